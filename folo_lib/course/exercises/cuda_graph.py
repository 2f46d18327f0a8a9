"""Checks of the exercises on page 14."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require

FEWEST_OF_256 = 1_123_580
"""Rows that the best twelve sizes pad in the last check of `choose_few_sizes`."""


@exercise
def check_count_padding(count_padding: Callable[[list[int], int], int]) -> None:
    """The smallest size that holds the step, whatever the order of the sizes."""
    for sizes, num_seqs, right, hint in (
        ([1, 2, 4, 8], 3, 1, ""),
        ([1, 2, 4, 8], 4, 0, "a graph of exactly that size holds the step"),
        ([1, 2, 4, 8], 5, 3, ""),
        ([8, 1, 4, 2], 3, 1, "the sizes come in any order"),
        ([1, 2, 4, 8], 9, 0, "no graph holds the step, so nothing is padded"),
        ([], 1, 0, "there is no graph at all"),
        ([6, 100], 7, 93, ""),
    ):
        got = count_padding(list(sizes), num_seqs)
        call = f"count_padding({sizes}, {num_seqs})"
        because = f": {hint}" if hint else ""
        require(got == right, f"{call} gives {got!r}, and {right} is right{because}.")


def count_padded_rows(steps: Mapping[int, int], sizes: Sequence[int]) -> int:
    """Rows that are nobody's, over all steps; each has a size that holds it."""
    return sum(
        count * (min(size for size in sizes if size >= number) - number)
        for number, count in steps.items()
    )


@exercise
def check_choose_few_sizes(
    choose_few_sizes: Callable[[dict[int, int], int], list[int]],
) -> None:
    """Against all choices where there are few, then on traffic of 256 numbers."""
    draw = random.Random(0)
    cases = [({5: 1}, 1), ({5: 1}, 3), ({1: 100, 7: 1, 8: 1}, 2)]
    for _ in range(60):
        numbers = draw.sample(range(1, 20), draw.randint(1, 7))
        cases.append(({n: draw.randint(1, 50) for n in numbers}, draw.randint(1, 4)))
    for steps, num_graphs in cases:
        call = f"choose_few_sizes({steps}, {num_graphs})"
        sizes = choose_few_sizes(dict(steps), num_graphs)
        check_sizes(call, sizes, steps, num_graphs)
        largest, padded = max(steps), count_padded_rows(steps, sizes)
        others = [number for number in steps if number != largest]
        best = min(
            ([*some, largest] for some in subsets(others, num_graphs - 1)),
            key=partial(count_padded_rows, steps),
        )
        fewest = count_padded_rows(steps, best)
        require(
            padded == fewest,
            f"{call} gives {sizes}, which pads {padded} rows: {sorted(best)} pads "
            f"{fewest}.",
        )
    steps = {n: draw.randint(1, 1000) for n in range(1, 257)}
    sizes = choose_few_sizes(dict(steps), 12)
    check_sizes("for numbers up to 256 it", sizes, steps, 12)
    padded = count_padded_rows(steps, sizes)
    require(
        padded <= FEWEST_OF_256,
        f"for every number up to 256 and 12 graphs it pads {padded:,} rows, and "
        f"{FEWEST_OF_256:,} is possible.",
    )


def subsets(numbers: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    """All choices of at most so many of the numbers."""
    for count in range(min(most, len(numbers)) + 1):
        yield from itertools.combinations(numbers, count)


def check_sizes(
    call: str, sizes: object, steps: Mapping[int, int], num_graphs: int
) -> None:
    """What must hold of any choice."""
    require(isinstance(sizes, list), f"{call} gives {sizes!r}, not a list.")
    assert isinstance(sizes, list)
    require(
        len(sizes) <= num_graphs,
        f"{call} gives {len(sizes)} sizes, and {num_graphs} may be recorded at most.",
    )
    require(sizes == sorted(set(sizes)), f"{call} gives {sizes}: not ascending.")
    require(
        bool(sizes) and sizes[-1] == max(steps),
        f"{call} ends with {sizes[-1:]}: the last size must be {max(steps)}, so that "
        "every step has a graph and none is larger than needed.",
    )


@exercise
def check_count_accepted(count_accepted: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Against a loop, and on the meta device, which has no values to ask for."""
    draw = random.Random(0)
    for case in range(200):
        size, length = draw.randint(1, 4), draw.randint(1, 6)
        vocab = draw.choice([2, 2, 50])
        chosen = [
            [draw.randrange(vocab) for _ in range(length + 1)] for _ in range(size)
        ]
        draft = [
            [c if draw.random() < 0.8 else draw.randrange(vocab) for c in row[:-1]]
            for row in chosen
        ]
        if case == 0:
            draft = [row[:-1] for row in chosen]
        wanted = []
        for guess, own in zip(draft, chosen, strict=True):
            right = 0
            while right < length and guess[right] == own[right]:
                right += 1
            wanted.append(right + 1)
        got = count_accepted(torch.tensor(draft), torch.tensor(chosen))
        require(isinstance(got, Tensor), f"it returns {got!r}: a tensor is wanted.")
        require(
            got.shape == (size,),
            f"for {size} rows it returns the shape {list(got.shape)}, not [{size}].",
        )
        for row, (ours, right) in enumerate(zip(got.tolist(), wanted, strict=True)):
            hint = "what comes after the first wrong guess does not count"
            if ours == right - 1:
                hint = "the large model's own choice is one token more"
            require(
                ours == right,
                f"draft {draft[row]}, chosen {chosen[row]}: it says {ours}, and {right} "
                f"is right; {hint}.",
            )
    require(got.dtype == torch.int64, f"its dtype is {got.dtype}, not torch.int64.")
    meta = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    try:
        count_accepted(meta, torch.zeros(2, 4, dtype=torch.int64, device="meta"))
    except (RuntimeError, NotImplementedError) as error:
        require(
            False,
            "it asks the device for a value (.item(), .tolist(), int(), an if on a "
            f"tensor, or indexing with a mask), so no graph can hold it: {error}",
        )
