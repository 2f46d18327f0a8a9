"""Draws in Triton: greedy, temperature, min_p, top_k and top_p, without a sort and without a wait.

A row of 151,936 logits is searched for a threshold in two strides: a launch over slices of all rows
adds up what lies in each of 2048 bins, and one program per row then searches the few tokens of the
bin that has the threshold. One program alone would read the row 31 times or more, at about 3 us
each, and a launch for every four bits of a threshold would be 8 launches for top_k and 8 for top_p.

Distances, weights, sums and ties are those of page 07. What rounds otherwise in the last bits are
`tl.exp`, and the noise, by 1e-6 at most: computed so in PyTorch, with vocabularies of 151,936, it
drew the same token in all of 3,480 rows. Sums are of integers: no order of addition shows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_rows import FLOATS, INTS
from .tile_sizes import count_multiprocessors

__all__ = ["TritonDraw"]

TILE = tl.constexpr(1024)  # logits that a program takes at once
MAX_SLICES = tl.constexpr(256)
NUM_BINS = tl.constexpr(2048)
BINS_PER_UNIT = tl.constexpr(64.0)  # of the logits
MAX_LISTED = tl.constexpr(4096)  # tokens in a row's list; if there are more, it is left
INFINITY, LARGEST = tl.constexpr(float("inf")), tl.constexpr(3.4028234e38)

NUM_FLOATS, NUM_INTS = tl.constexpr(len(FLOATS)), tl.constexpr(len(INTS))
TEMPERATURE = tl.constexpr(FLOATS.index("temperature"))
MIN_P, TOP_P = tl.constexpr(FLOATS.index("min_p")), tl.constexpr(FLOATS.index("top_p"))
SEED, TOP_K = tl.constexpr(INTS.index("seeds")), tl.constexpr(INTS.index("top_k"))
SAMPLE_INDEX = tl.constexpr(INTS.index("sample_indices"))


class Step(NamedTuple):
    """What is drawn from, and where to; see `TritonDraw`."""

    logits: Tensor
    stride: int  # from row to row
    vocab_size: int
    first_id: (
        int  # what its first logit is of; 0, or of a shard that of its first token
    )
    rank: int
    num_ranks: int  # whose slices take turns
    positions: Tensor
    rows: Tensor
    floats: Tensor
    ints: Tensor
    token_ids: Tensor
    last_token_ids: Tensor


class Scratch(NamedTuple):
    """What one launch leaves for the next ones."""

    maxima: Tensor  # [B, MAX_SLICES] float32, the largest logit of each slice
    floors: Tensor  # the same, logits that `top_k` of the slice reach
    scores: Tensor  # the same, the highest of what is kept for sure
    ids: Tensor  # the same, whose they are
    tallies: Tensor  # [B, NUM_BINS] int64
    cuts: Tensor  # [B, 2] int64, the first bin that is listed, and what the list has to hold
    counts: Tensor  # [B] int32
    listed: Tensor  # [B, MAX_LISTED] int64, keys of the tokens at the threshold


@triton.jit
def read_wishes(step, row):
    """A row's temperature, 0.01 at least, and its filters; all are off where it is 0.

    Returns also whether it is above 0, the largest distance that min_p leaves (any that is
    finite: off), top_k (0: off) and `1 - top_p` (0: off).
    """
    own = tl.load(step.rows + row)
    floats, ints = step.floats + own * NUM_FLOATS, step.ints + own * NUM_INTS
    temperature = tl.load(floats + TEMPERATURE).to(tl.float32)
    is_random = temperature > 0
    min_p = tl.load(floats + MIN_P).to(tl.float32)
    limit = 1e-6 - tl.log(tl.maximum(min_p, 2.0**-126))
    limit = tl.where(is_random & (min_p > 0), limit, LARGEST)
    top_k = tl.load(ints + TOP_K)
    top_k = tl.where(is_random & (top_k > 0) & (top_k < step.vocab_size), top_k, 0)
    spare = (1 - tl.load(floats + TOP_P)).to(tl.float32)  # of float64
    spare = tl.where(is_random & (spare > 0), spare, 0.0)
    return tl.maximum(temperature, 0.01), is_random, limit, top_k, spare


@triton.jit
def read_largest(parts, row, num_slices):
    """The largest number that a row's slices have left."""
    slices = tl.arange(0, MAX_SLICES)
    places = parts + row * MAX_SLICES + slices
    return tl.max(tl.load(places, mask=slices < num_slices, other=-INFINITY), 0)


