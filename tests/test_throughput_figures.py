"""What page 18 shows of many requests: figures, lines of text, and the numbers in its prose."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from inspect import signature
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from folo_lib.benchmark_bench import LatencySizes, Sizes
from folo_lib.benchmark_serving import PERCENTILES, ServingSizes
from folo_lib.benchmark_waterfall import RUNGS
from folo_lib.benchmark_workloads import ThroughputSizes
from folo_lib.course import throughput_figures as shown
from folo_lib.course.figures import HUGGING_FACE, OTHER, US
from folo_lib.course.motion.cards import choose_gpu

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "notebooks" / "data" / "throughput_h200.json"
PAGE = ROOT / "notebooks" / "18_benchmark.ipynb"
Result = dict[str, Any]


def row(requests: int, tokens: int, seconds: list[float], **more: Any) -> Result:
    middle = sorted(seconds)[len(seconds) // 2]
    spread = (max(seconds) - min(seconds)) / middle
    made = {"requests": requests, "output_tokens": tokens, "seconds": seconds}
    return made | {"spread": spread, "tokens_per_second": tokens / middle} | more


def engine(speed: float) -> Result:
    more = {"floor_tokens_per_second": 400.0, "share_of_floor": speed / 400}
    times = [1000 / speed * factor for factor in (0.9, 1.0, 1.25)]
    return {
        "one": {"ttft_ms": 3.21, "tpot_ms": 1.234},
        "equal": [row(n, 1000, times, **more) for n in (8, 32, 64)],
        "mixed": row(256, 1000, times, **more),
        "memory": {"beyond": {"allocated": 300 * 2**20}},
    }


def token(requests: int, prompt_tokens: int, ms: float, **more: Any) -> Result:
    """A row of `measure_tpot`, beside a floor of half a millisecond."""
    row = {"requests": requests, "prompt_tokens": prompt_tokens, "tpot_ms": ms}
    seconds = [0.002 + ms / 100 * factor for factor in (0.99, 1, 1.015)]
    row |= {
        "output_tokens": 11,
        "first_token_seconds": [0.001, 0.002, 0.003],
    }
    row |= {"seconds": seconds}
    least = 1 + requests * prompt_tokens / 1000
    return row | {"spread": 0.025, "floors": 2 * ms, "least_floors": least} | more


SIZES = (1, 128), (16, 128), (1, 1024), (1, 8192)


def tpot_section() -> Result:
    rows = [token(*size, ms) for size, ms in zip(SIZES, (1, 1.5, 2, 4), strict=True)]
    sampled = [token(1, 128, 1.25, more_ms=0.25), token(16, 128, 2, more_ms=None)]
    begun = [token(1, 128, ms) for ms in (1.0, 1.02)]
    return {
        "floor": {"bytes": 2e9, "ms": 0.5},
        "rows": rows,
        "left_out": {"4 requests of 128 tokens": "no luck"},
        "sampled": {"rows": sampled, "left_out": {}},
        "starts": {"rows": begun, "left_out": ["no card"], "spread": 0.02},
    }


@pytest.fixture
def record() -> Result:
    """A recording in the form of the benchmark's, with easy numbers."""
    meta = {"date": "2026-01-02T03:04:05+00:00", "seconds": 9.0}
    theirs = [row(32, 90, [10.0]) | {"system": "generate_batch"}]
    rungs = [
        ("slow", 1, [2.0]),
        ("many", 256, [50.0]),
        ("fast", 256, [190.0, 200.0, 230.0]),
    ]
    rows = [
        {
            "rung": name,
            "requests": requests,
            "starts": [{"tokens_per_second": speed} for speed in speeds],
            "tokens_per_second": sorted(speeds)[len(speeds) // 2],
        }
        for name, requests, speeds in rungs
    ]
    setup = {"device": "my card", "torch": "9.9"}
    vllm = [
        meta | {"versions": {"vllm": "1.2"}} | engine(speed) for speed in (125, 100)
    ]
    for start, ms in zip(vllm, (3.0, 2.0), strict=True):
        start["tpot"] = {"rows": [token(*size, ms) for size in SIZES[:3]]}
    vllm[0]["tpot"]["rows"][1]["tpot_ms"] = 1.75
    gaps = {"running": 64, "long_prompt": 8192}
    gaps |= {
        name: {"median": value}
        for name, value in (("before", 0.01), ("after", 0.04), ("ttft", 0.09))
    }
    context = {"prompt_tokens": 128, "tpot": {"median": 0.00123}}
    start = {"compile_cache": "empty", "first_token_seconds": 12.34}
    sections = {
        "throughput": [
            meta
            | {
                "bandwidth": {"median": 2e12},
                "folo_lib": engine(200),
                "huggingface": {"rows": theirs, "left_out": {}},
            }
        ],
        "vllm": vllm,
        "waterfall": [meta | {"rows": rows, "left_out": {"odd": "no such option"}}],
        "tpot": [meta | tpot_section()],
        "latency": [meta | {"context": [context], "gaps": gaps, "starts": [start]}],
    }
    return {"setup": setup, "sections": sections}


@pytest.fixture
def ax() -> Any:
    return Figure(figsize=(8, 3)).subplots()


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def dots(ax: Any) -> list[int]:
    """How many dots each line of dots has."""
    return [len(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"]


def test_the_better_start_counts_workload_by_workload(record: Result) -> None:
    one, two = record["sections"]["vllm"]
    assert shown.best_start([two, one]) is one["mixed"]
    two["equal"][1]["tokens_per_second"] = 999
    assert shown.best_start([one, two], 32) is two["equal"][1]
    assert shown.best_start([one, two], 64) is one["equal"][2]
    assert shown.best_start([], 64) == {} == shown.best_start([one], 7)


def test_systems(ax: Any, record: Result) -> None:
    shown.draw_systems(ax, record)
    assert [to_hex(bar.get_facecolor()).upper() for bar in ax.patches] == [
        look.colour for look in (US, OTHER, HUGGING_FACE)
    ]
    assert [round(bar.get_width()) for bar in ax.patches] == [200, 125, 9]
    assert all(bar.get_x() == 0 for bar in ax.patches) and ax.get_xlim()[0] == 0
    assert dots(ax) == [6, 6]  # runs and starts of both; one run has none
    ours, theirs = (sorted(map(round, line.get_xdata())) for line in ax.lines[:2])
    assert ours == [160, 190, 200, 200, 222, 230]
    assert theirs == [80, 100, 100, 111, 125, 139]
    assert texts(ax) == [
        "200", "125", "9 (the first 32 of 256 requests)", "memory allows\n400",
    ]  # fmt: skip
    assert ax.get_title() == "1.52 to 1.84 times the tokens of vLLM"
    assert ax.get_xlim()[1] > 400


def test_systems_without_vllm(ax: Any, record: Result) -> None:
    del record["sections"]["vllm"]
    shown.draw_systems(ax, record)
    assert len(ax.patches) == 2 and ax.get_title() == ""
    assert shown.describe(record, "throughput") == "my card, torch 9.9, 2026-01-02"


def test_batches(ax: Any, record: Result) -> None:
    shown.draw_batches(ax, record)
    assert texts(ax) == ["folo_lib", "vLLM"]
    ours, *_ = ax.lines
    assert ax.get_title() == "Ahead of vLLM at every size"
    assert list(ours.get_xdata()) == [8, 32, 64]
    assert ours.get_ydata() == pytest.approx([200] * 3)
    assert ax.get_ylim()[0] == 0 and ax.get_yscale() == "linear"
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert ax.get_xscale() == "log" and labels == ["8", "32", "64"]


def test_waterfall(ax: Any, record: Result) -> None:
    shown.draw_waterfall(ax, record)
    medians = ax.lines
    assert [list(line.get_xdata()) for line in medians] == [[2], [50], [200]]
    colours = [line.get_color() for line in medians]
    assert colours == [shown.SLOW.colour, US.colour, US.colour]
    assert ax.get_xscale() == "log" and ax.get_xlim()[0] < 2 < 230 < ax.get_xlim()[1]
    assert texts(ax) == ["2 (the first of 256 requests)", "50", "200, 4.00 times"]
    assert ax.get_title() == "With all 256 requests: 50 to 200"
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "slow",
        "many",
        "fast",
    ]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top


def test_starts(ax: Any, record: Result) -> None:
    shown.draw_starts(ax, record)
    starts, median = ax.lines
    assert list(starts.get_xdata()) == [95, 100, 115] and {*starts.get_ydata()} == {2}
    assert list(median.get_xdata()) == [100, 100]


def test_tpot(ax: Any, record: Result) -> None:
    """Ours and vLLM's; the faster start of each size, where it has the size."""
    shown.draw_tpot(ax, record, "requests")
    ours, theirs, least = ax.lines
    assert list(ours.get_ydata()) == [1, 1.5] and list(theirs.get_ydata()) == [2, 1.75]
    assert list(least.get_ydata()) == pytest.approx([1.128, 3.048])
    assert texts(ax) == ["folo_lib", "vLLM", "memory allows"]
    assert [one.get_text() for one in ax.get_xticklabels()] == ["1", "16"]
    assert ax.get_ylim() == pytest.approx((0, 1.12 * 4 * 1.015))
    dots, _ = ax.collections
    assert dots.get_offsets()[:3, 1].tolist() == pytest.approx([0.99, 1, 1.015])
    assert ax.get_title() == "Ours: 0.9, then 0.5 times the least"
    ax = Figure().subplots()
    shown.draw_tpot(ax, record, "prompt_tokens")
    ours, theirs, least = ax.lines
    assert list(ours.get_xdata()) == [0, 1, 2] and list(theirs.get_xdata()) == [0, 1]
    assert list(ours.get_ydata()) == [1, 2, 4] and list(theirs.get_ydata()) == [2, 2]
    labels = [one.get_text() for one in ax.get_xticklabels()]
    assert labels == ["128", "1,024", "8,192"]
    del record["sections"]["vllm"], record["sections"]["throughput"]
    ax = Figure().subplots()
    shown.draw_tpot(ax, record, "requests")
    assert texts(ax) == ["folo_lib", "memory allows"]
    _, least = ax.lines  # as fast as the kernel, where no sum was measured
    assert list(least.get_ydata()) == pytest.approx([0.564, 1.524])


def test_captions_name_card_versions_and_date(record: Result) -> None:
    expected = "my card, torch 9.9, vLLM 1.2, 2026-01-02"
    assert shown.describe(record, "throughput") == expected
    assert shown.describe(record, "tpot") == expected
    assert shown.describe(record, "waterfall") == "my card, torch 9.9, 2026-01-02"


def test_lines(record: Result) -> None:
    lines = shown.list_throughput(record)
    assert lines[0] == (
        "folo_lib: mixed 200 tokens/s (runs 35.0% apart); one alone 3.2 ms to the first token, "
        "then 1.23 ms each"
    )
    assert [line[:13] for line in lines[1:3]] == ["vLLM, start 1", "vLLM, start 2"]
    assert lines[3] == "Hugging Face, generate_batch: 9 tokens/s"
    assert lines[4] == "what memory allows is read at 2.00 TB/s by a sum"
    assert lines[6].split() == [
        "32",
        "equal",
        "requests:",
        "200",
        "tokens/s,",
        "50%",
        "of",
        "what",
        "memory",
        "allows,",
        "no",
        "ratio",
        "to",
        "vLLM",
        "(its",
        "runs",
        "35%",
        "apart)",
    ]
    assert lines[8].split()[:3] == ["256", "mixed", "requests:"]
    for start in record["sections"]["vllm"]:
        for row in start["equal"]:
            row["spread"] = 0.25
    ends = "1.60 times vLLM (its runs 25% apart)"  # a ratio where it says something
    assert shown.list_throughput(record)[6].endswith(ends)
    assert lines[9:] == [
        "memory beyond weights and cache: 300 MiB",
        "3 more starts: 190 to 230 tokens/s, 1.52 to 1.84 times vLLM",
    ]
    [whole] = record["sections"]["waterfall"]
    first, *others = whole["rows"]
    parts = [whole | {"rows": [dict(first, tokens_per_second=9)], "left_out": {}}]
    parts += [whole | {"rows": [first, others[0]]}, whole | {"rows": others[1:]}]
    in_parts = record | {"sections": {**record["sections"], "waterfall": parts}}
    joined = [shown.join_waterfall(one)["rows"] for one in (in_parts, record)]
    assert joined[0] == joined[1]
    names = [*RUNGS][:3]
    for row, name in zip(whole["rows"], names, strict=True):
        row["rung"] = name
    whole["rows"].reverse()
    in_order = [row["rung"] for row in shown.join_waterfall(record)["rows"]]
    assert in_order == names, "in the order of the way, not of the recording"
    assert shown.list_latency(record) == [
        "after   128 tokens: 1.23 ms per token",
        "longest gap of 64 requests: 10.0 ms",
        "longest gap when a prompt of 8,192 tokens arrives: 40.0 ms",
        "first token of that prompt: 90.0 ms",
        "compile cache empty: 12.3 s to the first token",
    ]


def test_lines_of_tpot(record: Result) -> None:
    lines = shown.list_tpot(record)
    assert lines == [
        " 1 ×    128 tokens: 1.000 ms (runs 2.5% apart), 0.89 times the least, "
        "vLLM 2.000 ms (2.5% apart)",
        "16 ×    128 tokens: 1.500 ms (runs 2.5% apart), 0.49 times the least, "
        "vLLM 1.750 ms (2.5% apart)",
        " 1 ×  1,024 tokens: 2.000 ms (runs 2.5% apart), 0.99 times the least, "
        "vLLM 2.000 ms (2.5% apart)",
        " 1 ×  8,192 tokens: 4.000 ms (runs 2.5% apart), 0.44 times the least",
        "drawn with filters, 1 at once: 0.250 ms more per step",
        "2 starts, compile cache empty: 1.000 to 1.020 ms, 2.0% apart",
        "4 requests of 128 tokens was left out: no luck",
        "a start was left out: no card",
    ]
    made = shown.latest(record, "tpot")
    made["starts"], made["rows"] = {"rows": [], "left_out": []}, []
    assert len(shown.list_tpot(record)) == 2
    ax = Figure().subplots()
    shown.draw_tpot(ax, record, "requests")
    assert texts(ax) == ["no recording yet"]


def test_nothing_is_shown_of_a_recording_that_is_not_there(tmp_path: Path) -> None:
    record = shown.read_recording(tmp_path / "none.json")
    for draw in (
        shown.draw_systems,
        shown.draw_batches,
        shown.draw_waterfall,
        shown.draw_starts,
    ):
        ax = Figure().subplots()
        draw(ax, record)
        assert texts(ax) == ["no recording yet"] and not ax.patches
    for by in ("requests", "prompt_tokens"):
        ax = Figure().subplots()
        shown.draw_tpot(ax, record, by)
        assert texts(ax) == ["no recording yet"] and not ax.lines
    assert shown.list_tpot(record) == ["no recording yet"]
    assert shown.list_throughput(record) == ["no recording yet"]
    assert shown.list_latency(record) == ["no recording yet"]
    assert shown.describe(record, "latency") == ""


def test_the_last_recording_is_drawn(record: Result) -> None:
    assert shown.latest(record, "waterfall") is record["sections"]["waterfall"][-1]
    record["sections"]["waterfall"].append({"rows": []})
    assert shown.latest(record, "waterfall") == {"rows": []}


# The page


def cells_of_section() -> list[Result]:
    """The cells of section 11, to the next heading of its rank."""
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    found: list[Result] = []
    for cell in cells:
        text = "".join(cell["source"])
        if found and "## What you built" in text:
            found.append(cell | {"source": [text.split("## What you built")[0]]})
            break
        if found:
            found.append(cell)
        elif "## 11. Many requests" in text:
            found.append(cell | {"source": [text.split("## 11. Many requests")[1]]})
    return found


def printed(cells: list[Result]) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs)


def numbers(text: str) -> set[str]:
    # What follows a letter is a name, as in H200.
    return {*re.findall(r"(?<!\w)\d+(?:,\d{3})*(?:\.\d+)?", text)}


def test_the_page_prints_the_recording() -> None:
    text, record = printed(cells_of_section()), shown.read_recording(RECORD)
    lists = shown.list_throughput, shown.list_tpot
    for line in [line for one in (*lists, shown.list_latency) for line in one(record)]:
        assert line + "\n" in text, (
            "tools/run_pages.py --save notebooks/18_benchmark.ipynb"
        )


def test_numbers_in_the_prose_are_printed_or_options() -> None:
    """Options are those of the benchmark's sizes; a date must be one that is printed."""
    cells = cells_of_section()
    outputs = numbers(printed(cells))
    wish = signature(choose_gpu).parameters
    options = {"0", f"{wish['speed'].default}"}  # the seed, and what Figure 8 asks for
    for sizes in (ThroughputSizes(), LatencySizes(), Sizes()):
        for field in fields(sizes):
            value = getattr(sizes, field.name)
            values = value if isinstance(value, tuple) else (value,)
            options |= {f"{one:,}" for one in values if isinstance(one, int)}
    options |= {f"{100 * load:.0f}" for load in ServingSizes().loads}  # per cent
    options |= {str(percentile) for percentile in PERCENTILES}
    for cell in cells:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"```.*?```", "", "".join(cell["source"]), flags=re.DOTALL)
            text = re.sub(r"(?:[Ss]ection|[Pp]age|Figure) \d+|^#+ \d+\.", "", text)
            text = re.sub(r"^## \d+\.", "", text, flags=re.MULTILINE)
            unknown = numbers(text) - outputs - options
            assert not unknown, (cell["id"], unknown)


