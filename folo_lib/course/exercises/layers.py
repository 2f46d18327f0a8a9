"""Checks of page 03's exercises: LayerNorm, a norm folded away, gpt-oss's activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from folo_lib.course.exercises import NotYet, exercise, require

__all__ = ["check_clamped_swiglu", "check_fold_norm", "check_layer_norm"]

FoldNorm = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None], tuple[Tensor, Tensor | None]
]
LayerNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
ClampedSwiGLU = Callable[[Tensor, float, float], Tensor]


def _require_tensor(
    result: Any, shape: list[int], dtype: torch.dtype, what: str
) -> None:
    require(
        isinstance(result, Tensor),
        f"{what} is a {type(result).__name__}, not a tensor.",
    )
    require(
        list(result.shape) == shape,
        f"{what} has the shape {list(result.shape)}, and should have {shape}.",
    )
    require(
        result.dtype == dtype, f"{what} is {result.dtype}, and should stay {dtype}."
    )


def _layer_norm_by_hand(
    row: list[float], weight: list[float], bias: list[float], eps: float
) -> list[float]:
    """The rule for one row, number by number."""
    mean = sum(row) / len(row)
    size = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + eps)
    return [
        w * (x - mean) / size + b for x, w, b in zip(row, weight, bias, strict=True)
    ]


def _require_layer_norm(
    solution: LayerNorm,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    what: str,
) -> None:
    """Row by row against the rule."""
    before = x.clone()
    message = "it calls PyTorch's own layer_norm. Write it with the lines of section 2."
    refused = mock.Mock(side_effect=NotYet(message))
    with (
        mock.patch.object(F, "layer_norm", refused),
        mock.patch.object(torch, "layer_norm", refused),
    ):
        result = solution(x, weight, bias, eps)
    _require_tensor(result, list(x.shape), x.dtype, f"for x {list(x.shape)} the result")
    require(torch.equal(x, before), "it changed x itself. Return a new tensor.")
    rows = zip(
        x.double().reshape(-1, x.shape[-1]).tolist(),
        result.double().reshape(-1, x.shape[-1]).tolist(),
        strict=True,
    )
    for row, got in rows:
        wanted = _layer_norm_by_hand(row, weight.tolist(), bias.tolist(), eps)
        near = all(abs(a - b) < 1e-4 for a, b in zip(got, wanted, strict=True))
        require(
            near,
            f"{what}: the row {[round(x, 3) for x in row[:4]]} became "
            f"{[round(x, 3) for x in got[:4]]}, wanted: {[round(x, 3) for x in wanted[:4]]}.",
        )


@exercise
def check_layer_norm(solution: LayerNorm) -> None:
    """Against the rule for one row, one difficulty after the other."""
    ones, zeros = torch.ones(2), torch.zeros(2)
    pair = torch.tensor([[1.0, 7.0]])
    _require_layer_norm(solution, pair, ones, zeros, 0.0, "the mean taken away")
    weight, bias = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -5.0])
    _require_layer_norm(solution, pair, weight, zeros, 0.0, "a weight of [1, 2]")
    _require_layer_norm(solution, pair, weight, bias, 0.0, "a bias of [5, -5]")
    rows = torch.tensor([[1.0, 7.0], [30.0, 10.0]])
    _require_layer_norm(solution, rows, ones, zeros, 0.0, "each row by itself")
    _require_layer_norm(solution, pair, ones, zeros, 16.0, "eps = 16 under the root")
    flat = torch.full((1, 2), 3.0)
    _require_layer_norm(solution, flat, ones, bias, 1e-6, "two equal elements")
    generator = torch.Generator().manual_seed(0)
    for shape in ((8,), (3, 5), (2, 3, 64)):
        x, w, b = (
            torch.randn(size, generator=generator, device="cpu")
            for size in (shape, shape[-1:], shape[-1:])
        )
        _require_layer_norm(solution, x, w, b, 1e-5, "random numbers")


def _folded(
    solution: FoldNorm,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    what: str,
) -> tuple[Tensor, Tensor | None]:
    """The solution's weight and bias, once their form was found to be right."""
    given = [norm_weight, norm_bias, linear_weight, linear_bias]
    before = [None if t is None else t.clone() for t in given]
    result: Any = solution(norm_weight, norm_bias, linear_weight, linear_bias)
    for now, then in zip(given, before, strict=True):
        require(
            now is None or then is None or torch.equal(now, then),
            f"{what}: it changed a tensor that it was given. Return new ones.",
        )
    require(
        isinstance(result, tuple) and len(result) == 2,
        f"{what}: it gives a {type(result).__name__}, not a pair of weight and bias.",
    )
    weight, bias = result
    _require_tensor(
        weight, list(linear_weight.shape), linear_weight.dtype, f"{what}: the weight"
    )
    if norm_bias is None and linear_bias is None:
        require(
            bias is None, f"{what}: neither layer has a bias, so the result is None."
        )
    else:
        require(
            bias is not None, f"{what}: the bias is None, and one layer had a bias."
        )
        shape = [len(linear_weight)]
        _require_tensor(bias, shape, linear_weight.dtype, f"{what}: the bias")
    return weight, bias


