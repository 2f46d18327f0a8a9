"""Mistakes that people make in the exercises of page 15, and what the checks say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.fused_decode import (
    check_end_of_chain,
    check_floor_us,
    check_pack_bfloat16,
    tick,
)


def weights_for_each(w: int, t: int, lens: Sequence[int], speed: float) -> float:
    return 1e6 * sum(w + t * n for n in lens or [0]) / speed


def one_length(w: int, t: int, lens: Sequence[int], speed: float) -> float:
    return 1e6 * (w + t * len(lens) * max(lens, default=0)) / speed


def in_seconds(w: int, t: int, lens: Sequence[int], speed: float) -> float:
    return (w + t * sum(lens)) / speed


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (weights_for_each, "the weights are read once"),
        (one_length, "each sequence has its own length"),
        (in_seconds, "no sequence, the weights alone"),
    ],
)
def test_floor_us(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_floor_us(attempt)
    assert not verdict and reason in verdict.message


def leaves_the_bits(scores: Tensor, token_ids: Tensor) -> Tensor:
    return scores.view(torch.int16).int() * 65536 + (65535 - token_ids.int())


def highest_token_wins(scores: Tensor, token_ids: Tensor) -> Tensor:
    bits = scores.view(torch.int16).int()
    return (bits ^ ((bits >> 15) & 0x7FFF)) * 65536 + token_ids.int()


def takes_64_bits(scores: Tensor, token_ids: Tensor) -> Tensor:
    bits = scores.view(torch.int16).long()
    return (bits ^ ((bits >> 15) & 0x7FFF)) * 65536 + (65535 - token_ids)


def multiplies(scores: Tensor, token_ids: Tensor) -> Tensor:
    return (scores.float() * 1000).int() * 4 + (3 - token_ids.int() % 4)


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (leaves_the_bits, "the one nearer to 0 is the larger"),
        (highest_token_wins, "the lowest should win"),
        (takes_64_bits, "not torch.int32"),
        (multiplies, "does not have the larger number"),
    ],
)
def test_pack_bfloat16(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_pack_bfloat16(attempt)
    assert not verdict and reason in verdict.message


Kernels = list[tuple[float, float]]


def adds_all(kernels: Kernels, room: int) -> float:
    return sum(fetch + work for fetch, work in kernels)


def forgets_fetches(kernels: Kernels, room: int) -> float:
    hidden = sum(work for _, work in kernels)
    if room == 1:
        return adds_all(kernels, room)
    return kernels[0][0] + hidden if kernels else 0


def has_room_for_two(kernels: Kernels, room: int) -> float:
    return tick([(int(f), int(w)) for f, w in kernels], min(room, 2))


def fails_without_kernels(kernels: Kernels, room: int) -> float:
    ends: list[float] = []
    for i, (fetch, work) in enumerate(kernels):
        start = ends[i - room] if i >= room else 0
        ends.append(max(start + fetch, ends[-1] if ends else 0) + work)
    return ends[-1]


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (adds_all, "fetches while the first one works"),
        (forgets_fetches, "a long fetch ends after"),
        (has_room_for_two, "with room for three"),
        (fails_without_kernels, "IndexError"),
    ],
)
def test_end_of_chain(attempt: Callable[..., Any], reason: str) -> None:
    verdict = check_end_of_chain(attempt)
    assert not verdict and reason in verdict.message
