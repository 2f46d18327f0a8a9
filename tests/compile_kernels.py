"""Compiles Triton's kernels for a card that is not there: run by test_paged_attention.

    python tests/compile_kernels.py 90

Triton's interpreter lets pass what its compiler refuses, such as a name that changes its type in
a loop. Prints the name and the bytes of shared memory of each kernel.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from folo_lib import paged_attention as module, sampling_kernels

INDICES = ("slot_mapping", "block_table", "query_start_loc", "seq_lens")
INDICES += ("positions", "rows", "ints", "tallies", "listed", "cuts")
INDICES += ("token_ids", "last_token_ids")
FLOATS = ("parts", "part_logs", "maxima", "floors", "scores")
TENSORS = ("query", "key", "value", "key_cache", "value_cache", "output", "logits")
OTHERS = {"floats": "*fp64", "counts": "*i32", "ids": "*i32", "scale": "fp32"}
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
    constants: dict[str, int],
    number: str,
    capability: int,
    sizes: Any = None,
) -> None:
    names = kernel.arg_names
    known = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in known else type_of(name, number) for name in names
    }
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
    options = {}
    if sizes is not None:
        options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=options
    )
    print(kernel.fn.__name__, made.metadata.shared)


def main(capability: int) -> None:
    store = {"BLOCK_SIZE": 16, "HEADS": 8, "DIMS": 128, "D": 128}
    compile_one(module.store_kv_kernel, store, "bf16", capability, module.DECODE)
    for number, group, head_dim in (("bf16", 2, 128), ("fp16", 3, 80)):
        shape = {"GROUP": group, "D": head_dim, "DIMS": 128, "BLOCK_SIZE": 16}
        for sizes in (module.DECODE, module.SMALL_DECODE):
            tile = {"ROWS": 16, "BT": sizes.tile, "MIN_CHUNK": sizes.min_chunk}
            every = shape | tile | {"MAX_SPLITS": module.MAX_SPLITS}
            compile_one(module.decode_kernel, every, number, capability, sizes)
        compile_one(module.merge_kernel, every, number, capability, sizes)
        sizes = module.PREFILL if capability == 90 else module.MEDIUM_PREFILL
        tile = {"ROWS": sizes.rows, "BQ": sizes.rows // group, "BT": sizes.tile}
        compile_one(module.prefill_kernel, shape | tile, number, capability, sizes)
    for number in ("bf16", "fp16", "fp32"):
        compile_one(sampling_kernels.tally_kernel, {"ID_BITS": 18}, number, capability)
        for filters in (False, True):
            known = {"ID_BITS": 18, "FILTERS": filters}
            for name in ("max_kernel", "score_kernel", "finish_kernel"):
                compile_one(getattr(sampling_kernels, name), known, number, capability)


if __name__ == "__main__":
    main(int(sys.argv[1]))
