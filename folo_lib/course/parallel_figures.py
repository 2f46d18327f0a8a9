"""Figures of page 16: who holds which heads, a short sum between two GPUs, and what it brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from folo_lib.course.figures import (
    DEVICE,
    KEYS,
    PALE_BLUE,
    QUERIES,
    US,
    YELLOW,
    Look,
    draw_box,
)
from folo_lib.course.moving import MovingFigure, Piece, State

__all__ = ["draw_rank_heads", "draw_steps", "find_steps", "find_sums", "move_sum"]

EMPTY = Look("#FFFFFF", "", "s", ":")
FULL = Look(YELLOW, "", "o", "-")
SUMS = Look(YELLOW, "//", "^", "--")
REST = Look(PALE_BLUE, "..", "s", ":")  # of a step, beside its half and its sums
COPY = Look(KEYS.colour, "xx", "o", "-")  # a head that another rank holds too


def draw_rank_heads(
    ax: Axes, queries: Sequence[Sequence[int]], keys: Sequence[Sequence[int]]
) -> None:
    """The heads that each rank holds; key/value heads that are there twice are hatched.

    Args:
        ax: where to draw, one row.
        queries, keys: numbers of the query heads and of the key/value heads of each rank.
    """
    everybody = [head for own in keys for head in own]
    width = sum(map(len, queries)) / len(queries)
    for rank, (own, seen) in enumerate(zip(queries, keys, strict=True)):
        left = rank * (width + 0.25)
        for i, head in enumerate(own):
            draw_box(ax, (left + i, 0), (1, 0.9), f"q {head}", 8, **QUERIES.bar)
        share = width / len(seen)
        for i, head in enumerate(seen):
            look = COPY if everybody.count(head) > 1 else KEYS
            corner = left + i * share, 1
            draw_box(ax, corner, (share, 0.9), f"k/v {head}", 8, **look.bar)
        ax.text(left + width / 2, -0.15, f"rank {rank}", ha="center", fontsize=8)
    count = f"{len(queries)} rank{'s' * (len(queries) > 1)}"
    ax.text(-0.15, 1, count, ha="right", va="center", fontsize=9)
    total = sum(map(len, queries))
    ax.set(xlim=(-0.8, total + 0.25 * total), ylim=(2, -0.75))
    ax.axis("off")


def move_sum() -> MovingFigure:
    """Two sums of one number between two GPUs, of which one is early."""
    lefts = 0.0, 6.4
    rows = {"term": 1.0, "A": 2.1, "B": 3.0, "sum": 4.1}

    def find(row: str, gpu: int) -> tuple[float, float]:
        return lefts[gpu] + 2.0, rows[row]

    def show(
        says: str,
        numbers: Mapping[str, tuple[str, int]],
        terms: tuple[str, str],
        sums: tuple[str, str] = ("", ""),
    ) -> State:
        """A moment.

        Args:
            says: what happens.
            numbers: those that lie in a place or are about to be sent, and where.
            terms, sums: of both GPUs, as far as they have them.
        """
        pieces = []
        for gpu, left in enumerate(lefts):
            pieces.append(Piece(f"gpu {gpu}", left, 0, 5.2, 0.7, f"GPU {gpu}", DEVICE))
            labels = {"term": "term", "A": "place A", "B": "place B", "sum": "sum"}
            for row, text in labels.items():
                where = left, rows[row]
                pieces.append(Piece(f"{row} of {gpu}", *where, 1.8, 0.7, text))
            for name in "AB":
                text = "" if (name, gpu) in numbers.values() else "empty"
                place = Piece(f"{name}{gpu}", *find(name, gpu), 2.4, 0.7, text, EMPTY)
                pieces.append(place)
            text = terms[gpu] or "at work"
            pieces.append(Piece(f"term {gpu}", *find("term", gpu), 2.4, 0.7, text))
            if sums[gpu]:
                where = find("sum", gpu)
                pieces.append(Piece(f"sum {gpu}", *where, 2.4, 0.7, sums[gpu], US))
        for text, (row, gpu) in numbers.items():
            pieces.append(Piece(f"sent {text}", *find(row, gpu), 2.4, 0.7, text, FULL))
        return State(pieces, says)

    first, second = "3 + 4 = 7", "5 + 6 = 11"
    states = [
        show(
            "All places are empty. GPU 0 has its term, and GPU 1 is still at work.",
            {"3": ("term", 0)},
            ("3", ""),
        ),
        show(
            "GPU 0 writes its 3 into place A of GPU 1. Its own place A is empty: it waits.",
            {"3": ("A", 1)},
            ("3", ""),
        ),
        show(
            "Now GPU 1 has its term, and writes the 4 into place A of GPU 0.",
            {"3": ("A", 1), "4": ("A", 0)},
            ("3", "4"),
        ),
        show(
            "GPU 0 finds the 4, adds, and marks its place as empty. GPU 1 is held up.",
            {"3": ("A", 1)},
            ("3", "4"),
            (first, ""),
        ),
        show(
            "GPU 0 is at the second sum already, and writes its 5 into place B of GPU 1. "
            "The 3, which GPU 1 has not read yet, is safe in place A.",
            {"3": ("A", 1), "5": ("B", 1)},
            ("5", "4"),
            (first, ""),
        ),
        show(
            "GPU 1 finds the 3, adds in the same order, and marks its place as empty.",
            {"5": ("B", 1)},
            ("5", "4"),
            (first, first),
        ),
        show(
            "GPU 1 writes its 6 into place B of GPU 0. Until now GPU 0 could not end the "
            "second sum, and so it could not begin a third in place A.",
            {"5": ("B", 1), "6": ("B", 0)},
            ("5", "6"),
            (first, first),
        ),
        show(
            "Both add, and mark their places as empty. The third sum takes place A again.",
            {},
            ("5", "6"),
            (second, second),
        ),
    ]
    return MovingFigure(states, (11.7, 4.9), seconds=3, pictured=4)


def find_sums(measured: dict[str, Any], method: str) -> dict[int, float]:
    """Microseconds of a sum in a graph, by its bytes.

    Args:
        measured: a recording of the benchmark's section `tensor_parallel`.
        method: how it was made.
    """
    wanted = {"method": method, "place": "graph"}
    found = [row for row in measured["sums"] if wanted.items() <= row.items()]
    return {row["bytes"]: row["us"] for row in found}


def find_steps(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Milliseconds of each step on one card, or None, and on two, and what its sums add.

    Args:
        measured: see `find_sums`.
    """
    found = []
    for ratio in measured["ratios"]:
        wanted = {key: ratio[key] for key in ("shape", "requests")}
        rows = [row for row in measured["steps"] if wanted.items() <= row.items()]
        one = [row["ms"] for row in rows if row["devices"] == 1]
        found.append(
            {
                "name": f"Qwen3-{ratio['shape']}",
                "count": ratio["requests"],
                "one": one[0] if one else None,
                "two": next(row["ms"] for row in rows if row["has_sums"]),
                "sums": ratio["sums_ms"],
            }
        )
    return found


