"""Figures of page 18: many requests at once, beside other engines and rung by rung.

    record = read_recording(Path("data/throughput_h200.json"))
    draw_systems(ax, record)

A recording that is not there yet gives an empty record, and a figure that says so.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from folo_lib.benchmark import MAX_SPREAD
from folo_lib.benchmark_waterfall import RUNGS
from folo_lib.course.figures import (
    BLACK,
    HUGGING_FACE,
    OTHER,
    PALE_GREY,
    US,
    Look,
    label_ticks,
)

__all__ = [
    "best_start",
    "compare_systems",
    "describe",
    "draw_batches",
    "draw_starts",
    "draw_systems",
    "draw_tpot",
    "draw_waterfall",
    "join_waterfall",
    "latest",
    "list_latency",
    "list_throughput",
    "list_tpot",
    "read_recording",
]

Result = dict[str, Any]
NOTHING_YET = "no recording yet"
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


def join_waterfall(record: Result) -> Result:
    """The section `waterfall`, which may have been recorded in parts; `{}` if there is none.

    Its rungs are in the order of the way, whichever part came first. Of a rung that was
    recorded twice the last recording counts.
    """
    parts: list[Result] = record["sections"].get("waterfall", [])
    if not parts:
        return {}
    rows = {row["rung"]: row for part in parts for row in part["rows"]}
    left_out = {name: why for part in parts for name, why in part["left_out"].items()}
    way = {name: place for place, name in enumerate(RUNGS)}
    in_order = sorted(rows.values(), key=lambda row: way.get(row["rung"], len(way)))
    return parts[-1] | {"rows": in_order, "left_out": left_out}


def describe(record: Result, section: str) -> str:
    """Card, versions and date of a section, for above a figure; `""` if there is none."""
    made, setup = latest(record, section), record["setup"]
    if not made:
        return ""
    parts = [setup["device"], f"torch {setup['torch']}"]
    starts = record["sections"].get("vllm", [])
    if starts and section in ("throughput", "tpot"):
        parts.append(f"vLLM {starts[-1]['versions']['vllm']}")
    return ", ".join([*parts, made["date"][:10]])


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


def list_runs(record: Result, name: str) -> list[float]:
    """Tokens per second of one system on the mixed workload: all runs of all its starts.

    Of ours the runs of one start, and the fresh starts of the waterfall's last rung.
    """
    if name == "folo_lib":
        runs = speeds_of(latest(record, "throughput")["folo_lib"]["mixed"])
        return runs + list_starts(record)
    starts = record["sections"].get("vllm", []) if name == "vLLM" else []
    return [speed for start in starts for speed in speeds_of(start["mixed"])]


def list_starts(record: Result) -> list[float]:
    """Tokens per second of the engine with everything, in its fresh starts."""
    rows = join_waterfall(record).get("rows", [])[-1:]
    return [start["tokens_per_second"] for row in rows for start in row["starts"]]


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


def write_range(numbers: Sequence[float], digits: int) -> str:
    """The least and the greatest: "1.09 to 1.12", or one number if they look alike."""
    ends = [f"{end:.{digits}f}" for end in (min(numbers), max(numbers))]
    return " to ".join(dict.fromkeys(ends))


def say_nothing_yet(ax: Axes) -> None:
    """Axes for a recording that is still to be made."""
    ax.text(0.5, 0.5, NOTHING_YET, ha="center", transform=ax.transAxes)
    ax.set_axis_off()


def draw_bar(ax: Axes, y: int, look: Look, row: Result) -> None:
    """A bar from 0 to the middle run, a dot for each from top to bottom, and the number."""
    ax.barh(y, row["tokens_per_second"], height=0.62, **look.bar)
    draw_dots(ax, y, row, height=0.42)


DOTS: Any = {"color": "white", "markeredgecolor": BLACK, "markersize": 4, "zorder": 3}


def draw_dots(ax: Axes, y: int, row: Result, height: float = 0) -> None:
    """A dot for each run where there are several, and the text to the right of all."""
    speeds = row["speeds"]
    if len(speeds) > 1:
        down = np.linspace(y - height / 2, y + height / 2, len(speeds))
        ax.plot(speeds, down, "o", **DOTS)
    write_right_of(ax, max(row["tokens_per_second"], *speeds), y, row["text"])


def write_right_of(ax: Axes, x: float, y: int, text: str) -> None:
    """Text beside a mark, at its height."""
    at: Any = {"textcoords": "offset points", "va": "center", "size": 9}
    ax.annotate(text, (x, y), (8, 0), **at)


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names at the left, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("tokens per second, all requests together")
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)


def name_part(row: Result, most: int) -> str:
    """Which of the requests a slow system was given, if not all of them."""
    if row["requests"] >= most:
        return ""
    some = "the first" if row["requests"] == 1 else f"the first {row['requests']}"
    return f" ({some} of {most} requests)"


def draw_systems(ax: Axes, record: Result) -> None:
    """The mixed workload end to end: a bar for each system, and a line for the floor."""
    systems = compare_systems(record)
    if not systems:
        return say_nothing_yet(ax)
    for y, (name, look, row) in enumerate(systems):
        text = f"{row['tokens_per_second']:,.0f}"
        text += name_part(row, systems[0][2]["requests"])
        speeds = list_runs(record, name) or speeds_of(row)
        draw_bar(ax, y, look, row | {"speeds": speeds, "text": text})
    name_rows(ax, [name for name, *_ in systems])
    ax.margins(x=0.28)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    if vllm := best_start(record["sections"].get("vllm", [])):
        ours = [systems[0][2]["tokens_per_second"], *list_starts(record)]
        ratios = [speed / vllm["tokens_per_second"] for speed in ours]
        ax.set_title(f"{write_range(ratios, 2)} times the tokens of vLLM")
    floor = systems[0][2]["floor_tokens_per_second"]
    ax.axvline(floor, color=BLACK, linestyle=":")
    ax.set_xlim(0, max(1.05 * floor, ax.get_xlim()[1]))
    ax.annotate(
        f"memory allows\n{floor:,.0f}",
        (floor, len(systems) - 1.5),
        (-5, 0),
        textcoords="offset points",
        ha="right",
        va="center",
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
        ratios = [
            row["tokens_per_second"] / other["tokens_per_second"]
            for row, other in zip(rows, theirs, strict=True)
            if other
        ]
        wins = sum(ratio > 1 for ratio in ratios)
        where = (
            "every size" if wins == len(ratios) else f"{wins} of {len(ratios)} sizes"
        )
        ax.set_title(f"Ahead of vLLM at {where}")
    for name, look, points in lines:
        x = [row["requests"] for row in points]
        y = [row["tokens_per_second"] for row in points]
        ax.plot(x, y, **look.line)
        for row in points:
            runs = speeds_of(row)
            ax.plot([row["requests"]] * len(runs), runs, ".", color=look.colour, ms=5)
        ax.annotate(
            name,
            (x[-1], y[-1]),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=look.colour,
        )
    ax.set(xlabel="requests at once", ylabel="tokens per second")
    ax.set_xscale("log", base=2)
    label_ticks(ax.xaxis, [row["requests"] for row in rows])
    ax.set_xlim(0.7 * rows[0]["requests"], 3 * rows[-1]["requests"])  # room for names
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:,.0f}")


def draw_waterfall(ax: Axes, record: Result) -> None:
    """The mixed workload on every rung: its median start.

    The axis is logarithmic, because the rungs lie a factor of a thousand apart. Rungs that
    were too slow for all of the requests are pale, and say how many they got.
    """
    rows = join_waterfall(record).get("rows", [])
    if not rows:
        return say_nothing_yet(ax)
    most = max(row["requests"] for row in rows)
    before = rows[0]
    for y, row in enumerate(rows):
        speed = row["tokens_per_second"]
        text = f"{speed:,.0f}"
        if row is not before and row["requests"] == before["requests"]:
            text += f", {speed / before['tokens_per_second']:.2f} times"
        look = SLOW if row["requests"] < most else US
        ax.plot(speed, y, look.marker, color=look.colour, markersize=11)
        text += name_part(row, most)
        write_right_of(ax, speed, y, text)
        before = row
    name_rows(ax, [row["rung"] for row in rows])
    ax.set_xscale("log")
    ends = [row["tokens_per_second"] for row in rows]
    ax.set_xlim(min(ends) / 2, 8 * max(ends))  # room for the text
    low, high = ax.get_xlim()
    label_ticks(ax.xaxis, [10**i for i in range(6) if low <= 10**i <= high])
    whole = [row["tokens_per_second"] for row in rows if row["requests"] == most]
    ax.set_title(f"With all {most} requests: {whole[0]:,.0f} to {whole[-1]:,.0f}")


def draw_starts(ax: Axes, record: Result) -> None:
    """The starts of each rung that has several, in per cent of its median start."""
    rows = join_waterfall(record).get("rows", [])
    if not rows:
        return say_nothing_yet(ax)
    for y, row in enumerate(rows):
        speeds = [start["tokens_per_second"] for start in row["starts"]]
        if len(speeds) > 1:
            shares = [100 * speed / row["tokens_per_second"] for speed in speeds]
            ax.plot(shares, [y] * len(shares), "o", **DOTS)
    ax.axvline(100, color=BLACK, linewidth=0.8, zorder=0)
    ax.grid(False, axis="y")
    ax.margins(x=0.15)
    ax.set_xlabel("% of the median start")
    ax.set_title("Start by start", fontsize=10)


def best_tpot(starts: Sequence[Result], row: Result) -> Result:
    """The fastest of vLLM's starts at the size of one of our rows; `{}` if there is none."""
    size = row["requests"], row["prompt_tokens"]
    rows = [
        one
        for start in starts
        for one in start.get("tpot", {}).get("rows", [])
        if (one["requests"], one["prompt_tokens"]) == size
    ]
    return min(rows, key=lambda one: float(one["tpot_ms"]), default={})


