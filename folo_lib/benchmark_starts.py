"""Fresh processes for the benchmark: each gets ready, waits for its turn, and measures.

Two starts of one program differ by more than two runs of it, so what is claimed of a program
is measured in several. Getting ready takes longer than measuring; so several processes do it
side by side, and then measure one after another, each alone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from folo_lib.benchmark import BenchmarkError, Result, make_prompt, synchronize
from folo_lib.benchmark_systems import recompute_all
from folo_lib.benchmark_throughput import ask, check_runner, clocked
from folo_lib.benchmark_workloads import (
    ThroughputSizes,
    Workload,
    describe_runs,
    make_equal,
    make_mixed,
    measure_tpot,
)
from folo_lib.checkpoint import DTYPES, load_model, read_config
from folo_lib.engine import LLMEngine
from folo_lib.kv_cache import kv_bytes_per_token
from folo_lib.sampling_params import SamplingParams

MAX_SECONDS = 300  # that a process may take to get ready, and then to measure


@dataclass(frozen=True)
class Task:
    """What a fresh process does.

    Attributes:
        name: a key of `TASKS`.
        folder: of the checkpoint.
        device, dtype: their names.
        sizes: of the workloads.
        num_requests: the first of the mixed ones, which are timed.
        options: for `LLMEngine`.
        environment: variables of the process, beside those of this one.
    """

    name: str
    folder: str
    device: str
    dtype: str
    sizes: ThroughputSizes = field(default_factory=ThroughputSizes)
    num_requests: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The task that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"sizes": ThroughputSizes(**fields["sizes"])})

    def to_json(self) -> str:
        """As an argument of a command."""
        return json.dumps(asdict(self))

    def get_few(self, vocab_size: int) -> Workload:
        """Two short greedy requests, whose answers are checked before the clock runs."""
        return make_equal(self.sizes, vocab_size, 2, min(16, self.sizes.output_tokens))


Prepared = tuple[list[list[int]], Callable[[], Result]]
"""Answers to `get_few`, and what measures."""


def count_tokens_at_peak(workload: Workload) -> int:
    """The most tokens that the cache holds while all requests run side by side."""
    pairs = list(zip(map(len, workload.prompts), workload.lengths, strict=True))
    return max(
        sum(prompt + end for prompt, length in pairs if length >= end)
        for end in workload.lengths
    )


def make_engine(task: Task, workload: Workload) -> LLMEngine:
    """An engine whose cache has room for a workload, and little more.

    The whole memory of a GPU would be too much, as other processes get ready beside it.
    """
    config, dtype = read_config(Path(task.folder)), DTYPES[task.dtype]
    tokens = count_tokens_at_peak(workload) + 64 * len(workload.prompts)
    few = make_equal(task.sizes, config.vocab_size, 2, task.sizes.output_tokens)
    longest = max(workload.max_model_len, few.max_model_len)
    options: dict[str, Any] = {
        "device": task.device,
        "dtype": dtype,
        "max_model_len": longest,
        "enable_prefix_caching": False,
        "use_tqdm": False,
        "kv_cache_memory_bytes": (tokens + longest) * kv_bytes_per_token(config, dtype),
    }
    return LLMEngine(task.folder, **options | dict(task.options))


def prepare_engine(task: Task) -> Prepared:
    """An engine that answers the workload once."""
    vocab_size = read_config(Path(task.folder)).vocab_size
    workload = make_mixed(task.sizes, vocab_size).first(task.num_requests)
    engine = make_engine(task, workload)
    check_runner(engine, task.options.get("decode", "auto"))
    answers = ask(engine, task.get_few(vocab_size), 0)
    temperature, device = task.sizes.temperature, torch.device(task.device)
    ask(engine, workload.shortened(4), temperature)  # kernels compile when first used

    def run() -> Result:
        start = time.perf_counter()
        ask(engine, workload, temperature)
        synchronize(device)
        made = describe_runs(workload, [time.perf_counter() - start])
        return made | {"preemptions": engine.stats().num_preemptions}

    return answers, run


def prepare_no_cache(task: Task) -> Prepared:
    """No engine at all: each token computes the whole text again, greedily."""
    device = torch.device(task.device)
    model = load_model(task.folder, task.dtype, device, use_tqdm=False)
    vocab_size = model.config.vocab_size
    workload = make_mixed(task.sizes, vocab_size).first(task.num_requests)
    few = task.get_few(vocab_size)

    def answer(some: Workload) -> list[list[int]]:
        pairs = zip(some.prompts, some.lengths, strict=True)
        return [list(recompute_all(model, *pair)) for pair in pairs]

    def run() -> Result:
        start = time.perf_counter()
        answer(workload)
        return describe_runs(workload, [time.perf_counter() - start])

    return answer(few), run


def prepare_nothing(task: Task) -> Prepared:
    """The first token of a whole engine, from the call of `LLMEngine` on."""

    def run() -> Result:
        vocab_size = read_config(Path(task.folder)).vocab_size
        prompt = make_prompt(vocab_size, task.sizes.prompt_tokens)
        start = time.perf_counter()
        options: dict[str, Any] = {"device": task.device, "use_tqdm": False}
        options |= {"dtype": DTYPES[task.dtype], **task.options}
        engine = LLMEngine(task.folder, **options)
        loaded = time.perf_counter() - start
        params = SamplingParams(temperature=0, max_tokens=1)
        engine.generate([prompt], params, use_tqdm=False)
        first = time.perf_counter() - start
        return {"load_seconds": loaded, "first_token_seconds": first}

    return [], run


def prepare_one(task: Task) -> Prepared:
    """An engine that answers one request, several times over."""
    sizes, vocab_size = task.sizes, read_config(Path(task.folder)).vocab_size
    workload = make_equal(sizes, vocab_size, 1, sizes.output_tokens)
    engine = make_engine(task, workload)
    check_runner(engine, task.options.get("decode", "auto"))
    answers = ask(engine, task.get_few(vocab_size), 0)
    run = clocked(engine, torch.device(task.device))
    return answers, lambda: measure_tpot(run, workload, 0, sizes.num_runs)


TASKS: Mapping[str, Callable[[Task], Prepared]] = {
    "engine": prepare_engine,
    "no cache": prepare_no_cache,
    "first token": prepare_nothing,
    "tpot": prepare_one,
}


def make_compile_cache(folder: str) -> dict[str, str]:
    """The environment of a task whose compiled kernels go into a folder of their own."""
    names = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
    return {name: f"{folder}/{name.lower()}" for name in names}


def main(argv: Sequence[str]) -> None:
    """The fresh process: writes two lines of JSON, the second when it was told to go on."""
    task = Task.from_json(argv[0])
    try:
        answers, run = TASKS[task.name](task)
    except (ValueError, TypeError) as error:  # an option that is not to be had here
        print(json.dumps({"left_out": f"{error}"}), flush=True)
        return
    print(json.dumps({"answers": answers}), flush=True)
    sys.stdin.readline()
    gc.collect()
    gc.freeze()
    print(json.dumps(run()), flush=True)


class Started:
    """A process with a task."""

    def __init__(self, task: Task, errors: IO[str]) -> None:
        command = [sys.executable, "-m", "folo_lib.benchmark_starts", task.to_json()]
        pipe, self.errors = subprocess.PIPE, errors
        environment = dict(os.environ) | dict(task.environment)
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment
        )

    def read(self) -> Result:
        """The next line of JSON, others are passed over; or how the process ended."""
        assert self.process.stdout is not None
        timer, begin = threading.Timer(MAX_SECONDS, self.process.kill), time.monotonic()
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith("{"):
                    result: Result = json.loads(line)
                    return result
        finally:
            timer.cancel()
        self.process.wait()
        if time.monotonic() - begin >= MAX_SECONDS:
            return {"left_out": f"the process took more than {MAX_SECONDS} s"}
        self.errors.seek(0)
        last = "\n".join(self.errors.read().splitlines()[-5:])
        return {"left_out": f"the process failed: {last}"}

    def measure(self) -> Result:
        """Tells the process to go on, and waits until it is gone."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # then `read` says how it ended
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        result = self.read()
        self.process.wait()
        return result


