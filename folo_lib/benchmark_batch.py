"""Many requests at once: what the benchmark's section `batch` measures."""

from __future__ import annotations

import gc
import pickle
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from folo_lib.benchmark import (
    MAX_ATTEMPTS,
    NEAR_TIE,
    BenchmarkError,
    Result,
    check_bounds,
    describe_ratio,
    make_prompt,
    paired_ratios,
    summarize,
    synchronize,
)
from folo_lib.benchmark_bench import BatchSizes, Bench
from folo_lib.benchmark_workloads import Workload
from folo_lib.engine import Inbox, LLMEngine
from folo_lib.kv_cache import kv_bytes_per_token
from folo_lib.runner import InFlightStep, StepPlan
from folo_lib.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Answers = list[list[int]]


def make_workload(
    vocab_size: int, num_requests: int, sizes: BatchSizes, seed: int = 0
) -> Workload:
    """Random prompts and lengths, the same for everybody."""
    rng = random.Random(seed)
    low, high = sizes.shortest, sizes.longest
    prompts = [
        rng.choices(range(vocab_size), k=rng.randint(low, high))
        for _ in range(num_requests)
    ]
    return Workload(prompts, [rng.randint(low, high) for _ in prompts])


def make_params(num_tokens: int) -> SamplingParams:
    """Greedy, and exactly that many tokens."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def make_engine(bench: Bench, max_model_len: int, **options: Any) -> LLMEngine:
    """A fresh engine around the bench's model; it takes token ids only."""
    return LLMEngine(bench.model, max_model_len=max_model_len, **options)


class Ours:
    """An engine of ours, with many requests.

    Args:
        options: for `LLMEngine`.
    """

    def __init__(self, bench: Bench, max_model_len: int, **options: Any) -> None:
        # Every run has the same prompts, which the prefix cache would know.
        options |= {"enable_prefix_caching": False}
        self.engine = make_engine(bench, max_model_len, **options)

    def answer(self, workload: Workload) -> Answers:
        """Greedy answers of the lengths that the workload says."""
        params = list(map(make_params, workload.lengths))
        outputs = self.engine.generate(workload.prompts, params, use_tqdm=False)
        for output in outputs:
            if output.error:
                raise RuntimeError(f"folo_lib failed: {output.error}")
        return [output.outputs[0].token_ids for output in outputs]


class Padded:
    """Hugging Face's `generate()`, so many prompts at a time, padded on the left.

    Args:
        batch_size: the last batch may be smaller.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size

    def answer(self, workload: Workload) -> Answers:
        """See `Ours`; a batch goes on until its longest answer is done."""
        answers: Answers = []
        generate: Any = self.model.generate
        for start in range(0, len(workload.prompts), self.batch_size):
            some = slice(start, start + self.batch_size)
            prompts, lengths = workload.prompts[some], workload.lengths[some]
            width = max(map(len, prompts))
            ids, mask = [], []
            for prompt in prompts:
                num_padding = width - len(prompt)
                ids.append([0] * num_padding + prompt)
                mask.append([0] * num_padding + [1] * len(prompt))
            written = generate(
                torch.tensor(ids, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                max_new_tokens=max(lengths),
                do_sample=False,
            )[:, width:].tolist()
            pairs = zip(written, lengths, strict=True)
            answers += [row[:length] for row, length in pairs]
        return answers


System = Ours | Padded


@torch.inference_mode()
def check_answers(bench: Bench, workload: Workload, answers: Answers) -> Result:
    """Every token must be the most likely one for the exact model, or nearly.

    Returns:
        How many tokens there are, at how many near-ties another was chosen, and how far
        rounding moves the logits, in their standard deviations.

    Raises:
        BenchmarkError: if one is behind the best by more than rounding explains.
    """
    worst = error = std = 0.0
    num_behind = 0
    for prompt, answer in zip(workload.prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer[:-1]], device=bench.device)
        truth, logits = (
            model.compute_logits(model(ids)[0, -len(answer) :]).double()
            for model in (bench.exact, bench.model)
        )
        error = max(error, (logits - truth).square().mean().sqrt().item())
        std = truth.std().item()
        chosen = truth.gather(-1, torch.tensor(answer, device=bench.device)[:, None])
        behind = truth.amax(dim=-1) - chosen[:, 0]
        worst = max(worst, behind.max().item())
        num_behind += int((behind > 0).sum())
    if not worst <= NEAR_TIE * error:
        raise BenchmarkError(
            f"a token is {worst:.2g} behind the best, and near-ties end at "
            f"{NEAR_TIE * error:.2g}. Nothing is timed."
        )
    return {
        "tokens": sum(map(len, answers)),
        "near_ties_lost": num_behind,
        "error": error / std,
    }


def take_turns(
    runs: Mapping[str, Callable[[], float]], num_runs: int
) -> dict[str, list[float]]:
    """What several functions return, by name, in turns; the first turn warms up."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for turn in range(num_runs + 1):
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                value = runs[name]()
                values[name] += [value] if turn else []
            if turn == 0:
                gc.freeze()
    finally:
        gc.unfreeze()
    return values


