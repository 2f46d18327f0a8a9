"""The figures that are moved by hand, each made as its page makes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from folo_lib import bundled_model_path, load_model
from folo_lib.course import story
from folo_lib.course.motion.attention import drag_query, slide_mask
from folo_lib.course.motion.base import Motion
from folo_lib.course.motion.kv_cache import fill_cache
from folo_lib.course.motion.layer import explore_layer
from folo_lib.course.motion.rope import turn_hands
from folo_lib.course.motion.sampler import order_filters, race


@cache
def load() -> story.Story:
    return story.load_story()


def label(token_id: int) -> str:
    return str(load().tokenizer.decode([token_id])).strip()


@cache
def run(text: str = "") -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits after the story and a text, what RoPE got, and what attention got, in order."""
    before: list[Tensor] = []
    attended: list[Tensor] = []

    def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
        before.append(x)
        return story.rotate(x, positions, theta)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended.extend((query, key))
        return story.attend(query, key, value)

    ids = [*load().ids, *load().tokenizer.encode(text).ids]
    with torch.inference_mode():
        logits = story.forward(ids, load(), rotate=rotate, attend=attend)[-1]
    return logits, before, attended


def make_query() -> Motion:
    query, key = run()[2][:2]
    return drag_query(query[1, -1], key[0], load().tokens)


def make_mask() -> Motion:
    return slide_mask(load().tokens)


def make_hands() -> Motion:
    query, key = run()[1][:2]
    theta = load().config.rope_parameters["rope_theta"]
    return turn_hands(query[11, 1], key[5, 0], theta, (11, 5), ("the", "kite"))


def make_layer() -> Motion:
    model = load_model(bundled_model_path(), "float32", "cpu", use_tqdm=False)
    return explore_layer(model, load().ids)


def make_cache() -> Motion:
    told = load().tokenizer.encode(story.continue_story(load())).ids
    words = [label(i) for i in told[: len(load().ids) + 9]]
    return fill_cache(words, len(load().ids), 2 * 6 * 2 * 64 * 4)


def make_filters() -> Motion:
    return order_filters(run(" kite outside.")[0], label)


def make_race() -> Motion:
    length = len(load().ids) + len(load().tokenizer.encode(" kite outside.").ids)
    return race(run(" kite outside.")[0], label, length)


MAKERS: dict[str, Callable[[], Motion]] = {
    "query": cache(make_query),
    "mask": cache(make_mask),
    "hands": cache(make_hands),
    "layer": cache(make_layer),
    "cache": cache(make_cache),
    "filters": cache(make_filters),
    "race": cache(make_race),
}
