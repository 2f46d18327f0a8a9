"""The checks of page 01 say what is wrong with solutions that people plausibly write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.attention import create_causal_mask, naive_attention
from folo_lib.course.exercises.attention import (
    check_create_window_mask,
    check_online_attention,
)

INF = float("inf")


def distances(query_len: int, key_len: int) -> Tensor:
    return torch.arange(key_len - query_len, key_len)[:, None] - torch.arange(key_len)


def to_mask(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, -INF)[None, None]


def causal_only(query_len: int, key_len: int, window: int) -> Tensor:
    return create_causal_mask(query_len, key_len)


def one_too_many(query_len: int, key_len: int, window: int) -> Tensor:
    d = distances(query_len, key_len)
    return to_mask((d >= 0) & (d <= window))


def without_itself(query_len: int, key_len: int, window: int) -> Tensor:
    d = distances(query_len, key_len)
    return to_mask((d > 0) & (d <= window))


def both_sides(query_len: int, key_len: int, window: int) -> Tensor:
    return to_mask(distances(query_len, key_len).abs() < window)


def top_left(query_len: int, key_len: int, window: int) -> Tensor:
    d = torch.arange(query_len)[:, None] - torch.arange(key_len)
    return to_mask((d >= 0) & (d < window))


def two_dimensions(query_len: int, key_len: int, window: int) -> Tensor:
    d = distances(query_len, key_len)
    return to_mask((d >= 0) & (d < window))[0, 0]


def booleans(query_len: int, key_len: int, window: int) -> Tensor:
    d = distances(query_len, key_len)
    return ((d >= 0) & (d < window))[None, None]


def zeros_and_ones(query_len: int, key_len: int, window: int) -> Tensor:
    return booleans(query_len, key_len, window).float()


def nan_from_multiplying(query_len: int, key_len: int, window: int) -> Tensor:
    return (~booleans(query_len, key_len, window)).float() * -INF


def square(query_len: int, key_len: int, window: int) -> Tensor:
    d = distances(query_len, query_len)
    return to_mask((d >= 0) & (d < window))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (causal_only, "row 1, which stands at position i + (T - S) = 1, must not see"),
        (one_too_many, "1 token before it, and window=1 counts itself too"),
        (without_itself, "must see key 0, which is itself"),
        (both_sides, "must not see key 1, which lies in its future"),
        (top_left, "stands at position i + (T - S) = 5, must see key 1"),
        (two_dimensions, "wanted is [1, 1, S, T] = [1, 1, 1, 1]"),
        (booleans, "torch.bool"),
        (zeros_and_ones, "holds [1.0]"),
        (nan_from_multiplying, "0 times -inf is nan"),
        (square, "[1, 1, S, T] = [1, 1, 1, 6]"),
        (lambda *args: booleans(*args).tolist(), "returned a list"),
    ],
)
def test_create_window_mask(attempt: Callable[..., Any], message: str) -> None:
    verdict = check_create_window_mask(attempt)
    assert not verdict
    assert message in verdict.message


def run(
    query: Tensor,
    chunks: Any,
    scale: float,
    *,
    start: float = -INF,
    shrink_total: bool = True,
    shrink_output: bool = True,
    one_maximum: bool = False,
    divide: bool = True,
) -> Tensor:
    """A right solution, with switches for the mistakes."""
    maximum = torch.full((len(query), 1), start)
    total, output = torch.zeros(len(query), 1), torch.zeros_like(query)
    for key, value in chunks:
        scores = query @ key.T * scale
        top = scores.amax() if one_maximum else scores.amax(-1, keepdim=True)
        higher = torch.maximum(maximum, top)
        shrink = (maximum - higher).exp()
        weights = (scores - higher).exp()
        total = total * (shrink if shrink_total else 1) + weights.sum(-1, keepdim=True)
        output = output * (shrink if shrink_output else 1) + weights @ value
        maximum = higher
    return output / total if divide else output


def mean_of_chunks(query: Tensor, chunks: Any, scale: float) -> Tensor:
    parts = [(query @ k.T * scale).softmax(-1) @ v for k, v in chunks]
    return torch.stack(parts).mean(0)


def no_maximum(query: Tensor, chunks: Any, scale: float) -> Tensor:
    total, output = torch.zeros(len(query), 1), torch.zeros_like(query)
    for key, value in chunks:
        weights = (query @ key.T * scale).exp()
        total += weights.sum(-1, keepdim=True)
        output += weights @ value
    return output / total


def all_at_once(query: Tensor, chunks: Any, scale: float) -> Tensor:
    keys, values = zip(*chunks, strict=True)
    key, value = torch.cat(keys), torch.cat(values)
    return naive_attention(query[None], key[None], value[None], scale)[0]


def two_passes(query: Tensor, chunks: Any, scale: float) -> Tensor:
    top = torch.stack([(query @ k.T * scale).amax(-1) for k, _ in chunks]).amax(0)
    return run(query, [(k, v) for k, v in chunks], scale) + top[:, None] * 0


def last_chunk_only(query: Tensor, chunks: Any, scale: float) -> Tensor:
    for key, value in chunks:
        output = naive_attention(query[None], key[None], value[None], scale)[0]
    return output


def test_the_switches_are_off() -> None:
    assert check_online_attention(run)


def with_mistake(**mistake: Any) -> Callable[..., Tensor]:
    return lambda query, chunks, scale: run(query, chunks, scale, **mistake)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (with_mistake(shrink_total=False), "both the sum and the output"),
        (with_mistake(shrink_output=False), "both the sum and the output"),
        (
            with_mistake(shrink_total=False, shrink_output=False),
            "both the sum and the output",
        ),
        (with_mistake(start=0.0), "begins at -inf, not at 0"),
        (with_mistake(one_maximum=True), "maximum of its own"),
        (with_mistake(divide=False), "by hand"),
        (mean_of_chunks, "wrong for one query, chunks of 8"),
        (last_chunk_only, "wrong for one query, chunks of 8"),
        (no_maximum, "exp(100) overflows"),
        (all_at_once, "it needs chunks that are gone"),
        (two_passes, "wrong for"),
        (lambda q, chunks, scale: run(q, chunks, 1.0), "wrong for one query"),
        (lambda *args: run(*args)[0], "wanted is [S, D] = [1, 16]"),
        (lambda *args: run(*args).tolist(), "returned a list"),
    ],
)
def test_online_attention(attempt: Callable[..., Any], message: str) -> None:
    verdict = check_online_attention(attempt)
    assert not verdict
    assert message in verdict.message


def test_checks_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    assert check_online_attention(run)
    assert torch.equal(before, torch.random.get_rng_state())
