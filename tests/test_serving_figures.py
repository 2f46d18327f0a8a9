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
    widths = [bar.get_width() for bar in ax.patches]
    assert widths[3] == pytest.approx(40)
    assert widths[0] == pytest.approx(100 * speeds["async"]["of_generate"])
    dots = ax.lines[1].get_xdata()
    assert len(dots) == len(speeds["http"]["values"])


def test_without_http_a_figure_says_so() -> None:
    record = make_gpu()
    del record["sections"]["serving"][-1]["speeds"]["http"]
    ax = Figure().subplots()
    shown.draw_shares(ax, [record])
    assert len(ax.patches) == 1


def test_page_17_says_what_its_recordings_hold() -> None:
    cells = nbformat.read(DATA.parent / "17_serving.ipynb", as_version=4).cells
    texts = {cell.id: cell.source for cell in cells}
    sizes = [latest(record, "serving")["sizes"]["streams"] for record in (CPU, H200)]
    assert f"model and {sizes[0]} prompts, on an H200" in texts["17-65"]
    assert f"Qwen3-0.6B's shape and {sizes[1]}." in texts["17-65"]
    prose, made = texts["17-67"], latest(H200, "serving")
    costs = []
    for one in (latest(CPU, "serving"), made):
        streams, http = (100 * one["speeds"][way]["of_generate"] for way in shown.WAYS)
        costs.append((100 - streams, streams - http))
        assert 19 < 100 - http < 23  # "HTTP a fifth"
    (few, many), (less, more) = costs
    assert f"cost {few:.0f} per cent on the CPU and {less:.0f} on the H200" in prose
    assert f"HTTP {many:.0f} and {more:.0f} more" in prose
    threads = made["threads"]
    assert 0.6 < threads["generate"]["read"] / threads["generate"]["wall"] < 2 / 3
    assert threads["async"]["loop"] < threads["generate"]["read"]
    assert threads["http"]["loop"] / threads["async"]["loop"] == pytest.approx(
        2.5, abs=0.1
    )
    speeds = made["speeds"]["http"]
    total = made["sizes"]["streams"] * made["sizes"]["stream_tokens"]
    seconds = total / min(speeds["values"]) - total / speeds["median"]
    assert 0.3 < seconds < 0.4 and "a third of a second longer" in prose
