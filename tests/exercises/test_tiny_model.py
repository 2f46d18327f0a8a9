"""Checks of the appendix's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.tiny_model import check_learn_merges, check_orthogonalize

Merge = tuple[bytes, bytes]
Pieces = list[tuple[list[Any], int]]


def start(words: Mapping[str, int]) -> Pieces:
    return [([bytes([b]) for b in word.encode()], n) for word, n in words.items()]


def count_pairs(pieces: Pieces) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    for tokens, n in pieces:
        for pair in pairwise(tokens):
            counts[pair] += n
    return counts


def merge(tokens: list[Any], pair: Any) -> list[Any]:
    merged: list[Any] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def learn(
    pieces: Pieces,
    count: int,
    count_pairs: Callable[[Pieces], Counter[Any]] = count_pairs,
    merge: Callable[[list[Any], Any], list[Any]] = merge,
) -> list[Any]:
    merges: list[Any] = []
    while len(merges) < count and (counts := count_pairs(pieces)):
        merges.append(max(counts, key=counts.__getitem__))
        pieces = [(merge(tokens, merges[-1]), n) for tokens, n in pieces]
    return merges


def ignores_how_often(words: Mapping[str, int], count: int) -> list[Any]:
    return learn([(tokens, 1) for tokens, _ in start(words)], count)


def counts_once(words: Mapping[str, int], count: int) -> list[Any]:
    return [pair for pair, _ in count_pairs(start(words)).most_common(count)]


def each_pair_once_a_word(words: Mapping[str, int], count: int) -> list[Any]:
    def count_pairs(pieces: Pieces) -> Counter[Any]:
        counts: Counter[Any] = Counter()
        for tokens, n in pieces:
            for pair in set(pairwise(tokens)):
                counts[pair] += n
        return counts

    return learn(start(words), count, count_pairs)


def from_the_right(words: Mapping[str, int], count: int) -> list[Any]:
    def merge(tokens: list[Any], pair: Any) -> list[Any]:
        tokens = list(tokens)
        for i in reversed(range(len(tokens) - 1)):
            if tuple(tokens[i : i + 2]) == pair:
                tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
        return tokens

    return learn(start(words), count, merge=merge)


def first_place_only(words: Mapping[str, int], count: int) -> list[Any]:
    def merge(tokens: list[Any], pair: Any) -> list[Any]:
        for i, found in enumerate(pairwise(tokens)):
            if found == pair:
                return [*tokens[:i], tokens[i] + tokens[i + 1], *tokens[i + 2 :]]
        return tokens

    return learn(start(words), count, merge=merge)


def across_words(words: Mapping[str, int], count: int) -> list[Any]:
    corpus = "".join(word * n for word, n in words.items())
    return learn(start({corpus: 1}), count)


def characters(words: Mapping[str, int], count: int) -> list[Any]:
    return learn([(list(word), n) for word, n in words.items()], count)


def encoded_characters(words: Mapping[str, int], count: int) -> list[Any]:
    pieces: Pieces = [([c.encode() for c in word], n) for word, n in words.items()]
    return learn(pieces, count)


def new_tokens(words: Mapping[str, int], count: int) -> list[Any]:
    return [left + right for left, right in learn(start(words), count)]


def runs_out(words: Mapping[str, int], count: int) -> list[Any]:
    merges: list[Any] = []
    pieces = start(words)
    for _ in range(count):
        counts = count_pairs(pieces)
        merges.append(max(counts, key=counts.__getitem__))
        pieces = [(merge(tokens, merges[-1]), n) for tokens, n in pieces]
    return merges


def one_too_many(words: Mapping[str, int], count: int) -> list[Any]:
    return learn(start(words), count + 1)


def stops_at_pairs_seen_once(words: Mapping[str, int], count: int) -> list[Any]:
    return [] if max(words.values(), default=0) < 3 else learn(start(words), count)


def eats_the_counts(words: dict[str, int], count: int) -> list[Any]:
    pieces = start(words)
    words.clear()
    return learn(pieces, count)


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (ignores_how_often, "counts nine times"),
        (counts_once, "count again"),
        (each_pair_once_a_word, "holds (b'a', b'a') twice"),
        (from_the_right, "the two on the left become one token"),
        (first_place_only, "also twice in a word"),
        (across_words, "Nothing is merged across words"),
        (characters, "should be a pair of bytes"),
        (encoded_characters, "The first tokens are bytes"),
        (new_tokens, "should be a pair of bytes"),
        (runs_out, "ValueError"),
        (one_too_many, "1 merges: it gives 2"),
        (stops_at_pairs_seen_once, "it stops after 0"),
        (eats_the_counts, "changed the counts"),
        (lambda words, count: tuple(learn(start(words), count)), "not a list"),
    ],
)
def test_learn_merges(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_learn_merges(attempt)
    assert not verdict
    assert fragment in verdict.message


def iterate(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def whole(matrix: Tensor, steps: int) -> Tensor:
    """Right but for tall matrices, whose products are large."""
    x = matrix.float()
    return iterate(x / (x.norm() + 1e-7), steps).to(matrix.dtype)


def undivided(matrix: Tensor, steps: int) -> Tensor:
    return iterate(matrix, steps)


def by_the_spectral_norm(matrix: Tensor, steps: int) -> Tensor:
    return iterate(matrix / torch.linalg.matrix_norm(matrix, ord=2), steps)


def one_step_less(matrix: Tensor, steps: int) -> Tensor:
    return whole(matrix, steps - 1)


def exactly(matrix: Tensor, steps: int) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def elementwise(matrix: Tensor, steps: int) -> Tensor:
    x = matrix / matrix.norm()
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def divides_in_place(matrix: Tensor, steps: int) -> Tensor:
    matrix /= matrix.norm()
    return iterate(matrix, steps)


def without_a_transpose(matrix: Tensor, steps: int) -> Tensor:
    x = matrix / matrix.norm()
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x @ x @ x + 2.0315 * x @ x @ x @ x @ x
    return x


def stays_turned(matrix: Tensor, steps: int) -> Tensor:
    return whole(matrix.T if matrix.shape[0] > matrix.shape[1] else matrix, steps)


def turns_the_wrong_ones(matrix: Tensor, steps: int) -> Tensor:
    wide = matrix.shape[0] < matrix.shape[1]
    return whole(matrix.T, steps).T if wide else whole(matrix, steps)


def zero_by_zero(matrix: Tensor, steps: int) -> Tensor:
    return iterate(matrix / matrix.norm(), steps)


def large_epsilon(matrix: Tensor, steps: int) -> Tensor:
    return iterate(matrix / (matrix.norm() + 0.01), steps)


def in_float32(matrix: Tensor, steps: int) -> Tensor:
    if matrix.shape[0] > matrix.shape[1]:
        return whole(matrix.float().T, steps).T
    return whole(matrix.float(), steps)


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (undivided, "no division at all"),
        (by_the_spectral_norm, "like the largest singular value"),
        (one_step_less, "one step too few"),
        (lambda matrix, steps: whole(matrix, steps + 1), "one step too many"),
        (exactly, "singular values of exactly 1"),
        (elementwise, "products of matrices"),
        (divides_in_place, "changed the matrix"),
        (without_a_transpose, "`X @ X.T @ X`"),
        (stays_turned, "the result is"),
        (turns_the_wrong_ones, "turn a tall matrix first"),
        (whole, "turn a tall matrix first"),
        (zero_by_zero, "0 / 0"),
        (large_epsilon, "instead of"),
        (in_float32, "a bfloat16 matrix became torch.float32"),
        (lambda matrix, steps: None, "not a tensor"),
    ],
)
def test_orthogonalize(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_orthogonalize(attempt)
    assert not verdict
    assert fragment in verdict.message


def test_a_steep_value_is_not_taken_for_a_turned_direction() -> None:
    verdict = check_orthogonalize(undivided)
    assert "the singular value 4 (of norm 5)" in verdict.message
