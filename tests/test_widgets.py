"""The widgets as Python sees them; tests/browser turns their knobs in a browser."""

from __future__ import annotations

import base64
import io
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import pytest
import torch
from PIL import Image, ImageChops
from transformers import Qwen2Config, Qwen3Config

from folo_lib import LLMEngine, bundled_model_path, load_model, load_tokenizer
from folo_lib.attention import create_causal_mask
from folo_lib.course.widgets import (
    MODEL_SHAPES,
    CourseWidget,
    Explorer,
    LiveGeneration,
    attention_explorer,
    attention_weights,
    copying_scores,
    kv_memory_calculator,
    live_generation,
    next_token_distributions,
    sampling_playground,
)
from folo_lib.course.widgets.attention import copy_targets
from folo_lib.course.widgets.base import BUSY, drawable, read_control, token_label
from folo_lib.course.widgets.generation import (
    Piece,
    cut_text,
    html_text,
    lay_out,
    split_by_token,
)
from folo_lib.course.widgets.memory import GPU_GIGABYTES, count_requests
from folo_lib.course.widgets.sampling import sampling_figure
from folo_lib.kv_cache import allocate_kv_caches
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.request import RequestOutput
from folo_lib.sampler import (
    apply_min_p_filtering,
    apply_penalties,
    apply_top_k_filtering,
    apply_top_p_filtering,
)
from folo_lib.sampling_params import SamplingParams

