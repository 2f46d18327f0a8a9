"""kv_cache.py against bookkeeping by hand, and the model through it against no cache."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from helpers import make_metadata
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import (
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM as Qwen3ReferenceModel,
)

from folo_lib.kv_cache import (
    DEFAULT_BLOCK_SIZE,
    BlockAllocator,
    TorchSDPABackend,
    allocate_kv_caches,
    compute_slot_mapping,
    kv_bytes_per_token,
    reshape_and_cache_kv,
    resolve_max_model_len,
)
from folo_lib.qwen3 import ATTENTION_BACKENDS, Qwen3ForCausalLM

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def small_config(**changes: Any) -> Qwen3Config:
    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return Qwen3Config(**(sizes | changes))


class TestReshapeAndCacheKV:
    @pytest.mark.parametrize("heads", [1, 2, 8])
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("flat", [True, False])
    def test_tokens_come_back_in_order(
        self, batch: int, heads: int, flat: bool
    ) -> None:
        keys, values = torch.randn(2, batch, heads, 9, 4)
        cache = reshape_and_cache_kv(keys[:, :, :5], values[:, :, :5])
        assert cache[0].shape == (batch, heads, 5, 4)
        for i in range(5, 8):
            at = i if flat else slice(i, i + 1)
            cache = reshape_and_cache_kv(keys[:, :, at], values[:, :, at], *cache)
            assert torch.equal(cache[0], keys[:, :, : i + 1])
            assert torch.equal(cache[1], values[:, :, : i + 1])
        cache = reshape_and_cache_kv(keys[:, :, 5:], values[:, :, 5:], *cache)
        assert cache[0].shape == (batch, heads, 12, 4)

    def test_begins_with_a_single_token(self) -> None:
        key, value = torch.randn(2, 2, 3, 4)
        cache = reshape_and_cache_kv(key, value)
        assert torch.equal(cache[0], key.view(2, 3, 1, 4))
        assert torch.equal(cache[1], value.view(2, 3, 1, 4))

    def test_the_old_cache_stays_as_it_is(self) -> None:
        old = torch.randn(2, 1, 2, 5, 4)
        before = old.clone()
        new = reshape_and_cache_kv(*torch.randn(2, 1, 2, 4), *old)
        new[0].zero_()
        assert torch.equal(old, before)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        new = torch.randn(2, 1, 2, 3, 4).to(dtype)
        assert reshape_and_cache_kv(*new, *new)[0].dtype == dtype

    @pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 1, 2, 3, 4)])
    def test_other_dimensions_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"\[B, H_kv, S, D\], or \[B, H_kv, D\]"):
            reshape_and_cache_kv(torch.zeros(shape), torch.zeros(shape))

    def test_key_and_value_must_be_alike(self) -> None:
        key, value = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4)
        with pytest.raises(
            ValueError, match=r"key \[1, 2, 3, 4\] and value \[1, 2, 4\]"
        ):
            reshape_and_cache_kv(key, value)

    def test_one_cache_alone_is_refused(self) -> None:
        key, cache = torch.zeros(1, 2, 4), torch.zeros(1, 2, 5, 4)
        with pytest.raises(ValueError, match="come together"):
            reshape_and_cache_kv(key, key, cache)
        with pytest.raises(ValueError, match="come together"):
            reshape_and_cache_kv(key, key, None, cache)

    @pytest.mark.parametrize(
        "shape", [(2, 2, 5, 4), (1, 1, 5, 4), (1, 2, 5, 8), (1, 2, 4), (2, 5, 4)]
    )
    def test_a_cache_of_others_is_refused(self, shape: tuple[int, ...]) -> None:
        key, cache, fits = (
            torch.zeros(1, 2, 4),
            torch.zeros(shape),
            torch.zeros(1, 2, 5, 4),
        )
        for keys, values in ((cache, cache), (fits, cache), (cache, fits)):
            with pytest.raises(ValueError, match=r"B=1, H_kv=2, S, D=4.*token axis"):
                reshape_and_cache_kv(key, key, keys, values)

    def test_two_caches_of_different_length_are_refused(self) -> None:
        key = torch.zeros(1, 2, 4)
        with pytest.raises(ValueError, match=r"\[1, 2, 5, 4\] and \[1, 2, 6, 4\]"):
            reshape_and_cache_kv(
                key, key, torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 6, 4)
            )

    def test_a_flat_prompt_is_noticed_at_the_next_token(self) -> None:
        flat = torch.zeros(7, 2, 4)  # [N, H_kv, D]
        cache = reshape_and_cache_kv(flat, flat)
        with pytest.raises(ValueError, match=r"\[7, 2, 1, 4\]"):
            reshape_and_cache_kv(flat[:1], flat[:1], *cache)


class TestSizes:
    @pytest.mark.parametrize(
        ("layers", "exact"),
        [(28, 114_688), (36, 147_456), (40, 163_840), (64, 262_144)],
    )
    def test_real_sizes(self, layers: int, exact: int) -> None:
        config = Qwen3Config(
            num_hidden_layers=layers, num_key_value_heads=8, head_dim=128
        )
        assert kv_bytes_per_token(config, torch.bfloat16) == exact
        assert kv_bytes_per_token(config, torch.float32) == 2 * exact

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("config", "heads", "head_dim"),
        [
            (small_config(), 2, 16),
            (small_config(num_key_value_heads=6, num_hidden_layers=1), 6, 16),
            (small_config(num_key_value_heads=1, head_dim=8), 1, 8),
            (Qwen2Config(hidden_size=48, num_attention_heads=6, num_hidden_layers=2,
                         num_key_value_heads=3), 3, 8),
            (Qwen2Config(hidden_size=48, num_attention_heads=6, num_hidden_layers=2,
                         num_key_value_heads=None), 6, 8),
        ],
    )  # fmt: skip
    def test_caches_are_what_the_formula_says(
        self,
        config: Qwen2Config | Qwen3Config,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        caches = allocate_kv_caches(config, 5, 4, dtype, "cpu")
        assert len(caches) == config.num_hidden_layers
        tensors = [cache for pair in caches for cache in pair]
        for cache in tensors:
            assert cache.shape == (5, 4, heads, head_dim)
            assert cache.dtype == dtype
        assert len({cache.data_ptr() for cache in tensors}) == len(tensors)
        total = sum(cache.nbytes for cache in tensors)
        assert total == 5 * 4 * kv_bytes_per_token(config, dtype)

    def test_without_groups_every_head_has_its_own(self) -> None:
        config = small_config(num_hidden_layers=2)
        config.num_key_value_heads = None
        caches = allocate_kv_caches(config, 5, 4, torch.float32, "cpu")
        assert caches[1][1].shape == (5, 4, 6, 16)
        assert kv_bytes_per_token(config, torch.float32) == 2 * 2 * 6 * 16 * 4

    def test_device(self) -> None:
        caches = allocate_kv_caches(small_config(), 5, 4, torch.float32, "meta")
        assert {cache.device.type for pair in caches for cache in pair} == {"meta"}


class TestComputeSlotMapping:
    @pytest.mark.parametrize("block_size", [1, 4, 16])
    def test_against_writing_down_all_slots(self, block_size: int) -> None:
        blocks = [7, 0, 3]
        slots = [b * block_size + p for b in blocks for p in range(block_size)]
        for stop in range(len(slots) + 1):
            for start in range(stop + 1):
                ours = compute_slot_mapping(blocks, start, stop, block_size)
                assert ours == slots[start:stop]

    @pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 9), (3, 2), (8, 10)])
    def test_tokens_outside_the_blocks_are_refused(self, start: int, stop: int) -> None:
        with pytest.raises(ValueError, match=f"{start} to {stop - 1} .* 2 blocks of 4"):
            compute_slot_mapping([1, 5], start, stop, 4)


def runs(free: list[bool]) -> list[tuple[int, int]]:
    """Start and length of every run of free blocks."""
    found: list[tuple[int, int]] = []
    for i, is_free in enumerate(free):
        if is_free and i and free[i - 1]:
            found[-1] = found[-1][0], found[-1][1] + 1
        elif is_free:
            found.append((i, 1))
    return found


class TestBlockAllocator:
    @given(
        num_blocks=st.integers(1, 40),
        block_size=st.sampled_from([1, 4, 16]),
        rng=st.randoms(use_true_random=False),
    )
    @settings(max_examples=60, deadline=None)
    def test_first_fit_against_a_list_of_runs(
        self, num_blocks: int, block_size: int, rng: random.Random
    ) -> None:
        allocator = BlockAllocator(num_blocks, block_size)
        free = [True] * num_blocks
        held: list[list[int]] = []
        for _ in range(60):
            assert allocator.num_free_blocks == sum(free)
            if held and rng.random() < 0.4:
                blocks = held.pop(rng.randrange(len(held)))
                rng.shuffle(blocks)
                allocator.free(blocks)
                for block in blocks:
                    free[block] = True
                continue
            tokens = rng.randint(1, num_blocks * block_size // 2 + 2)
            needed = (tokens + block_size - 1) // block_size
            fitting = [first for first, length in runs(free) if length >= needed]
            assert allocator.can_allocate(tokens) == bool(fitting)
            if not fitting:
                with pytest.raises(RuntimeError):
                    allocator.allocate(tokens)
                continue
            blocks = allocator.allocate(tokens)
            assert blocks == list(range(fitting[0], fitting[0] + needed))
            held.append(blocks)
            for block in blocks:
                free[block] = False
        for blocks in held:
            allocator.free(blocks)
        assert allocator.num_free_blocks == num_blocks
        assert allocator.allocate(num_blocks * block_size) == list(range(num_blocks))

    def test_asking_takes_nothing(self) -> None:
        allocator = BlockAllocator(3, 4)
        assert all(allocator.can_allocate(12) for _ in range(5))
        assert not allocator.can_allocate(13)
        assert allocator.num_free_blocks == 3
        assert allocator.allocate(4) == [0]

    def test_default_block_size(self) -> None:
        assert BlockAllocator(3).block_size == DEFAULT_BLOCK_SIZE == 16
        assert BlockAllocator(3, 4).num_blocks == 3

    def test_a_full_cache_says_so(self) -> None:
        allocator = BlockAllocator(6, 4)
        first = allocator.allocate(8)
        allocator.allocate(8)
        allocator.free(first)
        with pytest.raises(
            RuntimeError,
            match=r"9 tokens need 3 free blocks in a row; of 6 blocks 4 are free.*free\(\)",
        ):
            allocator.allocate(9)
        assert allocator.num_free_blocks == 4
        assert allocator.allocate(8) == [0, 1]

    def test_far_too_many_tokens(self) -> None:
        allocator = BlockAllocator(6, 4)
        assert not allocator.can_allocate(10**18)
        with pytest.raises(RuntimeError, match=str(10**18)):
            allocator.allocate(10**18)

    @pytest.mark.parametrize("num_tokens", [0, -1, -17])
    def test_no_tokens_is_an_error(self, num_tokens: int) -> None:
        allocator = BlockAllocator(6, 4)
        with pytest.raises(ValueError, match=f"num_tokens={num_tokens} "):
            allocator.allocate(num_tokens)
        with pytest.raises(ValueError, match=f"num_tokens={num_tokens} "):
            allocator.can_allocate(num_tokens)

    @pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, -1)])
    def test_sizes_that_cannot_be(self, num_blocks: int, block_size: int) -> None:
        with pytest.raises(
            ValueError, match=f"num_blocks={num_blocks} and block_size={block_size} "
        ):
            BlockAllocator(num_blocks, block_size)

    @pytest.mark.parametrize(
        "wrong", [[3], [0, 3], [0, 0], [0, 1, 0], [-1], [-6], [6], [0, 1, 10**9]]
    )
    def test_what_nobody_has_cannot_be_freed(self, wrong: list[int]) -> None:
        allocator = BlockAllocator(6, 4)
        assert allocator.allocate(8) == [0, 1]
        with pytest.raises(ValueError, match="freed before, or are not ours"):
            allocator.free(wrong)
        assert allocator.num_free_blocks == 4  # nothing was freed in part
        allocator.free([1, 0])
        with pytest.raises(ValueError, match=r"\[0\]"):
            allocator.free([0])

    def test_a_part_may_be_freed(self) -> None:
        allocator = BlockAllocator(6, 4)
        allocator.allocate(24)
        allocator.free([4, 2])
        allocator.free([])
        assert allocator.num_free_blocks == 2
        assert not allocator.can_allocate(5)
        assert allocator.allocate(1) == [2]


class TestResolveMaxModelLen:
    config = small_config()  # 3 layers * 2 heads * 16 numbers, twice: 192 numbers

    @given(
        memory=st.integers(0, 2**18),
        wanted=st.none() | st.integers(-2, 140),
        block_size=st.sampled_from([1, 5, 16, 64]),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=300, deadline=None)
    def test_against_trying_every_length(
        self, memory: int, wanted: int | None, block_size: int, dtype: torch.dtype
    ) -> None:
        def fits(length: int) -> bool:
            num_blocks = (length + block_size - 1) // block_size
            return num_blocks * block_size * 192 * dtype.itemsize <= memory

        able = [length for length in range(1, 129) if fits(length)]
        args = self.config, dtype, memory, wanted, block_size
        if able and (wanted is None or 1 <= wanted <= 128):
            right = max(n for n in able if wanted is None or n <= wanted)
            assert resolve_max_model_len(*args) == right
        else:
            named = 128 if wanted is None else wanted
            with pytest.raises(ValueError, match=f"max_model_len={named} "):
                resolve_max_model_len(*args)

    def test_the_models_limit_in_silence(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        exactly = 128 * 192 * 4
        assert resolve_max_model_len(self.config, torch.float32, exactly) == 128
        assert resolve_max_model_len(self.config, torch.float32, 10**12) == 128
        for wanted in (1, 127, 128):
            args = self.config, torch.float32, exactly, wanted
            assert resolve_max_model_len(*args) == wanted
        assert not caplog.records

    @pytest.mark.parametrize("wanted", [None, 128, 113])
    def test_less_is_served_and_said_aloud(
        self, wanted: int | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        memory = 128 * 192 * 4 - 1
        with caplog.at_level(logging.WARNING):
            args = self.config, torch.float32, memory, wanted
            assert resolve_max_model_len(*args) == 112
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        said = record.getMessage()
        for part in (f"{memory:,} bytes", "112 tokens", "768 bytes", "blocks of 16"):
            assert part in said
        assert f"is 112, not {wanted or 128}:" in said
        assert "set aside more memory, or use a narrower dtype" in said

    def test_what_fits_is_served_in_silence(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert resolve_max_model_len(self.config, torch.float32, 50_000, 64) == 64
        assert not caplog.records
        assert resolve_max_model_len(self.config, torch.float32, 50_000, 65) == 64
        assert len(caplog.records) == 1

    @pytest.mark.parametrize("wanted", [129, 0, -3])
    def test_the_models_limit_is_named(self, wanted: int) -> None:
        with pytest.raises(
            ValueError, match=f"max_model_len={wanted} .*128, the positions"
        ):
            resolve_max_model_len(self.config, torch.float32, 10**9, wanted)

    @pytest.mark.parametrize("wanted", [None, 1])
    def test_not_even_one_block(self, wanted: int | None) -> None:
        with pytest.raises(ValueError, match=r"hold 0 tokens.*more memory"):
            resolve_max_model_len(self.config, torch.float32, 16 * 768 - 1, wanted)


class Growing(TorchSDPABackend):
    """The growing cache behind the same seam, for one sequence."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: object,
        metadata: object,
    ) -> Tensor:
        assert isinstance(kv_cache, list)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        if key.shape[2] == 1:
            key, value = key[:, :, 0], value[:, :, 0]  # the spelling of decode
        kv_cache[:] = reshape_and_cache_kv(key, value, *kv_cache)
        return self.attend(query, *kv_cache)[0].transpose(0, 1)


