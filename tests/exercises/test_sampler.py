"""Checks of page 07's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.sampler import (
    check_apply_logit_bias,
    check_apply_top_n_sigma,
)

INF = float("inf")
Biases = list[dict[int, float]]


def over_the_batch(logits: Tensor, n: float) -> Tensor:
    threshold = logits.amax(-1, keepdim=True) - n * logits.std()
    return logits.masked_fill(logits < threshold, -INF)


def from_the_mean(logits: Tensor, n: float) -> Tensor:
    threshold = logits.mean(-1, keepdim=True) + n * logits.std(-1, keepdim=True)
    return logits.masked_fill(logits < threshold, -INF)


def plain_std(logits: Tensor, n: float) -> Tensor:
    threshold = logits.amax(-1, keepdim=True) - n * logits.std(-1, keepdim=True)
    return logits.masked_fill(logits < threshold, -INF)


def dropped_as_zeros(logits: Tensor, n: float) -> Tensor:
    sigma = logits.masked_fill(logits == -INF, 0).std(-1, keepdim=True)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) - n * sigma, -INF)


def of_probabilities(logits: Tensor, n: float) -> Tensor:
    return logits.masked_fill(plain_std(logits.softmax(-1), n) == -INF, -INF)


def in_place(logits: Tensor, n: float) -> Tensor:
    threshold = logits.amax(-1, keepdim=True) - n * logits.std(-1, keepdim=True)
    return logits.masked_fill_(logits < threshold, -INF)


def without_the_equals(logits: Tensor, n: float) -> Tensor:
    sigmas = [row[row > -INF].std() for row in logits]
    threshold = logits.amax(-1, keepdim=True) - n * torch.stack(sigmas)[:, None]
    return logits.masked_fill(logits <= threshold, -INF)


def normalised(logits: Tensor, n: float) -> Tensor:
    return plain_std(logits, n).log_softmax(-1)


def without_keepdim(logits: Tensor, n: float) -> Tensor:
    return logits.masked_fill(logits < logits.amax(-1) - n * logits.std(-1), -INF)


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (over_the_batch, "row 0 of 3"),
        (from_the_mean, "was dropped"),
        (plain_std, "-inf has no place in a mean"),
        (dropped_as_zeros, "was"),
        (of_probabilities, "was"),
        (in_place, "changed the logits"),
        (without_the_equals, "keeps the best only"),
        (normalised, "a survivor's logit has changed"),
        (without_keepdim, "RuntimeError"),
        (lambda logits, n: logits, "was kept"),
        (lambda logits, n: None, "not a tensor"),
    ],
)
def test_top_n_sigma(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_apply_top_n_sigma(attempt)
    assert not verdict
    assert fragment in verdict.message


def loop(logits: Tensor, biases: Biases) -> Tensor:
    biased = logits.float().clone()
    for row, bias in enumerate(biases):
        for token_id, value in bias.items():
            if not 0 <= token_id < logits.shape[-1]:
                raise ValueError(f"token id {token_id}")
            biased[row, token_id] += value
    return biased


def changes_its_input(logits: Tensor, biases: Biases) -> Tensor:
    for row, bias in enumerate(biases):
        for token_id, value in bias.items():
            logits[row, token_id] += value
    return logits


def sets_instead_of_adding(logits: Tensor, biases: Biases) -> Tensor:
    biased = logits.float().clone()
    for row, bias in enumerate(biases):
        for token_id, value in bias.items():
            biased[row, token_id] = value
    return biased


def same_for_all_rows(logits: Tensor, biases: Biases) -> Tensor:
    biased = logits.float().clone()
    for bias in biases:
        for token_id, value in bias.items():
            biased[:, token_id] += value
    return biased


def in_the_dtype_of_the_logits(logits: Tensor, biases: Biases) -> Tensor:
    return loop(logits, biases).to(logits.dtype)


def rounds_to_the_dtype(logits: Tensor, biases: Biases) -> Tensor:
    return loop(logits, biases).to(logits.dtype).float()


def counts_from_the_end(logits: Tensor, biases: Biases) -> Tensor:
    biased = logits.float().clone()
    for row, bias in enumerate(biases):
        for token_id, value in bias.items():
            if token_id >= logits.shape[-1]:
                raise ValueError(f"token id {token_id}")
            biased[row, token_id] += value
    return biased


def unchecked(logits: Tensor, biases: Biases) -> Tensor:
    biased = logits.float().clone()
    for row, bias in enumerate(biases):
        for token_id, value in bias.items():
            biased[row, token_id] += value
    return biased


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (changes_its_input, "changed the logits"),
        (sets_instead_of_adding, "became 5 instead of 8"),
        (same_for_all_rows, "three rows: row 0, token 1"),
        (in_the_dtype_of_the_logits, "should be float32"),
        (rounds_to_the_dtype, "became 16 instead of 16.01"),
        (counts_from_the_end, "token id -1 lies outside"),
        (unchecked, "gives a IndexError"),
        (loop, "on a GPU each is a launch"),
        (lambda logits, biases: None, "not a tensor"),
    ],
)
def test_logit_bias(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_apply_logit_bias(attempt)
    assert not verdict
    assert fragment in verdict.message


def test_global_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    check_apply_top_n_sigma(plain_std)
    check_apply_logit_bias(loop)
    assert torch.equal(torch.random.get_rng_state(), state)