PNG = b"\x89PNG\r\n\x1a\n"
TEXT = "river stone cloud green river stone cloud green"
PROMPT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return load_model(
        bundled_model_path(), dtype="float32", device="cpu", use_tqdm=False
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(bundled_model_path())


@pytest.fixture(scope="module")
def engine(model: Qwen3ForCausalLM, tokenizer: Any) -> LLMEngine:
    return LLMEngine(model, tokenizer, max_model_len=512)


@pytest.fixture
def live(engine: LLMEngine) -> Iterator[LiveGeneration]:
    widget = live_generation(engine, PROMPT)
    yield widget
    widget.stop()
    assert widget.wait(20)


MAKERS = {
    "attention_explorer": lambda m, t: attention_explorer(m, t, TEXT),
    "kv_memory_calculator": lambda m, t: kv_memory_calculator(),
    "sampling_playground": lambda m, t: sampling_playground(m, t, PROMPT),
}
CHANGES = {
    "attention_explorer": {"text": "one two three one two", "layer": 1, "head": 0},
    "kv_memory_calculator": {
        "model": "Qwen3-8B",
        "context": 16384,
        "dtype": "float32",
        "batch": 64,
    },
    "sampling_playground": {
        "prompt": "The little dog",
        "temperature": 1.5,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.8,
        "token": 12,
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "frequency_penalty": 2.0,
        "seed": 5,
    },
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_picture_follows_its_controls(
    name: str, model: Qwen3ForCausalLM, tokenizer: Any
) -> None:
    widget = MAKERS[name](model, tokenizer)
    assert isinstance(widget, Explorer)
    assert set(widget.controls) == set(CHANGES[name])
    first = widget.picture()
    assert first.startswith(PNG)
    for knob, value in CHANGES[name].items():
        control = widget.controls[knob]
        before, control.value = control.value, value
        assert widget.image.value != first, knob
        control.value = before
        assert widget.image.value == first, knob
    control.value = value
    assert widget.image.value == widget.picture() != first


@pytest.mark.parametrize("name", MAKERS)
def test_controls_are_labelled_and_wait_for_the_hand(
    name: str, model: Qwen3ForCausalLM, tokenizer: Any
) -> None:
    widget = MAKERS[name](model, tokenizer)
    shown = list(widget.box.children[0].children)
    assert shown == list(widget.controls.values())  # the order of the tab key
    labels = [control.description for control in shown]
    assert all(labels) and len(set(labels)) == len(labels)
    assert not any(getattr(control, "continuous_update", False) for control in shown)


@pytest.mark.parametrize("name", MAKERS)
def test_one_output_holds_view_and_picture(
    name: str, model: Qwen3ForCausalLM, tokenizer: Any
) -> None:
    check_bundle(MAKERS[name](model, tokenizer))


def check_bundle(widget: CourseWidget) -> None:
    data, metadata = widget._repr_mimebundle_()
    assert set(data) == {
        "text/plain",
        "image/png",
        "application/vnd.jupyter.widget-view+json",
    }
    assert base64.b64decode(data["image/png"]).startswith(PNG)
    view = data["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == widget.box.model_id
    assert data["text/plain"].startswith(widget.name)
    assert "0x" not in data["text/plain"]  # the same in every run
    assert len(metadata["image/png"]["alt"]) > 40


def test_a_still_picture_says_how_to_get_the_widget() -> None:
    """In a strip below; the picture of the widget itself has none."""
    widget = kv_memory_calculator()
    plain, noted = (
        Image.open(io.BytesIO(b)) for b in (widget.picture(), widget.still())
    )
    assert noted.width == plain.width and 20 < noted.height - plain.height < 40
    above = noted.crop((0, 0, plain.width, plain.height)).convert("RGB")
    assert (
        ImageChops.difference(above, plain.convert("RGB")).getextrema() == ((0, 0),) * 3
    )
    strip = noted.crop((0, plain.height, plain.width, noted.height)).convert("L")
    assert strip.getextrema()[0] < 64  # there is ink
    data, _ = widget._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == widget.still()
    assert LiveGeneration.purpose != CourseWidget.purpose


def test_a_picture_that_is_drawn_anew_says_so_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widget = kv_memory_calculator()
    seen: list[bool] = []
    draw = widget._draw

    def watch(**values: Any) -> Any:
        seen.append(BUSY in widget.box._dom_classes)
        if values["batch"] == 8:
            raise RuntimeError("a bug")
        return draw(**values)

    monkeypatch.setattr(widget, "_draw", watch)
    widget.controls["batch"].value = 2
    assert seen == [True] and BUSY not in widget.box._dom_classes
    with pytest.raises(RuntimeError):
        widget.controls["batch"].value = 8
    assert BUSY not in widget.box._dom_classes


def test_names_are_chosen_from_a_list() -> None:
    controls = kv_memory_calculator().controls
    kinds = {name: type(control).__name__ for name, control in controls.items()}
    assert kinds["model"] == kinds["dtype"] == "Dropdown"
    assert kinds["context"] == kinds["batch"] == "SelectionSlider"


def test_the_same_widget_draws_the_same_picture() -> None:
    assert kv_memory_calculator().picture() == kv_memory_calculator().picture()


@pytest.mark.more
@pytest.mark.parametrize("name", [*MAKERS, "live_generation"])
def test_the_style_of_a_page_changes_no_picture(
    name: str, model: Qwen3ForCausalLM, tokenizer: Any, engine: LLMEngine
) -> None:
    make = MAKERS.get(name, lambda m, t: live_generation(engine, PROMPT))
    plain = make(model, tokenizer).picture()
    cycle = mpl.cycler(color=["red", "blue"], linestyle=[":", "--"])
    other = {"axes.prop_cycle": cycle, "axes.grid": True, "font.size": 20}
    with mpl.rc_context(other):
        assert make(model, tokenizer).picture() == plain


# Attention


def test_attention_rows_sum_to_one_and_none_looks_ahead(
    model: Qwen3ForCausalLM, tokenizer: Any
) -> None:
    ids = tokenizer(TEXT).input_ids
    weights = attention_weights(model, ids)
    config = model.config
    shape = (config.num_hidden_layers, config.num_attention_heads, len(ids), len(ids))
    assert weights.shape == shape
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:3]))
    assert weights.triu(1).count_nonzero() == 0


