"""qwen3.py against Hugging Face, on random norm weights, whole and through the cache.

All-ones norms hide swapped, ignored and misplaced norms, and flat attention hides a wrong
scale, so every weight is random and large enough to matter.
"""

from __future__ import annotations

import functools
import math
import random
import re
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import BlockPool, KVCache, make_kv_cache
from models import (
    CASES,
    Config,
    assert_parity,
    load,
    make_config,
    make_reference,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from folo_lib.checkpoint_checks import check_config
from folo_lib.kv_cache import AttentionMetadata, TorchNaiveBackend
from folo_lib.qwen3 import (
    ATTENTION_BACKENDS,
    Qwen3ForCausalLM,
    copy_weights,
    get_head_dim,
)
from folo_lib.rope import longest_context

BACKENDS = ["torch_naive", "torch_sdpa"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize("case", CASES)


@dataclass(frozen=True)
class Reference:
    """What Hugging Face says, computed once per case."""

    config: Config
    model: PreTrainedModel
    batch: Tensor  # [B, S]
    batch_logits: Tensor  # [B, S, V]
    generated: Tensor  # [prompt + 64]
    generated_logits: Tensor  # [64, V], of each generated token
    prompt_len: int


NEW_TOKENS = 64


@functools.cache
@torch.random.fork_rng()  # who asks first must not draw other numbers afterwards
def reference(case: str) -> Reference:
    config = make_config(case)
    rng = random.Random(case)
    model = make_reference(config, rng.choice(["eager", "sdpa"]))
    shape = rng.choice([1, 2, 3]), rng.randrange(61, 91, 2)
    batch = torch.randint(config.vocab_size, shape)
    prompt = torch.randint(config.vocab_size, (1, rng.randrange(1, 40)))
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    return Reference(
        config,
        model,
        batch,
        model(batch).logits,
        generated.sequences[0],
        torch.cat(generated.logits),
        prompt.shape[1],
    )


@functools.cache
@torch.random.fork_rng()
def loaded(case: str, backend: str) -> Qwen3ForCausalLM:
    return load(reference(case).config, reference(case).model, backend)


def logits_of(model: Qwen3ForCausalLM, *args: Any) -> Tensor:
    return model.compute_logits(model(*args))


class Cached:
    """A model that reads its sequences in steps, from a cache full of NaN."""

    def __init__(self, model: Qwen3ForCausalLM, block_size: int = 16) -> None:
        config = model.config
        num_blocks = 512 // block_size
        self.model, self.pool = model, BlockPool(num_blocks, block_size)
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        sizes = num_blocks, block_size, kv_heads, get_head_dim(config)
        self.caches: list[KVCache] = [
            make_kv_cache(*sizes) for _ in range(config.num_hidden_layers)
        ]

    def step(self, news: dict[int, Tensor]) -> dict[int, Tensor]:
        """Sequence number and its new tokens in, its logits out."""
        lengths = {seq: len(tokens) for seq, tokens in news.items()}
        positions, metadata = self.pool.step(lengths)
        flat = torch.cat(list(news.values()))
        logits = logits_of(self.model, flat, positions, self.caches, metadata)
        parts = logits.split(list(lengths.values()))
        return dict(zip(news, parts, strict=True))


@each_backend
@each_case
class TestParityInFloat32:
    def test_whole_batch(self, case: str, backend: str) -> None:
        ref = reference(case)
        assert_parity(logits_of(loaded(case, backend), ref.batch), ref.batch_logits)

    def test_chunked_prefill_and_decode_through_the_cache(
        self, case: str, backend: str
    ) -> None:
        ref, cached = reference(case), Cached(loaded(case, backend))
        tokens = torch.randint(ref.config.vocab_size, (101,))
        chunks = tokens.split([7, 1, 32, 56, 1, 1, 1, 1, 1])
        logits = torch.cat([cached.step({0: chunk})[0] for chunk in chunks])
        assert_parity(logits, ref.model(tokens[None]).logits[0])
        assert_parity(logits, logits_of(loaded(case, backend), tokens[None])[0])

    def test_unequal_prompts_in_one_step_equal_each_alone(
        self, case: str, backend: str
    ) -> None:
        ref, cached = reference(case), Cached(loaded(case, backend), block_size=4)
        lengths = {3: 23, 0: 9, 2: 1, 1: 36}
        tokens = {
            s: torch.randint(ref.config.vocab_size, (n,)) for s, n in lengths.items()
        }
        steps = [{3: 20, 0: 7, 1: 31}, {2: 1, 1: 3, 0: 1, 3: 1}, {0: 1, 1: 2, 3: 2}]
        logits: dict[int, list[Tensor]] = {seq: [] for seq in tokens}
        for step in steps:
            news = {
                s: tokens[s][cached.pool.lengths.get(s, 0) :][:n]
                for s, n in step.items()
            }
            for seq, part in cached.step(news).items():
                logits[seq].append(part)
        for seq, alone in tokens.items():
            assert_parity(torch.cat(logits[seq]), ref.model(alone[None]).logits[0])

    def test_64_greedy_tokens_equal_generate(self, case: str, backend: str) -> None:
        # Both read the reference's tokens, so that a tie broken the other way costs one
        # step and not all that follow.
        ref, cached = reference(case), Cached(loaded(case, backend))
        chunks = ref.generated[:-1].split([ref.prompt_len] + [1] * (NEW_TOKENS - 1))
        logits = torch.cat([cached.step({0: chunk})[0][-1:] for chunk in chunks])
        assert_parity(logits, ref.generated_logits)
        error = (logits - ref.generated_logits).abs().max()
        best, second = ref.generated_logits.topk(2).values.T
        is_exempt = best - second < 10 * error
        is_equal = logits.argmax(-1) == ref.generated[ref.prompt_len :]
        assert len(is_equal) == NEW_TOKENS
        assert (is_equal | is_exempt).all()
        assert is_exempt.sum() <= 2


def test_the_cases_cover_what_they_should() -> None:
    configs = [make_config(case) for case in CASES]
    assert len(configs) >= 14
    for kind in (Qwen2Config, Qwen3Config):
        some = [c for c in configs if isinstance(c, kind)]
        assert {c.tie_word_embeddings for c in some} == {True, False}
        assert {c.rope_parameters["rope_type"] for c in some} == {
            "default",
            "linear",
            "yarn",
        }
    ratios = {c.num_attention_heads // c.num_key_value_heads for c in configs}
    assert ratios >= {1, 2, 4, 7}
    assert any(c.num_attention_heads % 2 for c in configs)
    assert {getattr(c, "attention_bias", False) for c in configs} == {True, False}
    assert any(
        get_head_dim(c) * c.num_attention_heads != c.hidden_size for c in configs
    )


BF16_CASES = [
    "qwen3 4/1",
    "qwen3 14/2 untied bias",
    "qwen3 7/1 untied yarn",
    "qwen3 5/5 linear",
    "qwen2 14/2",
    "qwen2 9/9 untied yarn",
]


@functools.cache
@torch.random.fork_rng()
def in_bfloat16(
    case: str,
) -> tuple[Config, dict[str, PreTrainedModel], Tensor, Tensor]:
    """Six layers; Hugging Face in bfloat16, both paths; tokens; its float32 logits."""
    config = make_config(case, num_hidden_layers=6)
    wide = make_reference(config)
    for weight in wide.parameters():
        weight.copy_(weight.bfloat16())
    narrow = {}
    for path in ("eager", "sdpa"):
        # Not .bfloat16() on the whole model: it would round RoPE's frequencies too.
        narrow[path] = make_reference(config, path, torch.bfloat16)
        narrow[path].load_state_dict(wide.state_dict())
    tokens = torch.randint(config.vocab_size, (4, 61))
    return config, narrow, tokens, wide(tokens).logits


@pytest.mark.parametrize("kind", [Qwen3Config, Qwen2Config])
@pytest.mark.parametrize("max_position_embeddings", [16, 48])
def test_yarn_reaches_as_far_as_its_factor(
    kind: type[Config], max_position_embeddings: int
) -> None:
    """Qwen's recipe: `max_position_embeddings` stays, original times factor counts."""
    config = make_config(
        "qwen3 2/1 yarn" if kind is Qwen3Config else "qwen2 6/3 yarn",
        max_position_embeddings=max_position_embeddings,
    )
    assert isinstance(config, kind)
    theirs = make_reference(config)
    ours = load(config, theirs, "torch_naive")
    limit = longest_context(max_position_embeddings, config.rope_parameters)
    assert limit == 160 == ours.model.rotary_emb.max_position_embeddings
    input_ids = torch.randint(config.vocab_size, (1, limit))
    for length in (max_position_embeddings + 1, limit):
        ids = input_ids[:, :length]
        assert_parity(ours.compute_logits(ours(ids)), theirs(ids).logits)
    with pytest.raises(ValueError, match=r"\b161\b.*\b160\b"):
        ours(torch.zeros(1, limit + 1, dtype=torch.long))


@pytest.mark.parametrize("case", BF16_CASES)
class TestBfloat16:
    @each_backend
    def test_error_is_that_of_hugging_face(self, case: str, backend: str) -> None:
        config, narrow, tokens, exact = in_bfloat16(case)
        ours = load(config, narrow["eager"], backend)
        cached = Cached(ours)
        cached.caches = [(k.bfloat16(), v.bfloat16()) for k, v in cached.caches]
        chunks = tokens[0].split([7, 1, 32, 21])
        flat = torch.cat([cached.step({0: chunk})[0] for chunk in chunks])
        for logits, theirs, truth in [
            (logits_of(ours, tokens), slice(None), exact),
            (flat, 0, exact[0]),
        ]:
            assert logits.dtype == torch.bfloat16
            errors = [m(tokens).logits[theirs] - truth for m in narrow.values()]
            error = logits - truth
            allowed = max(e.square().mean().sqrt() for e in errors)
            assert error.square().mean().sqrt() <= 1.2 * allowed
            # One outlier in 60,000 logits is a matter of luck, theirs as much as ours.
            assert error.abs().max() <= 2 * max(e.abs().max() for e in errors)

    def test_rounds_where_hugging_face_rounds(self, case: str) -> None:
        # Weights, cos and sin, and scores are cast at the same places: bound or no bound,
        # cast one of them elsewhere, and four logits in five differ.
        config, narrow, batch, _ = in_bfloat16(case)
        tokens = batch[:1]
        plain = logits_of(load(config, narrow["sdpa"], "auto"), tokens)
        cached = Cached(load(config, narrow["eager"], "torch_naive"))
        cached.caches = [(k.bfloat16(), v.bfloat16()) for k, v in cached.caches]
        naive = cached.step({0: tokens[0]})[0][None]
        for path, ours in [("sdpa", plain), ("eager", naive)]:
            equal = ours == narrow[path](tokens).logits
            assert equal.float().mean() > 0.5  # all, where this was written


class TestGradients:
    @pytest.mark.parametrize(
        "case", ["qwen3 3/3 bias", "qwen3 12/3 untied linear bias"]
    )
    def test_equal_those_of_hugging_face(self, case: str) -> None:
        # The bundled checkpoint is trained with this very model.
        config = make_config(case)
        theirs = make_reference(config)
        ours = load(config, theirs, "auto").requires_grad_()
        theirs.requires_grad_()
        tokens = torch.randint(config.vocab_size, (2, 33))
        for logits in (logits_of(ours, tokens), theirs(tokens).logits):
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            )
            loss.backward()
        for name, weight in ours.named_parameters():
            assert weight.grad is not None, name
        # Gradients go by our names; put in the place of the weights, they go by theirs.
        for weight in ours.parameters():
            weight.data = weight.grad
        gradients = ours.hf_weights()
        for name, weight in theirs.named_parameters():
            assert weight.grad is not None
            torch.testing.assert_close(
                gradients[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name
            )


class TestShapes:
    @each_backend
    @pytest.mark.parametrize(
        "case", ["qwen3 6/3 untied", "qwen2 14/2", "qwen3 1/1 untied"]
    )
    def test_leading_shapes_agree(self, case: str, backend: str) -> None:
        model, config = loaded(case, backend), reference(case).config
        tokens = torch.randint(config.vocab_size, (2, 3, 11))
        hidden = model(tokens)
        assert hidden.shape == (2, 3, 11, config.hidden_size)
        assert model.compute_logits(hidden).shape == (2, 3, 11, config.vocab_size)
        close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
        for a in range(2):
            close(model(tokens[a]), hidden[a])
            for b in range(3):
                alone = model(tokens[a, b])
                assert alone.shape == (11, config.hidden_size)
                close(alone, hidden[a, b])
        one = model(tokens[0, 0, :1])
        assert one.shape == (1, config.hidden_size)
        close(one, hidden[0, 0, :1])

    @each_backend
    def test_logits_of_chosen_rows_are_rows_of_the_logits(self, backend: str) -> None:
        model = loaded("qwen3 4/1", backend)
        hidden = model(torch.arange(12).view(2, 6))
        torch.testing.assert_close(
            model.compute_logits(hidden[:, -1]), model.compute_logits(hidden)[:, -1]
        )

    def test_positions_may_be_given(self) -> None:
        model = loaded("qwen3 4/1", "auto")
        tokens = torch.arange(18).view(2, 9)
        positions = torch.arange(9)
        expected = model(tokens)
        torch.testing.assert_close(model(tokens, positions), expected)
        torch.testing.assert_close(model(tokens, positions.expand(2, 9)), expected)
        # RoPE knows only distances; other distances are another text.
        close = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(model(tokens, positions + 50), expected, **close)
        assert not torch.allclose(model(tokens, 2 * positions), expected, **close)

    def test_every_layer_has_its_own_cache(self) -> None:
        model = loaded("qwen3 4/1", "auto")
        cached = Cached(model)
        cached.step({0: torch.arange(5)})
        for i, (key, value) in enumerate(cached.caches):
            assert (~key.isnan()).sum() == (~value.isnan()).sum() == 5 * 16
            for other, _ in cached.caches[:i]:
                assert not torch.equal(key.nan_to_num(), other.nan_to_num())


class TestErrors:
    def test_metadata_needs_positions_and_caches(self) -> None:
        model = loaded("qwen3 4/1", "auto")
        cached = Cached(model)
        positions, metadata = cached.pool.step({0: 3})
        tokens = torch.arange(3)
        with pytest.raises(ValueError, match=r"metadata.*positions.*kv_caches"):
            model(tokens, None, cached.caches, metadata)
        with pytest.raises(ValueError, match=r"metadata.*positions.*kv_caches"):
            model(tokens, positions, None, metadata)
        assert all(key.isnan().all() for key, _ in cached.caches)

    def test_too_long_an_input_is_told_the_limit(self) -> None:
        model = loaded("qwen3 4/1", "auto")
        assert model(torch.zeros(160, dtype=torch.long)[None]).shape[1] == 160
        with pytest.raises(
            ValueError, match=r"\b161\b.*max_position_embeddings.*\b160\b"
        ):
            model(torch.zeros(1, 161, dtype=torch.long))

    @pytest.mark.parametrize("kind", [Qwen3Config, Qwen2Config])
    @pytest.mark.parametrize(
        ("changes", "field", "value"),
        [
            ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
            (
                {"use_sliding_window": True, "max_window_layers": 0},
                "layer_types",
                "sliding_attention",
            ),
            ({"num_attention_heads": 6}, "num_key_value_heads", "4"),
            ({"num_attention_heads": 2}, "num_key_value_heads", "4"),
            (
                {"quantization_config": {"quant_method": "fp8"}},
                "quantization_config",
                "fp8",
            ),
            (
                {
                    "rope_parameters": {
                        "rope_type": "dynamic",
                        "rope_theta": 1e4,
                        "factor": 2.0,
                    }
                },
                "rope_type",
                "'dynamic'",
            ),
        ],
    )
    def test_what_is_not_computed_is_refused_by_name(
        self, kind: type[Config], changes: dict[str, Any], field: str, value: str
    ) -> None:
        fields: dict[str, Any] = {
            "vocab_size": 50,
            "hidden_size": 48,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
        }
        Qwen3ForCausalLM(kind(**fields))
        config = kind(**(fields | changes))
        with pytest.raises(ValueError, match=rf"(?s){field}\b.*{value}"):
            Qwen3ForCausalLM(config)

    @pytest.mark.parametrize(
        "kind", [LlamaConfig, Qwen3MoeConfig, Qwen2MoeConfig, GPT2Config]
    )
    def test_another_model_type_is_refused_by_name(self, kind: type) -> None:
        config = kind()
        with pytest.raises(ValueError, match=rf"model_type.*'{config.model_type}'"):
            check_config(config)

    def test_a_sliding_window_that_no_layer_uses_is_no_obstacle(self) -> None:
        check_config(Qwen2Config(use_sliding_window=False, sliding_window=16))
        check_config(Qwen3Config(use_sliding_window=True, max_window_layers=32))

    @pytest.mark.parametrize("config", [None, {}, {"model_type": "qwen3"}, 3, "qwen3"])
    def test_what_is_no_config_is_refused(self, config: Any) -> None:
        with pytest.raises(ValueError, match="model_type is None"):
            Qwen3ForCausalLM(config)

    @pytest.mark.parametrize("kind", [Qwen3Config, Qwen2Config])
    @pytest.mark.parametrize(
        "field", ["vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps"]
    )
    @pytest.mark.parametrize("value", [-1, 10**30, 1e30, True, "x", [], None, math.nan])
    def test_sizes_that_make_no_sense_are_refused_by_name(
        self, kind: type[Config], field: str, value: object
    ) -> None:
        config = kind(num_hidden_layers=1)
        object.__setattr__(config, field, value)
        message = re.escape(f"config.{field} is {value!r}: it must be")
        with pytest.raises(ValueError, match=message):
            Qwen3ForCausalLM(config)

    def test_heads_without_a_dimension_are_refused(self) -> None:
        config = Qwen2Config(
            hidden_size=8, num_attention_heads=16, num_key_value_heads=16
        )
        with pytest.raises(ValueError, match="head_dim=0 must be even"):
            Qwen3ForCausalLM(config)

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match=r"'flash'.*torch_naive"):
            Qwen3ForCausalLM(make_config("qwen3 4/1"), "flash")


class Doubling(TorchNaiveBackend):
    """A reader's own backend."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return 2 * super().attend(query, key, value, mask)


class TestBackendChoice:
    def test_a_backend_of_ones_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ATTENTION_BACKENDS, "doubling", f"{__name__}:Doubling")
        case = "qwen3 4/1"
        ours = load(reference(case).config, reference(case).model, "doubling")
        tokens = {0: torch.arange(10), 1: torch.arange(3)}
        halved = Cached(loaded(case, "torch_naive")).step(tokens)
        doubled = Cached(ours).step(tokens)
        assert not torch.allclose(doubled[0], halved[0])
        for name, weight in ours.hf_weights().items():
            if name.endswith("o_proj.weight"):
                weight.div_(2)
        doubled = Cached(ours).step(tokens)
        for seq, logits in halved.items():
            torch.testing.assert_close(doubled[seq], logits, rtol=1e-4, atol=1e-4)

    def test_without_a_cache_no_backend_is_asked(self) -> None:
        case = "qwen3 4/1"
        model = load(reference(case).config, reference(case).model, "auto")
        for layer in model.model.layers:
            layer.self_attn.backend = None  # type: ignore[union-attr, assignment]
        assert_parity(
            logits_of(model, reference(case).batch), reference(case).batch_logits
        )


class TestWeights:
    @each_case
    def test_names_and_shapes_are_those_of_hugging_face(self, case: str) -> None:
        ref = reference(case)
        theirs = {n: t.shape for n, t in ref.model.state_dict().items()}
        if ref.config.tie_word_embeddings:
            theirs.pop("lm_head.weight")
        ours = Qwen3ForCausalLM(ref.config).hf_weights()
        assert {name: view.shape for name, view in ours.items()} == theirs

    @each_case
    def test_what_is_loaded_is_there(self, case: str) -> None:
        theirs = reference(case).model.state_dict()
        for name, view in loaded(case, "auto").hf_weights().items():
            assert torch.equal(view, theirs[name]), name

    def test_views_write_through(self) -> None:
        case = "qwen3 14/2 untied bias"
        config, theirs = reference(case).config, reference(case).model
        ours = Qwen3ForCausalLM(config, "torch_naive")
        for view in ours.hf_weights().values():
            view.fill_(float("nan"))
        assert all(weight.isnan().all() for weight in ours.parameters())
        for name, view in ours.hf_weights().items():
            view.copy_(theirs.state_dict()[name])
        tokens = torch.arange(9)[None]
        assert_parity(logits_of(ours, tokens).detach(), theirs(tokens).logits)

    @pytest.mark.parametrize("case", ["qwen3 4/1", "qwen2 3/1 untied"])
    def test_any_order_and_any_dtype(self, case: str) -> None:
        ref = reference(case)
        weights = list(ref.model.state_dict().items())
        random.Random(0).shuffle(weights)
        ours = Qwen3ForCausalLM(ref.config)
        ours.load_weights((name, tensor.double()) for name, tensor in weights)
        assert all(weight.dtype == torch.float32 for weight in ours.parameters())
        assert_parity(logits_of(ours, ref.batch).detach(), ref.batch_logits)

    def test_loading_one_model_leaves_another_and_the_source_alone(self) -> None:
        ref = reference("qwen3 4/1")
        before = {n: t.clone() for n, t in ref.model.state_dict().items()}
        ours = Qwen3ForCausalLM(ref.config)
        ours.load_weights(ref.model.state_dict().items())
        for view in ours.hf_weights().values():
            view.zero_()
        for name, tensor in ref.model.state_dict().items():
            assert torch.equal(tensor, before[name])

    @pytest.mark.parametrize("case", ["qwen3 3/3 bias", "qwen2 3/1 untied"])
    def test_all_that_is_wrong_is_named_at_once(self, case: str) -> None:
        ref = reference(case)
        weights = dict(ref.model.state_dict())
        missing = "model.layers.1.self_attn.k_proj.bias", "model.norm.weight"
        for name in missing:
            del weights[name]
        up = "model.layers.0.mlp.up_proj.weight"
        weights[up] = weights[up].T  # as many numbers, another shape
        k_proj = "model.layers.0.self_attn.k_proj.weight"
        weights[k_proj] = weights[k_proj][:-1]
        extra = "model.layers.9.mlp.up_proj.weight", "visual.proj.weight"
        weights |= {name: torch.zeros(1) for name in extra}
        with pytest.raises(ValueError) as caught:
            Qwen3ForCausalLM(ref.config).load_weights(weights.items())
        message = str(caught.value)
        for name in missing:
            assert f"missing: {name}" in message
        for name in extra:
            assert f"unexpected: {name}" in message
        for name in (up, k_proj):
            assert f"mis-shaped: {name}" in message
            for shape in (weights[name].shape, ref.model.state_dict()[name].shape):
                assert str(list(shape)) in message
        assert message.count("\n") == 6

    def test_a_merged_name_of_ours_is_unexpected(self) -> None:
        ref = reference("qwen3 4/1")
        name = "model.layers.0.self_attn.qkv_proj.weight"
        weights = [*ref.model.state_dict().items(), (name, torch.zeros(1))]
        with pytest.raises(ValueError, match=f"unexpected: {name}"):
            Qwen3ForCausalLM(ref.config).load_weights(weights)

    def test_a_tied_head_may_be_in_the_file_or_not(self) -> None:
        ref = reference("qwen3 4/1")
        weights = ref.model.state_dict()
        pair = {"lm_head.weight", "model.embed_tokens.weight"}
        body = {n: t for n, t in weights.items() if n not in pair}
        for chosen in (["model.embed_tokens.weight"], ["lm_head.weight"], sorted(pair)):
            ours = Qwen3ForCausalLM(ref.config)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ours.load_weights((body | {n: weights[n] for n in chosen}).items())
            assert ours.lm_head is None
            assert_parity(logits_of(ours, ref.batch).detach(), ref.batch_logits)

    def test_a_tied_head_of_another_shape_is_an_error(self) -> None:
        ref = reference("qwen3 4/1")
        weights = ref.model.state_dict() | {"lm_head.weight": torch.zeros(3)}
        with pytest.raises(ValueError, match=r"mis-shaped: lm_head\.weight is \[3\]"):
            Qwen3ForCausalLM(ref.config).load_weights(weights.items())

    @pytest.mark.parametrize("case", ["qwen3 4/1", "qwen2 14/2"])
    @pytest.mark.parametrize("head_first", [True, False])
    def test_a_tied_head_that_differs_is_used(
        self, case: str, head_first: bool
    ) -> None:
        """As transformers 5 does it; a second loading starts from the config again."""
        ref = reference(case)
        weights = dict(ref.model.state_dict())
        head = weights.pop("lm_head.weight").flip(0)
        first = {"lm_head.weight": head}
        pairs = first | weights if head_first else weights | first
        ours = Qwen3ForCausalLM(ref.config)
        with pytest.warns(UserWarning, match=r"lm_head\.weight.*differs") as caught:
            ours.load_weights(pairs.items())
        assert len(caught) == 1
        assert ours.lm_head is not None
        assert torch.equal(ours.lm_head.weight, head)
        assert torch.equal(ours.hf_weights()["lm_head.weight"], head)
        expected = ref.batch_logits.flip(-1)
        assert_parity(logits_of(ours, ref.batch).detach(), expected)
        ours.load_weights(weights.items())
        assert ours.lm_head is None
        assert_parity(logits_of(ours, ref.batch).detach(), ref.batch_logits)

    def test_heads_that_are_equal_once_rounded_stay_tied(self) -> None:
        """transformers compares them in the dtype of the model, too."""
        config = make_config("qwen3 4/1")
        weights = make_reference(config).state_dict()
        embedding = weights["model.embed_tokens.weight"].bfloat16().float()
        weights |= {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": embedding * (1 + 1e-4),
        }
        with pytest.warns(UserWarning, match="differs"):
            Qwen3ForCausalLM(config).load_weights(weights.items())
        ours = Qwen3ForCausalLM(config).bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.load_weights(weights.items())
        assert ours.lm_head is None

    @each_case
    def test_names_of_a_base_model(self, case: str) -> None:
        """`Qwen3Model.save_pretrained` writes names without `model.`."""
        ref = reference(case)
        weights = {
            name.removeprefix("model."): tensor
            for name, tensor in ref.model.state_dict().items()
        }
        weights |= {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        weights |= {"rotary_emb.inv_freq": torch.ones(4)}
        ours = Qwen3ForCausalLM(ref.config)
        ours.load_weights(weights.items())
        assert_parity(logits_of(ours, ref.batch).detach(), ref.batch_logits)

    @pytest.mark.parametrize("count", [1, 9, 10, 500])
    def test_a_summary_has_at_most_ten_lines(self, count: int) -> None:
        views = {f"layers.{i}.weight": torch.zeros(2) for i in range(count)}
        shapes = [(f"layers.{i}.weight", torch.zeros(3)) for i in range(count // 2)]
        extra = [(f"visual.{i}.weight", torch.zeros(3)) for i in range(count)]
        with pytest.raises(ValueError) as caught:
            copy_weights(views, [*shapes, *extra])
        message = str(caught.value)
        assert message.count("\n") <= 9
        for kind, number in [
            ("missing", count - count // 2),
            ("unexpected", count),
            ("mis-shaped", count // 2),
        ]:
            lines = re.findall(rf"\n  {kind}: (.*)", message)
            if len(views) > 4:
                assert f"{number} {kind}" in message
                assert lines[-1] == f"and {number - 2} more" or number <= 3
            else:
                assert len(lines) == number

    def test_an_untied_head_is_demanded(self) -> None:
        ref = reference("qwen2 3/1 untied")
        body = {
            n: t for n, t in ref.model.state_dict().items() if n != "lm_head.weight"
        }
        with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
            Qwen3ForCausalLM(ref.config).load_weights(body.items())

    def test_a_new_model_is_random_with_norms_of_one(self) -> None:
        model = Qwen3ForCausalLM(make_config("qwen3 14/2 untied bias"))
        for name, view in model.hf_weights().items():
            if "norm" in name:
                assert torch.equal(view, torch.ones_like(view))
            elif name.endswith("bias"):
                assert not view.any()
            else:
                assert 0.018 < view.std() < 0.022, name


def test_metadata_reaches_the_backend_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AttentionMetadata] = []
    forward = TorchNaiveBackend.forward

    def spy(
        self: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any
    ) -> Any:
        seen.append(metadata)
        return forward(self, query, key, value, cache, metadata)

    monkeypatch.setattr(TorchNaiveBackend, "forward", spy)
    model = loaded("qwen3 4/1", "torch_naive")
    cached = Cached(model)
    positions, metadata = cached.pool.step({0: 4})
    model(torch.arange(4), positions, cached.caches, metadata)
    assert len(seen) == model.config.num_hidden_layers
    assert all(m is metadata for m in seen)
