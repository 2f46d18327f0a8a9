"""The paged cache: each rule by itself, and all of them against a cache that is simulated."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from hashlib import sha256
from struct import pack
from typing import Any

import pytest

import folo_lib.block_pool as block_pool
from folo_lib import LLMEngine, SamplingParams
from folo_lib.block_pool import (
    BlockPool,
    PagedKVCacheManager,
    find_faults,
    hash_block_tokens,
)
from folo_lib.request import Request, RequestMetrics
from folo_lib.scheduler import KVCacheManager


def make_request(
    tokens: Sequence[int], name: str = "r", prompt_logprobs: int | None = None
) -> Request:
    params = SamplingParams(max_tokens=9, prompt_logprobs=prompt_logprobs)
    metrics = RequestMetrics(arrival_time=0.0)
    return Request(
        request_id=name,
        prompt_token_ids=list(tokens),
        params=params,
        seed=0,
        max_tokens=9,
        metrics=metrics,
    )


def start(
    manager: PagedKVCacheManager, request: Request, num_tokens: int | None = None
) -> list[int]:
    """Admits a request, as a scheduler does; returns the blocks that were found."""
    computed = manager.get_computed_blocks(request)
    assert computed is not None
    num_found = len(computed) * manager.block_size
    if num_tokens is None:
        num_tokens = request.num_tokens - num_found
    assert manager.allocate_slots(request, num_tokens, computed) is not None
    request.num_computed_tokens = num_found + num_tokens
    return computed


def finish(manager: PagedKVCacheManager, request: Request) -> None:
    manager.free(request)
    request.num_computed_tokens = 0


def fill(manager: PagedKVCacheManager, tokens: Sequence[int]) -> list[int]:
    """A request that comes, runs, and is done; returns the blocks that it had."""
    request = make_request(tokens)
    start(manager, request)
    blocks = list(request.block_ids)
    manager.publish()
    finish(manager, request)
    manager.check_integrity([])
    return blocks


def found(manager: PagedKVCacheManager, tokens: Sequence[int]) -> int | None:
    """How many tokens of a prompt are in the cache; None: wait."""
    blocks = manager.get_computed_blocks(make_request(tokens))
    return None if blocks is None else len(blocks) * manager.block_size


class TestHash:
    def test_is_sha256_of_the_parent_and_the_tokens(self) -> None:
        first = hash_block_tokens(b"", [1, 2])
        assert first == sha256(pack("=2q", 1, 2)).digest()
        assert (
            hash_block_tokens(first, [3, 4])
            == sha256(first + pack("=2q", 3, 4)).digest()
        )

    def test_depends_on_each_token_their_order_and_what_came_before(self) -> None:
        parent = hash_block_tokens(b"", [9, 9])
        names = [
            hash_block_tokens(before, tokens)
            for before in (b"", parent)
            for tokens in ([1, 2], [2, 1], [1, 3], [12, 0], [1, 2**40])
        ]
        assert len(set(names)) == len(names)


class TestBlockPool:
    def named(self, num_blocks: int) -> BlockPool:
        """All blocks free and named, freed in the order of their ids."""
        pool = BlockPool(num_blocks)
        for block_id in pool.get_new_blocks(num_blocks):
            pool.cache_block(block_id, bytes([block_id]))
            pool.free_blocks([block_id])
        return pool

    def test_hands_out_each_block_once_in_a_row(self) -> None:
        pool = BlockPool(4)
        assert pool.get_new_blocks(3) == [0, 1, 2]
        assert pool.num_free_blocks == 1
        assert pool.get_new_blocks(0) == []
        assert pool.get_new_blocks(1) == [3]

    @pytest.mark.parametrize("named", [False, True])
    def test_too_few_is_an_error_and_changes_nothing(self, named: bool) -> None:
        pool = self.named(3) if named else BlockPool(3)
        pool.get_new_blocks(1)
        with pytest.raises(RuntimeError, match="3 blocks are wanted and 2 are free"):
            pool.get_new_blocks(3)
        assert pool.num_free_blocks == 2
        assert pool.ref_counts.count(0) == 2
        assert len(pool.cached_blocks) == len(pool.block_hashes) == 2 * named

    def test_a_shared_block_is_free_when_the_last_has_freed_it(self) -> None:
        pool = BlockPool(2)
        pool.get_new_blocks(1)
        pool.cache_block(0, b"a")
        pool.touch([0])
        pool.free_blocks([0])
        assert pool.num_free_blocks == 1
        pool.free_blocks([0])
        assert pool.num_free_blocks == 2

    @pytest.mark.parametrize("named", [False, True])
    def test_to_free_a_free_block_is_an_error(self, named: bool) -> None:
        pool = BlockPool(2)
        [block_id] = pool.get_new_blocks(1)
        if named:
            pool.cache_block(block_id, b"a")
        pool.free_blocks([block_id])
        with pytest.raises(ValueError, match="block 0 is free"):
            pool.free_blocks([block_id])
        assert find_faults(pool, [], 1) == []

    def test_blocks_without_a_name_are_used_before_those_with_one(self) -> None:
        pool = BlockPool(4)
        blocks = pool.get_new_blocks(4)
        pool.cache_block(0, b"a")
        pool.cache_block(2, b"c")
        pool.free_blocks(blocks)
        assert sorted(pool.get_new_blocks(2)) == [1, 3]
        assert set(pool.cached_blocks) == {b"a", b"c"}

    def test_what_was_freed_first_is_evicted_first(self) -> None:
        assert self.named(4).get_new_blocks(4) == [0, 1, 2, 3]

    def test_what_was_used_again_is_evicted_last(self) -> None:
        pool = self.named(3)
        pool.touch([0])
        assert list(pool.evictable) == [1, 2]
        pool.free_blocks([0])
        assert pool.get_new_blocks(3) == [1, 2, 0]

    def test_the_tail_of_a_sequence_goes_before_its_head(self) -> None:
        pool = BlockPool(3)
        blocks = pool.get_new_blocks(3)
        for block_id in blocks:
            pool.cache_block(block_id, bytes([block_id]))
        pool.free_blocks(blocks)
        assert pool.get_new_blocks(3) == blocks[::-1]

    def test_an_evicted_block_cannot_be_found(self) -> None:
        pool = self.named(2)
        pool.get_new_blocks(1)
        assert pool.cached_blocks == {bytes([1]): 1}
        assert pool.block_hashes == {1: bytes([1])}
        pool.free_blocks([0])
        assert pool.empty == [0]

    def test_a_name_finds_the_first_block_that_got_it(self) -> None:
        pool = BlockPool(2)
        for block_id in pool.get_new_blocks(2):
            pool.cache_block(block_id, b"same")
        assert pool.cached_blocks == {b"same": 0}
        assert pool.block_hashes == {0: b"same"}

    def test_a_hundred_thousand_takes_and_releases_are_linear(self) -> None:
        """A plain dict would search for its first key, and be quadratic."""

        def churn(count: int) -> float:
            pool = self.named_fast(count)
            begin = time.process_time()
            for _ in range(count):
                [block_id] = pool.get_new_blocks(1)
                pool.cache_block(block_id, pack("=q", block_id))
                pool.free_blocks([block_id])
            return time.process_time() - begin

        short, long = (min(churn(n) for _ in range(2)) for n in (10_000, 100_000))
        assert long < 30 * short  # about 10

    def named_fast(self, num_blocks: int) -> BlockPool:
        pool = BlockPool(num_blocks)
        blocks = pool.get_new_blocks(num_blocks)
        for block_id in blocks:
            pool.cache_block(block_id, pack("=q", block_id))
        pool.free_blocks(blocks)
        return pool


class TestManager:
    def test_keeps_the_protocol_of_page_11(self) -> None:
        manager: KVCacheManager = PagedKVCacheManager(2, 4)
        assert (manager.num_blocks, manager.num_used_blocks) == (2, 0)

    @pytest.mark.parametrize(
        ("num_prompt", "num_found"),
        [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8), (12, 8)],
    )
    def test_a_hit_ends_before_the_last_token(
        self, num_prompt: int, num_found: int
    ) -> None:
        manager = PagedKVCacheManager(8, 4)
        fill(manager, range(12))
        assert found(manager, range(num_prompt)) == num_found

    def test_a_whole_prompt_that_is_cached_runs_its_last_block_in_its_own(self) -> None:
        manager = PagedKVCacheManager(8, 4)
        first, second = make_request(range(8), "a"), make_request(range(8), "b")
        start(manager, first)
        manager.publish()
        assert start(manager, second) == first.block_ids[:1]
        manager.publish()
        assert second.block_ids[1] not in first.block_ids
        manager.check_integrity([first, second])
        finish(manager, second)  # its own block has no name, and so is empty
        assert manager.num_cached_blocks == 0
        finish(manager, first)
        assert manager.num_cached_blocks == 2

    @pytest.mark.parametrize(
        ("tokens", "num_found"),
        [
            ([0, 1, 2, 3, 4, 5, 6, 7, 8], 8),
            ([0, 1, 2, 9, 4, 5, 6, 7, 8], 0),  # the same second block, another first
            ([4, 5, 6, 7, 4, 5, 6, 7, 8], 0),  # a block at another place
            ([0, 1, 2, 3, 4, 5, 6, 9, 8], 4),
        ],
    )
    def test_a_block_belongs_to_all_tokens_before_it(
        self, tokens: list[int], num_found: int
    ) -> None:
        manager = PagedKVCacheManager(8, 4)
        fill(manager, range(8))
        assert found(manager, tokens) == num_found

    def test_what_is_written_in_this_step_is_waited_for(self) -> None:
        manager = PagedKVCacheManager(8, 4)
        writer = make_request(range(10))
        start(manager, writer)
        assert found(manager, range(10)) is None
        assert found(manager, range(5)) is None
        assert found(manager, range(4)) == 0  # needs nothing of it
        assert found(manager, [9, *range(9)]) == 0
        manager.publish()
        assert found(manager, range(10)) == 8
        assert manager.pending == {}

    def test_a_chunk_makes_findable_what_it_fills_and_no_more(self) -> None:
        manager = PagedKVCacheManager(8, 4)
        request = make_request(range(16))
        start(manager, request, num_tokens=6)
        assert found(manager, range(16)) is None
        manager.publish()
        assert found(manager, range(16)) == 4
        assert manager.allocate_slots(request, 6) is not None
        request.num_computed_tokens += 6
        assert found(manager, range(16)) is None  # the second block is being filled
        manager.publish()
        assert found(manager, range(16)) == 12
        manager.check_integrity([request])

    def test_what_is_written_while_decoding_is_found(self) -> None:
        manager = PagedKVCacheManager(8, 4)
        request = make_request(range(6))
        start(manager, request)
        for token in (6, 7, 8):
            manager.publish()
            request.output_token_ids.append(token)
            assert manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
        manager.publish()
        assert found(manager, range(12)) == 8

    def test_a_block_gets_its_name_when_its_tokens_are_known(self) -> None:
        """The host may be a step ahead: what runs is drawn and not read yet."""
        manager = PagedKVCacheManager(8, 4)
        request = make_request(range(7))
        start(manager, request)
        manager.publish()
        assert manager.allocate_slots(request, 1) is not None  # token 7, unread
        request.num_computed_tokens += 1
        manager.publish()
        assert len(manager.pool.block_hashes) == 1
        request.output_token_ids.append(7)  # read, while the next one is launched
        assert manager.allocate_slots(request, 1) is not None
        assert found(manager, range(9)) == 8  # at once: a step before this wrote it
        request.num_computed_tokens += 1
        manager.publish()
        manager.check_integrity([request])

    @pytest.mark.parametrize("num_known", range(5, 10))
    def test_the_end_names_what_is_known_and_has_run(self, num_known: int) -> None:
        """Nobody asked for room since then: the last block had enough."""
        manager = PagedKVCacheManager(8, 4)
        request = make_request(range(5))
        start(manager, request)
        manager.publish()
        request.num_computed_tokens = 8
        request.output_token_ids = [*range(5, num_known)]
        finish(manager, request)
        assert found(manager, range(9)) == min(num_known, 8) // 4 * 4
        assert not manager.num_named
        manager.check_integrity([])

    def test_blocks_come_when_they_are_needed(self) -> None:
        manager = PagedKVCacheManager(8, 4)
        request = make_request(range(4))
        start(manager, request)
        assert manager.num_used_blocks == 1
        request.output_token_ids.append(4)
        assert manager.allocate_slots(request, 1) == [1]
        request.num_computed_tokens += 1
        request.output_token_ids.append(5)
        assert manager.allocate_slots(request, 1) == []
        assert request.block_ids == [0, 1]

    def test_prompt_logprobs_run_all_tokens_and_can_be_found(self) -> None:
        manager = PagedKVCacheManager(12, 4)
        fill(manager, range(9))
        asked = make_request(range(20), "asked", prompt_logprobs=0)
        assert start(manager, asked) == []
        manager.publish()
        assert found(manager, range(20)) == 16
        manager.check_integrity([asked])

    def test_without_prefix_caching_nothing_is_found_or_hashed(self) -> None:
        manager = PagedKVCacheManager(8, 4, enable_prefix_caching=False)
        request = make_request(range(12))
        start(manager, request)
        assert found(manager, range(12)) == 0
        manager.publish()
        assert found(manager, range(12)) == 0
        assert request.block_hashes == []
        finish(manager, request)
        assert manager.num_cached_blocks == 0
        assert make_and_start(manager, range(12)) == [0, 1, 2]  # in a row again

    def test_too_few_blocks_changes_nothing(self) -> None:
        manager = PagedKVCacheManager(4, 4)
        fill(manager, range(8))
        other = make_request(range(100, 104))
        start(manager, other)
        manager.publish()
        request = make_request(range(16))
        computed = manager.get_computed_blocks(request)
        assert computed is not None
        assert len(computed) == 2
        evictable = list(manager.pool.evictable)
        # Three are free, and two of them are those that were found.
        assert manager.allocate_slots(request, 8, computed) is None
        assert request.block_ids == []
        assert list(manager.pool.evictable) == evictable
        assert manager.pending == {}
        manager.check_integrity([other])
        assert manager.allocate_slots(request, 4, computed) is not None
        request.num_computed_tokens = 12
        manager.check_integrity([other, request])
        assert manager.allocate_slots(request, 4) is None
        assert len(request.block_ids) == 3

    def test_what_was_found_is_not_evicted_for_the_rest(self) -> None:
        manager = PagedKVCacheManager(3, 4)
        blocks = fill(manager, range(12))
        request = make_request([*range(8), 50, 51])
        assert start(manager, request) == blocks[:2]
        assert request.block_ids[:2] == blocks[:2]
        assert len(set(request.block_ids)) == 3

    @pytest.mark.parametrize("size", [4, 16])
    def test_eviction_takes_the_oldest_from_its_end(self, size: int) -> None:
        manager = PagedKVCacheManager(6, size)
        old, new = list(range(3 * size)), list(range(1000, 1000 + 3 * size))
        fill(manager, old)
        fill(manager, new)
        longer = {"old": [*old, 7], "new": [*new, 7]}
        for num_left in (3, 2, 1, 0):  # one more block is needed each time
            assert found(manager, longer["old"]) == num_left * size
            assert found(manager, longer["new"]) == 3 * size
            request = make_request([5 * num_left + 1])
            start(manager, request)
            manager.publish()

    def test_to_free_twice_does_nothing(self) -> None:
        manager = PagedKVCacheManager(8, 4)
        request = make_request(range(9))
        start(manager, request)
        manager.publish()
        for _ in range(2):
            manager.free(request)
            assert request.block_ids == []
            assert manager.num_used_blocks == 0
            assert manager.num_cached_blocks == 2

    def test_who_is_freed_in_the_same_step_leaves_nothing_to_be_found(self) -> None:
        manager = PagedKVCacheManager(8, 4)
        writer, other = make_request(range(9)), make_request(range(50, 59))
        start(manager, writer)
        start(manager, other)
        finish(manager, writer)
        assert found(manager, range(9)) == 0
        manager.publish()
        assert found(manager, range(9)) == 0
        assert found(manager, range(50, 59)) == 8
        manager.check_integrity([other])

    def test_reset_forgets_everything(self) -> None:
        manager = PagedKVCacheManager(8, 4)
        request = make_request(range(9))
        start(manager, request)
        manager.publish()
        start(manager, make_request(range(20, 29)))
        manager.reset()
        request.block_ids, request.num_computed_tokens = [], 0
        manager.check_integrity([request])
        assert found(manager, range(9)) == found(manager, range(20, 29)) == 0
        assert (manager.num_used_blocks, manager.num_cached_blocks) == (0, 0)
        assert start(manager, request) == []  # its hashes are still right
        manager.publish()
        assert found(manager, range(9)) == 8

    def test_each_block_is_hashed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: list[list[int]] = []

        def counting(parent: bytes, tokens: list[int]) -> bytes:
            hashed.append(tokens)
            return hash_block_tokens(parent, tokens)

        monkeypatch.setattr(block_pool, "hash_block_tokens", counting)
        manager = PagedKVCacheManager(40, 4)
        request = make_request(range(8))
        for _ in range(3):
            assert manager.get_computed_blocks(request) == []
        start(manager, request)
        for token in range(8, 40):
            manager.publish()
            request.output_token_ids.append(token)
            assert manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
        finish(manager, request)  # preempted; now it starts again
        start(manager, request)
        assert hashed == [list(range(i, i + 4)) for i in range(0, 40, 4)]


def make_and_start(manager: PagedKVCacheManager, tokens: Sequence[int]) -> list[int]:
    request = make_request(tokens)
    start(manager, request)
    return request.block_ids


class TestIntegrity:
    def books(self) -> tuple[PagedKVCacheManager, Request, Request]:
        """Two requests that share a block, a kept block, and empty ones."""
        manager = PagedKVCacheManager(8, 4)
        fill(manager, range(70, 75))
        one, two = make_request(range(6), "one"), make_request([*range(4), 9], "two")
        start(manager, one)
        manager.publish()
        start(manager, two)
        manager.publish()
        manager.check_integrity([one, two])
        return manager, one, two

    def test_a_request_that_is_not_named(self) -> None:
        manager, one, _ = self.books()
        with pytest.raises(
            RuntimeError, match="has the count 2, and stands in tables 1"
        ):
            manager.check_integrity([one])

    def test_a_block_twice_in_a_table(self) -> None:
        manager, one, two = self.books()
        one.block_ids.append(one.block_ids[0])
        with pytest.raises(
            RuntimeError, match="has the count 2, and stands in tables 3"
        ):
            manager.check_integrity([one, two])

    def test_a_lost_block(self) -> None:
        manager, one, two = self.books()
        lost = manager.pool.empty.pop()
        with pytest.raises(
            RuntimeError, match=f"block {lost} has the count 0, and .* 0"
        ):
            manager.check_integrity([one, two])

    def test_a_block_that_is_free_and_used(self) -> None:
        manager, one, two = self.books()
        manager.pool.empty.append(one.block_ids[1])
        with pytest.raises(RuntimeError, match=r"count 1, and stands 1 times among"):
            manager.check_integrity([one, two])

    def test_a_block_that_is_free_twice(self) -> None:
        manager, one, two = self.books()
        manager.pool.empty.append(manager.pool.empty[0])
        with pytest.raises(RuntimeError, match=r"count 0, and stands 2 times among"):
            manager.check_integrity([one, two])

    def test_a_free_block_in_the_wrong_place(self) -> None:
        manager, one, two = self.books()
        manager.pool.evictable[manager.pool.empty.pop()] = None
        with pytest.raises(RuntimeError, match="an evictable one has none"):
            manager.check_integrity([one, two])
        manager, one, two = self.books()
        [kept] = manager.pool.evictable
        del manager.pool.evictable[kept]
        manager.pool.empty.append(kept)
        with pytest.raises(RuntimeError, match="an empty block has a hash"):
            manager.check_integrity([one, two])

    def test_two_mappings(self) -> None:
        """A block with two names, and a name that leads to somebody else's block."""
        manager, one, two = self.books()
        manager.pool.cached_blocks[b"another"] = one.block_ids[0]
        with pytest.raises(RuntimeError, match="do not lead to one another"):
            manager.check_integrity([one, two])
        manager, one, two = self.books()
        name = manager.pool.block_hashes[one.block_ids[0]]
        manager.pool.cached_blocks[name] = one.block_ids[1]
        with pytest.raises(RuntimeError, match="do not lead to one another"):
            manager.check_integrity([one, two])

    def test_a_name_before_the_block_is_computed(self) -> None:
        manager, one, two = self.books()
        manager.pool.cache_block(one.block_ids[1], b"too early")
        with pytest.raises(RuntimeError, match="can be found, and is not yet computed"):
            manager.check_integrity([one, two])

    def test_the_name_of_other_tokens(self) -> None:
        manager, one, two = self.books()
        block_id = one.block_ids[0]
        del manager.pool.cached_blocks[manager.pool.block_hashes.pop(block_id)]
        manager.pool.cache_block(block_id, b"other")
        with pytest.raises(RuntimeError, match="found by the hash of other tokens"):
            manager.check_integrity([one, two])

    def test_a_table_that_is_too_short(self) -> None:
        manager, one, two = self.books()
        one.num_computed_tokens += 8
        with pytest.raises(RuntimeError, match="one-0 has no room for 14 tokens"):
            manager.check_integrity([one, two])