def test_the_recording_is_of_the_real_workload() -> None:
    record = shown.read_recording(RECORD)
    made = shown.latest(record, "throughput")
    for system in (made["folo_lib"], *record["sections"]["vllm"]):
        assert system["mixed"]["output_tokens"] == 133_966
        assert system["mixed"]["requests"] == 256
        assert len(system["mixed"]["seconds"]) >= 3
        assert [one["requests"] for one in system["equal"]] == [8, 32, 64, 128, 256]
    few = shown.latest(record, "tpot")
    for one in (few, *(start["tpot"] for start in record["sections"]["vllm"])):
        assert [row["requests"] for row in one["rows"]] == [1, 2, 4, 8, 16, 1, 1, 1]
        assert all(len(row["seconds"]) >= 5 for row in one["rows"])
    assert len(few["starts"]["rows"]) == 5 and few["runner"] == "FusedRunner"
    assert RECORD.stat().st_size < 400_000


def test_the_recording_is_whole() -> None:
    record = shown.read_recording(RECORD)
    rungs = shown.join_waterfall(record)["rows"]
    assert [rung["rung"] for rung in rungs] == [*RUNGS]
    assert [len(rung["starts"]) for rung in rungs] == [1] * 4 + [5] * 4
    assert len(record["sections"]["vllm"]) >= 2


