"""Sums over GPUs without a barrier: every number travels with a ticket.

A sum over ranks has two parts, sending numbers and knowing when those of the others have come. A
barrier answers the second with messages of its own, which travel after the numbers. Here a number
and the ticket of its sum are one word of 64 bits, written in one piece into the memory of every
other rank. Who waits looks at the words themselves: the number is there as soon as its ticket is.

Two buffers take turns. A rank that sends for the sum after the next one has seen what the others
sent for the next one, and they sent that after they had read this one. So it writes over what
everybody has read. Tickets come from the memory of the GPU, where a recorded graph counts on.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .fused_attention import let_next_start, wait_for_previous

__all__ = ["exchange_kernel", "send", "send_kernel", "sum_kernel"]


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


@triton.jit
def as_floats(bits, FLOAT: tl.constexpr):
    """The one float32 of 32 bits, or the first of two bfloat16, which come before the second."""
    return (bits if FLOAT else bits << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_words"])
def exchange_kernel(
    x,  # int32 [num_words]
    out,
    words,  # int64 [2, RANKS, size]
    addresses,  # int64 [RANKS]
    tickets,  # int32, one for each program
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
    ticket = (tl.load(tickets + program) + 1) & 0x7FFFFFFF
    half = (ticket % 2) * RANKS * size
    bits = tl.load(x + place, mask=exist, other=0)
    own = (bits.to(tl.int64) << 32) | ticket.to(tl.int64)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = tl.load(addresses + rank).to(
                tl.pointer_type(tl.int64), bitcast=True
            )
            tl.store(theirs + half + RANK * size + place, own, mask=exist)
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    missing = 1
    while missing > 0:
        first = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        wrong = tl.zeros([BLOCK], tl.int32)
        for rank in tl.static_range(RANKS):
            if rank == RANK:
                part = bits
            else:
                word = tl.load(
                    words + half + rank * size + place, mask=exist, volatile=True
                )
                wrong |= word.to(tl.int32) ^ ticket
                part = (word >> 32).to(tl.int32)
            first += as_floats(part, FLOAT)
            if not FLOAT:
                second += (part & -65536).to(tl.float32, bitcast=True)
        missing = tl.max((exist & (wrong != 0)).to(tl.int32), 0)
    if FLOAT:
        total = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = second.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        total = low | (high << 16)
    tl.store(out + place, total, mask=exist)
    tl.store(tickets + program, ticket)
