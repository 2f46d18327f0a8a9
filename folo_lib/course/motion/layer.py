"""Page 04: a layer whose parts can be chosen, with the shapes and numbers of a real run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from folo_lib.course.figures import CACHE, KEYS, QUERIES, US, VALUES
from folo_lib.course.motion.base import Canvas, Guess, Motion, percent, round_all

if TYPE_CHECKING:
    from torch import Tensor

    from folo_lib.qwen3 import Qwen3ForCausalLM

__all__ = ["Part", "explore_layer", "watch_layers"]

WORDS = {
    "input_layernorm": "It makes every token's vector equally long, and weighs its numbers. It "
    "reads the stream and does not change it.",
    "qkv_proj": "One product makes the queries, keys and values of all heads.",
    "q_norm": "RMSNorm again, of each head's query apart.",
    "k_norm": "RMSNorm of each head's key apart.",
    "RoPE": "It turns queries and keys by angles that grow with the position, and does not touch "
    "the values. It has no weights.",
    "attention": "Only here do tokens hear of each other. Keys and values go into the cache. It "
    "has no weights.",
    "o_proj": "It mixes what the heads have heard, and makes it as long as the stream.",
    "add 1": "What attention found is added to the stream.",
    "post_attention_layernorm": "It does for the MLP what the first norm did for attention.",
    "gate_up_proj": "One product makes both halves of the MLP, gate and up.",
    "SiLU and multiply": "Each number of gate, after SiLU, opens or closes its number of up. It "
    "has no weights.",
    "down_proj": "It brings the numbers back to the length of the stream.",
    "add 2": "What the MLP found is added too, and the next layer begins.",
}


class Part(NamedTuple):
    """What was seen of a part of the layer.

    Attributes:
        goes_in, comes_out: the shapes, batch apart.
        weight: the shape of its weight, () if it has none.
        sizes: for each layer, the root mean square of what comes out.
    """

    goes_in: tuple[int, ...]
    comes_out: tuple[int, ...]
    weight: tuple[int, ...]
    sizes: list[float]


def watch_layers(model: Qwen3ForCausalLM, token_ids: Sequence[int]) -> dict[str, Part]:
    """Runs a model once, and notes what goes through each part of its layers.

    Args:
        model: a loaded model.
        token_ids: of a text, `S` of them.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    hooks = []

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            normed = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, []).append((inputs[0], normed))
            if isinstance(output, tuple):  # the norm has added first
                seen.setdefault(f"{name} adds", []).append((output[1], output[1]))

        return hook

    paths = {
        "input_layernorm": "input_layernorm",
        "qkv_proj": "self_attn.qkv_proj",
        "o_proj": "self_attn.o_proj",
        "post_attention_layernorm": "post_attention_layernorm",
        "gate_up_proj": "mlp.gate_up_proj",
        "SiLU and multiply": "mlp.act_fn",
        "down_proj": "mlp.down_proj",
    }
    for layer in model.model.layers:
        for name, path in paths.items():
            module = layer.get_submodule(path)
            hooks.append(module.register_forward_hook(note(name)))
    hooks.append(model.model.norm.register_forward_hook(note("norm")))
    device = model.model.embed_tokens.weight.device
    try:
        with torch.inference_mode():
            model(torch.tensor(list(token_ids), device=device))
    finally:
        for one in hooks:
            one.remove()
    first = model.model.layers[0]
    weights = {
        name: tuple(getattr(first.get_submodule(path), "weight", torch.zeros(())).shape)
        for name, path in paths.items()
    }
    parts = {
        name: Part(
            tuple(seen[name][0][0].shape),
            tuple(seen[name][0][1].shape),
            weights[name],
            [measure(output) for _, output in seen[name]],
        )
        for name in paths
    }
    for name, part in zip(("q_norm", "k_norm"), split_heads(model, seen), strict=True):
        parts[name] = part
    heard = [inputs for inputs, _ in seen["o_proj"]]
    query = parts["q_norm"].comes_out
    parts["attention"] = Part(
        query, tuple(heard[0].shape), (), [measure(one) for one in heard]
    )
    parts["RoPE"] = Part(
        query, query, (), parts["q_norm"].sizes
    )  # turning keeps lengths
    first_adds = [one for one, _ in seen["post_attention_layernorm adds"]]
    second_adds = [
        one for one, _ in [*seen["input_layernorm adds"], *seen["norm adds"]]
    ]
    for name, adds in (("add 1", first_adds), ("add 2", second_adds)):
        shape = tuple(adds[0].shape)
        parts[name] = Part(shape, shape, (), [measure(one) for one in adds])
    return {name: parts[name] for name in WORDS}


