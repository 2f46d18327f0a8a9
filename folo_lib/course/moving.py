"""Figures that move without a kernel: boxes that step from one state of an engine to the next.

    from folo_lib.course.moving import MovingFigure, Piece, State

    MovingFigure([State([Piece("a", 0, 0, text="A")], "A waits."), ...], size=(12, 4))

HTML with inline SVG and a small script of our own; nothing is fetched. Where scripts or SVG are
taken out, as on GitHub and in notebooks that are not trusted, one state stays as a still picture,
the first unless another says more. Boxes keep their key from state to state, and so they glide to
their new places.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from folo_lib.course.figures import DECODE, PREFILL, Look, Point, draw_box, ink_on

__all__ = ["MovingFigure", "Piece", "State", "move_requests"]

PIXELS = 44  # of a box of size 1 in the SVG
PATTERNS = {  # what matplotlib calls a hatch, as lines in a square of 8 by 8
    ".": '<circle cx="2" cy="2" r=".9"/><circle cx="6" cy="6" r=".9"/>',
    "/": '<path d="M-2 2l4-4M0 8l8-8M6 10l4-4"/>',
    "\\": '<path d="M-2 6l4 4M0 0l8 8M6-2l4 4"/>',
    "x": '<path d="M0 8l8-8M0 0l8 8"/>',
}
NAMES = {".": "dots", "/": "rising", "\\": "falling", "x": "crossed"}


class Piece(NamedTuple):
    """A box with text, or text alone.

    Attributes:
        key: who it is; the same piece in another state has the same key and size.
        x, y: of the corner at the top left; y grows downwards.
        width, height: in the same units as `size` of the figure.
        text: written in its middle; nothing is drawn around it if `look` is None.
        look: colour and hatch, as everywhere in the course.
    """

    key: str
    x: float
    y: float
    width: float = 1
    height: float = 1
    text: str = ""
    look: Look | None = None


class State(NamedTuple):
    """What is to be seen at one moment, and a sentence that says it."""

    pieces: Sequence[Piece]
    caption: str


class MovingFigure:
    """Shown by a notebook as HTML that moves, with one of its states as a picture.

    Args:
        states: in their order, at least one.
        size: width and height, in units of boxes.
        still: drawn in every state, below the pieces.
        seconds: from one state to the next when it plays by itself.
        pictured: index of the state that is shown where nothing moves.

    Raises:
        ValueError: if there is no state, or two pieces of a state have the same key.
    """

    def __init__(
        self,
        states: Sequence[State],
        size: Point,
        still: Sequence[Piece] = (),
        seconds: float = 1.5,
        pictured: int = 0,
    ) -> None:
        if not states:
            raise ValueError("a moving figure needs at least one state.")
        for state in states:
            keys = [piece.key for piece in state.pieces]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise ValueError(f"in {state.caption!r} these keys come twice: {twice}")
        self.states, self.size = list(states), size
        self.still, self.seconds = list(still), seconds
        self.pictured = self.states[pictured]

    def __repr__(self) -> str:
        return f"a figure of {len(self.states)} states, which moves in JupyterLab"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {
            "text/html": self.to_html(),
            "image/png": self.to_png(),
            "text/plain": repr(self),
        }

    def to_png(self) -> bytes:
        """The state that is shown where nothing moves."""
        width, height = self.size
        figure, ax = plt.subplots(figsize=(8, 8 * height / width))
        fontsize = min(9, 165 / width)  # in a wide figure the boxes are small
        for piece in [*self.still, *self.pictured.pieces]:
            x, y, text = piece.x, piece.y, piece.text
            if piece.look is None:
                middle = x + piece.width / 2, y + piece.height / 2
                ax.text(*middle, text, ha="center", va="center", fontsize=fontsize)
            else:
                extent = piece.width, piece.height
                draw_box(ax, (x, y), extent, text, fontsize=fontsize, **piece.look.bar)
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=110)
        plt.close(figure)
        return target.getvalue()

    def to_html(self) -> str:
        """All states, of which one is drawn and the others wait for the script."""
        width, height = (round(PIXELS * side) for side in self.size)
        keys: dict[tuple[Any, ...], int] = {}
        drawn: dict[int, Piece] = {}
        moments: list[dict[str, Any]] = []
        shown: set[int] = set()
        for state in self.states:
            places: dict[int, Point] = {}
            for piece in state.pieces:
                # A piece that changes its looks or text is another: one fades, one appears.
                parts = piece.key, piece.text, piece.width, piece.height, piece.look
                number = keys.setdefault(parts, len(keys))
                if number not in drawn or state is self.pictured:
                    drawn[number] = piece
                place = round(PIXELS * piece.x, 1), round(PIXELS * piece.y, 1)
                places[number] = place
            moments.append({"says": state.caption, "at": places})
            if state is self.pictured:
                shown = set(places)
        body = [draw_piece(piece, "", True) for piece in self.still]
        body += [
            draw_piece(piece, f'data-k="{i}" ', i in shown)
            for i, piece in drawn.items()
        ]
        name = hashlib.sha256(repr((body, moments)).encode()).hexdigest()[:10]
        first = html.escape(self.pictured.caption)
        return PAGE.format(
            name=name,
            width=width,
            height=height,
            patterns=draw_patterns(name),
            body="\n".join(body).replace("url(#", f"url(#{name}-"),
            first=first,
            last=len(self.states) - 1,
            # "<" would end the script if a caption held a tag.
            moments=json.dumps(moments, ensure_ascii=False).replace("<", "\\u003c"),
            pause=round(1000 * self.seconds),
        )


def draw_patterns(name: str) -> str:
    """The hatches of the course as SVG."""
    return "".join(
        f'<pattern id="{name}-{NAMES[mark]}" width="8" height="8" '
        'patternUnits="userSpaceOnUse" stroke="black" stroke-width=".8">'
        f"{lines}</pattern>"
        for mark, lines in PATTERNS.items()
    )


def draw_piece(piece: Piece, mark: str, is_shown: bool) -> str:
    """A piece as a group of SVG, moved to its place."""
    width, height = round(PIXELS * piece.width, 1), round(PIXELS * piece.height, 1)
    x, y = round(PIXELS * piece.x, 1), round(PIXELS * piece.y, 1)
    shapes, ink, halo = "", "black", ""
    if piece.look is not None:
        frame = f'<rect width="{width:g}" height="{height:g}" rx="3" '
        shapes = f'{frame}fill="{piece.look.colour}" stroke="black"/>'
        ink = ink_on(piece.look.colour)
        if piece.look.hatch:
            shapes += f'{frame}fill="url(#{NAMES[piece.look.hatch[0]]})"/>'
            halo = f' stroke="{piece.look.colour}" stroke-width="5"'
    if piece.text:
        middle = f'x="{width / 2:g}" y="{height / 2:g}" dy=".35em"'
        text = html.escape(piece.text)
        shapes += f'<text {middle} fill="{ink}"{halo}>{text}</text>'
    hidden = "" if is_shown else ' opacity="0"'
    return f'<g {mark}transform="translate({x:g} {y:g})"{hidden}>{shapes}</g>'


WAITS = Look("white", "", "", "")


def move_requests(
    plans: Sequence[Mapping[str, int]], arrivals: Mapping[str, int]
) -> MovingFigure:
    """Requests that wait, join a batch, leave it and are done, one state for each step.

    Args:
        plans: for each step, how many tokens of which request run, in their order.
        arrivals: the step before which each request comes, counted from 0.
    """
    last = {name: i for i, plan in enumerate(plans) for name in plan}
    states = []
    for i, plan in enumerate(plans):
        here = [
            name for name, step in arrivals.items() if step <= i and last[name] >= i
        ]
        waiting = [name for name in here if name not in plan]
        done = [name for name in last if last[name] < i]
        pieces = []
        for x, names in ((0.5, waiting), (3, list(plan)), (14, done)):
            pieces += [
                Piece(name, x, 1 + 1.2 * y, text=name, look=WAITS)
                for y, name in enumerate(names)
            ]
        for y, (name, count) in enumerate(plan.items()):
            look = DECODE if count == 1 else PREFILL
            place, width = (4.2, 1.05 + 1.2 * y), min(9.0, 0.7 + 0.25 * count)
            pieces.append(Piece(f"{name} runs", *place, width, 0.9, f"{count}", look))
        runs = ", ".join(f"{name} {count}" for name, count in plan.items())
        total = sum(plan.values())
        says = f"Step {i + 1} runs {total} token{'s' * (total > 1)}: {runs}."
        if waiting:
            says += f" Waiting: {', '.join(waiting)}."
        states.append(State(pieces, says))
    heads = (
        (0, "waiting"),
        (2.5, "in the step"),
        (6, "tokens that run"),
        (13.5, "done"),
    )
    still = [Piece(text, x, 0, 2, 0.9, text) for x, text in heads]
    bottom = max(piece.y for state in states for piece in state.pieces)
    return MovingFigure(states, (16, bottom + 1.3), still)


PAGE = """\
<div class="folo-moving" id="folo-{name}">
<style>
#folo-{name} svg {{ max-width: 100%; height: auto; background: white; }}
#folo-{name} text {{ font: 14px sans-serif; text-anchor: middle; paint-order: stroke; }}
#folo-{name} [data-k] {{ transition: transform .5s, opacity .5s; }}
@media (prefers-reduced-motion: reduce) {{
  #folo-{name} [data-k] {{ transition: none; }}
}}
</style>
<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<defs>{patterns}</defs>
{body}
</svg>
<p class="says" aria-live="polite">{first}</p>
<p class="knobs" hidden>
<button type="button" class="back" data-lm-suppress-shortcuts="true">Back</button>
<button type="button" class="play" data-lm-suppress-shortcuts="true">Play</button>
<button type="button" class="next" data-lm-suppress-shortcuts="true">Next</button>
<input type="range" min="0" max="{last}" value="0" aria-label="state" data-lm-suppress-shortcuts="true">
</p>
<script>
(() => {{
  const moments = {moments};
  for (const root of document.querySelectorAll("#folo-{name}:not([data-ready])")) {{
    root.dataset.ready = "";
    const find = (what) => root.querySelector(what);
    const range = find("input"), play = find(".play");
    let now = 0, timer = 0;
    const show = (to) => {{
      now = Math.max(0, Math.min(moments.length - 1, to));
      range.value = now;
      find(".says").textContent = moments[now].says;
      for (const piece of root.querySelectorAll("[data-k]")) {{
        const place = moments[now].at[piece.dataset.k];
        piece.style.opacity = place ? 1 : 0;
        if (place) piece.style.transform = `translate(${{place[0]}}px, ${{place[1]}}px)`;
      }}
    }};
    const stop = () => {{
      clearInterval(timer);
      timer = 0;
      play.textContent = "Play";
    }};
    const go = (to) => {{ stop(); show(to); }};
    find(".back").onclick = () => go(now - 1);
    find(".next").onclick = () => go(now + 1);
    range.oninput = () => go(Number(range.value));
    play.onclick = () => {{
      if (timer) return stop();
      show(now + 1 < moments.length ? now + 1 : 0);
      play.textContent = "Pause";
      timer = setInterval(() => {{
        if (!root.isConnected || now + 1 >= moments.length) return stop();
        show(now + 1);
      }}, {pause});
    }};
    find(".knobs").hidden = false;
    show(0);
  }}
}})();
</script>
</div>
"""
