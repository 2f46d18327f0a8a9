"""Checks of page 04's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.qwen3 import (
    check_count_parameters,
    check_find_rows,
    check_logit_lens,
)
from folo_lib.qwen3 import Qwen3ForCausalLM, get_head_dim


def find_rows(
    config: Any,
    gqa: bool = True,
    divided: bool = False,
    own: bool = False,
    length: bool = False,
) -> tuple[int, int]:
    """The right rows, unless it is told otherwise."""
    head_dim = config.hidden_size // config.num_attention_heads
    if not divided:
        head_dim = config.head_dim if own else get_head_dim(config)
    start = config.num_attention_heads * head_dim
    heads = config.num_key_value_heads if gqa else config.num_attention_heads
    return start, heads * head_dim + (0 if length else start)


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (lambda c: find_rows(c, length=True), "(32, 32) instead of (32, 64), of 96"),
        (lambda c: (0, find_rows(c)[1]), "(0, 64) instead of (32, 64)"),
        (lambda c: find_rows(c, gqa=False), "2 key heads for 4 queries: (32, 64)"),
        (lambda c: find_rows(c, divided=True), "head_dim 16"),
        (lambda c: find_rows(c, own=True), "AttributeError"),
        (lambda c: slice(*find_rows(c)), "not a pair of numbers"),
    ],
)
def test_find_rows(attempt: Callable[[Any], Any], fragment: str) -> None:
    verdict = check_find_rows(attempt)
    assert not verdict
    assert fragment in verdict.message


def test_find_rows_accepts_the_right_rows() -> None:
    assert check_find_rows(find_rows)


def count(config: Any, **without: bool) -> int:
    """All parameters, or without some."""
    size, inner = config.hidden_size, config.intermediate_size
    head_dim = get_head_dim(config)
    if without.get("head_dim"):
        head_dim = size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if without.get("gqa"):
        kv_heads = heads
    qkv = (heads + 2 * kv_heads) * head_dim
    layer = size * qkv + heads * head_dim * size
    layer += (2 if without.get("gate") else 3) * size * inner
    layer += 0 if without.get("norms") else 2 * size
    if config.model_type == "qwen3":
        layer += 0 if without.get("qk_norm") else 2 * head_dim
        if config.attention_bias and not without.get("bias"):
            layer += qkv + (0 if without.get("o_bias") else size)
    elif not without.get("qwen2"):
        layer += qkv
    embedding = config.vocab_size * size
    twice = without.get("tied") or not config.tie_word_embeddings
    if without.get("untied"):
        twice = False
    total: int = config.num_hidden_layers * layer + embedding * (2 if twice else 1)
    return total + (0 if without.get("last_norm") else size)


def built(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen3ForCausalLM(config).parameters())


@pytest.mark.parametrize(
    ("mistake", "fragment"),
    [
        ("last_norm", "32 are missing. As many as the last norm make up."),
        ("norms", "As many as the two norms of each layer make up."),
        ("qk_norm", "As many as the norms of queries and keys make up."),
        ("gate", "1,536 are missing. As many as the down matrices make up."),
        ("tied", "one layer, tied head: 15,216 instead of 12,016; 3,200 are too many."),
        ("untied", "an untied head: 12,016"),
        ("gqa", "two query heads to a key head"),
        ("head_dim", "head_dim 16, not hidden_size / heads = 8"),
        ("bias", "attention_bias: 12,016"),
        ("o_bias", "the biases of the output projection or the last norm"),
        ("qwen2", "Qwen2, with biases on QKV alone"),
    ],
)
def test_count_parameters(mistake: str, fragment: str) -> None:
    verdict = check_count_parameters(lambda config: count(config, **{mistake: True}))
    assert not verdict
    assert fragment in verdict.message


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (built, "it builds modules"),
        (lambda config: count(config) / 1, "not an int"),
        (lambda config: count(config) // config.num_hidden_layers, "three layers"),
    ],
)
def test_count_parameters_otherwise(
    attempt: Callable[[Any], Any], fragment: str
) -> None:
    verdict = check_count_parameters(attempt)
    assert not verdict
    assert fragment in verdict.message


def test_count_parameters_accepts_the_right_number() -> None:
    assert check_count_parameters(count)


Read = Callable[[Qwen3ForCausalLM, Any], Tensor]


def lens(read: Read, remove: bool = True, first: bool = True) -> Any:
    """A lens that makes logits of a layer's pair of outputs by `read`."""

    def attempt(model: Qwen3ForCausalLM, input_ids: Tensor) -> Tensor:
        inner = model.model
        embedded = inner.embed_tokens(input_ids)
        outputs: list[Any] = [(embedded, torch.zeros_like(embedded))] if first else []
        hooks = [
            layer.register_forward_hook(lambda *args: outputs.append(args[-1]))
            for layer in inner.layers
        ]
        model(input_ids)
        for hook in hooks:
            if remove:
                hook.remove()
        return torch.stack([read(model, output) for output in outputs])

    return attempt


def right(model: Qwen3ForCausalLM, output: Any) -> Tensor:
    return model.compute_logits(model.model.norm(*output)[0])


def tied_head(model: Qwen3ForCausalLM, output: Any) -> Tensor:
    logits: Tensor = model.model.norm(*output)[0] @ model.model.embed_tokens.weight.T
    return logits


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (lens(lambda m, o: m.compute_logits(m.model.norm(o[0]))), "not yet added"),
        (
            lens(lambda m, o: m.compute_logits(m.model.norm(o[1]))),
            "without what the MLP",
        ),
        (
            lens(lambda m, o: m.compute_logits(o[0] + o[1])),
            "the last norm stands before",
        ),
        (
            lens(lambda m, o: m.compute_logits(m.model.norm(m.model.norm(*o)[0]))),
            "applied twice",
        ),
        (lens(tied_head), "an untied head, ids"),
        (lens(right, remove=False), "left its hooks"),
        (lens(right, first=False), "a row for the embedding"),
        (
            lens(lambda m, o: right(m, o)[:, -1]),
            "for 1 layers and ids [1, 1] the result has the shape [2, 1, 100]",
        ),
        (lambda model, ids: [model(ids)], "gives a list, not a tensor"),
    ],
)
def test_logit_lens(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_logit_lens(attempt)
    assert not verdict
    assert fragment in verdict.message


def test_global_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    assert check_logit_lens(lens(right))
    assert torch.equal(torch.random.get_rng_state(), state)
