"""Random traffic for an engine, what must come of it, and what must hold after each step."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from types import CodeType, FrameType
from typing import Any

import models
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import folo_lib
from folo_lib import LLMEngine, RequestOutput, SamplingParams, bundled_model_path
from folo_lib.checkpoint import load_tokenizer
from folo_lib.kv_cache import kv_bytes_per_token
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.request import Request, RequestStatus
from folo_lib.runner import InFlightStep, StepPlan
from folo_lib.sampler import gumbel_noise

LONGEST = 600 + 512
"""Prompt and output of the longest item."""

IS_SOAK = "FOLO_SOAK_MINUTES" in os.environ
"""Whether `make soak` runs, which tries more of everything."""


Models = tuple[Qwen3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase]


def make_models(**changes: Any) -> Models:
    """A small random Qwen3, Hugging Face's with the same weights, and the bundled tokenizer.

    Its config has these changes. Its logits are spread widely, so that the context decides what is
    drawn, and not the noise alone.
    """
    tokenizer = load_tokenizer(bundled_model_path())
    config = models.make_config(
        "qwen3 6/3 untied",
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        **changes,
    )
    theirs = models.make_reference(config, "sdpa")
    theirs.lm_head.weight.mul_(4)
    return models.load(config, theirs, "torch_ragged"), theirs, tokenizer


@cache
def get_models() -> Models:
    """Those of all schedules."""
    return make_models()


def make_engine(num_tokens: int = 2 * LONGEST, **options: Any) -> LLMEngine:
    """An engine whose cache holds `num_tokens`, and is full of NaN."""
    model, _, tokenizer = get_models()
    size = kv_bytes_per_token(model.config, torch.float32)
    options = {"max_model_len": min(num_tokens, LONGEST)} | options
    engine = LLMEngine(
        model, tokenizer, kv_cache_memory_bytes=num_tokens * size, **options
    )
    for pair in get_runner(engine).kv_caches:
        for tensor in pair:
            tensor.fill_(float("nan"))
    return engine


def get_runner(engine: LLMEngine) -> Any:
    return engine.executor.worker.runner


# --- Items: what may be asked of an engine, and what comes of it alone ----------------


@dataclass(frozen=True)
class Item:
    """A request that many schedules share; what it gives alone is worked out once."""

    number: int
    small: bool
    prompt: list[int]
    params: SamplingParams


def draw_size(rng: random.Random, low: int, high: int) -> int:
    """From low to high; each doubling is as likely as the next."""
    return min(high, int(low * ((high + 1) / low) ** rng.random()))


@cache
def make_item(number: int, small: bool = False) -> Item:
    """Item `number`, the same each time. One in two begins as others do."""
    rng = random.Random(f"{number} {small}")
    longest, budget = (120, 40) if small else (600, 512)
    families = random.Random(0)
    shared = [[families.randrange(4, 2000) for _ in range(600)] for _ in range(3)]
    length = draw_size(rng, 1, longest)
    num_shared = rng.randint(0, length) if rng.random() < 0.6 else 0
    prompt = rng.choice(shared)[:num_shared]
    prompt += [rng.randrange(4, 2000) for _ in range(length - num_shared)]
    max_tokens = draw_size(rng, 8, budget)
    options: dict[str, Any] = {"temperature": 0, "seed": rng.randrange(2**40)}
    if rng.random() < 0.6:
        options |= {
            "temperature": rng.choice([0.6, 1.0, 1.4]),
            "top_k": rng.choice([0, 0, 5, 50]),
            "top_p": rng.choice([1, 1, 0.9]),
            "min_p": rng.choice([0, 0, 0.02]),
            "n": rng.choice([1, 1, 1, 2, 3]) if max_tokens < 100 else 1,
        }
    if rng.random() < 0.5:
        options["repetition_penalty"] = rng.choice([1, 1.3])
        options["presence_penalty"] = rng.choice([0, 0.8])
        options["frequency_penalty"] = rng.choice([0, 0.4])
    if rng.random() < 0.4:
        options["stop_token_ids"] = rng.sample(range(2000), 40)
        options["min_tokens"] = rng.choice([0, 5])
    if rng.random() < 0.3:
        options["stop"] = rng.sample(["ing", "e ", " she", "ar", "qu", "oo"], 2)
        options["include_stop_str_in_output"] = rng.random() < 0.3
    known = {one.name for one in fields(SamplingParams)}
    if rng.random() < 0.15 and "logit_bias" in known:
        options["logit_bias"] = {i: rng.uniform(-4, 4) for i in range(20, 60)}
    if rng.random() < 0.1 and "allowed_token_ids" in known:
        options["allowed_token_ids"] = sorted(rng.sample(range(2000), 300))
    options |= {
        "logprobs": rng.choice([None, None, 0, 3]),
        "prompt_logprobs": rng.choice([None, None, None, 0, 2]),
        "ignore_eos": rng.random() < 0.5,
    }
    return Item(number, small, prompt, SamplingParams(max_tokens=max_tokens, **options))


@cache
def run_alone(number: int, small: bool = False) -> RequestOutput:
    """The item alone in a fresh engine, step by step as Hugging Face would have it."""
    item = make_item(number, small)
    engine = make_engine(scheduler="fcfs", max_num_seqs=1)
    [alone] = engine.generate(item.prompt, item.params, use_tqdm=False)
    assert not alone.error
    for sample in alone.outputs:
        check_drawn(item, sample)
    return alone


# --- What may be drawn: the reference of the course for near-ties ---------------------

MARGIN = 2e-4
"""Ten times the error of our logits, which `measure_error` measures."""


def measure_error(engine: LLMEngine) -> list[float]:
    """A list that fills with how far each step's logits are from Hugging Face's.

    Requests that draw must be in `engine._table`.
    """
    errors: list[float] = []
    runner = get_runner(engine)
    launch, sample = runner.launch, runner.sampler.sample
    seen: list[Tensor] = []

    def sample_and_note(logits: Tensor, metadata: Any) -> Any:
        seen.append(logits.clone())
        return sample(logits, metadata)

    def launch_and_compare(plan: StepPlan) -> InFlightStep:
        handle: InFlightStep = launch(plan)
        for row, state in enumerate(handle.drawing):
            request = engine._table.unfinished[state.request.request_id]
            exact = get_logits(request.get_token_ids())[-1]
            errors.append((seen[-1][row] - exact).abs().max().item())
        return handle

    runner.sampler.sample, runner.launch = sample_and_note, launch_and_compare
    return errors


def get_logits(token_ids: Sequence[int]) -> Tensor:
    """`[T, V]` of Hugging Face."""
    with torch.inference_mode():
        return get_models()[1](torch.tensor([token_ids])).logits[0]


def may_be_drawn(
    logits: Tensor, item: Item, sample: Any, place: int
) -> tuple[bool, float]:
    """Whether a token of a sample is the one to draw, or as good as that.

    Penalties, filters and noise written out for a single row, in float64. A token within
    the error of a filter's edge may count as kept or as dropped.

    Args:
        logits: `[V]`, of Hugging Face after the prompt and `place` tokens.
        item: the request.
        sample: of its output.
        place: of the token in the output.

    Returns:
        The answer, and by how much another token was better: at most 0 without a tie.
    """
    params, output = item.params, sample.token_ids[:place]
    scores, token = logits.double().clone(), sample.token_ids[place]
    if bias := getattr(params, "logit_bias", None):
        for i, value in bias.items():
            scores[i] += value
    if allowed := getattr(params, "allowed_token_ids", None):
        others = torch.ones(len(scores), dtype=torch.bool)
        others[list(allowed)] = False
        scores[others] = -torch.inf
    if place < params.min_tokens:
        stops = [*(params.stop_token_ids or ())]
        if not params.ignore_eos:
            stops += get_eos(make_engine_once())
        scores[stops] = -torch.inf
    if (factor := params.repetition_penalty) != 1:
        seen = list({*item.prompt, *output})
        some = scores[seen]
        scores[seen] = torch.where(some > 0, some / factor, some * factor)
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = zip(*Counter(output).items(), strict=True)
        times = torch.tensor(counts).double() * params.frequency_penalty
        scores[list(ids)] -= params.presence_penalty + times
    error = MARGIN / 2  # of each of two logits
    surely = torch.ones(len(scores), dtype=torch.bool)
    perhaps = surely.clone()
    if params.temperature > 0:
        scores, error = scores / params.temperature, error / params.temperature
        if params.min_p > 0:
            edge = scores.max() + torch.tensor(params.min_p).double().log()
            surely, perhaps = keep(scores, edge, 2 * error + 2e-6, surely, perhaps)
        if params.top_k > 0:
            few = scores.masked_fill(~perhaps, -torch.inf)
            edge = few.topk(min(params.top_k, len(few))).values[-1]
            surely, perhaps = keep(scores, edge, 2 * error, surely, perhaps)
        if params.top_p < 1:
            few = scores.masked_fill(~perhaps, -torch.inf)
            ordered, ids = few.softmax(-1).sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            at = int((before < params.top_p - 1e-5).sum()) - 1
            low = int((before < params.top_p + 1e-5).sum()) - 1
            edges = few[ids[at]], few[ids[low]]
            surely = surely & (scores >= edges[0] + 2 * error)
            surely[ids[0]] = True
            perhaps = perhaps & (scores >= edges[1] - 2 * error)
        position = torch.tensor([len(item.prompt) + place])
        seed = (sample.seed + 2**63) % 2**64 - 2**63
        numbers = torch.tensor([seed]), torch.tensor([sample.index]), position
        scores = scores + gumbel_noise(*numbers, len(scores))[0].double()
        error += 1e-5  # noise is float32
    best = scores.masked_fill(~surely, -torch.inf).max()
    behind = (best - scores[token]).item()
    return bool(perhaps[token]) and behind <= 2 * error, behind


def keep(
    scores: Tensor, edge: Tensor, error: float, surely: Tensor, perhaps: Tensor
) -> tuple[Tensor, Tensor]:
    return surely & (scores >= edge + error), perhaps & (scores >= edge - error)


@cache
def make_engine_once() -> LLMEngine:
    return make_engine(scheduler="fcfs", max_num_seqs=1)


def get_eos(engine: LLMEngine) -> list[int]:
    group = engine.processor.process_request([5], SamplingParams(), None)
    return list(group[0].eos_token_ids)


def check_drawn(item: Item, sample: Any) -> None:
    """Each token of a sample is what Hugging Face's logits give, its tokens fed to both."""
    first = len(item.prompt)
    logits = get_logits(item.prompt + sample.token_ids)
    for place in range(len(sample.token_ids)):
        fine, behind = may_be_drawn(logits[first - 1 + place], item, sample, place)
        assert fine, (
            f"{item}: token {place} of sample {sample.index} is behind by {behind:.1e}"
        )
    for place, entries in enumerate(sample.logprobs or []):
        exact = logits[first - 1 + place].double().log_softmax(-1)
        check_logprobs(entries, exact, sample.token_ids[place])


