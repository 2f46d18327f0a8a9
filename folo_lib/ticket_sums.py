"""Sums over GPUs without a barrier: a number that has come says so itself.

A sum over ranks has two parts, sending numbers and knowing when those of the others have come. A
barrier answers the second with messages of its own, which travel after the numbers. Here who waits
looks at the places where the numbers will be, in one of two ways:

- In the fused step of `fused_shards.py` a kernel sends what it has computed, and a later one adds
  up. A number and the ticket of its sum are one word of 64 bits, written in one piece, so the
  number is there as soon as its ticket is. Tickets come from the memory of the GPU, where a
  recorded graph counts on.
- Where one kernel sends and adds up (`exchange`), it makes the places empty again as soon as it has
  read them. So a number needs no ticket, and half as many bytes travel: it is there as soon as its
  place is not empty.

In both, two buffers take turns. A rank that sends for the sum after the next one has seen what the
others sent for the next one, and they sent that after they had read this one, and made it empty.
So it writes over what everybody has read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .early_start import let_next_start, wait_for_previous

__all__ = ["add_norm_kernel", "exchange_kernel", "send", "send_kernel", "sum_kernel"]


@triton.jit
def send(numbers, place, exist, addresses, offset, tickets, index, RANKS: tl.constexpr):
    """Writes float32 numbers, each with the ticket of a sum, where all ranks look for them."""
    ticket = ((tl.load(tickets) + index) & 0x7FFFFFFF).to(tl.int64)
    words = (numbers.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ticket
    for rank in tl.static_range(RANKS):
        theirs = tl.load(addresses + rank).to(tl.pointer_type(tl.int64), bitcast=True)
        tl.store(theirs + offset + place, words, mask=exist)


@triton.jit(do_not_specialize=["offset", "index", "num_numbers"])
def send_kernel(
    x,
    addresses,
    offset,
    tickets,
    index,
    num_numbers,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sends what is in `x`, 1,024 numbers a program."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exist = place < num_numbers
    numbers = tl.load(x + place, mask=exist, other=0.0)
    send(numbers, place, exist, addresses, offset, tickets, index, RANKS)


@triton.jit(do_not_specialize=["index", "num_numbers"])
def sum_kernel(
    words,
    x,
    tickets,
    index,
    num_numbers,
    size,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Waits for the numbers of all ranks, and writes their sum into `x`."""
    let_next_start(PDL)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exist = place < num_numbers
    ticket = (tl.load(tickets) + index) & 0x7FFFFFFF
    total = tl.zeros([BLOCK], tl.float32)
    missing = 1
    while missing > 0:
        total = tl.zeros([BLOCK], tl.float32)
        wrong = tl.zeros([BLOCK], tl.int32)
        for rank in tl.static_range(RANKS):
            word = tl.load(words + rank * size + place, mask=exist, volatile=True)
            wrong |= word.to(tl.int32) ^ ticket
            total += (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        missing = tl.max((exist & (wrong != 0)).to(tl.int32), 0)
    tl.store(x + place, total, mask=exist)
    wait_for_previous(PDL)


EMPTY = tl.constexpr(0x80008000 - 2**32)
"""What is in a place where no numbers have come: two zeros of bfloat16 with the sign of -1.

Who has such numbers to send sends zeros without a sign. As a float32 it is -4.6e-41.
"""


@triton.jit
def as_pair(bits, FLOAT: tl.constexpr):
    """The float32 of 32 bits and a zero, or the two bfloat16 in them."""
    first = (bits if FLOAT else bits << 16).to(tl.float32, bitcast=True)
    second = (bits & (0 if FLOAT else -65536)).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def as_bits(first, second, FLOAT: tl.constexpr):
    """The 32 bits of a float32, or of two numbers rounded to bfloat16."""
    if FLOAT:
        bits = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = second.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        bits = low | (high << 16)
    return bits


@triton.jit
def exchange(
    bits,
    place,
    exist,
    words,  # int32 [2, RANKS, size]
    addresses,  # int64 [RANKS]
    half,
    size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """The sums over ranks of the numbers in `bits` `[BLOCK]`, as `as_pair` has them."""
    bits = tl.where(bits == EMPTY, 0, bits)
    half = half * RANKS * size
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = tl.load(addresses + rank).to(
                tl.pointer_type(tl.int32), bitcast=True
            )
            theirs = tl.multiple_of(theirs, 16)  # so four words are written at once
            tl.store(theirs + half + RANK * size + place, bits, mask=exist)
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    missing = 1
    while missing > 0:
        first = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        is_empty = tl.zeros([BLOCK], tl.int1)
        for rank in tl.static_range(RANKS):
            part = bits
            if rank != RANK:
                come = words + half + rank * size + place
                part = tl.load(come, mask=exist, other=0, volatile=True)
                is_empty |= part == EMPTY
            more, beside = as_pair(part, FLOAT)
            first += more
            second += beside
        missing = tl.max(is_empty.to(tl.int32), 0)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            come = words + half + rank * size + place
            tl.store(come, tl.full([BLOCK], EMPTY, tl.int32), mask=exist)
    return first, second


@triton.jit
def exchange_kernel(
    x,  # int32 [num_words]
    out,
    words,
    addresses,  # see exchange
    turns,  # int32, one for each program
    num_words,
    size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """`out` is the sum over ranks of `x`, of float32 or of pairs of bfloat16."""
    program = tl.program_id(0)
    place = program * BLOCK + tl.arange(0, BLOCK)
    exist = place < num_words
    half = tl.load(turns + program)
    bits = tl.load(x + place, mask=exist, other=0)
    first, second = exchange(
        bits, place, exist, words, addresses, half, size, RANK, RANKS, BLOCK, FLOAT
    )
    tl.store(out + place, as_bits(first, second, FLOAT), mask=exist)
    tl.store(turns + program, 1 - half)


@triton.jit
def add_norm_kernel(
    part,
    residual,  # int32 [N, W]
    weight,  # int32 [W]
    normed,
    stream,  # int32 [N, W]
    words,
    addresses,  # see exchange
    turns,  # int32 [N]
    size,
    eps,
    W: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """`RMSNorm` of the residual stream and the sum over ranks of `part`, a row a program.

    `stream` is the new residual. All tensors are float32, or pairs of bfloat16. With one rank,
    `part` is the sum already.
    """
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    exist, place = columns < W, row * W + columns
    scales = tl.load(weight + columns, mask=exist, other=0)
    bits = tl.load(part + place, mask=exist, other=0)
    before = tl.load(residual + place, mask=exist, other=0)
    if RANKS > 1:
        half = tl.load(turns + row)
        first, second = exchange(
            bits, place, exist, words, addresses, half, size, RANK, RANKS, BLOCK, FLOAT
        )
        tl.store(turns + row, 1 - half)
    else:
        first, second = as_pair(bits, FLOAT)
    more, beside = as_pair(before, FLOAT)
    bits = as_bits(first + more, second + beside, FLOAT)
    tl.store(stream + place, bits, mask=exist)
    # As page 03 has it: rounded, normed, rounded, and multiplied.
    first, second = as_pair(bits, FLOAT)
    count: tl.constexpr = W if FLOAT else 2 * W
    scale = tl.rsqrt(tl.sum(first * first + second * second, 0) / count + eps)
    first, second = as_pair(as_bits(first * scale, second * scale, FLOAT), FLOAT)
    more, beside = as_pair(scales, FLOAT)
    bits = as_bits(first * more, second * beside, FLOAT)
    tl.store(normed + place, bits, mask=exist)
