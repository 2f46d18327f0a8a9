"""The quick interpreter computes what Triton's own does, and leaves Triton as it finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton runs on Linux")

PROGRAM = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy, torch, triton
import triton.language as tl
from folo_lib.course.interpreter import make_interpreter_quick

QUICK = {quick}
if QUICK:
    make_interpreter_quick()
    make_interpreter_quick()  # twice is as once

@triton.jit
def product(a, b):
    return a * b

@triton.jit
def later(a, i, b, j):
    return tl.where(b >= a, b, a), tl.where(b >= a, j, i)

@triton.jit
def kernel(x, y, wide, SIZE: tl.constexpr):
    program = tl.program_id(0)
    i = tl.arange(0, SIZE)
    numbers = tl.load(x + program * SIZE + i)
    square = tl.reshape(numbers, (4, SIZE // 4))
    tl.store(y + program * 32 + tl.arange(0, SIZE // 4), tl.reduce(square, 0, product))
    tl.store(y + program * 32 + 16 + tl.arange(0, 4), tl.reduce(square, 1, product))
    places = tl.reshape(i, (4, SIZE // 4))
    best, place = tl.reduce((square, places), 1, later)
    tl.store(y + program * 32 + 20 + tl.arange(0, 4), best)
    tl.store(y + program * 32 + 24 + tl.arange(0, 4), place.to(tl.float32))
    tl.store(y + program * 32 + 28, tl.sum(numbers) + tl.max(numbers, 0))
    tl.store(y + program * 32 + 29, tl.reduce(numbers, 0, product))
    tl.store(wide + program, (2147483647 + program + tl.cdiv(7, 2)).to(tl.int64))

before = dict(vars(tl)), dict(vars(tl.tensor))
x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
x[:, 5] = x[:, 9] = 2.5
y, wide = torch.zeros(3, 32), torch.zeros(3, dtype=torch.int64)
for _ in range(2):
    kernel[(3,)](x.contiguous(), y, wide, 64)
after = vars(tl), vars(tl.tensor)
left = [{k for k in a if b.get(k) is not a[k]} for b, a in zip(before, after)]
interpreter = sys.modules["triton.runtime.interpreter"]
kinds = [getattr(tl, name) for name in ("int1", "int64", "bfloat16", "float16", "float32")]
kinds += [tl.pointer_type(tl.float16), tl.block_type(tl.bfloat16, [4])]
print(y.tolist(), wide.tolist(), *map(sorted, left))
print([interpreter._get_np_dtype(one).name for one in kinds])
"""


@pytest.mark.more
def test_results_are_the_same_to_the_bit(tmp_path: Path) -> None:
    """Kernels are written into a file, since Triton reads their source."""
    said = []
    for quick in (False, True):
        path = tmp_path / f"quick_{quick}.py"
        path.write_text(PROGRAM.replace("{quick}", str(quick)), encoding="utf-8")
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] and "uint16" in said[0]
