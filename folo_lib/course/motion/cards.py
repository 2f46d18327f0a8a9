"""Pages 08 and 18: what a step costs, a roofline that moves, and which GPU would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from folo_lib.course.figures import CACHE, DEVICE, HOST, US
from folo_lib.course.motion.base import (
    Canvas,
    Guess,
    Motion,
    round_all,
    select,
    slider,
)

if TYPE_CHECKING:
    from folo_lib.course.widgets.memory import ModelShape

__all__ = ["CARDS", "Card", "StepCost", "choose_gpu", "count_step", "move_roofline"]


class Card(NamedTuple):
    """A GPU, as its maker describes it.

    Attributes:
        memory: in GB, of 10^9 bytes.
        bandwidth: TB/s.
        peak: TFLOP/s of dense products in bfloat16.
    """

    memory: float
    bandwidth: float
    peak: float


CARDS = {
    "L4": Card(24, 0.3, 121),
    "RTX 4090": Card(24, 1.008, 165),
    "A100": Card(80, 2.039, 312),
    "H100": Card(80, 3.35, 989),
    "H200": Card(141, 4.8, 989),
}
"""From NVIDIA's data sheets: the SXM versions of A100, H100 and H200, without sparsity."""


class StepCost(NamedTuple):
    """What a decode step costs, by its requests and their context.

    Attributes:
        weights: bytes that are read once per step.
        cache: bytes read per request and token of context.
        products: operations per request with the weights.
        attention: operations per request and token of context.
    """

    weights: int
    cache: int
    products: int
    attention: int


def count_step(shape: ModelShape, dtype: torch.dtype = torch.bfloat16) -> StepCost:
    """What a decode step of a model reads and computes.

    Args:
        shape: of the model.
        dtype: of weights and cache.
    """
    numbers = shape.count_parameters()
    if not shape.tie_word_embeddings:  # of the embedding a step reads a row per token
        numbers -= shape.vocab_size * shape.hidden_size
    heads = shape.num_attention_heads * shape.head_dim
    return StepCost(
        weights=numbers * dtype.itemsize,
        cache=shape.kv_bytes(1, dtype),
        products=2 * numbers,
        attention=4 * heads * shape.num_hidden_layers,
    )


LEFT, TOP, RIGHT, BOTTOM = 52, 30, 328, 226
XS, YS = (0.3, 3000.0), (0.1, 2000.0)  # FLOP per byte, TFLOP/s
BATCHES = [2**i for i in range(11)]
TRAIL = (1, 8, 64, 1024)  # requests of the small dots
CONTEXTS = [2**i for i in range(7, 16)]


def pick(key: str, label: str, values: Sequence[float], value: float) -> str:
    """A slider over the places of a list."""
    last, place = len(values) - 1, values.index(value)
    return slider(key, label, 0, last, place, f"{value:,}")


def spot(intensity: float, speed: float) -> tuple[float, float]:
    """The place of FLOP per byte and TFLOP/s on the roofline, in pixels."""
    across = math.log(intensity / XS[0]) / math.log(XS[1] / XS[0])
    up = math.log(speed / YS[0]) / math.log(YS[1] / YS[0])
    return (
        round(LEFT + across * (RIGHT - LEFT), 1),
        round(BOTTOM - up * (BOTTOM - TOP), 1),
    )


def draw_roof(card: Card) -> list[tuple[float, float]]:
    """Slope, ridge and flat of a card."""
    start = max(XS[0], YS[0] / card.bandwidth)
    ridge = card.peak / card.bandwidth
    return [
        spot(start, start * card.bandwidth),
        spot(ridge, card.peak),
        spot(XS[1], card.peak),
    ]


