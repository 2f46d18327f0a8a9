"""fast_decode.py: graphs against the eager runner, on a CPU without recording, and on a GPU."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import load, make_config, make_reference
from torch._dynamo.testing import CompileCounter

from folo_lib import LLMEngine, bundled_model_path, load_model
from folo_lib.attention import TorchNaiveBackend, naive_attention
from folo_lib.config import MODEL_RUNNERS, EngineConfig
from folo_lib.fast_decode import (
    CHUNK,
    FIRST_LONG_BUCKET,
    CUDAGraphRunner,
    GraphSet,
    InFlightStep,
    ModelStep,
    PlainCUDAGraphRunner,
    RunAhead,
    attend_bucket,
    attend_chunks,
    bucket_views,
    can_compile,
    choose_bucket,
    compile_step,
    count_blocks,
    do_nothing,
    find_limit,
    load_step,
    make_buckets,
    make_room,
    make_step,
    round_up,
    run_layer,
    sampler_key,
    tune,
    use_backend,
)
from folo_lib.kv_cache import allocate_kv_caches
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.runner import (
    GPUWorker,
    ModelRunner,
    ScheduledRequest,
    start_batch,
)
from folo_lib.sampling_params import SamplingParams

NO_GPU = "records CUDA graphs, and there is no CUDA device"
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
RUNNERS = [
    pytest.param(("cpu", "unrecorded"), id="cpu"),
    pytest.param(("cuda", "plain_cuda_graph"), id="graph", marks=GPU),
    pytest.param(("cuda", "cuda_graph"), id="compiled", marks=GPU),
]
GREEDY = SamplingParams(temperature=0, max_tokens=40)
STEMS = ["Once upon a time", "What is a KV cache?", "The little fox", "Copy: 7 3 9 1"]
PROMPTS = [
    *STEMS,
    *[f"{stem} {n}" for stem in STEMS for n in ("", "and then", "a b c d e")],
    *["x" * n for n in (1, 2, 31, 32, 33, 64, 100)],
    "Tell me about engines. " * 12,
]
Case = tuple[str, str]


@pytest.fixture(scope="module", autouse=True)
def unrecorded() -> Iterator[None]:
    """A name for the runner as it is on a CPU, where nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_RUNNERS, "unrecorded", f"{__name__}:UnrecordedRunner")
        yield


class UnrecordedRunner(CUDAGraphRunner):
    needs_cuda = False


EAGER = EngineConfig(decode="eager", use_tqdm=False)


def make_engine(case: Case, **options: Any) -> LLMEngine:
    """With the bundled checkpoint in float32, and stale NaN wherever it can be."""
    device, decode = case
    options = {"dtype": "float32", "max_model_len": 700} | options
    options |= {"device": device, "decode": decode, "use_tqdm": False}
    engine = LLMEngine(bundled_model_path(), **options)
    fill_with_nan(engine.executor.worker.runner)
    return engine


def random_model(backend: str = "auto", **changes: Any) -> Qwen3ForCausalLM:
    config = make_config("qwen3 4/1", **changes)
    return load(config, make_reference(config), backend)


def fill_with_nan(runner: ModelRunner) -> None:
    for pair in runner.kv_caches:
        for cache in pair:
            cache.fill_(float("nan"))


