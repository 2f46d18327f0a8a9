"""Checks of page 04's exercises: rows found, parameters counted, and a lens on the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from folo_lib.course.exercises import NotYet, exercise, require
from folo_lib.qwen3 import Qwen3ForCausalLM

__all__ = ["check_count_parameters", "check_find_rows", "check_logit_lens"]

FindRows = Callable[[Any], tuple[int, int]]
CountParameters = Callable[[Any], int]
LogitLens = Callable[[Qwen3ForCausalLM, Tensor], Tensor]


def _config(qwen2: bool = False, **changes: Any) -> Any:
    """A small config of transformers."""
    from transformers import Qwen2Config, Qwen3Config

    settings: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    if not qwen2:
        settings["head_dim"] = 8
    return (Qwen2Config if qwen2 else Qwen3Config)(**(settings | changes))


def _require_rows(solution: FindRows, config: Any, what: str) -> None:
    """Against the view that the model has under the keys' name."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    prefix = "model.layers.0.self_attn."
    view = model.hf_weights()[f"{prefix}k_proj.weight"]
    start = view.storage_offset() // config.hidden_size
    got, wanted = solution(config), (start, start + len(view))
    require(
        isinstance(got, tuple) and len(got) == 2,
        f"it gives {got!r}, not a pair of numbers.",
    )
    rows = len(model.get_parameter(f"{prefix}qkv_proj.weight"))
    require(
        got == wanted, f"{what}: {got} instead of {wanted}, of {rows} rows in qkv_proj."
    )


@exercise
def check_find_rows(solution: FindRows) -> None:
    """Against models on the meta device, one difficulty after the other."""
    _require_rows(solution, _config(), "4 heads of each kind, 8 wide")
    _require_rows(solution, _config(num_key_value_heads=2), "2 key heads for 4 queries")
    wide = _config(num_key_value_heads=1, head_dim=16)
    _require_rows(solution, wide, "head_dim 16, not hidden_size / heads = 8")
    _require_rows(solution, _config(qwen2=True), "Qwen2, which has no head_dim")


def _group(name: str) -> str:
    """What a parameter belongs to, in words."""
    groups = {
        "lm_head": "the head",
        "embed_tokens": "the embedding",
        "q_norm": "the norms of queries and keys",
        "k_norm": "the norms of queries and keys",
        "layernorm": "the two norms of each layer",
        "model.norm": "the last norm",
        "qkv_proj.bias": "the biases of QKV",
        "o_proj.bias": "the biases of the output projection",
        "qkv_proj.weight": "the QKV matrices",
        "o_proj.weight": "the output projections",
        "gate_up_proj": "the gate and up matrices",
        "down_proj": "the down matrices",
    }
    return next(words for part, words in groups.items() if part in name)


@contextmanager
def _nothing_built() -> Iterator[None]:
    """Modules are refused: the numbers of the config are enough."""
    message = "it builds modules. All that is needed stands in the config."
    with mock.patch.object(nn.Module, "__init__", side_effect=NotYet(message)):
        yield


def _require_count(solution: CountParameters, config: Any, what: str) -> None:
    """Against the parameters of the model on the meta device."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    counts: dict[str, int] = {}
    for name, weight in model.named_parameters():
        counts[_group(name)] = counts.get(_group(name), 0) + weight.numel()
    wanted = sum(counts.values())
    with _nothing_built():
        got = solution(config)
    require(
        isinstance(got, int),
        f"{what}: it gives a {type(got).__name__}, not an int. (`//` divides ints.)",
    )
    fitting = [words for words, count in counts.items() if abs(got - wanted) == count]
    hint = f" As many as {' or '.join(fitting)} make up." if fitting else ""
    more = "too many" if got > wanted else "missing"
    require(
        got == wanted,
        f"{what}: {got:,} instead of {wanted:,}; {abs(got - wanted):,} are {more}.{hint}",
    )


@exercise
def check_count_parameters(solution: CountParameters) -> None:
    """Against models on the meta device, one difficulty after the other."""
    _require_count(solution, _config(), "one layer, tied head")
    _require_count(solution, _config(num_hidden_layers=3), "three layers")
    _require_count(solution, _config(tie_word_embeddings=False), "an untied head")
    _require_count(
        solution, _config(num_key_value_heads=2), "two query heads to a key head"
    )
    _require_count(
        solution, _config(head_dim=16), "head_dim 16, not hidden_size / heads = 8"
    )
    _require_count(solution, _config(attention_bias=True), "attention_bias")
    _require_count(
        solution,
        _config(qwen2=True),
        "Qwen2, with biases on QKV alone and no norms of queries and keys",
    )
    everything = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 80,
        "vocab_size": 300,
        "tie_word_embeddings": False,
    }
    for qwen2 in (False, True):
        config = _config(qwen2, **everything)
        _require_count(solution, config, f"{config.model_type}, all at once")
    large = _config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    _require_count(solution, large, "Qwen3-0.6B")


def _random_model(config: Any, generator: torch.Generator) -> Qwen3ForCausalLM:
    """Random weights, norms included; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = Qwen3ForCausalLM(config, "torch_naive").float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(std=0.2, generator=generator)
    return model


