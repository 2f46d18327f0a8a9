"""Measure the kernels of page 13 on a GPU, for the figures of its section 8.

    python tools/record_kernels.py notebooks/data/paged_attention_h200.json

A time is the median over replays of a CUDA graph that holds one call for each of several steps.
Each step has blocks of its own, so that its keys come from memory and not from the card's cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from graph_clock import WARM_SECONDS, time_replays  # noqa: E402

from folo_lib import paged_attention as module, tile_sizes  # noqa: E402
from folo_lib.benchmark_floor import SIZE, measure_reading, read_once  # noqa: E402
from folo_lib.kv_cache import (  # noqa: E402
    AttentionMetadata,
    TorchSDPABackend,
    compute_slot_mapping,
)
from folo_lib.tile_sizes import DECODE  # noqa: E402

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 16  # as Qwen3-0.6B
NUM_BLOCKS = 2**16  # 4.3 GB of keys and values
LONGEST = 40_960  # tokens that the block table has room for, as in an engine for Qwen3
UNEQUAL = torch.randint(200, 1601, (256,), generator=torch.Generator().manual_seed(0))
DECODES = {
    "256x800": [800] * 256,
    "64x800": [800] * 64,
    "32x600": [600] * 32,
    "1x32768": [32768],
    "1x8000 and 31x300": [8000] + [300] * 31,
    "1x30000 and 63x500": [30000] + [500] * 63,
    "20x3000": [3000] * 20,
    "1x128": [128],
    "8x512": [512] * 8,
    "8x8192": [8192] * 8,
    "256x200..1600": UNEQUAL.tolist(),
}
PREFILLS = {  # tokens that run, and all tokens
    "8192": ([8192], [8192]),
    "2048 after 6144": ([2048], [8192]),
    "4x512": ([512] * 4, [512] * 4),
    "20 after 30000": ([20], [30020]),
}
SPLIT = ("1x32768", "8x8192", "20x3000", "1x8000 and 31x300")
SPLITS = (1, 2, 4, 6, 8, 16, 32, 64, 128)
STORED, LONG = 256, "1x32768"

Step = tuple[Tensor, AttentionMetadata]
Call = Callable[[], object]


def measure(
    calls: Sequence[Callable[[], object]], replays: int = 7, warm: float = WARM_SECONDS
) -> float:
    """Microseconds per call."""
    times = time_replays(lambda: [call() for call in calls], replays, 1, warm)
    return round(statistics.median(times) / len(calls), 2)


def describe_card() -> dict[str, Any]:
    """Its name, and how fast it multiplies, reads and copies."""
    x = torch.randn(2**30, device=DEVICE)
    y = torch.empty_like(x)
    copy = measure([lambda: y.copy_(x)] * 4)
    speeds = measure_reading(DEVICE, x.nbytes, 7, 4)
    a = torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE)
    # Rested and briefly: a card that multiplies for 30 ms takes more power than it may, and
    # slows down by a tenth.
    time.sleep(0.5)
    multiply = measure([lambda: a @ a] * 3, warm=0)
    return {
        "device": torch.cuda.get_device_name(),
        "multiprocessors": tile_sizes.count_multiprocessors(DEVICE),
        "matmul_tflops": round(2 * 8192**3 / multiply / 1e6, 1),
        "read_gb_s": round(statistics.median(speeds) / 1e9, 1),
        "copy_gb_s": round(2 * x.nbytes / copy / 1e3, 1),
    }


def make_steps(
    query_lens: Sequence[int], seq_lens: Sequence[int], most: int = 24
) -> list[Step]:
    """Queries and metadata of up to `most` steps, over different blocks in random order."""
    needed = [-(-length // BLOCK_SIZE) for length in seq_lens]
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0))
    steps = []
    for i in range(max(1, min(most, NUM_BLOCKS // sum(needed)))):
        own = order[i * sum(needed) : (i + 1) * sum(needed)]
        rows = [row.tolist() for row in own.split(needed)]
        slots = [
            slot
            for row, new, end in zip(rows, query_lens, seq_lens, strict=True)
            for slot in compute_slot_mapping(row, end - new, end, BLOCK_SIZE)
        ]
        width = max([*needed, LONGEST // BLOCK_SIZE])
        table = [row + [0] * (width - len(row)) for row in rows]
        metadata = AttentionMetadata(
            block_size=BLOCK_SIZE,
            slot_mapping=torch.tensor(slots, device=DEVICE),
            block_table=torch.tensor(table, device=DEVICE),
            query_start_loc=torch.tensor([0, *accumulate(query_lens)], device=DEVICE),
            seq_lens=torch.tensor(seq_lens, device=DEVICE),
            query_lens_list=list(query_lens),
            seq_lens_list=list(seq_lens),
        )
        query = torch.randn(sum(query_lens), HEADS, HEAD_DIM, device=DEVICE)
        steps.append((query.to(DTYPE), metadata))
    return steps


def plan(metadata: AttentionMetadata) -> module.AttentionPlan:
    """What each program of a decode step is to do, if any lengths have to be expected."""
    unknown = replace(metadata, seq_lens_list=[])
    return module.make_plan(unknown, KV_HEADS, DECODE)


def count_splits(metadata: AttentionMetadata) -> int:
    """Of the sequence that has most."""
    return int(plan(metadata).programs[:, 4].max())


def bind_decode(caches: Tensor, query: Tensor, metadata: AttentionMetadata) -> Call:
    """`decode`, whose plan is made before."""
    where, output = (metadata.block_table, plan(metadata)), torch.empty_like(query)
    return partial(module.decode, query, *caches, *where, output, HEAD_DIM**-0.5)


def bind_prefill(caches: Tensor, query: Tensor, metadata: AttentionMetadata) -> Call:
    """`prefill`, whose plan is made before."""
    output = torch.empty_like(query)
    sizes = tile_sizes.choose_prefill_sizes(DTYPE, HEAD_DIM, DEVICE)
    num_queries = sizes.count_queries(HEADS // KV_HEADS)
    plan = module.make_plan(metadata, KV_HEADS, sizes, num_queries)
    return partial(
        module.prefill, query, *caches, metadata, plan, output, HEAD_DIM**-0.5
    )


def time_kernel(
    bind: Callable[[Tensor, Tensor, AttentionMetadata], Call],
    caches: Tensor,
    steps: list[Step],
    replays: int = 7,
) -> float:
    """Of what `bind` makes of each step."""
    return measure([bind(caches, *step) for step in steps], replays)


def draw_new(num_tokens: int) -> Tensor:
    """Keys and values of new tokens."""
    return torch.randn(2, num_tokens, KV_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)


def time_torch_sdpa(caches: Tensor, steps: list[Step]) -> float:
    """PyTorch's backend of page 06. It stores the new keys and values, too."""
    backend, new = TorchSDPABackend(), draw_new(len(steps[0][0]))
    calls = [
        lambda query=query, metadata=metadata: backend.forward(
            query, *new, tuple(caches), metadata
        )
        for query, metadata in steps[:4]
    ]
    for call in calls:  # plans its reads before it is captured
        call()
    return measure(calls, 3)


