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
    draw_arrow,
    draw_box,
    ink_on,
)
from folo_lib.course.moving import MovingFigure, Piece, State

__all__ = [
    "draw_gather",
    "draw_gpu",
    "draw_programs",
    "draw_rounds",
    "draw_speeds",
    "draw_tiles",
    "move_splits",
]

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

    def find_left(token: int) -> float:
        return 8 + token + (token // tile) * 2.5

    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    style: dict[str, Any] = {"rotation": 90, "fontsize": 7, "bbox": ground}
    for i, word in enumerate(words):
        block, slot = blocks[i // size], i % size
        draw_box(ax, (find_left(i), 4.2), (1, 1.6), **KEYS.bar)
        places = (block * (size + gap) + slot + 0.5, 0.8), (find_left(i) + 0.5, 5)
        for x, y in places:
            ax.text(x, y, word.strip(), ha="center", va="center", **style)
    for i, block in enumerate(blocks):
        left = find_left(i * size)
        draw_box(ax, (left, 3.1), (size, 0.9), f"{block}", 9)
        ends = block * (size + gap) + size / 2, left + size / 2
        ax.plot(ends, [1.6, 3.1], color="0.4", lw=1, linestyle="-")
    ax.text(
        find_left(0) - 0.4, 3.55, "block table", ha="right", va="center", fontsize=8
    )
    for first in range(0, len(words), tile):
        count = min(tile, len(words) - first)
        name = f"tile {first // tile}"
        middle = find_left(first) + count / 2
        ax.text(middle, 6.2, name, ha="center", va="center", fontsize=8)
    ax.set(xlim=(-0.2, num_blocks * (size + gap)), ylim=(6.5, -0.9))
    ax.axis("off")


def draw_programs(ax: Axes, programs: Sequence[Sequence[int]], num_heads: int) -> None:
    """The programs of a decode step: a row for each key head, a box for each program.

    Args:
        ax: where to draw.
        programs: rows of an `AttentionPlan`.
        num_heads: key heads.
    """
    for i, (sequence, _, begin, end, splits, _) in enumerate(programs):
        ax.text(3.2 * i + 1.5, -0.2, f"program {i}", ha="center", fontsize=9)
        for head in range(num_heads):
            corner, size = (3.2 * i, 1.1 * head), (3, 1)
            if sequence < 0:
                draw_box(ax, corner, size, "ends at once", 8, edgecolor="0.7")
                continue
            look = KEYS if splits == 1 else DECODE
            text = f"sequence {sequence}\n{begin} to {end}"
            draw_box(ax, corner, size, text, 8, **look.bar)
    for head in range(num_heads):
        name, middle = f"key head {head}", 1.1 * head + 0.5
        ax.text(-0.2, middle, name, ha="right", va="center", fontsize=9)
    ax.set(xlim=(-2.1, 3.2 * len(programs)), ylim=(1.1 * num_heads, -0.6))
    ax.axis("off")


def draw_rounds(
    ax: Axes,
    rounds: Mapping[str, Sequence[tuple[int, float]]],
    measured: Sequence[float],
    places: int,
) -> None:
    """How many programs run in each round, and how long.

    Args:
        ax: where to draw.
        rounds: of how many programs each, and its time, by a name.
        measured: how long it took in truth, for each name.
        places: how many run at once.
    """
    longest = max(sum(time for _, time in times) for times in rounds.values())
    for row, (name, times) in enumerate(rounds.items()):
        bottom, left = 1.25 * row + 1, 0.0
        for count, time in times:
            draw_box(ax, (left, bottom), (time, -1), edgecolor="0.7")
            size = time, -count / places
            draw_box(ax, (left, bottom), size, f"{count}", 8, **DECODE.bar)
            left += time
        middle = bottom - 0.5
        ax.text(-0.01 * longest, middle, name, ha="right", va="center", fontsize=9)
        took = measured[row]
        ax.plot([took, took], [bottom, bottom - 1], color="black", lw=2, linestyle="-")
        place = max(left, took) + 0.01 * longest
        ax.text(place, middle, f"measured: {took:.0f} µs", va="center", fontsize=9)
    ax.set(xlim=(0, 1.3 * longest), ylim=(1.25 * len(rounds) - 0.2, -0.1), yticks=[])
    ax.spines[:].set_visible(False)
    ax.grid(False)


def move_splits(
    tiles: Sequence[str],
    names: Sequence[str],
    running: Sequence[Sequence[tuple[float, float]]],
    weights: Sequence[float],
) -> MovingFigure:
    """Programs that read their parts of a context at the same time, and a merge.

    Args:
        tiles: what is written on each tile of the context.
        names: of the part of the context that each split reads.
        running: of each split, its maximum and its sum after each of its tiles.
        weights: of each split; their number divides that of the tiles.
    """
    per_split = len(tiles) // len(weights)
    width = 1.9 * len(tiles)

    def show(says: str, read: int, reading: bool = False, end: int = 0) -> State:
        """A moment: `read` tiles of each split are done, and one more is `reading`."""
        pieces, middle = [], 1.7 if end else 2.4  # where the programs are
        for i, text in enumerate(tiles):
            split, place = divmod(i, per_split)
            x, y, look = 1.9 * i, 0.5, READ if place < read else CACHE
            if reading and place == read:  # handed to its program
                x, y, look = 1.9 * (split * per_split + (per_split - 1) / 2), 1.5, KEYS
            pieces.append(Piece(f"tile {i}", x, y, 1.8, 0.7, text, look))
        for i, weight in enumerate(weights):
            x = 1.9 * per_split * i + (1.9 * per_split - 3.4) / 2
            pieces.append(Piece(f"name {i}", x, -0.1, 3.3, 0.5, names[i]))
            text = f"split {i}"
            pieces.append(Piece(text, x, middle, 3.3, 0.7, text, DECODE))
            text = "nothing read yet"
            if read:
                highest, total = running[i][read - 1]
                text = f"max {highest:.2f}, sum {total:.2f}"
            pieces.append(Piece(f"state {i}", x, middle + 0.75, 3.3, 0.5, text))
            text = ""
            if end:
                text = f"its weight: {weight:.0%}"
            elif read > 1 and not reading:
                shrink = 2 ** (running[i][read - 2][0] - running[i][read - 1][0])
                text = f"what was there: × {shrink:.2f}"
            pieces.append(Piece(f"more {i}", x, middle + 1.25, 3.3, 0.5, text))
        if end > 1:
            text = "the answer: their average, by these weights"
            x = (width - 7.4) / 2
            pieces.append(Piece("answer", x, 3.6, 7.3, 0.7, text, US))
        return State(pieces, says)

    says = (
        f"The keys and values of the sentence lie in the cache, in {len(tiles)} tiles."
    )
    states = [show(says, 0)]
    for read in range(per_split):
        says = f"Every program has its tile number {read + 1}, all at the same time."
        states.append(show(says, read, reading=True))
        says = "Maximum, sum and output of each program are brought up to date."
        states.append(show(says, read + 1))
    says = (
        "Each split has an answer. Its maximum and its sum give the weight behind it."
    )
    states.append(show(says, per_split, end=1))
    says = "The answers are merged, and each counts by its weight."
    states.append(show(says, per_split, end=2))
    return MovingFigure(states, (width, 4.4), pictured=-1, seconds=2)


def draw_gpu(ax: Axes, num_programs: int, num_processors: int) -> None:
    """A GPU as a kernel sees it: its memory, and programs on multiprocessors.

    Args:
        ax: where to draw.
        num_programs: on each multiprocessor.
        num_processors: of the GPU; one is drawn large.
    """
    draw_box(
        ax,
        (0, 0),
        (3, 6),
        "memory\n\nqueries,\nblock tables,\nthe cache",
        9,
        **CACHE.bar,
    )
    draw_box(ax, (5.2, 0), (9.6, 6), facecolor="none")
    ax.text(10, -0.15, f"multiprocessor 0 of {num_processors}", ha="center", fontsize=9)
    for i in range(num_programs):
        top = 0.4 + i * 5.4 / num_programs
        height = 5.4 / num_programs - 0.35
        shared = "shared memory:\nthe next tile"
        draw_box(ax, (5.5, top), (4.4, height), shared, 8, **KEYS.bar)
        used = "registers: the tile in use,\nmaximum, sum, output"
        draw_box(ax, (10.1, top), (4.4, height), used, 8, **DECODE.bar)
        middle = top + height / 2
        for start, end in ((3, 5.5), (9.9, 10.1)):
            look = {"arrowstyle": "->", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
            draw_arrow(ax, (start, middle), (end, middle), **look)
        ax.text(14.9, middle, "a program", ha="left", va="center", fontsize=8)
    rest = f"and {num_processors - 1} more multiprocessors, which read the same memory"
    ax.text(10, 6.5, rest, ha="center", va="center", fontsize=9)
    ax.set(xlim=(-0.1, 17), ylim=(6.9, -0.7))
    ax.axis("off")


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
            first, last = cached + top, cached + top + height - 1
            look: dict[str, Any] = {"edgecolor": "0.8"}
            if left + tile - 1 <= first:
                look = KEYS.bar
            elif left <= last:
                look = KEYS.bar | {"facecolor": MASKED}
            draw_box(ax, (left, top), (tile, height), **look)
    ends = [cached + row + 1 for row in range(query_len)]  # of what each query sees
    edges = [x for end in ends for x in (end, end)]
    steps = [y for row in range(query_len) for y in (row, row + 1)]
    ax.plot(edges, steps, "k-", lw=1.5)
    end = -(-seq_len // tile) * tile
    ax.set(xlim=(0, end), ylim=(query_len, 0), xlabel="key", ylabel="query")
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
    ax.text(99, -0.72, "the speed of memory", ha="right", va="center", fontsize=8)
    ax.set(xlim=(0, 103), ylim=(-1, len(rows) - 0.4))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
