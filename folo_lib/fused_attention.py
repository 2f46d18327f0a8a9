"""The attention of page 15: norm, rotation, cache and softmax of a decode step in one kernel.

Page 13's decode kernel, changed in three ways. It takes queries and keys as the projection leaves
them. Each warp keeps an online softmax of its own over 16 tokens of a tile, and loads keys and
values so that the tensor cores find in a thread's registers what they expect there: nothing goes
through shared memory on the way. And the split that arrives last merges, so that no second kernel
is needed. For heads of 128 numbers; cache blocks may have any size.
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
    "do_not_specialize": ["num_splits", "num_seqs"],
    "do_not_specialize_on_alignment": ["rows", "seq_lens", "slots", "input_ids"],
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
    return k, v


@triton.jit
def spread(query, GROUP: tl.constexpr):
    """`[GROUP, 128]` for every warp, dims in the order of the keys: `[WARPS, 16, 128]`."""
    x = tl.permute(tl.reshape(query, (GROUP, 4, 4, 2, 2, 2)), (0, 1, 3, 4, 2, 5))
    x = tl.reshape(x, (1, 1, GROUP, 128))
    x = tl.broadcast_to(x, (WARPS, 16 // GROUP, GROUP, 128))
    return tl.reshape(x, (WARPS, 16, 128))


@triton.jit
def attend_warps(query, tiles, seen, highest, total, output, scale):
    """One more tile for four online softmaxes, one per warp, that know nothing of others.

    `query` comes from `spread`, `tiles` from `load_tiles`; `seen` `[WARPS, 1, 16]` says
    which tokens exist. The rest is as in `attend_tile` of page 13, for each warp.
    """
    key = tl.reshape(tiles[0], (2, 4, WARPS, 8, 4, 2, 2, 2))
    key = tl.reshape(tl.permute(key, (2, 1, 5, 6, 4, 7, 0, 3)), (WARPS, 128, 16))
    value = tl.reshape(tiles[1], (2, 2, 2, WARPS, 8, 4, 8))
    value = tl.reshape(tl.permute(value, (3, 1, 5, 2, 0, 6, 4)), (WARPS, 16, 128))
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
def merge_warps(highest, total, output, own, own_value, GROUP: tl.constexpr):
    """Merges the softmaxes of all warps and the newest token.

    `own` `[GROUP]` holds the newest token's scores, -1e30 where it has no say, and
    `own_value` `[1, 128]` its value. Returns the answers `[GROUP, 128]`, and log2 of the
    weight behind each.
    """
    highest = tl.max(tl.reshape(highest, (WARPS, 16 // GROUP, GROUP)), 1)
    total = tl.max(tl.reshape(total, (WARPS, 16 // GROUP, GROUP)), 1)
    output = tl.max(tl.reshape(output, (WARPS, 16 // GROUP, GROUP, 128)), 1)
    best = tl.maximum(tl.max(highest, 0), own)
    weights, own = tl.exp2(highest - best[None, :]), tl.exp2(own - best)
    total = tl.sum(total * weights, 0) + own
    output = tl.sum(output * weights[:, :, None], 0)
    output = tl.permute(tl.reshape(output, (GROUP, 2, 8, 8)), (0, 1, 3, 2))
    output = tl.reshape(output, (GROUP, 128))  # dims in their own order again
    output = (output + own[:, None] * own_value.to(tl.float32)) / total[:, None]
    return output, best + tl.log2(total)


@triton.jit
def merge_splits(
    answer,
    log,
    parts,
    part_logs,
    arrivals,
    group,
    split,
    num_splits,
    num_used,
    GROUP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Leaves the answer of a split, and merges all answers if it is the last to arrive.

    `parts` and `part_logs` are float32 `[groups, num_splits, GROUP, 128]` and
    `[groups, num_splits, GROUP]`, and `arrivals` int32 `[groups]`, zeros before and
    after. Returns answers `[GROUP, 128]`, and whether they are merged.
    """
    heads, dims = tl.arange(0, GROUP), tl.arange(0, 128)
    own = (group * num_splits + split) * GROUP + heads
    tl.store(parts + own[:, None] * 128 + dims[None, :], answer)
    tl.store(part_logs + own, log)
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(arrivals + group, 1, sem="acq_rel") == num_used - 1
    if is_last:
        splits = tl.arange(0, MAX_SPLITS)[:, None]
        every = (group * num_splits + splits) * GROUP + heads[None, :]
        used = splits < num_used
        # Past the multiprocessor's own cache, which may hold what was there before.
        logs = tl.load(part_logs + every, used, other=-1e30, cache_modifier=".cg")
        place = parts + every[:, :, None] * 128 + dims[None, None, :]
        answers = tl.load(place, used[:, :, None], other=0.0, cache_modifier=".cg")
        shares = tl.exp2(logs - tl.max(logs, 0)[None, :])
        shares = shares / tl.sum(shares, 0)[None, :]
        answer = tl.sum(answers * shares[:, :, None], 0)
        tl.store(arrivals + group, 0)
    return answer, is_last