def test_attention_weights_are_hugging_faces(
    model: Qwen3ForCausalLM, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        bundled_model_path(), dtype=torch.float32, attn_implementation="eager"
    )
    ids = tokenizer(TEXT).input_ids
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids]), output_attentions=True).attentions
    torch.testing.assert_close(
        attention_weights(model, ids), torch.cat(wanted), atol=1e-4, rtol=0
    )


def test_the_model_is_left_alone(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backends() -> list[Any]:
        return [layer.self_attn.backend for layer in model.model.layers]

    before, during = backends(), []

    def look(*arguments: Any, **options: Any) -> torch.Tensor:
        during.append(backends())
        return create_causal_mask(*arguments, **options)

    monkeypatch.setattr("folo_lib.course.widgets.attention.create_causal_mask", look)
    tensors = {id(tensor) for tensor in model.parameters()}
    attention_weights(model, [1, 2, 3])
    assert during == [before] * len(before) and backends() == before
    assert {id(tensor) for tensor in model.parameters()} == tensors


@pytest.mark.parametrize(
    ("token_ids", "pairs"),
    [
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 1], [(3, 1)]),
        ([1, 2, 3, 1, 2, 3], [(3, 1), (4, 2), (5, 3)]),
        ([7, 7, 7], []),  # what came next is the token itself, or the one before
        ([9, 1, 9, 2, 9, 3], []),  # likewise
        ([1, 5, 2, 5, 3, 4, 2, 5], [(6, 3), (7, 4)]),  # 5 after 2, not the first 5
        ([1, 2, 1, 3, 4, 1], [(5, 3)]),  # the later of two
    ],
)
def test_copy_targets(token_ids: list[int], pairs: list[tuple[int, int]]) -> None:
    assert copy_targets(token_ids) == pairs


def test_copying_scores_find_the_head_that_copies() -> None:
    ids = [1, 2, 3, 1, 2, 3]
    weights = torch.full((2, 3, 6, 6), 0.1)
    weights[1, 2, [3, 4, 5], [1, 2, 3]] = torch.tensor([0.9, 0.8, 0.7])
    scores = copying_scores(weights, ids)
    assert scores is not None and scores.shape == (2, 3)
    torch.testing.assert_close(scores[1, 2].item(), 0.8)
    assert scores.flatten().argmax() == 5
    assert copying_scores(weights, [1, 2, 3, 4, 5, 6]) is None


def test_attention_explorer_opens_at_the_copying_head(
    model: Qwen3ForCausalLM, tokenizer: Any
) -> None:
    widget = attention_explorer(model, tokenizer, TEXT)
    ids = tokenizer(TEXT).input_ids
    scores = copying_scores(attention_weights(model, ids), ids)
    assert scores is not None
    chosen = widget.controls["layer"].value, widget.controls["head"].value
    assert scores[chosen] == scores.max() > 0.5
    assert "copies most" in widget.alt_text()
    widget.controls["head"].value = (chosen[1] + 1) % scores.shape[1]
    assert f"layer {chosen[0]}, head {chosen[1]}" in widget.alt_text()


def test_attention_explorer_takes_any_text(
    model: Qwen3ForCausalLM, tokenizer: Any, recwarn: pytest.WarningsRecorder
) -> None:
    widget = attention_explorer(model, tokenizer, "a b c")
    assert "repeat a phrase" in widget.alt_text()
    for text in ("$x$ \\frac{", "你好，世界", "🙂🙂", "word " * 500, "\t\n"):
        before = widget.picture()
        widget.controls["text"].value = text
        assert widget.picture() != before, text
    before = widget.picture()
    widget.controls["text"].value = ""
    assert widget.picture() == before
    assert "text is empty" in widget.caption.value
    assert not recwarn.list


# KV memory

