"""From the naive engine to today's, rung by rung: the benchmark's section `waterfall`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from folo_lib.benchmark import Result
from folo_lib.benchmark_batch import check_answers
from folo_lib.benchmark_bench import Bench
from folo_lib.benchmark_starts import Task, run_tasks
from folo_lib.config import EngineConfig


@dataclass(frozen=True)
class Rung:
    """One step on the way.

    Attributes:
        task: a key of `TASKS`.
        num_requests: the first of the workload, which it answers; slow ones get few.
        options: for `LLMEngine`.
        many_starts: whether it is measured in several processes.
    """

    task: str
    num_requests: int
    options: Mapping[str, Any] = field(default_factory=dict)
    many_starts: bool = False


TRITON = {"attention_backend": "triton", "async_scheduling": False}
SDPA = {"attention_backend": "torch_sdpa", "async_scheduling": False}

RUNGS: Mapping[str, Rung] = {
    "no KV cache": Rung("no cache", 1),
    "KV cache": Rung("engine", 2, {"scheduler": "fcfs", "decode": "eager", **SDPA}),
    "many at once": Rung("engine", 32, {"decode": "eager", **SDPA}),
    "Triton attention": Rung("engine", 256, {"decode": "eager", **TRITON}),
    "CUDA graphs": Rung("engine", 256, {"decode": "graph_plain", **TRITON}, True),
    "compiled": Rung("engine", 256, {"decode": "graph", **TRITON}, True),
    "run-ahead": Rung(
        "engine", 256, {"decode": "graph", **TRITON, "async_scheduling": True}, True
    ),
    "fused": Rung(
        "engine", 256, {"decode": "fused", **TRITON, "async_scheduling": True}, True
    ),
}


def find_rungs(bench: Bench) -> tuple[dict[str, Rung], dict[str, str]]:
    """The rungs that are to be had here, and why the others are not."""
    rungs, left_out = dict[str, Rung](), dict[str, str]()
    for name in bench.waterfall_rungs or RUNGS:
        rung = RUNGS[name]
        try:
            EngineConfig.from_options({"device": bench.device, **rung.options})
        except (ValueError, TypeError) as error:
            left_out[name] = str(error)
            print(f"{name:18} left out: {error}", flush=True)
        else:
            rungs[name] = rung
    return rungs, left_out


def make_tasks(bench: Bench, rungs: Mapping[str, Rung]) -> list[tuple[str, Task]]:
    """Rungs with their tasks, in the order of measuring: the starts of each take turns."""
    sizes, dtype = bench.sizes.throughput, str(bench.dtype).removeprefix("torch.")
    columns = []
    for name, rung in rungs.items():
        few = min(rung.num_requests, sizes.num_requests)
        args = rung.task, str(bench.folder), str(bench.device), dtype, sizes, few
        task = Task(*args, rung.options)
        columns.append([(name, task)] * (bench.sizes.starts if rung.many_starts else 1))
    return [one for turn in zip_longest(*columns) for one in turn if one is not None]


def run_waterfall(bench: Bench) -> Result:
    """The mixed workload on each rung: tokens per second in every start.

    Slow rungs answer its first requests only; every row says how many. On an H200 all of
    it takes 7 to 12 minutes, as the host is fast or slow, so it may be recorded in parts.
    """

    def check(task: Task, answers: list[list[int]]) -> None:
        check_answers(bench, task.get_few(bench.config.vocab_size), answers)

    rungs, left_out = find_rungs(bench)
    tasks = make_tasks(bench, rungs)
    results = run_tasks([task for _, task in tasks], bench.sizes.together, check)
    starts: dict[str, list[Result]] = {name: [] for name in rungs}
    for (name, _), result in zip(tasks, results, strict=True):
        if "left_out" in result:  # it fits the device and not the model
            left_out[name] = result["left_out"]
            print(f"{name:18} left out: {left_out[name]}", flush=True)
        else:
            starts[name].append(result)
    rows: list[Result] = []
    for name, made in starts.items():
        if made:
            speeds = [one["tokens_per_second"] for one in made]
            row: Result = {"rung": name, "options": dict(rungs[name].options)}
            row |= {"requests": made[0]["requests"], "starts": made}
            rows.append(row | {"tokens_per_second": statistics.median(speeds)})
            shown = ", ".join(f"{speed:,.0f}" for speed in speeds)
            print(f"{name:18} {shown} tokens/s", flush=True)
    return {"rows": rows, "left_out": left_out}
