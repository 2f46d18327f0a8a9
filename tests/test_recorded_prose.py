"""Numbers in the prose of pages 08, 16, 17 and 18 are those of the recordings that they quote."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import nbformat
import pytest

from folo_lib.benchmark import paired_ratios

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def read_prose(page: str) -> str:
    cells = nbformat.read(NOTEBOOKS / f"{page}.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.fixture(scope="module")
def sections() -> dict[str, list[dict[str, Any]]]:
    return read_record("benchmark_h200")


def read_record(name: str) -> dict[str, list[dict[str, Any]]]:
    text = (NOTEBOOKS / f"data/{name}.json").read_text("utf-8")
    found: dict[str, list[dict[str, Any]]] = json.loads(text)["sections"]
    return found


def test_page_18_says_how_the_recorded_systems_agreed(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    prose = read_prose("18_benchmark")
    [made] = sections["decode"]
    tokens = made["tokens"]
    assert f"over all {tokens['steps']} steps of its answer" in prose
    assert f"At all {tokens['decided']} decided ones" in prose
    assert f"At the other {tokens['steps'] - tokens['decided']} steps" in prose
    assert tokens["near_ties_lost"] == {"folo_lib": 3, "huggingface_static": 5}
    assert "otherwise three times, and Hugging Face's own static cache five" in prose


def test_page_18_says_what_its_first_figures_are(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    prose = read_prose("18_benchmark")
    [made] = sections["decode"]
    ours, default, static = made["rows"]
    found = [paired_ratios(row, ours, "tpot") for row in (default, static)]
    upper, lower = map(statistics.median, found)
    assert 7.5 < upper / lower < 8.5 and "by a factor of eight" in prose
    wide, narrow = ((max(one) - min(one)) / statistics.median(one) for one in found)
    assert narrow < 0.055 and "within five per cent" in prose
    assert 0.16 < wide < 0.18 and "within eighteen" in prose
    [row] = [
        row
        for row in sections["context"][-1]["rows"]
        if (row["system"], row["prompt_tokens"]) == ("huggingface", 128)
    ]
    later = statistics.median(
        paired_ratios(row, sections["context"][-1]["rows"][0], "tpot")
    )
    assert f"found {later:.0f} times where this one had found {upper:.0f}" in prose


def test_page_18_says_what_its_factors_are_made_of(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    """Beside the ladder: the default waits like its rungs, the static cache does not."""
    prose = read_prose("18_benchmark")
    [made] = sections["decode"]
    ours, default, static = (1e3 * row["tpot"]["median"] for row in made["rows"])
    rungs = [1e3 * row["tpot"]["median"] for row in sections["ladder"][-1]["rows"]]
    assert len(rungs) == 4 and max(rungs) < default < 2 * min(rungs)
    text = (NOTEBOOKS / "data/cuda_graph_h200.json").read_text("utf-8")
    plain, compiled = (
        statistics.median(json.loads(text)["decode"][name]["main"]["tpot_ms"])
        for name in ("plain_cuda_graph", "cuda_graph")
    )
    for words in (
        f"takes {default:.0f} ms for a token",
        f"is compiled, and takes {static:.1f} ms. Ours takes {ours:.2f}.",
        f"the CUDA graph, with {plain:.1f} ms, and the compiled layers, with {compiled:.1f}",
    ):
        assert words in prose
    assert ours < compiled < static < plain < default


def test_page_18_says_how_far_processes_differ(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    prose = read_prose("18_benchmark")
    many = read_record("throughput_h200")
    rows = [sections[name][-1]["rows"][0]["tpot"] for name in ("decode", "context")]
    rows.append(many["latency"][-1]["context"][0]["tpot"])
    assert max(row["spread"] for row in rows) < 0.005  # "half a per cent"
    assert f"have taken {rows[0]['spread']:.1%}".replace("%", " %") in prose
    times = [1e3 * row["median"] for row in rows]
    times += [row["tpot_ms"] for row in many["tpot"][-1]["starts"]["rows"]]
    assert len(times) == 8 and "The eight processes differ by up to five" in prose
    assert 0.045 < max(times) / min(times) - 1 < 0.055


def test_page_18_says_what_its_processes_read_and_wrote(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    alone = read_record("benchmark_cpu")["memory"][-1]["rows"]
    for rows in (alone, sections["ladder"][-1]["rows"]):
        sizes = {(row["prompt_tokens"], row["output_tokens"]) for row in rows}
        assert sizes == {(128, 64)}
    prose = read_prose("18_benchmark")
    assert "a prompt of 128 tokens and wrote 64" in prose
    assert "with 128 tokens in and 64 out on the lower four" in prose
    times = [row["first_token_seconds"] for row in alone]
    assert max(times) < 1.1 * min(times)  # "about as long"
    without, growing, *_ = (row["tpot"] for row in sections["ladder"][-1]["rows"])
    gain = 1 - growing["median"] / without["median"]
    # "a seventh less time", and not even this is certain
    assert abs(gain - 1 / 7) < 0.01 < gain < growing["spread"]


def test_page_18_says_where_the_gain_of_a_prompt_falls(
    sections: dict[str, list[dict[str, Any]]],
) -> None:
    [made] = sections["prefill"]
    rows = {(row["system"], row["prompt_tokens"]): row for row in made["rows"]}
    ours, theirs = (
        {
            n: 1e3 * row["ttft"]["median"]
            for (name, n), row in rows.items()
            if name == one
        }
        for one in ("folo_lib", "huggingface")
    )
    prose = read_prose("18_benchmark")
    assert max(ours[n] for n in (32, 64, 128, 256, 512)) < 3
    assert f"our line jumps to {ours[1024]:.0f} ms" in prose and ours[2048] < ours[1024]
    assert ours[8192] / ours[2048] == pytest.approx(4, abs=0.1)  # four chunks
    flat = [theirs[n] for n in (32, 64, 128, 256, 512, 1024, 2048)]
    assert all(abs(ms - 27.5) < 1 for ms in flat) and "at about 27 ms" in prose
    assert theirs[8192] > 1.9 * theirs[4096]
    ratios = paired_ratios(rows["huggingface", 8192], rows["folo_lib", 8192], "ttft")
    assert f"There the ratio is {statistics.median(ratios):.1f}." in prose


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
    for words in (f"or a prompt of some {round(edge, -1)} tokens", "cross at some 240"):
        assert words in prose
    assert f"the card can do {peak / bandwidth:.0f}. So why not" in prose
    cells = nbformat.read(NOTEBOOKS / "08_runner.ipynb", as_version=4).cells
    [output] = next(cell for cell in cells if cell.id == "08-47").outputs
    for n in (256, 16_384):
        assert f" {count_operations(n) / 1e9:,.1f} " in output.text
    assert f"some {round(edge, -1)} tokens fit" in read_prose("11_scheduler")
    assert round(edge, -1) == 240


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
    assert two / one <= 0.65 and many <= 1 / 1.6
    sums = {
        one["shape"]: one["sums_ms"]
        for one in measured["ratios"]
        if one["requests"] == 1
    }
    [waiting] = [x["sums_ms"] for x in measured["ratios"] if x["requests"] == 64]
    gap = find("8B", 64, 2, has_sums=True) - find("8B", 64, 1) / 2
    text = (NOTEBOOKS / "data/cuda_graph_h200.json").read_text("utf-8")
    tpot = json.loads(text)["decode"]["cuda_graph"]["main"]["tpot_ms"]
    page_14 = statistics.median(tpot)
    wanted = {"bytes": 8192, "method": "group", "place": "graph"}
    [own] = [x["us"] for x in measured["sums"] if wanted.items() <= x.items()]
    reading = (16.382e9 - 2 * 151_936 * 4096) / 4e9  # ms, at 4 TB per second
    prose = read_prose("16_tensor_parallel")
    for words in (
        f"it makes it {small:.1f} times as long",
        f"The factor of {small:.1f} for Qwen3-0.6B is not",
        f"On one card those take {page_14:.2f} ms (page 14), and two cards, if their "
        f"sums were free, {find('0.6B', 1, 2):.2f}",
        f"(On one card it takes {find('8B', 64, 1):.2f} ms where the formula has 3.78",
        f"runs on two cards in {find('32B', 1, 2, has_sums=True):.2f} ms",
        f"takes {find('32B', 1, 2, has_sums=True):.2f} ms and not the 8.33 of the formula",
        f"a step of Qwen3-8B takes {two / one:.2f} of its time on one card: {two:.2f} "
        "ms, where the formula has 2.08",
        f"The sums add {sums['8B']:.2f} ms",
        f"has 2.08, which are {reading / 2:.2f} of reading and 0.18 of sums",
        f"With 64 sequences it is {many:.2f}, which is {1 / many:.2f} times the tokens",
        f"The {find('8B', 64, 2, has_sums=True):.2f} ms are {find('8B', 64, 1) / 2:.2f}, "
        f"the half, and {waiting:.2f} for the sums, and {gap - waiting:.2f} of rest",
        f"less than 73 times the {own:.1f} µs of the first table",
        f"they are {sums['0.6B']:.2f} of the {find('0.6B', 1, 2, has_sums=True):.2f} ms",
    ):
        assert words in prose
