"""Page 01: a query that is dragged among keys, and a mask that follows S and T."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch

from folo_lib.course.figures import CACHE, KEYS, QUERIES, Look, Point
from folo_lib.course.motion.base import (
    Canvas,
    Guess,
    Motion,
    button,
    percent,
    round_all,
    slider,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["drag_query", "slide_mask"]

Box = tuple[float, float, float, float]  # left, top, right, bottom
MIDDLE, RADIUS = (170, 175), 150  # of the plane, in pixels
DOT, RING, FONT = 5, 10, 14  # of a key, of the winner's, and of the words beside them
LEFT, TOP, ROW, BAR = 60, 24, 22, 130  # of the weights: their bars, and the longest bar


def find_plane(query: Tensor, keys: Tensor) -> Tensor:
    """Two directions of length 1: the query's, and the one in which the keys differ most.

    A query in this plane scores every key exactly as in all `D` dimensions, because what a key
    has outside the plane is at right angles to it.

    Args:
        query: `[D]`.
        keys: `[T, D]`.

    Returns:
        `[2, D]`.
    """
    first = query / query.norm()
    rest = keys - (keys @ first)[:, None] * first
    second = torch.linalg.svd(rest - rest.mean(dim=0)).Vh[0]
    second = second - (second @ first) * first
    second = second / second.norm()
    if float((keys @ second)[0]) < 0:  # either sign would do: let it be the same always
        second = -second
    return torch.stack((first, second))


def place_labels(
    spots: Sequence[Point], words: Sequence[str]
) -> list[tuple[Point, str]]:
    """Where words stand beside their dots so that they cover neither dots nor each other.

    A word stands on the side that looks away from the middle. Where something is in its way, it
    stands higher or lower, or on the other side.

    Returns:
        For each word its place and its anchor.
    """
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in spots]
    labels = []
    for (x, y), word in zip(spots, words, strict=True):
        wide, outward = 0.65 * FONT * len(word.strip()), x >= MIDDLE[0]
        tries: list[tuple[float, int, Box, Point, str]] = []
        for is_right, rise in product(
            (outward, not outward), (0, 4, -4, 8, -8, 12, -12)
        ):
            edge, line = x + (RING + 2) * (1 if is_right else -1), y + rise
            left = edge if is_right else edge - wide
            box = left, line - FONT / 2, left + wide, line + FONT / 2
            hidden = sum(find_overlap(box, other) for other in taken)
            anchor = "start" if is_right else "end"
            tries.append((hidden, len(tries), box, (edge, line), anchor))
        _, _, box, place, anchor = min(tries)
        taken.append(box)
        labels.append((place, anchor))
    return labels


def find_overlap(one: Box, other: Box) -> float:
    """Of two boxes, in square pixels."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, high)


