"""Checks of page 00: a vote over several answers, and how likely a continuation is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from folo_lib import (
    CompletionOutput,
    LLMEngine,
    RequestOutput,
    SamplingParams,
    bundled_model_path,
    load_model,
)
from folo_lib.course.exercises import exercise, require
from folo_lib.request import RequestMetrics

__all__ = ["check_score_continuation", "check_vote"]


class ScriptedEngine:
    """Stands in for an engine: `chat` hands out answers written down beforehand."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = answers
        self.asked: list[tuple[Any, SamplingParams | None]] = []

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        self.asked.append((messages, sampling_params))
        n = sampling_params.n if sampling_params else 1
        outputs = [
            CompletionOutput(
                index=i,
                text=self.answers[i % len(self.answers)],
                token_ids=[],
                cumulative_logprob=None,
                logprobs=None,
                finish_reason="stop",
                stop_reason=None,
                seed=0,
            )
            for i in range(n)
        ]
        metrics = RequestMetrics(arrival_time=0.0)
        return [RequestOutput("scripted", None, [], outputs, True, metrics)]

    def generate(self, *args: Any, **kwargs: Any) -> list[RequestOutput]:
        require(False, "ask through engine.chat, which knows the chat template.")
        return []


# What the samples of one question say, and which of them wins.
ELECTIONS = [
    (["fox moon lake"], "fox moon lake"),
    (["foj moon lake", "fox moon lake", "fox moon lake"], "fox moon lake"),
    (["lake", "moon", "moon", "lake", "moon", "fox", "lake", "lake"], "lake"),
    (["a fox", "no", "a longer answer", "no", "a fox and a moon"], "no"),
    (["two", "one", "one", "two", "three"], "two"),
    (["", "", "yes"], ""),
]


@exercise
def check_vote(vote: Callable[[Any, str, int, int], str]) -> None:
    """`vote(engine, question, n, seed)`: the answer that most of `n` samples give."""
    for answers, wanted in ELECTIONS:
        n = len(answers)
        engine, question = ScriptedEngine(answers), f"Question {n}?"
        got = vote(engine, question, n, 10 + n)
        require(engine.asked, "the engine was not asked: call engine.chat(...).")
        check_call(engine.asked, question, n, 10 + n)
        require(
            isinstance(got, str),
            f"it returned a {type(got).__name__}; wanted is the text of one answer, "
            "a str. An output's samples are in .outputs, each with its .text.",
        )
        tie = (
            " Two share the lead: the one drawn first wins." if wanted == "two" else ""
        )
        require(
            got == wanted,
            f"the samples were {answers}; it chose {got!r}, wanted {wanted!r}.{tie}",
        )


def check_call(
    asked: list[tuple[Any, SamplingParams | None]], question: str, n: int, seed: int
) -> None:
    """The question went out once, as the user's, with the parameters that were given."""
    require(
        len(asked) == 1,
        f"engine.chat was called {len(asked)} times for n={n}; once is enough: "
        "SamplingParams(n=...) draws that many samples of one request.",
    )
    [(messages, params)] = asked
    message = messages[0] if isinstance(messages, Sequence) and messages else None
    require(
        isinstance(message, Mapping)
        and (message.get("role"), message.get("content")) == ("user", question),
        f"the engine was sent {messages!r}; wanted is a list with one message, "
        f'{{"role": "user", "content": {question!r}}}.',
    )
    require(params is not None, "pass SamplingParams to engine.chat.")
    assert params is not None
    for name, value in (("n", n), ("temperature", 1.5), ("seed", seed)):
        got = getattr(params, name)
        require(
            got == value, f"SamplingParams had {name}={got}; wanted {name}={value}."
        )


@functools.cache
def bundled_engine() -> LLMEngine:
    return LLMEngine(
        bundled_model_path(), dtype="float32", device="cpu", use_tqdm=False
    )


def score_from_logits(engine: Any, prompt: str, continuation: str) -> list[float]:
    """Each token's log-probability, in one pass over the whole text."""
    model = load_model(
        bundled_model_path(), dtype=torch.float32, device="cpu", use_tqdm=False
    )
    before, after = (engine.tokenizer(x).input_ids for x in (prompt, continuation))
    with torch.inference_mode():
        hidden = model(torch.tensor([before + after]))  # [1, S, E]
        logits = model.compute_logits(
            hidden[0, len(before) - 1 : -1]
        )  # [len(after), V]
        chosen = logits.float().log_softmax(-1)[range(len(after)), after]
    scores: list[float] = chosen.tolist()
    return scores


TEXTS = [
    ("Once upon a", " time"),
    ("Once upon a time there was a little", " badger named Mira"),
    ("A fox named Mira lived near an old mill. One day", " Mira took the"),
    ("A fox named Mira lived near an old mill. One day", ", the wind"),
]


@exercise
def check_score_continuation(score: Callable[[Any, str, str], float]) -> None:
    """`score_continuation(engine, prompt, continuation)`: its log-probability."""
    engine = bundled_engine()
    for prompt, continuation in TEXTS:
        got = score(engine, prompt, continuation)
        where = f"for {continuation!r} after {prompt!r}"
        require(
            isinstance(got, (int, float)),
            f"{where} it returned a {type(got).__name__}; wanted is a float.",
        )
        each = score_from_logits(engine, prompt, continuation)
        wanted = sum(each)
        hint = ""
        if abs(got - wanted / len(each)) < 1e-3:
            hint = " That is the mean over the tokens; wanted is their sum."
        elif abs(got - each[0]) < 1e-3:
            hint = " That is the first token alone; add those of all the others."
        elif abs(got + wanted) < 1e-3:
            hint = " The sign is wrong: a log-probability is never above 0."
        elif 0 < got <= 1:
            hint = " Is it a probability? Wanted is its logarithm, which is at most 0."
        elif len(each) > 1:
            hint = (
                " Every token is scored after the prompt and all the tokens of the "
                "continuation before it."
            )
        require(
            abs(got - wanted) < 1e-3,
            f"{where} it returned {got:.3f}, wanted {wanted:.3f}.{hint}",
        )
