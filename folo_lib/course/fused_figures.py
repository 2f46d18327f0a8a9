"""Figures of page 15: what a warp loads, kernels that overlap, and what a step is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes

from folo_lib.course.figures import (
    CACHE,
    OTHER,
    US,
    Look,
    draw_box,
    draw_row,
)

__all__ = ["draw_fragment", "draw_overlap", "draw_shares", "draw_step_times"]

Bar = Sequence[Any]  # a kernel: its name, and when it starts and ends, in µs
PALE, LIGHT, DARK, DEEP = "#F2F0F7", "#CBC9E2", "#9E9AC8", "#6A51A3"
THREADS = PALE, LIGHT, DARK, DEEP  # the four that share a row
NOT_READING: dict[str, Any] = {"facecolor": "white", "edgecolor": "black"}
NOT_READING |= {"hatch": "//", "linewidth": 0.8}
KERNELS = {
    "qkv": Look(PALE, "", "o", "-"),
    "attention": CACHE,
    "output": Look(LIGHT, "", "s", "--"),
    "gate_up": Look(DARK, "", "^", "-."),
    "down": Look(DEEP, "", "D", ":"),
}


def draw_fragment(ax: Axes, order: Sequence[int]) -> None:
    """Eight rows of 32 columns that a warp loads, and the order of the product below.

    Args:
        ax: where to draw.
        order: the 32 columns as the product takes them; thread `c` of the four that
            share a row has loaded columns `8 * c` to `8 * c + 7`.
    """
    for row in range(8):
        for c, colour in enumerate(THREADS):
            text = f"thread {4 * row + c}"
            draw_box(ax, (8 * c, 10 - row), (8, 1), text, 8, facecolor=colour)
    colours = [THREADS[column // 8] for column in order]
    draw_row(ax, (0, 0.2), order, colours, fontsize=8)
    ax.text(0, 11.2, "loaded: eight neighbours of 2 bytes for each thread", fontsize=9)
    ax.text(0, 1.5, "row 0, in the order of the product: two by two", fontsize=9)
    ax.set(xlim=(-0.2, 32.2), ylim=(0, 12))
    ax.axis("off")


def draw_overlap(ax: Axes, traces: Mapping[str, Sequence[Bar]]) -> None:
    """Rows of kernels on one clock; what overlaps lies in lanes below one another.

    Where kernels overlap each has its name in it, elsewhere each name stands once.

    Args:
        ax: where to draw.
        traces: the kernels of each row by its name, in the order of their start; called
            as in the module.
    """
    top, middles = 0.0, []
    for bars in traces.values():
        begin, name, names = bars[0][1], "", set()
        overlaps = any(after[1] < before[2] for before, after in pairwise(bars))
        lanes: list[float] = []  # when the last kernel of each has ended
        for i, (kernel, start, end) in enumerate(bars):
            adds = "output" if name == "attention" else "down"  # one kernel does both
            name = kernel.removesuffix("_kernel").replace("residual", adds)
            free = (lane for lane, busy in enumerate(lanes) if busy <= start)
            lane = next(free, len(lanes))
            lanes[lane:] = [end, *lanes[lane + 1 :]]
            corner = start - begin, top + lane
            look = KERNELS.get(name, OTHER)
            text = name if overlaps else ""
            draw_box(ax, corner, (end - start, 0.9), text, 8, **look.bar)
            if not overlaps and name not in names:  # labelled where it is seen first
                names.add(name)
                x, above = corner[0] + (end - start) / 2, i % 2 == 0
                y = corner[1] - 0.1 if above else corner[1] + 1.0
                va = "bottom" if above else "top"
                ax.text(x, y, name, ha="center", va=va, fontsize=8)
        middles.append(top + (len(lanes) - 0.1) / 2)
        last = max(lanes)
        end, y = last - begin, top + lanes.index(last) + 0.45  # beside the last bar
        ax.text(end, y, f" {end:.1f} µs", va="center", fontsize=9)
        top += len(lanes) + 0.9
    ax.set_yticks(middles, list(traces))
    longest = max(bars[-1][2] - bars[0][1] for bars in traces.values())
    ax.set(xlim=(0, 1.12 * longest), ylim=(top - 0.7, -0.6))
    ax.grid(axis="y", visible=False)


def draw_shares(
    ax: Axes, kernels: Sequence[Mapping[str, Any]], tb_per_s: float
) -> None:
    """How much longer a step is for each kernel, and how much of that is reading.

    Args:
        ax: where to draw.
        kernels: of the recording; with `kernel`, `bytes` and `us`, of all layers.
        tb_per_s: the speed of memory.
    """
    longest = max(row["us"] for row in kernels)
    for place, row in enumerate(kernels):
        reads = min(row["bytes"] / tb_per_s / 1e6, row["us"])
        ax.barh(place, reads, height=0.7, **US.bar)
        rest = row["us"] - reads
        ax.barh(place, rest, left=reads, height=0.7, **NOT_READING)
        ax.text(row["us"] + longest / 100, place, f"{row['us']:.0f} µs", va="center")
    ax.set_yticks(range(len(kernels)), [row["kernel"] for row in kernels])
    ax.set_xlim(0, 1.15 * longest)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def draw_step_times(
    ax: Axes,
    steps: Sequence[Mapping[str, Any]],
    floor: Mapping[str, float],
    by: str,
    token_bytes: int,
) -> None:
    """Times of steps, and what reading weights and cache would take.

    Args:
        ax: where to draw.
        steps: of the recording; with `num_seqs`, `context` and `us`.
        floor: `us` of the weights, and the speed of memory in `tb_per_s`.
        by: "num_seqs" or "context", what differs between the steps.
        token_bytes: of keys and values, of one token in all layers.
    """
    longest = max(step["us"] for step in steps)
    for place, step in enumerate(steps):
        cached = step["num_seqs"] * step["context"] * token_bytes
        least = floor["us"] + cached / floor["tb_per_s"] / 1e6
        ax.bar(place, floor["us"], width=0.75, **US.bar)
        ax.bar(place, least - floor["us"], bottom=floor["us"], width=0.75, **CACHE.bar)
        rest = max(step["us"] - least, 0)
        ax.bar(place, rest, bottom=least, width=0.75, **NOT_READING)
        text = f"{step['us']:,.0f}\n{step['us'] / least:.1f} ×"
        ax.text(place, step["us"] + longest / 50, text, ha="center", fontsize=8)
    ax.set_xticks(range(len(steps)), [f"{step[by]:,}" for step in steps])
    ax.set_ylim(0, 1.2 * longest)
    ax.grid(axis="x", visible=False)