@triton.jit
def read_logits(step, row, ids):
    """Logits of a row, as float32."""
    places = step.logits + row * step.stride + ids
    found = tl.load(places, mask=ids < step.vocab_size, other=-INFINITY)
    return found.to(tl.float32)


@triton.jit
def measure(step, row, ids, best, temperature):
    """How far behind the best: 0 and more, with the bins.

    Bins are as wide as they are in logits, whatever the temperature. Equals share one.
    """
    distances = tl.div_rn(best - read_logits(step, row, ids), temperature)
    bins = distances * (temperature * BINS_PER_UNIT)
    return distances, tl.minimum(bins, NUM_BINS - 1.0).to(tl.int32)


@triton.jit
def weigh(distances, ID_BITS: tl.constexpr):
    """`integer_weights` of page 07."""
    exact = tl.exp(-distances) * (2.0 ** (62 - ID_BITS))
    # 2**23 leaves no room for a fraction: a sum is rounded to even, as `torch.round` does.
    return tl.where(exact < 2.0**23, exact + 2.0**23 - 2.0**23, exact).to(tl.int64)


@triton.jit
def find_needed(total, spare):
    """`needed_mass` of page 07."""
    slack = tl.minimum(spare * 1e-5, 1e-6)
    return tl.maximum(total - (total.to(tl.float32) * (spare + slack)).to(tl.int64), 1)


@triton.jit
def mix_bits(x):
    """`mix_bits` of page 07: int64 that wrap around."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


@triton.jit
def start_noise(step, row):
    """The state of a row's noise."""
    ints = step.ints + tl.load(step.rows + row) * NUM_INTS
    state = tl.load(ints + SEED) * (0xD1342543DE82EF95 - 2**64)
    state += tl.load(ints + SAMPLE_INDEX) * (0xAEF17502108EF2D9 - 2**64)
    return mix_bits(
        state + tl.load(step.positions + row) * (0xF1357AEA2E62A9C5 - 2**64)
    )


@triton.jit
def make_uniform(state, ids):
    """The numbers between 0 and 1 that page 07 makes noise of."""
    bits = mix_bits(state + (ids.to(tl.int64) + 1) * (0x9E3779B97F4A7C15 - 2**64))
    v = (bits & (2**63 - 1)).to(tl.float32) * 2.0**-63
    return tl.minimum(tl.maximum(v, 2.0**-63), 1 - 2.0**-24)


@triton.jit
def make_noise(v):
    """`gumbel_noise` of page 07: `-log(-log1p(-v))`, at most `-log(v)`.

    `1 - v` is rounded, which would falsify the logarithm of a small `v`; the quotient of
    `v` and of what was subtracted in truth makes up for it.
    """
    rest = 1 - v
    behind = -tl.log(rest) * (v / tl.maximum(1 - rest, 2.0**-24))
    return -tl.log(tl.where(rest == 1, v, behind))


@triton.jit
def find_first_best(scores, ids):
    """The highest score, and the lowest id of those that have it."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, ids, 2**31 - 1), 0)


@triton.jit(do_not_specialize=["num_slices"])
def max_kernel(step, scratch, num_slices, FILTERS: tl.constexpr):
    """The largest logit of each slice, inf if there is a NaN; empties tallies and lists."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.full([TILE], -INFINITY, tl.float32)
    for first in tl.range(part * TILE, step.vocab_size, num_slices * TILE):
        found = read_logits(step, row, first + tl.arange(0, TILE))
        lanes = tl.maximum(lanes, tl.where(found == found, found, INFINITY))
    largest = tl.max(lanes, 0)
    place = row * MAX_SLICES + part * step.num_ranks + step.rank
    tl.store(scratch.maxima + place, largest)
    if FILTERS:
        if part == 0:
            bins = row * NUM_BINS + tl.arange(0, NUM_BINS)
            tl.store(scratch.tallies + bins, tl.zeros([NUM_BINS], tl.int64))
            tl.store(scratch.counts + row, 0)
        _, _, _, top_k, _ = read_wishes(step, row)
        # A logit that top_k lanes reach, sought as far down as bins go: nothing below is kept.
        floor = largest - NUM_BINS / BINS_PER_UNIT
        if top_k > 0:
            high = largest
            for _half in tl.range(12):
                middle = (floor + high) / 2
                is_enough = tl.sum((lanes >= middle).to(tl.int32), 0) >= top_k
                floor = tl.where(is_enough, middle, floor)
                high = tl.where(is_enough, high, middle)
        is_enough = tl.sum((lanes >= floor).to(tl.int32), 0) >= top_k
        floor = tl.where((top_k > 0) & is_enough, floor, -INFINITY)
        tl.store(scratch.floors + place, floor)


