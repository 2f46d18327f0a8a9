"""Checks of the exercises of page 10."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from folo_lib.config import EngineConfig
from folo_lib.course.exercises import exercise, require
from folo_lib.engine import FCFSScheduler, LLMEngine, Prompt
from folo_lib.inputs import InputProcessor
from folo_lib.request import Request, RequestOutput
from folo_lib.runner import GPUExecutor, SampledToken, StepOutput, StepPlan
from folo_lib.sampling_params import SamplingParams

__all__ = [
    "check_ShortestFirstScheduler",
    "check_first_token_steps",
    "check_generate_within",
]


@exercise
def check_first_token_steps(
    first_token_steps: Callable[[list[int]], list[int]],
) -> None:
    """Of `first_token_steps`: one more than the steps of all that came before."""
    cases = [
        ([3, 3, 3], "each request takes one step for each of its tokens"),
        ([5], "the first step reads the prompt and draws the first token"),
        ([1, 1, 4], "a request that writes one token takes one step"),
        ([2, 7, 1, 1], "what a request writes delays those after it, not itself"),
        ([], "nobody waits"),
    ]
    for num_tokens, why in cases:
        got = first_token_steps(list(num_tokens))
        wanted = [1 + sum(num_tokens[:i]) for i in range(len(num_tokens))]
        require(
            got == wanted,
            f"for {num_tokens} it returns {got!r}, and {wanted} is right: {why}.",
        )


VOCAB_SIZE = 50
NUM_BLOCKS, BLOCK_SIZE = 64, 16
CONFIG = EngineConfig(device="cpu", scheduler="fcfs", block_size=BLOCK_SIZE)


class FinishedStep:
    """What `launch` returns when there is no device to wait for."""

    def __init__(self, output: StepOutput) -> None:
        self.output = output

    def read(self) -> StepOutput:
        return self.output


class CountingExecutor(GPUExecutor):
    """An executor without a model: the next token is how many a request has so far."""

    def __init__(self, step_time: float = 0.0) -> None:
        self.num_blocks, self.block_size = NUM_BLOCKS, BLOCK_SIZE
        self.max_model_len, self.dtype = NUM_BLOCKS * BLOCK_SIZE, torch.float32
        nowhere = SimpleNamespace(device=torch.device("cpu"))
        self.worker: Any = SimpleNamespace(runner=nowhere)
        self.step_time, self.fails_at = step_time, -1
        self.error: BaseException = RuntimeError("the device failed")
        self.steps: list[str] = []
        self.reset()

    def launch(self, plan: StepPlan) -> FinishedStep:  # type: ignore[override]
        time.sleep(self.step_time)
        self.steps += [one.request_id for one in plan.scheduled]
        for new in plan.new_requests:
            self.num_tokens[new.request_id] = len(new.token_ids)
            self.num_computed[new.request_id] = new.num_computed_tokens
        if len(self.steps) == self.fails_at:
            raise self.error
        tokens = {}
        for one in plan.scheduled:
            self.num_computed[one.request_id] += one.num_tokens
            end = self.num_computed[one.request_id]
            if end >= self.num_tokens[one.request_id]:
                tokens[one.request_id] = SampledToken(end % VOCAB_SIZE)
        return FinishedStep(StepOutput(tokens, {}))

    def reset(self) -> None:
        self.num_tokens: dict[str, int] = {}
        self.num_computed: dict[str, int] = {}

    def get_peak_memory(self) -> int | None:
        return None


def make_engine(step_time: float = 0.0) -> LLMEngine:
    """The real engine, on an executor that counts."""
    executor = CountingExecutor(step_time)
    scheduler = FCFSScheduler(CONFIG, NUM_BLOCKS)
    processor = InputProcessor(None, VOCAB_SIZE, executor.max_model_len)
    parts = executor, scheduler, processor
    with mock.patch("folo_lib.engine.load_parts", lambda *args: parts):
        return LLMEngine()


def queue_of(scheduler: FCFSScheduler) -> list[str]:
    """Runs a scheduler dry, one step a request; the ids in the order in which they ran."""
    order: list[str] = []
    for _ in range(100):
        plan = scheduler.schedule()
        require(
            isinstance(plan, StepPlan) and len(plan.scheduled) <= 1,
            f"schedule() returns {plan!r}: a StepPlan with one request is wanted, or "
            "with none.",
        )
        if not plan.scheduled:
            return order
        [one] = plan.scheduled
        name = one.request_id.removesuffix("-0")
        require(name not in order, "a request that has finished is scheduled again.")
        order.append(name)
        running = scheduler.running
        require(
            running is not None and running.sample_id == one.request_id,
            f"{one.request_id} is scheduled, and scheduler.running is {running}.",
        )
        assert running is not None
        scheduler.finish(running)
    require(False, "a request that has finished is scheduled again.")
    return order


@exercise
def check_ShortestFirstScheduler(
    scheduler_class: Callable[[EngineConfig, int], FCFSScheduler],
) -> None:
    """Of `ShortestFirstScheduler`: the order, the running request, and the blocks."""
    processor = InputProcessor(None, VOCAB_SIZE, NUM_BLOCKS * BLOCK_SIZE)
    greedy = SamplingParams(temperature=0, max_tokens=3)

    def make(name: str, length: int) -> Request:
        return processor.process_request([1] * length, greedy, request_id=name)[0]

    cases = {
        "one request": {"a": 5},
        "a short one behind a long one": {"a": 9, "b": 2},
        "three": {"a": 30, "b": 40, "c": 20},
        "two of the same length": {"a": 7, "b": 7, "c": 3},
        "many": dict(zip("abcdefgh", [9, 3, 40, 3, 1, 9, 25, 2], strict=True)),
    }
    for name, lengths in cases.items():
        scheduler = scheduler_class(CONFIG, NUM_BLOCKS)
        require(
            not scheduler.schedule().scheduled,
            "with nobody there, schedule() schedules somebody.",
        )
        for request_id, length in lengths.items():
            scheduler.add(make(request_id, length))
        got, wanted = queue_of(scheduler), sorted(lengths, key=lengths.__getitem__)
        require(
            got == wanted,
            f"{name}, prompt lengths {lengths}: they run in the order {got}, and "
            f"{wanted} is wanted; equals in the order in which they came.",
        )
        stats = scheduler.get_stats()
        left = stats.num_running + stats.num_waiting
        require(not left, f"{name}: all have run, and {left} are still there.")
        taken = stats.num_used_blocks
        require(not taken, f"{name}: {taken} blocks stay taken.")

    scheduler = scheduler_class(CONFIG, NUM_BLOCKS)
    first, short, long = make("first", 20), make("short", 2), make("long", 30)
    scheduler.add(first)
    scheduler.schedule()
    status, blocks = first.status.name, first.block_ids
    require(status == "RUNNING", f"a scheduled request is {status}: start() it.")
    require(len(blocks) == 2, f"20 + 3 tokens need 2 blocks, and it has {blocks}.")
    scheduler.add(long)
    scheduler.add(short)
    first.append_token(SampledToken(1))
    [one] = scheduler.schedule().scheduled
    require(
        one.request_id == "first-0",
        "a shorter request came while one was running, and took its place: who runs "
        "runs to its end.",
    )
    scheduler.finish(short)  # aborted while it waits
    scheduler.finish(first)
    require(
        queue_of(scheduler) == ["long"],
        "a request that was finished while it waited is still scheduled.",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """The failures below are wanted, and need not be logged."""
    logger = logging.getLogger("folo_lib.engine")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def require_clean(engine: LLMEngine, when: str) -> None:
    """Nothing of anybody is left in the engine."""
    left = unfinished(engine) or list(engine._table.groups)
    require(not left, f"{when} the engine still has the requests {left}.")
    taken = engine.stats().num_used_blocks
    require(not taken, f"{when} {taken} blocks are still taken.")


def unfinished(engine: LLMEngine) -> list[str]:
    """The ids of the samples that wait or run."""
    return list(engine._table.unfinished)


Generate = Callable[
    [LLMEngine, list[Prompt], SamplingParams, float], list[RequestOutput]
]


def ends(outputs: list[RequestOutput]) -> list[tuple[int, str | None]]:
    """How many tokens each has, and why no more."""
    samples = [output.outputs[0] for output in outputs]
    return [(len(sample.token_ids), sample.finish_reason) for sample in samples]


@exercise
def check_generate_within(generate_within: Generate) -> None:
    """Of `generate_within`: outputs, the clock, and what is left behind."""
    prompts: list[Prompt] = [[1] * 5, [2] * 3, [3] * 7]
    short = SamplingParams(temperature=0, max_tokens=4)
    engine = make_engine()
    got = generate_within(engine, prompts, short, 60.0)
    require(
        isinstance(got, list) and len(got) == 3,
        f"for three prompts it returns {got!r}: a list of three outputs is wanted.",
    )
    order = [output.prompt_token_ids for output in got]
    require(order == prompts, f"the outputs belong to {order}, for prompts {prompts}.")
    require(
        ends(got) == [(4, "length")] * 3,
        "with 60 s for four tokens each, it returns (tokens, finish_reason) "
        f"{ends(got)}, and (4, 'length') is wanted for all.",
    )
    require_clean(engine, "when all was done in time,")
    require(
        generate_within(make_engine(), [], short, 60.0) == [], "no prompt, no output."
    )

    check_clock(generate_within, prompts)
    check_others(generate_within, prompts)
    check_mishaps(generate_within, prompts, short)


def check_clock(generate_within: Generate, prompts: list[Prompt]) -> None:
    """Steps take 5 ms or more, so no more than 21 can begin in 100 ms."""
    engine = make_engine(step_time=0.005)
    executor = engine.executor
    assert isinstance(executor, CountingExecutor)
    long = SamplingParams(temperature=0, max_tokens=90)
    got = generate_within(engine, prompts, long, 0.1)
    require(
        len(executor.steps) <= 21,
        f"in 0.1 s, with steps of 5 ms, {len(executor.steps)} steps were begun: look at "
        "the clock before each.",
    )
    require(len(executor.steps) > 0, "in 0.1 s not one step was begun.")
    require(
        isinstance(got, list) and len(got) == 3,
        "when time is over, every prompt has an output, even one that never ran; it "
        f"returns {len(got)} for three.",
    )
    order = [output.prompt_token_ids for output in got]
    require(order == prompts, f"the outputs belong to {order}, for prompts {prompts}.")
    wanted = [(len(executor.steps), "abort"), (0, "abort"), (0, "abort")]
    require(
        ends(got) == wanted,
        f"when time is over, it returns (tokens, finish_reason) {ends(got)}, and "
        f"{wanted} is wanted.",
    )
    require_clean(engine, "when time was over,")


def check_others(generate_within: Generate, prompts: list[Prompt]) -> None:
    """A request that was there before runs first, is not aborted, and keeps its news."""
    engine = make_engine()
    engine.add_request([9] * 4, SamplingParams(temperature=0, max_tokens=6), "other")
    short = SamplingParams(temperature=0, max_tokens=2)
    got = generate_within(engine, prompts, short, 60.0)
    require(
        ends(got) == [(2, "length")] * 3,
        "with a request of somebody else in front, it returns (tokens, finish_reason) "
        f"{ends(got)}, and (2, 'length') is wanted for all.",
    )
    outputs = engine.step() if engine.has_unfinished_requests() else []
    require(
        [o.request_id for o in outputs] == ["other"]
        and ends(outputs) == [(6, "length")],
        "a request of somebody else ended meanwhile, and its owner's next step() does "
        "not bring the output: collect only your own news, which step() does not.",
    )
    engine = make_engine()
    engine.add_request([9] * 4, SamplingParams(temperature=0, max_tokens=6), "other")
    generate_within(engine, prompts, short, 0.0)
    require(
        unfinished(engine) == ["other-0"],
        "with a budget of 0 s, a request of somebody else was there before, and "
        f"afterwards the engine has {unfinished(engine)}: abort only your own.",
    )


def check_mishaps(
    generate_within: Generate, prompts: list[Prompt], params: SamplingParams
) -> None:
    """A failing step, Ctrl-C, and a prompt that cannot be served."""
    engine = make_engine()
    assert isinstance(engine.executor, CountingExecutor)
    engine.executor.fails_at = 6
    with quiet():
        got = generate_within(engine, prompts, params, 60.0)
    wanted = [(4, "length"), (1, "error"), (4, "length")]
    require(
        ends(got) == wanted,
        f"when the sixth step fails, it returns {ends(got)}, and {wanted} is wanted.",
    )
    require_clean(engine, "after a step that failed,")

    engine = make_engine()
    assert isinstance(engine.executor, CountingExecutor)
    engine.executor.fails_at, engine.executor.error = 6, KeyboardInterrupt()
    try:
        generate_within(engine, prompts, params, 60.0)
    except KeyboardInterrupt:
        pass
    else:
        require(False, "it swallows Ctrl-C, which its caller has to see.")
    require_clean(engine, "after Ctrl-C")

    engine = make_engine()
    try:
        generate_within(engine, [[1], [2], []], params, 60.0)
    except ValueError:
        pass
    else:
        require(False, "a prompt without tokens raises no ValueError.")
    require_clean(engine, "when the third prompt was refused,")
    assert isinstance(engine.executor, CountingExecutor)
    require(not engine.executor.steps, "a prompt was refused after others had run.")