def check_logprobs(entries: Any, exact: Tensor, token_id: int) -> None:
    assert next(iter(entries)) == token_id
    for i, one in entries.items():
        assert abs(one.logprob - exact[i].item()) < 2e-4


def check_result(item: Item, output: RequestOutput, exact: bool = True) -> int:
    """Compares what an item gave in company with what it gave alone.

    Returns:
        How many of its samples went another way after a near-tie.
    """
    alone, num_ties = run_alone(item.number, item.small), 0
    assert not output.error, output.error
    assert len(output.outputs) == len(alone.outputs)
    for ours, its in zip(output.outputs, alone.outputs, strict=True):
        assert (ours.index, ours.seed) == (its.index, its.seed)
        if ours.token_ids != its.token_ids:
            check_drawn(item, ours)  # raises, unless each step of it is exempt
            num_ties += 1
            continue
        assert ours.text == its.text
        assert (ours.finish_reason, ours.stop_reason) == (
            its.finish_reason,
            its.stop_reason,
        )
        for one, other in zip(ours.logprobs or [], its.logprobs or [], strict=True):
            check_close(one, other)
    theirs = alone.prompt_logprobs
    assert (output.prompt_logprobs is None) == (theirs is None)
    for one, other in zip(output.prompt_logprobs or [], theirs or [], strict=True):
        check_close(one, other)
    return num_ties