def split_heads(
    model: Qwen3ForCausalLM, seen: dict[str, list[tuple[Tensor, Tensor]]]
) -> tuple[Part, Part]:
    """The norms of queries and keys, which a layer computes in one go."""
    layers: list[Any] = [layer.self_attn for layer in model.model.layers]
    num_heads, num_kv_heads, _ = layers[0].heads
    made = [
        out.view(*out.shape[:-1], -1, layers[0].head_dim) for _, out in seen["qkv_proj"]
    ]  # [S, H + 2 * H_kv, D]
    parts = []
    for name, heads in (
        ("q_norm", slice(num_heads)),
        ("k_norm", slice(num_heads, num_heads + num_kv_heads)),
    ):
        norms = [getattr(layer, name) for layer in layers]
        pairs = zip(norms, made, strict=True)
        normed = [norm(one[..., heads, :]) for norm, one in pairs]
        shape = tuple(normed[0].shape)
        weight = tuple(norms[0].weight.shape)
        parts.append(Part(shape, shape, weight, [measure(one) for one in normed]))
    return parts[0], parts[1]


def measure(x: Tensor) -> float:
    """The root mean square of all its numbers."""
    return float(x.double().pow(2).mean().sqrt())


PLACES = {  # left, top, width, height
    "input_layernorm": (70, 34, 262, 28),
    "qkv_proj": (70, 84, 262, 28),
    "q_norm": (70, 142, 82, 28),
    "k_norm": (160, 142, 82, 28),
    "RoPE": (70, 186, 172, 28),
    "attention": (70, 232, 262, 28),
    "o_proj": (70, 282, 262, 28),
    "add 1": (10, 326, 40, 28),
    "post_attention_layernorm": (70, 346, 262, 28),
    "gate_up_proj": (70, 396, 262, 28),
    "SiLU and multiply": (70, 446, 262, 28),
    "down_proj": (70, 496, 262, 28),
    "add 2": (10, 540, 40, 28),
}
LEFT, ROW, BAR = 138, 24, 90


def explore_layer(model: Qwen3ForCausalLM, token_ids: Sequence[int]) -> Motion:
    """The parts of a layer, each of which tells its shapes, and how large its numbers are.

    Args:
        model: a loaded model.
        token_ids: of a text that runs through it once.
    """
    parts = watch_layers(model, token_ids)
    counts = {name: count(part.weight) for name, part in parts.items()}
    total = sum(counts.values())
    layer, bars = Canvas(340, 600), Canvas(300, 380)
    stream = parts["add 1"].comes_out
    layer.line([(30, 22), (30, 326)], width=2.5)
    layer.line([(30, 354), (30, 540)], width=2.5)
    layer.line([(30, 568), (30, 598)], width=2.5)
    for start, name in ((26, "input_layernorm"), (364, "post_attention_layernorm")):
        y = PLACES[name][1] + 14
        layer.line([(30, start if start > 300 else y), (30, y), (70, y)], width=1.5)
    for end, name in ((340, "o_proj"), (554, "down_proj")):
        bottom = PLACES[name][1] + 28
        layer.line([(201, bottom), (201, end), (50, end)], width=1.5)
    layer.text((8, 10), f"the stream {show(stream)}", anchor="start", font=13)
    for above, below in (
        ("input_layernorm", "qkv_proj"),
        ("attention", "o_proj"),
        ("post_attention_layernorm", "gate_up_proj"),
        ("gate_up_proj", "SiLU and multiply"),
        ("SiLU and multiply", "down_proj"),
    ):
        y0, y1 = PLACES[above][1] + 28, PLACES[below][1]
        layer.line([(201, y0), (201, y1)], width=1.5)
        shape = show(parts[above].comes_out)
        layer.text((209, (y0 + y1) / 2), shape, anchor="start", font=13)
    heads = (
        (111, "q", parts["q_norm"].comes_out, QUERIES),
        (190, "k", parts["k_norm"].comes_out, KEYS),
        (266, "v", parts["k_norm"].comes_out, VALUES),
    )
    for x, name, head, look in heads:
        ways = [(112, 232)] if name == "v" else [(112, 142), (170, 186), (214, 232)]
        for way in ways:
            layer.line([(x, y) for y in way], colour=look.colour, width=5)
        layer.text((x + 6, 127), f"{name} {show(head)}", anchor="start", font=11)
    for name, (x, y, wide, high) in PLACES.items():
        text = "+" if name.startswith("add") else name
        ground = CACHE if name == "attention" else None
        layer.box((x, y), (wide, high), text, ground, name, label=name)
    layer.text((60, 588), "to the next layer", anchor="start", font=13)
    bars.text((2, 14), "numbers in its weight", anchor="start", bold=True)
    weighty = [name for name in parts if counts[name] > 1000]
    weighty.sort(key=lambda name: [*PLACES].index(name))
    for i, name in enumerate([*weighty, "the norms"]):
        number = counts.get(name, total - sum(counts[one] for one in weighty))
        y = 40 + ROW * i
        long = max(1.0, BAR * number / max(counts.values()))
        bars.text((LEFT - 40, y), name, anchor="end")
        bars.box((LEFT - 32, y - 8), (long, 16), "", US, f"weight {name}")
        bars.text((LEFT - 24 + long, y), f"{number:,}", anchor="start", font=13)
    bars.text((2, 190), "size of what comes out, by layer", anchor="start", bold=True)
    first = "input_layernorm"
    sizes = parts[first].sizes
    step = 280 / len(sizes)
    for i, size in enumerate(sizes):
        tall = max(1.0, 110 * size / max(sizes))
        left = 2 + step * i
        bars.box((left, 340 - tall), (step - 8, tall), "", US, f"size{i}")
        middle = left + (step - 8) / 2
        bars.text((middle, 328 - tall), f"{size:.2f}", f"number{i}", font=12)
        bars.text((middle, 352), i, font=13)
    attention = counts["qkv_proj"] + counts["o_proj"]
    mlp = counts["gate_up_proj"] + counts["down_proj"]
    return Motion(
        "a layer and its parts",
        [layer, bars],
        describe(first, parts, counts, total),
        [],
        LAYER_SCRIPT,
        {
            "parts": [*PLACES],
            "says": {name: describe(name, parts, counts, total) for name in PLACES},
            "sizes": {name: round_all(parts[name].sizes, 3) for name in PLACES},
        },
        Guess(
            "Most of a layer's numbers are weights of one of these. Which?",
            ["the norms", "attention, with qkv_proj and o_proj", "the MLP"],
            2 if mlp > attention else 1,
            f"The MLP has {percent(mlp / total)} of them, attention {percent(attention / total)}, "
            "all norms together less than 1 %. Now choose a part of the layer, or walk through "
            "it with the arrow keys.",
        ),
        says_first=True,
    )


