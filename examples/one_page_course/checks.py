"""The check of this course, made as `folo_lib.course.exercises` makes its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require

TopA = Callable[[Tensor, float], Tensor]


@exercise
def check_apply_top_a_filtering(solution: TopA) -> None:
    probs = torch.tensor([[0.6, 0.2, 0.15, 0.05], [0.3, 0.28, 0.22, 0.2]])
    logits = probs.log() + 7  # probabilities, not logits, are compared
    before = logits.clone()
    result = solution(logits, 0.5)
    require(
        isinstance(result, Tensor), f"returned {type(result).__name__}, not a tensor."
    )
    require(result.shape == logits.shape, f"[2, 4] became {list(result.shape)}.")
    require(
        torch.equal(logits, before),
        "the logits that came in were changed: masked_fill makes a new tensor.",
    )
    kept = (result > float("-inf")).tolist()
    require(
        kept[0] == [True, True, False, False],
        f"a = 0.5, probabilities 0.6, 0.2, 0.15, 0.05: the bound is 0.5 * 0.6 ** 2 = 0.18, so "
        f"the first two stay; kept {kept[0]}.",
    )
    require(
        kept[1] == [True] * 4,
        f"probabilities 0.3, 0.28, 0.22, 0.2: the bound is 0.5 * 0.3 ** 2 = 0.045, so all stay; "
        f"kept {kept[1]}. Has each row a maximum of its own?",
    )
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 50, generator=generator)
    for a in (0.0, 0.1, 0.5, 1.0):
        probs = logits.softmax(-1)
        wanted = probs >= a * probs.amax(-1, keepdim=True) ** 2
        result = solution(logits, a)
        kept_too = (result > float("-inf")) == wanted
        require(
            kept_too.all(), f"a = {a}: {int((~kept_too).sum())} of 1,000 tokens wrong."
        )
        require(
            torch.equal(result[wanted], logits[wanted]),
            f"a = {a}: what is kept must keep its logit.",
        )
