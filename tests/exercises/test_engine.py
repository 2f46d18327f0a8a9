"""The checks of page 10 know the mistakes that people make."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from folo_lib.course.exercises.engine import (
    check_first_token_steps,
    check_generate_within,
    check_ShortestFirstScheduler,
)
from folo_lib.engine import FCFSScheduler, Inbox, LLMEngine, Prompt
from folo_lib.request import RequestOutput
from folo_lib.runner import StepPlan
from folo_lib.sampling_params import SamplingParams


class LongestFirst(FCFSScheduler):
    def schedule(self) -> StepPlan:
        if self.running is None and self.waiting:
            one = max(self.waiting, key=lambda r: len(r.prompt_token_ids))
            self.waiting.remove(one)
            self.waiting.appendleft(one)
        return super().schedule()


class LastOfEquals(FCFSScheduler):
    def schedule(self) -> StepPlan:
        if self.running is None and self.waiting:
            turned = list(reversed(self.waiting))
            one = min(turned, key=lambda r: len(r.prompt_token_ids))
            self.waiting.remove(one)
            self.waiting.appendleft(one)
        return super().schedule()


class Impatient(FCFSScheduler):
    """Takes the place of whoever runs."""

    def schedule(self) -> StepPlan:
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

    def schedule(self) -> StepPlan:
        if self.running is None and self.waiting:
            one = min(self.waiting, key=lambda r: len(r.prompt_token_ids))
            self.waiting.appendleft(one)
        return super().schedule()


class NotNobody(FCFSScheduler):
    def schedule(self) -> StepPlan:
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
    engine: LLMEngine,
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
    inbox = Inbox(every_token=False)
    outputs: dict[str, RequestOutput] = {}
    if one_by_one:  # queues prompts before all of them are checked
        groups = []
        for prompt in prompts:
            groups.append(engine.processor.process_request(prompt, params))
            engine.submit(groups[-1:], inbox)
    else:
        groups = engine.processor.process_requests(prompts, params)
    ids = [group[0].request_id for group in groups]
    try:
        if not one_by_one:
            engine.submit(groups, inbox)
        while len(outputs) < len(groups):
            if look_at_clock and time.perf_counter() >= deadline:
                if not abort:
                    break
                for request_id in [*engine._table.groups] if everybody else ids:
                    engine.abort_request(request_id)
            outputs |= {output.request_id: output for output in engine.advance(inbox)}
        return [outputs[request_id] for request_id in ids if request_id in outputs]
    except KeyboardInterrupt:
        if not swallow:
            raise
        return []
    finally:
        if tidy:
            engine.withdraw(groups)


def mistake(**kwargs: Any) -> Callable[..., list[RequestOutput]]:
    return lambda *args: within(*args, **kwargs)


def with_step(
    engine: LLMEngine, prompts: list[Prompt], params: SamplingParams, seconds: float
) -> list[RequestOutput]:
    """Collects everybody's news."""
    engine.processor.process_requests(prompts, params)
    deadline = time.perf_counter() + seconds
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    outputs: dict[str, RequestOutput] = {}
    try:
        while time.perf_counter() < deadline and not all(
            i in outputs and outputs[i].finished for i in ids
        ):
            outputs |= {output.request_id: output for output in engine.step()}
    finally:
        for request_id in ids:
            engine.abort_request(request_id)
        last = engine._table.collect(engine._inbox)
        outputs |= {output.request_id: output for output in last}
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda n: [sum(n[:i]) for i in range(len(n))], "[1, 4, 7] is right"),
        (lambda n: [sum(n[: i + 1]) for i in range(len(n))], "takes one step for each"),
        (lambda n: [1 + 3 * i for i in range(len(n))], "takes one step"),
        (lambda n: [1 + sum(n) - sum(n[i:]) - i for i in range(len(n))], "is right"),
        (lambda n: [1] * len(n), "takes one step for each"),
        (lambda n: [1, *(1 + sum(n[:i]) for i in range(1, len(n)))], "nobody waits"),
    ],
)
def test_first_token_steps(
    wrong: Callable[[list[int]], list[int]], message: str
) -> None:
    verdict = check_first_token_steps(wrong)
    assert not verdict and message in " ".join(verdict.message.split())
