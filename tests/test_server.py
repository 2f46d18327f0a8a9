"""server.py through its real clients: OpenAI's, sync and async, and bare HTTP, on loopback."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import ClientDisconnect

import folo_lib
from folo_lib import LLMEngine, SamplingParams, bundled_model_path
from folo_lib.benchmark_serving import run_server
from folo_lib.request import Logprob, Request
from folo_lib.server import (
    ApiError,
    EventResponse,
    Server,
    Service,
    check_output,
    create_app,
    main,
    make_parser,
    merge,
    read_to_end,
    unless_gone,
)
from folo_lib.server_protocol import (
    UNSUPPORTED,
    CompletionRequest,
    Transcript,
    clamp,
)
from folo_lib.serving import (
    AsyncLLMEngine,
    EngineDeadError,
    EngineOverloadedError,
    RequestStream,
)

MODEL, KEY = "tiny-qwen3", "secret"
MESSAGES: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
PROMPT = "Once upon a time there was"
LONG: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}


@dataclass
class Running:
    """A server, and the engine behind it."""

    engine: LLMEngine
    served: AsyncLLMEngine
    url: str

    def wait_until_idle(self, seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while self.served.owner.streams or self.engine._table.unfinished:
            assert time.monotonic() < end, "requests are left"
            time.sleep(0.01)
        assert self.engine.stats().num_used_blocks == 0


def make_engine() -> LLMEngine:
    return LLMEngine(
        bundled_model_path(),
        device="cpu",
        use_tqdm=False,
        kv_cache_memory_bytes=2**26,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = make_engine()
    served = AsyncLLMEngine(engine, max_waiting=40)
    app = create_app(served, MODEL, KEY, max_body_bytes=100_000)
    with run_server(app, served) as running:
        yield Running(engine, served, running.url)
    assert not running.thread.is_alive() and not served.owner.thread.is_alive()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30
    ) as client:
        yield client
    server.wait_until_idle()


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:
        yield client
    server.wait_until_idle()


class TestAnswers:
    def test_chat_is_that_of_the_engine(
        self, server: Running, client: openai.OpenAI
    ) -> None:
        params = SamplingParams(temperature=0.8, top_k=20, seed=7, max_tokens=20)
        [expected] = server.engine.chat(MESSAGES, params, use_tqdm=False)
        got = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0.8,
            top_p=1,
            seed=7,
            max_completion_tokens=20,
            extra_body={"top_k": 20, "min_p": 0, "repetition_penalty": 1},
        )
        [choice] = got.choices
        assert choice.message.content == expected.outputs[0].text
        assert choice.message.role == "assistant"
        assert choice.finish_reason == expected.outputs[0].finish_reason
        assert got.usage is not None and got.usage.prompt_tokens_details is not None
        assert got.usage.prompt_tokens == len(expected.prompt_token_ids)
        assert got.usage.completion_tokens == len(expected.outputs[0].token_ids)
        cached = got.usage.prompt_tokens_details.cached_tokens
        assert cached == (len(expected.prompt_token_ids) - 1) // 16 * 16

    def test_what_is_not_said_is_taken_from_the_checkpoint(
        self, server: Running, client: openai.OpenAI
    ) -> None:
        defaults = server.engine.processor.default_params
        params = replace(defaults, seed=3, max_tokens=12)
        [expected] = server.engine.chat(MESSAGES, params, use_tqdm=False)
        got = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, seed=3, max_tokens=12
        )
        assert got.choices[0].message.content == expected.outputs[0].text

    def test_completion_of_text_and_of_ids(
        self, server: Running, client: openai.OpenAI
    ) -> None:
        params = SamplingParams(temperature=0, max_tokens=16)
        ids = server.engine.processor.encode(PROMPT)
        [expected] = server.engine.generate([PROMPT], params, use_tqdm=False)
        for prompt in (PROMPT, ids):
            got = client.completions.create(model=MODEL, prompt=prompt, temperature=0)
            assert got.choices[0].text == expected.outputs[0].text
            assert got.choices[0].finish_reason == "length"

    def test_several_prompts_and_samples(
        self, server: Running, client: openai.OpenAI
    ) -> None:
        params = SamplingParams(n=2, seed=5, max_tokens=6)
        prompts = [PROMPT, "The red kite"]
        expected = [
            sample.text
            for output in server.engine.generate(prompts, params, use_tqdm=False)
            for sample in output.outputs
        ]
        asked: dict[str, Any] = {"model": MODEL, "prompt": prompts, "n": 2, "seed": 5}
        asked |= {"temperature": 1, "top_p": 1, "max_tokens": 6}
        asked["extra_body"] = {"top_k": 0}
        got = client.completions.create(**asked)
        assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in got.choices] == expected
        assert got.usage is not None and got.usage.completion_tokens == 24
        texts = [""] * 4
        for chunk in client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == expected

    def test_stop_and_logit_bias(self, server: Running, client: openai.OpenAI) -> None:
        whole = client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=20
        )
        word = whole.choices[0].text.split()[3]
        got = client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=20, stop=[word]
        )
        assert got.choices[0].finish_reason == "stop"
        assert got.choices[0].text == whole.choices[0].text.split(word)[0]
        ids = server.engine.processor.encode(" fox")
        got = client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            temperature=0,
            max_tokens=3,
            logit_bias={str(ids[0]): 100},
        )
        assert got.choices[0].text == " fox fox fox"

    def test_logprobs_of_a_chat(self, server: Running, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6}
        asked |= {"temperature": 0, "logprobs": True, "top_logprobs": 3}
        [choice] = client.chat.completions.create(**asked).choices
        assert choice.logprobs is not None and choice.logprobs.content is not None
        content = choice.logprobs.content
        assert "".join(one.token for one in content) == choice.message.content
        for one in content:
            assert one.bytes == list(one.token.encode())
            assert one.top_logprobs[0].token == one.token
            values = [top.logprob for top in one.top_logprobs]
            assert len(values) == 3 and values == sorted(values, reverse=True)
        streamed: list[Any] = []
        for chunk in client.chat.completions.create(**asked, stream=True):
            if chunk.choices[0].logprobs is not None:
                streamed += chunk.choices[0].logprobs.content or []
        assert streamed == content

    def test_logprobs_of_a_completion(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5}
        asked |= {"temperature": 0, "logprobs": 2}
        [choice] = client.completions.create(**asked).choices
        scores = choice.logprobs
        assert scores is not None and scores.tokens is not None
        assert "".join(scores.tokens) == choice.text
        assert scores.text_offset is not None and scores.top_logprobs is not None
        assert scores.text_offset[:2] == [0, len(scores.tokens[0])]
        assert [len(top) for top in scores.top_logprobs] == [2] * 5
        offsets: list[int] = []
        for chunk in client.completions.create(**asked, stream=True):
            if chunk.choices[0].logprobs is not None:
                offsets += chunk.choices[0].logprobs.text_offset or []
        assert offsets == scores.text_offset

    @pytest.mark.parametrize("num_tokens", [0, 1, 3])
    @pytest.mark.parametrize("as_ids", [False, True])
    @pytest.mark.parametrize("stream", [False, True])
    def test_echo_scores_the_prompt(
        self,
        server: Running,
        http: httpx.Client,
        num_tokens: int,
        as_ids: bool,
        stream: bool,
    ) -> None:
        """As lm-eval asks for log-likelihoods; with 0 tokens as others do."""
        prompts: list[Any] = [PROMPT, "The red kite"]
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens or 1, logprobs=1, prompt_logprobs=1
        )
        expected = server.engine.generate(prompts, params, use_tqdm=False)
        ids = [output.prompt_token_ids for output in expected]
        body = {"model": MODEL, "prompt": ids if as_ids else prompts, "temperature": 0}
        body |= {"max_tokens": num_tokens, "logprobs": 1, "seed": 1234, "echo": True}
        for place, choice in enumerate(read_choices(http, body, stream)):
            output, scores = expected[place], choice["logprobs"]
            [sample] = output.outputs
            assert output.prompt_logprobs is not None and sample.logprobs is not None
            assert choice["text"] == prompts[place] + sample.text * (num_tokens > 0)
            assert "".join(scores["tokens"]) == choice["text"]
            assert choice["finish_reason"] == "length"
            entries = output.prompt_logprobs + sample.logprobs[:num_tokens]
            all_ids = (ids[place] + sample.token_ids)[: len(entries)]
            assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
            assert len(scores["text_offset"]) == len(entries)
            for i, entry in enumerate(entries[1:], 1):
                assert entry is not None
                expected_one = entry[all_ids[i]].logprob
                assert scores["token_logprobs"][i] == pytest.approx(
                    expected_one, abs=1e-4
                )
                top = max(one.logprob for one in entry.values())
                found = max(scores["top_logprobs"][i].values())
                assert found == pytest.approx(top, abs=1e-4)

    def test_echo_without_logprobs(self, http: httpx.Client) -> None:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 0, "echo": True}
        answer = http.post("/v1/completions", json=body | {"n": 2, "seed": 1}).json()
        assert [choice["text"] for choice in answer["choices"]] == [PROMPT] * 2
        assert answer["choices"][0]["logprobs"] is None
        assert answer["usage"]["completion_tokens"] == 0
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"]

    def test_echo_waits_for_the_scores_of_the_prompt(self, server: Running) -> None:
        """Of two samples the second may be the first to have a token."""
        params = SamplingParams(
            n=2, seed=1, max_tokens=1, logprobs=0, prompt_logprobs=0
        )
        [output] = server.engine.generate([PROMPT], params, use_tqdm=False)
        asked = CompletionRequest(
            model=MODEL, prompt=PROMPT, n=2, logprobs=0, echo=True, stream=True
        )
        token_bytes: Any = server.engine.processor.token_bytes
        transcript = Transcript(asked, token_bytes)
        assert output.prompt_logprobs is not None
        early = replace(output, prompt_logprobs=output.prompt_logprobs[:2])
        assert list(transcript.chunks(early)) == []
        events = "".join(transcript.chunks(output))
        assert events.count(PROMPT) == 2 and events.count('"length"') == 2

    @pytest.mark.parametrize("stream", [False, True])
    def test_pieces_of_characters_are_told_apart(
        self, server: Running, http: httpx.Client, stream: bool
    ) -> None:
        """The vocabulary is small, so é is two tokens, and 🙂 is four."""
        text = "été 🙂!"
        ids = server.engine.processor.encode(text)
        token_bytes = server.engine.processor.token_bytes
        assert token_bytes is not None
        raw = [token_bytes[token_id] for token_id in ids]
        body = {"model": MODEL, "prompt": text, "echo": True, "logprobs": 20}
        [choice] = read_choices(http, body | {"max_tokens": 0}, stream)
        scores = choice["logprobs"]
        assert scores["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
        assert scores["text_offset"] == [
            len(b"".join(raw[:place]).decode(errors="ignore"))
            for place in range(len(raw))
        ]

    def test_likely_pieces_of_characters_are_not_one(self, server: Running) -> None:
        """As � the unlikely one would hide the likely one, and seem to be the best."""
        token_bytes = server.engine.processor.token_bytes
        assert token_bytes is not None
        of = {token_bytes[i]: i for i in range(server.engine.processor.vocab_size)}
        entry = {of[b"\xc3"]: Logprob(-3.0, 9), of[b"\xe6"]: Logprob(-0.5, 1)}
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
        [output] = server.engine.generate([PROMPT], params, use_tqdm=False)
        [sample] = output.outputs
        sample.token_ids, sample.logprobs = [of[b"\xc3"]], [entry]
        asked = CompletionRequest(model=MODEL, prompt=PROMPT, logprobs=1)
        [choice] = Transcript(asked, token_bytes).answer([output])["choices"]
        assert choice["logprobs"]["token_logprobs"] == [-3.0]
        [top] = choice["logprobs"]["top_logprobs"]
        assert top == {"bytes:\\xe6": -0.5, "bytes:\\xc3": -3.0}

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("stop", [None, ["\ufffd"]])
    @pytest.mark.parametrize(
        ("num_tokens", "text"),
        [(0, "x�"), (1, "x��"), (2, "x橩"), (3, "x橩�")],
    )
    def test_a_character_that_is_cut_between_prompt_and_answer(
        self,
        server: Running,
        http: httpx.Client,
        num_tokens: int,
        text: str,
        stop: list[str] | None,
        stream: bool,
    ) -> None:
        token_bytes = server.engine.processor.token_bytes
        assert token_bytes is not None
        of = {token_bytes[i]: i for i in range(server.engine.processor.vocab_size)}
        body = {"model": MODEL, "prompt": [of[b"x"], of[b"\xe6"]], "echo": True}
        body |= {"max_tokens": num_tokens, "allowed_token_ids": [of[b"\xa9"]]}
        if stop is None:
            [choice] = read_choices(http, body, stream)
            assert choice["text"] == text
        else:  # the answer alone is searched, in which the second byte is a �
            body |= {"stop": stop, "include_stop_str_in_output": False}
            [choice] = read_choices(http, body, stream)
            assert choice["text"].startswith("x") and len(choice["text"]) == 2
            assert choice["finish_reason"] == ("stop" if num_tokens else "length")

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_echo_is_not_searched_for_stop_strings(
        self, http: httpx.Client, stream: bool
    ) -> None:
        """Nor is the seam, though "was a" stands there."""
        body = {"model": MODEL, "prompt": PROMPT, "echo": True, "temperature": 0}
        [whole] = read_choices(http, body, stream)
        assert whole["text"].startswith(PROMPT + " a")
        [choice] = read_choices(http, body | {"stop": ["upon", "was a"]}, stream)
        assert choice["text"] == whole["text"]
        assert choice["finish_reason"] == "length"

    def test_offsets_count_what_is_shown(
        self, server: Running, http: httpx.Client
    ) -> None:
        """The tokenizer makes one letter of e and its accent, and EOS is not shown."""
        prompt, eos = "cafe\u0301 fox", server.engine.processor.eos_token_id
        space = server.engine.processor.encode(" fox")[0]
        body = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 0}
        body |= {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
        body |= {"allowed_token_ids": [eos, space], "frequency_penalty": 2}
        [choice] = read_choices(http, body, False)
        offsets = choice["logprobs"]["text_offset"][-30:]
        shown = [token == " fox" for token in choice["logprobs"]["tokens"][-30:]]
        assert 0 < sum(shown) < 30
        expected = [len(prompt) + 4 * sum(shown[:place]) for place in range(30)]
        assert offsets == expected

    def test_a_prompt_alone_asks_for_no_token(self) -> None:
        """Whatever the checkpoint asks for."""
        asked = CompletionRequest(model=MODEL, prompt="x", echo=True, max_tokens=0)
        params = asked.get_params(SamplingParams(min_tokens=5))
        assert (params.min_tokens, params.max_tokens) == (0, 1)
        asked = asked.model_copy(update={"min_tokens": 3})
        with pytest.raises(
            ValueError, match="min_tokens=3 must be at most max_tokens=0"
        ):
            asked.get_params(SamplingParams())

    def test_a_token_that_cannot_come_has_a_number(self) -> None:
        """-inf is no JSON."""
        assert clamp(Logprob(-math.inf, 9)) == -9999.0
        assert clamp(Logprob(-0.5, 1)) == -0.5

    def test_parts_and_answers_of_earlier_turns(self, client: openai.OpenAI) -> None:
        first = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=4
        )
        turns = [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            first.choices[0].message.model_dump(),  # with all its nulls
            {"role": "user", "content": "Go on"},
        ]
        got = client.chat.completions.create(
            model=MODEL,
            messages=turns,  # type: ignore[arg-type]
            max_tokens=4,
            user="mira",
        )
        assert got.choices[0].finish_reason in ("length", "stop")

    @pytest.mark.parametrize("content", [None, [], ""])
    def test_an_empty_answer_of_an_earlier_turn(
        self, http: httpx.Client, content: Any
    ) -> None:
        """LangChain sends `[]` and LiteLLM null where vLLM takes them for ""."""
        answer = {"role": "assistant", "content": content}
        body = {"model": MODEL, "messages": [*MESSAGES, answer, *MESSAGES]}
        body |= {"max_tokens": 4, "temperature": 0}
        got = http.post("/v1/chat/completions", json=body).json()
        answer["content"] = ""
        assert got["usage"] == {
            **http.post("/v1/chat/completions", json=body).json()["usage"],
            "prompt_tokens_details": got["usage"]["prompt_tokens_details"],
        }

    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "folo_lib"


def read_chunks(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> list[dict[str, Any]]:
    """The chunks of a stream, without the end."""
    with http.stream("POST", path, json=body) as response:
        events = "".join(response.iter_text()).split("\n\n")[:-2]
    return [json.loads(event.removeprefix("data: ")) for event in events]


def read_choices(
    http: httpx.Client, body: dict[str, Any], stream: bool
) -> list[dict[str, Any]]:
    """The choices of a completion, put together again if they came in chunks."""
    if not stream:
        answer = http.post("/v1/completions", json=body).json()
        choices: list[dict[str, Any]] = answer["choices"]
        return choices
    whole: dict[int, dict[str, Any]] = {}
    for chunk in read_chunks(http, "/v1/completions", body | {"stream": True}):
        for choice in chunk["choices"]:
            known = whole.setdefault(choice["index"], choice)
            if known is not choice:
                known["text"] += choice["text"]
                known["finish_reason"] = choice["finish_reason"]
                for name, values in (choice["logprobs"] or {}).items():
                    known["logprobs"][name] += values
    return [whole[index] for index in sorted(whole)]


class TestStreams:
    def test_chunks_add_up(self, server: Running, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "seed": 1}
        asked |= {"max_tokens": 20}
        whole = client.chat.completions.create(**asked)
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        *most, end, usage = chunks
        text = "".join(chunk.choices[0].delta.content or "" for chunk in most)
        assert text == whole.choices[0].message.content
        assert end.choices[0].finish_reason == whole.choices[0].finish_reason
        assert usage.choices == [] and usage.usage is not None and whole.usage
        assert all(chunk.usage is None for chunk in (*most, end))
        assert usage.usage.completion_tokens == whole.usage.completion_tokens
        assert {chunk.id for chunk in chunks} == {chunks[0].id}

    @pytest.mark.parametrize("include_usage", [True, False])
    def test_usage_in_every_chunk(
        self, http: httpx.Client, include_usage: bool
    ) -> None:
        """GuideLLM asks for it."""
        body = {"model": MODEL, "messages": MESSAGES, "stream": True, "temperature": 0}
        body |= {"max_completion_tokens": 5, "ignore_eos": True}
        options = {"include_usage": include_usage, "continuous_usage_stats": True}
        chunks = read_chunks(
            http, "/v1/chat/completions", body | {"stream_options": options}
        )
        if not include_usage:
            assert all("usage" not in chunk for chunk in chunks)
            return
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and 1 <= counts[0] < counts[-1] == 5
        assert chunks[-1]["choices"] == []

    def test_the_last_usage_is_that_of_the_whole(self, http: httpx.Client) -> None:
        """Of several prompts and samples, each chunk counts what all of them have."""
        body = {"model": MODEL, "prompt": [PROMPT, "The"], "n": 2, "seed": 1}
        body |= {"max_tokens": 4, "ignore_eos": True, "echo": True}
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, end = read_chunks(
            http,
            "/v1/completions",
            body | {"stream": True, "stream_options": options},
        )
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and chunks[-1]["usage"] == end["usage"]
        whole = http.post("/v1/completions", json=body).json()["usage"]
        assert end["usage"]["total_tokens"] == whole["total_tokens"]
        assert end["usage"]["completion_tokens"] == 16

    def test_the_helper_of_the_client(self, client: openai.OpenAI) -> None:
        with client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, temperature=0, **LONG | {"extra_body": {}}
        ) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.content

    def test_thirty_at_a_time(self, server: Running) -> None:
        params = SamplingParams(temperature=0, max_tokens=12)
        prompts = [f"{PROMPT} a fox, number {i}" for i in range(30)]
        expected = server.engine.generate(prompts, params, use_tqdm=False)

        async def main() -> list[str]:
            async with openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
            ) as client:

                async def one(prompt: str) -> str:
                    stream = await client.completions.create(
                        model=MODEL,
                        prompt=prompt,
                        temperature=0,
                        max_tokens=12,
                        stream=True,
                    )
                    return "".join([c.choices[0].text async for c in stream])

                return await asyncio.gather(*map(one, prompts))

        texts = asyncio.run(main())
        assert texts == [output.outputs[0].text for output in expected]

    def test_what_is_on_the_wire(self, http: httpx.Client) -> None:
        body = {"model": MODEL, "prompt": PROMPT, "stream": True, "max_tokens": 3}
        with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = "".join(response.iter_text()).split("\n\n")
        assert events[-1] == "" and events[-2] == "data: [DONE]"
        for event in events[:-2]:
            assert json.loads(event.removeprefix("data: "))["object"]

    def test_an_error_after_the_first_token(
        self,
        server: Running,
        client: openai.OpenAI,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        append = Request.append_token

        def broken(self: Request, *args: Any) -> None:
            if len(self.output_token_ids) == 3:
                raise ZeroDivisionError("on purpose")
            append(self, *args)

        monkeypatch.setattr(Request, "append_token", broken)
        with pytest.raises(openai.InternalServerError, match="on purpose"):
            client.completions.create(model=MODEL, prompt=PROMPT)
        with pytest.raises(openai.APIError, match="on purpose"):
            list(client.completions.create(model=MODEL, prompt=PROMPT, stream=True))


class TestHangingUp:
    def count_steps(
        self, server: Running, monkeypatch: pytest.MonkeyPatch
    ) -> list[int]:
        counts: list[int] = []
        schedule = server.engine.scheduler.schedule

        def noted() -> Any:
            plan = schedule()
            if plan.scheduled:
                counts.append(len(plan.scheduled))
            return plan

        monkeypatch.setattr(server.engine.scheduler, "schedule", noted)
        return counts

    def test_in_the_middle_of_a_stream(
        self,
        server: Running,
        client: openai.OpenAI,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        counts = self.count_steps(server, monkeypatch)
        stream = client.completions.create(
            model=MODEL, prompt=PROMPT, stream=True, **LONG
        )
        next(stream)
        stream.close()
        server.wait_until_idle()
        assert len(counts) < 200, "it went on to the end"

    def test_before_the_first_event(self) -> None:
        """A generator that has not begun has no `finally`: the response closes its streams."""
        closed: list[str] = []
        stream: Any = SimpleNamespace(close=lambda: closed.append("stream"))

        async def events() -> AsyncIterator[str]:
            yield "data: x"

        async def never(_: Any = None) -> Any:
            raise OSError("the client has gone")

        response = EventResponse(events(), [stream], {})
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(ClientDisconnect):
            asyncio.run(response(scope, never, never))
        assert closed == ["stream"]

    def test_before_an_answer_that_is_not_streamed(
        self, server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = self.count_steps(server, monkeypatch)
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model=MODEL, prompt=PROMPT, timeout=0.1, **LONG)
        server.wait_until_idle()
        assert 0 < len(counts) < 200, "it went on to the end"

    def test_only_a_hang_up_ends_the_work(self) -> None:
        """What else the connection has to say is read past, and the work goes on."""
        messages = ["http.request", "http.disconnect"]
        ended: list[str] = []

        async def receive() -> dict[str, str]:
            await asyncio.sleep(0)
            return {"type": messages.pop(0)}

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        async def main() -> None:
            request: Any = SimpleNamespace(receive=receive)
            with pytest.raises(ApiError, match="the client has gone"):
                await unless_gone(request, work())
            await asyncio.sleep(0)

        asyncio.run(main())
        assert messages == [] and ended == ["cancelled"]

    def test_a_reader_that_never_reads_and_leaves(self, server: Running) -> None:
        body = {"model": MODEL, "prompt": [PROMPT] * 4, "stream": True, "n": 8}
        body |= {"max_tokens": 100, "ignore_eos": True, "logprobs": 20}
        text = json.dumps(body)
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        with socket.create_connection(address) as plug:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plug.sendall(
                (
                    "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                    f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(text)}\r\n\r\n{text}"
                ).encode()
            )
            time.sleep(0.3)
            answer = httpx.get(f"{server.url}/health")  # others are served meanwhile
            assert answer.status_code == 200
        server.wait_until_idle(20)


@dataclass
class Client:
    """Asks for eight tokens, and perhaps leaves at some moment.

    Attributes:
        prompt: of its own.
        arrival: seconds after the first one.
        stream: whether it wants events.
        patience: seconds after which it leaves; None: it stays.
        most_lines: that it reads before it leaves.
    """

    prompt: str
    arrival: float
    stream: bool
    patience: float | None = None
    most_lines: int = 1000
    status: int = 0
    text: str = ""

    async def run(self, port: int) -> None:
        await asyncio.sleep(self.arrival)
        body = {"model": MODEL, "prompt": self.prompt, "stream": self.stream}
        body |= {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
        content = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(self.patience):
                writer.write(head.encode() + content)
                await self.read(reader)
        except TimeoutError:
            self.status = 0
        finally:
            writer.close()

    async def read(self, reader: asyncio.StreamReader) -> None:
        num_lines = 0
        async for line in reader:
            num_lines += 1
            if line.startswith(b"HTTP/1.1 "):
                self.status = int(line.split()[1])
            elif line.startswith((b"data: {", b"{")):
                answer = json.loads(line.removeprefix(b"data: "))
                self.text += "".join(c["text"] for c in answer.get("choices", ()))
            if num_lines == self.most_lines:
                self.status = 0
                break


def count_leftovers(running: Any) -> dict[str, int]:
    """What must not grow: threads, open files and sockets, tasks, requests and streams."""
    gc.collect()
    counts = {"threads": threading.active_count()}
    if Path("/dev/fd").is_dir():
        counts["files"] = len(os.listdir("/dev/fd"))
    counts["tasks"] = running.call(lambda: len(asyncio.all_tasks()))
    kinds = (Request, RequestStream, EventResponse, asyncio.StreamWriter)
    counts["objects"] = sum(type(one) in kinds for one in gc.get_objects())
    return counts


class TestManyClients:
    @pytest.fixture
    def many(self) -> Iterator[tuple[Running, Any]]:
        engine = make_engine()
        served = AsyncLLMEngine(engine, max_waiting=1000)
        with run_server(create_app(served, MODEL), served) as running:
            yield Running(engine, served, running.url), running
        assert not running.thread.is_alive() and not served.owner.thread.is_alive()

    @pytest.mark.parametrize(
        "num_clients", [60, pytest.param(1000, marks=pytest.mark.more)]
    )
    def test_half_of_them_leave_and_nothing_is_left(
        self,
        many: tuple[Running, Any],
        num_clients: int,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        server, running = many
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        prompts = [f"{PROMPT} a fox, number {i}" for i in range(num_clients)]
        rng = random.Random(0)
        clients = [
            Client(prompt, rng.uniform(0, num_clients / 500), stream=i % 4 < 2)
            for i, prompt in enumerate(prompts)
        ]
        for client in clients[1::2]:
            if rng.random() < 0.5:
                client.patience = rng.uniform(0, 0.3)
            else:  # the first six lines are the head
                client.most_lines = rng.randrange(1, 18)

        async def come() -> None:
            port = int(running.port)
            await asyncio.gather(*(client.run(port) for client in clients))

        expected = server.engine.generate(prompts, params, use_tqdm=False)
        asyncio.run(Client(PROMPT, 0, stream=True).run(int(running.port)))
        server.wait_until_idle()
        before = count_leftovers(running)
        asyncio.run(come())
        server.wait_until_idle(30)
        # Who comes next makes the engine forget those that have waited.
        asyncio.run(Client(PROMPT, 0, stream=True).run(int(running.port)))
        server.wait_until_idle()
        for client, output in zip(clients, expected, strict=True):
            if client.status == 200:
                assert client.text == output.outputs[0].text
        assert all(client.status == 200 for client in clients[::2])
        assert sum(client.status == 0 for client in clients) > num_clients // 4
        assert not caplog.records, "a client that leaves is no error"
        kv_cache: Any = server.engine.scheduler
        kv_cache.kv_cache.check_integrity([])
        end = time.monotonic() + 30
        while (after := count_leftovers(running)) != before:  # sockets close by and by
            assert time.monotonic() < end, f"before {before}, after {after}"
            time.sleep(0.1)

    @pytest.mark.parametrize(
        "num_clients", [60, pytest.param(1000, marks=pytest.mark.more)]
    )
    def test_a_crowd_is_answered_or_told_to_come_again(
        self, many: tuple[Running, Any], num_clients: int
    ) -> None:
        server, running = many
        server.served.max_waiting = num_clients // 4
        clients = [Client(PROMPT, 0, stream=i % 2 == 0) for i in range(num_clients)]

        async def come() -> None:
            port = int(running.port)
            await asyncio.gather(*(client.run(port) for client in clients))

        asyncio.run(come())
        server.wait_until_idle(30)
        assert {client.status for client in clients} == {200, 503}
        texts = {client.text for client in clients if client.status == 200}
        assert len(texts) == 1 and texts != {""}


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "param", "said"),
        [
            ({"max_tokens": 0}, "max_tokens", "must be at least 1"),
            ({"temperature": 3}, "temperature", "at most 2"),
            ({"top_p": "1"}, "top_p", "valid number"),
            ({"n": 0}, "n", "greater than or equal to 1"),
            ({"n": 2, "temperature": 0}, "n", "temperature=0"),
            ({"seed": 2**70}, "seed", "64 bits"),
            ({"logprobs": 99}, "logprobs", "less than or equal to 20"),
            ({"stop": [""]}, "stop", "empty string"),
            ({"prompt": None}, "prompt", "valid string"),
            ({"prompt": []}, None, "empty"),
            ({"prompt": [[]]}, None, "empty"),
            ({"prompt": [10**9]}, None, "token id 1000000000"),
            ({"prompt": "\ud800"}, None, "surrogate"),
            ({"prompt": "fox " * 5000}, None, "leave room for an answer"),
            ({"prompt": "fox " * 5000}, None, "The prompt is too long: "),
            ({"prompt": ["fox", ""]}, None, "empty"),
            ({"temprature": 1}, "temprature", "Unrecognized request argument"),
            ({"logit_bias": {"fox": 1}}, "logit_bias", "fox"),
            ({"stream_options": {}}, "stream_options", "only allowed with stream"),
            ({"logit_bias": []}, "logit_bias", "logit_bias must be a JSON object."),
            ({"best_of": 3}, "best_of", "set n"),
            ({"suffix": "!"}, "suffix", "only goes on"),
            ({"echo": "yes"}, "echo", "valid boolean"),
            ({"prompt_logprobs": 1}, "prompt_logprobs", "echo and logprobs"),
        ],
    )
    def test_of_a_completion(
        self,
        http: httpx.Client,
        change: dict[str, Any],
        param: str | None,
        said: str,
    ) -> None:
        body = {"model": MODEL, "prompt": PROMPT} | change
        answer = http.post("/v1/completions", content=json.dumps(body), headers=JSON)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
        assert said in error["message"], error
        assert error["param"] == param, error

    @pytest.mark.parametrize("name", sorted(UNSUPPORTED))
    def test_fields_that_are_not_supported_are_named(
        self, http: httpx.Client, name: str
    ) -> None:
        body = {"model": MODEL, "messages": MESSAGES, name: {"some": "thing"}}
        error = http.post("/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == name and error["code"] == "unsupported_field"
        assert name in error["message"] and "not supported" in error["message"]

    def test_neutral_values_are_accepted(self, client: openai.OpenAI) -> None:
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=1,
            tools=[],
            response_format={"type": "text"},
            store=False,
            service_tier="auto",
            prediction=None,
        )

    def test_fields_that_hold_nothing_are_accepted(self, http: httpx.Client) -> None:
        empty: Any = {"refusal": "", "annotations": [], "metadata": {}, "audio": None}
        part = {"type": "text", "text": "", "annotations": [], "cache_control": None}
        messages = [
            {"role": "assistant", "content": "Hi"} | empty,
            {"role": "user", "content": [part], "name": "", "tool_calls": []},
            {"role": "user", "content": ""},
        ]
        options = {"include_usage": None, "continuous_usage_stats": None}
        body = {"model": MODEL, "messages": messages, "max_tokens": 1, "stream": True}
        answer = http.post(
            "/v1/chat/completions", json=body | {"stream_options": options}
        )
        assert answer.status_code == 200, answer.text
        assert '"usage"' not in answer.text

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"messages": []}, "at least 1"),
            ({"messages": "Hello"}, "valid list"),
            ({"messages": [{"role": "user"}]}, "messages[0].content"),
            ({"messages": ["Hi"]}, "messages[0] must be a JSON object."),
            ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                "content[0].type: Input should be 'text', for this server reads text",
            ),
            (
                {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [{}]}]},
                "messages[1].tool_calls is not supported",
            ),
            (
                {"messages": [{"role": "tool", "content": "5", "tool_call_id": "1"}]},
                "put calls and what they gave into a content",
            ),
            (
                {"tool_choice": {"type": "function"}, "tools": [{}]},
                "tools is not supported",
            ),
            ({"echo": True}, "it is for completions"),
            ({"top_logprobs": 2}, "logprobs=true"),
            ({"max_tokens": 1, "max_completion_tokens": 2}, "leave one out"),
            ({"max_completion_tokens": 0}, "max_tokens=0"),
            (
                {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
                "runs its own alone",
            ),
            ({"chat_template_kwargs": {"colour": "red"}}, "colour"),
        ],
    )
    def test_of_a_chat(
        self, http: httpx.Client, change: dict[str, Any], said: str
    ) -> None:
        body = {"model": MODEL, "messages": MESSAGES} | change
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        "content",
        ["", "{", "null", "[1]", "[" * 50_000, '{"model": 1' + "0" * 5000 + "}"],
        ids=["empty", "half", "null", "list", "deep", "digits"],
    )
    def test_what_is_no_request(self, http: httpx.Client, content: str) -> None:
        answer = http.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 400 and answer.json()["error"]["message"]

    def test_json_that_is_not_called_so(self, http: httpx.Client) -> None:
        body = json.dumps({"model": MODEL, "prompt": PROMPT})
        answer = http.post("/v1/completions", content=body)
        assert answer.status_code == 400
        assert "sent as Content-Type" in answer.json()["error"]["message"]

    def test_unknown_model_and_key(
        self, server: Running, client: openai.OpenAI
    ) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="gpt", prompt=PROMPT)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt")
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key="wrong").models.list()
        assert refused.value.code == "invalid_api_key"
        assert httpx.get(f"{server.url}/v1/models").status_code == 401

    @pytest.mark.parametrize("key", ["secre", "s", "secrets", "Secret", "ssecret"])
    def test_a_key_that_is_nearly_right(self, server: Running, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401

    def test_a_call_refused_halfway_leaves_nothing(self) -> None:
        closed: list[str] = []

        def submit(group: list[str]) -> Any:
            if group == ["c"]:
                raise EngineOverloadedError
            return SimpleNamespace(close=lambda: closed.append(group[0]))

        async def make_groups(_: Any) -> Any:
            return [["a"], ["b"], ["c"]]

        service: Any = Service.__new__(Service)
        service.find_model, service.make_groups = str, make_groups
        service.engine = SimpleNamespace(
            check_open=lambda: None, max_waiting=9, submit=submit
        )
        with pytest.raises(EngineOverloadedError):
            asyncio.run(service.submit(CompletionRequest(model=MODEL, prompt="x")))
        assert closed == ["a", "b"]

    def test_half_a_surrogate_pair_in_a_message_of_ours(
        self, http: httpx.Client
    ) -> None:
        body = json.dumps({"model": "gpt\ud800", "prompt": PROMPT, "x\ud800": 1})
        answer = http.post("/v1/completions", content=body, headers=JSON)
        assert answer.status_code == 400
        options = {"model": MODEL, "chat_template_kwargs": {"a\ud800": 1}}
        body = json.dumps(options | {"messages": MESSAGES})
        answer = http.post("/v1/chat/completions", content=body, headers=JSON)
        assert answer.status_code == 400
        assert "a\ud800" in answer.json()["error"]["message"]

    def test_unknown_urls(self, http: httpx.Client) -> None:
        for answer, status in ((http.get("/v1/what"), 404), (http.put("/health"), 405)):
            assert answer.status_code == status
            assert "Unknown request URL" in answer.json()["error"]["message"]

    @pytest.mark.parametrize("path", ["/v1/responses", "/chat/completions"])
    def test_an_unknown_url_is_told_the_routes(
        self, http: httpx.Client, path: str
    ) -> None:
        """Agents SDKs begin with /v1/responses, and a base URL may lack its /v1."""
        message = http.post(path, json={}).json()["error"]["message"]
        assert f"POST {path}. This server has" in message
        for route in http.get("/openapi.json").json()["paths"]:
            assert route.removesuffix("/{name}") in message

    def test_a_large_body_declared_or_not(self, http: httpx.Client) -> None:
        def pieces() -> Iterator[bytes]:
            for _ in range(200):
                yield b" " * 1000

        for content in (b" " * 200_000, pieces()):
            answer = http.post("/v1/completions", content=content, headers=JSON)
            assert answer.status_code == 413
            assert "larger than 100,000 bytes" in answer.json()["error"]["message"]

    def test_too_many_at_a_time(
        self,
        server: Running,
        client: openai.OpenAI,
        http: httpx.Client,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The client waits a second, and tries again by itself, unless told otherwise."""
        monkeypatch.setattr(server.served, "max_waiting", 0)
        with pytest.raises(openai.InternalServerError, match="requests wait already"):
            client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1)
        raw = http.post("/v1/completions", json={"model": MODEL, "prompt": PROMPT})
        assert (raw.status_code, raw.headers["retry-after"]) == (503, "1")

    @pytest.mark.parametrize(
        ("error", "status", "said"),
        [
            (EngineDeadError("the engine broke off."), 503, "the engine broke off."),
            (KeyError("secret"), 500, "The server failed: KeyError."),
        ],
    )
    def test_an_engine_that_is_dead_or_raises_what_nobody_expected(
        self,
        server: Running,
        http: httpx.Client,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        status: int,
        said: str,
    ) -> None:
        """What the client is told holds no detail of an error that is not ours."""

        def submit(_: Any) -> Any:
            raise error

        monkeypatch.setattr(server.served, "submit", submit)
        body = {"model": MODEL, "prompt": PROMPT}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["message"] == said

    def test_a_request_that_somebody_else_ended(self) -> None:
        """An answer that was cut short must not look like a whole one."""

        async def nothing() -> AsyncIterator[Any]:
            for output in ():
                yield output

        sample = SimpleNamespace(finish_reason="abort")
        output: Any = SimpleNamespace(error=None, outputs=[sample])
        with pytest.raises(ApiError, match="aborted") as told:
            check_output(output)
        assert told.value.status == 503
        with pytest.raises(ApiError, match="aborted"):
            asyncio.run(read_to_end(nothing()))

    def test_more_prompts_than_may_ever_wait(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="41 prompts: send 40 at most"):
            client.completions.create(model=MODEL, prompt=[PROMPT] * 41)


