"""Checks of the exercises on page 15."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require


@exercise
def check_floor_us(
    floor_us: Callable[[int, int, Sequence[int], float], float],
) -> None:
    """Weights once, and every token of every sequence."""
    for weight_bytes, token_bytes, seq_lens, speed, right, hint in (
        (1_192_099_840, 114_688, [], 4.4e12, 270.93, "no sequence, the weights alone"),
        (1_000_000, 1_000, [1_000], 1e9, 2_000.0, ""),
        (1_000_000, 1_000, [1_000] * 4, 1e9, 5_000.0, "the weights are read once"),
        (1_000_000, 1_000, [10, 990], 1e9, 2_000.0, "each sequence has its own length"),
        (1_192_099_840, 114_688, [32_768], 4.4e12, 1_125.05, "µs, not seconds"),
    ):
        got = floor_us(weight_bytes, token_bytes, list(seq_lens), speed)
        because = f": {hint}" if hint else ""
        require(
            math.isclose(got, right, rel_tol=1e-4),
            f"floor_us({weight_bytes:,}, {token_bytes:,}, {seq_lens}, {speed:.1e}) gives "
            f"{got:,.2f}, and {right:,.2f} is right{because}.",
        )


@exercise
def check_pack_bfloat16(pack_bfloat16: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Order, ties, both signs, and 32 bits."""
    scores = torch.tensor([-3.5, -1.0, -1e-20, 0.5, 1.0, 2.0, 3e38])
    ids = torch.arange(len(scores)).flip(0)
    packed = pack_bfloat16(scores.bfloat16(), ids.clone())
    require(isinstance(packed, Tensor), f"it returns {packed!r}: a tensor is wanted.")
    require(
        packed.dtype == torch.int32,
        f"its dtype is {packed.dtype}, not torch.int32: `atomic_max` of 32 bits wants it.",
    )
    require(packed.shape == (len(scores),), f"its shape is {list(packed.shape)}.")
    order = packed.argsort().tolist()
    sign = "of two negative scores the one nearer to 0 is the larger"
    require(
        order[-4:] == [3, 4, 5, 6],
        "among [0.5, 1.0, 2.0, 3e38] a larger score does not have the larger number.",
    )
    require(order == sorted(order), f"{scores.tolist()} come out as {order}: {sign}.")
    equal = torch.full((4,), 1.5).bfloat16()
    for value in (equal, -equal):
        ids = torch.tensor([65_535, 7, 40_000, 0])
        best = ids[pack_bfloat16(value, ids.clone()).argsort(descending=True)].tolist()
        require(
            best == [0, 7, 40_000, 65_535],
            f"of four scores of {value[0]:.1f} the tokens come in the order {best}: the "
            "lowest should win, up to 65,535, which needs all of 16 bits.",
        )
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5000, generator=generator).bfloat16()
    ids = torch.randperm(65_536, generator=generator)[:5000]
    packed = pack_bfloat16(scores, ids.clone())
    winner = int(packed.argmax())
    ties = ids[scores == scores.max()]
    require(
        scores[winner] == scores.max() and ids[winner] == ties.min(),
        f"of 5,000 scores {scores[winner]:.3f} of token {ids[winner]} wins, and it should "
        f"be {scores.max():.3f} of token {ties.min()}.",
    )


@exercise
def check_end_of_chain(
    end_of_chain: Callable[[list[tuple[float, float]], int], float],
) -> None:
    """By hand where it is easy, then against a clock that ticks."""
    for kernels, room, right, hint in (
        ([(2, 3)], 1, 5, ""),
        ([(2, 3), (2, 3)], 1, 10, "with room for one, nothing overlaps"),
        ([(2, 3), (2, 3)], 2, 8, "the second fetches while the first one works"),
        ([(2, 3), (9, 3)], 2, 12, "a long fetch ends after the kernel before it"),
        (
            [(1, 1), (1, 5), (8, 1)],
            2,
            11,
            "the third may start when the first has ended",
        ),
        ([(1, 1), (1, 5), (8, 1)], 3, 9, "with room for three, all start at once"),
        ([], 2, 0, "no kernels take no time"),
    ):
        got = end_of_chain(list(kernels), room)
        because = f": {hint}" if hint else ""
        require(
            got == right,
            f"end_of_chain({kernels}, {room}) gives {got}, and {right} is right{because}.",
        )
    draw = random.Random(0)
    for _ in range(200):
        kernels = [
            (draw.randint(0, 6), draw.randint(1, 6)) for _ in range(draw.randint(1, 8))
        ]
        room = draw.randint(1, 4)
        got, right = end_of_chain(list(kernels), room), tick(kernels, room)
        require(
            got == right,
            f"end_of_chain({kernels}, {room}) gives {got}, and {right} is right.",
        )


def tick(kernels: Sequence[tuple[int, int]], room: int) -> int:
    """The same by playing it, one unit of time after another."""
    fetch, work = [k[0] for k in kernels], [k[1] for k in kernels]
    first, clock = 0, 0  # the first kernel that has not ended
    while first < len(kernels):
        clock += 1
        for i in range(first, min(first + room, len(kernels))):
            if fetch[i] > 0:
                fetch[i] -= 1
            elif i == first:
                work[i] -= 1
        while first < len(kernels) and work[first] == 0:
            first += 1
    return clock
