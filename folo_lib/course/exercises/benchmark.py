"""Checks of the exercises on page 18."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

from folo_lib.course.exercises import exercise, require


@exercise
def check_bound_throughput(
    bound_throughput: Callable[[int, int, list[int], float], float],
) -> None:
    """Against the arithmetic, for one sequence, many equal and many unequal ones."""
    cases: list[tuple[int, int, list[int], float, str]] = [
        (10**9, 10**5, [0], 1e12, "one sequence and no context: bandwidth / weights"),
        (10**9, 10**5, [1000], 1e12, "its keys and values are read too"),
        (10**9, 10**5, [0] * 8, 1e12, "a step gives one token to each sequence"),
        (10**9, 10**5, [1000] * 8, 1e12, "weights are read once, not once a sequence"),
        (10**9, 10**5, [1, 50, 2000], 1e12, "sequences may differ in length"),
        (1_192_099_840, 114_688, [8192] * 32, 4.3e12, "a real case"),
    ]
    for weight_bytes, token_bytes, contexts, bandwidth, hint in cases:
        step = (weight_bytes + token_bytes * sum(contexts)) / bandwidth
        wanted = len(contexts) / step
        got = bound_throughput(weight_bytes, token_bytes, contexts, bandwidth)
        shown = (
            contexts if len(contexts) < 5 else f"{len(contexts)} times {contexts[0]}"
        )
        require(
            math.isclose(got, wanted, rel_tol=1e-9),
            f"{got:,.1f} tokens/s for contexts of {shown}, where {wanted:,.1f} is right: "
            f"{hint}.",
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
