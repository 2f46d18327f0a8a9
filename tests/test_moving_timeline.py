"""The timeline of page 14: what is drawn from a recording, and what is left without the script."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest

from folo_lib.benchmark_timeline import PHASES, SETTINGS, write_spans
from folo_lib.course.moving_timeline import (
    Lanes,
    Timeline,
    draw_lanes,
    find_busy_shares,
    read_lanes,
)

PAGES = Path(__file__).resolve().parent.parent / "notebooks"


def make_trace(step: float) -> dict[str, Any]:
    """Two steps; in each the host works for its first half, the device for a tenth."""
    spans = {
        phase: [
            (k * step + i * step / 8, k * step + (i + 1) * step / 8) for k in (0, 1)
        ]
        for i, phase in enumerate(PHASES)
    }
    device = [(k * step + 0.2 * step, k * step + 0.3 * step) for k in (0, 1)]
    return {
        "us_per_step": step,
        "busy_us_per_step": step / 10,
        "host": {phase: write_spans(own) for phase, own in spans.items()},
        "device": write_spans(device),
    }


def make_settings() -> dict[str, Any]:
    settings = {}
    for i, (name, options) in enumerate(SETTINGS.items()):
        step = 8000.0 - 900 * i
        row = {
            "requests": 64,
            "host_us": {"total": step / 2},
            "trace": make_trace(step),
        }
        settings[name] = {"options": dict(options), "rows": [{"requests": 1}, row]}
    return settings


def make_lanes(device: list[tuple[float, float]]) -> Lanes:
    return Lanes("", (), {}, device, 1.0, 10.0, "")


def read(html: str) -> tuple[ElementTree.Element, str]:
    """What is left where scripts are taken out, and the script."""
    script = re.search(r"<script>(.*?)</script>", html, re.S)
    assert script
    rest = html.replace(script[0], "").replace(" hidden>", ' hidden="">')
    return ElementTree.fromstring(rest), script[1]


def test_lanes_of_a_recording() -> None:
    lanes = read_lanes(make_settings(), 64)
    assert [one.name for one in lanes] == [*SETTINGS]
    assert lanes[0].switches == () and lanes[0].end == 16_000
    assert lanes[-1].switches == ("graph", "compile", "run-ahead")
    assert lanes[0].caption == (
        "eager: a step takes 4.00 ms, and kernels run for 0.80 ms of it."
    )
    assert lanes[0].host["launch"] == [(1000, 1000), (9000, 1000)]
    assert lanes[0].device == [(1600, 800), (9600, 800)]
    assert lanes[0].density == 1
    settings = make_settings()  # as if gaps had been merged
    settings["eager"]["rows"][1]["trace"]["device"] = write_spans([(1000, 9000)])
    assert read_lanes(settings, 64)[0].density == 0.2
    with pytest.raises(ValueError, match="no setting has a trace of 3 requests"):
        read_lanes(make_settings(), 3)


@pytest.mark.parametrize("num_bins", [1, 3, 10, 37])
def test_busy_shares_lose_no_time(num_bins: int) -> None:
    lanes = make_lanes([(0.0, 1.0), (3.5, 4.0), (9.5, 2.0)])  # goes on after the end
    shares = find_busy_shares(lanes, num_bins)
    assert len(shares) == num_bins and all(0 <= share <= 1 for share in shares)
    assert sum(shares) / num_bins * 10 == pytest.approx(5.5)
    assert find_busy_shares(make_lanes([]), 2) == [0, 0]
    full = make_lanes([(0.0, 10.0)])
    assert find_busy_shares(full, 3) == pytest.approx([1, 1, 1])
    assert find_busy_shares(full._replace(density=0.2), 2) == pytest.approx([0.2, 0.2])


def test_busy_shares_are_where_the_spans_are() -> None:
    shares = find_busy_shares(make_lanes([(2.0, 1.0), (5.0, 0.5)]), 10)
    assert shares == pytest.approx([0, 0, 1, 0, 0, 0.5, 0, 0, 0, 0])


def test_without_the_script_the_first_setting_is_seen() -> None:
    root, _ = read(Timeline(make_settings(), 64).to_html())
    groups = root.findall("svg/g")
    assert [g.get("data-s") for g in groups if g.get("display") != "none"] == ["000"]
    assert len(groups) == 8
    assert root.findall("p")[0].text == read_lanes(make_settings(), 64)[0].caption
    assert root.findall("p")[1].get("hidden") == ""
    names = {text.text for text in root.findall("svg/text")}
    assert {*PHASES, "device", "0", "16.00 ms"} == names


def test_the_script_knows_every_combination() -> None:
    _, script = read(Timeline(make_settings(), 64).to_html())
    found = re.search(r"const moments = (.*), order = (.*), longest", script)
    assert found
    moments = json.loads(found[1])
    assert moments.keys() == {f"{i:03b}" for i in range(8)}
    assert json.loads(found[2]) == [*moments]  # JavaScript would sort the keys
    assert moments["000"]["shrunk"] == 1 and moments["000"]["end"] == 16
    assert moments["111"]["says"].startswith("graph + run-ahead: a step takes")
    assert moments["111"]["shrunk"] == pytest.approx(1700 / 8000, abs=1e-4)


def test_shapes_stay_in_the_lanes() -> None:
    html = Timeline(make_settings(), 64).to_html()
    root, _ = read(html)
    for group in root.findall("svg/g"):
        bars = group.findall("rect")
        assert len(bars) == 2 * len(PHASES)
        ends = [float(b.get("x", "")) + float(b.get("width", "")) for b in bars]
        assert max(ends) <= 820.1
        [path] = group.findall("path")
        steps = re.findall(r"(v|h)(-?\d+)", path.get("d", ""))
        assert sum(int(n) for way, n in steps if way == "h") == 820
        assert sum(int(n) for way, n in steps if way == "v") == 0  # back to the bottom
    assert not re.search(r"https?:|src=|href=|import|fetch", html)
    assert len(html) < 300_000


def test_two_figures_have_names_of_their_own() -> None:
    settings = make_settings()
    html = Timeline(settings, 64).to_html()
    assert Timeline(make_settings(), 64).to_html() == html
    del settings["graph"]
    other = Timeline(settings, 64).to_html()
    names = [re.findall(r'id="(folo-\w+)"', text) for text in (html, other)]
    assert names[0] != names[1]


def test_a_picture_for_where_html_is_not_shown() -> None:
    bundle = Timeline(make_settings(), 64)._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    width, _ = struct.unpack(">II", bundle["image/png"][16:24])
    assert width <= 900
    text = "a timeline of 8 settings, with switches in JupyterLab"
    assert bundle["text/plain"] == text


def test_lanes_are_drawn() -> None:
    figure, ax = plt.subplots()
    [first, *_] = read_lanes(make_settings(), 64)
    draw_lanes(ax, first)
    assert ax.get_xlim() == (0, 16)
    assert [label.get_text() for label in ax.get_yticklabels()] == [*PHASES, "device"]
    assert len(ax.collections) == len(PHASES) + 1
    plt.close(figure)


LARGE = r"^(decode|merge|store_kv)_kernel$|nvjet|cublas|cutlass|gemm"


def test_the_prose_of_page_14_is_that_of_its_recording() -> None:
    page = json.loads((PAGES / "14_cuda_graph.ipynb").read_text(encoding="utf-8"))
    prose = "\n".join(
        "".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] != "code"
    )
    record = json.loads((PAGES / "data" / "timeline_h200.json").read_text("utf-8"))
    rows = {
        (name, row["requests"]): row
        for name, setting in record["sections"]["timeline"][-1]["settings"].items()
        for row in setting["rows"]
    }
    ms = {key: row["host_us"]["total"] / 1e3 for key, row in rows.items()}
    eager, compiled = (rows[name, 64]["trace"] for name in ("eager", "compile"))
    kernels = eager["kernels_per_step"]
    runs, launches = eager["busy_us_per_step"], rows["eager", 64]["host_us"]["launch"]
    before, after = (
        sum(kernel["per_layer"] for kernel in trace["layer"])
        for trace in (eager, compiled)
    )
    best = rows["graph + run-ahead", 64]
    host = rows["graph", 256]["host_us"]
    thinks = (host["schedule"] + host["launch"] + host["update"]) / 1e3
    ahead = rows["graph + run-ahead", 256]["host_us"]
    for said in (
        f"On average a kernel runs for {runs / kernels:.1f} µs",
        f"Python launches one every {launches / kernels:.0f} µs",
        f"Of {before} kernels {after} are left",
        f"**Compiling alone** makes it {ms['compile', 64]:.1f} ms, and it was "
        f"{ms['eager', 64]:.1f} ms",
        f"from {ms['eager', 64]:.1f} ms down to {ms['graph_plain', 64]:.1f} ms",
        f"make it {ms['graph', 64]:.1f} ms",
        f"makes it {ms['graph + run-ahead', 64]:.1f} ms, and kernels run for "
        f"{best['busy_share']:.0%} of that",
        f"the eager engine takes {ms['eager + run-ahead', 64]:.1f} ms with it, and the one "
        f"with compiled layers alone {ms['compile + run-ahead', 64]:.1f} ms",
        f"take {thinks:.1f} ms together",
        f"waits for {ahead['read'] / 1e3:.1f} ms and not for {host['read'] / 1e3:.1f} ms",
        f"takes {ms['graph + run-ahead', 256]:.1f} ms in place of "
        f"{ms['graph', 256]:.1f} ms",
    ):
        assert said in prose, said
    assert kernels > 1000, "its step has more than a thousand"
    small = [
        sum(k["per_layer"] for k in trace["layer"] if not re.search(LARGE, k["kernel"]))
        for trace in (eager, compiled)
    ]
    assert f"{small[0]} kernels for one operation each have become {small[1]}" in prose
    for name in ("schedule", "launch", "update"):
        assert ahead[name] > host[name], "its own parts took longer in that run"
    short = sum(k["per_layer"] for k in compiled["layer"] if k["us"] < 2)
    assert (after, short) == (12, 7) and "Seven of the twelve run for less" in prose
    saved = [ms["graph", n] - ms["graph + run-ahead", n] for n in (64, 256)]
    assert saved[0] < saved[1], "run-ahead saves more where there are more requests"
    half = compiled["busy_us_per_step"] / runs
    assert 0.45 < half < 0.55, "kernels that run for half the time"
    saved_by_graph = ms["eager", 64] - ms["graph_plain", 64]
    assert abs(ms["compile", 64] - ms["eager", 64]) < 0.2 * saved_by_graph
    for name in ("eager", "compile"):  # what differs is `launch`
        one, other = (
            rows[f"{name}{more}", 64]["host_us"] for more in ("", " + run-ahead")
        )
        rest = [parts["total"] - parts["launch"] for parts in (one, other)]
        assert abs(rest[1] - rest[0]) < 0.1 * abs(other["launch"] - one["launch"])
