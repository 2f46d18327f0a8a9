"""Continuous batching: many requests in one step, under a budget of tokens."""

import pkgutil
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .engine import EngineStats, describe_request
from .request import Request, RequestStatus
from .runner import NewRequest, ScheduledRequest, StepPlan

if TYPE_CHECKING:
    from .config import EngineConfig


# cell
class KVCacheManager(Protocol):
    """Hands out the blocks of the cache; who has which is noted in `block_ids`."""

    num_blocks: int

    def get_computed_blocks(self, request: Request) -> list[int] | None:
        """Blocks with the beginning of a request that others have written.

        None: another request writes the next one in this very step, so wait for it.
        """
        ...

    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        """Room for the next `num_tokens` tokens of a request.

        Args:
            request: `block_ids` and `num_computed_tokens` say what it has.
            num_tokens: how many will run.
            computed: of `get_computed_blocks`, for a request that has nothing yet.

        Returns:
            The blocks that it got; None, and nothing has changed, if there are too few.
        """
        ...

    def publish(self) -> None:
        """The step is made up: what it writes can be found from the next one on."""

    def free(self, request: Request) -> None:
        """Takes back all blocks of a request; again does nothing."""

    def reset(self) -> None:
        """Forgets who has what, and all that is cached."""

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests have."""
        ...

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody has, and whose contents may serve again."""
        ...


# cell
class SimpleKVCacheManager:
    """Blocks on demand from a list of free ones; nothing is shared."""

    num_cached_blocks = 0

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = False
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.reset()

    def get_computed_blocks(self, request: Request) -> list[int] | None:
        return []

    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        length = request.num_computed_tokens + num_tokens
        missing = -(-length // self.block_size) - len(request.block_ids)
        if missing > len(self.free_blocks):
            return None
        new = [self.free_blocks.pop() for _ in range(missing)]
        request.block_ids += new
        return new

    def publish(self) -> None:
        pass

    def free(self, request: Request) -> None:
        self.free_blocks += reversed(request.block_ids)
        request.block_ids = []

    def reset(self) -> None:
        self.free_blocks = list(range(self.num_blocks))[::-1]

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self.free_blocks)


KV_CACHE_MANAGERS = {
    "simple": "folo_lib.scheduler:SimpleKVCacheManager",
    "paged": "folo_lib.block_pool:PagedKVCacheManager",
}


# cell
class ContinuousScheduler:
    """Runs what is not yet in the cache: who runs already first, then who waits.

    Args:
        config: `max_num_seqs`, `max_num_batched_tokens` and `enable_prefix_caching`.
        num_blocks: in the cache.
        kv_cache: a name in `KV_CACHE_MANAGERS`.
    """

    def __init__(
        self, config: "EngineConfig", num_blocks: int, kv_cache: str = "paged"
    ) -> None:
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.max_num_running = min(config.max_num_seqs, self.max_num_batched_tokens)
        self.block_size = config.block_size
        make = pkgutil.resolve_name(KV_CACHE_MANAGERS[kv_cache])
        self.kv_cache: KVCacheManager = make(
            num_blocks, config.block_size, config.enable_prefix_caching
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.finished_ids: list[str] = []
        self.num_preemptions = self.num_prefix_tokens = self.num_prefix_hits = 0

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue."""
        self.waiting.append(request)

    def has_unfinished(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.running or self.waiting)

    def schedule(self) -> StepPlan:
        """The next step: who runs goes on; who waits joins, unless blocks ran out."""
        num_preemptions = self.num_preemptions
        scheduled = self.schedule_running()
        new_requests: list[NewRequest] = []
        if self.num_preemptions == num_preemptions:
            new_requests = self.schedule_waiting(scheduled)
        self.kv_cache.publish()
        finished_ids, self.finished_ids = self.finished_ids, []
        return StepPlan(scheduled, new_requests, finished_ids)

    def schedule_running(self) -> list[ScheduledRequest]:
        """The next tokens of those that run, in the order in which they came."""
        scheduled: list[ScheduledRequest] = []
        budget = self.max_num_batched_tokens
        for request in tuple(self.running):
            if budget == 0 or request.status is not RequestStatus.RUNNING:
                break  # the rest was preempted
            num_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            while (new := self.kv_cache.allocate_slots(request, num_tokens)) is None:
                last = self.running.pop()
                self.preempt(last)
                if last is request:
                    break
            else:
                request.num_computed_tokens += num_tokens
                budget -= num_tokens
                scheduled.append(ScheduledRequest(request.sample_id, num_tokens, new))
        return scheduled

    def schedule_waiting(self, scheduled: list[ScheduledRequest]) -> list[NewRequest]:
        """Those that join the step, in the order in which they came."""
        budget = self.max_num_batched_tokens - sum(one.num_tokens for one in scheduled)
        started: list[NewRequest] = []
        passed_over: list[Request] = []  # what they need is being written in this step
        while (
            self.waiting
            and budget > 0
            and len(self.running) + len(passed_over) < self.max_num_running
        ):
            request = self.waiting.popleft()
            computed = self.kv_cache.get_computed_blocks(request)
            if computed is None:
                passed_over.append(request)
                continue
            num_computed = len(computed) * self.block_size
            num_tokens = min(request.num_tokens - num_computed, budget)
            new = self.kv_cache.allocate_slots(request, num_tokens, computed)
            if new is None:
                self.waiting.appendleft(request)
                break
            request.num_computed_tokens = num_computed
            self.num_prefix_tokens += request.num_tokens
            self.num_prefix_hits += num_computed
            started.append(describe_request(request))
            request.start()
            self.running.append(request)
            request.num_computed_tokens += num_tokens
            budget -= num_tokens
            scheduled.append(ScheduledRequest(request.sample_id, num_tokens, new))
        self.waiting.extendleft(reversed(passed_over))
        return started

    def preempt(self, request: Request) -> None:
        """Takes the blocks of a request that ran; it waits again, before all others."""
        self.kv_cache.free(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.finished_ids.append(request.sample_id)  # for the runner, which forgets it
        self.num_preemptions += 1

    def finish(self, request: Request) -> None:
        """Takes a request out, wherever it is, and frees its blocks."""
        if request in self.running:
            self.running.remove(request)
            self.finished_ids.append(request.sample_id)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.kv_cache.free(request)

    def reset(self, requests: Sequence[Request]) -> None:
        """Begins anew with these requests, after a step of which nothing is certain."""
        self.kv_cache.reset()
        for request in requests:
            request.block_ids, request.num_computed_tokens = [], 0
            if request.status is RequestStatus.RUNNING:
                request.status = RequestStatus.PREEMPTED
        self.running, self.waiting, self.finished_ids = [], deque(requests), []

    def get_stats(self) -> EngineStats:
        """How full it is now, and what has happened so far."""
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_blocks=self.kv_cache.num_blocks,
            num_used_blocks=self.kv_cache.num_used_blocks,
            num_cached_blocks=self.kv_cache.num_cached_blocks,
            num_preemptions=self.num_preemptions,
            num_prefix_tokens=self.num_prefix_tokens,
            num_prefix_hits=self.num_prefix_hits,
        )
