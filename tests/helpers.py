"""What the tests of several modules share."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from folo_lib.kv_cache import AttentionMetadata

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
        positions, slots, starts = [], [], [0]
        for seq, num_new in news.items():
            blocks = self.blocks.setdefault(seq, [])
            for position in range(self.lengths.get(seq, 0), 0xFFFF)[:num_new]:
                if position == len(blocks) * self.block_size:
                    blocks.append(self.free.pop())
                block, place = divmod(position, self.block_size)
                slots.append(blocks[block] * self.block_size + place)
                positions.append(position)
            self.lengths[seq] = self.lengths.get(seq, 0) + num_new
            starts.append(len(slots))
        width = max(len(self.blocks[seq]) for seq in news) + 1
        seq_lens = [self.lengths[seq] for seq in news]
        metadata = AttentionMetadata(
            block_size=self.block_size,
            slot_mapping=torch.tensor(slots),
            block_table=torch.tensor(
                [(self.blocks[seq] + [10**9] * width)[:width] for seq in news]
            ),
            query_start_loc=torch.tensor(starts),
            seq_lens=torch.tensor(seq_lens),
            query_lens_list=list(news.values()),
            seq_lens_list=seq_lens,
        )
        return torch.tensor(positions), metadata

    def release(self, seq: int) -> None:
        """Gives the blocks back; the next sequence to ask gets them first."""
        self.free += self.blocks.pop(seq)
        del self.lengths[seq]
