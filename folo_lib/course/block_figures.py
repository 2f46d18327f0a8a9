"""Figures of page 12: who has which block, and what the blocks of a cache say, as a tree.

    states.append(draw_block_tables(manager, {"A": request, ...}, decode, "A has two blocks."))
    show_states(states)

Each function takes a manager of page 12 as it is at this moment and returns one state of a
`MovingFigure`; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from folo_lib.course.figures import CACHE, PALE_GREY, PREFILL, Look
from folo_lib.course.moving import MovingFigure, Piece, State

if TYPE_CHECKING:
    from folo_lib.block_pool import PagedKVCacheManager
    from folo_lib.request import Request

__all__ = ["draw_block_tables", "draw_prefix_tree", "show_states"]

Decode = Callable[[list[int]], str]

EMPTY = Look("#FFFFFF", "", "o", "-")
KEPT = Look(PALE_GREY, "..", "D", ":")  # free, and its contents may serve again
IN_USE = CACHE
SHARED = PREFILL._replace(hatch="\\\\")  # computed once, read by several

WIDTH, MOST = 2.6, 14  # of a box, and letters in it


def shorten(text: str) -> str:
    """A text for a box: on one line, and not too long."""
    text = " ".join(text.split())
    return text if len(text) <= MOST else text[: MOST - 1] + "…"


def look_at(manager: PagedKVCacheManager, block_id: int) -> Look:
    """How a block is drawn: empty, kept, in use, or shared."""
    count = manager.pool.ref_counts[block_id]
    if count == 0:
        return KEPT if block_id in manager.pool.block_hashes else EMPTY
    return IN_USE if count == 1 else SHARED


def draw_block_tables(
    manager: PagedKVCacheManager,
    requests: Mapping[str, Request],
    decode: Decode,
    caption: str,
) -> State:
    """The tables of some requests, and below them the blocks of the pool.

    Args:
        manager: with a dozen blocks or fewer, of four tokens or so.
        requests: by the names that the rows get; one without blocks has an empty row.
        decode: makes text of token ids.
        caption: says what has happened.
    """
    pieces, size = [], manager.block_size
    for row, (name, request) in enumerate(requests.items()):
        pieces.append(Piece(f"row {name}", 0, row * 1.3, 1.6, 1, f"table {name}"))
        for i, block_id in enumerate(request.block_ids):
            stop = min((i + 1) * size, request.num_computed_tokens)
            text = shorten(decode(request.get_token_ids(i * size, stop)))
            x, y = 1.8 + i * (WIDTH + 0.1), row * 1.3
            look = look_at(manager, block_id)
            pieces.append(Piece(f"{name} {i}", x, y, WIDTH, 0.55, text, look))
            said = f"in block {block_id}"
            pieces.append(Piece(f"{name} {i} where", x, y + 0.5, WIDTH, 0.5, said))
    floor = 1.3 * len(requests) + 0.3
    pieces.append(Piece("pool", 0, floor, 1.6, 1, "pool"))
    for block_id, count in enumerate(manager.pool.ref_counts):
        look = look_at(manager, block_id)
        says = "empty" if look is EMPTY else "kept" if look is KEPT else f"× {count}"
        place = 1.8 + block_id * 1.75, floor
        text = f"{block_id}: {says}"
        pieces.append(Piece(f"pool {block_id}", *place, 1.65, 1, text, look))
    return State(pieces, caption)


def show_states(states: Sequence[State]) -> MovingFigure:
    """The states one after another, in a figure that has room for all of them."""
    pieces = [piece for state in states for piece in state.pieces]
    width = max(piece.x + piece.width for piece in pieces) + 0.1
    height = max(piece.y + piece.height for piece in pieces) + 0.1
    return MovingFigure(states, (width, height), seconds=2.5)


def draw_prefix_tree(
    manager: PagedKVCacheManager,
    requests: Sequence[Request],
    decode: Decode,
    caption: str,
    num_found: int = 0,
) -> State:
    """What can be found, as a tree: each block to the right of the one it continues.

    Args:
        manager: its pool says what can be found.
        requests: all that there ever were, in the order in which they came; a block
            stands in the row of the first that has it.
        decode: makes text of token ids.
        caption: says what has happened.
        num_found: how many blocks of the last request were there when it came.
    """
    pieces: list[Piece] = []
    newest = requests[-1].block_hashes
    looks = dict.fromkeys(newest, IN_USE) | dict.fromkeys(newest[:num_found], SHARED)
    drawn: dict[bytes, int] = {}  # the row in which a block stands
    for row, request in enumerate(requests):
        for i, block_hash in enumerate(request.block_hashes):
            if block_hash not in manager.pool.cached_blocks or block_hash in drawn:
                continue
            size, x, y = manager.block_size, i * (WIDTH + 0.7), row * 1.1
            parent = drawn.get(request.block_hashes[i - 1], row) if i else row
            key = block_hash.hex()[:12]
            if i:
                mark = "→" if parent == row else "↳"
                pieces.append(Piece(f"{key} way", x - 0.7, y, 0.7, 0.7, mark))
            text = shorten(decode(request.get_token_ids(i * size, (i + 1) * size)))
            look = looks.get(block_hash, KEPT)
            pieces.append(Piece(key, x, y, WIDTH, 0.7, text, look))
            drawn[block_hash] = row
    return State(pieces, caption)
