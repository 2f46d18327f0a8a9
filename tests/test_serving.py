"""serving.py: many clients, one owner thread, and what happens when somebody leaves."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from folo_lib import LLMEngine, SamplingParams, bundled_model_path
from folo_lib.block_pool import PagedKVCacheManager
from folo_lib.request import RequestOutput
from folo_lib.serving import (
    LEAST_PAUSE,
    LONGEST_REST,
    AsyncLLMEngine,
    EngineDeadError,
    EngineOverloadedError,
    Outbox,
    RequestStream,
)

T = TypeVar("T")
Step: Any = partial(SimpleNamespace, arrival=None)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, seed=0)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, seed=0)
PROMPTS = [f"{'Once upon a time ' * (1 + i % 5)}{i}" for i in range(12)]


@pytest.fixture(scope="module")
def shared() -> LLMEngine:
    return LLMEngine(
        bundled_model_path(),
        device="cpu",
        use_tqdm=False,
        kv_cache_memory_bytes=2**26,
    )


@pytest.fixture
def engine(shared: LLMEngine) -> Iterator[LLMEngine]:
    """Must be left without requests, blocks or threads."""
    yield shared
    assert not shared._table.unfinished and not shared._table.groups
    assert shared.stats().num_used_blocks == 0
    kv_cache = shared.scheduler.kv_cache  # type: ignore[attr-defined]
    assert isinstance(kv_cache, PagedKVCacheManager)
    kv_cache.check_integrity([])
    names = [thread.name for thread in threading.enumerate()]
    assert "engine" not in names


@asynccontextmanager
async def serving(engine: LLMEngine, **options: Any) -> AsyncIterator[AsyncLLMEngine]:
    served = AsyncLLMEngine(engine, **options)
    try:
        yield served
    finally:
        await served.shutdown(timeout=0)
        served.owner.thread.join(10)


@contextmanager
def holding(served: AsyncLLMEngine) -> Iterator[None]:
    """Meanwhile its thread starts no request and runs no step."""
    may_go_on = threading.Event()
    served.owner.post(may_go_on.wait)
    try:
        yield
    finally:
        may_go_on.set()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Its result; a client that hangs is a failure, and not a test without an end."""
    return asyncio.run(asyncio.wait_for(work, 30))


async def last_of(stream: RequestStream) -> RequestOutput:
    [*_, last] = [output async for output in stream]
    return last


