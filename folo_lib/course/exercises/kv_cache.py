"""Checks of page 06's exercises: a cache that evicts, and blocks with several owners."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from folo_lib.course.exercises import NotYet, exercise, require

__all__ = ["check_SharedBlockAllocator", "check_evicting_slot_mapping"]

EvictingSlotMapping = Callable[[int, int, int, int], list[int]]


def _held_tokens(num_tokens: int, num_sinks: int, window: int) -> list[int]:
    """What the cache should hold after `num_tokens` tokens."""
    first_recent = max(num_sinks, num_tokens - window)
    return [*range(min(num_sinks, num_tokens)), *range(first_recent, num_tokens)]


def _write_steps(
    solution: EvictingSlotMapping, ends: list[int], num_sinks: int, window: int
) -> None:
    """Writes tokens step by step, as a cache would, and looks at what it holds."""
    num_slots, start = num_sinks + window, 0
    held: dict[int, int] = {}  # slot -> token
    for stop in ends:
        call = f"({start}, {stop}, {num_sinks}, {window})"
        slots = solution(start, stop, num_sinks, window)
        require(
            isinstance(slots, list), f"{call} gives {type(slots).__name__}, not a list."
        )
        require(
            len(slots) == stop - start,
            f"{call} gives {len(slots)} slots for {stop - start} tokens: one for each, "
            "and -1 for a token that is not stored.",
        )
        for token, slot in enumerate(slots, start):
            require(
                isinstance(slot, int) and -1 <= slot < num_slots,
                f"{call} puts token {token} into slot {slot}: slots are 0 to "
                f"{num_slots - 1}, or -1.",
            )
        stored = [slot for slot in slots if slot >= 0]
        twice = sorted({slot for slot in stored if stored.count(slot) > 1})
        require(
            not twice,
            f"{call} writes slot {twice[0] if twice else ''} twice in one step, and all "
            "writes of a step happen at once: which token is left there? Only the later "
            "one will be read; give the earlier one -1.",
        )
        held |= {slot: i for i, slot in enumerate(slots, start) if slot >= 0}
        wanted, got = _held_tokens(stop, num_sinks, window), sorted(held.values())
        where = (
            f"after {call} the cache holds the tokens {got}, and should hold {wanted}"
        )
        lost = [token for token in wanted if token not in got]
        hint = "A token stays in its slot until a newer one takes it."
        if lost and lost[0] < num_sinks:
            hint = f"Token {lost[0]} is a sink: it is stored, and never overwritten."
        elif lost and len(got) < len(wanted):
            hint = f"There is a slot for token {lost[0]} too."
        elif lost:
            hint = f"Token {lost[0]} is recent; the oldest behind the sinks must go."
        require(got == wanted, f"{where}. {hint}")
        start = stop


@exercise
def check_evicting_slot_mapping(solution: EvictingSlotMapping) -> None:
    """Slots of a cache of attention sinks and a recent window, simulated step by step."""
    _write_steps(solution, [1, 2, 3], 1, 4)  # everything fits
    _write_steps(solution, [3, 4, 5, 6, 7, 8, 9], 0, 3)  # a ring
    _write_steps(solution, [6, 7, 8, 9, 10, 11, 12, 13], 2, 4)  # decode, with sinks
    _write_steps(solution, [10], 0, 4)  # a prompt longer than the cache
    _write_steps(solution, [3, 13, 14, 22], 2, 4)
    _write_steps(solution, [1, 1, 3], 2, 4)  # a step without tokens; sinks in two steps
    rng = random.Random(0)
    for _ in range(300):
        num_sinks, window = rng.randint(0, 5), rng.randint(1, 9)
        ends = sorted(rng.randint(1, 60) for _ in range(rng.randint(1, 12)))
        _write_steps(solution, ends, num_sinks, window)


def _refused(action: Callable[[], Any], error: type[Exception], what: str) -> None:
    """Requires that `action` raises `error`."""
    try:
        got = action()
    except error:
        return
    except (NotYet, NotImplementedError):
        raise
    except Exception as other:
        raise NotYet(
            f"{what} raises {type(other).__name__} ({other}), not {error.__name__}."
        ) from None
    raise NotYet(f"{what} should raise a {error.__name__}; it gives {got!r}.")


def _check_one_owner(solution: Any) -> None:
    pool = solution(3)
    require(
        pool.num_free_blocks == 3,
        f"a new pool of 3 has num_free_blocks == {pool.num_free_blocks}, not 3.",
    )
    blocks = [pool.allocate() for _ in range(3)]
    require(
        sorted(blocks) == [0, 1, 2],
        f"three calls of allocate() on a pool of 3 give {blocks}: each of 0, 1, 2 once.",
    )
    require(
        pool.num_free_blocks == 0,
        f"with all 3 handed out, num_free_blocks is {pool.num_free_blocks}, not 0.",
    )
    _refused(pool.allocate, RuntimeError, "allocate() with no block free")
    pool.free(blocks[1])
    require(
        pool.num_free_blocks == 1,
        f"free() of a block with one owner makes num_free_blocks "
        f"{pool.num_free_blocks}, not 1.",
    )
    _refused(
        lambda: pool.free(blocks[1]), ValueError, "a second free() of a free block"
    )
    _refused(lambda: pool.share(blocks[1]), ValueError, "share() of a free block")
    _refused(
        lambda: pool.make_writable(blocks[1]),
        ValueError,
        "make_writable() of a free block",
    )


def _check_two_owners(solution: Any) -> None:
    pool = solution(2)
    block = pool.allocate()
    pool.share(block)
    require(pool.num_free_blocks == 1, "share() takes no block: num_free_blocks stays.")
    pool.free(block)
    require(
        pool.num_free_blocks == 1,
        "after share(), the first free() gave the block away, though one owner is left.",
    )
    got = pool.make_writable(block)
    require(
        got == block and pool.num_free_blocks == 1,
        f"make_writable({block}) with one owner gives {got}: nobody else reads the block, "
        "so no copy is needed.",
    )
    pool.share(block)
    got = pool.make_writable(block)
    require(
        got != block,
        f"make_writable({block}) with two owners gives {got}: writing there would change "
        "what the other owner reads.",
    )
    require(
        pool.num_free_blocks == 0,
        "after make_writable() of a shared block both blocks of the pool are in use, but "
        f"num_free_blocks is {pool.num_free_blocks}.",
    )
    pool.free(block)
    require(
        pool.num_free_blocks == 1,
        "who got a copy has left the old block: after make_writable() the block has one "
        "owner, and one free() makes it free.",
    )
    pool.free(got)
    require(
        pool.num_free_blocks == 2,
        "a copy has one owner: one free() makes it free, and it did not.",
    )


def _check_full_pool(solution: Any) -> None:
    pool = solution(1)
    block = pool.allocate()
    pool.share(block)
    _refused(
        lambda: pool.make_writable(block),
        RuntimeError,
        "make_writable() of a shared block with no block free",
    )
    pool.free(block)
    require(
        pool.num_free_blocks == 0,
        "make_writable() failed for want of a block, and took an owner away all the same: "
        "a call that raises should change nothing.",
    )
    pool.free(block)
    require(
        pool.num_free_blocks == 1, "both owners are gone, and the block is not free."
    )


def _check_random_life(solution: Any, seed: int) -> None:
    """A hundred random calls, against a dict of owners."""
    rng, size = random.Random(seed), 6
    pool, owners = solution(size), dict[int, int]()
    for _ in range(100):
        call, block = rng.randrange(4), rng.choice([*owners] or [0])
        if call == 0 and len(owners) < size:
            new = pool.allocate()
            require(new not in owners, f"allocate() gives {new}, which has an owner.")
            owners[new] = 1
        elif call == 1 and block in owners:
            pool.share(block)
            owners[block] += 1
        elif call == 2 and block in owners:
            pool.free(block)
            owners[block] -= 1
        elif call == 3 and block in owners:
            if owners[block] > 1 and len(owners) < size:
                new = pool.make_writable(block)
                require(
                    new not in owners,
                    f"make_writable() gives {new}, which has an owner.",
                )
                owners[block] -= 1
                owners[new] = 1
            elif owners[block] == 1:
                same = pool.make_writable(block)
                require(same == block, "make_writable() copied a block with one owner.")
        owners = {block: count for block, count in owners.items() if count}
        free = size - len(owners)
        require(
            pool.num_free_blocks == free,
            f"in a series of random calls num_free_blocks became {pool.num_free_blocks}, "
            f"and {free} blocks have no owner: count the owners of each block.",
        )


@exercise
def check_SharedBlockAllocator(solution: Any) -> None:
    """Blocks with owners that are counted, against a dict of owners."""
    _check_one_owner(solution)
    _check_two_owners(solution)
    _check_full_pool(solution)
    for seed in range(50):
        _check_random_life(solution, seed)
