"""What the benchmark measures: sizes, and a function for each section of its file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from folo_lib.benchmark import (
    MAX_SPREAD,
    MIN_RUNS,
    BenchmarkError,
    FoloLib,
    HuggingFace,
    Result,
    System,
    check_reference,
    check_tokens,
    describe_ratio,
    load_exact,
    load_huggingface,
    make_prompt,
    make_reference,
    measure,
    measure_bandwidth,
    step_bytes,
    summarize,
    synchronize,
)
from folo_lib.benchmark_systems import make_rungs, start_peers
from folo_lib.checkpoint import DTYPES, load_model, read_config
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen3Config


@dataclass(frozen=True)
class Sizes:
    """How long the prompts and answers of each section are."""

    prompt_tokens: int = 128
    output_tokens: int = 256
    prompts: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    contexts: Sequence[int] = (128, 512, 2048, 8192)
    context_tokens: int = 32
    ladder_tokens: int = 64
    bandwidth_bytes: int = 2**32

    def cut(self, max_model_len: int) -> Sizes:
        """Without what a model cannot hold."""
        longest = max_model_len - self.context_tokens
        return replace(
            self,
            prompts=[length for length in self.prompts if length <= longest],
            contexts=[length for length in self.contexts if length <= longest],
        )

    @property
    def max_model_len(self) -> int:
        """What an engine must hold for all of it."""
        longest = max([*self.prompts, *self.contexts], default=0)
        ours = longest + self.context_tokens
        return max(ours, self.prompt_tokens + self.output_tokens)


QUICK = Sizes(
    output_tokens=64,
    prompts=(32, 128, 512, 2048),
    contexts=(128, 512, 2048),
    ladder_tokens=32,
    bandwidth_bytes=2**27,
)


@dataclass
class Bench:
    """What the sections share. Systems are started when first needed."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    num_runs: int = MIN_RUNS
    max_spread: float = MAX_SPREAD

    @cached_property
    def config(self) -> Qwen2Config | Qwen3Config:
        return read_config(self.folder)

    @cached_property
    def ours(self) -> FoloLib:
        length = self.sizes.max_model_len
        return FoloLib(self.folder, self.device, self.dtype, length)

    @cached_property
    def model(self) -> Qwen3ForCausalLM:
        """Ours without an engine, for its logits."""
        return load_model(self.folder, self.dtype, self.device, use_tqdm=False)

    @cached_property
    def theirs(self) -> HuggingFace:
        return HuggingFace(load_huggingface(self.folder, self.device, self.dtype))

    @cached_property
    def exact(self) -> Qwen3ForCausalLM:
        return load_exact(self.folder, self.device, self.dtype)

    @cached_property
    def peers(self) -> list[System]:
        on_gpu = self.device.type == "cuda"
        return start_peers(self.folder, self.sizes.max_model_len) if on_gpu else []

    @cached_property
    def rungs(self) -> tuple[list[System], dict[str, str]]:
        sizes = self.sizes
        length = sizes.prompt_tokens + max(sizes.ladder_tokens, sizes.output_tokens)
        return make_rungs(self.folder, self.device, self.dtype, length)

    def check(self, systems: Sequence[System], num_tokens: int) -> Result:
        """What the tokens of the systems were compared with, and how it went."""
        prompt = make_prompt(self.config.vocab_size, self.sizes.prompt_tokens)
        models = self.model, self.exact
        reference = make_reference(self.theirs, *models, prompt, num_tokens)
        check_reference(reference, self.dtype)
        lost = {system.name: check_tokens(system, reference) for system in systems}
        result: Result = {"steps": num_tokens, "decided": reference.num_decided}
        result |= {"error": reference.error / reference.std, "near_ties_lost": lost}
        print(f"tokens agree where decided: {json.dumps(result)}", flush=True)
        return result

    def measure(
        self,
        systems: Sequence[System],
        prompt_len: int,
        num_tokens: int,
        times: Sequence[str],
    ) -> list[Result]:
        """See the function `measure`."""
        options = self.config.vocab_size, self.num_runs, self.max_spread
        return measure(systems, prompt_len, num_tokens, *options, times)

    def compare(
        self,
        others: Sequence[System],
        prompt_len: int,
        num_tokens: int,
        times: Sequence[str],
    ) -> list[Result]:
        """Ours and others in turns; prints their ratios too, which is what counts."""
        rows = self.measure([self.ours, *others], prompt_len, num_tokens, times)
        for row in rows[1:]:
            for name in times:
                print(describe_ratio(row, rows[0], name), flush=True)
        return rows


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
}
