"""The checks of page 09 know the mistakes that people make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from folo_lib.course.exercises.request import (
    check_cut_at_stop,
    check_goodput,
    check_hide_thought,
)
from folo_lib.request import RequestMetrics

Requests = list[RequestMetrics]


def ended(requests: Requests) -> Requests:
    return [r for r in requests if r.finished_time is not None]


def span(requests: Requests) -> float:
    ends = [r.finished_time for r in requests if r.finished_time is not None]
    return max(ends) - min(r.arrival_time for r in requests)


def is_good(r: RequestMetrics, max_ttft: float, max_tpot: float) -> bool:
    if r.ttft is None or r.tpot is None:
        return False
    return r.ttft <= max_ttft and r.tpot <= max_tpot


def of_averages(requests: Requests, max_ttft: float, max_tpot: float) -> float:
    """All of them, if they are good on average."""
    done = ended(requests)
    if not done:
        return 0.0
    ttft = sum(r.ttft or 0 for r in done) / len(done)
    tpot = sum(r.tpot or 0 for r in done) / len(done)
    return len(done) * (ttft <= max_ttft and tpot <= max_tpot) / span(done)


def with_those_that_run(requests: Requests, max_ttft: float, max_tpot: float) -> float:
    if not ended(requests):
        return 0.0
    return sum(is_good(r, max_ttft, max_tpot) for r in requests) / span(requests)


def time_of_the_good(requests: Requests, max_ttft: float, max_tpot: float) -> float:
    good = [r for r in ended(requests) if is_good(r, max_ttft, max_tpot)]
    return len(good) / span(good) if good else 0.0


def without_none(requests: Requests, max_ttft: float, max_tpot: float) -> float:
    done: list[Any] = ended(requests)
    good = [r for r in done if r.ttft <= max_ttft and r.tpot <= max_tpot]
    return len(good) / span(done) if done else 0.0


def only_ttft(requests: Requests, max_ttft: float, max_tpot: float) -> float:
    done = ended(requests)
    good = [r for r in done if r.ttft is not None and r.ttft <= max_ttft]
    return len(good) / span(done) if done else 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda requests, *limits: len(requests), "within the limits"),
        (of_averages, "whose first token was late"),
        (only_ttft, "whose tokens came too slowly"),
        (time_of_the_good, "whose first token was late"),
        (with_those_that_run, "still running"),
        (without_none, "TypeError"),
        (lambda requests, *limits: None, "it is None"),
    ],
)
def test_wrong_goodputs(wrong: Callable[..., float], message: str) -> None:
    verdict = check_goodput(wrong)
    assert not verdict
    assert message in verdict.message


def all_at_the_end(pieces: Iterable[str]) -> Iterator[str]:
    text = "".join(pieces)
    yield text.partition("</think>")[2] if text.startswith("<think>") else text


def piece_by_piece(pieces: Iterable[str]) -> Iterator[str]:
    """Looks for tags in each piece alone."""
    thinking = False
    for piece in pieces:
        if piece.startswith("<think>"):
            thinking = True
        if thinking and "</think>" in piece:
            thinking, piece = False, piece.partition("</think>")[2]
        if not thinking:
            yield piece


def anywhere(pieces: Iterable[str]) -> Iterator[str]:
    """Hides whatever comes before a closing tag, wherever that is."""
    text = "".join(pieces)
    yield text.partition("</think>")[2] if "</think>" in text else text


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    yield "".join(all_at_the_end(pieces)).strip()


def a_list(pieces: Iterable[str]) -> list[str]:
    return list(all_at_the_end(pieces))


def stream_of(pieces: Iterable[str], flush: bool, at_most: int) -> Iterator[str]:
    """Decides at the beginning, and holds back `at_most` characters at the end."""
    held, state = "", 0
    for piece in pieces:
        held += piece
        if state == 0 and held.startswith("<think>"):
            state = 1
        elif state == 0 and not "<think>".startswith(held):
            state = 2
        if state == 1 and "</think>" in held:
            state, held = 2, held.partition("</think>")[2]
        if state == 2:
            cut = len(held) - at_most
            yield held[: max(0, cut)]
            held = held[max(0, cut) :]
    if state == 2 or (flush and state == 0):
        yield held


def test_thoughts_without_a_mistake() -> None:
    assert check_hide_thought(lambda pieces: stream_of(pieces, True, 0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda pieces: iter(pieces), "is wanted"),
        (a_list, "a generator, which yields pieces, is wanted"),
        (anywhere, "it shows ' in the middle.'"),
        (stripped, "is wanted"),
        (piece_by_piece, "it shows '<think>"),
        (all_at_the_end, "hold back no more"),
        (lambda pieces: stream_of(pieces, False, 0), "'<th'] it shows ''"),
        (lambda pieces: stream_of(pieces, True, 7), "hold back no more"),
    ],
)
def test_wrong_thoughts(wrong: Callable[..., Any], message: str) -> None:
    verdict = check_hide_thought(wrong)
    assert not verdict
    assert message in verdict.message


def cut_in_turn(text: str, stop: list[str]) -> str:
    for string in stop:
        text = text.split(string)[0]
    return text


def cut_at_first_start(text: str, stop: list[str]) -> str:
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))]


def cut_after(text: str, stop: list[str]) -> str:
    ends = [text.find(s) + len(s) for s in stop if s in text]
    return text[: min(ends, default=len(text))]


def cut_at_last(text: str, stop: list[str]) -> str:
    return text[: text.rfind(stop[0])] if stop and stop[0] in text else text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (cut_in_turn, "`b` is complete before `abc` is"),
        (cut_at_first_start, "`b` is complete before `abc` is"),
        (cut_after, "the stop string itself is cut off"),
        (cut_at_last, "the order of the list does not matter"),
        (lambda text, stop: text[: text.find(stop[0])], "is not in the text"),
    ],
)
def test_cut_at_stop(wrong: Callable[[str, list[str]], str], message: str) -> None:
    verdict = check_cut_at_stop(wrong)
    assert not verdict and message in " ".join(verdict.message.split())
