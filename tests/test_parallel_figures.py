"""The figures of page 16 draw what they are given, and tell of a sum that could happen."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import pytest

from folo_lib.course.parallel_figures import (
    COPY,
    FULL,
    draw_rank_heads,
    draw_steps,
    move_sum,
)


def test_heads_that_are_there_twice_are_hatched() -> None:
    fig, ax = plt.subplots()
    draw_rank_heads(ax, [[0], [1], [2], [3]], [[0], [0], [1], [2]])
    written = [text.get_text() for text in ax.texts]
    assert written.count("k/v 0") == 2 and "4 ranks" in written
    hatches = [box.get_hatch() for box in ax.patches if box.get_y() == 1]
    assert hatches == [COPY.hatch, COPY.hatch, "", ""]
    plt.close(fig)


def test_no_place_is_overwritten_and_both_get_the_same_sums() -> None:
    held: list[dict[tuple[float, float], str]] = []
    for state in move_sum().states:
        pieces = [piece for piece in state.pieces if piece.look is FULL]
        places = {(piece.x, piece.y): piece.text for piece in pieces}
        assert len(places) == len(pieces)  # one number to a place
        held.append(places)
    for before, after in pairwise(held):
        for place in before.keys() & after.keys():
            assert before[place] == after[place]  # it was empty in between
    texts = [{piece.key: piece.text for piece in s.pieces} for s in move_sum().states]
    assert [text.get("sum 0") for text in texts] == [None] * 3 + ["3 + 4 = 7"] * 4 + [
        "5 + 6 = 11"
    ]
    assert texts[-1]["sum 0"] == texts[-1]["sum 1"]
    # Where nothing moves, the state is shown in which one set of places would not do.
    pictured = {
        piece.text for piece in move_sum().pictured.pieces if piece.look is FULL
    }
    assert pictured == {"3", "5"}


def test_steps_are_shares_of_one_card() -> None:
    fig, ax = plt.subplots()
    rows = [{"name": "a", "one": 4.0, "two": 2.4, "sums": 0.4}]
    draw_steps(ax, [*rows, rows[0] | {"two": 8.0}])
    widths = [box.get_width() for box in ax.patches]
    assert widths == pytest.approx([50, 10, 190, 10])
    assert [box.get_x() for box in ax.patches] == pytest.approx([0, 50, 0, 190])
    label, other, *_ = ax.texts
    assert label.get_text() == "2.40 ms, on one card 4.00"
    assert label.get_position()[0] > 100 and other.get_position()[0] > 200
    plt.close(fig)
