"""The attention of page 15: norm, rotation, cache and softmax of a decode step in one kernel.

Page 13's decode kernel, changed in three ways. It takes queries and keys as the projection leaves
them. Each warp keeps an online softmax of its own over 16 tokens of a tile, and loads keys and
values so that the tensor cores find in a thread's registers what they expect there: nothing goes
through shared memory on the way. And every warp leaves its share in memory, where the split that
arrives last merges all of them, so that no second kernel is needed, and no warp waits for another
before. For heads of 128 numbers; cache blocks may have any size.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .qwen3 import Attention
from .rope import RotaryEmbedding

__all__ = [
    "AttentionScratch",
    "launch_attention",
    "let_next_start",
    "norm_and_rotate",
    "wait_for_previous",
]

MAX_SPLITS = 32  # of all sequences together


@triton.jit
def norm_and_rotate(
    x, partners, weight, partner_weight, cos, sin, eps, D: tl.constexpr
):
    """The q/k norm of page 04 and the rotation of page 02, of heads `[M, D]`, in float32.

    `partners` and `partner_weight` are what stands half a head away. `cos` and `sin`
    `[1, D]` belong to a position; the first half of `sin` has its minus.
    """
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    turned = x * weight * cos + partners.to(tl.float32) * partner_weight * sin
    return turned * scale


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may start, and wait where it needs what this one writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Until the kernels before this one have ended, and what they wrote can be read."""
    if PDL:
        gdc_wait()


# Whatever differs from step to step is left out of what Triton compiles anew for.
PER_STEP = {
    "do_not_specialize": ["num_splits"],
    "do_not_specialize_on_alignment": ["seq_lens", "slots"],
}
WARPS = tl.constexpr(4)  # of the attention kernel; each looks at 16 tokens of a tile
TILE = tl.constexpr(64)


@triton.jit
def place_keys():
    """Which token of a tile, and from which dim on, each thread loads of the keys."""
    i = tl.arange(0, 16 * TILE)
    tokens = i // 32 % WARPS * 16 + i // (128 * WARPS) * 8 + i // 4 % 8
    return tokens, i // (32 * WARPS) % 4 * 32 + i % 4 * 8


@triton.jit
def place_values():
    """The same for values, of which tokens, not dims, are added up."""
    i = tl.arange(0, 16 * TILE)
    tokens = i // (64 * WARPS) % 2 * 8 + i % 4 * 2 + i // (32 * WARPS) % 2
    return i // 32 % WARPS * 16 + tokens, i // (128 * WARPS) * 64 + i // 4 % 8 * 8


