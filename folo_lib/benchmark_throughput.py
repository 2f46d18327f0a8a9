"""Tokens per second of many requests: what the benchmark's section `throughput` measures."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from folo_lib.benchmark import (
    Result,
    measure_bandwidth,
    synchronize,
    weight_bytes_per_step,
)
from folo_lib.benchmark_batch import Answers, Padded, check_answers
from folo_lib.benchmark_bench import Bench
from folo_lib.benchmark_workloads import (
    Clocked,
    Workload,
    describe_runs,
    make_equal,
    make_mixed,
    measure_throughput,
)
from folo_lib.engine import LLMEngine
from folo_lib.kv_cache import kv_bytes_per_token
from folo_lib.qwen3 import Attention
from folo_lib.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen3Config


def ask(
    engine: LLMEngine, workload: Workload, temperature: float, **options: Any
) -> Answers:
    """What our engine answers to a workload, token ids for token ids.

    Args:
        options: for `SamplingParams`, beside the temperature.

    Raises:
        RuntimeError: if a request failed, or its answer has another length.
    """
    options |= {"temperature": temperature, "ignore_eos": True}
    params = [SamplingParams(max_tokens=n, **options) for n in workload.lengths]
    outputs = engine.generate(workload.prompts, params, use_tqdm=False)
    for output in outputs:
        if output.error:
            raise RuntimeError(f"folo_lib failed: {output.error}")
    answers = [output.outputs[0].token_ids for output in outputs]
    if list(map(len, answers)) != workload.lengths:
        raise RuntimeError("folo_lib wrote other numbers of tokens than it was asked.")
    return answers


def clocked(engine: LLMEngine, device: torch.device, **options: Any) -> Clocked:
    """Our engine, with a clock; `options` as in `ask`."""

    def run(workload: Workload, temperature: float) -> float:
        synchronize(device)
        start = time.perf_counter()
        ask(engine, workload, temperature, **options)
        synchronize(device)
        return time.perf_counter() - start

    return run


def workload_bytes(
    config: Qwen2Config | Qwen3Config, dtype: torch.dtype, workload: Workload
) -> int:
    """What must be read at least, if all requests of a workload run together.

    The weights once for each step, of which there are as many as the longest answer has
    tokens; and for each token after the first of an answer the keys and values of all
    before it. The arithmetic on the prompts is left out, so the true floor is higher.
    """
    weights = weight_bytes_per_step(config, dtype) * max(workload.lengths)
    pairs = zip(workload.prompts, workload.lengths, strict=True)
    contexts = 0
    for prompt, length in pairs:
        steps = length - 1  # the first token comes with the prompt
        contexts += steps * len(prompt) + steps * (steps + 1) // 2
    return weights + contexts * kv_bytes_per_token(config, dtype)


def add_floor(bench: Bench, row: Result, workload: Workload, bandwidth: float) -> None:
    """Writes into a row what the floor is, and what share of its speed was reached."""
    row["floor_bytes"] = workload_bytes(bench.config, bench.dtype, workload)
    row["floor_seconds"] = row["floor_bytes"] / bandwidth
    row["floor_tokens_per_second"] = workload.num_tokens / row["floor_seconds"]
    share = row["tokens_per_second"] / row["floor_tokens_per_second"]
    row["share_of_floor"] = share
    print(f"{row['requests']:4} requests: {share:.0%} of the floor's speed", flush=True)


def measure_peak(engine: LLMEngine, model: torch.nn.Module) -> Result:
    """Bytes on the GPU at the peak, beyond the weights and the cache; see `run_ours`."""
    weights = sum(weight.nbytes for weight in model.parameters())
    executor = engine.executor
    token = kv_bytes_per_token(executor.config, executor.dtype)
    cache = executor.num_blocks * executor.block_size * token
    peaks = {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }
    beyond = {name: peak - weights - cache for name, peak in peaks.items()}
    return {"weights": weights, "cache": cache, "beyond": beyond}


def describe_engine(engine: LLMEngine, model: torch.nn.Module) -> Result:
    """Which of its parts an engine is made of, as `"auto"` does not say it."""
    backends = {
        type(module.backend).__name__
        for module in model.modules()
        if isinstance(module, Attention)
    }
    return {
        "runner": type(engine.executor.worker.runner).__name__,
        "attention": sorted(backends),
    }


def check_runner(engine: LLMEngine, decode: str) -> None:
    """Raises a ValueError if steps run eagerly, and more than that was asked for.

    An engine goes on with a warning then; a result under a wrong name would be worse.
    """
    runner = engine.executor.worker.runner
    if decode not in ("auto", "eager") and not getattr(runner, "is_static", True):
        raise ValueError(f"decode={decode!r} is not to be had here: steps run eagerly.")


def run_ours(bench: Bench, **options: Any) -> Result:
    """All workloads on one engine of ours, whose tokens are checked first.

    Args:
        options: for `LLMEngine`.
    """
    sizes, vocab_size = bench.sizes.throughput, bench.config.vocab_size
    longest = make_mixed(sizes, vocab_size).max_model_len
    longest = max(longest, sizes.prompt_tokens + sizes.output_tokens)
    start = time.perf_counter()
    options = {"max_model_len": longest, "enable_prefix_caching": False} | options
    engine = LLMEngine(bench.model, **options)
    started = time.perf_counter() - start
    few = make_equal(sizes, vocab_size, min(sizes.equal), min(32, sizes.output_tokens))
    tokens = check_answers(bench, few, ask(engine, few, 0))
    print(f"tokens: {tokens}", flush=True)
    bench.__dict__.pop("exact", None)  # so that the peak is the engine's own
    on_gpu = bench.device.type == "cuda"
    bench.free_memory()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    made = measure_throughput(clocked(engine, bench.device), sizes, vocab_size)
    memory = measure_peak(engine, bench.model) if on_gpu else None
    parts = describe_engine(engine, bench.model)
    parts |= {"start_seconds": started, "tokens": tokens, "memory": memory}
    return parts | made


def time_generate_batch(bench: Bench, workload: Workload) -> tuple[Answers, float]:
    """Hugging Face's `generate_batch`: continuous batching, each answer of its length.

    To start it takes a while and warms it up, which is not counted.

    Raises:
        RuntimeError: if a request failed, or the thread that does the work.
    """
    transformers: Any = importlib.import_module("transformers")
    lengths = workload.lengths
    page_size = 256  # the default; transformers before 5.18 calls it block_size
    pairs = list(zip(workload.prompts, lengths, strict=True))
    # With room for all of them: left alone it would take nearly the whole memory.
    num_blocks = sum(1 + -(-(len(prompt) + n) // page_size) for prompt, n in pairs)
    sizes = transformers.ContinuousBatchingConfig(
        num_blocks=num_blocks, max_batch_tokens=2048
    )
    config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, max_new_tokens=max(lengths)
    )
    model: Any = bench.theirs.model
    answers: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=sizes, timeout=5
    ) as manager:
        start = time.perf_counter()
        ids = [
            manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
            for prompt, length in pairs
        ]
        while len(answers) < len(ids):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("it stopped before the end")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                answers[result.request_id] = list(result.generated_tokens)
        seconds = time.perf_counter() - start
    return [answers[request_id] for request_id in ids], seconds


def time_padded(bench: Bench, workload: Workload) -> tuple[Answers, float]:
    """Hugging Face's `generate()` on one batch, padded to the longest prompt."""
    system = Padded(bench.theirs.model, len(workload.prompts))
    system.answer(workload.first(4).shortened(4))  # to warm up
    synchronize(bench.device)
    start = time.perf_counter()
    answers = system.answer(workload)
    synchronize(bench.device)
    return answers, time.perf_counter() - start


