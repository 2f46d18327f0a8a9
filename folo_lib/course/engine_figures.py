"""The figure of page 10: a request on its way through the layers of the engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from folo_lib.course.figures import DEVICE, PALE_GREY, draw_box
from folo_lib.request import RequestMetrics

__all__ = ["Span", "draw_request", "draw_spans", "watch"]

ON_DEVICE = ("model", "logits", "sample")
FRAME = "launch"  # around others


class Span(NamedTuple):
    """A call of a watched function, on the clock of `time.perf_counter`."""

    label: str
    begin: float
    end: float


def watch(spans: list[Span], layers: Mapping[str, tuple[Any, str]]) -> None:
    """Puts functions under a stopwatch.

    Args:
        spans: gets a span for each call.
        layers: by label, the owner of a function and its name there.
    """

    def wrap(label: str, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = original(*args, **kwargs)
            spans.append(Span(label, begin, time.perf_counter()))
            return result

        setattr(owner, name, timed)

    for label, (owner, name) in layers.items():
        wrap(label, owner, name)


def draw_spans(
    ax: Axes, spans: Sequence[Span], labels: Sequence[str], mine: float, scale: float
) -> None:
    """A row for each label; what would run on a GPU is coloured.

    Args:
        ax: where to draw.
        spans: with times since the zero of the axis, in seconds.
        labels: the rows, from the second on; the first is left to the queue.
        mine: what begins earlier belongs to somebody else, and is pale.
        scale: units of the axis in a second.
    """
    for label, begin, end in spans:
        colour = DEVICE.colour if label in ON_DEVICE else PALE_GREY
        fill = "white" if label == FRAME or begin < mine else colour
        edge = "black" if begin >= mine else "0.7"
        y, size = 1 + labels.index(label), (scale * (end - begin), 0.8)
        corner = scale * begin, y - 0.4
        draw_box(ax, corner, size, facecolor=fill, edgecolor=edge, linewidth=0.8)
    ax.set_yticks(range(1 + len(labels)), ["queue", *labels])


def draw_request(
    axes: Sequence[Axes],
    spans: Sequence[Span],
    labels: Sequence[str],
    metrics: RequestMetrics,
) -> None:
    """A request from its arrival to its end, and its last step under the lens.

    Args:
        axes: two.
        spans: of it and of those before it.
        labels: of the layers, from the top to the bottom and up again; the first one
            begins a step.
        metrics: of the request, which has ended.
    """
    whole, lens = axes
    began = metrics.first_scheduled_time
    assert began is not None

    def since(start: float) -> list[Span]:
        return [Span(label, b - start, e - start) for label, b, e in spans]

    arrival = metrics.arrival_time
    draw_spans(whole, since(arrival), labels, began - arrival, 1e3)
    queue = 1e3 * (began - arrival)
    draw_box(whole, (0, -0.4), (queue, 0.8), "waits", edgecolor="0.6", linestyle=":")
    for ms, name in [(queue, "starts"), (1e3 * (metrics.ttft or 0), "first token")]:
        whole.axvline(ms, color="black", linestyle="--", linewidth=1)
        whole.text(ms, -0.75, f" {name}")
    rows = len(labels)
    whole.set(xlabel="ms since the request arrived", ylim=(rows + 0.6, -0.7))
    whole.set_xlim(0, 1e3 * (metrics.total_time or 0) * 1.02)

    last_step = [span.begin for span in spans if span.label == labels[0]][-1]
    draw_spans(lens, since(last_step), labels, began - last_step, 1e6)
    lens.set(xlabel="µs since the last step began", ylim=(rows + 0.6, 0.4))
    lens.set_xlim(0, 1e6 * (spans[-1].end - last_step))