@triton.jit
def find_blocks(table, first, end, BLOCK_SIZE: tl.constexpr):
    """Blocks of the tile that begins at token `first`, for keys and for values."""
    keys, _ = place_keys()
    values, _ = place_values()
    keys, values = keys + first, values + first
    key_blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
    return key_blocks, tl.load(table + values // BLOCK_SIZE, mask=values < end, other=0)


@triton.jit
def load_eights(cache, blocks, tokens, dims, end, strides, BLOCK_SIZE: tl.constexpr):
    """Eight neighbours of a key or value for each thread; zeros from token `end` on."""
    place = blocks.to(tl.int64) * strides[0] + tokens % BLOCK_SIZE * strides[1] + dims
    place = place[:, None] + tl.arange(0, 8)[None, :]
    return tl.load(cache + place, mask=(tokens < end)[:, None], other=0.0)


@triton.jit
def load_tiles(keys, values, blocks, first, end, strides, BLOCK_SIZE: tl.constexpr):
    """Keys and values of the tile that begins at token `first`."""
    tokens, dims = place_keys()
    k = load_eights(keys, blocks[0], tokens + first, dims, end, strides, BLOCK_SIZE)
    tokens, dims = place_values()
    v = load_eights(values, blocks[1], tokens + first, dims, end, strides, BLOCK_SIZE)
    k = tl.permute(
        tl.reshape(k, (2, 4, WARPS, 8, 4, 2, 2, 2)), (2, 1, 5, 6, 4, 7, 0, 3)
    )
    v = tl.permute(tl.reshape(v, (2, 2, 2, WARPS, 8, 4, 8)), (3, 1, 5, 2, 0, 6, 4))
    return tl.reshape(k, (WARPS, 128, 16)), tl.reshape(v, (WARPS, 16, 128))


@triton.jit
def spread(query):
    """`[8, 128]` for every warp, dims in the order of the keys: `[WARPS, 16, 128]`."""
    x = tl.permute(tl.reshape(query, (8, 4, 4, 2, 2, 2)), (0, 1, 3, 4, 2, 5))
    x = tl.reshape(x, (1, 1, 8, 128))
    x = tl.broadcast_to(x, (WARPS, 2, 8, 128))
    return tl.reshape(x, (WARPS, 16, 128))


@triton.jit
def attend_warps(query, tiles, seen, highest, total, output, scale):
    """One more tile for four online softmaxes, one per warp, that know nothing of others.

    `query` comes from `spread`, `tiles` from `load_tiles`; `seen` `[WARPS, 1, 16]` says
    which tokens exist. The rest is as in `attend_tile` of page 13, for each warp.
    """
    key, value = tiles
    scores = tl.dot(query, key, input_precision="ieee") * scale
    scores = tl.where(seen, scores, -1e30)
    new_highest = tl.maximum(highest, tl.max(scores, 2))
    weights = tl.exp2(scores - new_highest[:, :, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 2)
    output = output * shrink[:, :, None]
    output = tl.dot(weights.to(value.dtype), value, output, input_precision="ieee")
    return new_highest, total, output


@triton.jit
def merge(scratch, first, count, GROUP: tl.constexpr, MOST: tl.constexpr):
    """Merges `count` shares from share `first` on, `MOST` at a time: `[GROUP, 128]`."""
    heads, dims = tl.arange(0, GROUP)[None, :], tl.arange(0, 128)[None, None, :]
    highest = tl.full([GROUP], -1e30, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    answer = tl.zeros([GROUP, 128], tl.float32)
    for begin in tl.range(0, count, MOST):
        shares = tl.arange(0, MOST)[:, None] + begin
        exist, place = shares < count, (first + shares) * GROUP + heads
        # Past the multiprocessor's own cache, which may hold what was there before.
        tops = tl.load(scratch[1] + place, exist, other=-1e30, cache_modifier=".cg")
        totals = tl.load(scratch[2] + place, exist, other=0.0, cache_modifier=".cg")
        place = place[:, :, None] * 128 + dims
        parts = tl.load(
            scratch[0] + place, exist[:, :, None], 0.0, cache_modifier=".cg"
        )
        new_highest = tl.maximum(highest, tl.max(tops, 0))
        weights = tl.exp2(tops - new_highest[None, :])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(totals * weights, 0)
        answer = answer * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        highest = new_highest
    return answer / total[:, None]


@triton.jit
def find_partners(D: tl.constexpr):
    """The dims half a head away; the compiler is told that they come in eights."""
    partners = (tl.arange(0, D)[None, :] + D // 2) % D
    return tl.max_contiguous(tl.multiple_of(partners, [1, 8]), [1, 8])


@triton.jit
def load_head_norm(weight, D: tl.constexpr):
    """The weight of a q/k norm, and the same half a head away: `[1, D]` float32 each."""
    dims = tl.arange(0, D)[None, :]
    here, there = tl.load(weight + dims), tl.load(weight + find_partners(D))
    return here.to(tl.float32), there.to(tl.float32)


@triton.jit
def load_heads(heads, norm, cos, sin, eps, D: tl.constexpr):
    """The heads that begin at `heads` `[M, 1]`, normed and rotated: `[M, D]`."""
    dims = tl.arange(0, D)[None, :]
    x, partners = tl.load(heads + dims), tl.load(heads + find_partners(D))
    return norm_and_rotate(x, partners, norm[0], norm[1], cos, sin, eps, D).to(x.dtype)


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
    slots,  # int32 [B, max_blocks], [B], [B]
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
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, rotation, cache and attention: a program per key head, sequence and split.

    Split `i` takes tiles `i`, `i + num_splits` and so on. The first one stores the newest
    token, which every split has in its registers: nobody reads it from the cache.
    """
    let_next_start(PDL)
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H // KV
    step = num_splits * TILE
    old = tl.load(seq_lens + sequence).to(tl.int32) - 1  # tokens that are in the cache
    begin, strides = split * TILE, (block_stride, slot_stride)
    table += sequence * max_blocks
    blocks = find_blocks(table, begin, max_blocks * BLOCK_SIZE, BLOCK_SIZE)
    if (begin >= tl.maximum(old, 1)) | (old < 0):  # nothing to do, or padding
        return
    keys = key_cache + head.to(tl.int64) * head_stride
    values = value_cache + head.to(tl.int64) * head_stride
    tiles = load_tiles(keys, values, blocks, begin, old, strides, BLOCK_SIZE)
    blocks = find_blocks(table, begin + step, old, BLOCK_SIZE)
    # The heads of the group, repeated up to eight: two per warp, so no sum crosses warps.
    heads, dims = tl.arange(0, 8)[:, None], tl.arange(0, D)[None, :]
    eight = 0 * heads  # all are loaded eight times, as the heads will be
    c = tl.load(cos + old * D + dims + eight).to(qkv.dtype.element_ty).to(tl.float32)
    s = tl.load(sin + old * D + dims + eight).to(qkv.dtype.element_ty).to(tl.float32)
    q_norm = load_head_norm(q_weight + eight, D)
    k_norm = load_head_norm(k_weight + eight, D)
    slot = tl.load(slots + sequence)
    newest = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
    wait_for_previous(PDL)
    qkv += sequence * (H + 2 * KV) * D
    query = qkv + (head * GROUP + heads % GROUP) * D
    query = load_heads(query, q_norm, c, s, eps, D)
    own_key = load_heads(qkv + (H + head + eight) * D, k_norm, c, s, eps, D)
    place = tl.arange(0, D)
    order = place // 64 * 64 + place % 8 * 8 + place // 8 % 8  # of dims in `result`
    own_value = tl.load(qkv + (H + KV + head) * D + order)
    if split == 0:
        tl.store(keys + newest + dims + eight, own_key, mask=heads == 0)
        tl.store(values + newest + order, own_value)
    spread_query = spread(query)
    # The first warp of the first split begins with the newest token, the others with none.
    warps, rows = tl.arange(0, WARPS)[:, None], tl.arange(0, 16)[None, :]
    has_newest = (warps + split) == 0
    own = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1) * scale
    own = tl.reshape(tl.broadcast_to(own[None, :], (2, 8)), (1, 16))
    highest = tl.where(has_newest, own, -1e30)
    total = tl.where(has_newest, 1.0, tl.zeros([WARPS, 16], tl.float32))
    result = total[:, :, None] * own_value[None, None, :].to(tl.float32)
    of_warp = warps[:, :, None] * 16 + rows[:, None, :]
    for first in tl.range(begin, old, step):
        now, seen = tiles, of_warp + first < old
        tiles = load_tiles(keys, values, blocks, first + step, old, strides, BLOCK_SIZE)
        blocks = find_blocks(table, first + 2 * step, old, BLOCK_SIZE)
        highest, total, result = attend_warps(
            spread_query, now, seen, highest, total, result, scale
        )
    group = sequence * KV + head
    first_share = group * num_splits * WARPS
    share = (first_share + split * WARPS + warps) * GROUP + rows
    tl.store(tops + share, highest, mask=rows < GROUP)
    tl.store(totals + share, total, mask=rows < GROUP)
    own_part = parts + share[:, :, None] * D + place[None, None, :]
    tl.store(own_part, result, mask=(rows < GROUP)[:, :, None])
    tl.debug_barrier()  # all threads have stored before one of them says so
    num_used = tl.minimum(tl.maximum(tl.cdiv(old, TILE), 1), num_splits)
    if tl.atomic_add(arrivals + group, 1, sem="acq_rel") == num_used - 1:
        scratch = (parts, tops, totals)
        if num_used * WARPS <= 16:
            answer = merge(scratch, first_share, num_used * WARPS, GROUP, 16)
        else:
            answer = merge(scratch, first_share, num_used * WARPS, GROUP, 64)
        of_group = tl.arange(0, GROUP)[:, None]
        where = output + (sequence * H + head * GROUP + of_group) * D + order[None, :]
        tl.store(where, answer.to(output.dtype.element_ty))
        tl.store(arrivals + group, 0)


class AttentionScratch(NamedTuple):
    """What the splits of an attention leave for each other; zeros at first.

    Each warp of a split has a share. `parts` float32 `[shares * H, 128]` holds values, weighted
    and added up, `tops` and `totals` float32 `[shares * H]` the highest score and the sum of the
    weights, and `arrivals` int32 `[B * H_kv]` counts; it is zeros between steps.
    """

    parts: Tensor
    tops: Tensor
    totals: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(
        cls, num_seqs: int, num_heads: int, num_kv_heads: int, device: torch.device
    ) -> AttentionScratch:
        """For at most that many sequences, and `MAX_SPLITS` splits of all together."""
        shares = max(num_seqs, MAX_SPLITS) * WARPS.value
        parts = torch.zeros(shares * num_heads, 128, device=device)
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
    num_splits = MAX_SPLITS // triton.next_power_of_2(num_seqs)
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
        H=num_heads,
        KV=num_kv_heads,
        D=attention.head_dim,
        BLOCK_SIZE=key_cache.shape[1],
        num_warps=4,
        **pdl,
    )
