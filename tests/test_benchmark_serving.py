"""The benchmark's section `serving`, on a few short requests."""

from __future__ import annotations

import json

import pytest
import torch

from folo_lib import benchmark_serving as serving, bundled_model_path
from folo_lib.benchmark_bench import QUICK, Bench

SIZES = serving.ServingSizes(
    streams=1,
    stream_tokens=4,
    num_runs=2,
    places=2,
    num_requests=8,
    shortest=2,
    longest=6,
    loads=(0.5, 1.1),
)


@pytest.fixture
def bench() -> Bench:
    return Bench(bundled_model_path(), torch.device("cpu"), torch.float32, QUICK)


def test_the_whole_section(bench: Bench) -> None:
    made = json.loads(json.dumps(serving.run_serving(bench, SIZES)))
    assert set(made["speeds"]) == {"generate", "async", "http"}
    assert all(len(row["values"]) == 2 for row in made["speeds"].values())
    assert 2 <= made["speeds"]["async"]["outputs"] <= 4
    assert (
        0
        < made["speeds"]["async"]["gaps"]["p50"]
        <= made["speeds"]["async"]["gaps"]["p99"]
    )
    assert made["ttft_alone"]["async"] > 0 and made["ttft_alone"]["http"] > 0
    assert made["left_out"] == {}
    for way in ("generate", "async", "http"):
        row = made["threads"][way]
        assert row["steps"] == 4 and 0 < row["step"] <= row["wall"]
        assert (row["loop"] > 0) == (row["owner"] > 0) == (way != "generate")
    assert made["threads"]["event_loop"]["samples"] > 0
    assert [row["load"] for row in made["loads"]] == [0.5, 1.1]
    for row in made["loads"]:
        assert row["requests"] == 8 and row["closed"]["requests"] == 4
        assert row["arrivals"] == pytest.approx(row["load"] * row["closed"]["rate"])
        assert 0 <= row["goodput"] <= row["rate"] * 1.0001
        assert row["ttft"]["p50"] <= row["ttft"]["p99"]


def test_goodput_counts_those_who_got_both_in_time() -> None:
    sizes = serving.ServingSizes(max_ttft=0.2, max_gap=0.05)
    kept, late, slow, one = (
        serving.Visit(times, num_tokens)
        for times, num_tokens in (
            ([0.1, 0.14, 0.18], 3),
            ([0.3, 0.31], 2),
            ([0.1, 0.3], 2),
            ([0.1], 1),
        )
    )
    assert kept.gap == pytest.approx(0.04) and one.gap == 0
    found = serving.describe_visits([kept, late, slow, one], 2.0, sizes)
    assert (found["rate"], found["goodput"]) == (2.0, 1.0)


def test_without_the_servers_packages_http_is_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    made = serving.run_serving(bench, SIZES)
    assert set(made["speeds"]) == {"generate", "async"} and len(made["loads"]) == 2
    assert set(made["ttft_alone"]) == {"async"}
    assert set(made["threads"]) == {"generate", "async"}
    assert made["left_out"]["http"].startswith("fastapi is missing: pip install")
