"""Checks of page 06's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from folo_lib.course.exercises.kv_cache import (
    check_evicting_slot_mapping,
    check_SharedBlockAllocator,
)


def sinks_are_not_kept(start: int, stop: int, num_sinks: int, window: int) -> list[int]:
    return [i % (num_sinks + window) for i in range(start, stop)]


def last_write_wins(start: int, stop: int, num_sinks: int, window: int) -> list[int]:
    return [
        i if i < num_sinks else num_sinks + (i - num_sinks) % window
        for i in range(start, stop)
    ]


def leaves_tokens_out(start: int, stop: int, num_sinks: int, window: int) -> list[int]:
    slots = last_write_wins(start, stop, num_sinks, window)
    return [
        slot
        for i, slot in enumerate(slots, start)
        if i < num_sinks or i >= stop - window
    ]


def drops_sinks_of_a_long_prompt(
    start: int, stop: int, num_sinks: int, window: int
) -> list[int]:
    slots = last_write_wins(start, stop, num_sinks, window)
    return [slot if i >= stop - window else -1 for i, slot in enumerate(slots, start)]


def window_includes_the_sinks(
    start: int, stop: int, num_sinks: int, window: int
) -> list[int]:
    rest = max(window - num_sinks, 1)
    return [
        i
        if i < num_sinks
        else num_sinks + (i - num_sinks) % rest
        if i >= stop - rest
        else -1
        for i in range(start, stop)
    ]


def slots_without_end(start: int, stop: int, num_sinks: int, window: int) -> list[int]:
    return list(range(start, stop))


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (sinks_are_not_kept, "Token 0 is a sink: it is stored, and never overwritten"),
        (last_write_wins, "twice in one step"),
        (leaves_tokens_out, "-1 for a token that is not stored"),
        (drops_sinks_of_a_long_prompt, "Token 0 is a sink"),
        (window_includes_the_sinks, "There is a slot for token"),
        (slots_without_end, "slots are 0 to 2, or -1"),
        (lambda *_: None, "not a list"),
    ],
)
def test_evicting_slot_mapping(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_evicting_slot_mapping(attempt)
    assert not verdict
    assert fragment in verdict.message


class Right:
    """A solution; each wrong attempt below changes one method."""

    def __init__(self, num_blocks: int) -> None:
        self.owners = [0] * num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.owners.count(0)

    def allocate(self) -> int:
        if 0 not in self.owners:
            raise RuntimeError("full")
        block_id = self.owners.index(0)
        self.owners[block_id] = 1
        return block_id

    def held(self, block_id: int) -> None:
        if self.owners[block_id] == 0:
            raise ValueError(block_id)

    def share(self, block_id: int) -> None:
        self.held(block_id)
        self.owners[block_id] += 1

    def free(self, block_id: int) -> None:
        self.held(block_id)
        self.owners[block_id] -= 1

    def make_writable(self, block_id: int) -> int:
        self.held(block_id)
        if self.owners[block_id] == 1:
            return block_id
        new = self.allocate()
        self.owners[block_id] -= 1
        return new


class FreesForAll(Right):
    def free(self, block_id: int) -> None:
        self.held(block_id)
        self.owners[block_id] = 0


class AlwaysCopies(Right):
    def make_writable(self, block_id: int) -> int:
        self.held(block_id)
        new = self.allocate()
        self.owners[block_id] -= 1
        return new


class NeverCopies(Right):
    def make_writable(self, block_id: int) -> int:
        self.held(block_id)
        return block_id


class KeepsTheOldOwner(Right):
    def make_writable(self, block_id: int) -> int:
        self.held(block_id)
        return block_id if self.owners[block_id] == 1 else self.allocate()


class LosesAnOwnerWhenFull(Right):
    def make_writable(self, block_id: int) -> int:
        self.held(block_id)
        if self.owners[block_id] == 1:
            return block_id
        self.owners[block_id] -= 1
        return self.allocate()


class FreesTwice(Right):
    def free(self, block_id: int) -> None:
        self.owners[block_id] = max(0, self.owners[block_id] - 1)


class SharesFreeBlocks(Right):
    def share(self, block_id: int) -> None:
        self.owners[block_id] += 1


class GivesNoneWhenFull(Right):
    def allocate(self) -> int:
        return super().allocate() if 0 in self.owners else -1


class SharesOnce(Right):
    def share(self, block_id: int) -> None:
        self.held(block_id)
        self.owners[block_id] = 2


def test_the_class_that_the_attempts_change_is_right() -> None:
    assert check_SharedBlockAllocator(Right)


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (FreesForAll, "though one owner is left"),
        (AlwaysCopies, "so no copy is needed"),
        (NeverCopies, "what the other owner reads"),
        (KeepsTheOldOwner, "has left the old block"),
        (LosesAnOwnerWhenFull, "should change nothing"),
        (FreesTwice, "a second free() of a free block should raise a ValueError"),
        (SharesFreeBlocks, "share() of a free block should raise a ValueError"),
        (
            GivesNoneWhenFull,
            "allocate() with no block free should raise a RuntimeError",
        ),
        (SharesOnce, "count the owners of each block"),
    ],
)
def test_shared_block_allocator(attempt: type, fragment: str) -> None:
    verdict = check_SharedBlockAllocator(attempt)
    assert not verdict
    assert fragment in verdict.message