def repeat_until_steady(
    bench: Bench, what: str, measure: Callable[[], Mapping[str, list[float]]]
) -> list[Result]:
    """Rows with a `system` and a summary under the name `what`.

    Args:
        measure: values of each system, in pairs.

    Raises:
        BenchmarkError: if they lie too far apart, `MAX_ATTEMPTS` times.
    """
    check_bounds(bench.num_runs, bench.max_spread)
    unsteady: list[str] = []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        rows: list[Result] = [
            {"system": name, what: summarize(values), "attempt": attempt}
            for name, values in measure().items()
        ]
        unsteady = [
            f"{what} of {row['system']}: {row[what]['spread']:.0%}"
            for row in rows
            if row[what]["spread"] > bench.max_spread
        ]
        if not unsteady:
            return rows
        print(f"attempt {attempt}: unsteady {'; '.join(unsteady)}", flush=True)
    raise BenchmarkError(
        f"spread above {bench.max_spread:.0%} in {MAX_ATTEMPTS} attempts, so nothing "
        f"is reported ({'; '.join(unsteady)}): use a quieter machine, or more runs."
    )


def compare(
    bench: Bench, workload: Workload, systems: Mapping[str, System], num_runs: int
) -> Result:
    """Checks all answers, then measures; ratios are to the first system, in pairs."""
    tokens = {
        name: check_answers(bench, workload, system.answer(workload))
        for name, system in systems.items()
    }

    def clocked(system: System) -> Callable[[], float]:
        def run() -> float:
            synchronize(bench.device)
            start = time.perf_counter()
            system.answer(workload)
            synchronize(bench.device)
            return time.perf_counter() - start

        return run

    runs = {name: clocked(system) for name, system in systems.items()}
    rows = repeat_until_steady(bench, "total", lambda: take_turns(runs, num_runs))
    for row in rows:
        row["tokens_per_second"] = workload.num_tokens / row["total"]["median"]
        row["times_ours"] = summarize(paired_ratios(row, rows[0], "total"))
        speed = f"{row['tokens_per_second']:8,.0f} tokens/s"
        print(f"{row['system']:24} {speed}", flush=True)
    for row in rows[1:]:
        print(describe_ratio(row, rows[0], "total"), flush=True)
    return {"tokens": tokens, "rows": rows}


def run_together(bench: Bench, sizes: BatchSizes) -> Result:
    """A batch of mixed requests: ours, one after another, and padded."""
    workload = make_workload(bench.config.vocab_size, sizes.together, sizes)
    length = workload.max_model_len
    systems: dict[str, System] = {
        "folo_lib": Ours(bench, length),
        "folo_lib, one by one": Ours(bench, length, scheduler="fcfs"),
        "huggingface, padded": Padded(bench.theirs.model, sizes.together),
    }
    compared = compare(bench, workload, systems, bench.num_runs)
    return {"requests": sizes.together, **compared}


