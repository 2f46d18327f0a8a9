"""Where the time of served steps goes: the threads of the section `serving`, clocked.

The thread that runs the steps and the one of the event loop share an interpreter, in which one
of them runs at a time. So what counts is the processor's time that each takes for a step, and
how long the first waits inside a step's `read`: for the device, or for the other thread.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock

from folo_lib.benchmark import Result
from folo_lib.engine import Inbox, LLMEngine

Clock = Callable[[], float]


class ClockedStep:
    """A launched step whose `read` is clocked; all else is the step's own."""

    def __init__(self, step: Any, clock: StepClock) -> None:
        self._step, self._clock = step, clock

    def read(self) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        output = self._step.read()
        self._clock.read_seconds += time.perf_counter() - wall
        self._clock.read_cpu += time.thread_time() - cpu
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


class StepClock:
    """Counts the steps of an engine, and clocks them in the thread that runs them.

    Args:
        engine: whose methods are wrapped while `attached`.

    Attributes:
        steps: that ran something.
        read_seconds, read_cpu: in `read`, by the wall clock and the processor's.
        step_cpu: of the processor in whole steps.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.steps, self.read_seconds, self.read_cpu, self.step_cpu = 0, 0.0, 0.0, 0.0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Wraps `advance`, and `launch` of the executor."""
        advance, launch = self.engine.advance, self.engine.executor.launch

        def clocked_advance(inbox: Inbox) -> Any:
            begin = time.thread_time()
            outputs = advance(inbox)
            self.step_cpu += time.thread_time() - begin
            return outputs

        def clocked_launch(plan: Any) -> Any:
            self.steps += bool(plan.scheduled)
            return ClockedStep(launch(plan), self)

        with (
            mock.patch.object(self.engine, "advance", clocked_advance),
            mock.patch.object(self.engine.executor, "launch", clocked_launch),
        ):
            yield


def clock_threads(
    engine: LLMEngine, run: Callable[[], object], owner: Clock | None, loop: Clock
) -> Result:
    """Milliseconds per step of one run: by the wall clock, and of each thread's processor.

    Args:
        engine: that `run` keeps busy.
        run: answers some requests.
        owner: processor's seconds of the thread that runs the steps; None: it is the
            caller's, and there is no event loop.
        loop: the same of the event loop's thread.

    Returns:
        `wall`; `read`: in `read`, where a step waits for the device, and to have the
        interpreter back; `step`: of the processor, for the rest of a step; `owner`: of the
        processor, for what its thread does between steps; `loop`: of the processor.
    """
    clock = StepClock(engine)
    owner_before, loop_before = owner and owner(), loop()
    with clock.attached():
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
    between, in_loop = 0.0, 0.0
    if owner is not None and owner_before is not None:
        between = owner() - owner_before - clock.step_cpu
        in_loop = loop() - loop_before
    per_step = {
        "wall": seconds,
        "read": clock.read_seconds,
        "step": clock.step_cpu - clock.read_cpu,
        "owner": between,
        "loop": in_loop,
    }
    found = {name: 1e3 * value / clock.steps for name, value in per_step.items()}
    return {"steps": clock.steps} | found


def name_package(frame: FrameType) -> str | None:
    """The package whose code runs in a frame; of ours the module; None: it waits for events."""
    name = str(frame.f_globals.get("__name__", "python"))
    if name == "selectors" and frame.f_code.co_name == "select":
        return None
    parts = name.split(".")
    return ".".join(parts[:2] if parts[0] == "folo_lib" else parts[:1])


def sample_thread(thread: threading.Thread, run: Callable[[], object]) -> Result:
    """Looks once a millisecond what a thread does while `run` goes on in another one.

    `cProfile` would not do: from Python 3.12 on it mixes the threads. Threads give way ten
    times as often as they would meanwhile, since a look waits until the busy one does.

    Returns:
        `samples`; `busy`, those in which the thread did not wait for events; `shares` of
        the latter by package, the largest first.
    """
    assert thread.ident is not None
    counts: Counter[str | None] = Counter()
    ended, ident, interval = threading.Event(), thread.ident, sys.getswitchinterval()

    def look() -> None:
        while not ended.wait(0.001):
            frame = sys._current_frames().get(ident)
            if frame is not None:
                counts[name_package(frame)] += 1

    looking = threading.Thread(target=look)
    sys.setswitchinterval(interval / 10)
    looking.start()
    try:
        run()
    finally:
        ended.set()
        looking.join()
        sys.setswitchinterval(interval)
    samples = sum(counts.values())
    busy = {name: count for name, count in counts.most_common() if name is not None}
    total = max(1, sum(busy.values()))
    shares = {name: count / total for name, count in busy.items()}
    return {"samples": samples, "busy": sum(busy.values()), "shares": shares}
