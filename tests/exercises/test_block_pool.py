"""Checks of page 12's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from folo_lib.block_pool import BlockPool
from folo_lib.course.exercises.block_pool import (
    check_count_hits,
    check_count_wasted_slots,
    check_FrequencyBlockPool,
)


def as_one_sequence(lengths: list[int], block_size: int) -> int:
    return -sum(lengths) % block_size


def half_a_block(lengths: list[int], block_size: int) -> int:
    return len(lengths) * block_size // 2


def a_block_too_many(lengths: list[int], block_size: int) -> int:
    return sum(block_size - length % block_size for length in lengths)


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (as_one_sequence, "each sequence has blocks of its own"),
        (half_a_block, "3 of the 8 slots are empty"),
        (a_block_too_many, "4 tokens fill one block of 4"),
    ],
)
def test_count_wasted_slots(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_count_wasted_slots(attempt)
    assert not verdict
    assert fragment in verdict.message


def count(
    prompts: list[list[int]],
    size: int,
    chained: bool = True,
    last_runs: bool = True,
    full_only: bool = True,
    remembers: bool = True,
    gaps: bool = False,
) -> list[int]:
    """The solution; each wrong attempt below changes one argument."""
    known: set[tuple[int, ...]] = set()
    hits = []
    for prompt in prompts:
        found, end = 0, size
        while end <= len(prompt) - last_runs:
            if tuple(prompt[0 if chained else end - size : end]) in known:
                found += size
            elif not gaps:
                break
            end += size
        hits.append(found)
        if not remembers:
            known.clear()
        for end in range(size, len(prompt) + 1, size):
            known.add(tuple(prompt[0 if chained else end - size : end]))
        if not full_only:
            known |= {tuple(prompt[:end]) for end in range(1, len(prompt) + 1)}
    return hits


def common_beginnings(prompts: list[list[int]], size: int) -> list[int]:
    """Token by token, without regard to blocks that were not full."""
    hits = []
    for i, prompt in enumerate(prompts):
        most = 0
        for other in prompts[:i]:
            same = 0
            for x, y in zip(prompt[:-1], other, strict=False):
                if x != y:
                    break
                same += 1
            most = max(most, same)
        hits.append(most)
    return hits


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (lambda p, n: count(p, n, chained=False), "a block elsewhere"),
        (lambda p, n: count(p, n, last_runs=False), "the last token must run"),
        (lambda p, n: count(p, n, remembers=False), "older prompts stay, too"),
        (lambda p, n: count(p, n, chained=False, gaps=True), "a block belongs to all"),
        (common_beginnings, "the block with the 3 was not full"),
        (lambda p, n: [0 for _ in p], "they share one full block"),
        (lambda p, n: tuple(count(p, n)), "a tuple, not a list of int"),
    ],
)
def test_count_hits(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_count_hits(attempt)
    assert not verdict
    assert fragment in verdict.message


class Right(BlockPool):
    """A solution; each wrong attempt below changes one thing."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.num_touches = [0] * num_blocks

    def choose(self) -> int:
        return min(self.evictable, key=self.num_touches.__getitem__)

    def get_new_blocks(self, num_blocks: int) -> list[int]:
        if num_blocks > self.num_free_blocks:
            return super().get_new_blocks(num_blocks)
        new = []
        for _ in range(num_blocks):
            if not self.empty:
                self.evictable.move_to_end(self.choose(), last=False)
            new += super().get_new_blocks(1)
            self.num_touches[new[-1]] = 0
        return new

    def touch(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        super().touch(block_ids)
        for block_id in block_ids:
            self.num_touches[block_id] += 1


class OldestFirst(Right):
    def choose(self) -> int:
        return next(iter(self.evictable))


class NewestOfEquals(Right):
    def choose(self) -> int:
        return min(reversed(self.evictable), key=self.num_touches.__getitem__)


class MostTouchedFirst(Right):
    def choose(self) -> int:
        return max(self.evictable, key=self.num_touches.__getitem__)


class CountsForEver(Right):
    def get_new_blocks(self, num_blocks: int) -> list[int]:
        before = list(self.num_touches)
        new = super().get_new_blocks(num_blocks)
        self.num_touches = before
        return new


class KeepsTheName(Right):
    def get_new_blocks(self, num_blocks: int) -> list[int]:
        cached = dict(self.cached_blocks)
        new = super().get_new_blocks(num_blocks)
        self.cached_blocks = cached
        return new


class TakesSomeOfTooFew(Right):
    def get_new_blocks(self, num_blocks: int) -> list[int]:
        if num_blocks > self.num_free_blocks:
            super().get_new_blocks(self.num_free_blocks)
            raise RuntimeError
        return super().get_new_blocks(num_blocks)


class GivesWhatThereIs(Right):
    def get_new_blocks(self, num_blocks: int) -> list[int]:
        return super().get_new_blocks(min(num_blocks, self.num_free_blocks))


class EvictsBeforeEmpty(Right):
    def get_new_blocks(self, num_blocks: int) -> list[int]:
        aside: list[int] = []
        if self.evictable:
            aside, self.empty = self.empty, []
            self.evictable.move_to_end(self.choose(), last=False)
        try:
            return super().get_new_blocks(num_blocks)
        finally:
            self.empty += aside


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (OldestFirst, "block 0 was touched twice"),
        (NewestOfEquals, "of equals the one freed first"),
        (MostTouchedFirst, "block 0 was touched twice"),
        (CountsForEver, "before does not count"),
        (KeepsTheName, "evicting removes it from `cached_blocks`"),
        (TakesSomeOfTooFew, "should take no block"),
        (GivesWhatThereIs, "should be a RuntimeError"),
        (EvictsBeforeEmpty, "empty first"),
    ],
)
def test_frequency_block_pool(attempt: type, fragment: str) -> None:
    verdict = check_FrequencyBlockPool(attempt)
    assert not verdict
    assert fragment in " ".join(verdict.message.split())


def test_right_passes() -> None:
    assert check_FrequencyBlockPool(Right)
    assert check_count_hits(count)