def count_steps(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each step ran, of those that ran any."""
    counts: list[int] = []
    schedule = engine.scheduler.schedule

    def noted() -> Any:
        plan = schedule()
        if plan.scheduled:
            counts.append(len(plan.scheduled))
        return plan

    monkeypatch.setattr(engine.scheduler, "schedule", noted)
    return counts


class TestAnswers:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_are_those_of_generate(self, engine: LLMEngine, temperature: float) -> None:
        params = [
            SamplingParams(temperature=temperature, seed=i, max_tokens=4 + i)
            for i in range(len(PROMPTS))
        ]
        expected = engine.generate(PROMPTS, params, use_tqdm=False)

        async def client(served: AsyncLLMEngine, i: int) -> RequestOutput:
            await asyncio.sleep(0.002 * (i % 4))
            return await last_of(served.add_request(PROMPTS[i], params[i]))

        async def main() -> list[RequestOutput]:
            async with serving(engine) as served:
                everybody = [client(served, i) for i in range(len(PROMPTS))]
                return await asyncio.gather(*everybody)

        for ours, theirs in zip(run(main()), expected, strict=True):
            assert ours.outputs == theirs.outputs

    def test_texts_grow_and_the_ends_are_told(self, engine: LLMEngine) -> None:
        async def main() -> list[RequestOutput]:
            async with serving(engine) as served:
                stream = served.generate(PROMPTS[0], GREEDY, "mine")
                return [output async for output in stream]

        outputs = run(main())
        texts = [output.outputs[0].text for output in outputs]
        assert all(b.startswith(a) for a, b in pairwise(texts))
        assert [output.finished for output in outputs[:-1]] == [False] * (
            len(outputs) - 1
        )
        assert outputs[-1].outputs[0].finish_reason == "length"
        assert {output.request_id for output in outputs} == {"mine"}

    def test_who_comes_together_runs_together(
        self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = count_steps(engine, monkeypatch)

        async def main() -> None:
            async with serving(engine) as served:
                streams = [served.add_request(p, GREEDY) for p in PROMPTS]
                await asyncio.gather(*map(last_of, streams))

        run(main())
        assert sum(counts) >= 8 * len(PROMPTS)
        assert len(counts) < 2 * 8 + 4  # not 96

    def test_samples_of_a_prompt(self, engine: LLMEngine) -> None:
        params = SamplingParams(n=3, seed=1, max_tokens=5)
        [expected] = engine.generate([PROMPTS[0]], params, use_tqdm=False)

        async def main() -> RequestOutput:
            async with serving(engine) as served:
                return await last_of(served.add_request(PROMPTS[0], params))

        assert run(main()).outputs == expected.outputs

    def test_a_slow_reader_sees_less_and_the_end(self, engine: LLMEngine) -> None:
        async def main() -> list[RequestOutput]:
            async with serving(engine) as served:
                stream = served.add_request(PROMPTS[0], GREEDY)
                while stream.latest is None or not stream.latest.finished:
                    await asyncio.sleep(0.001)
                return [output async for output in stream]

        [only] = run(main())
        assert only.finished and len(only.outputs[0].token_ids) == 8

    def test_a_loop_that_does_something_else_holds_up_nobody(
        self, engine: LLMEngine
    ) -> None:
        """Another loop gets its tokens nevertheless, and nothing piles up for the first."""
        served, idle = AsyncLLMEngine(engine), threading.Event()
        counts, num_unread = list[int](), list[int]()
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

        async def busy() -> None:
            stream = served.add_request(PROMPTS[0], LONG)
            await anext(stream)
            await asyncio.sleep(0)
            idle.wait(30)  # the loop does nothing else meanwhile
            [mailbox] = (
                box
                for loop, box in served.owner.outbox.mailboxes.items()
                if loop is asyncio.get_running_loop()
            )
            num_unread.append(len(mailbox.news))
            stream.close()

        async def quick() -> None:
            async for output in served.add_request(PROMPTS[1], params):
                counts.append(len(output.outputs[0].token_ids))
            idle.set()

        threads = [
            threading.Thread(target=asyncio.run, args=(main,))
            for main in (busy(), quick())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        run(served.shutdown())
        assert counts[-1] == 40 and len(counts) >= 5
        assert num_unread == [1]

    def test_tokens_rest_while_the_device_waits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But not if the last are long ago, for a reader's work or for a human eye."""
        outbox, pause = Outbox(), LONGEST_REST / 2
        mailbox: Any = SimpleNamespace(seconds=pause / LEAST_PAUSE)
        outbox.mailboxes = {None: mailbox}  # type: ignore[dict-item]
        late, busy = Step(has_arrived=True), Step(has_arrived=False)

        def choose(*steps: Any, ago: float) -> list[bool]:
            monkeypatch.setattr(time, "perf_counter", lambda: 1000 + ago)
            outbox.told = 1000.0
            return [outbox.is_due(step) for step in steps]

        assert choose(busy, late, busy, late, ago=0.9 * pause) == [True, False] * 2
        assert choose(late, late, ago=1.1 * pause) == [True, True]
        mailbox.seconds = 3600
        assert choose(late, ago=0.9 * LONGEST_REST) == [False]
        assert choose(late, ago=1.1 * LONGEST_REST) == [True]

    def test_tokens_are_handed_out_while_the_next_step_runs(
        self, engine: LLMEngine
    ) -> None:
        """On a device of its own; where a launch is the work itself, at once."""
        [group] = engine.processor.process_requests([PROMPTS[0]], GREEDY)
        token, end = (SimpleNamespace(request_id="a", finished=i) for i in (0, 1))

        async def main() -> list[list[Any]]:
            async with serving(engine) as served:
                owner, told = served.owner, []
                await served.ask(lambda: None)
                stream = RequestStream(group, on_close=owner.post)
                stream.put = told.append  # type: ignore[method-assign]
                history = []
                for has_device, output in [(0, token), (1, token), (1, end)]:
                    arrival = object() if has_device else None
                    owner.before_read(Step(has_arrived=False, arrival=arrival))
                    await asyncio.sleep(0.001)
                    owner.streams["a"] = stream
                    owner.deliver([output])  # type: ignore[list-item]
                    await asyncio.sleep(0.001)
                    history.append(list(told))
                stream.finished = True
                return history

        assert run(main()) == [[token], [token], [token, token, end]]

    def test_from_two_event_loops_and_a_thread_without_one(
        self, engine: LLMEngine
    ) -> None:
        expected = [
            output.outputs[0].token_ids
            for output in engine.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
        ]
        served = AsyncLLMEngine(engine)
        got: dict[int, list[int]] = {}

        async def client(i: int) -> None:
            output = await last_of(served.add_request(PROMPTS[i], GREEDY))
            got[i] = output.outputs[0].token_ids

        def blocking() -> None:
            [output] = engine.generate(PROMPTS[2], GREEDY, use_tqdm=False)
            got[2] = output.outputs[0].token_ids

        threads = [
            threading.Thread(target=asyncio.run, args=(client(0),)),
            threading.Thread(target=asyncio.run, args=(client(1),)),
            threading.Thread(target=blocking),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        run(served.shutdown())
        assert [got[i] for i in range(3)] == expected

    def test_each_loop_is_woken_once_and_for_its_own(self) -> None:
        class Stream:
            def __init__(self, loop: Loop) -> None:
                self.loop = loop

        class Loop:
            def __init__(self) -> None:
                self.calls: list[Any] = []

            def call_soon_threadsafe(self, function: Any) -> None:
                self.calls.append(function)

        outbox, loops = Outbox(), (Loop(), Loop())
        one, two, three = map(Stream, (loops[0], loops[1], loops[0]))
        news: Any = {one: 1, two: 2}
        outbox.hand_over(news)
        news = {one: 3, three: 4}
        outbox.hand_over(news)  # before the first loop has looked
        boxes: Any = [outbox.mailboxes[loop] for loop in loops]  # type: ignore[index]
        assert [loop.calls for loop in loops] == [[box.open] for box in boxes]
        assert [box.news for box in boxes] == [{one: 3, three: 4}, {two: 2}]

    def test_who_has_ended_is_forgotten(self, engine: LLMEngine) -> None:
        async def main() -> None:
            async with serving(engine) as served:
                await last_of(served.add_request(PROMPTS[0], GREEDY))
                assert await served.ask(lambda: dict(served.owner.streams)) == {}

        run(main())


class TestLeaving:
    def test_cancelled_client_gives_its_blocks_back_within_a_step(
        self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = count_steps(engine, monkeypatch)

        async def main() -> None:
            async with serving(engine) as served:
                begun = asyncio.Event()

                async def client() -> None:
                    async for _ in served.generate(PROMPTS[0], LONG):
                        begun.set()

                task = asyncio.create_task(client())
                await begun.wait()
                before = len(counts)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                stats = await served.ask(engine.stats)
                assert stats.num_running == stats.num_used_blocks == 0
                assert len(counts) <= before + 3  # one ran, and its outputs came

        run(main())

    def test_break_leaves_too(self, engine: LLMEngine) -> None:
        async def main() -> None:
            async with serving(engine) as served:
                async for _ in served.generate(PROMPTS[0], LONG):
                    break
                gc.collect()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert (await served.ask(engine.stats)).num_running == 0

        run(main())

    def test_abort_brings_a_last_output(self, engine: LLMEngine) -> None:
        async def main() -> RequestOutput:
            async with serving(engine) as served:
                stream = served.add_request(PROMPTS[0], LONG, "mine")
                await anext(stream)
                await served.abort("mine")
                await served.abort("nobody's")
                return await last_of(stream)

        last = run(main())
        assert last.outputs[0].finish_reason == "abort"
        assert 1 <= len(last.outputs[0].token_ids) < 400

    def test_an_id_is_free_again_at_once(self, engine: LLMEngine) -> None:
        """What the first one had to tell must not reach the second."""

        async def main() -> None:
            async with serving(engine) as served:
                for _ in range(20):
                    first = served.add_request(PROMPTS[0], LONG, "same")
                    await anext(first)
                    first.close()
                    first.close()
                    second = served.add_request(PROMPTS[1], GREEDY, "same")
                    last = await asyncio.wait_for(last_of(second), 10)
                    assert last.outputs[0].finish_reason == "length"
                    assert len(last.outputs[0].token_ids) == 8

        run(main())

    def test_who_leaves_late_takes_nobody_along(self, engine: LLMEngine) -> None:
        """It has ended, its reader did not look, and its id is another's by now."""

        async def main() -> RequestOutput:
            async with serving(engine) as served:
                first = served.add_request(PROMPTS[0], GREEDY, "same")
                while first.latest is None or not first.latest.finished:
                    await asyncio.sleep(0.01)
                second = served.add_request(PROMPTS[1], LONG, "same")
                await anext(second)
                first.close()
                return await last_of(second)

        assert run(main()).outputs[0].finish_reason == "length"

    def test_half_of_sixty_leave_and_the_others_do_not_notice(
        self, engine: LLMEngine
    ) -> None:
        prompts = [PROMPTS[i % 12] + f" {i}" for i in range(60)]
        expected = engine.generate(prompts, GREEDY, use_tqdm=False)

        async def client(served: AsyncLLMEngine, i: int) -> RequestOutput | None:
            stream = served.add_request(prompts[i], GREEDY)
            if i % 2:
                for _ in range(i % 5):
                    await anext(stream)
                stream.close()
                return None
            return await last_of(stream)

        async def main() -> list[RequestOutput | None]:
            async with serving(engine) as served:
                return await asyncio.gather(*(client(served, i) for i in range(60)))

        for i, output in enumerate(run(main())):
            if output is not None:
                assert output.outputs == expected[i].outputs

    @pytest.mark.more
    def test_a_thousand_clients_of_whom_half_leave(self, engine: LLMEngine) -> None:
        prompts = [PROMPTS[i % 12] + f" {i}" for i in range(1000)]
        expected = engine.generate(prompts, GREEDY, use_tqdm=False)
        rng = random.Random(0)
        delays = [rng.uniform(0, 2.0) if i % 2 else None for i in range(1000)]

        async def client(served: AsyncLLMEngine, i: int) -> RequestOutput | None:
            output = None
            with suppress(TimeoutError):
                async with asyncio.timeout(delays[i]):
                    async for output in served.generate(prompts[i], GREEDY):
                        assert output.error is None
                    return output
            return None

        async def main() -> list[RequestOutput | None]:
            async with serving(engine, max_waiting=1000) as served:
                return await asyncio.gather(*(client(served, i) for i in range(1000)))

        outputs = asyncio.run(main())
        for output, theirs in zip(outputs, expected, strict=True):
            assert output is None or output.outputs == theirs.outputs
        assert sum(output is None for output in outputs) > 50
        assert all(outputs[::2])

    def test_a_loop_that_is_gone(
        self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = count_steps(engine, monkeypatch)
        served = AsyncLLMEngine(engine)

        async def leave() -> None:
            await anext(served.add_request(PROMPTS[0], LONG))

        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave())
        loop.close()
        end = time.monotonic() + 10
        while served.owner.streams and time.monotonic() < end:
            time.sleep(0.01)
        assert not served.owner.streams
        assert len(counts) < 400, "it works on for a loop that is closed"

        async def another() -> RequestOutput:
            return await last_of(served.add_request(PROMPTS[1], GREEDY))

        assert run(another()).finished
        run(served.shutdown())


class TestRefusals:
    def test_bad_prompts_and_ids_in_use(self, engine: LLMEngine) -> None:
        async def main() -> None:
            async with serving(engine) as served:
                with pytest.raises(ValueError, match="the prompt is empty"):
                    served.add_request([], GREEDY)
                first = served.add_request(PROMPTS[0], LONG, "mine")
                again = served.generate(PROMPTS[0], GREEDY, "mine")
                with pytest.raises(ValueError, match="'mine' is in use"):
                    await anext(again)
                assert not (await anext(first)).finished
                first.close()

        run(main())

    def test_who_has_ended_or_left_waits_no_more(self, engine: LLMEngine) -> None:
        """And is not kept until the next request comes."""

        async def main() -> None:
            async with serving(engine) as served:
                with holding(served):
                    ended = served.add_request(PROMPTS[0], GREEDY)
                    left = served.add_request(PROMPTS[1], GREEDY)
                    refused = served.add_request(PROMPTS[0], GREEDY, ended.request_id)
                    assert served.owner.outbox.waiting == {ended, left, refused}
                left.close()
                with pytest.raises(ValueError, match="in use"):
                    await last_of(refused)
                await last_of(ended)
                await served.ask(lambda: None)
                assert (
                    not served.owner.outbox.waiting
                    and not served.owner.outbox.mailboxes
                )

        run(main())

    def test_too_many_wait(self, engine: LLMEngine) -> None:
        async def main() -> None:
            async with serving(engine, max_waiting=3) as served:
                with holding(served):
                    streams = [served.add_request(p, GREEDY) for p in PROMPTS[:3]]
                    with pytest.raises(EngineOverloadedError, match="3 requests wait"):
                        served.add_request(PROMPTS[3], GREEDY)
                await anext(streams[0])  # has its first token: there is room again
                await last_of(served.add_request(PROMPTS[3], GREEDY))
                await asyncio.gather(*(last_of(one) for one in streams[1:]))
                streams[0].close()

        run(main())
        with pytest.raises(ValueError, match="max_waiting=0"):
            AsyncLLMEngine(engine, max_waiting=0)


class TestTheEnd:
    def test_shutdown_lets_those_that_run_end(self, engine: LLMEngine) -> None:
        async def main() -> RequestOutput:
            served = AsyncLLMEngine(engine)
            stream = served.add_request(PROMPTS[0], GREEDY)
            ending = asyncio.create_task(served.shutdown())
            await asyncio.sleep(0)
            with pytest.raises(EngineDeadError, match="shutting down"):
                served.add_request(PROMPTS[1], GREEDY)
            await ending
            with pytest.raises(EngineDeadError, match="was shut down"):
                served.add_request(PROMPTS[1], GREEDY)
            await served.shutdown()
            await served.abort("nobody's")
            return await last_of(stream)

        assert run(main()).outputs[0].finish_reason == "length"

    def test_shutdown_does_not_wait_for_ever(self, engine: LLMEngine) -> None:
        async def main() -> None:
            served = AsyncLLMEngine(engine)
            stream = served.add_request(PROMPTS[0], LONG)
            await anext(stream)
            await served.shutdown(timeout=0.02)
            with pytest.raises(EngineDeadError, match="was shut down before"):
                await last_of(stream)

        run(main())

    def test_a_loop_that_breaks_off_tells_everybody(
        self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        schedule, num_left = engine.scheduler.schedule, [4]

        def broken() -> Any:
            num_left[0] -= 1
            if num_left[0] < 0:
                raise ZeroDivisionError("on purpose")
            return schedule()

        monkeypatch.setattr(engine.scheduler, "schedule", broken)

        async def main() -> list[Any]:
            async with serving(engine) as served:
                streams = [served.add_request(p, LONG) for p in PROMPTS]
                clients = asyncio.gather(*map(last_of, streams), return_exceptions=True)
                results = await asyncio.wait_for(clients, 10)
                with pytest.raises(EngineDeadError):
                    served.add_request(PROMPTS[0])
                return results

        results = run(main())
        assert {type(result) for result in results} == {EngineDeadError}
        assert "on purpose" in str(results[0])

    def test_a_request_that_fails_hurts_nobody_else(
        self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        [expected] = engine.generate([PROMPTS[1]], GREEDY, use_tqdm=False)

        async def main() -> list[RequestOutput]:
            async with serving(engine) as served:
                group = engine.processor.process_request(PROMPTS[0], GREEDY)
                monkeypatch.setattr(group[0].detokenizer, "append", None)
                bad = served.submit(group)
                good = served.add_request(PROMPTS[1], GREEDY)
                return await asyncio.gather(last_of(bad), last_of(good))

        bad, good = run(main())
        assert bad.outputs[0].finish_reason == "error" and bad.error
        assert good.outputs == expected.outputs

    def test_a_question_nobody_waits_for_and_one_that_fails(
        self, engine: LLMEngine
    ) -> None:
        async def main() -> None:
            async with serving(engine) as served:
                with pytest.raises(ZeroDivisionError):
                    await served.ask(lambda: 1 // 0)
                busy = threading.Event()
                served.owner.post(busy.wait)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(served.ask(busy.is_set), 0.02)
                busy.set()
                await served.ask(engine.stats)
                assert served.owner.error is None
                assert (await served.ask(engine.stats)).num_running == 0

        run(main())
