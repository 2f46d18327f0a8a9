"""Figures of page 04: a decoder layer with its shapes, and where the parameters are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from folo_lib.course.figures import GREY, KEYS, QUERIES, US, VALUES, draw_box

__all__ = ["draw_decoder_layer", "draw_parameters"]

BOXES = [  # row, first column, last column, name, what its output is called in shapes
    (1, 0, 3, "input_layernorm", "input_layernorm"),
    (2, 1, 3, "qkv_proj", "qkv_proj"),
    (3, 1, 2, "q_norm and k_norm, head by head", ""),
    (4, 1, 2, "RoPE", ""),
    (5, 1, 3, "attention", "into o_proj"),
    (6, 1, 3, "o_proj", "o_proj"),
    (7, 0, 3, "post_attention_layernorm", "post_attention_layernorm"),
    (8, 1, 3, "gate_up_proj", "gate_up_proj"),
    (9, 1, 3, "act_fn", "act_fn"),
    (10, 1, 3, "down_proj", "down_proj"),
]
LEFT, RIGHT = [0.0, 1.3, 3.5, 5.7], [1.0, 3.3, 5.5, 7.7]  # of the columns
FLOWS = [(1, QUERIES, "queries"), (2, KEYS, "keys"), (3, VALUES, "values")]
GROUPS = {"attention": "qkvo", "MLP": ("gate", "up", "down")}


def draw_decoder_layer(ax: Axes, shapes: Mapping[str, Sequence[int]]) -> None:
    """The parts of a layer from top to bottom, beside the residual stream.

    Args:
        ax: where to draw.
        shapes: what comes out of each module, by its name, and what goes `into o_proj`.
    """
    middle = [(a + b) / 2 for a, b in zip(LEFT, RIGHT, strict=True)]
    under: dict[str, Any] = {"linestyle": "-", "zorder": 0}
    ax.plot([0.5, 0.5], [0.3, 11.3], color=US.colour, linewidth=6, **under)
    ax.plot([middle[2]] * 2, [0.3, 11.3], color="black", linewidth=1, **under)
    for column, look, what in FLOWS:
        ax.plot([middle[column]] * 2, [2, 5], color=look.colour, linewidth=5, **under)
        ax.text(middle[column] + 0.12, 2.5, what, va="center", fontsize=9)
    for y, what in [(0.45, "the MLP before"), (11.2, "this MLP")]:
        ax.text(0.65, y, "residual", va="center")
        ax.text(4.6, y, f"hidden_states: what {what} adds", va="center")
    for row, first, last, name, key in BOXES:
        fill = "0.8" if name.endswith("_proj") else "white"
        size = (RIGHT[last] - LEFT[first], 0.6)
        text = f"{name}  {list(shapes[key])}" if key else name
        draw_box(ax, (LEFT[first], row - 0.3), size, text, 9, facecolor=fill)
    for row in (1, 7):  # the two fused additions
        ax.plot(0.5, row, "o", color="black", markerfacecolor="white", markersize=13)
        ax.plot(0.5, row, "k+", markersize=9)
    ax.set(xlim=(-0.1, 7.8), ylim=(11.6, 0))
    ax.axis("off")


def draw_parameters(ax: Axes, counts: Mapping[str, int]) -> None:
    """A bar for each kind of parameter, and the sums of attention and MLP.

    Args:
        ax: where to draw.
        counts: numbers by the name of their module, in the order of the bars.
    """
    looks = {"q": QUERIES.bar, "k": KEYS.bar, "v": VALUES.bar}
    for part, count in counts.items():
        fill = "0.8" if part == "embed_tokens" else "white"
        plain = {"facecolor": fill, "edgecolor": "black", "linewidth": 0.8}
        look = looks.get(part.removesuffix("_proj"), plain)
        bar = ax.barh(part, count / 1e6, **look)
        ax.bar_label(bar, fmt="%.1f", padding=4)
    places = {part: place for place, part in enumerate(counts)}
    for name, parts in GROUPS.items():
        members = [f"{part}_proj" for part in parts]
        first = min(places[part] for part in members)
        last = max(places[part] for part in members)
        total = sum(counts[part] for part in members) / 1e6
        ax.plot([120, 120], [first - 0.3, last + 0.3], color=GREY, linestyle="-")
        ax.text(123, (first + last) / 2, f"{name}: {total:.0f}", va="center")
    ax.set(xlabel="million parameters, in all layers together", xlim=(0, 180))
    ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
