"""What the benchmark measures: a function for each section of its file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch

from folo_lib.benchmark import (
    BenchmarkError,
    FoloLib,
    HuggingFace,
    Result,
    System,
    load_huggingface,
    make_prompt,
    measure_bandwidth,
    step_bytes,
    summarize,
    synchronize,
)
from folo_lib.benchmark_batch import run_batch
from folo_lib.benchmark_bench import Bench
from folo_lib.benchmark_latency import run_latency
from folo_lib.benchmark_serving import run_serving
from folo_lib.benchmark_tensor_parallel import run_tensor_parallel
from folo_lib.benchmark_throughput import run_throughput
from folo_lib.benchmark_timeline import run_timeline
from folo_lib.benchmark_tpot import run_tpot
from folo_lib.benchmark_waterfall import run_waterfall
from folo_lib.checkpoint import DTYPES, read_config
from folo_lib.sampling_params import SamplingParams


def run_decode(bench: Bench) -> Result:
    """One prompt, end to end: ours, Hugging Face by default and with static cache.

    The time to the first token is not claimed here: see `run_prefill`.
    """
    sizes = bench.sizes
    model, name = bench.theirs.model, "huggingface_static"
    others = [HuggingFace(model, name, cache_implementation="static"), *bench.peers]
    tokens = bench.check([bench.ours, *others], sizes.output_tokens)
    lengths = sizes.prompt_tokens, sizes.output_tokens
    rows = bench.compare([bench.theirs, *others], *lengths, ["tpot", "total"])
    return {"tokens": tokens, "rows": rows}


def run_prefill(bench: Bench) -> Result:
    """The time to the first token, for prompts of many lengths."""
    tokens = bench.check([bench.ours, *bench.peers], bench.sizes.context_tokens)
    rows: list[Result] = []
    for length in bench.sizes.prompts:
        rows += bench.compare([bench.theirs, *bench.peers], length, 1, ["ttft"])
    return {"tokens": tokens, "rows": rows}


def run_context(bench: Bench) -> Result:
    """The time per token after contexts of many lengths."""
    num_tokens = bench.sizes.context_tokens
    tokens = bench.check([bench.ours], num_tokens)
    rows: list[Result] = []
    for length in bench.sizes.contexts:
        rows += bench.compare([bench.theirs], length, num_tokens, ["tpot"])
    return {"tokens": tokens, "rows": rows}


def run_ladder(bench: Bench) -> Result:
    """The time per token of each rung."""
    sizes, (rungs, left_out) = bench.sizes, bench.rungs
    tokens = bench.check(rungs, sizes.ladder_tokens)
    rows = bench.measure(rungs, sizes.prompt_tokens, sizes.ladder_tokens, ["tpot"])
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}", flush=True)
    return {"tokens": tokens, "rows": rows, "left_out": left_out}


def run_profile(bench: Bench) -> Result:
    """What a decode step runs and how long it takes, for each rung with an engine."""
    sizes, (rungs, left_out) = bench.sizes, bench.rungs
    engines = [rung for rung in rungs if isinstance(rung, FoloLib)]
    tokens = bench.check(engines, sizes.ladder_tokens)
    rows = bench.measure(engines, sizes.prompt_tokens, sizes.output_tokens, ["tpot"])
    prompt = make_prompt(bench.config.vocab_size, sizes.prompt_tokens)
    profiles = {engine.name: profile_decode(engine, prompt) for engine in engines}
    return {"tokens": tokens, "rows": rows, "profiles": profiles, "left_out": left_out}


def profile_decode(system: FoloLib, prompt: list[int], num_steps: int = 4) -> Result:
    """Kernels of a decode step, operators on a CPU: how many, and how long they take."""
    warm_up = 4
    params = SamplingParams(
        temperature=0, max_tokens=warm_up + num_steps, ignore_eos=True
    )
    stream = system.engine.stream(prompt, params)
    for _ in islice(stream, warm_up):
        pass
    synchronize(system.device)
    with torch.profiler.profile() as profiler:
        for _ in stream:
            pass
        synchronize(system.device)
    events, on_gpu = profiler.key_averages(), system.device.type == "cuda"
    time_name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [
        {
            "kernel": event.key[:80],
            "per_step": event.count / num_steps,
            "us": getattr(event, time_name) / event.count,
        }
        for event in events
        if event.device_type.name == ("CUDA" if on_gpu else "CPU")
    ]
    kernels.sort(key=lambda kernel: -kernel["per_step"] * kernel["us"])
    launches = [
        event.count
        for event in events
        if event.key.startswith("cu") and "Launch" in event.key
    ]
    result: Result = {
        "kernels_per_step": sum(kernel["per_step"] for kernel in kernels),
        "busy_ms": sum(kernel["per_step"] * kernel["us"] for kernel in kernels) / 1e3,
        "launches_per_step": sum(launches) / num_steps,
    }
    print(f"profile of {system.name}: {json.dumps(result)}", flush=True)
    return result | {"longest": kernels[:12]}


def run_roofline(bench: Bench) -> Result:
    """Bytes per step, the speed of reading, and the least time for a step."""
    sizes = bench.sizes
    speeds = measure_bandwidth(bench.device, sizes.bandwidth_bytes, bench.num_runs)
    bandwidth = summarize(speeds)
    if bandwidth["spread"] > bench.max_spread:
        raise BenchmarkError(f"the bandwidth's spread is {bandwidth['spread']:.0%}.")
    print(f"reads {bandwidth['median'] / 1e9:,.0f} GB/s", flush=True)
    rows = []
    for context in (0, *sizes.contexts):
        size = step_bytes(bench.config, bench.dtype, context)
        rows.append({"context": context, "bytes": size})
        rows[-1]["seconds"] = size / bandwidth["median"]
        print(f"{context:6} tokens: {1e3 * rows[-1]['seconds']:.3f} ms", flush=True)
    return {"bandwidth": bandwidth, "rows": rows}


def get_peak_memory(device: torch.device) -> Result:
    """Most bytes used so far; None where the system does not tell."""
    if device.type == "cuda":
        return {
            "peak": torch.cuda.max_memory_allocated(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
        }
    status = Path("/proc/self/status")  # Linux; counts from the start of the program
    text = status.read_text() if status.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith("VmHWM")]
    return {"peak": int(lines[0].split()[1]) * 1024 if lines else None}


def run_alone(
    name: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    prompt_len: int,
    num_tokens: int,
) -> Result:
    """Loads one system and answers one prompt; this process has done nothing else."""
    start = time.perf_counter()
    system: System
    if name == "folo_lib":
        system = FoloLib(folder, device, dtype, max_model_len=prompt_len + num_tokens)
    else:
        options = {"cache_implementation": "static"} if "static" in name else {}
        system = HuggingFace(load_huggingface(folder, device, dtype), name, **options)
    loaded = time.perf_counter() - start
    vocab_size = read_config(folder).vocab_size
    run = system.generate(make_prompt(vocab_size, prompt_len), num_tokens)
    result = {"system": name, "prompt_tokens": prompt_len, "output_tokens": num_tokens}
    result |= {"load_seconds": loaded, "first_token_seconds": loaded + run.ttft}
    return result | get_peak_memory(device)


def alone_args(bench: Bench, name: str) -> list[str]:
    """The command line of `run_alone`."""
    dtype = next(key for key, value in DTYPES.items() if value == bench.dtype)
    sizes = [str(bench.sizes.prompt_tokens), str(bench.sizes.output_tokens)]
    return [name, str(bench.folder), str(bench.device), dtype, *sizes]


def parse_alone(values: Sequence[str]) -> Result:
    """`run_alone` with the arguments of `alone_args`."""
    name, folder, device, dtype, *sizes = values
    target = torch.device(device)
    return run_alone(name, Path(folder), target, DTYPES[dtype], *map(int, sizes))


def start_process(args: Sequence[str]) -> Result:
    """`run_alone` in a fresh process."""
    command = [sys.executable, "-m", "folo_lib.benchmark", "--alone", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise BenchmarkError(f"the process for {args[0]} failed:\n{last}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def run_memory(bench: Bench) -> Result:
    """Peak memory of each system, alone in a process; counted, so once."""
    rows = []
    for name in ("folo_lib", "huggingface", "huggingface_static"):
        rows.append(start_process(alone_args(bench, name)))
        print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


SECTIONS: Mapping[str, Callable[[Bench], Result]] = {
    "decode": run_decode,
    "prefill": run_prefill,
    "context": run_context,
    "memory": run_memory,
    "ladder": run_ladder,
    "profile": run_profile,
    "roofline": run_roofline,
    "batch": run_batch,
    "throughput": run_throughput,
    "waterfall": run_waterfall,
    "timeline": run_timeline,
    "latency": run_latency,
    "tpot": run_tpot,
    "serving": run_serving,
    "tensor_parallel": run_tensor_parallel,
}
