#!/usr/bin/env bash
# In Triton's interpreter a function that a kernel calls costs many times what it computes.
#
# Versions:  triton 3.9.0, torch 2.13.0, numpy 2.4.6
# Expected:  a call of a @triton.jit function from a kernel costs about as much as one more line of
#            it: a dozen microseconds. So does `tl.cdiv`, which is such a function.
# Behaviour: before every call the interpreter looks through Triton's language once more and
#            replaces its functions and the methods of `tl.tensor`, a hundred and more, and puts
#            them back after the call, though the kernel that calls has replaced them already.
# Seen:      the product of two blocks in a helper takes 7 to 18 times as long as the same product
#            written into the loop, in four runs of this; both give the same numbers.
# Instead:   replace them once for a launch (`folo_lib/course/interpreter.py`), or write short
#            helpers out where a kernel is interpreted often, as in tests.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat >"$folder/kernels.py" <<'PYTHON'
import os
import time

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def with_calls(x, y, REPEAT: tl.constexpr):
    places = tl.arange(0, 16)
    numbers = tl.load(x + places)
    factor = numbers
    for _ in range(REPEAT):
        numbers = multiply(numbers, factor)
    tl.store(y + places, numbers)


@triton.jit
def written_out(x, y, REPEAT: tl.constexpr):
    places = tl.arange(0, 16)
    numbers = tl.load(x + places)
    factor = numbers
    for _ in range(REPEAT):
        numbers = numbers * factor
    tl.store(y + places, numbers)


def measure(kernel, repeat):
    """Seconds of one launch, the fastest of nine, and what it computes."""
    x, y = torch.linspace(0.99, 1.01, 16), torch.zeros(16)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        kernel[(1,)](x, y, repeat)
        times.append(time.perf_counter() - start)
    return min(times), y


calls, wanted, got = 200, {}, {}
for kernel in (with_calls, written_out):
    few, _ = measure(kernel, 0)
    many, got[kernel] = measure(kernel, calls)
    wanted[kernel] = (many - few) / calls
assert torch.equal(got[with_calls], got[written_out])
ratio = wanted[with_calls] / wanted[written_out]
print(f"triton {triton.__version__}: {1e6 * wanted[with_calls]:.0f} us for a product in a helper,")
print(f"{1e6 * wanted[written_out]:.0f} us for one in the loop: {ratio:.0f} times as long")
assert ratio > 4, ratio
PYTHON
"$folder/venv/bin/python" "$folder/kernels.py"