BILLIONS = {  # as the model cards have them
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.72,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.77,
    "Qwen3-32B": 32.76,
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-7B": 7.62,
}


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_memory_is_that_of_a_model_and_its_cache(name: str) -> None:
    shape = MODEL_SHAPES[name]
    fields = dict(vars(shape))
    kind = Qwen3Config if fields.pop("model_type") == "qwen3" else Qwen2Config
    config = kind(**fields)
    with torch.device("meta"):
        built = Qwen3ForCausalLM(config).bfloat16()
    parameters = list(built.parameters())
    assert shape.count_parameters() == sum(p.numel() for p in parameters)
    assert shape.weight_bytes(torch.bfloat16) == sum(p.nbytes for p in parameters)
    caches = allocate_kv_caches(config, 5, 16, torch.bfloat16, "meta")
    held = sum(cache.nbytes for pair in caches for cache in pair)
    assert shape.kv_bytes(5 * 16, torch.bfloat16) == held
    if name in BILLIONS:
        assert shape.count_parameters() / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)


def test_the_bundled_shape_is_the_bundled_models(model: Qwen3ForCausalLM) -> None:
    for name, value in vars(MODEL_SHAPES["bundled"]).items():
        assert getattr(model.config, name) == value, name


def test_requests_that_fit() -> None:
    shape, kind = MODEL_SHAPES["Qwen3-0.6B"], torch.bfloat16
    weights, one = 596_049_920 * 2, 4096 * 28 * 2 * 8 * 128 * 2
    assert shape.kv_bytes(4096, kind) == one
    for gigabytes in GPU_GIGABYTES:
        memory = gigabytes * 10**9
        wanted = int((memory - weights) * 0.8) // one
        assert count_requests(shape, 4096, kind, memory) == wanted
        assert wanted > 0
    assert count_requests(shape, 4096, kind, weights + one) == 0  # a fifth stays free
    assert count_requests(shape, 4096, kind, weights + one * 5 // 4 + 1) == 1
    assert count_requests(shape, 4096, kind, weights - 1) == -1


def test_kv_memory_calculator_says_what_it_shows() -> None:
    widget = kv_memory_calculator()
    sentence = widget.alt_text()
    assert "weights 1.19 GB" in sentence
    assert "KV cache 0.47 GB for a request of 4,096 tokens, 3.76 GB for 8" in sentence
    assert "80% of what the weights leave free" in sentence
    assert "GiB" not in sentence
    assert "itself reaches" not in sentence
    widget.controls["context"].value = 65536
    assert "reaches 40,960 tokens, not 65,536" in widget.alt_text()


# Sampling

VOCAB = 50


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.6, "top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 0.5, "min_p": 0.01, "top_k": 12, "top_p": 0.9},
        {"repetition_penalty": 1.7, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 0.6, "frequency_penalty": -2.0, "top_p": 0.6},
    ],
)
def test_bars_are_what_the_filters_give(settings: dict[str, Any]) -> None:
    logits = torch.randn(VOCAB) * 3
    params = SamplingParams(**settings)
    prompt, output = [1, 2, 3, 3], [4, 5, 5]
    before, after = next_token_distributions(logits, params, prompt, output)
    torch.testing.assert_close(before, logits.softmax(-1))

    prompt_mask = torch.zeros(1, VOCAB, dtype=torch.bool)
    prompt_mask[0, prompt] = True
    counts = torch.bincount(torch.tensor(output), minlength=VOCAB)[None]
    penalties = (
        torch.tensor([getattr(params, name)])
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    )
    scores = apply_penalties(logits[None], prompt_mask, counts, *penalties)
    scores = apply_min_p_filtering(scores / params.temperature, params.min_p)
    scores = apply_top_k_filtering(scores, params.top_k)
    scores = apply_top_p_filtering(scores, params.top_p)
    torch.testing.assert_close(after, scores.softmax(-1)[0])
    torch.testing.assert_close(after.sum().item(), 1.0)


def test_greedy_leaves_one_token() -> None:
    logits = torch.zeros(VOCAB)
    logits[7], logits[8] = 2.0, 1.9
    greedy = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert next_token_distributions(logits, greedy, [1])[1][7] == 1
    assert next_token_distributions(logits, greedy, [7])[1][8] == 1


