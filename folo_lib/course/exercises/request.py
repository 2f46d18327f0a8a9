"""Checks of the exercises of page 09."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from folo_lib.course.exercises import exercise, require
from folo_lib.request import RequestMetrics

__all__ = ["check_cut_at_stop", "check_goodput", "check_hide_thought"]


@exercise
def check_cut_at_stop(cut_at_stop: Callable[[str, list[str]], str]) -> None:
    """Of `cut_at_stop`: as if the text had come character by character."""
    cases = [
        ("Yes. User: hi", ["User:"], "the stop string itself is cut off, too"),
        ("Yes. Users", ["User:"], "the stop string is not in the text"),
        ("Yes. User: hi", [], "there is no stop string"),
        ("one two three", ["three", "two"], "the order of the list does not matter"),
        ("one two one", ["one"], "the first place counts"),
        ("xabc", ["abc", "b"], "`b` is complete before `abc` is"),
        ("xabc", ["b", "abc"], "`b` is complete before `abc` is"),
        ("User: hi", ["User:"], "the text begins with it"),
    ]
    for text, stop, why in cases:
        ends = {text.find(s) + len(s): text.find(s) for s in stop if s in text}
        wanted = text[: ends[min(ends)]] if ends else text
        got = cut_at_stop(text, list(stop))
        require(
            got == wanted,
            f"for {text!r} and {stop} it returns {got!r}, and {wanted!r} is right: {why}.",
        )


def make_metrics(
    arrival: float, *tokens: float, end: float | None = None
) -> RequestMetrics:
    """Of a request that got tokens at these times and ended at `end`, if it has."""
    metrics = RequestMetrics(arrival, first_scheduled_time=arrival)
    for now in tokens:
        metrics.record_token(now)
    metrics.finished_time = end
    return metrics


def random_metrics(rng: random.Random) -> RequestMetrics:
    now = arrival = rng.uniform(100, 110)
    tokens = []
    for _ in range(rng.randint(0, 5)):
        now += rng.uniform(0, 1)
        tokens.append(now)
    return make_metrics(arrival, *tokens, end=now if rng.random() < 0.8 else None)


def expected_goodput(
    requests: list[RequestMetrics], max_ttft: float, max_tpot: float
) -> float:
    good, ends = 0, []
    arrivals = []
    for metrics in requests:
        if metrics.finished_time is not None:
            ends.append(metrics.finished_time)
            arrivals.append(metrics.arrival_time)
            if metrics.ttft is not None and metrics.tpot is not None:
                good += metrics.ttft <= max_ttft and metrics.tpot <= max_tpot
    return good / (max(ends) - min(arrivals)) if ends else 0.0


@exercise
def check_goodput(
    goodput: Callable[[list[RequestMetrics], float, float], float],
) -> None:
    """Of `goodput`: what was served in time, by the whole time."""
    fine = make_metrics(10, 11, 12, 13, end=13)
    late = make_metrics(10, 13, 14, end=14)
    slow = make_metrics(11, 12, 15, 18, end=18)
    lone = make_metrics(12, 13, end=13)
    running = make_metrics(9, 10, 11)
    failed = make_metrics(8, end=10)
    cases = {
        "one request within the limits": [fine],
        "a request whose first token was late": [fine, late],
        "a request whose tokens came too slowly": [fine, slow],
        "only requests that were late or slow": [late, slow],
        "a request of a single token, whose tpot is 0": [fine, lone],
        "a request that is still running": [fine, running],
        "only requests that are still running": [running],
        "a request that ended before its first token": [fine, failed],
        "no request": [],
    }
    rng = random.Random(9)
    for case in range(50):
        size = rng.randint(2, 8)
        cases[f"random request list {case}"] = [
            random_metrics(rng) for _ in range(size)
        ]
    for name, requests in cases.items():
        limits = (2.0, 1.0) if not name.startswith("random") else (0.5, 0.5)
        got, wanted = (
            goodput(list(requests), *limits),
            expected_goodput(requests, *limits),
        )
        require(
            isinstance(got, (int, float)) and abs(got - wanted) < 1e-9,
            f"with {name} it is {got!r}, and {wanted:.4f} is wanted, for limits of "
            f"{limits[0]} s on TTFT and {limits[1]} s on TPOT.",
        )


OPEN, CLOSE = "<think>", "</think>"


def visible(text: str, at_end: bool) -> str:
    """What can be shown of a text so far; all there will be, if it is at its end."""
    if text.startswith(OPEN):
        return text.partition(CLOSE)[2]
    return "" if OPEN.startswith(text) and not at_end else text


def watch(
    hide_thought: Callable[[Iterable[str]], Iterator[str]], pieces: list[str]
) -> list[str]:
    """All that has come out after each piece, and after the end."""
    out = [""]
    seen: list[str] = []

    def source() -> Iterator[str]:
        for i, piece in enumerate(pieces):
            if i:
                seen.append("".join(out))
            yield piece
        seen.append("".join(out))

    result = hide_thought(source())
    require(
        isinstance(result, Iterator),
        f"it returns a {type(result).__name__}: a generator, which yields pieces, is "
        "wanted.",
    )
    for piece in result:
        out.append(piece)
    require(len(seen) == len(pieces), f"it stops reading before the end of {pieces}.")
    return [*seen, "".join(out)]


@exercise
def check_hide_thought(
    hide_thought: Callable[[Iterable[str]], Iterator[str]],
) -> None:
    """Of `hide_thought`: nothing of a thought, and everything else as soon as possible."""
    texts = [
        "The sky is blue.",
        "<think>Sky. Blue?</think>The sky is blue.",
        "<think>Sky.</think>\n\n  It is blue. ",
        "<think></think>Yes",
        "<th",
        "<thin air>",
        "",
        "A <think>tag</think> in the middle.",
        " <think>A space first.</think>",
        "<think>a < b </thin </think>One</think>Two",
        "<think>a <<//think></think><think>again</think>",
        "<think>It never closes. </think",
        "</think>",
    ]
    rng = random.Random(9)
    samples = [[text] for text in texts] + [list(text) or [""] for text in texts]
    for text in [text for text in texts for _ in range(12)]:
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 12)))
        samples.append([text[a:b] for a, b in pairwise([0, *cuts, len(text)])])
    for pieces in samples:
        shown = watch(hide_thought, pieces)[-1]
        wanted = visible("".join(pieces), at_end=True)
        require(
            shown == wanted,
            f"of {pieces} it shows {shown!r}, and {wanted!r} is wanted.",
        )
    for pieces in samples:
        judge(pieces, watch(hide_thought, pieces))


def judge(pieces: list[str], seen: list[str]) -> None:
    """Was the right text shown after each piece?"""
    for n, shown in enumerate(seen[:-1], 1):
        wanted = visible("".join(pieces[:n]), at_end=False)
        require(
            shown == wanted,
            f"after {pieces[:n]} it has shown {shown!r}, and {wanted!r} is certain "
            "then: hold back no more, and no less, than may become the tag.",
        )
