"""Checks of page 13's exercises: a softmax in Triton, merged answers, a window in Triton."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require

__all__ = [
    "check_attend_in_window",
    "check_merge_answers",
    "check_softmax_rows",
]


@exercise
def check_softmax_rows(solution: Callable[[Tensor], Tensor]) -> None:
    """Beside PyTorch: rows of many lengths, large numbers, and rows that lie apart."""
    generator = torch.Generator().manual_seed(13)

    def draw(num_rows: int, length: int) -> Tensor:
        return torch.randn(num_rows, length, generator=generator)

    beyond = (
        "What lies beyond the end of a row has to count as -inf: exp of 0 is 1, and that "
        "would be in the sum."
    )
    large = "exp of a large number is inf: subtract the largest of the row first."
    strided = "Row i begins i * x.stride(0) numbers after the first one."
    for x, name, hint in [
        (draw(3, 16), "rows of 16 numbers", "One program takes one row."),
        (draw(2, 1), "rows of one number", beyond),
        (draw(5, 100), "rows of 100 numbers", beyond),
        (draw(4, 37) - 20, "rows of 37 numbers around -20", beyond),
        (300 * draw(3, 128), "numbers around 300", large),
        (draw(6, 90)[:, 10:60], "rows of 50 that lie 90 apart", strided),
        (draw(8, 64)[::2], "every second row of eight", strided),
    ]:
        kept = x.clone()
        got = solution(x)
        require(
            isinstance(got, Tensor) and got.shape == x.shape,
            f"it gives {list(getattr(got, 'shape', [])) or got!r}; wanted is a tensor "
            f"{list(x.shape)}.",
        )
        require(torch.equal(x, kept), "it writes into its input.")
        right = torch.allclose(got, x.softmax(-1), rtol=1e-4, atol=1e-6)
        require(right, f"the answer is wrong for {name}. {hint}")


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
