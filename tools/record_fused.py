"""Measure the fused decode step of page 15 on a GPU, for the figures of that page.

    python tools/record_fused.py notebooks/data/fused_decode_h200.json

Qwen3-0.6B's shape, random weights, bfloat16. A time is the median over five rounds of replays of
one CUDA graph that holds one step, and the floor is the time in which one kernel reads as many
bytes as the weights have. What a kernel takes is what the step is shorter without it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from graph_clock import record_graph, time_replays  # noqa: E402

from folo_lib import fused_attention, fused_decode  # noqa: E402
from folo_lib.benchmark import weight_bytes_per_step  # noqa: E402
from folo_lib.benchmark_floor import measure_reading  # noqa: E402
from folo_lib.fused_decode import FusedDecode  # noqa: E402
from folo_lib.kv_cache import allocate_kv_caches  # noqa: E402
from folo_lib.qwen3 import Qwen3ForCausalLM  # noqa: E402
from folo_lib.runner import RequestRows  # noqa: E402

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
BLOCK_SIZE, NUM_BLOCKS = 16, 4400
CONTEXTS = 256, 1024, 8192, 32768
BATCHES = 1, 2, 4, 8, 16
KERNELS = {  # by the names of the page: module, kernel, which launches of it
    "qkv": (fused_decode, "qkv_kernel", 0),
    "attention": (fused_attention, "attention_kernel", 0),
    "output": (fused_decode, "residual_kernel", 0),
    "gate_up": (fused_decode, "gate_up_kernel", 0),
    "down": (fused_decode, "residual_kernel", 1),
    "head": (fused_decode, "head_kernel", 0),
}


def measure(run: Callable[[], None], replays: int = 60) -> float:
    """Microseconds per replay."""
    return round(statistics.median(time_replays(run, 5, replays)), 1)


def make_model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        max_position_embeddings=40960, tie_word_embeddings=True, dtype=DTYPE,
    )  # fmt: skip
    with torch.device(DEVICE):
        return Qwen3ForCausalLM(config, "triton").to(DTYPE).eval()


def measure_floor(model: Qwen3ForCausalLM) -> dict[str, float]:
    """As the benchmark's section `tpot` does it, so that both count in the same floors."""
    size = weight_bytes_per_step(model.config, DTYPE)
    speed = statistics.median(measure_reading(DEVICE, size, num_runs=5, repeat=50))
    us, terabytes = round(1e6 * size / speed, 1), round(speed / 1e12, 2)
    return {"us": us, "gb": round(size / 1e9, 3), "tb_per_s": terabytes}


class Steps:
    """Steps of one model, over blocks that lie anywhere."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model = model
        self.kv_caches = allocate_kv_caches(
            model.config, NUM_BLOCKS, BLOCK_SIZE, DTYPE, DEVICE
        )
        for cache in [one for pair in self.kv_caches for one in pair]:
            cache.normal_()
        self.rows = RequestRows(17, 2560, model.config.vocab_size, DEVICE)
        vocab_size = model.config.vocab_size
        self.logits = torch.zeros(16, vocab_size, dtype=DTYPE, device=DEVICE)
        self.token_ids = torch.zeros(16, dtype=torch.int64, device=DEVICE)

    def make(self, num_seqs: int, context: int, pdl: bool = True) -> Callable[[], None]:
        """Launches a step of sequences that have `context` tokens with the newest."""
        needed = -(-context // BLOCK_SIZE)
        order = torch.randperm(NUM_BLOCKS)[: num_seqs * needed].view(num_seqs, needed)
        self.rows.block_table[:num_seqs, :needed] = order.to(DEVICE)
        last, place = order[:, -1], (context - 1) % BLOCK_SIZE
        full = torch.full((num_seqs,), context, device=DEVICE)
        columns = (
            torch.arange(num_seqs, device=DEVICE), full,
            torch.arange(num_seqs + 1, device=DEVICE), torch.full_like(full, -1),
            full - 1, (last * BLOCK_SIZE + place).to(DEVICE),
        )  # fmt: skip
        fused = FusedDecode(self.model, 2560, pdl)
        out = self.rows, self.kv_caches, self.logits, self.token_ids
        return lambda: fused.run(columns, *out)


@contextmanager
def left_out(name: str) -> Iterator[None]:
    """While it lasts, the kernel of that name is not launched."""
    module, attribute, which = KERNELS[name]
    kernel: Any = getattr(module, attribute)
    of_residual, count = attribute == "residual_kernel", 0

    class Skips:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                nonlocal count
                count += 1
                if of_residual and (count - 1) % 2 != which:
                    kernel[grid](*args, **options)

            return launch

    setattr(module, attribute, Skips())
    try:
        yield
    finally:
        setattr(module, attribute, kernel)


def count_bytes(model: Qwen3ForCausalLM, context: int) -> dict[str, int]:
    """What each kind of kernel must read of weights, or of the cache, in a step."""
    config = model.config
    layer: Any = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    token = config.num_key_value_heads * config.head_dim * 2
    numbers = {
        "qkv": attention.qkv_proj.weight.numel(),
        "attention": context * token,
        "output": attention.o_proj.weight.numel(),
        "gate_up": mlp.gate_up_proj.weight.numel(),
        "down": mlp.down_proj.weight.numel(),
    }
    layers = config.num_hidden_layers
    size = {name: count * 2 * layers for name, count in numbers.items()}
    return size | {"head": model.model.embed_tokens.weight.numel() * 2}


def record_trace(run: Callable[[], None], layers: int = 2) -> list[list[Any]]:
    """Name, start and end in microseconds of the kernels of some layers in the middle."""
    graph, _ = record_graph(run)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    events = sorted(
        (one for one in trace.events() if one.name.endswith("_kernel")),
        key=lambda one: one.time_range.start,
    )
    last = [i for i, one in enumerate(events) if one.name == "begin_kernel"][-1]
    some = events[last + 1 + 5 * 10 : last + 1 + 5 * (10 + layers)]
    first = some[0].time_range.start
    return [
        [
            one.name,
            round(one.time_range.start - first, 2),
            round(one.time_range.end - first, 2),
        ]
        for one in some
    ]


@torch.inference_mode()
def main(path: str) -> None:
    model = make_model()
    steps, floor = Steps(model), measure_floor(model)
    print("floor", floor, flush=True)
    cases = [(n, 256, True) for n in BATCHES] + [(1, c, True) for c in CONTEXTS[1:]]
    cases += [(1, 256, False)]
    rows = []
    for num_seqs, context, pdl in cases:
        us = measure(steps.make(num_seqs, context, pdl))
        rows.append({"num_seqs": num_seqs, "context": context, "pdl": pdl, "us": us})
        print(rows[-1], flush=True)
    whole, sizes, kernels = rows[0]["us"], count_bytes(model, 256), []
    for name in KERNELS:
        with left_out(name):
            us = round(whole - measure(steps.make(1, 256)), 1)
        launches = 1 if name == "head" else model.config.num_hidden_layers
        kernels.append(
            {"kernel": name, "launches": launches, "bytes": sizes[name], "us": us}
        )
        print(kernels[-1], flush=True)
    trace = {
        "pdl": record_trace(steps.make(1, 256, True)),
        "plain": record_trace(steps.make(1, 256, False)),
    }
    document = {
        "device": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": f"python tools/record_fused.py {Path(path).name}",
        "floor": floor,
        "steps": rows,
        "kernels": kernels,
        "trace": trace,
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
