"""Checks of the exercises on page 14."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require


@exercise
def check_make_geometric_buckets(
    make_geometric_buckets: Callable[[int, int, float, int], list[int]],
) -> None:
    """Few buckets, none too wide, every one of whole blocks."""
    for num_slots, smallest, factor, block in (
        (1024, 256, 2.0, 16),
        (8192, 256, 1.25, 16),
        (4096, 256, 1.5, 16),
        (1008, 16, 1.1, 16),
        (240, 240, 1.5, 16),
        (64, 256, 2.0, 16),
        (40_960, 128, 1.3, 128),
    ):
        call = f"make_geometric_buckets({num_slots}, {smallest}, {factor}, {block})"
        buckets = make_geometric_buckets(num_slots, smallest, factor, block)
        require(isinstance(buckets, list), f"{call} gives {buckets!r}, not a list.")
        require(
            bool(buckets) and buckets[-1] == num_slots,
            f"{call} ends with {buckets[-1:]}: the last bucket must hold all "
            f"{num_slots} slots, and none may be larger.",
        )
        first = min(smallest, num_slots)
        require(
            buckets[0] == first,
            f"{call} begins with {buckets[0]} and not with {first}.",
        )
        odd = [n for n in buckets if n % block]
        require(not odd, f"{call} holds {odd[:3]}: round up to a multiple of {block}.")
        for small, large in itertools.pairwise(buckets):
            require(
                large > small,
                f"{call} has {large} behind {small}: each must be larger than the one "
                "before it, also where the factor is so small that rounding stops it.",
            )
            wide = -(-small * factor // block) * block
            wide = max(wide, small + block)
            require(
                large <= wide,
                f"{call} jumps from {small} to {large}; {factor} times as much, in "
                f"whole blocks, is {wide:.0f}.",
            )
            require(
                large in (wide, num_slots),
                f"{call} has {large} behind {small}, where {wide:.0f} would do: more "
                "graphs than needed.",
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
            hint = "what comes behind the first wrong guess does not count"
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