def time_flash(query_lens: list[int], seq_lens: list[int]) -> float:
    """PyTorch's flash kernel, over keys in one piece and of every query head its own."""
    num_seqs, new, length = len(query_lens), query_lens[0], seq_lens[0]
    query, key, value = (
        torch.randn(num_seqs, HEADS, n, HEAD_DIM, device=DEVICE).to(DTYPE)
        for n in (new, length, length)
    )
    mask = (
        {"is_causal": True}
        if new == length
        else {"attn_mask": causal_lower_right(new, length)}
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attend = F.scaled_dot_product_attention
        return measure([lambda: attend(query, key, value, **mask)] * 3, 5)


def time_host(caches: Tensor, rounds: int = 200) -> dict[str, float]:
    """Microseconds that Python needs to launch the kernels of one layer."""
    found = {}
    for name, new, ends in (
        ("decode", [1] * 8, [200] * 8),
        ("mixed", [1, 1, 9], [200] * 3),
    ):
        [(query, metadata)] = make_steps(new, ends, most=1)
        args = (query, *draw_new(sum(new)), tuple(caches), metadata)
        backend = module.TritonBackend()
        for _ in range(3):
            backend.forward(*args)
        torch.cuda.synchronize()
        times = [time.perf_counter()]
        for _ in range(rounds):
            backend.forward(*args)
            times.append(time.perf_counter())
        torch.cuda.synchronize()
        spent = statistics.median(after - before for before, after in pairwise(times))
        found[f"{name}, as a function"] = round(spent * 1e6, 1)
    return found


def record_rows(caches: Tensor, speed: float) -> list[dict[str, Any]]:
    """Each kernel beside its floor, at `speed` GB/s, and beside PyTorch."""
    token_bytes = 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    rows: list[dict[str, Any]] = []
    for shape, lens in DECODES.items():
        steps = make_steps([1] * len(lens), lens)
        rows.append(
            {
                "kernel": "decode",
                "shape": shape,
                "splits": count_splits(steps[0][1]),
                "bytes": sum(lens) * token_bytes,
                "operations": 4 * HEADS * HEAD_DIM * sum(lens),
                "us": time_kernel(bind_decode, caches, steps),
                "floor_us": round(sum(lens) * token_bytes / speed / 1e3, 2),
                "torch_sdpa_us": time_torch_sdpa(caches, steps),
            }
        )
    new, steps = draw_new(STORED), make_steps([1] * STORED, [BLOCK_SIZE] * STORED)
    us = measure([partial(plan, metadata) for _, metadata in steps])
    rows.append({"kernel": "plan", "shape": f"{STORED} sequences", "us": us})
    stores = [
        lambda m=m: module.store_kv(*new, *caches, m.slot_mapping) for _, m in steps
    ]
    moved = 2 * STORED * token_bytes
    floor = round(moved / speed / 1e3, 2)
    row = {"kernel": "store", "shape": f"{STORED} tokens", "bytes": moved}
    rows.append(row | {"us": measure(stores), "floor_us": floor})
    for shape, (lens, ends) in PREFILLS.items():
        pairs = sum(n * (m - n) + n * (n + 1) // 2 for n, m in zip(lens, ends))  # noqa: B905
        operations = 4 * HEADS * HEAD_DIM * pairs
        steps = make_steps(lens, ends, most=3)
        us = time_kernel(bind_prefill, caches, steps)
        row = {"kernel": "prefill", "shape": shape, "operations": operations, "us": us}
        row["tflops"] = round(operations / us / 1e6, 1)
        chosen, module.count_workers = module.count_workers, lambda *_: 1
        row["whole_us"] = time_kernel(bind_prefill, caches, steps)  # without splits
        module.count_workers = chosen
        rows.append(row | {"flash_us": time_flash(lens, ends)})
    return rows


def record_splits(caches: Tensor) -> list[dict[str, Any]]:
    """Decode with other numbers of workers, so that the longest is split otherwise."""
    chosen, rows = module.count_workers, []
    for shape in SPLIT:
        lens = DECODES[shape]
        steps = make_steps([1] * len(lens), lens)
        for splits in SPLITS:
            # So many that a share is no longer than such a part of the longest.
            workers = triton.cdiv(sum(lens), max(lens) // splits)
            module.count_workers = lambda *_, workers=workers: workers
            if count_splits(steps[0][1]) == splits:
                us = time_kernel(bind_decode, caches, steps, 3)
                rows.append({"shape": shape, "splits": splits, "us": us})
    module.count_workers = chosen
    return rows


def record_stages(caches: Tensor) -> dict[str, Any]:
    """One long sequence: only reading as many bytes, and decode without what it has beside."""
    [length] = DECODES[LONG]
    steps = make_steps([1], [length])
    num_bytes = 2 * length * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    count = max(1, num_bytes // (4 * SIZE))
    pieces = caches.view(-1).view(torch.int32).split(count * SIZE)[: len(steps)]
    sums = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    found = {"shape": LONG}
    found["reading_us"] = measure([lambda x=x: read_once(x, sums) for x in pieces])
    merge, module.merge_kernel = module.merge_kernel, NoKernel()
    found["without_merge_us"] = time_kernel(bind_decode, caches, steps)
    module.merge_kernel = merge
    early, module.has_pdl = module.has_pdl, lambda _: False
    found["no_early_start_us"] = time_kernel(bind_decode, caches, steps)
    module.has_pdl = early
    return found | {"us": time_kernel(bind_decode, caches, steps)}


class NoKernel:
    """What is launched in place of a kernel that is left out."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def record() -> dict[str, Any]:
    card = describe_card()
    shape = (NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    caches = torch.empty(2, *shape, dtype=DTYPE, device=DEVICE).normal_()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": "python tools/record_kernels.py",
        "model": {
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "block_size": BLOCK_SIZE,
            "dtype": str(DTYPE),
        },
        **card,
        "settings": {
            name: vars(getattr(tile_sizes, name))
            for name in ("DECODE", "SMALL_DECODE", "PREFILL")
        },
        "host_us": time_host(caches),
        "recording": record_rows(caches, card["read_gb_s"]),
        "splits": record_splits(caches),
        "stages": record_stages(caches),
    }


if __name__ == "__main__":
    text = json.dumps(record(), indent=1) + "\n"
    Path(sys.argv[1]).write_text(text, encoding="utf-8")
