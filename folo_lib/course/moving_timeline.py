"""The figure of page 14 that moves: what host and device do in a few steps, by what is switched on.

    from folo_lib.course.moving_timeline import Timeline

    Timeline(section["settings"], num_requests=64)

It is drawn from the section `timeline` of the benchmark's recording. Like the figures of
`moving` it is HTML with inline SVG and a small script of our own. Without the script the first
setting stays as a still picture.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from folo_lib.benchmark_timeline import PHASES, read_spans
from folo_lib.course.figures import DEVICE, HOST

__all__ = ["Lanes", "Timeline", "draw_lanes", "find_busy_shares", "read_lanes"]

SWITCHES = ("graph", "compile", "run-ahead")
SWITCHED_ON = {  # by `decode`
    "eager": (),
    "graph_plain": ("graph",),
    "compile": ("compile",),
    "graph": ("graph", "compile"),
}
WIDTH, LEFT, ROW, BAR = 820, 90, 26, 18  # pixels: of the lanes, before them, of each
DEVICE_HEIGHT = 52
WAITS = "read"  # the phase in which the host waits

Spans = Sequence[tuple[float, float]]


class Lanes(NamedTuple):
    """A few steps of one setting.

    Attributes:
        name: of the setting.
        switches: those of `SWITCHES` that are on.
        host: by phase, (begin, duration) in microseconds.
        device: the same of the times in which kernels ran; neighbours may be one span.
        density: the share of these spans in which kernels ran, on average.
        end: of the last step, in microseconds.
        caption: how long a step takes, and how much of it the device is busy.
    """

    name: str
    switches: tuple[str, ...]
    host: Mapping[str, Spans]
    device: Spans
    density: float
    end: float
    caption: str


def read_lanes(
    settings: Mapping[str, Mapping[str, Any]], num_requests: int
) -> list[Lanes]:
    """The traces of a recording, in the order of the recording.

    Args:
        settings: of the section `timeline`.
        num_requests: of the steps that are shown.

    Raises:
        ValueError: if no setting has a trace of so many requests.
    """
    found = []
    for name, setting in settings.items():
        options = setting["options"]
        on = SWITCHED_ON[options["decode"]]
        on += ("run-ahead",) if options["async_scheduling"] else ()
        for row in setting["rows"]:
            if row["requests"] != num_requests or "trace" not in row:
                continue
            trace, step = row["trace"], row["host_us"]["total"]
            num_steps = len(read_spans(trace["host"]["schedule"]))
            caption = (
                f"{name}: a step takes {step / 1e3:.2f} ms, and kernels run for "
                f"{trace['busy_us_per_step'] / 1e3:.2f} ms of it."
            )
            host = {phase: read_spans(trace["host"][phase]) for phase in PHASES}
            device, end = read_spans(trace["device"]), trace["us_per_step"] * num_steps
            shown = sum(length for _, length in device)
            busy = trace["busy_us_per_step"] * num_steps
            density = min(1.0, busy / shown) if shown else 0.0
            found.append(Lanes(name, on, host, device, density, end, caption))
    if not found:
        raise ValueError(f"no setting has a trace of {num_requests} requests.")
    return found


def find_busy_shares(lanes: Lanes, num_bins: int) -> list[float]:
    """The share of each bin of the time from 0 to `end` in which kernels ran.

    Args:
        lanes: whose device is asked for; its spans do not overlap.
        num_bins: all equally long.
    """
    width = lanes.end / num_bins
    shares = [0.0] * num_bins
    for begin, duration in lanes.device:
        stop = min(begin + duration, lanes.end)
        i = int(begin / width)
        while i < num_bins and i * width < stop:
            inside = min(stop, (i + 1) * width) - max(begin, i * width)
            shares[i] += max(inside, 0.0) / width
            i += 1
    return [min(share, 1.0) * lanes.density for share in shares]


def draw_lanes(ax: Axes, lanes: Lanes, end: float | None = None) -> None:
    """The lanes of one setting, the device's as high as the share in which it is busy.

    Args:
        ax: where to draw.
        lanes: of the setting.
        end: of the axis, in microseconds; None: of the lanes.
    """
    for y, phase in enumerate(PHASES):
        look = HOST.bar | ({"facecolor": "white"} if phase == WAITS else {})
        spans = [(begin / 1e3, length / 1e3) for begin, length in lanes.host[phase]]
        ax.broken_barh(spans, (y - 0.35, 0.7), **look | {"hatch": ""})
    shares = find_busy_shares(lanes, 400)
    edges = [lanes.end / 1e3 * i / 400 for i in range(400)]
    base, tops = 5.35, [5.35 - 1.4 * share for share in shares]
    ax.fill_between(edges, tops, base, step="post", color=DEVICE.colour, linewidth=0)
    ax.set_yticks([*range(len(PHASES)), 4.7], [*PHASES, "device"])
    ax.set(xlim=(0, (end or lanes.end) / 1e3), ylim=(5.5, -0.5))
    ax.grid(axis="y", visible=False)


class Timeline:
    """Shown by a notebook as lanes with a switch for each cure, and as a picture of two settings.

    Args:
        settings: of the section `timeline`.
        num_requests: of the steps that are shown.

    Raises:
        ValueError: if no setting has a trace of so many requests.
    """

    def __init__(
        self, settings: Mapping[str, Mapping[str, Any]], num_requests: int
    ) -> None:
        self.lanes = read_lanes(settings, num_requests)

    def __repr__(self) -> str:
        return f"a timeline of {len(self.lanes)} settings, with switches in JupyterLab"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {
            "text/html": self.to_html(),
            "image/png": self.to_png(),
            "text/plain": repr(self),
        }

    def to_png(self) -> bytes:
        """The first setting and the last on one axis, and the last as wide as possible."""
        first, last = self.lanes[0], self.lanes[-1]
        end = max(first.end, last.end)
        figure, axes = plt.subplots(3, 1, figsize=(8, 6.4))
        wide = f"{last.name}, as wide as possible"
        for ax, lanes, until, title in (
            (axes[0], first, end, first.caption),
            (axes[1], last, end, last.caption),
            (axes[2], last, last.end, wide),
        ):
            draw_lanes(ax, lanes, until)
            ax.set_title(title, fontsize=10)
        axes[-1].set_xlabel("ms, under the profiler")
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=110)
        plt.close(figure)
        return target.getvalue()

    def to_html(self) -> str:
        """All settings, of which the first is drawn and the others wait for the script."""
        longest = max(lanes.end for lanes in self.lanes)
        groups, moments = [], {}
        for i, lanes in enumerate(self.lanes):
            key = "".join(str(int(name in lanes.switches)) for name in SWITCHES)
            hidden = "" if i == 0 else ' display="none"'
            shrunk = lanes.end / longest
            groups.append(
                f'<g data-s="{key}" transform="translate({LEFT} 0) scale({shrunk:.4f} 1)"'
                f"{hidden}>{draw_shapes(lanes)}</g>"
            )
            moments[key] = {
                "says": lanes.caption,
                "shrunk": round(shrunk, 4),
                "end": round(lanes.end / 1e3, 2),
            }
        names = [*PHASES, "device"]
        middles = [ROW * i + ROW / 2 for i in range(len(PHASES))]
        middles.append(ROW * len(PHASES) + DEVICE_HEIGHT / 2 + 4)
        heads = "".join(
            f'<text x="{LEFT - 8}" y="{y:g}" dy=".35em" text-anchor="end">{name}</text>'
            for name, y in zip(names, middles, strict=True)
        )
        body = "\n".join([heads, *groups])
        digest = hashlib.sha256(repr((body, moments)).encode()).hexdigest()[:10]
        switches = " ".join(
            f'<label><input type="checkbox" value="{name}"/> {name}</label>'
            for name in SWITCHES
        )
        return PAGE.format(
            name=digest,
            width=LEFT + WIDTH + 10,
            height=ROW * len(PHASES) + DEVICE_HEIGHT + 34,
            bottom=ROW * len(PHASES) + DEVICE_HEIGHT + 28,
            left=LEFT,
            right=LEFT + WIDTH,
            body=body,
            first=html.escape(self.lanes[0].caption),
            switches=switches,
            end=f"{longest / 1e3:.2f}",
            order=json.dumps([*moments]),
            moments=json.dumps(moments, ensure_ascii=False).replace("<", "\\u003c"),
        )


def draw_shapes(lanes: Lanes) -> str:
    """The lanes of one setting as SVG, as wide as all lanes may be."""
    scale = WIDTH / lanes.end
    shapes = []
    for i, phase in enumerate(PHASES):
        fill = "white" if phase == WAITS else HOST.colour
        top = ROW * i + (ROW - BAR) / 2
        for begin, length in lanes.host[phase]:
            x, width = round(begin * scale, 1), round(max(length * scale, 0.5), 1)
            shapes.append(
                f'<rect x="{x:g}" y="{top:g}" width="{width:g}" height="{BAR}" '
                f'fill="{fill}" stroke="black" stroke-width=".8" '
                'vector-effect="non-scaling-stroke"/>'
            )
    bottom = ROW * len(PHASES) + DEVICE_HEIGHT + 4
    path, height = [f"M0 {bottom}"], 0
    for share in find_busy_shares(lanes, WIDTH):
        wanted = round(share * DEVICE_HEIGHT)
        path.append(f"v{height - wanted}h1" if wanted != height else "h1")
        height = wanted
    shapes.append(f'<path fill="{DEVICE.colour}" d="{"".join(path)}v{height}z"/>')
    return "".join(shapes)


PAGE = """\
<div class="folo-moving" id="folo-{name}">
<style>
#folo-{name} svg {{ max-width: 100%; height: auto; background: white; }}
#folo-{name} text {{ font: 14px sans-serif; }}
#folo-{name} label {{ margin-right: 1em; }}
</style>
<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
{body}
<text x="{left}" y="{bottom}">0</text>
<text class="end" x="{right}" y="{bottom}" text-anchor="end">{end} ms</text>
</svg>
<p class="says" aria-live="polite">{first}</p>
<p class="knobs" hidden>
<button type="button" class="back" data-lm-suppress-shortcuts="true">Back</button>
<button type="button" class="next" data-lm-suppress-shortcuts="true">Next</button>
{switches}
<label><input type="checkbox" value="zoom"/> as wide as possible</label></p>
<script>
(() => {{
  const moments = {moments}, order = {order}, longest = "{end} ms";
  for (const root of document.querySelectorAll("#folo-{name}:not([data-ready])")) {{
    root.dataset.ready = "";
    const boxes = [...root.querySelectorAll("input")], zoom = boxes.pop();
    const read = () => boxes.map((box) => Number(box.checked)).join("");
    const show = () => {{
      const key = read();
      const now = moments[key];
      for (const lanes of root.querySelectorAll("[data-s]")) {{
        lanes.setAttribute("display", lanes.dataset.s === key ? "inline" : "none");
        const scale = zoom.checked ? 1 : moments[lanes.dataset.s].shrunk;
        lanes.setAttribute("transform", `translate({left} 0) scale(${{scale}} 1)`);
      }}
      root.querySelector(".says").textContent = now ? now.says : "This was not recorded.";
      root.querySelector(".end").textContent =
        now && zoom.checked ? `${{now.end}} ms` : longest;
    }};
    const go = (by) => {{
      const at = Math.max(0, order.indexOf(read()) + by);
      const key = order[Math.min(at, order.length - 1)];
      boxes.forEach((box, i) => {{ box.checked = key[i] === "1"; }});
      show();
    }};
    root.querySelector(".back").onclick = () => go(-1);
    root.querySelector(".next").onclick = () => go(1);
    for (const box of [...boxes, zoom]) box.onchange = show;
    root.querySelector(".knobs").hidden = false;
    show();
  }}
}})();
</script>
</div>
"""