def _streams(
    model: Qwen3ForCausalLM, input_ids: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """What each layer adds, and the stream to add it to; first the embedding alone."""
    inner = model.model
    x, residual = inner.embed_tokens(input_ids), None
    cos, sin = inner.rotary_emb(torch.arange(input_ids.shape[-1]), x.dtype)
    pairs: list[tuple[Tensor, Tensor | None]] = [(x, residual)]
    for layer in inner.layers:
        x, residual = layer(x, residual, cos, sin)
        pairs.append((x, residual))
    return pairs


def logit_lens(model: Qwen3ForCausalLM, input_ids: Tensor) -> Tensor:
    """What exercise 3 asks for, by calling the layers one by one. Page 05 uses it."""
    streams = [
        x if stream is None else x + stream for x, stream in _streams(model, input_ids)
    ]
    return torch.stack([model.compute_logits(model.model.norm(x)) for x in streams])


def _mistakes(
    model: Qwen3ForCausalLM, added: Tensor, before: Tensor | None
) -> dict[str, Tensor]:
    """Logits of usual mistakes, by what to say about them."""
    norm, logits = model.model.norm, model.compute_logits
    stream = added if before is None else added + before
    found = {
        "These are the logits of the stream itself: the last norm stands before the "
        "head.": logits(stream),
        "The norm seems to have been applied twice.": logits(norm(norm(stream))),
    }
    if before is not None:
        found[
            "These are the logits of the layer's first output alone: it is what the "
            "layer adds, and not yet added."
        ] = logits(norm(added))
        found[
            "These are the logits of the layer's second output alone: the stream "
            "without what the MLP adds."
        ] = logits(norm(before))
    return found


def _require_lens(solution: LogitLens, model: Qwen3ForCausalLM, what: str) -> None:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    num_layers, vocab_size = config.num_hidden_layers, config.vocab_size
    for shape in ((1, 1), (2, 9)):
        ids = torch.randint(vocab_size, shape, generator=generator, device="cpu")
        weights = {name: w.clone() for name, w in model.named_parameters()}
        result = solution(model, ids)
        require(
            isinstance(result, Tensor),
            f"it gives a {type(result).__name__}, not a tensor.",
        )
        wanted_shape = [num_layers + 1, *shape, vocab_size]
        require(
            list(result.shape) == wanted_shape,
            f"{what}: for {num_layers} layers and ids {list(shape)} the result has the "
            f"shape {list(result.shape)}, and should have {wanted_shape}: a row for the "
            "embedding, then one behind each layer.",
        )
        pairs = _streams(model, ids)
        # The last row first: it is what the model says itself.
        for row in (num_layers, *range(num_layers)):
            added, before = pairs[row]
            stream = added if before is None else added + before
            wanted = model.compute_logits(model.model.norm(stream))
            if torch.allclose(result[row], wanted, atol=1e-4, rtol=1e-4):
                continue
            hint = next(
                (
                    f" {words}"
                    for words, wrong in _mistakes(model, added, before).items()
                    if torch.allclose(result[row], wrong, atol=1e-4, rtol=1e-4)
                ),
                "",
            )
            name = f"behind layer {row - 1}" if row else "of the embedding"
            if row == num_layers:
                name += ", which must be the model's own logits,"
            require(
                False,
                f"{what}, ids {list(shape)}: row {row}, {name} is wrong by up to "
                f"{(result[row] - wanted).abs().max().item():.3g}.{hint}",
            )
        left = any(module._forward_hooks for module in model.modules())
        require(
            not left, "it left its hooks on the model: they would run for ever after."
        )
        for name, weight in model.named_parameters():
            require(torch.equal(weight, weights[name]), f"it has changed {name}.")


@exercise
def check_logit_lens(solution: LogitLens) -> None:
    """Each row against the layers called one by one."""
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
    configs = {
        "a model of 1 layer": _config(**changes),
        "a model of 3 layers": _config(**changes, num_hidden_layers=3),
        "an untied head": _config(
            **changes, num_hidden_layers=2, tie_word_embeddings=False
        ),
        "Qwen2": _config(qwen2=True, num_hidden_layers=2),
    }
    with torch.no_grad():
        for what, config in configs.items():
            _require_lens(solution, _random_model(config, generator), what)
