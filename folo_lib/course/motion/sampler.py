"""Page 07: filters that are dragged into another order, and a race with Gumbel noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from folo_lib.course.figures import US, Look
from folo_lib.course.motion.base import (
    Canvas,
    Guess,
    Motion,
    button,
    percent,
    round_all,
    slider,
)
from folo_lib.sampler import (
    apply_min_p_filtering,
    apply_top_k_filtering,
    apply_top_p_filtering,
    gumbel_noise,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FILTERS", "count_kept", "order_filters", "race"]

FILTERS = {"temperature": 1.5, "min_p": 0.02, "top_k": 50, "top_p": 0.9}
"""In the order of the sampler, with what they begin with in the figure."""

NUM_SHOWN = 14
PLAIN = Look("#ECECEC", "", "", "")
CARD = (196, 34)  # pixels
TOP, STEP = 40, 56  # of the cards: their first upper edge, and from one to the next
LEFT, ROW, BAR = 92, 22, 170  # of the bars


def count_kept(logits: Tensor, order: Sequence[str]) -> list[int]:
    """How many tokens are left after each of the filters in this order.

    Args:
        logits: `[V]`.
        order: names of `FILTERS`.
    """
    rows, kept = logits[None].float(), []
    for name in order:
        value = FILTERS[name]
        if name == "temperature":
            rows = rows / value
        elif name == "min_p":
            rows = apply_min_p_filtering(rows, value)
        elif name == "top_k":
            rows = apply_top_k_filtering(rows, int(value))
        else:
            rows = apply_top_p_filtering(rows, value)
        kept.append(int(rows.isfinite().sum()))
    return kept


def order_filters(logits: Tensor, label: Callable[[int], str]) -> Motion:
    """Temperature and three filters as cards, to be dragged up and down, and what they leave.

    Args:
        logits: of the next token, `[V]`.
        label: the text of a token.
    """
    ordered, ids = logits.float().sort(descending=True, stable=True)
    order = [*FILTERS]
    kept = count_kept(logits, order)
    shares = (ordered[: kept[-1]] / FILTERS["temperature"]).softmax(dim=-1).tolist()
    cards, bars = Canvas(250, 300), Canvas(330, 30 + ROW * NUM_SHOWN)
    cards.text((2, 14), f"{len(logits):,} tokens", anchor="start", bold=True)
    for i in range(len(order)):
        y = TOP + STEP * i
        cards.text((10, y - 9), "↓", font=13)
        left = 22, y + CARD[1] + 11
        cards.text(left, f"{kept[i]:,} left", f"left{i}", anchor="start", font=13)
    for i, name in enumerate(order):
        at = 2, TOP + STEP * i
        text = f"{name} = {FILTERS[name]:g}"
        spoken = f"{name}, moved by the arrow keys"
        cards.box(at, CARD, text, PLAIN, name, label=spoken, glides=True)
    bars.text((LEFT - 8, 12), "token", anchor="end", font=13)
    bars.text((LEFT, 12), "probability", anchor="start", font=13)
    words = [label(int(i)) for i in ids[:NUM_SHOWN]]
    longest = 0.25  # the probability that fills a bar
    for i, word in enumerate(words):
        middle = 28 + ROW * i + ROW / 2
        share = shares[i] if i < len(shares) else 0.0
        long = BAR * min(1.0, share / longest)
        seen = 1.0 if share else 0.35
        bars.text((LEFT - 8, middle), word, f"word{i}", anchor="end", alpha=seen)
        bars.box((LEFT, middle - 8), (max(1, long), 16), "", US, f"bar{i}", alpha=seen)
        text = percent(share) if share else "dropped"
        bars.text((LEFT + long + 8, middle), text, f"share{i}", anchor="start")
    moved = count_kept(logits, [*order[1:], order[0]])[-1]
    right = 0 if moved < kept[-1] else 1 if moved > kept[-1] else 2
    how = ("fewer", "more", "as many")[right]
    return Motion(
        "filters in an order of your choice",
        [cards, bars],
        f"In the order of the sampler {kept[-1]} tokens are left.",
        [
            slider("temperature", "temperature", 2, 30, 15, "1.5"),
            slider("min_p", "min_p", 0, 30, 2, "0.02"),
            slider("top_k", "top_k", 1, 100, 50),
            slider("top_p", "top_p", 1, 20, 18, "0.9"),
        ],
        FILTER_SCRIPT,
        {
            "logits": round_all(ordered.tolist(), 2),
            "order": order,
            "top": TOP,
            "step": STEP,
            "left": LEFT,
            "bar": BAR / longest,
            "longest": BAR,
            "shown": NUM_SHOWN,
        },
        Guess(
            f"In this order {kept[-1]} tokens are left. If the temperature came last and not "
            "first, would more or fewer be left?",
            ["fewer", "more", "as many"],
            right,
            f"There would be {how}, {moved} in place of {kept[-1]}: a temperature above 1 "
            "flattens the probabilities, and the filters after it need more tokens to fill "
            "their share. Drag a card up or down, or focus it and press the arrow keys.",
        ),
    )


FILTER_SCRIPT = """
let order = [...data.order];
const units = {temperature: .1, min_p: .01, top_k: 1, top_p: .05};
const read = (name) => Number((value(name) * units[name]).toFixed(2));
const run = () => {
  let scores = data.logits, kept = scores.length;
  const counts = [];
  for (const name of order) {
    const wish = read(name);
    if (name === "temperature") scores = scores.map((score) => score / wish);
    else if (name === "top_k") {
      const least = scores[Math.min(wish, kept) - 1];
      while (kept > 1 && scores[kept - 1] < least) kept--;
    } else if (name === "min_p") {
      const least = scores[0] + Math.log(wish);
      while (kept > 1 && scores[kept - 1] < least) kept--;
    } else if (wish < 1) {
      const shares = softmax(scores.slice(0, kept));
      let mass = 0, count = 0;
      while (mass < wish && count < kept) mass += shares[count++];
      kept = count;
    }
    counts.push(kept);
  }
  return {counts, shares: softmax(scores.slice(0, kept))};
};
const draw = (held) => {
  const {counts, shares} = run();
  order.forEach((name, i) => {
    if (name !== held) place(name, 2, data.top + data.step * i);
    write(name, `${name} = ${read(name)}`);
    piece(name).setAttribute("aria-label", `${name}, number ${i + 1} of 4, moved by the arrow keys`);
    write(`left${i}`, `${counts[i].toLocaleString("en")} left`);
    shown(name, read(name));
  });
  for (let i = 0; i < data.shown; i++) {
    const share = i < shares.length ? shares[i] : 0, long = Math.min(data.longest, data.bar * share);
    widen(`bar${i}`, Math.max(1, long));
    shift(`share${i}`, data.left + long + 8);
    write(`share${i}`, share ? percent(share) : "dropped");
    show(`bar${i}`, share ? 1 : .35);
    show(`word${i}`, share ? 1 : .35);
  }
  const count = counts[3];
  says(`${order.join(" → ")}: ${count} token${count > 1 ? "s are" : " is"} left` +
    (order.every((name, i) => name === data.order[i]) ? ", in the order of the sampler." : "."));
};
const move = (name, to) => {
  to = Math.max(0, Math.min(3, to));
  if (order.indexOf(name) === to) return false;
  order = order.filter((one) => one !== name);
  order.splice(to, 0, name);
  return true;
};
reveal(() => {
  for (const name of data.order) {
    on(name, () => draw());
    arrows(piece(name), (x, y) => { if (move(name, order.indexOf(name) + (x || y))) draw(); });
    let from = 0;
    piece(name).addEventListener("pointerdown", () => { from = data.top + data.step * order.indexOf(name); });
    drag(piece(name), (x, y, begin) => {
      const at = from + y - begin.y;
      place(name, 2, at);
      if (move(name, Math.round((at - data.top) / data.step))) draw(name);
    }, () => draw());
  }
  draw();
});
"""

NUM_RUNNERS = 8
SCALE = 26  # pixels for a logit
START, END, ZERO = 70, 338, 175  # of the track, and where the best logit stands
LONGEST = 190
NUM_RACES = 500
"""In the still picture."""


def run_races(scores: Tensor, ids: Tensor, position: int, vocab_size: int) -> Tensor:
    """Logits with the noise of seeds 0, 1, 2, ..., as the script has it: `[NUM_RACES, runners]`.

    Args:
        scores: `[runners]`.
        ids: their tokens, `[runners]`.
        position: of the token that is drawn.
        vocab_size: `V`.
    """
    seeds = torch.arange(NUM_RACES)
    zeros = torch.zeros_like(seeds)
    return scores + gumbel_noise(seeds, zeros, zeros + position, vocab_size)[:, ids]


def race(logits: Tensor, label: Callable[[int], str], position: int) -> Motion:
    """A draw as a race: each token starts at its logit, noise pushes it, the furthest wins.

    Without the script it shows the last of `NUM_RACES` and who has won them. The noise is that of
    `gumbel_noise` for seeds 0, 1, 2, ..., computed again by the script.

    Args:
        logits: of the next token, `[V]`; the eight likeliest take part.
        label: the text of a token.
        position: of the token that is drawn.
    """
    ordered, ids = logits.float().sort(descending=True, stable=True)
    ordered, ids = ordered[:NUM_RUNNERS], ids[:NUM_RUNNERS]
    shares = ordered.softmax(dim=-1).tolist()
    words = [label(int(i)) for i in ids]
    scores = (ordered - ordered[0]).tolist()
    sums = run_races(ordered - ordered[0], ids, position, len(logits))
    winners = sums.argmax(dim=-1)
    wins = winners.bincount(minlength=NUM_RUNNERS).tolist()
    winner, tallest = int(winners[-1]), max(*shares, max(wins) / NUM_RACES)
    high = 40 + 28 * NUM_RUNNERS
    track, counts = Canvas(340, high), Canvas(250, high)
    track.text((START + 8, 12), "logit  →  logit + noise", anchor="start", font=13)
    counts.text((2, 12), "wins (line: probability)", anchor="start", font=13)
    for i, (word, score) in enumerate(zip(words, scores, strict=True)):
        y = 40 + 28 * i
        x, to = (
            round(max(START, min(END, ZERO + SCALE * at)), 1)
            for at in (score, float(sums[-1, i]))
        )
        seen = 1.0 if i == winner else 0.35
        track.text((START - 6, y), word, anchor="end")
        track.line([(START, y), (END, y)], width=0.5, dash=":")
        track.line([(x, y), (to, y)], f"way{i}", width=4, colour=US.colour)
        track.line([(x, y - 9), (x, y + 9)], f"start{i}", width=2.5)
        track.circle((to, y), 7, US, f"runner{i}", glides=True, alpha=seen)
        long, place = (
            round(LONGEST * share / tallest, 1)
            for share in (wins[i] / NUM_RACES, shares[i])
        )
        counts.box((2, y - 8), (max(1, long), 16), "", US, f"wins{i}")
        line = [(2 + place, y - 11), (2 + place, y + 11)]
        counts.line(line, f"fair{i}", width=2.5)
        after = max(long, 2 + place) + 8
        counts.text((after, y), wins[i], f"count{i}", anchor="start")
    best = words[0]
    return Motion(
        "a race with noise",
        [track, counts],
        f"Race {NUM_RACES} (seed {NUM_RACES - 1}): “{words[winner]}” is drawn. “{best}” has won "
        f"{wins[0]} of {NUM_RACES}, {percent(wins[0] / NUM_RACES)}; its probability is "
        f"{percent(shares[0])}.",
        [
            button("one", "One race"),
            button("many", "A hundred races"),
            button("reset", "From the start"),
            slider("temperature", "temperature", 2, 30, 10, "1"),
        ],
        RACE_SCRIPT,
        {
            "scores": round_all(scores, 4),
            "words": words,
            "ids": ids.tolist(),
            "position": position,
            "unit": SCALE,
            "limits": [START, END],
            "zero": ZERO,
            "longest": LONGEST,
        },
        Guess(
            f"“{best}” has the highest logit and a probability of {percent(shares[0])} among "
            "these eight. Noise is added to all of them, and the highest sum wins. How often "
            "will it be this token?",
            ["always", f"about {percent(shares[0])}", "one in eight"],
            1,
            f"It wins about {percent(shares[0])} of the races: with Gumbel noise the highest "
            "sum is a draw with exactly the probabilities of softmax. Run one race, then "
            "hundreds, and see the bars approach their lines.",
        ),
    )


RACE_SCRIPT = """
const whole = (x) => BigInt.asUintN(64, x);
const mix = (x) => {
  x = whole((x ^ (x >> 30n)) * 0xBF58476D1CE4E5B9n);
  x = whole((x ^ (x >> 27n)) * 0x94D049BB133111EBn);
  return x ^ (x >> 31n);
};
const noise = (seed, id) => {
  const state = mix(whole(BigInt(seed) * 0xD1342543DE82EF95n +
    BigInt(data.position) * 0xF1357AEA2E62A9C5n));
  const bits = mix(whole(state + BigInt(id + 1) * 0x9E3779B97F4A7C15n)) & (2n ** 63n - 1n);
  const v = Math.min(1 - 2 ** -24, Math.max(2 ** -63, Number(bits) / 2 ** 63));
  return -Math.log(-Math.log1p(-v));
};
const n = data.words.length;
let wins = Array(n).fill(0), races = 0;
const fit = (x) => Math.max(data.limits[0], Math.min(data.limits[1], x));
const temperature = () => Number((value("temperature") / 10).toFixed(1));
const scores = () => data.scores.map((score) => score / temperature());
const stand = (sums) => {
  const at = scores(), best = sums ? sums.indexOf(Math.max(...sums)) : -1;
  const shares = softmax(at), tall = races ? Math.max(...wins) / races : 0;
  const scale = data.longest / Math.max(...shares, tall);
  data.words.forEach((_, i) => {
    const y = 40 + 28 * i, from = fit(data.zero + data.unit * at[i]);
    const to = sums ? fit(data.zero + data.unit * sums[i]) : from;
    place(`runner${i}`, to, y);
    show(`runner${i}`, best < 0 || best === i ? 1 : .35);
    set(`way${i}`, {d: `M${from} ${y}L${to} ${y}`});
    set(`start${i}`, {d: `M${from} ${y - 9}L${from} ${y + 9}`});
    const long = races ? scale * wins[i] / races : 0, line = 2 + scale * shares[i];
    widen(`wins${i}`, Math.max(1, long));
    set(`fair${i}`, {d: `M${line} ${y - 11}L${line} ${y + 11}`});
    shift(`count${i}`, Math.max(long, line) + 8);
    write(`count${i}`, wins[i]);
  });
  return best;
};
const run = () => {
  const sums = scores().map((score, i) => score + noise(races, data.ids[i]));
  wins[sums.indexOf(Math.max(...sums))]++;
  races++;
  return sums;
};
const tell = (best) => {
  const share = softmax(scores())[0];
  says(`Race ${races} (seed ${races - 1}): “${data.words[best]}” is drawn. “${data.words[0]}” has won ` +
    `${wins[0]} of ${races}, ${percent(wins[0] / races)}; its probability is ${percent(share)}.`);
};
const reset = () => {
  wins = Array(n).fill(0);
  races = 0;
  shown("temperature", temperature());
  stand();
  says("Each token stands at its logit divided by the temperature.");
};
reset();
reveal(() => {
  on("one", () => tell(stand(run())));
  on("many", () => {
    let sums = [];
    for (let i = 0; i < 100; i++) sums = run();
    tell(stand(sums));
  });
  on("reset", reset);
  on("temperature", reset);
});
"""
