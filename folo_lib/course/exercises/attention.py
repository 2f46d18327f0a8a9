"""Checks of page 01: a sliding-window mask, and attention in one pass over the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from folo_lib.attention import naive_attention
from folo_lib.course.exercises import exercise, require

__all__ = ["check_create_window_mask", "check_online_attention"]

# S, T, window: prompts, then decode, then chunks behind a cached prefix.
WINDOWS = [
    *((1, 1, 1), (4, 4, 4), (4, 4, 9), (4, 4, 1), (5, 5, 2), (9, 9, 4)),
    *((1, 6, 6), (1, 6, 3), (1, 6, 1), (1, 6, 20)),
    *((2, 6, 6), (2, 6, 3), (3, 9, 1), (4, 32, 7), (16, 40, 11)),
]


@exercise
def check_create_window_mask(create: Callable[[int, int, int], Tensor]) -> None:
    """`create_window_mask(query_len, key_len, window)`, cell by cell."""
    for query_len, key_len, window in WINDOWS:
        call = f"create_window_mask({query_len}, {key_len}, {window})"
        mask = create(query_len, key_len, window)
        require(
            isinstance(mask, Tensor),
            f"{call} returned a {type(mask).__name__}; wanted is a Tensor.",
        )
        require(
            mask.shape == (1, 1, query_len, key_len),
            f"{call} has the shape {list(mask.shape)}; "
            f"wanted is [1, 1, S, T] = [1, 1, {query_len}, {key_len}].",
        )
        require(
            mask.is_floating_point() and not mask.isnan().any(),
            f"{call} holds {mask.dtype} values"
            + (", some of them nan" if mask.isnan().any() else "")
            + "; wanted is a mask to add to the scores, of 0.0 and -inf. "
            "(0 times -inf is nan: use masked_fill or where.)",
        )
        strange = mask[(mask != 0) & (mask != float("-inf"))]
        require(
            not strange.numel(),
            f"{call} holds {strange[:1].tolist()}; wanted are 0 where a key may be "
            "seen and -inf where not.",
        )
        for i in range(query_len):
            for j in range(key_len):
                check_cell(mask, call, i, j, window)


def check_cell(mask: Tensor, call: str, i: int, j: int, window: int) -> None:
    query_len, key_len = mask.shape[-2:]
    position = i + key_len - query_len
    distance = position - j
    seen, wanted = bool(mask[0, 0, i, j] == 0), 0 <= distance < window
    if seen == wanted:
        return
    row = f"row {i}, which stands at position i + (T - S) = {position},"
    if distance < 0:
        reason = "which lies in its future"
    elif distance == 0:
        reason = "which is itself: even window=1 shows that one"
    else:
        before = f"{distance} token{'s' * (distance > 1)}"
        reason = f"which lies {before} before it, and window={window} counts itself too"
    verb = "must see" if wanted else "must not see"
    require(False, f"in {call}, {row} {verb} key {j}, {reason}.")


def hand_out(
    key: Tensor, value: Tensor, size: int, overwrite: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values in chunks; with `overwrite` in one piece of memory for all."""
    for start in range(0, len(key), size):
        pair = key[start : start + size].clone(), value[start : start + size].clone()
        yield pair
        if overwrite:
            for chunk in pair:
                chunk.fill_(float("nan"))


def make_inputs(
    seed: int, num_queries: int, num_keys: int, shifts: list[float], rising: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values; `shifts` are added to the scores of each query."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_queries, 16, generator=generator)
    key, value = torch.randn(2, num_keys, 16, generator=generator)
    # Dimension 0 is the same for all keys: it moves the scores of a query together.
    key[:, 0] = 1.0
    query[:, 0] = 4.0 * torch.tensor(shifts).repeat(num_queries)[:num_queries]
    if rising:  # dimension 1 rises from key to key, and so do the scores
        query[:, 1] = 4.0
        key[:, 1] = torch.linspace(-4.0, 8.0, num_keys)
    return query, key, value


# What is new, S, T, chunk size, what is added to the scores of each query, rising scores.
PASSES: list[tuple[str, int, int, int, list[float], bool]] = [
    ("one query, one chunk", 1, 20, 20, [0.0], False),
    ("one query, chunks of 8", 1, 40, 8, [0.0], False),
    ("scores that rise from chunk to chunk", 1, 40, 8, [0.0], True),
    ("a short last chunk", 1, 1000, 64, [0.0], False),
    ("chunks of one key", 1, 50, 1, [0.0], True),
    ("5 queries", 5, 300, 64, [0.0], False),
    ("5 queries and rising scores", 5, 300, 64, [0.0], True),
    ("100 added to every score", 1, 1000, 64, [100.0], False),
    ("200 taken from every score", 1, 1000, 64, [-200.0], False),
    (
        "+100 on one query's scores, -200 on another's",
        4,
        300,
        64,
        [100.0, -200.0],
        True,
    ),
]
SCALE = 0.25
GROWN = (
    "When the maximum grows from m to m', what was summed with m is too large by "
    "exp(m' - m): both the sum and the output have to shrink by that, and then the new "
    "chunk's share is added."
)
HINTS = {
    "one query, one chunk": "Compare with scores.softmax(-1) @ value, by hand.",
    "one query, chunks of 8": GROWN,
    "scores that rise from chunk to chunk": GROWN,
    "a short last chunk": "The last chunk holds fewer keys than the others.",
    "5 queries": "Every query has a maximum and a sum of its own, [S, 1].",
    "5 queries and rising scores": "Every query has a maximum of its own, [S, 1].",
    "100 added to every score": "exp(100) overflows: subtract the maximum first.",
    "200 taken from every score": (
        "exp(-200) is 0 in float32: subtract the maximum, which may be negative. A "
        "running maximum begins at -inf, not at 0."
    ),
    "+100 on one query's scores, -200 on another's": (
        "Every query needs a maximum of its own: keepdim=True over the keys only."
    ),
}


@exercise
def check_online_attention(attend: Callable[[Tensor, Any, float], Tensor]) -> None:
    """`online_attention(query, chunks, scale)` against `naive_attention`."""
    for seed, (name, num_queries, num_keys, size, shifts, rising) in enumerate(PASSES):
        query, key, value = make_inputs(seed, num_queries, num_keys, shifts, rising)
        wanted = naive_attention(query[None], key[None], value[None], SCALE)[0]
        got = attend(query.clone(), hand_out(key, value, size, True), SCALE)
        require(
            isinstance(got, Tensor),
            f"it returned a {type(got).__name__}; wanted is a Tensor.",
        )
        require(
            got.shape == wanted.shape,
            f"for {name} it returned the shape {list(got.shape)}; "
            f"wanted is [S, D] = {list(wanted.shape)}.",
        )
        if torch.allclose(got, wanted, rtol=1e-4, atol=1e-5):
            continue
        kept = attend(query.clone(), hand_out(key, value, size, False), SCALE)
        require(
            not torch.allclose(kept, wanted, rtol=1e-4, atol=1e-5),
            "it needs chunks that are gone: the memory of a chunk is overwritten when "
            "the next one is drawn. Use each chunk at once, and keep only a maximum, a "
            "sum and an output for each query.",
        )
        worst = "nan" if got.isnan().any() else f"{(got - wanted).abs().max():.2g}"
        require(
            False,
            f"wrong for {name} ({num_keys} keys): the error is {worst}. "
            + HINTS.get(name, ""),
        )
