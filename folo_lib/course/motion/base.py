"""What the figures that are moved by hand share: a drawing, a question, knobs, and their script.

The drawing is what stands where scripts are stripped, on paper too, so it shows an example that
tells what there is to see. Before it asks, a script may go back to a beginning that does not give
it away.

A figure is a `Canvas` with named pieces, some knobs of HTML below it, and a few lines of
script that read the knobs and change the pieces. What every script needs (finding a piece,
dragging it by pointer or arrow keys, saying a sentence) is `KIT`. The canvas is drawn twice:
as SVG, which follows the theme of the page around it, and as a picture for where no HTML is shown.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from folo_lib.course.figures import BLUE, Look, Point, ink_on
from folo_lib.course.moving import NAMES, draw_patterns

__all__ = [
    "INK",
    "Canvas",
    "Guess",
    "Motion",
    "button",
    "select",
    "slider",
    "percent",
    "player",
    "round_all",
    "text_field",
    "to_json",
]

INK = "currentColor"
"""The colour of letters and lines: that of the page's text, dark or light."""

DASHES = {"": "", "--": "6 4", ":": "2 3"}


class Shape(NamedTuple):
    """A piece of a drawing.

    Attributes:
        kind: "box", "line", "circle" or "text".
        key: by which the script finds it; "" if it stays as it is.
        at: its place: the corner of a box at the top left, the middle of a circle.
        size: of a box; the radius of a circle, twice.
        path: the points of a line.
        text: of a box, a circle or a text.
        look: colour and hatch; None: no ground, and an edge.
        style: `colour`, `width`, `dash`, `font`, `mono`, `anchor`, `bold`, `turn`, `alpha`,
            `label`, `role`, `closed`, `fill`, `glides`.
    """

    kind: str
    key: str
    at: Point
    size: Point
    path: Sequence[Point]
    text: str
    look: Look | None
    style: Mapping[str, Any]


