"""The figures of page 12 show what the manager says."""

from __future__ import annotations

from folo_lib.block_pool import PagedKVCacheManager
from folo_lib.course.block_figures import (
    EMPTY,
    IN_USE,
    KEPT,
    SHARED,
    draw_block_tables,
    draw_prefix_tree,
    shorten,
    show_states,
)
from folo_lib.course.moving import Piece, State
from folo_lib.request import Request, RequestMetrics
from folo_lib.sampling_params import SamplingParams


def run(manager: PagedKVCacheManager, name: str, tokens: list[int]) -> Request:
    request = Request(
        request_id=name,
        prompt_token_ids=tokens,
        params=SamplingParams(),
        seed=0,
        max_tokens=9,
        metrics=RequestMetrics(arrival_time=0.0),
    )
    computed = manager.get_computed_blocks(request)
    assert computed is not None
    num_tokens = len(tokens) - 4 * len(computed)
    assert manager.allocate_slots(request, num_tokens, computed) is not None
    request.num_computed_tokens = len(tokens)
    manager.publish()
    return request


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def pieces(state: State) -> dict[str, Piece]:
    return {piece.key: piece for piece in state.pieces}


def test_block_tables() -> None:
    manager = PagedKVCacheManager(6, 4)
    gone = run(manager, "gone", [7, 8, 9, 9, 5])
    manager.free(gone)
    one = run(manager, "one", [0, 1, 2, 3, 4, 5])
    two = run(manager, "two", [0, 1, 2, 3, 9])
    state = draw_block_tables(manager, {"A": one, "B": two, "C": gone}, decode, "now")
    drawn = pieces(state)
    assert state.caption == "now"
    assert drawn["A 0"].text == drawn["B 0"].text == "0 1 2 3"
    assert drawn["A 1"].text == "4 5"
    assert drawn["B 1 where"].text == f"in block {two.block_ids[1]}"
    assert "C 0" not in drawn
    looks = [drawn[f"pool {i}"].look for i in range(6)]
    assert sorted(looks, key=repr) == sorted(
        [KEPT, SHARED, IN_USE, IN_USE, EMPTY, EMPTY], key=repr
    )
    assert drawn[f"pool {one.block_ids[0]}"].text == f"{one.block_ids[0]}: × 2"


def test_prefix_tree() -> None:
    manager = PagedKVCacheManager(8, 4)
    one = run(manager, "one", list(range(9)))
    two = run(manager, "two", [*range(4), 9, 9, 9, 9, 9])
    state = draw_prefix_tree(manager, [one, two], decode, "", num_found=1)
    boxes = {piece.text: piece for piece in state.pieces if piece.look is not None}
    assert list(boxes) == ["0 1 2 3", "4 5 6 7", "9 9 9 9"]
    assert [box.look for box in boxes.values()] == [SHARED, KEPT, IN_USE]
    assert boxes["4 5 6 7"].x == boxes["9 9 9 9"].x > boxes["0 1 2 3"].x
    assert boxes["4 5 6 7"].y == boxes["0 1 2 3"].y < boxes["9 9 9 9"].y
    marks = [piece.text for piece in state.pieces if piece.look is None]
    assert marks == ["→", "↳"]


def test_an_evicted_block_is_not_in_the_tree() -> None:
    manager = PagedKVCacheManager(3, 4)
    one = run(manager, "one", list(range(9)))
    manager.free(one)
    two = run(manager, "two", list(range(20, 25)))
    state = draw_prefix_tree(manager, [one, two], decode, "")
    assert {p.text for p in state.pieces if p.look} == {"0 1 2 3", "20 21 22 23"}


def test_the_figure_has_room_for_all_states() -> None:
    small = State([Piece("a", 0, 0, look=KEPT)], "one")
    large = State([Piece("a", 5, 2, 3, 1, look=KEPT)], "two")
    figure = show_states([small, large])
    assert figure.size == (8.1, 3.1)
    assert "one" in figure.to_html()


def test_long_texts_are_shortened() -> None:
    assert shorten(" a  short\none ") == "a short one"
    assert shorten("x" * 40) == "x" * 13 + "…"