@contextmanager
def started(tasks: Sequence[Task]) -> Iterator[list[Started]]:
    """Processes for some tasks; none is left when the block ends."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            for _ in tasks
        ]
        processes = [
            Started(task, file) for task, file in zip(tasks, files, strict=True)
        ]
        try:
            yield processes
        finally:
            for one in processes:
                one.process.kill()
                one.process.wait()
                for pipe in (one.process.stdin, one.process.stdout):
                    with suppress(BrokenPipeError):  # closing sends what is unsent
                        if pipe is not None:
                            pipe.close()


Check = Callable[[Task, list[list[int]]], object]


def run_tasks(
    tasks: Sequence[Task],
    together: int,
    check: Check = lambda *_: None,
) -> list[Result]:
    """The result of each task, from a fresh process that measured alone.

    Args:
        tasks: in the order in which they measure.
        together: how many get ready side by side.
        check: is given the answers of each before it measures, and raises a
            BenchmarkError if they are wrong.

    Returns:
        For a task that is not to be had here, or has failed, or whose answers are wrong,
        why: `{"left_out": reason}`. The others go on, as a machine may be lent for a while.
    """
    results: list[Result] = []
    for begin in range(0, len(tasks), together):
        group = tasks[begin : begin + together]
        with started(group) as processes:
            ready = [one.read() for one in processes]
            for task, one, first in zip(group, processes, ready, strict=True):
                if "left_out" not in first:
                    first = measure_checked(task, one, first["answers"], check)
                results.append(first)
                print(f"{len(results)} of {len(tasks)} starts are measured", flush=True)
    return results


def measure_checked(
    task: Task, process: Started, answers: list[list[int]], check: Check
) -> Result:
    """What a process measures, once its answers are found right; else why not."""
    try:
        check(task, answers)
    except BenchmarkError as error:
        return {"left_out": str(error)}
    return process.measure()


if __name__ == "__main__":
    main(sys.argv[1:])
