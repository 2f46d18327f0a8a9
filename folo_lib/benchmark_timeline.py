"""What host and device do in a step, microsecond by microsecond: the section `timeline`.

The device's lane is a trace of torch's profiler. The host's lane names four things that an
engine does in a step, by wrapping its methods from outside: `schedule`, `launch`, `read`,
which waits for the device, and `update`, which is all that follows.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from folo_lib.benchmark import Result, make_prompt, synchronize
from folo_lib.benchmark_bench import Bench, TimelineSizes
from folo_lib.benchmark_throughput import check_runner
from folo_lib.benchmark_workloads import without_garbage
from folo_lib.engine import Groups, Inbox, LLMEngine
from folo_lib.sampling_params import SamplingParams

PHASES = ("schedule", "launch", "read", "update")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # in a trace of the profiler
MAX_GAP, MAX_INTERVALS = 1.0, 1500

DECODE = {
    (False, False): "eager",
    (True, False): "graph_plain",
    (False, True): "compile",
    (True, True): "graph",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    " + ".join(
        name
        for name, on in (
            (DECODE[graph, compiled], True),
            ("run-ahead", ahead),
        )
        if on
    ): {"decode": DECODE[graph, compiled], "async_scheduling": ahead}
    for graph, compiled, ahead in product((False, True), repeat=3)
}
"""Options of `LLMEngine` for each combination of graphs, compiled layers, and run-ahead."""


class InFlight:
    """A launched step whose `read` is clocked; all else is the step's own."""

    def __init__(self, step: Any, host: HostLane) -> None:
        self._step, self._host = step, host

    def read(self) -> Any:
        self._host.enter("read")
        output = self._step.read()
        self._host.enter("update")
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


class HostLane:
    """What an engine is doing, with a clock of its own and as ranges for the profiler.

    Args:
        engine: whose methods are wrapped while `attached`.
        inbox: of the requests that `step` advances.

    Attributes:
        steps: microseconds of each step by phase, and its `total`.
    """

    def __init__(self, engine: LLMEngine, inbox: Inbox) -> None:
        self.engine, self.inbox = engine, inbox
        self.steps: list[dict[str, float]] = []
        self.range: Any = None
        self.phase, self.since = "", 0.0

    def enter(self, phase: str) -> None:
        """Ends the phase that was, and begins another; `""` begins none."""
        now = time.perf_counter()
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.steps[-1][self.phase] += 1e6 * (now - self.since)
            self.range = None
        self.phase, self.since = phase, now
        if phase:
            self.range = record_function(f"host: {phase}")
            self.range.__enter__()

    def step(self) -> None:
        """One step of the engine."""
        self.steps.append(dict.fromkeys((*PHASES, "total"), 0.0))
        begin = time.perf_counter()
        self.engine.advance(self.inbox)
        self.enter("")
        self.steps[-1]["total"] = 1e6 * (time.perf_counter() - begin)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Wraps the scheduler's `schedule`, the executor's `launch`, and what it returns."""
        schedule, launch = self.engine.scheduler.schedule, self.engine.executor.launch

        def clocked_schedule() -> Any:
            self.enter("schedule")
            return schedule()

        def clocked_launch(plan: Any) -> Any:
            self.enter("launch")
            step = launch(plan)
            self.enter("")
            return InFlight(step, self)

        scheduler, executor = self.engine.scheduler, self.engine.executor
        with (
            mock.patch.object(scheduler, "schedule", clocked_schedule),
            mock.patch.object(executor, "launch", clocked_launch),
        ):
            yield


def coalesce(
    spans: Sequence[tuple[float, float]], gap: float = MAX_GAP
) -> list[tuple[float, float]]:
    """Spans of (begin, end), merged where no more than `gap` lies between two."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin - merged[-1][1] <= gap:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def write_spans(spans: Sequence[tuple[float, float]]) -> str:
    """Spans of (begin, end) in microseconds as `begin:duration`, which takes less room."""
    return " ".join(f"{begin:.1f}:{end - begin:.1f}" for begin, end in spans)


def read_spans(text: str) -> list[tuple[float, float]]:
    """(begin, duration) of each span that `write_spans` wrote, in microseconds."""
    pairs = (span.split(":") for span in text.split())
    return [(float(begin), float(duration)) for begin, duration in pairs]


def read_trace(events: Sequence[Result], num_steps: int) -> Result:
    """The last steps of a trace, as two lanes that begin at 0.

    Args:
        events: `traceEvents` of a trace in Chrome's format.
        num_steps: how many; as many schedules of the host are looked for.
    """
    host, kernels = [], []
    for event in events:
        if event.get("ph") != "X":
            continue
        name, begin = event["name"], float(event["ts"])
        span = name, begin, begin + float(event["dur"])
        if event.get("cat") == "user_annotation" and name.startswith("host: "):
            host.append((name.removeprefix("host: "), *span[1:]))
        elif event.get("cat") in DEVICE:
            kernels.append(span)
    host.sort(key=lambda span: span[1])
    start = [begin for name, begin, _ in host if name == "schedule"][-num_steps]
    host = [span for span in host if span[1] >= start]
    end = max(span[2] for span in host)
    inside = [span for span in kernels if start <= span[1] < end]
    busy = coalesce([(b - start, min(e, end) - start) for _, b, e in inside], 0)
    gap, shown = MAX_GAP, coalesce(busy)
    while len(shown) > MAX_INTERVALS:
        gap *= 2
        shown = coalesce(busy, gap)
    per_step = 1 / num_steps
    return {
        "us_per_step": (end - start) * per_step,
        "busy_us_per_step": sum(e - b for b, e in busy) * per_step,
        "host": {
            phase: write_spans(
                [(b - start, e - start) for n, b, e in host if n == phase]
            )
            for phase in PHASES
        },
        "gap_us": gap,
        "device": write_spans(shown),
        "kernels_per_step": len(inside) * per_step,
        "kernels": count_kernels(inside, num_steps),
    }


