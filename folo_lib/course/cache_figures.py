"""Figures of page 06: three ways of remembering, slots of a sequence, and who owns which block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folo_lib.course.figures import CACHE, KEYS, PALE_ORANGE, draw_box

__all__ = ["draw_pool", "draw_slots", "draw_ways"]

MARKS: dict[str, dict[str, Any]] = {
    "computed": KEYS.bar,
    "copied": {"facecolor": PALE_ORANGE, "text": "c"},
    "left alone": CACHE.bar,
    "reserved": {"facecolor": "white", "edgecolor": "0.5", "linestyle": ":"},
}
WAYS = {  # what happens to the tokens before, and what is there for those to come
    "recompute all": ("computed", None),
    "growing": ("copied", None),
    "slots": ("left alone", "reserved"),
}


def draw_ways(axes: Sequence[Axes], num_steps: int) -> None:
    """What three ways of remembering do in steps of one token, with a legend below.

    Args:
        axes: three of one figure.
        num_steps: steps, and tokens at the end.
    """
    for ax, (name, (before, ahead)) in zip(axes, WAYS.items(), strict=True):
        counts = dict.fromkeys(("computed", "copied"), 0)
        for step in range(num_steps):
            for token in range(num_steps):
                later = ahead if token > step else before
                what = "computed" if token == step else later
                if what:
                    draw_box(ax, (token, step), **MARKS[what])
                if what in counts:
                    counts[what] += 1
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        ax.set(title=f"{name}\n{said}", aspect="equal", xlabel="token", xticks=[])
        ends = -0.1, num_steps + 0.1
        ax.set(xlim=ends, ylim=ends[::-1], yticks=[])
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("step")
    handles, names = [], []
    for name, mark in MARKS.items():
        style = {key: value for key, value in mark.items() if key != "text"}
        handles.append(Rectangle((0, 0), 1, 1, **style))
        names.append(f"{name} ({mark['text']})" if "text" in mark else name)
    figure = axes[0].get_figure()
    assert figure is not None
    figure.legend(handles, names, loc="outside lower center", ncols=4)


def draw_slots(
    ax: Axes, slots: Sequence[int], num_blocks: int, block_size: int
) -> None:
    """A row of slots in blocks, and which token of one sequence lies in each.

    Args:
        ax: where to draw.
        slots: of the sequence's tokens, in their order.
        num_blocks: in the cache.
        block_size: slots in a block.
    """
    filled = {slot: token for token, slot in enumerate(slots)}
    size = num_blocks * block_size
    for slot in range(size):
        look = CACHE.bar if slot in filled else {"edgecolor": "0.7"}
        draw_box(ax, (slot, 0), text=filled.get(slot, ""), **look)
        ax.text(slot + 0.5, -0.15, str(slot), ha="center", va="top", fontsize=8)
    for block in range(num_blocks):
        left = block_size * block
        draw_box(ax, (left, 0), (block_size, 1), facecolor="none", linewidth=1.8)
        ax.text(left + block_size / 2, 1.12, f"block {block}", ha="center")
    ax.set(xlim=(-0.1, size + 0.1), ylim=(-0.6, 1.5))
    ax.axis("off")


def draw_pool(
    ax: Axes,
    owned: Mapping[str, Sequence[int]],
    tokens: Mapping[str, int],
    num_blocks: int,
    block_size: int,
) -> None:
    """Who has which blocks, how far they are filled, and how long the free runs are.

    Args:
        ax: where to draw.
        owned: blocks by name, in a row each.
        tokens: how many each has.
        num_blocks: in the cache.
        block_size: slots in a block.
    """
    for block in range(num_blocks):
        draw_box(ax, (block, 0))
    for name, blocks in owned.items():
        first, used = blocks[0], tokens[name] / block_size
        draw_box(ax, (first, 0), (len(blocks), 1), facecolor="0.85")  # reserved
        draw_box(ax, (first, 0), (used, 1), **CACHE.bar)
        ax.text(first + 0.05, 1.12, f"{name}: {tokens[name]} tokens")
    for block in range(num_blocks):
        draw_box(ax, (block, 0), facecolor="none")
    taken = {block for blocks in owned.values() for block in blocks}
    run = 0
    for block in range(num_blocks + 1):
        if block < num_blocks and block not in taken:
            run += 1
        elif run:
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            place, text = block - run / 2, f"{run} free"
            ax.text(place, 0.5, text, ha="center", va="center", bbox=ground)
            run = 0
    ax.set(xlim=(-2, num_blocks + 0.1), ylim=(-0.05, 1.6), yticks=[])
    places = [block + 0.5 for block in range(num_blocks)]
    ax.set_xticks(places, [str(block) for block in range(num_blocks)])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.grid(False)
