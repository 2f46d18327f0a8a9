"""The figures of page 06 show what they are given."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from folo_lib.course.cache_figures import draw_pool, draw_slots, draw_ways
from folo_lib.course.figures import CACHE


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_ways_count_what_they_touch() -> None:
    _, axes = plt.subplots(1, 3, layout="constrained")
    draw_ways(axes, num_steps=8)
    titles = [ax.get_title() for ax in axes]
    assert titles == [
        "recompute all\n36 computed",  # 1 + 2 + ... + 8
        "growing\n8 computed, 28 copied",
        "slots\n8 computed",
    ]
    assert [len(ax.patches) for ax in axes] == [36, 36, 64]
    plt.close("all")


def test_slots_hold_the_tokens_in_their_order() -> None:
    _, ax = plt.subplots()
    draw_slots(ax, [5, 2, 3], num_blocks=2, block_size=3)
    boxes = [box for box in ax.patches if isinstance(box, Rectangle)][:6]
    full = [box.get_facecolor() == to_rgba(CACHE.colour) for box in boxes]
    assert full == [False, False, True, True, False, True]
    inside = {
        text.get_position()[0]: text.get_text()
        for text in ax.texts
        if text.get_position()[1] == 0.5
    }
    assert inside == {2.5: "1", 3.5: "2", 5.5: "0"}
    plt.close("all")


def test_a_pool_names_its_free_runs() -> None:
    _, ax = plt.subplots()
    owned = {"a": [0, 1], "c": [4]}
    draw_pool(ax, owned, {"a": 20, "c": 7}, num_blocks=8, block_size=16)
    assert [text for text in texts(ax) if "free" in text] == ["2 free", "3 free"]
    assert {"a: 20 tokens", "c: 7 tokens"} < set(texts(ax))
    plt.close("all")