def test_the_recording_reaches_what_was_asked() -> None:
    """Tokens per second, in all starts; and times per token, in floors.

    Of one request six starts are known, of which the median counts.
    """
    record = shown.read_recording(RECORD)
    made = shown.latest(record, "throughput")["folo_lib"]
    starts = shown.join_waterfall(record)["rows"][-1]["starts"]
    speeds = [one["tokens_per_second"] for one in (made["mixed"], *starts)]
    assert min(speeds) >= 26_000
    vllm = shown.best_start(record["sections"]["vllm"])["tokens_per_second"]
    assert median(speeds) >= 1.1 * vllm
    asked = {8: 4_500, 32: 16_000, 256: 50_000}
    for row in made["equal"]:
        assert row["tokens_per_second"] >= asked.get(row["requests"], 0)
    few = shown.latest(record, "tpot")
    alone, *rows = few["rows"]
    times = [row["tpot_ms"] for row in (alone, *few["starts"]["rows"])]
    assert median(times) <= 2.1 * few["floor"]["ms"]
    assert few["starts"]["spread"] <= 0.03
    bounds = {(8, 128): 2.7, (16, 128): 3.6}
    bounds |= {(1, 1024): 2.6, (1, 8192): 3.4, (1, 32768): 6.2}
    for row in rows:
        assert row["floors"] <= bounds.get((row["requests"], row["prompt_tokens"]), 2.7)
    assert all(row["more_ms"] <= 0.1 for row in few["sampled"]["rows"])


