"""attention.py against sums written out, and every sequence of a step against itself alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from helpers import BlockPool, KVCache, make_kv_cache
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from folo_lib.attention import (
    ATTENTION_BACKENDS,
    AttentionBackend,
    AttentionMetadata,
    TorchNaiveBackend,
    TorchSDPABackend,
    create_causal_mask,
    get_attention_backend,
    naive_attention,
    read_cache,
    repeat_kv,
    write_cache,
)

BACKENDS: list[type[AttentionBackend]] = [TorchNaiveBackend, TorchSDPABackend]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_heads = pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (6, 3), (4, 1), (12, 3), (14, 2), (8, 1)]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def brute_force(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`[H, S, D]` over `[H_kv, T, D]`: one query of one head at a time, in float64."""
    (heads, query_len, _), (kv_heads, key_len, _) = query.shape, key.shape
    query, key, value = query.double(), key.double(), value.double()
    output = torch.empty_like(query)
    for head in range(heads):
        shared = head * kv_heads // heads
        for i in range(query_len):
            seen = key_len - query_len + i + 1
            scores = key[shared, :seen] @ query[head, i] * scale
            weights = scores.exp() / scores.exp().sum()
            output[head, i] = weights @ value[shared, :seen]
    return output


def random_qkv(
    heads: int, kv_heads: int, query_len: int, key_len: int, head_dim: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, query_len, head_dim),
        torch.randn(batch, kv_heads, key_len, head_dim),
        torch.randn(batch, kv_heads, key_len, head_dim),
    )


class TestCreateCausalMask:
    def test_against_a_loop(self) -> None:
        for key_len in range(1, 10):
            for query_len in range(1, key_len + 1):
                mask = create_causal_mask(query_len, key_len)
                assert mask.shape == (1, 1, query_len, key_len)
                for i in range(query_len):
                    for j in range(key_len):
                        seen = j <= i + key_len - query_len
                        assert mask[0, 0, i, j].item() == (0 if seen else -INF)

    def test_one_decode_token_sees_everything(self) -> None:
        assert torch.equal(create_causal_mask(1, 7), torch.zeros(1, 1, 1, 7))

    @pytest.mark.parametrize(
        ("query_len", "key_len"), [(5, 4), (2, 1), (1, 0), (0, 0), (0, 3), (-1, 3)]
    )
    def test_lengths_that_cannot_be_are_named(
        self, query_len: int, key_len: int
    ) -> None:
        with pytest.raises(
            ValueError, match=rf"query_len={query_len}\b.*key_len={key_len}\b"
        ):
            create_causal_mask(query_len, key_len)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype_and_device(self, dtype: torch.dtype) -> None:
        mask = create_causal_mask(2, 3, dtype)
        assert mask.dtype == dtype
        assert mask.tolist() == [[[[0, 0, -INF], [0, 0, 0]]]]
        assert create_causal_mask(2, 3, dtype, "meta").device.type == "meta"


