"""What page 18 shows of many clients: figures, and the numbers in its prose."""

from __future__ import annotations

import copy
import json
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


def test_waits_are_multiples_of_the_closed_loop_above_them() -> None:
    ax = Figure().subplots()
    shown.draw_waits(ax, [CPU, make_gpu()])
    half, most = ax.lines[:2]
    rows = latest(CPU, "serving")["loads"]
    assert list(half.get_xdata()) == [100 * row["load"] for row in rows]
    last = rows[-1]["ttft"]["p99"] / rows[-1]["closed"]["ttft"]["p50"]
    assert most.get_ydata()[-1] == pytest.approx(last)
    assert [line.get_label() for line in ax.lines[:4]] == [
        "CPU, half",
        "CPU, 99 %",
        "H200, half",
        "H200, 99 %",
    ]


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
    costs = [
        [
            a > b
            for a, b in zip(
                *(shown.get_shares(one, way) for way in shown.WAYS), strict=True
            )
        ]
        for one in (latest(CPU, "serving"), made)
    ]
    assert all(costs[0]) and sum(costs[1]) == 4 and "in one run of five" in prose
    assert min(shown.get_shares(made, "async")) < 0.6  # "lie far apart"
    for one in (latest(CPU, "serving"), made):
        streams, http = (one["speeds"][way]["of_generate"] for way in shown.WAYS)
        assert streams - http > 1 - streams  # "more of the speed than the streams do"
