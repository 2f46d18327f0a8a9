"""What the tests of several modules share."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from folo_lib.kv_cache import AttentionMetadata
from folo_lib.runner import (
    InputBatch,
    ModelRunner,
    StepPlan,
    lay_end_to_end,
    make_input_batch,
)


def brute_force(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`[H, S, D]` over `[H_kv, T, D]`: one query of one head at a time, in float64."""
    (heads, query_len, _), (kv_heads, key_len, _) = query.shape, key.shape
    query, key, value = query.double(), key.double(), value.double()
    output = torch.empty_like(query)
    for head in range(heads):
        shared = head * kv_heads // heads
        for i in range(query_len):
            seen = key_len - query_len + i + 1
            scores = key[shared, :seen] @ query[head, i] * scale
            weights = scores.exp() / scores.exp().sum()
            output[head, i] = weights @ value[shared, :seen]
    return output


def random_qkv(
    heads: int, kv_heads: int, query_len: int, key_len: int, head_dim: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, query_len, head_dim),
        torch.randn(batch, kv_heads, key_len, head_dim),
        torch.randn(batch, kv_heads, key_len, head_dim),
    )


KVCache = tuple[Tensor, Tensor]


def make_kv_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    fill: float = float("nan"),
) -> KVCache:
    """Full of NaN, so that one slot too many read anywhere spoils the result."""
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    return torch.full(shape, fill), torch.full(shape, fill)


def make_metadata(
    block_lists: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    block_size: int,
) -> AttentionMetadata:
    """Of a step in which sequence `i` runs its last `query_lens[i]` of `seq_lens[i]` tokens.

    The block table holds a block that does not exist wherever nobody may look.
    """
    slots = [
        blocks[j // block_size] * block_size + j % block_size
        for blocks, new, end in zip(block_lists, query_lens, seq_lens, strict=True)
        for j in range(end - new, end)
    ]
    width = max(map(len, block_lists)) + 1
    table = [([*blocks] + [10**9] * width)[:width] for blocks in block_lists]
    return AttentionMetadata(
        block_size=block_size,
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor(table),
        query_start_loc=torch.tensor([0, *accumulate(query_lens)]),
        seq_lens=torch.tensor(seq_lens),
        query_lens_list=list(query_lens),
        seq_lens_list=list(seq_lens),
    )


class BlockPool:
    """Growing sequences whose blocks are handed out in random order.

    The metadata is worked out token by token with plain integers, and holds a block
    that does not exist wherever the backend has no business to look.
    """

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.block_size = block_size
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, news: Mapping[int, int]) -> tuple[Tensor, AttentionMetadata]:
        """Positions and metadata of a step in which sequence `s` gets `news[s]` tokens.

        The sequences lie in the order of `news`.
        """
        positions = []
        for seq, num_new in news.items():
            blocks = self.blocks.setdefault(seq, [])
            start = self.lengths.get(seq, 0)
            self.lengths[seq] = start + num_new
            while len(blocks) * self.block_size < start + num_new:
                blocks.append(self.free.pop())
            positions += range(start, start + num_new)
        metadata = make_metadata(
            [self.blocks[seq] for seq in news],
            list(news.values()),
            [self.lengths[seq] for seq in news],
            self.block_size,
        )
        return torch.tensor(positions), metadata

    def release(self, seq: int) -> None:
        """Gives the blocks back; the next sequence to ask gets them first."""
        self.free += self.blocks.pop(seq)
        del self.lengths[seq]


def prepare_inputs(runner: ModelRunner, plan: StepPlan) -> InputBatch:
    """Tells a runner of a step, and makes its tensors; nothing runs."""
    rows, block_size = runner.rows, runner.config.block_size
    rows.update(plan)
    return make_input_batch(rows, lay_end_to_end(rows, plan, block_size), block_size)
