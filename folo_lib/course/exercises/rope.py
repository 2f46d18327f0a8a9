"""Checks of page 02: weights in the other layout, and cached keys at other positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require
from folo_lib.rope import RotaryEmbedding, apply_rotary_emb

__all__ = ["check_move_keys", "check_to_interleaved"]

# num_heads, head_dim, and the shape of what comes after the rows; () is a bias.
LAYOUTS: list[tuple[int, int, tuple[int, ...]]] = [
    *((1, 4, (3,)), (1, 8, (3,)), (2, 8, (5,)), (8, 2, (4,)), (4, 6, (7,))),
    *((3, 16, (8,)), (1, 8, ()), (4, 16, ())),
]


@exercise
def check_to_interleaved(convert: Callable[[Tensor, int], Tensor]) -> None:
    """`to_interleaved(weight, num_heads)`, row by row."""
    for seed, (num_heads, head_dim, rest) in enumerate(LAYOUTS):
        generator = torch.Generator().manual_seed(seed)
        rows = num_heads * head_dim
        weight = torch.randn(rows, *rest, generator=generator)
        original = weight.clone()
        got = convert(weight, num_heads)
        where = (
            f"for a {'weight' if rest else 'bias'} {list(weight.shape)} of {num_heads} "
            f"head{'s' * (num_heads > 1)} of {head_dim} rows"
        )
        require(
            isinstance(got, Tensor),
            f"{where} it returned a {type(got).__name__}; wanted is a Tensor.",
        )
        require(
            got.shape == weight.shape,
            f"{where} it returned the shape {list(got.shape)}; the shape must stay.",
        )
        require(torch.equal(weight, original), "it changed the weight it was given.")
        order = interleaved_order(num_heads, head_dim)
        if torch.equal(got, original[order]):
            continue
        require(not torch.equal(got, original), f"{where} no row has moved.")
        hint = ""
        if torch.equal(got, original[order.argsort()]):
            hint = " This is the way back, from interleaved to half-split."
        elif torch.equal(got, original[interleaved_order(1, rows)]):
            hint = " It pairs rows of different heads: split the rows into heads first."
        at = next(i for i in range(rows) if not torch.equal(got[i], original[order[i]]))
        found = [r for r in range(rows) if torch.equal(original[r], got[at])]
        is_what = f"row {found[0]} of the weight" if found else "no row of the weight"
        require(
            False,
            f"{where}, row {at} of the result is {is_what}; wanted is row "
            f"{int(order[at])}.{hint}",
        )


def interleaved_order(num_heads: int, head_dim: int) -> Tensor:
    """Which row of the half-split weight stands in each row of the interleaved one."""
    half = head_dim // 2
    order = [
        head * head_dim + pair + half * second
        for head in range(num_heads)
        for pair in range(half)
        for second in (0, 1)
    ]
    return torch.tensor(order)


PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {**PLAIN, "rope_type": "linear", "factor": 4.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 1024}
# The config, how many tokens and heads, the first position, delta.
MOVES: list[tuple[dict[str, Any], int, int, int, int]] = [
    *((PLAIN, 3, 1, 0, 0), (PLAIN, 3, 1, 0, 5), (PLAIN, 3, 1, 5, -5)),
    *((PLAIN, 6, 2, 100, -100), (PLAIN, 6, 2, 3990, -3990), (PLAIN, 6, 2, 0, 3990)),
    *((LINEAR, 6, 2, 700, -100), (LINEAR, 6, 2, 700, 100)),
    *((YARN, 6, 2, 700, -100), (YARN, 6, 2, 700, 100), (YARN, 6, 2, 700, 0)),
]


@exercise
def check_move_keys(move: Callable[[Tensor, int, RotaryEmbedding], Tensor]) -> None:
    """`move_keys(key, delta, rope)` against a fresh rotation."""
    for seed, (config, num_tokens, num_heads, first, delta) in enumerate(MOVES):
        generator = torch.Generator().manual_seed(seed)
        rope = RotaryEmbedding(32, 4096, config)
        fresh = torch.randn(num_tokens, num_heads, 32, generator=generator)

        def turned(by: int, fresh: Tensor = fresh, first: int = first) -> Tensor:
            positions = torch.arange(first + by, first + by + len(fresh))
            return apply_rotary_emb(fresh, *rope(positions))  # noqa: B023

        key, wanted = turned(0), turned(delta)
        original = key.clone()
        got = move(key, delta, rope)
        last = first + num_tokens - 1
        where = (
            f"with rope_type {config['rope_type']!r}, keys at {first} to {last}, and "
            f"delta={delta}"
        )
        require(
            isinstance(got, Tensor),
            f"{where}: it returned a {type(got).__name__}; wanted is a Tensor.",
        )
        require(
            got.shape == wanted.shape,
            f"{where}: it returned the shape {list(got.shape)}; wanted is "
            f"[N, H_kv, D] = {list(wanted.shape)}.",
        )
        require(torch.equal(key, original), "it changed the keys it was given.")
        if torch.allclose(got, wanted, rtol=1e-3, atol=2e-3):
            continue
        hint = find_mistake(got, wanted, original, rope, delta)
        error = float((got - wanted).abs().max())
        require(False, f"{where}: the error is {error:.2g}.{hint}")


def find_mistake(
    got: Tensor, wanted: Tensor, key: Tensor, rope: RotaryEmbedding, delta: int
) -> str:
    """What is known about this wrong answer."""

    def is_like(other: Tensor) -> bool:
        return torch.allclose(got, other, rtol=1e-3, atol=2e-3)

    cos, sin = (x / rope.attention_factor for x in rope(torch.tensor(abs(delta))))
    backwards = -sin if delta > 0 else sin
    if is_like(wanted * rope.attention_factor):
        return (
            f" The direction is right, the keys are {rope.attention_factor:.3f} times "
            "too long: YaRN's factor is in the table, and they carried it already."
        )
    if delta and is_like(key):
        return " The keys have not moved."
    if is_like(apply_rotary_emb(key, cos[None], backwards[None])):
        return f" They were moved by {-delta}, the other way."
    if delta < 0 and is_like(apply_rotary_emb(key, *rope(torch.tensor([delta])))):
        return (
            f" Row {delta} of a table is counted from its end. Turning back is turning "
            f"by {-delta} with the sine's sign changed."
        )
    return (
        " Each key is already turned by its own position: one rotation by delta, the "
        "same for all tokens, is missing."
    )
