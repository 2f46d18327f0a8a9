"""Checks of page 13's exercises: the last program, merged answers, the tiles of a window."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require

__all__ = [
    "check_find_last_end",
    "check_find_tiles",
    "check_merge_answers",
]


@exercise
def check_find_last_end(solution: Callable[[list[float], int], float]) -> None:
    """Beside a clock that goes from one end to the next."""
    rng = random.Random(13)
    drawn = [[rng.randint(1, 9) / 2 for _ in range(n)] for n in (5, 12, 40)]
    for durations, num_places, name in [
        ([2.0], 4, "[2.0]"),
        ([1.0] * 396, 396, "[1.0] * 396"),
        ([1.0] * 512, 396, "[1.0] * 512"),
        ([8.0] + [1.0] * 8, 2, "[8.0] + [1.0] * 8"),
        ([1.0] * 8 + [8.0], 2, "[1.0] * 8 + [8.0]"),
        ([1.0, 4.0, 1.0, 1.0], 2, "[1.0, 4.0, 1.0, 1.0]"),
        *((one, n, str(one)) for one, n in zip(drawn, (2, 3, 7), strict=True)),
    ]:
        ends = [0.0] * num_places
        for duration in durations:
            first = ends.index(min(ends))
            ends[first] += duration
        got = solution(list(durations), num_places)
        require(
            isinstance(got, float | int) and math.isclose(got, max(ends)),
            f"({name}, {num_places}) gives {got!r}, not {max(ends):g}: a program begins "
            "in the place that is free first.",
        )


def _attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores `[N, T]` and values `[T, D]`, in float64: the answer and log2 of its weight."""
    logs = scores.double().logsumexp(-1) / math.log(2)
    return scores.double().softmax(-1) @ values.double(), logs


def _split(
    seed: int, lengths: list[int], shift: float, num_empty: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Answers and logs of the parts of a context, some empty, and those of the whole."""
    generator = torch.Generator().manual_seed(seed)
    scores = [2 * torch.randn(6, n, generator=generator) + shift for n in lengths]
    values = [torch.randn(n, 8, generator=generator) for n in lengths]
    pairs = [_attend(*pair) for pair in zip(scores, values, strict=True)]
    pairs += [(torch.full((6, 8), math.nan), torch.full((6,), -math.inf))] * num_empty
    answers, logs = (torch.stack(x).float() for x in zip(*pairs, strict=True))
    return answers, logs, _attend(torch.cat(scores, -1), torch.cat(values))


def _judge(got: Any, wanted: tuple[Tensor, Tensor], name: str, hint: str) -> None:
    require(
        isinstance(got, tuple) and len(got) == 2,
        f"it gives a {type(got).__name__}; wanted are two tensors, answers and logs.",
    )
    for what, ours, theirs in zip(("answer", "log"), got, wanted, strict=True):
        require(
            isinstance(ours, Tensor) and ours.shape == theirs.shape,
            f"the {what}s of {name} have the shape {list(getattr(ours, 'shape', []))}, "
            f"not {list(theirs.shape)}.",
        )
        close = torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-5)
        require(close, f"the {what} is wrong for {name}. {hint}")


@exercise
def check_merge_answers(
    solution: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Against softmax over the whole context, for contexts in several parts."""
    weights = "A part counts by its weight, 2**log, and not like every other."
    large = "2**log overflows: subtract the largest log of each query first."
    empty = (
        "A part whose log is -inf has the weight 0, and 0 times NaN is NaN: put zeros in "
        "the place of its answer."
    )
    cases = [
        ("one part", [5], 0.0, "The only part is the whole context."),
        ("two parts", [5, 9], 0.0, weights),
        ("four parts", [1, 40, 3, 7], 0.0, weights),
        ("weights of 2**400", [5, 9], 280.0, large),
        ("weights of 2**-400", [5, 9], -280.0, large),
    ]
    for extra in (0, 1):
        for seed, (name, lengths, shift, hint) in enumerate(cases):
            answers, logs, wanted = _split(seed, lengths, shift, extra)
            if extra:
                name, hint = f"{name} and an empty one", empty
            _judge(solution(answers, logs), wanted, name, hint)
    answers, logs = torch.full((2, 3, 4), math.nan), torch.full((2, 3), -math.inf)
    answers[0, 1], logs[0, 1] = 7.0, 3.0  # the only part that is not empty
    expected = torch.zeros(3, 4).double(), logs.double().amax(0)
    expected[0][1] = 7.0
    hint = "-inf minus -inf is NaN: guard the largest log where no part has a weight."
    _judge(solution(answers, logs), expected, "queries without any key", hint)


def _by_hand(first: int, last: int, window: int, tile: int) -> tuple[range, range]:
    """By looking at every pair of a query and a key."""
    some, every = [], []
    for i in range(last // tile + 2):
        seen = [
            0 <= query - key < window
            for query in range(first, last + 1)
            for key in range(i * tile, (i + 1) * tile)
        ]
        some += [i] * any(seen)
        every += [i] * all(seen)
    read = range(some[0], some[-1] + 1)
    return read, range(every[0], every[-1] + 1) if every else range(0)


@exercise
def check_find_tiles(
    solution: Callable[[int, int, int, int], tuple[range, range]],
) -> None:
    """Against a table of who sees what, query by query and key by key."""
    rng = random.Random(0)
    cases = [
        (0, 7, 100, 4),
        (8, 15, 100, 4),
        (8, 8, 1, 4),
        (20, 23, 4, 4),
        (20, 23, 12, 4),
        (19, 22, 9, 4),
        (3, 3, 2, 8),
    ]
    for _ in range(300):
        first = rng.randint(0, 60)
        last = first + rng.randint(0, 12)
        cases.append((first, last, rng.randint(1, 40), rng.randint(1, 9)))
    for first, last, window, tile in cases:
        call = f"({first}, {last}, {window}, {tile})"
        got = solution(first, last, window, tile)
        require(
            isinstance(got, tuple)
            and len(got) == 2
            and all(isinstance(x, range) for x in got),
            f"{call} gives {got!r}; wanted are two ranges.",
        )
        read, whole = _by_hand(first, last, window, tile)
        oldest = max(0, first - window + 1)
        require(
            list(got[0]) == list(read),
            f"{call} reads the tiles {list(got[0])}, not {list(read)}: the first query "
            f"sees the keys {oldest} to {first}, and the last one sees itself, {last}.",
        )
        left = max(0, last - window + 1)
        require(
            list(got[1]) == list(whole),
            f"{call} needs no mask for the tiles {list(got[1])}; it should be "
            f"{list(whole)}: all queries see only what the first sees, up to {first}, "
            f"and what the last still sees, from {left} on.",
        )
