"""Checks of the appendix's exercises: learning byte-pair merges, and Muon's orthogonal update."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from folo_lib.course.exercises import exercise, require

__all__ = ["check_learn_merges", "check_orthogonalize"]

Merge = tuple[bytes, bytes]
LearnMerges = Callable[[Mapping[str, int], int], list[Merge]]
Orthogonalize = Callable[[Tensor, int], Tensor]

A, B, C = 3.4445, -4.7750, 2.0315
ATOL = 5e-3


def _neighbours(
    pieces: Mapping[str, list[bytes]], words: Mapping[str, int]
) -> Counter[Merge]:
    """How often each pair stands side by side inside a word."""
    counts: Counter[Merge] = Counter()
    for word, tokens in pieces.items():
        for pair in pairwise(tokens):
            counts[pair] += words[word]
    return counts


def _merged(tokens: list[bytes], pair: Merge) -> list[bytes]:
    """The tokens with every occurrence of the pair made one, from left to right."""
    result: list[bytes] = []
    i = 0
    while i < len(tokens):
        width = 2 if tuple(tokens[i : i + 2]) == pair else 1
        result.append(b"".join(tokens[i : i + width]))
        i += width
    return result


def _require_merges(
    solution: LearnMerges, words: dict[str, int], count: int, hint: str
) -> None:
    """Each merge in turn must be of a commonest pair; which one of several is free."""
    before = dict(words)
    merges = solution(words, count)
    shown = ", ".join(f"{word!r}: {n}" for word, n in list(words.items())[:4])
    where = f"{{{shown}{', ...' if len(words) > 4 else ''}}}, {count} merges"
    require(words == before, f"{where}: it changed the counts it was given.")
    require(
        isinstance(merges, list),
        f"{where}: it gives a {type(merges).__name__}, not a list.",
    )
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    for number, merge in enumerate(merges, start=1):
        require(
            isinstance(merge, tuple)
            and len(merge) == 2
            and all(isinstance(token, bytes) for token in merge),
            f"{where}: merge {number} is {merge!r}, and should be a pair of bytes such as "
            "(b'a', b'b').",
        )
        require(number <= count, f"{where}: it gives {len(merges)}.")
        counts = _neighbours(pieces, words)
        require(
            counts,
            f"{where}: merge {number} is {merge}, when every word is one token already. "
            "Nothing is merged across words.",
        )
        best, most = counts.most_common(1)[0]
        require(
            counts[merge] == most,
            f"{where}: merge {number} is {merge}, side by side {counts[merge]} times; "
            f"{best} are so {most} times. {hint}",
        )
        pieces = {word: _merged(tokens, merge) for word, tokens in pieces.items()}
    left = _neighbours(pieces, words)
    if len(merges) < count and left:
        best, most = left.most_common(1)[0]
        require(
            False,
            f"{where}: it stops after {len(merges)}, with {best} side by side {most} times.",
        )


@exercise
def check_learn_merges(solution: LearnMerges) -> None:
    """The commonest pair, merge by merge, against a recount of the whole corpus."""
    _require_merges(solution, {"low": 5}, 1, "")
    weights = "A word that occurs nine times counts nine times."
    _require_merges(solution, {"ab": 1, "abc": 1, "xy": 9}, 1, weights)
    recount = "After a merge the neighbours are others: count again."
    _require_merges(solution, {"abc": 5, "ab": 1}, 2, recount)
    overlap = "Every place counts, so 'aaa' holds (b'a', b'a') twice."
    _require_merges(solution, {"aaaab": 3, "cd": 7}, 1, overlap)
    order = "In 'aaa' the two on the left become one token, and the third stays alone."
    _require_merges(solution, {"aaab": 3, "aa": 1}, 2, order)
    everywhere = "A pair becomes one token everywhere, also twice in a word."
    _require_merges(solution, {"ababab": 3, "xy": 4}, 2, everywhere)
    _require_merges(solution, {"ab": 2}, 5, "")
    _require_merges(solution, {"ä": 3, "xy": 2}, 2, "The first tokens are bytes.")
    _require_merges(solution, {"low": 5}, 0, "")
    _require_merges(solution, {"a": 5, "b": 1}, 3, "")
    _require_merges(solution, {}, 3, "")
    rng = random.Random(0)
    for letters, size, count in (("ab", 3, 6), ("abc", 20, 25), ("abcdefgä ", 120, 60)):
        words = {
            "".join(rng.choices(letters, k=rng.randint(1, 9))): rng.randint(1, 30)
            for _ in range(size)
        }
        _require_merges(solution, words, count, recount)


class _Largest(TorchFunctionMode):
    """Remembers the largest tensor that an operation gave."""

    shape: list[int] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (
            self.shape is None or result.numel() > torch.Size(self.shape).numel()
        ):
            self.shape = list(result.shape)
        return result


def _iterated(values: Tensor, steps: int) -> Tensor:
    """The polynomial, `steps` times over."""
    for _ in range(steps):
        values = A * values + B * values**3 + C * values**5
    return values


def _guess(got: Tensor, values: Tensor, steps: int) -> str:
    """What a diagonal would come from, if not from the right thing."""
    start = values / values.norm()
    guesses = {
        "Divide by the Frobenius norm first; this looks like no division at all.": (
            values,
            steps,
        ),
        "Divide by the Frobenius norm, the root of the sum of all squares; this looks "
        "like the largest singular value.": (values / values.max(), steps),
        "This looks like one step too few.": (start, steps - 1),
        "This looks like one step too many.": (start, steps + 1),
        "This looks like no polynomial, but singular values of exactly 1.": (
            torch.ones_like(start),
            0,
        ),
    }
    for words, (begin, count) in guesses.items():
        if count >= 0 and torch.allclose(got, _iterated(begin, count), atol=ATOL):
            return f" {words}"
    return ""


def _require_orthogonal(solution: Orthogonalize, matrix: Tensor, steps: int) -> None:
    """Against the singular values, each sent through the polynomial by itself."""
    before = matrix.clone()
    result = solution(matrix, steps)
    where = f"a {list(matrix.shape)} matrix, steps = {steps}"
    require(
        isinstance(result, Tensor), f"it gives a {type(result).__name__}, not a tensor."
    )
    require(
        result.shape == matrix.shape, f"{where}: the result is {list(result.shape)}."
    )
    require(
        torch.equal(matrix, before),
        f"{where}: it changed the matrix it was given. Return a new one.",
    )
    require(
        result.isfinite().all(),
        f"{where}: there is inf or nan in the result. Values above 1 run away: divide by "
        "the Frobenius norm first, so that no singular value is larger than 1.",
    )
    u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    wanted = _iterated(values / values.norm(), steps)
    got = (u.T @ result.double() @ vt.T).diagonal()
    size = result.double().square().sum()
    require(
        size - got.square().sum() <= 1e-3 * size,
        f"{where}: the directions have turned, and only the singular values should change. "
        "Powers are products of matrices, `X @ X.T @ X`, not of their elements.",
    )
    worst = int((got - wanted).abs().argmax())
    require(
        torch.allclose(got, wanted, atol=ATOL, rtol=ATOL),
        f"{where}: the singular value {values[worst]:.4g} (of norm "
        f"{values.norm():.4g}) became {got[worst]:.4f} instead of {wanted[worst]:.4f}."
        + _guess(got, values, steps),
    )


@exercise
def check_orthogonalize(solution: Orthogonalize) -> None:
    """Singular values through the polynomial, directions untouched, for every shape."""
    simple = torch.tensor(
        [[3.0, 0.0], [0.0, 4.0]]
    )  # singular values 0.6, 0.8 of the norm
    for steps in (1, 5, 0):
        _require_orthogonal(solution, simple, steps)
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 4), (3, 8), (8, 3), (1, 5), (5, 1), (32, 48), (48, 32)):
        matrix = torch.randn(*shape, generator=generator)
        for steps in (1, 3, 5):
            _require_orthogonal(solution, matrix, steps)
    matrix = torch.randn(6, 10, generator=generator)
    for factor in (1e-2, 1e3):
        _require_orthogonal(solution, matrix * factor, 5)
    zeros = solution(torch.zeros(3, 4), 5)
    require(
        zeros.isfinite().all() and not zeros.any(),
        "a matrix of zeros, the gradient of a layer that was not used, should stay zeros. "
        "Dividing by its norm is 0 / 0: keep that away from zero, with 1e-7 for instance.",
    )
    for tall in (torch.randn(128, 8, generator=generator), matrix.T.contiguous()):
        wide = list(tall.T.shape)
        for given in (tall, tall.T.contiguous()):
            with _Largest() as largest:
                solution(given, 2)
            size = torch.Size(largest.shape or []).numel()
            require(
                size <= given.numel(),
                f"a {list(given.shape)} matrix: a tensor of {largest.shape} was made on the "
                f"way. X @ X.T is small if X is {wide}, so turn a tall matrix first and "
                "turn the result back.",
            )
    narrow = solution(matrix.bfloat16(), 5).dtype
    require(narrow == torch.bfloat16, f"a bfloat16 matrix became {narrow}.")
