"""Figures of page 13: splits of a context, tiles that a prefill reads, and speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from folo_lib.course.figures import (
    CACHE,
    DECODE,
    KEYS,
    OTHER,
    US,
    Look,
    draw_box,
    ink_on,
)
from folo_lib.course.moving import MovingFigure, Piece, State

__all__ = ["draw_gather", "draw_rounds", "draw_speeds", "draw_tiles", "move_splits"]

MASKED = "#D8EEFA"  # keys that not every query sees
READ = Look("#E0E0E0", "..", "s", ":")  # a tile that has been read


def draw_gather(
    ax: Axes, words: Sequence[str], blocks: Sequence[int], num_blocks: int, tile: int
) -> None:
    """Tiles of a sequence, and the slots of the cache that their tokens come from.

    Args:
        ax: where to draw.
        words: of the sequence, one for each token; whole blocks of them.
        blocks: of the sequence, in its order.
        num_blocks: of the cache.
        tile: tokens of a tile.
    """
    size, gap = len(words) // len(blocks), 0.6
    for block in range(num_blocks):
        left = block * (size + gap)
        own = blocks.index(block) if block in blocks else None
        for slot in range(size):
            look = {"edgecolor": "0.8"} if own is None else CACHE.bar
            draw_box(ax, (left + slot, 0), (1, 1.6), **look)
        ax.text(left + size / 2, -0.2, f"block {block}", ha="center", fontsize=8)
    for i, word in enumerate(words):
        block, slot = blocks[i // size], i % size
        x, y = block * (size + gap) + slot + 0.5, 0.8
        left = 8 + i + (i // tile) * 2.5
        draw_box(ax, (left, 3.6), (1, 1.6), **KEYS.bar)
        for place in ((x, y), (left + 0.5, 4.4)):
            ground = {
                "facecolor": "white",
                "edgecolor": "none",
                "pad": 0.5,
                "alpha": 0.8,
            }
            style: dict[str, Any] = {"rotation": 90, "fontsize": 7, "bbox": ground}
            ax.text(*place, word.strip(), ha="center", va="center", **style)
        ax.plot([x, left + 0.5], [1.6, 3.6], color="0.5", lw=0.8, linestyle="-")
    for first in range(0, len(words), tile):
        left, count = 8 + first + (first // tile) * 2.5, min(tile, len(words) - first)
        name = f"tile {first // tile}"
        ax.text(left + count / 2, 5.7, name, ha="center", va="center", fontsize=8)
    ax.set(xlim=(-0.2, num_blocks * (size + gap)), ylim=(6, -0.9))
    ax.axis("off")


def draw_rounds(ax: Axes, programs: Mapping[str, int], places: int) -> None:
    """Programs in rounds of as many as run at once; what is left of a round is empty.

    Args:
        ax: where to draw.
        programs: how many, by a name.
        places: how many run at once.
    """
    gap = places * 0.06
    for row, (name, count) in enumerate(programs.items()):
        for first in range(0, count, places):
            left, full = first // places * (places + gap), min(places, count - first)
            draw_box(ax, (left, row), (places, 0.7))
            draw_box(ax, (left, row), (full, 0.7), f"{full}", 9, **DECODE.bar)
        ax.text(-gap, row + 0.35, name, ha="right", va="center", fontsize=9)
    rounds = -(-max(programs.values()) // places)
    for i in range(rounds):
        middle = i * (places + gap) + places / 2
        ax.text(middle, -0.2, f"round {i + 1}", ha="center", fontsize=9)
    ax.set(xlim=(-places, rounds * (places + gap)), ylim=(len(programs), -0.5))
    ax.axis("off")


def move_splits(num_tiles: int, num_splits: int) -> MovingFigure:
    """Programs that read their shares of a context at the same time, and a merge.

    Args:
        num_tiles: of the context; split evenly.
        num_splits: programs; `num_tiles` is a multiple.
    """
    share = num_tiles // num_splits
    width = 1.6 * num_tiles

    def tiles(read: int, reading: bool) -> list[Piece]:
        pieces = []
        for i in range(num_tiles):
            split, place = divmod(i, share)
            text = f"tile {i}"
            if reading and place == read:  # handed to its program
                x = 1.6 * (split * share + (share - 1) / 2)
                pieces.append(Piece(text, x, 1.0, 1.5, 0.7, text, KEYS))
            else:
                look = READ if place < read else CACHE
                pieces.append(Piece(text, 1.6 * i, 0, 1.5, 0.7, text, look))
        return pieces

    def programs(read: int, y: float = 1.9) -> list[Piece]:
        pieces = []
        for split in range(num_splits):
            x = 1.6 * split * share + (1.6 * share - 3) / 2
            text = f"split {split}: {read} of {share}"
            pieces.append(Piece(f"split {split}", x, y, 2.9, 0.7, text, DECODE))
        return pieces

    says = f"{num_tiles} tiles of keys and values lie in the cache."
    states = [State([*tiles(0, False), *programs(0)], says)]
    for read in range(share):
        says = f"Every program has its tile number {read + 1}, all at the same time."
        states.append(State([*tiles(read, True), *programs(read)], says))
        says = "Maximum, sum and output are brought up to date."
        states.append(State([*tiles(read + 1, False), *programs(read + 1)], says))
    says = "Each split has an answer, and the logarithm of the weight behind it."
    states.append(State([*tiles(share, False), *programs(share, 2.1)], says))
    answer = Piece("answer", width / 2 - 1.75, 3.2, 3.4, 0.7, "merged answer", US)
    says = "The answers are merged, each with its own weight."
    states.append(State([*tiles(share, False), *programs(share, 2.1), answer], says))
    return MovingFigure(states, (width, 4.0), pictured=-1)


def draw_tiles(ax: Axes, query_len: int, cached: int, rows: int, tile: int) -> None:
    """Which tiles of keys the programs of one sequence read, and which need a mask.

    Args:
        ax: where to draw.
        query_len: tokens that run.
        cached: tokens before them.
        rows: queries of a program.
        tile: keys of a tile.
    """
    seq_len = cached + query_len
    for top in range(0, query_len, rows):
        height = min(rows, query_len - top)
        for left in range(0, seq_len, tile):
            width = min(tile, seq_len - left)
            first, last = cached + top, cached + top + height - 1
            look: dict[str, Any] = {"edgecolor": "0.8"}
            if left + tile - 1 <= first:
                look = KEYS.bar
            elif left <= last:
                look = KEYS.bar | {"facecolor": MASKED}
            draw_box(ax, (left, top), (width, height), **look)
    ends = [cached + row + 1 for row in range(query_len)]  # of what each query sees
    edges = [x for end in ends for x in (end, end)]
    steps = [y for row in range(query_len) for y in (row, row + 1)]
    ax.plot(edges, steps, "k-", lw=1.5)
    ax.set(xlim=(0, seq_len), ylim=(query_len, 0), xlabel="key", ylabel="query")
    ax.set_title(f"{query_len} tokens after {cached}", fontsize=9)
    ax.grid(False)


def draw_speeds(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Our decode kernels and PyTorch's backend, in percent of the speed of memory.

    Args:
        ax: where to draw.
        rows: of the recording; with `shape`, and `floor_us`, `us` and `torch_sdpa_us`.
    """
    parts = (("us", "ours", US, -0.2), ("torch_sdpa_us", "PyTorch", OTHER, 0.2))
    for place, row in enumerate(rows):
        for key, name, look, shift in parts:
            share = 100 * row["floor_us"] / row[key]
            ax.barh(place + shift, share, height=0.36, **look.bar)
            text = f"{share:.0f} %" if share > 1 else "less than 1 %"
            text = f"{name}, {text}" if place == 0 else text
            where = {"x": share + 1, "ha": "left"}
            if share > 60:  # inside, clear of the line at 100
                where = {"x": share - 1, "ha": "right", "color": ink_on(look.colour)}
            ax.text(y=place + shift, s=text, va="center", fontsize=8, **where)
    names = [r["shape"].replace("x", " × ").replace("..", " to ") for r in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.axvline(100, color="black", linestyle="--")
    ax.set_xlim(0, 103)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
