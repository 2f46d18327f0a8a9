"""Measure the decode step on a GPU, for the figures of page 11.

    python tools/record_fast_decode.py notebooks/data/fast_decode_h200.json

Qwen3-0.6B's shape in bfloat16 with random weights (speed does not depend on their values), batch 1,
greedy, through LLMEngine. The file holds every run, with device, versions, command and date.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from folo_lib import LLMEngine, SamplingParams
from folo_lib.benchmark import QWEN3_0_6B
from folo_lib.qwen3 import Qwen3ForCausalLM


def make_model() -> Qwen3ForCausalLM:
    config = transformers.Qwen3Config(**QWEN3_0_6B)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def prompt_of(length: int) -> list[int]:
    tokens: list[int] = torch.randint(QWEN3_0_6B["vocab_size"], (length,)).tolist()
    return tokens


def measure(engine: LLMEngine, length: int, new: int, runs: int) -> dict[str, Any]:
    """TTFT and TPOT in ms, every run, after two that warm up."""
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    metrics = [
        engine.generate([prompt_of(length)], params, use_tqdm=False)[0].metrics
        for _ in range(runs + 2)
    ][2:]
    figures = {
        "prompt": length,
        "new": new,
        "ttft_ms": [1e3 * m.ttft for m in metrics],
        "tpot_ms": [1e3 * m.tpot for m in metrics],
    }
    ttft, tpot = (statistics.median(figures[k]) for k in ("ttft_ms", "tpot_ms"))
    print(
        f"  {length:5} in, {new:3} out: TTFT {ttft:7.2f} ms, TPOT {tpot:7.3f} ms",
        flush=True,
    )
    return figures


def profile_step(engine: LLMEngine, length: int = 128) -> dict[str, Any]:
    """Kernels of a decode step: how many, how long, and the host's time between tokens."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    stream = engine.stream(prompt_of(length), params)
    for _ in range(8):
        next(stream)
    torch.cuda.synchronize()
    steps = 4
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            next(stream)
        torch.cuda.synchronize()
    averages = profile.key_averages()
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    launches = [
        e.count for e in averages if "Launch" in e.key and e.key.startswith("cu")
    ]
    found = {
        "kernels_per_step": sum(e.count for e in kernels) / steps,
        "busy_ms": sum(e.self_device_time_total for e in kernels) / steps / 1e3,
        "launches_per_step": sum(launches) / steps,
        "longest": [
            {
                "kernel": e.key[:80],
                "per_step": e.count / steps,
                "us": e.self_device_time_total / e.count,
            }
            for e in kernels[:12]
        ],
    }
    print("  profile:", {k: v for k, v in found.items() if k != "longest"}, flush=True)
    return found


def record(model: Qwen3ForCausalLM, decode: str) -> dict[str, Any]:
    """All figures of one way to decode."""
    print(decode, flush=True)
    start = time.perf_counter()
    engine = LLMEngine(model, decode=decode, max_model_len=384, use_tqdm=False)
    found: dict[str, Any] = {"start_s": time.perf_counter() - start}
    torch.cuda.reset_peak_memory_stats()
    runs = {"cuda_graph": 9, "plain_cuda_graph": 5}[decode]
    found["main"] = measure(engine, 128, 256, runs)
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    found["profile"] = profile_step(engine)
    print(
        f"  started in {found['start_s']:.1f} s, peak {found['peak_bytes'] / 1e9:.3f} GB",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--decode", nargs="*", default=["cuda_graph", "plain_cuda_graph"]
    )
    args = parser.parse_args()
    model = make_model()
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "command": f"python tools/record_fast_decode.py {args.out.name}",
        "date": datetime.date.today().isoformat(),
        "shape": dict(QWEN3_0_6B),
        "weights": "random",
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "decode": {},
    }
    for decode in args.decode:
        results["decode"][decode] = record(model, decode)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
