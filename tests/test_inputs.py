"""What users pass: prompts, params, messages and generation configs, and what is said of each."""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from folo_lib import bundled_model_path, load_tokenizer
from folo_lib.inputs import (
    DefaultParams,
    InputProcessor,
    default_sampling_params,
    get_eos_token_ids,
    load_generation_config,
    read_variables,
)
from folo_lib.runner import SampledToken
from folo_lib.sampler import Sampler, SamplingMetadata
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
        assert not {*seeds(5)} & {*seeds(-5)}
        assert seeds(-5) == seeds(-5)
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
            (
                {"input_ids": [5]},
                TypeError,
                r"is a dict.*'prompt_token_ids'.*\.input_ids",
            ),
            ({"prompt_embeds": [[0.5]]}, TypeError, "embeddings are not taken"),
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


HELLO = {"role": "user", "content": "Hello"}


def chat_text(messages: Any, /, **options: Any) -> str:
    [[request]] = processor().process_chat(
        messages, SamplingParams(max_tokens=1), options
    )
    assert request.prompt is not None
    return request.prompt


def processor_with(template: Any, **kwargs: Any) -> InputProcessor:
    own = copy.deepcopy(tokenizer())
    own.chat_template = template
    return InputProcessor(own, V, 512, **kwargs)


class TestShapesOfPrompts:
    """What is obvious is done; of the rest each is told what to pass."""

    @pytest.mark.parametrize(
        "prompts",
        [
            np.array(["a", "bc"]),
            np.array(["a", "bc"], dtype=object),
            (p for p in ["a", "bc"]),
            map(str, ["a", "bc"]),
            deque(["a", "bc"]),
            pytest.param("series", id="pandas"),
        ],
    )
    def test_collections_of_texts(self, prompts: Any) -> None:
        if isinstance(prompts, str):
            prompts = pytest.importorskip("pandas").Series(["a", "bc"], index=[7, 3])
        groups = processor().process_requests(prompts)
        assert [group[0].prompt for group in groups] == ["a", "bc"]

    @pytest.mark.parametrize(
        ("prompt", "ids", "text"),
        [
            ({"prompt": "hi"}, encode("hi"), "hi"),
            ({"prompt_token_ids": [5, 6]}, [5, 6], None),
            ({"prompt_token_ids": torch.tensor([5, 6])}, [5, 6], None),
            ({"prompt": "hi", "prompt_token_ids": [5, 6]}, [5, 6], "hi"),
            ({"prompt": "hi", "prompt_token_ids": None}, encode("hi"), "hi"),
            ({"prompt": "hi", "multi_modal_data": None}, encode("hi"), "hi"),
        ],
    )
    def test_the_dicts_of_vllm(
        self, prompt: dict[str, Any], ids: list[int], text: str | None
    ) -> None:
        [one] = processor().process_request(prompt)
        [[two]] = processor().process_requests(prompt)
        [[_], [three]] = processor().process_requests(["other", prompt])
        for request in (one, two, three):
            assert (request.prompt_token_ids, request.prompt) == (ids, text)

    def test_what_a_dict_holds_is_judged_like_a_prompt(self) -> None:
        for held in ({"prompt": ""}, {"prompt_token_ids": []}):
            with pytest.raises(ValueError, match="the prompt is empty"):
                processor().process_request(held)
        with pytest.raises(ValueError, match=r"prompts\[1\]: .*id 2048 at position 0"):
            processor().process_requests(["a", {"prompt_token_ids": [V]}])

    @pytest.mark.parametrize(
        "prompt", [np.array([5, 6]), (i for i in [5, 6]), deque([5, 6]), range(5, 7)]
    )
    def test_one_prompt_of_ids(self, prompt: Any) -> None:
        [[request]] = processor().process_requests(prompt)
        assert request.prompt_token_ids == [5, 6]

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ({"text": "hi"}, r"is a dict.*pass what its 'text' holds"),
            ({"input_ids": [5]}, r"is a dict.*\.input_ids"),
            (HELLO, r"is a dict.*chat\(\)"),
            ([HELLO], r"is a dict.*chat\(\)"),
            ([{"prompt": "a"}, {"prompt": 5}], r"prompts\[1\]: 'prompt' holds a int"),
            ({"prompt": [5, 6]}, r"'prompt' holds a list.*under 'prompt_token_ids'"),
            ({"prompt_token_ids": "hi"}, r"'prompt_token_ids' holds a str.*'prompt'"),
            ({"prompt_token_ids": 5}, r"is a int"),
            ({"prompt": None}, r"neither text nor ids"),
            ({"prompt": "a", "promt": 1}, r"no key 'promt': did you mean 'prompt'\?"),
            ({"prompt": "a", "id": 7}, r"no key 'id': there are prompt, prompt_tok"),
            (
                {"prompt": "a", "multi_modal_data": {"image": 1}},
                r"no key 'multi_modal_data': .*reads text.*docs/outgrow\.md",
            ),
            ({"a", "b"}, r"is a set.*no order.*list"),
            (b"hi", r"is a bytes.*Decode"),
            ([b"hi", b"ho"], r"prompts\[0\]: .*is a bytes"),
            (Path("story.txt"), r"is a Posix.*read the file"),
            ({"a": 1}.values(), r"is a dict_values.*list\(prompt\)"),
            (5, r"is a int"),
            (None, r"is a NoneType"),
            (["a", None], r"prompts\[1\]: prompt is a NoneType"),
            (["a", float("nan")], r"prompts\[1\]: prompt is a float"),
            ([5, "a"], r"'a' at position 1"),
            ([5.0, 6.0], r"5\.0 at position 0"),
            (np.array([True, False]), r"True at position 0"),
        ],
    )
    def test_what_is_told(self, prompts: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            processor().process_requests(prompts)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"temperature": 0}, r"is a dict.*SamplingParams\(\*\*params\)"),
            ([{"temperature": 0}], r"is a dict.*SamplingParams\(\*\*params\)"),
            (GenerationConfig(), "is a GenerationConfig.*default_sampling_params"),
            ("greedy", "is a str"),
            ({SamplingParams()}, "is a set"),
            (0.7, "is a float"),
        ],
    )
    def test_params(self, params: Any, message: str) -> None:
        with pytest.raises(TypeError, match=f"{message}"):
            processor().process_requests(["a"], params)
        with pytest.raises(TypeError, match=f"{message}"):
            processor().process_chat([HELLO], params)

    def test_an_iterator_of_params(self) -> None:
        params = [SamplingParams(seed=i) for i in range(2)]
        groups = processor().process_requests(["a", "b"], iter(params))  # type: ignore[arg-type]
        assert [group[0].params for group in groups] == params

    def test_names_and_seeds_of_other_kinds(self) -> None:
        with pytest.raises(TypeError, match=r"request_id=5 must be a str"):
            processor().process_request("a", request_id=5)  # type: ignore[arg-type]
        for seed in (0.5, "a", None, True):
            with pytest.raises(TypeError, match=r"seed=.* must be an int"):
                processor(seed=seed)
        assert processor(seed=np.int64(3)).process_request("a")[0].seed


