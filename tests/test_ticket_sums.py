"""Sums without a barrier, between two processes that share memory as GPUs of one host do.

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


def make_empty(*shape: int) -> Tensor:
    """Places where nothing has come."""
    from folo_lib.ticket_sums import EMPTY

    return torch.full(shape, EMPTY.value, dtype=torch.int32)


def as_words(numbers: Tensor) -> Tensor:
    """As they travel; none of the numbers in these tests is -0.0."""
    return numbers.contiguous().view(torch.int32)


def run_rank(rank: int, words: Sequence[Tensor], answers: Any) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from folo_lib.ticket_sums import exchange_kernel

        addresses = torch.tensor([one.data_ptr() for one in words])
        turns = torch.zeros(SIZE // BLOCK, dtype=torch.int32)
        outputs = []
        for dtype in DTYPES:
            for length in LENGTHS:
                x = make_numbers(rank, length, dtype)
                out = torch.full_like(x, float("nan"))
                exchange_kernel[(-(-length // BLOCK),)](
                    x.view(torch.int32), out.view(torch.int32), words[rank], addresses,
                    turns, length, SIZE, RANK=rank, RANKS=len(words), BLOCK=BLOCK,
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
    words = [make_empty(2, num_ranks, SIZE).share_memory_() for _ in range(num_ranks)]
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

    Twice, in both halves of the buffers; what has been read is empty again.
    """
    from folo_lib.ticket_sums import exchange_kernel

    parts, others = make_parts(3), {0, 1, 2} - {rank}
    words = make_empty(3, 2, 3, 8)  # of each rank, as it sees them
    addresses = torch.tensor([one.data_ptr() for one in words])
    turns, expected = torch.tensor([1], dtype=torch.int32), words.clone()
    for half in (1, 0):
        out = torch.zeros(5)
        for other in others:
            words[rank, half, other, :5] = as_words(parts[other])
        exchange_kernel[(1,)](
            parts[rank].view(torch.int32), out.view(torch.int32), words[rank], addresses,
            turns, 5, 8, RANK=rank, RANKS=3, BLOCK=8, FLOAT=True,
        )  # fmt: skip
        assert out.equal((parts[0] + parts[1]) + parts[2])
        assert turns.item() == 1 - half
        for other in others:
            expected[other, half, rank, :5] = as_words(parts[rank])
        assert words.equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_look_like_an_empty_place(dtype: torch.dtype) -> None:
    """A rank that sent them would be waited for without end; all add up zeros instead."""
    from folo_lib.ticket_sums import exchange_kernel

    words, turns = make_empty(2, 2, 2, 2), torch.tensor([0], dtype=torch.int32)
    x = torch.cat([make_empty(1), torch.tensor([-0.0]).view(torch.int32)])
    out, theirs = torch.zeros_like(x), torch.tensor([3.0, 5.0]).view(torch.int32)
    words[0, 0, 1] = theirs
    exchange_kernel[(1,)](
        x, out, words[0], torch.tensor([one.data_ptr() for one in words]), turns, 2, 2,
        RANK=0, RANKS=2, BLOCK=2, FLOAT=dtype == torch.float32,
    )  # fmt: skip
    assert words[1, 0, 0].tolist() == [0, x[1].item()]
    expected = x.view(dtype).float() + theirs.view(dtype).float()
    assert out.view(dtype).float().equal(expected)


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
    words = make_empty(2, 2, 2, 8)
    addresses = torch.tensor([one.data_ptr() for one in words])
    turns, out = torch.tensor([1], dtype=torch.int32), torch.zeros_like(mine)
    words[0, 0, 1, :5] = as_words(mine)  # in the other half
    thread = come_later(words[0, 1, 1], as_words(theirs))
    exchange_kernel[(1,)](
        mine.view(torch.int32), out.view(torch.int32), words[0], addresses, turns, 5, 8,
        RANK=0, RANKS=2, BLOCK=8, FLOAT=dtype == torch.float32,
    )  # fmt: skip
    thread.join()
    assert out.equal(mine + theirs)


# --- Sums and norms in one kernel -------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_sums(num_ranks: int, dtype: torch.dtype) -> None:
    """As the sum and page 03's norm one after the other; each rank writes to all others."""
    from folo_lib.layers import RMSNorm
    from folo_lib.ticket_sums import add_norm_kernel

    rows, count = 3, 24
    torch.manual_seed(num_ranks)
    parts = torch.randint(-60, 60, (num_ranks, rows, count)).to(dtype)
    residual = torch.randint(-60, 60, (rows, count)).to(dtype)  # no sum is rounded
    norm = RMSNorm(count, 0.5).to(dtype)
    norm.weight.detach().uniform_(-2, 2)
    width, rank = count * dtype.itemsize // 4, num_ranks - 1
    words = make_empty(num_ranks, 2, num_ranks, 4 * width)  # a row has room left
    addresses = torch.tensor([one.data_ptr() for one in words])
    turns, others = torch.tensor([0, 1, 0], dtype=torch.int32), range(rank)
    for row, half in enumerate(turns.tolist()):
        there = slice(row * width, (row + 1) * width)
        for other in others:
            words[rank, half, other, there] = as_words(parts[other, row])
    normed, stream = torch.full((2, rows, count), float("nan")).to(dtype)
    tensors = parts[rank], residual, norm.weight.detach(), normed, stream
    add_norm_kernel[(rows,)](
        *(one.view(torch.int32) for one in tensors), words[rank], addresses, turns,
        4 * width, norm.eps, W=width, RANK=rank, RANKS=num_ranks, BLOCK=32,
        FLOAT=dtype == torch.float32,
    )  # fmt: skip
    assert stream.float().equal(parts.float().sum(0) + residual.float())
    close = {} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(normed, norm(stream).detach(), **close)
    assert turns.tolist() == ([0, 1, 0] if num_ranks == 1 else [1, 0, 1])
    expected = make_empty(*words.shape)
    for row, half in enumerate([0, 1, 0]):
        for other in others:
            there = slice(row * width, (row + 1) * width)
            expected[other, half, rank, there] = as_words(parts[rank, row])
    assert words.equal(expected)