def check_close(one: Any, other: Any) -> None:
    """Two entries of log-probabilities are equal but for rounding."""
    assert (one is None) == (other is None)
    if one is not None:
        shared = one.keys() & other.keys()
        assert next(iter(one)) == next(iter(other))
        assert (
            len(one) == len(other) and len(shared) >= len(one) - 1
        )  # a tie at the end
        for i in shared:
            assert abs(one[i].logprob - other[i].logprob) < 2e-4


def check_cut_short(item: Item, output: RequestOutput) -> None:
    """An item that was aborted, or that failed, has the beginning of what it gives alone."""
    alone = run_alone(item.number, item.small)
    for ours, its in zip(output.outputs, alone.outputs, strict=True):
        assert ours.finish_reason is not None
        tokens = [i for i in ours.token_ids if i >= 0]
        if tokens != its.token_ids[: len(tokens)]:
            ours.token_ids = tokens
            check_drawn(item, ours)


# --- What must hold after each step ---------------------------------------------------


def check_integrity(engine: LLMEngine) -> None:
    """Recounts blocks, rows and queues from the requests that are unfinished."""
    scheduler, table = engine.scheduler, engine._table
    requests = list(table.unfinished.values())
    assert all(not request.status.is_finished for request in requests)
    assert sorted(id(r) for r in [*scheduler.running, *scheduler.waiting]) == sorted(
        map(id, requests)
    ), "each unfinished request waits or runs, once"
    num_in_flight: Counter[Request] = Counter()
    for step, starts in table.in_flight:
        drawing = {state.request.request_id for state in step.drawing}
        for request, num_starts in starts.items():
            is_current = request.num_starts == num_starts
            num_in_flight[request] += is_current and request.sample_id in drawing
    assert len(table.in_flight) <= table.num_ahead
    assert table.unfinished or not table.in_flight, "of nobody"
    for request in scheduler.running:
        assert request.status is RequestStatus.RUNNING
        end = request.num_tokens + num_in_flight[request]
        assert 0 < request.num_computed_tokens < end
        left = end - (end == len(request.prompt_token_ids) + request.max_tokens)
        assert request.num_uncomputed_tokens == left - request.num_computed_tokens
        most = len(request.prompt_token_ids) + request.max_tokens - 1
        assert request.num_computed_tokens <= most, "a token runs that is the last"
        held = len(request.block_ids) * scheduler.block_size
        assert 0 <= held - request.num_computed_tokens < scheduler.block_size
    for request in scheduler.waiting:
        assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        assert not request.block_ids and request.num_computed_tokens == 0
        assert not num_in_flight[request]
    if not getattr(scheduler.kv_cache, "enable_prefix_caching", False):
        # Nobody waits for what another writes, so they run in the order of arrival.
        assert scheduler.running == requests[: len(scheduler.running)], "overtaken"
    check_blocks(scheduler.kv_cache, requests)
    check_rows(engine)


