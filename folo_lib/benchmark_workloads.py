"""The workloads of many requests, and their measurement: the same for every engine.

Nothing but the standard library is imported here, so that another engine can be measured
in an environment of its own.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]

QWEN3_0_6B: Mapping[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "dtype": "bfloat16",
}
"""The shape of the model that is measured where no checkpoint is named."""


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens each is answered with.

    Attributes:
        prompts: of random ids.
        lengths: of the answers; the end of a text is ignored.
    """

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        """Of all answers: what a user gets, padding not counted."""
        return sum(self.lengths)

    @property
    def max_model_len(self) -> int:
        """The longest prompt with the longest answer."""
        return max(map(len, self.prompts)) + max(self.lengths)

    def first(self, num_requests: int) -> Workload:
        """Its first requests alone."""
        return Workload(self.prompts[:num_requests], self.lengths[:num_requests])

    def shortened(self, num_tokens: int) -> Workload:
        """The same prompts, each answered with so many tokens at most."""
        lengths = [min(length, num_tokens) for length in self.lengths]
        return Workload(self.prompts, lengths)


@dataclass(frozen=True)
class ThroughputSizes:
    """How much the sections of many requests run.

    Attributes:
        num_requests: of mixed lengths, all of which arrive at once.
        shortest, longest: tokens of a prompt, and of an answer.
        largest_id: of a prompt's tokens; a smaller vocabulary has smaller ones.
        temperature: of the mixed requests; equal ones are greedy.
        equal: numbers of requests of equal length.
        prompt_tokens, output_tokens: of each of those.
        num_runs: of each workload, after one that warms up.
        num_theirs: the first of the mixed requests, which `generate()` gets.
    """

    num_requests: int = 256
    shortest: int = 100
    longest: int = 1024
    largest_id: int = 10_000
    temperature: float = 0.6
    equal: Sequence[int] = (8, 32, 64, 128, 256)
    prompt_tokens: int = 128
    output_tokens: int = 256
    num_runs: int = 5
    num_theirs: int = 32


def make_mixed(sizes: ThroughputSizes, vocab_size: int) -> Workload:
    """Prompts and answers of many lengths, the same for everybody.

    The sizes that are the default give the workload of nano-vllm's benchmark, number by
    number: 256 requests, 133,966 tokens of output.
    """
    rng = random.Random(0)
    low, high = sizes.shortest, sizes.longest
    top = min(sizes.largest_id, vocab_size - 1)
    prompts = []
    for _ in range(sizes.num_requests):
        length = rng.randint(low, high)
        prompts.append([rng.randint(0, top) for _ in range(length)])
    return Workload(prompts, [rng.randint(low, high) for _ in prompts])


def make_equal(
    sizes: ThroughputSizes, vocab_size: int, num_requests: int, num_tokens: int
) -> Workload:
    """Requests of one length, with different prompts."""
    rng = random.Random(num_requests)
    ids = range(min(sizes.largest_id + 1, vocab_size))
    prompts = [rng.choices(ids, k=sizes.prompt_tokens) for _ in range(num_requests)]
    return Workload(prompts, [num_tokens] * num_requests)


Clocked = Callable[[Workload, float], float]
"""Answers a workload at a temperature, and returns the seconds that it took."""


def describe_runs(workload: Workload, seconds: Sequence[float]) -> Result:
    """A workload, all its runs, and tokens of output per second in the middle one."""
    median = statistics.median(seconds)
    return {
        "requests": len(workload.prompts),
        "prompt_tokens": sum(map(len, workload.prompts)),
        "output_tokens": workload.num_tokens,
        "seconds": list(seconds),
        "spread": (max(seconds) - min(seconds)) / median,
        "tokens_per_second": workload.num_tokens / median,
    }


def measure_runs(
    run: Clocked, workload: Workload, temperature: float, num_runs: int
) -> Result:
    """Runs a workload once to warm up, then so many times; all times are kept."""
    run(workload, temperature)
    gc.collect()
    gc.freeze()
    try:
        seconds = [run(workload, temperature) for _ in range(num_runs)]
    finally:
        gc.unfreeze()
    made = describe_runs(workload, seconds)
    speed = f"{made['tokens_per_second']:10,.1f} tokens/s"
    requests = f"{made['requests']:4} requests"
    print(f"{requests} {speed} (spread {made['spread']:.0%})", flush=True)
    return made


def measure_throughput(run: Clocked, sizes: ThroughputSizes, vocab_size: int) -> Result:
    """All workloads on one engine.

    Returns:
        `mixed`: a row of `describe_runs`; `equal`: one for each number of requests; `one`:
        the milliseconds of one request's first token and of each that follows, from runs
        of one token and of all, which is how any engine can be asked.
    """
    num_runs, count = sizes.num_runs, sizes.output_tokens
    equal = [make_equal(sizes, vocab_size, n, count) for n in sizes.equal]
    alone = [make_equal(sizes, vocab_size, 1, n) for n in (1, count)]
    first, whole = (
        measure_runs(run, workload, 0, num_runs)["seconds"] for workload in alone
    )
    ttft, total = statistics.median(first), statistics.median(whole)
    one = {
        "prompt_tokens": sizes.prompt_tokens,
        "output_tokens": count,
        "ttft_ms": 1e3 * ttft,
        "tpot_ms": 1e3 * (total - ttft) / (count - 1),
        "first_token_seconds": first,
        "seconds": whole,
    }
    print(f"TTFT {one['ttft_ms']:.2f} ms, TPOT {one['tpot_ms']:.3f} ms", flush=True)
    rows = [measure_runs(run, workload, 0, num_runs) for workload in equal]
    mixed = make_mixed(sizes, vocab_size)
    temperature = sizes.temperature
    row = measure_runs(run, mixed, temperature, num_runs)
    row["temperature"] = temperature
    return {"one": one, "equal": rows, "mixed": row}
