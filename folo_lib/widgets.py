"""Widgets of the pages: attention, RoPE, cache memory, sampling and a generation to watch.

    from folo_lib.widgets import rope_explorer

    rope_explorer()  # the last expression of a cell

Each function returns a `CourseWidget`, which shows itself: controls and a picture in JupyterLab,
the picture alone where no kernel runs. `controls` holds the controls by name, so that Python
can turn them too: `widget.controls["pair"].value = 5`.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import textwrap
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .attention import AttentionBackend, create_causal_mask, naive_attention, repeat_kv
from .engine import LLMEngine
from .kv_cache import kv_bytes_per_token
from .request import RequestOutput, TokenBytes
from .rope import apply_rotary_emb, compute_cos_sin, compute_inv_freq
from .sampler import Sampler, SamplingMetadata, apply_filters
from .sampling_params import SamplingParams

try:
    import ipywidgets as widgets
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise ImportError(
        f"folo_lib.widgets needs ipywidgets and matplotlib ({error}): "
        'pip install "folo-lib[notebooks]"'
    ) from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Config

    from .qwen3 import Qwen3ForCausalLM

__all__ = [
    "MODEL_SHAPES",
    "CourseWidget",
    "Explorer",
    "LiveGeneration",
    "ModelShape",
    "attention_explorer",
    "attention_weights",
    "copying_scores",
    "kv_memory_calculator",
    "live_generation",
    "next_token_distributions",
    "rope_explorer",
    "sampling_playground",
]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
STYLE: Any = {
    "figure.facecolor": "white",
    "figure.dpi": 110,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=["#0072B2"]),  # and lines without dashes
    "lines.linewidth": 1.8,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "text.parse_math": False,  # a token may hold dollar signs
}
_drawing = threading.Lock()  # matplotlib's settings are global


# What all widgets share


class CourseWidget(ABC):
    """Shows itself as a live widget and, in the same output, as a picture.

    Attributes:
        name: of the function that made it.
        controls: by name, in the order of the tab key.
        box: all of it, an ipywidgets box.
    """

    name: str
    controls: dict[str, Any]
    box: Any

    @abstractmethod
    def picture(self) -> bytes:
        """What stands for the widget where no kernel runs, as PNG."""

    @abstractmethod
    def alt_text(self) -> str:
        """The picture in words."""

    def __repr__(self) -> str:
        return f"{self.name}: controls in JupyterLab, a picture elsewhere"

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One output with the live view and the picture; each front end takes its best."""
        data = {
            "text/plain": repr(self),
            "image/png": base64.b64encode(self.picture()).decode(),
            WIDGET_VIEW: {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.box.model_id,
            },
        }
        return data, {"image/png": {"alt": self.alt_text()}}


class Explorer(CourseWidget):
    """Controls above a picture that is drawn anew when one of them changes.

    Args:
        name: of the function that makes it.
        controls: by name.
        draw: takes the values of the controls by name, and returns the figure and a sentence that
            says what it shows. A ValueError is shown in place of the sentence.
    """

    def __init__(
        self,
        name: str,
        controls: dict[str, Any],
        draw: Callable[..., tuple[Figure, str]],
    ) -> None:
        self.name, self.controls, self._draw = name, controls, draw
        layout = {"max_width": "100%", "align_self": "flex-start"}  # never enlarged
        self.image = widgets.Image(format="png", layout=layout)
        self.caption = widgets.HTML()
        self._sentence = ""
        self._refresh()
        for control in controls.values():
            control.observe(self._on_change, names="value")
        self.box = stack([row(controls.values()), self.image, self.caption])

    def picture(self) -> bytes:
        return bytes(self.image.value)

    def alt_text(self) -> str:
        return self._sentence

    def _refresh(self) -> None:
        values = {name: read_control(c) for name, c in self.controls.items()}
        with _drawing, mpl.rc_context(STYLE):
            figure, sentence = self._draw(**values)
            png = to_png(figure)
        self._sentence = sentence
        self.image.value = png
        self.caption.value = paragraph(sentence)

    def _on_change(self, change: Any) -> None:
        try:
            self._refresh()
        except ValueError as error:
            self.caption.value = paragraph(f"Nothing new to show: {error}")