def move_roofline(
    shape: ModelShape,
    name: str,
    cards: Mapping[str, Card] = CARDS,
    chosen: str = "H200",
    batch: int = 1,
    context: int = 512,
    example: int = 64,
) -> Motion:
    """Where decode steps of a model stand below the roof of a card.

    Small dots stand for other numbers of requests, as many as `TRAIL` says.

    Args:
        shape: of the model, in bfloat16.
        name: of the model.
        cards: by name.
        chosen: the card of the first state.
        batch, context: powers of 2, up to 1,024 and from 128 to 32,768.
        example: requests of the step that is drawn without the script.
    """
    cost, card = count_step(shape), cards[chosen]
    roof, times = Canvas(340, 272), Canvas(290, 150)
    roof.line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], width=1)
    roof.text((4, 12), "TFLOP/s, at the most", anchor="start", font=13)
    roof.text(((LEFT + RIGHT) / 2, BOTTOM + 36), "operations per byte", font=13)
    for x in (1, 10, 100, 1000):
        place = spot(x, YS[0])
        roof.line([place, (place[0], BOTTOM + 4)], width=1)
        roof.text((place[0], BOTTOM + 14), f"{x:,}", font=12)
    for y in (0.1, 1, 10, 100, 1000):
        place = spot(XS[0], y)
        roof.text((LEFT - 6, place[1]), f"{y:,g}", anchor="end", font=12)
    for one in cards.values():
        roof.line(draw_roof(one), width=1, alpha=0.25)
    roof.line(draw_roof(card), "roof", width=3, colour=DEVICE.colour)

    def measure(requests: int) -> tuple[float, float]:
        """Bytes and operations of a step."""
        return (
            cost.weights + requests * context * cost.cache,
            requests * (cost.products + context * cost.attention),
        )

    def stand(requests: int) -> tuple[float, float]:
        read, work = measure(requests)
        intensity = work / read
        return spot(intensity, min(card.peak, intensity * card.bandwidth))

    for i, requests in enumerate(TRAIL):
        at = stand(requests)
        roof.circle(at, 4, US, f"trail{i}")
        label, side = (at[0] + 9, at[1] + 9), "start"
        if requests == example:  # the large dot, beside which the last one stands
            label, side = (at[0] - 9, at[1] - 9), "end"
        roof.text(label, f"{requests:,}", f"name{i}", anchor=side, font=13)
    read, work = measure(example)
    at = stand(example)
    roof.line([at, (at[0], BOTTOM)], "drop", width=1, dash=":")
    roof.circle(at, 7, US, "dot")
    reading = 1e3 * read / card.bandwidth / 1e12
    working = 1e3 * work / card.peak / 1e12
    for y, key, text, took, look in (
        (30, "read", "to read the bytes", reading, CACHE),
        (96, "work", "to do the arithmetic", working, DEVICE),
    ):
        long = max(1.0, 190 * took / max(reading, working))
        times.text((2, y - 14), text, anchor="start", font=13)
        times.box((2, y), (long, 22), "", look, key)
        times.text((long + 10, y + 11), write_ms(took), f"{key}-ms", anchor="start")
    first, many = (measure(n)[0] / card.bandwidth for n in (1, 64))
    factor = f"{many / first:.1f} times as long"
    alone = measure(1)[0] / card.bandwidth / 1e9
    longer = max(reading, working) / alone
    return Motion(
        "a roofline",
        [roof, times],
        describe_step(example, context, read, work, chosen, reading, working)
        + f" It takes {longer:.1f} times as long as a step of one.",
        [
            select("card", "card", [*cards], [*cards].index(chosen)),
            pick("batch", "requests", BATCHES, batch),
            pick("context", "tokens of each", CONTEXTS, context),
        ],
        ROOF_SCRIPT,
        {
            "cost": cost._asdict(),
            "cards": [[key, *one] for key, one in cards.items()],
            "roofs": [draw_roof(one) for one in cards.values()],
            "batches": BATCHES,
            "contexts": CONTEXTS,
            "frame": [LEFT, TOP, RIGHT, BOTTOM],
            "xs": XS,
            "ys": YS,
            "trail": [[n, *stand(n)] for n in TRAIL],
        },
        Guess(
            f"A decode step of {name} serves one request with {context:,} tokens of context on "
            f"an {chosen}. How much longer does a step take, at the least, that serves 64?",
            [factor, "8 times as long", "64 times as long"],
            0,
            f"It takes {factor}: the weights are read once for all, and only the caches are read "
            "for each. So the dot climbs along the slope, which is the memory's. Take shorter contexts "
            "and more requests: does it ever reach the flat part?",
        ),
    )


