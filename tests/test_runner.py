"""runner.py: steps of many requests against each request alone, without a cache."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import prepare_inputs
from models import CASES, assert_parity, load, make_config, make_reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from folo_lib import bundled_model_path, load_model
from folo_lib.config import MODEL_RUNNERS, EngineConfig
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.runner import (
    GPUExecutor,
    GPUWorker,
    InFlightStep,
    InputBatch,
    ModelRunner,
    NewRequest,
    PromptChunk,
    RequestRow,
    RequestRows,
    SampledToken,
    ScheduledRequest,
    StepOutput,
    StepPlan,
    get_copy_stream,
    lay_end_to_end,
    make_input_batch,
    to_device,
)
from folo_lib.sampler import LogprobsTensors, Sampler
from folo_lib.sampling_params import SamplingParams
from folo_lib.token_logprobs import TokenLogprobs, to_entries

GREEDY = SamplingParams(temperature=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundled() -> Qwen3ForCausalLM:
    return load_model(bundled_model_path(), device="cpu", use_tqdm=False)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


def make_model(case: str) -> Qwen3ForCausalLM:
    config = make_config(case)
    return load(config, make_reference(config), "torch_ragged")


def make_runner(
    model: Qwen3ForCausalLM,
    num_blocks: int = 64,
    block_size: int = 4,
    num_rows: int = 8,
) -> ModelRunner:
    """With a cache full of NaN, so that nothing stale may be read."""
    config = EngineConfig(block_size=block_size, max_num_seqs=num_rows)
    runner = ModelRunner(model, config)
    runner.initialize_kv_caches(num_blocks, num_blocks * block_size)
    for pair in runner.kv_caches:
        for cache in pair:
            cache.fill_(float("nan"))
    return runner


def make_request(
    name: str,
    token_ids: Sequence[int],
    params: SamplingParams = GREEDY,
    num_prompt_tokens: int | None = None,
    **fields: Any,
) -> NewRequest:
    return NewRequest(
        request_id=name,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids)
        if num_prompt_tokens is None
        else num_prompt_tokens,
        params=params,
        **fields,
    )


def run(runner: ModelRunner, *plan: Any) -> dict[str, int]:
    """The tokens that a step draws: of what is scheduled, what is new, what has ended."""
    output = runner.launch(StepPlan(*plan)).read()
    return {name: token.token_id for name, token in output.tokens.items()}


def last_logits(runner: ModelRunner, plan: StepPlan) -> Tensor:
    """`[B, V]`, where the tokens of each request end in this step."""
    batch = prepare_inputs(runner, plan)
    hidden = runner.model(batch.input_ids, batch.positions, runner.kv_caches, batch)
    return runner.model.compute_logits(hidden[batch.query_start_loc[1:] - 1])


def uncached(model: Qwen3ForCausalLM, tokens: Sequence[int]) -> Tensor:
    return model.compute_logits(model(torch.tensor(tokens)))


def random_tokens(model: Qwen3ForCausalLM, length: int) -> list[int]:
    tokens: list[int] = torch.randint(model.config.vocab_size, (length,)).tolist()
    return tokens


class TestPlans:
    def make_plan(self, context: int, block_size: int = 16) -> StepPlan:
        """What a scheduler says when a request writes its next token."""
        place = context - 1
        new = [place // block_size] if place % block_size == 0 else []
        return StepPlan([ScheduledRequest("A", 1, new)])

    def test_are_as_large_at_every_context(self) -> None:
        sizes = {n: len(pickle.dumps(self.make_plan(n))) for n in (10, 400, 4000)}
        assert len(set(sizes.values())) == 1, sizes
        assert sizes[10] < 250
        assert len(pickle.dumps(self.make_plan(4001))) < sizes[10] + 20  # and a block

    def test_are_plain_data(self) -> None:
        params = SamplingParams(temperature=0.5, logprobs=2)
        request = make_request("A", [1, 2, 3], params, 2, bad_words_ids=((4, 5),))
        plan = StepPlan([ScheduledRequest("A", 3, [7])], [request], ["B"])
        assert pickle.loads(pickle.dumps(plan)) == plan
        output = StepOutput({"A": SampledToken(3, [(3, -1.0, 1)])}, {"A": (1, [])})
        assert pickle.loads(pickle.dumps(output)) == output


class TestPrefillAndDecode:
    @pytest.mark.parametrize(
        "case",
        ["qwen3 4/1", "qwen3 6/3 untied", "qwen3 5/5 linear", "qwen2 14/2"],
    )
    @pytest.mark.parametrize("in_a_row", [True, False])
    def test_chunks_and_decode_equal_the_uncached_model(
        self, case: str, in_a_row: bool
    ) -> None:
        model = make_model(case)
        tokens = random_tokens(model, 110)
        exact = uncached(model, tokens)
        blocks = list(range(3, 31))
        if not in_a_row:
            random.Random(0).shuffle(blocks)
        for chunks in ([96], [7, 1, 32, 56], [1] * 20 + [76], [13, 83]):
            runner, end = make_runner(model), 0
            told = [make_request("x", tokens, num_prompt_tokens=96)]
            given: list[int] = []
            for length in [*chunks, *[1] * 14]:
                end += length
                new = blocks[len(given) : -(-end // 4)]  # as late as possible
                given += new
                plan = StepPlan([ScheduledRequest("x", length, new)], told)
                assert_parity(last_logits(runner, plan), exact[end - 1 : end])
                told = []

    @pytest.mark.parametrize("case", ["qwen3 14/2 untied bias", "qwen3 6/3 yarn bias"])
    def test_unequal_requests_in_one_step_equal_each_alone(self, case: str) -> None:
        model, rng = make_model(case), random.Random(1)
        sequences = [random_tokens(model, n) for n in (40, 3, 25, 1, 31)]
        exact = [uncached(model, tokens) for tokens in sequences]
        pool = list(range(64))
        rng.shuffle(pool)
        blocks = [[pool.pop() for _ in range(-(-len(s) // 4))] for s in sequences]
        runner, ends = make_runner(model), [0] * 5
        while left := [i for i in range(5) if ends[i] < len(sequences[i])]:
            chosen = rng.sample(left, rng.randint(1, len(left)))
            scheduled, told = [], []
            for i in chosen:
                most = len(sequences[i]) - ends[i]
                length = rng.choice([1, rng.randint(1, most)])
                new = [] if ends[i] else blocks[i]
                if not ends[i]:
                    told.append(make_request(f"{i}", sequences[i]))
                ends[i] += length
                scheduled.append(ScheduledRequest(f"{i}", length, new))
            logits = last_logits(runner, StepPlan(scheduled, told))
            for i, row in zip(chosen, logits, strict=True):
                assert_parity(row, exact[i][ends[i] - 1])

    def test_the_cases_are_there(self) -> None:
        ratios = {case[1] // case[2] for case in CASES.values()}
        assert {1, 2, 4, 7} <= ratios


class TestInputBatch:
    def test_lays_requests_end_to_end(self, bundled: Qwen3ForCausalLM) -> None:
        runner = make_runner(bundled)
        prompts = {"A": list(range(100, 109)), "C": [21, 22, 23, 24, 25, 26, 27]}
        prepare_inputs(
            runner,
            StepPlan(
                [ScheduledRequest("A", 9, [0, 1, 2]), ScheduledRequest("C", 4, [5, 6])],
                [make_request(name, ids) for name, ids in prompts.items()],
            ),
        )
        runner.rows.last_token_ids[runner.rows.by_id["A"].row] = 77
        batch = prepare_inputs(
            runner,
            StepPlan(
                [
                    ScheduledRequest("A", 1),
                    ScheduledRequest("B", 5, [9, 3]),
                    ScheduledRequest("C", 2),
                ],
                [make_request("B", [11, 12, 13, 14, 15])],
            ),
        )
        assert isinstance(batch, InputBatch)
        assert batch.input_ids.tolist() == [77, 11, 12, 13, 14, 15, 25, 26]
        assert batch.positions.tolist() == [9, 0, 1, 2, 3, 4, 4, 5]
        assert batch.slot_mapping.tolist() == [9, 36, 37, 38, 39, 12, 24, 25]
        assert batch.query_start_loc.tolist() == [0, 1, 6, 8]
        assert batch.seq_lens.tolist() == batch.seq_lens_list == [10, 5, 6]
        assert batch.query_lens_list == [1, 5, 2]
        assert batch.block_table.shape == (3, 3)
        assert batch.block_table[0].tolist() == [0, 1, 2]
        assert batch.block_table[1:, :2].tolist() == [[9, 3], [5, 6]]
        # C has one token of its prompt left, and draws nothing yet.
        assert [state.request.request_id for state in batch.drawing] == ["A", "B"]
        assert batch.logits_indices.tolist() == [0, 5]
        assert batch.sampling.positions.tolist() == [10, 5]

    def test_columns_are_sent_as_they_are(self) -> None:
        columns = [[1, -2], [], range(3), [2**40]]
        sent = to_device(columns, CPU)
        assert [tensor.tolist() for tensor in sent] == [list(c) for c in columns]
        assert {tensor.dtype for tensor in sent} == {torch.int64}

    def test_no_token_stands_for_one_that_only_the_device_knows(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        """Wherever it is in the step, and however many there are."""
        runner = make_runner(bundled)
        told = [make_request(n, [i + 1, i + 2]) for i, n in enumerate("ABC")]
        scheduled = [ScheduledRequest(n, 2, [i, 9 - i]) for i, n in enumerate("ABC")]
        drawn = run(runner, scheduled, told)
        told = [make_request("D", [0, 0, 5])]  # 0 is a token like any other
        names = [("C", 1), ("D", 3), ("A", 1)]
        blocks: dict[str, list[int]] = {"D": [20]}
        plan = StepPlan(
            [ScheduledRequest(n, count, blocks.get(n, [])) for n, count in names], told
        )
        runner.rows.update(plan)
        step = lay_end_to_end(runner.rows, plan, runner.config.block_size)
        assert step.input_ids == [-1, 0, 0, 5, -1]
        assert step.pending == [0, 4]
        row_of = {name: state.row for name, state in runner.rows.by_id.items()}
        assert step.pending_rows == [row_of["C"], row_of["A"]]
        batch = make_input_batch(runner.rows, step, runner.config.block_size)
        assert batch.input_ids.tolist() == [drawn["C"], 0, 0, 5, drawn["A"]]
        assert step.positions == [2, 0, 1, 2, 2]
        assert step.slots == [2 * 4 + 2, 80, 81, 82, 0 * 4 + 2]

    def test_a_table_is_of_its_step(self, bundled: Qwen3ForCausalLM) -> None:
        """The same ids and counts in other blocks; what was made before stays as it was."""
        runner, ids = make_runner(bundled), [1, 2, 3, 4, 5]
        told = [make_request("A", ids), make_request("B", ids)]

        def table(a: list[int], b: list[int]) -> Tensor:
            scheduled = [ScheduledRequest("A", 5, a), ScheduledRequest("B", 5, b)]
            return prepare_inputs(
                runner, StepPlan(scheduled, told, ["A", "B"])
            ).block_table

        first = table([0, 1], [2, 3])
        assert table([0, 1], [5, 3]).tolist() == [[0, 1], [5, 3]]
        assert first.tolist() == [[0, 1], [2, 3]]

    def test_lists_of_a_plan_are_not_kept(self, bundled: Qwen3ForCausalLM) -> None:
        """A scheduler may change the list that it handed out, and is not changed."""
        runner, blocks = make_runner(bundled), [0, 1]
        scheduled = ScheduledRequest("A", 3, blocks)
        prepare_inputs(runner, StepPlan([scheduled], [make_request("A", [1] * 7)]))
        blocks[1] = 7
        batch = prepare_inputs(runner, StepPlan([ScheduledRequest("A", 2, [6])]))
        assert batch.block_table.tolist() == [[0, 1]]
        assert batch.slot_mapping.tolist() == [3, 4]
        assert blocks == [0, 7]

    def test_a_step_that_draws_nothing(self, bundled: Qwen3ForCausalLM) -> None:
        runner = make_runner(bundled)
        told = [make_request("A", [1, 2, 3])]
        assert run(runner, [ScheduledRequest("A", 2, [0])], told) == {}

    def test_a_step_that_runs_nothing_forgets_who_has_ended(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner = make_runner(bundled)
        run(runner, [ScheduledRequest("A", 3, [0])], [make_request("A", [1, 2, 3])])
        assert run(runner, [], [], ["A"]) == {}
        assert not runner.rows.by_id


@dataclass
class Story:
    """A request in a random schedule, and what has come of it."""

    request: NewRequest
    length: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    num_drawn: int = 0  # with those that nobody has read yet
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return self.request.num_prompt_tokens + self.num_drawn - self.num_computed

    @property
    def is_done(self) -> bool:
        return self.num_drawn == self.length


class Schedule:
    """Runs requests as a scheduler might that throws dice at every step.

    Chunks of any size, any order, requests that sit out, requests that lose their blocks and
    are told again with their output, and steps that are launched before the last is read.
    """

    def __init__(self, runner: ModelRunner, rng: random.Random) -> None:
        self.runner, self.rng = runner, rng
        self.num_rows = runner.config.max_num_seqs
        self.pool = list(range(runner.kv_caches[0][0].shape[0]))
        rng.shuffle(self.pool)
        self.running: dict[str, Story] = {}
        self.in_flight: list[InFlightStep] = []
        self.stories: dict[str, Story] = {}
        self.told: list[NewRequest] = []
        self.ended: list[str] = []

    def read(self) -> None:
        output = self.in_flight.pop(0).read()
        for name, token in output.tokens.items():
            self.stories[name].tokens.append(token.token_id)
            self.stories[name].logprobs.append(token.logprobs)
        for name, (first, entries) in output.prompt_logprobs.items():
            self.stories[name].prompt_logprobs |= dict(enumerate(entries, first))

    def release(self, name: str) -> None:
        story = self.running.pop(name)
        self.pool += story.blocks
        self.rng.shuffle(self.pool)
        story.blocks, story.num_computed = [], 0
        self.ended += [name, "nobody"]

    def tell(self, story: Story) -> None:
        prompt = story.request.token_ids[: story.request.num_prompt_tokens]
        self.told.append(replace(story.request, token_ids=[*prompt, *story.tokens]))
        self.running[story.request.request_id] = story

    def take_blocks(self, story: Story, length: int) -> list[int] | None:
        size = self.runner.config.block_size
        missing = -(-(story.num_computed + length) // size) - len(story.blocks)
        if missing > len(self.pool):
            return None
        new = [self.pool.pop() for _ in range(missing)]
        story.blocks += new
        return new

    def step(self, waiting: list[Story]) -> None:
        rng = self.rng
        if self.running and rng.random() < 0.15:  # loses its blocks
            while self.in_flight:
                self.read()
            name = rng.choice(list(self.running))
            waiting.insert(0, self.running[name])
            self.release(name)
        while waiting and len(self.running) < self.num_rows and rng.random() < 0.6:
            self.tell(waiting.pop(0))
        chosen = rng.sample(list(self.running), rng.randint(0, len(self.running)))
        scheduled = []
        for name in chosen:
            story = self.running[name]
            length = rng.choice([1, rng.randint(1, story.num_left), story.num_left])
            new = self.take_blocks(story, length)
            if new is not None:
                story.num_computed += length
                story.num_drawn += story.num_left == 0
                scheduled.append(ScheduledRequest(name, length, new))
        plan = StepPlan(scheduled, self.told, self.ended)
        plan = pickle.loads(pickle.dumps(plan))
        self.told, self.ended = [], []
        self.in_flight.append(self.runner.launch(plan))
        while len(self.in_flight) > rng.randint(0, 2):
            self.read()
        for name in [name for name, story in self.running.items() if story.is_done]:
            self.release(name)

    def run(self, stories: Sequence[Story]) -> None:
        self.stories |= {story.request.request_id: story for story in stories}
        waiting = list(stories)
        while waiting or self.running:
            self.step(waiting)
        while self.in_flight:
            self.read()
        run(self.runner, [], [], self.ended)
        self.ended = []


def play_alone(model: Qwen3ForCausalLM, story: Story) -> Story:
    """The same in a fresh runner, its prompt at once and then token by token."""
    alone = Story(story.request, story.length)
    runner, name = make_runner(model, num_rows=1), story.request.request_id
    ids = story.request.token_ids
    plan = StepPlan(
        [ScheduledRequest(name, len(ids), list(range(30)))], [story.request]
    )
    for _ in range(story.length):
        output = runner.launch(plan).read()
        alone.tokens.append(output.tokens[name].token_id)
        alone.logprobs.append(output.tokens[name].logprobs)
        for first, entries in output.prompt_logprobs.values():
            alone.prompt_logprobs |= dict(enumerate(entries, first))
        plan = StepPlan([ScheduledRequest(name, 1)])
    return alone


def assert_same_logprobs(
    ours: TokenLogprobs | None, theirs: TokenLogprobs | None
) -> None:
    if ours is None or theirs is None:
        assert ours is theirs
        return
    assert [(i, rank) for i, _, rank in ours] == [(i, rank) for i, _, rank in theirs]
    values = [[value for _, value, _ in entry] for entry in (ours, theirs)]
    assert values[0] == pytest.approx(values[1], abs=2e-4)


CHOICES = [
    GREEDY,
    SamplingParams(temperature=0, frequency_penalty=1.5),
    SamplingParams(temperature=0, repetition_penalty=1.4, presence_penalty=0.7),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.95),
    SamplingParams(temperature=1.1, min_p=0.02, repetition_penalty=1.2, logprobs=2),
    SamplingParams(temperature=0.8, frequency_penalty=0.8, logprobs=0),
    SamplingParams(temperature=0, min_tokens=6, presence_penalty=-0.5),
    SamplingParams(temperature=0.7, prompt_logprobs=1, logprobs=3),
    SamplingParams(temperature=0, prompt_logprobs=0),
]


class TestSchedules:
    def make_stories(
        self, model: Qwen3ForCausalLM, rng: random.Random, count: int
    ) -> list[Story]:
        stories = []
        for i in range(count):
            ids = [rng.randrange(model.config.vocab_size) for _ in range(40)]
            request = make_request(
                f"{i}",
                ids[: rng.choice([1, 2, rng.randint(3, 40)])],
                rng.choice(CHOICES),
                seed=rng.choice([0, 1, 2**64 - 1]),
                sample_index=rng.randrange(3),
                stop_token_ids=(0, 5, 9),
            )
            stories.append(Story(request, rng.randint(1, 14)))
        return stories

    @pytest.mark.parametrize("seed", range(12))
    def test_any_schedule_equals_each_request_alone(
        self, bundled: Qwen3ForCausalLM, seed: int
    ) -> None:
        rng = random.Random(seed)
        num_rows = rng.choice([1, 2, 5])
        runner = make_runner(bundled, 16 * num_rows, rng.choice([1, 4, 16]), num_rows)
        if runner.config.block_size == 1:
            runner = make_runner(bundled, 64 * num_rows, 1, num_rows)
        stories = self.make_stories(bundled, rng, 8)
        Schedule(runner, rng).run(stories)
        for story in stories:
            alone = play_alone(bundled, story)
            assert story.tokens == alone.tokens
            for ours, theirs in zip(story.logprobs, alone.logprobs, strict=True):
                assert_same_logprobs(ours, theirs)
            assert story.prompt_logprobs.keys() == alone.prompt_logprobs.keys()
            for place, entry in story.prompt_logprobs.items():
                assert_same_logprobs(entry, alone.prompt_logprobs[place])

    def test_a_greedy_story_is_that_of_the_uncached_model(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        request = make_request("A", [5, 6, 7, 8, 9])
        alone = play_alone(bundled, Story(request, 12))
        ids = [5, 6, 7, 8, 9]
        for token in alone.tokens:
            assert token == uncached(bundled, ids)[-1].argmax()
            ids.append(token)

    def test_rows_after_500_requests_are_as_before(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner, rng = make_runner(bundled, 64, 4, 8), random.Random(3)
        rows = runner.rows
        sizes = [t.shape for t in (rows.block_table, rows.last_token_ids)]
        schedule = Schedule(runner, rng)
        stories = [
            Story(make_request(f"{i}", [i % 7, 3], rng.choice(CHOICES)), 1 + i % 2)
            for i in range(500)
        ]
        schedule.run(stories)
        assert all(len(story.tokens) == story.length for story in stories)
        assert not rows.by_id
        assert sorted(rows.free_rows) == list(range(8))
        assert sorted(schedule.pool) == list(range(64))
        assert sizes == [t.shape for t in (rows.block_table, rows.last_token_ids)]


class TestRows:
    params = SamplingParams(temperature=0, frequency_penalty=1.0)

    def counts(self, rows: RequestRows, name: str) -> dict[int, int]:
        metadata = self.look_up(rows, name)
        assert metadata.output_counts is not None
        counts = metadata.output_counts[0]
        return {int(i): int(counts[i]) for i in counts.nonzero()}

    def prompt(self, rows: RequestRows, name: str) -> set[int]:
        mask = self.look_up(rows, name).prompt_mask
        assert mask is not None
        return {int(i) for i in mask[0].nonzero()}

    def look_up(self, rows: RequestRows, name: str) -> Any:
        row = rows.by_id[name].row
        return rows.sampling.gather([row], torch.tensor([row]), torch.tensor([9]))

    def test_what_is_drawn_is_counted_and_not_the_prompt(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner = make_runner(bundled)
        told = [make_request("A", [5, 6, 5, 7], self.params)]
        drawn = [run(runner, [ScheduledRequest("A", 2, [0, 1])], told)]
        assert self.counts(runner.rows, "A") == {}
        drawn += [run(runner, [ScheduledRequest("A", 2 - (i > 0))]) for i in range(3)]
        tokens = [one["A"] for one in drawn[1:]]
        expected = {i: tokens.count(i) for i in tokens}
        assert self.counts(runner.rows, "A") == expected
        assert self.prompt(runner.rows, "A") == {5, 6, 7}

    def test_counts_stay_while_the_request_sits_out(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner = make_runner(bundled)
        told = [make_request("A", [5, 6], self.params)]
        first = run(runner, [ScheduledRequest("A", 2, [0])], told)["A"]
        told = [make_request("B", [3, 4], self.params), make_request("C", [1])]
        scheduled = [ScheduledRequest("B", 2, [5]), ScheduledRequest("C", 1, [6])]
        drawn = run(runner, scheduled, told)
        run(runner, [ScheduledRequest("C", 1)], [], ["B"])
        assert self.counts(runner.rows, "A") == {first: 1}
        assert self.prompt(runner.rows, "A") == {5, 6}
        assert set(drawn) == {"B", "C"}
        second = run(runner, [ScheduledRequest("A", 1)])["A"]
        counted = self.counts(runner.rows, "A")
        assert sum(counted.values()) == 2
        assert counted.keys() == {first, second}

    def test_a_row_shows_nothing_of_the_one_before(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner = make_runner(bundled, num_rows=1)
        for name, ids in [("A", [5, 6, 7]), ("B", [8])]:
            told = [make_request(name, ids, self.params)]
            ended = [] if name == "A" else ["A"]
            scheduled = [ScheduledRequest(name, len(ids), [0])]
            token = run(runner, scheduled, told, ended)[name]
            assert self.counts(runner.rows, name) == {token: 1}
            assert self.prompt(runner.rows, name) == set(ids)
        batch = prepare_inputs(
            runner,
            StepPlan([ScheduledRequest("C", 1, [3])], [make_request("C", [1])], ["B"]),
        )
        assert batch.sampling.output_counts is None
        assert batch.block_table.tolist() == [[3]]

    def test_one_who_comes_back_is_counted_once(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner = make_runner(bundled)
        told = [make_request("A", [5, 6], self.params)]
        tokens = [run(runner, [ScheduledRequest("A", 2, [0, 1])], told)["A"]]
        tokens += [run(runner, [ScheduledRequest("A", 1)])["A"] for _ in range(3)]
        before = self.counts(runner.rows, "A")
        again = make_request("A", [5, 6, *tokens], self.params, 2)
        assert run(runner, [ScheduledRequest("A", 3, [4])], [again], ["A"]) == {}
        assert self.counts(runner.rows, "A") == before
        assert self.prompt(runner.rows, "A") == {5, 6}
        run(runner, [ScheduledRequest("A", 3, [2])])
        assert sum(self.counts(runner.rows, "A").values()) == 5

    def test_the_last_token_is_ones_own(self, bundled: Qwen3ForCausalLM) -> None:
        """Of a request that draws in another order, and after others have drawn."""
        runner = make_runner(bundled)
        loose = SamplingParams(temperature=2.0)
        told = [make_request(n, [i + 3], loose, seed=i) for i, n in enumerate("ABC")]
        scheduled = [ScheduledRequest(n, 1, [i]) for i, n in enumerate("ABC")]
        drawn = run(runner, scheduled, told)
        assert len(set(drawn.values())) == 3
        run(runner, [ScheduledRequest("D", 2, [9])], [make_request("D", [1, 2])], ["B"])
        batch = prepare_inputs(
            runner, StepPlan([ScheduledRequest("C", 1), ScheduledRequest("A", 1)])
        )
        assert batch.input_ids.tolist() == [drawn["C"], drawn["A"]]

    def test_a_row_that_is_used_again_runs_its_own_tokens(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        """Chunks never take what the request before it drew last."""
        runner = make_runner(bundled, num_rows=1)
        run(runner, [ScheduledRequest("A", 1, [0])], [make_request("A", [3])])
        told = [make_request("B", [7, 8, 9])]
        for place in range(3):
            batch = prepare_inputs(
                runner, StepPlan([ScheduledRequest("B", 1, [place])], told, ["A"])
            )
            assert batch.input_ids.tolist() == [7 + place]
            told = []

    def test_a_request_without_a_token_to_run_is_refused(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        """It would begin with what another has drawn."""
        runner = make_runner(bundled, num_rows=1)
        request = make_request("A", [1, 2], num_computed_tokens=2)
        with pytest.raises(ValueError, match=r"'A'.* 2 of its 2 tokens computed"):
            run(runner, [ScheduledRequest("A", 1, [0])], [request])
        assert len(runner.rows.free_rows) == 1

    def test_a_cached_prefix_is_not_run(self, bundled: Qwen3ForCausalLM) -> None:
        ids = list(range(20, 31))
        runner = make_runner(bundled)
        told = [make_request("A", ids)]
        token = run(runner, [ScheduledRequest("A", 11, [7, 2, 5])], told)["A"]
        shared = make_request("B", ids, num_computed_tokens=8)
        scheduled = [ScheduledRequest("B", 3, [7, 2, 9])]
        assert run(runner, scheduled, [shared]) == {"B": token}

    def test_ids_that_nobody_knows_are_ignored(self, bundled: Qwen3ForCausalLM) -> None:
        runner = make_runner(bundled)
        ended = ["nobody", "A", "A"]
        run(runner, [ScheduledRequest("A", 1, [0])], [make_request("A", [3])], ended)
        assert list(runner.rows.by_id) == ["A"]
        run(runner, [], [], ended)
        assert sorted(runner.rows.free_rows) == list(range(8))

    def test_the_spare_row_is_given_to_nobody(self) -> None:
        rows = RequestRows(3, 4, 50, CPU)
        assert rows.block_table.shape[0] == rows.last_token_ids.shape[0] == 4
        assert rows.sampling.floats.shape[0] == rows.sampling.ints.shape[0] == 4
        assert rows.num_rows == 3
        for _ in range(2):
            told = [make_request(n, [1]) for n in "ABC"]
            rows.update(StepPlan([], told))
            assert {state.row for state in rows.by_id.values()} == {0, 1, 2}
            with pytest.raises(IndexError):
                rows.update(StepPlan([], [make_request("D", [1])]))
            rows.update(StepPlan([], [], ["A", "C"]))
            rows.update(StepPlan([], [make_request(n, [1]) for n in "EF"]))
            assert {state.row for state in rows.by_id.values()} == {0, 1, 2}
            rows.reset()
        assert sorted(rows.free_rows) == [0, 1, 2]

    def test_nobody_touches_the_spare_row(self, bundled: Qwen3ForCausalLM) -> None:
        """It is filled with what would be seen, and so is what lies around it."""
        rng = random.Random(4)
        num_rows, num_blocks = 3, 12
        runner = make_runner(bundled, num_blocks, num_rows=num_rows)
        rows, vocab_size = runner.rows, bundled.config.vocab_size
        sampling = rows.sampling
        asks = SamplingParams(
            temperature=0.9,
            top_p=0.8,
            frequency_penalty=0.5,
            repetition_penalty=1.3,
            min_tokens=4,
            logit_bias={7: 2.0},
        )
        word = [[3, 4], [5]]
        made = make_request("0", [1, 2], asks, stop_token_ids=[2], bad_words_ids=word)
        run(runner, [ScheduledRequest("0", 2, [0])], [made])  # makes all tables
        run(runner, [], [], ["0"])
        tables = {
            **sampling.tables.made,
            "block_table": rows.block_table,
            "last_token_ids": rows.last_token_ids,
            "floats": sampling.floats,
            "ints": sampling.ints,
            "words": sampling.bad_words.words,
            "recent": sampling.bad_words.recent,
        }
        assert len(sampling.tables.made) == 4
        for name, table in tables.items():
            assert table.shape[0] == num_rows + 1, name
            table[num_rows].fill_(1 if table.dtype == torch.bool else 77)
        kept = {name: table[num_rows].clone() for name, table in tables.items()}
        free, running, count = list(range(num_blocks)), dict[str, list[int]](), 0
        for _ in range(60):
            ended = [name for name in running if rng.random() < 0.3]
            for name in ended:
                free += running.pop(name)
            told, scheduled = [], [ScheduledRequest(name, 1) for name in running]
            while len(running) < num_rows and rng.random() < 0.8:
                name, count = f"{count}", count + 1
                blocks = [free.pop() for _ in range(4)]
                running[name] = blocks
                ids = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 3))]
                told.append(
                    make_request(
                        name, ids, asks, stop_token_ids=[2], bad_words_ids=word
                    )
                )
                scheduled.append(ScheduledRequest(name, len(ids), blocks))
            rng.shuffle(scheduled)
            run(runner, scheduled, told, ended)
        assert count > 40
        for name, value in kept.items():
            assert torch.equal(tables[name][num_rows], value), name
        for name, table in sampling.tables.made.items():  # the same, as it has stayed
            assert table is tables[name]

    def test_reset(self, bundled: Qwen3ForCausalLM) -> None:
        executor = make_executor(max_num_seqs=3)
        told = [make_request(n, [3, 4], self.params) for n in "ABC"]
        scheduled = [ScheduledRequest(n, 2, [i]) for i, n in enumerate("ABC")]
        first = executor.launch(StepPlan(scheduled, told)).read()
        executor.reset()
        rows = executor.worker.runner.rows
        assert not rows.by_id
        assert sorted(rows.free_rows) == [0, 1, 2]
        assert executor.launch(StepPlan(scheduled, told)).read() == first


class TestPromptLogprobs:
    @pytest.mark.parametrize(
        "chunks", [[300], [1] * 9 + [291], [256, 44], [299, 1], [7, 100, 193]]
    )
    @pytest.mark.parametrize("wanted", [0, 3, -1])
    def test_equal_the_models_own(
        self, bundled: Qwen3ForCausalLM, chunks: list[int], wanted: int
    ) -> None:
        ids = [(7 * i) % 200 + 5 for i in range(300)]
        exact = uncached(bundled, ids).log_softmax(-1)
        runner = make_runner(bundled, num_blocks=90)
        params = SamplingParams(temperature=0, prompt_logprobs=wanted)
        told, blocks = [make_request("A", ids, params)], list(range(80))[::-1]
        other = [make_request("B", [9, 8])]  # beside it in the first step
        found: dict[int, TokenLogprobs] = {}
        beside = [ScheduledRequest("B", 2, [85])]
        for length in chunks:
            scheduled = [*beside, ScheduledRequest("A", length, blocks)]
            output = runner.launch(StepPlan(scheduled, told + other)).read()
            told, other, beside, blocks = [], [], [], []
            assert set(output.prompt_logprobs) <= {"A"}
            for first, entries in output.prompt_logprobs.values():
                assert not found.keys() & set(range(first, first + len(entries)))
                found |= dict(enumerate(entries, first))
        assert list(found) == list(range(1, 300))
        size = bundled.config.vocab_size if wanted == -1 else wanted
        for place, entry in found.items():
            row, token = exact[place - 1], ids[place]
            assert len(entry) == 1 + size
            assert entry[0][0] == token
            assert entry[0][2] == pytest.approx(
                int((row > row[token]).sum()) + 1, abs=1
            )
            for token_id, value, _ in entry[:20]:
                assert value == pytest.approx(row[token_id].item(), abs=1e-4)
        assert run(runner, [ScheduledRequest("A", 1)])  # and it goes on

    def test_a_step_after_the_prompt_has_none(self, bundled: Qwen3ForCausalLM) -> None:
        runner = make_runner(bundled)
        params = SamplingParams(temperature=0, prompt_logprobs=0)
        told = [make_request("A", [1, 2], params)]
        plan = StepPlan([ScheduledRequest("A", 2, [0])], told)
        assert runner.launch(plan).read().prompt_logprobs.keys() == {"A"}
        plan = StepPlan([ScheduledRequest("A", 1)])
        assert runner.launch(plan).read().prompt_logprobs == {}

    def test_a_prompt_of_one_token_has_none(self, bundled: Qwen3ForCausalLM) -> None:
        params = SamplingParams(prompt_logprobs=2)
        plan = StepPlan(
            [ScheduledRequest("A", 1, [0])], [make_request("A", [1], params)]
        )
        assert make_runner(bundled).launch(plan).read().prompt_logprobs == {}

    def test_written_tokens_that_are_run_again_are_no_prompt(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        params = SamplingParams(prompt_logprobs=0)
        request = make_request("A", [1, 2, 3, 4, 5], params, num_prompt_tokens=3)
        plan = StepPlan([ScheduledRequest("A", 5, [0, 1])], [request])
        output = make_runner(bundled).launch(plan).read()
        first, entries = output.prompt_logprobs["A"]
        assert first == 1
        assert [entry[0][0] for entry in entries] == [2, 3]


class TestLaunchAndRead:
    def test_steps_may_be_read_when_all_are_launched(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        told = [make_request("A", [5, 6, 7]), make_request("B", [9])]
        scheduled = [ScheduledRequest("A", 3, [0, 1, 2]), ScheduledRequest("B", 1, [7])]
        go_on = StepPlan([ScheduledRequest("B", 1), ScheduledRequest("A", 1)])
        only_a = StepPlan([ScheduledRequest("A", 1)])
        plans = [StepPlan(scheduled, told), go_on, only_a, go_on, go_on]
        eager, late = make_runner(bundled), make_runner(bundled)
        seen = [eager.launch(plan).read() for plan in plans]
        launched = [late.launch(plan) for plan in plans]
        assert [step.read() for step in launched] == seen

    def test_a_later_step_cannot_change_what_was_sent(self) -> None:
        """All results, read after their tensors hold something else."""
        ids, ranks = torch.tensor([[4, 9], [2, 2]]), torch.tensor([2, 1])
        params = SamplingParams(logprobs=1, prompt_logprobs=1)
        told = [make_request(name, [1, 3, 5], params) for name in "AB"]
        drawing = [RequestRow(i, one, [], 3) for i, one in enumerate(told)]
        chunk = PromptChunk(told[0], start=0, first=1, stop=3)
        tensors = LogprobsTensors(ids, -ids.float(), ranks)
        of_prompt = tensors.map(torch.clone)
        token_ids = torch.tensor([4, 2])
        results = drawing, token_ids, tensors, [(chunk, of_prompt)]
        expected = InFlightStep(*results).read()
        step = InFlightStep.send(*results)
        for tensor in (token_ids, *vars(tensors).values(), *vars(of_prompt).values()):
            tensor.fill_(77)
        assert step.read() == expected
        assert expected.tokens["A"] == SampledToken(4, [(4, -4.0, 2), (9, -9.0, 1)])
        assert expected.prompt_logprobs["A"][1][1] == [(2, -2.0, 1), (2, -2.0, 1)]
        assert InFlightStep(*results).read() != expected  # this one was not sent

    def test_steps_that_draw_into_one_tensor_may_be_read_late(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        """As those of page 14 do."""

        class OneTensor(Sampler):
            place = torch.zeros(2, dtype=torch.int64)

            def sample(self, logits: Tensor, metadata: Any) -> Any:
                token_ids, logprobs = super().sample(logits, metadata)
                return self.place[: len(token_ids)].copy_(token_ids), logprobs

        loose = SamplingParams(temperature=2.0)
        told = [make_request(n, [5, i], loose, seed=i) for i, n in enumerate("AB")]
        start = StepPlan(
            [ScheduledRequest(n, 2, [i]) for i, n in enumerate("AB")], told
        )
        plans = [start, *[StepPlan([ScheduledRequest(n, 1) for n in "BA"])] * 2]
        eager, late = make_runner(bundled), make_runner(bundled)
        late.sampler = OneTensor()
        seen = [eager.launch(plan).read() for plan in plans]
        launched = [late.launch(plan) for plan in plans]
        assert [step.read() for step in launched] == seen
        drawn = {token.token_id for one in seen for token in one.tokens.values()}
        assert len(drawn) > 3

    def test_read_waits_for_its_own_results_once(self) -> None:
        """For a mark that stands after the copies, and before it looks."""
        place, waited = torch.zeros(1, dtype=torch.int64), []

        class Mark:
            def synchronize(self) -> None:
                waited.append(place.fill_(5))

        drawing = [RequestRow(0, make_request("A", [1]), [], 1)]
        step = InFlightStep(drawing, place, arrival=Mark())  # type: ignore[arg-type]
        assert not waited
        assert step.read().tokens == {"A": SampledToken(5)}
        assert len(waited) == 1
        assert InFlightStep.send(drawing, place, None, []).arrival is None

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_the_next_step_neither_waits_for_a_copy_nor_harms_it(self) -> None:
        """The copies are held up, and the next step writes to the same place at once."""
        place = torch.tensor([4, 2], device="cuda")
        stream = get_copy_stream(place.device)
        drawing = [
            RequestRow(i, make_request(n, [1]), [], 1) for i, n in enumerate("AB")
        ]

        def launch_three() -> list[InFlightStep]:
            steps = []
            for _ in range(3):
                steps.append(InFlightStep.send(drawing, place, None, []))
                place.add_(1)
            return steps

        # The first kernels that are loaded and the first memory for copies make everybody wait.
        steps = launch_three()
        for cycles in (10**9, 10**10):  # the host may be busy
            steps.clear()  # before the sleep, behind which memory would be given back
            torch.cuda.synchronize()
            first = place.tolist()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(cycles)
            steps = launch_three()
            torch.cuda.current_stream().synchronize()
            is_held_up = not stream.query()
            drawn = [
                [one.token_id for one in step.read().tokens.values()] for step in steps
            ]
            assert drawn == [[token + i for token in first] for i in range(3)]
            if is_held_up:
                break
        assert is_held_up

    def test_a_step_of_nothing(
        self, bundled: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nothing = StepOutput({}, {})
        empty = torch.empty(0, dtype=torch.int64)
        assert InFlightStep().read() == nothing
        assert InFlightStep.send([], empty, None, []).read() == nothing
        runner = make_runner(bundled)
        monkeypatch.setattr(runner, "run", lambda batch: pytest.fail("ran a step"))
        told = [make_request("A", [3])]
        assert runner.launch(StepPlan([], told, [])).read() == nothing
        assert list(runner.rows.by_id) == ["A"]  # the news was told
        assert runner.launch(StepPlan([], [], ["A"])).read() == nothing
        assert not runner.rows.by_id

    def test_another_forward_may_take_the_models_place(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner, calls = make_runner(bundled), []

        def forward(*arguments: Any) -> Tensor:
            calls.append(arguments)
            return bundled(*arguments)

        plan = [ScheduledRequest("A", 2, [0])], [make_request("A", [5, 6])]
        expected = run(runner, *plan)
        again = make_runner(bundled)
        again.forward = forward
        assert run(again, *plan) == expected
        [(input_ids, positions, kv_caches, _)] = calls
        assert (input_ids.tolist(), positions.tolist()) == ([5, 6], [0, 1])
        assert kv_caches is again.kv_caches

    @pytest.mark.parametrize(
        "params",
        [GREEDY, SamplingParams(temperature=0.7, top_k=20, logprobs=3, seed=1)],
        ids=["greedy", "sampled"],
    )
    def test_launch_asks_for_no_number(
        self, bundled: Qwen3ForCausalLM, params: SamplingParams
    ) -> None:
        """What would wait for a GPU: a number, or a size that depends on numbers."""
        runner = make_runner(bundled)
        params = replace(params, prompt_logprobs=1)
        told = [make_request(n, [1, 2, 3], params) for n in "ABC"]
        scheduled = [ScheduledRequest(n, 3, [i]) for i, n in enumerate("ABC")]
        more = StepPlan([ScheduledRequest(n, 1) for n in "CA"])
        with CountOps() as counter:
            steps = [runner.launch(StepPlan(scheduled, told)), runner.launch(more)]
        waits = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal"}
        assert not waits & {name for name, _ in counter.ops}
        assert [len(step.read().tokens) for step in steps] == [3, 2]

    def test_logits_that_are_not_finite_end_no_other(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        """Also when the next step is launched before anybody has seen the -1."""
        runner = make_runner(bundled)
        told = [make_request("A", [5, 6, 7]), make_request("B", [9])]
        scheduled = [ScheduledRequest("A", 3, [0, 1]), ScheduledRequest("B", 1, [7])]
        alone = play_alone(bundled, Story(told[1], 2)).tokens

        class SpoilsA(Sampler):
            def sample(self, logits: Tensor, metadata: Any) -> Any:
                is_own = metadata.rows == runner.rows.by_id["A"].row
                return super().sample(
                    logits.masked_fill(is_own[:, None], float("nan")), metadata
                )

        runner.sampler = SpoilsA()
        first = runner.launch(StepPlan(scheduled, told))
        second = runner.launch(StepPlan([ScheduledRequest(n, 1) for n in "AB"]))
        tokens = [step.read().tokens for step in (first, second)]
        assert [step["A"].token_id for step in tokens] == [-1, -1]
        assert runner.rows.last_token_ids[runner.rows.by_id["A"].row] == 0
        assert [step["B"].token_id for step in tokens] == alone

    def test_entries_are_as_many_as_were_asked_for(self) -> None:
        logprobs = LogprobsTensors(
            token_ids=torch.tensor([[4, 9, 4], [2, 2, 5], [7, 7, 1], [3, 0, 1]]),
            logprobs=-torch.tensor([[2.0, 1, 2], [1, 1, 3], [0, 0, 4], [5, 1, 2]]),
            ranks=torch.tensor([2, 1, 1, 9]),
        )
        assert to_entries(logprobs, [1, None, -1, 0]) == [
            [(4, -2.0, 2), (9, -1.0, 1)],
            None,
            [(7, 0.0, 1), (7, 0.0, 1), (1, -4.0, 2)],
            [(3, -5.0, 9)],
        ]


class CountOps(TorchDispatchMode):
    """The names and result sizes of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        size = out.numel() if isinstance(out, Tensor) else 0
        self.ops.append((func.overloadpacket.__name__, size))
        return out


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0.7, top_k=20, top_p=0.95, logprobs=3),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, min_tokens=5),
    ],
    ids=["greedy", "sampled", "penalties"],
)
def test_work_per_token_does_not_grow(
    bundled: Qwen3ForCausalLM, params: SamplingParams
) -> None:
    """Beyond the keys and values that attention looks at, which are views."""
    runner = make_runner(bundled, block_size=16)
    told = [make_request("A", random_tokens(bundled, 20), params)]
    run(runner, [ScheduledRequest("A", 20, range(40))], told)
    counted, length = [], 20
    for start in (21, 22, 260, 518):
        while length < start:
            run(runner, [ScheduledRequest("A", 1)])
            length += 1
        with CountOps() as counter:
            run(runner, [ScheduledRequest("A", 1)])
        length += 1
        counted.append(counter.ops)
    names = [[name for name, _ in ops] for ops in counted]
    assert names[0] == names[1] == names[2] == names[3]
    # The step's part of the block table is as wide as the context, and read as a list.
    grow = {"slice", "transpose", "unsqueeze", "expand", "view", "_unsafe_view"}
    grow |= {"index_select", "select", "resolve_conj", "resolve_neg"}
    for ops in counted[1:]:
        for (name, size), (_, other) in zip(counted[0], ops, strict=True):
            assert size == other or (name in grow and size < 10_000), name