def test_the_playground_draws_what_the_engine_draws(
    model: Qwen3ForCausalLM,
    tokenizer: Any,
    engine: LLMEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[list[int]] = []

    def look(before: Any, after: Any, names: Any, output_ids: Any, place: int) -> Any:
        drawn.append(output_ids)
        return sampling_figure(before, after, names, output_ids, place)

    monkeypatch.setattr("folo_lib.course.widgets.sampling.sampling_figure", look)
    widget = sampling_playground(model, tokenizer, PROMPT)
    widget.controls["seed"].value = 3
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "max_tokens": 40}
    [output] = engine.generate(PROMPT, SamplingParams(**settings), use_tqdm=False)
    assert output.outputs[0].token_ids == drawn[-1] != drawn[0]


def test_the_playground_keeps_its_picture_where_nothing_can_be_drawn(
    model: Qwen3ForCausalLM, tokenizer: Any
) -> None:
    widget = sampling_playground(model, tokenizer, PROMPT)
    before = widget.picture()
    widget.controls["prompt"].value = ""
    assert widget.picture() == before
    assert "prompt is empty" in widget.caption.value
    widget.controls["prompt"].value = "The dog"
    assert widget.picture() != before
    assert "empty" not in widget.caption.value


# Live generation


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def free_blocks(engine: LLMEngine) -> int:
    stats = engine.stats()
    return stats.num_blocks - stats.num_used_blocks


def test_stop_aborts_and_frees_the_blocks(
    engine: LLMEngine, live: LiveGeneration
) -> None:
    free, empty = free_blocks(engine), len(live.text.value)
    live.controls["pace"].value = 5
    live.controls["generate"].click()
    wait_until(lambda: len(live.text.value) > empty)
    assert live.is_running and free_blocks(engine) < free
    live.controls["generate"].click()  # does nothing
    live.controls["stop"].click()
    assert live.wait(5)
    assert "abort" in live.status.value
    assert free_blocks(engine) == free
    assert not engine.has_unfinished_requests() and not engine._table.groups
    assert not live.controls["stop"].click()  # does nothing


def test_it_shows_an_example_before_anybody_presses(live: LiveGeneration) -> None:
    empty = len(live.text.value)
    live._repr_mimebundle_()
    assert len(live.text.value) > empty + 500 and "example" in live.status.value
    text = live.text.value
    live.picture()
    assert live.text.value == text


def test_enter_generates_and_stop_is_there_while_something_runs(
    live: LiveGeneration,
) -> None:
    stop, prompt = live.controls["stop"], live.controls["prompt"]
    assert stop.disabled and not stop.button_style
    assert prompt.continuous_update  # or Enter would come before the text
    live.controls["pace"].value = 15
    prompt.value = "The little dog"
    prompt._handle_custom_msg({"event": "something else"}, [])
    assert not live.is_running
    prompt._handle_custom_msg({"event": "submit"}, [])
    assert live.is_running and not stop.disabled and stop.button_style == "danger"
    wait_until(lambda: "tokens/s" in live.status.value)
    assert "Generating: " in live.status.value
    stop.click()
    assert live.wait(5)
    assert stop.disabled and not stop.button_style
    assert "tokens/s" in live.status.value and "The little dog" in live.text.value


def test_a_generation_runs_to_its_end_and_again(
    engine: LLMEngine, live: LiveGeneration
) -> None:
    live.controls["max_tokens"].value = 12
    live.controls["pace"].value = 200
    texts = []
    for _ in range(2):
        live.controls["generate"].click()
        assert live.wait(20)
        assert "length" in live.status.value and "12 tokens" in live.status.value
        texts.append(live.text.value)
    assert texts[0] == texts[1]
    live.controls["seed"].value = 1
    live.controls["generate"].click()
    assert live.wait(20)
    assert live.text.value != texts[0]