class TestRepeatKV:
    @pytest.mark.parametrize("n_rep", [1, 2, 7])
    @pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
    def test_query_head_finds_its_own(
        self, leading: tuple[int, ...], n_rep: int
    ) -> None:
        x = torch.randn(*leading, 3, 5, 4)
        repeated = repeat_kv(x, n_rep)
        assert repeated.shape == (*leading, 3 * n_rep, 5, 4)
        for head in range(3 * n_rep):
            assert torch.equal(repeated[..., head, :, :], x[..., head // n_rep, :, :])


class TestNaiveAttention:
    @each_heads
    @pytest.mark.parametrize(
        ("query_len", "key_len"), [(1, 1), (1, 11), (7, 7), (3, 13), (12, 13)]
    )
    def test_against_brute_force_and_sdpa(
        self, heads: int, kv_heads: int, query_len: int, key_len: int
    ) -> None:
        for head_dim, scale in [(6, 6**-0.5), (10, 0.7)]:
            query, key, value = random_qkv(
                heads, kv_heads, query_len, key_len, head_dim, batch=2
            )
            mask = create_causal_mask(query_len, key_len)
            ours = naive_attention(query, key, value, scale, mask)
            rows = zip(query, key, value, strict=True)
            exact = torch.stack([brute_force(*row, scale) for row in rows])
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6)
            theirs = F.scaled_dot_product_attention(
                query, key, value, mask, scale=scale, enable_gqa=True
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)

    def test_without_a_mask_everything_is_seen(self) -> None:
        query, key, value = random_qkv(6, 2, 5, 9, 8, batch=3)
        torch.testing.assert_close(
            naive_attention(query, key, value, 0.4),
            F.scaled_dot_product_attention(
                query, key, value, scale=0.4, enable_gqa=True
            ),
        )

    def test_a_mask_is_added_and_need_not_be_causal(self) -> None:
        query, key, value = random_qkv(4, 2, 5, 9, 8, batch=3)
        mask = torch.randn(3, 1, 5, 9).masked_fill(torch.rand(3, 1, 5, 9) < 0.2, -INF)
        mask[..., 4] = 0
        torch.testing.assert_close(
            naive_attention(query, key, value, 0.4, mask),
            F.scaled_dot_product_attention(
                query, key, value, mask, scale=0.4, enable_gqa=True
            ),
        )

    @pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
    def test_any_leading_shape(self, leading: tuple[int, ...]) -> None:
        query = torch.randn(*leading, 6, 5, 4)
        key, value = torch.randn(2, *leading, 2, 9, 4)
        out = naive_attention(query, key, value, 0.5, create_causal_mask(5, 9)[0, 0])
        assert out.shape == query.shape
        for index in torch.cartesian_prod(*map(torch.arange, (1, *leading))).view(
            -1, 1 + len(leading)
        ):
            row = tuple(index[1:].tolist())
            exact = brute_force(query[row], key[row], value[row], 0.5)
            torch.testing.assert_close(out[row].double(), exact, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("masked", [False, True])
    def test_equals_the_eager_attention_of_hugging_face_bit_for_bit(
        self, dtype: torch.dtype, masked: bool
    ) -> None:
        query, key, value = (2 * x.to(dtype) for x in random_qkv(14, 2, 9, 21, 16, 2))
        mask = create_causal_mask(9, 21, dtype) if masked else None
        module = torch.nn.Module().eval()
        module.num_key_value_groups = 7
        theirs, _ = eager_attention_forward(module, query, key, value, mask, 0.25)
        ours = naive_attention(query, key, value, 0.25, mask)
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.transpose(1, 2))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_softmax_runs_in_float32(self, dtype: torch.dtype) -> None:
        # A processor may do so by itself and round afterwards: look at the operation.
        seen = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
                if func is torch.ops.aten._softmax.default:
                    seen.append(args[0].dtype)
                return func(*args, **(kwargs or {}))

        query, key, value = (x.to(dtype) for x in random_qkv(4, 2, 3, 3, 8, batch=1))
        with Watch():
            naive_attention(query, key, value, 1.0)
        assert seen == [torch.float32]

    @pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (2, 4), (7, 3), (1, 2)])
    def test_heads_that_cannot_share_are_named(self, heads: int, kv_heads: int) -> None:
        query, key, value = random_qkv(heads, kv_heads, 2, 2, 4, batch=1)
        with pytest.raises(
            ValueError,
            match=rf"{heads} query heads.* {kv_heads} key.*num_attention_heads"
            r".*multiple.*num_key_value_heads",
        ):
            naive_attention(query, key, value, 0.5)


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
            assert read.shape == (1, 2, seq_len, 3)
            for j in range(seq_len):
                block, place = divmod(j, block_size)
                assert torch.equal(read[0, :, j], cache[blocks[block], place])

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
        backend: type[AttentionBackend],
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
    def test_scale(self, backend: type[AttentionBackend], scale: float | None) -> None:
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
        backend: type[AttentionBackend],
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
        self, backend: type[AttentionBackend], dtype: torch.dtype
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
        backend: type[AttentionBackend],
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