def draw_steps(ax: Axes, steps: Sequence[dict[str, Any]], other: float) -> None:
    """Steps on two cards, in percent of the same step on one, and what they are made of.

    Args:
        ax: where to draw.
        steps: of `find_steps`, each measured on one card too.
        other: milliseconds of the last of them on one card in another way.
    """
    for place, row in enumerate(steps):
        scale, left = 100 / row["one"], 0.0
        sums = row["sums"] * scale
        parts = (
            (50, US, "half of it"),
            (row["two"] * scale - 50 - sums, REST, "the rest"),
            (sums, SUMS, "sums"),
        )
        for width, look, name in parts:
            label = name if place == 0 else None
            ax.barh(place, width, left=left, height=0.55, label=label, **look.bar)
            left += width
        text = f"{row['two'] / row['one']:.2f}: {row['two']:.2f} of {row['one']:.2f} ms"
        ax.text(max(100, left) + 3, place, text, va="center", fontsize=8)
    ax.axvline(100, color="black", linestyle="--")
    ax.text(102.5, -0.62, "as on one card", fontsize=8)
    ax.legend(loc="upper right", fontsize=8)
    y, mark = len(steps) - 1, 100 * other / steps[-1]["one"]
    text = f"compiled, on one card: {other:.2f} ms"
    ax.text(mark + 2, y - 0.45, text, ha="right", fontsize=8)
    ax.plot([mark, mark], [y - 0.3, y + 0.3], color="black", linewidth=2, linestyle="-")
    names = [f"{row['name']} × {row['count']}" for row in steps]
    ax.set_yticks(range(len(steps)), names)
    ax.set(ylim=(len(steps) - 0.5, -0.95))
    ax.grid(axis="y", visible=False)
