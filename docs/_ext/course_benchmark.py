"""The benchmark page: tables and figures from the results that page 18 recorded."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from course_pages import COPIES, ROOT, write_if_changed
from sphinx.application import Sphinx

from folo_lib.benchmark import paired_ratios
from folo_lib.course.throughput_figures import (
    best_start,
    best_tpot,
    compare_systems,
    latest,
    read_recording,
    times_the_least,
)

DATA = ROOT / "notebooks" / "data"
GPU_RECORD = DATA / "benchmark_h200.json"
CPU_RECORD = DATA / "benchmark_cpu.json"
MANY_RECORD = DATA / "throughput_h200.json"  # the README's picture is drawn from it
DATA_URL = "https://github.com/folovllm/FoloVLLM/blob/main/notebooks/data"
BASELINE = "huggingface"

# Label, colour, hatch, marker and dash of a system; those of page 18.
LOOKS = {
    "folo_lib": ("folo_lib", "#0072B2", "", "o", "-"),
    BASELINE: ("Hugging Face", "#D55E00", "//", "s", "--"),
    "huggingface_static": ("Hugging Face, static cache", "#009E73", "..", "^", "-."),
    "vllm": ("vLLM", "#CC79A7", "xx", "D", ":"),
    "nanovllm": ("nano-vllm", "#F0E442", "\\\\", "v", ":"),
}
OTHER = ("#999999", "++", "x", ":")

Result = dict[str, Any]


def find_record() -> Path:
    """The results of the GPU, or those of a CPU as long as there are none."""
    return GPU_RECORD if GPU_RECORD.is_file() else CPU_RECORD


def look(system: str) -> tuple[str, str, str, str, str]:
    return LOOKS.get(system, (system, *OTHER))


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---", *["--:"] * (len(header) - 1)]
    lines = [header, align, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def three_digits(number: float) -> str:
    """As many of them as a measurement deserves."""
    digits = sum(number < bound for bound in (1, 10, 100))
    return f"{number:,.{digits}f}"


def milliseconds(summary: Result) -> str:
    """Median, and the 10th to the 90th percentile."""
    times = (three_digits(1e3 * summary[name]) for name in ("median", "p10", "p90"))
    return "{} ({} to {})".format(*times)


def times_faster(slow: Result, fast: Result, name: str) -> str:
    """The median of the ratios of paired runs, and their range."""
    ratios = paired_ratios(slow, fast, name)
    shown = statistics.median(ratios), min(ratios), max(ratios)
    return "{} ({} to {})".format(*map(three_digits, shown))


def by_size(rows: Sequence[Result]) -> Iterator[tuple[int, dict[str, Result]]]:
    """Prompt length, and the row of each system at that length."""
    for size in sorted({row["prompt_tokens"] for row in rows}):
        yield (
            size,
            {row["system"]: row for row in rows if row["prompt_tokens"] == size},
        )


def agreement(section: Result) -> str:
    """That the systems gave the same tokens, in a sentence."""
    tokens = section["tokens"]
    lost = sum(tokens["near_ties_lost"].values())
    ties = f"; {lost} near-ties fell otherwise" if lost else ""
    return (
        f"Before timing, {tokens['decided']} of {tokens['steps']} greedy steps were far "
        f"enough from a tie to be compared, and every system chose the same token at "
        f"all of them{ties}."
    )


def repeated(sections: Sequence[Result]) -> str:
    """That earlier recordings are not shown, if there are any."""
    count = len(sections)
    return f"\n\nThe last of {count} recordings." if count > 1 else ""


def medians(sections: Sequence[Result]) -> str:
    """How far recordings lie apart, if there are several, in a sentence."""
    if len(sections) < 2:
        return ""
    found: dict[str, list[str]] = {}
    for section in sections:
        for row in section["rows"]:
            times = found.setdefault(look(row["system"])[0], [])
            times.append(three_digits(1e3 * row["tpot"]["median"]))
    parts = [f"{label} {', '.join(times)}" for label, times in found.items()]
    return f" TPOT in ms of all of them, in order: {'; '.join(parts)}."


def many_part() -> str:
    """Many requests and few on one GPU, beside vLLM: what the engine of today does."""
    record = read_recording(MANY_RECORD)
    systems = compare_systems(record)
    tpot = latest(record, "tpot")
    vllm = record["sections"].get("vllm", [])
    if not systems or not tpot or not vllm:
        return ""
    setup, made = record["setup"], latest(record, "throughput")
    ours, theirs = systems[0][2], best_start(vllm)
    floor = ours["floor_tokens_per_second"]
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    most = ours["requests"]
    alt = ", ".join(
        f"{name} {row['tokens_per_second']:,.0f}" for name, _, row in systems
    )
    speeds = []
    for name, _, row in systems:
        some = "" if row["requests"] == most else f" (the first {row['requests']})"
        speed = row["tokens_per_second"]
        speeds.append(
            [
                name + some,
                f"{speed:,.0f}",
                f"{speed / floor:.{int(speed < 0.1 * floor)}%}",
            ]
        )
    starts = "All runs, one by one"
    if len(vllm) > 1:
        starts = (
            f"vLLM was started {len(vllm)} times, and the best start counts. {starts}"
        )
    times = []
    for row in tpot["rows"]:
        other = best_tpot(vllm, row)
        times.append(
            [
                f"{row['requests']} × {row['prompt_tokens']:,}",
                f"{row['tpot_ms']:.2f}",
                f"{times_the_least(record, row):.1f}",
                f"{other['tpot_ms']:.2f}" if other else "–",
            ]
        )
    return f"""![Tokens per second with {most} mixed requests: {alt}; memory would allow {floor:,.0f}. Beside it the time per token of a few requests.](_static/benchmark.png)

