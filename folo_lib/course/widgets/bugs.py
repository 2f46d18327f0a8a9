"""A laboratory of planted bugs: what each does to the story, the probabilities and the layers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from folo_lib.course import story as plain
from folo_lib.course.figures import OTHER, US
from folo_lib.course.story import NUM_NEW_TOKENS, Story, load_story
from folo_lib.course.widgets.base import (
    Explorer,
    choice_menu,
    choice_slider,
    token_label,
)

Parts = Mapping[str, Callable[..., Any]]


class Bug(NamedTuple):
    """A mistake in one part of the plain model.

    Attributes:
        name: what is wrong, in a few words.
        plant: makes the parts of `story.forward` that hold it.
        why: how one would find it, or why it is hard to find.
    """

    name: str
    plant: Callable[[], Parts]
    why: str


class Symptoms(NamedTuple):
    """What a model does.

    Attributes:
        ids: of the story that it tells, those of its beginning included.
        streams: `[points, S, E]`, what runs between the layers and inside them, while it reads
            the story as the right model tells it.
        logits: of the token at which this story parts from the right one, or else of its first
            new token, `[V]`.
    """

    ids: list[int]
    streams: Tensor
    logits: Tensor


# Page 01: attention


def attend_with(
    score: Callable[[Tensor, Tensor], Tensor] = lambda q, k: (
        q @ k.mT / q.shape[-1] ** 0.5
    ),
    hide: Callable[[int], Tensor] = lambda length: torch.ones(length, length).triu(1),
    dim: int = -1,
    tiled: bool = False,
) -> Parts:
    """Attention in one go, of which one step can be replaced."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = len(query) // len(key)
        if tiled:
            key, value = key.repeat(shared, 1, 1), value.repeat(shared, 1, 1)
        else:
            key, value = (x.repeat_interleave(shared, dim=0) for x in (key, value))
        scores = score(query, key)  # [H, S, S]
        hidden = hide(scores.shape[-1]).bool()
        scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(dim=dim).nan_to_num() @ value

    return {"attend": attend}


def hide_itself(length: int) -> Tensor:
    """A mask that begins one too early; the first token still sees itself."""
    hidden = torch.ones(length, length).triu(0)
    hidden[0, 0] = 0
    return hidden


# Page 03: norm and MLP


def norm_with(
    normalize: Callable[[Tensor, float], Tensor], weighs: bool = True
) -> Parts:
    """A norm that makes its vectors equally long in another way."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = normalize(x, eps)
        return weight * normed if weighs else normed

    return {"norm": norm}


def root_mean_square(x: Tensor, eps: float) -> Tensor:
    """As it should be."""
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def mlp_with(act: Callable[[Tensor], Tensor], swapped: bool = False) -> Parts:
    """An MLP with another function, or with its halves swapped."""

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if swapped:
            gate, up = up, gate
        return (act(x @ gate.T) * (x @ up.T)) @ down.T

    return {"mlp": mlp}


# Page 04: how the parts fit together


def rotate_with(
    where: Callable[[Tensor], Tensor] = lambda positions: positions,
    base: float | None = None,
    keys: bool = True,
) -> Parts:
    """RoPE at other positions, with another base, or of the queries alone."""
    num_kv_heads = load_story().config.num_key_value_heads

    def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
        if not keys and x.shape[1] == num_kv_heads:
            return x
        return plain.rotate(x, where(positions), base or theta)

    return {"rotate": rotate}


def rotate_neighbours() -> Parts:
    """Pairs of neighbours, as other models have them, and not of halves."""

    def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
        apart = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
        turned = plain.rotate(apart, positions, theta)
        halves = turned.chunk(2, dim=-1)
        return torch.stack(halves, dim=-1).flatten(-2)

    return {"rotate": rotate}


def skip_head_norms() -> Parts:
    """Queries and keys as the projections leave them."""
    head_dim = load_story().config.head_dim

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x if x.shape[-1] == head_dim else plain.norm(x, weight, eps)

    return {"norm": norm}


# Page 06: a cache. The prompt is read at once and as it should be; the bugs hit what follows.


def read_cache_with(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda key, value: (
        key,
        value,
    ),
    hide: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    raw: bool = False,
) -> Parts:
    """New tokens see keys and values, or a mask, that are not those of the prompt's reading."""
    prompt = len(load_story().ids)
    [right] = attend_with().values()
    seen: list[Tensor] = []

    def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
        seen[:] = [*seen[-1:], x.transpose(0, 1)]  # at last the keys, [H_kv, S, D]
        return plain.rotate(x, positions, theta)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs: Tensor = right(query, key, value)
        length = key.shape[-2]
        if length <= prompt:
            return outputs
        key, value = change(seen[-1] if raw else key, value)
        hidden = hide(torch.ones(length, length).triu(1).bool())
        wrong: Tensor = attend_with(hide=lambda _: hidden)["attend"](query, key, value)
        return torch.cat((outputs[:, :prompt], wrong[:, prompt:]), dim=1)

    return {"rotate": rotate, "attend": attend}


