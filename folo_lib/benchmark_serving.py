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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from folo_lib.benchmark import BenchmarkError, Result, make_prompt, summarize
from folo_lib.benchmark_bench import Bench
from folo_lib.engine import LLMEngine
from folo_lib.sampling_params import SamplingParams
from folo_lib.serving import AsyncLLMEngine

PERCENTILES = (50, 90, 99)


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
    places=256,
    num_requests=3000,
    shortest=64,
    longest=256,
    max_gap=0.02,
)


async def read_all(
    served: AsyncLLMEngine, prompts: Sequence[list[int]], params: SamplingParams
) -> list[float]:
    """Streams that begin at the same time; seconds until the first token of each."""

    async def read(prompt: list[int]) -> float:
        done = await visit(served, prompt, params, time.perf_counter())
        if done.num_tokens != params.max_tokens:
            raise RuntimeError(f"a stream ended after {done.num_tokens} tokens.")
        return done.ttft

    return list(await asyncio.gather(*map(read, prompts)))


@contextmanager
def run_server(served: AsyncLLMEngine) -> Iterator[tuple[str, str]]:
    """Host and port of a server in a thread of its own; the engine ends with it."""
    import uvicorn

    from folo_lib.server import create_app

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(served, "model"), log_level="error")
    )
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield "127.0.0.1", str(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


def read_over_http(
    address: tuple[str, str], prompts: Sequence[list[int]], params: SamplingParams
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
    command = [sys.executable, "-m", "folo_lib.benchmark_clients", *address]
    done = subprocess.run(
        command, input=json.dumps(bodies), capture_output=True, text=True
    )
    if done.returncode:
        raise BenchmarkError(f"the clients failed:\n{done.stderr[-500:]}")
    result: Result = json.loads(done.stdout)
    if result["tokens"] != len(prompts) * (params.max_tokens or 0):
        raise BenchmarkError(f"the clients got {result['tokens']} tokens.")
    return result


def run_streams(bench: Bench, engine: LLMEngine, sizes: ServingSizes) -> Result:
    """Tokens per second of `generate`, of `AsyncLLMEngine` and through HTTP, in turns.

    And the time to the first token of one client alone, through the engine and through HTTP.
    """
    served, vocab_size = AsyncLLMEngine(engine), bench.config.vocab_size
    params = SamplingParams(
        temperature=0, max_tokens=sizes.stream_tokens, ignore_eos=True
    )
    prompts = [make_prompt(vocab_size, 32, seed) for seed in range(sizes.streams)]
    total = sizes.streams * sizes.stream_tokens
    speeds: dict[str, list[float]] = {"generate": [], "async": [], "http": []}
    ttft: dict[str, list[float]] = {"async": [], "http": []}
    with run_server(served) as address:
        for _ in range(sizes.num_runs + 1):  # the first warms up
            begin = time.perf_counter()
            engine.generate(prompts, params, use_tqdm=False)
            speeds["generate"].append(total / (time.perf_counter() - begin))
            begin = time.perf_counter()
            asyncio.run(read_all(served, prompts, params))
            speeds["async"].append(total / (time.perf_counter() - begin))
            done = read_over_http(address, prompts, params)
            speeds["http"].append(total / done["seconds"])
            alone = prompts[:4]
            for prompt in alone:
                ttft["async"] += asyncio.run(read_all(served, [prompt], params))
                ttft["http"] += read_over_http(address, [prompt], params)["ttft"]
    rows = {name: summarize(values[1:]) for name, values in speeds.items()}
    for name in ("async", "http"):
        pairs = zip(speeds[name][1:], speeds["generate"][1:], strict=True)
        rows[name]["of_generate"] = statistics.median(
            ours / all_ for ours, all_ in pairs
        )
        print(f"{name}: {rows[name]['of_generate']:.0%} of generate", flush=True)
    medians = {
        name: statistics.median(values[len(alone) :]) for name, values in ttft.items()
    }
    print(f"one client's first token: {medians}", flush=True)
    return {"speeds": rows, "ttft_alone": medians}


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


def run_serving(bench: Bench, sizes: ServingSizes | None = None) -> Result:
    """Streams beside `generate`, and then the waits under load."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise BenchmarkError(
                f"{package} is missing: in a clone, pip install -e '.[serve]'"
            )
    sizes = sizes or (ON_GPU if bench.device.type == "cuda" else ServingSizes())
    options: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    options |= {"enable_prefix_caching": False, "max_model_len": 1024}
    options |= {"use_tqdm": False}
    engine = LLMEngine(bench.folder, **options, max_num_seqs=sizes.streams)
    result = run_streams(bench, engine, sizes)
    del engine
    bench.free_memory()
    engine = LLMEngine(bench.folder, **options, max_num_seqs=sizes.places)
    return {"sizes": asdict(sizes)} | result | run_loads(bench, engine, sizes)
