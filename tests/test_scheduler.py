"""Continuous batching: budget, order, chunks, blocks, preemption. No model is needed."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Iterator, Sequence

import pytest

from folo_lib.config import EngineConfig
from folo_lib.request import Request, RequestMetrics, RequestStatus
from folo_lib.runner import SampledToken, StepPlan
from folo_lib.sampling_params import SamplingParams
from folo_lib.scheduler import ContinuousScheduler, SimpleKVCacheManager

PARAMS = SamplingParams(temperature=0, ignore_eos=True)


def make_request(name: str, num_tokens: int = 4, max_tokens: int = 8) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(1, num_tokens + 1)),
        params=PARAMS,
        seed=0,
        max_tokens=max_tokens,
        metrics=RequestMetrics(0.0),
    )


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    seqs: int = 8,
    budget: int = 64,
    kv_cache: str = "simple",
) -> ContinuousScheduler:
    config = EngineConfig(
        device="cpu",
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
    )
    return ContinuousScheduler(config, num_blocks, kv_cache)


class Harness:
    """A scheduler, the requests, and a runner that believes only what plans tell it.

    Every step is checked against what holds for all plans.
    """

    def __init__(self, scheduler: ContinuousScheduler) -> None:
        self.scheduler = scheduler
        self.requests: dict[str, Request] = {}
        self.known: dict[str, list[int]] = {}  # what the runner has: blocks
        self.computed: dict[str, int] = {}
        self.preempted = 0

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.requests[request.sample_id] = request
            self.scheduler.add(request)

    def schedule(self) -> StepPlan:
        before = list(self.scheduler.running)
        plan = self.scheduler.schedule()
        for request_id in plan.finished_ids:
            self.known.pop(request_id)  # it was known, and is named once
            del self.computed[request_id]
        for new in plan.new_requests:
            assert new.request_id not in self.known
            request = self.requests[new.request_id]
            assert new.token_ids == request.get_token_ids()
            assert new.num_prompt_tokens == len(request.prompt_token_ids)
            self.known[new.request_id] = []
            self.computed[new.request_id] = new.num_computed_tokens
        self.check(plan, before)
        return plan

    def check(self, plan: StepPlan, before: Sequence[Request]) -> None:
        scheduler, size = self.scheduler, self.scheduler.block_size
        ids = [one.request_id for one in plan.scheduled]
        most = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        assert len(set(ids)) == len(ids) <= most
        total = sum(one.num_tokens for one in plan.scheduled)
        assert total <= scheduler.max_num_batched_tokens
        for one in plan.scheduled:
            assert one.num_tokens > 0
            self.known[one.request_id] += one.new_block_ids
            self.computed[one.request_id] += one.num_tokens
            request = self.requests[one.request_id]
            assert self.known[one.request_id] == request.block_ids
            assert self.computed[one.request_id] == request.num_computed_tokens
            assert request.num_computed_tokens <= request.num_tokens
            assert len(request.block_ids) == -(-request.num_computed_tokens // size)
        # Who ran and was not sent away runs: nobody sits out a step.
        running = scheduler.running
        assert ids == [one.sample_id for one in running]
        stayed = [one for one in before if one in running]
        assert running[: len(stayed)] == stayed == before[: len(stayed)]
        # Only the last one may still be in its prompt.
        assert all(one.num_computed_tokens == one.num_tokens for one in running[:-1])
        owned = [block for one in running for block in one.block_ids]
        assert len(set(owned)) == len(owned) == scheduler.kv_cache.num_used_blocks
        assert all(not one.block_ids for one in scheduler.waiting)

    def draw(self, plan: StepPlan) -> list[str]:
        """A token for those who have run to their end; who has ended leaves."""
        ended = []
        for one in plan.scheduled:
            request = self.requests[one.request_id]
            if request.num_computed_tokens == request.num_tokens:
                request.append_token(SampledToken(5), 0.0)
                if request.status.is_finished:
                    self.scheduler.finish(request)
                    ended.append(request.request_id)
        return ended

    def step(self) -> dict[str, int]:
        plan = self.schedule()
        self.draw(plan)
        return {one.request_id.split("-")[0]: one.num_tokens for one in plan.scheduled}

    def run(self, limit: int = 3000) -> Iterator[dict[str, int]]:
        while self.scheduler.has_unfinished():
            assert (limit := limit - 1), "nobody gets on"
            yield self.step()


class TestSimpleKVCacheManager:
    def test_blocks_come_when_they_are_needed(self) -> None:
        manager, request = SimpleKVCacheManager(4, 4), make_request("a", 16)
        sizes = []
        for _ in range(16):
            new = manager.allocate_slots(request, 1)
            assert new is not None
            sizes.append(len(new))
            request.num_computed_tokens += 1
        assert sizes == [1, 0, 0, 0] * 4
        assert sorted(request.block_ids) == [0, 1, 2, 3]

    def test_too_few_leave_everything_as_it_was(self) -> None:
        manager, request = SimpleKVCacheManager(4, 4), make_request("a", 17)
        assert manager.allocate_slots(request, 17) is None
        assert request.block_ids == []
        assert manager.num_used_blocks == 0
        assert manager.allocate_slots(request, 16) is not None
        assert manager.num_used_blocks == 4

    def test_free_twice_frees_once(self) -> None:
        manager, request = SimpleKVCacheManager(4, 4), make_request("a", 8)
        manager.allocate_slots(request, 8)
        manager.free(request)
        manager.free(request)
        assert sorted(manager.free_blocks) == [0, 1, 2, 3]

    def test_reset_and_sharing(self) -> None:
        manager, request = SimpleKVCacheManager(4, 4), make_request("a", 8)
        manager.allocate_slots(request, 8)
        assert manager.get_computed_blocks(make_request("b", 8)) == []
        assert manager.num_cached_blocks == 0
        manager.reset()
        assert manager.num_used_blocks == 0


class TestOrderAndBudget:
    def test_prompts_join_in_the_order_of_arrival(self) -> None:
        h = Harness(make_scheduler(seqs=3))
        h.add(*(make_request(name, 4, 3) for name in "abcde"))
        assert [list(plan) for plan in h.run()] == [["a", "b", "c"]] * 3 + [
            ["d", "e"]
        ] * 3

    def test_a_place_is_taken_over_at_once(self) -> None:
        h = Harness(make_scheduler(seqs=2))
        h.add(make_request("a", 4, 2), make_request("b", 4, 5), make_request("c", 4, 2))
        assert list(h.run()) == [
            {"a": 4, "b": 4},
            {"a": 1, "b": 1},
            {"b": 1, "c": 4},
            {"b": 1, "c": 1},
            {"b": 1},
        ]

    def test_who_comes_later_joins_at_the_next_step(self) -> None:
        h = Harness(make_scheduler())
        h.add(make_request("a", 4, 4))
        h.step()
        h.add(make_request("b", 6, 2))
        assert h.step() == {"a": 1, "b": 6}

    def test_long_prompt_in_chunks_beside_those_that_run(self) -> None:
        h = Harness(make_scheduler(budget=8))
        h.add(
            make_request("a", 4, 9), make_request("b", 20, 2), make_request("c", 3, 2)
        )
        assert list(h.run())[:6] == [
            {"a": 4, "b": 4},
            {"a": 1, "b": 7},
            {"a": 1, "b": 7},
            {"a": 1, "b": 2, "c": 3},
            {"a": 1, "b": 1, "c": 1},
            {"a": 1},
        ]

    def test_no_token_is_drawn_before_the_prompt_is_read(self) -> None:
        h = Harness(make_scheduler(budget=5))
        h.add(long := make_request("a", 12, 2))
        written = []
        for _ in h.run():
            written.append(len(long.output_token_ids))
        assert written == [0, 0, 1, 2]

    @pytest.mark.parametrize("budget", [1, 2, 3, 7, 19, 20, 21])
    def test_chunks_cover_each_token_once(self, budget: int) -> None:
        h = Harness(make_scheduler(budget=budget))
        h.add(make_request("a", 20, 1))
        chunks = [plan["a"] for plan in h.run()]
        assert chunks == [budget] * (20 // budget) + [20 % budget] * (20 % budget > 0)

    def test_no_more_requests_than_tokens(self) -> None:
        h = Harness(make_scheduler(seqs=16, budget=3))
        h.add(*(make_request(f"{i}", 1, 5) for i in range(7)))
        plans = list(h.run())
        assert all(len(plan) <= 3 for plan in plans)
        assert plans[:5] == [{"0": 1, "1": 1, "2": 1}] * 5

    def test_one_place_and_one_token(self) -> None:
        h = Harness(make_scheduler(seqs=1, budget=1))
        h.add(make_request("a", 3, 2), make_request("b", 2, 1))
        assert [list(plan) for plan in h.run()] == [["a"]] * 4 + [["b"]] * 2

    def test_nothing_to_do(self) -> None:
        scheduler = make_scheduler()
        assert scheduler.schedule() == StepPlan([], [], [])
        assert not scheduler.has_unfinished()


class TestPlans:
    def test_size_does_not_depend_on_the_context(self) -> None:
        def plan_size(num_tokens: int) -> int:
            h = Harness(make_scheduler(1024, 16, budget=8192))
            h.add(make_request("a", num_tokens, 100))
            h.step()
            h.step()
            return len(pickle.dumps(h.schedule()))

        assert plan_size(10) == plan_size(4000)

    def test_holds_only_what_is_new(self) -> None:
        h = Harness(make_scheduler(block_size=4))
        h.add(make_request("a", 4, 9))
        first = h.schedule()
        assert [len(new.token_ids) for new in first.new_requests] == [4]
        assert [len(one.new_block_ids) for one in first.scheduled] == [1]
        h.draw(first)
        later = []
        for _ in range(4):
            plan = h.schedule()
            h.draw(plan)
            assert not plan.new_requests
            later.append(len(plan.scheduled[0].new_block_ids))
        assert later == [1, 0, 0, 0]

    def test_who_has_ended_is_named_once(self) -> None:
        h = Harness(make_scheduler())
        h.add(make_request("a", 4, 1), make_request("b", 4, 3))
        h.step()
        plan = h.schedule()
        h.draw(plan)
        assert plan.finished_ids == ["a-0"]
        assert h.schedule().finished_ids == []


class TestRunAhead:
    def test_unread_tokens_run_and_the_last_one_does_not(self) -> None:
        """Steps are scheduled, and nothing is read; who has none left keeps nobody up."""
        h = Harness(make_scheduler())
        h.add(make_request("a", 4, 2), make_request("b", 4, 4), make_request("c", 4, 1))
        plans = [h.scheduler.schedule() for _ in range(5)]
        ran = [{x.request_id[0]: x.num_tokens for x in one.scheduled} for one in plans]
        assert ran == [
            {"a": 4, "b": 4, "c": 4},
            {"a": 1, "b": 1},
            {"b": 1},
            {"b": 1},
            {},
        ]
        assert len(h.scheduler.running) == 3


class TestPreemption:
    def test_the_last_comer_gives_way_and_returns_first(self) -> None:
        h = Harness(make_scheduler(num_blocks=3, seqs=3))
        h.add(*(make_request(name, 4, 5) for name in "abc"))
        h.add(make_request("d", 1, 1))
        a, b, c, d = h.requests.values()
        assert h.step() == {"a": 4, "b": 4, "c": 4}
        plan = h.schedule()  # a needs a second block: c goes; b needs one: b goes
        assert [one.request_id for one in plan.scheduled] == ["a-0"]
        assert plan.finished_ids == ["c-0", "b-0"]
        assert [*h.scheduler.waiting] == [b, c, d]
        assert [one.status.name for one in (a, b, c, d)] == [
            "RUNNING",
            "PREEMPTED",
            "PREEMPTED",
            "WAITING",
        ]
        assert b.num_computed_tokens == c.num_computed_tokens == 0
        assert not b.block_ids
        assert not c.block_ids
        assert h.scheduler.num_preemptions == 2
        h.draw(plan)
        assert not plan.new_requests

    def test_what_was_written_is_read_again(self) -> None:
        h = Harness(make_scheduler(num_blocks=4, seqs=2))
        h.add(make_request("a", 4, 8), make_request("b", 4, 8))
        plans = list(h.run())
        returns = [plan["b"] for plan in plans if plan.get("b", 0) > 1]
        assert returns == [4, 9]  # 4 of the prompt; then with the 5 that it wrote
        assert all(len(one.output_token_ids) == 8 for one in h.requests.values())

    def test_nobody_joins_in_a_step_that_preempts(self) -> None:
        h = Harness(make_scheduler(num_blocks=3, budget=5))
        h.add(make_request("a", 4, 9), make_request("b", 8, 3))
        assert h.step() == {"a": 4, "b": 1}
        # a takes the third block, b wants a second, and one would do for its return.
        assert h.step() == {"a": 1}
        assert h.step() == {"a": 1, "b": 4}

    def test_a_prompt_in_chunks_gives_way_to_a_token(self) -> None:
        h = Harness(make_scheduler(num_blocks=3, budget=8))
        h.add(make_request("a", 4, 9), make_request("b", 8, 2))
        assert h.step() == {"a": 4, "b": 4}
        assert h.step() == {"a": 1}  # it got the third block
        assert h.requests["b-0"].num_computed_tokens == 0

    def test_it_may_take_its_own_blocks(self) -> None:
        h = Harness(make_scheduler(num_blocks=3, budget=6))
        h.add(make_request("a", 2, 9), make_request("b", 10, 2))
        assert h.step() == {"a": 2, "b": 4}
        assert h.step() == {"a": 1}  # b wants 2 blocks more, and there is one
        assert h.scheduler.num_preemptions == 1
        for _ in h.run():
            pass

    def test_counts(self) -> None:
        h = Harness(make_scheduler(num_blocks=4, seqs=2))
        h.add(make_request("a", 4, 8), make_request("b", 4, 8))
        h.step()
        stats = h.scheduler.get_stats()
        assert (stats.num_running, stats.num_waiting) == (2, 0)
        assert (stats.num_blocks, stats.num_used_blocks) == (4, 2)
        assert (stats.num_prefix_tokens, stats.num_prefix_hits) == (8, 0)
        for _ in h.run():
            pass
        stats = h.scheduler.get_stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (
            0,
            0,
            0,
        )
        assert stats.num_preemptions == 1
        assert stats.num_prefix_tokens == 8 + 9
        assert stats.num_cached_blocks == 0

    def test_a_pool_for_one(self) -> None:
        h = Harness(make_scheduler(num_blocks=3, seqs=4))
        h.add(*(make_request(f"{i}", 3, 10) for i in range(4)))
        ends = [
            name
            for plan in h.run()
            for name in plan
            if h.requests[f"{name}-0"].status.is_finished
        ]
        assert list(dict.fromkeys(ends)) == ["0", "1", "2", "3"]


class TestFairness:
    def test_nobody_overtakes_the_one_whose_turn_it_is(self) -> None:
        h = Harness(make_scheduler(num_blocks=4, seqs=8))
        h.add(make_request("a", 8, 4), make_request("big", 12, 2))
        h.add(*(make_request(f"{i}", 1, 2) for i in range(3)))
        plans = list(h.run())
        assert plans[0] == {"a": 8}
        first = {name: i for i, plan in reversed([*enumerate(plans)]) for name in plan}
        assert first["a"] < first["big"] <= min(first[name] for name in "012")

    def test_a_large_request_ends_while_small_ones_keep_coming(self) -> None:
        h = Harness(make_scheduler(num_blocks=8, seqs=8))
        h.add(*(make_request(f"s{i}", 4, 8) for i in range(4)))
        h.step()
        h.add(big := make_request("big", 28, 4))
        for i in range(60):
            h.add(make_request(f"t{i}", 4, 8))
            h.step()
        assert big.status is RequestStatus.FINISHED_LENGTH

    def test_the_oldest_gets_its_token_in_every_step(self) -> None:
        rng = random.Random(3)
        h = Harness(make_scheduler(num_blocks=12, seqs=6))
        h.add(*(make_request(f"{i}", rng.randint(1, 20), 20) for i in range(20)))
        for plan in h.run():
            unfinished = [
                name
                for name, one in h.requests.items()
                if not one.status.is_finished or name.split("-")[0] in plan
            ]
            assert unfinished[0].split("-")[0] in plan


class PassingManager(SimpleKVCacheManager):
    """Lets some requests wait for others: what they need is being written."""

    passed: Sequence[str] = ()
    num_asked = num_published = 0

    def get_computed_blocks(self, request: Request) -> list[int] | None:
        self.num_asked += 1
        return None if request.request_id in self.passed else []

    def publish(self) -> None:
        self.num_published += 1


class TestPassedOver:
    def make(self, seqs: int = 8) -> tuple[Harness, PassingManager]:
        scheduler, manager = make_scheduler(seqs=seqs), PassingManager(64, 4)
        scheduler.kv_cache = manager
        return Harness(scheduler), manager

    def test_others_join_and_they_keep_their_places(self) -> None:
        h, manager = self.make()
        h.add(*(make_request(name) for name in "abcde"))
        manager.passed = "bd"
        assert list(h.step()) == ["a", "c", "e"]
        assert [one.request_id for one in h.scheduler.waiting] == ["b", "d"]
        assert all(one.status is RequestStatus.WAITING for one in h.scheduler.waiting)
        manager.passed = ""
        assert list(h.step()) == ["a", "c", "e", "b", "d"]

    def test_they_hold_places_so_that_few_are_asked(self) -> None:
        h, manager = self.make(seqs=4)
        samples = [make_request(f"{i}") for i in range(1000)]
        h.add(*samples)
        manager.passed = [f"{i}" for i in range(1, 1000)]
        h.step()
        assert manager.num_asked == 4
        assert [*h.scheduler.waiting] == samples[1:]

    def test_each_step_is_published_once(self) -> None:
        h, manager = self.make()
        h.add(make_request("a", 4, 3))
        for _ in h.run():
            pass
        assert manager.num_published == 3

    def test_found_blocks_are_not_run_again(self) -> None:
        h, manager = self.make()
        h.add(request := make_request("a", 10))
        manager.free_blocks.remove(7)
        manager.get_computed_blocks = lambda request: [7]  # type: ignore[method-assign]

        def allocate(
            request: Request, num_tokens: int, computed: Sequence[int] = ()
        ) -> list[int]:
            assert (num_tokens, list(computed)) == (6, [7])
            request.block_ids = [7, 8, 9]
            return request.block_ids

        manager.allocate_slots = allocate  # type: ignore[method-assign]
        plan = h.scheduler.schedule()
        assert [one.num_tokens for one in plan.scheduled] == [6]
        assert [new.num_computed_tokens for new in plan.new_requests] == [4]
        assert request.num_computed_tokens == 10
        assert request.metrics.num_cached_tokens == 4
        stats = h.scheduler.get_stats()
        assert (stats.num_prefix_tokens, stats.num_prefix_hits) == (10, 4)


class TestFinishAndReset:
    def test_finish_in_every_state(self) -> None:
        h = Harness(make_scheduler(num_blocks=3, seqs=3))
        h.add(*(make_request(name, 4, 5) for name in "abcd"))
        a, b, c, d = h.requests.values()
        h.step()
        h.step()  # a runs, b and c were preempted, d waits
        for request in (b, d, a, c):
            h.scheduler.finish(request)
            h.scheduler.finish(request)  # again does nothing
        assert not h.scheduler.has_unfinished()
        assert h.scheduler.kv_cache.num_used_blocks == 0
        assert h.schedule().finished_ids == ["a-0"]  # the others it had forgotten

    def test_finish_of_a_stranger(self) -> None:
        scheduler = make_scheduler()
        scheduler.add(make_request("a"))
        scheduler.finish(make_request("a"))  # equal, and not the same
        assert len(scheduler.waiting) == 1

    def test_reset(self) -> None:
        h = Harness(make_scheduler(num_blocks=3, seqs=3))
        h.add(*(make_request(name, 4, 5) for name in "abcd"))
        a, b, c, d = h.requests.values()
        h.step()
        h.step()
        h.scheduler.finish(b)
        h.scheduler.reset([a, c, d])
        assert [*h.scheduler.waiting] == [a, c, d]
        assert not h.scheduler.running
        assert h.scheduler.kv_cache.num_used_blocks == 0
        assert a.status is RequestStatus.PREEMPTED
        assert d.status is RequestStatus.WAITING
        assert a.num_computed_tokens == 0
        assert not a.block_ids
        h.known.clear()  # the runner was reset as well
        h.computed.clear()
        plan = h.schedule()
        assert plan.finished_ids == []
        assert plan.new_requests[0].token_ids == a.get_token_ids()
        h.draw(plan)
        for _ in h.run():
            pass
        assert len(c.output_token_ids) == len(d.output_token_ids) == 5

    def test_reset_forgets_who_was_to_be_forgotten(self) -> None:
        h = Harness(make_scheduler())
        h.add(make_request("a"), make_request("b"))
        a, b = h.requests.values()
        h.step()
        h.scheduler.finish(a)
        h.scheduler.reset([b])
        assert h.scheduler.schedule().finished_ids == []


class Model:
    """The rules once more, with numbers alone: `[name, tokens, computed, to write]`."""

    def __init__(self, num_blocks: int, size: int, seqs: int, budget: int) -> None:
        self.num_blocks, self.size, self.budget = num_blocks, size, budget
        self.places = min(seqs, budget)
        self.queue: list[list[int]] = []
        self.run: list[list[int]] = []

    def fits(self, extra: list[int], end: int) -> bool:
        used = sum(-(-one[2] // self.size) for one in self.run if one is not extra)
        return used + -(-end // self.size) <= self.num_blocks

    def step(self) -> list[tuple[int, int]]:
        left, plan, preempted = self.budget, [], False
        i = 0
        while i < len(self.run) and left:
            one = self.run[i]
            count = min(one[1] - one[2], left)
            while i < len(self.run) and not self.fits(one, one[2] + count):
                gone = self.run.pop()
                gone[2], preempted = 0, True
                self.queue.insert(0, gone)
            if i == len(self.run):
                break
            one[2] += count
            left -= count
            plan.append((one[0], count))
            i += 1
        while not preempted and self.queue and left and len(self.run) < self.places:
            one = self.queue[0]
            count = min(one[1], left)
            if not self.fits(one, count):
                break
            self.run.append(self.queue.pop(0))
            one[2] = count
            left -= count
            plan.append((one[0], count))
        for one in self.run:
            if one[1] == one[2]:
                one[1] += 1
                one[3] -= 1
        self.run = [one for one in self.run if one[3]]
        return plan


@pytest.mark.parametrize("seed", range(150))
def test_plans_are_those_of_the_rules(seed: int) -> None:
    rng = random.Random(seed)
    size, longest = rng.choice([1, 3, 4, 16]), rng.choice([10, 40])
    needed = -(-longest // size)  # for one that is as long as can be
    num_blocks = needed + rng.choice([0, 1, needed, 5 * needed])
    seqs, budget = rng.randint(1, 12), rng.choice([1, 3, 8, 20, 100])
    h = Harness(make_scheduler(num_blocks, size, seqs, budget))
    model = Model(num_blocks, size, seqs, budget)
    names = iter(range(rng.randint(1, 20)))
    for _ in range(4000):
        while rng.random() < 0.3 and (name := next(names, None)) is not None:
            prompt = rng.randint(1, longest - 1)
            answer = rng.randint(1, longest - prompt)
            h.add(make_request(f"{name}", prompt, answer))
            model.queue.append([name, prompt, 0, answer])
        if h.requests and rng.random() < 0.02:  # somebody hangs up
            request = rng.choice([*h.requests.values()])
            if not request.status.is_finished:
                request.finish(RequestStatus.FINISHED_ABORTED)
                h.scheduler.finish(request)
                own = int(request.request_id)
                model.queue = [one for one in model.queue if one[0] != own]
                model.run = [one for one in model.run if one[0] != own]
        plan = h.schedule()
        assert [
            (int(one.request_id[:-2]), one.num_tokens) for one in plan.scheduled
        ] == model.step()
        h.draw(plan)
        left = list(names)
        if not left and not h.scheduler.has_unfinished():
            break
        names = iter(left)
    assert all(one.status.is_finished for one in h.requests.values())
    assert h.scheduler.kv_cache.num_used_blocks == 0


@pytest.mark.parametrize("kv_cache", ["simple", "paged"])
def test_thousands_may_wait(kv_cache: str) -> None:
    scheduler = make_scheduler(4096, 16, 256, 2048, kv_cache)
    for i in range(5000):
        scheduler.add(make_request(f"{i}", 16, 64))
    scheduler.schedule()
    begin = time.process_time()
    for _ in range(20):
        scheduler.schedule_waiting([])
        scheduler.get_stats()
    assert time.process_time() - begin < 0.5


def test_a_kv_cache_manager_goes_by_its_name() -> None:
    assert isinstance(make_scheduler().kv_cache, SimpleKVCacheManager)
    with pytest.raises(KeyError):
        make_scheduler(kv_cache="nobody")