def random_reference(config: Qwen3Config) -> Qwen3ReferenceModel:
    """Norm weights random too: ones hide swapped and ignored norms."""
    reference = Qwen3ReferenceModel(config)
    reference.train(False)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=0.1)
    return reference


@pytest.mark.parametrize("tied", [True, False])
class TestThroughTheModel:
    chunks = (7, 1, 32, 56, 1, 1)

    @torch.inference_mode()
    def read(
        self,
        reference: Qwen3ReferenceModel,
        backend: str,
        ids: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        blocks: list[int],
        block_size: int = 16,
    ) -> Tensor:
        model = Qwen3ForCausalLM(reference.config, backend)
        model.load_weights(reference.state_dict().items())
        states, done = [], 0
        for size in self.chunks:
            metadata = make_metadata([blocks], [size], [done + size], block_size)
            positions = torch.arange(done, done + size)
            states.append(model(ids[positions], positions, caches, metadata))
            done += size
        return model.compute_logits(torch.cat(states))

    def check(
        self, logits: Tensor, reference: Qwen3ReferenceModel, ids: Tensor
    ) -> None:
        with torch.inference_mode():
            exact = reference(ids[None]).logits[0]
        bound = max(1e-5, 1e-5 * exact.std().item())
        assert (logits - exact).abs().max().item() <= bound

    @pytest.mark.parametrize("block_size", [1, 16])
    @pytest.mark.parametrize("backend", ["torch_naive", "torch_sdpa"])
    def test_chunks_through_slots(
        self, tied: bool, backend: str, block_size: int
    ) -> None:
        config = small_config(tie_word_embeddings=tied)
        reference, ids = random_reference(config), torch.randint(100, (98,))
        num_blocks = 2 * -(-98 // block_size) + 3
        allocator = BlockAllocator(num_blocks, block_size)
        allocator.allocate(2 * block_size)  # a neighbour
        blocks = allocator.allocate(98)
        sizes = num_blocks, block_size, torch.float32, "cpu"
        for in_a_row in (True, False):
            caches = allocate_kv_caches(config, *sizes)
            for cache in (cache for pair in caches for cache in pair):
                cache.fill_(float("nan"))
            order = blocks if in_a_row else blocks[::-1]
            logits = self.read(reference, backend, ids, caches, order, block_size)
            self.check(logits, reference, ids)
            slots = torch.tensor(compute_slot_mapping(order, 0, 98, block_size))
            for cache in (cache for pair in caches for cache in pair):
                written = ~cache.flatten(0, 1).isnan().any(-1).any(-1)
                assert written.nonzero()[:, 0].tolist() == sorted(slots.tolist())

    def test_chunks_through_the_growing_cache(
        self, tied: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(ATTENTION_BACKENDS, "growing", f"{__name__}:Growing")
        reference = random_reference(small_config(tie_word_embeddings=tied))
        ids = torch.randint(100, (98,))
        caches = [[None, None] for _ in range(3)]
        logits = self.read(reference, "growing", ids, caches, list(range(7)))  # type: ignore[arg-type]
        self.check(logits, reference, ids)

    def test_what_blocks_held_before_never_matters(self, tied: bool) -> None:
        config = small_config(tie_word_embeddings=tied)
        reference = random_reference(config)
        ids, others = torch.randint(100, (2, 98))
        allocator = BlockAllocator(10)
        caches = allocate_kv_caches(config, 10, 16, torch.float32, "cpu")
        outputs = []
        for tokens in (ids, others, ids):
            blocks = allocator.allocate(98)
            assert blocks == list(range(7))
            read = self.read(reference, "torch_sdpa", tokens, caches, blocks)
            outputs.append(read)
            allocator.free(blocks)
        assert torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], outputs[1])