def test_a_completion_has_16_tokens_unless_it_says_more() -> None:
    """Also of a checkpoint that says another number."""
    defaults = SamplingParams(max_tokens=100)
    for said, expected in (({}, 16), ({"max_tokens": 5}, 5), ({"min_tokens": 20}, 20)):
        asked = CompletionRequest(model=MODEL, prompt=PROMPT, **said)
        assert asked.get_params(defaults).max_tokens == expected


JSON = {"Content-Type": "application/json"}


class TestBeside:
    def test_metrics(self, http: httpx.Client) -> None:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
        before = read_metrics(http)
        http.post("/v1/completions", json=body)
        after = read_metrics(http)
        new = {name: after[name] - before.get(name, 0) for name in after}
        assert new["folo_generated_tokens_total"] == 3
        assert new["folo_time_to_first_token_seconds_count"] == 1
        assert 0 <= new["folo_inter_token_latency_seconds_count"] <= 2
        assert new['folo_requests_ended_total{reason="length"}'] == 1
        assert new["folo_prefix_tokens_total"] > 0
        assert after["folo_requests_running"] == 0
        assert after["folo_kv_cache_usage_ratio"] == 0

    def test_a_token_that_nobody_sees_is_not_counted(
        self, server: Running, http: httpx.Client
    ) -> None:
        eos = server.engine.processor.eos_token_id
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 0, "echo": True}
        before = read_metrics(http)
        [choice] = read_choices(http, body | {"allowed_token_ids": [eos]}, False)
        assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
        after = read_metrics(http)
        new = {name: after[name] - before.get(name, 0) for name in after}
        assert new["folo_generated_tokens_total"] == 0
        assert new["folo_time_to_first_token_seconds_count"] == 0
        assert new['folo_requests_ended_total{reason="length"}'] == 1
        assert new.get('folo_requests_ended_total{reason="stop"}', 0) == 0

    def test_ranges_in_the_document_are_those_of_the_engine(self) -> None:
        limited = 0
        for name, field in CompletionRequest.model_json_schema()["properties"].items():
            step = 1 if {"type": "integer"} in field.get("anyOf", []) else 1e-3
            for limit, outwards in (("minimum", -step), ("maximum", step)):
                exclusive = "exclusive" + limit.capitalize()
                if limit in field:
                    inside = field[limit]
                    outside = inside + outwards
                elif exclusive in field:
                    outside = field[exclusive]
                    inside = outside - outwards
                else:
                    continue
                limited += 1
                asked = {"model": MODEL, "prompt": PROMPT, name: inside}
                if name not in ("n", "temperature"):
                    asked["temperature"] = 1.0
                CompletionRequest(**asked).get_params(SamplingParams())
                with pytest.raises(ValueError, match=name):
                    CompletionRequest(**asked | {name: outside}).get_params(
                        SamplingParams()
                    )
        assert limited >= 14

    def test_the_document_tells_of_events(self, server: Running) -> None:
        document = httpx.get(f"{server.url}/openapi.json").json()
        for path in ("/v1/completions", "/v1/chat/completions"):
            answers = document["paths"][path]["post"]["responses"]
            kinds = {"application/json", "text/event-stream"}
            assert set(answers["200"]["content"]) == kinds
            assert {"400", "401", "404", "413", "503"} <= set(answers)

    def test_health_and_the_chat_page_need_no_key(self, server: Running) -> None:
        assert httpx.get(f"{server.url}/health").status_code == 200
        page = httpx.get(f"{server.url}/")
        assert page.headers["content-type"].startswith("text/html")
        assert "http://" not in page.text.replace("http://www.w3.org", "")

    def test_an_engine_without_tokenizer(self, server: Running) -> None:
        folder = bundled_model_path()
        model = folo_lib.load_model(folder, device="cpu", use_tqdm=False)
        engine = LLMEngine(model, kv_cache_memory_bytes=2**24)
        served = AsyncLLMEngine(engine)
        with pytest.raises(ValueError, match="needs a tokenizer"):
            create_app(served, MODEL)
        asyncio.run(served.shutdown())

    def test_options_are_those_of_the_engine(self) -> None:
        options = ["--max-num-seqs", "8", "--no-enable-prefix-caching"]
        args = vars(make_parser("x").parse_args(options))
        assert args["max_num_seqs"] == 8 and args["enable_prefix_caching"] is False
        assert args["host"] == "127.0.0.1" and "block_size" not in args

    def test_merge_passes_an_error_on(self) -> None:
        async def good() -> Any:
            yield 1
            await asyncio.sleep(10)

        async def bad() -> Any:
            yield 2
            raise ZeroDivisionError

        async def main() -> list[Any]:
            got = []
            with pytest.raises(ZeroDivisionError):
                async for pair in merge([good(), bad()]):
                    got.append(pair)
            return got

        assert sorted(asyncio.run(main())) == [(0, 1), (1, 2)]


