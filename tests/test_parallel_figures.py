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
    find_steps,
    find_sums,
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
    row = {"name": "a", "count": 1, "one": 4.0, "two": 2.4, "sums": 0.3}
    draw_steps(ax, [row, row | {"two": 8.0}], 7.0)
    assert [box.get_width() for box in ax.patches] == pytest.approx(
        [50, 2.5, 7.5, 50, 142.5, 7.5]
    )
    label, other, *_ = ax.texts
    assert label.get_text() == "0.60: 2.40 of 4.00 ms"
    assert label.get_position()[0] > 100 and other.get_position()[0] > 200
    assert [line.get_xdata()[0] for line in ax.lines] == [100, 175]
    plt.close(fig)


def test_what_is_found_in_a_recording() -> None:
    step = {"shape": "8B", "requests": 1}
    measured = {
        "sums": [
            {"method": "a", "place": "graph", "bytes": 8, "us": 2.0},
            {"method": "a", "place": "called", "bytes": 8, "us": 9.0},
            {"method": "b", "place": "graph", "bytes": 8, "us": 5.0},
        ],
        "steps": [
            step | {"devices": 2, "has_sums": False, "ms": 2.0},
            step | {"devices": 2, "has_sums": True, "ms": 2.5},
            step | {"devices": 1, "has_sums": False, "ms": 4.0},
            step | {"shape": "32B", "devices": 2, "has_sums": True, "ms": 9.0},
        ],
        "ratios": [step | {"sums_ms": 0.5}, step | {"shape": "32B", "sums_ms": 1.0}],
    }
    assert find_sums(measured, "a") == {8: 2.0}
    small, large = find_steps(measured)
    assert small == {
        "name": "Qwen3-8B",
        "count": 1,
        "one": 4.0,
        "two": 2.5,
        "sums": 0.5,
    }
    assert large["one"] is None and large["two"] == 9.0
