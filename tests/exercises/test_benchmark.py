"""Mistakes that people make in the exercises of page 18, and what the checks say."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from folo_lib.course.exercises.benchmark import (
    check_bootstrap_interval,
    check_bound_throughput,
)


def without_the_cache(weights: int, token: int, contexts: list[int], bw: float) -> Any:
    return len(contexts) * bw / weights


def weights_for_each(weights: int, token: int, contexts: list[int], bw: float) -> Any:
    return len(contexts) * bw / sum(weights + token * n for n in contexts)


def steps_per_second(weights: int, token: int, contexts: list[int], bw: float) -> Any:
    return bw / (weights + token * sum(contexts))


def all_alike(weights: int, token: int, contexts: list[int], bw: float) -> Any:
    return len(contexts) * bw / (weights + token * contexts[0] * len(contexts))


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (without_the_cache, "its keys and values are read too"),
        (weights_for_each, "one token to each sequence"),
        (steps_per_second, "one token to each sequence"),
        (all_alike, "may differ in length"),
    ],
)
def test_bound_throughput(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_bound_throughput(attempt)
    assert not verdict and reason in verdict.message


def resample(
    values: list[float], number: int, draw: random.Random, take: Any, size: int
) -> list[float]:
    return sorted(take(draw.choices(values, k=size)) for _ in range(number))


def unseeded(values: list[float], number: int = 1000, seed: int = 0) -> Any:
    medians = resample(values, number, random.Random(), statistics.median, len(values))
    return medians[random.randrange(number // 2)], medians[-1 - random.randrange(99)]


def without_replacement(values: list[float], number: int = 1000, seed: int = 0) -> Any:
    draw = random.Random(seed)
    medians = [
        statistics.median(draw.sample(values, k=len(values))) for _ in range(number)
    ]
    return min(medians), max(medians)


def of_the_values(values: list[float], number: int = 1000, seed: int = 0) -> Any:
    ordered = sorted(values)
    cut = round(0.025 * len(values))
    return ordered[cut], ordered[-1 - cut]


def the_middle_half(values: list[float], number: int = 1000, seed: int = 0) -> Any:
    size = len(values)
    draw = random.Random(seed)
    medians = resample(values, number, draw, statistics.median, size)
    return medians[number // 4], medians[-1 - number // 4]


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (unseeded, "draw from random.Random(seed)"),
        (without_replacement, "with replacement"),
        (of_the_values, "and not the values"),
        (the_middle_half, "from the 2.5th to the 97.5th"),
    ],
)
def test_bootstrap_interval(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_bootstrap_interval(attempt)
    assert not verdict and reason in verdict.message