def test_live_generation_shows_a_finished_one(
    engine: LLMEngine, live: LiveGeneration
) -> None:
    check_bundle(live)
    assert live.picture() == live.picture()
    assert not engine._table.groups
    data, _ = live._repr_mimebundle_()
    live.controls["prompt"].value = "Another"
    assert live._repr_mimebundle_()[0] == data
    labels = [control.description for control in live.controls.values()]
    assert all(labels) and len(set(labels)) == len(labels)


def test_errors_are_shown_where_the_text_would_be(
    engine: LLMEngine, live: LiveGeneration
) -> None:
    live.controls["prompt"].value = ""
    live.controls["generate"].click()
    assert live.wait(5)
    assert "prompt is empty" in live.status.value


def test_an_engine_with_other_requests_is_not_refused(
    engine: LLMEngine, live: LiveGeneration
) -> None:
    live.controls["max_tokens"].value = 12
    live.controls["pace"].value = 200
    live.generate()
    assert live.wait(20)
    alone, picture = live.text.value, live_generation(engine, PROMPT).picture()
    request_id = engine.add_request(PROMPT)
    try:
        live.generate()
        assert live.wait(20)
        assert live.text.value == alone
        assert "length" in live.status.value
        assert live_generation(engine, PROMPT).picture() == picture
    finally:
        engine.abort_request(request_id)
        engine.step()


def test_a_cell_may_use_the_engine_while_text_grows(
    engine: LLMEngine, live: LiveGeneration
) -> None:
    live.controls["max_tokens"].value = 60
    live.controls["pace"].value = 200
    live.generate()
    assert live.wait(20)
    text, params = live.text.value, SamplingParams(seed=7, max_tokens=30)
    [alone] = engine.generate("The dog", params, use_tqdm=False)
    for _ in range(5):
        live.generate()
        [beside] = engine.generate("The dog", params, use_tqdm=False)
        assert live.wait(20)
        assert beside.outputs == alone.outputs
        assert live.text.value == text and "60 tokens" in live.status.value


def test_stop_is_heeded_between_slow_tokens(live: LiveGeneration) -> None:
    live.controls["pace"].value = 2  # half a second each
    live.generate()
    wait_until(lambda: "folo-live" in live.text.value and "title" in live.text.value)
    started = time.monotonic()
    live.stop()
    assert live.wait(5)
    assert time.monotonic() - started < 0.4
    assert "abort" in live.status.value


def test_live_generation_refuses(model: Qwen3ForCausalLM, engine: LLMEngine) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        live_generation(LLMEngine(model, max_model_len=64), PROMPT)
    with pytest.raises(ValueError, match="prompt is empty"):
        live_generation(engine, "")
    with pytest.raises(TypeError, match="prompt is a list"):
        live_generation(engine, [1, 2])  # type: ignore[arg-type]


def test_pieces_are_the_text_and_its_probabilities(engine: LLMEngine) -> None:
    params = SamplingParams(seed=1, max_tokens=20, logprobs=0)
    outputs: list[RequestOutput] = []
    pieces = []
    for output, new in split_by_token(engine.stream(PROMPT, params)):
        outputs.append(output)
        pieces += new
    sample = outputs[-1].outputs[0]
    assert "".join(piece.text for piece in pieces) == sample.text
    assert sample.logprobs is not None
    wanted = [
        math.exp(each[i].logprob)
        for i, each in zip(sample.token_ids, sample.logprobs, strict=True)
    ]
    assert [piece.probability for piece in pieces] == pytest.approx(wanted)


@pytest.mark.parametrize("prompt", [PROMPT, "🙂 é 你", "a\nb"])
@pytest.mark.parametrize("size", [2, 3, 7, 1000])
def test_several_tokens_at_once_are_cut_as_if_they_came_one_by_one(
    engine: LLMEngine, prompt: str, size: int
) -> None:
    params = SamplingParams(seed=4, max_tokens=24, logprobs=0)
    outputs = list(engine.stream(prompt, params))
    one_by_one = [p for _, new in split_by_token(iter(outputs)) for p in new]
    some = iter([*outputs[size - 1 :: size], outputs[-1]])
    assert [p for _, new in split_by_token(some) for p in new] == one_by_one


