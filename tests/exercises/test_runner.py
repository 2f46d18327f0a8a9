"""The checks of page 08 know the mistakes that people make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from folo_lib.course.exercises.runner import (
    check_choose_padded_sizes,
    check_draws_token,
    check_generate_batch,
)
from folo_lib.kv_cache import BlockAllocator
from folo_lib.runner import GPUExecutor, NewRequest, ScheduledRequest, StepPlan
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
    stay_known: bool = False,
    tell_again: bool = False,
    tell: bool = True,
    eos_anywhere: bool = False,
    keep_eos: bool = True,
    computed: int = 0,
    extra: int = 0,
    shift: int = 0,
    first: int = 0,
    before: Sequence[str] = (),
) -> Prompts:
    """`generate_batch`, right unless a mistake is asked for."""
    allocator = BlockAllocator(executor.num_blocks, executor.block_size)
    lengths = [len(p) + (max_tokens if room is None else room) for p in prompts]
    blocks = [allocator.allocate(length) for length in lengths]
    answers: Prompts = [[] for _ in prompts]
    names = ["0" if one_name else f"{first + i}" for i in range(len(prompts))]
    new = [
        NewRequest(
            request_id=name,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            num_computed_tokens=computed,
            params=SamplingParams(temperature=temperature),
        )
        for name, prompt in zip(names, prompts, strict=True)
    ]
    own = [[b + shift for b in blocks[0 if shared else i]] for i in range(len(prompts))]
    sizes = [len(prompt) + extra for prompt in prompts]
    rows = zip(names, sizes, own, strict=True)
    plan = StepPlan(
        [ScheduledRequest(*row) for row in rows], new if tell else (), before
    )

    def done(i: int) -> bool:
        seen = prompts[i] + answers[i] if eos_anywhere else answers[i]
        return len(answers[i]) >= max_tokens or eos in seen

    while plan.scheduled:
        for name, token in executor.launch(plan).read().tokens.items():
            answers[int(name) - first].append(token.token_id)
        left = [i for i in range(len(prompts)) if not done(i)]
        going_on = range(len(prompts)) if stay and left else left
        ended = [names[i] for i in range(len(prompts)) if i not in going_on]
        plan = StepPlan(
            [ScheduledRequest(names[i], 1) for i in going_on],
            new if tell_again else (),
            () if stay_known else ended,
        )
    if stay:  # what was written after the end is cut off
        answers = [ids[:max_tokens] for ids in answers]
        answers = [a[: a.index(eos) + 1] if eos in a else a for a in answers]
    return answers if keep_eos else [[t for t in ids if t != eos] for ids in answers]


def one_by_one(
    executor: GPUExecutor, prompts: Prompts, max_tokens: int, eos: int
) -> Prompts:
    answers = []
    for i, prompt in enumerate(prompts):
        before = [str(i - 1)] if i else []
        one = batch(executor, [prompt], max_tokens, eos, first=i, before=before)
        answers.append(one[0])
    return answers


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
        (one_by_one, "steps, and the longest answer has"),
        (mistake(stay_known=True), "one that is done is named in finished_ids"),
        (mistake(tell_again=True), "a request is new once, in its first step"),
        (mistake(tell=False), "put it into new_requests in its first step"),
        (mistake(computed=1), "all are its prompt, and none is computed"),
        (mistake(extra=1), "run the whole prompt at first"),
        (mistake(shift=1000), "and the cache has"),
        (mistake(temperature=1), "greedy is SamplingParams(temperature=0)"),
        (mistake(shared=True), "two requests share a block"),
        (mistake(one_name=True), "give each request its own"),
        (mistake(room=0), "allocate room for the prompt and max_tokens"),
        (mistake(stay=True), "one that is done leaves the batch"),
        (mistake(eos_anywhere=True), "alone it would be"),
        (mistake(keep_eos=False), "alone it would be"),
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
    verdict = check_choose_padded_sizes(wrong)
    assert not verdict
    assert message in verdict.message


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (
            lambda known, computed, n: computed + n > known,
            "num_tokens=5 it returns False",
        ),
        (lambda known, computed, n: computed + n == known, "num_computed=9"),
        (lambda known, computed, n: computed >= known, "the whole prompt runs"),
        (lambda known, computed, n: n == 1 or computed + n == known, "six tokens"),
        (lambda known, computed, n: True, "nothing follows a half"),
        (lambda known, computed, n: known - computed - n, "True or False is wanted"),
    ],
)
def test_draws_token(mistake: Callable[[int, int, int], Any], words: str) -> None:
    verdict = check_draws_token(mistake)
    assert not verdict and words in " ".join(verdict.message.split())
