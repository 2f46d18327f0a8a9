"""Page 14: steps in graphs, on a CPU with a stand-in for kernels, and on a GPU as they are."""

from __future__ import annotations

import gc
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import cache, partial
from itertools import pairwise
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import schedules
import torch
from helpers import prepare_inputs
from schedules import Schedule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import folo_lib.cuda_graph as module
from folo_lib import LLMEngine, SamplingParams, bundled_model_path
from folo_lib.checkpoint import load_model, load_tokenizer
from folo_lib.config import EngineConfig
from folo_lib.cuda_graph import (
    GraphRunner,
    GraphSize,
    LayerwiseModel,
    Recorder,
    StaticInputs,
    StepGraphs,
    choose_decode_sizes,
    choose_sizes,
    choose_wrap,
    draw_rows,
    find_size,
)
from folo_lib.kv_cache import (
    AttentionMetadata,
    TorchNaiveBackend,
    read_cache,
    write_cache,
)
from folo_lib.qwen3 import Attention, Qwen3DecoderLayer, Qwen3ForCausalLM
from folo_lib.runner import (
    InFlightStep,
    ModelRunner,
    NewRequest,
    ScheduledRequest,
    StepLayout,
    StepPlan,
    lay_end_to_end,
)
from folo_lib.sampler import Sampler, SamplingRows, make_jumps

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
NAN = float("nan")

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


class TensorBackend(TorchNaiveBackend):
    """Learns lengths and blocks from tensors alone; what pads a step gets NaN."""

    supports_cuda_graph = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        real = metadata.slot_mapping >= 0
        for one, new in zip(kv_cache, (key, value), strict=True):
            write_cache(one, metadata.slot_mapping[real], new[real])
        output = torch.full_like(query, NAN)
        for i, (start, stop) in enumerate(pairwise(metadata.query_start_loc.tolist())):
            if start < stop:
                where = metadata.block_table[i], int(metadata.seq_lens[i])
                keys, values = (read_cache(one, *where) for one in kv_cache)
                queries = query[start:stop].transpose(0, 1)
                output[start:stop] = self.attend(queries, keys, values).transpose(0, 1)
        return output


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def use_tensors(
    model: Qwen3ForCausalLM, backend: type[TensorBackend] = TensorBackend
) -> None:
    for one in model.modules():
        if isinstance(one, Attention):
            one.backend = backend()


@cache
def get_model(is_static: bool = True) -> Qwen3ForCausalLM:
    model = load_model(bundled_model_path(), "float32", "cpu", use_tqdm=False)
    if is_static:
        use_tensors(model)
    return model


@cache
def get_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(bundled_model_path())


def make_engine(is_static: bool = True, **options: Any) -> LLMEngine:
    options = {
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 2**24,
    } | options
    return LLMEngine(get_model(is_static), get_tokenizer(), **options)


def get_graphs(engine: LLMEngine) -> StepGraphs:
    runner = engine.executor.worker.runner
    assert isinstance(runner, GraphRunner) and runner.graphs is not None
    return runner.graphs


def make_runner(
    cls: type[ModelRunner] = GraphRunner, num_rows: int = 8, budget: int = 64
) -> Any:
    """A runner with blocks of four, whose cache is full of NaN."""
    config = EngineConfig(
        block_size=4, max_num_seqs=num_rows, max_num_batched_tokens=budget
    )
    runner = cls(get_model(), config)
    runner.initialize_kv_caches(num_blocks=64, max_model_len=128)
    for pair in runner.kv_caches:
        for tensor in pair:
            tensor.fill_(NAN)
    return runner


def make_request(name: str, num_tokens: int, **params: Any) -> NewRequest:
    rng = random.Random(name)
    return NewRequest(
        request_id=name,
        token_ids=rng.choices(range(4, 2000), k=num_tokens),
        num_prompt_tokens=num_tokens,
        params=SamplingParams(**({"temperature": 0} | params)),
    )


def start(*requests: NewRequest, first_block: int = 1) -> StepPlan:
    """A plan that reads prompts to their ends, with a block to spare for each."""
    scheduled, block = [], first_block
    for request in requests:
        count = len(request.token_ids) // 4 + 2
        blocks = list(range(block, block + count))
        block += count
        scheduled.append(
            ScheduledRequest(request.request_id, len(request.token_ids), blocks)
        )
    return StepPlan(scheduled, requests)


def go_on(*names: str) -> StepPlan:
    return StepPlan([ScheduledRequest(name, 1) for name in names])


def get_tokens(step: InFlightStep) -> dict[str, int]:
    return {name: token.token_id for name, token in step.read().tokens.items()}


def note_sizes(graphs: StepGraphs) -> list[GraphSize]:
    """A list that fills with the sizes that are replayed."""
    seen: list[GraphSize] = []

    def noting(size: GraphSize, replay: Callable[[], None]) -> Callable[[], None]:
        def replay_and_note() -> None:
            seen.append(size)
            replay()

        return replay_and_note

    graphs.steps = {size: noting(size, run) for size, run in graphs.steps.items()}
    return seen