@triton.jit(do_not_specialize=["num_slices"])
def tally_kernel(step, scratch, num_slices, ID_BITS: tl.constexpr):
    """Adds to each bin its tokens, for top_k, or else their weights, for top_p."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, _, limit, top_k, spare = read_wishes(step, row)
    best = read_largest(scratch.maxima, row, num_slices)
    if (tl.abs(best) == INFINITY) | ((top_k == 0) & (spare == 0)):
        return
    floor = read_largest(scratch.floors, row, num_slices)
    limit = tl.minimum(limit, tl.div_rn(best - floor, temperature))
    tallies = scratch.tallies + row * NUM_BINS
    for first in tl.range(part * TILE, step.vocab_size, num_slices * TILE):
        ids = first + tl.arange(0, TILE)
        distances, bins = measure(step, row, ids, best, temperature)
        weights = tl.where(top_k > 0, 1, weigh(distances, ID_BITS))
        counts = (distances <= limit) & (weights != 0)
        tl.atomic_add(tallies + bins, weights, mask=counts, sem="relaxed")


@triton.jit
def find_bins(step, scratch, row):
    """In which bin a row's threshold lies, and what that has to hold up to there.

    Tokens in bins before the first are kept for sure, those up to the last are listed. With
    top_k that is everything, since a nucleus is a part of it.
    """
    _, _, _, top_k, spare = read_wishes(step, row)
    first, last = tl.full([], NUM_BINS, tl.int32), tl.full([], NUM_BINS, tl.int32)
    target = tl.zeros([], tl.int64)
    if (top_k > 0) | (spare > 0):
        tallies = tl.load(scratch.tallies + row * NUM_BINS + tl.arange(0, NUM_BINS))
        target = tl.where(top_k > 0, top_k, find_needed(tl.sum(tallies, 0), spare))
        is_before = tl.cumsum(tallies, 0) < target
        last = tl.sum(is_before.to(tl.int32), 0)
        first = tl.where(top_k > 0, 0, last)
        target -= tl.where(top_k > 0, 0, tl.sum(tl.where(is_before, tallies, 0), 0))
    return first, last, target


@triton.jit(do_not_specialize=["num_slices", "num_maxima"])
def score_kernel(
    step, scratch, num_slices, num_maxima, ID_BITS: tl.constexpr, FILTERS: tl.constexpr
):
    """The best token of each slice that is kept for sure; lists those at the threshold."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, is_random, limit, _, _ = read_wishes(step, row)
    best = read_largest(scratch.maxima, row, num_maxima)
    if tl.abs(best) == INFINITY:
        return
    if FILTERS:
        first_bin, last_bin, target = find_bins(step, scratch, row)
        if part == 0:
            tl.store(scratch.cuts + row * 2, first_bin.to(tl.int64))
            tl.store(scratch.cuts + row * 2 + 1, target)
    state = start_noise(step, row)
    scores = tl.full([TILE], -INFINITY, tl.float32)
    found = tl.zeros([TILE], tl.int32)
    highest = tl.max(scores, 0)
    for first in tl.range(part * TILE, step.vocab_size, num_slices * TILE):
        ids = first + tl.arange(0, TILE)
        distances, bins = measure(step, row, ids, best, temperature)
        is_kept = distances <= limit
        if FILTERS:
            is_near = is_kept & (bins >= first_bin) & (bins <= last_bin)
            is_kept = is_kept & (bins < first_bin)
            number = tl.sum(is_near.to(tl.int32), 0)
            if number > 0:
                places = tl.atomic_add(scratch.counts + row, number, sem="relaxed")
                places += tl.cumsum(is_near.to(tl.int32), 0) - 1
                is_near = is_near & (places < MAX_LISTED)
                keys = make_keys(distances, ids, ID_BITS)
                tl.store(scratch.listed + row * MAX_LISTED + places, keys, mask=is_near)
        if is_random:
            # Logarithms are dear, and few tiles have noise that can still win.
            v = make_uniform(state, step.first_id + ids)
            may_win = is_kept & (v <= 1.001 * tl.exp(-(highest + distances)))
            if tl.max(may_win.to(tl.int32), 0) > 0:
                own = tl.where(is_kept, make_noise(v) - distances, -INFINITY)
                is_better = own > scores  # of equals the first stays
                scores = tl.where(is_better, own, scores)
                found = tl.where(is_better, ids, found)
                highest = tl.max(scores, 0)
        elif tl.max((is_kept & (distances == 0)).to(tl.int32), 0) > 0:
            is_better = is_kept & (-distances > scores)
            scores = tl.where(is_better, -distances, scores)
            found = tl.where(is_better, ids, found)
    score, token = find_first_best(scores, found)
    place = row * MAX_SLICES + part * step.num_ranks + step.rank
    tl.store(scratch.scores + place, score)
    tl.store(scratch.ids + place, (step.first_id + token).to(tl.float32))


