#!/usr/bin/env bash
# A kernel may be right in Triton's interpreter and be refused by its compiler: types of loop variables.
#
# Versions:  triton 3.9.0, torch 2.13.0 (the CPU build does). TORCH_INDEX=<address> takes torch from
#            another index
# Expected:  what runs in the interpreter, and is right, also compiles; where a kernel breaks a rule
#            of the language, TRITON_INTERPRET=1 says so, as it does for a wrong argument.
# Behaviour: a name that holds an int64 column before a loop, and an int32 row inside, is carried
#            round the loop as one variable, and has to keep its type. The compiler refuses the
#            kernel; the interpreter is Python, where names have no types, and computes.
# Seen:      interpreter: equal to torch. Compiler for cuda:90, on a machine without a GPU:
#            CompilationError, "Loop-carried variable place has initial type <['8', '1'], int64> but
#            is re-assigned to <['4'], int32> in loop"
# Instead:   compile every kernel for a target in the tests too. triton.compile with a GPUTarget needs
#            neither a GPU nor a CUDA installation: Triton's package has the assembler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
"$folder/venv/bin/pip" install -q torch==2.13.0 triton==3.9.0 numpy
cat > "$folder/kernel.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def sum_rows(x, out, num_columns):
    rows = tl.arange(0, 8)
    place = rows.to(tl.int64)[:, None] * num_columns
    row = x + place
    total = tl.zeros([8], tl.float32)
    for first in range(0, num_columns, 4):
        place = first + tl.arange(0, 4)
        total += tl.sum(tl.load(row + place[None, :], mask=place[None, :] < num_columns, other=0.0), 1)
    tl.store(out + rows, total)


if sys.argv[1] == "interpret":
    x, out = torch.arange(80.0).view(8, 10), torch.empty(8)
    sum_rows[(1,)](x, out, 10)
    print("triton", triton.__version__, "interpreter:", out.tolist())
    assert torch.equal(out, x.sum(1)), out
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x": "*fp32", "out": "*fp32", "num_columns": "i32"}
    source = ASTSource(fn=sum_rows, signature=types, constexprs={})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        print("compiler:", type(error).__name__, str(error).splitlines()[-1])
        assert "Loop-carried variable place" in str(error), error
    else:
        sys.exit("the compiler takes the kernel now")
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernel.py" interpret
TRITON_INTERPRET=0 "$folder/venv/bin/python" "$folder/kernel.py" compile