@each_backend
class TestForward:
    @pytest.mark.parametrize("block_size", [1, 4, 16])
    def test_prefill_chunk_and_decode_in_one_step(
        self, backend: type[AttentionBackend], block_size: int
    ) -> None:
        steps = [{1: 16, 2: 9}, {0: 7, 1: 1, 2: 8, 3: 1}, {3: 1, 0: 1, 1: 1, 2: 1}]
        Story([8, 18, 18, 2]).check(backend, steps, block_size)

    @each_heads
    def test_heads(
        self, backend: type[AttentionBackend], heads: int, kv_heads: int
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
        backend: type[AttentionBackend],
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
        self, backend: type[AttentionBackend], block_size: int
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
        self, backend: type[AttentionBackend]
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

    def test_first_slots_change_nothing_but_the_copying(
        self, backend: type[AttentionBackend]
    ) -> None:
        query, key, value = (torch.randn(9, h, 4) for h in (4, 2, 2))
        gathered = AttentionMetadata(
            slot_mapping=torch.tensor([*range(8, 13), *range(20, 24)]),
            query_start_loc=torch.tensor([0, 5, 9]),
            seq_lens=torch.tensor([5, 4]),
            block_table=torch.tensor([[2, 3], [5, 10**9]]),
        )
        nowhere = torch.full((2, 2), 10**9)
        viewed = dataclasses.replace(gathered, block_table=nowhere, first_slots=[8, 20])
        outputs = [
            backend().forward(query, key, value, make_kv_cache(6, 4, 2, 4), metadata)
            for metadata in (gathered, viewed)
        ]
        assert torch.equal(*outputs)

    def test_inputs_stay_as_they_are(self, backend: type[AttentionBackend]) -> None:
        query, key, value = (torch.randn(5, h, 4) for h in (4, 2, 2))
        before = [x.clone() for x in (query, key, value)]
        _, metadata = BlockPool(9, 2).step({0: 3, 1: 2})
        backend().forward(query, key, value, make_kv_cache(9, 2, 2, 4), metadata)
        for x, copy in zip((query, key, value), before, strict=True):
            assert torch.equal(x, copy)

    def test_scale(self, backend: type[AttentionBackend]) -> None:
        query, key, value = (torch.randn(5, h, 4) for h in (4, 2, 2))
        _, metadata = BlockPool(9, 2).step({0: 5})
        cache = make_kv_cache(9, 2, 2, 4)
        ours = backend(0.1).forward(query, key, value, cache, metadata)
        exact = brute_force(*(x.transpose(0, 1) for x in (query, key, value)), 0.1)
        torch.testing.assert_close(
            ours.transpose(0, 1).double(), exact, rtol=1e-5, atol=2e-6
        )


class Loud(TorchNaiveBackend):
    """A reader's own backend."""

    @staticmethod
    def get_name() -> str:
        return "loud"

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2 * super().attend(query, key, value)


class TestGetAttentionBackend:
    def test_names(self) -> None:
        assert get_attention_backend("torch_naive") is TorchNaiveBackend
        assert get_attention_backend("torch_sdpa") is TorchSDPABackend
        assert get_attention_backend("auto") is TorchSDPABackend
        assert get_attention_backend() is TorchSDPABackend
        for name in ATTENTION_BACKENDS:
            assert get_attention_backend(name).get_name() == name

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

    def test_the_seam_itself_attends_to_nothing(self) -> None:
        with pytest.raises(TypeError, match="abstract"):
            AttentionBackend()  # type: ignore[abstract]


def test_metadata_is_plain_frozen_data() -> None:
    _, metadata = BlockPool(4, 2).step({0: 3})
    assert [f.name for f in dataclasses.fields(AttentionMetadata)] == [
        "slot_mapping",
        "query_start_loc",
        "seq_lens",
        "block_table",
        "first_slots",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata.seq_lens = metadata.block_table  # type: ignore[misc]
