"""How long somebody waits: the benchmark's section `latency`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from folo_lib.benchmark import BenchmarkError, Result, make_prompt
from folo_lib.benchmark_bench import Bench, LatencySizes
from folo_lib.benchmark_starts import Task, make_compile_cache, run_tasks
from folo_lib.engine import LLMEngine
from folo_lib.sampling_params import SamplingParams


def run_context(bench: Bench, sizes: LatencySizes) -> list[Result]:
    """The time per token of one request, after a short context and a long one."""
    rows = []
    for length in sizes.contexts:
        rows += bench.measure([bench.ours], length, sizes.num_tokens, ["tpot"])
    return rows


class Gaps:
    """Steps of an engine, and how long its requests wait between two tokens.

    Args:
        engine: with requests that were added to it.
        request_ids: those that are watched.

    Attributes:
        longest: for each step that brought them tokens, the longest such wait in seconds.
    """

    def __init__(self, engine: LLMEngine, request_ids: Sequence[str]) -> None:
        self.engine, self.request_ids = engine, frozenset(request_ids)
        self.last: dict[str, float] = {}
        self.longest: list[float] = []

    def step(self) -> set[str]:
        """One step; returns the requests that had a token, watched or not."""
        outputs = self.engine.step()
        if any(output.finished for output in outputs):
            errors = {str(output.error) for output in outputs if output.finished}
            raise RuntimeError(f"a request ended too early: {', '.join(errors)}")
        updated = {one.request_id for one in outputs}
        now, watched = time.perf_counter(), updated & self.request_ids
        waits = [now - self.last[one] for one in watched if one in self.last]
        if waits:
            self.longest.append(max(waits))
        self.last |= dict.fromkeys(watched, now)
        return updated


def measure_gaps(bench: Bench, engine: LLMEngine, sizes: LatencySizes) -> Result:
    """Gaps between tokens of requests that run, before a long prompt comes and after it."""
    vocab_size, num_steps = bench.config.vocab_size, sizes.num_steps
    params = SamplingParams(temperature=0, max_tokens=8 * num_steps, ignore_eos=True)
    prompts = [
        make_prompt(vocab_size, sizes.prompt_tokens, seed)
        for seed in range(sizes.running)
    ]
    added = [engine.add_request(prompt, params) for prompt in prompts]
    gaps = Gaps(engine, added)
    try:
        while len(gaps.last) < sizes.running:  # until all of them write
            gaps.step()
        for _ in range(4):  # to warm up
            gaps.step()
        gaps.longest.clear()
        while len(gaps.longest) < num_steps:
            gaps.step()
        before = max(gaps.longest)
        gaps.longest.clear()
        long_prompt = make_prompt(vocab_size, sizes.long_prompt, seed=sizes.running)
        arrived = time.perf_counter()
        added.append(engine.add_request(long_prompt, params))
        while added[-1] not in gaps.step():
            pass
        ttft = time.perf_counter() - arrived
        for _ in range(4):  # a gap that began before its first token ends after it
            gaps.step()
    finally:
        for request_id in added:
            engine.abort_request(request_id)
        while engine.has_unfinished_requests():
            engine.step()
    return {"before": before, "after": max(gaps.longest), "ttft": ttft}


def run_gaps(bench: Bench, sizes: LatencySizes) -> Result:
    """The longest gap of requests that run when a long prompt arrives; every run is kept."""
    longest = max(sizes.long_prompt, sizes.prompt_tokens) + 8 * sizes.num_steps
    options: dict[str, Any] = {"max_model_len": longest, "enable_prefix_caching": False}
    engine = LLMEngine(bench.model, **options)
    measure_gaps(bench, engine, sizes)  # to warm up
    runs = [measure_gaps(bench, engine, sizes) for _ in range(sizes.num_runs)]
    result: Result = {"running": sizes.running, "long_prompt": sizes.long_prompt}
    for name in ("before", "after", "ttft"):
        values = [run[name] for run in runs]
        result[name] = {"median": statistics.median(values), "values": values}
        print(f"{name} {1e3 * result[name]['median']:.1f} ms", flush=True)
    return result


def run_starts(bench: Bench, sizes: LatencySizes) -> list[Result]:
    """From the call of `LLMEngine` to the first token, compile cache empty and filled."""
    dtype = str(bench.dtype).removeprefix("torch.")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        task = Task(
            "first token",
            str(bench.folder),
            str(bench.device),
            dtype,
            bench.sizes.throughput,
            environment=make_compile_cache(cache),
        )
        for state in ("empty", "filled"):
            [made] = run_tasks([task], together=1)
            if "left_out" in made:
                raise BenchmarkError(made["left_out"])
            rows.append({"compile_cache": state, **made})
            seconds = made["first_token_seconds"]
            print(f"compile cache {state}: first token {seconds:.1f} s", flush=True)
    return rows


def run_latency(bench: Bench) -> Result:
    """How long one waits: per token, beside a long prompt, and at the very start.

    On an H200 it takes about two minutes.
    """
    sizes = bench.sizes.latency
    context = run_context(bench, sizes)
    bench.__dict__.pop("ours", None)  # its cache is memory that the next one needs
    bench.free_memory()
    gaps = run_gaps(bench, sizes)
    bench.free_memory()
    return {"context": context, "gaps": gaps, "starts": run_starts(bench, sizes)}