def to_png(figure: Figure) -> bytes:
    """The figure as PNG: the same figure, the same bytes."""
    buffer = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def paragraph(text: str) -> str:
    """Plain text as HTML that breaks its lines."""
    return f'<div role="status" style="line-height: 1.5; white-space: normal; max-width: 836px">{html.escape(text)}</div>'


def row(children: Any) -> Any:
    """Side by side, on several lines where the window is narrow."""
    return widgets.Box(
        list(children), layout={"display": "flex", "flex_flow": "row wrap"}
    )


def stack(children: Sequence[Any]) -> Any:
    """One below the other."""
    return widgets.VBox(list(children), layout={"overflow": "hidden"})


def options(description: str, width: str = "370px") -> dict[str, Any]:
    """What every control has: a label, and one update when the hand lets go."""
    return {
        "description": description,
        "style": {"description_width": "145px"},
        "layout": {"width": width, "max_width": "98%"},
        "continuous_update": False,
    }


def choice_slider(
    description: str, choices: Sequence[Any], value: Any, readout: bool = True
) -> Any:
    """A slider, as JupyterLab takes the arrow keys away from a drop-down list.

    Its readout has room for nine letters.
    """
    return widgets.SelectionSlider(
        options=list(choices), value=value, readout=readout, **options(description)
    )


def int_slider(description: str, low: int, high: int, value: int) -> Any:
    return widgets.IntSlider(value=value, min=low, max=high, **options(description))


def float_slider(
    description: str, low: float, high: float, step: float, value: float
) -> Any:
    return widgets.FloatSlider(
        value=value,
        min=low,
        max=high,
        step=step,
        readout_format=".2f",
        **options(description),
    )


NEW_LINE = "\u21b5"
"""Stands for a line break in a text field, which has one line, and in labels."""


def text_field(description: str, value: str) -> Any:
    shown = value.replace("\n", NEW_LINE)
    return widgets.Text(value=shown, **options(description, width="740px"))


def read_control(control: Any) -> Any:
    """The value of a control; the text of a field with its line breaks."""
    value = control.value
    return value.replace(NEW_LINE, "\n") if isinstance(value, str) else value


def drawable(text: str, font: str = "DejaVu Sans") -> str:
    """The text with a square for every character that the font lacks."""
    glyphs = font_manager.get_font(font_manager.findfont(font))
    return "".join(c if glyphs.get_char_index(ord(c)) else "\u25a1" for c in text)


def token_label(token: bytes, limit: int = 12) -> str:
    """A token as a label: spaces visible, bytes of a split character in hex."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "<" + token.hex(" ").upper() + ">"
    for invisible, sign in ((" ", "\u00b7"), ("\n", NEW_LINE), ("\t", "\u21e5")):
        text = text.replace(invisible, sign)
    text = text if len(text) <= limit else text[: limit - 1] + "\u2026"
    return drawable("".join(c if c.isprintable() else "\u25a1" for c in text))


def encode(
    tokenizer: PreTrainedTokenizerBase, name: str, text: Any, limit: int
) -> list[int]:
    """The ids of a text that is not empty, at most `limit` of them.

    Raises:
        TypeError: if it is not text.
        ValueError: if there is nothing in it.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}, and text is expected.")
    ids = list(tokenizer(text).input_ids)
    if not ids:
        raise ValueError(f"{name} is empty: type at least one word.")
    return ids[:limit]


# Attention


