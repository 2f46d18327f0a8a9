"""Checks of page 13's exercises: the last program, merged answers, a window in Triton."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require

__all__ = [
    "check_attend_in_window",
    "check_find_last_end",
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


WINDOW_SHAPE = 4, 2, 64, 4
"""Query heads, key heads, numbers of each, and slots of a block, as in the bundled model."""


def _make_window(
    seq_len: int, window: int, outside: float | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A query, caches and a table in random order, and the answer in float64.

    Args:
        outside: what lies in slots that are not seen; None: ordinary numbers.
    """
    heads, kv_heads, head_dim, block_size = WINDOW_SHAPE
    generator = torch.Generator().manual_seed(1000 * seq_len + window)
    num_blocks = -(-seq_len // block_size)
    table = torch.randperm(num_blocks, generator=generator)
    query, kv = (
        torch.randn(*shape, head_dim, generator=generator)
        for shape in ((heads,), (2, num_blocks * block_size, kv_heads))
    )
    first = max(0, seq_len - window)
    group = heads // kv_heads
    key, value = kv[:, first:seq_len].double().repeat_interleave(group, 2)
    scores = torch.einsum("hd,thd->ht", query.double(), key) * head_dim**-0.5
    answer = torch.einsum("ht,thd->hd", scores.softmax(-1), value)
    if outside is not None:
        kv[:, :first] = kv[:, seq_len:] = outside
    caches = torch.empty(2, num_blocks, block_size, kv_heads, head_dim)
    caches[:, table] = kv.view(2, num_blocks, block_size, kv_heads, head_dim)
    return (query, *caches, table), answer


@exercise
def check_attend_in_window(solution: Callable[..., Tensor]) -> None:
    """Beside softmax over the window, with `NaN` in all other slots in the end."""
    lens = [(12, 12), (12, 100), (1, 1), (12, 5), (31, 1), (30, 9), (67, 16), (67, 34)]
    for outside in (None, math.nan):
        for seq_len, window in lens:
            args, wanted = _make_window(seq_len, window, outside)
            got = solution(*args, seq_len, window)
            require(
                isinstance(got, Tensor) and got.shape == wanted.shape,
                f"it gives {list(getattr(got, 'shape', [])) or got!r}; wanted is a "
                f"tensor {list(wanted.shape)}.",
            )
            case = f"seq_len={seq_len}, window={window}"
            first = max(0, seq_len - window)
            if outside is None:
                require(
                    not got.isnan().any(),
                    f"the answer has NaN for {case}. In its first tile attend_tile "
                    "wants a key for every row: where all are hidden, the maximum is "
                    f"-inf, and -inf minus -inf is NaN. The first that is seen is {first}.",
                )
            else:
                require(
                    not got.isnan().any(),
                    f"the answer has NaN for {case}, where slots outside the window "
                    "hold NaN. A weight of zero does not help: load_tile must know "
                    "which tokens are to be read.",
                )
            require(
                torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5),
                f"the answer is wrong for {case}: seen are the positions {first} to "
                f"{seq_len - 1}.",
            )
