"""Checks of page 12's exercises: empty slots, hits, and a pool that evicts what is rare."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from folo_lib.course.exercises import exercise, require

__all__ = ["check_FrequencyBlockPool", "check_count_hits", "check_count_wasted_slots"]


@exercise
def check_count_wasted_slots(solution: Callable[[list[int], int], int]) -> None:
    """Empty slots in the last blocks, on small cases and at random."""
    for lengths, block_size, wanted, why in [
        ([5], 4, 3, "5 tokens take two blocks of 4, and 3 of the 8 slots are empty."),
        ([4], 4, 0, "4 tokens fill one block of 4: no slot is empty."),
        ([5, 6], 4, 5, "each sequence has blocks of its own: 3 slots and 2 are empty."),
        ([], 4, 0, "no sequence takes a block."),
        ([7, 100], 1, 0, "blocks of one slot are always full."),
    ]:
        got = solution(list(lengths), block_size)
        call = f"({lengths}, {block_size})"
        require(got == wanted, f"{call} gives {got!r}, not {wanted}: {why}")
    rng = random.Random(0)
    for _ in range(100):
        size = rng.randint(1, 20)
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 8))]
        wanted = sum(
            next(n for n in range(size) if (n + x) % size == 0) for x in lengths
        )
        got = solution(list(lengths), size)
        require(got == wanted, f"({lengths}, {size}) gives {got!r}, not {wanted}.")


def _count_hits(prompts: list[list[int]], size: int) -> list[int]:
    """By comparing each prompt with all that came before it."""
    hits = []
    for i, prompt in enumerate(prompts):
        most = 0
        for other in prompts[:i]:
            full = len(other) // size * size  # what is not full cannot be found
            same = 0
            while same < min(full, len(prompt)) and other[same] == prompt[same]:
                same += 1
            most = max(most, same)
        hits.append(min(most, len(prompt) - 1) // size * size)
    return hits


@exercise
def check_count_hits(solution: Callable[[list[list[int]], int], list[int]]) -> None:
    """Tokens found, against a comparison with all earlier prompts."""
    for prompts, size, why in [
        ([[1, 2, 3]], 2, "the first prompt finds an empty cache."),
        ([[1, 2, 3], [1, 2, 4]], 2, "they share one full block."),
        ([[1, 2, 3], [1, 2, 3, 4, 5]], 2, "the block with the 3 was not full."),
        ([[1, 2, 3, 4], [9, 9, 3, 4, 5]], 2, "a block belongs to all before it."),
        ([[1, 2, 3, 4], [3, 4, 1, 2, 5]], 2, "a block elsewhere is another block."),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 2, "the last token must run, and so its block."),
        ([[1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 3, 4, 5]], 2, "older prompts stay, too."),
        (
            [[1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 5, 6, 7]],
            2,
            "a chain ends at its first gap.",
        ),
        ([[7], [7]], 1, "the only token must run."),
    ]:
        got, wanted = (
            solution([list(p) for p in prompts], size),
            _count_hits(prompts, size),
        )
        require(
            isinstance(got, list),
            f"it gives a {type(got).__name__}, not a list of int.",
        )
        call = f"({prompts}, {size})"
        require(got == wanted, f"{call} gives {got}, not {wanted}: {why}")
    rng = random.Random(0)
    for _ in range(200):
        size = rng.randint(1, 4)
        prompts = [
            [rng.randint(0, 1) for _ in range(rng.randint(1, 12))]
            for _ in range(rng.randint(1, 8))
        ]
        got, wanted = (
            solution([list(p) for p in prompts], size),
            _count_hits(prompts, size),
        )
        require(got == wanted, f"({prompts}, {size}) gives {got}, not {wanted}.")


def _fill(solution: Any, num_blocks: int) -> Any:
    """A pool whose blocks 0, 1, ... were freed in this order and have names."""
    pool = solution(num_blocks)
    blocks = pool.get_new_blocks(num_blocks)
    require(
        blocks == list(range(num_blocks)),
        f"a new pool of {num_blocks} gives the blocks {blocks}: empty blocks are taken "
        "as `BlockPool` takes them.",
    )
    for block_id in blocks:
        pool.cache_block(block_id, bytes([block_id]))
    for block_id in blocks:
        pool.free_blocks([block_id])
    return pool


def _revive(pool: Any, *block_ids: int) -> None:
    for block_id in block_ids:
        pool.touch([block_id])
        pool.free_blocks([block_id])


@exercise
def check_FrequencyBlockPool(solution: Any) -> None:
    """Who is evicted, after touches that are counted by hand and at random."""
    got = _fill(solution, 3).get_new_blocks(3)
    require(
        got == [0, 1, 2],
        f"nothing was touched, the blocks were freed in the order 0, 1, 2, and they are "
        f"evicted in the order {got}: of equals the one freed first.",
    )
    pool = _fill(solution, 3)
    _revive(pool, 0, 0, 1)
    got = pool.get_new_blocks(2)
    require(
        got == [2, 1],
        f"block 0 was touched twice, 1 once, 2 never, and {got} are evicted, not [2, 1].",
    )
    require(
        set(pool.cached_blocks.values()) == {0} and set(pool.block_hashes) == {0},
        "after blocks 2 and 1 were evicted, only block 0 should have a hash: evicting "
        "removes it from `cached_blocks` and `block_hashes`.",
    )
    pool.free_blocks([2])  # empty now, for it has no name any more
    got = pool.get_new_blocks(1)
    require(got == [2], f"block 2 is empty, 0 is not, and {got} is taken: empty first.")
    pool = _fill(solution, 2)
    _revive(pool, 0, 0)
    _revive(pool, 1, 1, 1)
    pool.cache_block(pool.get_new_blocks(1)[0], b"again")  # 0: a new life
    pool.free_blocks([0])
    _revive(pool, 0, 0)
    got = pool.get_new_blocks(1)
    require(
        got == [0],
        "block 0 was taken for something new, which was touched twice, block 1 was "
        f"touched three times, and {got} is evicted: what was in block 0 before does "
        "not count any more.",
    )
    _check_random_life(solution)


def _check_random_life(solution: Any) -> None:
    rng = random.Random(0)
    for _ in range(100):
        pool = _fill(solution, 6)
        touches, line = [0] * 6, list(range(6))
        for _ in range(rng.randint(0, 20)):
            block_id = rng.randrange(6)
            _revive(pool, block_id)
            touches[block_id] += 1
            line.remove(block_id)
            line.append(block_id)
        wanted = sorted(line, key=lambda i: touches[i])
        got = pool.get_new_blocks(6)
        require(
            got == wanted,
            f"with touches {touches}, freed in the order {line}, the blocks are evicted "
            f"in the order {got}, not {wanted}.",
        )
    pool = _fill(solution, 2)
    try:
        pool.get_new_blocks(3)
    except RuntimeError:
        require(pool.num_free_blocks == 2, "a call that raises should take no block.")
        return
    require(False, "3 blocks of 2 free ones should be a RuntimeError.")
