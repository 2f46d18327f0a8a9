"""Checks of the exercises of page 16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require
from folo_lib.course.ranks import ThreadGroup, run_ranks

__all__ = ["check_count_sent_bytes", "check_cut_rows", "check_gather_top"]


@exercise
def check_count_sent_bytes(count: Callable[[int, int, int, int], int]) -> None:
    """Of `count_sent_bytes`: the bundled model, and Qwen3-8B."""
    cases = {
        (6, 192, 1, 4): 13 * 192 * 4,
        (36, 4096, 1, 2): 73 * 4096 * 2,
        (36, 4096, 64, 2): 73 * 4096 * 64 * 2,
    }
    for case, wanted in cases.items():
        got = count(*case)
        require(
            got == wanted,
            "with {} layers, hidden size {}, {} sequences and {} bytes a ".format(*case)
            + f"number it is {wanted:,} bytes, not {got:,}.",
        )


@exercise
def check_cut_rows(cut_rows: Callable[[int, int], list[tuple[int, int]]]) -> None:
    """Of `cut_rows`: even and uneven cuts, and fewer rows than ranks."""
    cases = {
        (10, 4): [(0, 3), (3, 6), (6, 8), (8, 10)],
        (8, 2): [(0, 4), (4, 8)],
        (7, 1): [(0, 7)],
        (2, 4): [(0, 1), (1, 2), (2, 2), (2, 2)],
        (2048, 3): [(0, 683), (683, 1366), (1366, 2048)],
    }
    for (num_rows, size), wanted in cases.items():
        got = [tuple(one) for one in cut_rows(num_rows, size)]
        require(
            got == wanted,
            f"{num_rows} rows on {size} ranks are cut into {got}, and {wanted} is wanted.",
        )


@exercise
def check_gather_top(gather_top: Callable[[Tensor, int, ThreadGroup], Tensor]) -> None:
    """Of `gather_top`: batches, ties within and between ranks, and what was sent."""
    noise = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 11, generator=noise)
    rows[1, [2, 9]] = 8.0  # a tie between ranks
    rows[2, [6, 7]] = 8.0  # a tie on one rank
    rows[3] = -100.0
    wanted = rows.argmax(-1)
    for size in (1, 2, 3):
        width = -(-11 // size)

        def work(group: ThreadGroup, width: int = width) -> tuple[Tensor, int]:
            start = group.rank * width
            own = rows[:, start : start + width].contiguous()
            top = gather_top(own, start, group)
            return top, sum(torch.Size(shape).numel() for _, shape in group.log)

        for rank, (top, num_sent) in enumerate(run_ranks(size, work)):
            require(
                top.dtype == torch.int64 and top.shape == (5,),
                f"the result is {top.dtype} of shape {list(top.shape)}, and int64 of shape "
                "[5] is wanted, one id for each row.",
            )
            require(
                torch.equal(top, wanted),
                f"rank {rank} of {size} finds {top.tolist()}, and {wanted.tolist()} are the "
                "best; rows 1 to 3 have ties, and the smaller id wins.",
            )
            require(
                num_sent <= 10,
                f"a rank has sent {num_sent} numbers for 5 rows, and two for each row are "
                "enough.",
            )