class TestStops:
    def test_eos_ids_that_do_not_exist_end_and_forbid_nothing(self) -> None:
        eos = (-1, V, 10**30, EOS)
        made = InputProcessor(tokenizer(), V, 64, eos)
        [request] = made.process_request("a", SamplingParams(min_tokens=1))
        assert made.eos_token_ids == request.stop_token_ids == (EOS,)

    def test_every_id_a_stop_id(self) -> None:
        for ids, ignore_eos in [(range(V), True), (sorted({*range(V)} - {EOS}), False)]:
            params = SamplingParams(
                stop_token_ids=ids, min_tokens=1, ignore_eos=ignore_eos
            )
            with pytest.raises(
                ValueError, match=r"min_tokens=1.*all 2048.*min_tokens=0"
            ):
                processor().process_request("a", params)
        rest = sorted({*range(V)} - {EOS})
        for params in (
            SamplingParams(stop_token_ids=rest, min_tokens=1, ignore_eos=True),
            SamplingParams(stop_token_ids=range(V)),
        ):
            processor().process_request("a", params)

    def test_a_stop_string_that_cannot_be_found(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = processor()
        for _ in range(2):
            made.process_request("a", SamplingParams(stop=["x", "<|im_end|>"]))
            made.process_requests(["a", "b"], SamplingParams(stop="\n<|im_end|>"))
        [record] = caplog.records
        assert "<|im_end|>" in record.getMessage()
        assert f"stop_token_ids=[{EOS}]" in record.getMessage()
        made.process_request("a", SamplingParams(stop="<|endoftext|>"))
        assert len(caplog.records) == 2

    def test_stop_strings_that_can_be_found(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        shown = SamplingParams(stop="<|im_end|>", skip_special_tokens=False)
        for params in (
            shown,
            SamplingParams(stop="</think>"),
            SamplingParams(stop="|"),
        ):
            processor().process_request("a", params)
        assert not caplog.records


class TestBans:
    """`bad_words`, `allowed_token_ids`, `logit_bias`: in the vocabulary, and not all."""

    def ids(self, made: InputProcessor, params: SamplingParams | None) -> Any:
        requests = [
            r for group in made.process_requests(["a", "b"], params) for r in group
        ]
        [found] = {request.bad_words_ids for request in requests}
        return found

    def test_both_ways_to_write_a_word(self) -> None:
        kite, bare = tuple(encode(" kite")), tuple(encode("kite"))
        assert len(kite) == 1
        assert len(bare) == 2
        for word in ("kite", " kite", "  kite"):
            found = self.ids(processor(), SamplingParams(bad_words=[word], n=2))
            assert found == (bare, kite)
        words = SamplingParams(bad_words=["kite", "\n", "red kite", " kite"])
        found = self.ids(processor(), words)
        assert found == (
            *(bare, kite),
            *(tuple(encode("\n")), tuple(encode(" \n"))),
            *(tuple(encode("red kite")), tuple(encode(" red kite"))),
        )

    def test_without_bad_words(self) -> None:
        assert self.ids(processor(), None) == ()
        assert self.ids(processor(), SamplingParams()) == ()

    def test_each_prompt_has_its_own(self) -> None:
        one, other = SamplingParams(bad_words=["a"]), SamplingParams()
        groups = processor().process_requests(["x"] * 5, [one, other, one, one, other])
        lengths = [len(group[0].bad_words_ids) for group in groups]
        assert lengths == [2, 0, 2, 2, 0]

    def test_words_need_a_tokenizer(self) -> None:
        made = InputProcessor(None, V, 64)
        with pytest.raises(ValueError, match=r"bad_words=.*no tokenizer.*logit_bias"):
            made.process_request([1], SamplingParams(bad_words=["a"]))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("allowed_token_ids", [1, V]),
            ("logit_bias", {1: 1.0, V: 1.0}),
            ("stop_token_ids", [1, V]),
        ],
    )
    def test_ids_outside_the_vocabulary(self, name: str, value: Any) -> None:
        params: Mapping[str, Any] = {name: value}
        with pytest.raises(ValueError, match=rf"{name} holds 2048.*0 to 2047"):
            processor().process_request("a", SamplingParams(**params))
        inside = {name: {V - 1: 1.0} if name == "logit_bias" else [V - 1]}
        processor().process_request("a", SamplingParams(**inside))  # type: ignore[arg-type]

    def test_words_outside_the_vocabulary(self) -> None:
        made = InputProcessor(tokenizer(), 50, 64)
        with pytest.raises(ValueError, match=r"bad word has the ids.*0 to 49"):
            made.process_request([1], SamplingParams(bad_words=["kite"]))

    def test_prompt_logprobs_of_all_and_of_more(self) -> None:
        for value in (-1, 0, V):
            processor().process_request("a", SamplingParams(prompt_logprobs=value))
        with pytest.raises(ValueError, match=rf"prompt_logprobs={V + 1}.*-1 asks"):
            processor().process_request("a", SamplingParams(prompt_logprobs=V + 1))

    @pytest.mark.parametrize(
        ("wish", "reason"),
        [
            (
                {"allowed_token_ids": [EOS, EOS_2], "min_tokens": 1},
                r"allowed_token_ids leaves 2, and min_tokens=1.*none is left.*min_tokens=0",
            ),
            (
                {"allowed_token_ids": [7], "min_tokens": 2, "stop_token_ids": [7]},
                r"allowed_token_ids leaves 1, and min_tokens=2",
            ),
            (
                {"allowed_token_ids": "KITE", "bad_words": ["kite"]},
                r"leaves 1, and bad words of one token forbid 1.*Forbid fewer",
            ),
            (
                {
                    "allowed_token_ids": [EOS],
                    "min_tokens": 1,
                    "ignore_eos": True,
                    "stop_token_ids": [EOS],
                },
                r"min_tokens=1",
            ),
        ],
    )
    def test_nothing_left_to_draw(self, wish: dict[str, Any], reason: str) -> None:
        if wish["allowed_token_ids"] == "KITE":
            wish = {**wish, "allowed_token_ids": encode(" kite")}
        with pytest.raises(ValueError, match=reason):
            processor().process_request("a", SamplingParams(**wish))

    @pytest.mark.parametrize(
        "wish",
        [
            {"allowed_token_ids": [EOS, EOS_2]},
            {"allowed_token_ids": [EOS, 7], "min_tokens": 1},
            {"allowed_token_ids": [EOS], "min_tokens": 1, "ignore_eos": True},
            {"allowed_token_ids": [7], "logit_bias": {7: -100}},
        ],
    )
    def test_something_left_to_draw(self, wish: dict[str, Any]) -> None:
        processor().process_request("a", SamplingParams(**wish))