def test_preparing_takes_as_many_operations_for_64_as_for_one(
    bundled: Qwen3ForCausalLM,
) -> None:
    counted = []
    for count in (1, 64):
        runner = make_runner(bundled, num_rows=64)
        names = [f"{i}" for i in range(count)]
        told = [make_request(name, [3, 4]) for name in names]
        scheduled = [ScheduledRequest(name, 2, [i]) for i, name in enumerate(names)]
        run(runner, scheduled, told)
        plan = StepPlan([ScheduledRequest(name, 1) for name in names])
        run(runner, plan.scheduled)
        with CountOps() as counter:
            prepare_inputs(runner, plan)
        counted.append([name for name, _ in counter.ops])
    assert counted[0] == counted[1]
    assert len(counted[0]) < 40


def make_executor(**options: Any) -> GPUExecutor:
    config = EngineConfig(device="cpu", use_tqdm=False, **options)
    return GPUExecutor(bundled_model_path(), config)


class TestExecutor:
    def test_plain_data_in_and_out(self) -> None:
        executor = make_executor()
        params = SamplingParams(temperature=0, logprobs=3)
        plan = StepPlan(
            [ScheduledRequest("A", 3, [0]), ScheduledRequest("B", 2, [1])],
            [make_request("A", [1, 2, 3], params), make_request("B", [4, 5])],
        )
        sent = pickle.loads(pickle.dumps(plan))
        output = pickle.loads(pickle.dumps(executor.launch(sent).read()))
        drawn, bare = output.tokens["A"], output.tokens["B"]
        assert bare == SampledToken(bare.token_id, None)
        exact = uncached(executor.worker.runner.model, [1, 2, 3])[-1].log_softmax(-1)
        best = exact.topk(3)
        assert drawn.token_id == best.indices[0]
        ids, values, ranks = zip(*drawn.logprobs, strict=True)
        assert ids == (drawn.token_id, *best.indices.tolist())
        assert ranks == (1, 1, 2, 3)
        first, *rest = best.values.tolist()
        assert values == pytest.approx([first, first, *rest], abs=1e-4)
        assert all(type(x) in (int, float) for entry in drawn.logprobs for x in entry)

    def test_each_request_gets_as_many_logprobs_as_it_asked_for(self) -> None:
        executor = make_executor()
        asked = [None, 0, 2, -1, 5]
        told = [
            make_request(f"{i}", [7, i], SamplingParams(logprobs=k), seed=i)
            for i, k in enumerate(asked)
        ]
        scheduled = [ScheduledRequest(f"{i}", 2, [i]) for i in range(5)]
        drawn = list(executor.launch(StepPlan(scheduled, told)).read().tokens.values())
        sizes = [None if d.logprobs is None else len(d.logprobs) for d in drawn]
        assert sizes == [None, 1, 3, executor.config.vocab_size + 1, 6]
        for sampled in drawn[1:]:
            assert sampled.logprobs is not None
            assert sampled.logprobs[0][0] == sampled.token_id
            assert sampled.logprobs[0][2] >= 1

    def test_the_length_follows_from_the_config_and_the_blocks_from_the_memory(
        self,
    ) -> None:
        per_block = 16 * 2 * 6 * 2 * 64 * 4
        for memory, num_blocks in [(7, 7), (18, 18), (10_000, 3 * 7)]:
            executor = make_executor(
                max_model_len=100,
                max_num_seqs=3,
                kv_cache_memory_bytes=memory * per_block + 5,
            )
            assert executor.max_model_len == 100
            assert (executor.num_blocks, executor.block_size) == (num_blocks, 16)
            rows = executor.worker.runner.rows
            # A row for each of three requests, and one that is nobody's.
            assert (rows.num_rows, *rows.block_table.shape) == (3, 4, 7)
        assert executor.get_peak_memory() is None

    def test_the_cache_stays_within_its_memory(self) -> None:
        per_token = 2 * 6 * 2 * 64 * 4
        worker = make_executor(kv_cache_memory_bytes=100 * per_token).worker
        assert worker.max_model_len == 96  # whole blocks
        used = sum(x.nbytes for pair in worker.runner.kv_caches for x in pair)
        assert used == 96 * per_token


