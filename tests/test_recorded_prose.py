"""Numbers in the prose of pages 08, 16, 17 and 18 are those of the recordings that they quote."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def read_prose(page: str) -> str:
    cells = nbformat.read(NOTEBOOKS / f"{page}.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.fixture(scope="module")
def sections() -> dict[str, list[dict[str, Any]]]:
    text = (NOTEBOOKS / "data/benchmark_h200.json").read_text("utf-8")
    found: dict[str, list[dict[str, Any]]] = json.loads(text)["sections"]
    return found


def test_page_18_says_how_the_recorded_systems_agreed(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    prose = read_prose("18_benchmark")
    tokens = [made["tokens"] for made in sections["decode"]]
    [(decided, steps)] = {(one["decided"], one["steps"]) for one in tokens}
    assert f"At all {decided} decided steps" in prose
    assert f"At the other {steps - decided} steps" in prose
    assert {one["near_ties_lost"]["folo_lib"] for one in tokens} == {3, 5}


def test_page_18_says_what_its_first_figures_are(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    static, default = [], []
    for made in sections["decode"]:
        ours, *others = [row["tpot"]["values"] for row in made["rows"]]
        ratios = [
            statistics.median(b / a for a, b in zip(ours, one, strict=True))
            for one in others
        ]
        default.append(ratios[0])
        static.append(ratios[1])
    words = f"moves from {min(static):.1f} to {max(static):.1f} between recordings"
    assert words in read_prose("18_benchmark")
    factors = [a / b for a, b in zip(default, static, strict=True)]
    assert 10 < min(factors) < max(factors) < 12  # "more than ten"
    ours = [1e3 * made["rows"][0]["tpot"]["median"] for made in sections["decode"]]
    words = f"the one of this table needed {min(ours):.1f} to {max(ours):.1f}"
    assert words in read_prose("18_benchmark")


def test_page_18_says_what_its_factors_are_made_of(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    """Beside the ladder: the default waits like the slow rungs, the static cache does not."""
    prose = read_prose("18_benchmark")
    rungs = {
        row["system"]: 1e3 * row["tpot"]["median"]
        for row in sections["ladder"][-1]["rows"]
    }
    slow = [
        rungs[name] for name in ("no cache", "growing cache", "preallocated", "SDPA")
    ]
    for i, digits, near in ((1, 0, slow), (2, 1, [rungs["CUDA graph"]])):
        times = [1e3 * made["rows"][i]["tpot"]["median"] for made in sections["decode"]]
        ends = f"{min(times):.{digits}f} to {max(times):.{digits}f} ms"
        assert f"takes {ends}" in prose
        assert max(times) < 1.6 * min(near) and max(near) < 1.25 * min(times)


def test_page_18_says_what_its_processes_read_and_wrote(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    for name, output_tokens in (("memory", 256), ("ladder", 64)):
        rows = sections[name][-1]["rows"]
        sizes = {(row["prompt_tokens"], row["output_tokens"]) for row in rows}
        assert sizes == {(128, output_tokens)}
    prose = read_prose("18_benchmark")
    assert "a prompt of 128 tokens and wrote 256" in prose
    assert "with 128 tokens in and 64 out, and with two more rungs" in prose


def test_page_18_says_in_which_recording_a_step_upwards_is(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    prose = read_prose("18_benchmark")
    assert (
        "a step upwards at 2,048 tokens that the earlier recording does not have"
        in prose
    )
    earlier, later = (
        {(row["system"], row["prompt_tokens"]): row["ttft"] for row in made["rows"]}
        for made in sections["prefill"]
    )
    rises = [
        found["huggingface", 2048]["median"] / found["huggingface", 1024]["median"]
        for found in (earlier, later)
    ]
    assert rises[0] < 1.1 and rises[1] > 1.3
    slow, fast = (earlier[name, 8192]["values"] for name in ("huggingface", "folo_lib"))
    ratio = statistics.median(a / b for a, b in zip(slow, fast, strict=True))
    assert f"the ratio is {ratio:.1f} in the earlier recording" in prose
    ours = [1e3 * found["folo_lib", 8192]["median"] for found in (earlier, later)]
    assert f"with {ours[0]:.1f} ms and not {ours[1]:.1f}" in prose


def test_page_08_takes_the_card_from_the_recordings(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    prose = read_prose("08_runner")
    bandwidth = sections["roofline"][-1]["bandwidth"]["median"]
    text = (NOTEBOOKS / "data/paged_attention_h200.json").read_text("utf-8")
    peak = 1e12 * json.loads(text)["matmul_tflops"]
    assert f"the border is at {peak / bandwidth:.0f} operations per byte" in prose

    layers, hidden, inner, vocabulary, heads, head_dim = (
        28,
        1024,
        3072,
        151_936,
        16,
        128,
    )
    per_layer = 2 * hidden * (2 * heads * head_dim + heads * head_dim + 3 * inner)

    def count_operations(n: int) -> int:
        """By hand: products with weights, pairs that are not masked, and the head once."""
        pairs = n * (n + 1) // 2 * 4 * heads * head_dim
        return layers * (n * per_layer + pairs) + 2 * hidden * vocabulary

    def is_arithmetic_the_limit(n: int) -> bool:
        return count_operations(n) / peak > (1_192_099_840 + 114_688 * n) / bandwidth

    edge = next(n for n in range(1, 1000) if is_arithmetic_the_limit(n))
    for words in (f"or a prompt of some {round(edge, -1)} tokens", "cross at some 230"):
        assert words in prose
    cells = nbformat.read(NOTEBOOKS / "08_runner.ipynb", as_version=4).cells
    [output] = next(cell for cell in cells if cell.id == "08-47").outputs
    for n in (256, 16_384):
        assert f" {count_operations(n) / 1e9:,.1f} " in output.text
    assert f"some {round(edge, -1)} tokens fit" in read_prose("11_scheduler")
    assert round(edge, -1) == 230


def test_page_17_says_what_its_recording_holds() -> None:
    record = json.loads((NOTEBOOKS / "data/serving_cpu.json").read_text("utf-8"))
    loads = {row["load"]: row for row in record["sections"]["serving"][-1]["loads"]}
    assert 0.02 < max(row["closed"]["ttft"]["p50"] for row in loads.values()) < 0.025
    assert 0.049 < loads[0.95]["ttft"]["p50"] < 0.0515
    assert abs(loads[0.95]["ttft"]["p99"] - 1 / 3) < 0.01
    kept = {load: row["goodput"] / row["rate"] for load, row in loads.items()}
    words = "{:.0%} at half the capacity, {:.0%} at 95 % of it, and {:.0%} beyond"
    said = words.format(kept[0.5], kept[0.95], kept[1.1]).replace("%", " %")
    assert said.replace("95  %", "95 %") in read_prose("17_serving")


def test_page_17_compares_its_loops_in_the_middle_draw() -> None:
    cells = nbformat.read(NOTEBOOKS / "17_serving.ipynb", as_version=4).cells
    printed = {
        cell.id: cell.outputs[0].get("text", "")
        for cell in cells
        if cell.get("outputs")
    }
    [closed] = re.findall(r"closed, 16 clients: .*TTFT +(\d+) ms", printed["17-34"])
    pattern = r"open, +95% of capacity: TTFT +(\d+) ms \((\d+) to (\d+)\)"
    [(middle, least, most)] = re.findall(pattern, printed["17-36"])
    prose = read_prose("17_serving")
    assert f"or longer, {middle} ms against {closed}" in prose
    assert (
        f"in the mildest of the eleven draws it is {least} ms, in the worst {most}"
        in prose
    )
    assert round(int(middle) / 5.6) == 7 and "about seven times" in prose


def test_page_16_says_what_its_recording_holds() -> None:
    text = (NOTEBOOKS / "data/tensor_parallel_h200.json").read_text("utf-8")
    measured = json.loads(text)["sections"]["tensor_parallel"][-1]
    assert (measured["devices"], measured["link"]) == (2, "NV18")  # eighteen NVLinks

    def find(shape: str, requests: int, devices: int, has_sums: bool = False) -> float:
        wanted = {"shape": shape, "requests": requests, "devices": devices}
        wanted |= {"has_sums": has_sums}
        [row] = [row for row in measured["steps"] if wanted.items() <= row.items()]
        milliseconds: float = row["ms"]
        return milliseconds

    one, two = find("8B", 1, 1), find("8B", 1, 2, has_sums=True)
    many = find("8B", 64, 2, has_sums=True) / find("8B", 64, 1)
    small = find("0.6B", 1, 2, has_sums=True) / find("0.6B", 1, 1)
    assert two / one <= 0.65 and many > 1 / 1.6
    sums = {
        one["shape"]: one["sums_ms"]
        for one in measured["ratios"]
        if one["requests"] == 1
    }
    prose = read_prose("16_tensor_parallel")
    for words in (
        f"it makes it {small:.1f} times as long",
        f"The factor of {small:.1f} is not",
        f"runs on two cards in {find('32B', 1, 2, has_sums=True):.2f} ms",
        f"with one sequence, and it takes {two / one:.2f}",
        f"Without its sums the step of {two:.2f} ms would be {sums['8B']:.2f} ms shorter",
        f"which is a ratio of {1 / 1.6}, and it is {many:.2f}",
        f"such a step would take {find('8B', 64, 2):.2f} ms",
        f"and half of the {find('8B', 64, 1):.2f} ms would be {find('8B', 64, 1) / 2:.2f}",
        f"they are {sums['0.6B']:.2f} of the {find('0.6B', 1, 2, has_sums=True):.2f} ms",
    ):
        assert words in prose
