"""Ranks in threads of one process, for pages and tests: every rank's tensors are in sight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["ThreadGroup", "run_ranks"]

T = TypeVar("T")


class ThreadGroup:
    """One rank of a group whose ranks are threads; see `RankGroup`.

    Sums are taken in the order of the ranks, so they do not depend on place or batch.

    Args:
        rank, size: see `RankGroup`.
        board: a place for each rank, which all of them share.
        barrier: that all of them share.

    Attributes:
        log: what was called so far, and with which shape.
    """

    def __init__(
        self, rank: int, size: int, board: list[Any], barrier: threading.Barrier
    ) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self.board, self.barrier = board, barrier
        self.log: list[tuple[str, tuple[int, ...]]] = []

    def connect(self) -> None:
        """They are connected."""

    def exchange(self, name: str, x: Tensor) -> list[Tensor]:
        """What all of them have."""
        self.log.append((name, tuple(x.shape)))
        self.board[self.rank] = x
        self.barrier.wait()
        everything = list(self.board)
        self.barrier.wait()  # before anybody writes the next one
        return everything

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `RankGroup`."""
        parts = self.exchange("all_reduce", x)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `RankGroup`."""
        return torch.cat(self.exchange("all_gather", x), -1)

    def close(self) -> None:
        """Lets the others go."""
        self.barrier.abort()


def run_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """What a function returns on each of `size` ranks, which run at the same time.

    Raises:
        Exception: of the first rank that fails; the others do not wait for it.
    """
    barrier, board = threading.Barrier(size, timeout=60), [None] * size
    first: list[BaseException] = []

    def run(rank: int) -> T:
        group = ThreadGroup(rank, size, board, barrier)
        try:
            with torch.inference_mode():
                return work(group)
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                first.append(error)
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    if first:
        raise first[0]
    return [future.result() for future in futures]
