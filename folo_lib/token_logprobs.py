"""Log-probabilities of tokens as plain data: of those that were drawn, and of a prompt's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.sampler import LogprobsTensors, gather_logprobs
from folo_lib.sampling_rows import move

__all__ = ["TokenLogprobs", "score_tokens", "to_entries"]

TokenLogprobs = list[tuple[int, float, int]]
"""Of one place: `(token id, log-probability, rank)`, first the token that is there."""


def to_entries(
    logprobs: LogprobsTensors, wanted: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Log-probabilities as plain data, of each row as many as it asked for.

    Args:
        logprobs: of `B` rows.
        wanted: `B` numbers of likeliest tokens beside the row's own; -1 is all, None no
            entry at all.
    """
    entries: list[TokenLogprobs | None] = []
    ranks = logprobs.ranks.tolist()
    columns = logprobs.token_ids.tolist(), logprobs.logprobs.tolist(), ranks, wanted
    for ids, values, rank, count in zip(*columns, strict=True):
        if count is None:
            entries.append(None)
            continue
        size = len(ids) if count == -1 else min(1 + count, len(ids))
        places = [rank, *range(1, size)]
        entries.append(list(zip(ids[:size], values[:size], places, strict=True)))
    return entries


def score_tokens(
    model: Qwen3ForCausalLM,
    hidden_states: Tensor,
    token_ids: Sequence[int],
    num_logprobs: int,
) -> LogprobsTensors:
    """Log-probabilities of given tokens, 256 at a time, as each has `V` logits.

    Args:
        model: for its logits.
        hidden_states: `[n, E]`, each of the token before.
        token_ids: `n` of them.
        num_logprobs: how many likeliest ones beside each; -1 is all.
    """
    count = model.config.vocab_size if num_logprobs < 0 else num_logprobs
    predicted = move(token_ids, torch.int64, hidden_states.device)
    parts = [
        gather_logprobs(model.compute_logits(some), own, count)
        for some, own in zip(
            torch.split(hidden_states, 256), torch.split(predicted, 256), strict=True
        )
    ]
    return LogprobsTensors(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.ranks for part in parts]),
    )
