"""SamplingParams: every default, every range, and what an error says."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from folo_lib.sampling_params import SamplingParams

NAN, INF = math.nan, math.inf

DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "max_tokens": 16,
    "min_tokens": 0,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "skip_special_tokens": True,
    "detokenize": True,
}


def test_defaults() -> None:
    assert dataclasses.asdict(SamplingParams()) == DEFAULTS


def test_takes_keywords_only() -> None:
    with pytest.raises(TypeError):
        SamplingParams(2)  # type: ignore[misc]


def test_frozen_equal_and_hashable() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[3], logit_bias={1: 2})
    same = SamplingParams(stop=("a",), stop_token_ids=(3,), logit_bias={1: 2.0})
    assert params == same
    assert hash(params) == hash(same)
    assert params != dataclasses.replace(params, logit_bias={1: 3})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1),
        ("n", 16_384),
        ("temperature", 0),
        ("temperature", 0.01),
        ("temperature", 2),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 10**9),
        ("min_p", 0),
        ("min_p", 1),
        ("presence_penalty", -2),
        ("presence_penalty", 2),
        ("frequency_penalty", -2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 1e-3),
        ("repetition_penalty", 50),
        ("seed", -(2**63)),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("max_tokens", 1),
        ("max_tokens", None),
        ("min_tokens", 0),
        ("min_tokens", 16),
        ("logprobs", -1),
        ("logprobs", 0),
        ("logprobs", 10**6),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 0),
        ("prompt_logprobs", 10**6),
        ("logit_bias", {}),
        ("logit_bias", {0: -100, 10**6: 100}),
        ("allowed_token_ids", (0, 10**6)),
        ("bad_words", ("\n", "a b", " a")),
    ],
)
def test_limits_are_allowed(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("n", 0, "at least 1"),
        ("n", -3, "at least 1"),
        ("n", 16_385, "at most 16384"),
        ("n", 2**63, "at most 16384"),
        ("temperature", -0.1, "at least 0 and at most 2"),
        ("temperature", 2.01, "at least 0 and at most 2"),
        ("temperature", NAN, "at least 0 and at most 2"),
        ("temperature", INF, "at least 0 and at most 2"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", NAN, "above 0 and at most 1"),
        ("top_k", -2, "at least -1"),
        ("min_p", -0.01, "at least 0 and at most 1"),
        ("min_p", 1.01, "at least 0 and at most 1"),
        ("min_p", NAN, "at least 0 and at most 1"),
        ("presence_penalty", -2.01, "at least -2 and at most 2"),
        ("presence_penalty", 2.01, "at least -2 and at most 2"),
        ("presence_penalty", NAN, "at least -2 and at most 2"),
        ("frequency_penalty", -2.01, "at least -2 and at most 2"),
        ("frequency_penalty", 2.01, "at least -2 and at most 2"),
        ("frequency_penalty", -INF, "at least -2 and at most 2"),
        ("repetition_penalty", 0, "above 0 and finite"),
        ("repetition_penalty", -1, "above 0 and finite"),
        ("repetition_penalty", INF, "above 0 and finite"),
        ("repetition_penalty", NAN, "above 0 and finite"),
        ("seed", -(2**63) - 1, "at least -9223372036854775808"),
        ("seed", 2**64, "below 2**64"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -1, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("min_tokens", 17, "at most max_tokens=16"),
        ("logprobs", -2, "at least -1"),
        ("prompt_logprobs", -2, "at least -1"),
        ("allowed_token_ids", [], "nothing to draw"),
        ("allowed_token_ids", [5, -1], "0 or more"),
        ("logit_bias", {-1: 2.0}, "0 or more"),
        ("logit_bias", {3: NAN}, "from -100 to 100"),
        ("bad_words", ["a", ""], "more than spaces"),
        ("bad_words", ["  "], "more than spaces"),
        ("bad_words", ["a\ud800"], "half a surrogate pair"),
        ("stop", "", "empty string"),
        ("stop", ["a", ""], "empty string"),
        ("stop_token_ids", [5, -1], "0 or more"),
    ],
)
def test_out_of_range(name: str, value: Any, limit: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert name in message
    assert limit in message
    shown = value
    if name in ("stop_token_ids", "allowed_token_ids", "bad_words"):
        shown = value[-1] if value else "empty"
    if name == "logit_bias":
        shown = "nan" if 3 in value else -1
    quoted = name in ("stop", "bad_words")
    assert (repr(shown) if quoted else str(shown)) in message


CURES = {
    "top_k": (-2, "keeps all tokens"),
    "max_tokens": (0, "None goes to the model's limit"),
    "logprobs": (-2, "None is none"),
    "prompt_logprobs": (-2, "None is none"),
    "allowed_token_ids": ([], "None, which allows all"),
    "bad_words": ([""], "leave it out"),
    "seed": (2**64, "None takes a fresh seed"),
    "temperature": (3, "0 is greedy"),
    "top_p": (0, "1 keeps all tokens"),
    "min_p": (2, "0 keeps all tokens"),
    "presence_penalty": (3, "0 is off"),
    "frequency_penalty": (3, "0 is off"),
    "repetition_penalty": (0, "1 is off"),
    "stop": ("", "leave it out"),
}


@pytest.mark.parametrize("name", CURES)
def test_the_error_names_a_way_out(name: str) -> None:
    value, cure = CURES[name]
    with pytest.raises(ValueError, match=cure):
        SamplingParams(**{name: value})


INTS = ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs"]
INTS += ["prompt_logprobs"]
FLOATS = [
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
]
FLAGS = [
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "detokenize",
]


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("value", [True, 1.0, "1", [1]])
def test_ints_are_ints(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}=.*must be an int"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["n", "top_k", "min_tokens"])
def test_none_is_no_int(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}=None"):
        SamplingParams(**{name: None})


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [True, None, "1", [1.0], 1j])
def test_floats_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}=.*must be a number"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_flags_are_bools(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}=.*True or False"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
def test_flags_both_ways(name: str) -> None:
    for value in (True, False):
        assert getattr(SamplingParams(**{name: value}), name) is value


@pytest.mark.parametrize("value", [["a", 3], [b"a"], [None], 3, 2.5])
def test_stop_takes_strings(value: Any) -> None:
    with pytest.raises(TypeError, match="stop"):
        SamplingParams(stop=value)


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("value", [["a"], [True], [1.0], 5, "12"])
def test_ids_are_ints(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("value", ["ab", ["a", 3], [b"a"], [None], [[1, 2]], 3, 2.5])
def test_bad_words_takes_a_sequence_of_strings(value: Any) -> None:
    with pytest.raises(TypeError, match="bad_words"):
        SamplingParams(bad_words=value)


@pytest.mark.parametrize(
    "value",
    [
        *([1, 2], [(1, 2.0)], 5, "1"),
        *({1.0: 2}, {True: 2}, {"a": 2}, {"-1": 2}, {None: 2}),
        *({1: "2"}, {1: None}, {1: True}, {1: [2]}),
    ],
)
def test_logit_bias_takes_ids_and_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="logit_bias"):
        SamplingParams(logit_bias=value)


def test_biases_are_clamped_and_copied() -> None:
    given_dict = {1: 1000, 2: -INF, 3: INF, 4: np.float32(0.5), np.int64(5): 1}
    params = SamplingParams(logit_bias=given_dict)  # type: ignore[arg-type]
    assert params.logit_bias == {1: 100, 2: -100, 3: 100, 4: 0.5, 5: 1}
    given_dict.clear()
    assert len(params.logit_bias) == 5
    assert {type(i) for i in params.logit_bias} == {int}
    assert {type(x) for x in params.logit_bias.values()} == {float}


def test_keys_of_json_are_ids() -> None:
    """An OpenAI client sends `{"1234": 5}`."""
    params = SamplingParams(logit_bias={"1234": 5})  # type: ignore[dict-item]
    assert params.logit_bias == {1234: 5}


def test_bans_become_tuples_without_doubles() -> None:
    params = SamplingParams(bad_words=["b", "a", "b"], allowed_token_ids=[3, 1, 3])
    assert params.bad_words == ("b", "a")
    assert params.allowed_token_ids == (3, 1)
    ids = SamplingParams(allowed_token_ids=np.array([3, 1])).allowed_token_ids  # type: ignore[arg-type]
    assert ids == (3, 1)
    assert all(type(i) is int for i in ids)
    assert SamplingParams(bad_words=None).bad_words == ()


def test_params_travel_to_other_processes() -> None:
    params = SamplingParams(logit_bias={1: 2.0}, bad_words=["a"], allowed_token_ids=[1])
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params


def test_stops_become_tuples() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["b", "a"]).stop == ("b", "a")
    assert SamplingParams(stop=None).stop == ()
    ids = SamplingParams(stop_token_ids=np.array([3, 1])).stop_token_ids  # type: ignore[arg-type]
    assert ids == (3, 1)
    assert all(type(i) is int for i in ids)


def test_numbers_of_numpy_become_plain() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=np.int64(3),  # type: ignore[arg-type]
        repetition_penalty=2,
    )
    assert (params.temperature, params.top_k) == (0.5, 3)
    assert type(params.temperature) is type(params.repetition_penalty) is float
    assert type(params.top_k) is int


@pytest.mark.parametrize("temperature", [1e-30, 0.001, 0.00999])
def test_a_tiny_temperature_is_raised_with_a_warning(
    temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="folo_lib"):
        assert SamplingParams(temperature=temperature).temperature == 0.01
    assert f"{temperature:g}" in caplog.text
    assert "0.01" in caplog.text


@pytest.mark.parametrize("temperature", [0, 0.01, 1])
def test_other_temperatures_are_left_alone(
    temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    assert SamplingParams(temperature=temperature).temperature == temperature
    assert not caplog.records


def test_greedy_has_one_sample() -> None:
    with pytest.raises(ValueError, match=r"n=2.*temperature=0.*n=1"):
        SamplingParams(n=2, temperature=0)
    # Not greedy: raised to 0.01.
    assert SamplingParams(n=2, temperature=1e-6).n == 2


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match=r"detokenize=False.*stop_token_ids"):
        SamplingParams(stop="a", detokenize=False)
    SamplingParams(stop_token_ids=[1], detokenize=False)


def test_min_tokens_meets_max_tokens() -> None:
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=500, max_tokens=None).min_tokens == 500
    with pytest.raises(ValueError, match=r"min_tokens=6.*max_tokens=5.*lower"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_replace_checks_again() -> None:
    params = SamplingParams(stop="a")
    assert dataclasses.replace(params, n=2).stop == ("a",)
    with pytest.raises(ValueError, match="top_p"):
        dataclasses.replace(params, top_p=0)


@given(
    temperature=st.floats(0.01, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**40),
    min_p=st.floats(0, 1),
    penalty=st.floats(-2, 2),
    repetition=st.floats(0, exclude_min=True, allow_infinity=False),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_the_whole_range(
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    penalty: float,
    repetition: float,
    seed: int,
) -> None:
    wanted: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "presence_penalty": penalty,
        "frequency_penalty": -penalty,
        "repetition_penalty": repetition,
        "seed": seed,
    }
    assert dataclasses.asdict(SamplingParams(**wanted)) == DEFAULTS | wanted


def test_imports_next_to_nothing() -> None:
    code = (
        "import folo_lib.sampling_params, sys; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


class TestParametersOfVllm:
    """Names that vLLM's class has and ours has not, and names that nobody has."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("guided_decoding", {"regex": "a"}),
            ("structured_outputs", {"choice": ["a"]}),
            ("best_of", 4),
            ("logits_processors", [print]),
            ("use_beam_search", True),
        ],
    )
    def test_is_an_error_that_says_where_to_read_on(
        self, name: str, value: Any
    ) -> None:
        with pytest.raises(TypeError) as caught:
            SamplingParams(**{name: value})
        assert f"SamplingParams has no parameter {name!r}: " in str(caught.value)
        assert str(caught.value).endswith("/docs/outgrow.md")

    def test_one_that_asks_for_nothing_is_let_through(self) -> None:
        off: dict[str, Any] = {"guided_decoding": None, "use_beam_search": False}
        assert SamplingParams(**off, seed=3) == SamplingParams(seed=3)

    def test_a_slip(self) -> None:
        wrong: dict[str, Any] = {"max_token": 3}
        with pytest.raises(TypeError, match="'max_token': did you mean 'max_tokens'"):
            SamplingParams(**wrong)

    def test_the_signature_is_as_before(self) -> None:
        names = [*inspect.signature(SamplingParams).parameters]
        assert names == [field.name for field in dataclasses.fields(SamplingParams)]
        params = SamplingParams(seed=3, stop=["a"])
        assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
        assert dataclasses.replace(params, seed=4).seed == 4
