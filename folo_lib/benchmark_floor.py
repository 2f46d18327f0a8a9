"""How fast a GPU reads its memory, by a kernel that does nothing else."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import time
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 16384  # numbers of a program


@triton.jit
def read_kernel(numbers, sums, SIZE: tl.constexpr):
    """Adds up `SIZE` numbers for each program, as what is read must be used for something."""
    i = tl.program_id(0).to(tl.int64)
    tl.store(sums + i, tl.sum(tl.load(numbers + i * SIZE + tl.arange(0, SIZE)), 0))


def read_once(numbers: Tensor, sums: Tensor) -> None:
    """Reads int32 `[count * SIZE]`, and writes `[count]`."""
    launch: Any = read_kernel[(len(sums),)]
    launch(numbers, sums, SIZE, num_warps=8)


def measure_reading(
    device: torch.device, num_bytes: int, num_runs: int, repeat: int
) -> list[float]:
    """Bytes read per second, in each run of `repeat` launches; like `measure_bandwidth`.

    What is left over of whole programs is not read, and not counted.
    """
    count = num_bytes // (4 * SIZE)
    numbers = torch.ones(count * SIZE, dtype=torch.int32, device=device)
    sums, speeds = torch.zeros(count, dtype=torch.int32, device=device), []
    for _ in range(num_runs + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeat):
            read_once(numbers, sums)
        torch.cuda.synchronize(device)
        speeds.append(repeat * numbers.nbytes / (time.perf_counter() - start))
    return speeds[1:]  # the first warmed up
