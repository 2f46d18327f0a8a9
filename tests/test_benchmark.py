"""The benchmark: its clock, its turns, its refusals, and the file that it writes."""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TINY
from safetensors.torch import load_file

from folo_lib import (
    benchmark,
    benchmark_batch as batch,
    benchmark_bench,
    benchmark_cli as cli,
    benchmark_records as records,
    benchmark_sections as sections,
    benchmark_systems as systems,
    bundled_model_path,
)
from folo_lib.benchmark import BenchmarkError, FoloLib, HuggingFace, Reference, Run
from folo_lib.benchmark_bench import BatchSizes, Bench, Sizes
from folo_lib.benchmark_systems import Loop, Peer
from folo_lib.benchmark_workloads import ThroughputSizes
from folo_lib.checkpoint import load_model, read_config
from folo_lib.kv_cache import allocate_kv_caches
from folo_lib.qwen3 import Qwen3ForCausalLM

pytestmark = pytest.mark.usefixtures("young_garbage")

CPU = torch.device("cpu")
SIZES = Sizes(
    prompt_tokens=12,
    output_tokens=10,
    prompts=(5, 40, 127, 8192),
    contexts=(6, 30, 125, 8192),
    context_tokens=4,
    ladder_tokens=6,
    bandwidth_bytes=2**16,
    batch=BatchSizes(
        together=3,
        many=5,
        shortest=2,
        longest=7,
        before=3,
        conversations=3,
        system_tokens=40,
        max_tokens=90,
        num_tokens=6,
        num_steps=2,
        contexts=(5, 100),
    ),
).cut(128)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    systems.write_random_checkpoint(folder, TINY, CPU)
    return folder


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> HuggingFace:
    return HuggingFace(benchmark.load_huggingface(tiny, CPU, torch.float32))


@pytest.fixture(scope="module")
def ours(tiny: Path) -> FoloLib:
    return FoloLib(tiny, CPU, torch.float32, 128)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once each time it is read: every run takes the same time."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def model_of(system: FoloLib) -> Qwen3ForCausalLM:
    return system.engine.executor.worker.runner.model


class Scripted:
    """Answers from a list of times, and remembers who was asked, in which order."""

    def __init__(
        self, name: str, log: list[str], tpot: Callable[[int], float] = lambda i: 1.0
    ) -> None:
        self.name, self.log, self.tpot, self.calls = name, log, tpot, 0
        self.prompts: list[list[int]] = []

    def generate(self, prompt: list[int], num_tokens: int) -> Run:
        self.log.append(self.name)
        self.prompts.append(prompt)
        total = 2.0 + self.tpot(self.calls) * (num_tokens - 1)
        self.calls += 1
        return Run([0] * num_tokens, 2.0, total)


class TestRun:
    def test_tpot_counts_the_tokens_after_the_first(self) -> None:
        assert Run([1, 2, 3, 4, 5], 0.5, 2.5).tpot == 0.5

    def test_one_token_has_no_tpot(self) -> None:
        assert Run([1], 0.5, 0.5).tpot == 0