def write_ms(took: float) -> str:
    """Milliseconds, as the script writes them."""
    return f"{took:.3f} ms" if took < 0.1 else f"{took:.2f} ms"


def describe_step(
    batch: int,
    context: int,
    read: float,
    work: float,
    card: str,
    reading: float,
    working: float,
) -> str:
    """What the script says too."""
    limit = "memory" if reading > working else "arithmetic"
    most = batch / max(reading, working) * 1e3
    requests = f"{batch:,} request{'s' if batch > 1 else ''}"
    return (
        f"A step of {requests} reads {read / 1e9:.2f} GB and computes {work / 1e9:,.0f} GFLOP, "
        f"{work / read:.1f} operations per byte: an {card} waits for {limit}, and gives at most "
        f"{round_to_three(most):,} tokens per second."
    )


def round_to_three(number: float) -> int:
    """Three digits say enough."""
    digits = max(0, math.floor(math.log10(number)) - 2) if number > 0 else 0
    return int(round(number / 10**digits) * 10**digits)


ROOF_SCRIPT = """
const {weights, cache, products, attention} = data.cost, [left, top, right, bottom] = data.frame;
const log = (x, [low, high]) => Math.log(x / low) / Math.log(high / low);
const three = (x) => Number(x.toPrecision(3)).toLocaleString("en");
const ms = (took) => `${took.toFixed(took < .1 ? 3 : 2)} ms`;
const draw = () => {
  const [name, , bandwidth, peak] = data.cards[value("card")];
  const batch = data.batches[value("batch")], context = data.contexts[value("context")];
  const measure = (n) => [weights + n * context * cache, n * (products + context * attention)];
  const stand = ([read, work]) => {
    const speed = Math.min(peak, work / read * bandwidth);
    return [left + log(work / read, data.xs) * (right - left), bottom - log(speed, data.ys) * (bottom - top)];
  };
  shown("batch", batch.toLocaleString("en")); shown("context", context.toLocaleString("en"));
  const [read, work] = measure(batch), [x, y] = stand([read, work]);
  data.trail.forEach(([n, fromX, fromY], i) => {
    const [toX, toY] = stand(measure(n));
    place(`trail${i}`, toX, toY);
    place(`name${i}`, toX - fromX, toY - fromY);
  });
  place("dot", x, y);
  set("drop", {d: `M${x} ${y}L${x} ${bottom}`});
  set("roof", {d: "M" + data.roofs[value("card")].map((at) => at.join(" ")).join("L")});
  const took = {read: read / bandwidth / 1e9, work: work / peak / 1e9};
  const most = Math.max(took.read, took.work);
  for (const key of ["read", "work"]) {
    const long = Math.max(1, 190 * took[key] / most);
    widen(key, long);
    shift(`${key}-ms`, long + 10);
    write(`${key}-ms`, ms(took[key]));
  }
  says(`A step of ${batch.toLocaleString("en")} request${batch > 1 ? "s" : ""} reads ` +
    `${(read / 1e9).toFixed(2)} GB and computes ${Math.round(work / 1e9).toLocaleString("en")} GFLOP, ` +
    `${(work / read).toFixed(1)} operations per byte: an ${name} waits for ` +
    `${took.read > took.work ? "memory" : "arithmetic"}, and gives at most ` +
    `${three(batch / most * 1e3)} tokens per second.`);
};
const trail = (is) => data.trail.forEach((_, i) => { show(`trail${i}`, is); show(`name${i}`, is); });
draw();
trail(false);
reveal(() => {
  for (const key of ["card", "batch", "context"]) on(key, draw);
  trail(true);
});
"""

