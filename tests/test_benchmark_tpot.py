"""The time per token in floors: the benchmark's section `tpot`, and the rows of it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY

from folo_lib import (
    benchmark,
    benchmark_starts as starts,
    benchmark_tpot as tpot,
    benchmark_workloads as workloads,
)
from folo_lib.benchmark import BenchmarkError
from folo_lib.benchmark_bench import Bench, Sizes
from folo_lib.benchmark_sections import SECTIONS
from folo_lib.benchmark_systems import write_random_checkpoint
from folo_lib.benchmark_workloads import ThroughputSizes, Workload
from folo_lib.engine import LLMEngine
from folo_lib.kv_cache import kv_bytes_per_token

pytestmark = pytest.mark.usefixtures("young_garbage")

CPU = torch.device("cpu")
SIZES = Sizes(
    throughput=ThroughputSizes(
        prompt_tokens=6,
        output_tokens=5,
        num_runs=2,
        few=(1, 3),
        contexts=(20, 30),
        context_tokens=4,
    ),
    starts=2,
    together=2,
)
FEW = [(1, 6, 5), (3, 6, 5), (1, 20, 4), (1, 30, 4)]  # requests, tokens in and out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, TINY, CPU)
    return folder


@pytest.fixture
def bench(tiny: Path) -> Bench:
    return Bench(tiny, CPU, torch.float32, SIZES)


def sizes_of(rows: Any) -> list[tuple[int, int, int]]:
    names = "requests", "prompt_tokens", "output_tokens"
    return [tuple(row[name] for name in names) for row in rows]


class TestRows:
    def test_the_first_token_is_taken_off(self) -> None:
        """The difference of two medians, and the spread of the pairs."""
        clock = iter([9.0, 1.0, 1.5, 1.1, 9.0, 3.0, 2.9, 3.4])  # the first warm up
        asked: list[list[int]] = []

        def run(workload: Workload, temperature: float) -> float:
            asked.append(workload.lengths)
            assert temperature == 0.5 and workload.prompts == [[1, 2], [3, 4]]
            return next(clock)

        row = workloads.measure_tpot(run, Workload([[1, 2], [3, 4]], [5, 5]), 0.5, 3)
        assert asked == [[1, 1]] * 4 + [[5, 5]] * 4
        assert row["ttft_ms"] == pytest.approx(1100)
        assert row["tpot_ms"] == pytest.approx((3.0 - 1.1) * 1e3 / 4)
        # 2.0, 1.4 and 2.3 s for four tokens
        assert row["spread"] == pytest.approx((2.3 - 1.4) / (3.0 - 1.1))
        assert sizes_of([row]) == [(2, 2, 5)]
        assert row["seconds"] == [3.0, 2.9, 3.4]

    def test_which_workloads(self) -> None:
        few = workloads.make_few(ThroughputSizes(), 151_936)
        shapes = [(len(w.prompts), len(w.prompts[0]), w.lengths[0]) for w in few]
        assert shapes == [(n, 128, 256) for n in (1, 2, 4, 8, 16)] + [
            (1, n, 128) for n in (1024, 8192, 32_768)
        ]
        assert all(len({*map(len, w.prompts)}) == 1 for w in few)
        assert ThroughputSizes().max_model_len == 32_768 + 128
        assert ThroughputSizes(contexts=()).max_model_len == 128 + 256

    def test_a_row_that_fails_leaves_the_others(self) -> None:
        def run(workload: Workload, _: float) -> float:
            if len(workload.prompts) == 3:
                raise LookupError("no such kernel")
            return float(max(workload.lengths))

        few = workloads.make_few(SIZES.throughput, 2100)
        made = workloads.measure_few(run, few, 0, 2)
        assert sizes_of(made["rows"]) == [FEW[0], *FEW[2:]]
        assert made["left_out"] == {
            "3 requests of 6 tokens": "LookupError: no such kernel"
        }


class TestSection:
    def test_the_floor_reads_the_weights(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = benchmark.weight_bytes_per_step(bench.config, torch.float32)
        asked: list[int] = []

        def read(device: Any, num_bytes: int, *_: Any, **__: Any) -> list[float]:
            asked.append(num_bytes)
            return [size / seconds for seconds in (0.2, 0.4, 0.1, 0.3, 0.2)]

        monkeypatch.setattr(tpot, "measure_bandwidth", read)
        floor = tpot.measure_floor(bench)
        assert asked == [size] and floor["bytes"] == size
        assert floor["ms"] == pytest.approx(200) and floor["spread"] == pytest.approx(
            1.5
        )

    def test_the_floor_of_the_real_shape(self) -> None:
        from transformers import Qwen3Config

        config = Qwen3Config(**workloads.QWEN3_0_6B)
        size = benchmark.weight_bytes_per_step(config, torch.bfloat16)
        assert round(size / 1e9, 3) == 1.192

    def test_rows_in_floors(self, bench: Bench) -> None:
        """Beside the weights, what the middle step of all requests has in its cache."""
        row = {"requests": 3, "prompt_tokens": 20, "output_tokens": 4, "tpot_ms": 0.6}
        tpot.add_floors(bench, [row], {"ms": 0.2, "bytes": 1000})
        assert row["floors"] == pytest.approx(3)
        cache = 3 * 22 * kv_bytes_per_token(bench.config, torch.float32)
        assert row["least_floors"] == pytest.approx(1 + cache / 1000)

    def test_what_drawing_costs(self) -> None:
        def row(requests: int, ms: float) -> dict[str, Any]:
            return {"requests": requests, "prompt_tokens": 6, "tpot_ms": ms}

        sampled = [row(1, 1.5), row(16, 3.0)]
        tpot.add_difference(sampled, [row(1, 1.25), row(8, 2.0)])
        assert [one["more_ms"] for one in sampled] == [0.25, None]

    def test_the_section(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """All of it, with real processes; and which requests were asked how."""
        asked: list[tuple[int, Any, Any, Any, Any]] = []
        generate = LLMEngine.generate

        def note(self: Any, prompts: Any, params: Any, **options: Any) -> Any:
            [kind] = {(p.temperature, p.top_p, p.top_k, p.seed) for p in params}
            asked.append((len(prompts), *kind))
            return generate(self, prompts, params, **options)

        monkeypatch.setattr(LLMEngine, "generate", note)
        made = json.loads(json.dumps(SECTIONS["tpot"](bench)))
        assert len(made["floor"]["seconds"]) == 5 and made["runner"] == "ModelRunner"
        assert sizes_of(made["rows"]) == FEW and made["left_out"] == {}
        assert [one["tokens"] for one in made["tokens"]] == [5, 15]
        for row in made["rows"]:
            assert row["floors"] == row["tpot_ms"] / made["floor"]["ms"]
            assert row["least_floors"] > 1 and len(row["seconds"]) == 2
        assert sizes_of(made["sampled"]["rows"]) == FEW[:2]
        for row, greedy in zip(made["sampled"]["rows"], made["rows"], strict=False):
            assert row["more_ms"] == pytest.approx(row["tpot_ms"] - greedy["tpot_ms"])
        drawn = [one for one in asked if one[1:] == (0.7, 0.9, 50, 0)]
        assert [one[0] for one in drawn] == [1] * 6 + [3] * 6
        assert {one[1] for one in asked} == {0, 0.7}
        begun = made["starts"]
        assert sizes_of(begun["rows"]) == [FEW[0]] * 2 and begun["left_out"] == []
        times = [row["tpot_ms"] for row in begun["rows"]]
        spread = (max(times) - min(times)) / statistics.median(times)
        assert begun["spread"] == pytest.approx(spread)
        assert begun["options"] == {"max_num_seqs": 1}

    def test_wrong_tokens_are_not_timed(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong = lambda _, some, __: [[0] * n for n in some.lengths]  # noqa: E731
        monkeypatch.setattr(tpot, "ask", wrong)
        monkeypatch.setattr(tpot, "measure_few", pytest.fail)
        with pytest.raises(BenchmarkError, match="Nothing is timed"):
            tpot.run_rows(bench, {"ms": 1.0, "bytes": 1})

    def test_every_start_has_an_empty_cache_of_its_own(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[starts.Task] = []
        row = {"requests": 1, "prompt_tokens": 6, "output_tokens": 5, "tpot_ms": 1.0}
        row["spread"] = 0.0

        def run(tasks: Any, together: int, check: Any) -> list[Any]:
            assert together == 2
            with pytest.raises(BenchmarkError):
                check(tasks[0], [[0] * 5] * 2)
            seen.extend(tasks)
            for task in tasks:
                assert not any(Path(one).exists() for one in task.environment.values())
            return [row, {"left_out": "no such card"}]

        monkeypatch.setattr(tpot, "run_tasks", run)
        made = tpot.run_starts(bench, {"ms": 0.5, "bytes": 1000})
        places = [one for task in seen for one in task.environment.values()]
        assert len({*places}) == 4 and {task.name for task in seen} == {"tpot"}
        assert {*seen[0].environment} == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
        [kept] = made["rows"]
        assert kept["floors"] == 2 and made["spread"] == 0
        assert made["left_out"] == ["no such card"]
