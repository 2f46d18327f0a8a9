"""Checks of the exercises of page 08."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from folo_lib.course.exercises import exercise, require
from folo_lib.runner import (
    GPUExecutor,
    InFlightStep,
    NewRequest,
    SampledToken,
    ScheduledRequest,
    StepOutput,
    StepPlan,
)

__all__ = ["check_choose_padded_sizes", "check_draws_token", "check_generate_batch"]

VOCAB_SIZE = 11


@exercise
def check_draws_token(draws_token: Callable[[int, int, int], bool]) -> None:
    """Of `draws_token`: true from the step on that runs the last token that is known."""
    cases = [
        ((5, 0, 5), "the whole prompt runs, so its last token does"),
        ((7, 0, 4), "three tokens of the prompt are left, and nothing follows a half"),
        ((7, 4, 3), "the second chunk reads the prompt to its end"),
        ((9, 9, 1), "the token that it drew runs, and another one follows"),
        ((9, 20, 1), "it has written for a while, and each of its tokens is the last"),
        ((7, 4, 2), "one token of the prompt is left"),
        (
            (7, 0, 1),
            "six tokens of the prompt are left, and a step of one token need not "
            "be a decode step",
        ),
        ((1, 0, 1), "the prompt is one token"),
    ]
    for numbers, why in cases:
        known, computed, tokens = numbers
        got, wanted = draws_token(*numbers), computed + tokens >= known
        require(
            isinstance(got, bool),
            f"for num_known={known}, num_computed={computed}, num_tokens={tokens} it "
            f"returns {got!r}: True or False is wanted.",
        )
        require(
            got is wanted,
            f"for num_known={known}, num_computed={computed}, num_tokens={tokens} it "
            f"returns {got}, and {wanted} is right: {why}.",
        )


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


class FinishedStep(InFlightStep):
    """A step without a device: its output was there when it was launched."""

    def __init__(self, output: StepOutput) -> None:
        object.__setattr__(self, "output", output)

    def read(self) -> StepOutput:
        output: StepOutput = vars(self)["output"]
        return output


@dataclass
class KnownRequest:
    """What the pretended device remembers of a request."""

    request: NewRequest
    token_ids: list[int]
    block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0


class SlotExecutor(GPUExecutor):
    """An executor without a model: its next token depends on what the slots hold."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_model_len = num_blocks * block_size
        self.slots: dict[int, tuple[str, int]] = {}  # who wrote which token
        self.known: dict[str, KnownRequest] = {}
        self.steps: list[list[str]] = []

    def launch(self, plan: StepPlan) -> InFlightStep:
        names = [one.request_id for one in plan.scheduled]
        require(names, "a step runs no request at all: stop when nobody is left.")
        twice = f"a step has the request ids {names}: give each request its own."
        require(len(set(names)) == len(names), twice)
        self.steps.append(names)
        for name in plan.finished_ids:
            self.known.pop(name, None)
        for request in plan.new_requests:
            self.start(request)
        for name in self.known:
            require(
                name in names,
                f"step {len(self.steps)} does not run request {name!r}, which is still "
                "known: everybody who is not done runs in every step, and one that is "
                "done is named in finished_ids.",
            )
        for one in plan.scheduled:
            self.write(one)
        tokens = {name: SampledToken(self.draw(name)) for name in names}
        return FinishedStep(StepOutput(tokens, {}))

    def start(self, request: NewRequest) -> None:
        name, ids = request.request_id, list(request.token_ids)
        require(
            name not in self.known,
            f"step {len(self.steps)} tells of request {name!r}, which is known already: "
            "a request is new once, in its first step.",
        )
        require(
            request.params.temperature == 0,
            f"request {name!r} runs with temperature={request.params.temperature}: "
            "greedy is SamplingParams(temperature=0).",
        )
        require(
            request.num_prompt_tokens == len(ids) and request.num_computed_tokens == 0,
            f"request {name!r} starts with {len(ids)} tokens, of which "
            f"{request.num_prompt_tokens} are its prompt and "
            f"{request.num_computed_tokens} are computed: all are its prompt, and none "
            "is computed.",
        )
        self.known[name] = KnownRequest(request, ids)

    def slot(self, state: KnownRequest, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        name, size = state.request.request_id, len(state.block_ids)
        require(
            block < size,
            f"request {name!r} puts a token at position {position}, and its {size} "
            f"blocks hold {size * self.block_size}: allocate room for the prompt and "
            "max_tokens.",
        )
        return state.block_ids[block] * self.block_size + offset

    def write(self, one: ScheduledRequest) -> None:
        name, step = one.request_id, len(self.steps)
        require(
            name in self.known,
            f"step {step} runs request {name!r}, of which the executor was not told: "
            "put it into new_requests in its first step.",
        )
        state = self.known[name]
        state.block_ids += one.new_block_ids
        start, total = state.num_computed_tokens, len(state.token_ids)
        require(
            one.num_tokens == total - start,
            f"step {step} runs {one.num_tokens} tokens of request {name!r}, and "
            f"{total - start} are not in the cache: run the whole prompt at first, and "
            "then the token that was drawn.",
        )
        for position in range(start, total):
            slot = self.slot(state, position)
            require(
                0 <= slot < self.num_blocks * self.block_size,
                f"request {name!r} has blocks {state.block_ids}, and the cache "
                f"has {self.num_blocks}.",
            )
            self.slots[slot] = name, state.token_ids[position]
        state.num_computed_tokens = total

    def draw(self, name: str) -> int:
        state, ids = self.known[name], []
        for position in range(state.num_computed_tokens):
            owner, token_id = self.slots[self.slot(state, position)]
            require(
                owner == name,
                f"step {len(self.steps)}: request {name!r} reads position {position} "
                f"and finds a token of request {owner!r} there: two requests share a "
                "block.",
            )
            ids.append(token_id)
        state.token_ids.append(next_token(ids))
        return state.token_ids[-1]


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
def check_choose_padded_sizes(
    choose_padded_sizes: Callable[[list[int], int], list[int]],
) -> None:
    """Of `choose_padded_sizes`: as little waste as any choice of that many sizes has."""
    rng = random.Random(8)
    cases = [([5], 1), ([2, 7, 4], 1), ([3, 4, 9, 10], 2), ([6, 6, 1], 3)]
    for case in range(60):
        top = rng.choice([6, 40, 300])
        many = [rng.randint(1, top) for _ in range(rng.randint(1, 14))]
        cases.append((many, 1 + case % 4))
    cases.append(([*[10] * 50, 11, 12, 99, 100], 2))
    for lengths, num_sizes in cases:
        given = f"lengths={lengths}, num_sizes={num_sizes}"
        got = choose_padded_sizes(list(lengths), num_sizes)
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
