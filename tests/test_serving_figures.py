"""What page 18 shows of many clients: figures, lines of text, and the numbers in its prose."""

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
    """As the recording of a GPU looks, with everything that a CPU's may lack."""
    record: Result = copy.deepcopy(CPU)
    record["setup"]["device"] = "NVIDIA H200"
    made = record["sections"]["serving"][-1]
    made["speeds"]["http"]["of_generate"] = 0.4
    row = {
        "steps": 9,
        "wall": 2.5,
        "read": 1.0,
        "step": 0.5,
        "owner": 0.25,
        "loop": 0.5,
    }
    made["threads"] = {"async": row, "event_loop": {"samples": 5}}
    theirs = {"tokens_per_second": 12_345.6, "ttft_alone": 0.0123}
    record["sections"]["vllm_serving"] = [theirs]
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
    assert ax.get_title() == f"Through HTTP\n{share} and 40% of the speed is left"
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
    near = next(row for row in rows if row["load"] == 0.95)
    ratio = f"{near['ttft']['p50'] / near['closed']['ttft']['p50']:.1f}"
    assert f"half wait {ratio} and {ratio} times" in ax.get_title()
    assert [line.get_label() for line in ax.lines[:4]] == [
        "CPU, half",
        "CPU, 99 %",
        "H200, half",
        "H200, 99 %",
    ]


def test_lines_of_text_name_vllm_and_the_threads_where_they_were_measured() -> None:
    record = make_gpu()
    del record["sections"]["serving"][-1]["speeds"]["http"]
    lines = "\n".join(shown.list_serving([CPU, record, NOTHING]))
    assert lines.count("HTTP") == 1 and lines.count("generate") == 2
    assert "vLLM's AsyncLLM: 12,346 tokens/s; first token after 12.3 ms" in lines
    assert (
        "async: a step takes 2.50 ms; in read 1.00, else 0.75 on the processor, and the "
        "event loop 0.50"
    ) in lines
    assert "event_loop" not in lines


def test_without_http_a_figure_says_so() -> None:
    record = make_gpu()
    del record["sections"]["serving"][-1]["speeds"]["http"]
    ax = Figure().subplots()
    shown.draw_shares(ax, [record])
    assert ax.get_title() == "No HTTP" and len(ax.patches) == 1


def test_outputs_of_a_stream_are_told_where_they_were_counted() -> None:
    record = copy.deepcopy(CPU)
    row = record["sections"]["serving"][-1]["speeds"]["async"]
    row |= {"outputs": 41.4, "gaps": {"p50": 0.0123, "p99": 0.5}}
    said = "in 41 outputs, half of them within 12.3 ms of the last, 99 % within 500.0"
    assert any(line.endswith(said) for line in shown.list_serving([record]))


def test_page_18_says_what_its_recordings_hold() -> None:
    cells = nbformat.read(DATA.parent / "18_benchmark.ipynb", as_version=4).cells
    texts = {cell.id: cell for cell in cells}
    prose = texts["12-serving-b"].source
    made = latest(CPU, "serving")
    said = texts["12-serving-a"].source
    assert f"{made['sizes']['streams']} on the CPU" in said
    assert f"{latest(H200, 'serving')['sizes']['streams']} on the H200" in said
    near = next(row for row in made["loads"] if row["load"] == 0.95)
    usual = near["closed"]["ttft"]["p50"]
    assert near["ttft"]["p50"] > 2 * usual and near["ttft"]["p99"] > 10 * usual
    made = latest(H200, "serving")
    loads = {row["load"]: row for row in made["loads"]}
    waits = {x: r["ttft"]["p50"] / r["closed"]["ttft"]["p50"] for x, r in loads.items()}
    assert abs(waits[0.95] - 1) < 0.1 and "hardly wait longer yet" in prose
    late = loads[0.95]["ttft"]["p99"] / loads[0.95]["closed"]["ttft"]["p50"]
    assert 6 < late < 7 and "waits more than six times as long" in prose
    costs = [
        [
            a > b
            for a, b in zip(
                *(shown.get_shares(one, way) for way in shown.WAYS), strict=True
            )
        ]
        for one in (latest(CPU, "serving"), made)
    ]
    assert all(costs[0]) and sum(costs[1]) == 4 and "in four runs of five" in prose
    step = made["threads"]["async"]
    assert abs(step["read"] / step["wall"] - 1 / 6) < 0.02  # "a sixth of a step"
    least = min(shown.get_shares(made, "async"))
    assert f"the lowest at {least:.0%}".replace("%", " %") in prose
    [output] = texts["12-serving-table"].outputs
    assert output.text.endswith("\n".join(shown.list_serving([CPU, H200])) + "\n"), (
        "a recording is new: run the page again"
    )
