"""The figures of page 08 show what a step says."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from folo_lib.course.figures import CACHE, DECODE, PREFILL
from folo_lib.course.runner_figures import draw_layers, draw_line, draw_rows
from folo_lib.runner import StepLayout


def boxes(ax: Axes) -> dict[tuple[float, float], Any]:
    """The colours of the boxes, by their corners."""
    found = {}
    for box in ax.patches:
        assert isinstance(box, Rectangle)
        found[round(box.get_x(), 3), round(box.get_y(), 3)] = box.get_facecolor()
    return found


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_a_line_shows_whose_each_token_is_and_where_it_lands() -> None:
    step = StepLayout(
        input_ids=[-1, 11, 12],
        positions=[9, 0, 1],
        slots=[2, 4, 5],
        query_lens=[1, 2],
        ends=[0, 2],
        pending=[0],
    )
    _, (ax, below) = plt.subplots(2)
    draw_line(ax, below, step, cached="AA      ", block_size=2)
    drawn = boxes(ax)
    assert drawn[0, 3] == to_rgba(DECODE.colour)
    assert drawn[1, 3] == drawn[2, 3] == to_rgba(PREFILL.colour)
    assert texts(ax).count("?") == 1
    assert "-1" not in texts(ax)
    assert [text for text in texts(ax) if "▲" in text] == ["▲ 0", "▲ 2"]
    found = boxes(below)
    looks = [found[slot, 0] for slot in range(8)]
    old, new, read = (to_rgba(look.colour) for look in (CACHE, DECODE, PREFILL))
    white = to_rgba("white")
    assert looks == [old, old, new, white, read, read, white, white]
    assert [text for text in texts(below) if text in "AB"][:5] == list("AAABB")
    plt.close("all")


def test_a_row_is_white_where_its_request_sits_out() -> None:
    _, ax = plt.subplots()
    draw_rows(ax, [{0: "A"}, {0: "A", 1: "B"}], running=["A", "B"])
    looks = {corner: colour == to_rgba("white") for corner, colour in boxes(ax).items()}
    assert looks == {(0, 1.1): False, (1, 1.1): True, (1, 0.1): False}
    plt.close("all")


def test_the_layers_say_what_crosses_and_what_stays() -> None:
    _, ax = plt.subplots()
    draw_layers(ax, there=2400, back=2100, logits=38_895_616)
    assert "logits: 38,895,616 bytes\nstay here" in texts(ax)
    assert "a plan:\n2,400 bytes" in texts(ax)
    assert "tokens:\n2,100 bytes" in texts(ax)
    plt.close("all")
