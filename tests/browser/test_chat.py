"""The chat page of the server: it streams, stops, and tells probabilities and prefix hits."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from folo_lib import AsyncLLMEngine, LLMEngine, bundled_model_path
from folo_lib.benchmark_serving import run_server
from folo_lib.server import create_app


@pytest.fixture(scope="module", params=[None, "secret"], ids=["open", "with a key"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, AsyncLLMEngine, Any]]:
    engine = LLMEngine(
        bundled_model_path(),
        device="cpu",
        use_tqdm=False,
        kv_cache_memory_bytes=2**26,
    )
    served = AsyncLLMEngine(engine)
    app = create_app(served, "tiny-qwen3", request.param)
    with run_server(app, served) as running:
        yield running.url, served, request.param


def test_a_chat(
    server: tuple[str, AsyncLLMEngine, Any],
    window: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, served, key = server
    faults: list[str] = []
    window.on("pageerror", lambda error: faults.append(str(error)))
    window.goto(url)
    if key is not None:
        window.get_by_text("asks for a key").wait_for()
        window.fill("#text", "Hello")
        window.press("#text", "Enter")
        window.locator("article.error", has_text="API key").wait_for()
        window.fill("#key", key)
        window.click("#anew")
    window.fill("#temperature", "0")
    window.fill("#most", "20")
    window.fill("#text", "Tell me a story about a fox who had a red kite.")
    window.press("#text", "Enter")
    first = window.locator("article.assistant .note").first
    first.wait_for()
    assert re.search(
        r"\d+ tokens read, 0 of them found in the cache", first.inner_text()
    )
    tokens = window.locator("article.assistant").first.locator(".token")
    assert tokens.count() >= 5
    tokens.first.hover()
    told = window.locator("#about").inner_text()
    assert re.search(r"had \d+\.\d %\. Likeliest: (\".+?\" \d+\.\d %(, )?){5}", told)

    window.fill("#text", "And then?")
    window.click("#send")
    second = window.locator("article.assistant .note").nth(1)
    second.wait_for()
    found = re.search(r"read, (\d+) of them found", second.inner_text())
    assert found and int(found[1]) >= 16  # the first turn is read no more

    window.uncheck("#probabilities")
    window.fill("#most", "2000")
    window.fill("#text", "Go on for a long time.")
    advance = served.owner.engine.advance

    def advance_slowly(inbox: Any) -> Any:
        time.sleep(0.2)  # the small model has told its story before a mouse is there
        return advance(inbox)

    monkeypatch.setattr(served.owner.engine, "advance", advance_slowly)
    window.click("#send")
    window.locator("article.assistant").nth(2).wait_for()
    window.click("#stop")
    monkeypatch.undo()
    window.locator("#send:enabled").wait_for()
    window.wait_for_function("document.querySelector('#stop').disabled")
    served.owner.thread.join(0.5)
    assert not served.owner.streams
    assert not faults, faults
