"""One fault at every call of executor, runner, sampler, detokenizer and allocator, in turn.

Whatever breaks, and wherever: the request or the step that it belongs to ends with the error, or
the caller is told; all others get what they get alone; nothing is left behind, and the engine
serves the next request.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest
from schedules import (
    IS_SOAK,
    check_cut_short,
    check_empty,
    check_integrity,
    check_result,
    get_runner,
    make_engine,
    make_item,
)

from folo_lib import RequestOutput, Sampler
from folo_lib.block_pool import BlockPool, PagedKVCacheManager
from folo_lib.request import IncrementalDetokenizer
from folo_lib.runner import (
    GPUExecutor,
    InFlightStep,
    ModelRunner,
    RequestRows,
    StepPlan,
)
from folo_lib.sampler import SamplingRows
from folo_lib.scheduler import RequestQueues


class Injected(Exception):
    pass


class Fault:
    """Counts the calls of all methods of some classes, and raises at one of them.

    Args:
        monkeypatch: wraps the methods.
        owners: the classes.
        place: of the method that raises; None counts alone.
        call: at which of its calls, from 0.

    Attributes:
        counts: the calls so far, by method.
        is_armed: whether calls count.
        has_struck: whether it raised.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owners: tuple[type, ...],
        place: str | None = None,
        call: int = 0,
    ) -> None:
        self.place, self.call = place, call
        self.counts: Counter[str] = Counter()
        self.is_armed = self.has_struck = False
        for owner in owners:
            for name, member in list(vars(owner).items()):
                is_shared = isinstance(member, (classmethod, staticmethod))
                inner = member.__func__ if is_shared else member
                is_ours = not name.startswith("__") and name != "check_integrity"
                if is_ours and isinstance(inner, FunctionType):
                    wrapped = self.wrap(inner, f"{owner.__name__}.{name}")
                    kind: Any = type(member) if is_shared else lambda method: method
                    monkeypatch.setattr(owner, name, kind(wrapped))

    def wrap(self, function: Any, place: str) -> Any:
        def call_or_raise(*args: Any, **kwargs: Any) -> Any:
            if self.is_armed:
                number, self.counts[place] = self.counts[place], self.counts[place] + 1
                if place == self.place and number == self.call:
                    self.has_struck = True
                    raise Injected(f"{place}, call {number}")
            return function(*args, **kwargs)

        return call_or_raise


