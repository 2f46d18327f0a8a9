"""A distribution through the filters, and what is drawn from it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from folo_lib.course.widgets.base import (
    BLUE,
    NEW_LINE,
    Explorer,
    drawable,
    encode,
    float_slider,
    int_slider,
    text_field,
    token_label,
)
from folo_lib.engine import LLMEngine
from folo_lib.request import TokenBytes
from folo_lib.sampler import Sampler, SamplingMetadata, apply_filters
from folo_lib.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from folo_lib.qwen3 import Qwen3ForCausalLM

MAX_CONTINUATION = 40
MAX_BARS = 14


def next_token_distributions(
    logits: Tensor,
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """The model's own probabilities of the next token, and those that it is drawn from.

    Args:
        logits: `[V]`, of the place behind the output so far.
        params: penalties, temperature and filters; temperature 0 or `top_k` 1 leave one token.
        prompt_token_ids: the prompt.
        output_token_ids: the output so far.

    Returns:
        Before and after, both `[V]` and summing to 1.
    """
    raw = logits.detach().float().cpu()[None]  # [1, V]
    length, vocab_size = len(prompt_token_ids), raw.shape[-1]
    metadata = SamplingMetadata.from_params(
        [params], [0], [0], [length], [()], vocab_size, "cpu"
    )
    if metadata.prompt_mask is not None and metadata.output_counts is not None:
        metadata.prompt_mask[0, list(prompt_token_ids)] = True
        for token_id in output_token_ids:
            metadata.output_counts[0, token_id] += 1
    scores = Sampler.apply_penalties(raw, metadata)
    if metadata.temperature is None:  # greedy, also by top_k=1
        after = torch.zeros(vocab_size)
        after[scores.argmax()] = 1.0
    else:
        after = apply_filters(scores, metadata).softmax(dim=-1)[0]
    return raw.softmax(dim=-1)[0], after


def sampling_playground(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> Explorer:
    """The distribution of a token before and after penalties, temperature and filters.

    With it a text drawn with these settings, of which `token` chooses the token to look at: the
    penalties on presence and frequency look at the output, so they change nothing at the first.

    Args:
        model: a loaded model.
        tokenizer: its tokenizer.
        prompt: to begin with.

    Raises:
        TypeError: if `prompt` is not text.
        ValueError: if it is empty.
    """
    limit = min(1024, model.config.max_position_embeddings)
    engine = LLMEngine(model, tokenizer, max_model_len=limit, decode="eager")
    token_bytes = TokenBytes(tokenizer)
    encode(tokenizer, "prompt", prompt, limit)

    def draw(prompt: str, token: int, seed: int, **settings: Any) -> tuple[Figure, str]:
        ids = encode(tokenizer, "prompt", prompt, limit - MAX_CONTINUATION)
        params = SamplingParams(seed=seed, max_tokens=MAX_CONTINUATION, **settings)
        [output] = engine.generate([ids], params, use_tqdm=False)
        output_ids = output.outputs[0].token_ids
        place = min(token, len(output_ids)) - 1
        device = model.model.embed_tokens.weight.device
        with torch.inference_mode():
            so_far = torch.tensor(ids + output_ids[:place], device=device)
            logits = model.compute_logits(model(so_far)[-1])
        before, after = next_token_distributions(
            logits, params, ids, output_ids[:place]
        )
        return sampling_figure(before, after, token_bytes, output_ids, place)

    controls = {
        "prompt": text_field("Prompt", prompt),
        "temperature": float_slider("Temperature", 0, 2, 0.05, 0.8),
        "top_k": int_slider("Top-k (0: off)", 0, 50, 0),
        "top_p": float_slider("Top-p (1: off)", 0.05, 1, 0.05, 0.9),
        "min_p": float_slider("Min-p (0: off)", 0, 1, 0.05, 0),
        "repetition_penalty": float_slider("Repetition (1: off)", 0.5, 2, 0.05, 1),
        "presence_penalty": float_slider("Presence (0: off)", -2, 2, 0.1, 0),
        "frequency_penalty": float_slider("Frequency (0: off)", -2, 2, 0.1, 0),
        "seed": int_slider("Seed", 0, 99, 0),
        "token": int_slider("Token to look at", 1, MAX_CONTINUATION, 1),
    }
    return Explorer("sampling_playground", controls, draw)


def sampling_figure(
    before: Tensor,
    after: Tensor,
    token_bytes: TokenBytes,
    output_ids: list[int],
    place: int,
) -> tuple[Figure, str]:
    """Bars of the likeliest tokens before and after, and the text that was drawn."""
    drawn = output_ids[place]
    shown = before.topk(min(MAX_BARS, len(before))).indices.tolist()
    if drawn not in shown:
        shown[-1] = drawn
    figure = Figure(figsize=(7.6, 5.2))
    ax = figure.subplots()
    ax.grid(True, axis="x")
    places = range(len(shown))
    bar: Any = {"height": 0.4, "edgecolor": "black", "linewidth": 0.7}
    own, drawn_from = before[shown].tolist(), after[shown].tolist()
    ax.barh(
        [i - 0.2 for i in places],
        own,
        color="white",
        label="the model's own",
        **bar,
    )
    ax.barh(
        [i + 0.2 for i in places], drawn_from, color=BLUE, label="drawn from", **bar
    )
    right = 1.25 * float(torch.maximum(before, after).max())
    for i, token_id in enumerate(shown):
        end = max(float(before[token_id]), float(after[token_id]))
        note = "cut" if after[token_id] == 0 else f"{float(after[token_id]):.1%}"
        note += "  \u2190 drawn" if token_id == drawn else ""
        ax.text(end + 0.01 * right, i, note, va="center", fontsize=9)
    ax.set_yticks(places, [token_label(token_bytes[i], 16) for i in shown])
    ax.set(
        xlim=(0, right),
        xlabel="probability of the next token",
        ylim=(len(shown) - 0.4, -0.6),
    )
    ax.legend(loc="lower right")
    ax.set_title(f"Token {place + 1} of {len(output_ids)}", loc="left")
    text = b"".join(token_bytes[i] for i in output_ids).decode(errors="replace")
    lines = textwrap.wrap(drawable(text.strip().replace("\n", NEW_LINE)), 95) or [""]
    figure.supxlabel(
        "The text drawn:\n" + "\n".join(lines),
        x=0.01,
        ha="left",
        fontsize=10,
        linespacing=1.4,
    )
    alive = int((after > 0).sum())
    label = token_label(token_bytes[drawn], 16)
    return figure, (
        f"Token {place + 1}: {alive:,} of {len(after):,} tokens can be drawn; \u201c{label}\u201d was, "
        f"with {float(after[drawn]):.1%} (the model's own: {float(before[drawn]):.1%})."
    )