def find_least_ms(record: Result, row: Result) -> float:
    """The time to read weights, keys and values of a row of `tpot`.

    As fast as the sum does it that `throughput` has measured, or else the kernel of `tpot`.
    """
    floor, made = latest(record, "tpot")["floor"], latest(record, "throughput")
    size = row["least_floors"] * floor["bytes"]
    speed = made["bandwidth"]["median"] if made else 1e3 * floor["bytes"] / floor["ms"]
    ms: float = 1e3 * size / speed
    return ms


def times_the_least(record: Result, row: Result) -> float:
    """How many times as long a token took as reading weights, keys and values."""
    ratio: float = row["tpot_ms"] / find_least_ms(record, row)
    return ratio


def clock_runs(row: Result) -> list[float]:
    """Milliseconds per token of each run of a row of `tpot`."""
    first = statistics.median(row["first_token_seconds"])
    steps = row["output_tokens"] - 1  # of each request
    return [1e3 * (seconds - first) / steps for seconds in row["seconds"]]


def draw_tpot(ax: Axes, record: Result, by: str) -> None:
    """The time per token, over requests or context, and the least that reading takes.

    Args:
        ax: where to draw.
        record: of the benchmark.
        by: "requests", or "prompt_tokens" of one request.
    """
    made = latest(record, "tpot")
    rows = made.get("rows", [])
    if by == "prompt_tokens":
        rows = [row for row in rows if row["requests"] == 1]
    elif rows:
        shortest = min(row["prompt_tokens"] for row in rows)
        rows = [row for row in rows if row["prompt_tokens"] == shortest]
    if not rows:
        return say_nothing_yet(ax)
    starts = record["sections"].get("vllm", [])
    theirs = [(x, best_tpot(starts, row)) for x, row in enumerate(rows)]
    lines = [
        ("folo_lib", US, list(enumerate(row["tpot_ms"] for row in rows))),
        ("vLLM", OTHER, [(x, row["tpot_ms"]) for x, row in theirs if row]),
    ]
    for name, look, points in lines:
        if points:
            x, y = zip(*points, strict=True)
            ax.plot(x, y, **look.line)
            place: Any = {"textcoords": "offset points", "color": look.colour}
            ax.annotate(name, points[-1], (9, 0), va="center", **place)
    for look, pairs in ((US, list(enumerate(rows))), (OTHER, theirs)):
        dots = [(x, ms) for x, row in pairs if row for ms in clock_runs(row)]
        if dots:
            x, y = zip(*dots, strict=True)
            ax.scatter(x, y, s=6, color=look.colour)
    least = [find_least_ms(record, row) for row in rows]
    ax.plot(range(len(rows)), least, ":", color=BLACK)
    below: Any = {"textcoords": "offset points", "va": "top"}
    ax.annotate("memory allows", (0, least[0]), (0, -3), **below)
    ax.set_xticks(range(len(rows)), [f"{row[by]:,}" for row in rows])
    ax.set_xlim(-0.3, len(rows) - 0.1)  # with room for the names
    both = [[row, best_tpot(starts, row)] for row in made["rows"]]
    highest = max(max(clock_runs(row)) for pair in both for row in pair if row)
    ax.set_ylim(0, 1.12 * highest)  # the same for requests and for context
    first, last = (times_the_least(record, row) for row in (rows[0], rows[-1]))
    ax.set_title(f"Ours: {first:.1f}, then {last:.1f} times the least", fontsize=10)