@triton.jit
def make_keys(distances, ids, ID_BITS: tl.constexpr):
    """Distance and id in one number: of equally likely tokens the lower ids come first.

    Distances are not negative, so that their bits are in the order of their values.
    """
    return (distances.to(tl.int32, bitcast=True).to(tl.int64) << ID_BITS) | ids


@triton.jit
def read_keys(near, first, ID_BITS: tl.constexpr):
    """A tile of a row's list, or of the row itself if the list was too short for it.

    What is not in the list is infinitely far behind.
    """
    step, scratch, row, best, temperature, limit, first_bin, size = near
    ids = first + tl.arange(0, TILE)
    none = tl.full([TILE], 0x7F800000, tl.int64) << ID_BITS
    if size <= MAX_LISTED:
        places = scratch.listed + row * MAX_LISTED + ids
        keys = tl.load(places, mask=ids < size, other=none)
    else:
        distances, bins = measure(step, row, ids, best, temperature)
        is_near = (distances <= limit) & (bins >= first_bin)
        keys = tl.where(is_near, make_keys(distances, ids, ID_BITS), none)
    distances = (keys >> ID_BITS).to(tl.int32).to(tl.float32, bitcast=True)
    return keys, distances, (keys & ((1 << ID_BITS) - 1)).to(tl.int32)


@triton.jit
def add_up(near, size, cut, IS_MASS: tl.constexpr, ID_BITS: tl.constexpr):
    """How many keys in the list are at most `cut`, or what their tokens weigh."""
    total = tl.zeros([TILE], tl.int64)
    for first in tl.range(0, size, TILE):
        keys, distances, _ = read_keys(near, first, ID_BITS)
        if IS_MASS:
            total += tl.where(keys <= cut, weigh(distances, ID_BITS), 0)
        else:
            total += (keys <= cut).to(tl.int64)
    return tl.sum(total, 0)


@triton.jit
def find_cut(near, size, target, highest, IS_MASS: tl.constexpr, ID_BITS: tl.constexpr):
    """The lowest key up to which `target` is reached; `highest` if it never is.

    Of a count it is the highest key at that distance: top_k keeps equals.
    """
    shift: tl.constexpr = 0 if IS_MASS else ID_BITS
    low, high = tl.zeros([], tl.int64), highest >> shift
    while low < high:
        middle = (low + high) >> 1
        cut = ((middle + 1) << shift) - 1
        is_less = add_up(near, size, cut, IS_MASS, ID_BITS) < target
        low = tl.where(is_less, middle + 1, low)
        high = tl.where(is_less, high, middle)
    return ((low + 1) << shift) - 1


@triton.jit(do_not_specialize=["num_slices"])
def finish_kernel(
    step, scratch, num_slices, ID_BITS: tl.constexpr, FILTERS: tl.constexpr
):
    """One program per row finds the threshold among what is listed, and the best token."""
    row, slices = tl.program_id(0).to(tl.int64), tl.arange(0, MAX_SLICES)
    best = read_largest(scratch.maxima, row, num_slices)
    parts = row * MAX_SLICES + slices
    tops = tl.load(scratch.scores + parts, mask=slices < num_slices, other=-INFINITY)
    top, token = find_first_best(tops, tl.load(scratch.ids + parts).to(tl.int32))
    if FILTERS:
        temperature, _, limit, top_k, spare = read_wishes(step, row)
        if (tl.abs(best) < INFINITY) & ((top_k > 0) | (spare > 0)):
            first_bin = tl.load(scratch.cuts + row * 2)
            target = tl.load(scratch.cuts + row * 2 + 1)
            size = tl.load(scratch.counts + row)
            size = tl.where(size <= MAX_LISTED, size, step.vocab_size)
            near = (step, scratch, row, best, temperature, limit, first_bin, size)
            cut = (tl.full([], 0x7F800001, tl.int64) << ID_BITS) - 1  # all
            if top_k > 0:
                cut = find_cut(near, size, target, cut, False, ID_BITS)
                target = find_needed(add_up(near, size, cut, True, ID_BITS), spare)
            if spare > 0:
                cut = find_cut(near, size, target, cut, True, ID_BITS)
            state = start_noise(step, row)
            for first in tl.range(0, size, TILE):
                keys, distances, ids = read_keys(near, first, ID_BITS)
                scores = make_noise(make_uniform(state, ids)) - distances
                scores = tl.where(keys <= cut, scores, -INFINITY)
                score, found = find_first_best(scores, ids)
                is_better = (score > top) | ((score == top) & (found < token))
                token = tl.where(is_better, found, token)
                top = tl.maximum(score, top)
    token = tl.where(tl.abs(best) < INFINITY, token, -1).to(tl.int64)
    tl.store(step.token_ids + row, token)
    tl.store(step.last_token_ids + tl.load(step.rows + row), tl.maximum(token, 0))


