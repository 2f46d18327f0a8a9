"""Checks of page 13's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from folo_lib.course.exercises.paged_attention import (
    check_find_last_end,
    check_find_tiles,
    check_merge_answers,
)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda durations, num_places: sum(durations) / num_places,
        lambda durations, num_places: -(-len(durations) // num_places) * max(durations),
        lambda durations, num_places: max(
            sum(durations[i::num_places]) for i in range(num_places)
        ),
        lambda durations, num_places: max(
            max(durations), sum(durations) / min(num_places, len(durations))
        ),
    ],
    ids=["mean", "rounds", "in turn", "bound"],
)
def test_find_last_end(attempt: Callable[..., Any]) -> None:
    verdict = check_find_last_end(attempt)
    assert not verdict
    assert "in the place that is free first" in verdict.message


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


def tiles(
    first: int,
    last: int,
    window: int,
    tile: int,
    at_zero: bool = True,
    itself: int = 1,
    oldest_of: str = "first",
    rounded_up: bool = True,
    behind: int = 1,
) -> tuple[range, range]:
    """The solution; each wrong attempt below changes one argument."""
    floor = 0 if at_zero else -(10**9)
    start = (first if oldest_of == "first" else last) - window + itself
    read = range(max(floor, start) // tile, last // tile + 1)
    begin = max(0, last - window + 1) + (tile - 1 if rounded_up else 0)
    whole = range(begin // tile, (first + behind) // tile)
    return read, whole


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"at_zero": False}, "reads the tiles"),
        ({"itself": 0}, "reads the tiles"),
        ({"oldest_of": "last"}, "reads the tiles"),
        ({"rounded_up": False}, "needs no mask"),
        ({"behind": 0}, "needs no mask"),
    ],
)
def test_find_tiles(change: dict[str, Any], fragment: str) -> None:
    assert check_find_tiles(tiles)
    verdict = check_find_tiles(lambda *args: tiles(*args, **change))
    assert not verdict
    assert fragment in verdict.message


def test_find_tiles_wants_ranges() -> None:
    verdict = check_find_tiles(lambda *args: [list(x) for x in tiles(*args)])
    assert not verdict
    assert "wanted are two ranges" in verdict.message