def list_tpot(record: Result) -> list[str]:
    """The section `tpot` in lines of text, beside the faster start of vLLM."""
    made, starts = latest(record, "tpot"), record["sections"].get("vllm", [])
    if not made:
        return [NOTHING_YET]
    lines = list[str]()
    for row in made["rows"]:
        parts = [f"{row['tpot_ms']:.3f} ms (runs {row['spread']:.1%} apart)"]
        parts.append(f"{times_the_least(record, row):.2f} times the least")
        if theirs := best_tpot(starts, row):
            spread = f"{theirs['spread']:.1%} apart"
            parts.append(f"vLLM {theirs['tpot_ms']:.3f} ms ({spread})")
        size = f"{row['requests']:2} × {row['prompt_tokens']:6,} tokens"
        lines.append(f"{size}: {', '.join(parts)}")
    for row in made["sampled"]["rows"]:
        if row["more_ms"] is not None:
            more = f"{row['more_ms']:.3f} ms more per step"
            lines.append(f"drawn with filters, {row['requests']} at once: {more}")
    rows = made["starts"]["rows"]
    if rows:
        times = [row["tpot_ms"] for row in rows]
        bounds = f"{min(times):.3f} to {max(times):.3f} ms"
        spread = f"{made['starts']['spread']:.1%} apart"
        lines.append(f"{len(rows)} starts, compile cache empty: {bounds}, {spread}")
    for part in (made, made["sampled"]):
        left_out = part["left_out"].items()
        lines += [f"{name} was left out: {why}" for name, why in left_out]
    return lines + [
        f"a start was left out: {why}" for why in made["starts"]["left_out"]
    ]