def test_the_prose_compares_starts() -> None:
    """Of page 18: five more starts, and two of the compiled rung that are slower."""
    record = shown.read_recording(RECORD)
    ours = shown.latest(record, "throughput")["folo_lib"]["mixed"]["tokens_per_second"]
    gains = [speed / ours for speed in shown.list_starts(record)]
    assert len(gains) == 5 and all(1.01 < gain < 1.03 for gain in gains)
    [row] = [
        row for row in shown.join_waterfall(record)["rows"] if row["rung"] == "compiled"
    ]
    slow, less, *rest = sorted(start["tokens_per_second"] for start in row["starts"])
    assert [round(100 * (1 - one / rest[0])) for one in (less, slow)] == [7, 9]


def test_the_prose_says_which_rung_gains_nothing() -> None:
    rows = shown.join_waterfall(shown.read_recording(RECORD))["rows"]
    speeds = [row["tokens_per_second"] for row in rows]
    falls = [
        row["rung"] for i, row in enumerate(rows) if i and speeds[i] < speeds[i - 1]
    ]
    assert falls == ["KV cache"]
    gains = [after / before for before, after in pairwise(speeds)]
    assert sorted(gains)[-2:] == sorted(gains[1:3])  # "the second rung and the fourth"
    assert speeds[3] / speeds[1] > 300


