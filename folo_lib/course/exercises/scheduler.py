"""Checks of the exercises of page 11."""

from __future__ import annotations

from collections.abc import Callable

from folo_lib.config import EngineConfig
from folo_lib.course.exercises import exercise, require
from folo_lib.request import Request, RequestMetrics
from folo_lib.runner import SampledToken
from folo_lib.sampling_params import SamplingParams
from folo_lib.scheduler import ContinuousScheduler, SimpleKVCacheManager

__all__ = [
    "check_HeadroomKVCacheManager",
    "check_TakeTurnsScheduler",
    "check_split_prompt",
]

PARAMS = SamplingParams(temperature=0, ignore_eos=True)


def make_request(name: str, num_tokens: int = 3, max_tokens: int = 4) -> Request:
    """A request whose tokens do not matter."""
    return Request(
        request_id=name,
        prompt_token_ids=[1] * num_tokens,
        params=PARAMS,
        seed=0,
        max_tokens=max_tokens,
        metrics=RequestMetrics(0.0),
    )


@exercise
def check_split_prompt(split_prompt: Callable[[int, int, int], list[int]]) -> None:
    """Of `split_prompt`: the chunks, their sum, and who comes first."""
    cases = {
        (5, 0, 8): [5],
        (8, 0, 8): [8],
        (9, 0, 8): [8, 1],
        (20, 1, 8): [7, 7, 6],
        (600, 2, 64): [62] * 9 + [42],
        (3, 7, 8): [1, 1, 1],
        (1, 0, 1): [1],
    }
    for case, wanted in cases.items():
        got = split_prompt(*case)
        require(
            list(got) == wanted,
            "with {} tokens beside {} requests under a budget of {} ".format(*case)
            + f"the chunks are {got}, and {wanted} is wanted.",
        )


def run_dry(scheduler: ContinuousScheduler, requests: list[Request]) -> tuple[int, int]:
    """Adds them all, and runs them to their ends: steps and preemptions."""
    by_id = {request.sample_id: request for request in requests}
    for request in requests:
        scheduler.add(request)
    for num_steps in range(2000):
        if not scheduler.has_unfinished():
            return num_steps, scheduler.num_preemptions
        for one in scheduler.schedule().scheduled:
            request = by_id[one.request_id]
            if request.num_computed_tokens == request.num_tokens:
                request.append_token(SampledToken(5), 0.0)
            if request.status.is_finished:
                scheduler.finish(request)
    require(False, "after 2,000 steps there are requests that have not ended.")
    return 0, 0


@exercise
def check_HeadroomKVCacheManager(make: type[SimpleKVCacheManager]) -> None:
    """Of `HeadroomKVCacheManager`: newcomers, those that run, and the exception."""
    manager = make(8, 16)  # two blocks are to stay free
    large = make_request("large", 128)
    got = manager.allocate_slots(large, 112)
    require(
        got is not None and len(got) == 7,
        "nobody has a block, and a newcomer that needs 7 of 8 gets "
        f"{got}: it would wait for ever.",
    )
    large.num_computed_tokens = 112
    got = manager.allocate_slots(large, 16)
    require(
        got is not None and len(got) == 1,
        f"a request that runs may take the last block, and gets {got}.",
    )
    manager.free(large)

    manager = make(8, 16)
    first, second, third = (make_request(name, 64) for name in "abc")
    got = manager.allocate_slots(first, 48)
    require(got is not None and len(got) == 3, f"48 tokens are 3 blocks, not {got}.")
    first.num_computed_tokens = 48
    got = manager.allocate_slots(second, 64)
    require(
        got is None and not second.block_ids and manager.num_used_blocks == 3,
        f"3 of 8 blocks are used, and a newcomer that needs 4 gets {got}: one would be "
        "left, and 2 are to be; nothing must change.",
    )
    got = manager.allocate_slots(third, 48)
    require(
        got is not None and len(got) == 3,
        f"3 of 8 blocks are used, and a newcomer that needs 3 gets {got}: two would be "
        "left, which is enough.",
    )
    got = manager.allocate_slots(first, 17)
    require(
        got is not None and len(got) == 2,
        f"a request that runs may take the last two blocks, and gets {got}.",
    )

    counts = []
    for manager_class in (SimpleKVCacheManager, make):
        config = EngineConfig(device="cpu", block_size=4, max_num_seqs=16)
        scheduler = ContinuousScheduler(config, 24, "simple")
        scheduler.kv_cache = manager_class(24, 4)
        requests = [make_request(f"{i}", 8 + i, 20 + i) for i in range(12)]
        counts.append(run_dry(scheduler, requests)[1])
    require(
        counts[1] < counts[0],
        f"twelve requests are preempted {counts[1]} times, and {counts[0]} times "
        "without headroom.",
    )


@exercise
def check_TakeTurnsScheduler(make: type[ContinuousScheduler]) -> None:
    """Of `TakeTurnsScheduler`: the queue in rounds, also when some have left it."""
    cases = {
        "one user": ("a/0 a/1 a/2", "a/0 a/1 a/2"),
        "a second user comes late": ("a/0 a/1 a/2 b/0", "a/0 b/0 a/1 a/2"),
        "two of each": ("a/0 a/1 b/0 b/1", "a/0 b/0 a/1 b/1"),
        "three users": (
            "a/0 a/1 a/2 b/0 c/0 c/1 b/1",
            "a/0 b/0 c/0 a/1 c/1 b/1 a/2",
        ),
        "a user without a slash": ("a a/1 b", "a b a/1"),
    }
    for name, (order, wanted) in cases.items():
        scheduler = make(EngineConfig(device="cpu", max_num_seqs=1), 16, "simple")
        for request_id in order.split():
            scheduler.add(make_request(request_id))
        got = " ".join(request.request_id for request in scheduler.waiting)
        require(
            got == wanted,
            f"{name}: {order} come in this order, and wait as {got or 'nobody'}; "
            f"{wanted} is wanted.",
        )

    scheduler = make(EngineConfig(device="cpu", max_num_seqs=1), 16, "simple")
    requests = [make_request(request_id) for request_id in ("a/0", "a/1", "a/2")]
    for request in requests:
        scheduler.add(request)
    scheduler.schedule()  # a/0 runs now, and does not wait
    scheduler.add(make_request("b/0"))
    scheduler.add(make_request("a/3"))
    got = " ".join(request.request_id for request in scheduler.waiting)
    require(
        got == "a/1 b/0 a/2 a/3",
        f"a/0 runs, a/1 and a/2 wait, b/0 and a/3 come, and the queue is {got}: a/1 b/0 "
        "a/2 a/3 is wanted, since only those that wait are counted.",
    )
    scheduler = make(EngineConfig(device="cpu", max_num_seqs=2), 16, "simple")
    run_dry(scheduler, [make_request(f"{u}/{i}") for u in "ab" for i in range(5)])
