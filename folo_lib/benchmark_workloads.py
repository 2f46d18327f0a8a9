"""The workloads of many requests, and their measurement: the same for every engine.

Nothing but the standard library is imported here, so that another engine can be measured
in an environment of its own.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
        few: numbers of equal requests of which the time per token is measured.
        contexts, context_tokens: lengths of one prompt after which it is measured too, and
            of the answer there.
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
    few: Sequence[int] = (1, 2, 4, 8, 16)
    contexts: Sequence[int] = (1024, 8192, 32_768)
    context_tokens: int = 128

    @property
    def max_model_len(self) -> int:
        """The longest of the equal requests and contexts, with its answer."""
        lengths = [length + self.context_tokens for length in self.contexts]
        return max([self.prompt_tokens + self.output_tokens, *lengths])


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


def make_few(sizes: ThroughputSizes, vocab_size: int) -> list[Workload]:
    """A few equal requests, then one at a time after each of the longer contexts."""
    few = [make_equal(sizes, vocab_size, n, sizes.output_tokens) for n in sizes.few]
    for length in sizes.contexts:
        longer = replace(sizes, prompt_tokens=length)
        few.append(make_equal(longer, vocab_size, 1, sizes.context_tokens))
    return few


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


@contextmanager
def without_garbage() -> Iterator[None]:
    """No search for garbage looks through what is there already."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measure_runs(
    run: Clocked, workload: Workload, temperature: float, num_runs: int
) -> Result:
    """Runs a workload once to warm up, then so many times; all times are kept."""
    run(workload, temperature)
    with without_garbage():
        seconds = [run(workload, temperature) for _ in range(num_runs)]
    made = describe_runs(workload, seconds)
    speed = f"{made['tokens_per_second']:10,.1f} tokens/s"
    requests = f"{made['requests']:4} requests"
    print(f"{requests} {speed} (spread {made['spread']:.0%})", flush=True)
    return made


def measure_tpot(
    run: Clocked, workload: Workload, temperature: float, num_runs: int
) -> Result:
    """The time of each token after the first, which all requests of equal length wait for.

    It comes from runs of one token and of all, which is how any engine can be asked.
    """
    first, whole = (
        measure_runs(run, some, temperature, num_runs)["seconds"]
        for some in (workload.shortened(1), workload)
    )
    count = workload.lengths[0]
    scale = 1e3 / (count - 1)
    tpot = scale * (statistics.median(whole) - statistics.median(first))
    pairs = [scale * (b - a) for a, b in zip(first, whole, strict=True)]
    row = {
        "requests": len(workload.prompts),
        "prompt_tokens": len(workload.prompts[0]),
        "output_tokens": count,
        "ttft_ms": 1e3 * statistics.median(first),
        "tpot_ms": tpot,
        "spread": (max(pairs) - min(pairs)) / tpot,
        "first_token_seconds": first,
        "seconds": whole,
    }
    times = f"TTFT {row['ttft_ms']:.2f} ms, TPOT {tpot:.3f} ms"
    print(f"{times} (spread {row['spread']:.1%})", flush=True)
    return row


def measure_few(
    run: Clocked, workloads: Sequence[Workload], temperature: float, num_runs: int
) -> Result:
    """The time per token on several workloads, one after another.

    Returns:
        `rows` of `measure_tpot`; `left_out`: what failed, with its reason, since one row
        that fails is no reason to lose the others.
    """
    rows: list[Result] = []
    left_out: dict[str, str] = {}
    for workload in workloads:
        length = len(workload.prompts[0])
        name = f"{len(workload.prompts)} requests of {length} tokens"
        print(f"-- {name}", flush=True)
        try:
            rows.append(measure_tpot(run, workload, temperature, num_runs))
        except Exception as error:  # each engine has errors of its own
            left_out[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"left out: {left_out[name]}", flush=True)
    return {"rows": rows, "left_out": left_out}


def measure_throughput(run: Clocked, sizes: ThroughputSizes, vocab_size: int) -> Result:
    """All workloads on one engine.

    Returns:
        `mixed`: a row of `describe_runs`; `equal`: one for each number of requests; `one`:
        one request alone, a row of `measure_tpot`.
    """
    num_runs, count = sizes.num_runs, sizes.output_tokens
    equal = [make_equal(sizes, vocab_size, n, count) for n in sizes.equal]
    alone = make_equal(sizes, vocab_size, 1, count)
    one = measure_tpot(run, alone, 0, num_runs)
    rows = [measure_runs(run, workload, 0, num_runs) for workload in equal]
    mixed = make_mixed(sizes, vocab_size)
    temperature = sizes.temperature
    row = measure_runs(run, mixed, temperature, num_runs)
    row["temperature"] = temperature
    return {"one": one, "equal": rows, "mixed": row}
