"""Checks of the exercises of page 08."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from folo_lib.course.exercises import exercise, require
from folo_lib.runner import GPUExecutor, SampledToken, ScheduledRequest

__all__ = ["check_choose_sizes", "check_generate_batch"]

VOCAB_SIZE = 11


def next_token(ids: Sequence[int]) -> int:
    """What the pretended model says after these tokens; every one of them matters."""
    state = 1
    for token_id in ids:
        state = (state * 31 + token_id + 7) % 1_000_003
    return state % VOCAB_SIZE


def answer(prompt: Sequence[int], max_tokens: int, eos_token_id: int) -> list[int]:
    """The greedy answer to one prompt, alone."""
    ids: list[int] = []
    while len(ids) < max_tokens and eos_token_id not in ids:
        ids.append(next_token([*prompt, *ids]))
    return ids


class SlotExecutor(GPUExecutor):
    """An executor without a model: its next token depends on what the slots hold."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_model_len = num_blocks * block_size
        self.slots: dict[int, tuple[str, int]] = {}  # who wrote which token
        self.steps: list[list[str]] = []

    def execute_model(
        self, scheduled: Sequence[ScheduledRequest]
    ) -> list[SampledToken]:
        names = [request.request_id for request in scheduled]
        require(names, "a step runs no request at all: stop when nobody is left.")
        twice = f"a step has the request ids {names}: give each request its own."
        require(len(set(names)) == len(names), twice)
        self.steps.append(names)
        for request in scheduled:
            self.write(request)
        return [SampledToken(next_token(self.read(request))) for request in scheduled]

    def slot(self, request: ScheduledRequest, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        name, size = request.request_id, len(request.block_ids)
        require(
            block < size,
            f"request {name!r} puts a token at position {position}, and its {size} "
            f"blocks hold {size * self.block_size}: allocate room for the prompt and "
            "max_tokens.",
        )
        return request.block_ids[block] * self.block_size + offset

    def write(self, request: ScheduledRequest) -> None:
        name, start = request.request_id, request.num_computed_tokens
        require(request.token_ids, f"request {name!r} runs no token in its step.")
        require(
            request.params.temperature == 0,
            f"request {name!r} runs with temperature={request.params.temperature}: "
            "greedy is SamplingParams(temperature=0).",
        )
        for position, token_id in enumerate(request.token_ids, start):
            slot = self.slot(request, position)
            require(
                0 <= slot < self.num_blocks * self.block_size,
                f"request {name!r} has blocks {list(request.block_ids)}, and the cache "
                f"has {self.num_blocks}.",
            )
            self.slots[slot] = name, token_id

    def read(self, request: ScheduledRequest) -> list[int]:
        name, ids = request.request_id, []
        for position in range(request.num_computed_tokens + len(request.token_ids)):
            where = (
                f"step {len(self.steps)}: request {name!r} reads position {position}"
            )
            held = self.slots.get(self.slot(request, position))
            require(
                held is not None,
                f"{where}, where nothing was written yet: num_computed_tokens counts "
                "the tokens that earlier steps ran.",
            )
            assert held is not None
            owner, token_id = held
            require(
                owner == name,
                f"{where} and finds a token of request {owner!r} there: two requests "
                "share a block.",
            )
            ids.append(token_id)
        return ids


@exercise
def check_generate_batch(
    generate_batch: Callable[[GPUExecutor, list[list[int]], int, int], list[list[int]]],
) -> None:
    """Of `generate_batch`: answers as if alone, in as few steps as the longest takes."""
    rng = random.Random(8)
    for case in range(60):
        sizes = [1] if case == 0 else [rng.randint(1, 9) for _ in range(1 + case % 5)]
        prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(size)] for size in sizes]
        max_tokens = 1 + case % 7
        eos = VOCAB_SIZE if case < 10 else 3  # at first nothing ends early
        block_size = rng.choice([2, 4])
        blocks = sum(-(-(size + max_tokens) // block_size) for size in sizes)
        executor = SlotExecutor(blocks, block_size)
        got = generate_batch(executor, [list(p) for p in prompts], max_tokens, eos)
        given = f"prompts={prompts}, max_tokens={max_tokens}, eos_token_id={eos}"
        require(
            isinstance(got, list) and len(got) == len(prompts),
            f"for {given} it returns {got!r}: one list of tokens for each prompt is "
            "wanted.",
        )
        for i, prompt in enumerate(prompts):
            wanted = answer(prompt, max_tokens, eos)
            require(
                list(got[i]) == wanted,
                f"for {given} the answer to prompt {i} is {got[i]}, and alone it would "
                f"be {wanted}.",
            )
        longest = max(len(answer(prompt, max_tokens, eos)) for prompt in prompts)
        require(
            len(executor.steps) == longest,
            f"for {given} it takes {len(executor.steps)} steps, and the longest answer "
            f"has {longest} tokens: everybody who is not done runs in every step.",
        )
        ran = sum(map(len, executor.steps))
        made = sum(map(len, got))
        require(
            ran == made,
            f"for {given} requests run {ran} times for {made} tokens: one that is done "
            "leaves the batch.",
        )
    require(
        generate_batch(SlotExecutor(1, 4), [], 3, 0) == [],
        "without prompts there is nothing to run: return [].",
    )


def count_waste(lengths: Sequence[int], sizes: Sequence[int]) -> int:
    """Columns that are computed for nobody."""
    return sum(min(s for s in sizes if s >= length) - length for length in lengths)


def find_best(lengths: Sequence[int], num_sizes: int) -> tuple[int, list[int]]:
    """The least waste, and sizes that have it: all choices tried."""
    *others, longest = sorted(set(lengths))
    choices = itertools.chain.from_iterable(
        itertools.combinations(others, k) for k in range(num_sizes)
    )
    return min((count_waste(lengths, [*c, longest]), [*c, longest]) for c in choices)


@exercise
def check_choose_sizes(choose_sizes: Callable[[list[int], int], list[int]]) -> None:
    """Of `choose_sizes`: as little waste as any choice of that many sizes has."""
    rng = random.Random(8)
    cases = [([5], 1), ([2, 7, 4], 1), ([3, 4, 9, 10], 2), ([6, 6, 1], 3)]
    for case in range(60):
        top = rng.choice([6, 40, 300])
        many = [rng.randint(1, top) for _ in range(rng.randint(1, 14))]
        cases.append((many, 1 + case % 4))
    cases.append(([*[10] * 50, 11, 12, 99, 100], 2))
    for lengths, num_sizes in cases:
        given = f"lengths={lengths}, num_sizes={num_sizes}"
        got = choose_sizes(list(lengths), num_sizes)
        require(
            isinstance(got, list) and all(isinstance(size, int) for size in got),
            f"for {given} it returns {got!r}: a list of ints is wanted.",
        )
        require(
            1 <= len(got) <= num_sizes,
            f"for {given} it returns {len(got)} sizes, {got}: at most {num_sizes}, and "
            "at least one.",
        )
        require(
            got == sorted(set(got)),
            f"for {given} it returns {got}: ascending, each size once.",
        )
        require(
            got[-1] >= max(lengths),
            f"for {given} it returns {got}: nothing holds the prompt of {max(lengths)}.",
        )
        least, sizes = find_best(lengths, num_sizes)
        waste = count_waste(lengths, got)
        require(
            waste <= least,
            f"for {given} the sizes {got} waste {waste} columns, and {sizes} waste only "
            f"{least}.",
        )