def check_plan(engine: LLMEngine, plan: StepPlan) -> None:
    """A plan keeps to the limits, and says what is new once."""
    scheduler, names = engine.scheduler, [one.request_id for one in plan.scheduled]
    rows = get_runner(engine).rows
    assert names or (engine._table.num_ahead and not plan.new_requests)
    assert len(set(names)) == len(names)
    assert all(one.num_tokens > 0 for one in plan.scheduled)
    total = sum(one.num_tokens for one in plan.scheduled)
    assert total <= scheduler.max_num_batched_tokens, f"{total} tokens in a step"
    assert len(names) <= len(rows.block_table)
    known = rows.by_id.keys() - set(plan.finished_ids)
    new = {one.request_id for one in plan.new_requests}
    assert new <= set(names) and known.isdisjoint(new)
    assert set(names) <= known | new


def check_blocks(manager: Any, requests: Sequence[Request]) -> None:
    """Every block is free or held by the right number; what can be found is written."""
    held: Counter[int] = Counter()
    for request in requests:
        assert len(set(request.block_ids)) == len(request.block_ids)
        held.update(request.block_ids)
    if hasattr(manager, "check_integrity"):
        manager.check_integrity(requests)
    stats = manager.num_used_blocks
    assert stats == len(held), f"{stats} blocks in use, {len(held)} held"
    if not hasattr(manager, "pool"):
        assert sorted([*manager.free_blocks, *held]) == list(range(manager.num_blocks))
        return
    counts, free, hash_of, block_of = read_books(manager.pool)
    size, expected = manager.block_size, [0] * manager.num_blocks
    for block_id, count in held.items():
        expected[block_id] = count
    assert counts == expected, "references"
    assert len(free) == manager.num_blocks - len(held) and held.keys().isdisjoint(free)
    assert len(set(free)) == len(free)
    assert {block_id: name for name, block_id in block_of.items()} == hash_of
    assert not manager.pending
    assert len(getattr(manager, "num_named", ())) <= len(requests)
    tokens_of: dict[int, tuple[int, ...]] = {}
    for request in requests:
        token_ids = tuple(request.get_token_ids())
        for i, block_id in enumerate(request.block_ids):
            end = (i + 1) * size
            if block_id in hash_of:
                assert end <= request.num_computed_tokens, "found before it is written"
                assert end <= request.num_tokens, "found before it is known"
                assert request.block_hashes[i] == hash_of[block_id]
            if held[block_id] > 1:  # shared: of the same tokens
                own = token_ids[:end]
                assert tokens_of.setdefault(block_id, own) == own


