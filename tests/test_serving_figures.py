"""What page 18 shows of many clients: figures, and the numbers in its prose."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from folo_lib.course import serving_figures as shown
from folo_lib.course.throughput_figures import latest, read_recording

DATA = Path(__file__).resolve().parent.parent / "notebooks" / "data"
CPU = json.loads((DATA / "serving_cpu.json").read_text("utf-8"))
H200 = read_recording(DATA / "serving_h200.json")
NOTHING = read_recording(DATA / "no such file")
Result = dict[str, Any]


def make_gpu() -> Result:
    """The recording of a CPU as that of a GPU, where HTTP keeps less."""
    record: Result = copy.deepcopy(CPU)
    record["setup"]["device"] = "NVIDIA H200"
    made = record["sections"]["serving"][-1]
    made["speeds"]["http"]["of_generate"] = 0.4
    return record


def test_shares_say_what_is_left_on_each_machine() -> None:
    ax = Figure().subplots()
    shown.draw_shares(ax, [CPU, make_gpu(), NOTHING])
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [
        "CPU: AsyncLLMEngine",
        "CPU: HTTP",
        "H200: AsyncLLMEngine",
        "H200: HTTP",
    ]
    speeds = latest(CPU, "serving")["speeds"]
    share = f"{speeds['http']['of_generate']:.0%}"
    assert ax.get_title() == f"HTTP keeps {share} (CPU), 40% (H200)\nof the speed"
    widths = [bar.get_width() for bar in ax.patches]
    assert widths[3] == pytest.approx(40)
    assert widths[0] == pytest.approx(100 * speeds["async"]["of_generate"])
    dots = ax.lines[1].get_xdata()
    assert len(dots) == len(speeds["http"]["values"])
    unsteady = make_gpu()
    unsteady["sections"]["serving"][-1]["speeds"]["http"]["spread"] = 0.3
    ax = Figure().subplots()
    shown.draw_shares(ax, [CPU, unsteady])
    assert ax.get_title() == f"HTTP keeps {share} (CPU)\nof the speed"
    ax = Figure().subplots()
    shown.draw_shares(ax, [unsteady])
    assert ax.get_title() == "What is left of the speed"


def test_waits_are_multiples_of_the_closed_loop_above_them() -> None:
    ax = Figure().subplots()
    shown.draw_waits(ax, [CPU, make_gpu()])
    half, most = ax.lines[:2]
    rows = latest(CPU, "serving")["loads"]
    assert list(half.get_xdata()) == [100 * row["load"] for row in rows]
    last = rows[-1]["ttft"]["p99"] / rows[-1]["closed"]["ttft"]["p50"]
    assert most.get_ydata()[-1] == pytest.approx(last)
    names = ["CPU, half", "CPU, 99 %", "H200, half", "H200, 99 %"]
    assert [line.get_label() for line in ax.lines[:4]] == names
    ax.figure.draw_without_rendering()
    boxes = sorted(
        (text.get_window_extent() for text in ax.texts), key=lambda box: box.y0
    )
    assert all(low.y1 < high.y0 + 3 for low, high in pairwise(boxes))  # no overlap


def test_without_http_a_figure_says_so() -> None:
    record = make_gpu()
    del record["sections"]["serving"][-1]["speeds"]["http"]
    ax = Figure().subplots()
    shown.draw_shares(ax, [record])
    assert ax.get_title() == "No HTTP" and len(ax.patches) == 1


def test_page_18_says_what_its_recordings_hold() -> None:
    cells = nbformat.read(DATA.parent / "18_benchmark.ipynb", as_version=4).cells
    texts = {cell.id: cell for cell in cells}
    prose = texts["12-serving-b"].source
    made = latest(CPU, "serving")
    said = texts["12-serving-a"].source
    assert f"{made['sizes']['streams']} on the CPU" in said
    assert f"{latest(H200, 'serving')['sizes']['streams']} on the H200" in said
    few, many = [], []
    for one in (made, latest(H200, "serving")):
        rates = [row["rate"] / row["load"] for row in one["loads"]]  # the capacities
        assert max(rates) / min(rates) < 1.23  # "by up to a fifth"
        for row in one["loads"]:
            waits = [
                row["ttft"][p] / row["closed"]["ttft"]["p50"] for p in ("p50", "p99")
            ]
            if row["load"] < 0.9:
                few.append(waits)
            elif row["load"] > 1:
                many.append(waits)
    assert all(half < 1 < most for half, most in few)
    assert max(most for _, most in few[:2]) > 5  # "on the CPU several times"
    assert all(half > 5 for half, _ in many)
    made = latest(H200, "serving")
    streams, http = (shown.get_shares(made, way) for way in shown.WAYS)
    assert min(streams) > 0.93 and "cost next to nothing" in prose
    low, *rest = sorted(http)
    assert (
        low < 0.55
        and min(rest) > 0.75
        and "one run of HTTP took about as much" in prose
    )
    earlier = H200["sections"]["serving"][0]
    stalls = [one["loads"][0]["ttft"]["p99"] for one in (made, earlier)]
    assert 0.4 < stalls[0] < 0.5 and round(1e3 * stalls[1]) == 8
    seconds = [
        made["sizes"]["streams"] * made["sizes"]["stream_tokens"] / speed
        for speed in (
            min(made["speeds"]["http"]["values"]),
            made["speeds"]["http"]["median"],
        )
    ]
    assert 0.3 < seconds[0] - seconds[1] < 0.4
    for one in (latest(CPU, "serving"), made):
        streams, http = (one["speeds"][way]["of_generate"] for way in shown.WAYS)
        assert streams - http > 1 - streams  # "more of the speed than the streams do"
