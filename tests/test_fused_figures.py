"""What page 15 shares with nobody: its figures, and its prose against its recordings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from folo_lib.course.figures import CACHE, US
from folo_lib.course.fused_figures import (
    THREADS,
    draw_fragment,
    draw_overlap,
    draw_shares,
    draw_step_times,
)

ROOT = Path(__file__).resolve().parent.parent
FLOOR = {"us": 200.0, "gb": 1.0, "tb_per_s": 5.0}


@pytest.fixture
def ax() -> Any:
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def written(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def boxes(ax: Any) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def test_a_column_has_the_colour_of_the_thread_that_loaded_it(ax: Any) -> None:
    order = [p * 9 % 32 for p in range(32)]
    draw_fragment(ax, order)
    loads, taken = boxes(ax)[:32], boxes(ax)[32:]
    assert {f"thread {t}" for t in range(32)} <= {*written(ax)}
    assert len(taken) == len(order)
    for column, box in zip(order, taken, strict=True):
        assert box.get_facecolor() == to_rgba(THREADS[column // 8])
    for t, box in enumerate(loads):
        assert box.get_xy() == (8 * (t % 4), 10 - t // 4) and box.get_width() == 8


def test_kernels_lie_on_one_clock_and_have_names(ax: Any) -> None:
    names = [f"{name}_kernel" for name in ("attention", "residual", "gate_up")]
    plain = [[names[0], 100.0, 102.0], [names[1], 102.5, 107.5], [names[2], 108.0, 110]]
    early = [[names[0], 50.0, 52.0], [names[1], 50.5, 56.0], [names[2], 51.0, 57.5]]
    early.append(["residual_kernel", 52.0, 58.0])
    draw_overlap(ax, {"one by one": plain, "early": early})
    places = [(box.get_x(), box.get_width()) for box in boxes(ax)]
    assert places[:3] == [(0, 2), (2.5, 5), (8, 2)]
    assert places[3:] == [(0, 2), (0.5, 5.5), (1, 6.5), (2, 6)]
    tops = [box.get_y() for box in boxes(ax)]
    assert tops[0] == tops[1] == tops[2] < min(tops[3:]) - 1
    assert [top - tops[3] for top in tops[3:]] == [0, 1, 2, 0]  # the first free lane
    said = ["attention", "output", "gate_up", " 10.0 µs"]  # outside, each once
    said += ["attention", "output", "gate_up", "down", " 8.0 µs"]  # in the bars
    assert written(ax) == said
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "one by one",
        "early",
    ]


def test_the_hatched_part_of_a_kernel_is_not_reading(ax: Any) -> None:
    rows = [
        {"kernel": "qkv", "launches": 28, "bytes": 200_000_000, "us": 100.0},
        {"kernel": "attention", "launches": 28, "bytes": 0, "us": 50.0},
        {"kernel": "head", "launches": 1, "bytes": 500_000_000, "us": 90.0},
    ]
    draw_shares(ax, rows, FLOOR["tb_per_s"])
    widths = [box.get_width() for box in boxes(ax)]
    assert widths == pytest.approx([40, 60, 0, 50, 90, 0])  # never below nothing
    assert written(ax) == ["100 µs", "50 µs", "90 µs"]


@pytest.mark.parametrize("by", ["num_seqs", "context"])
def test_a_step_stands_on_its_floor(ax: Any, by: str) -> None:
    steps = [
        {"num_seqs": 1, "context": 1000, "pdl": True, "us": 600.0},
        {"num_seqs": 4, "context": 2000, "pdl": True, "us": 480.0},
    ]
    draw_step_times(ax, steps, FLOOR, by, token_bytes=50_000)
    heights = [box.get_height() for box in boxes(ax)]
    assert heights == pytest.approx([200, 10, 390, 200, 80, 200])
    colours = [to_rgba(look) for look in (US.colour, CACHE.colour, "white")] * 2
    assert [box.get_facecolor() for box in boxes(ax)] == colours
    assert written(ax) == ["600\n2.9 ×", "480\n1.7 ×"]
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert ticks == (["1", "4"] if by == "num_seqs" else ["1,000", "2,000"])


def read_cells(kind: str) -> dict[str, str]:
    path = ROOT / "notebooks/15_fused_decode.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == kind}


def read_prose() -> str:
    return "\n".join(read_cells("markdown").values())


def test_the_kernels_can_be_defined_where_triton_is_missing() -> None:
    code = f"""
