"""Splits of a tile leave their answers in memory, and the last of them to arrive merges."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merge_if_last"]


@triton.jit
def merge_if_last(
    answer,  # where the rows go that are merged, [ROWS, DIMS]
    result,
    logs,  # of this split: its answer, and log2 of the weight behind it, [ROWS, 1]
    exists,
    own,  # which of the numbers, and of the rows, there are
    parts,
    part_logs,  # float32, [any, D] and [any]
    place,
    num_places,  # of each row among those of a split, and how many a split has
    program,
    first,
    num_splits,  # the number of this split, of the first one, and how many there are
    arrived,  # the counter of the tile: zero before the first and after the last
    D: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Leaves the answer of a split; the last one of its tile merges all of them.

    Nobody waits. The answers are merged in the order of the splits, whoever is the last.
    """
    part = program * num_places + place
    dims = tl.arange(0, DIMS)[None, :]
    tl.store(parts + part * D + dims, result, mask=exists)
    tl.store(part_logs + part, logs, mask=own)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(arrived, 1, sem="acq_rel") == num_splits - 1:
        tl.store(arrived, 0)  # for the next layer
        highest = tl.full(logs.shape, -float("inf"), tl.float32)
        total, merged = tl.zeros_like(logs), tl.zeros_like(result)
        for split in range(num_splits):
            part = (first + split) * num_places + place
            log = tl.load(part_logs + part, mask=own, other=0.0)
            one = tl.load(parts + part * D + dims, mask=exists, other=0.0)
            new_highest = tl.maximum(highest, log)
            weight, shrink = tl.exp2(log - new_highest), tl.exp2(highest - new_highest)
            merged, total = merged * shrink + one * weight, total * shrink + weight
            highest = new_highest
        tl.store(answer, (merged / total).to(answer.dtype.element_ty), mask=exists)
