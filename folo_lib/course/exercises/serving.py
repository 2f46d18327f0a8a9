"""Checks of the exercises of page 17."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

from folo_lib.course.exercises import NotYet, exercise, require
from folo_lib.sampling_params import SamplingParams
from folo_lib.serving import AsyncLLMEngine

__all__ = ["check_Turnstile", "check_count_places", "check_generate_within"]

PARAMS = SamplingParams(temperature=0, max_tokens=8)


class PuppetEngine:
    """Stands for an `AsyncLLMEngine`: a word every ten milliseconds, and a book of visits.

    Attributes:
        inside: requests that run, by client, which is the prompt's first word.
        most: how many of a client's ran at the same time.
        began: prompts in the order in which they began.
        num_words: that were written, for whoever.
        num_left: requests whose readers left before the end.
    """

    def __init__(self, num_words: int = 5, pause: float = 0.01) -> None:
        self.words = [f"word{i} " for i in range(num_words)]
        self.pause = pause
        self.inside: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.began: list[str] = []
        self.num_written = self.num_left = 0

    async def generate(
        self, prompt: str, params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Any]:
        client = prompt.split()[0]
        self.began.append(prompt)
        self.inside[client] += 1
        self.most[client] = max(self.most[client], self.inside[client])
        finished = False
        try:
            for i in range(len(self.words)):
                await asyncio.sleep(self.pause)
                self.num_written += 1
                text, finished = "".join(self.words[: i + 1]), i + 1 == len(self.words)
                sample = SimpleNamespace(text=text, token_ids=list(range(i + 1)))
                yield SimpleNamespace(
                    outputs=[sample], finished=finished, prompt=prompt
                )
        finally:
            self.inside[client] -= 1
            self.num_left += not finished


def run_in_a_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a coroutine in a thread with a loop of its own: a notebook's loop is busy.

    Raises:
        NotYet: also if it has not come to an end after three seconds.
    """
    caught: list[BaseException] = []

    def run() -> None:
        async def limited() -> None:
            task = asyncio.ensure_future(work())
            await asyncio.wait([task], timeout=3)
            if not task.done():
                task.cancel()
                raise NotYet(
                    "it is still waiting after three seconds. Is there a place in a queue "
                    "that nobody gives back?"
                )
            await task

        try:
            asyncio.run(limited())
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


@exercise
def check_count_places(count_places: Callable[[float, int, float], int]) -> None:
    """Of `count_places`: Little's law, rounded up."""
    cases = {
        (10.0, 20, 0.005): 1,
        (100.0, 20, 0.005): 10,
        (101.0, 20, 0.005): 11,
        (8.0, 250, 0.02): 40,
        (0.1, 10, 0.01): 1,
    }
    for case, wanted in cases.items():
        got = count_places(*case)
        require(
            got == wanted,
            "with {:g} requests per second of {} tokens and {:g} s per step ".format(
                *case
            )
            + f"it is {got!r}, and {wanted} places are wanted.",
        )
    require(
        isinstance(count_places(100.0, 20, 0.005), int),
        "a number of places is an int.",
    )


@exercise
def check_generate_within(
    generate_within: Callable[..., Awaitable[str]],
) -> None:
    """Of `generate_within`: the text in time, and nobody works on."""

    async def work() -> None:
        def call(puppet: PuppetEngine, seconds: float) -> Awaitable[str]:
            engine = cast(AsyncLLMEngine, puppet)
            return generate_within(engine, "fox runs", PARAMS, seconds)

        puppet = PuppetEngine(num_words=3)
        got = await call(puppet, 2.0)
        whole = "".join(puppet.words)
        require(
            got == whole,
            f"with time enough the text is {got!r}, and {whole!r} is wanted.",
        )

        puppet = PuppetEngine(num_words=100)
        begin = time.perf_counter()
        got = await call(puppet, 0.15)
        seconds = time.perf_counter() - begin
        require(
            seconds < 0.6, f"asked for 0.15 seconds, it comes back after {seconds:.1f}."
        )
        require(
            isinstance(got, str) and got and "".join(puppet.words).startswith(got),
            f"after 0.15 seconds the text is {got!r}: what has come by then is wanted.",
        )
        await asyncio.sleep(0.05)
        written = puppet.num_written
        await asyncio.sleep(0.05)
        require(
            puppet.num_written == written and not puppet.inside["fox"],
            "the engine works on for a reader who has left.",
        )

        puppet = PuppetEngine(pause=0.5)
        got = await call(puppet, 0.02)
        require(got == "", f"nothing has come yet, and the text is {got!r}, not ''.")

    run_in_a_loop(work)


@exercise
def check_Turnstile(make: Callable[..., Any]) -> None:
    """Of `Turnstile`: limits by client, order, and those who leave."""
    run_in_a_loop(lambda: visit_turnstile(make))
    run_in_a_loop(lambda: leave_turnstile(make))


async def visit_turnstile(make: Callable[..., Any]) -> None:
    puppet = PuppetEngine(num_words=2)
    gate = make(puppet, 2)
    prompts = [f"mira {i}" for i in range(6)] + ["tom 0"]
    tasks = [
        asyncio.ensure_future(gate.answer(prompt.split()[0], prompt, PARAMS))
        for prompt in prompts
    ]
    await asyncio.sleep(0.005)
    inside = dict(puppet.inside)
    require(
        inside.get("mira") == 2,
        f"mira sends six prompts and {inside.get('mira', 0)} are in the engine, not two.",
    )
    require(inside.get("tom") == 1, "tom must not wait for the places of mira.")
    require(
        gate.num_clients == 2,
        f"num_clients is {gate.num_clients}, and two have requests.",
    )
    outputs = await asyncio.gather(*tasks)
    for prompt, output in zip(prompts, outputs, strict=True):
        require(
            getattr(output, "prompt", None) == prompt and output.finished,
            f"the answer to {prompt!r} must be its last output.",
        )
    require(
        puppet.most["mira"] == 2,
        f"of mira's requests {puppet.most['mira']} were in the engine at a time, not two.",
    )
    order = [prompt for prompt in puppet.began if prompt.startswith("mira")]
    require(order == prompts[:6], f"mira's requests began in the order {order}.")
    require(
        gate.num_clients == 0,
        f"all have left, and num_clients is {gate.num_clients}.",
    )


async def leave_turnstile(make: Callable[..., Any]) -> None:
    puppet = PuppetEngine(num_words=20)
    gate = make(puppet, 1)
    running, waiting, last = (
        asyncio.ensure_future(gate.answer("mira", f"mira {i}", PARAMS))
        for i in range(3)
    )
    await asyncio.sleep(0.03)
    for task, what in ((waiting, "waits"), (running, "runs")):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
            require(False, f"a client who {what} was cancelled, and got an answer.")
    await asyncio.sleep(0.03)
    require(
        puppet.began == ["mira 0", "mira 2"],
        "the one who ran and one who waited have left, so the next is to run; what began "
        f"is {puppet.began}.",
    )
    require(
        puppet.inside["mira"] == 1,
        f"one is to be in the engine, and {puppet.inside['mira']} are.",
    )
    last.cancel()
    with suppress(asyncio.CancelledError):
        await last
    await asyncio.sleep(0.01)
    require(
        not puppet.inside["mira"], "a request runs on for a client who was cancelled."
    )
    require(gate.num_clients == 0, f"all have left: num_clients is {gate.num_clients}.")
