"""runner.py: a step of many requests against each request alone, without a cache."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import CASES, assert_parity, load, make_config, make_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from folo_lib import bundled_model_path, load_model
from folo_lib.config import MODEL_RUNNERS, EngineConfig
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.runner import (
    GPUExecutor,
    GPUWorker,
    InputBatch,
    ModelRunner,
    SampledToken,
    ScheduledRequest,
    make_block_table,
)
from folo_lib.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def bundled() -> Qwen3ForCausalLM:
    return load_model(bundled_model_path(), device="cpu", use_tqdm=False)


def make_model(case: str) -> Qwen3ForCausalLM:
    config = make_config(case)
    return load(config, make_reference(config), "torch_sdpa")


def make_runner(
    model: Qwen3ForCausalLM, num_blocks: int = 64, block_size: int = 4
) -> ModelRunner:
    """With a cache full of NaN, so that nothing stale may be read."""
    runner = ModelRunner(model, EngineConfig(block_size=block_size))
    runner.initialize_kv_caches(num_blocks)
    for pair in runner.kv_caches:
        for cache in pair:
            cache.fill_(float("nan"))
    return runner


def plan(
    name: str,
    tokens: Sequence[int],
    start: int,
    length: int,
    blocks: Sequence[int],
    params: SamplingParams = GREEDY,
    num_prompt_tokens: int | None = None,
    **fields: Any,
) -> ScheduledRequest:
    """Run `tokens[start : start + length]`, of which the first are the prompt."""
    return ScheduledRequest(
        name,
        tokens[start : start + length],
        start,
        blocks,
        tokens[:num_prompt_tokens],
        params,
        output_token_ids=tokens[len(tokens[:num_prompt_tokens]) : start + length],
        **fields,
    )


def logits_of(runner: ModelRunner, *plans: ScheduledRequest) -> Tensor:
    batch = runner.prepare_inputs(plans)
    hidden = runner.model(batch.input_ids, batch.positions, runner.kv_caches, batch)
    return runner.get_next_token_logits(hidden, batch)


def run(runner: ModelRunner, *plans: ScheduledRequest) -> list[int]:
    tokens, _ = runner.draw_tokens(runner.prepare_inputs(plans))
    return [int(token) for token in tokens]


def uncached(model: Qwen3ForCausalLM, tokens: Sequence[int]) -> Tensor:
    return model.compute_logits(model(torch.tensor(tokens)))


def random_tokens(model: Qwen3ForCausalLM, length: int) -> list[int]:
    tokens: list[int] = torch.randint(model.config.vocab_size, (length,)).tolist()
    return tokens


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
            runner, start = make_runner(model), 0
            for length in [*chunks, *[1] * 14]:
                logits = logits_of(
                    runner, plan("x", tokens, start, length, blocks, GREEDY, 96)
                )
                start += length
                assert_parity(logits, exact[start - 1 : start])

    @pytest.mark.parametrize("case", ["qwen3 14/2 untied bias", "qwen3 6/3 yarn bias"])
    def test_unequal_requests_in_one_step_equal_each_alone(self, case: str) -> None:
        model, rng = make_model(case), random.Random(1)
        sequences = [random_tokens(model, n) for n in (40, 3, 25, 1, 31)]
        exact = [uncached(model, tokens) for tokens in sequences]
        pool = list(range(64))
        rng.shuffle(pool)
        blocks = [[pool.pop() for _ in range(-(-len(s) // 4))] for s in sequences]
        runner, starts = make_runner(model), [0] * 5
        while left := [i for i in range(5) if starts[i] < len(sequences[i])]:
            chosen = rng.sample(left, rng.randint(1, len(left)))
            lengths = [
                rng.choice([1, rng.randint(1, len(sequences[i]) - starts[i])])
                for i in chosen
            ]
            logits = logits_of(
                runner,
                *(
                    plan(str(i), sequences[i], starts[i], length, blocks[i])
                    for i, length in zip(chosen, lengths, strict=True)
                ),
            )
            for i, length, row in zip(chosen, lengths, logits, strict=True):
                starts[i] += length
                assert_parity(row, exact[i][starts[i] - 1])

    def test_the_cases_are_there(self) -> None:
        ratios = {case[1] // case[2] for case in CASES.values()}
        assert {1, 2, 4, 7} <= ratios


class TestInputBatch:
    def test_lays_requests_end_to_end(self, bundled: Qwen3ForCausalLM) -> None:
        runner = make_runner(bundled)
        batch = runner.prepare_inputs(
            [
                plan("A", list(range(100, 110)), 9, 1, [0, 1, 2], num_prompt_tokens=9),
                plan("B", [11, 12, 13, 14, 15], 0, 5, [9, 3]),
                plan("C", [21, 22, 23, 24, 25, 26, 27], 4, 3, [5, 6]),
            ]
        )
        assert isinstance(batch, InputBatch)
        assert batch.input_ids.tolist() == [109, 11, 12, 13, 14, 15, 25, 26, 27]
        assert batch.positions.tolist() == [9, 0, 1, 2, 3, 4, 4, 5, 6]
        assert batch.slot_mapping.tolist() == [9, 36, 37, 38, 39, 12, 24, 25, 26]
        assert batch.query_start_loc.tolist() == [0, 1, 6, 9]
        assert batch.seq_lens.tolist() == [10, 5, 7]
        assert batch.block_table[:, :2].tolist() == [[0, 1], [9, 3], [5, 6]]
        assert batch.first_slots is None  # 9 and 3 do not follow one another
        assert batch.logits_indices.tolist() == [0, 5, 8]
        assert batch.sampling.positions.tolist() == [10, 5, 7]

    def test_block_table(self) -> None:
        table, first_slots = make_block_table([[4], [0, 1, 2], [8, 9]], 16)
        assert table.tolist() == [[4, 0, 0], [0, 1, 2], [8, 9, 0]]
        assert first_slots == [64, 0, 128]
        for blocks in ([1, 0], [0, 2], [0, 1, 3], [2, 2]):
            assert make_block_table([[4], blocks], 16)[1] is None

    def test_tensors_are_kept_while_the_same_requests_run(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner, tokens = make_runner(bundled), list(range(50))
        first = runner.prepare_inputs([plan("A", tokens, 0, 9, [0, 1, 2])])
        second = runner.prepare_inputs([plan("A", tokens, 9, 1, [0, 1, 2])])
        assert second.block_table is first.block_table
        assert second.sampling.seeds is first.sampling.seeds
        assert first.sampling.positions.tolist() == [9]  # was not overwritten
        for other in (
            [plan("A", tokens, 10, 1, [0, 1, 2, 3])],
            [plan("B", tokens, 10, 1, [0, 1, 2, 3])],
            [plan("A", tokens, 10, 1, [0, 1, 2]), plan("B", tokens, 0, 1, [7])],
            [plan("A", tokens, 0, 3, [0, 1, 2])],
        ):
            third = runner.prepare_inputs(other)
            assert third.block_table is not first.block_table

    def test_the_same_ids_and_counts_in_other_blocks(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        """The block table is that of this step, not of one before."""
        runner, tokens = make_runner(bundled), list(range(8))
        run(runner, plan("A", tokens, 0, 5, [0, 1]), plan("B", tokens, 0, 5, [2, 3]))
        same = [plan("A", tokens, 5, 1, [0, 1]), plan("B", tokens, 5, 1, [2, 3])]
        table = runner.prepare_inputs(same).block_table
        assert table.tolist() == [[0, 1], [2, 3]]
        moved = [plan("A", tokens, 6, 1, [0, 1]), plan("B", tokens, 6, 1, [5, 3])]
        assert runner.prepare_inputs(moved).block_table.tolist() == [[0, 1], [5, 3]]
        still = [plan("A", tokens, 7, 1, [0, 1]), plan("B", tokens, 7, 1, [5, 3])]
        assert runner.prepare_inputs(still).block_table.tolist() == [[0, 1], [5, 3]]

    def test_blocks_are_compared_as_they_were(self, bundled: Qwen3ForCausalLM) -> None:
        """A scheduler may change the list that it handed out."""
        runner, tokens, blocks = make_runner(bundled), list(range(50)), [0, 1]
        first = runner.prepare_inputs([plan("A", tokens, 0, 3, blocks)])
        blocks[1] = 7
        second = runner.prepare_inputs([plan("A", tokens, 3, 1, blocks)])
        assert (first.block_table.tolist(), second.block_table.tolist()) == (
            [[0, 1]],
            [[0, 7]],
        )

    def test_a_restarted_id_gets_its_new_params(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner = make_runner(bundled)
        warm = SamplingParams(temperature=0.5)
        runner.prepare_inputs([plan("A", [1, 2], 0, 2, [0])])
        batch = runner.prepare_inputs([plan("A", [1, 2], 0, 2, [0], warm, seed=9)])
        assert batch.sampling.temperature is not None
        assert batch.sampling.temperature.tolist() == [0.5]
        assert batch.sampling.seeds.tolist() == [9]


class TestPenalties:
    params = SamplingParams(temperature=0, frequency_penalty=1.0)

    def counts(self, runner: ModelRunner, row: int = 0) -> dict[int, int]:
        assert runner.running is not None
        counts = runner.running.sampling.output_counts
        assert counts is not None
        return {int(i): int(counts[row, i]) for i in counts[row].nonzero()}

    def prompt(self, runner: ModelRunner, row: int = 0) -> set[int]:
        assert runner.running is not None
        mask = runner.running.sampling.prompt_mask
        assert mask is not None
        return {int(i) for i in mask[row].nonzero()}

    def test_counts_what_was_written_and_not_the_prompt(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner, tokens = make_runner(bundled), [5, 6, 5, 7, 9, 9, 8]
        for start, length in [(0, 2), (2, 2), (4, 1), (5, 1), (6, 1)]:
            run(runner, plan("A", tokens, start, length, [0, 1], self.params, 4))
            assert self.prompt(runner) == {5, 6, 7}
        assert self.counts(runner) == {9: 2, 8: 1}

    def test_a_request_that_starts_over_is_counted_once(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner, tokens = make_runner(bundled), [5, 6, 9, 9, 8]
        for start, length in [(0, 2), (2, 1), (3, 1), (0, 4), (4, 1)]:
            run(runner, plan("A", tokens, start, length, [0, 1], self.params, 2))
        assert self.counts(runner) == {9: 2, 8: 1}

    def test_counts_stay_with_their_request_when_others_come_and_go(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner, tokens = make_runner(bundled), [5, 6, 9, 9, 8, 8, 8]

        def a(start: int, length: int = 1) -> ScheduledRequest:
            return plan("A", tokens, start, length, [0, 1], self.params, 2)

        def b(start: int, length: int = 1) -> ScheduledRequest:
            return plan("B", [3, 4, 4, 4], start, length, [5], GREEDY, 1)

        run(runner, a(0, 2))
        run(runner, a(2), b(0))
        assert self.counts(runner, 0) == {9: 1}
        assert self.counts(runner, 1) == {}
        assert (self.prompt(runner, 0), self.prompt(runner, 1)) == ({5, 6}, {3})
        run(runner, b(1), a(3))
        assert self.counts(runner, 0) == {4: 1}
        assert self.counts(runner, 1) == {9: 2}
        run(runner, a(4))
        assert self.counts(runner) == {9: 2, 8: 1}
        run(runner, plan("C", [1], 0, 1, [5]))  # nobody with penalties
        assert runner.running is not None
        assert runner.running.sampling.output_counts is None

    def test_counts_outlive_a_step_without_the_request(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        runner, tokens = make_runner(bundled), [5, 6, 9, 9, 8, 8, 8]
        for start, length in [(0, 2), (2, 1), (3, 1)]:
            run(runner, plan("A", tokens, start, length, [0, 1], self.params, 2))
        run(runner, plan("B", [3, 4], 0, 2, [5], GREEDY, 2))
        run(runner, plan("A", tokens, 4, 1, [0, 1], self.params, 2))
        assert self.counts(runner) == {9: 2, 8: 1}
        assert self.prompt(runner) == {5, 6}

    def test_a_part_that_is_run_again_is_counted_once(
        self, bundled: Qwen3ForCausalLM
    ) -> None:
        """Set back into the middle of the output, and read again in chunks."""
        runner, tokens = make_runner(bundled), [5, 6, 9, 9, 8, 7, 7]
        for start, length in [(0, 2), (2, 1), (3, 1), (4, 1), (3, 2), (0, 3), (3, 2)]:
            run(runner, plan("A", tokens, start, length, [0, 1], self.params, 2))
        assert self.counts(runner) == {9: 2, 8: 1}


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
    tokens, blocks = random_tokens(bundled, 520), range(40)
    counted = []
    run(runner, plan("A", tokens, 0, 20, blocks, params, 20))
    for start in (20, 21, 260, 518):
        if start > 21:
            run(runner, plan("A", tokens, start - 9, 9, blocks, params, 20))
        with CountOps() as counter:
            run(runner, plan("A", tokens, start, 1, blocks, params, 20))
        counted.append(counter.ops)
    names = [[name for name, _ in ops] for ops in counted]
    assert names[0] == names[1] == names[2] == names[3]
    views = {"slice", "transpose", "unsqueeze", "expand", "view", "_unsafe_view"}
    for ops in counted[1:]:
        for (name, size), (_, other) in zip(counted[0], ops, strict=True):
            assert size == other or name in views, name


def make_executor(**options: Any) -> GPUExecutor:
    config = EngineConfig(device="cpu", use_tqdm=False, **options)
    return GPUExecutor(bundled_model_path(), config)


class TestExecutor:
    def test_plain_data_in_and_out(self) -> None:
        executor = make_executor()
        params = SamplingParams(temperature=0, logprobs=3)
        request = plan("A", [1, 2, 3], 0, 3, [0], params)
        other = plan("B", [4, 5], 0, 2, [1])
        sent = pickle.loads(pickle.dumps([request, other]))
        drawn, bare = pickle.loads(pickle.dumps(executor.execute_model(sent)))
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
        drawn = executor.execute_model(
            [
                plan(str(i), [7, i], 0, 2, [i], SamplingParams(logprobs=k, seed=i))
                for i, k in enumerate(asked)
            ]
        )
        sizes = [None if d.logprobs is None else len(d.logprobs) for d in drawn]
        assert sizes == [None, 1, 3, executor.config.vocab_size + 1, 6]
        for sampled in drawn[1:]:
            assert sampled.logprobs[0][0] == sampled.token_id
            [rank] = {r for i, _, r in sampled.logprobs[:1]}
            assert rank >= 1

    def test_sizes(self) -> None:
        executor = make_executor(max_model_len=100)
        assert executor.max_model_len == 100
        assert (executor.num_blocks, executor.block_size) == (7, 16)
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
        monkeypatch.setattr("folo_lib.runner.load_model", None)
        with pytest.raises(ValueError, match=r"max_model_len=5000.*4096"):
            GPUWorker(bundled_model_path(), EngineConfig(max_model_len=5000))


CUDA = torch.device("cuda")


class OwnRunner(ModelRunner):
    pass
