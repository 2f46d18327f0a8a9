"""A pair of dimensions as it turns, and the score against the distance."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from folo_lib.course.figures import BLUE, GREY, ORANGE
from folo_lib.course.widgets.base import Explorer, int_slider
from folo_lib.rope import apply_rotary_emb, compute_cos_sin, compute_inv_freq


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
    cos, sin = compute_cos_sin(positions, inv_freq)  # [distances, 1, D]
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
