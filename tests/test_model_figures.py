"""The figures of pages 04 and 10 show what they are given."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from folo_lib.course.engine_figures import Span, draw_request, watch
from folo_lib.course.figures import DEVICE, PALE_GREY
from folo_lib.course.model_figures import BOXES, draw_decoder_layer, draw_parameters
from folo_lib.request import RequestMetrics


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def boxes(ax: Axes) -> list[Rectangle]:
    return [box for box in ax.patches if isinstance(box, Rectangle)]


def test_a_layer_shows_the_shape_of_every_module() -> None:
    shapes = {key: [7, place] for place, (*_, key) in enumerate(BOXES) if key}
    _, ax = plt.subplots()
    draw_decoder_layer(ax, shapes)
    for *_, name, key in BOXES:
        assert (f"{name}  {shapes[key]}" if key else name) in texts(ax)
    plt.close("all")


def test_parameters_are_summed_by_group() -> None:
    names = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj")
    names += ("gate_proj", "up_proj", "down_proj", "all norms")
    counts = {name: 10**6 * (place + 1) for place, name in enumerate(names)}
    _, ax = plt.subplots()
    draw_parameters(ax, counts)
    assert [bar.get_width() for bar in boxes(ax)] == list(range(1, 10))
    assert "attention: 14" in texts(ax)  # 2 + 3 + 4 + 5
    assert "MLP: 21" in texts(ax)  # 6 + 7 + 8
    plt.close("all")


def test_calls_are_watched_and_still_answer() -> None:
    spans: list[Span] = []
    owner = SimpleNamespace(double=lambda x: 2 * x)
    watch(spans, {"model": (owner, "double")})
    assert owner.double(4) == 8
    [span] = spans
    assert span.label == "model"
    assert span.begin <= span.end


def test_a_request_is_drawn_on_the_clock_of_its_arrival() -> None:
    spans = [
        Span("schedule", 100.0, 100.1),  # another one's
        Span("model", 100.1, 100.4),
        Span("schedule", 100.5, 100.6),
        Span("model", 100.6, 101.0),
    ]
    metrics = RequestMetrics(
        arrival_time=100.0,
        first_scheduled_time=100.5,
        first_token_time=101.0,
        finished_time=101.0,
    )
    _, axes = plt.subplots(2)
    draw_request(axes, spans, ["schedule", "model"], metrics)
    *calls, queue = boxes(axes[0])
    assert [box.get_x() for box in calls] == pytest.approx([0, 100, 500, 600])
    assert [box.get_width() for box in calls] == pytest.approx([100, 300, 100, 400])
    white, grey, pink = (to_rgba(c) for c in ("white", PALE_GREY, DEVICE.colour))
    assert [box.get_facecolor() for box in calls] == [white, white, grey, pink]
    assert queue.get_width() == pytest.approx(500)
    lens = boxes(axes[1])
    assert lens[-1].get_x() == pytest.approx(1e5)  # µs since the last step began
    assert axes[1].get_xlim() == pytest.approx((0, 5e5))
    plt.close("all")