def read_books(pool: Any) -> tuple[list[int], list[int], dict[int, bytes], Any]:
    """Of a block pool: counts, free blocks, the hash of a block and the block of a hash."""
    free = [*pool.empty, *pool.evictable]
    return pool.ref_counts, free, pool.block_hashes, pool.cached_blocks


def check_rows(engine: LLMEngine) -> None:
    """Every row of the runner is free or held once, and knows what the scheduler knows."""
    rows, scheduler = get_runner(engine).rows, engine.scheduler
    taken = [state.row for state in rows.by_id.values()]
    assert sorted([*rows.free_rows, *taken]) == list(range(rows.num_rows))
    assert len(rows.block_table) == rows.num_rows + 1  # the last is never given away
    leaving = set(scheduler.finished_ids)
    for request in scheduler.running:
        assert request.sample_id not in leaving
        state = rows.by_id[request.sample_id]
        assert state.block_ids == request.block_ids
        assert state.num_computed_tokens == request.num_computed_tokens
        own = rows.block_table[state.row, : len(state.block_ids)]
        assert own.tolist() == request.block_ids
    running = {request.sample_id for request in scheduler.running}
    assert rows.by_id.keys() - running <= leaving, "rows of requests that have ended"


def check_empty(engine: LLMEngine) -> None:
    """Nothing is left of what an engine has done, but for the blocks it remembers."""
    check_integrity(engine)
    assert not engine.has_unfinished_requests()
    assert not engine._table.groups and not engine._table.unfinished
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)


