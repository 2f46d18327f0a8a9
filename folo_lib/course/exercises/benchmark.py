"""Checks of the exercises on page 18."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

from folo_lib.benchmark import Run
from folo_lib.course.exercises import exercise, require


def _run(num_tokens: int, ttft: float, seconds: float) -> Run:
    """A run whose tokens after the first came in that many seconds."""
    return Run([0] * num_tokens, ttft, ttft + seconds)


@exercise
def check_tokens_per_second(
    tokens_per_second: Callable[[list[Run]], float],
) -> None:
    """Against sums of tokens and of seconds, for runs that differ more and more."""
    cases: list[tuple[list[Run], str]] = [
        (
            [_run(5, 0.5, 1.0)],
            "four tokens came after the first, in the time from the first to the last",
        ),
        (
            [_run(101, 0.5, 1.0), _run(101, 0.5, 10.0)],
            "add up the tokens, add up the seconds, and divide once. A mean or a median "
            "of rates forgets that the slow answer took more of the time",
        ),
        (
            [_run(11, 0.5, 1.0), _run(101, 0.5, 1.0)],
            "an answer of a hundred tokens counts for more than one of ten, which a mean "
            "over answers forgets, of rates or of TPOT",
        ),
        (
            [_run(1, 0.5, 0.0), _run(5, 0.5, 1.0)],
            "an answer of one token has no tokens after the first",
        ),
    ]
    for runs, hint in cases:
        wanted = sum(len(run.token_ids) - 1 for run in runs) / sum(
            run.total - run.ttft for run in runs
        )
        # The learner may empty the list.
        got = tokens_per_second(list(runs))
        shown = " and ".join(
            f"{len(run.token_ids)} tokens (TTFT {run.ttft} s, total {run.total} s)"
            for run in runs
        )
        require(
            math.isclose(got, wanted, rel_tol=1e-9),
            f"{got:.2f} tokens/s for {shown}, where {wanted:.2f} is right: {hint}.",
        )


@exercise
def check_bootstrap_interval(
    bootstrap_interval: Callable[..., tuple[float, float]],
) -> None:
    """Repeatable, with replacement, of medians, and as wide as it should be."""
    draw = random.Random(1)
    many = [draw.gauss(10, 1) for _ in range(101)]
    require(
        bootstrap_interval(many) == bootstrap_interval(many),
        "two calls with the same seed differ: draw from random.Random(seed).",
    )
    values = [2.0, 2.1, 2.0, 3.0, 2.05]
    low, high = bootstrap_interval(values)
    require(
        min(values) <= low <= high <= max(values),
        f"({low}, {high}) for {values}: no median can lie outside of the values, and the "
        "lower bound comes first.",
    )
    require(
        low < high,
        f"the interval of {values} has no width: were the values drawn with replacement?",
    )
    require(
        bootstrap_interval([4.0] * 5) == (4.0, 4.0),
        "five equal values leave no doubt: both bounds are that value.",
    )
    low, high = bootstrap_interval(many, 4000, 3)
    require(
        low <= statistics.median(many) <= high,
        f"({low:.2f}, {high:.2f}) does not hold the median itself, "
        f"{statistics.median(many):.2f}: take medians, of the values.",
    )
    width, wanted = high - low, 2 * 1.96 * 1.2533 / math.sqrt(101)
    require(
        width > 0.55 * wanted,
        f"for 101 normal values the interval is {width:.3f} wide, about {wanted:.2f} is "
        "right: resample as many values as there are, and go from the 2.5th to the "
        "97.5th percentile (the mean's interval is narrower than the median's).",
    )
    require(
        width < 1.6 * wanted,
        f"for 101 normal values the interval is {width:.3f} wide, about {wanted:.2f} is "
        "right: is it the medians that you take percentiles of, and not the values?",
    )
    inside = 0
    for trial in range(60):
        sample = [draw.gauss(0, 1) for _ in range(15)]
        low, high = bootstrap_interval(sample, 300, trial)
        inside += low <= 0 <= high
    require(
        inside >= 50,
        f"of 60 intervals, only {inside} hold the true median: about 57 should.",
    )


def _uneven(won: int, lost: int) -> float:
    """The probability that `won + lost` coins fall at least as unevenly as that."""
    pairs, lead = won + lost, abs(won - lost)
    ways = sum(
        math.comb(pairs, heads)
        for heads in range(pairs + 1)
        if abs(2 * heads - pairs) >= lead
    )
    return ways * 0.5**pairs


@exercise
def check_sign_test(sign_test: Callable[[list[float], list[float]], float]) -> None:
    """Against the count of all ways to fall, with ties, drift and no pair at all."""
    ones, drift = [1.0] * 8, [1.05**i for i in range(8)]
    # Each case: the times of both, pairs that the first won and lost, what went wrong.
    cases: list[tuple[list[float], list[float], int, int, str]] = [
        (
            ones[:5],
            [2.0] * 5,
            5,
            0,
            "five coins fall in 32 ways, and two of them are as uneven as five to none, "
            "because either side may win",
        ),
        ([2.0] * 5, ones[:5], 0, 5, "it does not matter which of the two won"),
        (
            ones,
            [2.0] * 7 + [0.5],
            7,
            1,
            "at least as uneven means that eight to none counts as well as seven to one",
        ),
        (
            ones,
            [2.0, 0.5] * 4,
            4,
            4,
            "no way to fall is more even than this, so all of them count, once each",
        ),
        (ones, [2.0] * 6 + [1.0] * 2, 6, 0, "a pair of equal times is left out"),
        (
            drift,
            [1.01 * time for time in drift],
            8,
            0,
            "the machine became slower and slower, and only the two runs of a pair saw "
            "it in the same state: compare run by run",
        ),
        (
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            [6.5, 1.5, 2.5, 3.5, 4.5, 5.5],
            1,
            5,
            "run i of one belongs to run i of the other, so keep the order of the runs",
        ),
        (ones, list(ones), 0, 0, "where no pair is left, nothing speaks against luck"),
    ]
    for first, second, won, lost, hint in cases:
        wanted = _uneven(won, lost)
        got = sign_test(list(first), list(second))
        times = " and ".join(
            "[" + ", ".join(f"{time:.3g}" for time in times) + "]"
            for times in (first, second)
        )
        require(
            math.isclose(got, wanted, rel_tol=1e-9),
            f"{got:.4g} for {times}, where {wanted:.4g} is right: {hint}.",
        )