@pytest.mark.parametrize(
    ("text", "tokens", "parts"),
    [
        ("", [], []),
        ("held", [], ["held"]),
        (" a b", [" a", " b"], [" a", " b"]),
        (" a", [" a", "<end>"], [" a", ""]),  # left out of the text
        (" a b", ["<think>", " a", " b"], ["", " a", " b"]),
        ("é x", ["\ufffd", "\ufffd", " x"], ["", "", "é x"]),
        ("é x y", ["\ufffd", "\ufffd", " x", " y"], ["", "é", " x", " y"]),
        (" held on", [" on"], [" held on"]),
        (" held on", [" on", ""], [" held on", ""]),
        (" cut", [" cut short", " more"], ["", " cut"]),
    ],
)
def test_text_is_cut_at_its_tokens(
    text: str, tokens: list[str], parts: list[str]
) -> None:
    assert cut_text(text, tokens) == parts
    assert "".join(parts) == text


def test_probability_is_told_with_and_without_colour() -> None:
    pieces = [Piece("<b>", 1.0), Piece(" x", 0.3), Piece(" y", 0.01), Piece("", 0.5)]
    assert [piece.num_underlines for piece in pieces] == [0, 1, 2, 0]
    assert pieces[0].colour == "#ffffff"
    brightness = [int(piece.colour[3:5], 16) for piece in pieces[:3]]
    assert brightness == sorted(brightness, reverse=True)
    text = html_text("a < b", pieces)
    assert "a &lt; b" in text and "&lt;b&gt;" in text and "<b>" not in text
    assert text.count("<span") == 4  # the prompt, and what has text


def test_lines_break_between_tokens() -> None:
    texts = ["one", " two", " three", "\nfour", "x" * 25, "", "\n"]
    placed = [
        (line, column, piece.text)
        for line, column, piece in lay_out([Piece(text, 0.5) for text in texts], 10)
    ]
    assert placed == [
        (0, 0, "one"),
        (0, 3, " two"),
        (1, 0, "three"),
        (2, 0, "four"),
        (3, 0, "x" * 10),
        (4, 0, "x" * 10),
        (5, 0, "x" * 5),
    ]


def test_no_line_begins_with_a_comma() -> None:
    """A word goes to the next line whole, with the sign after it."""
    texts = ["one", " two", "th", ",", " so"]
    placed = [
        (line, column, piece.text)
        for line, column, piece in lay_out([Piece(text, 0.5) for text in texts], 9)
    ]
    assert placed == [
        (0, 0, "one"),
        (1, 0, "two"),
        (1, 3, "th"),
        (1, 5, ","),
        (1, 6, " so"),
    ]


# Labels


def test_a_text_field_shows_line_breaks_and_keeps_them(
    model: Qwen3ForCausalLM, tokenizer: Any, engine: LLMEngine
) -> None:
    widget = attention_explorer(model, tokenizer, "a\nb")
    assert widget.controls["text"].value == "a↵b"
    assert read_control(widget.controls["text"]) == "a\nb"
    live = live_generation(engine, "a\nb")
    live.controls["max_tokens"].value = 1
    live.generate()
    assert live.wait(20)
    assert "a\nb</span>" in live.text.value


def test_labels_can_be_drawn() -> None:
    assert token_label(b" the") == "·the"
    assert token_label(b"\n") == "↵"
    assert token_label("é".encode()) == "é"
    assert token_label(b"\xe4\xbd") == "<E4 BD>"
    assert token_label(b"x" * 40) == "x" * 11 + "…"
    assert token_label(b"\x00") == "□"
    assert drawable("a你🙂") == "a□□"


def test_without_ipywidgets_the_error_names_the_cure() -> None:
    code = (
        "import sys; sys.modules['ipywidgets'] = None; import folo_lib.course.widgets"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode
    assert 'pip install "folo-lib[notebooks] @ git+' in done.stderr.splitlines()[-1]
