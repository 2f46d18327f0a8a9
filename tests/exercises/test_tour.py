"""The checks of page 00 say what is wrong with solutions that people plausibly write."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from folo_lib import SamplingParams
from folo_lib.course.exercises.tour import check_score_continuation, check_vote


def ask(engine: Any, question: str, **params: Any) -> list[str]:
    messages = [{"role": "user", "content": question}]
    defaults = {"temperature": 1.5, "max_tokens": 64}
    [output] = engine.chat(messages, SamplingParams(**{**defaults, **params}))
    return [sample.text for sample in output.outputs]


def winner(texts: list[str]) -> str:
    return Counter(texts).most_common(1)[0][0]


def the_first(engine: Any, question: str, n: int, seed: int) -> str:
    return ask(engine, question, n=n, seed=seed)[0]


def the_longest(engine: Any, question: str, n: int, seed: int) -> str:
    return max(ask(engine, question, n=n, seed=seed), key=len)


def ties_by_the_alphabet(engine: Any, question: str, n: int, seed: int) -> str:
    texts = ask(engine, question, n=n, seed=seed)
    return max(sorted(set(texts)), key=texts.count)


def the_count_too(engine: Any, question: str, n: int, seed: int) -> Any:
    return Counter(ask(engine, question, n=n, seed=seed)).most_common(1)[0]


def one_sample(engine: Any, question: str, n: int, seed: int) -> str:
    return winner([ask(engine, question, seed=seed)[0] for _ in range(n)])


def one_sample_always(engine: Any, question: str, n: int, seed: int) -> str:
    return winner(ask(engine, question, seed=seed))


def cold(engine: Any, question: str, n: int, seed: int) -> str:
    return winner(ask(engine, question, n=n, seed=seed, temperature=1.0))


def no_seed(engine: Any, question: str, n: int, seed: int) -> str:
    return winner(ask(engine, question, n=n))


def without_template(engine: Any, question: str, n: int, seed: int) -> str:
    params = SamplingParams(n=n, temperature=1.5, seed=seed)
    [output] = engine.generate(question, params)
    return winner([sample.text for sample in output.outputs])


def as_system(engine: Any, question: str, n: int, seed: int) -> str:
    params = SamplingParams(n=n, temperature=1.5, seed=seed)
    messages = [{"role": "system", "content": question}]
    [output] = engine.chat(messages, params)
    return winner([sample.text for sample in output.outputs])


def nobody_asked(engine: Any, question: str, n: int, seed: int) -> str:
    return "fox moon lake"


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (the_first, "it chose 'foj moon lake', wanted 'fox moon lake'"),
        (the_longest, "it chose 'foj moon lake', wanted 'fox moon lake'"),
        (ties_by_the_alphabet, "the one drawn first wins"),
        (the_count_too, "it returned a tuple"),
        (one_sample, "engine.chat was called 3 times for n=3"),
        (one_sample_always, "SamplingParams had n=1; wanted n=3"),
        (cold, "temperature=1.0; wanted temperature=1.5"),
        (no_seed, "seed=None; wanted seed=11"),
        (without_template, "ask through engine.chat"),
        (as_system, "wanted is a list with one message"),
        (nobody_asked, "the engine was not asked"),
    ],
)
def test_vote(attempt: Callable[..., Any], message: str) -> None:
    verdict = check_vote(attempt)
    assert not verdict
    assert message in verdict.message


def logprobs(engine: Any, prompt: str, continuation: str) -> list[float]:
    before, after = (engine.tokenizer(x).input_ids for x in (prompt, continuation))
    prefixes = [before + after[:i] for i in range(len(after))]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    outputs = engine.generate(prefixes, params, use_tqdm=False)
    return [
        o.outputs[0].logprobs[0][i].logprob for o, i in zip(outputs, after, strict=True)
    ]


def the_mean(*args: Any) -> float:
    values = logprobs(*args)
    return sum(values) / len(values)


def first_token_only(*args: Any) -> float:
    return logprobs(*args)[0]


def a_probability(*args: Any) -> float:
    return math.exp(sum(logprobs(*args)))


def negated(*args: Any) -> float:
    return -sum(logprobs(*args))


def prompt_alone(engine: Any, prompt: str, continuation: str) -> float:
    after = engine.tokenizer(continuation).input_ids
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    [output] = engine.generate(prompt, params, use_tqdm=False)
    return sum(output.outputs[0].logprobs[0][i].logprob for i in after)


def what_was_drawn(engine: Any, prompt: str, continuation: str) -> float:
    n = len(engine.tokenizer(continuation).input_ids)
    params = SamplingParams(temperature=0, max_tokens=n, logprobs=0)
    [output] = engine.generate(prompt, params, use_tqdm=False)
    return float(output.outputs[0].cumulative_logprob)


def a_list(*args: Any) -> Any:
    return logprobs(*args)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (the_mean, "That is the mean over the tokens"),
        (first_token_only, "That is the first token alone"),
        (a_probability, "Wanted is its logarithm"),
        (negated, "The sign is wrong"),
        (prompt_alone, "all the tokens of the continuation before it"),
        (what_was_drawn, "wanted"),
        (a_list, "it returned a list"),
    ],
)
def test_score_continuation(attempt: Callable[..., Any], message: str) -> None:
    verdict = check_score_continuation(attempt)
    assert not verdict
    assert message in verdict.message


def test_checks_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    assert check_score_continuation(lambda *args: sum(logprobs(*args)))
    assert torch.equal(before, torch.random.get_rng_state())
