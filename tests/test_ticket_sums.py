"""Sums with tickets, between two processes that share memory as GPUs of one host do.

Each runs Triton's interpreter, so a kernel that waits for the other rank does wait here.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux")

SIZE, BLOCK = 64, 16  # words of a rank, and of a program
LENGTHS = (64, 7, 64, 33, 1, 64, 64)  # of the sums that follow one another
DTYPES = (torch.bfloat16, torch.float32)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="see test_tensor_parallel_gpu.py"
)


def make_numbers(rank: int, length: int, dtype: torch.dtype) -> Tensor:
    """Of each rank others, whose sums have no rounding."""
    count = length * 4 // dtype.itemsize
    generator = torch.Generator().manual_seed(100 * length + rank)
    return torch.randint(-60, 60, (count,), generator=generator).to(dtype)


def run_rank(rank: int, words: Sequence[Tensor], answers: Any) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from folo_lib.ticket_sums import exchange_kernel

        addresses = torch.tensor([one.data_ptr() for one in words])
        tickets = torch.zeros(SIZE // BLOCK, dtype=torch.int32)
        outputs = []
        for dtype in DTYPES:
            for length in LENGTHS:
                x = make_numbers(rank, length, dtype)
                out = torch.full_like(x, float("nan"))
                exchange_kernel[(-(-length // BLOCK),)](
                    x.view(torch.int32), out.view(torch.int32), words[rank], addresses,
                    tickets, length, SIZE, RANK=rank, RANKS=len(words), BLOCK=BLOCK,
                    FLOAT=dtype == torch.float32,
                )  # fmt: skip
                outputs.append(out.float().tolist())
        answers.put((rank, outputs))
    except BaseException:
        answers.put((rank, traceback.format_exc()))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.more)])
def test_sums_that_follow_one_another(num_ranks: int) -> None:
    """Longer and shorter ones, so that a program's buffers are not in step with others'."""
    context = multiprocessing.get_context("spawn")
    shape = 2, num_ranks, SIZE
    words = [
        torch.zeros(shape, dtype=torch.int64).share_memory_() for _ in range(num_ranks)
    ]
    answers = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(rank, words, answers), daemon=True)
        for rank in range(num_ranks)
    ]
    try:
        for process in ranks:
            process.start()
        found = dict(answers.get(timeout=200) for _ in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    expected = [
        sum(
            make_numbers(rank, length, dtype).float() for rank in range(num_ranks)
        ).tolist()
        for dtype in DTYPES
        for length in LENGTHS
    ]
    for rank in range(num_ranks):
        assert found[rank] == expected
