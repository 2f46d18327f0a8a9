"""What the server counts and times, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from folo_lib.request import RequestOutput
from folo_lib.serving import AsyncLLMEngine, RequestStream

__all__ = ["ServerMetrics"]

SECONDS = tuple(m * 10.0**e for e in (-3, -2, -1, 0, 1) for m in (1, 2, 5))
"""Upper ends of the histograms' bars: 1 ms, 2 ms, 5 ms, and so on to 50 s."""


class EngineCollector(Collector):
    """The state of the engine at the moment somebody asks."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.owner.stats
        usage = stats.num_used_blocks / stats.num_blocks
        for name, about, value in (
            (
                "folo_requests_running",
                "Samples in the running batch",
                stats.num_running,
            ),
            ("folo_requests_waiting", "Samples in the queue", stats.num_waiting),
            ("folo_kv_cache_usage_ratio", "Blocks that requests have, 0 to 1", usage),
            (
                "folo_prefix_cache_hit_ratio",
                "Tokens found in the cache, of all that started, 0 to 1",
                stats.prefix_hit_rate,
            ),
        ):
            yield GaugeMetricFamily(name, about, value)
        for name, about, count in (
            (
                "folo_preemptions",
                "Requests that lost their blocks",
                stats.num_preemptions,
            ),
            (
                "folo_prefix_tokens",
                "Tokens of prompts that started",
                stats.num_prefix_tokens,
            ),
            (
                "folo_prefix_hits",
                "Those of them found in the cache",
                stats.num_prefix_hits,
            ),
        ):
            yield CounterMetricFamily(name, about, count)


class ServerMetrics:
    """The metrics of one server; `/metrics` shows them.

    Args:
        engine: of the server.
    """

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.ttft = Histogram(
            "folo_time_to_first_token_seconds",
            "From arrival to first token",
            registry=self.registry,
            buckets=SECONDS,
        )
        self.itl = Histogram(
            "folo_inter_token_latency_seconds",
            "From one token to the next",
            registry=self.registry,
            buckets=SECONDS,
        )
        self.tokens = Counter(
            "folo_generated_tokens", "Tokens written", registry=self.registry
        )
        self.ended = Counter(
            "folo_requests_ended",
            "Requests by how they ended",
            ["reason"],
            registry=self.registry,
        )

    async def watch(
        self, stream: RequestStream, arrival: float, has_answer: bool = True
    ) -> AsyncIterator[RequestOutput]:
        """Passes the outputs of a stream on, and takes their times; closes it at the end.

        Args:
            stream: to read.
            arrival: when its request came, of `time.perf_counter()`.
            has_answer: False if the client sees its prompt alone, and so no token is counted.
        """
        last, num_tokens, reason = arrival, 0, "abort"
        try:
            async for output in stream:
                num_before, now = num_tokens, time.perf_counter()
                if has_answer:
                    num_tokens = sum(len(one.token_ids) for one in output.outputs)
                if num_tokens > num_before:  # an end may come without a token
                    (self.itl if num_before else self.ttft).observe(now - last)
                    last = now
                if output.finished:
                    reason = output.outputs[0].finish_reason or "abort"
                    if reason == "stop" and not has_answer:
                        reason = "length"  # as the client is told
                yield output
        finally:
            stream.close()
            self.tokens.inc(num_tokens)
            self.ended.labels(reason).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self.registry)