def list_throughput(record: Result) -> list[str]:
    """The section `throughput` in lines of text, with every start of vLLM."""
    made, starts = latest(record, "throughput"), record["sections"].get("vllm", [])
    if not made:
        return [NOTHING_YET]
    ours, lines = made["folo_lib"], list[str]()
    engines = [("folo_lib", ours)]
    engines += [(f"vLLM, start {i}", start) for i, start in enumerate(starts, 1)]
    for name, engine in engines:
        one, row = engine["one"], engine["mixed"]
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        speed += f" (runs {row['spread']:.1%} apart)"
        alone = (
            f"{one['ttft_ms']:.1f} ms to the first token, then {one['tpot_ms']:.2f} ms"
        )
        lines.append(f"{name}: mixed {speed}; one alone {alone} each")
    for row in made["huggingface"]["rows"]:
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        lines.append(f"Hugging Face, {row['system']}: {speed}")
    reading = made["bandwidth"]["median"] / 1e12
    lines.append(f"what memory allows is read at {reading:.2f} TB/s by a sum")
    for row in [*ours["equal"], ours["mixed"]]:
        is_mixed = row is ours["mixed"]
        theirs = best_start(starts, None if is_mixed else row["requests"])
        parts = [f"{row['tokens_per_second']:7,.0f} tokens/s"]
        parts.append(f"{row['share_of_floor']:.0%} of what memory allows")
        if theirs:
            ratio = row["tokens_per_second"] / theirs["tokens_per_second"]
            is_steady = theirs["spread"] <= MAX_SPREAD  # or the ratio says little
            beside = f"{ratio:.2f} times vLLM" if is_steady else "no ratio to vLLM"
            parts.append(f"{beside} (its runs {theirs['spread']:.0%} apart)")
        kind = "mixed" if is_mixed else "equal"
        lines.append(f"{row['requests']:4} {kind} requests: {', '.join(parts)}")
    if memory := ours["memory"]:
        beyond = memory["beyond"]["allocated"] / 2**20
        lines.append(f"memory beyond weights and cache: {beyond:,.0f} MiB")
    if speeds := list_starts(record):
        line = f"{len(speeds)} more starts: {min(speeds):,.0f} to {max(speeds):,.0f}"
        if vllm := best_start(starts):
            ratios = [speed / vllm["tokens_per_second"] for speed in speeds]
            line += f" tokens/s, {write_range(ratios, 2)} times vLLM"
        lines.append(line)
    return lines


def list_latency(record: Result) -> list[str]:
    """The section `latency` in lines of text."""
    made = latest(record, "latency")
    if not made:
        return [NOTHING_YET]
    lines = [
        f"after {row['prompt_tokens']:5,} tokens: {1e3 * row['tpot']['median']:.2f} ms "
        "per token"
        for row in made["context"]
    ]
    gaps = made["gaps"]
    before, after = (1e3 * gaps[name]["median"] for name in ("before", "after"))
    long = f"a prompt of {gaps['long_prompt']:,} tokens"
    lines.append(f"longest gap of {gaps['running']} requests: {before:.1f} ms")
    lines.append(f"longest gap when {long} arrives: {after:.1f} ms")
    lines.append(f"first token of that prompt: {1e3 * gaps['ttft']['median']:.1f} ms")
    for row in made["starts"]:
        seconds = f"{row['first_token_seconds']:.1f} s to the first token"
        lines.append(f"compile cache {row['compile_cache']}: {seconds}")
    return lines