class Notes(logging.Handler):
    """What the engine's log says, in place of a screen full of tracebacks."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def notes() -> Iterator[Notes]:
    handler, logger = Notes(), logging.getLogger("folo_lib.engine")
    logger.addHandler(handler)
    logger.propagate = False
    yield handler
    logger.propagate = True
    logger.removeHandler(handler)


# Item, and the step at which it comes. 20 and 16 begin alike, 11 has three samples, 3 is
# aborted, and the cache is so small that some are preempted.
ARRIVALS = ((20, 0), (16, 1), (11, 1), (3, 2), (5, 4), (0, 9))
ABORTED, ABORT_AT = 3, 6


class Drive:
    """Requests that share, preempt and leave, run past a fault, and what came of them.

    Attributes:
        num_told: how often a call of the engine raised the fault.
        num_failed: requests that ended with it.
    """

    def __init__(self, fault: Fault, run_ahead: bool) -> None:
        self.fault, self.num_told, self.num_failed = fault, 0, 0
        self.engine = make_engine(
            176,
            max_model_len=168,
            block_size=4,
            max_num_batched_tokens=64,
            async_scheduling=run_ahead,
        )
        self.items: dict[str, int] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.ran: set[str] = set()  # in the step that is launched, or before it
        self.launch = self.engine.executor.launch
        self.engine.executor.launch = self.note_plan  # type: ignore[method-assign]
        fault.is_armed = True
        self.run()
        fault.is_armed = False
        self.check_outputs()

    def note_plan(self, plan: StepPlan) -> InFlightStep:
        self.ran |= {one.request_id.rpartition("-")[0] for one in plan.scheduled}
        return self.launch(plan)

    def run(self) -> None:
        engine, left, step = self.engine, list(ARRIVALS), 0
        failed: set[str] = set()
        while left or engine.has_unfinished_requests():
            in_flight = engine._table.in_flight
            self.ran = {one.request_id for _, starts in in_flight for one in starts}
            try:
                while left and left[0][1] <= step:
                    number, _ = left.pop(0)
                    item, name = make_item(number, small=True), str(number)
                    engine.add_request(item.prompt, item.params, name)
                    self.items[name] = number
                if step == ABORT_AT:
                    engine.abort_request(str(ABORTED))
                for output in engine.step():
                    name = output.request_id
                    assert name not in self.outputs, "told of twice"
                    if output.finished:
                        self.outputs[name] = output
                    if output.error and name not in failed:
                        failed.add(name)
                        fine = name in self.ran or self.items[name] == ABORTED
                        assert fine, f"{name} fails in a step of others"
            except Injected:
                self.num_told += 1
            check_integrity(engine)
            step += 1
            assert step < 500, "it does not end"
        check_empty(engine)
        assert self.outputs.keys() == self.items.keys(), "some were never told of"

    def check_outputs(self) -> None:
        """Each is what it is alone, but for those that failed: they are its beginning."""
        for name, output in self.outputs.items():
            item = make_item(self.items[name], small=True)
            reasons = {sample.finish_reason for sample in output.outputs}
            if output.error is not None:
                assert (
                    output.error
                    == f"Injected: {self.fault.place}, call {self.fault.call}"
                )
                assert "error" in reasons or self.items[name] == ABORTED
                self.num_failed += 1
                check_cut_short(item, output)
            elif "abort" in reasons:
                assert self.items[name] == ABORTED
                check_cut_short(item, output)
            else:
                check_result(item, output)
        assert self.num_told <= 1 and not (self.num_told and self.num_failed)


PARTS: dict[str, tuple[type, ...]] = {
    "executor": (GPUExecutor, ModelRunner, RequestRows, InFlightStep),
    "sampler": (Sampler, SamplingRows),
    "detokenizer": (IncrementalDetokenizer,),
    "allocator": (PagedKVCacheManager, BlockPool),
}


def check_fault(part: str, place: str, call: int, run_ahead: bool) -> Drive:
    """Runs past a fault, and uses the engine again."""
    num_threads = threading.active_count()
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, PARTS[part], place, call)
        drive = Drive(fault, run_ahead)
        assert fault.has_struck
    item, engine = make_item(5, small=True), drive.engine
    for _ in range(2):  # the runner hears of the last that ended in the next step
        [again] = engine.generate(item.prompt, item.params, use_tqdm=False)
        check_result(item, again)
    check_empty(engine)
    rows = get_runner(engine).rows
    assert len(rows.free_rows) >= rows.num_rows - 1
    assert threading.active_count() == num_threads
    return drive


def find_calls(part: str, run_ahead: bool) -> Counter[str]:
    """How often each method is called when nothing breaks."""
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, PARTS[part])
        drive = Drive(fault, run_ahead)
    stats = drive.engine.stats()
    assert stats.num_preemptions and stats.num_prefix_hits
    assert (drive.num_failed, drive.num_told) == (0, 0)
    return fault.counts


def break_each(part: str, run_ahead: bool, notes: Notes, most: int) -> int:
    """A fault at calls of each method of a part, evenly spread, at most so many each.

    Returns:
        How many faults there were.
    """
    num_faults = 0
    for place, count in find_calls(part, run_ahead).items():
        first, step = (count // 2, count) if most == 1 else (0, -(-count // most))
        for call in range(first, count, step):
            notes.records.clear()
            try:
                drive = check_fault(part, place, call, run_ahead)
                assert drive.num_told or drive.num_failed or notes.records, "unnoticed"
                if part == "detokenizer":
                    assert drive.num_failed == 1 and not drive.num_told
            except BaseException as error:
                error.add_note(f"a fault at call {call} of {place}, {run_ahead=}")
                raise
            num_faults += 1
    return num_faults


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("part", list(PARTS))
def test_a_fault_hurts_its_own_and_leaves_nothing(
    part: str, run_ahead: bool, notes: Notes
) -> None:
    """In the middle of what each method has to do."""
    assert break_each(part, run_ahead, notes, most=1) >= 3


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("part", list(PARTS))
def test_a_fault_at_any_call(part: str, run_ahead: bool, notes: Notes) -> None:
    """Four calls of each method from the first on, and under `make soak` all of them."""
    num_faults = break_each(part, run_ahead, notes, most=10_000 if IS_SOAK else 4)
    assert num_faults > (200 if IS_SOAK else 10)


@pytest.mark.parametrize(
    "part, place, run_ahead",
    [
        ("detokenizer", "IncrementalDetokenizer.flush", True),
        ("allocator", "BlockPool.free_blocks", False),
    ],
)
def test_a_fault_while_a_request_leaves(
    part: str, place: str, run_ahead: bool, notes: Notes
) -> None:
    """By itself, by a preemption, and by `abort_request`, which once left it half gone."""
    for call in range(find_calls(part, run_ahead)[place]):
        notes.records.clear()
        drive = check_fault(part, place, call, run_ahead)
        assert drive.num_told or drive.num_failed or notes.records, call
        if part == "allocator":  # the tokens were read: nobody has to end for it
            assert drive.num_failed == 0, call


def test_a_fault_while_a_stream_is_left() -> None:
    """The samples that were not aborted yet are, and nobody keeps the blocks."""
    engine, item = (
        make_engine(600, max_model_len=168, block_size=4),
        make_item(11, True),
    )
    stream = engine.stream(item.prompt, item.params)
    next(stream)
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, PARTS["allocator"], "BlockPool.free_blocks", 1)
        fault.is_armed = True
        with pytest.raises(Injected):
            stream.close()
    check_empty(engine)
    [again] = engine.generate(item.prompt, item.params, use_tqdm=False)
    check_result(item, again)


@pytest.mark.parametrize("call", range(3))
def test_a_fault_while_samples_are_queued(call: int) -> None:
    """All of them or none, and the id is free again."""
    engine, item = (
        make_engine(600, max_model_len=168, block_size=4),
        make_item(11, True),
    )
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, (RequestQueues,), "RequestQueues.add", call)
        fault.is_armed = True
        with pytest.raises(Injected):
            engine.add_request(item.prompt, item.params, "mine")
    check_empty(engine)
    engine.add_request(item.prompt, item.params, "mine")
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    check_result(item, outputs["mine"])