WAYS: Mapping[str, Callable[[Bench, Workload], tuple[Answers, float]]] = {
    "generate_batch": time_generate_batch,
    "generate, padded": time_padded,
}


def run_theirs(bench: Bench) -> Result:
    """Both of Hugging Face's ways to answer many requests, each once, greedily.

    Only the tokens that were asked for count, and the faster way is the one to compare
    with. They get the first of the mixed requests, since all would take minutes.
    """
    sizes = bench.sizes.throughput
    whole = make_mixed(sizes, bench.config.vocab_size)
    workload = whole.first(sizes.num_theirs)
    rows: list[Result] = []
    left_out: dict[str, str] = {}
    for name, answer in WAYS.items():
        try:
            answers, seconds = answer(bench, workload)
        except (AttributeError, RuntimeError, ValueError, TypeError) as error:
            left_out[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if list(map(len, answers)) != workload.lengths:
            left_out[name] = "it wrote other numbers of tokens than it was asked"
            continue
        rows.append({"system": name, **describe_runs(workload, [seconds])})
        speed = f"{rows[-1]['tokens_per_second']:,.0f} tokens/s"
        print(f"Hugging Face, {name}: {speed}", flush=True)
    rows.sort(key=lambda row: -row["tokens_per_second"])
    return {"rows": rows, "left_out": left_out}


def run_throughput(bench: Bench) -> Result:
    """Tokens per second of many requests end to end: ours, Hugging Face's, and the floor.

    vLLM is measured on the same workloads by `folo_lib.benchmark_vllm`. On an H200 all of
    it takes about two and a half minutes, one of which is Hugging Face's.
    """
    sizes, vocab_size = bench.sizes.throughput, bench.config.vocab_size
    speeds = measure_bandwidth(bench.device, bench.sizes.bandwidth_bytes)
    bandwidth = statistics.median(speeds)
    print(f"reads {bandwidth / 1e9:,.0f} GB/s", flush=True)
    ours = run_ours(bench)
    add_floor(bench, ours["mixed"], make_mixed(sizes, vocab_size), bandwidth)
    for row in ours["equal"]:
        equal = make_equal(sizes, vocab_size, row["requests"], sizes.output_tokens)
        add_floor(bench, row, equal, bandwidth)
    bench.free_memory()
    theirs = run_theirs(bench)
    return {
        "bandwidth": {"median": bandwidth, "values": speeds},
        "folo_lib": ours,
        "huggingface": theirs,
    }
