"""vLLM on the workloads of the benchmark, in a process of its own.

    python -m folo_lib.benchmark_vllm --out FILE.json

It has its own requirements, so it may need another environment, or another `PYTHONPATH`.
The result is added to a file that the benchmark has begun on the same device, as one
recording of the section `vllm`; start it twice, and both are kept. With `--serving` its
engine for an event loop is measured instead, on the streams of the section `serving`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from folo_lib.benchmark_workloads import (
    QWEN3_0_6B,
    Clocked,
    Result,
    ThroughputSizes,
    Workload,
    describe_runs,
    make_equal,
    make_few,
    make_mixed,
    measure_few,
    measure_throughput,
)


def write_config(folder: Path) -> None:
    """A `config.json` of Qwen3-0.6B's shape, for weights that vLLM draws itself."""
    config: Result = dict(QWEN3_0_6B) | {"model_type": "qwen3"}
    config |= {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"}
    # The names that transformers had before version 5, for an older one.
    config |= {"rope_theta": 1e6, "torch_dtype": config["dtype"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def make_options(folder: Path, has_weights: bool, max_model_len: int) -> Result:
    """What vLLM is started with: its defaults, but for what a fair comparison asks."""
    return {
        "model": str(folder),
        "load_format": "auto" if has_weights else "dummy",
        "dtype": "bfloat16",
        "max_model_len": max_model_len,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }


def start(options: Result) -> Clocked:
    """An engine of vLLM's that answers workloads of token ids."""
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(**options)

    def run(workload: Workload, temperature: float) -> float:
        params = [
            vllm.SamplingParams(
                temperature=temperature,
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
            )
            for length in workload.lengths
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        written = [len(output.outputs[0].token_ids) for output in outputs]
        if written != workload.lengths:
            raise RuntimeError("vLLM wrote other numbers of tokens than it was asked.")
        return seconds

    return run


def get_device_name() -> str:
    """The GPU's name, or the processor's; CUDA is left for vLLM's processes to start."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return platform.processor()
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip()


def read_record(path: Path, device: str) -> Result:
    """The benchmark's file, to which vLLM's result is added.

    Raises:
        SystemExit: if there is none, or it was recorded on another device.
    """
    if not path.is_file():
        raise SystemExit(
            f"{path.name} does not exist: run `python -m folo_lib.benchmark --out "
            f"{path.name}` on this device first, since a comparison needs both."
        )
    record: Result = json.loads(path.read_text(encoding="utf-8"))
    if record["setup"]["device"] != device:
        raise SystemExit(
            f"{path.name} was recorded on {record['setup']['device']} and this is "
            f"{device}: results of two devices do not belong in one file."
        )
    return record


def add_recording(path: Path, section: str, made: Result) -> None:
    """Adds one recording to a section; the file is whole at any time."""
    record = read_record(path, get_device_name())  # with what was added meanwhile
    record["sections"].setdefault(section, []).append(made)
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    half.replace(path)


def get_versions(torch: Any) -> dict[str, str]:
    """Of what a result depends on."""
    versions = {"vllm": importlib.import_module("vllm").__version__}
    return versions | {"torch": torch.__version__, "python": platform.python_version()}


async def time_streams(
    engine: Any, workload: Workload, name: str
) -> tuple[float, float]:
    """Seconds for streams that begin together, and until the first token on average."""
    vllm: Any = importlib.import_module("vllm")
    delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
    begin = time.perf_counter()

    async def read(number: int) -> float:
        length, first, num_tokens = workload.lengths[number], 0.0, 0
        params = vllm.SamplingParams(
            temperature=0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            output_kind=delta,
        )
        prompt = {"prompt_token_ids": workload.prompts[number]}
        async for output in engine.generate(prompt, params, f"{name}-{number}"):
            num_tokens += len(output.outputs[0].token_ids)
            first = first or time.perf_counter() - begin
        if num_tokens != length:
            raise RuntimeError(f"a stream of vLLM's ended after {num_tokens} tokens.")
        return first

    firsts = await asyncio.gather(*map(read, range(len(workload.lengths))))
    return time.perf_counter() - begin, statistics.mean(firsts)


async def run_streams(options: Result, workload: Workload, num_runs: int) -> Result:
    """vLLM's engine for an event loop: all streams together, then one alone."""
    vllm: Any = importlib.import_module("vllm")
    begin = time.perf_counter()
    engine = vllm.AsyncLLMEngine.from_engine_args(
        vllm.AsyncEngineArgs(**options, disable_log_stats=True)
    )
    try:
        started = time.perf_counter() - begin
        print(f"vLLM is ready after {started:.0f} s", flush=True)
        alone = workload.first(1).shortened(2)
        seconds, first = [], []
        for i in range(num_runs + 1):  # the first warms up
            seconds.append((await time_streams(engine, workload, f"all-{i}"))[0])
            first.append((await time_streams(engine, alone, f"one-{i}"))[1])
            print(f"{workload.num_tokens / seconds[-1]:10,.1f} tokens/s", flush=True)
    finally:
        engine.shutdown()
    made = describe_runs(workload, seconds[1:])
    return {
        "start_seconds": started,
        "ttft_alone": statistics.median(first[1:]),
        **made,
    }


def measure_serving(
    folder: Path, has_weights: bool, sizes: Result, vocab_size: int
) -> Result:
    """The streams of the section `serving` on vLLM; `sizes` are that section's.

    On an H200 it takes about one minute and a half, most of which is the start.
    """
    import torch

    date = datetime.now(UTC).isoformat(timespec="seconds")
    begin = time.perf_counter()
    options = make_options(folder, has_weights, max_model_len=1024)
    equal = ThroughputSizes(prompt_tokens=32, largest_id=vocab_size - 1)
    num_tokens = sizes["stream_tokens"]
    workload = make_equal(equal, vocab_size, sizes["streams"], num_tokens)
    made = asyncio.run(run_streams(options, workload, sizes["num_runs"]))
    del options["model"]
    return {
        "date": date,
        "command": "python -m folo_lib.benchmark_vllm --serving",
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": get_versions(torch),
        "options": options,
        **made,
    }


def measure(
    folder: Path, has_weights: bool, sizes: ThroughputSizes, vocab_size: int
) -> Result:
    """Starts vLLM and measures all workloads: one recording, with where it comes from.

    On an H200 it takes about three minutes, one of which is the start.
    """
    import torch

    date = datetime.now(UTC).isoformat(timespec="seconds")
    begin = time.perf_counter()
    longest = max(make_mixed(sizes, vocab_size).max_model_len, sizes.max_model_len)
    options = make_options(folder, has_weights, longest)
    run = start(options)
    versions = get_versions(torch)
    started = time.perf_counter() - begin
    print(f"vLLM is ready after {started:.0f} s", flush=True)
    made = measure_throughput(run, sizes, vocab_size)
    made["tpot"] = measure_few(run, make_few(sizes, vocab_size), 0, sizes.num_runs)
    del options["model"]
    return {
        "date": date,
        "command": "python -m folo_lib.benchmark_vllm",
        "seconds": round(time.perf_counter() - begin, 1),
        "start_seconds": started,
        "versions": versions,
        "options": options,
        **made,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m folo_lib.benchmark_vllm`; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m folo_lib.benchmark_vllm",
        description="Measure vLLM on the workloads of folo_lib.benchmark.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="to be added to")
    add("--model", type=Path, help="a folder; default: random weights, as Qwen3-0.6B's")
    add("--serving", action="store_true", help="streams, for the section `serving`")
    args = parser.parse_args(argv)
    record = read_record(args.out, get_device_name())
    served = record["sections"].get("serving")
    if args.serving and served is None:
        parser.error(f"{args.out.name} has no section `serving` to compare with.")
    sizes = ThroughputSizes(**record["setup"]["sizes"]["throughput"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        if args.model is None:
            write_config(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        has_weights = any(folder.glob("*.safetensors"))
        about = folder, has_weights
        if args.serving:
            made = measure_serving(*about, served[-1]["sizes"], config["vocab_size"])
        else:
            made = measure(*about, sizes, config["vocab_size"])
    add_recording(args.out, "vllm_serving" if args.serving else "vllm", made)


if __name__ == "__main__":
    main()
