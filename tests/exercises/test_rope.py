"""The checks of page 02 say what is wrong with solutions that people plausibly write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.rope import (
    check_move_keys,
    check_to_interleaved,
    interleaved_order,
)
from folo_lib.rope import RotaryEmbedding, apply_rotary_emb


def pairs_of(weight: Tensor, num_heads: int) -> Tensor:
    return weight.unflatten(0, (num_heads, 2, weight.shape[0] // num_heads // 2))


def the_way_back(weight: Tensor, num_heads: int) -> Tensor:
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def heads_forgotten(weight: Tensor, num_heads: int) -> Tensor:
    return pairs_of(weight, 1).transpose(1, 2).flatten(0, 2)


def members_swapped(weight: Tensor, num_heads: int) -> Tensor:
    return pairs_of(weight, num_heads).flip(1).transpose(1, 2).flatten(0, 2)


def halves_swapped(weight: Tensor, num_heads: int) -> Tensor:
    return pairs_of(weight, num_heads).flip(1).flatten(0, 2)


def columns(weight: Tensor, num_heads: int) -> Tensor:
    return torch.stack(weight.chunk(2, dim=-1), dim=-1).flatten(-2)


def weights_only(weight: Tensor, num_heads: int) -> Tensor:
    rows, width = weight.shape
    split = weight.view(num_heads, 2, rows // num_heads // 2, width)
    return split.transpose(1, 2).reshape(rows, width)


def with_heads_apart(weight: Tensor, num_heads: int) -> Tensor:
    return pairs_of(weight, num_heads).transpose(1, 2).flatten(1, 2)


def in_place(weight: Tensor, num_heads: int) -> Tensor:
    weight.copy_(pairs_of(weight, num_heads).transpose(1, 2).flatten(0, 2).clone())
    return weight


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda weight, num_heads: weight, "no row has moved"),
        (the_way_back, "This is the way back"),
        (heads_forgotten, "It pairs rows of different heads"),
        (
            members_swapped,
            "row 0 of the result is row 2 of the weight; wanted is row 0",
        ),
        (halves_swapped, "row 0 of the result is row 2 of the weight"),
        (columns, "RuntimeError"),
        (weights_only, "ValueError"),
        (with_heads_apart, "the shape must stay"),
        (in_place, "it changed the weight"),
    ],
)
def test_to_interleaved(attempt: Callable[..., Any], message: str) -> None:
    verdict = check_to_interleaved(attempt)
    assert not verdict
    assert message in verdict.message


def test_the_order_that_is_checked_keeps_the_scores() -> None:
    """Scores of half-split weights, and of reordered ones turned in neighbouring pairs."""
    generator = torch.Generator().manual_seed(0)
    q_proj, k_proj = torch.randn(2, 3 * 8, 5, generator=generator)
    hidden = torch.randn(6, 5, generator=generator)
    rope = RotaryEmbedding(8, 64, {"rope_type": "default", "rope_theta": 100.0})
    cos, sin = rope(torch.arange(6))

    def neighbours(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
        turned = turned * torch.complex(cos[..., 4:], sin[..., 4:])  # [6, 1, 4]
        return torch.view_as_real(turned).flatten(-2)

    def scores(order: Any, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        q, k = ((hidden @ w[order].T).view(6, 3, 8) for w in (q_proj, k_proj))
        return rotate(q).transpose(0, 1) @ rotate(k).permute(1, 2, 0)

    half_split = scores(slice(None), lambda x: apply_rotary_emb(x, cos, sin))
    interleaved = scores(interleaved_order(3, 8), neighbours)
    torch.testing.assert_close(half_split, interleaved, rtol=1e-4, atol=1e-4)


def turn(key: Tensor, delta: int, rope: RotaryEmbedding, sign: int) -> Tensor:
    cos, sin = rope(torch.tensor([abs(delta)]))
    if delta * sign < 0:
        sin = -sin
    return apply_rotary_emb(key, cos, sin)


def right(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return turn(key, delta, rope, 1) / rope.attention_factor


def yarn_forgotten(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return turn(key, delta, rope, 1)


def the_other_way(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return turn(key, delta, rope, -1) / rope.attention_factor


def forwards_always(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return right(key, abs(delta), rope)


def negative_row(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return apply_rotary_emb(key, *rope(torch.tensor([delta])))


def a_row_for_each_token(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return apply_rotary_emb(key, *rope((torch.arange(len(key)) + delta) % 4096))


def unmoved(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return key


def plain_frequencies(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    plain = {"rope_type": "default", "rope_theta": 1e6}
    return turn(key, delta, RotaryEmbedding(32, 4096, plain), 1)


def changed(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return key.copy_(right(key, delta, rope))


def one_row_too_many(key: Tensor, delta: int, rope: RotaryEmbedding) -> Tensor:
    return right(key, delta, rope)[None]


def test_a_right_solution() -> None:
    before = torch.random.get_rng_state()
    assert check_move_keys(right)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (yarn_forgotten, "YaRN's factor is in the table"),
        (the_other_way, "They were moved by -5, the other way"),
        (forwards_always, "They were moved by 5, the other way"),
        (negative_row, "Row -5 of a table is counted from its end"),
        (a_row_for_each_token, "one rotation by delta, the same for all tokens"),
        (unmoved, "The keys have not moved"),
        (plain_frequencies, "with rope_type 'linear'"),
        (changed, "it changed the keys"),
        (one_row_too_many, "wanted is [N, H_kv, D] = [3, 1, 32]"),
        (lambda *args: right(*args).tolist(), "returned a list"),
    ],
)
def test_move_keys(attempt: Callable[..., Any], message: str) -> None:
    verdict = check_move_keys(attempt)
    assert not verdict
    assert message in verdict.message