With {most} mixed requests folo_lib writes **{ratio:.2f} times** the tokens of vLLM; one request alone takes
**{tpot["rows"][0]["tpot_ms"]:.2f} ms** a token, where reading the weights takes {tpot["floor"]["ms"]:.3f} ms by itself.
{setup["device"]}, driver {setup["driver"]}, CUDA {setup["cuda"]}, torch {setup["torch"]}, vLLM
{vllm[-1]["versions"]["vllm"]} on the other card of the same machine, recorded on {made["date"][:10]}; {setup["weights"]}
in bfloat16.

## Many requests

{most} requests with prompts and answers of {setup["sizes"]["throughput"]["shortest"]:,} to
{setup["sizes"]["throughput"]["longest"]:,} tokens. What memory allows is {floor:,.0f} tokens per second: the bytes
that must be read, at the speed of this memory.

{table(["", "tokens/s", "of what memory allows"], speeds)}

## A few requests

Milliseconds per token, and how many times as long that is as reading the weights, keys and values once. The first
column says how many requests run at once, and after how many tokens of context.

{table(["requests × context", "folo_lib, ms", "times the least", "vLLM, ms"], times)}

{starts}: [{MANY_RECORD.name}]({DATA_URL}/{MANY_RECORD.name})."""


def describe_age(record: Result, is_gpu: bool) -> str:
    """Which engine the rest of the page is about, and on what it ran."""
    setup = record["setup"]
    if is_gpu:
        return (
            f"## One request\n\nWhat follows was measured on one **{setup['device']}**, one request "
            "at a time, beside `generate()` in the same process."
        )
    return (
        f"## On a CPU\n\n**This is not a GPU.** The recording of an H200 is not in the repository yet. What "
        f"follows is the quick run on {setup['threads']} thread of a CPU ({setup['device']}) with "
        "a model of three million parameters. It shows how the measurement works, and says "
        "nothing about large models or GPUs."
    )


def describe_setup(record: Result, is_gpu: bool) -> str:
    """What was measured where."""
    setup = record["setup"]
    shape = setup["shape"]
    shown = [found[-1] for found in record["sections"].values()]
    dates = sorted({section["date"][:10] for section in shown})
    commands = sorted({section["command"] for section in shown})
    rows = [
        ["weights", setup["weights"]],
        [
            "shape",
            f"{shape['num_hidden_layers']} layers, hidden size {shape['hidden_size']}, "
            f"{shape['num_attention_heads']} query heads and "
            f"{shape['num_key_value_heads']} key/value heads of {shape['head_dim']}, "
            f"vocabulary {shape['vocab_size']:,}, {shape['dtype']}",
        ],
        ["torch", setup["torch"]],
        ["transformers", setup["transformers"]],
        ["Python", setup["python"]],
    ]
    if is_gpu:
        rows.append(["driver, CUDA", f"{setup['driver']}, {setup['cuda']}"])
    rows.append(["recorded", ", ".join(dates)])
    rows.append(["command", "<br>".join(f"`{command}`" for command in commands)])
    return "## Set-up\n\n" + table(["", ""], rows).replace("--:", "---")


def decode_part(sections: Sequence[Result]) -> str:
    rows = sections[-1]["rows"]
    base = next((row for row in rows if row["system"] == BASELINE), None)
    lines = []
    for row in rows:
        ratio = times_faster(base, row, "tpot") if base else "–"
        lines.append(
            [
                look(row["system"])[0],
                milliseconds(row["tpot"]),
                milliseconds(row["total"]),
                f"{1 / row['tpot']['median']:,.0f}",
                "1" if row is base else ratio,
            ]
        )
    size = f"{rows[0]['prompt_tokens']} tokens in, {rows[0]['output_tokens']} out"
    header = [
        "",
        "TPOT, ms",
        "total, ms",
        "tokens/s",
        "speed-up over Hugging Face",
    ]
    return f"""## One prompt, one answer

