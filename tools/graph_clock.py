"""The clock of the scripts that record kernels: CUDA graphs, replayed between two events."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

WARM_SECONDS = 0.1
"""How long a graph is replayed before it is timed: a card that has waited is slow at first."""


def record_graph(run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of what `run` launches, and what that returned, which must be kept."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return graph, kept


def time_replays(
    run: Callable[[], object], rounds: int, replays: int, warm: float = WARM_SECONDS
) -> list[float]:
    """Microseconds per replay, in each round of so many, after `warm` seconds of replays."""
    graph, kept = record_graph(run)
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / replays)
    del kept
    return times