def count_kernels(
    spans: Sequence[tuple[str, float, float]], num_steps: int
) -> list[Result]:
    """Kernels by name: how many a step has, and microseconds of each; longest first."""
    durations: dict[str, list[float]] = {}
    for name, begin, end in spans:
        durations.setdefault(name, []).append(end - begin)
    rows = [
        {
            "kernel": name[:80],
            "per_step": len(us) / num_steps,
            "us": statistics.mean(us),
        }
        for name, us in durations.items()
    ]
    return sorted(rows, key=lambda row: -row["per_step"] * row["us"])


def of_one_layer(kernels: Sequence[Result], num_layers: int) -> list[Result]:
    """Those that every layer runs, with how often one layer does so."""
    return [
        {"kernel": row["kernel"], "per_layer": per_layer, "us": row["us"]}
        for row in kernels
        if (per_layer := int(row["per_step"]) // num_layers) > 0
    ]


def trace(device: torch.device, host: HostLane, num_steps: int) -> Result:
    """A trace of so many steps, after two that let the profiler settle."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=activities) as profiler:
        for _ in range(num_steps + 2):
            host.step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return read_trace(events, num_steps)


def check_unfinished(groups: Groups) -> None:
    """Raises a RuntimeError if a request has ended, so that a step would be too easy."""
    for [request] in groups:
        if request.status.is_finished:
            raise RuntimeError(f"a request ended too early: {request.error}")


def measure_batch(
    bench: Bench, engine: LLMEngine, num_requests: int, sizes: TimelineSizes
) -> Result:
    """Steps of so many requests that all write: clocked, and then some of them traced."""
    num_tokens = sizes.num_steps + sizes.num_traced + 16 + num_requests
    vocab_size, length = bench.config.vocab_size, sizes.prompt_tokens
    prompts = [make_prompt(vocab_size, length, seed) for seed in range(num_requests)]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    groups = engine.processor.process_requests(prompts, params)
    inbox = Inbox(every_token=False)
    host = HostLane(engine, inbox)
    engine.submit(groups, inbox)
    try:
        while engine.stats().num_waiting or not all(
            group[0].metrics.num_output_tokens for group in groups
        ):
            engine.advance(inbox)
            check_unfinished(groups)
        with host.attached():
            for _ in range(4):  # to warm up
                host.step()
            host.steps.clear()
            with without_garbage():
                for _ in range(sizes.num_steps):
                    host.step()
            check_unfinished(groups)
            names = (*PHASES, "total")
            median = {
                n: statistics.median(step[n] for step in host.steps) for n in names
            }
            made: Result = {"requests": num_requests, "host_us": median}
            if num_requests in sizes.traced:
                made["trace"] = trace(bench.device, host, sizes.num_traced)
                made["trace"]["layer"] = of_one_layer(
                    made["trace"].pop("kernels"), bench.config.num_hidden_layers
                )
                busy = made["trace"]["busy_us_per_step"]
                # The profiler slows the host down and not the device.
                made["busy_share"] = min(1.0, busy / median["total"])
    finally:
        engine.withdraw(groups)
    return made


def measure_setting(bench: Bench, options: Mapping[str, Any]) -> list[Result]:
    """All batches on one engine, with a model of its own: compiling may change a model."""
    sizes = bench.sizes.timeline
    longest = sizes.prompt_tokens + sizes.num_steps + sizes.num_traced + 32
    engine = LLMEngine(
        bench.folder,
        device=bench.device,
        dtype=bench.dtype,
        max_model_len=longest + max(sizes.batches),
        enable_prefix_caching=False,
        use_tqdm=False,
        **options,
    )
    check_runner(engine, options["decode"])
    rows = []
    for num_requests in sizes.batches:
        rows.append(measure_batch(bench, engine, num_requests, sizes))
        median = rows[-1]["host_us"]
        parts = ", ".join(f"{name} {us:,.0f}" for name, us in median.items())
        print(f"  {num_requests:3} requests, us: {parts}", flush=True)
    return rows


def run_timeline(bench: Bench) -> Result:
    """What host and device do in a step, for graphs, compiled layers, run-ahead on or off.

    On an H200 it takes about two minutes, most of which is starting eight engines.
    """
    settings: Result = {}
    left_out: dict[str, str] = {}
    for name, options in SETTINGS.items():
        print(f"-- {name}", flush=True)
        try:
            rows = measure_setting(bench, options)
        except (ValueError, TypeError, RuntimeError) as error:
            left_out[name] = f"{error}"[:300]
            print(f"left out: {error}", flush=True)
            continue
        settings[name] = {"options": dict(options), "rows": rows}
        bench.free_memory()
    return {"settings": settings, "left_out": left_out}
