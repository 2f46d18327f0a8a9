"""Page 15's kernels against the plain model, sequence by sequence.

Without a GPU they run in Triton's interpreter, in float32 and on one small layer, since each
step launches some hundred programs that take milliseconds there; with one the same tests run
on it, and those marked `gpu` add Qwen3-0.6B's layer, bfloat16 and repeats.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from folo_lib import LLMEngine, SamplingParams
from folo_lib.cuda_graph import GraphRunner, GraphSize, Recorder, StepGraphs
from folo_lib.fused_checks import FusionSizes, choose_fusion_sizes, find_obstacle
from folo_lib.kv_cache import AttentionMetadata
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.runner import RequestRows

pytest.importorskip("triton", reason="Triton runs on Linux")

import triton
import triton.language as tl

from folo_lib import fused_attention, fused_decode as module
from folo_lib.fused_decode import FusedDecode, FusedGraphs, FusedRunner

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
BLOCK_SIZE = 16
WIDE = torch.float32
TILE, MAX_SPLITS = fused_attention.WIDE_TILE, fused_attention.MAX_SPLITS  # of WIDE

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def few_programs(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """As the interpreter runs one program after another."""
    if "gpu" not in request.keywords and not HAS_GPU:

        def choose_large(
            num_seqs: int, dtype: torch.dtype, hidden_size: int
        ) -> FusionSizes:
            rows = choose_fusion_sizes(num_seqs, dtype, hidden_size).rows
            return FusionSizes(num_seqs, rows, 4, 4, 4)

        monkeypatch.setattr(module, "choose_fusion_sizes", choose_large)


def make_model(
    heads: int = 8,
    kv_heads: int = 2,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "torch_naive",
    **fields: Any,
) -> Qwen3ForCausalLM:
    """A random model of the smallest shape that is fused, with random norm weights."""
    config = Qwen3Config(**{
        "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
        "vocab_size": 160, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        **fields,
    })  # fmt: skip
    model = Qwen3ForCausalLM(config, backend).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.detach().normal_(1, 0.2)
    return model.to(DEVICE, dtype)


class Step:
    """A decode step of sequences whose blocks lie anywhere; 0 tokens are padding."""

    def __init__(self, model: Qwen3ForCausalLM, seq_lens: Sequence[int]) -> None:
        self.model, self.size = model, len(seq_lens)
        num_kv_heads, num_seqs = model.config.num_key_value_heads, self.size
        weight = model.model.embed_tokens.weight
        needed = [-(-length // BLOCK_SIZE) for length in seq_lens]
        blocks = list(range(sum(needed) + 3))
        random.Random(sum(seq_lens)).shuffle(blocks)
        max_blocks = max(max(needed), 5)
        self.rows = RequestRows(
            num_seqs + 2, max_blocks, model.config.vocab_size, DEVICE
        )
        table = torch.zeros_like(self.rows.block_table, device="cpu")
        self.row_index = torch.randperm(num_seqs + 2)[:num_seqs]
        slots = []
        shape = len(blocks), BLOCK_SIZE, num_kv_heads, 128
        self.kv_caches = []
        for _ in model.model.layers:  # what nobody has written is NaN
            self.kv_caches.append(tuple(
                torch.full(shape, float("nan"), dtype=weight.dtype, device=DEVICE)
                for _ in range(2)
            ))  # fmt: skip
        for row, length, count in zip(self.row_index, seq_lens, needed, strict=True):
            own = [blocks.pop() for _ in range(count)]
            table[row, :count] = torch.tensor(own, dtype=torch.int64)
            places = [b * BLOCK_SIZE + i for b in own for i in range(BLOCK_SIZE)]
            slots.append(places[length - 1] if length else -1)
            for cache in [one for pair in self.kv_caches for one in pair]:
                old = torch.tensor(places[: max(length - 1, 0)], dtype=torch.int64)
                values = torch.randn(len(old), *shape[2:], dtype=weight.dtype)
                cache.flatten(0, 1)[old.to(DEVICE)] = values.to(DEVICE)
        self.rows.block_table.copy_(table)
        tensor = lambda numbers: torch.as_tensor(numbers).to(DEVICE)  # noqa: E731
        self.row_index, self.slots = tensor(self.row_index), tensor(slots)
        self.seq_lens, self.starts = tensor(list(seq_lens)), tensor(range(num_seqs + 1))
        self.tokens = torch.randint(model.config.vocab_size, (num_seqs,)).to(DEVICE)
        self.input_ids = self.tokens.clone()
        self.input_ids[::2] = -1  # drawn by the step before, and known to the rows only
        self.rows.last_token_ids[self.row_index] = self.tokens

    def copy_caches(self) -> list[tuple[Tensor, Tensor]]:
        return [(keys.clone(), values.clone()) for keys, values in self.kv_caches]

    def run_plain(self, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits of the plain model, for the sequences that are no padding."""
        real = self.seq_lens > 0
        count, lengths = int(real.sum()), self.seq_lens[real]
        metadata = AttentionMetadata(
            block_size=BLOCK_SIZE, slot_mapping=self.slots[real],
            block_table=self.rows.block_table[self.row_index[real]],
            query_start_loc=self.starts[: count + 1], seq_lens=lengths,
            query_lens_list=[1] * count, seq_lens_list=lengths.tolist(),
        )  # fmt: skip
        hidden = self.model(self.tokens[real], lengths - 1, caches, metadata)
        return self.model.compute_logits(hidden)

    def get_columns(self) -> tuple[Tensor, ...]:
        """As `StaticInputs.split` gives them."""
        positions = (self.seq_lens - 1).clamp(min=0)
        return (
            self.row_index, self.seq_lens, self.starts, self.input_ids, positions,
            self.slots,
        )  # fmt: skip

    def run_fused(
        self, caches: list[tuple[Tensor, Tensor]], fused: FusedDecode | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits and tokens of all sequences."""
        table = self.rows.block_table
        fused = fused or FusedDecode(self.model, table.shape[1], has_pdl())
        logits = torch.zeros(
            self.size, self.model.config.vocab_size, dtype=fused.x.dtype, device=DEVICE
        )
        token_ids = torch.zeros(self.size, dtype=torch.int64, device=DEVICE)
        fused.run(self.get_columns(), self.rows, caches, logits, token_ids)
        return logits, token_ids


def has_pdl() -> bool:
    return HAS_GPU and torch.cuda.get_device_capability() >= (9, 0)


def check_step(
    model: Qwen3ForCausalLM,
    seq_lens: Sequence[int],
    make: Callable[[Step], FusedDecode | None] = lambda step: None,
) -> None:
    """Logits, caches and tokens are those of the plain model; float32."""
    step = Step(model, seq_lens)
    theirs, ours = step.copy_caches(), step.copy_caches()
    expected = step.run_plain(theirs)
    logits, token_ids = step.run_fused(ours, make(step))
    real = step.seq_lens > 0
    tolerance = 1e-5 * max(1.0, expected.std().item())
    torch.testing.assert_close(logits[real], expected, rtol=0, atol=tolerance)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, equal_nan=True)
    assert token_ids[real].tolist() == logits[real].argmax(-1).tolist()
    assert step.rows.last_token_ids[step.row_index[real]].equal(token_ids[real])


class TestStep:
    def test_one_sequence(self) -> None:
        """With so many tiles that the shares of their programs are merged in two rounds."""
        check_step(make_model(), [TILE * 9 + 3])

    def test_one_token(self) -> None:
        check_step(make_model(heads=8, kv_heads=1), [1])

    def test_the_edges_of_blocks_and_tiles(self) -> None:
        """Lengths with the newest token: a tile holds the old ones."""
        check_step(make_model(), [17, TILE, TILE + 1, TILE + 2])
        check_step(make_model(), [16, TILE * 2 + 1, TILE * 2 + 2, 5, 4])

    @pytest.mark.parametrize("block_size", [4, 8])
    def test_blocks_of_other_sizes(
        self, block_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Blocks of eight tokens and more are looked up once for eight neighbours."""
        monkeypatch.setattr(sys.modules[__name__], "BLOCK_SIZE", block_size)
        check_step(make_model(), [TILE + 7, 3])

    def test_padding_writes_nothing(self) -> None:
        check_step(make_model(), [20, 0, 2, 0])

    def test_more_tiles_than_splits(self) -> None:
        splits = MAX_SPLITS // 16
        check_step(make_model(), [TILE * splits * 2 + 70, *[3] * 8])

    def test_tiles_that_splits_do_not_divide(self) -> None:
        """Four splits of two tiles each; rounded down to one they would lose the end."""
        check_step(make_model(), [TILE * (MAX_SPLITS // 4) + 3, 3, 3])

    def test_a_head_of_its_own_and_rows_of_2048(self) -> None:
        model = make_model(
            heads=8, kv_heads=4, hidden_size=2048, tie_word_embeddings=False
        )
        check_step(model, [33, 70])

    @pytest.mark.more
    def test_rows_of_4096(self) -> None:
        """Of four bytes a number, so the head loads its inputs for every tile."""
        check_step(make_model(hidden_size=4096), [5, 66, 20])

    @pytest.mark.more
    def test_more_columns_than_are_loaded_before_the_wait(self) -> None:
        check_step(make_model(intermediate_size=5120), [9, 66])

    def test_counters_begin_again(self) -> None:
        """A second step, in the scratch memory that the first has left behind."""
        model = make_model()
        step = Step(model, [TILE * 2 + 5, 3])
        fused = FusedDecode(model, step.rows.block_table.shape[1], has_pdl())
        first = step.run_fused(step.copy_caches(), fused)
        assert not fused.scratch.arrivals.any()
        assert not fused.best.any() and not fused.arrivals.any()
        second = step.run_fused(step.copy_caches(), fused)
        for before, after in zip(first, second, strict=True):
            assert before.equal(after)

    def test_a_logit_that_is_not_finite(self) -> None:
        model = make_model()
        model.model.embed_tokens.weight[3] = float("nan")
        step = Step(model, [4, 5])
        step.tokens.clamp_(min=4)
        step.rows.last_token_ids[step.row_index] = step.tokens
        step.input_ids = step.tokens.clone()
        _, token_ids = step.run_fused(step.copy_caches())
        assert token_ids.tolist() == [-1, -1]
        assert step.rows.last_token_ids[step.row_index].tolist() == [0, 0]


def make_model_with_outliers(hidden_size: int, **fields: Any) -> Qwen3ForCausalLM:
    """In float16, with what real models have: some large numbers in the residual stream.

    `x * g` would be infinite there, if it were not scaled before it is float16.
    """
    fields |= {"hidden_size": hidden_size, "tie_word_embeddings": False}
    model = make_model(dtype=torch.float16, **fields)
    model.model.embed_tokens.weight.normal_(0, 20)
    model.model.embed_tokens.weight[:, 7::512] = 4000
    for name, weight in model.named_parameters():
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            weight[7::512] = 50
    return model


@pytest.mark.parametrize(
    ("hidden_size", "seq_lens"),
    [(1024, [70]), pytest.param(4096, [5, 66, 20], marks=pytest.mark.more)],
)
def test_float16_is_as_near_as_the_plain_path(
    hidden_size: int, seq_lens: list[int]
) -> None:
    """By root mean square of the error against float32, and nothing overflows."""
    narrow = make_model_with_outliers(hidden_size)
    wide = make_model(hidden_size=hidden_size, tie_word_embeddings=False)
    wide.load_state_dict(narrow.state_dict())
    step = Step(narrow, seq_lens)
    plain = step.run_plain(step.copy_caches())
    ours, token_ids = step.run_fused(step.copy_caches())
    step.model = wide
    exact = step.run_plain([(k.float(), v.float()) for k, v in step.copy_caches()])
    assert plain.isfinite().all() and ours.isfinite().all()
    assert ours.dtype == torch.float16 and token_ids.equal(ours.argmax(-1))
    errors = [(one.float() - exact).square().mean().sqrt() for one in (ours, plain)]
    print(hidden_size, seq_lens, [error.item() for error in errors])
    assert errors[0] <= 1.2 * errors[1]
    assert errors[0] < 0.01 * exact.std()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (5, 5)])
def test_a_layer_of_any_step(heads: int, kv_heads: int) -> None:
    """Layers that are fused between their products, on prompts, chunks and decodes."""
    backend = "triton" if HAS_GPU else "torch_naive"
    model = make_model(
        heads, kv_heads, backend=backend, hidden_size=96, intermediate_size=64
    )
    query_lens, ends = [5, 1, 3], [5, 20, 19]
    table = torch.tensor([[2, 0], [4, 1], [5, 3]]).to(DEVICE)
    slots = []
    for row, (new, end) in enumerate(zip(query_lens, ends, strict=True)):
        for i in range(end - new, end):
            slots.append(int(table[row, i // BLOCK_SIZE]) * BLOCK_SIZE + i % BLOCK_SIZE)
    starts = torch.tensor([0, 5, 6, 9]).to(DEVICE)
    metadata = AttentionMetadata(
        block_size=BLOCK_SIZE, slot_mapping=torch.tensor(slots).to(DEVICE),
        block_table=table, query_start_loc=starts,
        seq_lens=torch.tensor(ends).to(DEVICE),
        query_lens_list=query_lens, seq_lens_list=ends,
    )  # fmt: skip
    caches = [torch.randn(6, BLOCK_SIZE, kv_heads, 128).to(DEVICE) for _ in range(2)]
    positions = torch.tensor([*range(5), 19, *range(16, 19)]).to(DEVICE)
    x, residual = torch.randn(2, 9, 96).to(DEVICE)
    layer = model.model.layers[0]
    rotary = model.model.rotary_emb(positions)
    theirs, ours = ((caches[0].clone(), caches[1].clone()) for _ in range(2))
    expected = layer(x, residual, *rotary, theirs, metadata)
    fused = module.FusedLayers(model, lambda function: function)
    *projected, inner = fused.before(layer, x, residual, *rotary)
    answers = fused.attend(layer, projected, rotary, ours, metadata)
    got = fused.after(layer, answers, inner)
    for mine, other in zip([*got, *ours], [*expected, *theirs], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


def test_a_padding_row_stores_nothing() -> None:
    model = make_model(4, 2, hidden_size=96, intermediate_size=64)
    attention = model.model.layers[0].self_attn
    longer = torch.zeros(2, 3, BLOCK_SIZE, 2, 128, device=DEVICE)
    keys, values = longer[:, 1:]  # slot -1 of these is there
    qkv = torch.randn(3, 8 * 128, device=DEVICE)
    cos, sin = model.model.rotary_emb(torch.arange(3, device=DEVICE))
    slots = torch.tensor([-1, 5, -1], device=DEVICE)
    module.prepare(attention, qkv, cos, sin, (keys, values), slots)
    written = longer.flatten(1, 2).abs().sum((2, 3)).nonzero().tolist()
    assert written == [[0, BLOCK_SIZE + 5], [1, BLOCK_SIZE + 5]]


@triton.jit
def product_kernel(x, w, y, ROWS: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, 8 * GROUPS)[None, :]
    tiles = module.load_first_tiles(w, 8, 16, K, GROUPS)
    product = module.multiply(x, (), tiles, w, 8, 16, ROWS, 0.0, K, GROUPS, ROWS, False)
    tl.store(y + rows * 8 * GROUPS + columns, product)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("groups", "k"), [(1, 1024), (2, 2048), (4, 1024), (1, 6144)])
def test_multiply(rows: int, groups: int, k: int) -> None:
    """Groups of 8 rows, each 16 rows after the last."""
    x = torch.randn(rows, k, device=DEVICE)
    w = torch.randn(8 + 16 * groups, k, device=DEVICE)
    y = torch.empty(rows, 8 * groups, device=DEVICE)
    product_kernel[(1,)](x, w, y, rows, groups, k, num_warps=8)
    chosen = torch.cat([w[8 + 16 * i : 16 + 16 * i] for i in range(groups)])
    expected = x.double() @ chosen.double().T
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-4)


@triton.jit
def pack_kernel(scores, packed, tokens, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    whole = module.pack_scores(tl.load(scores + i), i)
    tl.store(packed + i, whole)
    tl.store(tokens + i, module.unpack_token(whole))


def test_pack_scores() -> None:
    """In the order of the scores, the first of equals on top, and no infinity drawn."""
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor(
        [
            0.0,
            -1.5,
            3.0,
            3.0,
            1e-40,
            -1e-40,
            -3e38,
            3e38,
            inf,
            -inf,
            nan,
            2.0,
            0,
            0,
            0,
            0,
        ]
    ).to(DEVICE)
    packed = torch.empty(16, dtype=torch.int64, device=DEVICE)
    tokens = torch.empty_like(packed)
    pack_kernel[(1,)](scores, packed, tokens, 16)
    order = packed.argsort(descending=True).tolist()
    assert order == [8, 10, 7, 2, 3, 11, 4, 0, 12, 13, 14, 15, 5, 1, 6, 9]
    assert tokens.tolist() == [i if i not in (8, 9, 10) else -1 for i in range(16)]
    assert (packed > 0).all()


@pytest.mark.parametrize("hidden_size", [1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes(dtype: torch.dtype, hidden_size: int) -> None:
    """Every row of a matrix belongs to one program, for all shapes that are fused."""
    for num_seqs in range(1, module.MAX_FUSED_SEQS + 1):
        sizes = choose_fusion_sizes(num_seqs, dtype, hidden_size)
        assert sizes.rows >= sizes.num_seqs == num_seqs and 16 % sizes.rows == 0
        for groups in (sizes.qkv_groups, sizes.head_groups, sizes.residual_groups):
            assert 128 % (8 * groups) == 0  # a head, and what find_obstacle asks
        assert 32 % (8 * sizes.head_groups) == 0


class TestObstacles:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"hidden_size": 1040}, "hidden_size=1040, not a multiple of 1024"),
            ({"intermediate_size": 1536}, "intermediate_size=1536, not a multiple"),
            ({"hidden_size": 5120}, "hidden_size=5120, above 4096"),
            ({"head_dim": 64, "heads": 16}, "head_dim=64, not 128"),
            ({"heads": 24, "kv_heads": 8}, "3 query heads per key head"),
            ({"attention_bias": True}, "biases"),
            ({"vocab_size": 161}, "vocab_size=161"),
            ({"dtype": torch.float64}, "torch.float64"),
        ],
    )
    def test_each(self, fields: dict[str, Any], message: str) -> None:
        with torch.device("meta"):
            fault = find_obstacle(make_model_on_meta(**fields))
        assert fault is not None and message in fault

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_none(self, dtype: torch.dtype) -> None:
        assert find_obstacle(make_model_on_meta(dtype=dtype)) is None

    @pytest.mark.parametrize(
        ("hidden_size", "intermediate_size", "heads", "message"),
        [
            (1024, 3072, 16, None),
            (2048, 6144, 16, None),
            (2560, 9728, 32, "hidden_size=2560, intermediate_size=9728, not a mult"),
            (4096, 12288, 32, None),
            (5120, 17408, 40, "above 4096"),
            (5120, 25600, 64, "above 4096"),
        ],
        ids=["0.6B", "1.7B", "4B", "8B", "14B", "32B"],
    )
    def test_the_models_of_qwen3(
        self, hidden_size: int, intermediate_size: int, heads: int, message: str | None
    ) -> None:
        model = make_model_on_meta(
            heads, 8, torch.bfloat16, hidden_size=hidden_size,
            intermediate_size=intermediate_size, vocab_size=151936,
        )  # fmt: skip
        fault = find_obstacle(model)
        assert fault is None if message is None else message in str(fault)

    def test_one_message_and_graphs_without_fusion(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = make_model(4, 2, hidden_size=64, intermediate_size=64, backend="triton")
        with caplog.at_level(logging.INFO, "folo_lib.fused_decode"):
            runner = FusedRunner(model)
        [record] = [one for one in caplog.records if "fused" in one.message]
        assert "hidden_size=64" in record.message
        assert runner.graphs_class is StepGraphs


def make_model_on_meta(
    heads: int = 8, kv_heads: int = 2, dtype: torch.dtype = torch.float32, **fields: Any
) -> Qwen3ForCausalLM:
    with torch.device("meta"):
        config = Qwen3Config(**{
            "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": 128, "vocab_size": 160, **fields,
        })  # fmt: skip
        return Qwen3ForCausalLM(config, "torch_naive").to(dtype)


def test_an_engine() -> None:
    """A prompt alone, and two requests of unequal length, greedy and drawn."""
    if HAS_GPU:
        pytest.skip("see test_engines_agree")
    model = make_model(backend="triton")
    greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    drawn = SamplingParams(temperature=0.7, seed=3, max_tokens=3, ignore_eos=True)
    texts = []
    for decode in ("fused", "eager"):
        engine = LLMEngine(
            model, decode=decode, max_num_seqs=2, max_model_len=64,
            max_num_batched_tokens=32, kv_cache_memory_bytes=2**20,
        )  # fmt: skip
        if decode == "fused":
            runner = engine.executor.worker.runner
            assert isinstance(runner, GraphRunner)
            assert isinstance(runner.graphs, FusedGraphs)
        outputs = engine.generate([[5, 6, 7]], greedy, use_tqdm=False)
        prompts = [[8, 3], [9] * 18]
        outputs += engine.generate(prompts, [greedy, drawn], use_tqdm=False)
        texts.append([one.outputs[0].token_ids for one in outputs])
    assert texts[0] == texts[1]


def test_which_steps_are_fused_and_which_launch_draws() -> None:
    """By the number of sequences, and by all that the requests of a step ask for."""
    graphs, most = FusedGraphs.__new__(FusedGraphs), module.MAX_FUSED_SEQS
    small, large = (GraphSize(n, n, True) for n in (most, most + 1))
    assert [graphs.is_fused(one) for one in (small, large)] == [True, False]
    assert not graphs.is_fused(GraphSize(1, 4, False))
    ran: list[str] = []
    graphs.draws = {
        (size.num_seqs, is_random): partial(ran.append, f"{size.num_seqs} {is_random}")
        for size in (small, large)
        for is_random in (False, True)
    }
    graphs.filtered = {most: partial(ran.append, "filtered")}
    wishes: list[set[str]] = [
        set(), {"temperature"}, {"temperature", "min_p"}, {"temperature", "top_k"},
        {"top_p"}, {"temperature", "min_p", "top_k", "top_p"},
    ]  # fmt: skip
    for one in wishes:
        draw = graphs.find_draw(small, one)
        assert draw is not None
        draw()
    assert (
        ran == [f"{most} True"] * 2 + ["filtered"] * 3
    )  # the first by the step itself
    assert graphs.find_draw(small, {"temperature", "repetition_penalty"}) is None
    draw = graphs.find_draw(large, set())
    assert draw is not None
    draw()
    assert ran[-1] == f"{most + 1} False"


@pytest.mark.more
@pytest.mark.slow
def test_compiles_for_a_card_that_is_not_there() -> None:
    """All shapes, in narrow numbers, and the head of wide ones; and each kernel fits.

    With those of a sequence that is alone, and of two cards.
    """
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), "90", "fused"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3 * (3 * 5 + 2) + 2 + 1 + 2 * 7 + 12
    for name, shared, stack in lines:
        assert int(shared) <= 1024 * 227 and int(stack) <= 1024, name


# What follows runs on a GPU only.


def make_large_model(
    dtype: torch.dtype, layers: int = 3, shape: str = "0.6B"
) -> Qwen3ForCausalLM:
    """Layers of a Qwen3 of that size."""
    hidden, heads, intermediate = {
        "0.6B": (1024, 16, 3072), "1.7B": (2048, 16, 6144), "8B": (4096, 32, 12288),
    }[shape]  # fmt: skip
    return make_model(
        heads, 8, layers, dtype, "triton", hidden_size=hidden, vocab_size=4096,
        intermediate_size=intermediate, max_position_embeddings=40960,
    )  # fmt: skip


@gpu
@on_gpu
@pytest.mark.parametrize(
    "seq_lens",
    [
        [1], [64], [2048], [40_000], [2048, 2049], [1, 129, 7], [300, 1, 0, 65, 64],
        [8192, 5, 63, 64, 65, 66, 4097, 300], [17 * i + 1 for i in range(16)],
    ],
)  # fmt: skip
def test_large_steps_in_float32(seq_lens: list[int]) -> None:
    check_step(make_large_model(torch.float32, 2), seq_lens)


@gpu
@on_gpu
@pytest.mark.parametrize("num_seqs", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["0.6B", "1.7B", "8B"])
def test_narrow_numbers_are_as_near_as_on_the_plain_path(
    shape: str, dtype: torch.dtype, num_seqs: int
) -> None:
    """By root mean square of the logits' error against float32, over five lengths."""
    layers = 3 if shape == "0.6B" else 1
    narrow, wide = (make_large_model(one, layers, shape) for one in (dtype, WIDE))
    wide.load_state_dict(narrow.state_dict())
    errors = {"ours": 0.0, "plain": 0.0}
    for length in (1, 64, 300, 1025, 5000):
        lengths = [max(1, length - 3 * i) for i in range(num_seqs)]
        step = Step(narrow, lengths)
        caches = step.copy_caches()
        exact_caches = [(k.float(), v.float()) for k, v in step.copy_caches()]
        plain = step.run_plain(step.copy_caches()).float()
        step.model = wide
        exact = step.run_plain(exact_caches)
        step.model = narrow
        ours = step.run_fused(caches)[0].float()
        errors["ours"] += (ours - exact).square().mean().sqrt().item()
        errors["plain"] += (plain - exact).square().mean().sqrt().item()
    print(shape, dtype, num_seqs, errors)
    assert errors["ours"] <= 1.2 * errors["plain"]


@gpu
@on_gpu
@pytest.mark.parametrize("uses_pdl", [False, True])
@pytest.mark.parametrize("num_seqs", [1, 3, 8, 16])
def test_repeats_are_equal_to_the_bit(num_seqs: int, uses_pdl: bool) -> None:
    """The same step launched twenty times, over one cache and scratch, at five lengths."""
    if uses_pdl and not has_pdl():
        pytest.skip("needs compute capability 9.0")
    model = make_large_model(torch.bfloat16)
    for length in (2, 65, 300, 1025, 4000):
        step = Step(model, [length + 5 * i for i in range(num_seqs)])
        fused = FusedDecode(model, step.rows.block_table.shape[1], uses_pdl)
        caches = step.copy_caches()
        results = []
        for _ in range(20):
            step.rows.last_token_ids[step.row_index] = step.tokens
            results.append((*step.run_fused(caches, fused), *step_slots(step, caches)))
        for later in results[1:]:
            assert all(a.equal(b) for a, b in zip(results[0], later, strict=True))


def step_slots(step: Step, caches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [one.flatten(0, 1)[step.slots] for pair in caches for one in pair]


@gpu
@on_gpu
@pytest.mark.parametrize("num_seqs", [2, 8, 16])
def test_each_sequence_is_as_it_is_alone(num_seqs: int) -> None:
    """In float32, where the order of a sum shows in the last bits only."""
    model = make_large_model(torch.float32, 2)
    step = Step(model, [61 + 40 * i for i in range(num_seqs)])
    together, _ = step.run_fused(step.copy_caches())
    for i in range(num_seqs):
        alone = Step.__new__(Step)
        vars(alone).update(vars(step))
        alone.size, alone.starts = 1, step.starts[:2]
        for name in ("row_index", "seq_lens", "slots", "tokens", "input_ids"):
            setattr(alone, name, getattr(step, name)[i : i + 1].clone())
        alone.input_ids = alone.tokens.clone()
        logits, _ = alone.run_fused(step.copy_caches())
        torch.testing.assert_close(logits[0], together[i], rtol=0, atol=1e-5)


def test_what_is_recorded_reads_rows_of_its_own_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is run before it is recorded reads a step of padding, not what another size left.

    Of a step of four a draw of six would read slots as rows, which are -1 where nothing is stored.
    """
    num_seen = 0

    class CheckedGraphs(FusedGraphs):
        def run_step(self, size: GraphSize) -> None:
            self.check(size)

        def run_draw(
            self, size: GraphSize, is_random: bool, filters: bool = False
        ) -> None:
            self.check(size)

        def check(self, size: GraphSize) -> None:
            nonlocal num_seen
            num_seen += 1
            rows, lengths, *_, slots = self.inputs.split(size)
            assert rows.eq(self.inputs.padding_row).all()
            assert lengths.eq(0).all() and slots.eq(-1).all()

    monkeypatch.setattr(module, "FusedGraphs", CheckedGraphs)
    monkeypatch.setattr(Recorder, "record", lambda self, run: [run(), run][1])
    LLMEngine(
        make_model(backend="triton"), decode="fused", max_num_seqs=6, max_model_len=64,
        max_num_batched_tokens=128, kv_cache_memory_bytes=2**20,
    )  # fmt: skip
    # Decode steps of 1, 2, 4 and 6 sequences, each with three draws, and longer steps.
    assert num_seen == 4 * (1 + 3) + 6


@gpu
@on_gpu
@pytest.mark.parametrize("max_num_seqs", [1, 5, 16, 24])
def test_engines_agree(max_num_seqs: int) -> None:
    """Greedy and drawn tokens in float32, with requests that join and leave."""
    model = make_large_model(torch.float32, 2)
    rng = random.Random(max_num_seqs)
    prompts = [
        [rng.randrange(4096) for _ in range(rng.randrange(1, 200))] for _ in range(20)
    ]
    params = [
        SamplingParams(
            temperature=0.8 * (i % 2), seed=i, ignore_eos=True,
            max_tokens=rng.randrange(2, 60), top_k=40 if i % 3 == 0 else 0,
        )
        for i in range(20)
    ]  # fmt: skip
    texts = []
    for decode in ("eager", "fused"):
        engine = LLMEngine(
            model, decode=decode, max_num_seqs=max_num_seqs, max_model_len=512,
            kv_cache_memory_bytes=2**28,
        )  # fmt: skip
        outputs = engine.generate(prompts, params, use_tqdm=False)
        texts.append([one.outputs[0].token_ids for one in outputs])
    assert texts[0] == texts[1]
