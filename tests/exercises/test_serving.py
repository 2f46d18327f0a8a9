"""Plausible mistakes in the exercises of page 17, and what the checks say about them."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from folo_lib.course.exercises.serving import (
    check_count_places,
    check_generate_within,
    check_Turnstile,
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda r, n, s: int(r * n * s), "with 101 requests per second"),
        (lambda r, n, s: math.ceil(r * s), "with 100 requests per second"),
        (lambda r, n, s: math.ceil(r * n), "with 10 requests per second"),
        (lambda r, n, s: float(math.ceil(round(r * n * s, 9))), "is an int"),
    ],
)
def test_wrong_places(wrong: Callable[..., Any], message: str) -> None:
    verdict = check_count_places(wrong)
    assert not verdict and message in verdict.message


async def waits_for_the_end(engine: Any, prompt: str, params: Any, s: float) -> str:
    text = ""
    async for output in engine.generate(prompt, params):
        text = output.outputs[0].text
    return text


async def raises(engine: Any, prompt: str, params: Any, s: float) -> str:
    return await asyncio.wait_for(waits_for_the_end(engine, prompt, params, s), s)


async def gives_each_token_its_time(
    engine: Any, prompt: str, params: Any, s: float
) -> str:
    text, stream = "", engine.generate(prompt, params)
    while True:
        try:
            output = await asyncio.wait_for(anext(stream), s)
        except (TimeoutError, StopAsyncIteration):
            return text
        text = output.outputs[0].text


async def lets_it_run_on(engine: Any, prompt: str, params: Any, s: float) -> str:
    texts = [""]

    async def read() -> None:
        async for output in engine.generate(prompt, params):
            texts.append(output.outputs[0].text)

    await asyncio.wait([asyncio.create_task(read())], timeout=s)
    return texts[-1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (waits_for_the_end, "it comes back after"),
        (raises, "TimeoutError"),
        (gives_each_token_its_time, "it comes back after"),
        (lets_it_run_on, "works on for a reader who has left"),
    ],
)
def test_wrong_timeouts(wrong: Callable[..., Any], message: str) -> None:
    verdict = check_generate_within(wrong)
    assert not verdict and message in verdict.message, verdict.message


class Base:
    """Right but for what a subclass changes; and it never forgets a client."""

    def __init__(self, engine: Any, limit: int) -> None:
        self.engine = engine
        self.places: Any = defaultdict(lambda: asyncio.Semaphore(limit))

    async def answer(self, client: str, prompt: str, params: Any) -> Any:
        async with self.places[client]:
            return await self.read(prompt, params)

    async def read(self, prompt: str, params: Any) -> Any:
        outputs = [one async for one in self.engine.generate(prompt, params)]
        return outputs[-1]

    @property
    def num_clients(self) -> int:
        return len(self.places)


class NoLimit(Base):
    async def answer(self, client: str, prompt: str, params: Any) -> Any:
        return await self.read(prompt, params)


class OneLimitForAll(Base):
    async def answer(self, client: str, prompt: str, params: Any) -> Any:
        return await super().answer("all", prompt, params)


class KeepsThePlace(Base):
    """Gives it back only when all goes well."""

    def __init__(self, engine: Any, limit: int) -> None:
        super().__init__(engine, limit)
        self.names: dict[str, int] = defaultdict(int)

    async def answer(self, client: str, prompt: str, params: Any) -> Any:
        self.names[client] += 1
        await self.places[client].acquire()
        output = await self.read(prompt, params)
        self.places[client].release()
        self.names[client] -= 1
        return output

    @property
    def num_clients(self) -> int:
        return sum(count > 0 for count in self.names.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (NoLimit, "six prompts and 6 are in the engine"),
        (OneLimitForAll, "tom must not wait"),
        (Base, "all have left, and num_clients is 2"),
        (KeepsThePlace, "the next is to run"),
    ],
)
def test_wrong_turnstiles(wrong: Callable[..., Any], message: str) -> None:
    verdict = check_Turnstile(wrong)
    assert not verdict and message in verdict.message, verdict.message
