"""Triton's kernels against `naive_attention`, sequence by sequence.

Without a GPU they run in Triton's interpreter, in float32 and on small shapes; with one the
same tests run on it, and those marked `gpu` add every dtype and long contexts.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import make_metadata
from torch import Tensor

from folo_lib.attention import create_causal_mask, naive_attention
from folo_lib.kv_cache import AttentionMetadata, TorchSDPABackend, write_cache
from folo_lib.qwen3 import get_attention_backend

pytest.importorskip("triton", reason="Triton runs on Linux")


from folo_lib import paged_attention as module, paged_checks, tile_sizes
from folo_lib.paged_attention import TritonBackend, count_programs, store_kv
from folo_lib.tile_sizes import TileSizes, choose_prefill_sizes

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
NAN = float("nan")
TILE = 16
"""Tokens per tile in these tests, so that small contexts have several."""

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def small_tiles(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "gpu" in request.keywords:
        return
    tiles = TileSizes(TILE, 4, 2, min_chunk=TILE)
    monkeypatch.setattr(module, "choose_decode_sizes", lambda _: tiles)
    monkeypatch.setattr(module, "choose_prefill_sizes", lambda *_: tiles)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Programs of each key head that share the tokens: the more, the more splits."""
    monkeypatch.setattr(module, "count_workers", lambda *_: request.param)
    return request.param