class Canvas:
    """Shapes in pixels, y downwards, in the order in which they cover each other.

    Args:
        width, height: of the whole. A canvas of 340 pixels is not shrunk on a phone.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.shapes: list[Shape] = []

    def box(
        self,
        at: Point,
        size: Point,
        text: object = "",
        look: Look | None = None,
        key: str = "",
        **style: Any,
    ) -> None:
        """A box with text in its middle. With a `label` it can be focused and is a button."""
        shape = Shape("box", key, at, size, [], str(text), look, style)
        self.shapes.append(shape)

    def circle(
        self, at: Point, radius: float, look: Look, key: str = "", **style: Any
    ) -> None:
        """A dot."""
        size = radius, radius
        self.shapes.append(Shape("circle", key, at, size, [], "", look, style))

    def line(self, path: Sequence[Point], key: str = "", **style: Any) -> None:
        """Straight from point to point."""
        self.shapes.append(Shape("line", key, (0, 0), (0, 0), path, "", None, style))

    def text(self, at: Point, text: object, key: str = "", **style: Any) -> None:
        """A line of text with its middle at `at`, or its `anchor`, "start" or "end"."""
        shape = Shape("text", key, at, (0, 0), [], str(text), None, style)
        self.shapes.append(shape)

    def to_svg(self, name: str, label: str) -> str:
        """The drawing as SVG, whose hatches belong to the figure called `name`."""
        body = "\n".join(draw_shape(shape) for shape in self.shapes)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="group" aria-label="{html.escape(label)}">\n'
            f"<defs>{draw_patterns(name)}</defs>\n"
            f"{body.replace('url(#', f'url(#{name}-')}\n</svg>"
        )


def paint(canvases: Sequence[Canvas]) -> bytes:
    """The drawings side by side as a picture, with black ink on white ground."""
    gap = 20
    width = sum(canvas.width for canvas in canvases) + gap * (len(canvases) - 1)
    height = max(canvas.height for canvas in canvases)
    wide = max(width, 500)
    inches = min(8.0, wide / 75)  # letters are as large as in other figures
    left, target = 0.0, io.BytesIO()
    with mpl.rc_context({"figure.constrained_layout.use": False}):
        size = inches, inches * height / wide
        figure = Figure(figsize=size, facecolor="white")
        for canvas in canvases:
            share, high = canvas.width / wide, canvas.height / height
            ax = figure.add_axes((left, 1 - high, share, high))
            for shape in canvas.shapes:
                paint_shape(ax, shape, 72 * inches / wide)
            ax.set(xlim=(0, canvas.width), ylim=(canvas.height, 0))
            ax.axis("off")
            left += share + gap / wide
        figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def draw_shape(shape: Shape) -> str:
    """A shape as SVG. A box is a group that stands at its place, the others are one element."""
    style, look = shape.style, shape.look
    mark = f' data-k="{html.escape(shape.key)}"' if shape.key else ""
    mark += ' data-glides=""' if style.get("glides") else ""
    if "alpha" in style:
        mark += f' opacity="{style["alpha"]:g}"'
    if label := style.get("label"):
        mark += f' tabindex="0" role="{style.get("role", "button")}" '
        mark += f'aria-label="{html.escape(label)}"'
    width = style.get("width", 1.2)
    dash = DASHES[style.get("dash", "")]
    line = f'stroke="{style.get("colour", INK)}" stroke-width="{width:g}"'
    line += f' stroke-dasharray="{dash}"' if dash else ""
    (x, y), (wide, high) = shape.at, shape.size
    if shape.kind == "text":
        return draw_text(shape.text, (x, y), style, mark)
    if shape.kind == "line":
        path = "M" + "L".join(f"{px:g} {py:g}" for px, py in shape.path)
        path += "Z" if style.get("closed") else ""
        fill = style.get("fill", "none")
        return f'<path{mark} d="{path}" fill="{fill}" {line}/>'
    fill = look.colour if look else "transparent"  # a box without ground can be hit too
    if shape.kind == "circle":
        place = f'transform="translate({x:g} {y:g})"'
        return f'<g{mark} {place}><circle r="{wide:g}" fill="{fill}" {line}/></g>'
    frame = f'<rect width="{wide:g}" height="{high:g}" rx="3" '
    inside = f'{frame}fill="{fill}" {line}/>'
    if look and look.hatch:
        inside += f'{frame}fill="url(#{NAMES[look.hatch[0]]})" class="hatch"/>'
    if shape.text or "write" in style:
        ink = {"colour": ink_on(look.colour)} if look else {}
        if look and look.hatch:
            ink["halo"] = look.colour
        inside += draw_text(shape.text, (wide / 2, high / 2), ink | {**style}, "")
    return f'<g{mark} transform="translate({x:g} {y:g})">{inside}</g>'


def draw_text(text: str, at: Point, style: Mapping[str, Any], mark: str) -> str:
    """Text as SVG, of one line or of several."""
    wishes = {
        "fill": style.get("colour"),
        "font-size": f"{style['font']:g}px" if "font" in style else None,
        "font-family": "monospace" if style.get("mono") else None,
        "text-anchor": style.get("anchor"),
        "font-weight": "bold" if style.get("bold") else None,
        "stroke": style.get("halo"),
        "stroke-width": "5px" if "halo" in style else None,
    }
    words = ";".join(f"{name}:{wish}" for name, wish in wishes.items() if wish)
    words = f' style="{words}"' if words else ""
    lines = text.split("\n")
    high = 1.25 * style.get("font", 15)
    spans = "".join(
        f'<tspan x="{at[0]:g}" y="{at[1] + (i - (len(lines) - 1) / 2) * high:g}" '
        f'dy=".35em">{html.escape(line)}</tspan>'
        for i, line in enumerate(lines)
    )
    if turn := style.get("turn"):
        words += f' transform="rotate({turn:g} {at[0]:g} {at[1]:g})"'
    return f"<text{mark}{words}>{spans}</text>"


def paint_shape(ax: Axes, shape: Shape, scale: float) -> None:
    """A shape in axes of pixels; `scale` is points per pixel."""
    style, look = shape.style, shape.look
    alpha = style.get("alpha", 1)
    colour = style.get("colour", INK).replace(INK, "black")
    if alpha == 0:
        return
    edge: dict[str, Any] = {
        "linewidth": scale * style.get("width", 1.2),
        "linestyle": style.get("dash", "") or "-",
        "alpha": alpha,
    }
    (x, y), (wide, high) = shape.at, shape.size
    if shape.kind == "line":
        points = [*shape.path, shape.path[0]] if style.get("closed") else shape.path
        xs, ys = zip(*points, strict=True)
        if (fill := style.get("fill", "none")) != "none":
            ax.fill(xs, ys, color=fill.replace(INK, "black"), linewidth=0, alpha=alpha)
        ax.plot(xs, ys, color=colour, solid_capstyle="butt", **edge)
        return
    fill = look.colour if look else "none"
    if shape.kind == "circle":
        ax.add_patch(Circle((x, y), wide, facecolor=fill, edgecolor=colour, **edge))
    if shape.kind == "box":
        ground = FancyBboxPatch(
            (x, y),
            wide,
            high,
            boxstyle="round,pad=0,rounding_size=3",
            facecolor=fill,
            edgecolor=colour,
            hatch=look.hatch if look else "",
            **edge,
        )
        ax.add_patch(ground)
        x, y = x + wide / 2, y + high / 2
        colour = ink_on(look.colour) if look else "black"
    if shape.text:
        sides = {"start": "left", "middle": "center", "end": "right"}
        halo = {"facecolor": fill, "edgecolor": "none", "pad": 1}
        ax.text(
            x,
            y,
            shape.text.replace("$", r"\$"),
            ha=sides[style.get("anchor", "middle")],
            va="center",
            fontsize=scale * style.get("font", 15) * 0.92,
            family="monospace" if style.get("mono") else "sans-serif",
            fontweight="bold" if style.get("bold") else "normal",
            color=colour,
            alpha=alpha,
            rotation=-style.get("turn", 0),
            rotation_mode="anchor",
            linespacing=1.3,
            bbox=halo if look and look.hatch else None,
        )


# Knobs


def slider(
    key: str, label: str, low: int, high: int, value: int, shown: str = ""
) -> str:
    """A slider over whole numbers; the script writes what it stands for beside it."""
    return (
        f"<label>{html.escape(label)} "
        f'<input type="range" data-knob="{key}" min="{low}" max="{high}" value="{value}"/> '
        f'<output data-shown="{key}">{html.escape(shown or str(value))}</output></label>'
    )


def button(key: str, text: str) -> str:
    """A button."""
    return f'<button type="button" data-knob="{key}">{html.escape(text)}</button>'


def player(last: int) -> list[str]:
    """Buttons and a slider that go from state 0 to `last`; the script calls `player`."""
    track = (
        f'<input type="range" data-knob="step" min="0" max="{last}" value="0" '
        'aria-label="step"/>'
    )
    return [*(button(key, key.title()) for key in ("back", "play", "next")), track]


def select(key: str, label: str, choices: Sequence[str], chosen: int = 0) -> str:
    """A list to choose from; its value is the number of the choice."""
    options = "".join(
        f'<option value="{i}"{" selected=" + chr(34) * 2 if i == chosen else ""}>'
        f"{html.escape(choice)}</option>"
        for i, choice in enumerate(choices)
    )
    return f'<label>{html.escape(label)} <select data-knob="{key}">{options}</select></label>'


def text_field(
    key: str, label: str, text: str, size: int = 30, limit: int = 100
) -> str:
    """A line to type into."""
    return (
        f'<label>{html.escape(label)} <input type="text" data-knob="{key}" '
        f'size="{size}" maxlength="{limit}" value="{html.escape(text)}" '
        'spellcheck="false" autocomplete="off"/></label>'
    )


class Guess(NamedTuple):
    """A question to be answered before the figure moves.

    Attributes:
        question: what will happen.
        choices: the answers.
        right: which of them it is, counted from 0.
        because: the answer as a whole sentence, and its reason.
    """

    question: str
    choices: Sequence[str]
    right: int
    because: str

    def to_html(self) -> str:
        """Buttons for where scripts run, and an answer to unfold for where they do not."""
        buttons = "".join(
            f'<button type="button" class="guess">{html.escape(choice)}</button>\n'
            for choice in self.choices
        )
        return (
            f'<p class="asks">{html.escape(self.question)}</p>\n'
            f'<p class="guesses" hidden="">{buttons}</p>\n'
            f'<details class="answer"><summary>The answer</summary>'
            f"<p>{html.escape(self.because)}</p></details>"
        )


def to_json(what: Any) -> str:
    """JSON for a script, in which no text can end the script."""
    text = json.dumps(what, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def round_all(numbers: Any, digits: int) -> Any:
    """Nested lists of numbers, rounded, so that they are the same on every machine."""
    if isinstance(numbers, list):
        return [round_all(number, digits) for number in numbers]
    rounded = round(float(numbers), digits)
    if not math.isfinite(rounded):
        raise ValueError(f"{numbers} cannot be drawn.")
    return int(rounded) if rounded == int(rounded) else rounded


def percent(share: float) -> str:
    """As the script writes it: 34 %, and never 0 % or 100 % of what is less or more."""
    if 0 < share < 0.005:
        return "< 1 %"
    return "> 99 %" if 0.995 < share < 1 else f"{share:.0%}".replace("%", " %")


class Motion:
    """Shown by a notebook as HTML that a reader moves, and as a picture.

    Args:
        name: what it is called, as text and for those who do not see it.
        canvases: what is seen without the script, in one drawing or in several, side by side if
            there is room.
        says: a sentence that says what is seen there.
        knobs: HTML of the controls.
        script: reads the knobs and changes the pieces; see `KIT` for what it can use.
        facts: what the script calls `data`.
        guess: asked before the knobs appear.
        says_first: the sentence stands above the drawing and not below it.
    """

    def __init__(
        self,
        name: str,
        canvases: Canvas | Sequence[Canvas],
        says: str,
        knobs: Sequence[str],
        script: str,
        facts: Mapping[str, Any],
        guess: Guess | None = None,
        says_first: bool = False,
    ) -> None:
        self.name, self.says = name, says
        self.canvases = [canvases] if isinstance(canvases, Canvas) else [*canvases]
        self.knobs, self.script, self.facts = list(knobs), script, facts
        self.guess, self.says_first = guess, says_first

    def __repr__(self) -> str:
        return f"{self.name}: a figure to be moved by hand in JupyterLab"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {
            "text/html": self.to_html(),
            "image/png": paint(self.canvases),
            "text/plain": repr(self),
        }

    def to_html(self) -> str:
        """All of it; nothing is fetched."""
        facts = to_json({**self.facts, "right": self.guess.right if self.guess else -1})
        asks = self.guess.to_html() if self.guess else ""
        bare = [canvas.to_svg("", "") for canvas in self.canvases]
        parts = bare, facts, self.script, self.says, asks
        name = "folo-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
        knobs = "\n".join(self.knobs)
        drawings = "\n".join(
            canvas.to_svg(f"{name}-{i}", self.name)
            for i, canvas in enumerate(self.canvases)
        )
        drawn = f'<div class="drawn">{drawings}</div>\n'
        says = f'<p class="says" aria-live="polite">{html.escape(self.says)}</p>\n'
        middle = says + drawn if self.says_first else drawn + says
        return (
            f'<div class="folo-moving" id="{name}">\n'
            f"<style>\n{CSS.replace('ROOT', '#' + name)}</style>\n{asks}\n"
            f"{middle}"
            f'<p class="knobs" hidden="">\n{knobs}\n</p>\n'
            f"<script>\n(() => {{\nconst data = {facts};\nfor (const root of document"
            f'.querySelectorAll("#{name}:not([data-ready])")) {{\n'
            f"{KIT}{self.script.strip()}\n}}\n}})();\n</script>\n</div>\n"
        )


CSS = (
    """\
