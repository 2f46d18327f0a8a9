"""Page 02: hands that turn with the position, and the score that only knows the distance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from folo_lib.course.figures import KEYS, QUERIES, US
from folo_lib.course.motion.base import (
    Canvas,
    Guess,
    Motion,
    button,
    round_all,
    slider,
)
from folo_lib.rope import compute_inv_freq

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_hands", "turn_hands"]

PAIRS = (0, 4, 8, 16)
LAST = 100  # the largest position
MIDDLES, RADIUS = ((84, 80), (252, 80), (84, 236), (252, 236)), 52
FRAME = (34, 30, 290, 200)  # of the curve: left, top, right, bottom


def find_hands(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A query and a key as one hand for each pair of dimensions.

    Args:
        query: `[D]`, before RoPE.
        key: like `query`.

    Returns:
        Three times `[D/2]`: the angle of the query's hand, that of the key's, and the product of
        their lengths. The score is the sum of that times the cosine of the angle between them.
    """
    half = query.shape[-1] // 2
    pairs = [x.double().view(2, half) for x in (query, key)]  # [2, D/2]
    angles = [torch.atan2(pair[1], pair[0]) for pair in pairs]
    return angles[0], angles[1], pairs[0].norm(dim=0) * pairs[1].norm(dim=0)


def turn_hands(
    query: Tensor,
    key: Tensor,
    rope_theta: float,
    positions: tuple[int, int],
    words: tuple[str, str],
) -> Motion:
    """The hands of a query and a key in four pairs of dimensions, and q·k against distance.

    Args:
        query: `[D]`, before RoPE.
        key: like `query`.
        rope_theta: the base of the frequencies.
        positions: of the query and of the key, which is not after it.
        words: the tokens that they belong to.
    """
    inv_freq = compute_inv_freq(query.shape[-1], rope_theta).double()
    ours, theirs, lengths = find_hands(query, key)
    scale = query.shape[-1] ** -0.5
    distances = torch.arange(LAST + 1)[:, None]
    turned = (ours - theirs + distances * inv_freq).cos()  # [distances, D/2]
    scores = (scale * (turned * lengths).sum(dim=-1)).tolist()
    m, n = positions
    low, high = min(0, math.floor(min(scores))), math.ceil(max(scores))

    dials, curve = Canvas(340, 328), Canvas(320, 250)
    for pair, (x, y) in zip(PAIRS, MIDDLES, strict=True):
        ring = [
            (
                x + RADIUS * math.cos(i / 24 * math.pi),
                y + RADIUS * math.sin(i / 24 * math.pi),
            )
            for i in range(48)
        ]
        dials.line(ring, closed=True, width=0.8)
        for name, look, angle, length, wide in (
            ("query", QUERIES, float(ours[pair]) + m * float(inv_freq[pair]), 1.0, 6),
            ("key", KEYS, float(theirs[pair]) + n * float(inv_freq[pair]), 0.8, 4),
        ):
            reach = RADIUS * length
            tip = x + reach * math.cos(angle), y - reach * math.sin(angle)
            dials.line([(x, y), tip], f"{name}{pair}", colour=look.colour, width=wide)
        turn = 2 * math.pi / float(inv_freq[pair])
        dials.text((x, y + RADIUS + 14), f"pair {pair}", bold=True, font=13)
        dials.text((x, y + RADIUS + 31), f"a turn takes {turn:,.0f} tokens", font=12)
    dials.text((4, 12), f"long hand: query of “{words[0]}”,", anchor="start", font=13)
    dials.text((196, 12), f"short: key of “{words[1]}”", anchor="start", font=13)

    left, top, right, bottom = FRAME
    unit = (right - left) / LAST

    def place(distance: float, score: float) -> tuple[float, float]:
        y = bottom - (bottom - top) * (score - low) / (high - low)
        return round(left + unit * distance, 1), round(y, 1)

    curve.text((4, 12), "score, q·k / √D", anchor="start", font=13)
    curve.line([place(0, 0), place(LAST, 0)], width=0.6, dash=":")
    curve.line([(left, top), (left, bottom), (right, bottom)], width=1)
    for score in sorted({low, 0, high}):
        curve.text(
            (left - 5, place(0, score)[1]),
            f"{score}".replace("-", "−"),
            anchor="end",
            font=12,
        )
    for distance in range(0, LAST + 1, 20):
        curve.text((place(distance, low)[0], bottom + 14), distance, font=12)
    curve.text(
        ((left + right) / 2, bottom + 34), "tokens between query and key", font=13
    )
    curve.line([place(i, score) for i, score in enumerate(scores)], width=2)
    curve.circle(place(m - n, scores[m - n]), 7, US, "dot")
    score = f"{scores[m - n]:.2f}".replace("-", "−")
    return Motion(
        "hands that turn",
        [dials, curve],
        f"The query stands at {m}, the key at {n}, {m - n} tokens apart: the score is {score}.",
        [
            slider("m", "query at", 0, LAST, m),
            slider("n", "key at", 0, LAST, n),
            button("both", "Both 10 further"),
        ],
        HANDS_SCRIPT,
        {
            "pairs": PAIRS,
            "middles": MIDDLES,
            "radius": RADIUS,
            "speeds": round_all([1e3 * x for x in inv_freq.tolist()], 7),
            "hands": round_all([ours.tolist(), theirs.tolist(), lengths.tolist()], 5),
            "scale": scale,
            "curve": [place(i, score) for i, score in enumerate(scores)],
            "last": LAST,
        },
        Guess(
            f"“{words[0]}” at position {m} gives “{words[1]}” at position {n} a score of "
            f"{score}. Both move 10 tokens further, and every hand turns. What about the score?",
            ["it grows", "it falls", "it stays as it is"],
            2,
            "It stays as it is: in each pair both hands turn by the same angle, and the score "
            "knows only the angles between them, and so the distance. Move both; then move one.",
        ),
    )


HANDS_SCRIPT = """
const [ours, theirs, lengths] = data.hands;
const speed = (pair) => data.speeds[pair] / 1e3;
const draw = () => {
  let m = value("m"), n = Math.min(value("n"), m), sum = 0;
  knob("n").value = n;
  shown("m", m); shown("n", n);
  data.pairs.forEach((pair, i) => {
    const [x, y] = data.middles[i];
    for (const [name, angle, reach] of [["query", ours[pair] + m * speed(pair), 1],
                                        ["key", theirs[pair] + n * speed(pair), .8]]) {
      const far = data.radius * reach;
      set(`${name}${pair}`, {d: `M${x} ${y}L${x + far * Math.cos(angle)} ${y - far * Math.sin(angle)}`});
    }
  });
  lengths.forEach((length, p) => {
    sum += length * Math.cos(ours[p] + m * speed(p) - theirs[p] - n * speed(p));
  });
  place("dot", ...data.curve[m - n]);
  says(`The query stands at ${m}, the key at ${n}, ${m - n} tokens apart: the score is ` +
    `${signed(sum * data.scale, 2)}.`);
  knob("both").disabled = m + 10 > data.last;
};
reveal(() => {
  on("m", draw);
  on("n", () => {
    if (value("n") > value("m")) knob("m").value = value("n");
    draw();
  });
  on("both", () => {
    for (const key of ["m", "n"]) knob(key).value = value(key) + 10;
    draw();
  });
  draw();
});
"""
