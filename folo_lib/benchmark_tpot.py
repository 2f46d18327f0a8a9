"""The time per token of a few requests, in floors: the benchmark's section `tpot`.

A floor is what it takes to read the weights once, and it is measured in the same run. No step
can be shorter, so the time of a step divided by it says how far there is still to go.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from folo_lib.benchmark import Result, measure_bandwidth, weight_bytes_per_step
from folo_lib.benchmark_batch import check_answers
from folo_lib.benchmark_bench import Bench
from folo_lib.benchmark_starts import Task, make_compile_cache, run_tasks
from folo_lib.benchmark_throughput import ask, check_runner, clocked, describe_engine
from folo_lib.benchmark_workloads import make_equal, make_few, measure_few
from folo_lib.engine import LLMEngine
from folo_lib.kv_cache import kv_bytes_per_token

TEMPERATURE = 0.7
FILTERS: dict[str, Any] = {"top_p": 0.9, "top_k": 50, "seed": 0}


def find_reader(device: torch.device) -> Callable[..., list[float]]:
    """What reads memory fastest: on a GPU a kernel of our own, where there is Triton."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        floor: Any = importlib.import_module("folo_lib.benchmark_floor")
        reader: Callable[..., list[float]] = floor.measure_reading
        return reader
    return measure_bandwidth


def measure_floor(bench: Bench) -> Result:
    """The bytes of the weights, and the time that it takes to read as many."""
    size = weight_bytes_per_step(bench.config, bench.dtype)
    read = find_reader(bench.device)
    speeds = read(bench.device, size, bench.num_runs, repeat=50)
    seconds = [size / speed for speed in speeds]
    floor: Result = {"bytes": size, "ms": 1e3 * statistics.median(seconds)}
    floor["spread"] = 1e3 * (max(seconds) - min(seconds)) / floor["ms"]
    print(f"the floor is {floor['ms']:.4f} ms, {size / 1e9:.3f} GB", flush=True)
    return floor | {"seconds": seconds}


def add_floors(bench: Bench, rows: Sequence[Result], floor: Result) -> None:
    """Writes into rows how many floors a token takes, and with the cache at least.

    What must be read beside the weights are keys and values, of the middle step here.
    """
    token = kv_bytes_per_token(bench.config, bench.dtype)
    for row in rows:
        context = row["prompt_tokens"] + row["output_tokens"] / 2
        cache = row["requests"] * context * token
        row["floors"] = row["tpot_ms"] / floor["ms"]
        row["least_floors"] = 1 + cache / floor["bytes"]
        size = f"{row['requests']:2} requests of {row['prompt_tokens']} tokens"
        times = f"{row['tpot_ms']:.3f} ms, {row['floors']:.2f} floors"
        print(f"{size}: {times} (at least {row['least_floors']:.2f})", flush=True)


def run_rows(bench: Bench, floor: Result) -> Result:
    """One engine, as a user would start it: greedy, then with filters and a seed."""
    sizes, vocab_size = bench.sizes.throughput, bench.config.vocab_size
    begin = time.perf_counter()
    engine = LLMEngine(
        bench.model, max_model_len=sizes.max_model_len, enable_prefix_caching=False
    )
    check_runner(engine, "fused" if bench.device.type == "cuda" else "eager")
    parts = describe_engine(engine, bench.model)
    parts["start_seconds"] = time.perf_counter() - begin
    print(f"{parts['runner']} after {parts['start_seconds']:.0f} s", flush=True)
    length = min(32, sizes.output_tokens)
    some = [make_equal(sizes, vocab_size, n, length) for n in sizes.few]
    parts["tokens"] = [check_answers(bench, one, ask(engine, one, 0)) for one in some]
    few, num_runs = make_few(sizes, vocab_size), sizes.num_runs
    greedy = measure_few(clocked(engine, bench.device), few, 0, num_runs)
    run = clocked(engine, bench.device, **FILTERS)
    ends = [few[0], few[len(sizes.few) - 1]]  # the fewest requests and the most
    sampled = measure_few(run, ends, TEMPERATURE, num_runs)
    add_floors(bench, greedy["rows"], floor)
    add_floors(bench, sampled["rows"], floor)
    add_difference(sampled["rows"], greedy["rows"])
    sampled["options"] = {"temperature": TEMPERATURE, **FILTERS}
    return parts | greedy | {"sampled": sampled}


def add_difference(sampled: Sequence[Result], greedy: Sequence[Result]) -> None:
    """Writes into sampled rows how many ms more a step takes than a greedy one."""
    times = {(row["requests"], row["prompt_tokens"]): row["tpot_ms"] for row in greedy}
    for row in sampled:
        same = times.get((row["requests"], row["prompt_tokens"]))
        row["more_ms"] = None if same is None else row["tpot_ms"] - same


def run_starts(bench: Bench, floor: Result) -> Result:
    """One request in several fresh processes, each of which compiles all its kernels."""
    sizes, vocab_size = bench.sizes, bench.config.vocab_size
    dtype = str(bench.dtype).removeprefix("torch.")
    # One row and its few graphs: more of them take longer and make a step no different.
    options: dict[str, Any] = {"max_num_seqs": 1}
    if bench.device.type == "cuda":
        options["decode"] = "fused"
    with tempfile.TemporaryDirectory() as scratch:
        tasks = [
            Task(
                "tpot",
                str(bench.folder),
                str(bench.device),
                dtype,
                sizes.throughput,
                options=options,
                environment=make_compile_cache(f"{scratch}/{start}"),
            )
            for start in range(sizes.starts)
        ]
        made = run_tasks(
            tasks,
            sizes.together,
            lambda task, answers: check_answers(
                bench, task.get_few(vocab_size), answers
            ),
        )
    rows = [one for one in made if "left_out" not in one]
    left_out = [one["left_out"] for one in made if "left_out" in one]
    for reason in left_out:
        print(f"a start was left out: {reason}", flush=True)
    add_floors(bench, rows, floor)
    result: Result = {"options": options, "rows": rows, "left_out": left_out}
    if rows:
        times = [row["tpot_ms"] for row in rows]
        spread = (max(times) - min(times)) / statistics.median(times)
        result["spread"] = spread
        print(f"{len(rows)} starts differ by {spread:.1%}", flush=True)
    return result


def run_tpot(bench: Bench) -> Result:
    """The time per token of a few requests and of long contexts, in floors.

    vLLM is measured on the same workloads by `folo_lib.benchmark_vllm`. On an H200 all of
    it takes about two minutes, half of which are the starts.
    """
    floor = measure_floor(bench)
    bench.free_memory()
    result: Result = {"floor": floor, **run_rows(bench, floor)}
    bench.free_memory()  # the engine's cache, before others get ready beside it
    return result | {"starts": run_starts(bench, floor)}