class TestSystems:
    def test_all_give_the_tokens_of_plain_greedy_decoding(
        self, tiny: Path, ours: FoloLib, theirs: HuggingFace
    ) -> None:
        prompt = benchmark.make_prompt(2100, 9)
        ids = list(prompt)
        model = load_model(tiny, "float32", "cpu", use_tqdm=False)
        for _ in range(7):
            logits = model.compute_logits(model(torch.tensor(ids))[-1])
            ids.append(int(logits.argmax()))
        static = HuggingFace(theirs.model, "static", cache_implementation="static")
        loops = systems.make_loops(tiny, CPU, torch.float32)
        for system in [ours, theirs, static, *loops]:
            assert system.generate(prompt, 7).token_ids == ids[9:], system.name
            assert system.generate(prompt, 1).token_ids == ids[9:10], system.name

    def test_first_token_comes_after_the_start_and_before_the_end(
        self, tiny: Path, ours: FoloLib, theirs: HuggingFace
    ) -> None:
        for system in [ours, theirs, *systems.make_loops(tiny, CPU, torch.float32)]:
            start = time.perf_counter()
            run = system.generate([1, 2, 3], 12)
            wall = time.perf_counter() - start
            assert 0 < run.ttft < run.total <= wall
            assert run.total > 0.8 * wall

    def test_ttft_is_that_of_the_prompt(
        self, ours: FoloLib, theirs: HuggingFace
    ) -> None:
        """Slowed down from outside: the prompt's step by 60 ms, all later by 10 ms."""
        for system, model in ((ours, model_of(ours).model), (theirs, theirs.model)):

            def slow(_: Any, args: Any, kwargs: Any) -> None:
                ids = kwargs.get("input_ids", args[0] if args else None)
                time.sleep(0.06 if ids.numel() > 1 else 0.01)

            handle = model.register_forward_pre_hook(slow, with_kwargs=True)
            try:
                run = system.generate([1, 2, 3], 6)
            finally:
                handle.remove()
            assert 0.06 <= run.ttft < run.total - 0.04
            assert 0.01 <= run.tpot < 0.06

    def test_eos_does_not_stop_them(self) -> None:
        """The bundled model would end this answer after a few tokens."""
        folder = bundled_model_path()
        ours = FoloLib(folder, CPU, torch.float32, 128)
        theirs = HuggingFace(benchmark.load_huggingface(folder, CPU, torch.float32))
        text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert ours.engine.tokenizer is not None
        prompt = ours.engine.tokenizer(text).input_ids
        for system in (ours, theirs):
            assert len(system.generate(prompt, 90).token_ids) == 90

    def test_ours_reports_what_went_wrong(
        self, ours: FoloLib, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(model_of(ours), "forward", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            ours.generate([1, 2], 3)

    def test_the_cache_is_as_large_as_asked(self, tiny: Path) -> None:
        system = FoloLib(tiny, CPU, torch.float32, 48)
        expected = allocate_kv_caches(read_config(tiny), 3, 16, torch.float32, CPU)
        caches = system.engine.executor.worker.runner.kv_caches
        assert caches[0][0].shape == expected[0][0].shape

    def test_no_run_finds_what_another_has_read(self, ours: FoloLib) -> None:
        prompt = benchmark.make_prompt(2100, 40)
        for _ in range(2):
            ours.generate(prompt, 2)
        assert ours.engine.stats().num_prefix_hits == 0

    def test_peer_has_its_ttft_from_a_run_of_one_token(self) -> None:
        asked: list[tuple[list[int], int]] = []

        def answer(prompt: list[int], num_tokens: int) -> list[int]:
            asked.append((prompt, num_tokens))
            time.sleep(0.01 * num_tokens)
            return [7] * num_tokens

        run = Peer("peer", answer).generate([1, 2], 4)
        assert asked == [([2, 1], 1), ([1, 2], 4)]
        assert run.token_ids == [7] * 4
        assert run.ttft >= 0.01 and run.total >= 0.04

    def test_loop_stops_its_clock_at_the_last_token(self) -> None:
        def tokens(prompt: list[int], num_tokens: int) -> Any:
            for i in range(num_tokens):
                time.sleep(0.02 if i == 0 else 0.005)
                yield i

        run = Loop("loop", tokens).generate([1], 5)
        assert run.token_ids == [0, 1, 2, 3, 4]
        assert run.ttft >= 0.02 and run.total - run.ttft >= 0.02

    def test_the_clock_waits_for_the_device(
        self, ours: FoloLib, theirs: HuggingFace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A device busy for 100 s when a run begins, and for 1 s at each later wait."""
        clock, waited = time.perf_counter, [0]
        monkeypatch.setattr(time, "perf_counter", lambda: clock() + waited[0])

        def wait(_: torch.device) -> None:
            waited[0] += 1 if waited[0] else 100

        monkeypatch.setattr(benchmark, "synchronize", wait)
        assert 1 < ours.generate([1, 2, 3], 4).total < 2
        waited[0] = 0
        run = theirs.generate([1, 2, 3], 4)
        assert 1 < run.ttft < 2 < run.total < 3

    def test_a_gpu_is_waited_for_and_a_cpu_is_not(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waited: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
        benchmark.synchronize(CPU)
        benchmark.synchronize(torch.device("cuda", 1))
        assert waited == [torch.device("cuda", 1)]

    def test_huggingface_has_the_device_and_the_dtype_asked_for(
        self, tiny: Path
    ) -> None:
        model = benchmark.load_huggingface(tiny, torch.device("meta"), torch.bfloat16)
        assert model.device.type == "meta" and model.dtype == torch.bfloat16

    def test_options_reach_generate(
        self, theirs: HuggingFace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        generate: Any = theirs.model.generate

        def spy(*args: Any, **options: Any) -> Any:
            seen.append(options.get("cache_implementation"))
            return generate(*args, **options)

        monkeypatch.setattr(theirs.model, "generate", spy)
        static = HuggingFace(theirs.model, "static", cache_implementation="static")
        for system in (theirs, static):
            system.generate([1, 2], 3)
        assert seen == [None, "static"]

    def test_ours_reports_what_went_wrong_later(
        self, ours: FoloLib, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = model_of(ours)
        forward = model.forward

        def fail(ids: Any, *args: Any, **kwargs: Any) -> Any:
            if ids.numel() == 1:
                raise RuntimeError("out of luck")
            return forward(ids, *args, **kwargs)

        monkeypatch.setattr(model, "forward", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            ours.generate([1, 2], 3)


class TestTurns:
    def test_take_turns_in_alternating_order_after_a_warm_up(self) -> None:
        log: list[str] = []
        a, b = Scripted("a", log), Scripted("b", log)
        runs = benchmark.take_turns([a, b], 4, 3, 100, 5)
        assert "".join(log) == "ba" + "ab" + "ba" + "ab" + "ba" + "ab"
        assert {name: len(of) for name, of in runs.items()} == {"a": 5, "b": 5}

    def test_each_turn_has_its_own_prompt_the_same_for_all(self) -> None:
        a, b = Scripted("a", []), Scripted("b", [])
        benchmark.take_turns([a, b], 40, 3, 100, 5)
        assert a.prompts == b.prompts
        assert len({tuple(prompt) for prompt in a.prompts}) == 6
        assert {len(prompt) for prompt in a.prompts} == {40}
        assert set().union(*a.prompts) <= set(range(100))

    def test_the_warm_up_does_not_count(self) -> None:
        a = Scripted("a", [], lambda i: 9.0 if i == 0 else 1.0)
        runs = benchmark.take_turns([a], 4, 3, 100, 5)
        assert [run.tpot for run in runs["a"]] == [1.0] * 5

    def test_no_run_waits_for_a_search_through_all_that_is_loaded(self) -> None:
        frozen: list[bool] = []
        gc.unfreeze()  # what `conftest.py` has frozen

        class Looks(Scripted):
            def generate(self, prompt: list[int], num_tokens: int) -> Run:
                frozen.append(gc.get_freeze_count() > 0)
                return super().generate(prompt, num_tokens)

        benchmark.take_turns([Looks("a", [])], 4, 3, 100, 5)
        assert frozen == [False] + [True] * 5
        assert gc.get_freeze_count() == 0

    @pytest.mark.parametrize("extra", [-1, 1])
    def test_an_answer_of_another_length_is_an_error(self, extra: int) -> None:
        class Other(Scripted):
            def generate(self, prompt: list[int], num_tokens: int) -> Run:
                return super().generate(prompt, num_tokens + extra)

        with pytest.raises(RuntimeError, match=f"stopped after {3 + extra} tokens"):
            benchmark.take_turns([Other("a", [])], 4, 3, 100, 5)


class TestStatistics:
    def test_summary_agrees_with_torch(self) -> None:
        values = [3.0, 1.0, 2.0, 5.0, 4.0, 9.0]
        p10, p90 = torch.tensor(values).quantile(torch.tensor([0.1, 0.9])).tolist()
        summary = benchmark.summarize(values)
        assert summary["median"] == statistics.median(values) == 3.5
        assert summary["p10"] == pytest.approx(p10)
        assert summary["p90"] == pytest.approx(p90)
        assert summary["spread"] == pytest.approx((p90 - p10) / 3.5)
        assert summary["values"] == values

    def test_paired_ratios_go_run_by_run(self) -> None:
        slow = {"tpot": {"values": [4.0, 9.0]}, "ttft": {"values": [1.0, 1.0]}}
        fast = {"tpot": {"values": [2.0, 3.0]}, "ttft": {"values": [4.0, 2.0]}}
        assert benchmark.paired_ratios(slow, fast) == [2.0, 3.0]
        assert benchmark.paired_ratios(slow, fast, "ttft") == [0.25, 0.5]

    @pytest.mark.parametrize("runs, spread", [(4, 0.25), (0, 0.25)])
    def test_too_few_runs_are_refused(self, runs: int, spread: float) -> None:
        with pytest.raises(ValueError, match="at least 5"):
            benchmark.check_bounds(runs, spread)

    @pytest.mark.parametrize("spread", [0.26, 0.0, -1.0, float("nan"), float("inf")])
    def test_the_bound_goes_downwards_only(self, spread: float) -> None:
        with pytest.raises(ValueError, match=r"goes up to 0\.25"):
            benchmark.check_bounds(5, spread)
        benchmark.check_bounds(5, 0.25)
        benchmark.check_bounds(7, 0.01)

    def test_measure_checks_the_bounds_first(self) -> None:
        a = Scripted("a", [])
        with pytest.raises(ValueError, match="at least 5"):
            benchmark.measure([a], 4, 3, 100, num_runs=4)
        assert a.calls == 0

    def test_pairs_must_be_as_many(self) -> None:
        slow, fast = {"tpot": {"values": [4.0, 9.0]}}, {"tpot": {"values": [2.0]}}
        with pytest.raises(ValueError):
            benchmark.paired_ratios(slow, fast)

    def test_a_row_shows_its_medians(self) -> None:
        runs = [Run([1, 2], i, 3.0 * i) for i in (1.0, 2.0, 30.0)]
        line = benchmark.describe_row(benchmark.make_row("a", 7, runs))
        assert "TTFT  2000.000 ms" in line and "TPOT  4000.000 ms" in line

    def test_a_spread_may_be_as_large_as_its_bound(self) -> None:
        row = {"system": "a", "prompt_tokens": 4, "ttft": {"spread": 0.25}}
        assert benchmark.find_unsteady([row], 0.25) == []


class TestMeasure:
    def test_rows(self, capsys: pytest.CaptureFixture[str]) -> None:
        systems = [Scripted("a", []), Scripted("b", [], lambda i: 0.5)]
        a, b = benchmark.measure(systems, 4, 11, 100, 6)
        assert (a["system"], a["prompt_tokens"], a["output_tokens"]) == ("a", 4, 11)
        assert a["ttft"]["values"] == [2.0] * 6 and a["attempt"] == 1
        assert b["tpot"]["median"] == 0.5 and b["total"]["median"] == 7.0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and "TPOT   500.000 ms" in lines[1]

    def test_one_token_has_ttft_only(self) -> None:
        [row] = benchmark.measure([Scripted("a", [])], 4, 1, 100, times=["ttft"])
        assert "ttft" in row and "tpot" not in row and "total" not in row

    def test_only_what_is_claimed_must_be_steady(self) -> None:
        wild = Scripted("wild", [], lambda i: 1.0 + i % 3)
        [row] = benchmark.measure([wild], 4, 9, 100, times=["ttft"])
        assert row["attempt"] == 1 and row["ttft"]["spread"] == 0

    def test_what_is_unsteady_is_refused_after_five_attempts(self) -> None:
        wild = Scripted("wild", [], lambda i: 1.0 + 0.2 * (i % 3))
        calm = Scripted("calm", [])
        with pytest.raises(BenchmarkError, match="tpot of wild at 4 tokens"):
            benchmark.measure([calm, wild], 4, 30, 100)
        assert wild.calls == calm.calls == 5 * 6

    def test_all_systems_are_measured_again_together(self) -> None:
        late = Scripted("late", [], lambda i: 1.0 + (i % 3 if i < 6 else 0))
        calm = Scripted("calm", [])
        rows = benchmark.measure([calm, late], 4, 30, 100)
        assert [row["attempt"] for row in rows] == [2, 2]
        assert late.calls == calm.calls == 12
        assert rows[1]["tpot"]["values"] == [1.0] * 5

    def test_a_tighter_bound_refuses_more(self) -> None:
        some = Scripted("a", [], lambda i: 1.0 + 0.05 * (i % 3))
        benchmark.measure([some], 4, 30, 100)
        with pytest.raises(BenchmarkError, match="spread above 3%"):
            benchmark.measure([some], 4, 30, 100, max_spread=0.03)

    @pytest.mark.parametrize("name", ["ttft", "tpot", "total"])
    def test_every_time_is_looked_at(self, name: str) -> None:
        row = {"system": "a", "prompt_tokens": 4}
        row |= {key: {"spread": 0.1} for key in ("ttft", "tpot", "total")}
        assert benchmark.find_unsteady([row], 0.2) == []
        row[name] = {"spread": 0.21}  # type: ignore[assignment]
        assert len(benchmark.find_unsteady([row], 0.2)) == 1


def follow(reference: Reference, swaps: dict[int, int]) -> Any:
    """A system that writes the reference's text, but for some of its steps."""

    class Follower:
        name = "follower"

        def __init__(self) -> None:
            self.prompts: list[list[int]] = []

        def generate(self, prompt: list[int], num_tokens: int) -> Run:
            self.prompts.append(prompt)
            at = len(prompt) - len(reference.prompt)
            answer: list[int] = []
            for step in range(at, at + num_tokens):
                derailed = any(i in swaps for i in range(at, step))
                token = 99 if derailed else reference.token_ids[step]
                answer.append(swaps.get(step, token))
            return Run(answer, 1.0, 2.0)

    return Follower()


class TestTokens:
    reference = Reference(
        prompt=[1, 2], token_ids=[3, 4, 5, 6, 7], margins=[1.0, 0.05, 1.0, 0.09, 0.1],
        error=0.01, std=1.0,
    )  # fmt: skip

    def test_equal(self) -> None:
        assert self.reference.num_decided == 3
        assert benchmark.check_tokens(follow(self.reference, {}), self.reference) == 0

    def test_near_ties_may_be_lost_and_the_reference_goes_on(self) -> None:
        system = follow(self.reference, {1: 50, 3: 60})
        assert benchmark.check_tokens(system, self.reference) == 2
        assert system.prompts == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]

    def test_a_near_tie_at_the_end(self) -> None:
        reference = Reference([1], [3, 4], [1.0, 0.0], 0.01, 1.0)
        assert benchmark.check_tokens(follow(reference, {1: 5}), reference) == 1

    @pytest.mark.parametrize("step", [0, 2, 4])
    def test_a_decided_step_must_agree(self, step: int) -> None:
        system = follow(self.reference, {step: 50})
        with pytest.raises(BenchmarkError, match=f"different tokens at step {step}"):
            benchmark.check_tokens(system, self.reference)

    def test_a_difference_behind_a_near_tie_is_seen(self) -> None:
        system = follow(self.reference, {1: 50, 2: 60})
        with pytest.raises(BenchmarkError, match="step 2"):
            benchmark.check_tokens(system, self.reference)

    def test_a_reference_that_proves_nothing_is_refused(self) -> None:
        good = Reference([1], [2] * 10, [1.0] * 10, 1e-5, 1.0)
        benchmark.check_reference(good, torch.float32)
        wrong = Reference([1], [2] * 10, [100.0] * 10, 2e-4, 1.0)
        with pytest.raises(BenchmarkError, match=r"2\.0e-04 standard deviations"):
            benchmark.check_reference(wrong, torch.float32)
        benchmark.check_reference(wrong, torch.bfloat16)
        ties = Reference([1], [2] * 11, [1.0] + [0.0] * 10, 1e-5, 1.0)
        with pytest.raises(BenchmarkError, match="9% of the steps"):
            benchmark.check_reference(ties, torch.float32)
        nan = Reference([1], [2] * 10, [1.0] * 10, float("nan"), 1.0)
        with pytest.raises(BenchmarkError):
            benchmark.check_reference(nan, torch.float32)

    def test_reference_is_huggingfaces_answer_and_its_margins(
        self, tiny: Path, ours: FoloLib, theirs: HuggingFace
    ) -> None:
        exact = benchmark.load_exact(tiny, CPU, torch.float32)
        assert exact.model.norm.weight.dtype == torch.float64
        prompt = benchmark.make_prompt(2100, 6)
        reference = benchmark.make_reference(theirs, model_of(ours), exact, prompt, 5)
        ids = list(prompt)
        for token, margin in zip(reference.token_ids, reference.margins, strict=True):
            logits = theirs.model(torch.tensor([ids])).logits[0, -1]
            best = logits.topk(2)
            assert best.indices[0] == token
            assert margin == pytest.approx(float(best.values.diff().abs()), abs=1e-5)
            ids.append(token)
        assert 0 < reference.error <= 1e-5 * reference.std

    def test_error_is_the_root_of_the_mean_square(
        self, tiny: Path, theirs: HuggingFace
    ) -> None:
        model = load_model(tiny, "float32", "cpu", use_tqdm=False)
        exact = benchmark.load_exact(tiny, CPU, torch.float32)
        model.model.norm.weight.mul_(1.1)  # every logit 1.1 times as large
        reference = benchmark.make_reference(theirs, model, exact, [5, 6, 7], 4)
        ids = torch.tensor([[5, 6, 7, *reference.token_ids[:-1]]])
        logits = theirs.model(ids).logits[0, -4:]
        expected = 0.1 * float(logits.square().mean().sqrt())
        assert reference.error == pytest.approx(expected, rel=1e-3)
        exact.model.norm.weight.mul_(1.1)  # now they are the ones who are wrong
        reference = benchmark.make_reference(theirs, model, exact, [5, 6, 7], 4)
        assert reference.error == pytest.approx(expected, rel=1e-3)

    def test_bf16(self, tiny: Path) -> None:
        ours = FoloLib(tiny, CPU, torch.bfloat16, 64)
        theirs = HuggingFace(benchmark.load_huggingface(tiny, CPU, torch.bfloat16))
        prompt = benchmark.make_prompt(2100, 8)
        exact = benchmark.load_exact(tiny, CPU, torch.bfloat16)
        reference = benchmark.make_reference(theirs, model_of(ours), exact, prompt, 32)
        assert reference.error > 1e-4 * reference.std
        benchmark.check_reference(reference, torch.bfloat16)
        assert benchmark.check_tokens(ours, reference) <= 32 - reference.num_decided

    @pytest.mark.parametrize(
        "dtype, most",
        [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)],
    )
    def test_the_error_is_bounded_in_standard_deviations(
        self, dtype: torch.dtype, most: float
    ) -> None:
        for std in (0.01, 100.0):
            good = Reference([1], [2], [1e9], 0.99 * most * std, std)
            benchmark.check_reference(good, dtype)
            bad = Reference([1], [2], [1e9], 1.01 * most * std, std)
            with pytest.raises(BenchmarkError, match="nothing is timed"):
                benchmark.check_reference(bad, dtype)

    def test_the_reference_has_their_margins_and_spread(
        self, tiny: Path, theirs: HuggingFace
    ) -> None:
        model = load_model(tiny, "float32", "cpu", use_tqdm=False)
        exact = benchmark.load_exact(tiny, CPU, torch.float32)
        model.model.norm.weight.mul_(1.5)  # our logits are others
        reference = benchmark.make_reference(theirs, model, exact, [5, 6, 7], 4)
        ids = torch.tensor([[5, 6, 7, *reference.token_ids[:-1]]])
        logits = theirs.model(ids).logits[0, -4:]
        margins = -logits.topk(2).values.diff().flatten()
        assert reference.margins == pytest.approx(margins.tolist(), abs=1e-5)
        assert reference.std == pytest.approx(float(logits.std()), rel=1e-5)

    def test_the_exact_model_is_not_rounded(self, tiny: Path) -> None:
        stored = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"]
        for dtype in (torch.bfloat16, torch.float16):
            exact = benchmark.load_exact(tiny, CPU, dtype)
            torch.testing.assert_close(
                exact.model.embed_tokens.weight.detach(), stored, rtol=0, atol=0
            )


class TestCheckpoint:
    def test_random_weights_load_and_have_uneven_norms(self, tiny: Path) -> None:
        model = load_model(tiny, "float32", "cpu", use_tqdm=False)
        norms = [w for name, w in model.named_parameters() if "norm" in name]
        assert len(norms) == 2 * 4 + 1
        assert all(0.5 <= w.min() < w.max() <= 1.5 for w in norms)
        assert json.loads((tiny / "config.json").read_text())["head_dim"] == 16

    def test_the_default_shape_is_that_of_qwen3_0_6b(self) -> None:
        from transformers import Qwen3Config

        config = Qwen3Config(**systems.QWEN3_0_6B)
        size = benchmark.weight_bytes_per_step(config, torch.bfloat16)
        assert size == 1_192_099_840  # the 596,049,920 parameters of the real one
        kv_bytes = benchmark.step_bytes(config, torch.bfloat16, 3) - size
        assert kv_bytes == 3 * 114_688

    def test_an_untied_embedding_is_not_read(self) -> None:
        from transformers import Qwen3Config

        shape = TINY | {"tie_word_embeddings": False}
        untied = benchmark.weight_bytes_per_step(Qwen3Config(**shape), torch.float32)
        tied = benchmark.weight_bytes_per_step(Qwen3Config(**TINY), torch.float32)
        assert untied == tied

    def test_weights_are_stored_in_the_dtype_of_the_shape(self, tmp_path: Path) -> None:
        systems.write_random_checkpoint(tmp_path, TINY | {"dtype": "bfloat16"}, CPU)
        stored = load_file(tmp_path / "model.safetensors").values()
        assert {weight.dtype for weight in stored} == {torch.bfloat16}

    def test_the_same_weights_each_time(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        for folder in (one, two):
            systems.write_random_checkpoint(folder, TINY, CPU)
            torch.rand(3)
        file = "model.safetensors"
        assert (one / file).read_bytes() == (two / file).read_bytes()

    def test_a_step_reads_twice_the_bytes_in_float32(self) -> None:
        from transformers import Qwen3Config

        config = Qwen3Config(**TINY)
        half = benchmark.step_bytes(config, torch.bfloat16, 3)
        assert benchmark.step_bytes(config, torch.float32, 3) == 2 * half


class TestLadder:
    def test_what_is_lacking_is_left_out_with_its_reason(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rungs, left_out = systems.make_rungs(tiny, CPU, torch.float32, 64)
        names = [rung.name for rung in rungs]
        assert names == ["no cache", "growing cache", "preallocated", "SDPA"]
        assert {*names[2:]} == {*systems.RUNGS} and not left_out
        lacking = {"magic": {"decode": "magic"}}
        monkeypatch.setattr(systems, "RUNGS", lacking | {"SDPA": {}})
        rungs, left_out = systems.make_rungs(tiny, CPU, torch.float32, 64)
        assert [rung.name for rung in rungs[2:]] == ["SDPA"]
        assert left_out.keys() == {"magic"} and "decode 'magic'" in left_out["magic"]

    def test_the_loops_read_as_many_tokens_a_step_as_they_say(self, tiny: Path) -> None:
        loops: Any = systems.make_loops(tiny, CPU, torch.bfloat16)
        assert [loop.name for loop in loops] == ["no cache", "growing cache"]
        for loop, expected in zip(loops, ([3, 4, 5, 6], [3, 1, 1, 1]), strict=True):
            model, lengths = loop.tokens.args[0], list[int]()
            assert model.model.norm.weight.dtype == torch.bfloat16
            hook = model.register_forward_pre_hook(
                lambda _, args, lengths=lengths: lengths.append(args[0].numel())
            )
            loop.generate([1, 2, 3], 4)
            hook.remove()
            assert lengths == expected

    def test_each_rung_has_its_attention(self, tiny: Path) -> None:
        rungs: Any = systems.make_rungs(tiny, CPU, torch.float32, 64)[0]
        names = {
            rung.name: type(module.backend).__name__
            for rung in rungs[2:4]
            for module in model_of(rung).modules()
            if isinstance(module, systems.Attention)
        }
        expected = {"preallocated": "TorchNaiveBackend", "SDPA": "TorchSDPABackend"}
        assert names == expected


class TestRoofline:
    @pytest.mark.usefixtures("steady")
    def test_bandwidth_is_bytes_over_seconds(self) -> None:
        speeds = benchmark.measure_bandwidth(CPU, 4096, num_runs=6, repeat=3)
        assert speeds == [3 * 4096.0] * 6  # a run is one tick

    @pytest.mark.usefixtures("steady")
    def test_the_bandwidth_clock_waits_for_the_device(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ticks = iter([50])  # the first run warms up

        def wait(_: torch.device) -> None:
            for _tick in range(next(ticks, 1)):
                time.perf_counter()

        monkeypatch.setattr(benchmark, "synchronize", wait)
        speeds = benchmark.measure_bandwidth(CPU, 4096, num_runs=6, repeat=3)
        assert speeds == [3 * 4096 / 2] * 6  # a tick to wait, and one to read

    def test_an_unsteady_bandwidth_is_refused(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        speeds = [1.0, 2.0, 3.0, 4.0, 5.0]
        monkeypatch.setattr(sections, "measure_bandwidth", lambda *_: speeds)
        with pytest.raises(BenchmarkError, match="bandwidth's spread is 107%"):
            sections.run_roofline(bench_of(tiny))
        speeds[:] = [4.0, 4.0, 4.0, 4.0, 4.8]
        row = sections.run_roofline(bench_of(tiny))["rows"][0]
        assert row["seconds"] == row["bytes"] / 4


def bench_of(folder: Path, **changes: Any) -> Bench:
    return Bench(folder, CPU, torch.float32, SIZES, **changes)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are no place to measure: any spread will do."""
    monkeypatch.setattr(benchmark, "find_unsteady", lambda *_: [])
    summarize = benchmark.summarize
    for module in (benchmark, sections, batch):
        monkeypatch.setattr(
            module, "summarize", lambda values: summarize(values) | {"spread": 0.0}
        )


class TestSections:
    def test_sizes_are_cut_to_the_model(self) -> None:
        assert list(SIZES.prompts) == [5, 40] and list(SIZES.contexts) == [6, 30]
        assert SIZES.max_model_len == 44
        assert Sizes().max_model_len == 8192 + 32
        assert Sizes(prompts=(), contexts=()).max_model_len == 128 + 256
        assert Sizes(prompts=(32,), contexts=(128,)).max_model_len == 128 + 256

    @pytest.mark.usefixtures("patient")
    def test_in_process(self, tiny: Path, tmp_path: Path) -> None:
        names = ["decode", "prefill", "context", "ladder", "profile", "roofline"]
        out = tmp_path / "new" / "out.json"
        cli.run_all(bench_of(tiny), names, "tiny", out, "the command")
        record = json.loads(out.read_text())
        assert list(record["sections"]) == names
        assert all(len(recordings) == 1 for recordings in record["sections"].values())
        latest = {name: made[0] for name, made in record["sections"].items()}
        decode = latest["decode"]
        systems = [row["system"] for row in decode["rows"]]
        assert systems == ["folo_lib", "huggingface", "huggingface_static"]
        assert decode["tokens"]["steps"] == 10 == decode["rows"][0]["output_tokens"]
        assert decode["tokens"]["near_ties_lost"] == {
            "folo_lib": 0, "huggingface_static": 0,
        }  # fmt: skip
        assert len(decode["rows"][0]["tpot"]["values"]) == 5
        assert decode["command"] == "the command" and decode["date"].endswith("+00:00")
        prompts = [row["prompt_tokens"] for row in latest["prefill"]["rows"]]
        assert prompts == [5, 5, 40, 40]
        assert [row["prompt_tokens"] for row in latest["context"]["rows"]] == [
            6,
            6,
            30,
            30,
        ]
        assert latest["ladder"]["left_out"] == {}
        engines = [row["system"] for row in latest["profile"]["rows"]]
        assert engines == [row["system"] for row in latest["ladder"]["rows"]][2:]
        assert engines == list(latest["profile"]["profiles"])
        for profile in latest["profile"]["profiles"].values():
            assert profile["kernels_per_step"] > 2 * len(profile["longest"]) > 0
            assert profile["busy_ms"] > 0 == profile["launches_per_step"]
        rows = latest["roofline"]["rows"]
        assert [row["context"] for row in rows] == [0, 6, 30]
        speed = latest["roofline"]["bandwidth"]["median"]
        assert rows[1]["seconds"] == pytest.approx(rows[1]["bytes"] / speed)

    def test_alone(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One real process; the others are imagined."""
        args = sections.alone_args(bench_of(tiny), "folo_lib")
        assert args == ["folo_lib", str(tiny), "cpu", "float32", "12", "10"]
        row = sections.start_process(args)
        assert row["system"] == "folo_lib" and row["output_tokens"] == 10
        assert 0 < row["load_seconds"] < row["first_token_seconds"]
        if Path("/proc/self/status").is_file():
            assert row["peak"] > 10**8

        asked: list[Any] = []
        monkeypatch.setattr(
            sections,
            "start_process",
            lambda args: asked.append(args[0]) or {},
        )
        bench = bench_of(tiny)
        assert len(sections.run_memory(bench)["rows"]) == 3
        assert asked == ["folo_lib", "huggingface", "huggingface_static"]

    def test_a_process_that_fails_says_why(self) -> None:
        args = ["folo_lib", "/no/such/folder", "cpu", "float32", "4", "4"]
        with pytest.raises(BenchmarkError, match="neither a folder nor a hub id"):
            sections.start_process(args)

    def test_the_longest_prompt_just_fits(self) -> None:
        lengths = (124, 125)
        cut = Sizes(prompts=lengths, contexts=lengths, context_tokens=4).cut(128)
        assert cut.prompts == cut.contexts == [124]
        many = ThroughputSizes(contexts=lengths, context_tokens=4)
        assert Sizes(throughput=many).cut(128).throughput.contexts == [124]
        assert Sizes(prompts=(9,), contexts=(8192,)).max_model_len == 8192 + 32

    def test_a_bench_measures_with_its_bounds(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(benchmark_bench, "measure", lambda *args: args)
        bench = bench_of(tiny, num_runs=7, max_spread=0.1)
        args: Any = bench.measure([], 3, 4, ["ttft"])
        assert args == ([], 3, 4, 2100, 7, 0.1, ["ttft"])

    def test_a_bench_checks_every_system(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompt = benchmark.make_prompt(2100, 12)
        reference = Reference(prompt, [3, 4, 5], [1.0, 0.0, 1.0], 1e-4, 2.0)
        monkeypatch.setattr(benchmark_bench, "make_reference", lambda *_: reference)
        one, two = follow(reference, {}), follow(reference, {1: 50})
        one.name, two.name = "one", "two"
        assert bench_of(tiny).check([one, two], 3) == {
            "steps": 3, "decided": 2, "error": 5e-5,
            "near_ties_lost": {"one": 0, "two": 1},
        }  # fmt: skip
        reference = Reference(prompt, [3, 4, 5], [1.0, 0.0, 1.0], 1e-3, 2.0)
        with pytest.raises(BenchmarkError, match="nothing is timed"):
            bench_of(tiny).check([one], 3)

    def test_what_each_section_checks_and_claims(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def note(_: Bench, systems: Any, *rest: Any) -> list[Any]:
            options = [getattr(system, "options", {}) for system in systems]
            names = [system.name for system in systems]
            asked.append((names, *rest, sum(map(len, options))))
            return []

        monkeypatch.setattr(Bench, "check", note)
        monkeypatch.setattr(Bench, "measure", note)
        bench = bench_of(tiny)
        both, static = ["folo_lib", "huggingface"], "huggingface_static"
        sections.run_decode(bench)
        assert asked == [
            (["folo_lib", static], 10, 1),
            ([*both, static], 12, 10, ["tpot", "total"], 1),
        ]
        asked.clear()
        sections.run_prefill(bench)
        assert asked == [
            (["folo_lib"], 4, 0), (both, 5, 1, ["ttft"], 0), (both, 40, 1, ["ttft"], 0)
        ]  # fmt: skip
        asked.clear()
        sections.run_context(bench)
        assert asked == [
            (["folo_lib"], 4, 0), (both, 6, 4, ["tpot"], 0), (both, 30, 4, ["tpot"], 0)
        ]  # fmt: skip
        asked.clear()
        lengths: list[int] = []
        rungs = [Scripted("low", []), Scripted("high", [])], {"fused": "no GPU"}
        monkeypatch.setattr(
            benchmark_bench,
            "make_rungs",
            lambda *args: lengths.append(args[-1]) or rungs,
        )
        assert sections.run_ladder(bench)["left_out"] == {"fused": "no GPU"}
        assert asked == [
            (["low", "high"], 6, 0), (["low", "high"], 12, 6, ["tpot"], 0)
        ]  # fmt: skip
        asked.clear()
        engine = object.__new__(FoloLib)
        engine.name = "high"
        bench = bench_of(tiny)
        bench.rungs = [Scripted("low", []), engine], {"fused": "no GPU"}
        monkeypatch.setattr(sections, "profile_decode", lambda *args: args)
        made = sections.run_profile(bench)
        assert asked == [(["high"], 6, 0), (["high"], 12, 10, ["tpot"], 0)]
        assert made["profiles"] == {"high": (engine, benchmark.make_prompt(2100, 12))}
        assert made["left_out"] == {"fused": "no GPU"}
        assert lengths == [12 + 10]

    def test_ratios_to_ours_are_printed(
        self, tiny: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench = bench_of(tiny, num_runs=9)
        ours: Any = Scripted("folo_lib", [])
        bench.ours = ours
        slow = Scripted("slow", [], lambda i: 1.5 if i % 2 else 1.6)
        rows = bench.compare([slow], 4, 11, ["tpot", "total"])
        assert [row["system"] for row in rows] == ["folo_lib", "slow"]
        assert capsys.readouterr().out.splitlines()[2:] == [
            "slow over folo_lib: tpot 1.50 times, median of 9 pairs (1.50 to 1.60)",
            "slow over folo_lib: total 1.42 times, median of 9 pairs (1.42 to 1.50)",
        ]

    def test_a_profile_counts_what_the_gpu_ran(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def event(name: str, where: str, count: int, us: float) -> Any:
            kind = SimpleNamespace(name=where)
            return SimpleNamespace(
                key=name, device_type=kind, count=count, self_device_time_total=us
            )

        found = [
            event("short", "CUDA", 8, 16.0),
            event("long" * 50, "CUDA", 4, 400.0),
            event("cudaLaunchKernel", "CPU", 6, 0.0),
            event("cuLaunchKernelEx", "CPU", 2, 0.0),
            event("aten::Launch", "CPU", 99, 0.0),
            event("cudaMemcpyAsync", "CPU", 99, 0.0),
        ]
        log: list[str] = []

        class Profiler:
            def __enter__(self) -> Any:
                log.append("profile")
                return self

            def __exit__(self, *_: Any) -> None:
                log.append("done")

            def key_averages(self) -> list[Any]:
                return found

        def stream(prompt: list[int], params: Any) -> Any:
            assert params.ignore_eos and params.temperature == 0
            for _ in range(params.max_tokens):
                log.append("step")
                yield

        monkeypatch.setattr(torch.profiler, "profile", Profiler)
        monkeypatch.setattr(sections, "synchronize", lambda _: log.append("wait"))
        engine = SimpleNamespace(stream=stream)
        gpu = torch.device("cuda")
        system: Any = SimpleNamespace(engine=engine, device=gpu, name="x")
        made = sections.profile_decode(system, [1, 2, 3], num_steps=4)
        begin = log.index("profile")
        assert log[begin - 2 :] == [
            "step", "wait", "profile", *["step"] * 4, "wait", "done",
        ]  # fmt: skip
        assert made == {
            "kernels_per_step": 3.0,
            "busy_ms": pytest.approx(0.104),
            "launches_per_step": 2.0,
            "longest": [
                {"kernel": ("long" * 50)[:80], "per_step": 1.0, "us": 100.0},
                {"kernel": "short", "per_step": 2.0, "us": 2.0},
            ],
        }


SETUP = {"device": "a", "torch": "1", "sizes": (1, 2)}


class TestRecord:
    def test_starts_empty(self, tmp_path: Path) -> None:
        for path in (None, tmp_path / "none.json"):
            record = records.open_record(path, SETUP)
            assert record == {"setup": SETUP | {"sizes": [1, 2]}, "sections": {}}

    def test_another_setup_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        records.save_record(records.open_record(None, SETUP), path)
        records.open_record(path, SETUP)
        with pytest.raises(
            ValueError, match=r"out.json was recorded with another torch"
        ):
            records.open_record(path, SETUP | {"torch": "2"})

    @pytest.mark.parametrize(
        "text", ["{", "[]", "null", '{"device": "a"}', '{"setup": 1, "sections": 2}']
    )
    def test_another_kind_of_file_is_not_touched(
        self, tmp_path: Path, text: str
    ) -> None:
        path = tmp_path / "out.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"out\.json holds no results of this"):
            records.open_record(path, SETUP)
        assert path.read_text() == text

    def test_resumes_repeats_and_keeps(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran: list[str] = []

        def section(name: str) -> Callable[[Bench], dict[str, Any]]:
            def run(_: Bench) -> dict[str, Any]:
                ran.append(name)
                if name == "bad" and ran.count("bad") == 1:
                    raise BenchmarkError("too wild")
                if name == "sad" and ran.count("sad") == 1:
                    raise RuntimeError("no more memory")
                return {"rows": [name]}

            return run

        names = ("one", "bad", "sad", "two")
        monkeypatch.setattr(cli, "SECTIONS", {n: section(n) for n in names})
        out, bench = tmp_path / "out.json", bench_of(tiny)

        def run(sections: list[str] | None) -> dict[str, int]:
            cli.run_all(bench, sections, "tiny", out, "c")
            record = json.loads(out.read_text())
            return {name: len(made) for name, made in record["sections"].items()}

        with pytest.raises(BenchmarkError, match="refused: bad, sad"):
            run(None)
        assert ran == ["one", "bad", "sad", "two"]
        assert set(json.loads(out.read_text())["sections"]) == {"one", "two"}
        assert run(None) == {"one": 1, "two": 1, "bad": 1, "sad": 1}
        assert ran == ["one", "bad", "sad", "two", "bad", "sad"]
        assert run(["two"]) == {"one": 1, "two": 2, "bad": 1, "sad": 1}

    def test_what_another_command_adds_meanwhile_stays(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out.json"

        def run(bench: Bench) -> dict[str, Any]:
            record = records.open_record(out, records.describe_setup(bench, "tiny"))
            record["sections"].setdefault("theirs", []).append({"rows": [1]})
            records.save_record(record, out)
            return {"rows": [2]}

        monkeypatch.setattr(cli, "SECTIONS", {"ours": run})
        cli.run_all(bench_of(tiny), None, "tiny", out, "c")
        assert set(json.loads(out.read_text())["sections"]) == {"theirs", "ours"}

    def test_setup_names_device_versions_and_shape(self, tiny: Path) -> None:
        setup = records.describe_setup(bench_of(tiny), "tiny")
        assert setup["torch"] == torch.__version__ and setup["weights"] == "tiny"
        assert setup["shape"]["head_dim"] == 16
        assert setup["shape"]["dtype"] == "float32"
        assert setup["device"] and setup["driver"] is None and setup["python"]
        assert setup["sizes"]["output_tokens"] == 10
        assert str(tiny) not in json.dumps(setup)

    def test_a_file_that_lacks_part_of_the_setup_is_refused(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "out.json"
        records.save_record(records.open_record(None, SETUP), path)
        with pytest.raises(ValueError, match="another threads"):
            records.open_record(path, SETUP | {"threads": 2})

    def test_the_old_file_is_whole_until_the_new_one_is(self, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        records.save_record({"old": 1}, path)
        with path.open() as old:
            records.save_record({"new": 2}, path)
            assert json.load(old) == {"old": 1}
        assert json.loads(path.read_text()) == {"new": 2}
        assert list(tmp_path.iterdir()) == [path]

    def test_a_section_is_saved_as_soon_as_it_is_done(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def crash(_: Bench) -> None:
            raise OSError("no more memory")

        crashing: Any = {"one": lambda _: {}, "two": crash}
        monkeypatch.setattr(cli, "SECTIONS", crashing)
        out = tmp_path / "out.json"
        with pytest.raises(OSError, match="no more memory"):
            cli.run_all(bench_of(tiny), None, "tiny", out, "c")
        assert list(json.loads(out.read_text())["sections"]) == ["one"]

    def test_the_setup_has_what_a_time_depends_on(self, tiny: Path) -> None:
        import folo_lib

        setup = records.describe_setup(bench_of(tiny), "tiny")
        assert setup["device"] == records.get_processor()
        assert setup["threads"] == torch.get_num_threads()
        assert setup["folo_lib"] == folo_lib.__version__


class TestCommandLine:
    @pytest.mark.usefixtures("patient")
    def test_one_section_into_a_file(self, tiny: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        args = ["--model", str(tiny), "--device", "cpu", "--quick", "--out", str(out)]
        cli.main([*args, "--sections", "roofline", "--runs", "9"])
        record = json.loads(out.read_text())
        [made] = record["sections"]["roofline"]
        expected = "--quick --out out.json --sections roofline --model"
        assert f"python -m folo_lib.benchmark {expected} " in made["command"]
        assert str(tmp_path) not in out.read_text()
        assert record["setup"]["weights"] == tiny.name
        assert len(made["bandwidth"]["values"]) == 9

    def test_a_refusal_is_an_exit_status_and_leaves_no_figures(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(benchmark, "find_unsteady", lambda *_: ["all of it"])
        monkeypatch.setattr(cli, "QUICK", SIZES)
        out = tmp_path / "out.json"
        args = ["--model", str(tiny), "--device", "cpu", "--quick", "--out", str(out)]
        with pytest.raises(SystemExit, match="error: refused: context"):
            cli.main([*args, "--sections", "context"])
        assert not out.exists()

    @pytest.mark.usefixtures("patient")
    def test_the_headline_of_a_cpu(
        self,
        tiny: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """`--quick --device cpu --sections decode --runs 10` prints what docs claim."""
        monkeypatch.setattr(cli, "QUICK", SIZES)
        args = ["--quick", "--device", "cpu", "--sections", "decode", "--runs", "10"]
        cli.main([*args, "--model", str(tiny)])
        text = capsys.readouterr().out
        for name in ("tpot", "total"):
            found = rf"huggingface over folo_lib: {name} \d+\.\d\d times, median of 10"
            assert len(re.findall(found, text)) == 1

    def test_as_a_module(self) -> None:
        command = [
            sys.executable,
            "-W",
            "error",
            "-m",
            "folo_lib.benchmark",
            "--runs",
            "1",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and "at least 5" in done.stderr

    @pytest.mark.parametrize(
        "args, message",
        [
            (["--runs", "4"], "at least 5"),
            (["--max-spread", "0.5"], "goes up to 0.25"),
            (["--device", "toaster"], "unknown device 'toaster'"),
            (["--device", "cpu", "--model", "/no/such"], "neither a folder"),
        ],
    )
    def test_errors(
        self, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cli, "run_all", pytest.fail)
        with pytest.raises(SystemExit, match=message):
            cli.main(args)

    def test_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[Bench, str]] = []
        monkeypatch.setattr(
            cli,
            "run_all",
            lambda bench, s, weights, *_: seen.append((bench, weights)),
        )
        cli.main(["--quick", "--device", "cpu"])
        monkeypatch.setattr(cli, "QWEN3_0_6B", TINY)
        cli.main(["--device", "cpu", "--dtype", "bfloat16"])
        assert [weights for _, weights in seen] == [
            "the bundled checkpoint",
            "random weights of Qwen3-0.6B's shape",
        ]
        assert [bench.dtype for bench, _ in seen] == [torch.float32, torch.bfloat16]
        assert seen[0][0].folder == bundled_model_path()

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            cli.main(["--help"])
        text = capsys.readouterr().out
        assert done.value.code == 0 and "--sections" in text
        assert all(name in text for name in sections.SECTIONS)
        assert "--alone" not in text

    def test_a_private_folder_is_not_recorded(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []
        monkeypatch.setattr(cli, "run_all", lambda *args: seen.append(args[-1]))
        cli.main(["--model", str(tiny), "--device", "cpu", "--out", "/a/b/c.json"])
        assert "/a/b" not in seen[0] and str(tiny) not in seen[0]
        assert "--out c.json" in seen[0] and f"--model {tiny.name}" in seen[0]

    def test_what_is_asked_for_reaches_the_bench(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(cli, "run_all", lambda *args: seen.append(args))
        args = ["--model", str(tiny), "--device", "cpu"]
        cli.main([*args, "--runs", "7", "--max-spread", "0.1"])
        cli.main([*args, "--quick", "--sections", "memory", "decode"])
        full, quick = seen
        assert (full[0].num_runs, full[0].max_spread) == (7, 0.1)
        assert full[0].sizes == Sizes().cut(128) and full[1] is None
        assert quick[0].sizes == benchmark_bench.QUICK.cut(128)
        assert quick[1] == ["memory", "decode"]

    def test_which_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cli, "write_random_checkpoint", lambda *_: None)
        args = argparse.Namespace(model=None, quick=True)
        cpu = cli.choose_weights(args, CPU, tmp_path)
        assert cpu == (bundled_model_path(), "the bundled checkpoint")
        gpu = cli.choose_weights(args, torch.device("cuda"), tmp_path)
        assert gpu == (tmp_path, "random weights of Qwen3-0.6B's shape")

    @pytest.mark.parametrize(
        "out", ["--out=/a/b/c.json", "--out /a//b/c.json", "--ou /a/b/c.json"]
    )
    def test_no_spelling_of_a_path_is_recorded(
        self, out: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []
        monkeypatch.setattr(cli, "run_all", lambda *args: seen.append(args[-1]))
        cli.main([f"--model={tiny}/", "--device", "cpu", *out.split(" ")])
        assert "/a/" not in seen[0] and str(tiny.parent) not in seen[0]
        assert "--out c.json" in seen[0] and f"--model {tiny.name}" in seen[0]

    def test_the_folder_one_is_in_has_a_name(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []
        monkeypatch.setattr(cli, "run_all", lambda *args: seen.append(args[2]))
        monkeypatch.chdir(tiny)
        cli.main(["--model", ".", "--device", "cpu"])
        assert seen == [tiny.name]

    def test_a_hub_id_is_recorded_in_full(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(cli, "run_all", lambda *args: seen.append(args))
        monkeypatch.setattr(cli, "find_checkpoint", lambda _: tiny)
        cli.main(["--model", "Qwen/Qwen3-0.6B", "--device", "cpu"])
        assert seen[0][2] == "Qwen/Qwen3-0.6B"
        assert seen[0][-1].endswith("--model Qwen/Qwen3-0.6B --device cpu")

    def test_the_command_of_the_shell_is_recorded(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []
        monkeypatch.setattr(cli, "run_all", lambda *args: seen.append(args[-1]))
        args = ["--model", str(tiny), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["benchmark.py", *args])
        cli.main()
        expected = f"python -m folo_lib.benchmark --model {tiny.name} --device cpu"
        assert seen == [expected]


def test_the_command_prints_as_it_goes(tiny: Path) -> None:
    """Flushed line by line, so that a run that is cut off has said what it knew."""
    modules = (benchmark, batch, cli, benchmark_bench, records, sections, systems)
    lines = "".join(Path(m.__file__ or "").read_text() for m in modules).splitlines()
    prints = [line for line in lines if line.strip().startswith("print(")]
    assert len(prints) > 8
    assert all("flush=True" in p or "json.dumps(parse_alone" in p for p in prints)


class TestBatch:
    """The section `batch`, at sizes that measure nothing."""

    @pytest.mark.usefixtures("patient")
    def test_every_part(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        made = sections.SECTIONS["batch"](bench_of(tiny))
        json.dumps(made)
        assert list(made) == list(batch.PARTS)
        alone = sections.SECTIONS["batch"](bench_of(tiny, batch_parts=["reservation"]))
        assert alone == {"reservation": made["reservation"]}
        sizes = SIZES.batch

        together = made["together"]
        workload = batch.make_workload(2100, sizes.together, sizes)
        names = ["folo_lib", "folo_lib, one by one", "huggingface, padded"]
        assert [row["system"] for row in together["rows"]] == names
        for row in together["rows"]:
            assert len(row["total"]["values"]) == 5
            tokens = together["tokens"][row["system"]]
            assert tokens["tokens"] == workload.num_tokens
            rate = workload.num_tokens / row["total"]["median"]
            assert row["tokens_per_second"] == pytest.approx(rate)
        assert set(together["rows"][0]["times_ours"]["values"]) == {1}

        assert made["many"]["requests"] == 5 and made["many"]["max_num_seqs"] == 3
        assert all(len(row["total"]["values"]) == 9 for row in made["one"]["rows"])

        cached, without = made["prefix"]["rows"]
        # 40 tokens are two blocks of 16 and a rest: two of three requests find the blocks.
        assert without["computed_tokens"] - cached["computed_tokens"] == 2 * 32

        room = made["reservation"]
        assert room["num_blocks"] == 2 * 6 and room["reserved"] == 2
        assert 2 < room["on_demand"] <= room["most"] <= 12

        [share] = made["host"]["rows"]
        assert all(0 < value < 1 for value in share["share"]["values"])
        short, long = made["host"]["plans"]
        assert (short["context"], long["context"]) == (5, 100)
        assert abs(long["bytes"] - short["bytes"]) < 10
        text = capsys.readouterr().out
        assert "huggingface, padded over folo_lib: total" in text

    def test_workload_is_the_same_for_everybody(self) -> None:
        sizes = BatchSizes()
        one, again = (batch.make_workload(50, 200, sizes) for _ in range(2))
        other = batch.make_workload(50, 200, sizes, seed=1)
        assert one == again != other
        lengths = [*map(len, one.prompts), *one.lengths]
        assert (min(lengths), max(lengths)) == (16, 128)
        assert one.num_tokens == sum(one.lengths)
        assert one.max_model_len == max(map(len, one.prompts)) + max(one.lengths)

    def test_padding_changes_no_answer(self, tiny: Path) -> None:
        """Nor does company: each equals the request alone."""
        bench = bench_of(tiny)
        workload = batch.Workload([[5], [6, 7, 8, 9], [1, 2], [3] * 9], [4, 2, 6, 1])
        alone = batch.Padded(bench.theirs.model, 1).answer(workload)
        assert [len(answer) for answer in alone] == workload.lengths
        assert batch.Padded(bench.theirs.model, 3).answer(workload) == alone
        assert batch.Ours(bench, 16).answer(workload) == alone
        assert batch.Ours(bench, 16, max_num_seqs=2).answer(workload) == alone

    def test_a_wrong_token_is_refused(self, tiny: Path) -> None:
        bench = bench_of(tiny)
        workload = batch.Workload([[5, 6], [7]], [3, 4])
        answers = batch.Ours(bench, 8).answer(workload)
        checked = batch.check_answers(bench, workload, answers)
        assert (checked["tokens"], checked["near_ties_lost"]) == (7, 0)
        assert 0 < checked["error"] < 1e-4
        answers[1][2] = (answers[1][2] + 1) % 2100
        with pytest.raises(BenchmarkError, match="behind the best"):
            batch.check_answers(bench, workload, answers)

    def test_no_system_is_timed_before_its_tokens_are_checked(self, tiny: Path) -> None:
        class Wrong(batch.Ours):
            def answer(self, workload: batch.Workload) -> batch.Answers:
                return [[0] * length for length in workload.lengths]

        bench, workload = bench_of(tiny), batch.Workload([[5, 6]], [3])
        right, wrong = batch.Ours(bench, 8), Wrong(bench, 8)
        with pytest.raises(BenchmarkError, match="Nothing is timed"):
            batch.compare(bench, workload, {"right": right, "wrong": wrong}, 5)

    def test_turns_alternate_and_the_first_is_not_kept(self) -> None:
        log: list[str] = []

        def run(name: str) -> Callable[[], float]:
            def note() -> float:
                log.append(name)
                return len(log)

            return note

        values = batch.take_turns({"a": run("a"), "b": run("b")}, 3)
        assert "".join(log) == "ba" + "ab" + "ba" + "ab"
        assert values == {"a": [3, 6, 7], "b": [4, 5, 8]}
        assert gc.get_freeze_count() == 0

    def test_unsteady_results_are_refused(
        self, tiny: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench = bench_of(tiny)
        wild, calm = [1.0, 1.0, 2.0, 2.0, 3.0], [1.0] * 5
        with pytest.raises(BenchmarkError, match=r"attempts.*\(total of b: 80%\)"):
            both = {"a": calm, "b": wild}
            batch.repeat_until_steady(bench, "total", lambda: both)
        assert capsys.readouterr().out.count("unsteady") == benchmark.MAX_ATTEMPTS
        tries = iter([{"a": wild}, {"a": calm}])
        [row] = batch.repeat_until_steady(bench, "total", lambda: next(tries))
        assert row["attempt"] == 2 and row["total"]["median"] == 1
        loose = bench_of(tiny, max_spread=0.5)
        with pytest.raises(ValueError, match=r"goes up to 0\.25"):
            batch.repeat_until_steady(loose, "total", lambda: {"a": calm})

    def test_an_engine_that_fails_is_not_measured(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours = batch.Ours(bench_of(tiny), 8)

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of luck")

        model = ours.engine.executor.worker.runner.model
        monkeypatch.setattr(model, "forward", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            ours.answer(batch.Workload([[1, 2]], [3]))

    def test_the_model_is_as_before_once_the_host_is_measured(self, tiny: Path) -> None:
        bench = bench_of(tiny)
        shares = batch.measure_host_share(bench, SIZES.batch)
        assert len(shares) == bench.num_runs
        assert not {"forward", "compute_logits"} & vars(bench.model).keys()


class TestAlone:
    def test_peak_memory_is_the_high_water_mark(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        status = tmp_path / "status"
        status.write_text("VmPeak:\t 9999 kB\nVmHWM:\t 2048 kB\nVmRSS:\t 1024 kB\n")
        monkeypatch.setattr(sections, "Path", lambda _: status)
        assert sections.get_peak_memory(CPU) == {"peak": 2 * 2**20}
        status.unlink()
        assert sections.get_peak_memory(CPU) == {"peak": None}
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 7)
        found = sections.get_peak_memory(torch.device("cuda"))
        assert found == {"peak": 5, "peak_reserved": 7}

    @pytest.mark.usefixtures("steady")
    def test_each_system_is_loaded_and_timed_from_the_start(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Any] = []

        def make(*args: Any, **options: Any) -> Any:
            made.append(options)
            return SimpleNamespace(generate=lambda prompt, n: Run([0] * n, 5.0, 9.0))

        monkeypatch.setattr(sections, "FoloLib", make)
        monkeypatch.setattr(sections, "HuggingFace", make)
        for name in ("folo_lib", "huggingface", "huggingface_static"):
            row = sections.run_alone(name, tiny, CPU, torch.float32, 3, 4)
            assert (row["system"], row["prompt_tokens"]) == (name, 3)
            assert (row["output_tokens"], row["load_seconds"]) == (4, 1.0)
            assert row["first_token_seconds"] == 1.0 + 5.0
            assert "peak" in row
        static = {"cache_implementation": "static"}
        assert made == [{"max_model_len": 7}, {}, static]

    def test_the_arguments_of_a_process_come_back_as_they_were(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench = Bench(tiny, CPU, torch.bfloat16, SIZES)
        monkeypatch.setattr(sections, "run_alone", lambda *args: args)
        values: Any = sections.parse_alone(sections.alone_args(bench, "x"))
        assert values == ("x", tiny, CPU, torch.bfloat16, 12, 10)

    def test_the_last_line_of_a_process_is_its_result(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(command: Any, **_: Any) -> Any:
            return subprocess.CompletedProcess(command, 0, 'noise\n{"a": 1}\n', "")

        monkeypatch.setattr(subprocess, "run", run)
        assert sections.start_process(["x"]) == {"a": 1}


class TestPeers:
    @pytest.mark.usefixtures("steady")
    def test_a_peer_has_two_clocks(self) -> None:
        def answer(prompt: list[int], num_tokens: int) -> list[int]:
            return [int(time.perf_counter()) for _ in range(num_tokens)]

        run = systems.Peer("peer", answer).generate([1, 2], 4)
        assert (run.ttft, run.total) == (1 + 1, 4 + 1)

    def test_only_those_that_are_installed_and_on_a_gpu(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []
        starts = {"json": lambda *args: asked.append(args), "no_such": pytest.fail}
        monkeypatch.setattr(systems, "PEERS", starts)
        assert bench_of(tiny).peers == [] == asked
        bench = Bench(tiny, torch.device("cuda"), torch.float32, SIZES)
        assert [peer.name for peer in bench.peers] == ["json"]
        assert asked == [(tiny, SIZES.max_model_len)]
