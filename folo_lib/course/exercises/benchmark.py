"""Checks of the exercises on page 18."""

from __future__ import annotations

import math
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
def check_bytes_of_batch(
    bytes_of_batch: Callable[[int, int, list[int], list[int]], int],
) -> None:
    """Against a count step by step, for one request and for several."""
    cases: list[tuple[list[int], list[int], str]] = [
        (
            [3],
            [1],
            "the only step computes the prompt and gives the one token: it reads the weights, "
            "and no keys and values",
        ),
        (
            [3],
            [2],
            "the second step runs the first token of the answer, and attends to it too: to "
            "3 + 1 tokens",
        ),
        (
            [3],
            [5],
            "the context grows by a token with each step: 4 + 5 + 6 + 7 tokens",
        ),
        ([3, 6], [2, 2], "one reading of the weights serves all requests of a step"),
        (
            [3, 6],
            [5, 2],
            "there are as many steps as the longest answer has tokens, and a request that has "
            "ended is not read any more",
        ),
    ]
    weights, kv_bytes = 1000, 10
    for prompts, answers, hint in cases:
        wanted = 0
        for step in range(max(answers)):
            wanted += weights
            for prompt, answer in zip(prompts, answers, strict=True):
                if 0 < step < answer:
                    wanted += kv_bytes * (prompt + step)
        got = bytes_of_batch(weights, kv_bytes, list(prompts), list(answers))
        require(
            got == wanted,
            f"{got:,} bytes for prompts of {prompts} and answers of {answers} tokens, weights "
            f"of 1,000 bytes and 10 bytes for a token, where {wanted:,} is right: {hint}.",
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
