#!/usr/bin/env bash
# A larger tile of a float32 tl.dot is compiled to fewer registers, 32 of 255, and to kilobytes of stack.
#
# Versions:  triton 3.9.0, whose package has the assembler and cuobjdump; no GPU and no torch are needed
# Expected:  registers grow with the tile up to 255 a thread, and what does not fit is spilled.
# Behaviour: with input_precision="ieee" a product runs on the ordinary cores, and each thread holds
#            its rows and columns. Twice the rows of a tile that takes 204 registers give a kernel of
#            32 registers, in which nearly every number lives in memory. Nothing warns.
# Seen:      for cuda:90, 4 warps: 16 x 128 x 128: 204 registers, no stack. 32 x 128 x 128: 32
#            registers, 8,208 bytes of stack a thread. 64 x 128 x 64: 255 registers, 1,432 bytes;
#            128 x 128 x 64: 32 registers, 12,656 bytes.
# Instead:   smaller tiles or more warps for float32, and a look at the stack of what was compiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.9.0
cat > "$folder/kernel.py" <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def multiply(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision="ieee"))


def count(*sizes):
    types = dict.fromkeys("abc", "*fp32") | dict.fromkeys("MNK", "constexpr")
    known = {(3 + i,): size for i, size in enumerate(sizes)}
    even = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(multiply, types, known, even)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    cubin = Path(sys.argv[1]) / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    command = [tool, "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    print(*sizes, f"{registers} registers, {stack:,} bytes of stack")
    return registers, stack


print("triton", triton.__version__)
small, double = count(16, 128, 128), count(32, 128, 128)
count(64, 128, 64)
count(128, 128, 64)
assert small[0] > 100 and small[1] == 0, small
assert double[0] <= 40 and double[1] > 4096, double
PYTHON
"$folder/venv/bin/python" "$folder/kernel.py" "$folder"
