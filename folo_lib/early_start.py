"""Kernels that start before the one ahead of them has ended: programmatic dependent launch (PDL).

A kernel that is launched with `launch_pdl=True` is brought to its start while the one ahead of it
still runs, once all programs of that one have let it. Two calls keep order. At least one program
of such a kernel must wait: the kernel after it starts when it has ended, and if nobody waited,
that may be before the one ahead has. Where `PDL` is false, as in Triton's interpreter, they do
nothing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["has_pdl", "let_next_start", "wait_for_previous"]


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Lets the next kernel start; it waits where it needs what this one writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Waits until the kernels before this one have ended and what they wrote can be read."""
    if PDL:
        gdc_wait()


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether a kernel can start there before the last one has ended."""
    is_cuda = device.type == "cuda"
    return is_cuda and torch.cuda.get_device_capability(device) >= (9, 0)
