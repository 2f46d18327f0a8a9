"""Plausible mistakes in the exercises of page 11, and what the checks say about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from folo_lib.course.exercises.scheduler import (
    check_HeadroomKVCacheManager,
    check_split_prompt,
    check_TakeTurnsScheduler,
)
from folo_lib.request import Request
from folo_lib.scheduler import ContinuousScheduler, SimpleKVCacheManager


def split(num_tokens: int, room: int) -> list[int]:
    return [min(room, num_tokens - start) for start in range(0, num_tokens, room)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda n, r, b: split(n, b), "with 20 tokens beside 1 requests"),
        (lambda n, r, b: [b - r] * -(-n // (b - r)), "with 5 tokens"),
        (lambda n, r, b: [b - r] * (n // (b - r)), "with 5 tokens"),
        (lambda n, r, b: [*split(n, b - r), 0], "with 5 tokens"),
        (lambda n, r, b: split(n, b - r)[::-1], "with 9 tokens"),
        (lambda n, r, b: split(n, b - r - 1), "with 8 tokens"),
    ],
)
def test_wrong_chunks(wrong: Callable[..., list[int]], message: str) -> None:
    verdict = check_split_prompt(wrong)
    assert not verdict
    assert message in verdict.message


class Base(SimpleKVCacheManager):
    """Right, unless a subclass changes a part."""

    def headroom(self) -> int:
        return self.num_blocks // 4

    def is_newcomer(self, request: Request) -> bool:
        return not request.block_ids

    def is_exempt(self) -> bool:
        return self.num_used_blocks == 0

    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        if self.is_newcomer(request) and not self.is_exempt():
            left = len(self.free_blocks) - -(-num_tokens // self.block_size)
            if left < self.headroom():
                return None
        return super().allocate_slots(request, num_tokens, computed)


class ForEverybody(Base):
    def is_newcomer(self, request: Request) -> bool:
        return True


class WithoutException(Base):
    def is_exempt(self) -> bool:
        return False


class TooMuch(Base):
    def headroom(self) -> int:
        return self.num_blocks // 4 + 1


class TakesFirst(Base):
    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        newcomer, exempt = self.is_newcomer(request), self.is_exempt()
        new = SimpleKVCacheManager.allocate_slots(self, request, num_tokens)
        few = len(self.free_blocks) < self.headroom()
        return None if newcomer and not exempt and few else new


def test_headroom_without_a_mistake() -> None:
    assert check_HeadroomKVCacheManager(Base)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SimpleKVCacheManager, "a newcomer that needs 4 gets"),
        (ForEverybody, "may take the last block"),
        (WithoutException, "it would wait for ever"),
        (TooMuch, "which is enough"),
        (TakesFirst, "nothing must change"),
    ],
)
def test_wrong_headroom(wrong: type[SimpleKVCacheManager], message: str) -> None:
    verdict = check_HeadroomKVCacheManager(wrong)
    assert not verdict
    assert message in verdict.message


def user_of(request: Request) -> str:
    return request.request_id.partition("/")[0]


class Sorted(ContinuousScheduler):
    """Keeps each user's requests together."""

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.waiting = type(self.waiting)(sorted(self.waiting, key=user_of))


class ToTheFront(ContinuousScheduler):
    """A user who is new goes before all others."""

    def add(self, request: Request) -> None:
        users = {user_of(one) for one in self.waiting}
        if user_of(request) in users:
            self.waiting.append(request)
        else:
            self.waiting.appendleft(request)


class CountsThoseThatRan(ContinuousScheduler):
    """Rounds are counted from the beginning of time."""

    rounds: dict[str, int]

    def add(self, request: Request) -> None:
        if not hasattr(self, "rounds"):
            self.rounds, self.round_of = {}, {}
        user = user_of(request)
        self.round_of[request.request_id] = self.rounds.get(user, 0)
        self.rounds[user] = self.rounds.get(user, 0) + 1
        self.waiting.append(request)
        order = sorted(self.waiting, key=lambda one: self.round_of[one.request_id])
        self.waiting = type(self.waiting)(order)


class Loses(ContinuousScheduler):
    def add(self, request: Request) -> None:
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ContinuousScheduler, "a second user comes late"),
        (Sorted, "a second user comes late"),
        (ToTheFront, "a second user comes late"),
        (CountsThoseThatRan, "only those that wait are counted"),
        (Loses, "wait as nobody"),
    ],
)
def test_wrong_turns(wrong: type[ContinuousScheduler], message: str) -> None:
    verdict = check_TakeTurnsScheduler(wrong)
    assert not verdict
    assert message in verdict.message
