"""What users pass: prompts, params, messages and generation configs, and what is said of each."""

from __future__ import annotations

import time
import uuid
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from folo_lib import bundled_model_path, load_tokenizer
from folo_lib.inputs import InputProcessor, default_sampling_params
from folo_lib.runner import SampledToken
from folo_lib.sampling_params import SamplingParams

V = 2048
EOS, EOS_2 = 2045, 2043


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(bundled_model_path())


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text).input_ids
    return ids


def processor(**kwargs: Any) -> InputProcessor:
    return InputProcessor(tokenizer(), V, 64, (EOS, EOS_2), **kwargs)


class TestProcessRequest:
    def test_text(self) -> None:
        [request] = processor().process_request("Hello 🙂")
        assert request.prompt == "Hello 🙂"
        assert request.prompt_token_ids == encode("Hello 🙂")
        assert request.params == SamplingParams()
        assert (request.eos_token_id, request.eos_token_ids) == (EOS, (EOS, EOS_2))
        assert request.output_token_ids == request.block_ids == []
        assert request.num_computed_tokens == 0

    @pytest.mark.parametrize(
        "ids",
        [
            [5, 6, 7],
            (5, 6, 7),
            range(5, 8),
            torch.tensor([5, 6, 7]),
            np.array([5, 6, 7], dtype=np.uint16),
            [np.int32(5), np.int64(6), 7],
        ],
        ids=lambda ids: type(ids).__name__,
    )
    def test_token_ids_of_all_kinds(self, ids: Any) -> None:
        [request] = processor().process_request(ids)
        assert request.prompt is None
        assert request.prompt_token_ids == [5, 6, 7]
        assert {type(i) for i in request.prompt_token_ids} == {int}
        [[same]] = processor().process_requests(ids)
        assert same.prompt_token_ids == [5, 6, 7]

    def test_a_chat_template_has_its_special_tokens(self) -> None:
        seen: list[bool] = []

        class Spy:
            def __getattr__(self, name: str) -> Any:
                return getattr(tokenizer(), name)

            def __call__(self, text: str, add_special_tokens: bool) -> Any:
                seen.append(add_special_tokens)
                return tokenizer()(text)

        spied = InputProcessor(Spy(), V, 64)  # type: ignore[arg-type]
        spied.process_request("hi")
        spied.process_requests(["hi"])
        spied.process_chat([{"role": "user", "content": "hi"}])
        assert seen == [True, True, False]

    def test_ids_are_uuids_unless_given(self) -> None:
        made = processor().process_requests(["a", "b"], SamplingParams(n=2))
        names = [request.request_id for group in made for request in group]
        assert names[0] == names[1] != names[2] == names[3]
        assert uuid.UUID(names[0]).version == 4
        assert len({request.sample_id for group in made for request in group}) == 4
        [request] = processor().process_request("a", request_id="mine")
        assert request.request_id == "mine"

    def test_samples_share_a_seed_and_differ_in_index_and_text(self) -> None:
        one, two = processor().process_request("hi", SamplingParams(n=2))
        assert (one.index, two.index) == (0, 1)
        assert one.seed == two.seed
        one.append_token(SampledToken(5))
        assert two.output_token_ids == []
        assert two.text == ""
        assert one.metrics is not two.metrics

    def test_seeds(self) -> None:
        def seeds(seed: int) -> list[int]:
            made = processor(seed=seed).process_requests(["a", "b"])
            return [group[0].seed for group in made]

        assert seeds(1) == seeds(1)
        assert len({*seeds(1), *seeds(2)}) == 4
        assert all(0 <= seed < 2**63 for seed in seeds(3))
        for seed in (0, -5, 2**64 - 1):
            [request] = processor().process_request("a", SamplingParams(seed=seed))
            assert request.seed == seed

    def test_a_call_that_fails_does_not_change_the_seeds_of_the_next(self) -> None:
        one, two = processor(), processor()
        with pytest.raises(ValueError):
            two.process_requests(["good", "good", ""])
        assert one.process_request("a")[0].seed == two.process_request("a")[0].seed

    def test_max_tokens_is_capped_by_the_room(self) -> None:
        for asked, left in [(None, 61), (61, 61), (62, 61), (1, 1), (16, 16)]:
            [request] = processor().process_request(
                [1, 2, 3], SamplingParams(max_tokens=asked)
            )
            assert request.max_tokens == left
        [request] = processor().process_request([1] * 63)
        assert request.max_tokens == 1

    def test_default_params(self) -> None:
        default = SamplingParams(temperature=0.3)
        own = SamplingParams(temperature=0.9)
        made = processor(default_params=default)
        assert made.process_request("a")[0].params == default
        assert made.process_request("a", own)[0].params == own
        groups = made.process_requests(["a", "b"], [own, None])  # type: ignore[list-item]
        assert [group[0].params for group in groups] == [own, default]

    def test_arrival_is_before_the_tokenizer_runs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = processor()
        events: list[str] = []
        monkeypatch.setattr(
            time, "perf_counter", lambda: float(events.append("clock") or 3)
        )
        monkeypatch.setattr(
            made, "encode", lambda *args: events.append("encode") or [1, 2]
        )
        assert made.process_request("a")[0].metrics.arrival_time == 3.0
        assert made.process_requests(["a"])[0][0].metrics.arrival_time == 3.0
        assert events == ["clock", "encode"] * 2
        assert (
            made.process_request("a", arrival_time=0.0)[0].metrics.arrival_time == 0.0
        )

    def test_several_prompts(self) -> None:
        made = processor()
        assert made.process_requests([]) == []
        assert [g[0].prompt for g in made.process_requests("ab")] == ["ab"]
        assert [g[0].prompt for g in made.process_requests(("a", "b"))] == ["a", "b"]
        groups = made.process_requests([[5, 6], "a", torch.tensor([7])])
        ids = [group[0].prompt_token_ids for group in groups]
        assert ids == [[5, 6], encode("a"), [7]]
        params = [SamplingParams(seed=i) for i in range(2)]
        groups = made.process_requests(["a", "b"], params)
        assert [group[0].params for group in groups] == params