def run_many(bench: Bench, sizes: BatchSizes) -> Result:
    """More requests than run at a time, against batches of that size."""
    workload = make_workload(bench.config.vocab_size, sizes.many, sizes, seed=1)
    limit = sizes.together
    systems: dict[str, System] = {
        "folo_lib": Ours(bench, workload.max_model_len, max_num_seqs=limit),
        "huggingface, batches": Padded(bench.theirs.model, limit),
    }
    compared = compare(bench, workload, systems, bench.num_runs)
    return {"requests": sizes.many, "max_num_seqs": limit, **compared}


def run_one(bench: Bench, sizes: BatchSizes) -> Result:
    """One request alone: in a fresh engine, and after many others."""
    vocab_size, length = bench.config.vocab_size, sizes.longest
    alone = Workload([make_prompt(vocab_size, length)], [length])
    others = make_workload(vocab_size, sizes.before, sizes, seed=2)
    fresh, used = Ours(bench, 2 * length), Ours(bench, 2 * length)
    used.answer(others)
    systems: dict[str, System] = {
        "folo_lib": fresh,
        "folo_lib, after others": used,
        "huggingface": Padded(bench.theirs.model, 1),
    }
    compared = compare(bench, alone, systems, max(9, bench.num_runs))
    return {"requests_before": sizes.before, **compared}


def run_prefix(bench: Bench, sizes: BatchSizes) -> Result:
    """Conversations that share a system prompt and arrive together, cache cold."""
    rng, vocabulary = random.Random(3), range(bench.config.vocab_size)
    system = rng.choices(vocabulary, k=sizes.system_tokens)
    lengths = [
        rng.randint(sizes.shortest, sizes.question_tokens)
        for _ in range(sizes.conversations)
    ]
    prompts = [system + rng.choices(vocabulary, k=length) for length in lengths]
    num_tokens = 8
    longest = max(map(len, prompts)) + num_tokens
    computed: dict[str, int] = {}

    def clocked(name: str, enabled: bool) -> Callable[[], float]:
        def run() -> float:  # in a fresh engine, because the cache must be cold
            engine = make_engine(bench, longest, enable_prefix_caching=enabled)
            outputs = engine.generate(prompts, make_params(num_tokens), use_tqdm=False)
            cached = sum(output.num_cached_tokens for output in outputs)
            computed[name] = sum(map(len, prompts)) - cached
            waits = [output.metrics.ttft for output in outputs]
            return statistics.median(wait for wait in waits if wait is not None)

        return run

    names = {"with prefix caching": True, "without": False}
    runs = {name: clocked(name, enabled) for name, enabled in names.items()}
    turns = lambda: take_turns(runs, bench.num_runs)  # noqa: E731
    rows = repeat_until_steady(bench, "ttft", turns)
    for row in rows:
        row["computed_tokens"] = computed[row["system"]]
    print(describe_ratio(rows[1], rows[0], "ttft"), flush=True)
    return {
        "conversations": sizes.conversations,
        "system_tokens": sizes.system_tokens,
        "question_tokens": [min(lengths), max(lengths)],
        "times": summarize(paired_ratios(rows[1], rows[0], "ttft")),
        "rows": rows,
    }


