#!/usr/bin/env bash
# A limit of registers above what a kernel takes without one gives it more of them, and spills as well.
#
# Versions:  triton 3.9.0, whose package has the assembler and cuobjdump; no GPU and no torch are needed
# Expected:  maxnreg is the most registers that a thread may have, so a limit that is not below what
#            the kernel takes anyway changes nothing.
# Behaviour: with a limit the assembler allots registers in another way, and may use up the limit. What
#            ran in 100 registers without any stack gets 128 registers and spills, or 188 without.
# Seen:      attention of 16 queries over tiles of 128 keys of 128 numbers in bfloat16, for cuda:90,
#            4 warps. No limit: 100 registers, no stack. maxnreg=100: 100 registers, 24 bytes of stack
#            a thread. 128: 128 and 40. 255: 188 and none. Tiles of 64 keys: 72 registers without a
#            limit, 125 with 128, none with a stack.
# Instead:   look at registers and stack of what was compiled with each limit, and measure; a search for
#            settings should have "no limit" among its choices.
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
def attend(q, keys, values, out, length, T: tl.constexpr, D: tl.constexpr):
    m, d = tl.arange(0, 16)[:, None], tl.arange(0, D)[None, :]
    x = tl.load(q + m * D + d)
    highest = tl.full([16], -float("inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    y = tl.zeros([16, D], tl.float32)
    for first in tl.range(0, length, T):
        t = first + tl.arange(0, T)[:, None]
        k = tl.load(keys + t * D + d, mask=t < length, other=0.0)
        v = tl.load(values + t * D + d, mask=t < length, other=0.0)
        scores = tl.dot(x, tl.trans(k))
        scores = tl.where(tl.trans(t) < length, scores, -float("inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new[:, None]), tl.exp2(highest - new)
        total = total * shrink + tl.sum(weights, 1)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None])
        highest = new
    tl.store(out + m * D + d, y / total[:, None])


def count(tile, limit=None):
    names = ("q", "keys", "values", "out")
    types = dict.fromkeys(names[:3], "*bf16") | {"out": "*fp32", "length": "i32"}
    types |= {"T": "constexpr", "D": "constexpr"}
    even = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(attend, types, {(5,): tile, (6,): 128}, even)
    options = {"num_warps": 4, "num_stages": 2}
    if limit is not None:
        options["maxnreg"] = limit
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = Path(sys.argv[1]) / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    command = [tool, "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    print(f"tiles of {tile:3}, maxnreg={limit}: {registers} registers, {stack} bytes of stack")
    return registers, stack


print("triton", triton.__version__)
free, equal, above, wide = (count(128, limit) for limit in (None, 100, 128, 255))
small, below = count(64), count(64, 128)
assert free == (100, 0), free
assert equal[0] <= 100 and equal[1] > 0, equal
assert above[0] > free[0] and above[1] > 0, above
assert wide[0] > 180 and wide[1] == 0, wide
assert small[1] == below[1] == 0 and below[0] > 1.4 * small[0], (small, below)
PYTHON
"$folder/venv/bin/python" "$folder/kernel.py" "$folder"