class TestErrors:
    """Each names the value, the limit and the cure."""

    @pytest.mark.parametrize(
        ("prompt", "kind", "message"),
        [
            ("", ValueError, "empty"),
            ([], ValueError, "empty"),
            (torch.tensor([], dtype=torch.long), ValueError, "empty"),
            ([1] * 64, ValueError, r"64 tokens.*max_model_len=64.*at most 63.*shorten"),
            ([1] * 99, ValueError, r"99 tokens.*max_model_len=64.*at most 63.*raise"),
            ("a b " * 64, ValueError, r"tokens.*max_model_len=64 at most 63"),
            ([5, V], ValueError, r"id 2048 at position 1.*0 to 2047.*tokenizer\?"),
            ([-1], ValueError, r"id -1 at position 0.*0 to 2047"),
            (torch.tensor([[5, 6]]), ValueError, r"shape \[1, 2\].*\[S\].*padding"),
            (torch.tensor(5), ValueError, r"shape \[\].*\[S\]"),
            (np.zeros((2, 2), dtype=int), ValueError, r"shape \[2, 2\]"),
            (torch.tensor([5.0]), TypeError, r"5\.0 at position 0.*ints"),
            (torch.tensor([True]), TypeError, r"True at position 0"),
            ([5, True], TypeError, r"True at position 1.*ints"),
            ([5, 6.0], TypeError, r"6\.0 at position 1.*ints"),
            ([5, "a"], TypeError, r"'a' at position 1"),
            ([5, None], TypeError, r"None at position 1"),
            (["a", "b"], TypeError, r"'a' at position 0"),
            ([[5, 6]], TypeError, r"\[5, 6\] at position 0"),
            (None, TypeError, r"is a NoneType.*str or a sequence of token ids"),
            (5, TypeError, r"is a int"),
            (b"hi", TypeError, r"is a bytes.*Decode bytes"),
            (bytearray(b"hi"), TypeError, r"is a bytearray"),
            ({"input_ids": [5]}, TypeError, r"is a dict.*\.input_ids"),
            ({5, 6}, TypeError, r"is a set"),
            (iter([5]), TypeError, r"is a list_iterator"),
            ("a\ud83d", ValueError, r"'\\ud83d' at position 1.*surrogate"),
        ],
    )
    def test_prompts(self, prompt: Any, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message) as caught:
            processor().process_request(prompt)
        assert caught.type is kind
        with pytest.raises(kind, match=r"^prompts\[1\]: .*" + message) as caught:
            processor().process_requests(["good", prompt])
        assert caught.type is kind

    def test_what_a_tokenizer_returns(self) -> None:
        with pytest.raises(TypeError, match=r"BatchEncoding.*\.input_ids"):
            processor().process_request(tokenizer()("hi"))

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"stop_token_ids": [3, V]}, r"stop_token_ids holds 2048.*0 to 2047"),
            ({"logprobs": V + 1}, r"logprobs=2049.*2048.*-1 asks for all"),
            (
                {"min_tokens": 62, "max_tokens": 99},
                r"min_tokens=62.*3 of max_model_len=64.*most 61.*raise",
            ),
            ({"min_tokens": 62, "max_tokens": None}, r"min_tokens=62"),
        ],
    )
    def test_params(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            processor().process_request([1, 2, 3], SamplingParams(**params))

    def test_params_at_the_limit(self) -> None:
        for kwargs in (
            {"stop_token_ids": [V - 1]},
            {"logprobs": V},
            {"logprobs": -1},
            {"min_tokens": 61, "max_tokens": None},
        ):
            processor().process_request([1, 2, 3], SamplingParams(**kwargs))  # type: ignore[arg-type]

    def test_params_of_another_kind(self) -> None:
        for wrong in ({}, {"temperature": 0}, "greedy", GenerationConfig()):
            with pytest.raises(TypeError, match="not SamplingParams"):
                processor().process_request("a", wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"prompts\[1\].*not SamplingParams"):
            processor().process_requests(["a", "b"], [SamplingParams(), 5])  # type: ignore[list-item]

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_one_for_each_prompt(self, number: int) -> None:
        message = rf"{number} sampling params and 2 prompts.*one for each"
        with pytest.raises(ValueError, match=message):
            processor().process_requests(["a", "b"], [SamplingParams()] * number)

    def test_without_a_tokenizer(self) -> None:
        bare = InputProcessor(None, V, 64)
        with pytest.raises(ValueError, match=r"'hi' is text.*no tokenizer.*token ids"):
            bare.process_request("hi")
        with pytest.raises(ValueError, match=r"stop=\('a',\).*stop_token_ids"):
            bare.process_request([1], SamplingParams(stop="a"))


class TestDefaultParams:
    def test_of_the_bundled_model(self) -> None:
        config = GenerationConfig.from_pretrained(bundled_model_path())
        expected = SamplingParams(temperature=0.7, top_k=20, top_p=0.95)
        assert default_sampling_params(config) == expected

    def test_without_a_config(self) -> None:
        assert default_sampling_params(None) == SamplingParams()

    def test_greedy_unless_it_samples(self) -> None:
        config = GenerationConfig(temperature=0.7, repetition_penalty=1.2)
        expected = SamplingParams(temperature=0, repetition_penalty=1.2)
        assert default_sampling_params(config) == expected

    def test_what_is_not_named_is_what_generate_takes(self) -> None:
        config = GenerationConfig(do_sample=True, min_p=0.1, max_new_tokens=7)
        ours = default_sampling_params(config)
        theirs = GenerationConfig._get_default_generation_params()
        for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
            assert getattr(ours, name) == theirs[name]
        assert (ours.min_p, ours.max_tokens) == (0.1, 7)

    def test_top_k_off(self) -> None:
        config = GenerationConfig(do_sample=True, top_k=0)
        assert default_sampling_params(config).top_k == 0
