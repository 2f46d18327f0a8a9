"""An HTTP server in front of the engine, with the routes of OpenAI's API.

    python -m folo_lib.server --model Qwen/Qwen3-0.6B --port 8000

or `folo serve` with the same options. It needs the extra `serve`. Page 17 says how the engine
serves many clients; here is what clients need besides: routes, errors, keys and limits.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hmac
import json
import logging
import math
import os
import sys
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from folo_lib import __version__, bundled_model_path
from folo_lib.engine import LLMEngine
from folo_lib.request import Request as EngineRequest, RequestOutput
from folo_lib.server_metrics import ServerMetrics
from folo_lib.server_protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Transcript,
    make_error,
    read_validation_error,
)
from folo_lib.serving import (
    AsyncLLMEngine,
    EngineDeadError,
    EngineOverloadedError,
    RequestStream,
)
from folo_lib.vllm_names import name_model

__all__ = ["create_app", "main"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_BODY_BYTES = 4 * 2**20
ROUTES = "POST /v1/chat/completions and /v1/completions, GET /v1/models, /health and /metrics"
LONG_TEXT = 20_000
"""Characters from which on a text is tokenized beside the event loop, not in it."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": about}
    for status, about in {
        400: "Something is wrong with the request",
        401: "The key is missing or wrong",
        404: "No such model",
        413: "The body is too large",
        503: "Overloaded, or shutting down",
    }.items()
}
ANSWERS = ERRORS | {
    200: {
        "description": "The answer, or with `stream` its chunks as events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


class AsciiResponse(JSONResponse):
    """JSON that can hold any string: half a surrogate pair cannot be written in UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def respond(error: ApiError) -> JSONResponse:
    """An error as the client gets it; `Retry-After` where it pays to try again."""
    headers = {"Retry-After": "1"} if error.code == "overloaded" else None
    return AsciiResponse(error.body, error.status, headers)


class Gate:
    """Asks for the key, and lets no body in that is too large.

    Args:
        app: what is behind it.
        api_key: that `/v1` asks for; None: none.
        max_body_bytes: of a request.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self.app, self.api_key, self.max_body_bytes = app, api_key, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if error := self.find_fault(scope["path"], headers):
            return await respond(error)(scope, receive, send)
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise HTTPException(413, self.too_large())
            return message

        await self.app(scope, counted, send)

    def find_fault(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self.api_key is not None and path.startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not given:
                return ApiError(
                    401, "You did not provide an API key: send it as a Bearer token."
                )
            if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                message = "Incorrect API key provided."
                return ApiError(401, message, code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return ApiError(413, self.too_large())
        return None

    def too_large(self) -> str:
        return f"The body is larger than {self.max_body_bytes:,} bytes."


class Service:
    """What the routes do.

    Args:
        engine: that answers.
        name: of the model, as clients call it.
    """

    def __init__(self, engine: AsyncLLMEngine, name: str) -> None:
        self.engine, self.name = engine, name
        self.processor = engine.engine.processor
        self.metrics = ServerMetrics(engine)
        self.created = int(time.time())

    def describe_model(self) -> dict[str, Any]:
        length = self.engine.engine.max_model_len
        model = {"id": self.name, "object": "model", "created": self.created}
        return model | {"owned_by": "folo_lib", "max_model_len": length}

    def find_model(self, name: str) -> dict[str, Any]:
        if name != self.name:
            message = (
                f"The model {name!r} does not exist: this server has {self.name!r}."
            )
            raise ApiError(404, message, "model", "model_not_found")
        return self.describe_model()

    async def make_groups(
        self, asked: ChatRequest | CompletionRequest
    ) -> list[list[EngineRequest]]:
        """The engine's requests, the samples of each prompt together."""
        params = asked.get_params(self.processor.default_params)
        if isinstance(asked, ChatRequest):
            messages = [message.to_dict() for message in asked.messages]
            size = sum(len(message["content"]) for message in messages)
            work: Callable[[], list[list[EngineRequest]]] = lambda: (  # noqa: E731
                self.processor.process_chat(messages, params, asked.options)
            )
        else:
            prompts = asked.prompts
            size = sum(map(len, prompts))
            work = lambda: self.processor.process_requests(prompts, params)  # noqa: E731
        return await asyncio.to_thread(work) if size > LONG_TEXT else work()

    async def submit(
        self, asked: ChatRequest | CompletionRequest
    ) -> list[RequestStream]:
        """A stream for each prompt; none, if one of them is refused.

        Raises:
            ApiError: that says why.
        """
        self.find_model(asked.model)
        streams: list[RequestStream] = []
        try:
            self.engine.check_open()  # before the work of reading the prompt
            most = self.engine.max_waiting
            if isinstance(asked, CompletionRequest) and len(asked.prompts) > most:
                message = (
                    f"prompt holds {len(asked.prompts)} prompts: send {most} at most."
                )
                raise ApiError(400, message, "prompt")
            groups = await self.make_groups(asked)
            for group in groups:
                streams.append(self.engine.submit(group))
        except BaseException as error:
            for stream in streams:
                stream.close()
            if isinstance(error, TypeError | ValueError):
                raise ApiError.from_value_error(error) from error
            raise
        return streams

    async def answer(
        self, asked: ChatRequest | CompletionRequest, request: Request
    ) -> Response:
        """What a route answers: all at once, or as a stream of events."""
        arrival = time.perf_counter()
        streams = await self.submit(asked)
        assert self.processor.token_bytes is not None
        transcript = Transcript(asked, self.processor.token_bytes)
        has_answer = not asked.has_no_answer
        watched = [
            self.metrics.watch(stream, arrival, has_answer) for stream in streams
        ]
        if asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            events = self.write_events(transcript, watched)
            return EventResponse(events, streams, headers)
        try:
            outputs = await unless_gone(request, read_all(watched))
        finally:
            for stream in streams:
                stream.close()
        for output in outputs:
            check_output(output)
        return AsciiResponse(transcript.answer(outputs))

    async def write_events(
        self, transcript: Transcript, watched: Sequence[AsyncIterator[RequestOutput]]
    ) -> AsyncIterator[str]:
        """Server-sent events; after the first one an error is an event too."""
        try:
            async with aclosing(merge(watched)) as merged:
                async for place, output in merged:
                    check_output(output)
                    events = "".join(transcript.chunks(output, place))
                    if events:
                        yield events
        except (ApiError, EngineDeadError) as error:
            told = error if isinstance(error, ApiError) else ApiError(503, str(error))
            yield f"data: {json.dumps(told.body)}\n\n"
            yield "data: [DONE]\n\n"
            return
        yield "".join(transcript.last_events())


class EventResponse(StreamingResponse):
    """A stream of events that closes the engine's streams, however it ends.

    Also when the client left before the first event was asked for: a generator that has not
    begun has no `finally`.
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        streams: Sequence[RequestStream],
        headers: dict[str, str],
    ) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self.streams:
                stream.close()


def check_output(output: RequestOutput) -> None:
    """Raises an error for a request that failed, or that somebody else ended."""
    if output.error is not None:
        raise ApiError(500, output.error)
    if any(sample.finish_reason == "abort" for sample in output.outputs):
        raise ApiError(503, "the request was aborted.")


async def read_to_end(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    """The last output."""
    last = None
    async for output in outputs:
        last = output
    if last is None:
        raise ApiError(503, "the request was aborted.")
    return last


async def read_all(
    sources: Sequence[AsyncIterator[RequestOutput]],
) -> list[RequestOutput]:
    """The last output of each."""
    return await asyncio.gather(*map(read_to_end, sources))


async def merge(
    sources: Sequence[AsyncIterator[RequestOutput]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of several prompts as they come, each with the place of its prompt."""
    if len(sources) == 1:
        async for output in sources[0]:
            yield 0, output
        return
    waiting = {
        asyncio.ensure_future(anext(source)): place
        for place, source in enumerate(sources)
    }
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = waiting.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(sources[place]))] = place
                yield place, output
    finally:
        for task in waiting:
            task.cancel()


async def unless_gone(request: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine brings; cancelled when the client hangs up, who sees no answer."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.create_task(coroutine)
    gone = asyncio.create_task(hang_up())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client has gone.")
        return work.result()
    finally:
        gone.cancel()
        work.cancel()


def make_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/health", response_class=Response)
    async def health() -> Response:
        """200 as long as requests are taken."""
        owner = service.engine.owner
        return Response(status_code=503 if owner.error or owner.closing else 200)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """In Prometheus' format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        page = resources.files("folo_lib") / "assets" / "chat.html"
        return HTMLResponse(page.read_text(encoding="utf-8"))

    @router.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe_model()]}

    @router.get("/v1/models/{name:path}", responses={i: ERRORS[i] for i in (401, 404)})
    async def model(name: str) -> dict[str, Any]:
        return service.find_model(name)

    @router.post("/v1/completions", responses=ANSWERS)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await service.answer(asked, request)

    @router.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await service.answer(asked, request)

    return router


def create_app(
    engine: AsyncLLMEngine,
    name: str,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The server, for uvicorn or another one that speaks ASGI.

    Args:
        engine: with a tokenizer; shut down when the server ends.
        name: of the model, as clients call it.
        api_key: that the routes under `/v1` ask for; None: none.
        max_body_bytes: of a request.

    Raises:
        ValueError: if the engine has no tokenizer.
    """
    if engine.engine.tokenizer is None:
        raise ValueError("a server needs text, so the engine needs a tokenizer.")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.shutdown()

    app = FastAPI(title="FoloVLLM", version=__version__, lifespan=lifespan)
    app.include_router(make_router(Service(engine, name)))
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes)

    @app.exception_handler(ApiError)
    async def tell(_: Request, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def tell_invalid(_: Request, error: RequestValidationError) -> Response:
        return respond(read_validation_error(error.errors()))

    @app.exception_handler(EngineOverloadedError)
    async def tell_overloaded(_: Request, error: EngineOverloadedError) -> Response:
        return respond(ApiError(503, str(error), code="overloaded"))

    @app.exception_handler(EngineDeadError)
    async def tell_dead(_: Request, error: EngineDeadError) -> Response:
        return respond(ApiError(503, str(error)))

    @app.exception_handler(HTTPException)
    async def tell_http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            asked = f"{request.method} {request.url.path}"
            message = f"Unknown request URL: {asked}. This server has {ROUTES}."
        body = make_error(error.status_code, message)
        return AsciiResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def tell_fault(_: Request, error: Exception) -> Response:
        return respond(ApiError(500, f"The server failed: {type(error).__name__}."))

    return app


class Server(uvicorn.Server):
    """Uvicorn, which tells the engine at once when it is to end.

    Args:
        config: of uvicorn.
        engine: takes no requests from then on, so that streams end before the connections.
        grace: seconds that running requests have to end by themselves.
    """

    def __init__(
        self, config: uvicorn.Config, engine: AsyncLLMEngine, grace: float
    ) -> None:
        super().__init__(config)
        self.engine, self.grace = engine, grace
        self.ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.loop.call_soon_threadsafe(self.begin_shutdown)

    def begin_shutdown(self) -> None:
        if self.ending is None:
            self.ending = self.loop.create_task(self.engine.shutdown(self.grace))


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Serve a Qwen3 with the routes of OpenAI's API."
    )
    add = parser.add_argument
    bundled = "default: $FOLO_MODEL, else the bundled checkpoint"
    add("--model", help=f"a folder or hub id; {bundled}")
    add("--served-model-name", help="what clients call it; default: its own name")
    local = "default: 127.0.0.1, this machine only; 0.0.0.0 is everybody"
    add("--host", default="127.0.0.1", help=f"address to listen at; {local}")
    add("--port", type=int, default=8000)
    add("--api-key", help="that clients must send; default: $FOLO_API_KEY, else none")
    waits = "requests that may wait for a first token; others get 503 (default: 256)"
    add("--max-waiting", type=int, default=256, help=waits)
    add("--max-body-bytes", type=int, default=MAX_BODY_BYTES, help="of a request")
    waits = "seconds that requests have to end when the server is to stop (default: 5)"
    add("--shutdown-timeout", type=float, default=5.0, help=waits)
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    group = parser.add_argument_group("engine", "see folo_lib.config.EngineConfig")
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    for name in ("--dtype", "--device", "--attention-backend", "--decode"):
        group.add_argument(name, **options)
    for name in (
        "--max-model-len",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--kv-cache-memory-bytes",
        "--block-size",
        "--seed",
    ):
        group.add_argument(name, type=int, **options)
    group.add_argument("--gpu-memory-utilization", type=float, **options)
    for name in ("--enable-prefix-caching", "--enforce-eager", "--async-scheduling"):
        group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
    return parser


SERVER_OPTIONS = (
    "model",
    "served_model_name",
    "host",
    "port",
    "api_key",
    "max_waiting",
    "max_body_bytes",
    "shutdown_timeout",
    "log_level",
)


def main(argv: Sequence[str] | None = None, prog: str = "folo_lib.server") -> None:
    """`python -m folo_lib.server`; see `--help`."""
    args = vars(make_parser(prog).parse_args(argv))
    options = {name: x for name, x in args.items() if name not in SERVER_OPTIONS}
    model = args["model"] or os.environ.get("FOLO_MODEL") or bundled_model_path()
    name = args["served_model_name"] or name_model(str(model))
    try:
        engine = AsyncLLMEngine(LLMEngine(model, **options), args["max_waiting"])
        api_key = args["api_key"] or os.environ.get("FOLO_API_KEY") or None
        app = create_app(engine, name, api_key, args["max_body_bytes"])
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{prog}: error: {error}")
    config = uvicorn.Config(
        app,
        host=args["host"],
        port=args["port"],
        log_level=args["log_level"],
        timeout_graceful_shutdown=math.ceil(args["shutdown_timeout"]) + 3,
    )
    # From here on no search for garbage looks through all that was loaded, which would hold
    # up every stream for as long as many tokens take.
    gc.collect()
    gc.freeze()
    Server(config, engine, args["shutdown_timeout"]).run()


if __name__ == "__main__":
    main()