# --- Sizes ----------------------------------------------------------------------------


class TestSizes:
    @pytest.mark.parametrize(
        "most", [1, 2, 3, 5, 8, 31, 32, 33, 100, 128, 129, 256, 700]
    )
    def test_every_batch_has_a_graph_and_the_last_is_the_largest(
        self, most: int
    ) -> None:
        sizes = choose_decode_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1
        for count in range(1, most + 1):
            held = min(size for size in sizes if size >= count)
            assert held < 2 * count or held == 1, "more than half is nobody's"

    def test_no_graph_holds_more_tokens_than_a_step(self) -> None:
        for most, budget in (
            (1, 1),
            (1, 40),
            (8, 8),
            (8, 100),
            (256, 2048),
            (64, 8192),
        ):
            sizes = choose_sizes(most, budget)
            assert len(sizes) == len(set(sizes))
            for size in sizes:
                assert size.num_seqs <= most
                assert size.is_decode or size.num_tokens <= budget
                assert not size.is_decode or size.num_seqs == size.num_tokens

    def test_the_draws_of_all_sizes_exist(self) -> None:
        """A mixed step draws with the graph of a decode step of as many sequences."""
        for most in (1, 2, 7, 64):
            sizes = choose_sizes(most, 2048)
            drawn = {size.num_seqs for size in sizes if size.is_decode}
            assert {size.num_seqs for size in sizes} <= drawn

    def test_the_smallest_that_holds_a_step(self) -> None:
        sizes = choose_sizes(96, 512)
        rng = random.Random(0)
        for _ in range(300):
            num_seqs = rng.randint(1, 100)
            num_tokens = num_seqs + rng.choice([0, 0, rng.randint(1, 600)])
            held = [
                size
                for size in sizes
                if size.num_seqs >= num_seqs
                and size.num_tokens >= num_tokens
                and size.is_decode == (num_tokens == num_seqs)
            ]
            found = find_size(sizes, num_seqs, num_tokens)
            assert (found is None) == (not held)
            if found:
                assert found in held
                assert found.num_tokens == min(size.num_tokens for size in held) or (
                    found.num_seqs == min(size.num_seqs for size in held)
                )

    def test_a_prompt_alone_has_graphs_of_its_own(self) -> None:
        sizes = choose_sizes(8, 2048)
        assert find_size(sizes, 1, 16) == (1, 16, False)
        assert find_size(sizes, 1, 17) == (1, 32, False)
        assert find_size(sizes, 1, 513) == (8, 1024, False)
        assert find_size(sizes, 1, 2049) is None
        assert find_size(sizes, 9, 9) is None


# --- Static inputs --------------------------------------------------------------------


class TestStaticInputs:
    SIZES = GraphSize(4, 4, True), GraphSize(4, 16, False), GraphSize(1, 16, False)

    def make(self) -> StaticInputs:
        return StaticInputs(self.SIZES, padding_row=9, device=CPU)

    def test_what_is_missing_is_filled_up(self) -> None:
        inputs = self.make()
        inputs.packed.fill_(77)  # of a step before
        step = StepLayout(
            input_ids=[5, 6, -1], positions=[0, 1, 8], slots=[12, 13, 28],
            query_lens=[2, 1], seq_lens=[2, 9], rows=[3, 1],
        )  # fmt: skip
        inputs.load(step, self.SIZES[1])
        rows, seq_lens, starts, ids, positions, slots = inputs.split(self.SIZES[1])
        assert rows.tolist() == [3, 1, 9, 9]
        assert seq_lens.tolist() == [2, 9, 0, 0]
        assert starts.tolist() == [0, 2, 3, 3, 3]
        assert ids.tolist() == [5, 6, -1] + [0] * 13
        assert positions.tolist() == [0, 1, 8] + [0] * 13
        assert slots.tolist() == [12, 13, 28] + [-1] * 13

    def test_nothing_at_all(self) -> None:
        inputs = self.make()
        inputs.packed.fill_(77)
        inputs.load(StepLayout(), self.SIZES[0])
        rows, seq_lens, starts, ids, _, slots = inputs.split(self.SIZES[0])
        assert rows.tolist() == [9] * 4 and seq_lens.tolist() == [0] * 4
        assert starts.tolist() == [0] * 5 and ids.tolist() == [0] * 4
        assert slots.tolist() == [-1] * 4

    def test_the_columns_of_sequences_lie_where_they_lay(self) -> None:
        """So that a mixed step may draw with the graph of a decode step."""
        inputs = self.make()
        decode, mixed = (inputs.split(size)[:3] for size in self.SIZES[:2])
        for one, other in zip(decode, mixed, strict=True):
            assert one.data_ptr() == other.data_ptr() and one.shape == other.shape

    def test_they_stay_where_they_are(self) -> None:
        inputs = self.make()
        before = [column.data_ptr() for column in inputs.split(self.SIZES[1])]
        inputs.load(StepLayout([1], [0], [0], [1], [1], [0]), self.SIZES[1])
        assert [column.data_ptr() for column in inputs.split(self.SIZES[1])] == before


