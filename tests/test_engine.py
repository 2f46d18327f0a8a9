"""engine.py: against Hugging Face's generate(), and on its bad days."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import load, make_config, make_reference
from schedules import IS_SOAK
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from folo_lib import LLM, LLMEngine, SamplingParams, bundled_model_path, load_model
from folo_lib.config import EngineConfig
from folo_lib.engine import FCFSScheduler, Inbox, RequestTable, describe_request
from folo_lib.inputs import get_eos_token_ids, load_generation_config
from folo_lib.request import (
    CompletionOutput,
    Request,
    RequestMetrics,
    RequestOutput,
)
from folo_lib.runner import InFlightStep, SampledToken, ScheduledRequest, StepPlan
from folo_lib.sampler import Sampler

FOLDER = bundled_model_path()
IM_END, END_OF_TEXT = 2045, 2043
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def shared() -> LLMEngine:
    return LLMEngine(FOLDER, device="cpu", use_tqdm=False)


@pytest.fixture
def engine(shared: LLMEngine) -> Iterator[LLMEngine]:
    """Must be left as it was found."""
    yield shared
    assert_idle(shared)


@pytest.fixture
def fresh() -> LLMEngine:
    return LLMEngine(FOLDER, device="cpu", use_tqdm=False)


@pytest.fixture
def fcfs() -> LLMEngine:
    """One request at a time."""
    return LLMEngine(FOLDER, device="cpu", scheduler="fcfs", use_tqdm=False)


@pytest.fixture(scope="module")
def hugging_face() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").eval()


def make(**options: Any) -> LLMEngine:
    """The bundled model on a CPU."""
    return LLMEngine(FOLDER, device="cpu", use_tqdm=False, **options)


run_ahead = pytest.mark.parametrize("run_ahead", [False, True])


def assert_idle(engine: LLMEngine) -> None:
    """Nobody waits, nothing is left to tell, and no block or row is lost."""
    assert not engine.has_unfinished_requests()
    assert not engine._table.unfinished and not engine._table.groups
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert stats.num_blocks == engine.executor.num_blocks
    rows = engine.executor.worker.runner.rows  # each is free, or held by one request
    assert len(rows.free_rows) + len(rows.by_id) == rows.num_rows


def run(engine: LLMEngine, *args: Any) -> list[RequestOutput]:
    return engine.generate(*args, use_tqdm=False)


def text_of(engine: LLMEngine, *args: Any) -> str:
    [output] = run(engine, *args)
    return output.outputs[0].text


def ids_of_outputs(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def ids_of(engine: LLMEngine, *args: Any) -> list[list[int]]:
    return ids_of_outputs(run(engine, *args))


def assert_same_sample(ours: CompletionOutput, theirs: CompletionOutput) -> None:
    """All of it; log-probabilities up to the last bits, which company changes."""
    assert dataclasses.replace(ours, logprobs=None, cumulative_logprob=None) == (
        dataclasses.replace(theirs, logprobs=None, cumulative_logprob=None)
    )
    close = pytest.approx(theirs.cumulative_logprob, abs=1e-4)
    assert ours.cumulative_logprob == close
    for our, their in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
        assert list(our) == list(their)
        for token_id, entry in our.items():
            assert entry.rank == their[token_id].rank
            assert entry.logprob == pytest.approx(their[token_id].logprob, abs=1e-4)


def assert_equals_generate(
    ours: list[int], model: PreTrainedModel, prompt: list[int], **options: Any
) -> None:
    """The same tokens, up to a step that is a tie within ten times float32's error."""
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=GenerationConfig(
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        ),
    )
    theirs = result.sequences[0, len(prompt) :].tolist()
    for step, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            best, second = result.scores[step][0].topk(2).values.tolist()
            error = 1e-5 * max(1.0, result.scores[step][0].std().item())
            assert best - second < 10 * error, f"step {step}: {our}, not {their}"
            return  # from here on they read different texts
    assert len(ours) == len(theirs)


class TestParity:
    def test_bundled_model_on_50_prompts_of_1_to_1000_tokens(
        self, engine: LLMEngine, hugging_face: PreTrainedModel
    ) -> None:
        rng = random.Random(0)
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        text = " ".join(
            output.outputs[0].text
            for output in run(
                engine,
                ["Once upon a time"] * 10,
                SamplingParams(max_tokens=150, min_tokens=150),
            )
        )
        words = tokenizer(text).input_ids
        assert len(words) > 1200
        lengths = [1, 2, 3, 15, 16, 17, 31, 32, 33, 255, 256, 257, 999, 1000]
        lengths += [rng.randint(1, 1000 >> rng.randint(0, 6)) for _ in range(38)]
        assert len(lengths) >= 50
        prompts = []
        for length in lengths:
            start = rng.randrange(len(words) - length)
            prompts.append(words[start : start + length])
        prompts[0], prompts[1] = [rng.randrange(2048)], [IM_END, 0]
        eos = [IM_END, END_OF_TEXT]
        ours = ids_of(engine, prompts, SamplingParams(temperature=0, max_tokens=12))
        for prompt, tokens in zip(prompts, ours, strict=True):
            options = {"max_new_tokens": 12, "eos_token_id": eos}
            assert_equals_generate(tokens, hugging_face, prompt, **options)

    @pytest.mark.parametrize(
        "case",
        [
            "qwen3 4/1",
            "qwen3 6/3 untied",
            "qwen3 3/3 bias",
            "qwen3 14/2 untied bias",
            "qwen3 12/3 untied linear bias",
            "qwen3 2/1 yarn",
            "qwen2 14/2",
            "qwen2 9/9 untied yarn",
        ],
    )
    @pytest.mark.parametrize("backend", ["torch_sdpa", "torch_naive", "torch_ragged"])
    def test_random_models(self, case: str, backend: str) -> None:
        config = make_config(case)
        model = make_reference(config)
        engine = LLMEngine(load(config, model, backend))
        rng = random.Random(case)
        prompts = [
            [rng.randrange(config.vocab_size) for _ in range(n)]
            for n in (1, 2, 16, 17, 50, 119)
        ]
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        for prompt, ours in zip(prompts, ids_of(engine, prompts, params), strict=True):
            options = {"max_new_tokens": 40, "eos_token_id": None}
            assert_equals_generate(ours, model, prompt, **options)
        assert_idle(engine)

    @pytest.mark.parametrize("penalty", [1.3, 0.8, 2.0])
    def test_repetition_penalty(
        self, engine: LLMEngine, hugging_face: PreTrainedModel, penalty: float
    ) -> None:
        prompts = [[488, 1381], list(range(300, 360)), [5] * 20]
        params = SamplingParams(
            temperature=0, max_tokens=40, repetition_penalty=penalty, ignore_eos=True
        )
        for prompt, ours in zip(prompts, ids_of(engine, prompts, params), strict=True):
            assert_equals_generate(
                ours,
                hugging_face,
                prompt,
                max_new_tokens=40,
                eos_token_id=None,
                repetition_penalty=penalty,
            )

    def test_frequency_and_presence_against_a_loop(self, engine: LLMEngine) -> None:
        model = engine.executor.worker.runner.model
        prompt, frequency, presence = [488, 1381, 488], 0.7, 0.4
        tokens: list[int] = []
        for _ in range(30):
            logits = model.compute_logits(model(torch.tensor(prompt + tokens)))[-1]
            for token in set(tokens):
                logits[token] -= frequency * tokens.count(token) + presence
            tokens.append(int(logits.argmax()))
        params = SamplingParams(
            temperature=0,
            max_tokens=30,
            frequency_penalty=frequency,
            presence_penalty=presence,
            ignore_eos=True,
        )
        assert ids_of(engine, [prompt], params) == [tokens]

    def test_min_tokens_forbids_every_end(
        self, engine: LLMEngine, hugging_face: PreTrainedModel
    ) -> None:
        assert engine.tokenizer is not None
        prompt = engine.tokenizer("They were happy. The end.").input_ids
        eos = [IM_END, END_OF_TEXT]
        [short] = ids_of(engine, [prompt], SamplingParams(temperature=0, max_tokens=30))
        assert len(short) < 25 and short[-1] in eos
        params = SamplingParams(temperature=0, max_tokens=30, min_tokens=25)
        [long] = ids_of(engine, [prompt], params)
        assert len(long) >= 25 and not set(long[:25]) & set(eos)
        options = {"max_new_tokens": 30, "min_new_tokens": 25, "eos_token_id": eos}
        assert_equals_generate(long, hugging_face, prompt, **options)


