"""Mistakes that people make in the exercises of page 18, and what the checks say."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from folo_lib.benchmark import Run, paired_ratios, weight_bytes_per_step
from folo_lib.benchmark_systems import QWEN3_0_6B
from folo_lib.benchmark_throughput import workload_bytes
from folo_lib.benchmark_workloads import ThroughputSizes, make_mixed
from folo_lib.course.exercises.benchmark import (
    check_bytes_of_batch,
    check_sign_test,
    check_tokens_per_second,
)
from folo_lib.kv_cache import kv_bytes_per_token
from tests.exercises.test_all import PAGES, solutions


def decode_tokens(runs: list[Run]) -> int:
    return sum(len(run.token_ids) - 1 for run in runs)


def with_the_first_token(runs: list[Run]) -> Any:
    tokens = sum(len(run.token_ids) for run in runs)
    return tokens / sum(run.total - run.ttft for run in runs)


def with_the_prompt(runs: list[Run]) -> Any:
    return decode_tokens(runs) / sum(run.total for run in runs)


def mean_of_rates(runs: list[Run]) -> Any:
    return statistics.mean(1 / run.tpot for run in runs)


def median_of_rates(runs: list[Run]) -> Any:
    return statistics.median(1 / run.tpot for run in runs)


def one_over_mean_tpot(runs: list[Run]) -> Any:
    return 1 / statistics.mean(run.tpot for run in runs)


def at_least_one_token(runs: list[Run]) -> Any:
    tokens = sum(max(1, len(run.token_ids) - 1) for run in runs)
    return tokens / sum(run.total - run.ttft for run in runs)


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (with_the_first_token, "four tokens came after the first"),
        (with_the_prompt, "from the first to the last"),
        (mean_of_rates, "divide once"),
        (median_of_rates, "divide once"),
        (one_over_mean_tpot, "counts for more than one of ten"),
        (at_least_one_token, "no tokens after the first"),
    ],
)
def test_tokens_per_second(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_tokens_per_second(attempt)
    assert not verdict and reason in verdict.message


def test_tokens_per_second_by_weights_is_right_too() -> None:
    def weighted(runs: list[Run]) -> float:
        """One over the mean TPOT, in which each token counts once."""
        total = sum(run.tpot * (len(run.token_ids) - 1) for run in runs)
        return decode_tokens(runs) / total

    assert check_tokens_per_second(weighted)


def of_steps(
    weights: int,
    kv_bytes: int,
    pairs: list[tuple[int, int]],
    steps: int,
    first: int = 1,
    more: int = 0,
) -> int:
    """Bytes of requests whose step `k` attends to `prompt + k + more` tokens."""
    tokens = sum(p + k + more for p, n in pairs for k in range(first, n))
    return steps * weights + kv_bytes * tokens


def pairs_of(prompts: list[int], answers: list[int]) -> list[tuple[int, int]]:
    return list(zip(prompts, answers, strict=True))


def prompt_is_read_back(w: int, kv: int, prompts: list[int], answers: list[int]) -> int:
    pairs = pairs_of(prompts, answers)
    return of_steps(w, kv, pairs, max(answers), first=0)


def without_the_token_that_runs(
    w: int, kv: int, prompts: list[int], answers: list[int]
) -> int:
    pairs = pairs_of(prompts, answers)
    return of_steps(w, kv, pairs, max(answers), more=-1)


def context_stands_still(
    w: int, kv: int, prompts: list[int], answers: list[int]
) -> int:
    tokens = sum((p + 1) * (n - 1) for p, n in pairs_of(prompts, answers))
    return w * max(answers) + kv * tokens


def weights_for_each(w: int, kv: int, prompts: list[int], answers: list[int]) -> int:
    return of_steps(w, kv, pairs_of(prompts, answers), sum(answers))


def steps_of_the_first(w: int, kv: int, prompts: list[int], answers: list[int]) -> int:
    return of_steps(w, kv, pairs_of(prompts, answers), min(answers))


def all_to_the_end(w: int, kv: int, prompts: list[int], answers: list[int]) -> int:
    pairs = [(prompt, max(answers)) for prompt in prompts]
    return of_steps(w, kv, pairs, max(answers))


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (prompt_is_read_back, "no keys and values"),
        (without_the_token_that_runs, "attends to it too"),
        (context_stands_still, "grows by a token"),
        (weights_for_each, "serves all requests"),
        (steps_of_the_first, "the longest answer"),
        (all_to_the_end, "not read any more"),
    ],
)
def test_bytes_of_batch(attempt: Callable[..., int], reason: str) -> None:
    verdict = check_bytes_of_batch(attempt)
    assert not verdict and reason in verdict.message


def test_bytes_of_batch_is_what_the_benchmark_computes() -> None:
    """On the workload of section 11, and the number of requests that the solution names."""
    [page] = [page for page in PAGES if page.stem == "18_benchmark"]
    bytes_of_batch = solutions(page)["bytes_of_batch"]
    config, dtype = Qwen3Config(**QWEN3_0_6B), torch.bfloat16
    sizes = weight_bytes_per_step(config, dtype), kv_bytes_per_token(config, dtype)
    assert sizes == (1_192_099_840, 114_688)
    mixed = make_mixed(ThroughputSizes(), config.vocab_size)
    prompts = [len(prompt) for prompt in mixed.prompts]
    wanted = workload_bytes(config, dtype, mixed)
    assert bytes_of_batch(*sizes, prompts, list(mixed.lengths)) == wanted
    weights = 256 * sizes[0]

    def keys_and_values(n: int) -> int:
        total: int = bytes_of_batch(*sizes, [128] * n, [256] * n)
        return total - weights

    assert keys_and_values(40) < weights < keys_and_values(41)
    text = (page.parent.parent / "docs/solutions/18_benchmark.md").read_text("utf-8")
    assert "From 41 requests on" in text


def wins(first: list[float], second: list[float]) -> tuple[int, int]:
    """How many pairs the first won, and of how many that were decided."""
    pairs = list(zip(first, second, strict=True))
    return sum(a < b for a, b in pairs), sum(a != b for a, b in pairs)


def fall(pairs: int, counts: Callable[[int], bool]) -> float:
    """The share of ways for coins to fall that count."""
    return sum(math.comb(pairs, k) for k in range(pairs + 1) if counts(k)) / 2**pairs


def tail(won: int, pairs: int) -> float:
    """The right answer, from the number of wins and pairs."""
    return fall(pairs, lambda k: abs(2 * k - pairs) >= abs(2 * won - pairs))


def one_sided(first: list[float], second: list[float]) -> float:
    won, pairs = wins(first, second)
    return fall(pairs, lambda k: k >= won)


def twice_the_firsts_tail(first: list[float], second: list[float]) -> float:
    return min(1.0, 2 * one_sided(first, second))


def exactly_so(first: list[float], second: list[float]) -> float:
    won, pairs = wins(first, second)
    return fall(pairs, lambda k: k in (won, pairs - won))


def twice_the_tail(first: list[float], second: list[float]) -> float:
    won, pairs = wins(first, second)
    most = max(won, pairs - won)
    return 2 * fall(pairs, lambda k: k >= most)


def ties_are_lost(first: list[float], second: list[float]) -> float:
    return tail(wins(first, second)[0], len(first))


def against_the_median(first: list[float], second: list[float]) -> float:
    # Right as long as the machine is steady, so that only drift betrays it.
    if len(set(second)) < 4:
        return tail(*wins(first, second))
    middle = statistics.median(second)
    decided = [time for time in first if time != middle]
    return tail(sum(time < middle for time in decided), len(decided))


def every_run_with_every_run(first: list[float], second: list[float]) -> float:
    """The exact test of Mann and Whitney, which knows no pairs."""
    if len(set(second)) < 4:
        return tail(*wins(first, second))
    both, n = first + second, len(first)

    def lead(chosen: tuple[int, ...]) -> int:
        others = [i for i in range(2 * n) if i not in chosen]
        less = sum(both[i] < both[j] for i in chosen for j in others)
        return abs(2 * less - n * n)

    measured = lead(tuple(range(n)))
    splits = list(itertools.combinations(range(2 * n), n))
    return sum(lead(split) >= measured for split in splits) / len(splits)


def sorted_first(first: list[float], second: list[float]) -> float:
    if len(set(second)) < 4:
        return tail(*wins(first, second))
    return tail(*wins(sorted(first), sorted(second)))


def no_pair_no_luck(first: list[float], second: list[float]) -> float:
    won, pairs = wins(first, second)
    return tail(won, pairs) if pairs else 0.0


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (one_sided, "either side may win"),
        (twice_the_firsts_tail, "does not matter which"),
        (exactly_so, "eight to none counts as well"),
        (twice_the_tail, "more even than this"),
        (ties_are_lost, "equal times is left out"),
        (against_the_median, "compare run by run"),
        (every_run_with_every_run, "compare run by run"),
        (sorted_first, "keep the order"),
        (no_pair_no_luck, "nothing speaks against luck"),
    ],
)
def test_sign_test(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_sign_test(attempt)
    assert not verdict and reason in verdict.message


def test_sign_test_that_tosses_all_coins_is_right_too() -> None:
    def tossed(first: list[float], second: list[float]) -> float:
        won, pairs = wins(first, second)
        falls = [sum(coins) for coins in itertools.product((0, 1), repeat=pairs)]
        uneven = [k for k in falls if abs(2 * k - pairs) >= abs(2 * won - pairs)]
        return len(uneven) / len(falls)

    assert check_sign_test(tossed)


def test_the_numbers_of_the_page_and_of_its_solutions() -> None:
    [page] = [page for page in PAGES if page.stem == "18_benchmark"]
    text = (page.parent.parent / "docs/solutions/18_benchmark.md").read_text("utf-8")
    tokens_per_second = solutions(page)["tokens_per_second"]
    two = [Run([0] * 101, 0.5, 1.5), Run([0] * 101, 0.5, 10.5)]
    assert round(tokens_per_second(two)) == 18
    assert round(mean_of_rates(two)) == 55

    sign_test = solutions(page)["sign_test"]

    def of(won: int, lost: int) -> float:
        result: float = sign_test([1.0] * (won + lost), [2.0] * won + [0.5] * lost)
        return result

    for won, lost, said in (
        (5, 0, 0.0625),
        (6, 0, 0.031),
        (7, 1, 0.070),
        (8, 1, 0.039),
    ):
        assert of(won, lost) == pytest.approx(said, abs=5e-4)
        assert f"{said:.4f}".rstrip("0") in text
    assert of(4, 1) == 0.375 and "0.375" in text
    assert of(5, 0) > 0.05 > of(6, 0)
    for order, said in (("ABABABABABAB", 0.03125), ("ABBAABBAABBA", 1.0)):
        times = [[1.02**i for i, x in enumerate(order) if x == name] for name in "AB"]
        assert sign_test(*times) == said

    recording = page.parent / "data" / "benchmark_h200.json"
    for made in json.loads(recording.read_text("utf-8"))["sections"]["decode"]:
        rows = {row["system"]: row for row in made["rows"]}
        ratios = paired_ratios(rows["huggingface"], rows["folo_lib"])
        assert len(ratios) == 10 and min(ratios) > 20
    assert "more than twenty times" in " ".join(text.split())