import sys
from importlib import util
from IPython.core.interactiveshell import InteractiveShell
find = util.find_spec
util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
class Hidden:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
shell = InteractiveShell.instance()
from folo_lib.course.triton_setup import prepare_triton
prepare_triton()
for source in {[s for s in read_cells("code").values() if s.startswith("#| export")]}:
    shell.run_cell(source).raise_error()
try: shell.user_ns["prepare_kernel"][(1,)]()
except ImportError as error: print(error)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton is not installed here" in done.stdout


def count_floors() -> float:
    """Of a step that is one graph of compiled layers; section 1 begins with it."""
    data = ROOT / "notebooks/data"
    page_14 = json.loads((data / "cuda_graph_h200.json").read_text("utf-8"))
    seconds = median(page_14["decode"]["cuda_graph"]["main"]["tpot_ms"]) / 1e3
    record = json.loads((data / "benchmark_h200.json").read_text("utf-8"))
    speed: float = record["sections"]["roofline"][-1]["bandwidth"]["median"]
    return seconds * speed / 1_192_099_840


def test_the_prose_of_section_1_is_that_of_its_recordings() -> None:
    # "Four fifths of a step are not spent reading weights", says figure 1.
    assert 1 - 1 / count_floors() == pytest.approx(4 / 5, abs=0.01)
    data = ROOT / "notebooks/data"
    card = json.loads((data / "paged_attention_h200.json").read_text("utf-8"))
    operations = 1000 * card["matmul_tflops"] / card["read_gb_s"]
    assert f"could do {operations:.0f} operations" in read_prose()


def count_most(bars: list[Any]) -> int:
    """The most kernels at a time."""
    most: int = max(sum(s <= time < e for _, s, e in bars) for _, time, _ in bars)
    return most


def test_the_prose_of_sections_3_and_9_is_that_of_the_recording() -> None:
    path = ROOT / "notebooks/data/fused_decode_h200.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    floor, speed = record["floor"]["us"], record["floor"]["tb_per_s"] * 1e6
    us = {(s["num_seqs"], s["context"], s["pdl"]): s["us"] for s in record["steps"]}
    taken = {row["kernel"]: row["us"] for row in record["kernels"]}
    least = {row["kernel"]: row["bytes"] / speed for row in record["kernels"]}
    above = {name: taken[name] - least[name] for name in taken}
    products = {"qkv", "output", "gate_up", "down"}
    assert taken.keys() == products | {"attention", "head"}
    edges, step = sum(above[name] for name in products), us[1, 256, True]
    rest, cache = step - sum(taken.values()), 32_768 * 114_688 / speed

    def times(num_seqs: int, context: int) -> str:
        reads = num_seqs * context * 114_688 / speed
        return f"{us[num_seqs, context, True] / (floor + reads):.1f}"

    most = ("", "one", "two", "three", "four", "five", "six")
    prose = read_prose()
    for words in (
        f"up to {most[count_most(record['trace']['pdl'])]} kernels are on the card",
        f"a step is shorter: {step:.0f} µs instead of {us[1, 256, False]:.0f} µs",
        f"The step takes {step / floor:.1f} floors, where section 1 began with {count_floors():.1f}",
        f"{taken['head']:.0f} µs for bytes that take {least['head']:.0f} µs",
        f"**Attention: {above['attention']:.0f} µs above its floor, "
        f"{above['attention'] / 28:.1f} µs in each layer.**",
        f"**The edges of the products: {edges:.0f} µs for 112 launches, "
        f"{edges / 112:.1f} µs each.**",
        f"**What belongs to no kernel alone: {rest:.0f} µs.**",
        f"Sixteen sequences take {us[16, 256, True] / step:.1f} times as long as one",
        f"In floors it is {times(16, 256)} where one sequence has {times(1, 256)}",
        f"At 32,768 tokens a step takes {times(1, 32_768)} floors",
        f"the cache is then {cache / floor:.1f} times as large as the weights",
    ):
        assert words in prose, words
    assert edges > above["attention"] > rest > above["head"], "the three largest items"
    plain, early = record["trace"]["plain"], record["trace"]["pdl"]
    assert count_most(plain) == 1, "one by one"
    for (_, start, end), (name, begin, last) in zip(plain, early, strict=True):
        assert last - begin > end - start, (
            f"every bar is longer, says section 3: {name}"
        )
    assert float(times(1, 32_768)) < float(times(1, 256)) < float(times(16, 256))