def test_the_prose_says_who_is_how_near() -> None:
    """Of page 18: shares of what memory allows, and distances from the least."""
    record = shown.read_recording(RECORD)
    made = shown.latest(record, "throughput")
    ours = made["folo_lib"]["mixed"]
    share = ours["share_of_floor"]
    theirs = max(
        one["mixed"]["tokens_per_second"] for one in record["sections"]["vllm"]
    )
    assert round(share, 1) == 0.7 and abs(share - 2 / 3) < 0.02
    assert abs(share * theirs / ours["tokens_per_second"] - 0.6) < 0.02
    rows = shown.latest(record, "tpot")["rows"]
    short, *_, long = [
        shown.times_the_least(record, row) for row in rows if row["requests"] == 1
    ]
    assert abs(short - 2) < 0.1 and 1.3 < long < 1.5
    [most] = [row for row in rows if row["requests"] == 16]
    assert 2.1 < shown.times_the_least(record, most) < 2.4


def test_the_prose_says_who_ran_what() -> None:
    """The table at the beginning of section 11 of page 18."""
    record = shown.read_recording(RECORD)
    cells = {cell["id"]: "".join(cell["source"]) for cell in cells_of_section()}
    rows = re.findall(
        r"^\| ([^|]+) \|(.+)\|$", cells["12-workload-a"], flags=re.MULTILINE
    )
    table = {name: [one.strip() for one in rest.split("|")] for name, rest in rows}
    ours = shown.latest(record, "throughput")["folo_lib"]["mixed"]
    assert table["our engine"][1:] == [
        "1",
        str(len(ours["seconds"])),
        str(ours["requests"]),
    ]
    starts = record["sections"]["vllm"]
    [runs] = {len(start["mixed"]["seconds"]) for start in starts}
    assert table["vLLM"][1:] == [
        f"{len(starts)}, and the better counts",
        str(runs),
        "256",
    ]
    [theirs] = shown.latest(record, "throughput")["huggingface"]["rows"]
    assert len(theirs["seconds"]) == 1
    assert table["Hugging Face"][3] == f"{theirs['requests']}, greedy"
    rungs = shown.join_waterfall(record)["rows"]
    slow = [rung["requests"] for rung in rungs if len(rung["starts"]) == 1]
    assert table["slow rungs of Figure 5"][3] == "{}, {}, {} and {}".format(*slow)
    assert {len(rung["starts"]) for rung in rungs[len(slow) :]} == {5}
    assert table["fast rungs of Figure 5"][1] == "5"