class TestErrors:
    def test_a_runner_of_ones_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(MODEL_RUNNERS, "mine", f"{__name__}:OwnRunner")
        assert type(make_executor(decode="mine").worker.runner) is OwnRunner

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("dtype", "bfloat16"),
            ("device", "cpu"),
            ("attention_backend", "torch_naive"),
        ],
    )
    def test_a_loaded_model_brings_its_own(
        self, bundled: Qwen3ForCausalLM, name: str, value: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"{name}='{value}'.*load_model"):
            GPUWorker(bundled, EngineConfig(**{name: value}))

    def test_too_long_a_context_is_refused_before_loading(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("folo_lib.model_source.load_model", None)
        with pytest.raises(ValueError, match=r"max_model_len=5000.*4096"):
            GPUWorker(bundled_model_path(), EngineConfig(max_model_len=5000))


@pytest.mark.parametrize(
    ("has_mkl", "dtype", "is_by_columns"),
    [(True, "float32", True), (False, "float32", False), (True, "bfloat16", False)],
)
def test_matrices_lie_as_they_are_multiplied(
    monkeypatch: pytest.MonkeyPatch, has_mkl: bool, dtype: str, is_by_columns: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    config = EngineConfig(device="cpu", dtype=dtype)
    loaded = GPUWorker(bundled_model_path(), config).runner.model
    plain = load_model(bundled_model_path(), dtype, "cpu", use_tqdm=False)
    theirs = dict(plain.named_parameters())
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, theirs[name])
        if weight.dim() == 2:
            assert theirs[name].is_contiguous()
            assert weight.t().is_contiguous() == is_by_columns
    GPUWorker(plain, EngineConfig())  # somebody's own model stays as it is
    assert plain.lm_head is None and plain.model.embed_tokens.weight.is_contiguous()


def test_matrices_by_columns_are_saved_as_rows(tmp_path: Path) -> None:
    """And filled again, for a file holds rows, of which q, k and v are some."""
    model = GPUWorker(bundled_model_path(), EngineConfig(device="cpu")).runner.model
    path, views = tmp_path / "model.safetensors", model.hf_weights()
    save_file({name: view.contiguous() for name, view in views.items()}, path)
    before = {name: view.clone() for name, view in views.items()}
    for view in views.values():
        view.zero_()
    model.load_weights(load_file(path).items())
    for name, view in model.hf_weights().items():
        assert torch.equal(view, before[name])


class OwnRunner(ModelRunner):
    pass