class RecordingBackend(AttentionBackend):
    """Attends as `naive_attention` does, and keeps the weights of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    @staticmethod
    def get_name() -> str:
        return "recording"

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        lengths = query.shape[-2], key.shape[-2]
        mask = create_causal_mask(*lengths, device=query.device)[0, 0]  # [S, T]
        keys = repeat_kv(key, query.shape[-3] // key.shape[-3]).float()
        scores = query.float() @ keys.transpose(-1, -2) * scale + mask
        self.weights.append(scores.softmax(dim=-1).cpu())
        return naive_attention(query, key, value, scale, mask.to(query.dtype))


def attention_weights(model: Qwen3ForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """The attention weights of every layer and head over one text.

    Args:
        model: its backend is replaced while the text is read, and put back.
        token_ids: `S` ids.

    Returns:
        `[layers, H, S, S]` float32 on the CPU; each row sums to 1, none looks ahead.
    """
    recorder = RecordingBackend()
    modules = [cast(Any, layer).self_attn for layer in model.model.layers]
    backends = [module.backend for module in modules]
    device = model.model.embed_tokens.weight.device
    try:
        for module in modules:
            module.backend = recorder
        with torch.inference_mode():
            model(torch.tensor(token_ids, device=device))
    finally:
        for module, backend in zip(modules, backends, strict=True):
            module.backend = backend
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
        for i, j in itertools.product(range(layers), range(heads)):
            score = float(scores[i, j])
            colour = "white" if score > 0.6 else "black"
            text = f"{score:.2f}".removeprefix("0")
            ax.text(j, i, text, ha="center", va="center", fontsize=8.5, color=colour)
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


# RoPE


def rope_explorer(head_dim: int = 64, rope_theta: float = 1e6) -> Explorer:
    """What RoPE does to one pair of dimensions, and what becomes of q·k with distance.

    Args:
        head_dim: `D`, even; the bundled model's by default.
        rope_theta: the base of the frequencies.

    Raises:
        ValueError: if `head_dim` is odd or below 2, or `rope_theta` is not above 1.
    """
    if head_dim < 2 or not rope_theta > 1:
        raise ValueError(
            f"head_dim={head_dim} must be at least 2, and rope_theta={rope_theta} above 1."
        )
    inv_freq = compute_inv_freq(head_dim, rope_theta)
    controls = {
        "position": int_slider("Position", 0, MAX_DISTANCE, 12),
        "pair": int_slider(
            "Frequency pair", 0, head_dim // 2 - 1, min(4, head_dim // 2 - 1)
        ),
    }

    def draw(position: int, pair: int) -> tuple[Figure, str]:
        return rope_figure(inv_freq, position, pair)

    return Explorer("rope_explorer", controls, draw)


MAX_DISTANCE = 128


def rope_scores(inv_freq: Tensor) -> Tensor:
    """q·k of equal vectors of length 1, `d` tokens apart: `[distances, D/2]`, pair by pair.

    Query and key are rotated by `apply_rotary_emb`, the query at `MAX_DISTANCE`, the keys at every
    position up to it.
    """
    positions = torch.arange(MAX_DISTANCE, -1, -1)  # distances 0, 1, 2, ...
    cos, sin = compute_cos_sin(positions, inv_freq)  # [distances, D/2]
    pairs = len(inv_freq)
    unit = torch.cat((torch.ones(pairs), torch.zeros(pairs)))[None]  # [H=1, D]
    keys = apply_rotary_emb(unit.expand(len(positions), 1, -1), cos, sin)[:, 0]
    products = keys[0] * keys  # the query is the key at distance 0
    return products[:, :pairs] + products[:, pairs:]


def rope_figure(inv_freq: Tensor, position: int, pair: int) -> tuple[Figure, str]:
    """The rotation of one pair in the plane, beside q·k against distance."""
    frequency, pairs = float(inv_freq[pair]), len(inv_freq)
    angle = frequency * position
    period = 2 * math.pi / frequency
    figure = Figure(figsize=(7.6, 3.3))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.75])
    draw_rotation(left, angle, position)
    left.set(xlabel=f"dimension {pair}", ylabel=f"dimension {pair + pairs}")
    left.set_title(f"Pair {pair} at positions 0 and {position}")

    distances = range(MAX_DISTANCE + 1)
    scores = rope_scores(inv_freq)
    one, everyone = scores[:, pair], scores.mean(dim=-1)
    right.grid(True)
    right.plot(distances, one.tolist(), color=BLUE, linestyle="-", linewidth=1.8)
    right.plot(
        distances, everyone.tolist(), color=ORANGE, linestyle="--", linewidth=1.8
    )
    right.plot(position, float(one[position]), "o", color=BLUE, markersize=9)
    right.set(
        xlabel="distance between query and key, tokens", ylabel="q·k", ylim=(-1.15, 1.5)
    )
    right.set_yticks([-1, -0.5, 0, 0.5, 1])
    lines = right.get_lines()[:2]
    names = [f"pair {pair} alone", "mean of all pairs"]
    right.legend(lines, names, loc="upper right", ncols=2, handlelength=3, fontsize=9)
    turn = f"one turn takes {period:,.{0 if period >= 10 else 1}f} tokens"
    return figure, (
        f"Position {position} turns pair {pair} by {position} x {frequency:.3g} = "
        f"{angle:.3g} radians ({angle / (2 * math.pi):.3g} turns; {turn}). "
        f"A query {position} tokens behind an equal key scores {float(one[position]):+.2f} in this "
        f"pair, wherever the two stand."
    )


def draw_rotation(ax: Axes, angle: float, position: int) -> None:
    """A vector of length 1 before and after it was turned."""
    circle = torch.linspace(0, 2 * math.pi, 200)
    ax.plot(
        circle.cos().tolist(), circle.sin().tolist(), color="#bbbbbb", linewidth=0.8
    )
    travelled = torch.linspace(0, angle, 60 + int(abs(angle) * 20))
    radius = 0.25 + 0.25 * travelled / max(8 * math.pi, angle)
    if angle > 0:
        ax.plot(
            (radius * travelled.cos()).tolist(),
            (radius * travelled.sin()).tolist(),
            color=GREY,
            linewidth=1,
        )
    arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    before = {**arrow, "color": GREY, "linestyle": "--", "linewidth": 1.3}
    after = {**arrow, "color": BLUE, "linewidth": 2.2}
    ax.annotate("", (1, 0), (0, 0), arrowprops=before)
    ax.annotate("", (math.cos(angle), math.sin(angle)), (0, 0), arrowprops=after)
    ax.text(1.08, 0, "0", va="center", color=GREY)
    if math.cos(angle) < 0.97:
        ax.text(
            1.18 * math.cos(angle),
            1.18 * math.sin(angle),
            str(position),
            ha="center",
            va="center",
            color=BLUE,
            weight="bold",
        )
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    ax.set_xticks([-1, 0, 1])
    ax.set_yticks([-1, 0, 1])


# Memory of the KV cache


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


def count_requests(
    shape: ModelShape, context: int, dtype: torch.dtype, memory: int
) -> int:
    """How many requests of `context` tokens fit beside the weights into `memory` bytes.

    -1 if not even the weights do.
    """
    left = memory - shape.weight_bytes(dtype)
    return left // shape.kv_bytes(context, dtype) if left >= 0 else -1


def kv_memory_calculator() -> Explorer:
    """Memory of weights and KV cache by model, context, dtype and batch, on four sizes of GPU."""
    contexts = [(f"{2**i:,}", 2**i) for i in range(9, 18)]
    batches = [(str(2**i), 2**i) for i in range(9)]
    controls = {
        "model": choice_slider("Model", list(MODEL_SHAPES), "Qwen3-0.6B", False),
        "context": choice_slider("Context, tokens", contexts, 4096),
        "dtype": choice_slider("dtype", list(CACHE_DTYPES), "bfloat16"),
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
    figure = Figure(figsize=(7.6, 3.6))
    ax = figure.subplots()
    parts: tuple[Any, Any] = (
        {"facecolor": BLUE, "edgecolor": "black", "linewidth": 0.6},
        {
            "facecolor": "#F5C7A9",
            "edgecolor": "black",
            "linewidth": 0.6,
            "hatch": "////",
        },
    )
    for place, gigabytes in enumerate(GPU_GIGABYTES):
        memory = gigabytes * 10**9
        first, second = min(1.0, weights / memory), min(1.0, total / memory)
        ax.barh(place, 1, 0.56, facecolor="white", edgecolor="black")
        ax.barh(place, first, 0.56, **parts[0])
        ax.barh(place, second - first, 0.56, left=first, **parts[1])
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
    ax.set(xlim=(0, 1), xlabel="share of the GPU's memory")
    ax.invert_yaxis()
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, **part) for part in parts]
    names = [
        f"weights {gib(weights)}",
        f"KV cache {batch} x {gib(one)} = {gib(batch * one)}",
    ]
    ax.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    title = f"{model} in {dtype}, {context:,} tokens a request"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    sentence = (
        f"{model} in {dtype}: weights {gib(weights)}; KV cache {gib(one)} for a request of "
        f"{context:,} tokens, {gib(batch * one)} for {batch}; together {gib(total)}. "
        "A GB of a GPU is counted as 10^9 bytes; activations come on top."
    )
    if context > shape.max_position_embeddings:
        sentence += f" The model itself reaches {shape.max_position_embeddings:,} tokens, not {context:,}."
    return figure, sentence


def gib(num_bytes: int) -> str:
    """Bytes in GiB, to three digits."""
    size = num_bytes / 2**30
    digits = 3 if size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{size:,.{digits}f} GiB"


# Sampling

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
        params: penalties, temperature and filters; temperature 0 leaves one token.
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
    if params.temperature == 0:
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
        hatch="////",
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


# Live generation

SURE, UNSURE = 0.5, 0.1
"""From the one up a token is shown plain, below the other underlined twice."""


@dataclass(frozen=True)
class Piece:
    """Text that a token added, and the probability that the model gave it."""

    text: str
    probability: float

    @property
    def colour(self) -> str:
        """White for a token that was certain, orange for one that was not expected at all."""
        share = 1 - self.probability
        orange = (0xF2, 0xA0, 0x3D)
        return "#" + "".join(f"{round(255 - share * (255 - c)):02x}" for c in orange)

    @property
    def num_underlines(self) -> int:
        """0, 1 or 2: what the colour says, without colour."""
        return (self.probability < SURE) + (self.probability < UNSURE)


def split_by_token(
    outputs: Iterator[RequestOutput],
) -> Iterator[tuple[RequestOutput, Piece]]:
    """Each output of a stream with what is new in it.

    A token that ends within a character shows nothing; the next has the whole character.
    """
    length, num_tokens = 0, 0
    for output in outputs:
        sample = output.outputs[0]
        new = [
            logprobs[i].logprob
            for i, logprobs in zip(
                sample.token_ids[num_tokens:],
                (sample.logprobs or [])[num_tokens:],
                strict=True,
            )
        ]
        yield output, Piece(sample.text[length:], math.exp(min(new, default=0.0)))
        length, num_tokens = len(sample.text), len(sample.token_ids)


def html_text(prompt: str, pieces: Sequence[Piece]) -> str:
    """The prompt in grey, then each piece on its colour; the tooltip has the number."""
    decoration = ("none", "underline 1px", "underline double 1px")
    spans = [
        f'<span title="{piece.probability:.1%}" style="background: {piece.colour}; '
        f'text-decoration: {decoration[piece.num_underlines]}; text-underline-offset: 3px">'
        f"{html.escape(piece.text)}</span>"
        for piece in pieces
        if piece.text
    ]
    return (
        '<div class="folo-live" style="background: white; color: black; border: 1px solid #999; '
        "padding: 8px 10px; max-width: 836px; min-height: 7em; line-height: 1.9; "
        'font-size: 14px; white-space: pre-wrap; box-sizing: border-box">'
        f'<span style="color: #555">{html.escape(prompt)}</span>{"".join(spans)}</div>'
    )


LEGEND = (
    "Probability of each token: white and plain from 50 %, underlined below, "
    "underlined twice below 10 %; the less expected, the darker."
)


class LiveGeneration(CourseWidget):
    """Text that grows as the engine makes it, with a button that stops the request.

    The engine runs in a thread of its own, so that the click on Stop finds the kernel free; that
    thread alone touches the engine, and aborts the request between two steps. While it runs,
    leave the engine to it.

    Args:
        engine: with a tokenizer.
        prompt: to begin with.
    """

    def __init__(self, engine: LLMEngine, prompt: str) -> None:
        if engine.tokenizer is None:
            raise ValueError("the engine has no tokenizer, and so no text to show.")
        encode(engine.tokenizer, "prompt", prompt, 1)
        self.name, self.engine = "live_generation", engine
        longest = max(1, min(400, engine.max_model_len // 2))
        self.controls = {
            "prompt": text_field("Prompt", prompt),
            "temperature": float_slider("Temperature", 0, 2, 0.05, 0.8),
            "seed": int_slider("Seed", 0, 99, 0),
            "max_tokens": int_slider("Most tokens", 1, longest, min(120, longest)),
            "pace": int_slider("Tokens/s at most", 2, 200, 20),
            "generate": widgets.Button(description="Generate", icon="play"),
            "stop": widgets.Button(description="Stop", icon="stop"),
        }
        self.text = widgets.HTML(html_text(prompt, []))
        self.status = widgets.HTML(paragraph("Press Generate. Stop ends the request."))
        self.controls["generate"].on_click(lambda button: self.generate())
        self.controls["stop"].on_click(lambda button: self.stop())
        *settings, start, stop = self.controls.values()
        legend = widgets.HTML(paragraph(LEGEND))
        self.box = stack(
            [row(settings), row([start, stop]), self.text, self.status, legend]
        )
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._example: list[Piece] | None = None
        self._example_prompt = ""

    @property
    def is_running(self) -> bool:
        """Whether text is being made."""
        return self._thread is not None and self._thread.is_alive()

    def generate(self) -> None:
        """Starts a generation and returns at once; while one runs, does nothing."""
        if self.is_running:
            return
        if self.engine.has_unfinished_requests():
            self.status.value = paragraph(
                "The engine is busy with other requests: wait for them."
            )
            return
        self._stopping.clear()
        self.status.value = paragraph("Generating.")
        self._thread = threading.Thread(
            target=self._run, daemon=True, name="live_generation"
        )
        self._thread.start()

    def stop(self) -> None:
        """Aborts the request that runs, if any; returns at once."""
        self._stopping.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the generation has ended; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.is_running

    def picture(self) -> bytes:
        """A generation of the prompt as it was at first, run to its end."""
        if self._example is None:
            if self.is_running or self.engine.has_unfinished_requests():
                raise RuntimeError(
                    "the engine is busy: show the widget when it is free."
                )
            self._example_prompt = read_control(self.controls["prompt"])
            stream = self.engine.stream(self._example_prompt, self._params())
            self._example = [piece for _, piece in split_by_token(stream)]
        with _drawing, mpl.rc_context(STYLE):
            return to_png(generation_figure(self._example_prompt, self._example))

    def alt_text(self) -> str:
        text = "".join(piece.text for piece in self._example or [])
        return f"{LEGEND} The text: {self._example_prompt}{text}"

    def _params(self) -> SamplingParams:
        names = ("temperature", "seed", "max_tokens")
        return SamplingParams(logprobs=0, **{n: self.controls[n].value for n in names})

    def _run(self) -> None:
        try:
            self._follow(read_control(self.controls["prompt"]))
        except Exception as error:  # a thread has nobody else to tell
            self.status.value = paragraph(f"Not generated: {error}")

    def _follow(self, prompt: str) -> None:
        """Streams a request to its end, or aborts it."""
        self.text.value = html_text(prompt, [])
        pieces: list[Piece] = []
        started, shown = time.perf_counter(), 0.0
        for output, piece in split_by_token(self.engine.stream(prompt, self._params())):
            pieces.append(piece)
            now = time.perf_counter()
            if now - shown > 0.1 or output.finished:  # the whole text travels each time
                self.text.value, shown = html_text(prompt, pieces), now
            if output.finished:
                self.status.value = paragraph(self._summary(output, now - started))
            else:
                due = started + len(pieces) / self.controls["pace"].value
                if self._stopping.wait(max(0.0, due - now)):
                    self.engine.abort_request(output.request_id)

    def _summary(self, output: RequestOutput, seconds: float) -> str:
        sample = output.outputs[0]
        ends = {
            "abort": "Stopped",
            "stop": "Finished",
            "length": "At its limit",
            "error": f"Failed ({output.error})",
        }
        count = len(sample.token_ids)
        text = (
            f"{ends[sample.finish_reason or 'error']}: finish_reason is "
            f"\u201c{sample.finish_reason}\u201d, {count} tokens in {seconds:.1f} s."
        )
        allocator = getattr(self.engine.scheduler, "allocator", None)
        if allocator is not None:
            free, all_blocks = allocator.num_free_blocks, allocator.num_blocks
            text += f" Cache blocks free: {free} of {all_blocks}."
        return text


def live_generation(engine: LLMEngine, prompt: str) -> LiveGeneration:
    """Streamed text, each token coloured by its probability, with Generate and Stop.

    Args:
        engine: with a tokenizer; leave it alone while the widget generates.
        prompt: to begin with.

    Raises:
        TypeError: if `prompt` is not text.
        ValueError: if it is empty, or the engine has no tokenizer.
    """
    return LiveGeneration(engine, prompt)


FONT, FONT_SIZE = "DejaVu Sans Mono", 10


def lay_out(pieces: Sequence[Piece], width: int) -> Iterator[tuple[int, int, Piece]]:
    """Line, column and text of what fits on lines of `width` characters."""
    line = column = 0
    for piece in pieces:
        text = piece.text
        if column and column + len(text) > width:  # a token is not torn apart
            line, column, text = line + 1, 0, text.lstrip(" ")
        for number, rest in enumerate(text.split("\n")):
            part = rest
            if number:
                line, column = line + 1, 0
            while part:
                if column >= width:
                    line, column = line + 1, 0
                chunk, part = part[: width - column], part[width - column :]
                yield line, column, Piece(chunk, piece.probability)
                column += len(chunk)


def generation_figure(prompt: str, pieces: Sequence[Piece]) -> Figure:
    """The text of a finished generation, as the widget colours it."""
    advance, pitch, margin = 0.602 * FONT_SIZE / 72, 0.27, 0.15  # inches
    width = 7.6
    words = [Piece(word, 1.0) for word in split_words(prompt)]
    places = list(lay_out([*words, *pieces], int((width - 2 * margin) / advance)))
    num_prompt = len(list(lay_out(words, int((width - 2 * margin) / advance))))
    num_lines = max((line for line, _, _ in places), default=0) + 1
    height = (num_lines + 1.6) * pitch + 2 * margin
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")

    def put(x: float, y: float, piece: Piece, colour: str = "black") -> None:
        span = len(piece.text) * advance
        ax.add_patch(Rectangle((x, y), span, pitch * 0.8, color=piece.colour, lw=0))
        ax.text(
            x,
            y + pitch * 0.6,
            drawable(piece.text, FONT),
            family=FONT,
            fontsize=FONT_SIZE,
            color=colour,
        )
        for i in range(piece.num_underlines):
            low = y + pitch * (0.7 + 0.09 * i)
            ax.plot([x, x + span], [low, low], color="black", linewidth=0.8)

    for number, (line, column, piece) in enumerate(places):
        colour = "#555555" if number < num_prompt else "black"
        put(margin + column * advance, margin + line * pitch, piece, colour)
    x, y = margin, margin + (num_lines + 0.6) * pitch
    for text, probability in (
        ("from 50 %", 0.75),
        ("10 to 50 %", 0.3),
        ("below 10 %", 0.05),
    ):
        put(x, y, Piece(text, probability))
        x += (len(text) + 3) * advance
    ax.text(x, y + pitch * 0.6, "probability that the model gave the token", fontsize=9)
    return figure


def split_words(text: str) -> list[str]:
    """The text in pieces that end before a space, so that lines break there."""
    words = text.split(" ")
    return [words[0], *(" " + word for word in words[1:])]
