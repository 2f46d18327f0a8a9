"""Many clients: the benchmark's section `serving`."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from folo_lib.benchmark import BenchmarkError, Result, make_prompt, summarize
from folo_lib.benchmark_bench import Bench
from folo_lib.benchmark_threads import clock_threads, sample_thread
from folo_lib.benchmark_workloads import without_garbage
from folo_lib.engine import LLMEngine
from folo_lib.sampling_params import SamplingParams
from folo_lib.serving import AsyncLLMEngine

if TYPE_CHECKING:
    from fastapi import FastAPI

    from folo_lib.server import Server

PERCENTILES = (50, 90, 99)
T = TypeVar("T")


@dataclass(frozen=True)
class ServingSizes:
    """How much the section runs; it stands in the results, not in the file's setup.

    Attributes:
        streams: that run at the same time, beside `generate` with the same prompts.
        stream_tokens: of each of them.
        num_runs: of each way to serve, in turns.
        places: `max_num_seqs` under load.
        num_requests: of each load; half as many find out the capacity before it.
        shortest, longest: tokens of a prompt, and of an answer, under load.
        loads: arrivals per second in the open loop, as shares of the capacity.
        max_ttft, max_gap: the promise; a request keeps it if its first token comes within the
            one, and its others within the other on average, in seconds.
    """

    streams: int = 32
    stream_tokens: int = 100
    num_runs: int = 7
    places: int = 16
    num_requests: int = 200
    shortest: int = 16
    longest: int = 64
    loads: Sequence[float] = (0.5, 0.8, 0.95, 1.1)
    max_ttft: float = 0.2
    max_gap: float = 0.05


ON_GPU = ServingSizes(
    streams=64,
    stream_tokens=256,
    num_runs=5,
    places=64,
    num_requests=800,
    shortest=64,
    longest=256,
    max_gap=0.02,
)


async def read_all(
    served: AsyncLLMEngine, prompts: Sequence[list[int]], params: SamplingParams
) -> list[Visit]:
    """Streams that begin at the same time, and what the client of each saw."""

    async def read(prompt: list[int]) -> Visit:
        done = await visit(served, prompt, params, time.perf_counter())
        if done.num_tokens != params.max_tokens:
            raise RuntimeError(f"a stream ended after {done.num_tokens} tokens.")
        return done

    return list(await asyncio.gather(*map(read, prompts)))


@dataclass
class Running:
    """A server in a thread of its own.

    Attributes:
        server: of uvicorn, as `folo serve` starts it.
        thread: in which its event loop runs.
        host, port: where it listens.
    """

    server: Server
    thread: threading.Thread
    host: str
    port: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def call(self, function: Callable[[], T]) -> T:
        """What a function returns that the event loop calls."""

        async def answer() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(answer(), self.server.loop).result()


@contextmanager
def run_server(
    app: FastAPI, served: AsyncLLMEngine, grace: float = 5.0
) -> Iterator[Running]:
    """A server on a free port of this machine; the engine ends with it.

    Args:
        app: of `create_app`.
        served: the engine behind it.
        grace: seconds that running requests have when it is told to end.
    """
    import uvicorn

    from folo_lib.server import Server

    listening = socket.create_server(("127.0.0.1", 0))
    # What the extra `serve` installs, also where uvicorn would find something faster.
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        log_level="error",
        timeout_graceful_shutdown=5,
    )
    server = Server(config, served, grace)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.001)
    try:
        yield Running(server, thread, "127.0.0.1", str(listening.getsockname()[1]))
    finally:
        server.should_exit = True
        thread.join(20)


def read_over_http(
    running: Running, prompts: Sequence[list[int]], params: SamplingParams
) -> Result:
    """The same through HTTP, with the clients in a process of their own."""
    bodies = [
        {
            "model": "model",
            "prompt": prompt,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": params.max_tokens,
            "ignore_eos": True,
        }
        for prompt in prompts
    ]
    command = [sys.executable, "-m", "folo_lib.benchmark_clients"]
    command += [running.host, running.port]
    done = subprocess.run(
        command, input=json.dumps(bodies), capture_output=True, text=True
    )
    if done.returncode:
        raise BenchmarkError(f"the clients failed:\n{done.stderr[-500:]}")
    result: Result = json.loads(done.stdout)
    if result["tokens"] != len(prompts) * (params.max_tokens or 0):
        raise BenchmarkError(f"the clients got {result['tokens']} tokens.")
    return result


class Streams:
    """The same prompts through `generate`, `AsyncLLMEngine` and, with a server, HTTP.

    Args:
        bench: knows the vocabulary.
        served: over the engine that is measured.
        running: a server in front of it; None: HTTP is left out.
        sizes: how many streams, and how long.
    """

    def __init__(
        self,
        bench: Bench,
        served: AsyncLLMEngine,
        running: Running | None,
        sizes: ServingSizes,
    ) -> None:
        self.served, self.engine, self.running = served, served.engine, running
        self.sizes, vocab_size = sizes, bench.config.vocab_size
        self.prompts = [make_prompt(vocab_size, 32, i) for i in range(sizes.streams)]
        self.params = SamplingParams(
            temperature=0, max_tokens=sizes.stream_tokens, ignore_eos=True
        )
        self.first = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        self.visits: list[Visit] = []  # of all streams, without HTTP
        self.ways: dict[str, Callable[[], float]] = {
            "generate": self.generate,
            "async": self.stream,
        }
        if running is not None:
            self.ways["http"] = lambda: self.ask(running)

    def generate(self) -> float:
        """Seconds for all of them."""
        begin = time.perf_counter()
        self.engine.generate(self.prompts, self.params, use_tqdm=False)
        return time.perf_counter() - begin

    def stream(self) -> float:
        """The same as streams."""
        begin = time.perf_counter()
        self.visits += asyncio.run(read_all(self.served, self.prompts, self.params))
        return time.perf_counter() - begin

    def ask(self, running: Running) -> float:
        """The same through HTTP; the start of the clients' process is not counted."""
        seconds: float = read_over_http(running, self.prompts, self.params)["seconds"]
        return seconds

    def measure_speeds(self) -> Result:
        """Tokens per second of each way, in turns; of the streams how they come.

        `outputs`: that a stream got on average, fewer than tokens where some came together;
        `gaps`: percentiles of the seconds between two outputs.
        """
        total = self.sizes.streams * self.sizes.stream_tokens
        speeds: dict[str, list[float]] = {name: [] for name in self.ways}
        for _ in range(self.sizes.num_runs + 1):  # the first warms up
            for name, run in self.ways.items():
                speeds[name].append(total / run())
        rows = {name: summarize(values[1:]) for name, values in speeds.items()}
        for name in list(rows)[1:]:
            pairs = zip(speeds[name][1:], speeds["generate"][1:], strict=True)
            share = statistics.median(ours / all_ for ours, all_ in pairs)
            rows[name]["of_generate"] = share
        outputs = [len(visit.times) for visit in self.visits]
        gaps = [b - a for visit in self.visits for a, b in pairwise(visit.times)]
        cuts = statistics.quantiles(gaps, n=100, method="inclusive")
        rows["async"]["outputs"] = statistics.mean(outputs)  # of a stream
        rows["async"]["gaps"] = {f"p{p}": cuts[p - 1] for p in PERCENTILES}
        for name, row in rows.items():
            share = row.get("of_generate", 1)
            print(f"{name}: {row['median']:,.0f} tokens/s, {share:.0%}", flush=True)
        return rows

    def measure_first_tokens(self) -> Result:
        """Seconds until one client that is alone has its first token."""
        ttft: dict[str, list[float]] = {name: [] for name in self.ways}
        del ttft["generate"]
        alone = self.prompts[:4]
        for prompt in alone * (self.sizes.num_runs + 1):  # the first of each warms up
            visits = asyncio.run(read_all(self.served, [prompt], self.first))
            ttft["async"] += [one.ttft for one in visits]
            if self.running is not None:
                done = read_over_http(self.running, [prompt], self.first)
                ttft["http"] += done["ttft"]
        medians = {
            name: statistics.median(values[len(alone) :])
            for name, values in ttft.items()
        }
        print(f"one client's first token: {medians}", flush=True)
        return medians

    def measure_threads(self) -> Result:
        """Where the time of a step goes in each way, and what the event loop does."""
        here, running = time.thread_time, self.running

        def owner() -> float:
            return asyncio.run(self.served.ask(time.thread_time))

        result: Result = {
            "generate": clock_threads(self.engine, self.generate, None, here),
            "async": clock_threads(self.engine, self.stream, owner, here),
        }
        if running is not None:
            loop = lambda: running.call(time.thread_time)  # noqa: E731
            run = self.ways["http"]
            result["http"] = clock_threads(self.engine, run, owner, loop)
            result["event_loop"] = sample_thread(running.thread, run)
        for name, row in result.items():
            print(f"threads, {name}: {json.dumps(row)}", flush=True)
        return result


