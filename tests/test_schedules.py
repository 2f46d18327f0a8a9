"""An engine for many requests: each gets what it would get alone, whatever happens."""

from __future__ import annotations

import gc
import logging
import random
import threading
from collections import Counter
from typing import Any

import pytest
import schedules
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from schedules import (
    IS_SOAK,
    CacheModel,
    Schedule,
    check_cut_short,
    check_empty,
    check_integrity,
    check_result,
    get_runner,
    interrupt,
    make_engine,
    make_item,
    poison_free_blocks,
    run_alone,
)
from transformers import GenerationConfig

from folo_lib import LLMEngine, RequestOutput, SamplingParams
from folo_lib.runner import InFlightStep, NewRequest, ScheduledRequest, StepPlan
from folo_lib.scheduler import ContinuousScheduler


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Requests fail on purpose here, each with a traceback in the log."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, **options
    )


def finish(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Steps to the end, checking each; the last output of each request."""
    outputs, num_steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
        num_steps += 1
        assert num_steps < 1000, "it does not end"
        check_integrity(engine)
        poison_free_blocks(engine)
    return outputs


# --- Random schedules -----------------------------------------------------------------


def run_schedules(
    seeds: range, small: bool, run_ahead: bool | None = None
) -> Counter[str]:
    """None: every other one runs ahead."""
    tally: Counter[str] = Counter()
    for seed in seeds:
        is_ahead = seed % 2 == 1 if run_ahead is None else run_ahead
        try:
            tally += Schedule(seed, small, is_ahead).run()
        except Exception as error:
            error.add_note(f"in Schedule({seed}, {small}, {is_ahead})")
            raise
    return tally


@pytest.mark.parametrize("part", range(4))
def test_each_request_gets_what_it_gets_alone(part: int) -> None:
    """24 schedules of short requests; in half of them the host runs a step ahead."""
    tally = run_schedules(range(6 * part, 6 * part + 6), small=True)
    assert tally["right"] > 12 and tally["hits"] and tally["preempted"]
    assert tally["ties"] <= 2  # none so far; each is proved to be one


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.parametrize("part", range(15 if IS_SOAK else 7))
def test_each_of_many_requests_gets_what_it_gets_alone(part: int) -> None:
    """140 schedules, with prompts of up to 600 tokens and answers of up to 512.

    In half of them the host runs a step ahead; under `make soak` there are 300, and each runs
    both ways.
    """
    seeds = range(20 * part, 20 * part + 20)
    for run_ahead in (False, True) if IS_SOAK else (None,):
        tally = run_schedules(seeds, small=False, run_ahead=run_ahead)
        assert tally["right"] > 40 and tally["hits"] and tally["preempted"]
        assert tally["aborts"] + tally["errors"]
        assert tally["ties"] <= 4


def test_the_margin_of_a_tie_is_ten_times_the_measured_error() -> None:
    engine = make_engine(5 * schedules.LONGEST, block_size=4, max_num_batched_tokens=64)
    errors = schedules.measure_error(engine)
    for number in range(8):
        item = make_item(number, small=True)
        engine.add_request(item.prompt, item.params)
    finish(engine)
    assert len(errors) > 100
    assert schedules.MARGIN / 40 < max(errors) < 2 * schedules.MARGIN / 10


def test_the_reference_notices_a_token_that_is_not_the_best() -> None:
    """What is said of near-ties would prove nothing if it let every token pass."""
    num_right = 0
    for number in range(40):
        item = make_item(number, small=True)
        sample = run_alone(number, small=True).outputs[-1]
        logits = schedules.get_logits(item.prompt + sample.token_ids)
        place, own = len(sample.token_ids) // 2, list(sample.token_ids)
        before = logits[len(item.prompt) - 1 + place]
        assert schedules.may_be_drawn(before, item, sample, place)[0]
        sample.token_ids[place] = (own[place] + 1) % 2000
        num_right += not schedules.may_be_drawn(before, item, sample, place)[0]
        sample.token_ids[:] = own
    assert num_right == 40


# --- Any order of calls ---------------------------------------------------------------


class EngineMachine(RuleBasedStateMachine):
    """Calls of an engine in any order, with the engine whole after each."""

    @initialize(
        block_size=st.sampled_from([1, 4, 16]),
        num_blocks=st.sampled_from([1, 1.5, 4]),
        budget=st.sampled_from([5, 40, 500]),
        num_seqs=st.sampled_from([1, 3, 16]),
        caching=st.booleans(),
        run_ahead=st.booleans(),
    )
    def start(
        self,
        block_size: int,
        num_blocks: float,
        budget: int,
        num_seqs: int,
        caching: bool,
        run_ahead: bool,
    ) -> None:
        self.engine = make_engine(
            int(-(-168 // block_size) * num_blocks) * block_size,
            max_model_len=168,
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=num_seqs,
            enable_prefix_caching=caching,
            async_scheduling=run_ahead,
        )
        self.items: dict[str, int] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.streams: list[tuple[int, Any]] = []

    def record(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.outputs
            if output.finished:
                self.outputs[output.request_id] = output

    @rule(number=st.integers(0, 15))
    def add(self, number: int) -> None:
        item = make_item(number, small=True)
        self.items[self.engine.add_request(item.prompt, item.params)] = number

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.record(self.engine.step())
            check_integrity(self.engine)
        poison_free_blocks(self.engine)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        self.engine.abort_request(data.draw(st.sampled_from(sorted(self.items))))

    @precondition(lambda self: len(self.streams) < 3)
    @rule(number=st.integers(0, 15))
    def begin_stream(self, number: int) -> None:
        item = make_item(number, small=True)
        stream = self.engine.stream(item.prompt, item.params)
        output = next(stream)
        assert output.outputs
        self.streams.append((number, stream))

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def read_stream(self, data: Any) -> None:
        one = data.draw(st.sampled_from(self.streams))
        if (output := next(one[1], None)) is None:
            self.streams.remove(one)
        elif output.finished:
            check_result(make_item(one[0], small=True), output)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def end_stream(self, data: Any) -> None:
        one = data.draw(st.sampled_from(self.streams))
        self.streams.remove(one)
        one[1].close()

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "engine"):
            check_integrity(self.engine)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _, stream in self.streams:
            stream.close()
        while self.engine.has_unfinished_requests():
            self.record(self.engine.step())
        check_empty(self.engine)
        assert self.outputs.keys() == self.items.keys()
        for name, number in self.items.items():
            item, output = make_item(number, small=True), self.outputs[name]
            assert output.error is None
            if any(one.finish_reason == "abort" for one in output.outputs):
                check_cut_short(item, output)
            else:
                check_result(item, output)


TestCallsInAnyOrder = EngineMachine.TestCase
TestCallsInAnyOrder.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None
)


# --- Old keys, many requests ----------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_what_the_cache_held_before_does_not_matter(block_size: int) -> None:
    """Zeros, NaN, and keys of others in every block: the same tokens."""
    results = []
    for fill in (0.0, float("nan"), 1e6):
        engine = make_engine(
            1024, block_size=block_size, max_model_len=200, max_num_batched_tokens=64
        )
        for pair in get_runner(engine).kv_caches:
            for tensor in pair:
                tensor.fill_(fill)
        items = [make_item(number, small=True) for number in range(8)]
        outputs = engine.generate(
            [item.prompt for item in items], [item.params for item in items], False
        )
        results.append([[o.token_ids for o in out.outputs] for out in outputs])
        for item, output in zip(items, outputs, strict=True):
            check_result(item, output)
    assert results[0] == results[1] == results[2]


def count_live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("run_ahead", [False, True])
def test_many_requests_leave_nothing_behind(run_ahead: bool) -> None:
    """Not even one tensor for each of them. `test_soak.py` counts over thousands."""
    one_by_one = at_once = 100
    engine = make_engine(
        4096, max_model_len=64, max_num_seqs=32, async_scheduling=run_ahead
    )
    rng, prompts = random.Random(0), []
    for _ in range(max(one_by_one, at_once)):
        length = rng.randint(1, 40)
        prompts.append([rng.randrange(4, 2000) for _ in range(length)])
    params = [greedy(2), SamplingParams(seed=1, max_tokens=3, presence_penalty=1)]

    def use() -> None:
        for number in range(one_by_one):
            engine.generate(prompts[number], params[number % 2], False)
        some = [params[number % 2] for number in range(at_once)]
        engine.generate(prompts[:at_once], some, False)
        # The runner learns of the last that ended with the next step.
        engine.generate([5], greedy(1), False)
        check_empty(engine)

    engine.generate(prompts[:64], [params[i % 2] for i in range(64)], False)
    engine.generate([5], greedy(1), False)
    before = count_live_tensors()
    rows = len(get_runner(engine).rows.free_rows)
    use()
    assert count_live_tensors() <= before + 2
    assert len(get_runner(engine).rows.free_rows) == rows
    stats = engine.stats()
    assert stats.num_used_blocks == 0
    assert stats.num_cached_blocks <= stats.num_blocks


# --- Ctrl-C ---------------------------------------------------------------------------


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stage", ["schedule", "launch", "read", "update", "collect"])
def test_ctrl_c_leaves_the_engine_whole(stage: str, seed: int, run_ahead: bool) -> None:
    """At any line of a step. It ends nobody, and all come out the same."""
    rng = random.Random(f"{stage} {seed}")
    options = {"block_size": 4, "max_model_len": 168, "max_num_batched_tokens": 48}
    size = rng.choice([168, 400])
    engine = make_engine(size, async_scheduling=run_ahead, **options)
    items, outputs, num_interrupted, steps = {}, {}, 0, 0
    for _ in range(6):
        item = make_item(rng.randrange(30), small=True)
        items[engine.add_request(item.prompt, item.params)] = item
    while engine.has_unfinished_requests():
        place = []
        try:
            if rng.random() < 0.3 and num_interrupted < 8:
                line = schedules.draw_size(rng, 1, 150 if stage == "launch" else 60)
                with interrupt(stage, line) as place:
                    ended = engine.step()
            else:
                ended = engine.step()
        except KeyboardInterrupt:
            ended = []
        assert bool(place) or ended is not None
        num_interrupted += bool(place)
        for output in ended:
            outputs[output.request_id] = output
        check_integrity(engine)
        steps += 1
        assert steps < 3000, f"it does not end after Ctrl-C at {place}"
    assert num_interrupted
    check_empty(engine)
    assert outputs.keys() == items.keys(), "some were never told of"
    for name, output in outputs.items():
        check_result(items[name], output)


@pytest.mark.parametrize("stage", ["add", "abort"])
def test_ctrl_c_while_requests_come_and_go(stage: str) -> None:
    """A request is here with all its samples or not at all; the others do not notice."""
    item, many = make_item(6, small=True), make_item(11, small=True)
    assert many.params.n > 1
    num_interrupted = 0
    for line in range(0, 60, 2):
        engine = make_engine(400, max_model_len=168)
        name = engine.add_request(item.prompt, item.params)
        engine.step()
        if stage == "abort":
            engine.add_request(many.prompt, many.params, "many")
            engine.step()
        with interrupt(stage, line) as place:
            try:
                if stage == "abort":
                    engine.abort_request("many")
                else:
                    engine.add_request(many.prompt, many.params, "many")
            except KeyboardInterrupt:
                num_interrupted += 1
            else:
                assert not place
                break
        check_integrity(engine)
        engine.abort_request("many")  # again, as one would
        outputs = finish(engine)
        check_empty(engine)
        check_result(item, outputs[name])
        if stage == "abort":
            assert outputs["many"].finished
    assert num_interrupted > 5


# --- The host a step ahead --------------------------------------------------------------


def run_ahead(**options: Any) -> tuple[LLMEngine, list[StepPlan]]:
    """An engine whose host runs a step ahead, and the plans that it launches."""
    engine = make_engine(**({"async_scheduling": True} | options))
    plans, launch = [], engine.executor.launch

    def launch_and_record(plan: StepPlan) -> Any:
        plans.append(plan)
        return launch(plan)

    engine.executor.launch = launch_and_record  # type: ignore[method-assign]
    return engine, plans


def count_tokens(plans: list[StepPlan], request_id: str = "") -> int:
    return sum(
        one.num_tokens
        for plan in plans
        for one in plan.scheduled
        if one.request_id.startswith(request_id)
    )


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


A, B, C = [10, 11, 12], [20, 21, 22, 23], [30, 31]


def test_a_step_is_read_when_the_next_has_been_launched() -> None:
    engine, plans = run_ahead()
    engine.add_request(A, greedy(4), "a")
    seen = [[len(tokens_of(one)) for one in engine.step()] for _ in range(5)]
    assert seen == [[], [1], [2], [3], [4]]
    ran = [[one.num_tokens for one in plan.scheduled] for plan in plans]
    assert ran == [[3], [1], [1], [1], []]  # the last one is foreseen
    check_empty(engine)


@pytest.mark.parametrize("scheduler", ["continuous", "fcfs"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_an_end_by_length_costs_no_step(scheduler: str, max_tokens: int) -> None:
    engine, plans = run_ahead(scheduler=scheduler, max_num_seqs=1)
    prompts = [A, B, C]
    outputs = engine.generate(prompts, greedy(max_tokens), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert tokens_of(output) == get_alone(prompt, greedy(max_tokens))
    assert count_tokens(plans) == sum(len(one) + max_tokens - 1 for one in prompts)
    assert sum(bool(plan.scheduled) for plan in plans) == 3 * max_tokens
    assert not engine._table.in_flight and not engine.has_unfinished_requests()


@pytest.mark.parametrize("scheduler", ["continuous", "fcfs"])
def test_what_is_drawn_after_an_unforeseen_end_is_dropped(
    scheduler: str, caplog: pytest.LogCaptureFixture
) -> None:
    alone = get_alone(A, greedy(20))
    params = greedy(20, stop_token_ids=[alone[6]])
    expected = alone[: alone.index(alone[6]) + 1]
    engine, plans = run_ahead(scheduler=scheduler)
    engine.add_request(A, params, "a")
    engine.add_request(B, greedy(20), "b")
    outputs, seen = {}, []
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
            seen += [tokens_of(output)] if output.request_id == "a" else []
    assert seen == [expected[: i + 1] for i in range(len(expected))]
    assert outputs["a"].outputs[0].finish_reason == "stop"
    assert tokens_of(outputs["b"]) == get_alone(B, greedy(20))
    assert count_tokens(plans, "a") == len(A) + len(expected)  # one for nothing
    assert not engine._table.in_flight
    assert not caplog.records  # "b" did not begin again, as after a step that failed


def test_the_last_one_out_leaves_no_step_behind() -> None:
    alone = get_alone(A, greedy(20))
    params = greedy(20, stop_token_ids=[alone[6]])
    engine, plans = run_ahead()
    for _ in range(2):  # and the runner hears that it ended
        [output] = engine.generate(A, params, use_tqdm=False)
        assert tokens_of(output) == alone[: alone.index(alone[6]) + 1]
        check_empty(engine)
        assert not engine._table.in_flight
    assert sum(map(len, (plan.finished_ids for plan in plans))) == 1
    stream = engine.stream(A, greedy(20))
    for _ in range(3):
        next(stream)
    stream.close()
    check_empty(engine)
    assert not engine._table.in_flight


def test_an_id_that_is_used_again_while_a_step_runs() -> None:
    """The late token of the first "x" is not the second one's."""
    engine, _plans = run_ahead()
    engine.add_request(A, greedy(20), "x")
    engine.add_request(B, greedy(20), "y")
    for _ in range(4):
        engine.step()
    engine.abort_request("x")
    [gone] = engine.step()
    assert tokens_of(gone) == get_alone(A, greedy(20))[:3]
    assert gone.outputs[0].finish_reason == "abort"
    assert len(engine._table.in_flight) == 1  # of the first "x", and of "y"
    engine.add_request(C, greedy(20), "x")
    outputs = finish(engine)
    assert tokens_of(outputs["x"]) == get_alone(C, greedy(20))
    assert tokens_of(outputs["y"]) == get_alone(B, greedy(20))
    check_empty(engine)


def test_who_is_preempted_keeps_the_token_that_is_in_flight() -> None:
    engine, plans = run_ahead(
        num_tokens=32, block_size=4, max_model_len=28, enable_prefix_caching=False
    )
    names = [
        engine.add_request(prompt, greedy(20), n) for prompt, n in ((A, "a"), (B, "b"))
    ]
    request = engine._table.unfinished["b-0"]
    while not engine.stats().num_preemptions:
        before = len(request.output_token_ids)
        engine.step()
        check_integrity(engine)
    assert request.status.name == "PREEMPTED"
    assert len(request.output_token_ids) == before + 1
    known, start = request.num_tokens, len(plans)
    outputs = finish(engine)
    [again] = [new for plan in plans[start:] for new in plan.new_requests]
    assert len(again.token_ids) == known
    for name, prompt in zip(names, (A, B), strict=True):
        assert tokens_of(outputs[name]) == get_alone(prompt, greedy(20))


def test_who_starts_again_with_a_token_in_flight_gets_it_once() -> None:
    """As a scheduler of one's own may do it: sent back, and taken in again by the same step."""

    class Restless(ContinuousScheduler):
        num_steps = 0

        def schedule(self) -> StepPlan:
            self.num_steps += 1
            if self.num_steps % 3 == 0 and self.running:
                self.preempt_last()
            return super().schedule()

    engine, plans = run_ahead(scheduler=Restless, enable_prefix_caching=False)
    for prompt, name in ((A, "a"), (B, "b")):
        engine.add_request(prompt, greedy(12), name)
    outputs = finish(engine)
    for prompt, name in ((A, "a"), (B, "b")):
        assert tokens_of(outputs[name]) == get_alone(prompt, greedy(12))
    assert sum(len(plan.new_requests) for plan in plans) > 5
    check_empty(engine)


def test_a_block_is_found_once_its_last_token_is_known() -> None:
    engine, _plans = run_ahead(block_size=4, max_model_len=64)
    pool = engine.scheduler.kv_cache.pool
    engine.add_request(B, greedy(20), "first")  # its prompt fills a block
    request = engine._table.unfinished["first-0"]
    named = []
    for _ in range(10):
        engine.step()
        check_integrity(engine)
        known = [i in pool.block_hashes for i in request.block_ids]
        named.append((request.num_computed_tokens, sum(known)))
    # The 8th token is drawn by the 4th step, runs in the 5th, and is read after that.
    assert named[4:7] == [(8, 1), (9, 2), (10, 2)]
    prompt = [*request.get_token_ids()[:8], 7]
    engine.add_request(prompt, greedy(5), "second")
    outputs = finish(engine)
    assert outputs["second"].num_cached_tokens == 8
    assert tokens_of(outputs["second"]) == get_alone(prompt, greedy(5))
    assert tokens_of(outputs["first"]) == get_alone(B, greedy(20))


@pytest.mark.parametrize("run_ahead", [False, True])
def test_what_can_be_found_when_all_have_ended(run_ahead: bool) -> None:
    """All full blocks of what has run, however it ended; the host's lead is no loss."""
    for length in range(1, 12):
        engine = make_engine(block_size=4, async_scheduling=run_ahead, max_model_len=64)
        [output] = engine.generate(A, greedy(length), use_tqdm=False)
        cached = (len(A) + length - 1) // 4
        assert engine.stats().num_cached_blocks == cached
        [again] = engine.generate(A + tokens_of(output), greedy(2), use_tqdm=False)
        assert again.num_cached_tokens == 4 * cached


def test_a_launch_that_fails_hurts_its_own_requests() -> None:
    """Not one whose last token is in flight, in the step before."""
    engine, _plans = run_ahead()
    engine.add_request(A, greedy(9), "a")
    engine.add_request(B, greedy(3), "b")
    for _ in range(3):
        engine.step()
    engine.add_request(C, greedy(9), "c")
    launch = engine.executor.launch

    def fail(plan: StepPlan) -> Any:
        engine.executor.launch = launch  # type: ignore[method-assign]
        assert [one.request_id for one in plan.scheduled] == ["a-0", "c-0"]
        raise RuntimeError("the device is on fire")

    engine.executor.launch = fail  # type: ignore[method-assign]
    outputs = finish(engine)
    reasons = {n: one.outputs[0].finish_reason for n, one in outputs.items()}
    assert reasons == {"a": "error", "b": "length", "c": "error"}
    assert tokens_of(outputs["a"]) == get_alone(A, greedy(9))[:2]
    assert tokens_of(outputs["b"]) == get_alone(B, greedy(3))
    check_empty(engine)


def test_a_read_that_fails_hurts_the_requests_of_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not one that has joined in the step after it."""
    engine, plans = run_ahead()
    engine.add_request(A, greedy(9), "a")
    for _ in range(3):
        engine.step()
    engine.add_request(B, greedy(9), "b")
    read = InFlightStep.read

    def fail(step: InFlightStep) -> Any:
        monkeypatch.setattr(InFlightStep, "read", read)
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(InFlightStep, "read", fail)
    assert [one.request_id for one in engine.step()] == ["a"]
    assert [one.request_id for one in plans[-1].scheduled] == ["a-0", "b-0"]
    check_integrity(engine)
    outputs = finish(engine)
    assert outputs["b"].outputs[0].finish_reason == "length"
    assert tokens_of(outputs["b"]) == get_alone(B, greedy(9))
    check_empty(engine)


def test_a_scheduler_that_fails_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = run_ahead()
    engine.add_request(A, greedy(9), "a")
    for _ in range(3):
        engine.step()
    schedule = engine.scheduler.schedule

    def fail() -> Any:
        monkeypatch.setattr(engine.scheduler, "schedule", schedule)
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.scheduler, "schedule", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        engine.step()
    assert not engine._table.in_flight
    assert tokens_of(finish(engine)["a"]) == get_alone(A, greedy(9))


def test_a_draw_that_is_not_finite_ends_its_request_and_names_no_block() -> None:
    """The step after it ran a token that nobody drew."""
    engine, plans = run_ahead(block_size=1, max_model_len=64)
    sampler = get_runner(engine).sampler
    sample, calls = sampler.sample, iter(range(100))

    def spoil(logits: Any, metadata: Any) -> Any:
        token_ids, logprobs = sample(logits, metadata)
        return (token_ids - 10_000 * (next(calls) == 2), logprobs)

    sampler.sample = spoil
    engine.add_request(A, greedy(9), "a")
    outputs = finish(engine)
    assert outputs["a"].outputs[0].finish_reason == "error"
    assert "NaN" in str(outputs["a"].error)
    assert tokens_of(outputs["a"]) == get_alone(A, greedy(9))[:2]
    assert count_tokens(plans) == len(A) + 3
    assert engine.stats().num_cached_blocks == len(A) + 2
    check_empty(engine)


# --- Several callers ------------------------------------------------------------------


def record_steps(engine: LLMEngine) -> list[set[int]]:
    """For each step, the first prompt tokens of the requests that ran in it."""
    steps: list[set[int]] = []
    first_of: dict[str, int] = {}
    launch = engine.executor.launch

    def launch_and_record(plan: StepPlan) -> Any:
        for request in plan.new_requests:
            first_of[request.request_id] = request.token_ids[0]
        steps.append({first_of[one.request_id] for one in plan.scheduled})
        return launch(plan)

    engine.executor.launch = launch_and_record  # type: ignore[method-assign]
    return steps


def test_a_stream_beside_generate_shares_its_steps() -> None:
    engine = make_engine(max_model_len=128)
    steps = record_steps(engine)
    stream = engine.stream([100, 7], greedy(60))
    seen = [next(stream)]  # it runs before the other begins
    results: list[RequestOutput] = []
    other = threading.Thread(
        target=lambda: results.extend(
            engine.generate([[200, 8], [300, 9]], greedy(30), use_tqdm=False)
        )
    )
    other.start()
    seen += list(stream)
    other.join()
    assert seen[-1].finished and len(results) == 2
    shared = [step for step in steps if {100, 200, 300} <= step]
    assert len(shared) == 30, "each of the other's tokens came in a step of the stream"
    assert len(steps) == 60
    check_empty(engine)


def test_two_threads_share_the_batch() -> None:
    """Each gets its own results, in far fewer steps than one after the other."""
    engine = make_engine(8 * 168, max_model_len=168)
    steps, num_rounds = record_steps(engine), 6
    items = [make_item(number, small=True) for number in range(12)]
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def use(own: list[Any]) -> None:
        try:
            for _ in range(num_rounds):
                start.wait()
                outputs = engine.generate(
                    [item.prompt for item in own],
                    [item.params for item in own],
                    use_tqdm=False,
                )
                for item, output in zip(own, outputs, strict=True):
                    check_result(item, output)
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [
        threading.Thread(target=use, args=(own,)) for own in (items[:6], items[6:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    owners = [{item.prompt[0] for item in own} for own in (items[:6], items[6:])]
    shared = sum(bool(step & owners[0]) and bool(step & owners[1]) for step in steps)
    assert shared > len(steps) / 3
    check_empty(engine)


# --- Bugs that others shipped ---------------------------------------------------------


def test_bug_a_prefix_entered_before_its_keys_were_written() -> None:
    engine = make_engine(512, max_model_len=128, block_size=4)
    model, launch, plans = CacheModel(engine), engine.executor.launch, []

    def launch_and_check(plan: StepPlan) -> Any:
        model.take(plan)
        plans.append(plan)
        return launch(plan)

    engine.executor.launch = launch_and_check  # type: ignore[method-assign]
    prompt = list(range(10, 31))
    for _ in range(3):
        engine.add_request(prompt, greedy(4))
    outputs = finish(engine)
    assert [len(plan.new_requests) for plan in plans[:2]] == [1, 2]
    assert [one.num_computed_tokens for one in plans[1].new_requests] == [20, 20]
    first, *others = [one.outputs[0].token_ids for one in outputs.values()]
    assert others == [first, first]


def make_plan(engine: LLMEngine, name: str, tokens: list[int], **options: Any) -> Any:
    """A request that starts on the runner with its blocks."""
    params = options.pop("params", greedy(50))
    blocks = options.pop("blocks")
    request = NewRequest(
        request_id=name,
        token_ids=tokens,
        num_prompt_tokens=options.pop("num_prompt_tokens", len(tokens)),
        params=params,
    )
    scheduled = [ScheduledRequest(name, len(tokens), blocks)]
    return StepPlan(scheduled, [request], options.pop("finished", []))


def draw(engine: LLMEngine, plan: StepPlan) -> dict[str, int]:
    output = engine.executor.launch(plan).read()
    return {name: token.token_id for name, token in output.tokens.items()}


def get_alone(tokens: list[int], params: SamplingParams) -> list[int]:
    engine = make_engine(scheduler="fcfs")
    return engine.generate(tokens, params, use_tqdm=False)[0].outputs[0].token_ids


def test_bug_a_freed_row_reused_while_a_step_still_read_it() -> None:
    engine = make_engine(max_num_seqs=1)
    handle = engine.executor.launch(
        make_plan(engine, "a", [10, 11, 12], blocks=[0], params=greedy(5, logprobs=1))
    )
    later = make_plan(engine, "b", [20, 21], blocks=[1], finished=["a"])
    handles = [handle, engine.executor.launch(later)]
    read = [one.read().tokens for one in handles]
    assert [list(tokens) for tokens in read] == [["a"], ["b"]]
    assert read[0]["a"].token_id == get_alone([10, 11, 12], greedy(1))[0]
    assert read[0]["a"].logprobs and read[1]["b"].logprobs is None
    assert read[1]["b"].token_id == get_alone([20, 21], greedy(1))[0]


@pytest.mark.parametrize("block_size", [4, 16])
def test_bug_eviction_with_more_than_one_token_per_block(block_size: int) -> None:
    """What is evicted is run again, what is not is found, and both come out the same."""
    engine = make_engine(128, max_model_len=128, block_size=block_size)
    model, launch = CacheModel(engine), engine.executor.launch

    def launch_and_check(plan: StepPlan) -> Any:
        model.take(plan)
        return launch(plan)

    engine.executor.launch = launch_and_check  # type: ignore[method-assign]
    rng = random.Random(1)
    shared = list(range(10, 58))
    for _ in range(12):
        rest = [rng.randrange(4, 2000) for _ in range(rng.randint(1, 60))]
        prompt = shared[: rng.randint(0, 48)] + rest
        name = engine.add_request(prompt, greedy(8))
        output = finish(engine)[name]
        assert output.outputs[0].token_ids == get_alone(prompt, greedy(8))
        model.chains.clear()
    assert engine.stats().num_prefix_hits


def test_bug_a_length_rounded_up_past_the_limit() -> None:
    engine = make_engine(64, max_model_len=37, block_size=16)
    [output] = engine.generate(
        list(range(5, 35)), SamplingParams(max_tokens=None, ignore_eos=True), False
    )
    assert len(output.outputs[0].token_ids) == 7
    assert output.outputs[0].finish_reason == "length"


def test_bug_a_prompt_longer_than_the_limit_dies_at_work() -> None:
    engine = make_engine(64, max_model_len=37, block_size=16)
    for length in (37, 38, 48, 500):
        with pytest.raises(ValueError, match="37"):
            engine.add_request([7] * length)
    assert not engine.has_unfinished_requests()
    [output] = engine.generate([7] * 36, greedy(5), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
    check_empty(engine)


def test_bug_one_eos_id_only() -> None:
    model, _, tokenizer = schedules.get_models()
    prompts = [[10, 11, 12], [30, 31, 32, 33]]
    alone = [get_alone(prompt, greedy(12)) for prompt in prompts]
    ends = [tokens[5] for tokens in alone]
    engine = LLMEngine(
        model,
        tokenizer,
        GenerationConfig(eos_token_id=[tokenizer.eos_token_id, *ends]),
        max_model_len=64,
    )
    outputs = engine.generate(
        prompts, SamplingParams(temperature=0, max_tokens=12), False
    )
    for output, tokens in zip(outputs, alone, strict=True):
        first = min(tokens.index(end) for end in ends if end in tokens)
        assert output.outputs[0].token_ids == tokens[: first + 1]
        assert output.outputs[0].finish_reason == "stop"


def test_bug_penalties_forgotten_by_a_request_that_sat_out_a_step() -> None:
    params = greedy(8, frequency_penalty=2.0, repetition_penalty=1.3)
    expected = get_alone([10, 11, 12], params)
    assert expected != get_alone([10, 11, 12], greedy(8))
    engine = make_engine(max_num_seqs=4)
    plan = make_plan(engine, "a", [10, 11, 12], blocks=[3], params=params)
    drawn = [draw(engine, plan)["a"]]
    draw(engine, make_plan(engine, "b", [10, 11, 12], blocks=[5]))
    for turn in range(7):
        drawn.append(draw(engine, StepPlan([ScheduledRequest("a", 1)]))["a"])
        if turn % 2:
            draw(engine, StepPlan([ScheduledRequest("b", 1)]))
    assert drawn == expected


def test_bug_the_old_block_table_read_by_a_batch_with_the_same_ids() -> None:
    """The same id, row and number of blocks after a preemption, but other blocks."""
    tokens = list(range(10, 30))
    expected = get_alone(tokens, greedy(6))
    engine = make_engine(max_num_seqs=2, block_size=16)
    drawn = [draw(engine, make_plan(engine, "a", tokens, blocks=[0, 1]))["a"]]
    drawn += [draw(engine, StepPlan([ScheduledRequest("a", 1)]))["a"] for _ in "12"]
    for pair in get_runner(engine).kv_caches:
        for tensor in pair:
            tensor[:2] = float("nan")
    again = make_plan(
        engine,
        "a",
        tokens + drawn,
        blocks=[7, 4],
        finished=["a"],
        num_prompt_tokens=len(tokens),
    )
    drawn.append(draw(engine, again)["a"])
    drawn += [draw(engine, StepPlan([ScheduledRequest("a", 1)]))["a"] for _ in "12"]
    assert drawn == expected
