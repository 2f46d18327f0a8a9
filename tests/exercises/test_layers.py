"""Checks of page 03's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from folo_lib.course.exercises.layers import (
    check_clamped_swiglu,
    check_fold_norm,
    check_layer_norm,
)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: bool = True,
    dim: int | None = -1,
    unbiased: bool = False,
) -> Tensor:
    """The right one, unless it is told otherwise."""
    if mean:
        x = x - (x.mean() if dim is None else x.mean(-1, keepdim=True))
    square = x.square()
    if unbiased:
        size = square.sum(-1, keepdim=True) / (x.shape[-1] - 1)
    else:
        size = square.mean() if dim is None else square.mean(-1, keepdim=True)
    return weight * x / (size + eps).sqrt() + bias


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (
            lambda x, w, b, eps: layer_norm(x, w, b, eps, mean=False),
            "the mean taken away: the row [1.0, 7.0] became [0.2, 1.4], "
            "wanted: [-1.0, 1.0]",
        ),
        (
            lambda x, w, b, eps: layer_norm(x, w, b, eps, unbiased=True),
            "the mean taken away",
        ),
        (lambda x, w, b, eps: layer_norm(x, w * 0 + 1, b, eps), "a weight of [1, 2]"),
        (lambda x, w, b, eps: layer_norm(x, w, b * 0, eps), "a bias of [5, -5]"),
        (lambda x, w, b, eps: layer_norm(x, w, b, eps, dim=None), "each row by itself"),
        (lambda x, w, b, eps: layer_norm(x, w, b, 0), "eps = 16 under the root"),
        (lambda x, w, b, eps: layer_norm(x, w, b, eps**2), "eps = 16 under the root"),
        (
            lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps),
            "PyTorch's own",
        ),
        (lambda x, w, b, eps: layer_norm(x.sub_(x.mean()), w, b, eps), "changed x"),
        (lambda x, w, b, eps: x[0], "has the shape [2], and should have [1, 2]"),
    ],
)
def test_layer_norm(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_layer_norm(attempt)
    assert not verdict
    assert fragment in verdict.message.replace("\n", " ")


Folded = tuple[Tensor, Tensor | None]


def rows_scaled(
    w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None
) -> Any:
    return linear * w[:, None], bias


def norm_bias_forgotten(
    w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None
) -> Folded:
    return linear * w, bias


def norm_bias_dropped(
    w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None
) -> Folded:
    return linear * w, bias if b is None else torch.zeros(len(linear)) if (
        bias is None
    ) else bias


def norm_bias_scaled_twice(
    w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None
) -> Folded:
    linear = linear * w
    if b is not None:
        bias = linear @ b if bias is None else linear @ b + bias
    return linear, bias


def zeros_without_a_bias(
    w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None
) -> Folded:
    return linear * w, torch.zeros(len(linear)) if bias is None else bias


def in_place(
    w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None
) -> Folded:
    return linear.mul_(w), bias


def divided(w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None) -> Folded:
    return linear / w, bias


def weight_alone(
    w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None
) -> Tensor:
    return linear * w


def in_float32(
    w: Tensor, b: Tensor | None, linear: Tensor, bias: Tensor | None
) -> Folded:
    added = None if b is None else linear.float() @ b.float()
    if added is None or bias is None:
        return linear.float() * w, bias if added is None else added
    return linear.float() * w, added + bias


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (rows_scaled, "which axis of a weight"),
        (divided, "it gives [[0.5"),
        (norm_bias_forgotten, "the bias is None"),
        (norm_bias_dropped, "a vector of zeros should come out as"),
        (norm_bias_scaled_twice, "through its old weight, or the new one?"),
        (zeros_without_a_bias, "so the result is None"),
        (in_place, "changed a tensor"),
        (weight_alone, "not a pair of weight and bias"),
        (in_float32, "all in bfloat16: the weight is torch.float32"),
        (lambda w, b, linear, bias: (None, None), "is a NoneType"),
    ],
)
def test_fold_norm(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_fold_norm(attempt)
    assert not verdict
    assert fragment in verdict.message


def right(x: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def in_halves(x: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def up_first(x: Tensor, alpha: float, limit: float) -> Tensor:
    up, gate = x[..., ::2].clamp(-limit, limit), x[..., 1::2].clamp(max=limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def plain_silu(x: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return (up + 1) * F.silu(gate)


def alpha_outside_too(x: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return (up + 1) * F.silu(alpha * gate)


def without_the_one(x: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return up * gate * torch.sigmoid(alpha * gate)


def gate_cut_on_both_sides(x: Tensor, alpha: float, limit: float) -> Tensor:
    return right(x.clamp(-limit, limit), alpha, limit)


def up_cut_from_above_only(x: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = x.clamp(max=limit)[..., ::2], x.clamp(max=limit)[..., 1::2]
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def limits_forgotten(x: Tensor, alpha: float, limit: float) -> Tensor:
    return right(x, alpha, float("inf"))


def refuses_odd(attempt: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(x: Tensor, alpha: float, limit: float) -> Tensor:
        if x.shape[-1] % 2:
            raise ValueError
        return attempt(x, alpha, limit)

    return checked


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (in_halves, "gate 1 and up 0.5 give"),
        (up_first, "gate 1 and up 0.5 give"),
        (plain_silu, "alpha 1.702"),
        (alpha_outside_too, "alpha 1.702"),
        (without_the_one, "alpha 1.0, limit 7.0: gate 1 and up 0.5"),
        (gate_cut_on_both_sides, "cut from above only"),
        (up_cut_from_above_only, "cut on both sides"),
        (limits_forgotten, "lies above the limit"),
        (
            lambda x, alpha, limit: right(x[..., : x.shape[-1] // 2 * 2], alpha, limit),
            "no pairs",
        ),
        (refuses_odd(lambda *args: right(*args).float()), "should stay torch.bfloat16"),
        (lambda x, alpha, limit: x, "has the shape [2], and should have [1]"),
        (lambda x, alpha, limit: None, "not a tensor"),
    ],
)
def test_clamped_swiglu(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_clamped_swiglu(attempt)
    assert not verdict
    assert fragment in verdict.message


def test_global_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    assert not check_fold_norm(in_float32)
    assert check_clamped_swiglu(refuses_odd(right))
    assert torch.equal(torch.random.get_rng_state(), state)