def overwrite_block(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Somebody else's tokens in the first four slots."""
    slots = [4, 5, 6, 7, *range(4, key.shape[-2])]
    return key[:, slots], value[:, slots]


def hide_all_but_first(hidden: Tensor) -> Tensor:
    """What `is_causal=True` does with one query and many keys."""
    return torch.ones_like(hidden).index_fill(1, torch.tensor([0]), False)


def stop_at_prompt(positions: Tensor) -> Tensor:
    """New tokens begin to count at 0 again."""
    prompt = len(load_story().ids)
    return torch.where(positions < prompt, positions, positions - prompt)


BUGS: dict[str, list[Bug]] = {
    "01": [
        Bug(
            "no causal mask",
            lambda: attend_with(hide=lambda length: torch.zeros(length, length)),
            "The last token has no future that could be hidden, and it alone is asked what comes "
            "next. All tokens before it are read wrongly. The text does not show it, a comparison "
            "of numbers does.",
        ),
        Bug(
            "scores are not divided by √D",
            lambda: attend_with(score=lambda q, k: q @ k.mT),
            "All scores are eight times too large, so that each query hears one key alone.",
        ),
        Bug(
            "key/value heads are paired 0 1 0 1, not 0 0 1 1",
            lambda: attend_with(tiled=True),
            "All shapes are right. Only a comparison of numbers finds it.",
        ),
        Bug(
            "a token may not see itself",
            lambda: attend_with(hide=hide_itself),
            "The mask begins one column too early.",
        ),
        Bug(
            "softmax over the queries, not over the keys",
            lambda: attend_with(dim=-2),
            "The score matrix is square while a prompt is read, so no shape complains.",
        ),
    ],
    "03": [
        Bug(
            "the norm forgets its weight",
            lambda: norm_with(root_mean_square, weighs=False),
            "A test with weights of one would never see it.",
        ),
        Bug(
            "LayerNorm in place of RMSNorm",
            lambda: norm_with(
                lambda x, eps: root_mean_square(x - x.mean(-1, keepdim=True), eps)
            ),
            "It subtracts the mean first, which is small here.",
        ),
        Bug(
            "the norm divides by the sum, not by the mean",
            lambda: norm_with(
                lambda x, eps: x * (x.pow(2).sum(-1, keepdim=True) + eps).rsqrt()
            ),
            "Everything is smaller by √E, and the queries and keys by √D.",
        ),
        Bug(
            "eps is forgotten",
            lambda: norm_with(lambda x, eps: root_mean_square(x, 0.0)),
            "Where no vector is near zero it changes nothing that one sees. A token whose vector "
            "is zero would make NaN of it.",
        ),
        Bug(
            "gate and up are swapped",
            lambda: mlp_with(F.silu, swapped=True),
            "Both have the same shape. It happens where the two are merged into one weight.",
        ),
        Bug(
            "GELU in place of SiLU",
            lambda: mlp_with(F.gelu),
            "The two curves are much alike, and so are the texts.",
        ),
    ],
    "04": [
        Bug(
            "RoPE pairs neighbours, not halves",
            rotate_neighbours,
            "Both ways exist in the wild, and the checkpoint does not say which it wants.",
        ),
        Bug(
            "rope_theta is 10,000, not 1,000,000",
            lambda: rotate_with(base=10_000.0),
            "The text reads well. Only a comparison of numbers tells that it is another.",
        ),
        Bug(
            "positions begin at 1",
            lambda: rotate_with(where=lambda positions: positions + 1),
            "It changes nothing but rounding: the score knows only distances (page 02).",
        ),
        Bug(
            "RoPE turns the queries and forgets the keys",
            lambda: rotate_with(keys=False),
            "Then the score depends on where a query stands, and not on the distance.",
        ),
        Bug(
            "queries and keys are not normalised",
            skip_head_norms,
            "Qwen2 has no such norm; it is what Qwen3 added.",
        ),
        Bug(
            "gate and up are swapped",
            lambda: mlp_with(F.silu, swapped=True),
            "Attention in layer 0 is right, what comes after the MLP is not: look where the "
            "error begins.",
        ),
    ],
    "06": [
        Bug(
            "new tokens count their positions from 0 again",
            lambda: rotate_with(where=stop_at_prompt),
            "The first new token is right, because it comes from the prompt.",
        ),
        Bug(
            "keys go into the cache before RoPE",
            lambda: read_cache_with(raw=True),
            "The prompt attends to keys of its own step, and they are right.",
        ),
        Bug(
            "a new token sees the oldest key alone",
            lambda: read_cache_with(hide=hide_all_but_first),
            "It is what `is_causal=True` does when one query meets many keys.",
        ),
        Bug(
            "a new token's own key is not read",
            lambda: read_cache_with(
                hide=lambda hidden: hidden | torch.eye(len(hidden)).bool()
            ),
            "The length of the sequence is one too small: the step attends first and counts "
            "its token afterwards.",
        ),
        Bug(
            "another request writes into the first block",
            lambda: read_cache_with(change=overwrite_block),
            "Alone, each request is right. Test every request beside others.",
        ),
    ],
}
"""By the page whose parts they are planted in."""


def examine(story: Story, parts: Parts, told: list[int] | None = None) -> Symptoms:
    """Lets a model tell the story, and then read it as the right one tells it.

    Args:
        story: what `load_story` returns.
        parts: of `story.forward`.
        told: the ids of the right story; None: this model is the right one.
    """
    ids = list(story.ids)
    with torch.inference_mode():
        for _ in range(NUM_NEW_TOKENS):
            ids.append(int(plain.forward(ids, story, **parts)[-1].argmax()))
        streams: list[Tensor] = []
        norm = parts.get("norm", plain.norm)

        def note(x: Tensor, weight: Tensor, eps: float) -> Any:
            if x.dim() == 2:  # not of the heads
                streams.append(x)
            return norm(x, weight, eps)

        watched: dict[str, Any] = {**parts, "norm": note}
        plain.forward(told or ids, story, **watched)
        end = find_difference(told or ids, ids) or len(story.ids)
        logits = plain.forward(ids[:end], story, **parts)[-1]
    return Symptoms(ids, torch.stack(streams), logits)


@cache
def examine_bug(page: str, number: int) -> tuple[Symptoms, Symptoms]:
    """The right model and one with the bug of that number, counted from 1; 0 is none."""
    story = load_story()
    if number == 0:
        right = examine(story, {})
        return right, right
    right = examine_bug(page, 0)[0]
    return right, examine(story, BUGS[page][number - 1].plant(), right.ids)


def measure_errors(right: Symptoms, wrong: Symptoms) -> Tensor:
    """How far the stream is off at each point, relative to its length, `[points]`."""
    apart: Tensor = (wrong.streams - right.streams).flatten(1).norm(dim=1)
    lengths: Tensor = right.streams.flatten(1).norm(dim=1)
    return apart / lengths


def find_difference(right: list[int], wrong: list[int]) -> int | None:
    """The first place at which two stories differ; None if they are the same."""
    pairs = enumerate(zip(right, wrong, strict=True))
    return next((i for i, (ours, theirs) in pairs if ours != theirs), None)


def bug_laboratory(page: str = "01") -> Explorer:
    """Bugs by number: what they do to story, probabilities and layers, and then their names.

    Args:
        page: "01", "03", "04" or "06", whose bugs are planted.

    Raises:
        ValueError: if no bugs belong to that page.
    """
    if page not in BUGS:
        raise ValueError(f"no bugs for page {page!r}: choose one of {sorted(BUGS)}")
    numbers = [("none", 0), *((str(i + 1), i + 1) for i in range(len(BUGS[page])))]
    controls = {
        "number": choice_slider("Bug", numbers, 1),
        "named": choice_menu("Its name", [("hidden", False), ("shown", True)], False),
    }

    def draw(number: int, named: bool) -> tuple[Figure, str]:
        return bug_figure(page, number, named)

    return Explorer("bug_laboratory", controls, draw)


NOTHING = 1e-5  # smaller errors are rounding


def bug_figure(page: str, number: int, named: bool) -> tuple[Figure, str]:
    """The two stories, what comes where they part, and the error along the layers."""
    story = load_story()
    right, wrong = examine_bug(page, number)
    parts_at = find_difference(right.ids, wrong.ids)
    errors = measure_errors(right, wrong).tolist()
    figure = Figure(figsize=(7.6, 4.6))
    title = (
        "no bug"
        if number == 0
        else f"Bug {number}: {BUGS[page][number - 1].name if named else '?'}"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    grid = figure.add_gridspec(2, 2, height_ratios=[0.62, 1.7], width_ratios=[1, 1.15])
    draw_stories(figure.add_subplot(grid[0, :]), story, right, wrong, parts_at)
    draw_candidates(figure.add_subplot(grid[1, 0]), story, right, wrong, parts_at)
    draw_errors(figure.add_subplot(grid[1, 1]), errors)
    begins = next((i for i, error in enumerate(errors) if error > NOTHING), None)
    if number == 0:
        return (
            figure,
            "This is the right model. Choose a bug: what does it do, and where?",
        )
    bug = BUGS[page][number - 1]
    told = (
        "The story stays the same."
        if parts_at is None
        else f"The story parts at new token {parts_at - len(story.ids) + 1}."
    )
    where = (
        "Along the layers nothing is off but by rounding."
        if begins is None
        else f"The error begins {name_point(begins)}, with {share(errors[begins])}, and ends at "
        f"{share(errors[-1])}."
    )
    asks = f"It is: {bug.name}. {bug.why}" if named else "Which bug is it?"
    return figure, f"Bug {number}. {told} {where} {asks}"


def share(error: float) -> str:
    """In percent, to two digits if it is small."""
    return f"{100 * error:.0f} %" if error >= 0.1 else f"{100 * error:.2g} %"


def name_point(point: int) -> str:
    """Where in the model a point of the stream is."""
    if point == 0:
        return "in the embedding"
    layer, half = divmod(point - 1, 2)
    return f"after {('attention', 'the MLP')[half]} in layer {layer}"


def draw_stories(
    ax: Axes, story: Story, right: Symptoms, wrong: Symptoms, parts_at: int | None
) -> None:
    """Both texts, from the prompt on, with a mark where they part."""
    ax.axis("off")
    prompt = len(story.ids)
    for y, name, symptoms, colour in (
        (1.0, "right", right, US.colour),
        (0.38, "with the bug", wrong, "#A0407A"),
    ):
        end = parts_at if parts_at is not None else len(symptoms.ids)
        same = story.tokenizer.decode(symptoms.ids[prompt:end])
        rest = story.tokenizer.decode(symptoms.ids[end:])
        text = f"… took the{same}" + (f" ▸{rest}" if rest else "")
        text = "\n".join(textwrap.wrap(" ".join(text.split()), 82)[:2])
        ax.text(
            0, y, name, va="top", weight="bold", color=colour, transform=ax.transAxes
        )
        ax.text(0.17, y, text, va="top", transform=ax.transAxes)


def draw_candidates(
    ax: Axes, story: Story, right: Symptoms, wrong: Symptoms, parts_at: int | None
) -> None:
    """What both think comes next where they part, or after the prompt."""
    end = parts_at or len(story.ids)
    with torch.inference_mode():
        logits = plain.forward(right.ids[:end], story)[-1]
    ours, theirs = logits.softmax(dim=-1), wrong.logits.softmax(dim=-1)
    likely = torch.maximum(ours, theirs).topk(5).indices
    ids = likely[ours[likely].argsort(descending=True, stable=True)].tolist()
    for i, token_id in enumerate(ids):
        ax.barh(i - 0.19, 100 * float(ours[token_id]), 0.36, **US.bar)
        ax.barh(i + 0.19, 100 * float(theirs[token_id]), 0.36, **OTHER.bar)
    labels = [token_label(story.tokenizer.decode([i]).encode()) for i in ids]
    ax.set_yticks(range(len(ids)), labels)
    ax.set(ylim=(len(ids) - 0.5, -0.5), xlim=(0, 100), xlabel="probability in %")
    before = story.tokenizer.decode([right.ids[end - 1]]).strip()
    ax.set_title(f"next after “{before}”: right, and with the bug", fontsize=10)


def draw_errors(ax: Axes, errors: list[float]) -> None:
    """The error of the stream, point by point."""
    least = 1e-8
    shown = [max(error, least) for error in errors]
    ax.plot(
        range(len(errors)),
        shown,
        color=OTHER.colour,
        marker="D",
        markeredgecolor="black",
    )
    ax.axhline(NOTHING, color="0.5", linestyle=":", linewidth=1)
    ax.text(
        len(errors) - 1,
        NOTHING,
        "rounding",
        ha="right",
        va="top",
        fontsize=9,
        color="0.35",
    )
    ax.set(
        yscale="log",
        ylim=(least / 2, 20),
        xlabel="after each layer (between: attention)",
    )
    ax.set_xticks(range(0, len(errors), 2), ["in", *map(str, range(len(errors) // 2))])
    ax.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1], ["0", "10⁻⁶", "10⁻⁴", "1 %", "100 %"])
    ax.set_title("error of the stream", fontsize=10)
    ax.grid(True)
    ax.minorticks_off()
