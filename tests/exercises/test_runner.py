"""The checks of page 08 know the mistakes that people make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from folo_lib.course.exercises.runner import check_choose_sizes, check_generate_batch
from folo_lib.kv_cache import BlockAllocator
from folo_lib.runner import GPUExecutor, ScheduledRequest
from folo_lib.sampling_params import SamplingParams

Prompts = list[list[int]]


def batch(
    executor: GPUExecutor,
    prompts: Prompts,
    max_tokens: int,
    eos: int,
    *,
    temperature: float = 0,
    shared: bool = False,
    one_name: bool = False,
    room: int | None = None,
    stay: bool = False,
    eos_anywhere: bool = False,
    keep_eos: bool = True,
    behind: int = 0,
) -> Prompts:
    """`generate_batch`, right unless a mistake is asked for."""
    allocator = BlockAllocator(executor.num_blocks, executor.block_size)
    lengths = [len(p) + (max_tokens if room is None else room) for p in prompts]
    blocks = [allocator.allocate(length) for length in lengths]
    tokens = [list(prompt) for prompt in prompts]
    cached = [0] * len(prompts)
    params = SamplingParams(temperature=temperature)

    def done(i: int) -> bool:
        made = tokens[i][len(prompts[i]) :]
        seen = tokens[i] if eos_anywhere else made
        return len(made) >= max_tokens or eos in seen

    while not all(map(done, range(len(prompts)))):
        running = [i for i in range(len(prompts)) if stay or not done(i)]
        plans = [
            ScheduledRequest(
                "x" if one_name else f"{i}",
                tokens[i][cached[i] :],
                cached[i] + behind,
                blocks[0 if shared else i],
                prompts[i],
                params,
            )
            for i in running
        ]
        for i, token in zip(running, executor.execute_model(plans), strict=True):
            cached[i] = len(tokens[i])
            tokens[i].append(token.token_id)
    answers = [
        ids[len(p) :][:max_tokens] for ids, p in zip(tokens, prompts, strict=True)
    ]
    if stay:  # what was written behind the end is cut off
        answers = [a[: a.index(eos) + 1] if eos in a else a for a in answers]
    return answers if keep_eos else [[t for t in ids if t != eos] for ids in answers]


def one_by_one(
    executor: GPUExecutor, prompts: Prompts, max_tokens: int, eos: int
) -> Prompts:
    return [batch(executor, [p], max_tokens, eos)[0] for p in prompts]


def mistake(**kwargs: Any) -> Callable[..., Prompts]:
    def wrong(
        executor: GPUExecutor, prompts: Prompts, max_tokens: int, eos: int
    ) -> Prompts:
        return batch(executor, prompts, max_tokens, eos, **kwargs)

    return wrong


def test_batch_without_a_mistake() -> None:
    assert check_generate_batch(mistake())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda *a: [], "one list of tokens for each prompt is wanted"),
        (one_by_one, "everybody who is not done runs in every step"),
        (mistake(temperature=1), "greedy is SamplingParams(temperature=0)"),
        (mistake(shared=True), "two requests share a block"),
        (mistake(one_name=True), "give each request its own"),
        (mistake(room=0), "allocate room for the prompt and max_tokens"),
        (mistake(stay=True), "one that is done leaves the batch"),
        (mistake(eos_anywhere=True), "alone it would be"),
        (mistake(keep_eos=False), "alone it would be"),
        (mistake(behind=1), "where nothing was written yet"),
    ],
)
def test_wrong_batches(wrong: Callable[..., Prompts], message: str) -> None:
    verdict = check_generate_batch(wrong)
    assert not verdict
    assert message in verdict.message


def even(lengths: list[int], num_sizes: int) -> list[int]:
    """Evenly spaced up to the longest."""
    top = max(lengths)
    return sorted({-(-top * (i + 1) // num_sizes) for i in range(num_sizes)})


def quantiles(lengths: list[int], num_sizes: int) -> list[int]:
    """Each size holds equally many prompts."""
    ordered = sorted(lengths)
    ends = [len(ordered) * (i + 1) // num_sizes for i in range(num_sizes)]
    return sorted({ordered[max(0, end - 1)] for end in ends})


def powers_of_two(lengths: list[int], num_sizes: int) -> list[int]:
    return sorted({1 << (length - 1).bit_length() for length in lengths})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda lengths, num_sizes: tuple(lengths), "a list of ints is wanted"),
        (lambda lengths, num_sizes: sorted(set(lengths)), "at most 1"),
        (lambda lengths, num_sizes: [lengths[0]], "nothing holds the prompt of"),
        (lambda lengths, num_sizes: [max(lengths)], "waste only"),
        (lambda lengths, num_sizes: [max(lengths)] * num_sizes, "each size once"),
        (even, "waste only"),
        (quantiles, "waste only"),
        (powers_of_two, "waste"),
    ],
)
def test_wrong_sizes(wrong: Callable[..., list[int]], message: str) -> None:
    verdict = check_choose_sizes(wrong)
    assert not verdict
    assert message in verdict.message
