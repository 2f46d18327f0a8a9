"""Mistakes that people make in the exercises of page 14, and what the checks say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.cuda_graph import (
    check_choose_few_sizes,
    check_count_accepted,
    check_count_padding,
    count_padded_rows,
)


def count_loosely(sizes: list[int], num_seqs: int) -> int:
    return min((size - num_seqs for size in sizes if size > num_seqs), default=0)


def takes_the_first(sizes: list[int], num_seqs: int) -> int:
    return next((size - num_seqs for size in sizes if size >= num_seqs), 0)


def needs_a_graph(sizes: list[int], num_seqs: int) -> int:
    return min((size for size in sizes if size >= num_seqs), default=0) - num_seqs


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (count_loosely, "a graph of exactly that size"),
        (takes_the_first, "in any order"),
        (needs_a_graph, "nothing is padded"),
    ],
)
def test_count_padding(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_count_padding(attempt)
    assert not verdict and reason in verdict.message


def evenly_spread(steps: dict[int, int], num_graphs: int) -> list[int]:
    largest = max(steps)
    return sorted({-(-largest * (i + 1) // num_graphs) for i in range(num_graphs)})


def the_commonest(steps: dict[int, int], num_graphs: int) -> list[int]:
    return sorted(sorted(steps, key=lambda n: -steps[n])[:num_graphs])


def greedily(steps: dict[int, int], num_graphs: int) -> list[int]:
    """The best next size, one after another; the best pair need not hold it."""
    sizes = [max(steps)]
    while len(sizes) < min(num_graphs, len(steps)):
        rest = [n for n in steps if n not in sizes]
        sizes.append(min(rest, key=lambda n: count_padded_rows(steps, [*sizes, n])))
    return sorted(sizes)


def all_of_them(steps: dict[int, int], num_graphs: int) -> list[int]:
    return sorted(steps)


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (evenly_spread, "pads"),
        (the_commonest, "the last size must be"),
        (greedily, "pads"),
        (all_of_them, "may be recorded at most"),
    ],
)
def test_choose_few_sizes(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_choose_few_sizes(attempt)
    assert not verdict and reason in verdict.message


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
        (counts_all_that_agree, "after the first wrong guess does not count"),
        (forgets_its_own, "own choice is one token more"),
        (loops, "it asks the device for a value"),
        (one_number, "returns the shape []"),
    ],
)
def test_count_accepted(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_count_accepted(attempt)
    assert not verdict and reason in verdict.message
