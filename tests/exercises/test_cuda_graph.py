"""Mistakes that people make in the exercises of page 14, and what the checks say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.cuda_graph import (
    check_count_accepted,
    check_make_geometric_buckets,
)


def without_the_last(n: int, smallest: int, factor: float, block: int) -> list[int]:
    buckets, width = [], smallest
    while width <= n:
        buckets.append(width)
        width = max(int(-(-width * factor // block)) * block, width + block)
    return buckets


def rounded_down(n: int, smallest: int, factor: float, block: int) -> list[int]:
    buckets, width = [], smallest
    while width < n:
        buckets.append(width)
        width = max(int(width * factor // block) * block, width + block)
    return [*buckets, n]


def not_whole_blocks(n: int, smallest: int, factor: float, block: int) -> list[int]:
    buckets, width = [], smallest
    while width < n:
        buckets.append(width)
        width = int(width * factor) + 1
    return [*buckets, n]


def doubling(n: int, smallest: int, factor: float, block: int) -> list[int]:
    buckets, width = [], smallest
    while width < n:
        buckets.append(width)
        width *= 2
    return [*buckets, n]


def stays_the_same(n: int, smallest: int, factor: float, block: int) -> list[int]:
    buckets, width = [], smallest
    while width < n:
        buckets.append(width)
        round(width * factor / block) * block
    return [*buckets, n]


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (without_the_last, "the last bucket must hold all"),
        (rounded_down, "more graphs than needed"),
        (not_whole_blocks, "round up to a multiple of 16"),
        (doubling, "jumps from 256 to 512"),
    ],
)
def test_make_geometric_buckets(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_make_geometric_buckets(attempt)
    assert not verdict and reason in verdict.message


def test_buckets_that_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folo_lib.course.exercises.MAX_SECONDS", 0.1)
    verdict = check_make_geometric_buckets(stays_the_same)
    assert not verdict and "still running" in verdict.message


def counts_all_that_agree(draft: Tensor, chosen: Tensor) -> Tensor:
    return (draft == chosen[:, :-1]).sum(-1) + 1


def forgets_its_own(draft: Tensor, chosen: Tensor) -> Tensor:
    return (draft == chosen[:, :-1]).long().cumprod(-1).sum(-1)


def loops(draft: Tensor, chosen: Tensor) -> Tensor:
    counts = []
    for guess, own in zip(draft, chosen, strict=True):
        right = 0
        while right < len(guess) and guess[right] == own[right]:
            right += 1
        counts.append(right + 1)
    return torch.tensor(counts)


def one_number(draft: Tensor, chosen: Tensor) -> Tensor:
    return (draft == chosen[:, :-1]).long().cumprod(-1).sum() + 1


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (counts_all_that_agree, "behind the first wrong guess does not count"),
        (forgets_its_own, "own choice is one token more"),
        (loops, "it asks the device for a value"),
        (one_number, "returns the shape []"),
    ],
)
def test_count_accepted(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_count_accepted(attempt)
    assert not verdict and reason in verdict.message