class Step:
    """A step over sequences whose blocks lie anywhere, in caches full of NaN elsewhere.

    What was cached before is there; the new tokens' keys and values are apart.
    """

    def __init__(
        self,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        order: str = "NHD",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            kwargs = {"device": DEVICE, "generator": generator}
            return torch.randn(*shape, **kwargs).to(dtype)

        num_heads, num_kv_heads = heads
        needed = [-(-length // block_size) for length in seq_lens]
        ids = list(range(sum(needed) + 3))
        random.Random(seed).shuffle(ids)
        blocks = [[ids.pop() for _ in range(n)] for n in needed]
        metadata = make_metadata(blocks, query_lens, seq_lens, block_size)
        moved = {
            f.name: x.to(DEVICE)
            for f in dataclasses.fields(metadata)
            if isinstance(x := getattr(metadata, f.name), Tensor)
        }
        self.metadata = dataclasses.replace(metadata, **moved)
        num_blocks = sum(needed) + 3

        def reserve() -> Tensor:
            places = (block_size, num_kv_heads)
            if order == "HND":
                cache = torch.full((num_blocks, *places[::-1], head_dim), NAN)
                return cache.transpose(1, 2).to(DEVICE, dtype)
            return torch.full((num_blocks, *places, head_dim), NAN).to(DEVICE, dtype)

        self.kv_cache = reserve(), reserve()
        self.keys, self.values = (
            [draw(length, num_kv_heads, head_dim) for length in seq_lens]
            for _ in range(2)
        )
        old = [
            row[j // block_size] * block_size + j % block_size
            for row, new, end in zip(blocks, query_lens, seq_lens, strict=True)
            for j in range(end - new)
        ]
        new = [
            (slice(n - q, n), slice(n - q))
            for q, n in zip(query_lens, seq_lens, strict=True)
        ]
        slots = torch.tensor(old, dtype=torch.int64, device=DEVICE)
        for cache, whole in zip(self.kv_cache, (self.keys, self.values), strict=True):
            cached = torch.cat([x[was] for x, (_, was) in zip(whole, new, strict=True)])
            cache[slots // block_size, slots % block_size] = cached
        self.key, self.value = (
            torch.cat([x[now] for x, (now, _) in zip(whole, new, strict=True)])
            for whole in (self.keys, self.values)
        )
        self.query = draw(sum(query_lens), num_heads, head_dim)

    def run(self, scale: float | None = None) -> Tensor:
        new = self.query, self.key, self.value
        return TritonBackend(scale).forward(*new, self.kv_cache, self.metadata)

    def expect(self, scale: float | None = None, dtype: torch.dtype | None = None):
        """Each sequence by itself."""
        dtype = self.query.dtype if dtype is None else dtype
        scale = self.query.shape[-1] ** -0.5 if scale is None else scale
        outputs = []
        queries = self.query.to(dtype).split(self.metadata.query_lens_list)
        for query, key, value in zip(queries, self.keys, self.values, strict=True):
            lengths = len(query), len(key)
            mask = create_causal_mask(*lengths, dtype, DEVICE)
            heads_first = (
                x.to(dtype).transpose(0, 1)[None] for x in (query, key, value)
            )
            output = naive_attention(*heads_first, scale, mask)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    def check(self, scale: float | None = None) -> None:
        torch.testing.assert_close(
            self.run(scale), self.expect(scale), rtol=2e-5, atol=5e-6
        )


EDGES = [1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE - 1, 3 * TILE, 3 * TILE + 1]


class TestStore:
    def test_each_token_goes_to_its_slot_and_nothing_else_changes(self) -> None:
        key, value = torch.randn(2, 5, 3, 16, device=DEVICE)
        slots = torch.tensor([7, -1, 0, 23, 10], device=DEVICE)
        kv_cache = torch.full((2, 6, 4, 3, 16), NAN, device=DEVICE)
        store_kv(key, value, *kv_cache, slots)
        kept = slots >= 0
        expected = torch.full((2, 6, 4, 3, 16), NAN, device=DEVICE)
        write_cache(expected[0], slots[kept], key[kept])
        write_cache(expected[1], slots[kept], value[kept])
        torch.testing.assert_close(kv_cache, expected, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("head_dim", [16, 24])
    @pytest.mark.parametrize("kv_heads", [1, 2, 5])
    def test_slices_of_wider_tensors(self, kv_heads: int, head_dim: int) -> None:
        rotated = torch.randn(6, 2 * kv_heads, head_dim, device=DEVICE)
        wide = torch.randn(6, 3 * kv_heads, head_dim + 8, device=DEVICE)
        key, value = rotated[:, kv_heads:], wide[:, 2 * kv_heads :, :head_dim]
        slots = torch.tensor([5, 3, 2, 1, 9, 8], device=DEVICE)
        cache = torch.zeros(2, 5, kv_heads, 2, head_dim, device=DEVICE).transpose(2, 3)
        store_kv(key, value, cache[0], cache[1], slots)
        for i, slot in enumerate(slots.tolist()):
            assert torch.equal(cache[0, slot // 2, slot % 2], key[i])
            assert torch.equal(cache[1, slot // 2, slot % 2], value[i])
        assert (cache != 0).sum() == key.numel() + value.numel()

    @gpu
    @on_gpu
    def test_a_block_beyond_two_to_the_31_numbers(self) -> None:
        """All of its tokens lie there, those that it stores too."""
        step = Step([1, 5], [40, 70], (16, 8), 128, 16, torch.bfloat16)
        shift = 2**31 // (16 * 8 * 128)
        num_blocks = shift + len(step.kv_cache[0])
        kwargs = {"dtype": torch.bfloat16, "device": DEVICE}
        cache = torch.zeros(2, num_blocks, 16, 8, 128, **kwargs)
        for big, small in zip(cache, step.kv_cache, strict=True):
            big[shift:] = small
        expected = step.run()
        old = step.metadata
        step.kv_cache = cache[0], cache[1]
        step.metadata = dataclasses.replace(
            old,
            block_table=old.block_table + shift,
            slot_mapping=old.slot_mapping + 16 * shift,
        )
        assert torch.equal(step.run(), expected)
        assert not cache[:, :shift].any()


MIXED = [1, 5, 1, 19], [37, 37, 9, 19]


class TestShapes:
    """Of a step in which some sequences decode, split where they are long."""

    @pytest.fixture(autouse=True)
    def many_workers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "count_workers", lambda *_: 40)

    @pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 17])
    def test_heads_that_share(self, group: int) -> None:
        Step(*MIXED, (group, 1)).check()

    @pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128])
    def test_head_dims(self, head_dim: int) -> None:
        Step(*MIXED, (3, 1), head_dim).check()

    @pytest.mark.parametrize("block_size", [1, 3, 4, 8, 16, 32, 64])
    def test_block_sizes(self, block_size: int) -> None:
        Step(*MIXED, block_size=block_size).check()


class TestDecode:
    @pytest.mark.parametrize("workers", [1, 9, 64], indirect=True)
    def test_contexts_at_the_edges_of_tiles_and_splits(self, workers: int) -> None:
        lengths = [*EDGES, 5 * TILE, 5 * TILE + 1, 10 * TILE + 1]
        Step([1] * len(lengths), lengths, (2, 1)).check()

    @pytest.mark.parametrize("workers", [64, 200], indirect=True)
    def test_many_splits(self, workers: int) -> None:
        """With 200 workers 82, more than are merged at once."""
        Step([1, 1], [1300, 17], (2, 1)).check()

    def test_short_sequences_are_not_split(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No part is written for them: parts are allocated full of NaN here."""
        tiles = TileSizes(TILE, 4, 2, min_chunk=48)
        monkeypatch.setattr(module, "choose_decode_sizes", lambda _: tiles)
        monkeypatch.setattr(module, "count_workers", lambda *_: 6)
        made_here: list[Tensor] = []
        new_empty = Tensor.new_empty

        def new_nan(self: Tensor, *shape, **kwargs) -> Tensor:
            made = new_empty(self, *shape, **kwargs)
            if made.dtype == torch.float32:
                made.fill_(NAN)
            made_here.append(made)
            return made

        monkeypatch.setattr(Tensor, "new_empty", new_nan)
        step = Step([1, 1, 1], [48, 49, 200])
        step.check()
        # A share is 50 tokens: one split, one, and four; programs may be 8.
        parts = next(x for x in made_here if x.shape == (8, 4, 16))
        used = ~parts.isnan().all(-1)  # [P, H]
        assert used.all(1).tolist() == used.any(1).tolist()
        assert used.all(1).tolist() == [False] * 2 + [True] * 4 + [False] * 2


class TestPrefill:
    @pytest.mark.parametrize("query_len", [2, 7, 8, 9, 33])
    @pytest.mark.parametrize("cached", [0, 1, 15, 16, 17, 40])
    def test_a_chunk_after_a_cached_prefix(self, query_len: int, cached: int) -> None:
        Step([query_len], [cached + query_len]).check()

    def test_more_sequences_than_are_looked_through_at_once(self) -> None:
        lengths = [1 + i % 3 for i in range(260)]
        Step([*lengths, 20], [*lengths, 25], (1, 1), 16).check()

    @pytest.mark.parametrize("workers", [30, 64, 200], indirect=True)
    def test_a_history_that_is_split(self, workers: int) -> None:
        """Several layers with one plan, whose counters begin at zero for each."""
        step = Step([5, 20, 2, 30], [400, 20, 90, 330], (6, 2))
        for _ in range(3):
            step.check()
        [plan] = step.metadata.plans.values()
        assert plan.programs[:, 4].max() > 1
        assert not plan.arrivals.any()

    @pytest.mark.parametrize("workers", [3, 4], indirect=True)
    def test_many_tiles_are_not_split(self, workers: int) -> None:
        """Parts of all of them would take much memory."""
        step = Step([7 * TILE // 2, 1, 2], [7 * TILE // 2, 9, 400])  # 7 tiles and one
        step.check()
        plan = step.metadata.plans["triton, 2 heads, 8 queries"]
        assert len(plan.programs) == 8 + (workers == 4) * 3
        assert (plan.num_parts > 0) == (workers == 4)

    @pytest.mark.parametrize("workers", [64], indirect=True)
    def test_nothing_is_counted_without_a_history(self, workers: int) -> None:
        step = Step([40, 1 + TILE], [40, 2 * TILE])
        step.check()
        [plan] = step.metadata.plans.values()
        assert plan.num_parts == 0 and plan.arrivals.numel() == 0


@module.triton.jit
def places_kernel(table, places):  # type: ignore[no-untyped-def]
    tokens = module.tl.arange(0, 32)
    found = module.find_places(table, tokens, tokens < 32, 2**16, 2**12, 16)
    module.tl.store(places + tokens, found)


def test_places_beyond_two_to_the_31_from_a_table_of_32_bits() -> None:
    table = torch.tensor([3, 2**20], dtype=torch.int32, device=DEVICE)
    places = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    places_kernel[(1,)](table, places)
    blocks = [3] * 16 + [2**20] * 16
    expected = [block * 2**16 + i % 16 * 2**12 for i, block in enumerate(blocks)]
    assert places.tolist() == expected


class TestMixed:
    @pytest.mark.parametrize("workers", [1, 9, 64], indirect=True)
    @pytest.mark.parametrize("seed", range(4))
    def test_any_mix(self, seed: int, workers: int) -> None:
        rng = random.Random(seed)
        query_lens = [
            rng.choice([1, 1, 2, 5, 17, 30]) for _ in range(rng.randint(2, 7))
        ]
        seq_lens = [n + rng.choice([0, 1, 14, 50]) for n in query_lens]
        kv_heads = rng.choice([1, 2, 3])
        heads = kv_heads * rng.choice([1, 2, 3, 4]), kv_heads
        shape = rng.choice([8, 16, 24]), rng.choice([1, 3, 4, 16])
        order = rng.choice(["NHD", "HND"])
        Step(query_lens, seq_lens, heads, *shape, order=order, seed=seed).check()

    @pytest.mark.parametrize("workers", [1, 30], indirect=True)
    def test_each_kernel_writes_the_rows_of_its_own_sequences(
        self, workers: int
    ) -> None:
        step = Step([1, 6, 1, 2], [40, 30, 9, 70])
        step.run()  # stores
        metadata, is_decode = step.metadata, [True] + 6 * [False] + [True] + 2 * [False]
        for function, where, num_queries, own in (
            (module.decode, metadata.block_table, 1, is_decode),
            (module.prefill, metadata, 4, [not x for x in is_decode]),
        ):
            sizes = TileSizes(TILE, 4, 2, min_chunk=TILE)
            plan = module.make_plan(metadata, 2, sizes, num_queries)
            output = torch.full_like(step.query, NAN)
            function(step.query, *step.kv_cache, where, plan, output, 0.25)
            assert (~output.isnan()).all(-1).all(-1).tolist() == own
            assert output.isnan().all(-1).all(-1).tolist() == [not x for x in own]

    @pytest.mark.parametrize("scale", [0.0, -0.1, 0.3, 2.0])
    def test_scale(self, scale: float) -> None:
        Step([1, 6], [20, 30]).check(scale)

    @pytest.mark.parametrize("order", ["NHD", "HND"])
    def test_the_order_inside_a_block(self, order: str) -> None:
        Step([1, 6], [20, 30], order=order).check()

    def test_large_scores_do_not_overflow(self) -> None:
        step = Step([1, 6], [40, 30])
        step.query *= 1000
        assert step.run().isfinite().all()
        step.check()

    def test_the_query_may_be_a_slice(self) -> None:
        step = Step([1, 6], [20, 30])
        wide = torch.cat([step.query, step.key, step.value], dim=1)
        step.query, step.key, step.value = wide.split([4, 2, 2], dim=1)
        assert not step.query.is_contiguous()
        step.check()

    def test_integers_of_32_bits(self) -> None:
        step = Step([1, 6], [40, 30])
        names = "slot_mapping", "block_table", "query_start_loc", "seq_lens"
        narrow = {
            name: getattr(step.metadata, name).clamp(max=10**6).int() for name in names
        }
        step.metadata = dataclasses.replace(step.metadata, **narrow)
        step.check()


def pad(step: Step, num_rows: int) -> AttentionMetadata:
    """The step as a CUDA graph runs it: rows that nobody asked for, with one token each."""
    metadata = step.metadata
    step.query, step.key, step.value = (
        torch.cat([x, torch.full_like(x[:1], NAN).repeat(num_rows, 1, 1)])
        for x in (step.query, step.key, step.value)
    )
    last = metadata.query_start_loc[-1]
    more = torch.arange(1, num_rows + 1, device=DEVICE)
    zeros = torch.zeros_like(more)
    table = torch.full((num_rows, metadata.block_table.shape[1]), 10**9).to(DEVICE)
    return dataclasses.replace(
        metadata,
        slot_mapping=torch.cat([metadata.slot_mapping, zeros - 1]),
        block_table=torch.cat([metadata.block_table, table]),
        query_start_loc=torch.cat([metadata.query_start_loc, last + more]),
        seq_lens=torch.cat([metadata.seq_lens, zeros]),
        query_lens_list=[*metadata.query_lens_list, *[1] * num_rows],
        seq_lens_list=[*metadata.seq_lens_list, *[0] * num_rows],
    )


class TestPadding:
    @pytest.mark.parametrize("workers", [1, 30], indirect=True)
    @pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 6, 1]])
    def test_rows_of_a_graph_that_nobody_asked_for(
        self, query_lens: list[int], workers: int
    ) -> None:
        step = Step(query_lens, [20, 30, 70])
        expected = step.expect()
        before = [cache.clone() for cache in step.kv_cache]
        step.metadata = pad(step, 5)
        output = step.run()[: len(expected)]
        torch.testing.assert_close(output, expected, rtol=2e-5, atol=5e-6)
        for old, cache in zip(before, step.kv_cache, strict=True):
            written = ~cache.isnan().any((-1, -2)) & old.isnan().any((-1, -2))
            assert written.sum() == sum(query_lens)

    def test_rows_without_a_token(self) -> None:
        """Or the graph says that they run none."""
        step = Step([1, 1], [20, 30])
        expected, start = step.expect(), step.metadata.query_start_loc
        padded = pad(step, 3)
        step.metadata = dataclasses.replace(
            padded, query_start_loc=torch.cat([start, start[-1:].repeat(3)])
        )
        torch.testing.assert_close(step.run()[:2], expected, rtol=2e-5, atol=5e-6)


class TestNaN:
    """What nobody uses never matters; what is used is never lost."""

    @pytest.mark.parametrize("workers", [1, 30], indirect=True)
    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("place", [0, 63, 69])
    def test_in_a_used_key_or_value_reaches_the_output(
        self, place: int, which: int, workers: int
    ) -> None:
        step = Step([1, 3, 1], [70, 70, 70])
        for sequence in (0, 1):
            block = step.metadata.block_table[sequence, place // 4]
            step.kv_cache[which][block, place % 4, 1] = NAN
            # The last token is stored by the step itself.
            (step.key, step.value)[which][[0, 3][sequence], 1] = NAN
        output = step.run().isnan()
        assert output[0, 2:].any() and not output[0, :2].any()
        assert output[3, 2:].any() and not output[:4, :2].any()
        assert not output[4].any()

    @pytest.mark.parametrize("workers", [1, 30], indirect=True)
    def test_in_a_query(self, workers: int) -> None:
        step = Step([1, 3], [70, 70])
        step.query[0, 1, 3] = step.query[2, 0, 3] = NAN
        wrong = step.run().isnan().all(-1)
        assert wrong.nonzero().tolist() == [[0, 1], [2, 0]]


def describe_lengths(
    lengths: list[int], query_lens: Sequence[int] | None = None
) -> AttentionMetadata:
    """All that a plan asks for: each sequence has one block, as long as the longest."""
    query_lens = query_lens or [1] * len(lengths)
    return AttentionMetadata(
        block_size=max(*lengths, 1),
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
        block_table=torch.zeros(len(lengths), 1, dtype=torch.int64),
        query_start_loc=torch.tensor([0, *accumulate(query_lens)]),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        query_lens_list=list(query_lens),
        seq_lens_list=lengths,
    )


def find_used(
    lengths: list[int],
    num_workers: int,
    query_lens: Sequence[int] | None = None,
    num_queries: int = 1,
) -> list[int]:
    """Into how many splits each tile is cut; the whole plan is looked through."""
    metadata = describe_lengths(lengths, query_lens)
    starts, sizes = metadata.query_start_loc, TileSizes(16, 4, 2, min_chunk=32)
    with patch.object(module, "count_workers", lambda *_: num_workers):
        plan = module.make_plan(metadata, 1, sizes, num_queries)
    rows, merges = plan.programs.tolist(), plan.merges.tolist()
    used, expected, firsts = [], [], []
    for i, (length, new) in enumerate(
        zip(lengths, metadata.query_lens_list, strict=True)
    ):
        tiles = range(0, new, num_queries) if (new == 1) == (num_queries == 1) else [0]
        for query in tiles:
            token, ends, first = starts[i].item() + query, [0], len(expected)
            mine = [row for row in rows if row[:2] == [i, token]]
            used.append(len(mine))
            if len(mine) > 1 and num_queries == 1:
                firsts.append([token, first, len(mine)])
            for row in mine:
                ends.append(row[3])
                expected.append([i, token, *ends[-2:], len(mine), first])
                # Each split has a key for all queries of the sequence.
                assert ends[-2] < ends[-1] and (ends[-2] % 16 == 0)
                assert ends[-2] <= length - new
            assert ends[-1] == (length if mine else 0)
    assert rows == expected + [[-1] * 6] * (len(rows) - len(expected))
    assert merges == firsts + [[-1] * 3] * (len(merges) - len(firsts))
    return used


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the interpreter")
class TestShares:
    """Of whole tiles of 16 tokens, with at least 32 to a split."""

    @pytest.mark.parametrize("num_seqs", [1, 2, 63, 255, 256, 257])
    def test_all_equal(self, num_seqs: int) -> None:
        for num_workers in (1, 5, 64):
            used = find_used([6400] * num_seqs, num_workers)
            splits = max(1, num_workers // num_seqs)
            tiles = -(-400 // splits)
            assert used == [-(-400 // tiles)] * num_seqs

    def test_only_the_long_one_is_split(self) -> None:
        assert find_used([4000, *[200] * 20], 20) == [10, *[1] * 20]
        assert find_used([*[160] * 300, 4000], 60) == [*[1] * 300, 4]

    def test_no_split_below_the_least_size(self) -> None:
        assert find_used([1, 31, 32, 33, 65], 10**6) == [1, 1, 1, 2, 3]

    def test_any_lengths(self) -> None:
        """One split for each whole share, and the programs that are launched suffice."""
        draw = random.Random(0)
        for _ in range(15):
            count, longest = draw.choice([1, 5, 40, 300]), draw.choice([40, 900, 9000])
            lengths = [draw.randrange(1, longest) for _ in range(count)]
            if draw.random() < 0.5:
                lengths[draw.randrange(count)] *= 30
            num_workers = draw.choice([1, 3, 49, 130])
            share = -(-sum(lengths) // num_workers)
            for length, used in zip(
                lengths, find_used(lengths, num_workers), strict=True
            ):
                splits = max(1, min(length // share, -(-length // 32)))
                chunk = -(-length // splits // 16) * 16
                assert used == -(-length // chunk)

    def test_the_recording_counts_splits_as_the_kernels_do(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "tools"))
        script = importlib.import_module("record_kernels")
        monkeypatch.setattr(script, "DEVICE", DEVICE)
        sizes = TileSizes(16, 4, 2, min_chunk=32)
        monkeypatch.setattr(script, "DECODE", sizes)
        workers = module.count_workers(sizes, script.KV_HEADS, DEVICE)
        for lengths in ([1], [3000], [400] * 3, [900] + [30] * 4, [70] * 40):
            found = script.count_splits(describe_lengths(lengths))
            assert found == max(find_used(lengths, workers))

    def test_padding_counts_for_nothing(self) -> None:
        assert find_used([3200, 0, 0, 0], 4) == [4, 0, 0, 0]
        assert find_used([0, 3200, 0, 400], 9, [1, 1, 1, 1]) == [0, 8, 0, 1]
        assert find_used([0, 0], 4) == [0, 0]

    def test_prompts_count_for_nothing(self) -> None:
        assert find_used([900, 3200, 9000], 8, [1, 1, 7]) == [1, 6, 0]
        assert find_used([9000, 3200], 8, [2, 1]) == [0, 8]

    def test_tiles_of_prompts(self) -> None:
        """Each has the splits of its sequence; whoever runs one token has none."""
        assert find_used([3204], 8, [5], 8) == [8]
        assert find_used([3215], 8, [16], 8) == [4, 4]
        assert find_used([20, 9000, 3200], 8, [20, 1, 3], 8) == [1, 1, 1, 0, 7]
        assert find_used([40, 0], 8, [40, 7], 16) == [1, 1, 1, 0]

    def test_any_prompts(self) -> None:
        draw = random.Random(1)
        for count in (1, 1, 2, 4, 4, 30, 30, 260):
            num_queries = draw.choice([2, 8, 42])
            new = [draw.choice([1, 1, 2, 7, 8, 9, 20]) for _ in range(count)]
            lengths = [n + draw.choice([0, 5, 300]) for n in new]
            lengths[draw.randrange(count)] += 9000
            workers = draw.choice([1, 3, 16, 130])
            tiles = [-(-n // num_queries) if n > 1 else 0 for n in new]
            seen = [end - n + 1 for n, end in zip(new, lengths, strict=True)]
            workers = 1 if sum(tiles) > 2 * workers else workers
            work = sum(n * keys for n, keys in zip(tiles, seen, strict=True))
            share, expected = max(1, -(-work // workers)), []
            for n, keys in zip(tiles, seen, strict=True):
                splits = max(1, min(keys // share, -(-keys // 32)))
                chunk = -(-keys // splits // 16) * 16
                expected += [-(-keys // chunk)] * n or [0]
            assert find_used(lengths, workers, new, num_queries) == expected


class TestLaunch:
    def test_only_what_the_step_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = []
        for name in ("decode", "prefill"):
            monkeypatch.setattr(module, name, lambda *_, name=name: ran.append(name))
        for query_lens, names in [
            ([1, 1], ["decode"]),
            ([3, 2], ["prefill"]),
            ([3, 1], ["decode", "prefill"]),
        ]:
            ran.clear()
            Step(query_lens, [9, 9]).run()
            assert ran == names

    def test_workers_are_as_many_as_run_at_once(self) -> None:
        count = module.count_multiprocessors(DEVICE)
        for kv_heads in (1, 2, 8, 10**6):
            for num_programs in (1, 3):
                sizes = TileSizes(16, 4, 2, num_programs=num_programs)
                found = module.count_workers(sizes, kv_heads, DEVICE)
                assert found == max(1, num_programs * count // kv_heads)

    def test_a_query_tile_has_two_tokens_or_more(self) -> None:
        """One token is decode's."""
        sizes = TileSizes(16, 4, 2, rows=32)
        found = [sizes.count_queries(group) for group in (1, 2, 5, 16, 17, 32, 64)]
        assert found == [32, 16, 6, 2, 3, 2, 2]

    def test_programs_are_few_where_nobody_can_be_split(self) -> None:
        assert [count_programs(3, 49, n, 256) for n in (1, 256, 257, 10**6)] == [
            3,
            3,
            6,
            51,
        ]
        assert count_programs(1, 49, 10**6, 256) == 49
        assert count_programs(300, 1, 10**6, 256) == 300

    @pytest.mark.parametrize("can_be", [False, True])
    @pytest.mark.parametrize("is_known", [False, True])
    def test_no_merge_where_nobody_can_be_split(
        self, can_be: bool, is_known: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = Step([1, 1], [70, 9])
        longest = 70 if is_known else step.metadata.block_table.shape[1] * 4
        if not is_known:
            step.metadata = dataclasses.replace(step.metadata, seq_lens_list=[])
        sizes = TileSizes(TILE, 4, 2, min_chunk=longest - can_be)
        monkeypatch.setattr(module, "choose_decode_sizes", lambda _: sizes)
        merges = []

        class Merge:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *_, **__: merges.append(grid)

        monkeypatch.setattr(module, "merge_kernel", Merge())
        step.run()
        assert merges == ([(4, 2)] if can_be else [])

    def test_layers_share_a_plan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plans, make_plan = [], module.make_plan

        def note(*args: Any) -> Any:
            plans.append(make_plan(*args))
            return plans[-1]

        monkeypatch.setattr(module, "make_plan", note)
        step = Step([1, 3, 1], [70, 9, 8])
        for _ in range(3):
            step.check()
        assert [plan.num_queries for plan in plans] == [1, TILE // 2]
        Step([3], [9]).run()  # nobody decodes, nothing to plan
        assert [plan.num_queries for plan in plans[2:]] == [TILE // 2]

    def test_what_the_host_knows_of_tiles(self) -> None:
        """With lists it counts; without, each sequence may waste part of a tile."""
        metadata = describe_lengths([40, 9, 30, 0], [17, 1, 2, 7])
        unknown = dataclasses.replace(metadata, seq_lens_list=[])
        for num_queries, tiles, most, longest in [(1, 1, 4, 9), (8, 5, 7, 29)]:
            assert paged_checks.count_tiles(metadata, num_queries) == tiles
            assert paged_checks.count_tiles(unknown, num_queries) == most
            assert paged_checks.find_longest(metadata, num_queries) == longest
            assert paged_checks.find_longest(unknown, num_queries) == 40

    def test_a_plan_of_padding_alone(self) -> None:
        for lens in ([300], [600, 600], [7]):
            metadata = describe_lengths([0] * len(lens), lens)
            plan = module.make_plan(metadata, 2, TileSizes(16, 4, 2), 8)
            assert (plan.programs == -1).all()

    def test_a_recording_has_a_plan_of_its_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was planned before is not made anew in a replay."""
        metadata = Step([1], [70]).metadata
        for place in (module, paged_checks):
            monkeypatch.setattr(place, "is_recording", lambda _: now)
        plans = []
        for now in (False, True, True, False):  # noqa: B007
            plans.append(module.get_plan(metadata, 2, TileSizes(TILE, 4, 2), 1))
        assert plans[0] is plans[3] and plans[1] is plans[2]
        assert plans[0] is not plans[1]
        assert module.get_plan(metadata, 1, TileSizes(TILE, 4, 2), 1) is not plans[0]
        assert module.find_longest(metadata, 1) == 70
        now = True
        assert module.find_longest(metadata, 1) == metadata.block_table.shape[1] * 4

    def test_the_prefill_takes_the_largest_tiles_that_a_card_has_room_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An H200 has 228 KiB of shared memory, an A10 has 100."""
        cuda = torch.device("cuda")
        rooms = {228: tile_sizes.PREFILL, 100: tile_sizes.MEDIUM_PREFILL}
        for size, tiles in rooms.items():
            found = SimpleNamespace(
                shared_memory_per_multiprocessor=size * 1024, multi_processor_count=72
            )
            monkeypatch.setattr(
                torch.cuda, "get_device_properties", lambda _, found=found: found
            )
            choose = choose_prefill_sizes.__wrapped__  # nothing is remembered
            assert choose(torch.bfloat16, 128, cuda) == tiles
            assert choose(torch.float32, 128, cuda) == tile_sizes.SMALL_PREFILL
            assert choose(torch.bfloat16, 256, cuda) == tile_sizes.SMALL_PREFILL
            assert choose(torch.bfloat16, 128, torch.device("cpu")) == (
                tile_sizes.MEDIUM_PREFILL
            )
            assert module.count_multiprocessors.__wrapped__(cuda) == 72


class TestBackend:
    def test_name(self) -> None:
        assert get_attention_backend("triton") is TritonBackend
        assert TritonBackend.get_name() == "triton"

    def test_says_what_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert TritonBackend.find_fault(DEVICE, torch.float32) is None
        monkeypatch.setattr(module.triton.knobs.runtime, "interpret", False)
        fault = TritonBackend.find_fault(torch.device("cpu"), torch.float32)
        assert fault is not None
        for part in ("'cpu'", "CUDA", "TRITON_INTERPRET=1", "torch_sdpa"):
            assert part in fault

    def test_without_triton_the_cure_is_named(self) -> None:
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "from folo_lib.qwen3 import get_attention_backend\n"
            "try: get_attention_backend('triton')\n"
            "except ValueError as error: print(error)"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "pip install triton" in done.stdout
        assert "torch_sdpa" in done.stdout


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "room"), [(80, 163), (89, 99), (90, 227)])
def test_compiles_for_a_card_that_is_not_there(capability: int, room: int) -> None:
    """The interpreter lets pass what the compiler refuses; and each kernel must fit."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 11 + 3 * 7  # those of draws too, for three dtypes
    for name, shared, stack in lines:
        assert int(shared) <= 1024 * room, name
        # What every thread has from the start; more would be allocated while graphs exist.
        assert int(stack) <= 1024, name


def error(output: Tensor, exact: Tensor) -> float:
    return (output.float() - exact).norm().item() / exact.norm().item()


@gpu
@on_gpu
class TestOnTheCard:
    """With the tiles that it is used with. Error at most 1.2 times that of SDPA."""

    def compare(self, step: Step) -> None:
        exact, naive = step.expect(dtype=torch.float32), step.expect()
        ours = error(step.run(), exact)  # stores the keys, in whatever order
        new = step.query, step.key, step.value
        sdpa = TorchSDPABackend().forward(*new, step.kv_cache, step.metadata)
        if step.query.dtype == torch.float32:
            assert ours < 1e-5
        else:
            assert ours <= 1.2 * max(error(sdpa, exact), error(naive, exact))

    @pytest.mark.parametrize(
        ("group", "head_dim", "dtype"),
        [
            (2, 128, torch.bfloat16),
            (1, 64, torch.bfloat16),
            (3, 80, torch.bfloat16),
            (8, 96, torch.bfloat16),
            (5, 128, torch.float16),
            (2, 64, torch.float32),
            (3, 80, torch.float32),
        ],
    )
    def test_shapes(self, group: int, head_dim: int, dtype: torch.dtype) -> None:
        query_lens = [1, 1, 300, 2, 1, 65, 128]
        seq_lens = [1, 777, 300, 1025, 4097, 700, 128]
        self.compare(Step(query_lens, seq_lens, (2 * group, 2), head_dim, 16, dtype))

    @pytest.mark.parametrize("block_size", [1, 4, 8, 16, 32, 64])
    @pytest.mark.parametrize("order", ["NHD", "HND"])
    def test_blocks(self, block_size: int, order: str) -> None:
        lens = [1, 1, 300, 2], [1000, 64, 300, 65]
        shape = (16, 8), 128, block_size, torch.bfloat16, order
        self.compare(Step(*lens, *shape))

    @pytest.mark.parametrize("workers", [1, 2, 7, 64, 198], indirect=True)
    def test_long_contexts(self, workers: int) -> None:
        lens = [1, 1, 70], [40_960, 20_000, 30_000]
        self.compare(Step(*lens, (16, 8), 128, 16, torch.bfloat16))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_short_question_after_a_long_history(self, dtype: torch.dtype) -> None:
        """Three layers in a row with one plan, and with one that a graph makes."""
        lens = [20, 1, 33, 300, 2], [30_020, 500, 9000, 4000, 2]
        step = Step(*lens, (16, 8), 128, 16, dtype)
        self.compare(step)
        eager = [step.run() for _ in range(3)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = [step.run() for _ in range(3)]
        for _ in range(2):
            graph.replay()
            for output in (*eager, *replayed):
                assert torch.equal(output, eager[0])

    @pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
    def test_a_long_one_among_many(self, kv_heads: int) -> None:
        lens = [500] * 300
        lens[270], lens[3] = 40_000, 9000
        heads = 2 * kv_heads, kv_heads
        self.compare(Step([1] * 300, lens, heads, 128, 16, torch.bfloat16))

    def test_many_sequences(self) -> None:
        rng = random.Random(0)
        seq_lens = [rng.randint(1, 600) for _ in range(256)]
        query_lens = [rng.choice([1, 1, 1, n]) for n in seq_lens]
        self.compare(Step(query_lens, seq_lens, (16, 8), 128, 16, torch.bfloat16))

    @pytest.mark.parametrize("workers", [1, 33], indirect=True)
    def test_captured_in_a_graph(self, workers: int) -> None:
        """And replayed with other sequences, lengths and blocks."""
        steps = [
            Step([1] * 4, lengths, (16, 8), 128, 16, torch.bfloat16, seed=seed)
            for seed, lengths in enumerate([[900, 16, 17, 1300], [5, 1200, 64, 700]])
        ]
        static = steps[0]
        static.run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = static.run()
        for step in steps:
            expected = step.run().clone()
            width = min(s.metadata.block_table.shape[1] for s in (static, step))
            for name in ("slot_mapping", "query_start_loc", "seq_lens"):
                getattr(static.metadata, name).copy_(getattr(step.metadata, name))
            static.metadata.block_table[:, :width] = step.metadata.block_table[
                :, :width
            ]
            for name in ("query", "key", "value"):
                getattr(static, name).copy_(getattr(step, name))
            blocks = min(len(s.kv_cache[0]) for s in (static, step))
            for old, new in zip(static.kv_cache, step.kv_cache, strict=True):
                old[:blocks] = new[:blocks]
            graph.replay()
            assert torch.equal(output, expected)
