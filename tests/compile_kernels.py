"""Compiles Triton's kernels for a card that is not there: run by tests of pages 13 and 15.

    python tests/compile_kernels.py 90
    python tests/compile_kernels.py 90 fused

Triton's interpreter lets pass what its compiler refuses, such as a name that changes its type in
a loop. Prints the name of each kernel, the bytes of shared memory of a program, and those of a
thread for what its registers have no room for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from folo_lib import (
    fused_attention,
    fused_checks,
    fused_decode,
    fused_shards,
    fused_vectors,
    paged_attention as module,
    sampling_kernels,
    summed_layers,
    symmetric_memory,
    ticket_sums,
    tile_sizes,
)

INDICES = ("slot_mapping", "block_table", "query_start_loc", "seq_lens")
INDICES += ("positions", "rows", "ints", "tallies", "listed", "cuts")
INDICES += ("token_ids", "last_token_ids", "input_ids", "slots", "best")
FLOATS = ("parts", "part_logs", "maxima", "floors", "scores", "tops", "totals")
TENSORS = ("query", "key", "value", "key_cache", "value_cache", "output", "logits")
TENSORS += ("x", "y", "w", "norm_weight", "qkv", "q_weight", "k_weight", "cos", "sin")
TENSORS += ("embedding",)
OTHERS = {"floats": "*fp64", "counts": "*i32", "ids": "*i32", "scale": "fp32"}
OTHERS |= {"table": "*i32", "arrivals": "*i32", "eps": "fp32"}
OTHERS |= {"programs": "*i32", "merges": "*i32"}
OTHERS |= {"words": "*i64", "addresses": "*i64", "tickets": "*i32"}
TUPLES = {"step": sampling_kernels.Step, "scratch": sampling_kernels.Scratch}


def type_of(name: str, number: str) -> Any:
    if name in TUPLES:
        return TUPLES[name](*(type_of(one, number) for one in TUPLES[name]._fields))
    if name in INDICES:
        return "*i64"
    if name in FLOATS:
        return "*fp32"
    return f"*{number}" if name in TENSORS else OTHERS.get(name, "i32")


def compile_one(
    kernel: Any,
    constants: dict[str, Any],
    number: str,
    capability: int,
    sizes: Any = None,
    types: dict[str, str] | None = None,
    **options: Any,
) -> None:
    names = kernel.arg_names
    known = {name: value for name, value in constants.items() if name in names}
    signature = {name: type_of(name, number) for name in names} | (types or {})
    signature |= dict.fromkeys(known, "constexpr")
    even = [n for n in names if n in TENSORS or n.endswith("stride")]
    attributes = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n in even
        if n != "table_stride"
    }
    if "step" in names:  # the logits, their stride and the size of the vocabulary
        attributes |= {(0, i): [["tt.divisibility", 16]] for i in range(3)}
    places = {(names.index(name),): value for name, value in known.items()}
    source = ASTSource(kernel, signature, places, attributes)
    if sizes is not None:
        options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=options
    )
    print(kernel.fn.__name__, made.metadata.shared, count_stack(made.asm["cubin"]))


def count_stack(cubin: bytes) -> int:
    """Bytes of memory that each thread has for what does not fit into its registers."""
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    [stack] = re.findall(r"STACK:(\d+)", usage.stdout)
    return int(stack)


def main(capability: int) -> None:
    store = {"BLOCK_SIZE": 16, "HEADS": 8, "DIMS": 128, "D": 128}
    compile_one(module.store_kv_kernel, store, "bf16", capability, tile_sizes.DECODE)
    for number, group, head_dim in (("bf16", 2, 128), ("fp16", 3, 80)):
        shape = {"GROUP": group, "D": head_dim, "DIMS": 128, "BLOCK_SIZE": 16}
        sizes, early = tile_sizes.DECODE, {"PDL": capability >= 90}
        every = shape | {"ROWS": 16, "BT": sizes.tile} | early
        compile_one(module.decode_kernel, every, number, capability, sizes)
        compile_one(module.merge_kernel, every, number, capability)
        sizes = tile_sizes.PREFILL if capability == 90 else tile_sizes.MEDIUM_PREFILL
        tile = {"ROWS": sizes.rows, "BQ": sizes.rows // group, "BT": sizes.tile}
        compile_one(module.prefill_kernel, shape | tile, number, capability, sizes)
    sizes = tile_sizes.SMALL_PREFILL
    tile = {"GROUP": 2, "ROWS": sizes.rows, "BQ": sizes.rows // 2, "BT": sizes.tile}
    compile_one(module.prefill_kernel, shape | tile, "fp32", capability, sizes)
    sizes = tile_sizes.SMALL_DECODE
    every |= {"GROUP": 2, "D": 128, "BT": sizes.tile}
    compile_one(module.decode_kernel, every, "fp32", capability, sizes)
    known = {"BT": sizes.tile, "MIN_CHUNK": sizes.min_chunk}
    for num_queries in (1, 64):
        every = known | {"BQ": num_queries}
        compile_one(module.plan_kernel, every, "fp32", capability)
    for number in ("bf16", "fp16", "fp32"):
        compile_one(sampling_kernels.tally_kernel, {"ID_BITS": 18}, number, capability)
        for filters in (False, True):
            known = {"ID_BITS": 18, "FILTERS": filters}
            for name in ("max_kernel", "score_kernel", "finish_kernel"):
                compile_one(getattr(sampling_kernels, name), known, number, capability)


# E, the width of the MLP, H and V, all with 8 key heads, as Qwen3 has them.
FUSED = {
    "0.6B": (1024, 3072, 16, 151936),
    "1.7B": (2048, 6144, 16, 151936),
    "8B": (4096, 12288, 32, 151936),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_attention(capability: int, heads: int, number: str, tile: int) -> None:
    """Of a fused step; the same for any number of sequences."""
    shape = {"H": heads, "KV": 8, "D": 128, "BLOCK_SIZE": 16, "TILE": tile}
    pdl, warps = capability >= 90, fused_attention.WARPS.value
    compile_one(
        fused_attention.attention_kernel, shape | {"PDL": pdl}, number, capability,
        num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip


def compile_fused(capability: int, model: str, number: str, num_seqs: int) -> None:
    """The kernels of a fused step, as `FusedDecode` launches them."""
    hidden, inner, heads, vocab = FUSED[model]
    sizes = fused_checks.choose_fusion_sizes(num_seqs, DTYPES[number], hidden)
    pdl = capability >= 90
    fixed = {"ROWS": sizes.rows, "PDL": pdl, "num_seqs": num_seqs}
    options: dict[str, Any] = {"num_warps": 8, "launch_pdl": pdl}
    if num_seqs > 1:  # what is 1 is a constant to Triton
        del fixed["num_seqs"]

    def compile_kernel(kernel: Any, **constants: int) -> None:
        compile_one(kernel, fixed | constants, number, capability, **options)

    options["num_stages"] = sizes.head_stages
    groups = sizes.head_groups
    whole = {"FIRST": 0, "DRAWS": True}  # no shard
    compile_kernel(fused_decode.head_kernel, V=vocab, K=hidden, GROUPS=groups, **whole)
    if number == "fp32":  # for checks, and slow to compile: only what is fullest
        return
    options["num_stages"], groups = 3, sizes.qkv_groups
    width = 128 * (heads + 16)
    compile_kernel(fused_decode.qkv_kernel, N=width, K=hidden, GROUPS=groups)
    compile_kernel(fused_decode.gate_up_kernel, INNER=inner, K=hidden)
    known = {"E": hidden, "GROUPS": sizes.residual_groups}
    for columns in (128 * heads, inner):
        compile_kernel(fused_decode.residual_kernel, K=columns, **known)
    if num_seqs == 1:  # what is the same for any number of sequences
        compile_attention(capability, heads, number, fused_attention.TILE)
        options["launch_pdl"] = False
        compile_kernel(
            fused_decode.begin_kernel, V=vocab, E=hidden, BLOCK_SIZE=16, FIRST=0
        )


STREAM = {"x": "*fp32"}  # of a shard
RANKS = 2


def compile_vectors(capability: int, number: str) -> None:
    """The kernels of a sequence that is alone in 8B, on one card and on two."""
    hidden, inner, heads, vocab = FUSED["8B"]
    pdl = capability >= 90

    def compile_kernel(
        name: str,
        columns: int,
        num_matrices: int = 1,
        types: dict[str, str] | None = None,
        **constants: Any,
    ) -> None:
        known = {"K": columns, "E": hidden, "PDL": pdl, **constants}
        known |= fused_vectors.choose_block(columns, num_matrices)
        kernel = getattr(fused_vectors, f"vector_{name}_kernel")
        options = {"num_warps": known["num_warps"], "launch_pdl": pdl}
        compile_one(kernel, known, number, capability, types=types, **options)

    compile_kernel("qkv", hidden, N=128 * (heads + 16))
    compile_kernel("gate_up", hidden, 2, INNER=inner)
    compile_kernel("head", hidden, V=vocab, FIRST=0)
    alone = {"RANKS": 0, "ADDS": True, "addresses": None, "tickets": None}
    compile_kernel("residual", hidden, **alone)
    for columns, adds in ((hidden // RANKS, False), (inner // RANKS, True)):
        compile_kernel("residual", columns, types=STREAM, RANKS=RANKS, ADDS=adds)
    known, options = {"PDL": pdl}, {"num_warps": 4, "launch_pdl": pdl}
    compile_one(fused_vectors.draw_kernel, known, number, capability, **options)


def compile_sums(capability: int) -> None:
    """What passes between two cards, after products of 8B in bfloat16."""
    pdl, (hidden, inner, _, _) = capability >= 90, FUSED["8B"]
    fixed = {"RANKS": RANKS, "PDL": pdl}

    def compile_kernel(kernel: Any, num_warps: int, **constants: int) -> None:
        options = {
            "num_warps": num_warps,
            "launch_pdl": pdl and "PDL" in kernel.arg_names,
        }
        compile_one(kernel, fixed | constants, "bf16", capability, types=own, **options)

    own = STREAM
    for num_seqs, adds in ((1, True), (16, False)):
        sizes = fused_checks.choose_fusion_sizes(num_seqs, torch.bfloat16, hidden)
        known = {"E": hidden, "K": inner // RANKS, "ADDS": adds, "ROWS": sizes.rows}
        known |= {"num_seqs": 1} if num_seqs == 1 else {}
        groups = sizes.residual_groups
        compile_kernel(fused_shards.part_kernel, 8, GROUPS=groups, **known)
    compile_kernel(ticket_sums.send_kernel, 4, BLOCK=1024)
    compile_kernel(ticket_sums.sum_kernel, 4, BLOCK=fused_shards.SUM_BLOCK)
    own = {}
    for kernel in (fused_shards.share_kernel, fused_shards.choose_kernel):
        compile_kernel(kernel, 1, ROWS=fused_decode.MAX_FUSED_SEQS)
    own = dict.fromkeys(("x", "out", "words", "turns"), "*i32")
    for is_wide in (False, True):
        known = {"RANK": 1, "BLOCK": symmetric_memory.PROGRAM_WORDS, "FLOAT": is_wide}
        compile_kernel(ticket_sums.exchange_kernel, 4, **known)
    own = dict.fromkeys(("words", "turns"), "*i32")
    own |= dict.fromkeys(("part", "residual", "weight", "normed", "stream"), "*i32")
    for is_wide in (False, True):
        width = hidden if is_wide else hidden // 2
        known = {"RANK": 1, "W": width, "BLOCK": width, "FLOAT": is_wide}
        compile_kernel(ticket_sums.add_norm_kernel, 8, **known)


def compile_gate_up(capability: int) -> None:
    """The product of a shard of 8B, in both dtypes that shards add up."""
    hidden, inner, _, _ = FUSED["8B"]
    for number, bk in (("bf16", 128), ("fp32", 64)):
        shape = {"INNER": inner // RANKS, "K": hidden, "ROWS": summed_layers.MOST_ROWS}
        shape |= {"COLUMNS": summed_layers.COLUMNS, "BK": bk}
        options = {"num_warps": 4, "num_stages": 4}
        compile_one(summed_layers.gate_up_kernel, shape, number, capability, **options)


def main_fused(capability: int) -> None:
    """Each shape with the fewest and the most sequences; float16 in between."""
    for model in FUSED:
        for number, num_seqs in (("bf16", 1), ("bf16", 16), ("fp16", 8)):
            compile_fused(capability, model, number, num_seqs)
    for model in ("1.7B", "8B"):
        compile_fused(capability, model, "fp32", 16)
    compile_attention(capability, 16, "fp32", fused_attention.WIDE_TILE)
    for number in ("bf16", "fp16"):
        compile_vectors(capability, number)
    compile_sums(capability)
    if capability >= 90:  # where it is used
        compile_gate_up(capability)


if __name__ == "__main__":
    main_fused(int(sys.argv[1])) if "fused" in sys.argv else main(int(sys.argv[1]))
