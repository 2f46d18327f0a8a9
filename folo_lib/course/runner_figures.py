"""Figures of page 08: the layers of an engine, rows that stay, and a step end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.axes import Axes

from folo_lib.course.figures import (
    CACHE,
    DECODE,
    HOST,
    PREFILL,
    draw_arrow,
    draw_box,
)
from folo_lib.runner import StepLayout

__all__ = ["draw_layers", "draw_line", "draw_rows"]

LAYERS = {
    "Engine": "requests and text: who runs next, what is shown",
    "Executor": "which devices take part",
    "Worker": "one device: its model, its memory",
    "Runner": "one step: tensors, logits, the next tokens",
}


def draw_layers(ax: Axes, there: int, back: int, logits: int) -> None:
    """The layers from the engine to the runner, and what a step sends between them.

    Args:
        ax: where to draw.
        there: bytes of a plan.
        back: bytes of what comes of it.
        logits: bytes of the logits, which stay.
    """
    for y, (name, task) in zip((3.6, 2, 1, 0), LAYERS.items(), strict=True):
        colour = HOST.colour if name == "Engine" else "white"
        draw_box(ax, (0, y), (5.5, 0.75), facecolor=colour)
        ax.text(0.15, y + 0.36, name, va="center", weight="bold")
        ax.text(1.2, y + 0.36, task, va="center")
    for x, begin, end, label in (
        (5.8, 3.9, 0.4, f"a plan:\n{there:,} bytes"),
        (7.1, 0.4, 3.9, f"tokens:\n{back:,} bytes"),
    ):
        draw_arrow(ax, (x, begin), (x, end), lw=1.5)
        ax.text(x + 0.1, 2.2, label, va="center")
    ax.axhline(3.15, color=".4", linestyle="--")
    ax.text(0, 3.24, "only plain data crosses this line", style="italic")
    ax.text(5.65, -0.02, f"logits: {logits:,} bytes\nstay here", va="center")
    ax.set(xlim=(-0.05, 8.2), ylim=(-0.3, 4.4))
    ax.axis("off")


def draw_rows(
    ax: Axes, owners: Sequence[Mapping[int, str]], running: Sequence[str]
) -> None:
    """Who has which row in each step: filled where it runs, white where it sits out.

    Args:
        ax: where to draw.
        owners: by step, the name at each row that is taken.
        running: by step, the names of those that run, a letter each.
    """
    num_rows = 1 + max(row for owner in owners for row in owner)
    for x, (owner, names) in enumerate(zip(owners, running, strict=True)):
        for row, name in owner.items():
            white = {"facecolor": "white", "edgecolor": "black"}
            look = DECODE.bar if name in names else white
            draw_box(ax, (x, num_rows - 0.9 - row), (0.95, 0.9), name, **look)
    for row in range(num_rows):
        ax.text(-0.1, num_rows - 0.5 - row, f"row {row}", ha="right", va="center")
    size = len(owners)
    ax.set(xlim=(-0.7, size), ylim=(0, num_rows + 0.1), xlabel="step", yticks=[])
    ax.set_xticks([x + 0.5 for x in range(size)], [str(n + 1) for n in range(size)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(False)


def draw_line(
    ax: Axes, below: Axes, step: StepLayout, cached: str, block_size: int
) -> None:
    """A step end to end, and the cache in which its tokens land.

    Args:
        ax: for the step.
        below: for the cache.
        step: of requests called A, B, ...; those of one token decode.
        cached: whose token lies in each slot before the step, " " for nobody's.
        block_size: slots in a block.
    """
    starts = list(accumulate(step.query_lens, initial=0))
    names = "ABCDEFGH"[: len(step.query_lens)]
    lengths = list(zip(names, step.query_lens, strict=True))
    owner = "".join(name * n for name, n in lengths)
    looks = {name: (DECODE if n == 1 else PREFILL).bar for name, n in lengths}
    ids = [
        "?" if i in step.pending else token for i, token in enumerate(step.input_ids)
    ]
    labelled: list[tuple[str, Sequence[object]]] = [
        ("slot", step.slots),
        ("position", step.positions),
        ("token", ids),
        ("request", owner),
    ]
    for y, (label, values) in enumerate(labelled):
        for x, value in enumerate(values):
            look = looks[owner[x]] if label == "request" else {}
            draw_box(ax, (x, y), text=value, **look)
        ax.text(-0.2, y + 0.5, label, ha="right", va="center")
    for start in starts:
        ax.plot([start, start], [-0.1, 4.1], "k-", lw=3)
    for end in step.ends:
        ax.text(end + 0.5, -0.5, f"▲ {end}", ha="center", va="center")
    ax.text(-0.2, -0.5, "draws at", ha="right", va="center")
    landed = dict(zip(step.slots, owner, strict=True))
    for slot, name in enumerate(cached):
        old = CACHE.bar if name != " " else {}
        look = looks[landed[slot]] if slot in landed else old
        draw_box(below, (slot, 0), text=landed.get(slot, name), **look)
    for label, height in [("cache", 0.5), ("slot", 1.3)]:
        below.text(-0.2, height, label, ha="right", va="center")
    for first in range(0, len(cached) + 1, block_size):
        below.plot([first] * 2, [0, 1.4], "k-", lw=2)
        below.text(first + 0.1, 1.15, str(first) if first < len(cached) else "", size=9)
    for axes, width, low, high in [
        (ax, len(owner), -0.9, 4.2),
        (below, len(cached), -0.1, 1.7),
    ]:
        axes.set(xlim=(-0.16 * width, width + 0.1), ylim=(low, high))
        axes.axis("off")
