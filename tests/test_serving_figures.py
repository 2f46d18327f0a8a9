"""What page 17 shows of many clients: a figure, and the numbers in its prose."""

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
    unsteady = make_gpu()
    unsteady["sections"]["serving"][-1]["speeds"]["http"]["spread"] = 0.3
    ax = Figure().subplots()
    shown.draw_shares(ax, [CPU, unsteady])
    assert ax.get_title() == f"HTTP keeps {share} (CPU)\nof the speed"
    ax = Figure().subplots()
    shown.draw_shares(ax, [unsteady])
    assert ax.get_title() == "What is left of the speed"


def test_without_http_a_figure_says_so() -> None:
    record = make_gpu()
    del record["sections"]["serving"][-1]["speeds"]["http"]
    ax = Figure().subplots()
    shown.draw_shares(ax, [record])
    assert ax.get_title() == "No HTTP" and len(ax.patches) == 1


def test_page_17_says_what_its_recordings_hold() -> None:
    cells = nbformat.read(DATA.parent / "17_serving.ipynb", as_version=4).cells
    texts = {cell.id: cell.source for cell in cells}
    sizes = [latest(record, "serving")["sizes"]["streams"] for record in (CPU, H200)]
    assert f"model and {sizes[0]} prompts, on an H200" in texts["17-65"]
    assert f"Qwen3-0.6B's shape and {sizes[1]}." in texts["17-65"]
    made = latest(H200, "serving")
    streams, http = (shown.get_shares(made, way) for way in shown.WAYS)
    assert min(streams) > 0.93 and "cost next to nothing" in texts["17-67"]
    low, *rest = sorted(http)
    assert low < 0.55 and min(rest) > 0.75 and "One run of HTTP" in texts["17-67"]
    total = made["sizes"]["streams"] * made["sizes"]["stream_tokens"]
    speeds = made["speeds"]["http"]
    seconds = total / min(speeds["values"]) - total / speeds["median"]
    assert 0.3 < seconds < 0.4 and "a third of a second slower" in texts["17-67"]
    for one in (latest(CPU, "serving"), made):
        streams, http = (one["speeds"][way]["of_generate"] for way in shown.WAYS)
        assert streams - http > 1 - streams  # "more than the streams"
