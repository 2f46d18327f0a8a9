"""Executors of which a rank fails, in a module that costs that rank little to import."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import Tensor

from folo_lib.config import EngineConfig
from folo_lib.tensor_parallel import (
    ParallelExecutor,
    RankGroup,
    RankProcesses,
    RankSetup,
    ShardedForCausalLM,
    Weights,
    follow,
    load_shard,
)

# --- Ranks in threads ------------------------------------------------------------------


class Thread(threading.Thread):
    """A thread that looks like a process to `RankProcesses`."""

    exitcode = 0
    pid = None

    def kill(self) -> None:
        """It ends when its pipe does."""


class ThreadRanks(RankProcesses):
    """Plans are pickled and sums are Gloo's, but no process is started."""

    def start(self, rank: int, setup: RankSetup, pipe: Connection) -> Any:
        def run() -> None:
            follow(rank, setup, pipe)
            pipe.close()

        thread = Thread(target=run, daemon=True)
        thread.start()
        return thread


class ThreadExecutor(ParallelExecutor):
    processes = ThreadRanks


# --- Ranks that fail --------------------------------------------------------------------


def slow(weights: Weights) -> Weights:
    """Takes 20 seconds for the bundled checkpoint."""
    for named in weights:
        time.sleep(0.3)
        yield named


def fail_at_load(
    how: Callable[[], None],
    folder: Path,
    config: EngineConfig,
    group: RankGroup,
    watch: Callable[[Weights], Weights] = iter,
) -> ShardedForCausalLM:
    """Rank 1 fails, while rank 0 has a lot to read."""
    if group.rank == 1:
        how()
    return load_shard(folder, config, group, lambda weights: slow(watch(weights)))


def fail_in_step(
    how: Callable[[], None],
    folder: Path,
    config: EngineConfig,
    group: RankGroup,
    watch: Callable[[Weights], Weights] = iter,
) -> ShardedForCausalLM:
    """The last rank fails in the middle of the fifth step."""
    shard = load_shard(folder, config, group, watch)
    mlp, forward, calls = (
        shard.model.layers[2].mlp,
        shard.model.layers[2].mlp.forward,
        [],
    )

    def forward_or_fail(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            how()
        return forward(x)

    if group.rank == group.size - 1:
        mlp.forward = forward_or_fail
    return shard


def run_out_of_memory() -> None:
    raise MemoryError("no room for one more matrix")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FailsAtLoad(ParallelExecutor):
    load = staticmethod(partial(fail_at_load, run_out_of_memory))


class KilledAtLoad(ParallelExecutor):
    load = staticmethod(partial(fail_at_load, be_killed))


class FailsInStep(ParallelExecutor):
    load = staticmethod(partial(fail_in_step, run_out_of_memory))


class KilledInStep(ParallelExecutor):
    load = staticmethod(partial(fail_in_step, be_killed))
