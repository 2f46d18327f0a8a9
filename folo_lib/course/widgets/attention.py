"""Attention maps of a model, and the heads that copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from folo_lib.attention import create_causal_mask, repeat_kv
from folo_lib.course.figures import GREY, ORANGE, write_values
from folo_lib.course.widgets.base import (
    Explorer,
    encode,
    int_slider,
    text_field,
    token_label,
)
from folo_lib.kv_cache import (
    AttentionMetadata,
    TorchNaiveBackend,
    allocate_kv_caches,
)
from folo_lib.request import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from folo_lib.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM


class RecordingBackend(TorchNaiveBackend):
    """Attends as its parent does, and keeps the weights of every call on one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    @staticmethod
    def get_name() -> str:
        return "recording"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        lengths = query.shape[-2], key.shape[-2]
        causal = create_causal_mask(*lengths, device=query.device)[0, 0]  # [S, T]
        keys = repeat_kv(key, query.shape[-3] // key.shape[-3]).float()
        scores = query.float() @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        self.weights.append((scores + causal).softmax(dim=-1)[0].cpu())
        return super().attend(query, key, value, mask)


def attention_weights(model: Qwen3ForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """The attention weights of every layer and head over one text.

    Args:
        model: left as it is; a copy that shares its weights reads the text.
        token_ids: `S` ids.

    Returns:
        `[layers, H, S, S]` float32 on the CPU; each row sums to 1, none looks ahead.
    """
    recorder = RecordingBackend()
    tensors = [*model.parameters(), *model.buffers()]
    reader = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for layer in reader.model.layers:
        cast("Qwen3DecoderLayer", layer).self_attn.backend = recorder
    weight, length = model.model.embed_tokens.weight, len(token_ids)
    places = torch.arange(length, device=weight.device)
    metadata = AttentionMetadata(  # one sequence, one block
        block_size=length,
        slot_mapping=places,
        block_table=places[:1, None],
        query_start_loc=torch.tensor([0, length], device=weight.device),
        seq_lens=torch.tensor([length], device=weight.device),
        query_lens_list=[length],
        seq_lens_list=[length],
    )
    caches = allocate_kv_caches(model.config, 1, length, weight.dtype, weight.device)
    with torch.inference_mode():
        ids = torch.tensor(token_ids, device=weight.device)
        reader(ids, places, caches, metadata)
    return torch.stack(recorder.weights)


def copy_targets(token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs `(i, j)`: what stands before `j` is the previous occurrence of token `i`.

    A head that copies looks from `i` to `j`, and says what came next the last time. Of several
    occurrences the one counts before which most tokens agree, of those the latest. No pair
    where `j` would be `i` or the token before: all heads look there for other reasons.
    """
    pairs = []
    for i in range(len(token_ids)):
        matches = []
        for k in range(i):
            length = 0  # of what agrees, read backwards from i and from k
            while length <= k and token_ids[k - length] == token_ids[i - length]:
                length += 1
            matches.append((length, k + 1))
        length, j = max(matches, default=(0, 0))
        if length and j < i - 1:
            pairs.append((i, j))
    return pairs


def copying_scores(weights: Tensor, token_ids: Sequence[int]) -> Tensor | None:
    """How much each head looks at the token after the previous occurrence of the present one.

    Args:
        weights: `[layers, H, S, S]`.
        token_ids: `S` ids.

    Returns:
        `[layers, H]`, the mean weight over all tokens that occurred before; None if none did.
    """
    pairs = copy_targets(token_ids)
    if not pairs:
        return None
    rows, columns = torch.tensor(pairs).T
    return weights[:, :, rows, columns].mean(dim=-1)


MAX_TOKENS_SHOWN = 36


def attention_explorer(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str
) -> Explorer:
    """Attention maps of a text, by layer and head, and the heads that copy.

    It opens at the head that most looks at what came after the previous occurrence of the present
    token. Of long texts the first 36 tokens are shown.

    Args:
        model: a loaded model.
        tokenizer: its tokenizer.
        text: to begin with; repeat something in it.

    Raises:
        TypeError: if `text` is not text.
        ValueError: if it is empty.
    """
    token_bytes = TokenBytes(tokenizer)
    memo: dict[str, tuple[list[int], Tensor]] = {}

    def read(text: str) -> tuple[list[int], Tensor]:
        if text not in memo:
            ids = encode(tokenizer, "text", text, MAX_TOKENS_SHOWN)
            memo.clear()
            memo[text] = ids, attention_weights(model, ids)
        return memo[text]

    def draw(text: str, layer: int, head: int) -> tuple[Figure, str]:
        ids, weights = read(text)
        labels = [token_label(token_bytes[i]) for i in ids]
        return attention_figure(weights, ids, labels, layer, head)

    ids, weights = read(text)
    scores = copying_scores(weights, ids)
    start = (
        divmod(int(scores.argmax()), scores.shape[1]) if scores is not None else (0, 0)
    )
    controls = {
        "text": text_field("Text", text),
        "layer": int_slider("Layer", 0, weights.shape[0] - 1, start[0]),
        "head": int_slider("Head", 0, weights.shape[1] - 1, start[1]),
    }
    return Explorer("attention_explorer", controls, draw)


def attention_figure(
    weights: Tensor,
    token_ids: Sequence[int],
    labels: Sequence[str],
    layer: int,
    head: int,
) -> tuple[Figure, str]:
    """The map of one head, the copying scores of all heads, and what to see."""
    length = len(token_ids)
    scores, pairs = copying_scores(weights, token_ids), copy_targets(token_ids)
    figure = Figure(figsize=(7.6, min(6.2, max(3.6, 1.1 + 0.14 * length))))
    grid = figure.add_gridspec(2, 2, width_ratios=[3.4, 1], height_ratios=[20, 1])
    ax = figure.add_subplot(grid[:, 0])
    hidden = torch.ones(length, length).triu(1).bool()
    seen = weights[layer, head].masked_fill(hidden, float("nan"))
    image = ax.imshow(
        seen.tolist(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    size = 8.5 if length > 24 else 9.5
    ax.set_xticks(range(length), labels, rotation=90, fontsize=size)
    ax.set_yticks(range(length), labels, fontsize=size)
    ax.tick_params(length=2)
    ax.set(
        xlabel="looked at",
        ylabel="token that looks",
        title=f"Layer {layer}, head {head}",
    )
    edge = [i / 2 + 0.5 for i in range(-2, 2 * length)]
    stairs = [math.floor(x) + 0.5 for x in edge]  # where the causal mask begins
    ax.plot(stairs[1:], stairs[:-1], color=GREY, linewidth=0.8)
    ax.set(xlim=(-0.5, length - 0.5), ylim=(length - 0.5, -0.5), anchor="N")
    if pairs:
        rows, columns = zip(*pairs, strict=True)
        marks: Any = {
            "marker": "s",
            "facecolors": "none",
            "edgecolors": ORANGE,
            "linewidths": 1.3,
        }
        label = "what came next\nthe last time"
        marks |= {"s": min(100, max(16, 45000 / length**2)), "label": label}
        ax.scatter(columns, rows, **marks)
        ax.legend(loc="upper right", fontsize=9, handletextpad=0.3)
    draw_copying_scores(figure.add_subplot(grid[0, 1]), scores, layer, head)
    scale = figure.add_subplot(grid[1, 1])
    figure.colorbar(image, cax=scale, orientation="horizontal", ticks=[0, 0.5, 1])
    scale.set_xlabel("attention weight", fontsize=9)
    return figure, describe_copying(scores, layer, head)


def draw_copying_scores(ax: Axes, scores: Tensor | None, layer: int, head: int) -> None:
    """All heads by layer, the chosen one framed; numbers where there is room for them."""
    ax.set_title("Copying score")
    ax.set_anchor("N")
    if scores is None:
        ax.axis("off")
        ax.text(0.5, 0.6, "no token\nrepeats", ha="center", transform=ax.transAxes)
        return
    layers, heads = scores.shape
    ax.imshow(scores.tolist(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlabel="head", ylabel="layer")
    if layers <= 12 and heads <= 4:
        ax.set_xticks(range(heads))
        ax.set_yticks(range(layers))
        write_values(ax, scores, fontsize=8.5)
    corner = (head - 0.5, layer - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, ec=ORANGE, lw=2.5, clip_on=False))


def describe_copying(scores: Tensor | None, layer: int, head: int) -> str:
    """Who copies, and how much the chosen head does."""
    if scores is None:
        return (
            f"Layer {layer}, head {head}. No token of this text comes back later, so no head "
            "can show that it copies: repeat a phrase."
        )
    best = divmod(int(scores.argmax()), scores.shape[1])
    leader = f"layer {best[0]}, head {best[1]}"
    share = float(scores[best])
    if best == (layer, head):
        return (
            f"Layer {layer}, head {head} is the head that copies most: where a token has occurred "
            f"before, {share:.0%} of its attention goes to what came next the last time."
        )
    return (
        f"Layer {layer}, head {head} gives {float(scores[layer, head]):.0%} of its attention to "
        f"what came next the last time. The head that copies most is {leader}, with {share:.0%}."
    )