@exercise
def check_fold_norm(solution: FoldNorm) -> None:
    """The folded layer against norm and layer one after the other."""
    scale = torch.tensor([2.0, 10.0])
    weight, _ = _folded(solution, scale, None, torch.ones(2, 2), None, "a small case")
    require(
        weight.tolist() == [[2.0, 10.0], [2.0, 10.0]],
        "a norm weight [2, 10] in front of a layer of ones should give "
        f"[[2, 10], [2, 10]]; it gives {weight.tolist()}. The norm scales what the layer "
        "reads: which axis of a weight [O, E] is that?",
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    for outs, ins in ((3, 2), (4, 4), (1, 8), (16, 5), (7, 64)):
        for with_norm_bias, with_bias in ((0, 0), (0, 1), (1, 0), (1, 1)):
            w, b = random(ins), random(ins) if with_norm_bias else None
            linear, bias = random(outs, ins), random(outs) if with_bias else None
            what = (
                f"E = {ins}, O = {outs}, {'a' if with_norm_bias else 'no'} bias in the "
                f"norm, {'a' if with_bias else 'no'} bias in the layer"
            )
            folded = _folded(solution, w, b, linear, bias, what)
            x = random(6, ins)
            wanted = F.linear(x * w + (0 if b is None else b), linear, bias)
            got = F.linear(x, *folded)
            at_zero = F.linear(torch.zeros(1, ins), *folded)
            bias_wanted = F.linear(
                torch.zeros(1, ins) if b is None else b[None], linear, bias
            )
            require(
                torch.allclose(at_zero, bias_wanted, atol=1e-4),
                f"{what}: a vector of zeros should come out as "
                f"{bias_wanted[0, 0].item():.4f} in channel 0, and is "
                f"{at_zero[0, 0].item():.4f}. The norm's bias goes through the layer like "
                "any other input: through its old weight, or the new one?",
            )
            require(
                torch.allclose(got, wanted, atol=1e-4),
                f"{what}: channel 0 of the first vector is {got[0, 0].item():.4f}, and was "
                f"{wanted[0, 0].item():.4f} with norm and layer apart.",
            )
    _folded(
        solution,
        random(8).bfloat16(),
        random(8).bfloat16(),
        random(3, 8).bfloat16(),
        None,
        "all in bfloat16",
    )


def _one_channel(gate: float, up: float, alpha: float, limit: float) -> float:
    """The rule for two numbers."""
    gate, up = min(gate, limit), max(-limit, min(up, limit))
    return (up + 1) * gate / (1 + math.exp(-alpha * gate))


def _require_channels(
    solution: ClampedSwiGLU, x: Tensor, alpha: float, limit: float
) -> None:
    """Channel by channel against the rule."""
    before = x.clone()
    result = solution(x, alpha, limit)
    shape = [*x.shape[:-1], x.shape[-1] // 2]
    _require_tensor(result, shape, x.dtype, f"for x {list(x.shape)} the result")
    require(torch.equal(x, before), "it changed x itself. Return a new tensor.")
    pairs = x.double().reshape(-1, 2).tolist()
    for (gate, up), got in zip(pairs, result.flatten().tolist(), strict=True):
        wanted = _one_channel(gate, up, alpha, limit)
        bound = 1e-5 if x.dtype == torch.float32 else 0.05
        hint = ""
        if gate > limit:
            hint = " This gate lies above the limit."
        elif gate < -limit:
            hint = " This gate lies far below zero; it is cut from above only."
        elif abs(up) > limit:
            hint = " This up lies outside the limits; it is cut on both sides."
        require(
            abs(got - wanted) <= bound * (1 + abs(wanted)),
            f"x {list(x.shape)}, alpha {alpha}, limit {limit}: gate {gate:.4g} and up "
            f"{up:.4g} give {got:.5g} instead of {wanted:.5g}.{hint}",
        )


@exercise
def check_clamped_swiglu(solution: ClampedSwiGLU) -> None:
    """Against the rule for two numbers, inside the limits first and then outside."""
    _require_channels(solution, torch.tensor([1.0, 0.5]), 1.0, 7.0)
    _require_channels(solution, torch.tensor([1.0, 0.5]), 1.702, 7.0)
    _require_channels(solution, torch.tensor([1.0, 0.5, -1.0, 2.0]), 1.702, 7.0)
    for pair in ([3.0, 0.5], [0.5, 3.0], [0.5, -3.0], [-3.0, 0.5]):
        _require_channels(solution, torch.tensor(pair), 1.0, 1.0)
    try:
        solution(torch.ones(2, 3), 1.0, 1.0)
    except ValueError:
        pass
    else:
        require(False, "x [2, 3]: three channels are no pairs; that is a ValueError.")
    generator = torch.Generator().manual_seed(0)
    for shape in ((2,), (5, 8), (2, 3, 6), (1, 1, 64)):
        for alpha, limit in ((1.702, 7.0), (0.5, 1.0), (1.0, 2.5)):
            x = 3 * torch.randn(shape, generator=generator, device="cpu")
            _require_channels(solution, x, alpha, limit)
    x = torch.randn(4, 16, generator=generator, device="cpu").bfloat16()
    _require_channels(solution, x, 1.702, 7.0)
