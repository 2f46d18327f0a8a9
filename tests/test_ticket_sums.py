"""Sums with tickets, between two processes that share memory as GPUs of one host do.

Each runs Triton's interpreter, so a kernel that waits for the other rank does wait here.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux")

WRAPS = 2**31 - 2  # a ticket, after which there is one more before they begin again
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


def pack(numbers: Tensor, ticket: int) -> Tensor:
    """Float32 as words."""
    return (numbers.view(torch.int32).long() << 32) | (ticket % 2**31)


def make_parts(num_ranks: int) -> Tensor:
    """Numbers whose sum depends on the order in which they are added."""
    return torch.tensor([[1e8] * 5, [3.0] * 5, [-1e8] * 5])[:num_ranks].contiguous()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_ranks_add_in_the_same_order(rank: int) -> None:
    """Else each would round in its own way, and they would not go on with equal numbers.

    The words lie in one half of the buffers, and those of the sum before in the other.
    """
    from folo_lib.ticket_sums import exchange_kernel

    parts, old = make_parts(3), torch.full((5,), 7.0)
    words = torch.zeros(3, 2, 3, 8, dtype=torch.int64)  # of each rank, as it sees them
    addresses = torch.tensor([one.data_ptr() for one in words])
    tickets = torch.tensor([WRAPS], dtype=torch.int32)
    for ticket in (WRAPS + 1, WRAPS + 2):  # the second is 0
        words[rank, ticket % 2, :, :5] = pack(parts, ticket)
        words[:, (ticket + 1) % 2, :, :5] = pack(old, ticket - 1)
        words[rank, ticket % 2, rank] = 0  # nobody sends to himself
        before, out = words.clone(), torch.zeros(5)
        exchange_kernel[(1,)](
            parts[rank].view(torch.int32), out.view(torch.int32), words[rank], addresses,
            tickets, 5, 8, RANK=rank, RANKS=3, BLOCK=8, FLOAT=True,
        )  # fmt: skip
        assert out.equal((parts[0] + parts[1]) + parts[2])
        assert tickets.item() == ticket % 2**31
        for other in {0, 1, 2} - {rank}:
            before[other, ticket % 2, rank, :5] = pack(parts[rank], ticket)
        assert words.equal(before)


def test_words_that_are_sent() -> None:
    """Each with its ticket, where all ranks look for them, and nothing beyond the last."""
    from folo_lib.ticket_sums import send_kernel

    x = torch.tensor([1.5, -2.0, 0.0, -0.0, 1e-40, float("inf"), 9.0])
    words = torch.full((2, 3, 8), -1)
    addresses = torch.tensor([one.data_ptr() for one in words])
    tickets = torch.tensor([WRAPS], dtype=torch.int32)
    expected = words.clone()
    for index, slot in ((1, 0), (2, 2)):  # the ticket of the second is 0
        send_kernel[(2,)](x, addresses, 8 * slot, tickets, index, 6, RANKS=2, BLOCK=4)
        expected[:, slot, :6] = pack(x, WRAPS + index)[:6]
        assert words.equal(expected)


def come_later(words: Tensor, values: Tensor) -> threading.Thread:
    """Fills words while a kernel waits for them."""

    def write() -> None:
        time.sleep(0.2)
        for place, value in enumerate(values.tolist()):
            words[place] = value

    thread = threading.Thread(target=write)
    thread.start()
    return thread


@pytest.mark.parametrize("late", [0, 1, 2])
def test_numbers_that_come_late(late: int) -> None:
    """What is there before its time is neither taken nor added twice."""
    from folo_lib.ticket_sums import sum_kernel

    parts, index, size = make_parts(3), 5, 8
    words, x = torch.zeros(3, size, dtype=torch.int64), torch.full((6,), 4.0)
    words[:, :5] = pack(parts, WRAPS + index)
    words[late, :5] = pack(torch.full((5,), 7.0), WRAPS + index - 2)  # the last but one
    tickets = torch.tensor([WRAPS], dtype=torch.int32)
    thread = come_later(words[late], pack(parts[late], WRAPS + index))
    sum_kernel[(1,)](words, x, tickets, index, 5, size, RANKS=3, BLOCK=8, PDL=False)
    thread.join()
    assert x[:5].equal((parts[0] + parts[1]) + parts[2]) and x[5] == 4
    assert tickets.item() == WRAPS  # the last kernel of a step counts on


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_exchanged_late(dtype: torch.dtype) -> None:
    from folo_lib.ticket_sums import exchange_kernel

    count = 5 * 4 // dtype.itemsize
    mine, theirs = (torch.arange(2.0 * count) - 7).view(2, count).to(dtype)
    words = torch.zeros(2, 2, 2, 8, dtype=torch.int64)
    addresses = torch.tensor([one.data_ptr() for one in words])
    tickets = torch.tensor([8], dtype=torch.int32)
    out = torch.zeros_like(mine)
    come = pack(theirs, 9)
    words[0, 1, 1, :5] = pack(mine, 7)
    thread = come_later(words[0, 1, 1], come)
    exchange_kernel[(1,)](
        mine.view(torch.int32), out.view(torch.int32), words[0], addresses, tickets, 5,
        8, RANK=0, RANKS=2, BLOCK=8, FLOAT=dtype == torch.float32,
    )  # fmt: skip
    thread.join()
    assert out.equal(mine + theirs)
