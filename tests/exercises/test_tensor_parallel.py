"""Plausible mistakes in the exercises of page 16, and what the checks say about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.tensor_parallel import (
    check_choose_num_ranks,
    check_cut_fused,
    check_gather_top,
)


def choose(
    num_bytes: float,
    num_layers: int,
    bandwidth: float,
    sum_seconds: dict[int, float],
    target: float,
    num_sums: int = 1,
    alone: float = 0.0,
    fewest: bool = True,
    divided: bool = True,
) -> int | None:
    """The solution; each wrong attempt below changes one argument."""
    times = {}
    for ranks, seconds in ({1: alone} | sum_seconds).items():
        read = num_bytes / bandwidth / (ranks if divided else 1)
        times[ranks] = read + (2 * num_layers + num_sums) * seconds
    enough = [ranks for ranks, time in times.items() if time <= target]
    if not fewest:
        return min(times, key=lambda ranks: times[ranks])
    return min(enough, default=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alone": 13e-6}, "1 is wanted, not 2"),
        ({"fewest": False}, "4 is wanted, not 8"),
        ({"num_sums": -36}, "not 2"),
        ({"divided": False}, "4 is wanted, not None"),
    ],
)
def test_wrong_numbers_of_ranks(change: dict[str, Any], message: str) -> None:
    assert check_choose_num_ranks(choose)
    verdict = check_choose_num_ranks(lambda *args: choose(*args, **change))
    assert not verdict
    assert message in verdict.message


def cut(
    weight: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rank: int,
    size: int,
    copies: bool = True,
    by_kind: bool = True,
    neighbours: bool = True,
) -> Tensor:
    """The solution; each wrong attempt below changes one argument."""
    if not by_kind:
        return weight.chunk(size)[rank]
    parts = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    q, k, v = weight.split(parts)
    count = max(int(copies), num_kv_heads // size)
    first = rank * num_kv_heads // size
    if not neighbours:
        first = rank * count % num_kv_heads
    heads = slice(first * head_dim, (first + count) * head_dim)
    return torch.cat([q.chunk(size)[rank], k[heads], v[heads]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by_kind": False}, "rank 0 of 2, with 4 query heads and 2 key/value heads"),
        ({"copies": False}, "for the heads q0, k0, v0"),
        (
            {"neighbours": False},
            "rank 1 of 4, with 4 query heads and 2 key/value heads",
        ),
    ],
)
def test_wrong_cuts(change: dict[str, bool], message: str) -> None:
    assert check_cut_fused(cut)
    verdict = check_cut_fused(lambda *args: cut(*args, **change))
    assert not verdict
    assert message in verdict.message


def gather_all(scores: Tensor, start: int, group: Any) -> Tensor:
    wide = torch.nn.functional.pad(scores, (0, 20 - scores.shape[1]), value=-1e9)
    parts = group.all_gather(wide).unflatten(-1, (group.size, 20))
    width = -(-11 // group.size)
    joined = torch.cat([parts[:, i, :width] for i in range(group.size)], -1)
    return joined.argmax(-1)


def gather_local_ids(scores: Tensor, start: int, group: Any) -> Tensor:
    best = scores.argmax(-1, keepdim=True)
    own = torch.cat([scores.gather(-1, best), best.float()], -1)
    pairs = group.all_gather(own).unflatten(-1, (group.size, 2))
    winner = pairs[..., 0].argmax(-1, keepdim=True)
    return pairs[..., 1].gather(-1, winner)[:, 0].long()


def gather_reshaped(scores: Tensor, start: int, group: Any) -> Tensor:
    best = scores.argmax(-1, keepdim=True)
    own = torch.cat([scores.gather(-1, best), (best + start).float()], -1)
    pairs = group.all_gather(own).view(group.size, -1, 2).transpose(0, 1)
    winner = pairs[..., 0].argmax(-1, keepdim=True)
    return pairs[..., 1].gather(-1, winner)[:, 0].long()


def gather_late(scores: Tensor, start: int, group: Any) -> Tensor:
    """Of equal scores the larger id."""
    best = scores.argmax(-1, keepdim=True)
    own = torch.cat([scores.gather(-1, best), (best + start).float()], -1)
    pairs = group.all_gather(own).unflatten(-1, (group.size, 2)).flip(-2)
    winner = pairs[..., 0].argmax(-1, keepdim=True)
    return pairs[..., 1].gather(-1, winner)[:, 0].long()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (gather_all, "two for each row are enough"),
        (gather_local_ids, "rank 0 of 2 finds"),
        (gather_reshaped, "rank 0 of 2 finds"),
        (gather_late, "the smaller id wins"),
        (lambda scores, start, group: scores.argmax(-1)[:, None], "int64 of shape"),
    ],
)
def test_wrong_winners(wrong: Any, message: str) -> None:
    verdict = check_gather_top(wrong)
    assert not verdict
    assert message in " ".join(verdict.message.split())
