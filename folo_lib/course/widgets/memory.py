"""How much memory weights and cache take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from folo_lib.course.figures import CACHE, US
from folo_lib.course.widgets.base import Explorer, choice_menu, choice_slider
from folo_lib.kv_cache import kv_bytes_per_token
from folo_lib.platform import GPU_MEMORY_SHARE

if TYPE_CHECKING:
    from transformers import Qwen3Config


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Qwen model that its memory depends on; the names are Hugging Face's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    model_type: str = "qwen3"

    def count_parameters(self) -> int:
        """Numbers in all weights; a tied head counts once."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        attention = (
            self.hidden_size * (heads + self.num_attention_heads) * self.head_dim
        )
        attention += (
            2 * self.head_dim if self.model_type == "qwen3" else heads * self.head_dim
        )
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size  # and two norms
        embeddings = 1 if self.tie_word_embeddings else 2
        return (
            self.num_hidden_layers * layer
            + embeddings * self.vocab_size * self.hidden_size
            + self.hidden_size
        )

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Memory of the weights."""
        return self.count_parameters() * dtype.itemsize

    def kv_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Memory of the keys and values of so many tokens."""
        return num_tokens * kv_bytes_per_token(cast("Qwen3Config", self), dtype)


MODEL_SHAPES = {
    "bundled": ModelShape(192, 512, 6, 4, 2, 64, 2048, True, 4096),
    "Qwen3-0.6B": ModelShape(1024, 3072, 28, 16, 8, 128, 151936, True, 40960),
    "Qwen3-1.7B": ModelShape(2048, 6144, 28, 16, 8, 128, 151936, True, 40960),
    "Qwen3-4B": ModelShape(2560, 9728, 36, 32, 8, 128, 151936, True, 40960),
    "Qwen3-8B": ModelShape(4096, 12288, 36, 32, 8, 128, 151936, False, 40960),
    "Qwen3-14B": ModelShape(5120, 17408, 40, 40, 8, 128, 151936, False, 40960),
    "Qwen3-32B": ModelShape(5120, 25600, 64, 64, 8, 128, 151936, False, 40960),
    "Qwen2.5-0.5B": ModelShape(896, 4864, 24, 14, 2, 64, 151936, True, 32768, "qwen2"),
    "Qwen2.5-7B": ModelShape(
        3584, 18944, 28, 28, 4, 128, 152064, False, 131072, "qwen2"
    ),
}
GPU_GIGABYTES = (8, 24, 80, 141)
CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
}


def cache_memory(shape: ModelShape, dtype: torch.dtype, memory: int) -> int:
    """What the engine sets aside for the cache on an empty GPU of `memory` bytes.

    A share of what the weights leave free, see `folo_lib.platform`; negative if they do not fit.
    """
    free = memory - shape.weight_bytes(dtype)
    return int(free * GPU_MEMORY_SHARE) if free >= 0 else -1


def count_requests(
    shape: ModelShape, context: int, dtype: torch.dtype, memory: int
) -> int:
    """How many requests of `context` tokens fit into the cache on a GPU of `memory` bytes.

    -1 if not even the weights do.
    """
    set_aside = cache_memory(shape, dtype, memory)
    return set_aside // shape.kv_bytes(context, dtype) if set_aside >= 0 else -1


def kv_memory_calculator() -> Explorer:
    """Memory of weights and KV cache by model, context, dtype and batch, on four sizes of GPU."""
    contexts = [(f"{2**i:,}", 2**i) for i in range(9, 18)]
    batches = [(str(2**i), 2**i) for i in range(9)]
    controls = {
        "model": choice_menu("Model", list(MODEL_SHAPES), "Qwen3-0.6B"),
        "context": choice_slider("Context, tokens", contexts, 4096),
        "dtype": choice_menu("dtype", list(CACHE_DTYPES), "bfloat16"),
        "batch": choice_slider("Batch, requests", batches, 8),
    }
    return Explorer("kv_memory_calculator", controls, memory_figure)


def memory_figure(
    model: str, context: int, dtype: str, batch: int
) -> tuple[Figure, str]:
    """For each GPU how much of it weights and caches take, and how many requests would fit."""
    shape, kind = MODEL_SHAPES[model], CACHE_DTYPES[dtype]
    weights, one = shape.weight_bytes(kind), shape.kv_bytes(context, kind)
    total = weights + batch * one
    figure = Figure(figsize=(7.6, 3.7))
    ax = figure.subplots()
    parts = US.bar, CACHE.bar  # the weights are what we have loaded
    for place, gigabytes in enumerate(GPU_GIGABYTES):
        memory = gigabytes * 10**9
        first, second = min(1.0, weights / memory), min(1.0, total / memory)
        ax.barh(place, 1, 0.56, facecolor="white", edgecolor="black")
        ax.barh(place, first, 0.56, **parts[0])
        ax.barh(place, second - first, 0.56, left=first, **parts[1])
        set_aside = cache_memory(shape, kind, memory)
        if set_aside >= 0:
            limit = (weights + set_aside) / memory
            ax.plot([limit, limit], [place - 0.36, place + 0.36], "k-", linewidth=3)
        fits = count_requests(shape, context, kind, memory)
        note = "1 request fits" if fits == 1 else f"{fits:,} requests fit"
        if fits < 0:
            note = "weights do not fit"
        elif fits < batch:
            note += f",\nbatch of {batch} does not"
        ax.text(1.02, place, note, va="center", fontsize=9.5)
    ax.set_yticks(
        range(len(GPU_GIGABYTES)), [f"{size} GB GPU" for size in GPU_GIGABYTES]
    )
    ax.set(
        xlim=(0, 1.005),
        xlabel="share of the GPU's memory; the bold mark is the cache's limit",
    )
    ax.invert_yaxis()
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, **part) for part in parts]
    names = [
        f"weights {gb(weights)}",
        f"KV cache {batch} x {gb(one)} = {gb(batch * one)}",
    ]
    ax.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    title = (
        f"{model} in {dtype}: {batch} x {context:,} tokens take "
        f"{batch * one / weights:.2g} times the memory of the weights"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    sentence = (
        f"{model} in {dtype}: weights {gb(weights)}; KV cache {gb(one)} for a request of "
        f"{context:,} tokens, {gb(batch * one)} for {batch}; together {gb(total)}. "
        f"A GB is 10^9 bytes. The cache may have {GPU_MEMORY_SHARE:.0%} of what the weights "
        "leave free; activations have the rest."
    )
    if context > shape.max_position_embeddings:
        sentence += f" The model itself reaches {shape.max_position_embeddings:,} tokens, not {context:,}."
    return figure, sentence


def gb(num_bytes: int) -> str:
    """Bytes in GB of 10^9 bytes, to three digits."""
    size = num_bytes / 10**9
    digits = 3 if size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{size:,.{digits}f} GB"