# --- Draws ----------------------------------------------------------------------------


class TestDraws:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("is_random", [False, True])
    def test_equal_to_the_sampler(self, dtype: torch.dtype, is_random: bool) -> None:
        rng = random.Random(0)
        for case in range(30):
            size, num_rows = rng.choice([1, 7, 500]), rng.randint(1, 6)
            tables = SamplingRows(8, size, CPU)
            rows = rng.sample(range(8), num_rows)
            for row in rows:
                temperature = rng.choice([0, 0.05, 0.7, 2]) if is_random else 0
                params = SamplingParams(temperature=temperature)
                tables.set_row(
                    row, params, rng.randrange(2**64), rng.randint(0, 3), [1], []
                )
            index = torch.tensor(rows)
            positions = torch.tensor([rng.randrange(5000) for _ in rows])
            logits = torch.randn(num_rows, size).mul_(3).to(dtype)
            if case % 3 == 0:
                logits[0, -1] = NAN
            if case % 3 == 1:
                logits[-1] = -torch.inf
            expected, _ = Sampler().sample(
                logits, tables.gather(rows, index, positions)
            )
            drawn = draw_rows(
                logits, positions, index, tables.floats, tables.ints,
                make_jumps(size, CPU), is_random,
            )  # fmt: skip
            assert drawn.dtype == torch.int64 and drawn.tolist() == expected.tolist()

    def test_an_infinite_logit_draws_nothing(self) -> None:
        tables = SamplingRows(2, 5, CPU)
        tables.set_row(0, SamplingParams(temperature=1), 1, 0, [1], [])
        logits = torch.tensor([[0, 1, torch.inf, 2, 3]])
        place, row, jumps = torch.tensor([4]), torch.tensor([0]), make_jumps(5, CPU)
        for is_random in (False, True):
            drawn = draw_rows(
                logits, place, row, tables.floats, tables.ints, jumps, is_random
            )
            assert drawn.tolist() == [-1]


# --- Compiled layers ------------------------------------------------------------------


