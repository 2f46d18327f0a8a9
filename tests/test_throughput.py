"""The benchmark of many requests: its workloads, floors, fresh processes and traces."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import TINY

from folo_lib import (
    benchmark,
    benchmark_cli as cli,
    benchmark_latency as latency,
    benchmark_starts as starts,
    benchmark_throughput as throughput,
    benchmark_timeline as timeline,
    benchmark_tpot as tpot,
    benchmark_vllm,
    benchmark_waterfall as waterfall,
    benchmark_workloads as workloads,
)
from folo_lib.benchmark import BenchmarkError
from folo_lib.benchmark_bench import Bench, LatencySizes, Sizes, TimelineSizes
from folo_lib.benchmark_sections import SECTIONS
from folo_lib.benchmark_systems import write_random_checkpoint
from folo_lib.benchmark_workloads import ThroughputSizes, Workload
from folo_lib.config import MODEL_RUNNERS
from folo_lib.engine import Inbox, LLMEngine
from folo_lib.kv_cache import kv_bytes_per_token
from folo_lib.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("young_garbage")

CPU = torch.device("cpu")
SIZES = Sizes(
    prompt_tokens=8,
    output_tokens=6,
    prompts=(5,),
    contexts=(6,),
    context_tokens=4,
    bandwidth_bytes=2**16,
    throughput=ThroughputSizes(
        num_requests=5,
        shortest=3,
        longest=9,
        equal=(2, 3),
        prompt_tokens=6,
        output_tokens=5,
        num_runs=2,
        num_theirs=4,
        few=(1, 3),
        contexts=(20,),
        context_tokens=4,
    ),
    timeline=TimelineSizes((1, 3), (3,), prompt_tokens=5, num_steps=3, num_traced=2),
    latency=LatencySizes((6,), 4, 2, 5, long_prompt=40, num_steps=3, num_runs=2),
    starts=2,
    together=2,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, TINY, CPU)
    return folder


@pytest.fixture
def bench(tiny: Path) -> Bench:
    return Bench(tiny, CPU, torch.float32, SIZES)


class TestWorkloads:
    def test_the_mixed_one_is_nano_vllms(self) -> None:
        """One generator for all numbers, prompts first, each after its own length."""
        mixed = workloads.make_mixed(ThroughputSizes(), 151_936)
        random.seed(0)
        prompts = [
            [random.randint(0, 10_000) for _ in range(random.randint(100, 1024))]
            for _ in range(256)
        ]
        lengths = [random.randint(100, 1024) for _ in range(256)]
        assert mixed == Workload(prompts, lengths)
        assert mixed.num_tokens == 133_966 and sum(map(len, prompts)) == 142_827
        assert mixed.max_model_len == max(map(len, prompts)) + 1024

    def test_a_small_vocabulary_has_small_ids(self) -> None:
        sizes = SIZES.throughput
        mixed = workloads.make_mixed(sizes, 50)
        equal = workloads.make_equal(sizes, 50, 40, 5)
        for workload in (mixed, equal):
            ids = {one for prompt in workload.prompts for one in prompt}
            assert 40 < max(ids) < 50
        assert {*map(len, equal.prompts)} == {6} and equal.lengths == [5] * 40
        assert len({tuple(prompt) for prompt in equal.prompts}) == 40

    def test_parts_of_a_workload(self) -> None:
        whole = Workload([[1], [2, 3], [4]], [5, 2, 7])
        assert whole.first(2) == Workload([[1], [2, 3]], [5, 2])
        assert whole.shortened(4) == Workload([[1], [2, 3], [4]], [4, 2, 4])
        assert (whole.num_tokens, whole.max_model_len) == (14, 9)

    def test_the_first_run_warms_up_and_garbage_waits(self) -> None:
        frozen: list[bool] = []
        gc.unfreeze()  # what `conftest.py` has frozen
        seconds = iter([99.0, 4.0, 2.0, 8.0])

        def run(workload: Workload, temperature: float) -> float:
            frozen.append(gc.get_freeze_count() > 0)
            assert temperature == 0.5
            return next(seconds)

        made = workloads.measure_runs(run, Workload([[1, 2]], [8]), 0.5, 3)
        assert made == {
            "requests": 1, "prompt_tokens": 2, "output_tokens": 8,
            "seconds": [4.0, 2.0, 8.0], "spread": 1.5, "tokens_per_second": 2.0,
        }  # fmt: skip
        assert frozen == [False, True, True, True] and not gc.get_freeze_count()

    def test_every_engine_is_asked_the_same(self) -> None:
        asked: list[tuple[int, int, float]] = []

        def run(workload: Workload, temperature: float) -> float:
            asked.append((len(workload.prompts), workload.num_tokens, temperature))
            return 0.5 + 0.1 * max(workload.lengths)

        made = workloads.measure_throughput(run, SIZES.throughput, 2100)
        mixed = workloads.make_mixed(SIZES.throughput, 2100)
        expected = [(1, 1, 0), (1, 5, 0), (2, 10, 0), (3, 15, 0)]
        expected += [(5, mixed.num_tokens, 0.6)]
        assert asked == [one for one in expected for _ in range(3)]
        assert made["one"]["ttft_ms"] == pytest.approx(600)
        assert made["one"]["tpot_ms"] == pytest.approx(100)
        assert [row["requests"] for row in made["equal"]] == [2, 3]
        assert made["mixed"]["temperature"] == 0.6


class TestThroughput:
    def test_the_floor_is_what_steps_must_read(self, bench: Bench) -> None:
        """Step by step, as long as somebody writes."""
        workload = Workload([[1] * 4, [2] * 9], [3, 6])
        weights = benchmark.weight_bytes_per_step(bench.config, torch.float32)
        token = kv_bytes_per_token(bench.config, torch.float32)
        total = 0
        for step in range(6):  # the first step reads the prompts and draws from them
            total += weights
            for prompt, length in ((4, 3), (9, 6)):
                if 0 < step < length:
                    total += (prompt + step) * token
        args = bench.config, torch.float32, workload
        assert throughput.workload_bytes(*args) == total

    def test_the_floor_of_the_real_workload(self) -> None:
        """Design section 6: about 3.7 s on an H200, 0.3 of which is arithmetic."""
        from transformers import Qwen3Config

        config = Qwen3Config(**workloads.QWEN3_0_6B)
        mixed = workloads.make_mixed(ThroughputSizes(), 151_936)
        size = throughput.workload_bytes(config, torch.bfloat16, mixed)
        assert 3.3 < size / 4.4e12 < 3.5

    def test_shares_of_the_floor(self, bench: Bench) -> None:
        workload = Workload([[1] * 4], [3])
        row: dict[str, Any] = {"requests": 1, "tokens_per_second": 1.5}
        size = throughput.workload_bytes(bench.config, torch.float32, workload)
        throughput.add_floor(bench, row, workload, size / 2)
        assert row["floor_seconds"] == 2 and row["floor_bytes"] == size
        assert row["floor_tokens_per_second"] == 1.5 and row["share_of_floor"] == 1

    def test_the_section(self, bench: Bench) -> None:
        made = json.loads(json.dumps(SECTIONS["throughput"](bench)))
        assert len(made["bandwidth"]["values"]) == 5
        ours = made["folo_lib"]
        few = bench.sizes.throughput
        assert ours["runner"] == "ModelRunner"
        assert ours["attention"] == ["TorchRaggedBackend"]
        assert ours["tokens"]["tokens"] == 2 * 5 and ours["memory"] is None
        assert [row["requests"] for row in ours["equal"]] == [2, 3]
        for row in (*ours["equal"], ours["mixed"]):
            assert len(row["seconds"]) == 2 and row["share_of_floor"] > 0
            speed = row["output_tokens"] / statistics.median(row["seconds"])
            assert row["tokens_per_second"] == pytest.approx(speed)
        theirs = made["huggingface"]
        workload = workloads.make_mixed(few, 2100).first(4)
        names = {row["system"] for row in theirs["rows"]} | {*theirs["left_out"]}
        assert names == {*throughput.WAYS} and theirs["rows"]
        for row in theirs["rows"]:
            assert row["output_tokens"] == workload.num_tokens and row["requests"] == 4
        speeds = [row["tokens_per_second"] for row in theirs["rows"]]
        assert speeds == sorted(speeds, reverse=True)

    def test_both_ways_of_hugging_face_write_our_tokens(self, bench: Bench) -> None:
        workload = Workload([[5, 6, 7], [8] * 9, [1, 2]], [4, 2, 6])
        ours = throughput.ask(LLMEngine(bench.model, max_model_len=16), workload, 0)
        for name, answer in throughput.WAYS.items():
            if name == "generate_batch":
                pytest.importorskip("transformers", minversion="5.17")
            answers, seconds = answer(bench, workload)
            assert answers == ours and seconds > 0, name

    def test_what_fails_is_left_out_with_its_reason(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Any:
            raise RuntimeError("no such thread")

        def short(_: Bench, workload: Workload) -> Any:
            return [[1]] * len(workload.prompts), 1.0

        def good(_: Bench, workload: Workload) -> Any:
            return [[1] * length for length in workload.lengths], 2.0

        ways = {"fails": fail, "short": short, "good": good}
        monkeypatch.setattr(throughput, "WAYS", ways)
        made = throughput.run_theirs(bench)
        assert [row["system"] for row in made["rows"]] == ["good"]
        assert "no such thread" in made["left_out"]["fails"]
        assert "other numbers of tokens" in made["left_out"]["short"]

    def test_an_engine_that_answers_wrongly_is_not_timed(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def wrong(_: Any, workload: Workload, temperature: float) -> Any:
            return [[0] * length for length in workload.lengths]

        monkeypatch.setattr(throughput, "ask", wrong)
        monkeypatch.setattr(throughput, "measure_throughput", pytest.fail)
        with pytest.raises(BenchmarkError, match="Nothing is timed"):
            throughput.run_ours(bench)

    def test_a_failed_request_is_an_error(self) -> None:
        output = SimpleNamespace(error="out of luck", outputs=[])
        engine: Any = SimpleNamespace(generate=lambda *_, **__: [output])
        with pytest.raises(RuntimeError, match="out of luck"):
            throughput.ask(engine, Workload([[1]], [2]), 0)
        output.error, output.outputs = "", [SimpleNamespace(token_ids=[1])]
        with pytest.raises(RuntimeError, match="other numbers"):
            throughput.ask(engine, Workload([[1]], [2]), 0)

    def test_prefix_caching_is_off(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engines: list[LLMEngine] = []

        def note(engine: LLMEngine, *_: Any) -> Any:
            engines.append(engine)
            raise InterruptedError

        monkeypatch.setattr(throughput, "ask", note)
        with pytest.raises(InterruptedError):
            throughput.run_ours(bench)
        params = SamplingParams(max_tokens=1)
        for _ in range(2):  # a block of 16 tokens that could be found again
            engines[0].generate([[7] * 17], params, use_tqdm=False)
        assert engines[0].stats().num_prefix_hits == 0

    def test_steps_that_run_eagerly_have_no_other_name(self, bench: Bench) -> None:
        engine = LLMEngine(bench.model, max_model_len=16)
        throughput.check_runner(engine, "graph")
        runner: Any = engine.executor.worker.runner
        runner.is_static = False
        throughput.check_runner(engine, "eager")
        with pytest.raises(ValueError, match="decode='graph' is not to be had here"):
            throughput.check_runner(engine, "graph")

    @pytest.mark.parametrize("decode", sorted({*MODEL_RUNNERS} - {"eager"}))
    def test_torchs_attention_has_no_graphs(self, bench: Bench, decode: str) -> None:
        options = {"decode": decode, "attention_backend": "torch_sdpa"}
        with pytest.raises(ValueError, match="steps run eagerly"):
            timeline.measure_setting(bench, options)

    def test_peak_memory_beyond_weights_and_cache(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = LLMEngine(bench.model, max_model_len=32, max_num_seqs=3)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * 10**9)
        made = throughput.measure_peak(engine, bench.model)
        runner = engine.executor.worker.runner
        caches = [part for pair in runner.kv_caches for part in pair]
        assert made["cache"] == sum(tensor.nbytes for tensor in caches)
        weights = sum(weight.nbytes for weight in bench.model.parameters())
        rest = weights + made["cache"]
        assert made["weights"] == weights
        assert made["beyond"] == {
            "allocated": 10**9 - rest,
            "reserved": 2 * 10**9 - rest,
        }


class FakeVLLM(ModuleType):
    """As much of vLLM as the benchmark asks for."""

    __version__ = "1.2.3"

    def __init__(self) -> None:
        super().__init__("vllm")
        self.options: dict[str, Any] = {}
        self.params: list[dict[str, Any]] = []
        self.extra = 0
        self.was_shut_down = False

    def LLM(self, **options: Any) -> Any:
        self.options = options
        self.config = json.loads(Path(options["model"], "config.json").read_text())
        return self

    def SamplingParams(self, **options: Any) -> dict[str, Any]:
        self.params.append(options)
        return options

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm and all(
            [*prompt] == ["prompt_token_ids"] for prompt in prompts
        )
        lengths = [one["max_tokens"] + self.extra for one in params]
        time.sleep(1e-5 * max(lengths))  # so that no token takes no time
        tokens = [SimpleNamespace(token_ids=[0] * length) for length in lengths]
        return [SimpleNamespace(outputs=[one]) for one in tokens]

    def AsyncEngineArgs(self, **options: Any) -> dict[str, Any]:
        self.LLM(**options)
        return options

    @property
    def AsyncLLMEngine(self) -> Any:
        return FakeAsyncLLM(self)


class FakeAsyncLLM:
    """Streams what is new, two tokens at a time."""

    def __init__(self, vllm: FakeVLLM) -> None:
        self.vllm = vllm
        self.ids: list[str] = []

    def from_engine_args(self, options: dict[str, Any]) -> Any:
        assert options["disable_log_stats"]
        return self

    async def generate(
        self, prompt: Any, params: dict[str, Any], request_id: str
    ) -> AsyncIterator[Any]:
        assert [*prompt] == ["prompt_token_ids"] and request_id not in self.ids
        assert params["output_kind"] == "new tokens"
        self.ids.append(request_id)
        tokens = [0] * (params["max_tokens"] + self.vllm.extra)
        for i in range(0, len(tokens), 2):
            await asyncio.sleep(1e-4)
            one = SimpleNamespace(token_ids=tokens[i : i + 2])
            yield SimpleNamespace(outputs=[one])

    def shutdown(self) -> None:
        self.vllm.was_shut_down = True


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    params: Any = ModuleType("vllm.sampling_params")
    params.RequestOutputKind = SimpleNamespace(DELTA="new tokens")
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return fake


class TestVLLM:
    def begin(self, path: Path, device: str) -> None:
        sizes = asdict(SIZES)
        record = {"setup": {"device": device, "sizes": sizes}, "sections": {"x": [1]}}
        path.write_text(json.dumps(record))

    def test_each_start_is_added_to_the_file(
        self, vllm: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "out.json"
        monkeypatch.setattr("platform.processor", lambda: "my cpu")
        self.begin(path, "my cpu")
        for _ in range(2):
            benchmark_vllm.main(["--out", str(path)])
        record = json.loads(path.read_text())
        assert record["sections"]["x"] == [1]
        one, two = record["sections"]["vllm"]
        assert one.keys() == two.keys()
        assert one["versions"]["vllm"] == "1.2.3" and one["date"].endswith("+00:00")
        assert one["start_seconds"] >= 0 and str(tmp_path) not in path.read_text()
        mixed = workloads.make_mixed(SIZES.throughput, 151_936)
        assert one["mixed"]["output_tokens"] == mixed.num_tokens
        assert [row["requests"] for row in one["equal"]] == [2, 3]
        assert all(len(row["seconds"]) == 2 for row in one["equal"])
        sizes = [(row["requests"], row["prompt_tokens"]) for row in one["tpot"]["rows"]]
        assert sizes == [(1, 6), (3, 6), (1, 20)] and one["tpot"]["left_out"] == {}
        assert [*tmp_path.iterdir()] == [path]

    def test_it_is_started_like_ours(
        self, vllm: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import Qwen3Config

        monkeypatch.setattr("platform.processor", lambda: "my cpu")
        self.begin(tmp_path / "out.json", "my cpu")
        benchmark_vllm.main(["--out", str(tmp_path / "out.json")])
        assert vllm.options["enable_prefix_caching"] is False
        assert vllm.options["skip_tokenizer_init"] is True
        assert vllm.options["load_format"] == "dummy"
        assert vllm.options["max_model_len"] == 20 + 4
        for params in vllm.params:
            assert params["ignore_eos"] and params["detokenize"] is False
            assert params["temperature"] in (0, 0.6)
        read = Qwen3Config(**vllm.config)
        for name, value in workloads.QWEN3_0_6B.items():
            found = getattr(read, name)
            assert str(found).removeprefix("torch.") == str(value) or found == value

    def test_a_checkpoint_is_loaded(
        self,
        vllm: FakeVLLM,
        tiny: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("platform.processor", lambda: "my cpu")
        path = tmp_path / "out.json"
        self.begin(path, "my cpu")
        benchmark_vllm.main(["--out", str(path), "--model", str(tiny)])
        assert vllm.options["load_format"] == "auto"
        assert vllm.options["model"] == str(tiny) and str(tiny) not in path.read_text()

    def test_other_numbers_of_tokens_are_refused(
        self, vllm: FakeVLLM, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text("{}")
        vllm.extra = 1
        run = benchmark_vllm.start(benchmark_vllm.make_options(tmp_path, False, 9))
        with pytest.raises(RuntimeError, match="other numbers of tokens"):
            run(Workload([[1]], [2]), 0)

    def test_streams_are_those_of_our_section(
        self, vllm: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("platform.processor", lambda: "my cpu")
        path = tmp_path / "out.json"
        self.begin(path, "my cpu")
        with pytest.raises(SystemExit):  # there is nothing to compare with
            benchmark_vllm.main(["--out", str(path), "--serving"])
        record = json.loads(path.read_text())
        sizes = {"streams": 3, "stream_tokens": 5, "num_runs": 2}
        record["sections"]["serving"] = [{"sizes": sizes}]
        path.write_text(json.dumps(record))
        benchmark_vllm.main(["--out", str(path), "--serving"])
        [made] = json.loads(path.read_text())["sections"]["vllm_serving"]
        assert (made["requests"], made["output_tokens"]) == (3, 15)
        assert made["prompt_tokens"] == 3 * 32 and len(made["seconds"]) == 2
        assert made["ttft_alone"] > 0 and made["versions"]["vllm"] == "1.2.3"
        assert vllm.options["enable_prefix_caching"] is False and vllm.was_shut_down
        assert str(tmp_path) not in path.read_text()
        vllm.extra, vllm.was_shut_down = 1, False
        with pytest.raises(RuntimeError, match="ended after 6 tokens"):
            benchmark_vllm.main(["--out", str(path), "--serving"])
        assert vllm.was_shut_down

    def test_a_file_must_be_there_and_of_this_device(
        self, vllm: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(benchmark_vllm, "measure", pytest.fail)
        path = tmp_path / "out.json"
        with pytest.raises(SystemExit, match="does not exist: run"):
            benchmark_vllm.main(["--out", str(path)])
        self.begin(path, "another")
        with pytest.raises(SystemExit, match="recorded on another and this is"):
            benchmark_vllm.main(["--out", str(path)])

    def test_the_workloads_need_the_standard_library_alone(self) -> None:
        code = (
            "import sys, folo_lib.benchmark_workloads;"
            "print({n.split('.')[0] for n in sys.modules} & {'torch', 'transformers'})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
        assert done.stdout.strip() == "set()"


def task_of(folder: Path, name: str = "engine", **changes: Any) -> starts.Task:
    task = starts.Task(name, str(folder), "cpu", "float32", SIZES.throughput, 3)
    return replace(task, **changes)


class TestStarts:
    def test_fresh_processes_measure_one_after_another(
        self, tiny: Path, bench: Bench
    ) -> None:
        """Real ones: an engine, the loop without a cache, and one that is not to be had."""
        from folo_lib.benchmark_batch import check_answers

        checked: list[str] = []

        def check(task: starts.Task, answers: list[list[int]]) -> None:
            checked.append(task.name)
            found = check_answers(bench, task.get_few(2100), answers)
            assert found["tokens"] == 2 * 5

        tasks = [
            task_of(tiny, options={"scheduler": "fcfs"}),
            task_of(tiny, "no cache", num_requests=2),
            task_of(tiny, options={"decode": "magic"}),
        ]
        one, alone, magic = starts.run_tasks(tasks, 3, check)
        assert checked == ["engine", "no cache"]
        mixed = workloads.make_mixed(SIZES.throughput, 2100)
        assert (one["requests"], alone["requests"]) == (3, 2)
        assert one["output_tokens"] == mixed.first(3).num_tokens
        assert one["preemptions"] == 0 and len(one["seconds"]) == 1
        assert "decode 'magic'" in magic["left_out"]

    def test_wrong_answers_are_not_timed_and_no_process_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log: list[str] = []

        class Fake:
            def __init__(self, task: starts.Task, errors: Any) -> None:
                self.name, self.timer = task.name, threading.Timer(9, pytest.fail)
                self.process = SimpleNamespace(
                    kill=lambda: log.append(f"kill {task.name}"),
                    wait=lambda: None, stdin=None, stdout=None,
                )  # fmt: skip

            def read(self) -> dict[str, Any]:
                log.append(f"ready {self.name}")
                return {"answers": [[1]]}

            def measure(self) -> dict[str, Any]:
                log.append(f"measure {self.name}")
                return {"name": self.name}

        monkeypatch.setattr(starts, "Started", Fake)
        tasks = [task_of(tmp_path, name) for name in "abc"]
        assert [one["name"] for one in starts.run_tasks(tasks, 2)] == ["a", "b", "c"]
        assert log == [
            "ready a", "ready b", "measure a", "measure b", "kill a", "kill b",
            "ready c", "measure c", "kill c",
        ]  # fmt: skip
        log.clear()

        def refuse(*_: Any) -> None:
            raise BenchmarkError("wrong")

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        made = starts.run_tasks(tasks, 2, refuse)
        assert made == [{"left_out": "wrong"}] * 3
        assert not any(line.startswith("measure") for line in log)
        assert [line for line in log if "kill" in line] == [
            "kill a",
            "kill b",
            "kill c",
        ]
        log.clear()
        with pytest.raises(KeyboardInterrupt):
            starts.run_tasks(tasks, 2, interrupt)
        assert log == ["ready a", "ready b", "kill a", "kill b"]

    def test_a_process_that_fails_says_why(self, tmp_path: Path) -> None:
        [made] = starts.run_tasks([task_of(tmp_path, "no such")], 1)
        assert "the process failed" in made["left_out"]
        assert "KeyError: 'no such'" in made["left_out"]

    def test_a_process_that_hangs_is_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        popen = subprocess.Popen
        code = "import time; time.sleep(60)"

        def run(command: list[str], **options: Any) -> Any:
            return popen([sys.executable, "-c", code], **options)

        monkeypatch.setattr(subprocess, "Popen", run)
        monkeypatch.setattr(starts, "MAX_SECONDS", 0.5)
        [made] = starts.run_tasks([task_of(tmp_path)], 1)
        assert made["left_out"] == "the process took more than 0.5 s"

    @pytest.mark.parametrize("dies", [False, True])
    def test_a_process_that_waits_for_its_turn(
        self, dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Has the time that it likes; if it ends meanwhile, that is its result."""
        code = "print('{}', flush=True); input(); print('{\"done\": 1}')"
        monkeypatch.setattr(starts, "MAX_SECONDS", 1)
        popen = subprocess.Popen

        def run(command: list[str], **options: Any) -> Any:
            return popen([sys.executable, "-c", code], **options)

        monkeypatch.setattr(subprocess, "Popen", run)
        with starts.started([task_of(tmp_path)]) as [one]:
            assert one.read() == {}
            time.sleep(1.2)
            if dies:
                one.process.kill()
                one.process.wait()
            made = one.measure()
        assert made == {"left_out": "the process failed: "} if dies else {"done": 1}

    def test_a_task_comes_back_as_it_was(self, tmp_path: Path) -> None:
        task = task_of(tmp_path, options={"a": 1}, environment={"B": "2"})
        back = starts.Task.from_json(task.to_json())
        assert asdict(back) == json.loads(task.to_json())
        tuples = {"equal": (2, 3), "few": (1, 3), "contexts": (20,)}
        assert replace(back.sizes, **tuples) == task.sizes

    def test_noise_is_passed_over_and_the_environment_reaches(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "child.py"
        program.write_text(
            "import os, sys\n"
            "print('a warning')\n"
            "print('{\"answers\": []}', flush=True)\n"
            "sys.stdin.readline()\n"
            "print('another')\n"
            "print('{\"seen\": \"' + os.environ['FOLO_SEEN'] + '\"}')\n"
        )
        popen = subprocess.Popen

        def run(command: list[str], **options: Any) -> Any:
            assert command[1:3] == ["-m", "folo_lib.benchmark_starts"]
            return popen([sys.executable, str(program)], **options)

        monkeypatch.setattr(subprocess, "Popen", run)
        task = task_of(tmp_path, environment={"FOLO_SEEN": "yes"})
        assert starts.run_tasks([task], 1) == [{"seen": "yes"}]

    def test_the_cache_has_room_for_all_that_run_at_once(self, tiny: Path) -> None:
        workload = Workload([[1] * 4, [2] * 9, [3]], [3, 6, 5])
        by_hand = [
            sum(len(prompt) + step for prompt, length in pairs if length >= step)
            for step in range(1, 7)
            for pairs in [list(zip(workload.prompts, workload.lengths, strict=True))]
        ]
        assert starts.count_tokens_at_peak(workload) == max(by_hand)
        mixed = workloads.make_mixed(SIZES.throughput, 2100)
        engine = starts.make_engine(task_of(tiny), mixed)
        throughput.ask(engine, mixed, 0.6)
        assert engine.stats().num_preemptions == 0

    def test_the_first_token_counts_from_the_call_on(self, tiny: Path) -> None:
        answers, run = starts.prepare_nothing(task_of(tiny, "first token"))
        made = run()
        assert answers == [] and 0 < made["load_seconds"] < made["first_token_seconds"]

    def test_the_child_writes_two_lines(
        self,
        tiny: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        log: list[str] = []
        run = lambda: log.append("run") or {"x": 1}  # noqa: E731
        monkeypatch.setitem(starts.TASKS, "engine", lambda _: ([[7]], run))
        stdin = SimpleNamespace(readline=lambda: log.append("told"))
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            starts.main([task_of(tiny).to_json()])
        finally:
            gc.unfreeze()
        assert log == ["told", "run"]
        assert capsys.readouterr().out.splitlines() == [
            '{"answers": [[7]]}',
            '{"x": 1}',
        ]


class TestWaterfall:
    def test_the_rungs_climb(self) -> None:
        names = [*waterfall.RUNGS]
        assert names[0] == "no KV cache" and names[-1] == "fused"
        rungs = waterfall.RUNGS
        assert [name for name in names if rungs[name].many_starts] == names[-4:]
        before, after = rungs["compiled"].options, rungs["run-ahead"].options
        assert {**before, "async_scheduling": True} == after
        assert {**after, "decode": "fused"} == rungs["fused"].options
        sizes = [rung.num_requests for rung in rungs.values()]
        assert sizes == sorted(sizes) and sizes[-1] == 256

    def test_starts_take_turns(self, bench: Bench) -> None:
        rungs = {
            "slow": waterfall.Rung("no cache", 1),
            "a": waterfall.Rung("engine", 256, {"decode": "a"}, True),
            "b": waterfall.Rung("engine", 256, {"decode": "b"}, True),
        }
        tasks = waterfall.make_tasks(bench, rungs)
        assert [name for name, _ in tasks] == ["slow", "a", "b", "a", "b"]
        slow, a, *_ = (task for _, task in tasks)
        assert (slow.name, slow.num_requests, a.num_requests) == ("no cache", 1, 5)
        assert (a.options, a.dtype, a.device) == ({"decode": "a"}, "float32", "cpu")

    def test_what_is_lacking_is_left_out_before_anything_starts(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rungs = {
            "good": waterfall.Rung("engine", 4, {"decode": "eager"}, True),
            "odd": waterfall.Rung("engine", 4, {"no_such_option": 1}, True),
            "bad": waterfall.Rung("engine", 4, {"decode": "magic"}, True),
            "late": waterfall.Rung("engine", 4, {}),
        }
        monkeypatch.setattr(waterfall, "RUNGS", rungs)
        checked: list[int] = []
        speeds = iter([4.0, 7.0])

        def run(tasks: Any, together: int, check: Any) -> list[dict[str, Any]]:
            assert together == 2
            results = []
            for task in tasks:
                if not task.options:
                    results.append({"left_out": "not with this model"})
                    continue
                few = task.get_few(2100)
                engine = LLMEngine(bench.model, max_model_len=16)
                check(task, throughput.ask(engine, few, 0))
                checked.append(few.num_tokens)
                with pytest.raises(BenchmarkError):
                    check(task, [[0] * 5] * 2)
                results.append({"tokens_per_second": next(speeds), "requests": 4})
            return results

        monkeypatch.setattr(waterfall, "run_tasks", run)
        made = waterfall.run_waterfall(bench)
        assert checked == [10, 10]
        [row] = made["rows"]
        assert row["rung"] == "good" and row["tokens_per_second"] == 5.5
        assert [one["tokens_per_second"] for one in row["starts"]] == [4.0, 7.0]
        assert row["requests"] == 4 and row["options"] == {"decode": "eager"}
        assert made["left_out"].keys() == {"odd", "bad", "late"}
        assert made["left_out"]["late"] == "not with this model"
        part = replace(bench, waterfall_rungs=["bad", "late"])
        made = waterfall.run_waterfall(part)
        assert made["rows"] == [] and [*made["left_out"]] == ["bad", "late"]


class TestTimeline:
    def test_the_settings_are_all_combinations(self) -> None:
        assert len(timeline.SETTINGS) == 8
        found = {tuple(one.values()) for one in timeline.SETTINGS.values()}
        assert len(found) == 8
        assert timeline.SETTINGS["graph + run-ahead"] == {
            "decode": "graph", "async_scheduling": True,
        }  # fmt: skip

    def test_spans_are_merged_and_written(self) -> None:
        spans = [(5.0, 6.0), (0.0, 2.0), (2.5, 3.0), (2.6, 2.7), (7.5, 8.0)]
        assert timeline.coalesce(spans) == [(0.0, 3.0), (5.0, 6.0), (7.5, 8.0)]
        assert len(timeline.coalesce(spans, 0)) == 4
        text = timeline.write_spans([(0.0, 3.04), (5.0, 6.0)])
        assert text == "0.0:3.0 5.0:1.0"
        assert timeline.read_spans(text) == [(0.0, 3.0), (5.0, 1.0)]
        assert timeline.read_spans("") == []

    def test_a_trace_becomes_two_lanes(self) -> None:
        def event(name: str, cat: str, ts: float, dur: float) -> dict[str, Any]:
            return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur}

        events = [{"ph": "M", "name": "process_name"}]
        for step in range(3):
            begin = 1000 + 100.0 * step
            events += [
                event("host: schedule", "user_annotation", begin, 10),
                event("host: launch", "user_annotation", begin + 10, 20),
                event("host: launch", "gpu_user_annotation", begin + 12, 70),
                event("aten::mm", "cpu_op", begin + 11, 5),
                event("gemm", "kernel", begin + 20, 30),
                event("gemm", "kernel", begin + 50.5, 9.5),
                event("copy", "gpu_memcpy", begin + 70, 10),
                event("host: read", "user_annotation", begin + 30, 51),
                event("host: update", "user_annotation", begin + 81, 9),
            ]
        made = timeline.read_trace(events, 2)
        assert made["us_per_step"] == pytest.approx((300 - 10 - 100) / 2)
        assert made["busy_us_per_step"] == pytest.approx(49.5)
        assert made["host"] == {
            "schedule": "0.0:10.0 100.0:10.0", "launch": "10.0:20.0 110.0:20.0",
            "read": "30.0:51.0 130.0:51.0", "update": "81.0:9.0 181.0:9.0",
        }  # fmt: skip
        assert made["device"] == "20.0:40.0 70.0:10.0 120.0:40.0 170.0:10.0"
        assert made["gap_us"] == 1.0 and made["kernels_per_step"] == 3
        assert made["kernels"] == [
            {"kernel": "gemm", "per_step": 2.0, "us": 19.75},
            {"kernel": "copy", "per_step": 1.0, "us": 10.0},
        ]

    def test_a_lane_never_has_too_many_spans(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(timeline, "MAX_INTERVALS", 3)
        host = {"ph": "X", "name": "host: schedule", "cat": "user_annotation"}
        events: list[Any] = [host | {"ts": 0, "dur": 500}]
        events += [
            {"ph": "X", "name": "k", "cat": "kernel", "ts": 10.0 * i, "dur": 5 + i % 2}
            for i in range(10)
        ]
        made = timeline.read_trace(events, 1)
        assert made["gap_us"] == 8 and made["device"].count(":") <= 3
        assert made["busy_us_per_step"] == 55  # counted before

    def test_kernels_of_a_layer_are_those_that_all_have(self) -> None:
        rows = [
            {
                "kernel": "gemm",
                "per_step": 57.0,
                "us": 3.0,
            },  # two a layer, and the head
            {"kernel": "norm", "per_step": 28.0, "us": 1.0},
            {"kernel": "sample", "per_step": 1.0, "us": 9.0},
        ]
        assert timeline.of_one_layer(rows, 28) == [
            {"kernel": "gemm", "per_layer": 2, "us": 3.0},
            {"kernel": "norm", "per_layer": 1, "us": 1.0},
        ]

    def test_the_host_names_what_it_does(self, bench: Bench) -> None:
        engine, inbox = (
            LLMEngine(bench.model, max_model_len=32),
            Inbox(every_token=False),
        )
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        groups = engine.processor.process_requests([[1, 2, 3]], params)
        engine.submit(groups, inbox)
        host, executor = timeline.HostLane(engine, inbox), engine.executor
        launch = executor.launch

        def slow(plan: Any) -> Any:
            time.sleep(0.02)
            step = launch(plan)
            read = step.read
            object.__setattr__(step, "read", lambda: time.sleep(0.03) or read())
            return step

        executor.launch = slow  # type: ignore[method-assign]
        with host.attached():
            for _ in range(4):
                host.step()
        assert executor.launch is slow
        assert not {"schedule"} & vars(engine.scheduler).keys()
        for step in host.steps[1:]:
            parts = [step[name] for name in timeline.PHASES]
            assert all(part > 0 for part in parts) and sum(parts) <= step["total"]
            assert step["launch"] >= 20_000 and 30_000 <= step["read"] < 50_000
        assert len(groups[0][0].output_token_ids) >= 3

    def test_the_section(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {"eager": {"decode": "eager"}, "magic": {"decode": "magic"}}
        monkeypatch.setattr(timeline, "SETTINGS", settings)
        made = json.loads(json.dumps(SECTIONS["timeline"](bench)))
        assert [*made["settings"]] == ["eager"] and "magic" in made["left_out"]
        one, three = made["settings"]["eager"]["rows"]
        assert (one["requests"], three["requests"]) == (1, 3)
        assert "trace" not in one
        assert one["host_us"].keys() == {*timeline.PHASES, "total"}
        trace = three["trace"]
        assert trace["device"] == "" and trace["layer"] == []
        for name, minimum in (
            ("schedule", 2),
            ("launch", 2),
            ("read", 1),
            ("update", 1),
        ):
            spans = timeline.read_spans(trace["host"][name])
            assert minimum <= len(spans) <= 2
        assert timeline.read_spans(trace["host"]["schedule"])[0][0] == 0
        assert three["busy_share"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_a_lane_of_its_own(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"eager": {"decode": "eager"}}
    monkeypatch.setattr(timeline, "SETTINGS", settings)
    bench = Bench(tiny, torch.device("cuda"), torch.float32, SIZES)
    made = timeline.run_timeline(bench)
    _, three = made["settings"]["eager"]["rows"]
    trace = three["trace"]
    spans = timeline.read_spans(trace["device"])
    assert spans and 0 < three["busy_share"] <= 1
    assert spans[0][0] >= 0 and sum(spans[-1]) <= 1.01 * 2 * trace["us_per_step"]
    busy = sum(duration for _, duration in spans) / 2
    assert busy >= 0.9 * trace["busy_us_per_step"] > 0
    assert sum(row["per_layer"] for row in trace["layer"]) >= 5


class TestLatency:
    def test_gaps_are_those_of_the_watched(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter([1.0, 2.0, 4.5, 5.0, 6.0])
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        steps = iter(["ab", "abc", "c", "b", "ac"])

        class Engine:
            def step(self) -> list[Any]:
                ids = next(steps)
                return [SimpleNamespace(request_id=i, finished=False) for i in ids]

        engine: Any = Engine()
        gaps = latency.Gaps(engine, ["a", "b"])
        found = [gaps.step() for _ in range(5)]
        assert found == [{*"ab"}, {*"abc"}, {"c"}, {"b"}, {*"ac"}]
        assert gaps.longest == [1.0, 3.0, 4.0]

    def test_a_long_prompt_makes_a_gap(self, bench: Bench) -> None:
        """Slowed down from outside: its step takes long, all others are quick."""
        engine = LLMEngine(bench.model, max_model_len=70, enable_prefix_caching=False)
        launch = engine.executor.launch

        def slow(plan: Any) -> Any:
            long = any(one.num_tokens > 20 for one in plan.scheduled)
            time.sleep(0.1 if long else 0.001)
            return launch(plan)

        engine.executor.launch = slow  # type: ignore[method-assign]
        made = latency.measure_gaps(bench, engine, SIZES.latency)
        assert made["before"] < 0.1 <= made["after"]
        assert made["ttft"] >= 0.1
        stats = engine.stats()
        assert stats.num_running == stats.num_waiting == stats.num_used_blocks == 0

    def test_the_first_token_comes_after_all_chunks(self, bench: Bench) -> None:
        """Each step is made a long one: four of them read the prompt of 40 tokens."""
        options = {"max_num_batched_tokens": 12, "enable_prefix_caching": False}
        engine = LLMEngine(bench.model, max_model_len=70, **options)
        launch = engine.executor.launch

        def slow(plan: Any) -> Any:
            time.sleep(0.05)
            return launch(plan)

        engine.executor.launch = slow  # type: ignore[method-assign]
        made = latency.measure_gaps(bench, engine, SIZES.latency)
        assert made["ttft"] >= 4 * 0.05

    def test_a_request_that_fails_ends_the_measurement(self, bench: Bench) -> None:
        engine = LLMEngine(bench.model, max_model_len=70)

        def fail(_: Any) -> Any:
            raise ValueError("no such kernel")

        engine.executor.launch = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no such kernel"):
            latency.measure_gaps(bench, engine, SIZES.latency)
        with pytest.raises(RuntimeError, match="no such kernel"):
            timeline.measure_batch(bench, engine, 1, SIZES.timeline)

    def test_a_start_that_fails_is_refused(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(latency, "run_tasks", lambda *_, **__: [{"left_out": "no"}])
        with pytest.raises(BenchmarkError, match="no"):
            latency.run_starts(bench, SIZES.latency)

    def test_the_section(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(benchmark, "find_unsteady", lambda *_: [])
        seen: list[starts.Task] = []

        def run(tasks: Any, together: int) -> list[Any]:
            seen.extend(tasks)
            return [{"first_token_seconds": 3.0, "load_seconds": 2.0}]

        monkeypatch.setattr(latency, "run_tasks", run)
        made = json.loads(json.dumps(SECTIONS["latency"](bench)))
        [row] = made["context"]
        assert row["prompt_tokens"] == 6 and len(row["tpot"]["values"]) == 5
        assert made["gaps"]["running"] == 2 and made["gaps"]["long_prompt"] == 40
        for name in ("before", "after", "ttft"):
            assert len(made["gaps"][name]["values"]) == 2
        assert [one["compile_cache"] for one in made["starts"]] == ["empty", "filled"]
        empty, filled = seen
        assert empty == filled and empty.name == "first token"
        assert {*empty.environment} == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
        assert not any(Path(place).exists() for place in empty.environment.values())


class TestCommandLine:
    def test_the_sections_are_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        text = capsys.readouterr().out
        for name in ("throughput", "waterfall", "timeline", "latency", "tpot"):
            assert name in SECTIONS and name in text

    def test_the_documentation_names_every_section(self) -> None:
        root = Path(__file__).resolve().parent.parent
        text = (root / "docs" / "benchmark.md").read_text(encoding="utf-8")
        assert {*re.findall(r"`(\w+)`", text)} >= {*SECTIONS}
        command = re.search(r"--sections (throughput [\w ]+)\n", text)
        assert command and {*command.group(1).split()} <= {*SECTIONS}
        assert "python -m folo_lib.benchmark_vllm --out" in text

    def test_quick_fits_the_bundled_model(self) -> None:
        from folo_lib import bundled_model_path
        from folo_lib.benchmark_bench import QUICK
        from folo_lib.checkpoint import read_config

        longest = read_config(bundled_model_path()).max_position_embeddings
        sizes = QUICK.latency
        assert sizes.long_prompt + 8 * sizes.num_steps <= longest
        assert max(sizes.contexts) + sizes.num_tokens <= QUICK.max_model_len
        assert QUICK.throughput.max_model_len <= longest
        assert {*QUICK.timeline.traced} <= {*QUICK.timeline.batches}

    def test_progress_is_flushed(self) -> None:
        modules = (throughput, starts, waterfall, timeline, latency, tpot, workloads)
        lines = "".join(
            Path(m.__file__ or "").read_text() for m in modules
        ).splitlines()
        prints = [line for line in lines if line.strip().startswith("print(")]
        assert len(prints) > 8 and all("flush=True)" in line for line in prints)