class TritonDraw:
    """Draws for the rows of a step, in launches that a CUDA graph can record.

    One serves all graphs that follow one another: each call writes what it reads afresh.

    Args:
        num_seqs: the most rows of a call.
        vocab_size: `V`.
        device: of all tensors.

    Attributes:
        num_tokens: of a row's logits, that belong to a token; of a shard perhaps not all do.
        first_id: whose the first logit is.
        rank, num_ranks: whose logits these are, of how many; see `ShardedDraw`.
    """

    first_id = 0
    rank = 0
    num_ranks = 1

    def __init__(
        self, num_seqs: int, vocab_size: int, device: torch.device | str
    ) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.num_tokens = vocab_size
        widths = [MAX_SLICES.value] * 4 + [NUM_BINS.value, 2, 1, MAX_LISTED.value]
        floats, int32, int64 = [torch.float32] * 3, torch.int32, torch.int64
        dtypes = [*floats, torch.float32, int64, int64, int32, int64]
        columns = zip(widths, dtypes, strict=True)
        reserve = partial(torch.empty, device=device)
        self.scratch = Scratch(*(reserve(num_seqs, n, dtype=d) for n, d in columns))

    def __call__(
        self,
        logits: Tensor,
        positions: Tensor,
        rows: Tensor,
        floats: Tensor,
        ints: Tensor,
        token_ids: Tensor,
        last_token_ids: Tensor,
        filters: bool,
    ) -> None:
        """Draws a token for each row, as `Sampler.sample` does.

        Args:
            logits: `[B, V]`, float32, bfloat16 or float16, each row contiguous.
            positions: `[B]` int64, that the drawn tokens will take.
            rows: `[B]` int64, of `SamplingRows`.
            floats, ints: of `SamplingRows`, `[R, 6]` float64 and `[R, 4]` int64.
            token_ids: `[B]` int64, written; -1 where the best logit is not finite, or one
                is NaN.
            last_token_ids: `[R]` int64, written at `rows`, 0 in place of -1.
            filters: whether a row may wish top_k or top_p, which are off otherwise. A
                temperature and min_p need no more launches.
        """
        num_rows, id_bits = len(logits), self.vocab_size.bit_length()
        num_slices = self.choose_num_slices(num_rows)
        shard = self.num_tokens, self.first_id, self.rank, self.num_ranks
        written = token_ids, last_token_ids
        tables = positions, rows, floats, ints
        step = Step(logits, logits.stride(0), *shard, *tables, *written)
        scratch = Scratch(*(part[:num_rows] for part in self.scratch))
        grid, total = (num_rows, num_slices), num_slices * self.num_ranks
        max_kernel[grid](step, scratch, num_slices, filters)
        scratch = scratch._replace(maxima=self.share(scratch.maxima))
        if filters:
            tally_kernel[grid](step, scratch, num_slices, id_bits)
        score_kernel[grid](step, scratch, num_slices, total, id_bits, filters)
        found = {name: self.share(getattr(scratch, name)) for name in ("scores", "ids")}
        finish_kernel[num_rows,](
            step, scratch._replace(**found), total, id_bits, filters
        )

    def share(self, found: Tensor) -> Tensor:
        """What all ranks have found in their slices."""
        return found

    def choose_num_slices(self, num_rows: int) -> int:
        """Programs per row: eight for each multiprocessor in all, if there are tiles enough."""
        wanted = triton.cdiv(8 * count_multiprocessors(self.device), num_rows)
        num_tiles = triton.cdiv(self.vocab_size, TILE.value)
        return int(min(num_tiles, wanted, MAX_SLICES.value // self.num_ranks))
