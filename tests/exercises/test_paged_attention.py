"""Checks of page 13's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.paged_attention import (
    check_attend_in_window,
    check_merge_answers,
    check_softmax_rows,
)


def softmax(
    x: Tensor,
    other: float = -torch.inf,
    shifted: bool = True,
    stride: int | None = None,
) -> Tensor:
    """The solution in PyTorch; each wrong attempt below changes one argument.

    Args:
        other: what stands in beyond the end of a row.
        shifted: whether the largest number is subtracted.
        stride: from row to row; None: that of `x`.
    """
    num_rows, length = x.shape
    stride = x.stride(0) if stride is None else stride
    rows = x.as_strided((num_rows, length), (stride, 1))
    row = torch.full((num_rows, 128), other)
    row[:, :length] = rows
    weights = (row - row.amax(1, keepdim=True) if shifted else row).exp()
    return (weights / weights.sum(1, keepdim=True))[:, :length]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"other": 0.0}, "the answer is wrong for rows of"),
        ({"shifted": False}, "subtract the largest of the row first"),
        ({"stride": 1}, "the answer is wrong for rows of 16"),
    ],
)
def test_softmax_rows(change: dict[str, Any], fragment: str) -> None:
    assert check_softmax_rows(softmax)
    verdict = check_softmax_rows(lambda x: softmax(x, **change))
    assert not verdict
    assert fragment in verdict.message


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (
            lambda x: x.sub_(x.amax(1, keepdim=True)).softmax(-1),
            "writes into its input",
        ),
        (lambda x: x.softmax(-1)[0], "wanted is a tensor [3, 16]"),
        (
            lambda x: x.contiguous().view(-1)[: x.numel()].softmax(-1).view_as(x),
            "wrong",
        ),
    ],
)
def test_softmax_rows_otherwise(attempt: Callable[..., Any], fragment: str) -> None:
    assert fragment in check_softmax_rows(attempt).message


def test_softmax_rows_that_are_taken_for_dense() -> None:
    """Right for all cases but those whose rows lie apart."""

    def dense(x: Tensor) -> Tensor:
        return softmax(x, stride=x.shape[1])

    assert "Row i begins i * x.stride(0)" in check_softmax_rows(dense).message


def merge(
    answers: Tensor,
    logs: Tensor,
    shifted: bool = True,
    one_for_all: bool = False,
    replaced: bool = True,
    guarded: bool = True,
    base: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """The solution; each wrong attempt below changes one argument."""
    highest = logs.amax() + 0 * logs[0] if one_for_all else logs.amax(0)
    if guarded:
        highest = highest.masked_fill(highest.isinf(), 0)
    if not shifted:
        highest = highest * 0
    weights = base ** (logs - highest)
    if replaced:
        answers = answers.masked_fill(logs.isneginf()[..., None], 0)
    total = weights.sum(0)
    summed = (weights[..., None] * answers).sum(0)
    return summed / total.clamp(min=1e-30)[:, None], highest + total.log2()


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"shifted": False}, "2**log overflows"),
        ({"replaced": False}, "0 times NaN is NaN"),
        ({"guarded": False}, "guard the largest log"),
        ({"base": 2.718}, "A part counts by its weight"),
    ],
)
def test_merge_answers(change: dict[str, Any], fragment: str) -> None:
    assert check_merge_answers(merge)
    verdict = check_merge_answers(lambda *args: merge(*args, **change))
    assert not verdict
    assert fragment in verdict.message


def mean(answers: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    return answers.mean(0), logs.exp2().sum(0).log2()


def no_logs(answers: Tensor, logs: Tensor) -> Any:
    return merge(answers, logs)[0]


def highest_log(answers: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    return merge(answers, logs)[0], logs.amax(0)


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (mean, "A part counts by its weight"),
        (no_logs, "wanted are two tensors"),
        (highest_log, "the log is wrong"),
    ],
)
def test_merge_answers_otherwise(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_merge_answers(attempt)
    assert not verdict
    assert fragment in verdict.message


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    seq_len: int,
    window: int,
    wider: int = 0,
    tile: int = 1,
    shape: tuple[int, ...] = (4, 64),
) -> Tensor:
    """The solution in PyTorch; each wrong attempt below changes one argument.

    Args:
        wider: by how many keys too many it sees.
        tile: more than one: what lies before the window in its first tile is read, and
            gets the weight zero.
    """
    first = max(0, seq_len - window - wider)
    begin = first // tile * tile
    key, value = (
        cache[table].flatten(0, 1)[begin:seq_len].repeat_interleave(2, 1)
        for cache in (key_cache, value_cache)
    )
    scores = torch.einsum("hd,thd->ht", query, key) / 8
    scores[:, : first - begin] = -torch.inf
    answer = torch.einsum("ht,thd->hd", scores.softmax(-1), value)
    return answer.view(shape)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"wider": 1}, "seen are the positions"),
        ({"wider": -1}, "the answer"),
        ({"tile": 4}, "load_tile must know which tokens are to be read"),
        ({"shape": (1, 4, 64)}, "it gives [1, 4, 64]"),
    ],
)
def test_attend_in_window(change: dict[str, Any], fragment: str) -> None:
    assert check_attend_in_window(attend)
    verdict = check_attend_in_window(lambda *args: attend(*args, **change))
    assert not verdict
    assert fragment in verdict.message


def test_attend_in_window_with_a_tile_that_is_hidden() -> None:
    """As in a loop that begins at 0: the first maximum is -inf."""

    def nothing_in_the_first_tile(*args: Any) -> Tensor:
        answer = attend(*args)
        return answer * torch.nan if args[-2] - args[-1] >= 8 else answer

    verdict = check_attend_in_window(nothing_in_the_first_tile)
    assert "In its first tile attend_tile wants a key for every row" in verdict.message