class TestGenerate:
    def test_outputs_are_in_the_order_of_the_prompts(self, engine: LLMEngine) -> None:
        prompts = ["The fox", [488], "One day", torch.tensor([5, 6])]
        outputs = run(engine, prompts, GREEDY)
        assert [out.prompt for out in outputs] == ["The fox", None, "One day", None]
        assert outputs[1].prompt_token_ids == [488]
        assert outputs[3].prompt_token_ids == [5, 6]
        for prompt, out in zip(prompts, outputs, strict=True):
            assert out.finished and out.error is None
            assert out.outputs[0].text == text_of(engine, [prompt], GREEDY)

    def test_one_prompt_need_not_be_a_list(self, engine: LLMEngine) -> None:
        assert engine.tokenizer is not None
        ids = engine.tokenizer("The fox").input_ids
        [as_text], [as_ids] = run(engine, "The fox", GREEDY), run(engine, ids, GREEDY)
        assert as_text.outputs[0].token_ids == as_ids.outputs[0].token_ids

    def test_nothing_gives_nothing(self, engine: LLMEngine) -> None:
        assert run(engine, []) == []
        assert engine.chat([], use_tqdm=False) == []

    def test_one_params_each(self, engine: LLMEngine) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 5, 3)]
        ids = ids_of(engine, ["The fox"] * 3, params)
        assert [len(x) for x in ids] == [1, 5, 3]
        assert ids[0] == ids[1][:1]
        with pytest.raises(ValueError, match=r"2 .*3"):
            run(engine, ["The fox"] * 3, params[:2])

    def test_without_params_the_checkpoint_says_how(self, fresh: LLMEngine) -> None:
        [output] = run(fresh, "Once upon a time")
        assert len(output.outputs[0].token_ids) == 16
        params = SamplingParams(
            temperature=0.7, top_k=20, top_p=0.95, seed=output.outputs[0].seed
        )
        assert ids_of(fresh, "Once upon a time", params) == [
            output.outputs[0].token_ids
        ]

    def test_progress_bar_only_when_asked(
        self, engine: LLMEngine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(engine, "The fox", GREEDY)
        assert capsys.readouterr().err == ""
        engine.generate(["The fox", "A kite"], GREEDY)
        assert "2/2" in capsys.readouterr().err

    def test_all_prompts_are_judged_before_any_work(
        self, fresh: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fresh.executor, "launch", None)
        for bad, message in [
            ("", "empty"),
            ([], "empty"),
            ([0] * 4096, r"4096.*4095"),
            ([5, 2048], r"2048.*2047"),
        ]:
            with pytest.raises(ValueError, match=message):
                run(fresh, ["The fox", bad, "One day"], GREEDY)
            assert_idle(fresh)

    def test_up_to_the_limit_of_the_model(self) -> None:
        engine = LLMEngine(FOLDER, device="cpu", max_model_len=40, use_tqdm=False)
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        for length in (1, 15, 16, 17, 38, 39):
            [output] = run(engine, [[7] * length], params)
            assert len(output.outputs[0].token_ids) == 40 - length
            assert output.outputs[0].finish_reason == "length"
        with pytest.raises(ValueError, match=r"40.*39"):
            run(engine, [[7] * 40], params)
        assert_idle(engine)


class TestNamesOfVllm:
    """What somebody types who knows vLLM."""

    def test_the_class_and_its_tokenizer(self, engine: LLMEngine) -> None:
        assert LLM is LLMEngine
        tokenizer = engine.get_tokenizer()
        assert tokenizer is engine.tokenizer and tokenizer is not None
        assert make(gpu_memory_utilization=0.5).executor.num_blocks > 0

    def test_prompts_that_are_dicts(self, engine: LLMEngine) -> None:
        text = "Once upon a time"
        [wanted] = run(engine, text, GREEDY)
        ids = wanted.prompt_token_ids
        texts, tokens = {"prompt": text}, {"prompt_token_ids": ids}
        outputs = run(engine, [texts, tokens, text], GREEDY)
        outputs += [*run(engine, texts, GREEDY), *run(engine, tokens, GREEDY)]
        for prompt in (texts, tokens):
            *_, last = engine.stream(prompt, GREEDY)
            outputs.append(last)
            request_id = engine.add_request(prompt, GREEDY)
            while engine.has_unfinished_requests():
                outputs += [one for one in engine.step() if one.finished]
            assert outputs[-1].request_id == request_id
        assert len(outputs) == 9
        for output in outputs:
            assert output.prompt_token_ids == ids
            assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert [one.prompt for one in outputs[:3]] == [text, None, text]

    def test_a_share_of_the_gpu_reaches_the_worker(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[float | None] = []

        def get_memory(device: object, utilization: float | None = None) -> int:
            asked.append(utilization)
            return 2**24

        monkeypatch.setattr("folo_lib.runner.get_kv_cache_memory", get_memory)
        few = make(gpu_memory_utilization=0.5).executor.num_blocks
        assert make().executor.num_blocks == few
        more = make(gpu_memory_utilization=0.5, kv_cache_memory_bytes=2**25)
        assert more.executor.num_blocks > few  # the bytes count
        assert asked == [0.5, None]

    def test_looks(self, engine: LLMEngine) -> None:
        first = repr(engine)
        assert first.startswith("<LLMEngine tiny-qwen3: float32 on cpu, max_model_len=")
        assert first.endswith(", 0 running, 0 waiting>")
        engine.add_request("One", GREEDY, "a")
        engine.step()
        engine.add_request("Two", GREEDY)
        assert repr(engine).endswith(" blocks used, 1 running, 1 waiting>")
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert len(repr(output)) < 120
                assert "not finished" in repr(output) or output.finished
        model = load_model(FOLDER, device="cpu", use_tqdm=False)
        assert repr(LLMEngine(model)).startswith("<LLMEngine a loaded model: float32")

    def test_an_output_looks_short(self, engine: LLMEngine) -> None:
        params = SamplingParams(max_tokens=50, n=2, logprobs=5, seed=1, ignore_eos=True)
        [one, two] = run(engine, ["Once " * 50, [5, 6]], params)
        assert repr(one).startswith(
            "<RequestOutput of 'Once Once On...ce Once Once ': '"
        )
        assert repr(two).startswith("<RequestOutput of 2 token ids: '")
        for output in (one, two):
            assert repr(output).count("(50 tokens, length)") == 2
            assert len(repr(output)) < 180


class TestChat:
    question = [{"role": "user", "content": "What is the KV cache?"}]  # noqa: RUF012
    params = SamplingParams(temperature=0, max_tokens=60)

    def test_is_generate_behind_the_template(self, engine: LLMEngine) -> None:
        assert engine.tokenizer is not None
        for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            prompt = engine.tokenizer.apply_chat_template(
                self.question, tokenize=False, add_generation_prompt=True, **options
            )
            [chat] = engine.chat(self.question, self.params, use_tqdm=False, **options)
            [plain] = run(engine, prompt, self.params)
            assert chat.prompt == prompt
            assert chat.outputs[0].token_ids == plain.outputs[0].token_ids
        assert "keys and values" in plain.outputs[0].text
        assert plain.outputs[0].finish_reason == "stop"
        assert plain.outputs[0].stop_reason is None

    def test_several_conversations(self, engine: LLMEngine) -> None:
        other = [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Repeat: fox moon lake"},
        ]
        both = engine.chat([self.question, other], self.params, use_tqdm=False)
        for messages, output in zip([self.question, other], both, strict=True):
            [alone] = engine.chat(messages, self.params, use_tqdm=False)
            assert alone.outputs[0].text == output.outputs[0].text

    @pytest.mark.parametrize("messages", [[[]], [{"content": "hi"}], [[{}]]])
    def test_what_is_no_conversation(self, engine: LLMEngine, messages: Any) -> None:
        with pytest.raises(ValueError, match=r"messages is .*'role' and 'content'"):
            engine.chat(messages, use_tqdm=False)

    def test_a_base_model_has_no_template(self, fresh: LLMEngine) -> None:
        assert fresh.tokenizer is not None
        fresh.tokenizer.chat_template = None
        with pytest.raises(ValueError, match=r"no chat template.*generate\(\)"):
            fresh.chat(self.question, use_tqdm=False)
        [output] = fresh.chat(
            self.question,
            self.params,
            use_tqdm=False,
            chat_template="{{ messages[0]['content'] }}",
        )
        assert output.prompt == "What is the KV cache?"


class TestStream:
    def test_texts_grow_to_what_generate_gives(self, engine: LLMEngine) -> None:
        params = SamplingParams(temperature=0.7, seed=5, max_tokens=60, logprobs=1)
        outputs = list(engine.stream("Once upon a time", params))
        for before, after in itertools.pairwise(outputs):
            assert after.outputs[0].text.startswith(before.outputs[0].text)
            assert after.outputs[0].token_ids[:-1] == before.outputs[0].token_ids
        assert [out.finished for out in outputs] == [False] * (len(outputs) - 1) + [
            True
        ]
        [whole] = run(engine, "Once upon a time", params)
        assert outputs[-1].outputs == whole.outputs

    @run_ahead
    @pytest.mark.parametrize("prompt_logprobs", [None, 1])
    def test_chunks_of_a_prompt_are_no_news(
        self, run_ahead: bool, prompt_logprobs: int | None
    ) -> None:
        """Neither at the start nor when a request comes back after a preemption."""
        engine = make(max_num_batched_tokens=8, async_scheduling=run_ahead)
        params = dataclasses.replace(GREEDY, prompt_logprobs=prompt_logprobs)
        prompt = list(range(100, 130))
        outputs = []
        for output in engine.stream(prompt, params):
            outputs.append(output)
            if len(outputs) == 4:
                engine.executor.reset()  # all is read again, in chunks
                engine._table.restart({}, KeyboardInterrupt())
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        assert counts == list(range(1, 9))
        assert ids_of_outputs(outputs[-1:]) == ids_of(engine, prompt, params)
        scores = outputs[-1].prompt_logprobs
        assert len(scores or []) == (0 if prompt_logprobs is None else len(prompt))
        assert_idle(engine)

    def test_an_end_before_the_first_token_is_news(self) -> None:
        engine = make(max_num_batched_tokens=8)
        launch, left = engine.executor.launch, iter(range(2))

        def fails(plan: StepPlan) -> InFlightStep:
            if next(left, None) is None:
                raise RuntimeError("out of memory, say")
            return launch(plan)

        engine.executor.launch = fails  # type: ignore[method-assign]
        [only] = engine.stream(list(range(100, 130)), GREEDY)
        assert only.finished and only.outputs[0].finish_reason == "error"
        assert not only.outputs[0].token_ids
        aborted = engine.add_request([1, 2, 3], GREEDY)
        engine.abort_request(aborted)
        [last] = engine.step()
        assert last.finished and not last.outputs[0].token_ids
        assert_idle(engine)

    def test_to_stop_listening_aborts(self, engine: LLMEngine) -> None:
        stream = engine.stream("Once upon a time", GREEDY)
        next(stream)
        assert engine.has_unfinished_requests()
        stream.close()
        assert_idle(engine)

    def test_a_bad_prompt_is_refused_at_once(self, engine: LLMEngine) -> None:
        with pytest.raises(ValueError, match="empty"):
            engine.stream("", GREEDY)

    def test_abort_from_inside_the_loop(self, engine: LLMEngine) -> None:
        reasons = []
        for output in engine.stream("Once upon a time", GREEDY):
            reasons.append(output.outputs[0].finish_reason)
            if len(reasons) == 3:
                engine.abort_request(output.request_id)
        assert reasons == [None, None, None, "abort"]

    def test_two_streams_take_turns(self, engine: LLMEngine) -> None:
        one, two = (engine.stream(text, GREEDY) for text in ("The fox", "One day"))
        next(one)
        last_two = list(two)[-1]  # waits for one, whose news is kept
        last_one = list(one)[-1]
        assert last_one.outputs[0].text == text_of(engine, "The fox", GREEDY)
        assert last_two.outputs[0].text == text_of(engine, "One day", GREEDY)

    def test_several_samples(self, engine: LLMEngine) -> None:
        params = SamplingParams(n=3, seed=1, max_tokens=4)
        *_, last = engine.stream("The fox", params)
        assert [len(sample.token_ids) for sample in last.outputs] == [4, 4, 4]


class TestSteps:
    def test_first_come_first_served(self, fcfs: LLMEngine) -> None:
        names = [fcfs.add_request("The fox", GREEDY, name) for name in "abc"]
        assert names == ["a", "b", "c"]
        seen = []
        while fcfs.has_unfinished_requests():
            seen += [output.request_id for output in fcfs.step()]
        assert seen == ["a"] * 8 + ["b"] * 8 + ["c"] * 8
        assert_idle(fcfs)

    def test_everybody_in_every_step(self, engine: LLMEngine) -> None:
        for name in "abc":
            engine.add_request("The fox", GREEDY, name)
        steps = []
        while engine.has_unfinished_requests():
            steps.append("".join(output.request_id for output in engine.step()))
        assert steps == ["abc"] * 8

    def test_fresh_ids_are_uuids(self, engine: LLMEngine) -> None:
        one, two = (engine.add_request("The fox", GREEDY) for _ in range(2))
        assert one != two and len(one) == 36
        for name in (one, two):
            engine.abort_request(name)
        engine.step()

    def test_an_id_in_use(self, engine: LLMEngine) -> None:
        engine.add_request("The fox", GREEDY, "mine")
        with pytest.raises(ValueError, match="'mine' is in use"):
            engine.add_request("A kite", GREEDY, "mine")
        while engine.has_unfinished_requests():
            [output] = engine.step()
        assert output.prompt == "The fox"
        engine.add_request("A kite", GREEDY, "mine")  # free again
        engine.abort_request("mine")
        engine.step()

    def test_of_a_batch_with_an_id_in_use_nothing_is_queued(
        self, engine: LLMEngine
    ) -> None:
        engine.add_request("The fox", GREEDY, "mine")
        process = engine.processor.process_request
        groups = [process("A kite", GREEDY, name) for name in ("other", "mine")]
        with pytest.raises(ValueError, match="'mine' is in use"):
            engine.submit(groups, Inbox(every_token=True))
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert {output.prompt for output in outputs} == {"The fox"}
        assert_idle(engine)

    def test_news_that_generate_passes_over_is_kept(self, engine: LLMEngine) -> None:
        engine.add_request("The fox", GREEDY, "mine")
        engine.step()
        longer = SamplingParams(temperature=0, max_tokens=12)
        [other] = run(engine, "One day", longer)
        assert other.prompt == "One day"
        assert engine.has_unfinished_requests()
        [output] = engine.step()
        assert output.finished and output.request_id == "mine"
        assert output.outputs[0].text == text_of(engine, "The fox", GREEDY)

    def test_a_step_with_nothing_to_do(self, engine: LLMEngine) -> None:
        assert engine.step() == []

    def test_outputs_are_snapshots(self, engine: LLMEngine) -> None:
        engine.add_request("The fox", SamplingParams(logprobs=1, max_tokens=3), "x")
        first = engine.step()[0].outputs[0]
        text, ids = first.text, list(first.token_ids)
        engine.step()
        assert (first.text, first.token_ids, len(first.logprobs)) == (text, ids, 1)
        engine.abort_request("x")
        engine.step()

    def test_a_scheduler_of_ones_own(self) -> None:
        class LastComeFirstServed(FCFSScheduler):
            def add(self, request: Request) -> None:
                self.waiting.appendleft(request)

        engine = LLMEngine(
            FOLDER, device="cpu", scheduler=LastComeFirstServed, use_tqdm=False
        )
        for name in "abc":
            engine.add_request("The fox", GREEDY, name)
        seen = [engine.step()[0].request_id for _ in range(24)]
        assert seen == ["c"] * 8 + ["b"] * 8 + ["a"] * 8
        outputs = run(engine, PROMPTS, GREEDY)
        assert [output.prompt for output in outputs] == PROMPTS


class TestSeeds:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=12)

    def test_alone_after_others_in_any_order_and_again(
        self, engine: LLMEngine, fresh: LLMEngine
    ) -> None:
        others = [SamplingParams(seed=s, max_tokens=s) for s in (3, 5)]
        alone = ids_of(engine, "Once upon", self.params)
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
            params = [[*others, self.params][i] for i in order]
            ids = ids_of(engine, ["The fox"] * 2 + ["Once upon"], params)
            prompts = ["Once upon" if p is self.params else "A" for p in params]
            ids = ids_of(engine, prompts, params)
            assert ids[params.index(self.params)] == alone[0]
        assert ids_of(fresh, "Once upon", self.params) == alone
        again = LLMEngine(FOLDER, device="cpu", seed=99, use_tqdm=False)
        assert ids_of(again, "Once upon", self.params) == alone

    def test_four_samples_repeat_and_differ(
        self, engine: LLMEngine, fresh: LLMEngine
    ) -> None:
        params = SamplingParams(n=4, temperature=1.0, seed=2, max_tokens=12)
        four = ids_of(engine, "Once upon", params)
        assert len({tuple(ids) for ids in four}) == 4
        run(engine, "The fox", self.params)
        assert ids_of(engine, "Once upon", params) == four
        assert ids_of(fresh, ["A kite", "Once upon"], params)[4:] == four
        one = SamplingParams(temperature=1.0, seed=2, max_tokens=12)
        assert ids_of(engine, "Once upon", one) == four[:1]

    def test_another_seed_another_text(self, engine: LLMEngine) -> None:
        texts = {
            text_of(engine, "Once", SamplingParams(seed=s, max_tokens=12))
            for s in (0, 1, 2**63, 2**64 - 1)
        }
        assert len(texts) == 4

    def test_without_a_seed_the_engine_takes_one_and_says_which(self) -> None:
        first, second, other = (
            LLMEngine(FOLDER, device="cpu", seed=s, use_tqdm=False) for s in (4, 4, 5)
        )
        params = SamplingParams(max_tokens=12)
        outputs = run(first, ["Once upon"] * 2, params)
        assert outputs[0].outputs[0].token_ids != outputs[1].outputs[0].token_ids
        assert ids_of(second, ["Once upon"] * 2, params) == [
            out.outputs[0].token_ids for out in outputs
        ]
        assert ids_of(other, "Once upon", params) != [outputs[0].outputs[0].token_ids]
        again = SamplingParams(max_tokens=12, seed=outputs[1].outputs[0].seed)
        assert ids_of(other, "Once upon", again) == [outputs[1].outputs[0].token_ids]


class TestStops:
    """What request.py decides, as it arrives through all layers."""

    story = "Once upon a time"

    def test_the_tokenizers_eos_needs_no_reason(self, engine: LLMEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=None)
        [output] = engine.chat(TestChat.question, params, use_tqdm=False)
        sample = output.outputs[0]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", None)
        assert sample.token_ids[-1] == IM_END
        assert "<|im_end|>" not in sample.text

    def test_the_second_eos_names_itself(self, engine: LLMEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=None)
        sample = run(engine, self.story, params)[0].outputs[0]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", END_OF_TEXT)
        assert sample.token_ids[-1] == END_OF_TEXT

    def test_eos_on_the_last_allowed_token(self, engine: LLMEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=None)
        whole = run(engine, self.story, params)[0].outputs[0].token_ids
        for size, reason in [(len(whole), "stop"), (len(whole) - 1, "length")]:
            params = SamplingParams(temperature=0, max_tokens=size)
            sample = run(engine, self.story, params)[0].outputs[0]
            assert sample.token_ids == whole[:size]
            assert sample.finish_reason == reason

    def test_ignore_eos_goes_on_and_stop_ids_still_count(
        self, engine: LLMEngine
    ) -> None:
        params = SamplingParams(temperature=0, max_tokens=None)
        whole = run(engine, self.story, params)[0].outputs[0].token_ids
        longer = len(whole) + 5
        params = SamplingParams(temperature=0, max_tokens=longer, ignore_eos=True)
        sample = run(engine, self.story, params)[0].outputs[0]
        assert sample.token_ids[: len(whole)] == whole
        assert (len(sample.token_ids), sample.finish_reason) == (longer, "length")
        params = SamplingParams(
            temperature=0,
            max_tokens=longer,
            ignore_eos=True,
            stop_token_ids=[END_OF_TEXT],
        )
        sample = run(engine, self.story, params)[0].outputs[0]
        assert sample.token_ids == whole
        assert (sample.finish_reason, sample.stop_reason) == ("stop", END_OF_TEXT)

    def test_stop_string_in_mid_token(self, engine: LLMEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=40)
        text = text_of(engine, self.story, params)
        stop = text[41:47]
        params = SamplingParams(temperature=0, max_tokens=40, stop=stop)
        sample = run(engine, self.story, params)[0].outputs[0]
        assert sample.text == text[: text.index(stop)]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
        for output in engine.stream(self.story, params):
            assert sample.text.startswith(output.outputs[0].text)

    def test_min_tokens_meets_max_tokens(self, engine: LLMEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=200, min_tokens=200)
        sample = run(engine, self.story, params)[0].outputs[0]
        assert (len(sample.token_ids), sample.finish_reason) == (200, "length")
        assert not {IM_END, END_OF_TEXT} & set(sample.token_ids)


class Injected(Exception):
    pass


def fail_on_call(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    error: type[BaseException],
) -> None:
    """Makes the given call of a method raise, once, counted from now."""
    original, calls = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("injected")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


PLACES: dict[str, Callable[[LLMEngine], tuple[Any, str]]] = {
    "schedule": lambda e: (e.scheduler, "schedule"),
    "launch": lambda e: (e.executor.worker.runner, "launch"),
    "model": lambda e: (e.executor.worker.runner.model, "forward"),
    "layer": lambda e: (e.executor.worker.runner.model.model.layers[3], "forward"),
    "sampler": lambda e: (e.executor.worker.runner.sampler, "sample"),
    "detokenizer": lambda e: (
        __import__("folo_lib.request", fromlist=["x"]).IncrementalDetokenizer,
        "append",
    ),
}
each_place = pytest.mark.parametrize("place", list(PLACES)[1:])
# Where a step hands out what it brought; an error there belongs to the whole step.
UPDATES: dict[str, Callable[[LLMEngine], tuple[Any, str]]] = {
    "read": lambda e: (InFlightStep, "read"),
    "append": lambda e: (Request, "append_token"),
    "stop": lambda e: (Sampler, "check_stop_conditions"),
    "count": lambda e: (RequestMetrics, "record_token"),
    "update": lambda e: (e._table, "update"),
    "finish": lambda e: (e.scheduler, "finish"),
}
LIVELY = SamplingParams(
    temperature=0.9, seed=3, max_tokens=8, frequency_penalty=0.5, repetition_penalty=1.1
)
LISTENING = SamplingParams(
    temperature=0.9, seed=3, max_tokens=8, presence_penalty=0.5, logprobs=1, stop="###"
)
STRICT = SamplingParams(
    temperature=0,
    presence_penalty=2,
    frequency_penalty=2,
    max_tokens=12,
    ignore_eos=True,
)


PROMPTS = ["The fox", "One day", "A kite"]


@pytest.fixture(scope="module")
def right(shared: LLMEngine) -> list[list[int]]:
    """What `PROMPTS` give when nothing goes wrong."""
    return ids_of(shared, PROMPTS, LIVELY)


class TestBadDays:
    @each_place
    @pytest.mark.parametrize("call", [1, 2, 9, 12, 16])
    def test_an_exception_ends_its_request_and_no_other(
        self,
        fcfs: LLMEngine,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        right: list[list[int]],
        place: str,
        call: int,
    ) -> None:
        fail_on_call(monkeypatch, *PLACES[place](fcfs), call, Injected)
        with caplog.at_level(logging.ERROR):
            outputs = run(fcfs, PROMPTS, LIVELY)
        assert "injected" in caplog.text
        hurt = (call - 1) // 8
        for i, output in enumerate(outputs):
            sample = output.outputs[0]
            if i == hurt:
                assert sample.finish_reason == "error"
                assert output.error == "Injected: injected"
                assert sample.token_ids == right[i][: len(sample.token_ids)]
            else:
                assert (sample.finish_reason, output.error) == ("length", None)
                assert sample.token_ids == right[i]
        assert_idle(fcfs)
        assert ids_of(fcfs, PROMPTS, LIVELY) == right

    @pytest.mark.parametrize("place", ["launch", "model", "layer", "sampler"])
    @pytest.mark.parametrize("call", [1, 2, 7, 9, 16])
    def test_an_exception_ends_the_requests_of_its_step_and_no_other(
        self,
        monkeypatch: pytest.MonkeyPatch,
        right: list[list[int]],
        place: str,
        call: int,
    ) -> None:
        """Two run at a time, six ask; what waits and what comes later is as alone."""
        engine = LLMEngine(FOLDER, device="cpu", max_num_seqs=2, use_tqdm=False)
        running: list[set[str]] = []
        original = engine.scheduler.schedule

        def noting() -> StepPlan:
            plan = original()
            running.append({one.request_id[0] for one in plan.scheduled})
            return plan

        monkeypatch.setattr(engine.scheduler, "schedule", noting)
        fail_on_call(monkeypatch, *PLACES[place](engine), call, Injected)
        for i, name in enumerate("abcdef"):
            engine.add_request(PROMPTS[i % 3], LIVELY, name)
        last: dict[str, RequestOutput] = {}
        while engine.has_unfinished_requests():
            last |= {output.request_id: output for output in engine.step()}
        hurt = running[call - 1]
        assert len(hurt) == 2
        for i, name in enumerate("abcdef"):
            sample = last[name].outputs[0]
            if name in hurt:
                assert sample.finish_reason == "error"
                assert last[name].error == "Injected: injected"
                assert sample.token_ids == right[i % 3][: len(sample.token_ids)]
            else:
                assert (sample.finish_reason, last[name].error) == ("length", None)
                assert sample.token_ids == right[i % 3]
        assert_idle(engine)

    def test_those_who_were_not_in_the_step_begin_again(
        self, monkeypatch: pytest.MonkeyPatch, right: list[list[int]]
    ) -> None:
        """All run; a prompt of 40 takes the whole budget of a step, which fails."""
        engine = LLMEngine(FOLDER, device="cpu", scheduler=Alternate, use_tqdm=False)
        fail_on_call(monkeypatch, engine.executor, "launch", 7, Injected)
        outputs = run(engine, PROMPTS, LIVELY)  # a b c a b c, and a fails
        reasons = [output.outputs[0].finish_reason for output in outputs]
        assert reasons == ["error", "length", "length"]
        assert ids_of_outputs(outputs) == [right[0][:2], *right[1:]]
        assert not engine.has_unfinished_requests()

    def test_a_broken_detokenizer_hurts_its_request_alone(
        self, fresh: LLMEngine, monkeypatch: pytest.MonkeyPatch, right: list[list[int]]
    ) -> None:
        fail_on_call(monkeypatch, *PLACES["detokenizer"](fresh), 11, Injected)
        outputs = run(fresh, PROMPTS, LIVELY)  # the second request's fourth token
        reasons = [output.outputs[0].finish_reason for output in outputs]
        assert reasons == ["length", "error", "length"]
        assert ids_of_outputs(outputs) == [right[0], right[1][:4], right[2]]
        assert_idle(fresh)

    def test_a_broken_scheduler_is_told_to_the_caller_and_ends_nobody(
        self, fresh: LLMEngine, monkeypatch: pytest.MonkeyPatch, right: list[list[int]]
    ) -> None:
        fresh.add_request(PROMPTS[0], LIVELY, "mine")
        fresh.step()
        fail_on_call(monkeypatch, *PLACES["schedule"](fresh), 2, Injected)
        with pytest.raises(Injected):
            run(fresh, PROMPTS[1:], LIVELY)
        while fresh.has_unfinished_requests():
            [output] = fresh.step()
        assert output.outputs[0].token_ids == right[0]
        assert_idle(fresh)

    @each_place
    @pytest.mark.parametrize("call", [1, 3, 12])
    def test_ctrl_c_in_generate(
        self,
        fcfs: LLMEngine,
        monkeypatch: pytest.MonkeyPatch,
        right: list[list[int]],
        place: str,
        call: int,
    ) -> None:
        fail_on_call(monkeypatch, *PLACES[place](fcfs), call, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(fcfs, PROMPTS, LIVELY)
        assert_idle(fcfs)
        assert ids_of(fcfs, PROMPTS, LIVELY) == right

    @pytest.mark.parametrize(
        ("scheduler", "run_ahead"),
        [("fcfs", False), ("continuous", False), ("continuous", True)],
    )
    @pytest.mark.parametrize("place", [*PLACES, *UPDATES])
    @pytest.mark.parametrize("call", [1, 4, 8])
    def test_ctrl_c_leaves_the_requests_of_others_unchanged(
        self,
        monkeypatch: pytest.MonkeyPatch,
        scheduler: str,
        run_ahead: bool,
        place: str,
        call: int,
    ) -> None:
        """Wherever it falls, in whosever step: same tokens, text, log-probabilities."""
        engine = make(scheduler=scheduler, async_scheduling=run_ahead)
        [alone] = run(engine, PROMPTS[0], LISTENING)
        engine.add_request(PROMPTS[0], LISTENING, "mine")
        where = (PLACES | UPDATES)[place](engine)
        call = min(call, 3) if place == "finish" else call  # three requests end
        fail_on_call(monkeypatch, *where, call, KeyboardInterrupt)
        texts, interrupted = [""], 0
        try:
            run(engine, PROMPTS[1:], LISTENING)
        except KeyboardInterrupt:
            interrupted += 1
        while engine.has_unfinished_requests():
            try:
                for output in engine.step():
                    texts.append(output.outputs[0].text)
            except KeyboardInterrupt:
                interrupted += 1
        assert interrupted == 1
        assert output.request_id == "mine" and output.finished
        assert_same_sample(output.outputs[0], alone.outputs[0])
        assert all(new.startswith(old) for old, new in itertools.pairwise(texts))
        assert output.metrics.num_output_tokens == 8
        assert_idle(engine)

    def test_ctrl_c_forgets_no_penalty(
        self, fresh: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It counts what was written before, and nothing twice."""
        [alone] = ids_of(fresh, [[5, 6, 7]], STRICT)
        fresh.add_request([5, 6, 7], STRICT, "mine")
        for call in (6, 3):
            where = PLACES["sampler"](fresh)
            fail_on_call(monkeypatch, *where, call, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                while fresh.has_unfinished_requests():
                    fresh.step()
        while fresh.has_unfinished_requests():
            [output] = fresh.step()
        assert output.outputs[0].token_ids == alone

    def test_abort_waiting_and_running(
        self, engine: LLMEngine, right: list[list[int]]
    ) -> None:
        for name, prompt in zip("abc", PROMPTS, strict=True):
            engine.add_request(prompt, LIVELY, name)
        for _ in range(3):
            engine.step()
        engine.add_request(PROMPTS[2], LIVELY, "d")
        engine.abort_request("a")  # runs
        engine.abort_request("d")  # waits
        engine.abort_request("nobody")
        outputs: dict[str, RequestOutput] = {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
        samples = {name: output.outputs[0] for name, output in outputs.items()}
        assert {n: s.finish_reason for n, s in samples.items()} == {
            "a": "abort",
            "b": "length",
            "c": "length",
            "d": "abort",
        }
        assert samples["a"].token_ids == right[0][:3]
        assert samples["b"].token_ids == right[1]
        assert samples["c"].token_ids == right[2]
        assert samples["d"].token_ids == []
        engine.abort_request("a")  # finished and forgotten

    def test_abort_all_samples(self, fcfs: LLMEngine) -> None:
        fcfs.add_request("The fox", SamplingParams(n=3, max_tokens=4), "x")
        for _ in range(6):
            fcfs.step()
        fcfs.abort_request("x")
        [output] = fcfs.step()
        reasons = [sample.finish_reason for sample in output.outputs]
        assert reasons == ["length", "abort", "abort"]
        assert [len(s.token_ids) for s in output.outputs] == [4, 2, 0]

    def test_abort_while_a_step_runs(
        self,
        engine: LLMEngine,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """As from another thread: the token of that step is not shown."""
        original = engine.executor.launch

        def aborting(plan: StepPlan) -> Any:
            launched = original(plan)
            engine.abort_request("x")
            return launched

        engine.add_request("The fox", GREEDY, "x")
        engine.step()
        monkeypatch.setattr(engine.executor, "launch", aborting)
        [output] = engine.step()
        assert output.outputs[0].finish_reason == "abort"
        assert len(output.outputs[0].token_ids) == 1
        assert not caplog.records  # and it is no error

    def test_who_is_aborted_between_launch_and_read_gets_no_token(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = make(async_scheduling=True)
        for name, prompt in zip("ab", PROMPTS, strict=False):
            engine.add_request(prompt, LIVELY, name)
        for _ in range(3):
            engine.step()
        engine.abort_request("a")
        [output] = engine.step()
        assert (output.request_id, output.outputs[0].finish_reason) == ("a", "abort")
        assert len(output.outputs[0].token_ids) == 2
        seen = []
        while engine.has_unfinished_requests():
            seen += [(one.request_id, one.finished) for one in engine.step()]
        assert seen == [("b", False)] * 5 + [("b", True)]
        assert_idle(engine)
        assert not caplog.records  # "b" did not begin again

    def test_news_of_a_request_that_is_gone_are_not_its_successors(
        self, engine: LLMEngine
    ) -> None:
        """A late update of the first "x", when a second one has its id."""
        config = EngineConfig(device="cpu")
        table, inbox = RequestTable(FCFSScheduler(config, 10)), Inbox(every_token=True)
        old, new = (
            engine.processor.process_request("The fox", GREEDY, "x") for _ in range(2)
        )
        table.add([old], inbox)
        table.abort("x")
        assert [one.finished for one in table.collect(inbox)] == [True]
        table.add([new], inbox)
        table.update(old[0])
        assert list(table.unfinished.values()) == new and not inbox.updated

    def test_stale_contents_of_the_cache_never_matter(
        self, fresh: LLMEngine, right: list[list[int]]
    ) -> None:
        for fill in (float("nan"), 1e30):
            for pair in fresh.executor.worker.runner.kv_caches:
                for cache in pair:
                    cache.fill_(fill)
            assert ids_of(fresh, PROMPTS, LIVELY) == right


class TestNaN:
    """Weights that float32 can take and float16 cannot."""

    @pytest.fixture
    def overflowing(self) -> Iterator[LLMEngine]:
        engine = LLMEngine(FOLDER, dtype="float16", device="cpu", use_tqdm=False)
        projection = engine.executor.worker.runner.model.model.layers[0].mlp.down_proj
        before = projection.weight.clone()
        projection.weight.mul_(3e4)
        yield engine
        projection.weight.copy_(before)
        assert ids_of(engine, "The fox", GREEDY)  # nothing is left of it in the cache
        assert_idle(engine)

    @pytest.mark.parametrize(
        "params",
        [GREEDY, LIVELY, SamplingParams(top_k=3, top_p=0.5, seed=1, logprobs=2)],
        ids=["greedy", "penalties", "filters and logprobs"],
    )
    def test_ends_with_an_error_that_says_what_to_do(
        self, overflowing: LLMEngine, params: SamplingParams
    ) -> None:
        for output in run(overflowing, PROMPTS, params):
            sample = output.outputs[0]
            assert (sample.finish_reason, sample.token_ids) == ("error", [])
            assert "NaN" in str(output.error) and "float16" in str(output.error)
            assert "'bfloat16' or 'float32'" in str(output.error)

    def test_in_float32_it_is_a_text(self) -> None:
        engine = LLMEngine(FOLDER, dtype="float32", device="cpu", use_tqdm=False)
        layers = engine.executor.worker.runner.model.model.layers
        layers[0].mlp.down_proj.weight.mul_(3e4)
        [output] = run(engine, "The fox", GREEDY)
        assert output.error is None and len(output.outputs[0].token_ids) == 8

    def test_neighbours_go_on(
        self, fresh: LLMEngine, monkeypatch: pytest.MonkeyPatch, right: list[list[int]]
    ) -> None:
        """All three in every step; the row of the second is spoiled in the fourth."""
        model = fresh.executor.worker.runner.model
        original, calls = model.compute_logits, 0

        def spoiled(hidden_states: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            logits = original(hidden_states)
            if calls == 4:
                logits[1, 7] = float("nan")
            return logits

        monkeypatch.setattr(model, "compute_logits", spoiled)
        outputs = run(fresh, PROMPTS, LIVELY)
        assert [out.outputs[0].token_ids for out in outputs] == [
            right[0],
            right[1][:3],
            right[2],
        ]
        reasons = [out.outputs[0].finish_reason for out in outputs]
        assert reasons == ["length", "error", "length"]
        assert_idle(fresh)


@pytest.fixture(scope="module")
def small() -> LLMEngine:
    return make(max_model_len=256)


@pytest.fixture(scope="module")
def ahead() -> LLMEngine:
    """The host a step ahead."""
    return make(max_model_len=256, async_scheduling=True)


ROUNDS = 200 if IS_SOAK else 50


class TestThreads:
    """Several callers at once; each must get what it gets alone."""

    params = (
        SamplingParams(temperature=0, max_tokens=40, seed=0),
        SamplingParams(temperature=0.9, seed=4, max_tokens=40, repetition_penalty=1.2),
        SamplingParams(seed=9, max_tokens=30, top_p=0.8, stop="the", min_tokens=3),
        SamplingParams(
            temperature=0, max_tokens=25, seed=0, presence_penalty=0.7, logprobs=2
        ),
    )
    prompts = ("The fox", "One day a kite", "Tom saw", "Once upon a time there was")

    def generated(self, engine: LLMEngine, i: int) -> Any:
        return run(engine, [self.prompts[i]], self.params[i])[0].outputs

    def streamed(self, engine: LLMEngine, i: int) -> Any:
        *_, last = engine.stream(self.prompts[i], self.params[i])
        return last.outputs

    def by_hand(self, engine: LLMEngine, i: int) -> Any:
        name = engine.add_request(self.prompts[i], self.params[i])
        while True:
            for output in engine.step():
                if output.request_id == name and output.finished:
                    return output.outputs

    @pytest.mark.parametrize(
        "rounds", [8, pytest.param(ROUNDS, marks=pytest.mark.more)]
    )
    @pytest.mark.parametrize("callers", [2, 4])
    def test_generate(self, small: LLMEngine, callers: int, rounds: int) -> None:
        alone = [self.generated(small, i) for i in range(4)]
        with ThreadPoolExecutor(callers) as pool:
            for turn in range(rounds):
                who = [(turn + i) % 4 for i in range(callers)]
                got = pool.map(lambda i: self.generated(small, i), who)
                for i, [ours] in zip(who, got, strict=True):
                    assert_same_sample(ours, alone[i][0])
        assert_idle(small)

    @pytest.mark.parametrize("name", ["small", "ahead"])
    def test_every_way_to_ask(
        self, small: LLMEngine, name: str, request: pytest.FixtureRequest
    ) -> None:
        engine: LLMEngine = request.getfixturevalue(name)
        ways = [self.generated, self.streamed, self.by_hand, self.generated]
        alone = [way(small, i) for i, way in enumerate(ways)]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(8):
                got = list(pool.map(lambda i: ways[i](engine, i), range(4)))
                for [ours], [theirs] in zip(got, alone, strict=True):
                    assert_same_sample(ours, theirs)
        assert_idle(engine)

    def test_asyncio(self, small: LLMEngine) -> None:
        alone = [self.generated(small, i) for i in range(2)]

        async def both() -> list[Any]:
            tasks = (asyncio.to_thread(self.generated, small, i) for i in range(2))
            return await asyncio.gather(*tasks)

        for _ in range(8):
            assert asyncio.run(both()) == alone

    def test_a_stream_held_open_blocks_nobody(self, small: LLMEngine) -> None:
        alone = [self.generated(small, 1), self.generated(small, 0)]
        stream = small.stream(self.prompts[0], self.params[0])
        outputs = [next(stream)]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(self.generated, small, 1).result(60) == alone[0]
        outputs += stream
        assert outputs[-1].outputs == alone[1]
        assert outputs[-1].finished and len(outputs) == 2  # the rest came at once
        assert_idle(small)

    def test_they_take_turns(
        self, small: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While both wait for their prompts, both run steps."""
        stepping: list[int] = []
        original = small.executor.launch

        def noting(plan: StepPlan) -> Any:
            stepping.append(threading.get_ident())
            return original(plan)

        monkeypatch.setattr(small.executor, "launch", noting)
        start = threading.Barrier(2)

        def long(prompt: str) -> None:
            start.wait()
            run(small, prompt, SamplingParams(max_tokens=60, ignore_eos=True))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(long, ["The fox", "One day"]))
        shares = [stepping[5:55].count(thread) for thread in set(stepping)]
        assert len(shares) == 2 and min(shares) > 10

    def test_all_ways_to_ask_share_the_steps(
        self, small: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two threads that generate, a stream and steps by hand: 40 tokens each."""
        batches: list[int] = []
        original = small.executor.launch

        def noting(plan: StepPlan) -> Any:
            batches.append(len(plan.scheduled))
            return original(plan)

        monkeypatch.setattr(small.executor, "launch", noting)
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        stream = small.stream("The fox", params)  # queued when it is first asked
        small.add_request("A kite", params, "by hand")
        next(stream)
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(run, small, t, params) for t in ("Tom", "One day")]
            while small.stats().num_running < 4 and not waiting[0].done():
                next(stream, None)
            for future in waiting:
                future.result(60)
        *_, last = stream
        while small.has_unfinished_requests():
            outputs = small.step()
        assert last.finished and outputs[0].finished
        assert sum(batches) == 4 * 40
        assert batches.count(4) > 20  # all four in one step, most of the time
        assert len(batches) < 2 * 40  # and not one after the other
        assert_idle(small)

    def test_errors_and_aborts_of_one_leave_the_others(
        self, small: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = self.generated(small, 1)

        def annoying() -> None:
            for turn in range(12):
                if turn % 3 == 0:
                    with pytest.raises(ValueError, match="empty"):
                        run(small, "")
                elif turn % 3 == 1:
                    stream = small.stream("A kite", GREEDY)
                    next(stream)
                    stream.close()
                else:
                    name = small.add_request("A kite", GREEDY)
                    small.abort_request(name)
                    assert small.step()[0].outputs[0].finish_reason == "abort"

        with ThreadPoolExecutor(2) as pool:
            noise = pool.submit(annoying)
            for _ in range(6):
                assert self.generated(small, 1) == alone
            noise.result(60)
        assert_idle(small)

    def test_tokenizing_in_several_threads(self, small: LLMEngine) -> None:
        texts = [f"{word} " * 50 for word in ("fox", "kite", "moon", "lake")]
        right = [small.processor.process_request(t)[0].prompt_token_ids for t in texts]

        def tokenize(i: int) -> Any:
            return small.processor.process_request(texts[i % 4])[0].prompt_token_ids

        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(tokenize, range(200)))
        assert got == right * 50


class TestMetrics:
    def test_times_add_up(self, fcfs: LLMEngine) -> None:
        first, second = run(fcfs, ["The fox", "One day"], GREEDY)
        for output in (first, second):
            metrics = output.metrics
            assert metrics.ttft == pytest.approx(
                metrics.queue_time + metrics.prefill_time
            )
            decode = metrics.last_token_time - metrics.first_token_time
            assert metrics.tpot == pytest.approx(decode / 7)
            assert metrics.total_time == pytest.approx(metrics.ttft + decode, rel=0.2)
            assert metrics.throughput == pytest.approx(8 / metrics.total_time)
            assert metrics.peak_memory is None
        assert second.metrics.queue_time > first.metrics.total_time * 0.9

    def test_one_token_has_no_time_between_tokens(self, engine: LLMEngine) -> None:
        [output] = run(engine, "The fox", SamplingParams(max_tokens=1))
        assert output.metrics.tpot == 0


class TestLogprobs:
    def test_are_those_of_the_raw_logits(self, engine: LLMEngine) -> None:
        model = engine.executor.worker.runner.model
        params = SamplingParams(
            temperature=0.5,
            top_k=3,
            repetition_penalty=1.5,
            seed=1,
            max_tokens=6,
            logprobs=2,
        )
        [output] = run(engine, "The fox", params)
        sample, total = output.outputs[0], 0.0
        ids = output.prompt_token_ids + sample.token_ids
        exact = model.compute_logits(model(torch.tensor(ids))).log_softmax(-1)
        rows = exact[len(output.prompt_token_ids) - 1 :]
        for token, entry, row in zip(
            sample.token_ids, sample.logprobs, rows, strict=False
        ):
            assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert entry[token].rank == 1 + (row > row[token]).sum()
            assert set(entry) == {token, *row.topk(2).indices.tolist()}
            assert engine.tokenizer is not None
            assert entry[token].decoded_token == engine.tokenizer.decode(token)
            total += row[token].item()
        assert sample.cumulative_logprob == pytest.approx(total, abs=1e-3)


class TestMaking:
    def test_nothing_named_takes_the_bundled_or_the_environments(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("FOLO_MODEL", raising=False)
        right = ids_of(LLMEngine(use_tqdm=False), "The fox", GREEDY)
        copy = shutil.copytree(FOLDER, tmp_path / "copy")
        monkeypatch.setenv("FOLO_MODEL", str(copy))
        assert ids_of(LLMEngine(use_tqdm=False), "The fox", GREEDY) == right
        monkeypatch.setenv("FOLO_MODEL", str(tmp_path / "missing"))
        with pytest.raises((FileNotFoundError, ConnectionError, ValueError)):
            LLMEngine(use_tqdm=False)

    def test_a_loaded_model_with_its_own_tokenizer(self, engine: LLMEngine) -> None:
        model = load_model(FOLDER, use_tqdm=False)
        config = load_generation_config(FOLDER)
        own = LLMEngine(model, engine.tokenizer, config)
        assert text_of(own, "The fox", GREEDY) == text_of(engine, "The fox", GREEDY)
        assert own.executor.worker.runner.model is model

    def test_without_a_tokenizer_it_takes_and_gives_ids(
        self, engine: LLMEngine
    ) -> None:
        own = LLMEngine(load_model(FOLDER, use_tqdm=False))
        [output] = run(own, [[488, 1381]], GREEDY)
        assert output.outputs[0].text == ""
        assert [output.outputs[0].token_ids] == ids_of(engine, [[488, 1381]], GREEDY)
        with pytest.raises(ValueError, match="no tokenizer"):
            run(own, "The fox", GREEDY)
        with pytest.raises(ValueError, match="no chat template"):
            own.chat(TestChat.question)

    def test_a_checkpoint_without_generation_config(self, tmp_path: Path) -> None:
        copy = shutil.copytree(FOLDER, tmp_path / "copy")
        (copy / "generation_config.json").unlink()
        engine = LLMEngine(copy, use_tqdm=False)
        assert engine.processor.default_params == SamplingParams()
        assert IM_END in engine.processor.eos_token_ids

    @pytest.mark.parametrize(
        ("missing", "error"),
        [
            ("config.json", FileNotFoundError),
            ("tokenizer.json", FileNotFoundError),
            ("model.safetensors", FileNotFoundError),
        ],
    )
    def test_an_incomplete_folder(
        self, tmp_path: Path, missing: str, error: type[Exception]
    ) -> None:
        copy = shutil.copytree(FOLDER, tmp_path / "copy")
        (copy / missing).unlink()
        with pytest.raises(error):
            LLMEngine(copy, use_tqdm=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": "int8"}, "unknown dtype 'int8'"),
            ({"device": "tpu"}, "tpu"),
            ({"attention_backend": "flash"}, "unknown attention backend 'flash'"),
            ({"decode": "fast"}, "unknown decode 'fast'"),
        ],
    )
    def test_options_are_judged_before_the_checkpoint_is_looked_for(
        self, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            LLMEngine("nobody/nothing", **options)

    @pytest.mark.parametrize(
        ("length", "message"), [(0, "at least 1"), (-1, "at least 1"), (4097, "4096")]
    )
    def test_max_model_len(self, length: int, message: str) -> None:
        with pytest.raises(ValueError, match=rf"max_model_len={length} .*{message}"):
            LLMEngine(FOLDER, max_model_len=length, use_tqdm=False)

    def test_yarn_reaches_original_times_factor(self) -> None:
        """Qwen's recipe: `max_position_embeddings` stays what it was."""
        rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
        rope["original_max_position_embeddings"] = 64
        config = make_config("qwen3 4/1")
        config.max_position_embeddings, config.rope_parameters = 64, rope
        model = make_reference(config)
        engine = LLMEngine(load(config, model, "torch_sdpa"), max_model_len=256)
        prompt = [random.Random(0).randrange(config.vocab_size) for _ in range(226)]
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        [ours] = ids_of(engine, [prompt], params)
        options = {"max_new_tokens": 30, "eos_token_id": None}
        assert_equals_generate(ours, model, prompt, **options)
        assert LLMEngine(load(config, model, "torch_sdpa")).max_model_len == 256
        with pytest.raises(ValueError, match=r"max_model_len=257.*256"):
            LLMEngine(load(config, model, "torch_sdpa"), max_model_len=257)

    def test_bfloat16(self) -> None:
        engine = LLMEngine(FOLDER, dtype="bfloat16", device="cpu", use_tqdm=False)
        assert engine.executor.worker.runner.kv_caches[0][0].dtype == torch.bfloat16
        assert len(text_of(engine, "Once upon a time", GREEDY)) > 10

    def test_eos_token_ids(self) -> None:
        def named(ids: Any) -> Any:
            return GenerationConfig(eos_token_id=ids)

        assert get_eos_token_ids(named([5, 6]), named(7)) == [5, 6]
        assert get_eos_token_ids(None, named(None), named(7)) == [7]
        assert get_eos_token_ids(None) == []
        assert get_eos_token_ids(load_generation_config(FOLDER)) == [
            IM_END,
            END_OF_TEXT,
        ]


class Chunks(FCFSScheduler):
    """Reads prompts seven tokens at a time."""

    def schedule(self) -> StepPlan:
        plan = super().schedule()
        if not plan.scheduled:
            return plan
        [one], request = plan.scheduled, self.running
        assert request is not None
        size = min(one.num_tokens, 7)
        request.num_computed_tokens -= one.num_tokens - size
        return dataclasses.replace(
            plan, scheduled=[dataclasses.replace(one, num_tokens=size)]
        )


class Together(FCFSScheduler):
    """Everybody in every step, each with blocks of its own, in disorder."""

    def __init__(self, config: EngineConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        self.all: list[Request] = []
        self.rng = random.Random(0)

    def choose(self) -> list[Request]:
        return self.all

    def move(self, request: Request) -> None:
        """It is preempted, and comes back at once, in other blocks."""
        self.finished_ids.append(request.sample_id)
        old = request.block_ids
        self.begin(request)
        self.allocator.free(old)

    def begin(self, request: Request) -> None:
        length = len(request.prompt_token_ids) + request.max_tokens
        request.block_ids = self.allocator.allocate(length)
        self.rng.shuffle(request.block_ids)
        request.num_computed_tokens = 0
        request.start()
        self.new[request.sample_id] = describe_request(request)
        self.untold[request.sample_id] = request.block_ids

    def schedule(self) -> StepPlan:
        self.new: dict[str, Any] = {}
        self.untold: dict[str, list[int]] = getattr(self, "untold", {})
        while self.waiting:
            self.all.append(self.waiting.popleft())
            self.begin(self.all[-1])
        scheduled = []
        for request in self.choose():
            num_tokens = request.num_uncomputed_tokens
            if num_tokens == 0:
                continue
            request.num_computed_tokens += num_tokens
            blocks = self.untold.pop(request.sample_id, [])
            scheduled.append(ScheduledRequest(request.sample_id, num_tokens, blocks))
        finished_ids, self.finished_ids = self.finished_ids, []
        return StepPlan(scheduled, list(self.new.values()), finished_ids)

    def finish(self, request: Request) -> None:
        if request in self.all:
            self.all.remove(request)
            self.finished_ids.append(request.sample_id)
        super().finish(request)

    def reset(self, requests: Any) -> None:
        super().reset(requests)
        self.all, self.untold = [], {}


class SitOut(Together):
    """Some of them in each step, chosen at random; at times one starts over elsewhere."""

    def choose(self) -> list[Request]:
        if not self.all:
            return []
        if self.rng.random() < 0.2:
            self.move(self.rng.choice(self.all))
        return self.rng.sample(self.all, self.rng.randint(1, len(self.all)))


class Alternate(Together):
    """One in each step, in turn."""

    def choose(self) -> list[Request]:
        self.all.append(self.all.pop(0))
        return self.all[-1:]


class Moves(Together):
    """Before every third step all move to as many other blocks."""

    num_steps = 0

    def choose(self) -> list[Request]:
        self.num_steps += 1
        if self.num_steps % 3 == 0:
            for request in self.all:
                self.move(request)
        return self.all


class AfterSix(Together):
    """The first request writes six tokens; then another runs a step; then it goes on."""

    def choose(self) -> list[Request]:
        first = self.all[0]
        others = self.all[1:] if len(first.output_token_ids) == 6 else []
        return others or [first]


class TestScheduler:
    @run_ahead
    def test_a_prompt_may_be_read_in_chunks(
        self, engine: LLMEngine, run_ahead: bool
    ) -> None:
        chunked = make(scheduler=Chunks, async_scheduling=run_ahead)
        prompts = [[5 + i] * n for i, n in enumerate((3, 7, 8, 40))]
        for params in (GREEDY, LIVELY):
            assert ids_of(chunked, prompts, params) == ids_of(engine, prompts, params)
        assert_idle(chunked)

    def test_penalties_outlive_a_step_of_somebody_else(self) -> None:
        engine = LLMEngine(FOLDER, device="cpu", scheduler=AfterSix, use_tqdm=False)
        one = SamplingParams(temperature=0, max_tokens=1)
        first, _ = ids_of(engine, [[5, 6, 7], [9]], [STRICT, one])
        assert first[6:] == [688, 340, 1530, 13, 2045, 583]

    @run_ahead
    @pytest.mark.parametrize("scheduler", [Together, SitOut, Alternate, Moves])
    def test_company_changes_nothing(
        self, engine: LLMEngine, scheduler: type[Together], run_ahead: bool
    ) -> None:
        """Penalties, seeds, minimum lengths: as alone, whoever runs in a step."""
        prompts = [[5 + i] * n for i, n in enumerate((3, 17, 1, 40, 8))]
        params = [
            SamplingParams(temperature=0, max_tokens=30, presence_penalty=1.5),
            SamplingParams(seed=1, max_tokens=25, frequency_penalty=1.0, logprobs=1),
            SamplingParams(seed=2, max_tokens=40, repetition_penalty=1.5),
            SamplingParams(temperature=0, max_tokens=20, min_tokens=20),
            SamplingParams(seed=3, max_tokens=35, top_k=5, frequency_penalty=0.3),
        ]
        own = make(scheduler=scheduler, async_scheduling=run_ahead)
        for _ in range(3):
            assert ids_of(own, prompts, params) == ids_of(engine, prompts, params)
        assert not own.has_unfinished_requests()

    @run_ahead
    def test_a_request_that_moved_reads_its_new_blocks(
        self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, run_ahead: bool
    ) -> None:
        """Same ids, as many blocks, but others: what it left behind becomes NaN."""
        prompts = [[5 + i] * n for i, n in enumerate((20, 33))]
        own = make(scheduler=Moves, async_scheduling=run_ahead)
        original, caches = own.executor.launch, own.executor.worker.runner.kv_caches

        def spoiling(plan: StepPlan) -> Any:
            taken = {i for r in own._table.unfinished.values() for i in r.block_ids}
            free = [i for i in range(40) if i not in taken]
            for pair in caches:
                for cache in pair:
                    cache[free] = float("nan")
            return original(plan)

        monkeypatch.setattr(own.executor, "launch", spoiling)
        assert ids_of(own, prompts, LIVELY) == ids_of(engine, prompts, LIVELY)

    def test_blocks_for_all_that_may_be_written(self, engine: LLMEngine) -> None:
        scheduler = FCFSScheduler(EngineConfig(device="cpu", block_size=16), 10)
        params = SamplingParams(max_tokens=20)
        [one] = engine.processor.process_request([5] * 40, params)
        [two] = engine.processor.process_request([5], params)
        scheduler.add(one)
        scheduler.add(two)
        plan = scheduler.schedule()
        blocks = [0, 1, 2, 3]  # 60 tokens
        assert plan.scheduled == [ScheduledRequest(one.sample_id, 40, blocks)]
        assert plan.new_requests == [
            dataclasses.replace(describe_request(one), num_computed_tokens=0)
        ]
        one.append_token(SampledToken(7))
        assert scheduler.schedule() == StepPlan(
            [ScheduledRequest(one.sample_id, 1, [])], [], []
        )
        assert scheduler.get_stats().num_used_blocks == 4
        scheduler.finish(two)  # while it waits
        scheduler.finish(one)
        scheduler.finish(one)
        stats = scheduler.get_stats()
        assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0,) * 3
        assert scheduler.schedule() == StepPlan([], [], [one.sample_id])
        assert scheduler.schedule() == StepPlan([], [], [])

    def test_reset_queues_anew(self, engine: LLMEngine) -> None:
        scheduler = FCFSScheduler(EngineConfig(device="cpu"), 10)
        one, two = (engine.processor.process_request([5], GREEDY)[0] for _ in range(2))
        scheduler.add(one)
        scheduler.add(two)
        scheduler.schedule()
        one.append_token(SampledToken(7))
        scheduler.reset([one, two])
        assert (one.status.name, two.status.name) == ("PREEMPTED", "WAITING")
        stats = scheduler.get_stats()
        assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (
            0,
            0,
            2,
        )
        plan = scheduler.schedule()
        assert plan.finished_ids == []  # the runner has forgotten all by itself
        [new], [scheduled] = plan.new_requests, plan.scheduled
        assert (new.token_ids, new.num_prompt_tokens) == ([5, 7], 1)
        assert (scheduled.request_id, scheduled.num_tokens) == (one.sample_id, 2)

    def test_tokenizer_type(self, engine: LLMEngine) -> None:
        assert isinstance(engine.tokenizer, PreTrainedTokenizerBase)