def drag_query(query: Tensor, keys: Tensor, words: Sequence[str]) -> Motion:
    """A query of a head, to be dragged in a plane, and the weight that each token gets.

    Args:
        query: `[D]`, of the last token.
        keys: `[T, D]`, of that head, for each token.
        words: the text of each token.
    """
    plane = find_plane(query.double(), keys.double())
    scale = query.shape[-1] ** -0.5
    points = keys.double() @ plane.T  # [T, 2]
    start = float(query.double().norm())
    reach = max(start, float(points.norm(dim=-1).max()))
    unit = RADIUS / reach  # pixels
    weights = ((points[:, 0] * start) * scale).softmax(dim=-1).tolist()
    best = max(range(len(words)), key=weights.__getitem__)

    canvas, table = Canvas(340, 350), Canvas(260, TOP + ROW * len(words) + 8)
    x, y = MIDDLE
    canvas.line([(x - 165, y), (x + 165, y)], width=0.6, dash=":")
    canvas.line([(x, y - 165), (x, y + 165)], width=0.6, dash=":")
    spots = [(x + unit * a, y - unit * b) for a, b in points.tolist()]
    for spot in spots:
        canvas.line([MIDDLE, spot], colour=KEYS.colour, width=1)
        canvas.circle(spot, DOT, KEYS)
    for word, (at, side) in zip(words, place_labels(spots, words), strict=True):
        canvas.text(at, word.strip(), anchor=side, font=FONT)
    canvas.circle(spots[best], RING, KEYS._replace(colour="none"), "winner", width=2)
    tip = x + unit * start, y
    canvas.line([MIDDLE, tip], "shaft", colour=QUERIES.colour, width=7)
    canvas.circle(
        tip,
        12,
        QUERIES,
        "tip",
        width=1.5,
        role="slider",
        label="query, moved by the arrow keys",
    )
    table.text((LEFT - 8, 12), "key", anchor="end", font=13)
    table.text((LEFT, 12), "weight", anchor="start", font=13)
    for i, (word, weight) in enumerate(zip(words, weights, strict=True)):
        middle = TOP + ROW * i + ROW / 2
        table.text((LEFT - 8, middle), word.strip(), anchor="end")
        table.box((LEFT, middle - 8), (max(1, BAR * weight), 16), "", KEYS, f"bar{i}")
        end = LEFT + BAR * weight + 8, middle
        table.text(end, percent(weight), f"share{i}", anchor="start")
    name = words[best].strip()
    others = [i for i in range(len(words)) if i != best]
    others.sort(key=lambda i: -weights[i])
    choices = sorted([best, *others[1:4]])
    return Motion(
        "a query among keys",
        [canvas, table],
        f"The query (the broad line) gives “{name}” {percent(weights[best])} of the weight.",
        [button("home", "Back to the model's query")],
        QUERY_SCRIPT,
        {
            "keys": round_all(points.tolist(), 4),
            "words": [word.strip() for word in words],
            "start": round_all(start, 4),
            "scale": scale,
            "unit": round_all(unit, 4),
            "at": MIDDLE,
            "left": LEFT,
            "bar": BAR,
        },
        Guess(
            f"The broad line is the query of the last token, “{words[-1].strip()}”. Which "
            "token will get most of its weight?",
            [words[i].strip() for i in choices],
            choices.index(best),
            f"“{name}” gets {percent(weights[best])}, because its key reaches furthest in the "
            "direction of the query. A long key that stands at right angles to the query "
            "scores nothing. Now drag the tip of the query, or move it with the arrow keys.",
        ),
    )


QUERY_SCRIPT = """
const [cx, cy] = data.at, tip = piece("tip");
let x = data.start, y = 0;
const draw = () => {
  const scores = data.keys.map(([a, b]) => (a * x + b * y) * data.scale);
  const weights = softmax(scores), best = weights.indexOf(Math.max(...weights));
  const px = cx + data.unit * x, py = cy - data.unit * y;
  place("tip", px, py);
  set("shaft", {d: `M${cx} ${cy}L${px} ${py}`});
  weights.forEach((weight, i) => {
    widen(`bar${i}`, Math.max(1, data.bar * weight));
    write(`share${i}`, percent(weight));
    shift(`share${i}`, data.left + data.bar * weight + 8);
    show(`bar${i}`, true); show(`share${i}`, true);
  });
  const [a, b] = data.keys[best];
  place("winner", cx + data.unit * a, cy - data.unit * b);
  show("winner", true);
  const said = `“${data.words[best]}” gets ${percent(weights[best])}: its score is ` +
    `${signed(scores[best], 1)}, the lowest is ${signed(Math.min(...scores), 1)}.`;
  tip.setAttribute("aria-valuetext", said);
  const length = Math.hypot(x, y);
  says(said + (length < .3 * data.start ? " A short query cannot choose: all scores are near 0." :
    length > 1.5 * data.start ? " A long query makes all scores larger, and the choice sharper." : ""));
};
const limit = 165 / data.unit, fit = (a) => Math.max(-limit, Math.min(limit, a));
const move = (a, b) => { x = fit(a); y = fit(b); draw(); };
data.words.forEach((_, i) => { show(`bar${i}`, false); show(`share${i}`, false); });
show("winner", false);
says("Guess first, then the weights appear.");
reveal(() => {
  drag(tip, (px, py) => move((px - cx) / data.unit, (cy - py) / data.unit));
  arrows(tip, (a, b) => move(x + a * limit / 20, y - b * limit / 20));
  on("home", () => move(data.start, 0));
  draw();
});
"""