def read_metrics(http: httpx.Client) -> dict[str, float]:
    lines = http.get("/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


class TestCommand:
    def test_the_signal_to_end_ends_streams_with_an_error(self) -> None:
        engine = LLMEngine(
            bundled_model_path(),
            device="cpu",
            use_tqdm=False,
            kv_cache_memory_bytes=2**26,
        )
        served = AsyncLLMEngine(engine)
        with run_server(create_app(served, MODEL), served, grace=0.1) as running:
            url = f"{running.url}/v1"
            client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
            stream = client.completions.create(
                model=MODEL, prompt=[PROMPT] * 4, stream=True, **LONG
            )
            next(stream)
            running.server.handle_exit(signal.SIGTERM, None)
            ending = running.call(lambda: running.server.ending)
            running.server.handle_exit(signal.SIGTERM, None)
            assert running.call(lambda: running.server.ending) is ending is not None
            with pytest.raises(openai.APIError, match="shut down before the end"):
                list(stream)
            running.thread.join(10)
            assert not running.thread.is_alive()
        assert engine.stats().num_used_blocks == 0

    @pytest.mark.more
    def test_sigterm_under_load(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        env = os.environ | {"PYTHONPATH": str(Path(folo_lib.__file__).parents[1])}
        command = [sys.executable, "-m", "folo_lib.server", "--port", str(port)]
        command += ["--device", "cpu", "--shutdown-timeout", "0.5"]
        process = subprocess.Popen([*command, "--log-level", "warning"], env=env)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
            stream = client.completions.create(
                model=MODEL, prompt=[PROMPT] * 30, stream=True, n=4, **LONG
            )
            next(stream)
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shut down before the end"):
                list(stream)
            process.wait(10)
            assert time.monotonic() - begin < 10
        finally:
            process.kill()
            process.wait()

    def test_it_serves_what_its_arguments_say(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun: list[Server] = []
        order: list[str] = []
        monkeypatch.setattr(gc, "collect", lambda: order.append("collect"))
        monkeypatch.setattr(gc, "freeze", lambda: order.append("freeze"))
        monkeypatch.setattr(
            Server, "run", lambda server: begun.append(server) or order.append("run")
        )
        monkeypatch.setenv("FOLO_API_KEY", KEY)
        words = "--device cpu --host 127.0.0.2 --port 8123 --max-waiting 3 "
        words += "--served-model-name fox --max-num-seqs 5 --shutdown-timeout 0.5"
        main(words.split())
        (server,) = begun
        # What was loaded is in no later search for garbage, which would stop all streams.
        assert order[-3:] == ["collect", "freeze", "run"]
        config, engine = server.config, server.engine
        assert (config.host, config.port) == ("127.0.0.2", 8123)
        assert (engine.max_waiting, engine.engine.scheduler.max_num_seqs) == (3, 5)
        assert (server.grace, config.timeout_graceful_shutdown) == (0.5, 4)

        async def ask(key: str) -> httpx.Response:
            app: Any = config.app
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport) as client:
                headers = {"Authorization": f"Bearer {key}"}
                return await client.get("http://x/v1/models", headers=headers)

        try:
            assert asyncio.run(ask("wrong")).status_code == 401
            models = asyncio.run(ask(KEY)).json()
            assert [model["id"] for model in models["data"]] == ["fox"]
        finally:
            asyncio.run(engine.shutdown())

    def test_a_mistake_is_said_in_one_line(self) -> None:
        with pytest.raises(SystemExit, match=r"^folo serve: error: max_num_seqs=0"):
            main(["--max-num-seqs", "0"], prog="folo serve")


def wait_for(url: str) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError(url)
