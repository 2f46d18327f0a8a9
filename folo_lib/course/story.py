"""One story, and the first model that can read it: Qwen3 in its plainest form.

    from folo_lib.course.story import STORY, continue_story

    print(continue_story())             # the naive model, as page 00 shows it
    print(continue_story(norm=better))  # the same with one part replaced: the same story

Nothing here is fast, and nothing is exported into the engine. Every later page builds a better
version of one part, puts it in place of the naive one, and the story must not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from folo_lib import bundled_model_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STORY = "She had a red kite. One day Mira took the"

NUM_NEW_TOKENS = 16
"""How many tokens `continue_story` adds."""


class Story(NamedTuple):
    """The bundled model as it lies on disk, and the story that it reads.

    Attributes:
        config: what `config.json` says, with the names of Hugging Face's config.
        tokenizer: between text and ids, with `encode(text).ids` and `decode(ids)`.
        weights: in float32, by their Hugging Face names.
        ids: of the tokens of `STORY`.
        tokens: the text of each.
    """

    config: SimpleNamespace
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    ids: list[int]
    tokens: list[str]


def load_story() -> Story:
    """Reads three files of the bundled checkpoint; page 05 does it for any checkpoint."""
    from tokenizers import Tokenizer

    path = bundled_model_path()
    config = SimpleNamespace(**json.loads((path / "config.json").read_text("utf-8")))
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    stored = load_file(path / "model.safetensors")
    weights = {name: weight.float() for name, weight in stored.items()}
    ids = tokenizer.encode(STORY).ids
    return Story(config, tokenizer, weights, ids, [tokenizer.decode([i]) for i in ids])


# The five parts. Sizes: S tokens, E hidden size, H heads, H_kv key/value heads, D head_dim.


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension; page 03 builds the better one."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE: turns pairs of `[S, H, D]` by angles that grow with the position; page 02."""
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half) / half)  # radians per token
    angles = positions[:, None, None] * speeds  # [S, 1, D/2]
    a, b = x[..., :half], x[..., half:]
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.cat(turned, dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, one head after another; page 01 builds the better one.

    Args:
        query: `[H, S, D]`.
        key: `[H_kv, S, D]`.
        value: like `key`.
    """
    num_heads, length, head_dim = query.shape
    shared = num_heads // len(key)  # query heads per key/value head
    future = torch.ones(length, length).triu(1).bool()  # True where a key comes later
    outputs = []
    for head in range(num_heads):
        scores = query[head] @ key[head // shared].T / head_dim**0.5  # [S, S]
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        outputs.append(weights @ value[head // shared])
    return torch.stack(outputs)  # [H, S, D]


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU, given its three matrices; page 03 builds its middle, page 04 the whole."""
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def choose(logits: Tensor) -> int:
    """The token with the best score, given those of all tokens, `[V]`; page 07."""
    return int(logits.argmax())


# How they fit together.


def weights_of(layer: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The eleven weights of a layer, by the last word of their names, such as `q_proj`."""
    prefix = f"model.layers.{layer}."
    return {n.split(".")[-2]: w for n, w in weights.items() if n.startswith(prefix)}


def forward(
    ids: list[int],
    story: Story,
    norm: Callable[[Tensor, Tensor, float], Tensor] = norm,
    rotate: Callable[[Tensor, Tensor, float], Tensor] = rotate,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend,
    mlp: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = mlp,
) -> Tensor:
    """For each token of a text, a score for every token that could come next, `[S, V]`."""
    config, weights = story.config, story.weights
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    by_head = (len(ids), -1, config.head_dim)
    positions = torch.arange(len(ids))
    x = weights["model.embed_tokens.weight"][ids]  # [S, E]
    for layer in range(config.num_hidden_layers):
        w = weights_of(layer, weights)
        normed = norm(x, w["input_layernorm"], eps)
        query = (normed @ w["q_proj"].T).view(by_head)  # [S, H, D]
        key = (normed @ w["k_proj"].T).view(by_head)  # [S, H_kv, D]
        value = (normed @ w["v_proj"].T).view(by_head)
        query = rotate(norm(query, w["q_norm"], eps), positions, theta)
        key = rotate(norm(key, w["k_norm"], eps), positions, theta)
        heads = attend(*(part.transpose(0, 1) for part in (query, key, value)))
        x = x + heads.transpose(0, 1).flatten(1) @ w["o_proj"].T
        normed = norm(x, w["post_attention_layernorm"], eps)
        x = x + mlp(normed, w["gate_proj"], w["up_proj"], w["down_proj"])
    x = norm(x, weights["model.norm.weight"], eps)
    return x @ weights["model.embed_tokens.weight"].T


def continue_story(
    story: Story | None = None,
    forward: Callable[..., Tensor] = forward,
    choose: Callable[[Tensor], int] = choose,
    write: Callable[[list[int]], str] | None = None,
    **parts: Callable[..., Tensor],
) -> str:
    """`STORY` and its next `NUM_NEW_TOKENS` tokens.

    Args:
        story: what `load_story` returns; None loads it.
        forward: given all ids and the story, the scores of the next token in its last row.
        choose: given those scores, the id of the next token.
        write: the text of all ids; None: the tokenizer's `decode`.
        parts: of `forward`: `norm`, `rotate`, `attend`, `mlp`.
    """
    story = story or load_story()
    ids = list(story.ids)
    with torch.inference_mode():
        for _ in range(NUM_NEW_TOKENS):
            logits = forward(ids, story, **parts)
            ids.append(choose(logits[-1]))
    return str((write or story.tokenizer.decode)(ids))
