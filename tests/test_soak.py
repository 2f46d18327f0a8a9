"""Traffic for as long as `make soak` asks for: memory stays flat, and answers stay right.

`FOLO_SOAK_MINUTES` says how long; without it, under `make test-more`, five thousand requests run,
with the host a step ahead.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from schedules import (
    check_empty,
    check_integrity,
    check_result,
    get_runner,
    make_engine,
    make_item,
)

from folo_lib import LLMEngine, RequestOutput

MINUTES = float(os.environ.get("FOLO_SOAK_MINUTES", "0"))
NUM_REQUESTS, NUM_ITEMS = 5000, 60
SPARE = 8 * 2**20  # bytes that the process may grow by, after the first fifth


def resident_bytes() -> int:
    """Of this process, as the kernel counts; 0 where it does not say."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return 0
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def count_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


class Traffic:
    """Requests of many kinds that come, are read, and now and then leave early."""

    def __init__(self, engine: LLMEngine, seed: int) -> None:
        self.engine, self.rng = engine, random.Random(seed)
        self.items: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.num_right = 0

    def step(self) -> None:
        rng, engine = self.rng, self.engine
        while len(self.items) < 12:
            number = rng.randrange(NUM_ITEMS)
            item = make_item(number, small=True)
            self.items[engine.add_request(item.prompt, item.params)] = number
        if rng.random() < 0.02:
            name = rng.choice(list(self.items))
            engine.abort_request(name)
            self.aborted.add(name)
        for output in engine.step():
            if output.finished:
                self.take(output)

    def take(self, output: RequestOutput) -> None:
        number = self.items.pop(output.request_id)
        if output.request_id in self.aborted:
            self.aborted.discard(output.request_id)
        else:
            check_result(make_item(number, small=True), output)
            self.num_right += 1

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    self.take(output)
        check_empty(self.engine)


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.parametrize("run_ahead", [False, True] if MINUTES else [True])
def test_minutes_of_traffic(run_ahead: bool) -> None:
    """Each answer is what the request gets alone; bytes, objects and threads do not grow."""
    engine = make_engine(
        1200,
        max_model_len=168,
        block_size=4,
        max_num_seqs=8,
        async_scheduling=run_ahead,
    )
    traffic, end = Traffic(engine, seed=run_ahead), time.monotonic() + 60 * MINUTES
    base: tuple[int, int, int] | None = None
    for number in count():
        traffic.step()
        if number % 50 == 0:
            check_integrity(engine)
        is_warm = traffic.num_right >= NUM_REQUESTS // 10
        if base is None and is_warm:
            base = resident_bytes(), count_objects(), threading.active_count()
        enough = traffic.num_right >= NUM_REQUESTS // 2
        if enough and time.monotonic() >= end:
            break
    traffic.finish()
    assert base is not None
    assert resident_bytes() - base[0] <= SPARE, "memory grows"
    assert count_objects() - base[1] <= 2000, "objects are kept"
    assert threading.active_count() == base[2]
    rows = get_runner(engine).rows
    assert len(rows.free_rows) >= rows.num_rows - 8
    print(f"{traffic.num_right} requests, {engine.stats().num_preemptions} preemptions")