def count(shape: tuple[int, ...]) -> int:
    """The numbers in a weight; 0 if there is none."""
    number = 1 if shape else 0
    for side in shape:
        number *= side
    return number


def show(shape: tuple[int, ...]) -> str:
    """As PyTorch writes it."""
    return "[" + ", ".join(str(side) for side in shape) + "]"


def describe(
    name: str, parts: dict[str, Part], counts: dict[str, int], total: int
) -> str:
    """Shapes, weight and meaning of a part."""
    part = parts[name]
    says = f"{name}: {show(part.goes_in)} → {show(part.comes_out)}. {WORDS[name]}"
    if part.weight:
        share = percent(counts[name] / total)
        says += (
            f" Its weight {show(part.weight)} has {counts[name]:,} numbers, {share} of "
            "the layer's."
        )
    return says


LAYER_SCRIPT = """
const letters = (size) => size < 10 ? size.toFixed(2) : size.toFixed(1);
const choose = (name, focus) => {
  for (const one of data.parts) {
    const is = one === name, part = piece(one);
    part.setAttribute("aria-pressed", is);
    part.setAttribute("tabindex", is ? 0 : -1);
    part.querySelector("rect").setAttribute("stroke-width", is ? 4 : 1.2);
    part.querySelector("text").setAttribute("font-weight", is ? "bold" : "normal");
  }
  if (focus) piece(name).focus();
  const sizes = data.sizes[name], most = Math.max(...sizes);
  sizes.forEach((size, i) => {
    const high = Math.max(1, 110 * size / most), bar = piece(`size${i}`);
    bar.querySelector("rect").setAttribute("height", high);
    bar.setAttribute("transform", bar.getAttribute("transform").replace(/ .*/, ` ${340 - high})`));
    piece(`number${i}`).querySelector("tspan").setAttribute("y", 328 - high);
    write(`number${i}`, letters(size));
  });
  says(data.says[name]);
};
reveal(() => {
  data.parts.forEach((name, i) => {
    press(piece(name), () => choose(name));
    arrows(piece(name), (x, y) => {
      const to = Math.max(0, Math.min(data.parts.length - 1, i + (x || y)));
      choose(data.parts[to], true);
    });
  });
  choose(data.parts[0]);
});
"""