DTYPES = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
USERS = [2**i for i in range(10)]
SPEEDS = [5, 10, 20, 30, 50, 100, 200]
FACTORS = [1.0, 1.2, 1.5, 2.0, 3.0, 5.0]
SHARE = 0.8  # of the memory that the weights leave: what an engine gives its cache
HIGH, FRAME = 62, 336  # pixels: of a card, and of the largest memory


def choose_gpu(
    shapes: Mapping[str, ModelShape],
    cards: Mapping[str, Card] = CARDS,
    model: str = "Qwen3-8B",
    users: int = 16,
    context: int = 4096,
    speed: int = 30,
    factor: float = 2.0,
) -> Motion:
    """Which cards hold a model and the caches of its users, and are fast enough for them.

    Args:
        shapes: the models, by name.
        cards: by name.
        model: of the first state, in bfloat16.
        users: how many answers are written at once.
        context: tokens of each, at the most.
        speed: tokens per second that each user wants.
        factor: how many times as long a step takes as the reading of its bytes.
    """
    table = Canvas(340, HIGH * len(cards))
    largest = max(card.memory for card in cards.values())
    costs = {
        name: {kind: count_step(shape, dtype) for kind, dtype in DTYPES.items()}
        for name, shape in shapes.items()
    }
    sizes = {
        name: {kind: shape.weight_bytes(dtype) for kind, dtype in DTYPES.items()}
        for name, shape in shapes.items()
    }
    verdicts = []
    for i, (name, card) in enumerate(cards.items()):
        y, unit = HIGH * i, FRAME / largest
        cost, weights = costs[model]["bfloat16"], sizes[model]["bfloat16"] / 1e9
        caches = users * context * cost.cache / 1e9
        verdict, seen = judge(card, cost, weights, caches, speed, factor)
        verdicts.append(seen == "fits")
        inside = min(weights, card.memory)
        rest = min(caches, card.memory - inside)
        title = f"{name}, {card.memory:g} GB, {card.bandwidth:.1f} TB/s"
        table.text((2, y + 10), title, anchor="start", bold=True)
        table.box(
            (2, y + 38),
            (unit * card.memory, 18),
            "",
            HOST._replace(hatch="", colour="#ECECEC"),
        )
        table.box((2, y + 38), (max(0.1, unit * inside), 18), "", US, f"weights{i}")
        table.box(
            (2 + unit * inside, y + 38),
            (max(0.1, unit * rest), 18),
            "",
            CACHE,
            f"cache{i}",
        )
        table.text((2, y + 27), verdict, f"verdict{i}", anchor="start", font=13)
    right = verdicts.index(True) if True in verdicts else len(cards)
    choices = [*cards, "none of them"]
    return Motion(
        "choose your GPU",
        table,
        describe_wish(model, users, context, speed),
        [
            select("model", "model", [*shapes], [*shapes].index(model)),
            select("dtype", "dtype", [*DTYPES]),
            pick("users", "answers at once", USERS, users),
            pick("context", "tokens of each", CONTEXTS, context),
            pick("speed", "tokens/s for each", SPEEDS, speed),
            slider(
                "factor",
                "a step takes, times the least",
                0,
                len(FACTORS) - 1,
                FACTORS.index(factor),
                f"{factor:g}",
            ),
        ],
        CHOOSE_SCRIPT,
        {
            "models": [*shapes],
            "costs": [[[*costs[m][k], sizes[m][k]] for k in DTYPES] for m in shapes],
            "cards": [[key, *card] for key, card in cards.items()],
            "users": USERS,
            "contexts": CONTEXTS,
            "speeds": SPEEDS,
            "factor": FACTORS,
            "share": SHARE,
            "unit": round_all(FRAME / largest, 6),
        },
        Guess(
            f"{model} in bfloat16 is to write {users} answers at once, each with up to "
            f"{context:,} tokens, at {speed} tokens per second for each. Which of these is the "
            "first card that does?",
            choices,
            right,
            advise(choices[right], right < len(cards)),
        ),
    )


