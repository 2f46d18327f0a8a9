"""Kernels compile for GPUs that are not here: the interpreter passes what a compiler refuses.

Triton's package has its own assembler, so this needs no GPU and no CUDA. It happens in a process
of its own, since Triton reads TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

KERNELS = ("store_kv_kernel", "decode_kernel", "merge_kernel", "prefill_kernel")
POINTERS = {
    "query": "{}",
    "key": "{}",
    "value": "{}",
    "key_cache": "{}",
    "value_cache": "{}",
    "output": "{}",
    "slot_mapping": "i64",
    "block_table": "i64",
    "query_start_loc": "i64",
    "seq_lens": "i64",
    "parts": "fp32",
    "part_logs": "fp32",
}
CONSTANTS = {
    "GROUP": 2,
    "BLOCK_SIZE": 16,
    "MIN_CHUNK": 256,
    "MAX_SPLITS": 64,
    "HEADS": 8,
}


def compile_kernels(capability: int, dtype: str, head_dim: int) -> None:
    """Compiles all of them, in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from folo_lib import paged_attention

    dims: dict[str, Any] = {"D": head_dim, "DIMS": triton.next_power_of_2(head_dim)}
    small = {"ROWS": 32, "BQ": 16, "BT": 32}
    for name in KERNELS:
        kernel = getattr(paged_attention, name)
        tiles = {"ROWS": 16, "BT": 64} if name != "prefill_kernel" else small
        known = CONSTANTS | dims | tiles
        constants = {n: known[n] for n in kernel.arg_names if n in known}
        types = {
            n: "constexpr"
            if n in constants
            else f"*{POINTERS[n].format(dtype)}"
            if n in POINTERS
            else "fp32"
            if n == "scale"
            else "i32"
            for n in kernel.arg_names
        }
        values = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=values)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"], name


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim"),
    [(80, "fp32", 64), (90, "bf16", 128), (90, "fp16", 80)],
)
def test_all_kernels_compile(capability: int, dtype: str, head_dim: int) -> None:
    arguments = [str(capability), dtype, str(head_dim)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
