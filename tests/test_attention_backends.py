"""Every sequence of a step against itself alone, whichever backend attends over the cache."""

from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from helpers import (
    BlockPool,
    KVCache,
    brute_force,
    make_kv_cache,
    make_metadata,
    random_qkv,
)
from hypothesis import given, settings, strategies as st
from torch import Tensor

from folo_lib.kv_cache import (
    AttentionBackend,
    AttentionMetadata,
    PerSequenceBackend,
    TorchNaiveBackend,
    TorchSDPABackend,
    find_first_slot,
    group_by_length,
    read_cache,
    write_cache,
)
from folo_lib.qwen3 import ATTENTION_BACKENDS, get_attention_backend
from folo_lib.ragged_attention import TorchRaggedBackend, plan_ragged

BACKENDS: list[type[PerSequenceBackend]] = [TorchNaiveBackend, TorchSDPABackend]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_on_a_cpu = pytest.mark.parametrize("backend", [*BACKENDS, TorchRaggedBackend])
INF = float("inf")
each_heads = pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (6, 3), (4, 1), (12, 3), (14, 2), (8, 1)]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TestCacheAccess:
    @pytest.mark.parametrize("block_size", [1, 4, 16])
    def test_a_slot_is_a_place_in_a_block(self, block_size: int) -> None:
        cache = torch.zeros(5, block_size, 2, 3)
        slots = torch.randperm(5 * block_size)[: 2 * block_size]
        new = torch.randn(len(slots), 2, 3)
        write_cache(cache, slots, new)
        for slot, written in zip(slots.tolist(), new, strict=True):
            assert torch.equal(cache[slot // block_size, slot % block_size], written)
        assert (cache != 0).sum() == new.numel()

    @pytest.mark.parametrize("block_size", [1, 4, 16])
    def test_reads_in_the_order_of_the_table_and_not_beyond(
        self, block_size: int
    ) -> None:
        cache = torch.randn(6, block_size, 2, 3)
        blocks = [4, 0, 5]
        for seq_len in range(1, 3 * block_size + 1):
            needed = -(-seq_len // block_size)
            table = torch.tensor(blocks[:needed] + [10**9] * 2)
            read = read_cache(cache, table, seq_len)
            assert read.shape == (2, seq_len, 3)
            for j in range(seq_len):
                block, place = divmod(j, block_size)
                assert torch.equal(read[:, j], cache[blocks[block], place])

    def test_blocks_in_a_row_are_read_without_a_copy(self) -> None:
        cache = torch.randn(6, 4, 2, 3)
        for seq_len in range(1, 13):
            gathered = read_cache(cache, torch.tensor([2, 3, 4]), seq_len)
            view = read_cache(cache, torch.tensor([10**9]), seq_len, first_slot=8)
            assert torch.equal(view, gathered)
            assert view.data_ptr() == cache[2].data_ptr()

    def test_the_cache_may_be_narrower(self) -> None:
        cache, new = torch.zeros(2, 4, 1, 2, dtype=torch.bfloat16), torch.randn(3, 1, 2)
        write_cache(cache, torch.tensor([7, 0, 2]), new)
        assert torch.equal(cache[0, 2], new[2].bfloat16())


class TestAttend:
    @each_backend
    @each_heads
    @pytest.mark.parametrize(
        ("query_len", "key_len"), [(1, 1), (1, 11), (7, 7), (3, 13), (12, 13)]
    )
    def test_against_brute_force(
        self,
        backend: type[PerSequenceBackend],
        heads: int,
        kv_heads: int,
        query_len: int,
        key_len: int,
    ) -> None:
        query, key, value = random_qkv(heads, kv_heads, query_len, key_len, 6, batch=2)
        ours = backend().attend(query, key, value)
        rows = zip(query, key, value, strict=True)
        exact = torch.stack([brute_force(*row, 6**-0.5) for row in rows])
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6)

    @each_backend
    @pytest.mark.parametrize("scale", [None, 0.0, 0.1, 1.0])
    def test_scale(
        self, backend: type[PerSequenceBackend], scale: float | None
    ) -> None:
        query, key, value = random_qkv(4, 2, 5, 9, 16, batch=1)
        ours = backend(scale).attend(query, key, value)
        exact = brute_force(
            query[0], key[0], value[0], 0.25 if scale is None else scale
        )
        torch.testing.assert_close(ours[0].double(), exact, rtol=1e-5, atol=2e-6)
        decoded = backend(scale=scale).attend(query[:, :, -1:], key, value)
        torch.testing.assert_close(decoded, ours[:, :, -1:], rtol=1e-5, atol=2e-6)

    @each_backend
    @pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
    @pytest.mark.parametrize(("query_len", "key_len"), [(1, 5), (5, 5), (4, 9)])
    def test_any_leading_shape(
        self,
        backend: type[PerSequenceBackend],
        leading: tuple[int, ...],
        query_len: int,
        key_len: int,
    ) -> None:
        for kv_heads in (6, 2):
            query = torch.randn(*leading, 6, query_len, 4)
            key, value = torch.randn(2, *leading, kv_heads, key_len, 4)
            out = backend().attend(query, key, value)
            assert out.shape == query.shape
            rows = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
            exact = torch.stack(
                [brute_force(*row, 0.5) for row in zip(*rows, strict=True)]
            )
            torch.testing.assert_close(
                out.double(), exact.view_as(out), rtol=1e-5, atol=2e-6
            )

    @each_backend
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeps_the_dtype_and_comes_close(
        self, backend: type[PerSequenceBackend], dtype: torch.dtype
    ) -> None:
        query, key, value = (x.to(dtype) for x in random_qkv(6, 2, 5, 9, 8, batch=1))
        ours = backend().attend(query, key, value)
        exact = brute_force(query[0], key[0], value[0], 8**-0.5)
        assert ours.dtype == dtype
        tolerance = 10 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            ours[0].double(), exact, rtol=tolerance, atol=tolerance
        )

    @pytest.mark.parametrize(("query_len", "key_len"), [(1, 5), (5, 5), (4, 9)])
    def test_gradients_of_both_are_equal(self, query_len: int, key_len: int) -> None:
        inputs = random_qkv(6, 2, query_len, key_len, 8, batch=2)
        grads = []
        for backend in BACKENDS:
            leaves = [x.clone().requires_grad_() for x in inputs]
            backend().attend(*leaves).square().sum().backward()
            grads.append([x.grad for x in leaves])
        for naive, sdpa in zip(*grads, strict=True):
            torch.testing.assert_close(naive, sdpa, rtol=1e-4, atol=1e-5)


class Story:
    """Sequences with queries, keys and values for every token, and the right answers."""

    def __init__(
        self, lengths: list[int], heads: int = 6, kv_heads: int = 2, head_dim: int = 8
    ) -> None:
        self.sizes = kv_heads, head_dim
        self.tokens = [
            tuple(torch.randn(n, h, head_dim) for h in (heads, kv_heads, kv_heads))
            for n in lengths
        ]
        self.exact = [
            brute_force(*(x.transpose(0, 1) for x in qkv), head_dim**-0.5).transpose(
                0, 1
            )
            for qkv in self.tokens
        ]

    def play(
        self,
        backend: AttentionBackend,
        steps: list[dict[int, int]],
        pool: BlockPool,
        cache: KVCache,
    ) -> list[Tensor]:
        """The outputs of every sequence, `[length, H, D]`, step after step."""
        outputs: dict[int, list[Tensor]] = {}
        for news in steps:
            begin = {seq: pool.lengths.get(seq, 0) for seq in news}
            _, metadata = pool.step(news)
            query, key, value = (
                torch.cat([self.tokens[s][x][begin[s] :][:n] for s, n in news.items()])
                for x in range(3)
            )
            output = backend.forward(query, key, value, cache, metadata)
            assert output.shape == query.shape
            assert output.dtype == query.dtype
            for seq, part in zip(news, output.split(list(news.values())), strict=True):
                outputs.setdefault(seq, []).append(part)
        return [torch.cat(outputs[seq]) for seq in range(len(self.tokens))]

    def check(
        self,
        backend: type[PerSequenceBackend],
        steps: list[dict[int, int]],
        block_size: int,
        seed: int = 0,
    ) -> None:
        num_blocks = sum(-(-len(qkv[0]) // block_size) for qkv in self.tokens) + 2
        pool = BlockPool(num_blocks, block_size, seed)
        cache = make_kv_cache(num_blocks, block_size, *self.sizes)
        outputs = self.play(backend(), steps, pool, cache)
        for output, exact in zip(outputs, self.exact, strict=True):
            torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=2e-6)
        written = sum(len(qkv[0]) for qkv in self.tokens)
        for side in cache:  # every token was written once, and nothing else was
            assert (~side.isnan()).all(-1).all(-1).sum() == written


def random_steps(lengths: list[int], rng: random.Random) -> list[dict[int, int]]:
    """Steps in which some of the sequences go on by one token, a chunk, or to the end."""
    left, steps = dict(enumerate(lengths)), []
    while left:
        chosen = rng.sample(sorted(left), rng.randint(1, len(left)))
        steps.append(
            {s: rng.choice([1, rng.randint(1, left[s]), left[s]]) for s in chosen}
        )
        left = {s: n - steps[-1].get(s, 0) for s, n in left.items()}
        left = {s: n for s, n in left.items() if n}
    return steps


@each_on_a_cpu
class TestForward:
    @pytest.mark.parametrize("block_size", [1, 4, 16])
    def test_prefill_chunk_and_decode_in_one_step(
        self, backend: type[PerSequenceBackend], block_size: int
    ) -> None:
        steps = [{1: 16, 2: 9}, {0: 7, 1: 1, 2: 8, 3: 1}, {3: 1, 0: 1, 1: 1, 2: 1}]
        Story([8, 18, 18, 2]).check(backend, steps, block_size)

    @each_heads
    def test_heads(
        self, backend: type[PerSequenceBackend], heads: int, kv_heads: int
    ) -> None:
        story = Story([5, 11, 1], heads, kv_heads, head_dim=6)
        story.check(backend, [{0: 4, 1: 7, 2: 1}, {1: 4, 0: 1}], block_size=4)

    @given(
        lengths=st.lists(st.integers(1, 37), min_size=1, max_size=5),
        block_size=st.sampled_from([1, 4, 16]),
        rng=st.randoms(use_true_random=False),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=40, deadline=None)
    def test_any_partition_gives_each_sequence_what_it_gets_alone(
        self,
        backend: type[PerSequenceBackend],
        lengths: list[int],
        block_size: int,
        rng: random.Random,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        story = Story(lengths, heads=4, kv_heads=2, head_dim=4)
        story.check(backend, random_steps(lengths, rng), block_size, seed)

    @pytest.mark.parametrize("block_size", [1, 4, 16])
    def test_what_freed_blocks_hold_never_matters(
        self, backend: type[PerSequenceBackend], block_size: int
    ) -> None:
        first, second = Story([9, 21, 14]), Story([15, 8, 18])
        steps = random_steps([15, 8, 18], random.Random(1))
        num_blocks = 4 + 48 // block_size
        outputs = []
        for fill, stale in [(0.0, False), (float("nan"), False), (1e30, True)]:
            pool = BlockPool(num_blocks, block_size)
            cache = make_kv_cache(num_blocks, block_size, *first.sizes, fill)
            if stale:  # the second three live where the first three died
                first.play(backend(), [{0: 9, 1: 21, 2: 14}], pool, cache)
                for seq in range(3):
                    pool.release(seq)
            outputs.append(second.play(backend(), steps, pool, cache))
        for clean, spoilt, stale_ in zip(*outputs, strict=True):
            assert torch.equal(clean, spoilt)
            assert torch.equal(clean, stale_)

    def test_neighbours_do_not_change_a_bit(
        self, backend: type[PerSequenceBackend]
    ) -> None:
        story = Story([6, 13])
        pool, cache = BlockPool(20, 4), make_kv_cache(20, 4, *story.sizes)
        outputs = story.play(backend(), [{1: 5, 0: 5}, {0: 1, 1: 8}], pool, cache)
        for seq, chunks in [(0, (5, 1)), (1, (5, 8))]:
            pool, cache = BlockPool(20, 4, seed=9), make_kv_cache(20, 4, *story.sizes)
            alone = Story([])
            alone.tokens = [story.tokens[seq]]
            steps = [{0: n} for n in chunks]
            assert torch.equal(
                alone.play(backend(), steps, pool, cache)[0], outputs[seq]
            )

    def test_blocks_in_a_row_change_nothing_but_the_copying(
        self, backend: type[PerSequenceBackend]
    ) -> None:
        query, key, value = (torch.randn(9, h, 4) for h in (4, 2, 2))
        outputs = []
        for tables, in_a_row in [([[2, 3], [5]], [8, 20]), ([[3, 0], [5]], [None, 20])]:
            metadata = make_metadata(tables, [5, 4], [5, 4], block_size=4)
            assert [read.first_slot for read in metadata.reads[0]] == in_a_row
            cache = make_kv_cache(6, 4, 2, 4)
            outputs.append(backend().forward(query, key, value, cache, metadata))
        assert torch.equal(*outputs)

    def test_inputs_stay_as_they_are(self, backend: type[PerSequenceBackend]) -> None:
        query, key, value = (torch.randn(5, h, 4) for h in (4, 2, 2))
        before = [x.clone() for x in (query, key, value)]
        _, metadata = BlockPool(9, 2).step({0: 3, 1: 2})
        backend().forward(query, key, value, make_kv_cache(9, 2, 2, 4), metadata)
        for x, copy in zip((query, key, value), before, strict=True):
            assert torch.equal(x, copy)

    def test_scale(self, backend: type[PerSequenceBackend]) -> None:
        query, key, value = (torch.randn(5, h, 4) for h in (4, 2, 2))
        _, metadata = BlockPool(9, 2).step({0: 5})
        cache = make_kv_cache(9, 2, 2, 4)
        ours = backend(0.1).forward(query, key, value, cache, metadata)
        exact = brute_force(*(x.transpose(0, 1) for x in (query, key, value)), 0.1)
        torch.testing.assert_close(
            ours.transpose(0, 1).double(), exact, rtol=1e-5, atol=2e-6
        )


def rounding(outputs: Tensor, exact: Tensor) -> float:
    return (outputs.double() - exact).square().mean().sqrt().item()


class Step:
    """A step of many sequences, most with a past, over blocks in disorder.

    What no sequence has written is NaN, and the entries of the block table that nobody
    has business to read name a block that does not exist.
    """

    def __init__(
        self,
        news: list[int],
        lengths: list[int],
        heads: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        head_dim: int = 8,
    ) -> None:
        num_blocks = sum(-(-n // block_size) for n in lengths) + 3
        pool = BlockPool(num_blocks, block_size, seed=sum(lengths))
        self.cache: KVCache = tuple(  # type: ignore[assignment]
            x.to(dtype)
            for x in make_kv_cache(num_blocks, block_size, heads[1], head_dim)
        )
        per_sequence = [
            [torch.randn(n, h, head_dim).to(dtype) for h in (*heads, heads[1])]
            for n in lengths
        ]
        past = {
            i: n - new
            for i, (n, new) in enumerate(zip(lengths, news, strict=True))
            if n > new
        }
        if past:
            _, before = pool.step(past)
            for cache, side in zip(self.cache, (1, 2), strict=True):
                rows = [per_sequence[i][side][:n] for i, n in past.items()]
                write_cache(cache, before.slot_mapping, torch.cat(rows))
        order = list(range(len(lengths)))
        random.Random(len(past)).shuffle(order)
        _, self.metadata = pool.step({i: news[i] for i in order})
        self.news = [news[i] for i in order]
        self.sequences = [per_sequence[i] for i in order]

    def run(self, backend: AttentionBackend) -> Tensor:
        new = zip(self.news, self.sequences, strict=True)
        ends = [[x[-n:] for x in sequence] for n, sequence in new]
        query, key, value = (torch.cat(parts) for parts in zip(*ends, strict=True))
        cache = self.cache[0].clone(), self.cache[1].clone()
        return backend.forward(query, key, value, cache, self.metadata)

    def exact(self) -> Tensor:
        outputs = []
        for n, (query, key, value) in zip(self.news, self.sequences, strict=True):
            heads_first = (x.transpose(0, 1) for x in (query[-n:], key, value))
            scale = query.shape[-1] ** -0.5
            outputs.append(brute_force(*heads_first, scale).transpose(0, 1))
        return torch.cat(outputs)

    def alone(self, backend: PerSequenceBackend) -> Tensor:
        """Every sequence by itself and without a cache, in the dtype of the step."""
        outputs = []
        for n, (query, key, value) in zip(self.news, self.sequences, strict=True):
            one = (x.transpose(0, 1)[None] for x in (query[-n:], key, value))
            outputs.append(backend.attend(*one)[0].transpose(0, 1))
        return torch.cat(outputs)


def random_step(rng: random.Random, heads: tuple[int, int], **options: Any) -> Step:
    """Lengths 1 to 600; most bring one token, some a chunk, some are new."""
    lengths = [rng.randint(1, rng.choice([20, 100, 600])) for _ in range(24)]
    news = [min(n, rng.choice([1, 1, 1, 1, rng.randint(1, 20)])) for n in lengths]
    return Step(news, lengths, heads, **options)


class TestManyAtOnce:
    @each_on_a_cpu
    @pytest.mark.parametrize("group", range(1, 9))
    def test_padded_or_not_against_brute_force_and_each_alone(
        self, backend: type[PerSequenceBackend], group: int
    ) -> None:
        rng = random.Random(group)
        for kv_heads, block_size in [(1, 16), (2, 4)]:
            heads = group * kv_heads, kv_heads
            step = random_step(rng, heads, block_size=block_size)
            assert len(step.metadata.reads[1]) > 1
            ours, exact = step.run(backend()), step.exact()
            alone = step.alone(backend())
            bound = 1e-5 * exact.std().item()
            assert (ours - alone).abs().max().item() <= bound
            assert (ours.double() - exact).abs().max().item() <= bound

    @each_backend
    @pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1)])
    def test_in_bfloat16_padding_rounds_no_more_than_being_alone(
        self, backend: type[PerSequenceBackend], heads: tuple[int, int]
    ) -> None:
        step = random_step(random.Random(3), heads, dtype=torch.bfloat16)
        ours, exact = step.run(backend()), step.exact()
        assert ours.dtype == torch.bfloat16
        alone = rounding(step.alone(backend()), exact)
        assert rounding(ours, exact) <= 1.2 * alone

    @each_backend
    def test_sixty_four_tokens_are_one_call(
        self, backend: type[PerSequenceBackend], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step, shapes = Step([1] * 64, [40] * 64, (4, 2)), []
        attend = backend.attend

        def spy(self: Any, query: Tensor, *others: Any) -> Tensor:
            shapes.append(list(query.shape))
            return attend(self, query, *others)

        monkeypatch.setattr(backend, "attend", spy)
        step.run(backend())
        assert shapes == [[64, 2, 2, 8]]


class TestRagged:
    """Single tokens as rows of a sparse matrix; what it computes, the tests above compare."""

    def test_an_entry_for_each_own_key_and_none_else(self) -> None:
        heads, kv_heads, block_size = 6, 2, 4
        metadata = make_metadata([[7], [5, 2, 9], [0, 3]], [1, 3, 1], [4, 9, 6], 4)
        cache = make_kv_cache(10, block_size, kv_heads, 8)[0]
        read = plan_ragged(metadata, [2, 0], heads, cache)
        assert read.tokens.tolist() == [4, 0]
        assert read.seq_lens.tolist() == [6] * heads + [4] * heads
        assert read.scores.shape == (2 * heads, 10 * block_size * kv_heads)
        own = [[0, 1, 2, 3, 12, 13], [28, 29, 30, 31]]  # slots
        columns = read.scores.col_indices().split(read.seq_lens.tolist())
        for row, keys in enumerate(columns):
            slots, kv_head = own[row // heads], row % heads // 3
            assert keys.tolist() == [slot * kv_heads + kv_head for slot in slots]
            assert (read.rows == row).sum() == len(slots)
        starts = read.scores.crow_indices()
        assert torch.equal(starts.diff(), read.seq_lens)
        assert not read.scores.values().any()

    def test_nothing_is_padded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither is anything copied: the operations have the cache's own keys."""
        step, seen = Step([1] * 64, list(range(1, 128, 2)), (4, 2)), []
        product = torch.sparse.sampled_addmm

        def spy(scores: Tensor, queries: Tensor, keys: Tensor, **options: Any) -> Any:
            seen.append((scores.values().numel(), keys.T.is_contiguous()))
            return product(scores, queries, keys, **options)

        monkeypatch.setattr(torch.sparse, "sampled_addmm", spy)
        monkeypatch.setattr(TorchRaggedBackend, "attend", None)
        step.run(TorchRaggedBackend())
        assert seen == [(4 * 64 * 64, True)]

    def test_one_plan_serves_all_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step, plans = Step([1, 1, 5], [40, 9, 5], (4, 2)), []
        plan = TorchRaggedBackend.plan

        def spy(self: TorchRaggedBackend, *args: Any) -> Any:
            plans.append(plan(self, *args))
            return plans[-1]

        monkeypatch.setattr(TorchRaggedBackend, "plan", spy)
        backend = TorchRaggedBackend()
        assert torch.equal(step.run(backend), step.run(backend))
        assert len(plans) == 1

    def test_company_does_not_change_a_bit(self) -> None:
        rng = random.Random(5)
        lengths = [rng.randint(1, 300) for _ in range(16)]
        step = Step([1] * 16, lengths, (4, 2))
        together = step.run(TorchRaggedBackend())
        for rows in torch.arange(16).split(2):
            pair, m = rows.tolist(), step.metadata
            few = dataclasses.replace(
                m,
                slot_mapping=m.slot_mapping[rows],
                block_table=m.block_table[rows],
                query_start_loc=torch.arange(3),
                seq_lens=m.seq_lens[rows],
                query_lens_list=[1, 1],
                seq_lens_list=[m.seq_lens_list[i] for i in pair],
            )
            ends = [[x[-1:] for x in step.sequences[i]] for i in pair]
            qkv = [torch.cat(parts) for parts in zip(*ends, strict=True)]
            cache = step.cache[0].clone(), step.cache[1].clone()
            answers = TorchRaggedBackend().forward(*qkv, cache, few)
            assert torch.equal(answers, together[rows])

    def test_a_nan_stays_with_its_sequence(self) -> None:
        step = Step([1] * 8, [30 + i for i in range(8)], (4, 2))
        clean = step.run(TorchRaggedBackend())
        step.cache[0][step.metadata.block_table[3, 0], 5] = float("nan")
        spoilt = step.run(TorchRaggedBackend())
        others = [i for i in range(8) if i != 3]
        assert spoilt[3].isnan().all()
        assert torch.equal(spoilt[others], clean[others])

    def test_large_scores_do_not_overflow(self) -> None:
        step = Step([1] * 8, [30 + i for i in range(8)], (4, 2))
        for sequence in step.sequences:
            sequence[0].mul_(1e4)
        ours, theirs = step.run(TorchRaggedBackend()), step.run(TorchSDPABackend())
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    def test_a_model_that_was_moved_goes_on(self) -> None:
        """It was loaded for float32; in bfloat16 the parent does all of the work."""
        step = Step([1] * 8, [30 + i for i in range(8)], (4, 2), dtype=torch.bfloat16)
        assert torch.equal(step.run(TorchRaggedBackend()), step.run(TorchSDPABackend()))

    @pytest.mark.parametrize(
        ("device", "dtype"),
        [("cpu", torch.bfloat16), ("cuda", torch.float32), ("mps", torch.float32)],
    )
    def test_needs_a_cpu_and_float32(self, device: str, dtype: torch.dtype) -> None:
        fault = TorchRaggedBackend.find_fault(torch.device(device), dtype)
        name = str(dtype).removeprefix("torch.")
        for part in ("'torch_ragged'", repr(device), repr(name), "'torch_sdpa'"):
            assert part in str(fault)
        for runs in (torch.float32, torch.float64):
            assert TorchRaggedBackend.find_fault(torch.device("cpu"), runs) is None

    def test_no_warning_that_sparse_matrices_are_a_beta(self) -> None:
        code = (
            "import warnings; warnings.simplefilter('error'); import torch;"
            "import folo_lib.ragged_attention;"
            "torch.zeros(1, 1).to_sparse_csr()"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def wastes_little(lengths: list[int]) -> bool:
    """Whether sequences that are padded to the longest read few slots in vain."""
    padding = len(lengths) * max(lengths) - sum(lengths)
    return padding <= 512 or padding <= sum(lengths) // 8


class TestGroups:
    @given(st.lists(st.integers(1, 5000), max_size=60), st.integers(0, 3))
    def test_as_many_together_as_waste_little(
        self, lengths: list[int], first: int
    ) -> None:
        members = range(first, len(lengths))
        groups = group_by_length(members, lengths)
        assert sorted(i for group in groups for i in group) == list(members)
        own = [[lengths[i] for i in group] for group in groups]
        assert list(itertools.chain(*own)) == sorted(lengths[first:], reverse=True)
        assert all(map(wastes_little, own))
        for group, after in itertools.pairwise(own):
            assert not wastes_little([*group, after[0]])

    def test_equal_lengths_are_one_group(self) -> None:
        assert len(group_by_length(range(256), [4000] * 256)) == 1


class TestReads:
    @given(
        sequences=st.lists(
            st.tuples(st.sampled_from([1, 1, 1, 5, 40]), st.integers(0, 600)),
            min_size=1,
            max_size=12,
        ),
        block_size=st.sampled_from([1, 4, 16]),
    )
    @settings(max_examples=60, deadline=None)
    def test_every_token_once_and_nobody_elses_slots(
        self, sequences: list[tuple[int, int]], block_size: int
    ) -> None:
        news = [new for new, _ in sequences]
        lengths = [new + past for new, past in sequences]
        counts = [-(-n // block_size) for n in lengths]
        ids = torch.randperm(sum(counts)).split(counts)
        tables = [row.tolist() for row in ids]
        metadata = make_metadata(tables, news, lengths, block_size)
        starts = metadata.query_start_loc.tolist()
        alone, padded = metadata.reads
        seen = [token for read in alone for token in range(read.start, read.stop)]
        for read in alone:
            i = starts.index(read.start)
            assert (read.stop, read.seq_len) == (starts[i + 1], lengths[i])
            assert torch.equal(read.blocks, metadata.block_table[i])
        for group in padded:
            assert len(group.tokens) > 1
            rows = [starts.index(token) for token in group.tokens.tolist()]
            seen += group.tokens.tolist()
            longest = max(lengths[i] for i in rows)
            assert group.slots.shape == (len(rows), longest)
            assert group.mask.shape == (len(rows), 1, 1, longest)
            assert wastes_little([lengths[i] for i in rows])
            for i, slots, mask in zip(rows, group.slots, group.mask, strict=True):
                assert news[i] == 1
                own = [b * block_size + p for b in tables[i] for p in range(block_size)]
                own = own[: lengths[i]]
                extra = longest - lengths[i]
                assert slots.tolist() == own + own[-1:] * extra
                assert mask.flatten().tolist() == [0.0] * lengths[i] + [-INF] * extra
        assert sorted(seen) == list(range(sum(news)))

    def test_a_plan_is_made_once_per_step(self) -> None:
        metadata = make_metadata([[0], [1]], [1, 1], [3, 4], 4)
        assert metadata.reads is metadata.reads

    def test_one_token_reads_alone_and_as_a_view(self) -> None:
        alone, padded = make_metadata([[3, 4]], [1], [7], 4).reads
        assert not padded
        assert [(read.start, read.stop, read.first_slot) for read in alone] == [
            (0, 1, 12)
        ]

    @pytest.mark.parametrize(
        ("blocks", "num_blocks", "first"),
        [
            ([2, 3, 4], 3, 8),
            ([2, 3, 9], 2, 8),
            ([2, 3, 9], 3, None),
            ([3, 2], 2, None),
            ([5, 5], 2, None),
            ([0], 1, 0),
        ],
    )
    def test_first_slot(
        self, blocks: list[int], num_blocks: int, first: int | None
    ) -> None:
        assert find_first_slot(torch.tensor(blocks), num_blocks, 4) == first

    def test_blocks_elsewhere_are_not_looked_at(self) -> None:
        blocks = torch.arange(3, device="meta")
        assert find_first_slot(blocks, 3, 4) is None


class Loud(TorchNaiveBackend):
    """A reader's own backend."""

    @staticmethod
    def get_name() -> str:
        return "loud"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return 2 * super().attend(query, key, value, mask)


class TestGetAttentionBackend:
    def test_names(self) -> None:
        assert get_attention_backend("torch_naive") is TorchNaiveBackend
        assert get_attention_backend("torch_sdpa") is TorchSDPABackend
        assert get_attention_backend("auto") is TorchSDPABackend
        assert get_attention_backend() is TorchSDPABackend
        has_triton = find_spec("triton") is not None
        for name in ATTENTION_BACKENDS:
            if name != "triton" or has_triton:
                assert get_attention_backend(name).get_name() == name

    @pytest.mark.parametrize("backend", [*BACKENDS, Loud])
    def test_runs_everywhere_and_is_not_recorded(
        self, backend: type[PerSequenceBackend]
    ) -> None:
        """It cuts tensors by lengths that the host knows: no other step has the same."""
        for device in ("cpu", "cuda", "mps"):
            for dtype in DTYPES:
                assert backend.find_fault(torch.device(device), dtype) is None
        assert not backend.supports_cuda_graph

    def test_triton_needs_a_gpu_of_its_age(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        triton = pytest.importorskip("triton")
        backend = get_attention_backend("triton")
        cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
        assert backend.find_fault(cpu, torch.float32) is None
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        assert "'cpu'" in str(backend.find_fault(cpu, torch.float32))
        ages = {cuda: (7, 5)}
        monkeypatch.setattr(torch.cuda, "get_device_capability", ages.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_name", {cuda: "T4"}.__getitem__)
        for dtype in DTYPES:
            ages[cuda] = 7, 5
            fault = str(backend.find_fault(cuda, dtype))
            assert all(part in fault for part in ("8.0", "T4", "'torch_sdpa'"))
            ages[cuda] = 8, 0
            assert backend.find_fault(cuda, dtype) is None

    @pytest.mark.parametrize("name", ["flash", "", "TORCH_SDPA", "AUTO"])
    def test_an_unknown_name_is_told_the_choices(self, name: str) -> None:
        with pytest.raises(
            ValueError, match=rf"{name!r}.*'auto'.*'torch_naive'.*'torch_sdpa'"
        ):
            get_attention_backend(name)

    def test_a_backend_of_ones_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ATTENTION_BACKENDS, "loud", f"{__name__}:Loud")
        assert get_attention_backend("loud") is Loud
        query, key, value = random_qkv(4, 2, 3, 3, 8, batch=1)
        torch.testing.assert_close(
            get_attention_backend("loud")().attend(query, key, value),
            2 * TorchNaiveBackend().attend(query, key, value),
        )
        with pytest.raises(ValueError, match="'loud'"):
            get_attention_backend("other")

    @pytest.mark.parametrize("seam", [AttentionBackend, PerSequenceBackend])
    def test_the_seam_itself_attends_to_nothing(self, seam: Any) -> None:
        with pytest.raises(TypeError, match="abstract"):
            seam()


def test_metadata_is_plain_frozen_data() -> None:
    _, metadata = BlockPool(4, 2).step({0: 3, 1: 1})
    assert [f.name for f in dataclasses.fields(AttentionMetadata)] == [
        "block_size",
        "slot_mapping",
        "block_table",
        "query_start_loc",
        "seq_lens",
        "query_lens_list",
        "seq_lens_list",
    ]
    assert (metadata.max_query_len, metadata.max_seq_len) == (3, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata.seq_lens = metadata.block_table  # type: ignore[misc]