def run_reservation(bench: Bench, sizes: BatchSizes) -> Result:
    """How many requests run at once that ask for much and take little. A count."""
    rng, vocabulary = random.Random(4), range(bench.config.vocab_size)
    block_size, num_reserved = 16, 2
    length = sizes.shortest + sizes.max_tokens
    reserved = -(-length // block_size)  # blocks of a request that reserves; rounded up
    num_blocks = num_reserved * reserved
    memory = num_blocks * block_size * kv_bytes_per_token(bench.config, bench.dtype)
    options = {"kv_cache_memory_bytes": memory, "block_size": block_size}
    engine = make_engine(bench, length, **options)
    taken = -(-(sizes.shortest + sizes.num_tokens) // block_size)
    num_requests = 4 * num_blocks // taken
    ends: dict[str, int] = {}  # where an answer happens to end; the engine is not told
    for _ in range(num_requests):
        prompt = rng.choices(vocabulary, k=sizes.shortest)
        request_id = engine.add_request(prompt, make_params(sizes.max_tokens))
        low, high = sizes.num_tokens // 2, 3 * sizes.num_tokens // 2
        ends[request_id] = rng.randint(low, high)
    running: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            if len(output.outputs[0].token_ids) >= ends[output.request_id]:
                engine.abort_request(output.request_id)
        if (
            stats := engine.stats()
        ).num_waiting:  # the end, when nobody waits, left out
            running.append(stats.num_running)
    result: Result = {
        "num_blocks": num_blocks,
        "requests": num_requests,
        "reserved": num_reserved,
        "on_demand": statistics.mean(running),
        "most": max(running),
        "preemptions": engine.stats().num_preemptions,
    }
    result["times"] = result["on_demand"] / num_reserved
    print(f"on demand {result['times']:.1f} times as many run at once", flush=True)
    return result


def run_host(bench: Bench, sizes: BatchSizes) -> Result:
    """What of a step of single tokens is not the model's; bytes of a plan."""
    share = "share of the host"
    measure = lambda: {share: measure_host_share(bench, sizes)}  # noqa: E731
    [row] = repeat_until_steady(bench, "share", measure)
    print(f"the host takes {row['share']['median']:.0%} of a step", flush=True)
    plans = [
        {"context": context, "bytes": weigh_plan(bench, context)}
        for context in sizes.contexts
    ]
    print(f"plans: {plans}", flush=True)
    return {"requests": sizes.together, "rows": [row], "plans": plans}


def measure_host_share(bench: Bench, sizes: BatchSizes) -> list[float]:
    """The part of each `num_steps` steps outside model and sampler, from 0 to 1."""
    workload = make_workload(bench.config.vocab_size, sizes.together, sizes)
    num_tokens = sizes.num_steps * (bench.num_runs + 2) + sizes.together
    length = workload.max_model_len + num_tokens
    engine = make_engine(bench, length, enable_prefix_caching=False)
    inbox = Inbox(every_token=False)  # as `generate` does it
    params = [make_params(num_tokens)] * sizes.together
    engine.submit(engine.processor.process_requests(workload.prompts, params), inbox)
    while engine.stats().num_waiting:
        engine.advance(inbox)
    for _ in range(sizes.num_steps):  # the last prompt's rest, and to warm up
        engine.advance(inbox)
    spent = [0.0]

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(bench.device)
            spent[0] += time.perf_counter() - start
            return result

        return call

    runner, shares = engine.executor.worker.runner, []
    model, sampler = runner.model, runner.sampler
    parts = (model, "forward"), (model, "compute_logits"), (sampler, "sample")
    with ExitStack() as stack:
        for owner, name in parts:
            timed = clocked(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        for _ in range(bench.num_runs):
            spent[0], start = 0.0, time.perf_counter()
            for _ in range(sizes.num_steps):
                engine.advance(inbox)
            shares.append(1 - spent[0] / (time.perf_counter() - start))
    return shares


def weigh_plan(bench: Bench, context: int) -> int:
    """Bytes of the pickled plan of a decode step after so many tokens."""
    num_tokens = 4
    engine = make_engine(bench, context + num_tokens)
    launch, sizes = engine.executor.launch, list[int]()

    def weigh_and_launch(plan: StepPlan) -> InFlightStep:
        sizes.append(len(pickle.dumps(plan)))
        return launch(plan)

    prompt = make_prompt(bench.config.vocab_size, context)
    with mock.patch.object(engine.executor, "launch", weigh_and_launch):
        engine.generate([prompt], make_params(num_tokens), use_tqdm=False)
    return min(sizes[1 - num_tokens :])  # one of them may bring a block


PARTS: Mapping[str, Callable[[Bench, BatchSizes], Result]] = {
    "together": run_together,
    "many": run_many,
    "one": run_one,
    "prefix": run_prefix,
    "reservation": run_reservation,
    "host": run_host,
}


def run_batch(bench: Bench) -> Result:
    """Many requests at once, and what they share; see `BatchSizes`."""
    result: Result = {}
    for name in bench.batch_parts or PARTS:
        print(f"-- {name}", flush=True)
        result[name] = PARTS[name](bench, bench.sizes.batch)
    return result