def tokens_of(
    engine: LLMEngine, prompts: Sequence[str], params: SamplingParams
) -> list[list[int]]:
    outputs = engine.generate(list(prompts), params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [list(one.token_ids) for output in outputs for one in output.outputs]


@pytest.fixture(scope="module", params=RUNNERS)
def engines(request: pytest.FixtureRequest) -> tuple[LLMEngine, LLMEngine]:
    """An eager engine, and one with graphs."""
    device, decode = request.param
    return make_engine((device, "eager")), make_engine((device, decode))


class TestBuckets:
    def test_they_double_and_the_last_holds_all(self) -> None:
        assert make_buckets(1000) == [256, 512, 1000]
        assert make_buckets(1024) == [256, 512, 1024]
        assert make_buckets(1040) == [256, 512, 1024, 1040]
        assert make_buckets(256) == [256]
        assert make_buckets(16) == [16]
        assert make_buckets(100, smallest=16) == [16, 32, 64, 100]

    @pytest.mark.parametrize("num_slots", [1, 255, 256, 257, 4096, 40960])
    def test_every_length_has_the_smallest_that_holds_it(self, num_slots: int) -> None:
        buckets = make_buckets(num_slots)
        assert buckets == sorted(set(buckets))
        for length in range(1, num_slots + 1, max(1, num_slots // 97)):
            bucket = choose_bucket(buckets, length)
            assert bucket == min(b for b in buckets if b >= length)
        assert choose_bucket(buckets, num_slots) == num_slots
        assert choose_bucket(buckets, num_slots + 1) is None


class TestAttendBucket:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (14, 2)])
    @pytest.mark.parametrize("position", [0, 1, 14, 30, 31])
    def test_equals_naive_attention_over_what_is_seen(
        self, device: str, heads: int, kv_heads: int, position: int
    ) -> None:
        with torch.device(device):
            query = torch.randn(1, heads, 16)
            keys, values = torch.randn(2, 32, kv_heads, 16)
            place = torch.tensor([position])
        seen = [x[: position + 1].transpose(0, 1)[None] for x in (keys, values)]
        exact = naive_attention(query[:, :, None], *seen, 0.3)[:, :, 0]
        for stale in (0.0, 1e30, float("inf"), -float("inf"), float("nan")):
            keys[position + 1 :], values[position + 1 :] = stale, stale
            ours = attend_bucket(query, keys, values, place, 0.3)
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
            chunks = (x.unflatten(0, (-1, 8)) for x in (keys, values))
            ours = attend_chunks(query, *chunks, place, 0.3)
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("heads", [4, 8, 28])
    def test_large_scores_are_not_rounded(
        self, device: str, dtype: torch.dtype, heads: int
    ) -> None:
        """Qwen2.5's biases make scores of thousands, which have few bits in 16."""
        with torch.device(device):
            bias = 30 * torch.randn(1, 4, 64)
            query = torch.randn(1, heads, 64) + bias.repeat_interleave(heads // 4, 1)
            keys, values = torch.randn(256, 4, 64) + bias, torch.randn(256, 4, 64)
            position = torch.tensor([199])
        step = [x.to(dtype) for x in (query, keys, values)]
        q, k, v = (x.double().transpose(0, 1)[None] for x in step)
        exact = naive_attention(q, k[:, :, :200], v[:, :, :200], 0.125)[0].transpose(
            0, 1
        )
        chunks = [x.unflatten(0, (-1, 64)) for x in step[1:]]
        for ours in (
            attend_bucket(*step, position, 0.125),
            attend_chunks(step[0], *chunks, position, 0.125),
        ):
            error = (ours.double() - exact).norm() / exact.norm()
            assert error < 0.01


class TestUseBackend:
    def test_gives_back_what_was_there_after_an_error_too(self) -> None:
        model = random_model("torch_sdpa")
        layers: list[Any] = list(model.model.layers)
        before = [layer.self_attn.backend for layer in layers]
        other = type(before[0])()
        with pytest.raises(KeyError), use_backend(model, other):
            assert all(layer.self_attn.backend is other for layer in layers)
            raise KeyError
        assert [layer.self_attn.backend for layer in layers] == before


class Launcher:
    """Steps that only note when they were launched and read; place `p` draws 100 + p."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, position: int) -> Any:
        self.log.append(f"launch {position}")

        def read() -> int:
            self.log.append(f"read {position}")
            return 100 + position

        return read


def ask(name: str, position: int, *token_ids: int) -> list[ScheduledRequest]:
    return [ScheduledRequest(name, token_ids, position, [0], [1, 2], GREEDY)]


class TestRunAhead:
    def test_every_step_starts_before_the_one_before_it_is_read(self) -> None:
        launcher = Launcher()
        ahead = RunAhead()
        token = ahead.finish(InFlightStep("a", 4, launcher(4)), 8, launcher)
        for position in (5, 6, 7):
            flight = ahead.take(ask("a", position, token))
            assert flight is not None and flight.position == position
            token = ahead.finish(flight, 8, launcher)
            assert token == 100 + position
        assert launcher.log == [
            *["launch 4", "launch 5", "read 4", "launch 6", "read 5"],
            *["launch 7", "read 6", "read 7"],
        ]

    def test_nothing_starts_at_the_limit(self) -> None:
        launcher = Launcher()
        ahead = RunAhead()
        assert ahead.finish(InFlightStep("a", 7, launcher(7)), 8, launcher) == 107
        assert ahead.in_flight is None and launcher.log == ["launch 7", "read 7"]

    @pytest.mark.parametrize(
        "asked",
        [
            ask("b", 5, 104),
            ask("a", 6, 104),
            ask("a", 0, 104),
            ask("a", 5, 7),
            ask("a", 5, 104, 104),
            ask("a", 5, 104) + ask("b", 5, 104),
            [],
        ],
    )
    def test_a_step_nobody_asked_for_is_dropped(
        self, asked: list[ScheduledRequest]
    ) -> None:
        launcher = Launcher()
        ahead = RunAhead()
        ahead.finish(InFlightStep("a", 4, launcher(4)), 8, launcher)
        assert ahead.take(asked) is None
        assert ahead.take(ask("a", 5, 104)) is None  # it is gone for good
        assert "read 5" not in launcher.log

    def test_an_interrupted_read_leaves_nothing_in_flight(self) -> None:
        def interrupted() -> int:
            raise KeyboardInterrupt

        ahead = RunAhead()
        with pytest.raises(KeyboardInterrupt):
            ahead.finish(InFlightStep("a", 4, interrupted), 8, Launcher())
        assert ahead.in_flight is None


SAMPLED = {
    "temperature": SamplingParams(temperature=0.9, seed=5, max_tokens=24),
    "top_k": SamplingParams(temperature=0.8, top_k=30, seed=6, max_tokens=24),
    "top_p": SamplingParams(temperature=1.1, top_p=0.8, seed=7, max_tokens=24),
    "min_p": SamplingParams(temperature=1.0, min_p=0.05, seed=8, max_tokens=24),
    "all": SamplingParams(
        temperature=1.0, top_k=40, top_p=0.9, min_p=0.01, seed=9, max_tokens=24, n=2
    ),
    "penalties": SamplingParams(
        temperature=0.9, seed=1, repetition_penalty=1.3, frequency_penalty=0.2, n=2
    ),
    "min_tokens": SamplingParams(temperature=0, min_tokens=30, max_tokens=40),
    "logprobs": SamplingParams(temperature=0.7, seed=2, logprobs=3, max_tokens=12),
}


class TestTokens:
    def test_greedy_equals_eager(self, engines: tuple[LLMEngine, LLMEngine]) -> None:
        assert len(PROMPTS) >= 20
        ours, eager = (tokens_of(engine, PROMPTS, GREEDY) for engine in engines)
        assert ours == eager
        assert len({len(tokens) for tokens in eager}) > 2  # some stop early

    @pytest.mark.parametrize("name", SAMPLED)
    def test_seeded_sampling_equals_eager(
        self, name: str, engines: tuple[LLMEngine, LLMEngine]
    ) -> None:
        ours, eager = (tokens_of(e, PROMPTS[:5], SAMPLED[name]) for e in engines)
        assert ours == eager

    def test_logprobs_equal_eager(self, engines: tuple[LLMEngine, LLMEngine]) -> None:
        both = [
            engine.generate(PROMPTS[0], SAMPLED["logprobs"], use_tqdm=False)[0]
            for engine in engines
        ]
        for ours, eager in zip(*(o.outputs[0].logprobs for o in both), strict=True):
            assert list(ours) == list(eager)
            for token_id, entry in eager.items():
                assert math.isclose(ours[token_id].logprob, entry.logprob, abs_tol=1e-4)

    def test_contexts_that_cross_buckets(
        self, engines: tuple[LLMEngine, LLMEngine]
    ) -> None:
        params = replace(GREEDY, ignore_eos=True, max_tokens=30)
        for length in (250, 256, 505, 512, 669, 670):
            prompt = torch.randint(1, 900, (length,)).tolist()
            ours, eager = (
                engine.generate([prompt], params, use_tqdm=False)[0].outputs[0]
                for engine in engines
            )
            assert ours.token_ids == eager.token_ids and len(ours.token_ids) == 30

    @pytest.mark.parametrize("case", RUNNERS)
    def test_long_contexts_go_in_chunks(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if case[0] == "cpu":  # as if it were compiled
            step = partial(ModelStep, is_compiled=True)
            monkeypatch.setattr("folo_lib.fast_decode.ModelStep", step)
        params = replace(GREEDY, ignore_eos=True, max_tokens=12)
        prompts = [torch.randint(1, 900, (n,)).tolist() for n in (2040, 2788)]
        runs = [
            make_engine((case[0], decode), max_model_len=2800).generate(
                prompts, params, use_tqdm=False
            )
            for decode in (case[1], "eager")
        ]
        for ours, eager in zip(*runs, strict=True):
            assert ours.outputs[0].token_ids == eager.outputs[0].token_ids
            assert len(ours.outputs[0].token_ids) == 12

    def test_a_late_stop_shows_no_extra_token(
        self, engines: tuple[LLMEngine, LLMEngine]
    ) -> None:
        text = tokens_of(engines[0], PROMPTS[:1], GREEDY)[0]
        params = replace(GREEDY, stop_token_ids=[text[7]])
        expected = text[: text.index(text[7]) + 1]
        for prompts in (PROMPTS[:1], PROMPTS[:2]):
            assert tokens_of(engines[1], prompts, params)[0] == expected

    def test_streams_one_by_one(self, engines: tuple[LLMEngine, LLMEngine]) -> None:
        expected = tokens_of(engines[0], PROMPTS[:1], GREEDY)[0]
        stream = engines[1].stream(PROMPTS[0], GREEDY)
        for length, output in enumerate(stream, 1):
            assert output.outputs[0].token_ids == expected[:length]

    def test_requests_taking_turns(self, engines: tuple[LLMEngine, LLMEngine]) -> None:
        """Plans as a scheduler would make them that gives each request one step."""
        runs = []
        for engine in engines:
            runs.append(take_turns(engine))
            fill_with_nan(engine.executor.worker.runner)
        assert runs[0] == runs[1]

    @pytest.mark.parametrize(
        "changes",
        [
            {"temperature": 0.4},
            {"min_p": 0.5},
            {"top_p": 0.3},
            {"top_k": 2},
            {"seed": 2},
        ],
        ids=str,
    )
    def test_a_graph_for_drawing_takes_the_next_request_s_numbers(
        self, changes: dict[str, Any], engines: tuple[LLMEngine, LLMEngine]
    ) -> None:
        first = SamplingParams(
            temperature=2.0, top_k=90, top_p=0.98, min_p=1e-4, seed=1, max_tokens=16
        )
        second = replace(first, **changes)
        for params in (first, second):
            ours, eager = (tokens_of(e, PROMPTS[:2], params) for e in engines)
            assert ours == eager


def take_turns(engine: LLMEngine) -> list[list[int]]:
    blocks = [list(range(10)), list(range(10, 20))]
    texts = [list(range(50, 71)), list(range(300, 340))]
    starts = [len(text) for text in texts]
    cached = [0, 0]
    for turn in range(20):
        who = [0, 1] if turn % 5 == 4 else [turn % 2]
        plans = [
            ScheduledRequest(
                f"r{i}",
                texts[i][cached[i] :],
                cached[i],
                blocks[i],
                texts[i][: starts[i]],
                SamplingParams(temperature=i * 0.8),
                seed=3,
            )
            for i in who
        ]
        sampled = engine.executor.execute_model(plans)
        for i, token in zip(who, sampled, strict=True):
            cached[i] = len(texts[i])
            texts[i].append(token.token_id)
    return texts


class TestRunner:
    def make(self, model: Qwen3ForCausalLM, num_blocks: int = 8) -> CUDAGraphRunner:
        runner = CUDAGraphRunner(model)
        runner.initialize_kv_caches(num_blocks)
        runner.warm_up()
        fill_with_nan(runner)
        return runner

    @pytest.mark.parametrize(
        "case", ["qwen3 6/3 untied", "qwen3 14/2 untied bias", "qwen2 6/3 yarn"]
    )
    @torch.inference_mode()
    def test_other_models(self, case: str) -> None:
        config = make_config(case)
        model = load(config, make_reference(config), "torch_naive")
        eager = ModelRunner(model)
        eager.initialize_kv_caches(8)
        tokens = torch.randint(config.vocab_size, (41,)).tolist()
        runs = []
        for runner in (self.make(model), eager):
            text, cached = list(tokens), 0
            for _ in range(30):
                plan = ScheduledRequest(
                    "x", text[cached:], cached, range(8), tokens, GREEDY
                )
                cached = len(text)
                text.append(runner.run_step([plan])[0].token_id)
            runs.append(text)
        assert runs[0] == runs[1]

    @torch.inference_mode()
    def test_slots_of_others_are_left_alone(self) -> None:
        """A prompt fills its bucket up; the filling goes to the block behind the last."""
        runner = self.make(random_model())
        tokens = list(range(1, 34))
        runner.run_step([ScheduledRequest("x", tokens, 0, [5, 6, 7], tokens, GREEDY)])
        for pair in runner.kv_caches:
            for cache in pair:
                written = ~cache.flatten(0, 1).isnan().any(-1).any(-1)
                places = [*range(80, 80 + 33), 128]
                assert written.nonzero().flatten().tolist() == places

    @torch.inference_mode()
    def test_launches_nothing_that_cannot_be_asked_for(self) -> None:
        runner = self.make(random_model())
        tokens = list(range(1, 21))
        for max_tokens, launches in ((1, 1), (2, 2), (None, 2)):
            runner.launcher.num_launched = 0
            params = SamplingParams(temperature=0, max_tokens=max_tokens)
            plan = ScheduledRequest("x", tokens, 0, [0, 1], tokens, params)
            runner.run_step([plan])
            assert runner.launcher.num_launched == launches
        full = list(range(1, 33))  # no slot is left behind them
        runner.launcher.num_launched = 0
        params = SamplingParams(temperature=0, max_tokens=None)
        runner.run_step([ScheduledRequest("y", full, 0, [0, 1], full, params)])
        assert runner.launcher.num_launched == 1

    def test_kinds(self) -> None:
        runner = self.make(random_model())

        def kind(params: SamplingParams) -> Any:
            plan = ScheduledRequest("x", [1, 2], 0, [0], [1, 2], params)
            return sampler_key(runner.prepare_inputs([plan]).sampling)

        assert kind(GREEDY) is not None
        assert kind(GREEDY) != kind(SAMPLED["temperature"]) != kind(SAMPLED["top_k"])
        other = SamplingParams(temperature=1.5, seed=77)
        assert kind(SAMPLED["temperature"]) == kind(other)
        assert kind(SAMPLED["penalties"]) is kind(SAMPLED["logprobs"]) is None

    def test_few_graphs_are_kept_for_drawing(self) -> None:
        runner = self.make(random_model())
        for top_k in range(1, 40):
            params = SamplingParams(temperature=1, top_k=top_k)
            plan = ScheduledRequest("x", [1, 2], 0, [0], [1, 2], params)
            runner.run_step([plan])
        assert (
            len(runner.launcher.sampler_graphs.graphs)
            == runner.launcher.sampler_graphs.max_graphs
        )

    @torch.inference_mode()
    def test_the_one_used_longest_ago_makes_room(self) -> None:
        runner = make_engine(("cpu", "unrecorded")).executor.worker.runner
        assert isinstance(runner, CUDAGraphRunner)
        [(greedy, recorded)] = runner.launcher.sampler_graphs.graphs.items()
        for top_k in range(1, 40):
            params = SamplingParams(temperature=1, top_k=top_k)
            for each in (params, GREEDY):
                runner.run_step([ScheduledRequest("x", [1], 0, [0], [1], each)])
        assert runner.launcher.sampler_graphs.graphs[greedy][0] is recorded[0]

    def test_the_latest_graphs_are_kept_for_drawing(self) -> None:
        runner = self.make(random_model())
        sampler_graphs = runner.launcher.sampler_graphs
        assert len(sampler_graphs.graphs) == 1  # greedy, before anybody asks
        for top_k in range(1, 40):
            params = SamplingParams(temperature=1, top_k=top_k)
            plan = ScheduledRequest("x", [1, 2], 0, [0], [1, 2], params)
            runner.run_step([plan])
        kept = [max_top_k for _, max_top_k, _ in sampler_graphs.graphs]
        assert kept == list(range(40 - sampler_graphs.max_graphs, 40))

    def test_each_length_finds_its_graph(self) -> None:
        runner = self.make(random_model(), num_blocks=40)
        prompts, tokens = runner.graphs.prompt_graphs, runner.graphs.token_graphs

        def find(cached: int, end: int, first: int = 0) -> Any:
            ids, blocks = [1] * (end - cached), range(first, first + 41)
            name = f"{cached} to {end} from block {first}"
            plan = ScheduledRequest(name, ids, cached, blocks, [1] * end, GREEDY)
            return load_step(runner.graphs, runner.prepare_inputs([plan]))

        for length, bucket in ((1, 32), (32, 32), (33, 64), (513, 640), (640, 640)):
            assert find(0, length) is prompts[bucket]
        for length, bucket in ((2, 256), (256, 256), (257, 512), (640, 640)):
            assert find(length - 1, length) is tokens[bucket]
        assert find(3, 6) is None  # a chunk of a prompt
        assert find(3, 4, first=1) is None

    def test_several_requests_have_no_graph(self) -> None:
        runner = self.make(random_model())
        plans = [  # 3 tokens in all, as many as the first one is long
            ScheduledRequest("x", [7], 2, [0], [5, 6], GREEDY),
            ScheduledRequest("y", [8, 9], 0, [1], [8, 9], GREEDY),
        ]
        assert load_step(runner.graphs, runner.prepare_inputs(plans)) is None

    def test_a_prompt_longer_than_all_buckets_has_no_graph(self) -> None:
        runner = self.make(random_model(), num_blocks=513)
        for length, has_graph in ((8192, True), (8193, False)):
            ids = [1] * length
            plan = ScheduledRequest(f"{length}", ids, 0, range(513), ids, GREEDY)
            graph = load_step(runner.graphs, runner.prepare_inputs([plan]))
            assert (graph is not None) is has_graph

    @torch.inference_mode()
    def test_a_prompt_in_chunks_equals_eager(self) -> None:
        model = random_model()
        eager = ModelRunner(model)
        eager.initialize_kv_caches(8)
        text, runs = list(range(1, 41)), []
        for runner in (self.make(model), eager):
            ends, drawn = [0, 16, 17, 40], []
            for start, end in pairwise(ends):
                plan = ScheduledRequest(
                    "x", text[start:end], start, range(8), text, GREEDY
                )
                drawn += runner.run_step([plan])
            runs.append(drawn)
        assert runs[0] == runs[1]

    @torch.inference_mode()
    def test_stops_where_the_model_has_no_more_positions(self) -> None:
        runner = self.make(random_model(max_position_embeddings=32))
        params = SamplingParams(temperature=0, max_tokens=None)
        tokens = list(range(1, 33))
        runner.run_step([ScheduledRequest("x", tokens, 0, range(8), tokens, params)])
        assert runner.launcher.num_launched == 1

    @pytest.mark.parametrize("is_compiled", [False, True])
    def test_tunes_only_what_is_compiled(
        self, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tuned: list[object] = []
        path, step = (
            "folo_lib.fast_decode.",
            partial(ModelStep, is_compiled=is_compiled),
        )
        monkeypatch.setattr(path + "tune", lambda *args: tuned.append(args))
        monkeypatch.setattr(path + "ModelStep", step)
        self.make(random_model())
        assert len(tuned) == is_compiled

    @torch.inference_mode()
    def test_a_draw_that_is_not_recorded_has_a_graph_before_it(self) -> None:
        runner = self.make(random_model())
        logits = runner.graphs.state.logits.fill_(float("nan"))
        params = SAMPLED["logprobs"]
        runner.run_step([ScheduledRequest("x", [1, 2], 0, [0], [1, 2], params)])
        assert not logits.isnan().any() and runner.launcher.num_launched == 0

    @torch.inference_mode()
    def test_each_step_is_launched_once(self) -> None:
        runner = self.make(random_model())
        runner.launcher.num_launched = 0
        params = SamplingParams(temperature=0, max_tokens=6)
        text, cached = [1, 2, 3], 0
        for _ in range(6):
            new = text[cached:]
            plan = ScheduledRequest("x", new, cached, [0], [1, 2, 3], params)
            cached = len(text)
            text.append(runner.run_step([plan])[0].token_id)
        assert runner.launcher.num_launched == 6


@torch.inference_mode()
def test_a_step_that_was_launched_with_other_blocks_does_not_count() -> None:
    """A scheduler that gives blocks ahead of need, and not in a row."""
    runner = make_engine(("cpu", "unrecorded")).executor.worker.runner
    text, start, blocks = list(range(50, 60)), 0, [0]
    for _ in range(14):
        if start == 13:
            blocks = [0, 5]
        plan = ScheduledRequest("a", text[start:], start, blocks, range(50, 60), GREEDY)
        start = len(text)
        text.append(runner.run_step([plan])[0].token_id)
    keys = runner.kv_caches[0][0]
    assert keys[0].isfinite().all() and keys[5, :7].isfinite().all()
    assert keys[1].isnan().all()  # the block of somebody else


@pytest.mark.parametrize("case", RUNNERS)
@torch.inference_mode()
def test_a_limit_that_is_no_whole_number_of_blocks(case: Case) -> None:
    model = random_model(max_position_embeddings=1000).to(case[0])
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [torch.randint(60, (length,)).tolist() for length in (700, 900, 997)]
    runs = []
    for decode in (case[1], "eager"):
        engine = LLMEngine(model, decode=decode, use_tqdm=False)
        runner = engine.executor.worker.runner
        if isinstance(runner, CUDAGraphRunner):
            for _, _, run in runner.graphs.list_runs():
                run()  # as recording does
        outputs = engine.generate(prompts, params, use_tqdm=False)
        runs.append([(o.error, o.outputs[0].token_ids) for o in outputs])
    assert runs[0] == runs[1]
    assert {error for error, _ in runs[0]} == {None}


class TestCompiler:
    @pytest.mark.parametrize(
        ("capability", "dtype", "expected"),
        [
            ((7, 5), torch.bfloat16, False),  # a T4
            ((7, 5), torch.float16, True),
            ((6, 1), torch.float32, False),
            ((8, 0), torch.bfloat16, True),
            ((9, 0), torch.bfloat16, True),
        ],
    )
    def test_old_gpus_do_without(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capability: tuple[int, int],
        dtype: torch.dtype,
        expected: bool,
    ) -> None:
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
        monkeypatch.setattr("folo_lib.fast_decode.which", lambda name: name)
        monkeypatch.setattr("folo_lib.fast_decode.find_spec", lambda name: name)
        assert can_compile(torch.zeros(1, dtype=dtype)) is expected
        monkeypatch.setattr("folo_lib.fast_decode.find_spec", lambda _: None)
        assert not can_compile(torch.zeros(1, dtype=dtype))

    def test_if_it_fails_the_engine_does_without(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("no kernel for this\nand a long trace")

        def make_step(runner: CUDAGraphRunner) -> ModelStep:
            return ModelStep(runner.model, broken, broken, broken, is_compiled=True)

        expected = tokens_of(make_engine(("cpu", "eager")), STEMS, GREEDY)
        monkeypatch.setattr(CUDAGraphRunner, "make_step", make_step)
        engine = make_engine(("cpu", "unrecorded"))
        assert "Layers are not compiled: no kernel for this" in caplog.messages
        assert tokens_of(engine, STEMS, GREEDY) == expected


class TestMakeRoom:
    @pytest.mark.parametrize(("room", "moved"), [(0, 0), (1, 1), (16, 1), (17, 2)])
    def test_moves_no_more_layers_than_needed_and_brings_them_back(
        self, room: int, moved: int
    ) -> None:
        log: list[tuple[int, str]] = []

        class Layer(torch.nn.Linear):
            def to(self, *args: Any, **_: Any) -> Any:
                log.append((layers.index(self), str(args[0])))
                return self

        layers = [Layer(4, 1, bias=False) for _ in range(4)]  # 16 bytes each
        with pytest.raises(KeyError), make_room(layers, room):
            assert log == [(i, "cpu") for i in range(1, 1 + moved)]
            raise KeyError
        assert len(log) == 2 * moved

    def test_a_model_with_graphs_stays_where_it_is(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Graphs of another engine on the same model hold its addresses."""
        rooms: list[int] = []

        @contextmanager
        def note(layers: Any, num_bytes: int) -> Iterator[None]:
            rooms.append(num_bytes)
            yield

        monkeypatch.setattr("folo_lib.fast_decode.make_room", note)
        step = partial(ModelStep, is_compiled=True)
        monkeypatch.setattr("folo_lib.fast_decode.ModelStep", step)
        model = load_model(bundled_model_path(), torch.float32, use_tqdm=False)
        for _ in range(2):
            LLMEngine(model, decode="unrecorded", max_model_len=64, use_tqdm=False)
        assert rooms[0] > 0 and rooms[1] == 0


def test_the_cache_is_free_as_soon_as_the_engine_is_gone() -> None:
    """Without a garbage collection: a notebook makes the next engine at once."""
    engine = make_engine(("cpu", "unrecorded"))
    tokens_of(engine, PROMPTS[:1], GREEDY)
    runner = engine.executor.worker.runner
    assert isinstance(runner, CUDAGraphRunner)
    runner.graphs.prompt_graphs.clear()  # a recorded graph holds no function of ours
    runner.graphs.token_graphs.clear()
    runner.launcher.sampler_graphs.graphs.clear()
    runner.launcher.draw = do_nothing
    cache = weakref.ref(runner.kv_caches[0][0])
    gc.disable()
    try:
        del engine, runner
        assert cache() is None
    finally:
        gc.enable()


def test_use_backend_gives_each_layer_its_own_back() -> None:
    model = random_model("torch_sdpa")
    layers: list[Any] = list(model.model.layers)
    before = [TorchNaiveBackend() for _ in layers]
    for layer, backend in zip(layers, before, strict=True):
        layer.self_attn.backend = backend
    with use_backend(model, TorchNaiveBackend()):
        pass
    assert [layer.self_attn.backend for layer in layers] == before


@pytest.mark.parametrize(
    ("bucket", "is_compiled", "shape"),
    [
        (2048, True, (16, 128, 2, 4)),
        (2064, True, (17, 128, 2, 4)),
        (2000, True, (2000, 2, 4)),
        (2064, False, (2064, 2, 4)),
    ],
)
def test_compiled_long_buckets_are_in_chunks(
    bucket: int, is_compiled: bool, shape: tuple[int, ...]
) -> None:
    cache = torch.zeros(2200, 2, 4)
    views = bucket_views((cache, cache), bucket, is_compiled)
    assert [view.shape for view in views] == [shape, shape]


@pytest.mark.parametrize(
    ("device", "wanted", "cc", "programs", "has_triton", "compiles"),
    [
        ("cuda", True, None, ["gcc"], True, True),
        ("cuda", True, "my-cc", ["my-cc"], True, True),
        ("cuda", True, None, [], True, False),
        ("cuda", True, None, ["gcc"], False, False),
        ("cuda", False, None, ["gcc"], True, False),
        ("cpu", True, None, ["gcc"], True, False),
    ],
)
def test_layers_are_compiled_where_that_is_possible(
    device: str,
    wanted: bool,
    cc: str | None,
    programs: list[str],
    has_triton: bool,
    compiles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, spec = "folo_lib.fast_decode.", object() if has_triton else None
    monkeypatch.setattr(path + "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(path + "find_spec", lambda name: spec)
    monkeypatch.setattr(path + "compile_step", partial(ModelStep, is_compiled=True))
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    weight = SimpleNamespace(
        device=torch.device(device), is_cuda=device == "cuda", dtype=torch.bfloat16
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    core = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
    model: Any = SimpleNamespace(model=core)
    assert make_step(model, wanted).is_compiled is compiles


def test_the_plain_runner_compiles_nothing() -> None:
    assert CUDAGraphRunner.compiles and not PlainCUDAGraphRunner.compiles


def test_tuning_respects_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    model = random_model()
    tune(ModelStep(model, is_compiled=True), 32, 16, use_tqdm=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    ("cached", "new", "blocks", "max_tokens", "limit"),
    [
        (0, 20, [0, 1, 2], 5, 24),  # the last token is drawn, not run
        (20, 1, [0, 1, 2], 5, 24),
        (0, 20, [0, 1, 2], None, 40),  # of 48 slots
        (0, 20, [0, 1], None, 32),
        (0, 20, [0, 1], 30, 32),
        (12, 8, [0, 1, 2], 5, 24),  # the last chunk of the prompt
        (0, 12, [0, 1, 2], 5, 0),  # a chunk that is not the last
        (0, 20, [1, 2, 3], 5, 0),  # slots that do not begin at 0
        (0, 20, [0, 2, 1], 5, 0),
    ],
)
def test_find_limit(
    cached: int, new: int, blocks: list[int], max_tokens: int | None, limit: int
) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    plan = ScheduledRequest("x", [1] * new, cached, blocks, [1] * 20, params)
    running = start_batch([plan], 16, 100, torch.device("cpu"))
    assert find_limit(plan, running, num_places=40, block_size=16) == limit


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("num_slots", [16, 700, 2032, 2048, 2064, 2800, 4096])
def test_the_cache_holds_whole_chunks_and_the_filling(
    num_slots: int, block_size: int
) -> None:
    slots = count_blocks(num_slots, block_size) * block_size
    chunk = CHUNK if num_slots >= FIRST_LONG_BUCKET else 1
    assert num_slots < slots and round_up(num_slots, chunk) <= slots


def teacher_forced(runner: ModelRunner, text: Sequence[int]) -> torch.Tensor:
    """Logits after each token but the first 8, fed one by one."""
    logits, cached = [], 0
    for end in range(8, len(text)):
        plan = ScheduledRequest(
            "x", text[cached:end], cached, range(32), text[:8], GREEDY
        )
        batch, cached = runner.prepare_inputs([plan]), end
        if isinstance(runner, CUDAGraphRunner):
            graph = load_step(runner.graphs, batch)
            assert graph is not None
            graph()
            logits.append(runner.graphs.state.logits.float().clone())
        else:
            hidden = runner.model(
                batch.input_ids, batch.positions, runner.kv_caches, batch
            )
            logits.append(runner.get_next_token_logits(hidden, batch).float())
    return torch.cat(logits)


@pytest.mark.parametrize("case", RUNNERS)
@torch.inference_mode()
def test_bfloat16_errs_no_more_than_eager(case: Case) -> None:
    device, decode = case
    models = {
        dtype: load_model(
            bundled_model_path(), dtype=dtype, device=device, use_tqdm=False
        )
        for dtype in ("float32", "bfloat16")
    }
    workers = {
        "exact": GPUWorker(models["float32"], EAGER),
        "eager": GPUWorker(models["bfloat16"], EAGER),
        "ours": GPUWorker(
            models["bfloat16"],
            EngineConfig(decode=decode, max_model_len=512, use_tqdm=False),
        )
        if device == "cuda"
        else None,
    }
    if device == "cpu":  # the name is refused there
        runner = CUDAGraphRunner(models["bfloat16"])
        runner.initialize_kv_caches(32)
        runner.warm_up()
    else:
        assert workers["ours"] is not None
        runner = workers["ours"].runner
    text = torch.randint(1, 900, (90,)).tolist()
    exact, eager = (
        teacher_forced(workers[name].runner, text) for name in ("exact", "eager")
    )
    ours = teacher_forced(runner, text)
    assert not ours.isnan().any()
    error, reference = ((x - exact).square().mean().sqrt() for x in (ours, eager))
    assert error <= 1.2 * reference
    top = exact.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > 10 * reference
    assert clear.sum() >= 10
    assert torch.equal(ours.argmax(-1)[clear], exact.argmax(-1)[clear])


def test_each_use_is_compiled_whole_and_once_for_all_its_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph break or a number that is baked in shows without a GPU too."""
    counters: dict[str, CompileCounter] = {}
    compile_function = torch.compile

    def compile_without_options(function: Any, **options: Any) -> Any:
        options.pop("options", None)  # which the backend that counts does not know
        counter = counters[function.__name__] = CompileCounter()
        return compile_function(function, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", compile_without_options)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch._dynamo.reset()
    model = load_model(bundled_model_path(), torch.float32, use_tqdm=False)
    num_slots, prompt = 4096, torch.arange(7, 107)
    results = []
    for step in (compile_step(model), ModelStep(model, is_compiled=True)):
        if not results:
            tune(step, num_slots, 16, use_tqdm=False)
            tuned = {name: counter.frame_count for name, counter in counters.items()}
        shape = count_blocks(num_slots, 16), 16
        caches = allocate_kv_caches(model.config, *shape, torch.float32, "cpu")
        with torch.inference_mode():
            graphs, logits = GraphSet(step, caches, num_slots), []
            graphs.state.load_prompt(prompt, torch.arange(100), graphs.scratch)
            for recorded, bucket, run in graphs.list_runs():
                if recorded is graphs.token_graphs or bucket >= len(prompt):
                    run()
                    logits.append(graphs.state.logits.clone())
        results.append(torch.cat(logits))
    num_prompts = sum(len(prompt) <= bucket for bucket in graphs.prompt_graphs)
    assert len(results[0]) == num_prompts + len(make_buckets(num_slots))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    uses = ["run_layer", "run_long_layer", "run_prompt_layer", "run_head"]
    assert tuned == dict.fromkeys(uses, 1)  # all of it before the cache is there
    assert {name: c.frame_count for name, c in counters.items()} == tuned  # no more


@pytest.mark.parametrize("case", RUNNERS)
class TestNaN:
    def test_ends_one_request_and_no_other(self, case: Case) -> None:
        """Also the step that was launched ahead, on a token that was never drawn."""
        engine = make_engine(case)
        right = engine.generate(["The fox", "A kite"], GREEDY, use_tqdm=False)
        weight = engine.executor.worker.runner.model.model.norm.weight
        before = weight.clone()
        stream = engine.stream("The fox", GREEDY)
        first = [next(stream) for _ in range(5)][-1]
        weight.fill_(float("nan"))
        *_, last = stream
        sample = last.outputs[0]
        assert sample.finish_reason == "error" and "NaN" in str(last.error)
        assert len(sample.token_ids) in (5, 6)  # one may have been under way
        assert sample.token_ids[:5] == first.outputs[0].token_ids
        weight.copy_(before)
        again = engine.generate(["The fox", "A kite"], GREEDY, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in again] == [
            o.outputs[0].token_ids for o in right
        ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
class TestOnAGPU:
    def test_auto_takes_graphs_and_enforce_eager_does_not(self) -> None:
        engine = LLMEngine(max_model_len=64, use_tqdm=False)
        runner = engine.executor.worker.runner
        assert type(runner) is CUDAGraphRunner
        assert runner.graphs.step.layer is not run_layer  # compiled
        engine = LLMEngine(max_model_len=64, enforce_eager=True, use_tqdm=False)
        assert type(engine.executor.worker.runner) is ModelRunner

    def test_a_decode_step_is_two_launches(self) -> None:
        engine = make_engine(("cuda", "cuda_graph"))
        stream = engine.stream("Once upon a time", GREEDY)
        for _ in range(4):
            next(stream)
        with torch.profiler.profile() as profile:
            next(stream)
        torch.cuda.synchronize()
        counts = {e.key: e.count for e in profile.key_averages()}
        assert counts.get("cudaGraphLaunch") == 2  # the model, the draw
        assert counts.get("cudaLaunchKernel", 0) + counts.get("cuLaunchKernel", 0) == 0


def test_importing_it_loads_no_triton() -> None:
    code = (
        "import sys, folo_lib.fast_decode; bad = {'triton', 'torch._inductor'}"
        " & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