def advise(choice: str, exists: bool) -> str:
    """The answer to the question."""
    if not exists:
        return "None of them does; look at what each card lacks, room or speed."
    return (
        f"It is the {choice}. Those above it lack room for the caches, or speed: look at what is "
        "said of each. Then ask for your own model and your own users."
    )


def judge(
    card: Card,
    cost: StepCost,
    weights: float,
    caches: float,
    speed: float,
    factor: float,
) -> tuple[str, str]:
    """What is said of a card, and in a word.

    Args:
        card: which one.
        cost: of a step.
        weights, caches: what is kept, in GB.
        speed: tokens per second that each user wants.
        factor: how many times as long a step takes as the reading of its bytes.
    """
    if weights >= card.memory:
        return f"✗ the weights alone are {weights:.1f} GB", "weights"
    room = SHARE * (card.memory - weights)
    if caches > room:
        return f"✗ caches of {caches:.1f} GB, room for {room:.1f} GB", "cache"
    step = factor * (cost.weights / 1e9 + caches) / card.bandwidth  # ms
    got = 1e3 / step
    if got < speed:
        return f"✗ fits, but {got:.0f} tokens/s for each", "slow"
    return f"✓ {got:.0f} tokens/s for each", "fits"


def describe_wish(model: str, users: int, context: int, speed: int) -> str:
    """What the script says too."""
    return (
        f"{model}, {users} answer{'s' if users > 1 else ''} at once, {context:,} tokens each, "
        f"{speed} tokens per second for each. Solid: weights; hatched: caches."
    )


CHOOSE_SCRIPT = """
const comma = (x) => x.toLocaleString("en");
const draw = () => {
  const [weights, cache, , , size] = data.costs[value("model")][value("dtype")];
  const users = data.users[value("users")], context = data.contexts[value("context")];
  const speed = data.speeds[value("speed")], factor = data.factor[value("factor")];
  shown("users", users); shown("context", comma(context));
  shown("speed", speed); shown("factor", factor);
  const own = size / 1e9, caches = users * context * cache / 1e9;
  const good = [];
  data.cards.forEach(([name, memory, bandwidth], i) => {
    const inside = Math.min(own, memory), rest = Math.min(caches, memory - inside);
    const y = piece(`cache${i}`).getAttribute("transform").match(/ ([\\d.]+)\\)/)[1];
    widen(`weights${i}`, Math.max(.1, data.unit * inside));
    widen(`cache${i}`, Math.max(.1, data.unit * rest));
    piece(`cache${i}`).setAttribute("transform", `translate(${2 + data.unit * inside} ${y})`);
    const room = data.share * (memory - own);
    const got = bandwidth / (weights / 1e9 + caches) / factor * 1e3;
    let verdict = `✓ ${got.toFixed(0)} tokens/s for each`;
    if (own >= memory) verdict = `✗ the weights alone are ${own.toFixed(1)} GB`;
    else if (caches > room) verdict = `✗ caches of ${caches.toFixed(1)} GB, room for ${room.toFixed(1)} GB`;
    else if (got < speed) verdict = `✗ fits, but ${got.toFixed(0)} tokens/s for each`;
    else good.push(name);
    write(`verdict${i}`, verdict);
  });
  says(`${data.models[value("model")]}, ${users} answer${users > 1 ? "s" : ""} at once, ` +
    `${comma(context)} tokens each, ${speed} tokens per second for each. Solid: weights; hatched: caches. ` +
    (good.length ? `These do: ${good.join(", ")}.` : "None of them does."));
};
reveal(() => {
  for (const key of ["model", "dtype", "users", "context", "speed", "factor"]) on(key, draw);
  draw();
});
"""
