"""The figures that are moved by hand, each made as its page makes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from folo_lib import bundled_model_path, load_model, load_tokenizer
from folo_lib.course import story
from folo_lib.course.motion.attention import drag_query, slide_mask
from folo_lib.course.motion.base import Motion
from folo_lib.course.motion.cards import choose_gpu, move_roofline
from folo_lib.course.motion.kv_cache import fill_cache
from folo_lib.course.motion.layer import explore_layer
from folo_lib.course.motion.queue import Told, run_queue
from folo_lib.course.motion.rope import turn_hands
from folo_lib.course.motion.sampler import order_filters, race
from folo_lib.course.motion.stops import step_tokens
from folo_lib.course.widgets import MODEL_SHAPES

RED = "She had a red"


@cache
def load() -> story.Story:
    return story.load_story()


def label(token_id: int) -> str:
    return str(load().tokenizer.decode([token_id])).strip()


def dotted(token_id: int) -> str:
    """As page 07 writes it."""
    return repr(load().tokenizer.decode([token_id]))[1:-1].replace(" ", "·")


@cache
def run(text: str = story.STORY) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits after a text, what RoPE got, and what attention got, in order."""
    before: list[Tensor] = []
    attended: list[Tensor] = []

    def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
        before.append(x)
        return story.rotate(x, positions, theta)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended.extend((query, key))
        return story.attend(query, key, value)

    ids = load().tokenizer.encode(text).ids
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
    return order_filters(run(RED)[0], dotted)


def make_race() -> Motion:
    return race(run(RED)[0], dotted, len(load().tokenizer.encode(RED).ids))


def make_roofline() -> Motion:
    return move_roofline(MODEL_SHAPES["Qwen3-0.6B"], "Qwen3-0.6B")


def make_stops() -> Motion:
    return step_tokens(load_tokenizer(bundled_model_path()))


REQUESTS = [
    Told("Ann", "She had a red kite", 6, [" and", " took", " good", " care", " of"]),
    Told(
        "Ben",
        "The fox",
        2,
        [" named", " Tobin", " lived", " near", " a", " big", " swamp"],
    ),
    Told("Cleo", "Tom saw a big", 5, [" beach", " lived", " a", " happy"]),
]


def make_queue() -> Motion:
    return run_queue(REQUESTS)


def make_choice() -> Motion:
    return choose_gpu(MODEL_SHAPES)


MAKERS: dict[str, Callable[[], Motion]] = {
    "query": cache(make_query),
    "mask": cache(make_mask),
    "hands": cache(make_hands),
    "layer": cache(make_layer),
    "cache": cache(make_cache),
    "filters": cache(make_filters),
    "race": cache(make_race),
    "roofline": cache(make_roofline),
    "stops": cache(make_stops),
    "queue": cache(make_queue),
    "choice": cache(make_choice),
}
