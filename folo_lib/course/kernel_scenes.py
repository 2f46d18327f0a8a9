# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Small uses of the Triton kernels that a student writes; see `scenes.py`.

They run in Triton's interpreter. Each returns tensors, which are compared: once with the finished
kernel in its place, and once with the learner's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from folo_lib import paged_attention as paged
from folo_lib.fused_decode import (
    as_right,
    load_first_tiles,
    load_norm,
    load_weights,
    multiply,
    pack_scores,
    unpack_token,
)
from folo_lib.kv_cache import AttentionMetadata

__all__ = ["fused_decode", "paged_attention"]


def paged_attention(name: str) -> list[Tensor]:
    """A prompt, a chunk and two tokens, over one cache."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(shape, generator=generator)
        for shape in ((25, 4, 16), (79, 4, 2, 16), (79, 4, 2, 16))
    )
    seq_lens, query_lens = [200, 9, 300, 1], [20, 3, 1, 1]
    ends = torch.tensor([0, *query_lens]).cumsum(0)
    metadata = AttentionMetadata(
        block_size=4,
        slot_mapping=torch.zeros(25, dtype=torch.int64),
        block_table=torch.arange(300).reshape(4, 75) % 79,
        query_start_loc=ends,
        seq_lens=torch.tensor(seq_lens),
        query_lens_list=query_lens,
        seq_lens_list=seq_lens,
    )
    # Scores that rise, so that the highest so far changes.
    query = query * torch.linspace(1, 6, 25)[:, None, None]
    return [paged.paged_attention(query, keys, values, metadata, 0.5)]


@triton.jit
def right_kernel(w, out):
    place = tl.arange(0, 8)[:, None, None] * 1024 + tl.arange(0, 128)[None, :, None] * 8
    right = as_right(load_weights(w, 0, 8, 0, 1024, 1), 1)
    tl.store(out + place + tl.arange(0, 8)[None, None, :], right)


@triton.jit
def multiply_kernel(
    x, g, w, y, num_seqs, eps, K: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr
):
    tiles, norm = load_first_tiles(w, 0, 8, K, 2), load_norm(g, K)
    result = multiply(x, norm, tiles, w, 0, 8, num_seqs, eps, K, 2, ROWS, NORM)
    place = tl.arange(0, ROWS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(y + place, result, mask=tl.arange(0, ROWS)[:, None] < num_seqs)


@triton.jit
def pack_kernel(scores, packed, SIZE: tl.constexpr):
    ids = tl.arange(0, SIZE)
    one = pack_scores(tl.load(scores + ids), ids)
    tl.store(packed + ids, one)


@triton.jit
def unpack_kernel(packed, tokens, SIZE: tl.constexpr):
    ids = tl.arange(0, SIZE)
    tl.store(tokens + ids, unpack_token(tl.load(packed + ids)))


def fused_decode(name: str) -> list[Tensor]:
    """The kernel of that name alone, in a small kernel that stores what it gives."""
    generator = torch.Generator().manual_seed(0)
    if name == "as_right":
        w = torch.arange(8 * 1024).reshape(8, 1024)
        right = torch.zeros(8, 128, 8, dtype=torch.int64)
        right_kernel[(1,)](w, right)
        return [right]
    if name == "multiply":
        results = []
        for rows, columns, norm in ((3, 1024, True), (2, 3072, True), (1, 2048, False)):
            x = torch.randn(rows, columns, generator=generator)
            g = torch.rand(columns, generator=generator)
            w = torch.randn(16, columns, generator=generator)
            y = torch.zeros(rows, 16)
            multiply_kernel[(1,)](x, g, w, y, rows, 1e-3, K=columns, ROWS=4, NORM=norm)
            results.append(y)
        return results
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([1.5, -2.0, 0.0, 1.5, -inf, 3e38, -1e-30, nan])
    packed, tokens = torch.zeros(2, 8, dtype=torch.int64).unbind()
    pack_kernel[(1,)](scores, packed, SIZE=8)
    unpack_kernel[(1,)](packed, tokens, SIZE=8)
    return [packed, tokens]
