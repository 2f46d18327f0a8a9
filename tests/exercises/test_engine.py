"""The checks of page 10 know the mistakes that people make."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from folo_lib.course.exercises.engine import (
    check_generate_within,
    check_ShortestFirstScheduler,
)
from folo_lib.engine import FCFSScheduler, Prompt, StepEngine, submit, withdraw
from folo_lib.request import RequestOutput
from folo_lib.runner import ScheduledRequest
from folo_lib.sampling_params import SamplingParams


class LongestFirst(FCFSScheduler):
    def schedule(self) -> list[ScheduledRequest]:
        if self.running is None and self.waiting:
            one = max(self.waiting, key=lambda r: len(r.prompt_token_ids))
            self.waiting.remove(one)
            self.waiting.appendleft(one)
        return super().schedule()


class LastOfEquals(FCFSScheduler):
    def schedule(self) -> list[ScheduledRequest]:
        if self.running is None and self.waiting:
            turned = list(reversed(self.waiting))
            one = min(turned, key=lambda r: len(r.prompt_token_ids))
            self.waiting.remove(one)
            self.waiting.appendleft(one)
        return super().schedule()


class Impatient(FCFSScheduler):
    """Takes the place of whoever runs."""

    def schedule(self) -> list[ScheduledRequest]:
        if self.running is not None:
            self.allocator.free(self.running.block_ids)
            self.waiting.append(self.running)
            self.running = None
        if self.waiting:
            one = min(self.waiting, key=lambda r: len(r.prompt_token_ids))
            self.waiting.remove(one)
            self.waiting.appendleft(one)
        return super().schedule()


class Careless(FCFSScheduler):
    """Runs the shortest and leaves it in the queue."""

    def schedule(self) -> list[ScheduledRequest]:
        if self.running is None and self.waiting:
            one = min(self.waiting, key=lambda r: len(r.prompt_token_ids))
            self.waiting.appendleft(one)
        return super().schedule()


class NotNobody(FCFSScheduler):
    def schedule(self) -> list[ScheduledRequest]:
        one = min(self.waiting, key=lambda r: len(r.prompt_token_ids))
        self.waiting.remove(one)
        self.waiting.appendleft(one)
        return super().schedule()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (FCFSScheduler, "a short one behind a long one"),
        (LongestFirst, "a short one behind a long one"),
        (LastOfEquals, "in the order in which they came"),
        (Impatient, "who runs runs to its end"),
        (Careless, "that has finished is scheduled again"),
        (NotNobody, "ValueError"),
    ],
)
def test_wrong_schedulers(wrong: type[FCFSScheduler], message: str) -> None:
    verdict = check_ShortestFirstScheduler(wrong)
    assert not verdict
    assert message in verdict.message


def within(
    engine: StepEngine,
    prompts: list[Prompt],
    params: SamplingParams,
    seconds: float,
    *,
    look_at_clock: bool = True,
    abort: bool = True,
    tidy: bool = True,
    everybody: bool = False,
    swallow: bool = False,
    one_by_one: bool = False,
) -> list[RequestOutput]:
    """`generate_within`, right unless a mistake is asked for."""
    deadline = time.perf_counter() + seconds
    if one_by_one:  # queues prompts before all of them are checked
        groups = []
        for prompt in prompts:
            groups.append(engine.processor.process_request(prompt, params))
            submit(engine, groups[-1])
    else:
        groups = engine.processor.process_requests(prompts, params)
    own = [request for group in groups for request in group]
    left = True
    try:
        ids = [group[0].request_id for group in groups]
        for group in groups if not one_by_one else ():
            submit(engine, group)
        while not look_at_clock or time.perf_counter() < deadline:
            if all(request.status.is_finished for request in own):
                break
            engine.run_step()
        if abort:
            for request_id in [*engine.groups] if everybody else ids:
                engine.abort_request(request_id)
        outputs = [engine.collect(name) for name in ids if name in engine.news]
        left = False
        return outputs
    except KeyboardInterrupt:
        if not swallow:
            raise
        return []
    finally:
        if tidy or not left:
            withdraw(engine, groups)


def mistake(**kwargs: Any) -> Callable[..., list[RequestOutput]]:
    return lambda *args: within(*args, **kwargs)


def with_step(
    engine: StepEngine, prompts: list[Prompt], params: SamplingParams, seconds: float
) -> list[RequestOutput]:
    """Collects everybody's news."""
    groups = engine.processor.process_requests(prompts, params)
    return finish(engine, [submit(engine, group) for group in groups], seconds)


def finish(engine: StepEngine, ids: list[str], seconds: float) -> list[RequestOutput]:
    deadline = time.perf_counter() + seconds
    outputs: dict[str, RequestOutput] = {}
    try:
        while time.perf_counter() < deadline and not all(
            i in outputs and outputs[i].finished for i in ids
        ):
            outputs |= {output.request_id: output for output in engine.step()}
    finally:
        for request_id in ids:
            engine.abort_request(request_id)
            if request_id in engine.groups:
                outputs[request_id] = engine.collect(request_id)
    return [outputs[request_id] for request_id in ids]


def test_within_without_a_mistake() -> None:
    assert check_generate_within(mistake())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda *args: None, "a list of three outputs is wanted"),
        (lambda *args: within(*args)[::-1], "the outputs belong to"),
        (mistake(look_at_clock=False), "look at the clock before each"),
        (mistake(abort=False), "every prompt has an output"),
        (mistake(everybody=True), "abort only your own"),
        (mistake(tidy=False), "after Ctrl-C"),
        (mistake(swallow=True), "it swallows Ctrl-C"),
        (with_step, "collect only your own news"),
        (mistake(one_by_one=True), "when the third prompt was refused"),
    ],
)
def test_wrong_budgets(wrong: Callable[..., list[RequestOutput]], message: str) -> None:
    verdict = check_generate_within(wrong)
    assert not verdict
    assert message in verdict.message
