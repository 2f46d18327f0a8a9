"""Figures of page 18: many requests at once, beside other engines and rung by rung.

    record = read_recording(Path("data/throughput_h200.json"))
    draw_systems(ax, record)

A recording that is not there yet gives an empty record, and a figure that says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from folo_lib.course.figures import (
    BLACK,
    HUGGING_FACE,
    OTHER,
    PALE_GREY,
    US,
    Look,
)

__all__ = [
    "best_start",
    "compare_systems",
    "draw_batches",
    "draw_systems",
    "draw_waterfall",
    "latest",
    "read_recording",
]

Result = dict[str, Any]
SLOW = Look(PALE_GREY, "", "s", "--")  # measured on a few of the requests only


def read_recording(path: Path) -> Result:
    """What the benchmark has written; without such a file a record of nothing."""
    if not path.is_file():
        return {"setup": {}, "sections": {}}
    record: Result = json.loads(path.read_text(encoding="utf-8"))
    return record


def latest(record: Result, section: str) -> Result:
    """The last recording of a section; `{}` if there is none."""
    recordings: list[Result] = record["sections"].get(section, [])
    return recordings[-1] if recordings else {}


def speeds_of(row: Result) -> list[float]:
    """Tokens per second in each run of a workload."""
    return [row["output_tokens"] / seconds for seconds in row["seconds"]]


def best_start(starts: Sequence[Result], requests: int | None = None) -> Result:
    """Of several starts of one engine the row of the better one; `{}` if there is none.

    Args:
        starts: each with `mixed` and `equal`, as `measure_throughput` gives them.
        requests: of equal length; None: the mixed workload.
    """
    rows = [
        row
        for start in starts
        for row in ([start["mixed"]] if requests is None else start["equal"])
        if requests is None or row["requests"] == requests
    ]
    return max(rows, key=lambda row: float(row["tokens_per_second"]), default={})


def compare_systems(record: Result) -> list[tuple[str, Look, Result]]:
    """Name, look and row of each system on the mixed workload, ours first."""
    made = latest(record, "throughput")
    if not made:
        return []
    systems = [("folo_lib", US, made["folo_lib"]["mixed"])]
    if vllm := best_start(record["sections"].get("vllm", [])):
        systems.append(("vLLM", OTHER, vllm))
    if theirs := made["huggingface"]["rows"]:
        systems.append(("Hugging Face", HUGGING_FACE, theirs[0]))
    return systems


def say_nothing_yet(ax: Axes) -> None:
    """Axes for a recording that is still to be made."""
    ax.text(0.5, 0.5, "no recording yet", ha="center", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)


def draw_bar(ax: Axes, y: int, name: str, look: Look, row: Result) -> None:
    """A bar from 0 to the middle run, a dot for each, and the number at its end."""
    speeds = row["speeds"]
    middle = row["tokens_per_second"]
    ax.barh(y, middle, height=0.62, **look.bar)
    if len(speeds) > 1:
        dots: Any = {"color": "white", "markeredgecolor": BLACK, "markersize": 4.5}
        ax.plot(speeds, [y] * len(speeds), "o", zorder=3, **dots)
    end = max(middle, *speeds)
    ax.annotate(
        row["text"], (end, y), (6, 0), textcoords="offset points", va="center", size=9
    )


def draw_bars(ax: Axes, bars: Sequence[tuple[str, Look, Result]]) -> None:
    """Horizontal bars under one another, the first on top, with their names."""
    for y, (name, look, row) in enumerate(bars):
        draw_bar(ax, y, name, look, row)
    ax.set_yticks(range(len(bars)), [name for name, *_ in bars])
    ax.invert_yaxis()
    ax.margins(x=0.22)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("tokens per second, all requests together")
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)


def draw_systems(ax: Axes, record: Result) -> None:
    """The mixed workload end to end: a bar for each system, and a line for the floor."""
    systems = compare_systems(record)
    if not systems:
        return say_nothing_yet(ax)
    bars = []
    for name, look, row in systems:
        text = f"{row['tokens_per_second']:,.0f}"
        if row["requests"] != systems[0][2]["requests"]:
            text += f" (first {row['requests']} requests)"
        bars.append((name, look, row | {"speeds": speeds_of(row), "text": text}))
    draw_bars(ax, bars)
    floor = systems[0][2]["floor_tokens_per_second"]
    ax.axvline(floor, color=BLACK, linestyle=":")
    place = (floor, len(bars) - 0.5)
    ax.annotate(
        f"memory allows\n{floor:,.0f}",
        place,
        (-5, 0),
        textcoords="offset points",
        ha="right",
        va="bottom",
        size=9,
    )


def draw_batches(ax: Axes, record: Result) -> None:
    """Equal requests: tokens per second over how many run together."""
    made = latest(record, "throughput")
    if not made:
        return say_nothing_yet(ax)
    rows = made["folo_lib"]["equal"]
    lines = [("folo_lib", US, rows)]
    starts = record["sections"].get("vllm", [])
    if starts:
        theirs = [best_start(starts, row["requests"]) for row in rows]
        lines.append(("vLLM", OTHER, [row for row in theirs if row]))
    for name, look, points in lines:
        x = [row["requests"] for row in points]
        y = [row["tokens_per_second"] for row in points]
        ax.plot(x, y, **look.line)
        for row in points:
            runs = speeds_of(row)
            ax.plot([row["requests"]] * len(runs), runs, ".", color=look.colour, ms=3)
        ax.annotate(
            name,
            (x[-1], y[-1]),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=look.colour,
        )
    ax.set(xlabel="requests at once", ylabel="tokens per second")
    ax.set_xticks([row["requests"] for row in rows])
    ax.set_xlim(0, 1.25 * rows[-1]["requests"])
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:,.0f}")


def draw_waterfall(ax: Axes, record: Result) -> None:
    """The mixed workload on every rung, a dot for each start.

    Rungs that were too slow for all of its requests are pale, and say how many they got.
    """
    rows = latest(record, "waterfall").get("rows", [])
    if not rows:
        return say_nothing_yet(ax)
    most = max(row["requests"] for row in rows)
    bars, before = [], None
    for row in rows:
        speed = row["tokens_per_second"]
        text = f"{speed:,.0f}"
        if before is not None:
            text += f", {speed / before:.{1 if speed / before >= 2 else 2}f} times"
        few = row["requests"] < most
        if few:
            text += f" (first {row['requests']} of {most} requests)"
        speeds = [start["tokens_per_second"] for start in row["starts"]]
        look = SLOW if few else US
        bars.append((row["rung"], look, row | {"speeds": speeds, "text": text}))
        before = speed
    draw_bars(ax, bars)
