"""The attention of page 15: norm, rotation, cache and softmax of a decode step in one kernel.

Page 13's decode kernel, changed in four ways:

1. It takes queries, keys and values as the projection leaves them, and norms, rotates and stores.
2. It loads keys so that the tensor cores find in a thread's registers what they expect there, as
   section 4 of the page does with weights. Values are multiplied without tensor cores. So nothing
   of the cache has to go through the memory that the warps share.
3. Each warp keeps an online softmax over tokens of its own, and waits for no other warp before the
   end.
4. Where a context is split over several programs, the one that arrives last merges what all have
   left, so that no second kernel is needed.

Heads have 128 numbers; cache blocks may have any size. Scores are in powers of two (`scale` has a
factor `log2(e)`), so softmax is made of `exp2`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .early_start import let_next_start, wait_for_previous
from .qwen3 import Attention
from .rope import RotaryEmbedding

__all__ = [
    "AttentionScratch",
    "launch_attention",
    "norm_and_rotate",
]

# Pieces of all sequences together. With 8 key heads that is 128 programs, one for nearly each of
# the 132 multiprocessors of an H200.
MAX_SPLITS = 16
WARPS = tl.constexpr(8)  # of the attention kernel
# Tokens of a tile; the second is for float32, which needs twice the registers.
TILE, WIDE_TILE = 128, 64


@triton.jit
def norm_and_rotate(x, partners, here, there, eps, D: tl.constexpr):
    """The q/k norm of page 04 and the rotation of page 02, of heads `[M, D]`, in float32.

    `partners` are the numbers half a head away. `here` is the weight of the norm times the
    cosine, `there` the partners' weight times the sine, whose first half is negative.
    """
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    return (x * here + partners.to(tl.float32) * there) * scale


# Triton compiles anew for some values of an argument, and not for these: they differ from step to
# step.
PER_STEP = {
    "do_not_specialize": ["num_splits", "min_tiles"],
    "do_not_specialize_on_alignment": ["seq_lens", "slots"],
}


@triton.jit
def find_places(
    table, first, end, strides, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Where in the cache the tokens of a tile are, and whether they exist: `[TILE]` each."""
    # Eight tokens that lie in one block need one look at the table.
    NEIGHBOURS: tl.constexpr = 8 if BLOCK_SIZE % 8 == 0 else 1
    starts = tl.arange(0, TILE // NEIGHBOURS) * NEIGHBOURS + first
    blocks = tl.load(table + starts // BLOCK_SIZE, mask=starts < end, other=0)
    places = blocks.to(tl.int64) * strides[0] + starts % BLOCK_SIZE * strides[1]
    places = places[:, None] + tl.arange(0, NEIGHBOURS)[None, :] * strides[1]
    return tl.reshape(places, (TILE,)), tl.arange(0, TILE) + first < end


@triton.jit
def load_eights(cache, places, exist, dims):
    """Rows of eight neighbours, which one thread loads at once: `[M, 8]`.

    Row `i` begins at number `dims[i]` of the key or value at `places[i]`; `places`, `exist` and
    `dims` are `[M]`. Zeros are loaded where there is no token.
    """
    places = tl.multiple_of(places + dims, 8)[:, None] + tl.arange(0, 8)[None, :]
    return tl.load(cache + places, mask=exist[:, None], other=0.0)


@triton.jit
def load_keys(keys, places, exist, TILE: tl.constexpr):
    """Keys of a tile, in the order of `load_weights` on the page: `[16 * TILE, 8]`.

    A key is a row of 128 columns. Eight of them in four pieces of 32 columns are what a warp has
    at a time: four threads share a row of a piece. So row `i` of the result is made of, from left
    to right, the run of 8 tokens for each warp, the piece, the warp, the token and the thread.
    """
    RUNS: tl.constexpr = TILE // (8 * WARPS)  # of 8 tokens, for each warp
    i = tl.arange(0, 16 * TILE)
    places = tl.reshape(places, (RUNS, 1, WARPS, 8, 1))
    exist = tl.reshape(exist, (RUNS, 1, WARPS, 8, 1))
    places = tl.reshape(tl.broadcast_to(places, (RUNS, 4, WARPS, 8, 4)), (16 * TILE,))
    exist = tl.reshape(tl.broadcast_to(exist, (RUNS, 4, WARPS, 8, 4)), (16 * TILE,))
    return load_eights(keys, places, exist, i // (32 * WARPS) % 4 * 32 + i % 4 * 8)


@triton.jit
def load_values(values, places, exist, TILE: tl.constexpr):
    """Values of a tile, for the same warps as their keys: `[16 * TILE, 8]`.

    Sixteen threads share a value, so a warp loads two at a time, four times for a run of 8. A
    thread has the same eight numbers of every other token of its warp.
    """
    RUNS: tl.constexpr = TILE // (8 * WARPS)
    i = tl.arange(0, 16 * TILE)
    places = tl.permute(tl.reshape(places, (RUNS, WARPS, 4, 2, 1)), (0, 2, 1, 3, 4))
    exist = tl.permute(tl.reshape(exist, (RUNS, WARPS, 4, 2, 1)), (0, 2, 1, 3, 4))
    places = tl.reshape(tl.broadcast_to(places, (RUNS, 4, WARPS, 2, 16)), (16 * TILE,))
    exist = tl.reshape(tl.broadcast_to(exist, (RUNS, 4, WARPS, 2, 16)), (16 * TILE,))
    return load_eights(values, places, exist, i % 16 * 8)


@triton.jit
def as_keys(k, TILE: tl.constexpr):
    """What `load_keys` has loaded, as `[128, TILE]`: a column per token; see `as_right`."""
    RUNS: tl.constexpr = TILE // (8 * WARPS)
    k = tl.reshape(k, (RUNS, 4, WARPS, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(k, (1, 5, 6, 4, 7, 0, 2, 3)), (128, TILE))


@triton.jit
def as_query(x):
    """`[16, 128]` with the dims in the order in which `as_keys` has them."""
    x = tl.permute(tl.reshape(x, (16, 4, 4, 2, 2, 2)), (0, 1, 3, 4, 2, 5))
    return tl.reshape(x, (16, 128))


@triton.jit
def find_partners(D: tl.constexpr):
    """The dims half a head away; the compiler is told that they come in eights."""
    partners = (tl.arange(0, D)[None, :] + D // 2) % D
    return tl.max_contiguous(tl.multiple_of(partners, [1, 8]), [1, 8])


@triton.jit
def product(a, b):
    """How `tl.reduce` makes one of two numbers."""
    return a * b


@triton.jit
def add_warps(x, GROUP: tl.constexpr, D: tl.constexpr):
    """The sum over the warps of `[GROUP, WARPS, D]`: `[GROUP, D]`.

    The gather takes every number from where it is, so it changes no value. It changes which thread
    holds it: afterwards one thread has a number of all warps. A sum across warps without it is
    slow, since its writes to shared memory collide.
    """
    x = tl.reshape(tl.permute(x, (1, 0, 2)), (WARPS, GROUP * D))
    same = tl.arange(0, WARPS)[:, None] + tl.zeros([WARPS, GROUP * D], tl.int32)
    return tl.reshape(tl.sum(tl.gather(x, same, 0), 0), (GROUP, D))


@triton.jit
def merge(scratch, first, count, GROUP: tl.constexpr, D: tl.constexpr):
    """Merges `count` shares from share `first` on, eight at a time: `[GROUP, D]`.

    `scratch` are `parts`, `tops` and `totals` of `AttentionScratch`.
    """
    # Told that columns have no neighbours, Triton gives a thread one column of all eight shares,
    # so that it adds them up alone.
    columns = tl.max_contiguous(tl.arange(0, GROUP * D), 1)[None, :]
    heads = tl.arange(0, GROUP)[None, :]
    highest = tl.full([GROUP], -1e30, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    answer = tl.zeros([GROUP, D], tl.float32)
    for begin in tl.range(0, count, 8):
        shares = begin + tl.arange(0, 8)[:, None]
        exist, place = shares < count, (first + shares) * GROUP + heads
        # ".cg" reads past the multiprocessor's own cache, which may hold what was there before.
        tops = tl.load(scratch[1] + place, exist, other=-1e30, cache_modifier=".cg")
        totals = tl.load(scratch[2] + place, exist, other=0.0, cache_modifier=".cg")
        place = (first + shares) * (GROUP * D) + columns
        parts = tl.load(scratch[0] + place, exist, other=0.0, cache_modifier=".cg")
        new_highest = tl.maximum(highest, tl.max(tops, 0))
        weights = tl.exp2(tops - new_highest[None, :])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(totals * weights, 0)
        parts = tl.reshape(parts, (8, GROUP, D)) * weights[:, :, None]
        answer = answer * shrink[:, None] + tl.sum(parts, 0)
        highest = new_highest
    return answer / total[:, None]


@triton.jit(**PER_STEP)
def attention_kernel(
    qkv,  # [B, (H + 2 * KV) * D]
    q_weight,
    k_weight,  # [D]
    cos,
    sin,  # [P, D]
    key_cache,
    value_cache,  # [num_blocks, block_size, KV, D]
    table,
    seq_lens,
    slots,  # int32 [B, max_blocks], int64 [B], int64 [B]
    output,  # [B, H * D]
    parts,
    tops,
    totals,
    arrivals,  # see AttentionScratch
    scale,
    eps,
    block_stride,
    slot_stride,
    head_stride,
    max_blocks,
    num_splits,
    min_tiles,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, rotation, cache and attention: a program per key head, sequence and split.

    A context is cut into at most `num_splits` pieces of at least `min_tiles` tiles; programs for
    which nothing is left end at once. Every program norms and rotates the queries and the newest
    key. That of the first piece stores the newest token and counts it: nobody reads it from the
    cache, it joins at the end, from registers.
    """
    let_next_start(PDL)
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H // KV
    RUNS: tl.constexpr = TILE // (8 * WARPS)
    old = tl.load(seq_lens + sequence).to(tl.int32) - 1  # tokens that are in the cache
    tiles = tl.cdiv(old, TILE)
    length = tl.maximum(tl.cdiv(tiles, num_splits), min_tiles) * TILE
    begin, strides = split * length, (block_stride, slot_stride)
    if (begin >= tl.maximum(old, 1)) | (old < 0):  # nothing to do, or padding
        if old < 0:  # where all is padding, somebody must wait: see early_start.py
            wait_for_previous(PDL)
        return
    end = tl.minimum(begin + length, old)
    table += sequence * max_blocks
    keys = key_cache + head.to(tl.int64) * head_stride
    values = value_cache + head.to(tl.int64) * head_stride
    places, exist = find_places(table, begin, end, strides, TILE, BLOCK_SIZE)
    k = load_keys(keys, places, exist, TILE)
    v = load_values(values, places, exist, TILE)
    # 16 rows for the tensor cores: a query, the newest key, the next query, the key again, and so
    # on, the queries repeated. With the key beside each query, their product can be added up
    # without a detour. Weights times cosines and sines are ready before the wait.
    rows, dims = tl.arange(0, 16)[:, None], tl.arange(0, D)[None, :]
    is_key, partners, every = rows % 2 == 1, find_partners(D), 0 * rows
    dtype = qkv.dtype.element_ty
    q_here, k_here = tl.load(q_weight + dims + every), tl.load(k_weight + dims + every)
    here = tl.where(is_key, k_here, q_here).to(tl.float32)
    here *= tl.load(cos + old * D + dims + every).to(dtype).to(tl.float32)
    q_there = tl.load(q_weight + partners + every)
    k_there = tl.load(k_weight + partners + every)
    there = tl.where(is_key, k_there, q_there).to(tl.float32)
    there *= tl.load(sin + old * D + dims + every).to(dtype).to(tl.float32)
    slot = tl.load(slots + sequence)
    newest = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
    qkv += sequence * (H + 2 * KV) * D
    source = tl.where(is_key, H + head, head * GROUP + rows // 2 % GROUP) * D
    wait_for_previous(PDL)
    x, others = tl.load(qkv + source + dims), tl.load(qkv + source + partners)
    own_value = tl.load(qkv + (H + KV + head) * D + tl.arange(0, D))
    x = norm_and_rotate(x, others, here, there, eps, D).to(dtype)
    if split == 0:  # row 1 is the key
        tl.store(keys + newest + dims + every, x, mask=rows == 1)
        tl.store(values + newest + tl.arange(0, D), own_value)
    own = tl.reduce(tl.reshape(x.to(tl.float32), (8, 2, D)), 1, product)
    own = tl.where(split == 0, tl.sum(own, 1) * scale, -1e30)  # query times newest key
    own = tl.max(tl.reshape(own, (8 // GROUP, GROUP)), 0)
    query = as_query(x)
    # The online softmax of each warp. What is summed over its tokens stays apart as long as
    # possible: `sums` for 8 tokens of each run, `result` for the two halves of a warp.
    highest = tl.full([GROUP, WARPS], -1e30, tl.float32)
    sums = tl.zeros([GROUP, RUNS, WARPS, 8], tl.float32)
    result = tl.zeros([GROUP, WARPS, 2, D], tl.float32)
    for first in tl.range(begin, end, TILE):
        scores = tl.dot(query, as_keys(k, TILE), input_precision="ieee") * scale
        # The next tile is on its way as soon as there is room: its keys while this one's values
        # are multiplied, its values while its own scores are. Beyond the end nothing is loaded.
        places, exist = find_places(table, first + TILE, end, strides, TILE, BLOCK_SIZE)
        k = load_keys(keys, places, exist, TILE)
        unseen = first + tl.arange(0, TILE)[None, :] >= end
        # Out of 16 rows come `GROUP`: the maximum drops the rows of the key and the repeated ones.
        scores = tl.where(is_key | unseen, -1e30, scores)
        scores = tl.max(tl.reshape(scores, (8 // GROUP, GROUP, 2, TILE)), 2)
        scores = tl.reshape(tl.max(scores, 0), (GROUP, RUNS, WARPS, 8))
        new_highest = tl.maximum(highest, tl.max(tl.max(scores, 3), 1))
        weights = tl.exp2(scores - new_highest[:, None, :, None])
        shrink = tl.exp2(highest - new_highest)
        sums = sums * shrink[:, None, :, None] + weights
        highest = new_highest
        wide = tl.reshape(v.to(tl.float32), (1, RUNS * 4, WARPS, 2, D))
        weights = tl.reshape(weights, (GROUP, RUNS, WARPS, 4, 2))
        weights = tl.permute(weights, (0, 1, 3, 2, 4))
        weights = tl.reshape(weights, (GROUP, RUNS * 4, WARPS, 2, 1))
        result = result * shrink[:, :, None, None] + tl.sum(wide * weights, 1)
        v = load_values(values, places, exist, TILE)
    # The warps meet for the first time, and the newest token joins them.
    top = tl.maximum(tl.max(highest, 1), own)
    shrink, own = tl.exp2(highest - top[:, None]), tl.exp2(own - top)
    total = tl.sum(tl.sum(tl.sum(sums, 3), 1) * shrink, 1) + own
    answer = add_warps(tl.sum(result, 2) * shrink[:, :, None], GROUP, D)
    answer += own[:, None] * own_value.to(tl.float32)[None, :]
    num_used, heads = tl.cdiv(old, length), tl.arange(0, GROUP)
    place = output + (sequence * H + head * GROUP + heads[:, None]) * D + dims
    if num_used <= 1:
        tl.store(place, (answer / total[:, None]).to(dtype))
    else:
        group = sequence * KV + head
        share = (group * num_splits + split) * GROUP + heads
        tl.store(tops + share, top)
        tl.store(totals + share, total)
        tl.store(parts + share[:, None] * D + dims, answer)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrivals + group, 1, sem="acq_rel") == num_used - 1:
            scratch = (parts, tops, totals)
            answer = merge(scratch, group * num_splits, num_used, GROUP, D)
            tl.store(place, answer.to(dtype))
            tl.store(arrivals + group, 0)


class AttentionScratch(NamedTuple):
    """What the splits of an attention leave for each other; zeros at first.

    Each program that has a piece of a context leaves a share. `parts` float32
    `[splits * H, 128]` holds values, weighted and added up, `tops` and `totals` float32
    `[splits * H]` the highest score and the sum of the weights. `arrivals` int32
    `[B * H_kv]` counts the programs that have left theirs; it is zeros between launches.
    """

    parts: Tensor
    tops: Tensor
    totals: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(
        cls, num_seqs: int, heads: Sequence[int], device: torch.device
    ) -> AttentionScratch:
        """For at most that many sequences, and `MAX_SPLITS` splits of all together.

        `heads` are the numbers of query, key and value heads.
        """
        splits, (num_heads, num_kv_heads, _) = max(num_seqs, MAX_SPLITS), heads
        parts = torch.zeros(splits * num_heads, 128, device=device)
        arrivals = torch.zeros(
            num_seqs * num_kv_heads, dtype=torch.int32, device=device
        )
        tops, totals = parts.new_zeros(2, len(parts))
        return cls(parts, tops, totals, arrivals)


def launch_attention(
    attention: Attention,
    rotary: RotaryEmbedding,
    qkv: Tensor,
    kv_cache: tuple[Tensor, Tensor],
    table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    output: Tensor,
    scratch: AttentionScratch,
    pdl: dict[str, bool],
) -> None:
    """Attention of a decode step, from the projection to `output`.

    Args:
        attention: for its sizes and its q/k norm.
        rotary: for its tables.
        qkv: `[B, (H + 2 * H_kv) * D]`, `D` being 128.
        kv_cache: keys and values `[num_blocks, block_size, H_kv, D]`; the newest token of each
            sequence is stored there.
        table: int32 `[B, max_blocks]`, a sequence's blocks.
        seq_lens, slots: `[B]`, lengths with the newest token, and where that one goes; length 0
            is padding, whose output is left as it is.
        output: `[B, H * D]`.
        scratch: of `AttentionScratch.allocate`.
        pdl: `PDL` and `launch_pdl`, if the kernel may start before the last one has ended.
    """
    assert attention.q_norm is not None and attention.k_norm is not None
    (num_heads, num_kv_heads, _), num_seqs = attention.heads, len(seq_lens)
    key_cache, _ = kv_cache
    num_splits = max(1, MAX_SPLITS // triton.next_power_of_2(num_seqs))
    min_tiles = 1 if num_seqs <= 4 else 2  # where many run, splitting one gains less
    attention_kernel[(num_kv_heads, num_seqs, num_splits)](
        qkv,
        attention.q_norm.weight,
        attention.k_norm.weight,
        rotary.cos,
        rotary.sin,
        *kv_cache,
        table,
        seq_lens,
        slots,
        output,
        *scratch,
        attention.head_dim**-0.5 * log2(e),
        attention.q_norm.eps,
        *key_cache.stride()[:3],
        table.stride(0),
        num_splits,
        min_tiles,
        H=num_heads,
        KV=num_kv_heads,
        D=attention.head_dim,
        BLOCK_SIZE=key_cache.shape[1],
        TILE=WIDE_TILE if qkv.dtype == torch.float32 else TILE,
        num_warps=WARPS.value,
        **pdl,
    )
