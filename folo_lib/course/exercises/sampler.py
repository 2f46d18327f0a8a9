"""Checks of page 07's exercises: top-n-sigma sampling, and a bias on the logits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from folo_lib.course.exercises import exercise, require

__all__ = ["check_apply_logit_bias", "check_apply_top_n_sigma"]

TopNSigma = Callable[[Tensor, float], Tensor]
LogitBias = Callable[[Tensor, Sequence[Mapping[int, float]]], Tensor]

INF = float("inf")


def _require_tensor(result: Any, logits: Tensor, before: Tensor) -> None:
    """A new tensor of the same shape; `before` is a copy of the logits."""
    require(
        isinstance(result, Tensor), f"it gives a {type(result).__name__}, not a tensor."
    )
    shape = list(logits.shape)
    require(
        result.shape == logits.shape, f"logits {shape} became {list(result.shape)}."
    )
    require(
        torch.equal(logits, before),
        "it changed the logits it was given; log-probabilities still need them. Return a "
        "new tensor.",
    )


def _keeps(solution: TopNSigma, logits: Tensor, n: float) -> Tensor:
    """Which tokens survive, once the result was found to be filtered logits."""
    before = logits.clone()
    result = solution(logits, n)
    _require_tensor(result, logits, before)
    require(
        not result.isnan().any(),
        f"there is a nan in the result for {_row(logits)}: -inf has no place in a mean, "
        "so the deviation is that of the finite logits.",
    )
    kept = result > -INF
    require(
        torch.equal(result[kept], logits[kept]),
        "a survivor's logit has changed; a filter leaves what it keeps alone.",
    )
    return kept


def _row(logits: Tensor) -> str:
    """The first logits of the first row, in short."""
    values = ", ".join(f"{x:.4g}" for x in logits[0, :6].tolist())
    return f"[{values}{', ...' if logits.shape[1] > 6 else ''}]"


def _thresholds(row: list[float], n: float) -> tuple[float, float]:
    """By hand, with the deviation that divides by the count, and by one less."""
    finite = [x for x in row if x > -INF]
    mean = sum(finite) / len(finite)
    squares = sum((x - mean) ** 2 for x in finite)
    sigmas = [(squares / max(len(finite) - less, 1)) ** 0.5 for less in (0, 1)]
    return max(finite) - n * sigmas[1], max(finite) - n * sigmas[0]


def _require_survivors(solution: TopNSigma, logits: Tensor, n: float) -> None:
    """Row by row against the rule; what lies between the two thresholds is free."""
    kept = _keeps(solution, logits, n)
    for i, row in enumerate(logits.tolist()):
        low, high = _thresholds(row, n)
        best = max(row)
        nan = (
            "" if min(row) > -INF else " (-inf has no place in a mean or a deviation.)"
        )
        for token, logit in enumerate(row):
            where = (
                f"row {i} of {len(logits)}, n = {n}: the largest logit is {best:.4g}, the "
                f"threshold {high:.4g}, and the logit {logit:.4g}"
            )
            if logit > high + 1e-4 * (1 + abs(high)):
                require(kept[i, token], f"{where} was dropped.{nan}")
            elif logit < low - 1e-4 * (1 + abs(low)):
                require(not kept[i, token], f"{where} was kept.{nan}")


@exercise
def check_apply_top_n_sigma(solution: TopNSigma) -> None:
    """The survivors of `max - n * sigma`, against the rule written with lists."""
    simple = torch.tensor([[4.0, 3.0, 0.0, -1.0]])  # sigma is 2.06, or 2.38
    _require_survivors(solution, simple, 1.0)
    _require_survivors(solution, simple - 100, 1.0)
    _require_survivors(solution, torch.cat([simple, 10 * simple, -simple]), 1.0)
    _require_survivors(solution, torch.tensor([[4.0, 3.0, 0.0, -1.0, -INF]]), 1.0)
    kept = _keeps(solution, simple, 0.0)
    require(
        kept[0].tolist() == [True, False, False, False], "n = 0 keeps the best only."
    )
    equal = _keeps(solution, torch.ones(2, 5), 1.0)
    require(equal.all(), "five equal logits: all are as good as the best, so all stay.")
    generator = torch.Generator().manual_seed(0)
    for size, vocab_size in ((1, 7), (3, 50), (8, 300)):
        for n in (0.5, 1.0, 2.5):
            logits = 3 * torch.randn(size, vocab_size, generator=generator)
            _require_survivors(solution, logits, n)
            logits[torch.rand(size, vocab_size, generator=generator) < 0.3] = -INF
            logits[:, 0] = 1.0
            _require_survivors(solution, logits, n)
    logits = torch.randn(4, 200, generator=generator)
    same = torch.equal(_keeps(solution, logits, 1.5), _keeps(solution, logits * 4, 1.5))
    require(same, "four times the logits (a temperature of 0.25) has other survivors.")
    narrow = torch.randn(4, 200, generator=generator).bfloat16()
    dtype = solution(narrow, 1.5).dtype
    require(dtype == torch.bfloat16, f"bfloat16 logits became {dtype}.")


class _CountOps(TorchFunctionMode):
    count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _require_biased(
    solution: LogitBias, logits: Tensor, biases: list[dict[int, float]], what: str
) -> None:
    """Against a loop over all biases."""
    before = logits.clone()
    result = solution(logits, biases)
    _require_tensor(result, logits, before)
    wanted = logits.float()
    for row, asked in enumerate(biases):
        for token, value in asked.items():
            wanted[row, token] += value
    require(
        result.dtype == torch.float32,
        f"{what}: the result is {result.dtype}, and should be float32.",
    )
    if torch.equal(result, wanted):
        return
    row, token = (result != wanted).nonzero()[0].tolist()
    bias = f"a bias of {biases[row][token]:g}" if token in biases[row] else "no bias"
    require(
        torch.allclose(result, wanted, atol=1e-6, rtol=1e-6),
        f"{what}: row {row}, token {token}, logit {logits[row, token].item():g}, with "
        f"{bias}, became {result[row, token].item():g} instead of "
        f"{wanted[row, token].item():g}.",
    )


def _random_biases(
    rng: random.Random, size: int, vocab_size: int, most: int
) -> list[dict[int, float]]:
    return [
        {
            rng.randrange(vocab_size): rng.uniform(-5, 5)
            for _ in range(rng.randint(0, most))
        }
        for _ in range(size)
    ]


@exercise
def check_apply_logit_bias(solution: LogitBias) -> None:
    """A bias for some tokens of some rows, against a loop, and without one."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    _require_biased(solution, logits, [{2: 5.0}], "one row, one bias")
    _require_biased(solution, logits, [{0: 1.0, 3: -100.0}], "one row, two biases")
    _require_biased(solution, logits, [{}], "no bias at all")
    three = logits.repeat(3, 1)
    _require_biased(solution, three, [{1: 2.0}, {}, {1: -3.0}], "three rows")
    wide = torch.full((1, 4), 16.0, dtype=torch.bfloat16)
    _require_biased(solution, wide, [{1: 0.01}], "bfloat16 logits")
    _require_biased(solution, three, [{}, {1: -INF}, {}], "a bias of -inf, a ban")
    for token in (4, -1):
        try:
            solution(logits, [{token: 1.0}])
        except ValueError as error:
            require(
                str(token) in str(error),
                f"the error for token id {token} does not name it: {error}",
            )
        except (IndexError, RuntimeError) as error:
            kind = type(error).__name__
            message = f"token id {token} of 4 gives a {kind}; say it with a ValueError."
            require(False, message)
        else:
            message = f"token id {token} lies outside a vocabulary of 4: a ValueError."
            require(False, message)
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    for size, vocab_size in ((1, 10), (5, 40), (16, 500)):
        logits = torch.randn(size, vocab_size, generator=generator)
        biases = _random_biases(rng, size, vocab_size, 20)
        _require_biased(solution, logits, biases, f"random biases, {size} rows")
    counts = []
    for most in (1, 100):
        biases = [dict.fromkeys(range(most), 1.0) for _ in range(16)]
        with _CountOps() as ops:
            solution(logits, biases)
        counts.append(ops.count)
    require(
        counts[1] <= counts[0] + 5,
        f"16 rows with 1 bias each take {counts[0]} tensor operations, with 100 each "
        f"{counts[1]}: on a GPU each is a launch. Collect rows, ids and values as lists, "
        "then make one tensor of each.",
    )