class TestLayerwiseModel:
    def test_equal_to_the_model(self) -> None:
        model, runner = get_model(), make_runner(ModelRunner)
        batch = prepare_inputs(
            runner,
            start(make_request("a", 9), make_request("b", 1), make_request("c", 22)),
        )
        where = batch.input_ids, batch.positions, runner.kv_caches, batch
        ours = LayerwiseModel(model, lambda function: function)(*where)
        torch.testing.assert_close(ours, model(*where), rtol=0, atol=0)

    def test_no_step_is_compiled_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All code is there once all graphs are recorded; on a GPU that is the start."""

        def wrap(weight: Tensor, compiles: bool) -> Any:
            return partial(torch.compile, backend="eager", dynamic=True)

        model = load_model(bundled_model_path(), "float32", "cpu", use_tqdm=False)
        use_tensors(model, TensorBackend)
        monkeypatch.setattr(module, "choose_wrap", wrap)
        monkeypatch.setattr(sys.modules[__name__], "get_model", lambda: model)
        torch._dynamo.reset()
        ours, theirs = make_runner(), make_runner(ModelRunner)
        for size in ours.graphs.sizes:
            ours.graphs.inputs.load(StepLayout(), size)
            ours.graphs.steps[size]()
            for is_random in (False, True):
                ours.graphs.draws[size.num_seqs, is_random]()
        new = [make_request(n, k) for n, k in zip("abc", (3, 19, 8), strict=True)]
        scored = make_request("d", 17, prompt_logprobs=1)
        long = make_request("e", 73)  # these two go around the graphs
        plans = [
            start(*new),
            go_on("a", "b", "c"),
            start(scored, first_block=20),
            go_on("b"),
            start(long, first_block=30),
            go_on("a", "e", "c", "d", "b"),
        ]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for plan in plans:
                assert get_tokens(ours.launch(plan)) == get_tokens(theirs.launch(plan))

    def test_layers_share_one_code_for_all_batches(self) -> None:
        compiled: list[Any] = []

        def note(graph: Any, _: Any) -> Any:
            compiled.append(graph)
            return graph.forward

        torch._dynamo.reset()
        wrap = partial(torch.compile, backend=note, dynamic=True)
        before, after = wrap(module.run_before), wrap(module.run_after)
        for length in (5, 9):
            hidden, cos, sin = module.run_embedding(
                get_model(False), torch.arange(4, 4 + length), torch.arange(length)
            )
            for layer in get_model(False).model.layers:
                assert isinstance(layer, Qwen3DecoderLayer)
                query, *_, residual = before(
                    layer, torch.zeros_like(hidden), hidden, cos, sin
                )
                after(layer, query, residual)
        assert len(compiled) == 2

    def test_nothing_is_compiled_on_a_cpu(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        for compiles in (False, True):
            wrap = choose_wrap(torch.zeros(1), compiles)
            assert wrap(draw_rows) is draw_rows
        assert not caplog.records

    def test_a_gpu_that_cannot_compile_is_told_of(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class OnGpu:
            is_cuda = True

        monkeypatch.setattr(module, "can_compile", lambda weight: False)
        weight: Any = OnGpu()
        assert choose_wrap(weight, True)(draw_rows) is draw_rows
        [record] = caplog.records
        assert "Layers are not compiled" in record.getMessage()
        caplog.clear()
        assert choose_wrap(weight, False)(draw_rows) is draw_rows
        assert not caplog.records

    def test_one_that_can(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "can_compile", lambda weight: True)
        wrap: Any = choose_wrap(torch.zeros(1), True)
        assert wrap.func is torch.compile and wrap.keywords["dynamic"]
        assert choose_wrap(torch.zeros(1), False)(draw_rows) is draw_rows


# --- The runner -----------------------------------------------------------------------


class TestRunner:
    """Beside page 08's runner, plan by plan."""

    def compare(self, *plans: StepPlan) -> list[GraphSize]:
        """Runs both, with one step unread; returns the sizes that were replayed."""
        ours, theirs = make_runner(), make_runner(ModelRunner)
        sizes = note_sizes(ours.graphs)
        flights = [(ours.launch(plan), theirs.launch(plan)) for plan in plans]
        for one, other in flights:  # all are read last: nothing was overwritten
            got, wanted = one.read(), other.read()
            assert got.tokens.keys() == wanted.tokens.keys()
            for name, token in wanted.tokens.items():
                assert got.tokens[name].token_id == token.token_id
                if token.logprobs is not None:
                    pairs = zip(got.tokens[name].logprobs, token.logprobs, strict=True)
                    for (i, value, rank), (j, exact, at) in pairs:
                        assert (i, rank) == (j, at) and abs(value - exact) < 1e-4
            assert got.prompt_logprobs.keys() == wanted.prompt_logprobs.keys()
        for name in ("a", "b"):
            if name in ours.rows.by_id:
                row = ours.rows.by_id[name].row
                last = ours.rows.last_token_ids, theirs.rows.last_token_ids
                assert last[0][row] == last[1][row]
        return sizes

    def test_unequal_requests(self) -> None:
        new = [make_request(n, k) for n, k in zip("abc", (3, 19, 8), strict=True)]
        steps = [go_on("a", "b", "c"), go_on("c", "a"), go_on("b", "c"), go_on("b")]
        sizes = self.compare(start(*new), *steps)
        counts = [(8, 64), (4, 4), (2, 2), (2, 2), (1, 1)]
        assert [size[:2] for size in sizes] == counts

    def test_a_batch_that_is_full_and_one_more_than_a_size(self) -> None:
        names = "abcdefgh"
        new = [make_request(name, 1 + i) for i, name in enumerate(names)]
        sizes = self.compare(
            start(*new), go_on(*names), go_on(*names[:5]), go_on(*names[:4])
        )
        assert [size.num_seqs for size in sizes] == [8, 8, 8, 4]

    @pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 64])
    def test_a_prompt_alone(self, length: int) -> None:
        sizes = self.compare(start(make_request("a", length)), go_on("a"), go_on("a"))
        held = next(n for n in (16, 32, 64) if n >= length)
        assert sizes[0] == (1, held, False)
        assert sizes[1:] == [(1, 1, True)] * 2

    def test_a_prompt_longer_than_all_graphs(self) -> None:
        sizes = self.compare(start(make_request("a", 65)), go_on("a"))
        assert sizes == [(1, 1, True)]

    def test_prompts_in_chunks_beside_one_that_writes(self) -> None:
        a, b = make_request("a", 5), make_request("b", 40)
        chunks = [ScheduledRequest("b", 17, list(range(20, 32)))]
        chunks += [ScheduledRequest("b", 17), ScheduledRequest("b", 6)]
        ones = [ScheduledRequest("a", 1)] * 3
        plans = [
            StepPlan([one, chunk], [b] if i == 0 else [])
            for i, (one, chunk) in enumerate(zip(ones, chunks, strict=True))
        ]
        sizes = self.compare(start(a), *plans, go_on("b", "a"))
        assert [size.is_decode for size in sizes] == [False] * 4 + [True]

    def test_a_chunk_alone_draws_nothing(self) -> None:
        b = make_request("b", 40)
        first = StepPlan([ScheduledRequest("b", 30, list(range(20, 32)))], [b])
        runner = make_runner()
        assert runner.launch(first).read().tokens == {}
        self.compare(first, StepPlan([ScheduledRequest("b", 10)]), go_on("b"))

    def test_other_wishes_among_plain_rows(self) -> None:
        new = [
            make_request("a", 6, repetition_penalty=1.5, frequency_penalty=0.5),
            make_request("b", 9),
            make_request("c", 4, temperature=0.9, top_p=0.8, seed=5),
            make_request("d", 4, temperature=0.9),
            make_request("e", 7, logprobs=2),
        ]
        rounds = [go_on("a", "b", "c", "d", "e")] * 3 + [go_on("b", "d")] * 2
        rounds += [go_on("b", "a"), go_on("e"), go_on("c", "b"), go_on("a", "d")]
        self.compare(start(*new), *rounds)

    def test_a_penalty_beside_a_chunk(self) -> None:
        """Some of the sequences draw, and with wishes of their own."""
        a, c = make_request("a", 5, presence_penalty=1.5), make_request("c", 6)
        b = make_request("b", 40)
        chunk = ScheduledRequest("b", 30, list(range(20, 32)))
        both = [chunk, ScheduledRequest("c", 1), ScheduledRequest("a", 1)]
        self.compare(start(a, c), go_on("a", "c"), StepPlan(both, [b]), go_on("c", "a"))

    def test_those_who_draw_are_not_the_first(self) -> None:
        """A prompt of which more is cached comes before them, and draws nothing yet."""
        a, c = make_request("a", 5), make_request("c", 6, presence_penalty=1.5)
        b = make_request("b", 40)
        chunk = StepPlan([ScheduledRequest("b", 20, list(range(20, 32)))], [b])
        both = [
            ScheduledRequest(name, n) for name, n in (("c", 1), ("b", 10), ("a", 1))
        ]
        self.compare(start(a, c), chunk, StepPlan(both), go_on("c", "a"))

    def test_prompt_logprobs_go_around_the_graphs(self) -> None:
        new = [make_request("a", 6, prompt_logprobs=1), make_request("b", 4)]
        sizes = self.compare(start(*new), go_on("a", "b"))
        assert sizes == [(2, 2, True)]

    def test_wishes_of_a_row_that_changes_hands(self) -> None:
        runner, theirs = make_runner(num_rows=1), make_runner(ModelRunner, num_rows=1)
        drawn = []
        for name, params in (
            ("a", {}),
            ("b", {"temperature": 1.3, "seed": 3}),
            ("c", {"repetition_penalty": 1.8}),
            ("d", {}),
        ):
            before = [chr(ord(name) - 1)]
            plan = start(make_request(name, 5, **params))
            plan = StepPlan(plan.scheduled, plan.new_requests, before)
            for each in (plan, go_on(name), go_on(name)):
                one, other = runner.launch(each), theirs.launch(each)
                drawn.append(get_tokens(one)[name])
                assert drawn[-1] == get_tokens(other)[name]
        assert len(set(drawn)) > 3

    def test_the_longest_sequences_come_first(self) -> None:
        runner = make_runner()
        runner.launch(start(make_request("A", 3), make_request("B", 9))).read()
        runner.launch(start(make_request("C", 6), first_block=9)).read()
        assert runner.graphs is not None
        runner.launch(go_on("A", "B", "C")).read()
        _, seq_lens, *_ = runner.graphs.inputs.split(GraphSize(4, 4, True))
        assert seq_lens.tolist() == [10, 7, 4, 0]

    def test_an_empty_plan(self) -> None:
        runner = make_runner()
        assert runner.launch(StepPlan([])).read().tokens == {}

    def test_logits_that_are_not_finite(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """-1 is told, and no token that could not run is kept."""
        runner = make_runner()
        runner.launch(start(make_request("a", 5), make_request("b", 5))).read()
        compute = get_model().compute_logits
        spoil = torch.tensor([NAN, 0, 0, 0])[:, None]
        monkeypatch.setattr(
            get_model(), "compute_logits", lambda x: compute(x) + spoil[: len(x)]
        )
        tokens = get_tokens(runner.launch(go_on("a", "b")))
        assert tokens["a"] == -1 and tokens["b"] >= 0
        assert runner.rows.last_token_ids[runner.rows.by_id["a"].row] == 0


class TestPadding:
    """What fills a step up touches nobody's row, block or last token."""

    def test_rows_blocks_and_last_tokens(self) -> None:
        runner = make_runner()
        new = [
            make_request(n, k) for n, k in zip("abcde", (5, 7, 9, 4, 6), strict=True)
        ]
        runner.launch(start(*new)).read()
        rows = runner.rows
        for plan in (go_on("a", "b", "c"), go_on("d"), go_on("b", "a", "c", "e", "d")):
            before = [one.clone() for pair in runner.kv_caches for one in pair]
            others = [r for r in range(8) if r not in self.get_rows(runner, plan)]
            rows.last_token_ids[others] = 1_000_000 + torch.tensor(others)
            kept = rows.block_table.clone(), rows.sampling.ints.clone()
            step = runner.launch(plan)
            assert all(token >= 0 for token in get_tokens(step).values())
            written = {
                slot
                for one in plan.scheduled
                for slot in self.get_slots(runner, one.request_id)
            }
            assert len(written) == len(plan.scheduled)
            after = [one for pair in runner.kv_caches for one in pair]
            for old, new_one in zip(before, after, strict=True):
                same = old.flatten(0, 1).nan_to_num(7) == new_one.flatten(
                    0, 1
                ).nan_to_num(7)
                changed = (~same.flatten(1).all(1)).nonzero().flatten().tolist()
                assert set(changed) == written
            expected = 1_000_000 + torch.tensor(others)
            assert torch.equal(rows.last_token_ids[others], expected)
            assert torch.equal(kept[0], rows.block_table)
            assert torch.equal(kept[1], rows.sampling.ints)
            rows.last_token_ids[others] = 5

    @staticmethod
    def get_rows(runner: Any, plan: StepPlan) -> list[int]:
        return [runner.rows.by_id[one.request_id].row for one in plan.scheduled]

    @staticmethod
    def get_slots(runner: Any, name: str) -> list[int]:
        state = runner.rows.by_id[name]
        place = state.num_computed_tokens - 1
        return [state.block_ids[place // 4] * 4 + place % 4]

    def test_what_is_recorded_runs_with_nobody(self) -> None:
        """On a GPU all graphs are recorded with a step that holds nothing."""
        runner = make_runner()
        graphs, last = runner.graphs, runner.rows.last_token_ids
        last.copy_(100 + torch.arange(9))
        cache = runner.kv_caches[0][0]
        cache.fill_(7)
        for size in graphs.sizes:
            graphs.inputs.load(StepLayout(), size)
            graphs.steps[size]()
            for is_random in (False, True):
                graphs.draws[size.num_seqs, is_random]()
        assert last.tolist()[:8] == list(range(100, 108))
        assert (cache == 7).all()

    def test_the_row_of_nobody_is_never_given_away(self) -> None:
        runner = make_runner()
        new = [make_request(name, 1) for name in "abcdefgh"]
        runner.launch(start(*new))
        taken = {state.row for state in runner.rows.by_id.values()}
        assert runner.graphs.inputs.padding_row not in taken
        assert runner.rows.free_rows == []

    def test_tokens_that_pad_a_mixed_step_belong_to_a_sequence_that_exists(
        self,
    ) -> None:
        """Eight sequences of a step that is full, and 64 - 36 tokens of nobody."""
        runner, theirs = make_runner(), make_runner(ModelRunner)
        plan = start(*[make_request(n, 1 + i) for i, n in enumerate("abcdefgh")])
        assert get_tokens(runner.launch(plan)) == get_tokens(theirs.launch(plan))


class TestRunAhead:
    def test_tokens_that_only_the_device_knows(self) -> None:
        """The host is never told, and steps of all kinds go on from them."""
        runner, theirs = make_runner(), make_runner(ModelRunner)
        new = [make_request(n, k) for n, k in zip("abc", (3, 9, 5), strict=True)]
        late = make_request("d", 12)
        plans = [start(*new), go_on("c", "a", "b"), go_on("a", "b")]
        beside = ScheduledRequest("d", 12, list(range(30, 36)))
        mixed = [beside, ScheduledRequest("b", 1), ScheduledRequest("c", 1)]
        plans += [StepPlan(mixed, [late]), go_on("d", "c")]
        steps = [runner.launch(plan) for plan in plans]
        expected = [get_tokens(theirs.launch(plan)) for plan in plans]
        assert [get_tokens(step) for step in steps] == expected
        assert len({token for drawn in expected for token in drawn.values()}) > 5

    def test_a_layout_says_minus_one(self) -> None:
        runner = make_runner()
        runner.launch(start(make_request("a", 3), make_request("b", 4)))
        step = lay_end_to_end(runner.rows, go_on("a", "b"), 4)
        assert step.input_ids == [-1, -1]

    def test_results_outlive_the_next_launch(self) -> None:
        runner = make_runner()
        runner.launch(start(make_request("a", 3), make_request("b", 4)))
        step = runner.launch(go_on("a", "b"))
        tokens = step.token_ids.tolist()
        for _ in range(3):
            runner.launch(go_on("b", "a"))
        runner.graphs.token_ids.fill_(-7)
        runner.graphs.logits.fill_(NAN)
        assert list(get_tokens(step).values()) == tokens


# --- The engine -----------------------------------------------------------------------


PLAIN: dict[str, Any] = {"ignore_eos": True}


def make_traffic(count: int = 14) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(0)
    prompts = [rng.choices(range(2000), k=rng.randint(1, 60)) for _ in range(count)]
    wishes: dict[int, dict[str, Any]] = {
        3: {"repetition_penalty": 1.3, "logprobs": 2},
        5: {"top_p": 0.8},
        7: {"prompt_logprobs": 1},
        9: {"min_tokens": 4, "stop_token_ids": list(range(200, 400))},
    }
    params = [
        SamplingParams(
            temperature=0 if i % 3 == 0 else 0.8,
            seed=i,
            max_tokens=rng.randint(2, 24),
            **PLAIN | wishes.get(i, {}),
        )
        for i in range(count)
    ]
    return prompts, params


def write(**options: Any) -> list[list[int]]:
    prompts, params = make_traffic()
    engine = make_engine(**options)
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@cache
def write_eagerly() -> list[list[int]]:
    return write(decode="eager", is_static=False)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("decode", ["graph", "graph_plain", "compile"])
def test_all_runners_write_what_the_eager_one_writes(
    decode: str, run_ahead: bool
) -> None:
    assert write(decode=decode, async_scheduling=run_ahead) == write_eagerly()


def test_one_request_at_a_time() -> None:
    assert write(decode="graph", scheduler="fcfs", max_num_seqs=1) == write_eagerly()


def test_which_runners_record() -> None:
    assert get_graphs(make_engine(decode="graph")).steps.keys() == set(
        choose_sizes(8, 64)
    )
    assert get_graphs(make_engine(decode="graph_plain")).draws
    runner: Any = make_engine(decode="compile").executor.worker.runner
    assert runner.graphs is None and isinstance(runner.forward, LayerwiseModel)


@pytest.mark.parametrize("decode", ["graph", "graph_plain", "compile"])
def test_a_backend_that_reads_on_the_host_runs_eagerly(
    decode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "folo_lib"):
        engine = make_engine(is_static=False, decode=decode)
        runner: Any = engine.executor.worker.runner
        assert runner.graphs is None and not runner.is_static
        prompts, params = make_traffic()
        outputs = engine.generate(prompts, params, use_tqdm=False)
    [record] = caplog.records
    said = f"decode={decode!r} needs attention_backend='triton', not 'torch_ragged'"
    assert record.getMessage() == f"{said}: steps run eagerly."
    assert [one.outputs[0].token_ids for one in outputs] == write_eagerly()


# --- Recording ------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_python_looks_for_no_garbage_during_a_recording(
    enabled: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And afterwards does what it did before, however the recording has ended."""
    cuda: Any = torch.cuda
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(cuda, "graph", lambda graph, **options: nullcontext())
    recorder: Any = Recorder(CPU)
    recorder.is_cuda, recorder.memory, recorder.stream = True, None, None
    seen: list[bool] = []

    def run() -> None:
        seen.append(gc.isenabled())
        if fails and len(seen) == 2:
            raise ValueError("in the recording")

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(ValueError):
            assert recorder.record(run) is graph.replay
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    # The first run is not recorded.
    assert seen == [enabled, False]


# --- Random schedules -----------------------------------------------------------------


Models = tuple[Qwen3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase]


@cache
def get_static_models() -> Models:
    """The model of all schedules, whose backend learns lengths from tensors."""
    ours, theirs, tokenizer = schedules.get_models()
    static = Qwen3ForCausalLM(ours.config, "torch_naive").eval().requires_grad_(False)
    static.load_state_dict(ours.state_dict())
    use_tensors(static)
    return static, theirs, tokenizer


def run_schedules(
    seeds: range,
    models: Models,
    monkeypatch: Any,
    decode: str = "graph",
    run_ahead: bool = True,
) -> Counter[str]:
    """In graphs, with the host one step behind; each item is run alone eagerly."""
    tally: Counter[str] = Counter()
    for seed in seeds:
        schedule = Schedule(seed, small=True, run_ahead=run_ahead)
        for arrival in schedule.arrivals:
            schedules.run_alone(arrival.item.number, arrival.item.small)
        schedule.options["decode"] = decode
        with monkeypatch.context() as patch:
            patch.setattr(schedules, "get_models", lambda: models)
            try:
                tally += schedule.run()
            except Exception as error:
                error.add_note(f"in Schedule({seed}, True, {run_ahead}), {decode}")
                raise
    return tally


def test_random_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = run_schedules(range(6), get_static_models(), monkeypatch)
    assert tally["right"] > 20


@pytest.mark.more
@pytest.mark.slow
def test_more_random_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = run_schedules(range(100, 130), get_static_models(), monkeypatch)
    assert tally["right"] > 100 and tally["preempted"] > 2


# --- On a GPU -------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> None:
    """Each engine compiles anew, and the compiler gives up on a function after eight."""
    torch._dynamo.reset()


@cache
def get_gpu_models(dtype: torch.dtype = torch.float32) -> Models:
    ours, theirs, tokenizer = schedules.get_models()
    model = Qwen3ForCausalLM(ours.config, "triton").eval().requires_grad_(False)
    model.load_state_dict(ours.state_dict())
    return model.to("cuda", dtype), theirs, tokenizer


@gpu
@on_gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_random_schedules_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real graphs of compiled layers: the tokens of a CPU, or near-ties."""
    torch.backends.cuda.matmul.allow_tf32 = False
    tally = run_schedules(range(4), get_gpu_models(), monkeypatch)
    assert tally["right"] > 12


@gpu
@on_gpu
@pytest.mark.more
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("first", range(1000, 1300, 25))
@pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "ahead"])
@pytest.mark.parametrize("decode", ["eager", "compile", "graph_plain", "graph"])
def test_three_hundred_random_schedules_on_a_gpu(
    decode: str, run_ahead: bool, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every way to run a step, in float32; of one first block: `-k "graph and 1000"`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    seeds = range(first, first + 25)
    tally = run_schedules(seeds, get_gpu_models(), monkeypatch, decode, run_ahead)
    assert tally["right"] > 75


@gpu
@on_gpu
def test_an_old_graph_that_is_garbage_does_not_end_a_recording() -> None:
    """As it may be in an engine that nobody needs any more; see `Recorder`."""
    recorder = Recorder(torch.device("cuda"))
    number = torch.zeros(1, device="cuda")
    old: list[Any] = [recorder.record(lambda: number.add_(1))]
    calls: list[None] = []

    def run() -> None:
        calls.append(None)
        number.add_(1)
        if len(calls) == 2:  # in the recording
            cycle = old[:]
            cycle.append(cycle)  # so that only a search finds it
            old.clear()
            del cycle
            assert len([[] for _ in range(100_000)]) == 100_000  # calls for a search

    replay = recorder.record(run)
    number.zero_()
    replay()
    assert number.item() == 1


@gpu
@on_gpu
def test_other_threads_may_use_the_device_during_a_recording() -> None:
    """Such as another engine's: its allocations and waits are no part of it."""
    recorder = Recorder(torch.device("cuda"))
    number, begun, done = torch.zeros(1, device="cuda"), Event(), Event()
    found: list[float] = []

    def other() -> None:
        assert begun.wait(10)
        torch.cuda.empty_cache()
        found.append(torch.ones(2**26, device="cuda").sum().item())
        done.set()

    calls: list[None] = []

    def run() -> None:
        calls.append(None)
        number.add_(1)
        if len(calls) == 2:  # in the recording
            begun.set()
            done.wait(10)

    thread = Thread(target=other)
    thread.start()
    replay = recorder.record(run)
    thread.join()
    number.zero_()
    replay()
    assert found == [2**26] and number.item() == 1


def make_gpu_engine(dtype: torch.dtype, decode: str) -> LLMEngine:
    model, _, tokenizer = get_gpu_models(dtype)
    return LLMEngine(
        model, tokenizer, decode=decode, max_model_len=256, max_num_seqs=8,
        max_num_batched_tokens=64, kv_cache_memory_bytes=2**26,
    )  # fmt: skip


@gpu
@on_gpu
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("decode", ["graph", "graph_plain", "compile"])
def test_logits_on_a_gpu(decode: str) -> None:
    """Hardly further from Hugging Face's in float32 than those of eager steps."""
    prompts, _ = make_traffic(8)
    errors: dict[tuple[str, torch.dtype], float] = {}
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    for dtype in (torch.float32, torch.bfloat16):
        for one in ("eager", decode):
            engine = make_gpu_engine(dtype, one)
            worst = []
            for output in engine.generate(prompts, params, use_tqdm=False):
                exact = schedules.get_logits(output.prompt_token_ids)[-1].log_softmax(
                    -1
                )
                [entries] = output.outputs[0].logprobs or []
                ours = torch.tensor([entries[i].logprob for i in range(len(exact))])
                worst.append((ours - exact).square().mean().sqrt().item())
            errors[one, dtype] = sum(worst) / len(worst)
    for dtype in (torch.float32, torch.bfloat16):
        assert errors[decode, dtype] <= 1.2 * errors["eager", dtype] + 1e-6
    assert errors["eager", torch.float32] < errors["eager", torch.bfloat16]


@gpu
@on_gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_an_engine_that_has_only_started_on_a_gpu() -> None:
    """Recording leaves nothing behind: no request, no token, a cache that is not read."""
    engine = make_gpu_engine(torch.float32, "graph")
    rows = engine.executor.worker.runner.rows
    assert not rows.by_id and len(rows.free_rows) == 8
    assert not engine.has_unfinished_requests()
    eager = make_gpu_engine(torch.float32, "eager")
    params = SamplingParams(temperature=0, max_tokens=12, **PLAIN)
    prompts, _ = make_traffic(3)
    tokens = [
        [
            one.outputs[0].token_ids
            for one in each.generate(prompts, params, use_tqdm=False)
        ]
        for each in (engine, eager)
    ]
    assert tokens[0] == tokens[1]