def find_missing() -> str | None:
    """The package that the server needs and that is not here, if there is one."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            return package
    return None


def run_streams(bench: Bench, engine: LLMEngine, sizes: ServingSizes) -> Result:
    """Tokens per second of `generate`, of `AsyncLLMEngine` and through HTTP, in turns.

    And the time to the first token of one client alone, through the engine and through HTTP,
    and where the time of a step goes. HTTP is left out where a package is missing.
    """
    served, missing = AsyncLLMEngine(engine), find_missing()
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        running = None
        if missing is None:
            from folo_lib.server import create_app

            app = create_app(served, "model")
            running = stack.enter_context(run_server(app, served))
        else:
            left_out["http"] = f"{missing} is missing: pip install 'folo-lib[serve]'"
            print(f"HTTP is left out: {left_out['http']}", flush=True)
            stack.callback(lambda: asyncio.run(served.shutdown()))
        streams = Streams(bench, served, running, sizes)
        return {
            "speeds": streams.measure_speeds(),
            "ttft_alone": streams.measure_first_tokens(),
            "threads": streams.measure_threads(),
            "left_out": left_out,
        }


def make_load(
    bench: Bench, sizes: ServingSizes
) -> list[tuple[list[int], SamplingParams]]:
    """Prompts and answers of mixed lengths, always the same."""
    rng = random.Random(0)
    lengths = sizes.shortest, sizes.longest
    return [
        (
            make_prompt(bench.config.vocab_size, rng.randint(*lengths), seed),
            SamplingParams(
                temperature=0, max_tokens=rng.randint(*lengths), ignore_eos=True
            ),
        )
        for seed in range(sizes.num_requests)
    ]


@dataclass
class Visit:
    """What one client saw: seconds from its arrival to each of its outputs."""

    times: list[float]
    num_tokens: int

    @property
    def ttft(self) -> float:
        return self.times[0]

    @property
    def gap(self) -> float:
        """Seconds per token after the first."""
        return (self.times[-1] - self.times[0]) / max(1, self.num_tokens - 1)


async def visit(
    served: AsyncLLMEngine, prompt: list[int], params: SamplingParams, arrival: float
) -> Visit:
    """One request, timed from the moment at which it should have come."""
    await asyncio.sleep(arrival - time.perf_counter())
    times, num_tokens = [], 0
    async for output in served.generate(prompt, params):
        if output.error:
            raise RuntimeError(f"a request failed: {output.error}")
        times.append(time.perf_counter() - arrival)
        num_tokens = len(output.outputs[0].token_ids)
    return Visit(times, num_tokens)


async def run_closed(
    served: AsyncLLMEngine,
    load: Sequence[tuple[list[int], SamplingParams]],
    clients: int,
) -> tuple[list[Visit], float]:
    """So many clients, each of whom sends a request when the last one is answered."""
    left, visits = iter(load), []

    async def client() -> None:
        for prompt, params in left:
            visits.append(await visit(served, prompt, params, time.perf_counter()))

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return visits, time.perf_counter() - begin


async def run_open(
    served: AsyncLLMEngine,
    load: Sequence[tuple[list[int], SamplingParams]],
    rate: float,
) -> tuple[list[Visit], float]:
    """Poisson arrivals, whether or not anybody has been answered."""
    rng, begin = random.Random(1), time.perf_counter()
    arrival, coming = begin, []
    for prompt, params in load:
        arrival += rng.expovariate(rate)
        coming.append(visit(served, prompt, params, arrival))
    visits = await asyncio.gather(*coming)
    return list(visits), time.perf_counter() - begin


def describe_visits(
    visits: Sequence[Visit], seconds: float, sizes: ServingSizes
) -> Result:
    """Percentiles of what the clients saw, and the goodput."""
    kept = sum(v.ttft <= sizes.max_ttft and v.gap <= sizes.max_gap for v in visits)
    result: Result = {"requests": len(visits), "seconds": seconds}
    result |= {"rate": len(visits) / seconds, "goodput": kept / seconds}
    for name, values in (
        ("ttft", [v.ttft for v in visits]),
        ("itl", [v.gap for v in visits]),
    ):
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        result[name] = {f"p{p}": cuts[p - 1] for p in PERCENTILES}
    return result


def run_loads(bench: Bench, engine: LLMEngine, sizes: ServingSizes) -> Result:
    """Open loops at shares of the capacity, which is the rate of a closed one before each."""
    served = AsyncLLMEngine(engine, max_waiting=sizes.num_requests)
    load, clients, rows = make_load(bench, sizes), sizes.places, []
    half = load[: len(load) // 2]
    try:
        asyncio.run(run_closed(served, half, clients))  # warms up
        for share in sizes.loads:
            visits, seconds = asyncio.run(run_closed(served, half, clients))
            closed = describe_visits(visits, seconds, sizes)
            rate = share * closed["rate"]
            visits, seconds = asyncio.run(run_open(served, load, rate))
            row: Result = {"load": share, "arrivals": rate, "closed": closed}
            row |= describe_visits(visits, seconds, sizes)
            print(f"open: {json.dumps(row)}", flush=True)
            rows.append(row)
    finally:
        asyncio.run(served.shutdown())
    return {"clients": clients, "loads": rows}


def name_all_tokens(engine: LLMEngine) -> None:
    """Gives each token id a text, also one that the bundled tokenizer does not know.

    Random weights of another shape draw such ids, and a stream of empty texts has no events.
    """
    tokens, known = engine.processor.token_bytes, len(engine.tokenizer or ())
    if tokens is not None:
        for token_id in range(known, engine.executor.config.vocab_size):
            tokens[token_id] = f" {token_id}".encode()


def run_serving(bench: Bench, sizes: ServingSizes | None = None) -> Result:
    """Streams beside `generate`, and then the waits under load."""
    sizes = sizes or (ON_GPU if bench.device.type == "cuda" else ServingSizes())
    options: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    options |= {"enable_prefix_caching": False, "max_model_len": 1024}
    options |= {"use_tqdm": False}
    engine = LLMEngine(bench.folder, **options, max_num_seqs=sizes.streams)
    name_all_tokens(engine)
    with without_garbage():  # as in `folo serve`
        result = run_streams(bench, engine, sizes)
    if sizes.places != sizes.streams:
        del engine
        bench.free_memory()
        engine = LLMEngine(bench.folder, **options, max_num_seqs=sizes.places)
    with without_garbage():
        result |= run_loads(bench, engine, sizes)
    return {"sizes": asdict(sizes)} | result