def test_the_prose_says_how_far_to_trust_vllm() -> None:
    """Of page 18: its weights are its own, and its time does not follow the floor."""
    record = shown.read_recording(RECORD)
    starts, few = record["sections"]["vllm"], shown.latest(record, "tpot")
    assert {start["options"]["load_format"] for start in starts} == {"dummy"}
    for key, largest in (("requests", 16), ("prompt_tokens", 32_768)):
        [end] = [row for row in few["rows"] if row[key] == largest]
        ours = few["rows"][0]
        growth = [
            shown.best_tpot(starts, end)["tpot_ms"]
            / shown.best_tpot(starts, ours)["tpot_ms"],
            end["least_floors"] / ours["least_floors"],
        ]
        assert growth[0] < 0.9 * growth[1]
    spreads = [shown.best_tpot(starts, row)["spread"] for row in few["rows"]]
    assert 0.7 < max(spreads) < 0.8  # "up to three quarters of their median apart"
    for row in few["rows"]:
        theirs = shown.best_tpot(starts, row)["tpot_ms"]
        least = shown.find_least_ms(record, row)
        assert theirs > 2 * least and abs(theirs - least - 1.5) < 0.3
    assert {start["options"]["max_model_len"] for start in starts} == {32_896}
    speed = few["floor"]["bytes"] / few["floor"]["ms"] * 1e3
    made = shown.latest(record, "throughput")
    assert 1.045 < speed / made["bandwidth"]["median"] < 1.055  # "five per cent more"
