"""The fused step of a shard, page 15's kernels with the sums of page 16 between them.

Without GPUs the ranks are threads of one process that take turns, since Triton's interpreter
runs one kernel at a time; their sums are made by hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux")

from test_fused_decode import (
    BLOCK_SIZE,
    DEVICE,
    HAS_GPU,
    Step,
    few_programs,
    make_model,
    no_gradients,
)

from folo_lib import fused_decode, fused_shards
from folo_lib.fused_checks import find_obstacle
from folo_lib.fused_shards import ShardedDecode
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.tensor_parallel import ShardedForCausalLM, find_share

__all__ = ["few_programs", "no_gradients"]  # fixtures

pytestmark = pytest.mark.skipif(HAS_GPU, reason="see test_tensor_parallel_gpu.py")


class Turns:
    """Lets one rank run at a time, from sum to sum."""

    def __init__(self, size: int) -> None:
        self.size, self.board, self.running = size, [None] * size, threading.Lock()
        self.barrier = threading.Barrier(size, timeout=300)

    def wait(self) -> None:
        self.running.release()
        self.barrier.wait()
        self.running.acquire()


class TurnSum:
    """What `ShardedDecode` needs, and what `ShardedForCausalLM` needs beside it."""

    def __init__(self, rank: int, turns: Turns) -> None:
        self.rank, self.size, self.turns, self.count = rank, turns.size, turns, 0
        self.device = DEVICE

    def allocate(self, *shape: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
        return torch.full(shape, fill, dtype=dtype)

    def show(self, shared: Tensor) -> list[Tensor]:
        """What all ranks show."""
        self.turns.board[self.rank] = shared
        self.turns.wait()
        board = list(self.turns.board)
        self.turns.wait()  # all have read
        return board

    def find_addresses(self, shared: Tensor) -> list[int]:
        return [one.data_ptr() for one in self.show(shared)]

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.show(x.clone())).sum(0)


class Meeting:
    """A kernel that waits for what other ranks send: they take their turns before it.

    What has not come by then never comes, and the kernel would wait for ever.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel, names = kernel, kernel.arg_names
        self.places = [names.index(name) for name in ("words", "tickets", "index")]

    def __getitem__(self, grid: Any) -> Any:
        sums = TURN.get()
        sums.count += 1
        sums.turns.wait()

        def launch(*arguments: Any, **options: Any) -> None:
            words, tickets, index = (arguments[i] for i in self.places)
            come = words & 0xFFFFFFFF == tickets + index
            assert come.any(1).all(), f"sum {index}: ranks {come.any(1).tolist()} sent"
            self.kernel[grid](*arguments, **options)

        return launch


TURN: ContextVar[TurnSum] = ContextVar("the rank of a thread")


@pytest.fixture(autouse=True)
def meetings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sum_kernel", "choose_kernel"):
        kernel = Meeting(getattr(fused_shards, name))
        monkeypatch.setattr(fused_shards, name, kernel)