class TestChat:
    def test_is_what_transformers_writes(self) -> None:
        for options in (
            {},
            {"enable_thinking": True},
            {"add_generation_prompt": False},
        ):
            expected = tokenizer().apply_chat_template(
                [HELLO], tokenize=False, **({"add_generation_prompt": True} | options)
            )
            assert chat_text([HELLO], **options) == expected
            if "add_generation_prompt" not in options:
                assert chat_text([HELLO], chat_template_kwargs=options) == expected
        assert chat_text([HELLO], enable_thinking=True) != chat_text([HELLO])

    def test_several_conversations(self) -> None:
        other = [HELLO, {"role": "assistant", "content": "Hi"}, HELLO]
        made = processor().process_chat([[HELLO], other], SamplingParams(max_tokens=1))
        assert [group[0].prompt for group in made] == [
            chat_text([HELLO]),
            chat_text(other),
        ]
        assert processor().process_chat([]) == []

    @pytest.mark.parametrize(
        ("name", "value", "hint"),
        [
            ("max_tokens", 1, r"SamplingParams\(max_tokens=1\)"),
            ("max_new_tokens", 1, r"SamplingParams\(max_tokens=1\)"),
            ("temperature", 0, r"SamplingParams\(temperature=0\)"),
            ("stop", "x", r"SamplingParams\(stop='x'\)"),
            ("enable_thinkin", False, "did you mean enable_thinking"),
            ("add_generation_promt", True, "did you mean add_generation_prompt"),
            ("chat_templat", "x", "did you mean chat_template"),
            ("tokenize", False, "makes tokens of the text by itself"),
            ("tools", [{"type": "function"}], "no place for it"),
            ("documents", [{"text": "x"}], "no place for it"),
            ("messages", [], "leave it out"),
            ("qwertz", 1, "leave it out"),
        ],
    )
    def test_options_that_nobody_reads(self, name: str, value: Any, hint: str) -> None:
        for options in ({name: value}, {"chat_template_kwargs": {name: value}}):
            with pytest.raises(TypeError, match=rf"^{name}=.*{hint}") as caught:
                chat_text([HELLO], **options)
            assert "enable_thinking" in str(caught.value)

    def test_enable_thinking_where_the_template_does_not_read_it(self) -> None:
        """It could neither switch thinking on nor off, so it is not passed over."""
        template = "{{ messages[0].content }}"
        for value in (True, False):
            with pytest.raises(
                TypeError, match=r"enable_thinking=.*can change nothing"
            ):
                chat_text([HELLO], enable_thinking=value, chat_template=template)

    def test_options_that_ask_for_nothing(self) -> None:
        plain = chat_text([HELLO])
        assert chat_text([HELLO], tools=None, documents=[]) == plain
        assert chat_text([HELLO], chat_template_kwargs=None) == plain

    def test_the_variables_that_a_template_reads(self) -> None:
        assert read_variables(str(tokenizer().chat_template)) == {
            "add_generation_prompt",
            "enable_thinking",
        }
        template = (
            "{%- set ns = namespace(a=range(3)) %}{%- if not date is defined %}"
            "{%- set date = strftime_now('%Y') %}{%- endif %}{%- set own = 1 %}"
            "{%- set lang = lang | default('en') %}"
            "{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{%- set text = m.content %}{{ text }}{% continue %}{%- endfor %}"
            "{%- macro show(x) %}{{ x }}{{ style }}{%- endmacro %}"
        )
        assert read_variables(template) == {"date", "lang", "style"}

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"chat_template": 5}, TypeError, "chat_template=5 must be a str"),
            ({"chat_template_kwargs": [1]}, TypeError, "must be a dict"),
            ({"add_generation_prompt": 3}, TypeError, "must be True or False"),
            ({"chat_template": "{{ x "}, ValueError, "broken in line 1"),
            ({"chat_template": "{{ raise_exception('no!') }}"}, ValueError, "no!"),
            ({"chat_template": "{{ a.b }}"}, ValueError, "'a' is undefined"),
            ({"chat_template": "{{ messages[7].a.b }}"}, ValueError, "no element 7"),
            ({"chat_template": "{{ 'a' + 5 }}"}, ValueError, "TypeError"),
            ({"chat_template": "{{ 1 / 0 }}"}, ValueError, "ZeroDivisionError"),
            ({"chat_template": "{{ ''.__class__.__mro__ }}"}, ValueError, "Security"),
            (
                {"chat_template": "{{ tools }}", "tools": {"a": 1}},
                TypeError,
                "must be a list",
            ),
            (
                {"chat_template": "{{ tools }}", "tools": [5]},
                ValueError,
                "JSON schema",
            ),
        ],
    )
    def test_options_that_cannot_be_used(
        self, options: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        with pytest.raises(kind, match=message) as caught:
            chat_text([HELLO], **options)
        assert caught.type is kind

    def test_the_message_that_a_template_refuses(self) -> None:
        template = (
            "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
            "{{ raise_exception('system comes first') }}{% endif %}{% endfor %}"
        )
        late = [HELLO, HELLO, {"role": "system", "content": "Late"}, HELLO]
        made = processor_with(template)
        message = r"messages\[1\]\[2\] cannot.*system comes first"
        with pytest.raises(ValueError, match=message):
            made.process_chat([[HELLO], late])

    def test_to_continue_the_last_message(self) -> None:
        messages = [HELLO, {"role": "assistant", "content": "Sure, the"}]
        text = chat_text(messages, continue_final_message=True)
        assert text.endswith("Sure, the")
        both = {"continue_final_message": True, "add_generation_prompt": False}
        assert chat_text(messages, **both) == text
        both["add_generation_prompt"] = True
        with pytest.raises(ValueError, match=r"continue_final.*add_generation.*choose"):
            chat_text(messages, **both)

    def test_parts_of_text_are_joined(self) -> None:
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        for content in (parts, tuple(parts), [{"text": "Hello"}], ["Hel", "lo"]):
            assert chat_text([{"role": "user", "content": content}]) == chat_text(
                [HELLO]
            )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url'"),
            ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "'input_audio'"),
            ([{"type": "text"}], "text=None"),
            ([{"type": "text", "text": 5}], "text=5"),
            ([5], "kind int"),
            ([None], "kind NoneType"),
        ],
    )
    def test_other_parts(self, content: Any, message: str) -> None:
        with pytest.raises(ValueError, match=rf"messages\[1\] has a .*{message}"):
            chat_text([HELLO, {"role": "user", "content": content}])

    @pytest.mark.parametrize("message", [{}, {"content": None}, {"tool_calls": []}])
    def test_nothing_said(self, message: dict[str, Any]) -> None:
        said = {"role": "assistant", **message}
        with pytest.raises(
            ValueError, match=r"messages\[1\], of role 'assistant', has no"
        ):
            chat_text([HELLO, said])
        with pytest.raises(ValueError, match=r"messages\[1\]\[1\], of role"):
            processor().process_chat([[HELLO], [HELLO, said]])

    def test_a_call_of_a_tool_needs_no_content(self) -> None:
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
        for own in (call, {**call, "content": None}):
            assert chat_text([HELLO, own]) == chat_text(
                [HELLO, {**call, "content": ""}]
            )

    def test_messages_of_the_openai_client(self) -> None:
        class Message:
            def model_dump(self, exclude_none: bool) -> dict[str, Any]:
                assert exclude_none
                return HELLO

        assert chat_text([Message()]) == chat_text([HELLO])

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            (HELLO, r"messages is a dict: pass a list of dicts.*'role'"),
            ("Hello", r"messages is a str: .*generate\(\)"),
            (["Hello"], r"messages\[0\] is a str"),
            (None, "messages is a NoneType"),
            (5, "messages is a int"),
            ({5}, "messages is a set"),
            ([[HELLO], HELLO], "messages is"),
            ([HELLO, [HELLO]], r"messages\[1\] is a list"),
            ([{"role": 5, "content": "x"}], r"messages\[0\] has no role"),
            ([{"role": "user", "content": {"a": 1}}], r"content of type dict.*json"),
        ],
    )
    def test_what_is_no_conversation(self, messages: Any, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            chat_text(messages)

    def test_a_broken_template_is_told_at_the_start(self) -> None:
        for broken in ("{% if %}", {"default": "{{ x", "rag": "y"}, [5], "{{" * 9999):
            with pytest.raises(ValueError, match=r"chat template .*tokenizer"):
                processor_with(broken)

    def test_without_a_template(self) -> None:
        with pytest.raises(ValueError, match=r"no chat template.*generate"):
            processor_with(None).process_chat([HELLO])
        with pytest.raises(ValueError, match=r"no chat template.*generate"):
            InputProcessor(None, V, 64).process_chat([HELLO])

    def test_templates_by_name(self) -> None:
        made = processor_with(
            {"default": "{{ messages[0].content }}", "loud": "{{ 'A' }}"}
        )
        assert made.process_chat([HELLO])[0][0].prompt == "Hello"
        [[request]] = made.process_chat([HELLO], None, {"chat_template": "loud"})
        assert request.prompt == "A"


class TestThreads:
    def test_one_at_a_time_in_the_tokenizer_and_the_template(self) -> None:
        """A fast tokenizer whose settings change while it works raises "Already borrowed"."""
        inside, most = 0, 0

        class Busy:
            def __getattr__(self, name: str) -> Any:
                return getattr(tokenizer(), name)

            def work(self, result: Any) -> Any:
                nonlocal inside, most
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1
                return result

            def __call__(self, text: str, **kwargs: Any) -> Any:
                return self.work(tokenizer()(text, **kwargs))

            def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
                return self.work(tokenizer().apply_chat_template(messages, **kwargs))

        made = InputProcessor(Busy(), V, 64)  # type: ignore[arg-type]
        calls = [made.process_request, made.process_requests]
        calls.append(lambda text: made.process_chat([{**HELLO, "content": text}]))  # type: ignore[arg-type]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: calls[i % 3](f"prompt {i}"), range(60)))
        assert most == 1

    def test_a_tokenizer_that_comes_with_truncation_and_padding(self) -> None:
        own = copy.deepcopy(tokenizer())
        made = InputProcessor(own, V, 512)
        text = "Once upon a time " * 20
        expected = tokenizer()(text).input_ids

        def work(i: int) -> list[int]:
            if i % 10 == 0:
                with made._lock:
                    own.backend_tokenizer.enable_truncation(5)
                    own.backend_tokenizer.enable_padding()
            return made.process_request(text)[0].prompt_token_ids

        with ThreadPoolExecutor(4) as pool:
            assert all(ids == expected for ids in pool.map(work, range(200)))

    def test_no_two_requests_draw_the_same_seed(self) -> None:
        made, alone = processor(seed=7), processor(seed=7)
        start = threading.Barrier(4)

        def work(_: int) -> list[int]:
            start.wait()
            groups = [made.process_requests(["a", "b"]) for _ in range(25)]
            return [group[0].seed for pair in groups for group in pair]

        with ThreadPoolExecutor(4) as pool:
            seeds = [seed for part in pool.map(work, range(4)) for seed in part]
        expected = [alone.process_request("a")[0].seed for _ in range(200)]
        assert sorted(seeds) == sorted(expected)


def write_config(folder: Path, content: Any) -> Path:
    """A checkpoint folder with this `generation_config.json`: text, bytes or fields."""
    path = folder / "generation_config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return folder


def params_of(folder: Path, **fields: Any) -> SamplingParams:
    return default_sampling_params(load_generation_config(write_config(folder, fields)))


class TestGenerationConfig:
    def test_of_the_bundled_model(self, tmp_path: Path) -> None:
        path = bundled_model_path()
        config = load_generation_config(path)
        assert get_eos_token_ids(config) == [EOS, EOS_2]
        assert load_generation_config(tmp_path) is None
        shutil.copy(path / "generation_config.json", tmp_path)
        assert load_generation_config(tmp_path).to_dict() == config.to_dict()  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "holds a list"),
            ("null", "holds a NoneType"),
            ("3", "holds a int"),
            ('"x"', "holds a str"),
            ("", "is not JSON"),
            ("{", "is not JSON"),
            (b"\xff\xfe{}", "is not JSON"),
            ("[" * 100_000, "is not JSON"),
            ('{"a":' * 100_000, "is not JSON"),
            ({"eos_token_id": 2045.0}, r"eos_token_id=2045\.0"),
            ({"eos_token_id": "2045"}, "eos_token_id='2045'"),
            ({"eos_token_id": [2045, "x"]}, "eos_token_id=.*'x'"),
            ({"eos_token_id": [[2045]]}, r"eos_token_id=\[\[2045\]\]"),
            ({"eos_token_id": True}, "eos_token_id=True"),
            ({"eos_token_id": {"a": 1}}, "eos_token_id="),
            ({"do_sample": "yes"}, "do_sample='yes'"),
            ({"do_sample": True, "temperature": 3.0}, r"temperature=3\.0.*at most 2"),
            ({"do_sample": True, "temperature": "hot"}, "temperature='hot'"),
            ({"do_sample": True, "temperature": [1]}, r"temperature=\[1\]"),
            ('{"do_sample": true, "temperature": NaN}', "temperature=nan"),
            ({"do_sample": True, "top_p": 0.0}, r"top_p=0\.0.*above 0"),
            ({"do_sample": True, "top_p": 1.5}, r"top_p=1\.5"),
            ({"do_sample": True, "top_k": -3}, "top_k=-3"),
            ({"do_sample": True, "top_k": 2.5}, r"top_k=2\.5"),
            ({"do_sample": True, "min_p": 2}, "min_p=2"),
            ({"repetition_penalty": 0}, "repetition_penalty=0"),
            ({"repetition_penalty": {}}, r"repetition_penalty=\{\}"),
            ({"max_new_tokens": 0}, "max_new_tokens=0"),
            ({"max_new_tokens": "many"}, "max_new_tokens='many'"),
            ({"min_new_tokens": -1}, "min_new_tokens=-1"),
            ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_tokens=9"),
            ({"max_length": 0}, "max_length=0"),
            ({"max_length": "x"}, "max_length='x'"),
            ({"max_length": True}, "max_length=True"),
            ({"stop_strings": 5}, "stop_strings=5"),
            ({"stop_strings": [""]}, r"stop_strings=\[''\]"),
            ({"stop_strings": ["a", 5]}, "stop_strings="),
        ],
    )
    def test_damage(self, tmp_path: Path, content: Any, message: str) -> None:
        folder = write_config(tmp_path, content)
        path = tmp_path / "generation_config.json"
        with pytest.raises(ValueError, match=message) as caught:
            load_generation_config(folder)
        assert str(path) in str(caught.value)

    def test_values_that_nobody_looks_at_when_greedy(self, tmp_path: Path) -> None:
        assert params_of(tmp_path, temperature=3.0, top_p=0.5).temperature == 0

    def test_random_damage_is_told_with_the_file(self, tmp_path: Path) -> None:
        fields = json.loads(
            (bundled_model_path() / "generation_config.json").read_text()
        )
        names = [*fields, "min_p", "stop_strings", "max_length", "min_new_tokens"]
        names += ["max_new_tokens", "repetition_penalty", "num_beams", "typical_p"]
        odd = [None, True, -1, 0, 0.5, 10**30, 1e300, "", "x", [], [[]], [None], {}]
        odd += [{"a": [1]}, ["a", 1], [-1, 2], "\ud83d", float("nan"), float("inf")]
        rng = random.Random(0)
        for _ in range(300):
            damaged = fields | {rng.choice(names): rng.choice(odd) for _ in "12"}
            try:
                params = params_of(tmp_path, **damaged)
                get_eos_token_ids(load_generation_config(tmp_path), None, tokenizer())
            except ValueError as error:
                assert "generation_config.json: " in str(error)
            else:
                assert isinstance(params, SamplingParams)

    def test_an_object_is_named_too(self) -> None:
        config = GenerationConfig(do_sample=True)
        config.temperature = 3.0
        with pytest.raises(ValueError, match=r"^generation_config: temperature=3\.0"):
            default_sampling_params(config)
        with pytest.raises(TypeError, match="generation_config is a dict"):
            default_sampling_params({"do_sample": True})  # type: ignore[arg-type]

    def test_fields_that_are_obeyed(self, tmp_path: Path) -> None:
        params = params_of(tmp_path, stop_strings=["User:", "#"], max_new_tokens=9)
        assert params == SamplingParams(
            temperature=0, stop=["User:", "#"], max_tokens=9
        )
        assert params_of(tmp_path, stop_strings="#").stop == ("#",)
        params = params_of(tmp_path, min_new_tokens=5)
        assert (params.min_tokens, params.max_tokens) == (5, 16)
        params = params_of(tmp_path, min_new_tokens=50)
        assert (params.min_tokens, params.max_tokens) == (50, 50)

    def test_max_length_counts_the_prompt(self, tmp_path: Path) -> None:
        params = params_of(tmp_path, max_length=30)
        assert params == DefaultParams(temperature=0, max_tokens=None, max_length=30)
        made = processor(default_params=params)
        assert made.process_request([1] * 10)[0].max_tokens == 20
        own = SamplingParams(max_tokens=40)
        assert made.process_request([1] * 10, own)[0].max_tokens == 40
        with pytest.raises(
            ValueError, match=r"30 tokens.*max_length=30.*29.*pass samp"
        ):
            made.process_request([1] * 30)
        wide = processor(default_params=params_of(tmp_path, max_length=1000))
        assert wide.process_request([1] * 10)[0].max_tokens == 54
        both = params_of(tmp_path, max_length=30, max_new_tokens=40)
        assert (
            processor(default_params=both).process_request([1] * 10)[0].max_tokens == 40
        )
        least = processor(
            default_params=params_of(tmp_path, max_length=30, min_new_tokens=5)
        )
        with pytest.raises(ValueError, match=r"min_tokens=5.*26 of max_length=30"):
            least.process_request([1] * 26)

    @pytest.mark.parametrize(
        "fields",
        [
            {"no_repeat_ngram_size": 3},
            {"suppress_tokens": [5, 6]},
            {"num_beams": 4},
            {"do_sample": True, "typical_p": 0.9},
            {"do_sample": True, "epsilon_cutoff": 0.1},
        ],
    )
    def test_the_rest_is_named_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
    ) -> None:
        caplog.set_level(logging.WARNING, "folo_lib")
        params_of(tmp_path, **fields)
        [record] = [r for r in caplog.records if r.name == "folo_lib.inputs"]
        assert list(fields)[-1] in record.getMessage()

    @pytest.mark.parametrize(
        "fields",
        [
            {"no_repeat_ngram_size": 0, "typical_p": 1.0, "num_beams": 1},
            {"typical_p": 0.9},  # greedy: it changes nothing
            {"bad_words_ids": [], "suppress_tokens": None, "guidance_scale": 1.0},
        ],
    )
    def test_what_changes_nothing_is_not_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
    ) -> None:
        params_of(tmp_path, **fields)
        assert not [r for r in caplog.records if r.name == "folo_lib.inputs"]

    def test_bad_words_ids_are_obeyed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        words = [[5], [6, 7], [EOS], [6, 7]]
        params = params_of(tmp_path, bad_words_ids=words, max_length=30)
        assert isinstance(params, DefaultParams)
        assert params.max_length == 30
        assert params.bad_words_ids == ((5,), (6, 7), (EOS,), (6, 7))
        assert not [r for r in caplog.records if r.name == "folo_lib.inputs"]
        made = processor(default_params=params)
        [request] = made.process_request([1] * 10)
        # Without EOS, as in Hugging Face: it would never end.
        assert request.bad_words_ids == ((5,), (6, 7))
        assert request.max_tokens == 20
        [own] = made.process_request([1] * 10, SamplingParams())
        assert own.bad_words_ids == ()
        alone = params_of(tmp_path, bad_words_ids=words)
        assert isinstance(alone, DefaultParams)
        assert alone.max_length is None
        assert alone.max_tokens == 16
        for nothing in (None, []):
            params = params_of(tmp_path, bad_words_ids=nothing)
            assert type(params) is SamplingParams

    @pytest.mark.parametrize(
        "value",
        [5, [5], [[]], [["a"]], [[5, -1]], [[True]], "ab", {"a": [5]}, [[5], 6]],
    )
    def test_bad_words_ids_of_a_wrong_kind(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(ValueError, match=r"bad_words_ids=.*list of words"):
            params_of(tmp_path, bad_words_ids=value)

    def test_bad_words_ids_outside_the_vocabulary(self, tmp_path: Path) -> None:
        made = processor(default_params=params_of(tmp_path, bad_words_ids=[[5, V]]))
        with pytest.raises(ValueError, match=r"\[5, 2048\].*bad_words_ids"):
            made.process_request("a")
        made.process_request("a", SamplingParams())

    def test_min_p_comes_after_top_p_at_hugging_face(self) -> None:
        """So it keeps three where this engine keeps two, which the docs say."""
        logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
        theirs = MinPLogitsWarper(0.2)(None, TopPLogitsWarper(0.82)(None, logits))  # type: ignore[arg-type]
        assert theirs.isfinite().sum() == 3
        n = 200
        metadata = SamplingMetadata.from_params(
            params=[SamplingParams(top_p=0.82, min_p=0.2)] * n,
            seeds=range(n),
            sample_indices=[0] * n,
            num_prompt_tokens=[1] * n,
            stop_token_ids=[()] * n,
            vocab_size=4,
            device="cpu",
        )
        kept = Sampler().sample(logits.expand(n, 4), metadata)[0].tolist()
        assert set(kept) == {0, 1}


def named(ids: Any) -> SimpleNamespace:
    return SimpleNamespace(eos_token_id=ids)


class TestEosTokenIds:
    @pytest.mark.parametrize(
        ("sources", "expected"),
        [
            ((named(EOS), None, named(EOS_2)), [EOS, EOS_2]),
            ((None, named(0), named(EOS_2)), [0, EOS_2]),
            ((named(None), named([0, 1]), named(None)), [0, 1]),
            ((named([5, 6]), named(7), named(5)), [5, 6]),
            ((named(-1), named(7), None), [-1]),
            ((named(torch.tensor([5, 6])),), [5, 6]),
            ((None, None, None), []),
        ],
    )
    def test_the_union(self, sources: Any, expected: list[int]) -> None:
        assert get_eos_token_ids(*sources) == expected

    def test_ends_a_text(self, tmp_path: Path) -> None:
        own = copy.deepcopy(tokenizer())
        own.eos_token = "<|endoftext|>"
        write_config(tmp_path, {"eos_token_id": EOS})
        for config, expected in [
            (load_generation_config(tmp_path), (EOS, EOS_2)),
            (None, (0, EOS_2)),
        ]:
            eos = get_eos_token_ids(config, named(0), own)
            made = InputProcessor(own, V, 64, eos)
            assert made.eos_token_ids == expected
            for token_id in expected:
                [request] = made.process_request("a")
                request.append_token(SampledToken(token_id))
                assert request.status.finish_reason == "stop"

    @pytest.mark.parametrize("ids", [2.0, "a", [[5]], [5, None], {5: 6}, True])
    def test_what_is_no_id(self, ids: Any) -> None:
        with pytest.raises(ValueError, match="config: eos_token_id="):
            get_eos_token_ids(None, named(ids), None)


ODD: list[Any] = [
    *(None, True, -1, 0, 0.5, 10**30, "", "x", "\ud800", b"x", [], [[]], {}, [None]),
    *([{}], {"role": "user"}, [HELLO], [[HELLO]], {5}, iter([5]), object(), [object()]),
    *(torch.zeros(2, 2), torch.tensor(3), np.array("x"), np.array([]), range(0), int),
    *(
        SamplingParams(),
        [SamplingParams()],
        [{"role": "user", "content": [{}]}],
        ["a", 5],
    ),
    *([{"role": "user", "content": [{"type": []}]}], {"a": {"b": 1}}, lambda: 5, 1j),
    *([1j], np.array([None, "x"]), [5, [5]], [[5], 5], {"type": "text"}, float("nan")),
]


def test_odd_values_are_told_or_done() -> None:
    """Nothing but TypeError and ValueError, with a message, whatever is passed where."""
    made, rng = processor(), random.Random(0)
    names = ["chat_template", "tools", "enable_thinking", "continue_final_message", "n"]
    names += ["chat_template_kwargs", "add_generation_prompt", "documents", "messages"]
    messages = [HELLO, {"role": "assistant", "content": "Hi"}]
    calls: list[tuple[Any, ...]] = []
    for value in ODD:
        calls += [(made.process_request, value), (made.process_requests, value)]
        calls += [(made.process_requests, ["a", value]), (made.process_chat, value)]
        calls += [(made.process_chat, [value]), (made.process_chat, [HELLO, value])]
        calls += [
            (made.process_requests, ["a"], value),
            (made.process_request, "a", value),
        ]
        calls += [(made.process_chat, [HELLO], value)]
        calls += [(made.process_request, "a", None, value)]
        for field in ("role", "content", "tool_calls", "reasoning_content", "name"):
            changed = [*messages[:1], {**messages[1], field: value}]
            calls += [(made.process_chat, changed)]
    for _ in range(600):
        options = {
            rng.choice(names): rng.choice(ODD) for _ in range(rng.choice([1, 2]))
        }
        calls.append((made.process_chat, messages, None, options))
    told = 0
    for function, *args in calls:
        try:
            groups = function(*args)
        except (TypeError, ValueError) as error:
            told += 1
            frames, tb = [], error.__traceback__
            while tb is not None:
                frames.append(tb.tb_frame.f_code.co_filename)
                tb = tb.tb_next
            assert frames[-1].endswith("inputs.py"), (function, args, error)
            assert len(str(error)) > 20, (function, args, error)
        else:
            assert isinstance(groups, list)
    assert told > 500


def test_odd_params_are_told_or_done() -> None:
    made, rng = processor(), random.Random(1)
    fields = list(SamplingParams.__dataclass_fields__)
    odd = [*ODD, 1, 2, 5, 63, 64, V, V + 1, [V - 1], range(V), ["<|im_end|>"], 2**63]
    for _ in range(1500):
        changes: Mapping[str, Any] = {
            rng.choice(fields): rng.choice(odd) for _ in range(rng.choice([1, 2, 3]))
        }
        try:
            made.process_request("Once upon", SamplingParams(**changes))
        except (TypeError, ValueError) as error:
            assert len(str(error)) > 20, (changes, error)