Batch 1, {size}, greedy. TPOT is the time for each token after the first, total the whole answer, and
tokens/s is 1/TPOT; the lines in the figure go from the slowest run to the fastest. In brackets:
the 10th to the 90th percentile of the runs. The speed-up is that of TPOT, the median of paired
runs, with its least and its greatest.

![{picture_alt(rows)}](pages/benchmark-speed.png)

{table(header, lines)}

{agreement(sections[-1])}{repeated(sections)}{medians(sections)}"""


def picture_alt(rows: Sequence[Result]) -> str:
    parts = [
        f"{look(row['system'])[0]} {1 / row['tpot']['median']:,.0f}" for row in rows
    ]
    return f"Tokens per second at batch 1: {', '.join(parts)}."


def sizes_part(
    title: str, sections: Sequence[Result], name: str, text: str, picture: str, alt: str
) -> str:
    """One time, at several lengths of the prompt."""
    rows = sections[-1]["rows"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lines = []
    for size, found in by_size(rows):
        cells = [
            milliseconds(found[system][name]) if system in found else "–"
            for system in systems
        ]
        pair = found.get(BASELINE), found.get("folo_lib")
        ratio = times_faster(pair[0], pair[1], name) if all(pair) else "–"
        lines.append([f"{size:,}", *cells, ratio])
    header = [
        "tokens",
        *(look(s)[0] + ", ms" for s in systems),
        "folo_lib, times as fast",
    ]
    return f"""## {title}

{text} Systems took turns within a row, rows came one after the other: compare within a
row.

![{alt}](pages/{picture})

{table(header, lines)}{repeated(sections)}"""


def ladder_part(sections: Sequence[Result]) -> str:
    latest = sections[-1]
    rows = latest["rows"]
    lines = [
        [
            row["system"],
            milliseconds(row["tpot"]),
            times_faster(rows[0], row, "tpot") if number else "1",
        ]
        for number, row in enumerate(rows)
    ]
    left_out = ", ".join(latest.get("left_out", {}))
    note = f"\n\nNot on this machine or in this build: {left_out}." if left_out else ""
    return f"""## What each page was worth

The same model and prompt, on every rung of the ladder that the course climbs. Each rung keeps
what the one before it had.

![{ladder_alt(rows)}](pages/benchmark-ladder.png)

{table(["", "TPOT, ms", "speed-up over the first"], lines)}{note}{repeated(sections)}"""


def ladder_alt(rows: Sequence[Result]) -> str:
    parts = [f"{row['system']} {1e3 * row['tpot']['median']:.2f}" for row in rows]
    return f"Milliseconds per token, rung by rung: {', '.join(parts)}."


def alone_part(memory: Sequence[Result], cold: Sequence[Result], is_gpu: bool) -> str:
    lines = [
        [look(row["system"])[0], f"{row['peak'] / 2**20:,.0f}"]
        for row in memory[-1]["rows"]
        if row["peak"]
    ]
    what = (
        "Only tensors count: the most bytes that were allocated at once."
        if is_gpu
        else "The whole process counts, Python and PyTorch included."
    )
    parts = [
        f"""## Memory and the first start

The same run, alone in a fresh process. {what}