def run_ranks(size: int, work: Callable[[TurnSum], Any]) -> list[Any]:
    """What a function returns on each rank."""
    turns = Turns(size)

    def run(rank: int) -> Any:
        with torch.inference_mode(), turns.running:
            try:
                sums = TurnSum(rank, turns)
                TURN.set(sums)
                return work(sums)
            except BaseException:
                turns.barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [one.exception() for one in futures if one.exception()]
    real = [one for one in errors if not isinstance(one, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return [one.result() for one in futures]


def make_shard(
    whole: Qwen3ForCausalLM, group: Any, backend: str = "torch_naive"
) -> ShardedForCausalLM:
    """One rank's part of a model."""
    shard = ShardedForCausalLM(whole.config, group, backend).eval()
    weight = whole.model.embed_tokens.weight
    parts = []
    for name, tensor in whole.hf_weights().items():
        share = find_share(
            name, list(tensor.shape), whole.config, group.rank, group.size
        )
        assert share is not None
        dim, start, stop = share
        part = tensor[:, start:stop] if dim else tensor[start:stop]
        parts.append((name, part))
    shard.to(weight.device, weight.dtype)
    shard.load_weights(parts)
    return shard


def cut_caches(
    caches: Sequence[tuple[Tensor, Tensor]], rank: int, size: int
) -> list[tuple[Tensor, Tensor]]:
    """The heads of one rank; with fewer heads than ranks neighbours have the same."""
    pairs = []
    for pair in caches:
        count = max(1, pair[0].shape[2] // size)
        first = rank * pair[0].shape[2] // size
        pairs.append(tuple(one[:, :, first : first + count].clone() for one in pair))
    return pairs


def run_shards(
    whole: Qwen3ForCausalLM, seq_lens: Sequence[int], size: int, times: int = 1
) -> tuple[Step, list[Any]]:
    """A step on all ranks: logits, tokens, last tokens, caches and number of sums.

    More than once it runs over what it has left behind, and must give the same.
    """
    step = Step(whole, seq_lens)

    def work(sums: TurnSum) -> Any:
        shard = make_shard(whole, sums)
        assert find_obstacle(shard) is None
        mine = Step.__new__(Step)
        vars(mine).update(vars(step))
        mine.model = shard
        mine.rows = type(step.rows)(
            len(step.rows.block_table) - 1,
            step.rows.block_table.shape[1],
            whole.config.vocab_size,
            DEVICE,
        )
        mine.rows.block_table.copy_(step.rows.block_table)
        mine.rows.last_token_ids.copy_(step.rows.last_token_ids)
        caches = cut_caches(step.copy_caches(), sums.rank, size)
        embedding = shard.model.embed_tokens
        max_blocks = step.rows.block_table.shape[1]
        fused = ShardedDecode(shard, max_blocks)
        logits = torch.zeros(len(seq_lens), len(embedding.weight))
        token_ids = torch.zeros(len(seq_lens), dtype=torch.int64)
        outputs = []
        for _ in range(times):
            mine.rows.last_token_ids.copy_(step.rows.last_token_ids)
            fused.run(mine.get_columns(), mine.rows, caches, logits, token_ids)
            outputs.append((logits.clone(), token_ids.clone()))
        for again in outputs[1:]:
            for before, after in zip(outputs[0], again, strict=True):
                torch.testing.assert_close(
                    after, before, rtol=0, atol=0, equal_nan=True
                )
        count = sums.count // times
        return logits, token_ids, mine.rows.last_token_ids, caches, count

    return step, run_ranks(size, work)


def check_shards(whole: Qwen3ForCausalLM, seq_lens: Sequence[int], size: int) -> None:
    step, ranks = run_shards(whole, seq_lens, size, times=2)
    theirs = step.copy_caches()
    expected, real = step.run_plain(theirs), step.seq_lens > 0
    logits = torch.cat([one[0] for one in ranks], -1)
    tolerance = 1e-5 * max(1.0, expected.std().item())
    torch.testing.assert_close(logits[real], expected, rtol=0, atol=tolerance)
    for rank, (_, token_ids, last, caches, count) in enumerate(ranks):
        assert count == 2 * len(whole.model.layers) + 2  # and embedding, and tokens
        assert token_ids[real].tolist() == expected.argmax(-1).tolist()
        assert last[step.row_index[real]].equal(token_ids[real])
        for mine, other in zip(caches, cut_caches(theirs, rank, size), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("layers", "tied"), [(1, True), pytest.param(2, False, marks=pytest.mark.more)]
)
def test_two_ranks(layers: int, tied: bool) -> None:
    model = make_model(
        heads=16, kv_heads=4, layers=layers, intermediate_size=2048, vocab_size=192,
        tie_word_embeddings=tied,
    )  # fmt: skip
    check_shards(model, [70, 0, BLOCK_SIZE], 2)


@pytest.mark.more
def test_more_ranks_than_key_heads() -> None:
    model = make_model(
        heads=32, kv_heads=2, intermediate_size=4096, vocab_size=256
    )  # fmt: skip
    check_shards(model, [33], 4)


def test_the_winner_of_all_ranks() -> None:
    """Of equal scores the lower id, and no number where one is not finite."""
    model = make_model(
        heads=16, kv_heads=4, intermediate_size=2048, vocab_size=192,
        tie_word_embeddings=False,
    )  # fmt: skip
    assert model.lm_head is not None
    head = model.lm_head.weight
    head[1:96] = head[97:] = 0.0  # 0 and 96 are the first rows of the two ranks
    head[96] = head[0]
    _, ranks = run_shards(model, [3, 9, 4], 2)
    logits = torch.cat([one[0] for one in ranks], -1)
    expected = torch.where(logits[:, 0] > 0, 0, 1)
    assert 0 < expected.sum() < 3 or logits[:, 0].ne(0).all()
    for rank in ranks:
        assert rank[1].tolist() == expected.tolist()
    head[100] = float("nan")
    _, ranks = run_shards(model, [3, 9, 4], 2)
    for rank in ranks:
        assert rank[1].tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ((4096, 12288, 32, 8), 2, None),  # 8B
        ((4096, 12288, 32, 8), 4, None),
        ((1024, 3072, 16, 8), 2, "intermediate_size=1536, not a multiple of 1024"),
        ((2048, 6144, 16, 8), 2, None),  # 1.7B
        ((5120, 25600, 64, 8), 2, "intermediate_size=12800, not a multiple of 1024"),
        (
            (4096, 32768, 64, 8),
            8,
            "vocab_size=18992",
        ),  # rows of a rank, not of the model
    ],
    ids=["8B on 2", "8B on 4", "0.6B on 2", "1.7B on 2", "32B on 2", "rows on 8"],
)
def test_obstacles_of_shards(
    fields: tuple[int, int, int, int], size: int, message: str | None
) -> None:
    """The sizes of a rank count, and not those of the whole model."""
    from transformers import Qwen3Config

    hidden, inner, heads, kv_heads = fields
    config = Qwen3Config(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, vocab_size=151936)  # fmt: skip
    with torch.device("meta"):
        group = TurnSum(0, Turns(size))
        shard = ShardedForCausalLM(config, group, "torch_naive").to(torch.bfloat16)
    fault = find_obstacle(shard)
    assert fault is None if message is None else message in str(fault)


def test_words_of_a_winner() -> None:
    """Whole numbers below 2**56 go through two words, each with a ticket, and come back."""
    numbers = torch.tensor(
        [0, 1, 16777215, 16777216, 2**28 - 1, 2**28, 2**56 - 1, 2**55 + 12345678901]
    )
    best, words = numbers.clone(), torch.zeros(2, 8, dtype=torch.int64)
    tickets = torch.tensor(
        [2**31 - 3], dtype=torch.int32
    )  # the next but one is negative
    addresses = torch.tensor([words.data_ptr()])
    fused_shards.share_kernel[(1,)](best, addresses, 0, tickets, 5, 1, 8, False)
    assert not best.any()
    low, high = words
    assert (((high >> 32) << 28) + (low >> 32)).equal(numbers)
    assert (words & 0xFFFFFFFF).eq((2**31 - 3 + 5) % 2**31).all()
    assert fused_decode.MAX_FUSED_SEQS == 16


class CountingGroup(TurnSum):
    """One rank of two, whose logits are its own ones twice."""

    gathers = 0

    def find_addresses(self, shared: Tensor) -> list[int]:
        return [shared.data_ptr()]

    def all_gather(self, x: Tensor) -> Tensor:
        self.gathers += 1
        return torch.cat([x, x + 1], -1)


def test_logits_are_gathered_where_a_draw_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the benchmark's requests run in the graph that it records."""
    from folo_lib import benchmark_tensor_parallel as benchmark
    from folo_lib.runner import NewRequest, ScheduledRequest, StepPlan
    from folo_lib.sampling_kernels import TritonDraw
    from folo_lib.sampling_params import SamplingParams

    def run(self: Any, columns: Any, rows: Any, caches: Any, *out: Tensor) -> None:
        out[0].copy_(torch.arange(out[0].shape[1]))
        out[1].fill_(191)

    monkeypatch.setattr(fused_shards.ShardedDecode, "run", run)
    monkeypatch.setattr(TritonDraw, "__call__", lambda self, *arguments: None)
    whole = make_model(
        heads=16, kv_heads=4, backend="triton", intermediate_size=2048, vocab_size=192
    )
    group = CountingGroup(0, Turns(2))
    shard = make_shard(whole, group, "triton")
    case = benchmark.Case("8B", 1, 2)
    runner = benchmark.make_runner(shard, case, 8)
    assert isinstance(runner, fused_shards.ShardedRunner)
    graphs = runner.graphs
    assert isinstance(graphs, fused_shards.ShardedGraphs)

    group.gathers = 0
    plan = benchmark.start_requests(runner, case)
    assert runner.launch(plan).read().tokens["0"].token_id == 191
    assert group.gathers == 0

    for params, gathers in (
        (SamplingParams(temperature=1.0), 0),
        (SamplingParams(temperature=1.0, top_k=3), 1),
        (SamplingParams(temperature=0, repetition_penalty=1.5), 1),
    ):
        runner.rows.reset()
        group.gathers = 0
        graphs.logits.fill_(float("nan"))
        new = NewRequest(
            request_id="a", token_ids=[1, 2], num_prompt_tokens=2, params=params,
            num_computed_tokens=1,
        )  # fmt: skip
        step = runner.launch(StepPlan([ScheduledRequest("a", 1, [0])], [new])).read()
        assert group.gathers == gathers, params
        expected = torch.cat([torch.arange(96.0), torch.arange(96.0) + 1])
        assert graphs.logits[0].equal(expected) or gathers == 0
    assert step.tokens["a"].token_id == 191  # of the sampler, from all logits


@pytest.mark.parametrize(
    ("size", "vocab_size"), [(2, 190), (4, 190), (2, 2049), (4, 197)]
)
def test_shards_draw_as_one(size: int, vocab_size: int) -> None:
    """Numbers of rows that differ from call to call, equals on two ranks, and no winner.

    The last rank has rows of nobody, and once fewer tiles than the others have.
    """
    from test_sampling_kernels import Batch, make_logits

    wishes = [{"temperature": 0.0}, {}, {"temperature": 0.3}, {"min_p": 0.2}] * 2
    model = make_model(
        heads=16, kv_heads=4, intermediate_size=4096, vocab_size=vocab_size
    )
    whole = make_logits(8, vocab_size) - 20  # what nobody has written is 0
    whole[0, [20, 150]] = -1.0
    whole[6, 188] = float("nan")
    steps = [whole[:1], whole, whole[:3].flip(0).contiguous()]
    expected = [Batch(wishes[: len(one)], one).draw(False) for one in steps]
    assert expected[1][0] == 20 and expected[1][6] == -1

    def work(sums: TurnSum) -> list[list[int]]:
        shard = ShardedForCausalLM(model.config, sums, "torch_naive")
        draw = fused_shards.ShardedDraw(8, shard)
        rows, drawn = len(shard.model.embed_tokens.weight), []
        for one in steps:
            batch = Batch(wishes[: len(one)], one)
            nobody = torch.full((len(one), rows * size - vocab_size), 99.0)
            own = torch.cat([one, nobody], -1).split(rows, -1)[sums.rank]
            batch.logits = own.contiguous()
            drawn.append(batch.draw(False, draw))
        return drawn

    assert run_ranks(size, work) == [expected] * size


def test_ranks_that_share_no_memory_run_graphs() -> None:
    from folo_lib.config import EngineConfig
    from folo_lib.cuda_graph import StepGraphs
    from folo_lib.fused_shards import ShardedRunner

    class Group(TurnSum):
        find_addresses = property()  # type: ignore[assignment]

    whole = make_model(
        heads=16, kv_heads=4, backend="triton", intermediate_size=2048, vocab_size=192
    )
    shard = make_shard(whole, Group(0, Turns(2)), "triton")
    runner = ShardedRunner(shard, EngineConfig(tensor_parallel_size=2))
    assert runner.graphs_class is StepGraphs
