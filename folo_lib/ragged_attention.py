"""Decode attention on a CPU without a copy of the cache and without padding: page 06, section 9."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from folo_lib.kv_cache import (
    AttentionMetadata,
    SequenceRead,
    TorchSDPABackend,
    read_alone,
    write_cache,
)

__all__ = ["RaggedRead", "TorchRaggedBackend", "plan_ragged"]

# PyTorch says once that sparse matrices are a beta and, in some versions, that nobody checks them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)


@dataclass(frozen=True)
class RaggedRead:
    """Sequences with one token each: their scores as the entries of a sparse matrix.

    It has a row for each query head of each sequence, and a column for each key of the cache.
    What a sequence does not own has no entry, so nobody's slots are read but its own.

    Attributes:
        tokens: `[b]`, their tokens in the step.
        scores: `[b * H, num_blocks * block_size * H_kv]`, CSR, with entries where a query meets
            a key; their values are zeros.
        seq_lens: `[b * H]`, the entries of each row.
        rows: the row of each entry.
    """

    tokens: Tensor
    scores: Tensor
    seq_lens: Tensor
    rows: Tensor


def plan_ragged(
    metadata: AttentionMetadata, members: list[int], num_heads: int, cache: Tensor
) -> RaggedRead:
    """The ragged read of these sequences, each of which runs one token.

    Args:
        metadata: of the step.
        members: the numbers of the sequences.
        num_heads: `H`.
        cache: `[num_blocks, block_size, H_kv, D]`, of any layer.
    """
    device, size = cache.device, metadata.block_size
    num_kv_heads, num_keys = cache.shape[2], cache.shape[:3].numel()
    chosen = torch.tensor(members, device=device)
    seq_lens = metadata.seq_lens.index_select(0, chosen)  # [b]
    longest = max(metadata.seq_lens_list[i] for i in members)
    blocks = metadata.block_table[:, : -(-longest // size)].index_select(0, chosen)
    slots = (blocks[:, :, None] * size + torch.arange(size, device=device)).flatten(1)
    places = torch.arange(slots.shape[1], device=device)
    slots = slots[places < seq_lens[:, None]]  # those of all sequences, end to end

    lengths = seq_lens.repeat_interleave(num_heads)  # [b * H]
    rows = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    # Each head of a sequence goes through all of the sequence's slots.
    first_slots = (seq_lens.cumsum(0) - seq_lens).repeat_interleave(num_heads)
    places = torch.arange(len(rows), device=device)
    places += (first_slots - starts[:-1]).index_select(0, rows)
    kv_heads = torch.arange(num_heads, device=device) // (num_heads // num_kv_heads)
    columns = slots.index_select(0, places) * num_kv_heads
    columns += kv_heads.repeat(len(members)).index_select(0, rows)
    scores = torch.sparse_csr_tensor(
        starts,
        columns,
        torch.zeros(len(columns), dtype=cache.dtype, device=device),
        (len(lengths), num_keys),
        check_invariants=False,
    )
    tokens = metadata.query_start_loc.index_select(0, chosen)
    return RaggedRead(tokens, scores, lengths, rows)


class TorchRaggedBackend(TorchSDPABackend):
    """Single tokens attend by sparse matrix products, over keys and values where they lie.

    `TorchSDPABackend` copies the contexts of single tokens into rectangles first, which takes
    longer than to attend. What runs several tokens, or decodes alone, is left to it.
    """

    @staticmethod
    def get_name() -> str:
        return "torch_ragged"

    @staticmethod
    def find_fault(device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, with the cure; None: it can."""
        if device.type == "cpu" and dtype in (torch.float32, torch.float64):
            return None
        return (
            "attention_backend='torch_ragged' needs a CPU and dtype='float32', not "
            f"{device.type!r} and {str(dtype).removeprefix('torch.')!r}: choose "
            "attention_backend='torch_sdpa'."
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        if self.get_name() not in metadata.plans:
            plan = self.plan(metadata, query.shape[1], kv_cache[0])
            metadata.plans[self.get_name()] = plan
        alone, ragged = metadata.plans[self.get_name()]
        if ragged is None:
            return super().forward(query, key, value, kv_cache, metadata)
        for cache, new in zip(kv_cache, (key, value), strict=True):
            write_cache(cache, metadata.slot_mapping, new)
        if not alone:
            return self.attend_ragged(query, kv_cache, ragged)
        output = torch.empty_like(query)
        for read in alone:
            own = slice(read.start, read.stop)
            output[own] = self.attend_alone(query[own], kv_cache, read)
        queries = query.index_select(0, ragged.tokens)
        answers = self.attend_ragged(queries, kv_cache, ragged)
        return output.index_copy_(0, ragged.tokens, answers)

    def plan(
        self, metadata: AttentionMetadata, num_heads: int, cache: Tensor
    ) -> tuple[list[SequenceRead], RaggedRead | None]:
        """Who reads alone, and who together; nobody together: `TorchSDPABackend` plans."""
        query_lens = metadata.query_lens_list
        single = [i for i, query_len in enumerate(query_lens) if query_len == 1]
        # A model may have been moved since it was loaded.
        if len(single) < 2 or self.find_fault(cache.device, cache.dtype):
            return [], None
        alone = [
            read_alone(metadata, i, start)
            for i, start in enumerate(accumulate(query_lens[:-1], initial=0))
            if query_lens[i] > 1
        ]
        return alone, plan_ragged(metadata, single, num_heads, cache)

    def attend_ragged(
        self, query: Tensor, kv_cache: tuple[Tensor, Tensor], read: RaggedRead
    ) -> Tensor:
        """`[b, H, D] -> [b, H, D]`, each over its own sequence."""
        head_dim = query.shape[-1]
        scale = head_dim**-0.5 if self.scale is None else self.scale
        keys, values = (cache.view(-1, head_dim) for cache in kv_cache)
        queries = query.reshape(-1, head_dim)  # [b * H, D]
        # queries @ keys.T, where there are entries
        scores = torch.sparse.sampled_addmm(
            read.scores, queries, keys.T, alpha=scale, beta=0.0
        )
        # A softmax over each row, whose sum is divided by at the end.
        entries, lengths = scores.values(), read.seq_lens
        highest = torch.segment_reduce(entries, "max", lengths=lengths, unsafe=True)
        weights = (entries - highest.index_select(0, read.rows)).exp_()
        total = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
        columns, starts = scores.col_indices(), scores.crow_indices()[:-1]
        output = F.embedding_bag(  # weights @ values, a weighted sum for each row
            columns, values, starts, mode="sum", per_sample_weights=weights
        )
        return output.div_(total[:, None]).view_as(query)