ROOT { max-width: 46em; color: inherit; font: 15px/1.5 sans-serif; }
ROOT .drawn { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: flex-start; }
ROOT svg { display: block; max-width: 100%; height: auto; overflow: visible; }
ROOT svg text { font: 15px sans-serif; fill: currentColor; text-anchor: middle; paint-order: stroke; }
ROOT p { margin: .5em 0; }
ROOT .knobs:not([hidden]), ROOT .guesses:not([hidden]) {
  display: flex; flex-wrap: wrap; gap: .5em 1.2em; align-items: center; }
ROOT .asks { font-weight: bold; }
ROOT label { display: inline-flex; gap: .5em; align-items: center; }
ROOT output { min-width: 2em; font-variant-numeric: tabular-nums; }
ROOT .says { min-height: 3em; font-variant-numeric: tabular-nums; }
ROOT button, ROOT select, ROOT input[type=text] { font: inherit; color: inherit; background: transparent;
  border: 1.5px solid currentColor; border-radius: 6px; padding: .15em .7em; max-width: 100%; }
ROOT select option { color: black; background: white; }
ROOT button, ROOT [data-grip] { cursor: pointer; }
ROOT input[type=range] { accent-color: BLUE; width: 10em; }
ROOT button[aria-pressed=true] { background: BLUE; border-color: BLUE; color: white; }
ROOT button:disabled { opacity: .45; cursor: default; }
ROOT :focus-visible { outline: 3px solid BLUE; outline-offset: 2px; }
ROOT [data-grip] { touch-action: none; }
ROOT [data-glides]:not(.held) { transition: transform .4s, opacity .4s; }
@media (prefers-reduced-motion: reduce) { ROOT [data-glides] { transition: none; } }
"""
).replace("BLUE", BLUE)

KIT = """\
root.dataset.ready = "";
const find = (what) => root.querySelector(what), all = (what) => [...root.querySelectorAll(what)];
// JupyterLab would take the arrow keys for itself.
for (const one of all("button, input, select, summary, [tabindex]")) one.dataset.lmSuppressShortcuts = "true";
const piece = (key) => find(`[data-k="${key}"]`), knob = (key) => find(`[data-knob="${key}"]`);
const set = (key, changes) => {
  for (const [name, value] of Object.entries(changes)) piece(key).setAttribute(name, value);
};
const place = (key, x, y) => { piece(key).style.transform = `translate(${x}px, ${y}px)`; };
const widen = (key, width) => {
  for (const rect of piece(key).querySelectorAll("rect")) rect.setAttribute("width", width);
};
const shift = (key, x) => piece(key).querySelector("tspan").setAttribute("x", x);
const write = (key, text) => {
  const spans = piece(key).querySelectorAll("tspan");
  String(text).split("\\n").forEach((line, i) => { spans[i].textContent = line; });
};
const show = (key, is) => set(key, {opacity: is === true ? 1 : Number(is)});
const says = (text) => { find(".says").textContent = text; };
const shown = (key, text) => { find(`[data-shown="${key}"]`).textContent = text; };
const value = (key) => Number(knob(key).value);
const on = (key, change) => {
  knob(key).addEventListener(knob(key).type === "button" ? "click" : "input", change);
};
const arrows = (element, nudge) => element.addEventListener("keydown", (event) => {
  const ways = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  if (!ways[event.key]) return;
  event.preventDefault();
  nudge(...ways[event.key]);
});
const drag = (element, move, drop = () => {}) => {
  element.dataset.grip = "";
  element.addEventListener("pointerdown", (event) => {
    const turn = element.ownerSVGElement.getScreenCTM().inverse();
    const where = (at) => new DOMPoint(at.clientX, at.clientY).matrixTransform(turn);
    const begin = where(event);
    const follow = (at) => move(where(at).x, where(at).y, begin);
    const end = () => {
      element.classList.remove("held");
      element.removeEventListener("pointermove", follow);
      drop();
    };
    event.preventDefault();
    element.focus();
    element.classList.add("held");
    element.setPointerCapture(event.pointerId);
    element.addEventListener("pointermove", follow);
    element.addEventListener("lostpointercapture", end, {once: true});
  });
};
const press = (element, act) => {
  element.dataset.grip = "";
  element.addEventListener("click", act);
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    act();
  });
};
const softmax = (scores) => {
  const top = Math.max(...scores), powers = scores.map((score) => Math.exp(score - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
};
const percent = (share) => share > .995 && share < 1 ? "> 99 %" :
  share < .005 && share > 0 ? "< 1 %" : `${Math.round(100 * share)} %`;
const signed = (number, digits) => number.toFixed(digits).replace("-", "−");
const player = (draw, pause = 1200) => {
  const track = knob("step"), button = knob("play");
  let timer = 0;
  const go = (to) => {
    const last = Number(track.max);
    track.value = Math.max(0, Math.min(last, to));
    knob("back").disabled = Number(track.value) === 0;
    knob("next").disabled = Number(track.value) === last;
    draw(Number(track.value));
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  };
  on("back", () => { stop(); go(value("step") - 1); });
  on("next", () => { stop(); go(value("step") + 1); });
  on("step", () => { stop(); go(value("step")); });
  on("play", () => {
    if (timer) return stop();
    go(value("step") < track.max ? value("step") + 1 : 0);
    button.textContent = "Pause";
    timer = setInterval(() => {
      if (!root.isConnected || value("step") >= track.max) return stop();
      go(value("step") + 1);
    }, pause);
  });
  go(value("step"));
  return go;
};
const reveal = (open) => {
  // Once somebody has guessed, or at once where nothing is asked.
  if (data.right < 0) {
    find(".knobs").hidden = false;
    return open();
  }
  const buttons = all(".guess"), answer = find(".answer");
  answer.hidden = true;
  find(".guesses").hidden = false;
  buttons.forEach((button, i) => button.addEventListener("click", () => {
    buttons.forEach((one) => one.setAttribute("aria-pressed", one === button));
    answer.querySelector("summary").textContent =
      i === data.right ? "Yes, so it is." : `No, the answer is “${buttons[data.right].textContent}”.`;
    answer.hidden = false;
    answer.open = true;
    if (!find(".knobs").hidden) return;
    find(".knobs").hidden = false;
    open();
  }));
};
"""