# All rules together: a random scheduler, and a cache that remembers what was written.

Slot = tuple[int, int]


class Play:
    """Steps in random order, on a cache whose slots hold the prefix that they stand for.

    What a step reads must have been written by an earlier step, with exactly these tokens
    before it; what it writes, nobody else may have in a table.
    """

    def __init__(self, manager: Any, seed: int, endless: bool) -> None:
        self.manager, self.rng, self.endless = manager, random.Random(seed), endless
        self.cache: dict[Slot, tuple[int, ...]] = {}
        self.known: set[tuple[int, ...]] = set()  # prefixes that can be found
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_found = self.num_waits = self.num_preemptions = self.num_asked = 0
        size = manager.block_size
        self.bases = [
            [self.rng.randrange(3) for _ in range(5 * size + 3)] for _ in range(3)
        ]
        self.limit = manager.num_blocks * size

    def add(self) -> None:
        rng, size = self.rng, self.manager.block_size
        base = rng.choice(self.bases)
        tokens = base[: rng.randint(0, len(base))]
        tokens += [rng.randrange(3) for _ in range(rng.randint(0, size + 1))]
        tokens = (tokens or [1])[: max(1, self.limit - 4)]
        asks = 0 if rng.random() < 0.1 else None
        self.num_asked += 1
        self.waiting.append(make_request(tokens, f"r{self.num_asked}", asks))

    def check(self) -> None:
        self.manager.check_integrity(self.running)
        used = {i for request in self.running for i in request.block_ids}
        assert self.manager.num_used_blocks == len(used)

    def drop(self, request: Request) -> None:
        self.running.remove(request)
        self.manager.free(request)
        request.num_computed_tokens = 0

    def schedule(self) -> list[tuple[Request, int]]:
        """Who runs, and the first token that runs."""
        rng, plan = self.rng, list[tuple[Request, int]]()
        for request in list(self.running):
            if request not in self.running or rng.random() < 0.1:
                continue
            begin = request.num_computed_tokens
            count = rng.randint(1, request.num_tokens - begin)
            while self.manager.allocate_slots(request, count) is None:
                last = self.running[-1]
                plan = [one for one in plan if one[0] is not last]
                self.drop(last)
                self.waiting.insert(0, last)
                self.num_preemptions += 1
                self.check()
                if last is request:
                    break
            else:
                request.num_computed_tokens += count
                plan.append((request, begin))
                self.check()
        for request in list(self.waiting):
            computed = self.manager.get_computed_blocks(request)
            if computed is None:
                self.num_waits += 1
                continue
            begin = len(computed) * self.manager.block_size
            if self.endless:
                assert begin == self.expected_hit(request)
            assert begin < request.num_tokens
            count = rng.randint(1, request.num_tokens - begin)
            if self.manager.allocate_slots(request, count, computed) is None:
                break
            self.num_found += begin
            self.waiting.remove(request)
            self.running.append(request)
            request.num_computed_tokens = begin + count
            plan.append((request, begin))
            self.check()
            if rng.random() < 0.05:  # aborted before the step has run
                self.drop(request)
                plan.pop()
                self.check()
        self.manager.publish()
        self.check()
        return plan

    def expected_hit(self, request: Request) -> int:
        size, tokens = self.manager.block_size, tuple(request.get_token_ids())
        if request.params.prompt_logprobs is not None:
            return 0
        end = 0
        while end + size < len(tokens) and tokens[: end + size] in self.known:
            end += size
        return end

    def run(self, plan: list[tuple[Request, int]]) -> None:
        size = self.manager.block_size

        def slots(request: Request, begin: int, end: int) -> list[tuple[int, Slot]]:
            table = request.block_ids
            return [(i, (table[i // size], i % size)) for i in range(begin, end)]

        written: set[Slot] = set()
        for request, begin in plan:
            tokens = tuple(request.get_token_ids())
            for i, slot in slots(request, 0, begin):
                assert self.cache.get(slot) == tokens[: i + 1], "reads something else"
        for request, begin in plan:
            tokens, end = tuple(request.get_token_ids()), request.num_computed_tokens
            for i, slot in slots(request, begin, end):
                assert slot not in written, "two requests write to one slot"
                written.add(slot)
                assert self.manager.pool.ref_counts[slot[0]] == 1, (
                    "writes what is shared"
                )
                self.cache[slot] = tokens[: i + 1]
            full = range(size, end + 1, size)
            self.known |= {tokens[:stop] for stop in full if stop > begin}

    def step(self) -> None:
        rng = self.rng
        for _ in range(rng.choice([0, 0, 1, 2, 3])):
            self.add()
        plan = self.schedule()
        self.run(plan)
        for request, _ in plan:
            is_long = request.num_tokens + 1 >= self.limit
            if request.num_computed_tokens == request.num_tokens:
                request.output_token_ids.append(rng.randrange(3))
                if is_long or rng.random() < 0.15:
                    self.drop(request)
                    self.check()
        if rng.random() < 0.01:
            self.manager.reset()
            self.cache.clear()
            self.known.clear()
            for request in self.running:
                request.block_ids, request.num_computed_tokens = [], 0
            self.waiting, self.running = self.running + self.waiting, []
            self.check()


def play(
    make: type[PagedKVCacheManager],
    seed: int,
    size: int,
    endless: bool = False,
    enable: bool = True,
) -> Play:
    num_blocks = 1000 if endless else random.Random(seed).randint(2, 14)
    game = Play(make(num_blocks, size, enable), seed, endless)
    for _ in range(25 if endless else 60):
        game.step()
    for request in list(game.running):
        game.drop(request)
    game.check()
    assert game.manager.num_used_blocks == 0
    return game


@pytest.mark.parametrize("size", [1, 4, 16])
class TestRandomSchedules:
    def test_nobody_reads_what_is_not_there(self, size: int) -> None:
        games = [play(PagedKVCacheManager, seed, size) for seed in range(40)]
        for what in ("num_found", "num_waits", "num_preemptions"):
            assert sum(getattr(game, what) for game in games) > 40, what

    def test_everything_that_is_there_is_found(self, size: int) -> None:
        games = [
            play(PagedKVCacheManager, seed, size, endless=True) for seed in range(6)
        ]
        assert sum(game.num_found for game in games) > 100

    def test_without_prefix_caching(self, size: int) -> None:
        games = [
            play(PagedKVCacheManager, seed, size, enable=False) for seed in range(9)
        ]
        assert sum(game.num_found for game in games) == 0
        assert sum(game.num_preemptions for game in games) > 9


class FindsAll(PagedKVCacheManager):
    """The whole prompt, its last token included."""

    def get_computed_blocks(self, request: Request) -> list[int] | None:
        request.output_token_ids.append(0)
        blocks = super().get_computed_blocks(request)
        request.output_token_ids.pop()
        if len(request.block_hashes) * self.block_size > request.num_tokens:
            request.block_hashes.pop()
        return blocks


class DoesNotWait(PagedKVCacheManager):
    """A block can be found in the step that writes it."""

    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        new = super().allocate_slots(request, num_tokens, computed)
        for block_hash, block_id in self.pending.items():
            self.pool.cache_block(block_id, block_hash)
        return new


class NamesTheWholePrompt(PagedKVCacheManager):
    """All blocks of a prompt can be found as soon as its first chunk has run."""

    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        there = request.num_computed_tokens + len(computed) * self.block_size
        return super().allocate_slots(request, request.num_tokens - there, computed)


class NamesWithoutTheChain(PagedKVCacheManager):
    def hash_blocks(self, request: Request, num_blocks: int) -> list[bytes]:
        size = self.block_size
        for i in range(len(request.block_hashes), num_blocks):
            tokens = request.get_token_ids(i * size, (i + 1) * size)
            request.block_hashes.append(hash_block_tokens(b"", tokens))
        return request.block_hashes


class TouchesLater(PagedKVCacheManager):
    """New blocks are taken before those that were found are touched."""

    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        length = len(computed) * self.block_size + num_tokens
        missing = -(-length // self.block_size) - len(computed)
        if not computed or missing > self.pool.num_free_blocks:
            return super().allocate_slots(request, num_tokens, computed)
        new = self.pool.get_new_blocks(missing)
        for block_id in computed:
            self.pool.evictable.pop(block_id, None)
            self.pool.ref_counts[block_id] += 1
        request.block_ids += [*computed, *new]
        return [*computed, *new]


class KeepsPending(PagedKVCacheManager):
    """What a request that is gone was to write gets its name all the same."""

    def free(self, request: Request) -> None:
        self.pool.free_blocks(request.block_ids)
        request.block_ids = []


class CountsNobody(PagedKVCacheManager):
    """A hit does not raise the count of a block that is in use."""

    def reset(self) -> None:
        super().reset()

        class Pool(BlockPool):
            def touch(self, block_ids: Any) -> None:
                super().touch([i for i in block_ids if self.ref_counts[i] == 0])

        self.pool = Pool(self.num_blocks)


class ForgetsToForget(PagedKVCacheManager):
    """An evicted block can still be found."""

    def reset(self) -> None:
        super().reset()

        class Pool(BlockPool):
            def get_new_blocks(self, num_blocks: int) -> list[int]:
                names = dict(self.block_hashes), dict(self.cached_blocks)
                new = super().get_new_blocks(num_blocks)
                self.block_hashes, self.cached_blocks = names
                return new

        self.pool = Pool(self.num_blocks)


@pytest.mark.parametrize(
    "broken",
    [
        FindsAll,
        DoesNotWait,
        NamesTheWholePrompt,
        NamesWithoutTheChain,
        TouchesLater,
        KeepsPending,
        CountsNobody,
        ForgetsToForget,
    ],
)
@pytest.mark.parametrize("checked", [False, True])
def test_broken_managers_are_found(
    broken: type[PagedKVCacheManager], checked: bool
) -> None:
    """By the simulated cache alone, and with the books checked too."""

    class Unchecked(broken):  # type: ignore[valid-type, misc]
        def check_integrity(self, requests: Collection[Request]) -> None:
            pass

    make = broken if checked else Unchecked
    # A scheduler may crash over the ruins before a check sees them; that counts as well.
    with pytest.raises((AssertionError, RuntimeError, ValueError, KeyError)):
        for seed in range(40):
            play(make, seed, 4)


class TestEngine:
    """With the bundled model: what is found gives the same tokens as what is computed."""

    @pytest.mark.parametrize("size", [4, 16])
    def test_same_tokens_with_and_without(self, size: int) -> None:
        rng = random.Random(size)
        system = [rng.randrange(300, 1900) for _ in range(45)]
        prompts = [
            system[: rng.choice([45, 45, 30])]
            + [rng.randrange(300, 1900) for _ in range(rng.randint(0, 20))]
            for _ in range(10)
        ]
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        answers: list[list[list[int]]] = []
        for enable in (True, False):
            engine = LLMEngine(
                device="cpu",
                dtype="float32",
                block_size=size,
                max_num_batched_tokens=70,
                max_num_seqs=6,
                enable_prefix_caching=enable,
                kv_cache_memory_bytes=32 * 2**20,
                use_tqdm=False,
            )
            scheduler: Any = engine.scheduler
            ids = [engine.add_request(prompt, params) for prompt in prompts]
            outputs: dict[str, Any] = {}
            while engine.has_unfinished_requests():
                outputs |= {one.request_id: one for one in engine.step()}
                scheduler.kv_cache.check_integrity(scheduler.running)
            answers.append([outputs[i].outputs[0].token_ids for i in ids])
            stats = engine.stats()
            assert (stats.num_prefix_hits > 150) is enable
            assert stats.num_used_blocks == 0
        assert answers[0] == answers[1]


def test_evictable_blocks_stand_in_an_ordered_dict() -> None:
    """From whose front and middle one can leave at once."""
    assert isinstance(BlockPool(1).evictable, OrderedDict)