def poison_free_blocks(engine: LLMEngine) -> None:
    """NaN into each block that nobody has and that cannot be found: nobody may read it."""
    _, free, hash_of, _ = read_books(engine.scheduler.kv_cache.pool)
    index = torch.tensor([i for i in free if i not in hash_of], dtype=torch.int64)
    for pair in get_runner(engine).kv_caches:
        for tensor in pair:
            tensor.index_fill_(0, index.to(tensor.device), float("nan"))


# --- A schedule -----------------------------------------------------------------------


@dataclass
class Arrival:
    """An item, the step at which it comes, and what happens to it.

    Attributes:
        abort_after: steps after which it is aborted.
        fails_at: the token at which its detokenizer raises.
    """

    item: Item
    step: int
    abort_after: int | None = None
    fails_at: int | None = None


@dataclass
class Schedule:
    """Traffic and an engine for it, all drawn from one seed.

    Attributes:
        seed: of all that follows.
        small: whether all of its items are.
        run_ahead: whether steps are launched before the last one is read.
        arrivals: in the order in which they come.
        options: of the engine.
        num_tokens: that its cache holds.
        broken_launches: by number, whether they raise before or after the model ran.
        spoiled_draws: launches of which one row draws nothing.
    """

    seed: int
    small: bool = False
    run_ahead: bool = False
    arrivals: list[Arrival] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 0
    broken_launches: dict[int, str] = field(default_factory=dict)
    spoiled_draws: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        share = 0.0 if self.small else rng.choice([0, 0.15, 0.15, 0.15, 1])
        num_requests, spread = draw_size(rng, 2, 24), rng.choice([0, 10, 60])
        is_rough = rng.random() < 0.5
        for _ in range(num_requests):
            is_small = rng.random() >= share
            number = rng.randrange(60 if is_small else 160)
            item = make_item(number, is_small)
            arrival = Arrival(item, rng.randint(0, spread))
            if is_rough and rng.random() < 0.15:
                arrival.abort_after = rng.randint(0, 50)
            if is_rough and rng.random() < 0.15:
                arrival.fails_at = rng.randint(1, 20)
            self.arrivals.append(arrival)
        self.arrivals.sort(key=lambda one: one.step)
        if is_rough:
            for _ in range(rng.randint(0, 2)):
                where = rng.choice(["before", "after"])
                self.broken_launches[rng.randint(0, 80)] = where
            self.spoiled_draws = {rng.randint(0, 80) for _ in range(rng.randint(0, 2))}
        longest = max(
            len(one.item.prompt) + (one.item.params.max_tokens or 0)
            for one in self.arrivals
        )
        size = rng.choice([1, 4, 16])
        blocks = -(-longest // size)
        self.num_tokens = size * int(blocks * rng.choice([1, 1, 1.2, 2, 6]))
        self.options = {
            "block_size": size,
            "max_model_len": longest,
            "max_num_batched_tokens": rng.choice([16, 64, 256, 2048]),
            "max_num_seqs": rng.choice([2, 4, 8, 32, 32]),
            "enable_prefix_caching": rng.random() < 0.7,
            "async_scheduling": self.run_ahead,
        }

    def run(self, check: Callable[[LLMEngine], None] = check_integrity) -> Counter[str]:
        """Runs it, and checks the engine after each step and each result at the end."""
        engine = make_engine(self.num_tokens, **self.options)
        spoiler = Spoiler(engine, self)
        expected, left = {}, self.arrivals[::-1]
        outputs: dict[str, RequestOutput] = {}
        deadlines: dict[str, int] = {}
        step = 0
        while left or engine.has_unfinished_requests():
            while left and left[-1].step <= step:
                arrival = left.pop()
                name = engine.add_request(arrival.item.prompt, arrival.item.params)
                expected[name] = arrival
                if arrival.fails_at is not None:
                    spoiler.break_detokenizer(name, arrival.fails_at)
                if arrival.abort_after is not None:
                    deadlines[name] = step + arrival.abort_after
            for name in [name for name, at in deadlines.items() if at <= step]:
                engine.abort_request(name)
                del deadlines[name]
            try:
                news = engine.step()
            except RuntimeError:  # it broke where it was no request's, and all go on
                assert spoiler.broken_plan is not None
                assert not spoiler.broken_plan.scheduled
                news = []
            for output in news:
                outputs[output.request_id] = output
            check(engine)
            poison_free_blocks(engine)
            step += 1
            assert step < 40_000, "it does not end"
        check_empty(engine)
        stats = engine.stats()
        tally = Counter(
            steps=step,
            preempted=stats.num_preemptions,
            hits=stats.num_prefix_hits,
            requests=len(expected),
        )
        for name, arrival in expected.items():
            output = outputs[name]
            reasons = {sample.finish_reason for sample in output.outputs}
            if "error" in reasons:
                assert name in spoiler.victims, output.error
                tally["errors"] += 1
                check_cut_short(arrival.item, output)
            elif "abort" in reasons:
                assert arrival.abort_after is not None
                tally["aborts"] += 1
                check_cut_short(arrival.item, output)
            else:
                tally["ties"] += check_result(arrival.item, output)
                tally["right"] += 1
        return tally


class CacheModel:
    """What each slot of a cache holds: a name for its token and all tokens before.

    A step may run tokens that are drawn and not read yet. So a slot remembers the request
    and the place, and what that token was is asked for when somebody finds it.

    Args:
        engine: whose plans it follows.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.size = engine.executor.block_size
        self.written: dict[int, tuple[Request, int]] = {}  # by slot
        self.chains: dict[Request, list[int]] = {}  # of each token that is known
        self.blocks: dict[str, list[int]] = {}  # by sample id

    def reset(self) -> None:
        """After a step that broke off."""
        self.written.clear()
        self.blocks.clear()

    def get_name(self, request: Request, place: int) -> int | None:
        """Of a token and all before it; None if it was never read."""
        chain = self.chains.setdefault(request, [])
        for token_id in request.get_token_ids()[len(chain) :]:
            chain.append(hash((chain[-1] if chain else 0, token_id)))
        return chain[place] if place < len(chain) else None

    def take(self, plan: StepPlan) -> None:
        """Checks what the plan reads without running it, then writes what it runs."""
        for name in plan.finished_ids:
            self.blocks.pop(name, None)
        start_of = {r.request_id: r.num_computed_tokens for r in plan.new_requests}
        for one in plan.scheduled:
            request = self.engine._table.unfinished[one.request_id]
            if one.request_id in start_of:
                self.blocks[one.request_id] = []
            blocks = self.blocks[one.request_id]
            blocks += one.new_block_ids
            for i in range(start_of.get(one.request_id, 0)):
                found = self.written.get(self.slot(blocks, i))
                assert found and self.get_name(*found) == self.get_name(request, i), (
                    f"{one.request_id} reads what nobody has written"
                )
        readers = Counter(i for blocks in self.blocks.values() for i in blocks)
        for one in plan.scheduled:
            request = self.engine._table.unfinished[one.request_id]
            end, blocks = request.num_computed_tokens, self.blocks[one.request_id]
            for i in range(end - one.num_tokens, end):
                slot = self.slot(blocks, i)
                assert readers[slot // self.size] == 1, "written while others read it"
                self.written[slot] = request, i

    def slot(self, blocks: list[int], place: int) -> int:
        return blocks[place // self.size] * self.size + place % self.size


class Spoiler:
    """Breaks launches, draws and detokenizers of an engine, and notes who suffers.

    Args:
        engine: to be broken.
        schedule: says at which launches.
    """

    def __init__(self, engine: LLMEngine, schedule: Schedule) -> None:
        self.engine, self.schedule = engine, schedule
        self.victims: set[str] = set()
        self.num_launches = 0
        self.cache = CacheModel(engine)
        self.launch_well, self.sample_well = (
            engine.executor.launch,
            get_runner(engine).sampler.sample,
        )
        self.spoiled_row: int | None = None
        self.broken_plan: StepPlan | None = None
        engine.executor.launch = self.launch  # type: ignore[method-assign]
        get_runner(engine).sampler.sample = self.sample

    def launch(self, plan: StepPlan) -> InFlightStep:
        number, self.num_launches = self.num_launches, self.num_launches + 1
        where = self.schedule.broken_launches.get(number)
        self.broken_plan = None if where is None else plan
        if where is not None:
            self.victims |= {get_request_id(one.request_id) for one in plan.scheduled}
        check_plan(self.engine, plan)
        self.cache.take(plan)
        if where:
            self.cache.reset()
        if where == "before":
            raise RuntimeError("out of memory, say")
        self.is_spoiled, self.spoiled_row = number in self.schedule.spoiled_draws, None
        handle = self.launch_well(plan)
        if where == "after":
            raise RuntimeError("out of memory, at last")
        if self.spoiled_row is not None:
            request = handle.drawing[self.spoiled_row].request
            self.victims.add(get_request_id(request.request_id))
        return handle

    def sample(self, logits: Tensor, metadata: Any) -> Any:
        token_ids, logprobs = self.sample_well(logits, metadata)
        if self.is_spoiled:
            self.spoiled_row = self.num_launches % len(token_ids)
            token_ids = token_ids.clone()
            token_ids[self.spoiled_row] = -1
        return token_ids, logprobs

    def break_detokenizer(self, request_id: str, token: int) -> None:
        group, _ = self.engine._table.groups[request_id]
        detokenizer, append = group[-1].detokenizer, group[-1].detokenizer.append
        left = iter(range(token))

        def append_or_raise(token_id: int) -> str | None:
            if next(left, None) is None:
                self.victims.add(request_id)
                raise UnicodeError("no such character")
            return append(token_id)

        detokenizer.append = append_or_raise


def get_request_id(sample_id: str) -> str:
    return sample_id.rpartition("-")[0]


# --- Ctrl-C -----------------------------------------------------------------------------

STAGES = {
    "schedule": "schedule",
    "launch": "launch",
    "read": "read",
    "take_outputs": "update",
    "update": "update",
    "collect": "collect",
    "add": "add",
    "abort": "abort",
}
"""Functions of an engine that a step goes through, and what they are part of."""
FOLDER = folo_lib.__path__[0]


@contextmanager
def interrupt(stage: str, line: int) -> Iterator[list[str]]:
    """Raises KeyboardInterrupt at a line of the library that one stage of a step runs.

    Args:
        stage: schedule, launch, read, update, collect, add or abort.
        line: how many lines of that stage run before.

    Yields:
        A list, which holds the place after it was raised.
    """
    left, place, inside = line, [], 0

    def is_start(code: CodeType) -> bool:
        name = code.co_qualname.split(".")
        owners = ("ContinuousScheduler", "FCFSScheduler", "GPUExecutor")
        owners += ("InFlightStep", "RequestTable", "take_outputs")
        return STAGES.get(name[-1]) == stage and name[0] in owners

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left, inside
        code = frame.f_code
        if place or not code.co_filename.startswith(FOLDER):
            return None
        if event == "call":
            if is_start(code):
                inside += 1
            return trace if inside else None
        if event == "return" and is_start(code):
            inside -= 1
        if event == "line" and inside:
            left -= 1
            if left < 0:
                place.append(f"{code.co_qualname}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield place
    finally:
        sys.settrace(before)