@triton.jit
def load_head_norm(weight, D: tl.constexpr):
    """The weight of a q/k norm, and the same half a head away: `[1, D]` float32 each."""
    dims = tl.arange(0, D)[None, :]
    here, there = tl.load(weight + dims), tl.load(weight + (dims + D // 2) % D)
    return here.to(tl.float32), there.to(tl.float32)


@triton.jit
def load_heads(heads, norm, cos, sin, eps, D: tl.constexpr):
    """The heads that begin at `heads` `[M, 1]`, normed and rotated: `[M, D]`."""
    dims = tl.arange(0, D)[None, :]
    x, partners = tl.load(heads + dims), tl.load(heads + (dims + D // 2) % D)
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
    part_logs,
    arrivals,  # see merge_splits
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
    MAX_SPLITS: tl.constexpr,
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
    heads, dims = tl.arange(0, GROUP)[:, None], tl.arange(0, D)[None, :]
    c = tl.load(cos + old * D + dims).to(qkv.dtype.element_ty).to(tl.float32)
    s = tl.load(sin + old * D + dims).to(qkv.dtype.element_ty).to(tl.float32)
    q_norm, k_norm = load_head_norm(q_weight, D), load_head_norm(k_weight, D)
    slot = tl.load(slots + sequence)
    newest = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride + dims
    wait_for_previous(PDL)
    qkv += sequence * (H + 2 * KV) * D
    query = load_heads(qkv + (head * GROUP + heads) * D, q_norm, c, s, eps, D)
    own_key = load_heads(qkv + (H + head) * D, k_norm, c, s, eps, D)
    own_value = tl.load(qkv + (H + KV + head) * D + dims)
    if split == 0:
        tl.store(keys + newest, own_key)
        tl.store(values + newest, own_value)
    spread_query = spread(query, GROUP)
    highest = tl.full([WARPS, 16], -1e30, tl.float32)
    total = tl.zeros([WARPS, 16], tl.float32)
    result = tl.zeros([WARPS, 16, D], tl.float32)
    of_warp = tl.arange(0, WARPS)[:, None, None] * 16 + tl.arange(0, 16)[None, None, :]
    for first in tl.range(begin, old, step):
        now, seen = tiles, of_warp + first < old
        tiles = load_tiles(keys, values, blocks, first + step, old, strides, BLOCK_SIZE)
        blocks = find_blocks(table, first + 2 * step, old, BLOCK_SIZE)
        highest, total, result = attend_warps(
            spread_query, now, seen, highest, total, result, scale
        )
    own = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1) * scale
    own = tl.where(split == 0, own, -1e30)
    answer, log = merge_warps(highest, total, result, own, own_value, GROUP)
    is_last = old <= TILE  # there is one split only
    if not is_last:
        num_used = tl.minimum(tl.cdiv(old, TILE), num_splits)
        answer, is_last = merge_splits(
            answer,
            log,
            parts,
            part_logs,
            arrivals,
            sequence * KV + head,
            split,
            num_splits,
            num_used,
            GROUP,
            MAX_SPLITS,
        )
    if is_last:
        place = output + (sequence * H + head * GROUP + heads) * D + dims
        tl.store(place, answer.to(output.dtype.element_ty))


class AttentionScratch(NamedTuple):
    """What the splits of an attention leave for each other; zeros at first.

    Attributes:
        parts, part_logs, arrivals: see `merge_splits`.
    """

    parts: Tensor
    part_logs: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(
        cls, num_seqs: int, num_heads: int, num_kv_heads: int, device: torch.device
    ) -> AttentionScratch:
        """For at most that many sequences, and `MAX_SPLITS` splits of all together."""
        parts = torch.zeros(max(num_seqs, MAX_SPLITS) * num_heads, 128, device=device)
        arrivals = torch.zeros(
            num_seqs * num_kv_heads, dtype=torch.int32, device=device
        )
        return cls(parts, parts.new_zeros(len(parts)), arrivals)


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
        MAX_SPLITS=MAX_SPLITS,
        num_warps=4,
        **pdl,
    )