def slide_mask(words: Sequence[str], num_queries: int = 3) -> Motion:
    """The mask of a step, with sliders for its new tokens, S, and all there are, T.

    Args:
        words: the tokens of a text; T goes up to their number.
        num_queries: S in the first state, at most half the number of words.
    """
    size, cell, left, top = len(words), 22, 62, 62
    canvas = Canvas(left + cell * size + 14, top + cell * size + 6)
    length = size - size // 3
    for i, word in enumerate(words):
        middle = (i + 0.5) * cell
        seen = {} if i < length else {"alpha": 0.2}
        canvas.text(
            (left - 8, top + middle), word.strip(), f"row{i}", anchor="end", **seen
        )
        head = left + middle, top - 8
        canvas.text(head, word.strip(), f"head{i}", anchor="start", turn=-60, **seen)
    canvas.text((left - 8, top - 12), "query", anchor="end", font=13)
    canvas.text((6, 14), "key →", anchor="start", font=13)
    cached = length - num_queries
    for row in range(size):
        for column in range(size):
            place = left + column * cell + 1, top + row * cell + 1
            box = (cell - 2, cell - 2)
            inside = cached <= row < length and column < length
            if column <= row and row < size - 1:  # done by an earlier step
                dots = {"dash": ":", "width": 0.8, "alpha": 0.5 * (row < cached)}
                canvas.box(place, box, "", None, f"done{row}-{column}", **dots)
            looks: dict[str, Look | None] = {"old": CACHE, "new": KEYS}
            if column > row:
                looks = {"not": None}
            for kind, look in looks.items():
                is_on = inside and (
                    kind == "not" or (kind == "old") == (column < cached)
                )
                text = "" if look else "−∞"
                key = f"{kind}{row}-{column}"
                canvas.box(place, box, text, look, key, font=11, alpha=float(is_on))
    visible = sum(row + 1 for row in range(cached, length))
    hidden = num_queries * length - visible
    choices = sorted(
        {hidden, num_queries * (length - num_queries), num_queries * length // 2}
    )
    return Motion(
        "the causal mask of a step",
        canvas,
        describe_mask(num_queries, length, visible),
        [
            slider("T", "T, tokens there are", 1, size, length),
            slider("S", "S, tokens that ask", 1, size, num_queries),
        ],
        MASK_SCRIPT,
        {"size": size},
        Guess(
            f"{num_queries} tokens ask, and there are {length} to look at: {num_queries * length} "
            "scores. How many of them are hidden?",
            [str(choice) for choice in choices],
            choices.index(hidden),
            f"{hidden} of them. Only the tokens of this step can lie in each other's future: the "
            "last one hides nothing, the one before it one key, and so on. How many keys there "
            "are besides does not matter. Move the sliders: what is hidden if one token asks?",
        ),
    )


def describe_mask(num_queries: int, length: int, visible: int) -> str:
    """What the script says too."""
    scores = num_queries * length
    return (
        f"S = {num_queries}, T = {length}: of {scores} scores {visible} count and "
        f"{scores - visible} are hidden. {length - num_queries} keys come from the cache (hatched)."
    )


MASK_SCRIPT = """
const draw = () => {
  const T = value("T"), S = Math.min(value("S"), T), cached = T - S;
  knob("S").value = S;
  shown("T", T); shown("S", S);
  for (let row = 0; row < data.size; row++) {
    show(`row${row}`, row < T ? 1 : .2);
    show(`head${row}`, row < T ? 1 : .2);
    for (let column = 0; column < data.size; column++) {
      const inside = row >= cached && row < T && column < T;
      if (column > row) show(`not${row}-${column}`, inside);
      else {
        if (row < data.size - 1) show(`done${row}-${column}`, row < cached ? .5 : 0);
        show(`old${row}-${column}`, inside && column < cached);
        show(`new${row}-${column}`, inside && column >= cached);
      }
    }
  }
  let visible = 0;
  for (let row = cached; row < T; row++) visible += row + 1;
  says(`S = ${S}, T = ${T}: of ${S * T} scores ${visible} count and ${S * T - visible} are ` +
    `hidden. ${cached} keys come from the cache (hatched).` +
    (S === 1 ? " One token asks: nothing is hidden." : S === T ? " The whole prompt at once." : ""));
};
for (const one of all("[data-k^=not]")) one.setAttribute("opacity", 0);
says("Guess first, then the mask appears.");
reveal(() => {
  on("T", draw);
  on("S", draw);
  draw();
});
"""