{table(["", "peak, MiB"], lines)}"""
    ]
    if cold:
        starts = [
            [row["compile_cache"], f"{row['first_token_seconds']:.1f}"]
            for row in cold[-1]["rows"]
        ]
        parts.append("From nothing to the first token, without the imports:")
        parts.append(table(["cache for compiled code", "seconds"], starts))
    return "\n\n".join(parts)


def write_page() -> str:
    """All of the results, as Markdown."""
    path = find_record()
    record = json.loads(path.read_text(encoding="utf-8"))
    sections, is_gpu = record["sections"], path == GPU_RECORD
    parts = [many_part(), describe_age(record, is_gpu)]
    if "decode" in sections:
        parts.append(decode_part(sections["decode"]))
    if "context" in sections:
        text = (
            "TPOT behind contexts of several lengths. The floor is what the bytes of a "
            "step would take at the bandwidth that this machine reached."
        )
        alt = "TPOT over tokens of context, with the floor that bandwidth sets."
        title = "Long contexts"
        context = sections["context"]
        picture = "benchmark-context.png"
        parts.append(sizes_part(title, context, "tpot", text, picture, alt))
    if "prefill" in sections:
        text = "The time to the first token, most of which is reading the prompt."
        alt = "TTFT over tokens of the prompt."
        title, prefill = "Long prompts", sections["prefill"]
        picture = "benchmark-prefill.png"
        parts.append(sizes_part(title, prefill, "ttft", text, picture, alt))
    if "ladder" in sections:
        parts.append(ladder_part(sections["ladder"]))
    if "memory" in sections:
        cold = sections.get("cold_start", [])
        parts.append(alone_part(sections["memory"], cold, is_gpu))
    parts.append(describe_setup(record, is_gpu))
    parts.append(f"All runs, one by one: [{path.name}]({DATA_URL}/{path.name}).")
    return "\n\n".join(parts)


# Figures


def draw_speed(ax: Any, sections: Result) -> None:
    rows = sections["decode"][-1]["rows"]
    for y, row in enumerate(rows):
        label, colour, hatch, *_ = look(row["system"])
        speeds = [1 / tpot for tpot in row["tpot"]["values"]]
        middle, low, high = statistics.median(speeds), min(speeds), max(speeds)
        ax.barh(y, middle, height=0.5, color=colour, hatch=hatch, edgecolor="black")
        ax.plot([low, high], [y, y], "-", color="black", linewidth=1.5)
        ax.text(high, y, f"  {middle:,.0f}", va="center")
        ax.text(0, y - 0.29, label, va="bottom")
    ax.set(yticks=[], ylim=(len(rows) - 0.6, -0.7), xlabel="tokens per second, batch 1")
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)


def draw_sizes(ax: Any, rows: Sequence[Result], name: str) -> None:
    for system in dict.fromkeys(row["system"] for row in rows):
        label, colour, _, marker, dash = look(system)
        mine = [row for row in rows if row["system"] == system]
        x = [row["prompt_tokens"] for row in mine]
        y = [1e3 * row[name]["median"] for row in mine]
        ax.plot(x, y, dash, color=colour, marker=marker, label=label)
    sizes = sorted({row["prompt_tokens"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])


def draw_context(ax: Any, sections: Result) -> None:
    rows = sections["context"][-1]["rows"]
    draw_sizes(ax, rows, "tpot")
    if "roofline" in sections:
        sizes = {row["prompt_tokens"] for row in rows}
        floor = [r for r in sections["roofline"][-1]["rows"] if r["context"] in sizes]
        x, y = (
            [row["context"] for row in floor],
            [1e3 * row["seconds"] for row in floor],
        )
        ax.plot(x, y, ":", color="black", label="floor: bytes / bandwidth")
    ax.set(xlabel="tokens of context", ylabel="TPOT (ms)")
    show_ratios(ax)


def draw_prefill(ax: Any, sections: Result) -> None:
    draw_sizes(ax, sections["prefill"][-1]["rows"], "ttft")
    ax.set(xlabel="tokens of prompt", ylabel="TTFT (ms)")
    show_ratios(ax)


def show_ratios(ax: Any) -> None:
    """A logarithmic axis: lines that are equally far apart differ by the same factor."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.legend(loc="best", frameon=True, framealpha=1, edgecolor="none")


def draw_ladder(ax: Any, sections: Result) -> None:
    for row in sections["ladder"][-1]["rows"]:
        tpot = 1e3 * row["tpot"]["median"]
        ax.barh(row["system"], tpot, color="0.75", edgecolor="black", height=0.6)
        ax.text(tpot, row["system"], f"  {tpot:.2f}", va="center")
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("TPOT (ms)")


# By section: file, function, and the height in inches, of which a part is for each bar.
FIGURES: dict[str, tuple[str, Callable[[Any, Result], None], float, float]] = {
    "decode": ("benchmark-speed.png", draw_speed, 0.85, 0.65),
    "context": ("benchmark-context.png", draw_context, 3.2, 0),
    "prefill": ("benchmark-prefill.png", draw_prefill, 3.2, 0),
    "ladder": ("benchmark-ladder.png", draw_ladder, 0.9, 0.4),
}


def draw_figures(app: Sphinx) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = find_record()
    record = json.loads(path.read_text(encoding="utf-8"))
    where = record["setup"]["device"]
    weights = record["setup"]["weights"]
    style = mpl.rc_params_from_file(
        ROOT / "notebooks" / "folo.mplstyle", use_default_template=False
    )
    for section, (name, draw, height, per_bar) in FIGURES.items():
        if section not in record["sections"]:
            continue
        with mpl.rc_context(style):
            height += per_bar * len(record["sections"][section][-1]["rows"])
            figure = Figure(figsize=(7, height))
            ax = figure.subplots()
            draw(ax, record["sections"])
            ax.set_title(f"{where}, {weights}", fontsize=10, loc="left")
            buffer = io.BytesIO()
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        write_if_changed(COPIES / name, buffer.getvalue())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", draw_figures)
    return {"version": "1", "parallel_read_safe": True}
