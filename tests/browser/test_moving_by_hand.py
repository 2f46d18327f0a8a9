"""The figures that are moved by hand, in a real browser: by pointer, by keyboard, and stripped."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from motions import MAKERS, RED, run

from folo_lib.course.motion import sampler
from folo_lib.sampler import gumbel_noise

LIGHT, DARK = (
    "background:white;color:rgb(0, 0, 0)",
    "background:#131416;color:rgb(220, 220, 220)",
)


def put(window: Any, name: str, look: str = LIGHT) -> Any:
    """Shows a figure alone, in a window without a network; its element."""
    html = MAKERS[name]().to_html()
    complaints: list[str] = []
    window.on("pageerror", lambda error: complaints.append(str(error)))
    window.context.set_offline(True)
    window.set_content(f'<!doctype html><body style="margin:16px;{look}">{html}</body>')
    figure = window.locator(".folo-moving")
    figure.complaints = complaints
    return figure


def guess(figure: Any, window: Any) -> None:
    """Answers by keyboard."""
    figure.locator(".guess").first.focus()
    window.keyboard.press("Enter")


def says(figure: Any) -> str:
    return str(figure.locator(".says").inner_text())


def drawing(figure: Any) -> str:
    return "".join(
        figure.locator("svg").evaluate_all("all => all.map(one => one.outerHTML)")
    )


@pytest.mark.parametrize("name", MAKERS)
def test_first_the_guess_then_the_knobs(window: Any, name: str) -> None:
    figure = put(window, name)
    knobs = figure.locator(".knobs")
    if figure.locator(".guess").count():
        assert not knobs.is_visible()
        assert not figure.locator(".answer").is_visible()
        guess(figure, window)
        assert figure.locator(".answer p").is_visible()
        pressed = figure.locator(".guess[aria-pressed=true]")
        assert pressed.count() == 1
        right = MAKERS[name]().guess.right  # type: ignore[union-attr]
        for i in range(figure.locator(".guess").count()):
            figure.locator(".guess").nth(i).click()
            said = figure.locator(".answer summary").inner_text()
            assert said.startswith("Yes" if i == right else "No")
    assert knobs.get_attribute("hidden") is None
    assert not figure.complaints


@pytest.mark.parametrize("name", MAKERS)
def test_every_slider_and_button_changes_something(window: Any, name: str) -> None:
    figure = put(window, name)
    guess(figure, window)
    for knob in figure.locator(".knobs [data-knob]").all():
        if not knob.is_enabled() or knob.get_attribute("data-knob") in (
            "play",
            "home",
            "reset",
        ):
            continue
        before = drawing(figure) + says(figure)
        knob.focus()
        if knob.evaluate("it => it.type") == "range":
            at_end = knob.evaluate("it => it.value === it.max")
            window.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
        elif knob.evaluate("it => it.tagName") == "SELECT":
            last = knob.evaluate("it => it.selectedIndex === it.length - 1")
            window.keyboard.press("ArrowUp" if last else "ArrowDown")
        elif knob.evaluate("it => it.type") == "text":
            is_text = knob.get_attribute("data-knob") == "text"
            for key in ("End", "a") if is_text else ("Control+a", "Backspace"):
                window.keyboard.press(key)
        else:
            window.keyboard.press("Enter")
        assert drawing(figure) + says(figure) != before, knob.get_attribute("data-knob")
    assert not figure.complaints


@pytest.mark.parametrize("name", MAKERS)
def test_on_a_phone_in_the_dark(browser: Any, name: str) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 800}, has_touch=True
    )
    tab = context.new_page()
    figure = put(tab, name, DARK)
    guess(figure, tab)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.evaluate(wide) <= 0
    fill = "it => getComputedStyle(it).fill"
    inks = {text.evaluate(fill) for text in figure.locator("svg > text").all()}
    assert inks == {"rgb(220, 220, 220)"}
    for svg in figure.locator("svg").all():
        shown, drawn = svg.evaluate(
            "it => [it.getBoundingClientRect().width, it.viewBox.baseVal.width]"
        )
        assert shown >= 0.95 * drawn, "letters keep their size"
    context.close()


@pytest.mark.parametrize("name", MAKERS)
def test_a_still_picture_where_scripts_are_stripped(browser: Any, name: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    html = re.sub(r"<script>.*?</script>", "", MAKERS[name]().to_html(), flags=re.S)
    tab.set_content(f"<!doctype html><body>{html}</body>")
    figure = tab.locator(".folo-moving")
    assert figure.locator("svg").first.is_visible()
    assert not figure.locator(".knobs").is_visible()
    assert not figure.locator(".guesses").is_visible()
    assert figure.locator(".says").inner_text() == MAKERS[name]().says
    if figure.locator(".answer").count():
        figure.locator("summary").focus()
        tab.keyboard.press("Enter")
        assert figure.locator(".answer p").is_visible(), "without a script too"
    context.close()


def drag(window: Any, element: Any, by: tuple[float, float]) -> None:
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    window.mouse.move(x, y)
    window.mouse.down()
    window.mouse.move(x + by[0] / 2, y + by[1] / 2, steps=3)
    window.mouse.move(x + by[0], y + by[1], steps=3)
    window.mouse.up()


def test_a_query_is_dragged_to_another_key(window: Any) -> None:
    figure = put(window, "query")
    guess(figure, window)
    assert says(figure).startswith("“kite” gets 99 %")
    tip = figure.locator("[data-k=tip]")
    drag(window, tip, (-140, -140))  # straight up
    said = says(figure)
    assert said.startswith(("“S” gets", "“he” gets"))
    assert tip.get_attribute("aria-valuetext") in said
    shares = [figure.locator(f"[data-k=share{i}]").text_content() for i in range(12)]
    whole = [int(share.split()[0]) for share in shares if "<" not in share]
    assert 90 <= sum(whole) <= 102
    figure.locator("[data-knob=home]").click()
    assert says(figure).startswith("“kite” gets 99 %")
    tip.focus()
    for _ in range(13):
        window.keyboard.press("ArrowLeft")
    assert "A short query cannot choose" in says(figure)


def test_the_mask_counts_as_the_library_does(window: Any) -> None:
    from folo_lib.attention import create_causal_mask

    figure = put(window, "mask")
    guess(figure, window)

    def turn(key: str, to: int) -> None:
        figure.locator(f"[data-knob={key}]").evaluate(
            "(it, to) => { it.value = to; it.dispatchEvent(new Event('input')); }", to
        )

    for length, queries in ((12, 12), (7, 3), (9, 1), (1, 1)):
        turn("T", length)
        turn("S", queries)
        seen = int((create_causal_mask(queries, length) == 0).sum())
        hidden = queries * length - seen
        assert f"of {queries * length} scores {seen} count and {hidden} are" in says(
            figure
        )
        for kind, count in (
            ("not", hidden),
            ("new", None),
            ("old", queries * (length - queries)),
        ):
            drawn = figure.locator(f'[data-k^="{kind}"][opacity="1"]').count()
            assert count in (None, drawn)


def test_both_hands_move_and_the_score_stays(window: Any) -> None:
    figure = put(window, "hands")
    guess(figure, window)
    score = says(figure).split("score is")[1]
    before = drawing(figure)
    figure.locator("[data-knob=both]").click()
    assert drawing(figure) != before and says(figure).split("score is")[1] == score
    figure.locator("[data-knob=m]").focus()
    window.keyboard.press("ArrowRight")
    assert says(figure).split("score is")[1] != score


def test_parts_of_a_layer_by_click_and_by_arrow(window: Any) -> None:
    figure = put(window, "layer")
    guess(figure, window)
    figure.locator("[data-k=o_proj]").click()
    assert says(figure).startswith("o_proj: [12, 256] → [12, 192].")
    window.keyboard.press("ArrowDown")
    assert says(figure).startswith("add 1:")
    assert figure.locator("[data-k='add 1']").evaluate(
        "it => it === document.activeElement"
    )
    assert figure.locator("svg [tabindex='0']").count() == 1
    for _ in range(20):
        window.keyboard.press("ArrowDown")
    assert says(figure).startswith("add 2:")


def test_a_cache_fills_and_is_thrown_away(window: Any) -> None:
    figure = put(window, "cache")
    guess(figure, window)
    lit = figure.locator('[data-k^="runs-"][opacity="1"]')
    assert lit.count() == 12
    figure.locator("[data-knob=next]").click()
    assert lit.count() == 1
    assert says(figure).startswith("Step 1 runs 1 token (“kite”)")
    figure.locator("[data-knob=mode]").click()
    assert lit.count() == 13
    for _ in range(7):
        figure.locator("[data-knob=next]").click()
    assert not figure.locator("[data-knob=next]").is_enabled()
    assert figure.locator("[data-k=with-count]").text_content() == "20"
    assert figure.locator("[data-k=without-count]").text_content() == "144"
    figure.locator("[data-knob=play]").click()  # from the start
    assert says(figure).startswith("Step 0")
    window.wait_for_function(
        "() => document.querySelector('.says').textContent.startsWith('Step 2')"
    )


def test_filters_in_every_order_leave_what_the_sampler_leaves(window: Any) -> None:
    figure = put(window, "filters")
    guess(figure, window)
    logits = run(RED)[0]
    for wanted in itertools.permutations(sampler.FILTERS):
        for i, name in enumerate(wanted):
            arrange(figure, window, name, i)
        counts = sampler.count_kept(logits, wanted)
        shown = [figure.locator(f"[data-k=left{i}]").text_content() for i in range(4)]
        assert shown == [f"{count:,} left" for count in counts], wanted


def arrange(figure: Any, window: Any, name: str, to: int) -> None:
    """Moves a card by the arrow keys."""
    card = figure.locator(f"[data-k={name}]")
    card.focus()
    for _ in range(4):
        window.keyboard.press("ArrowUp")
    for _ in range(to):
        window.keyboard.press("ArrowDown")


def test_a_filter_is_dragged(window: Any) -> None:
    figure = put(window, "filters")
    guess(figure, window)
    drag(window, figure.locator("[data-k=temperature]"), (0, 3 * 56))
    assert says(figure).startswith("min_p → top_k → top_p → temperature:")


def test_the_race_is_won_by_whom_the_library_draws(window: Any) -> None:
    figure = put(window, "race")
    guess(figure, window)
    facts = MAKERS["race"]().facts
    logits, count = run(RED)[0], 40
    seeds, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    noise = gumbel_noise(seeds, zeros, zeros + facts["position"], len(logits))
    sums = (logits + noise)[:, facts["ids"]]
    for seed in range(count):
        figure.locator("[data-knob=one]").click()
        word = facts["words"][int(sums[seed].argmax())]
        assert says(figure).startswith(
            f"Race {seed + 1} (seed {seed}): “{word}” is drawn."
        )
    assert len({int(i) for i in sums.argmax(dim=-1)}) > 3


def slide(figure: Any, key: str, to: int) -> None:
    figure.locator(f"[data-knob={key}]").evaluate(
        "(it, to) => { it.value = to; it.dispatchEvent(new Event('input')); }", to
    )


def test_stop_strings_are_held_back_as_the_library_does(window: Any) -> None:
    from folo_lib import bundled_model_path, load_tokenizer
    from folo_lib.request import IncrementalDetokenizer, TokenBytes
    from folo_lib.sampling_params import SamplingParams

    tokenizer = load_tokenizer(bundled_model_path())
    token_bytes = TokenBytes(tokenizer)
    figure = put(window, "stops")
    guess(figure, window)
    for text, stop in (
        (" A friendly mouse named Felix met a mouse named Fox. Fox", "mouse named Fox"),
        ("She said 🪁 and 12 don't!", "🪁 and 13"),
        ("aaabaaab", "aab"),
        ("the  end ", "d "),
        ("no stop at all", ""),
    ):
        figure.locator("[data-knob=text]").fill(text)
        figure.locator("[data-knob=stop]").fill(stop)
        ids = tokenizer(text).input_ids
        params = SamplingParams(stop=[stop] if stop else None)
        reader, stopped = IncrementalDetokenizer(token_bytes, params), False
        for step in range(len(ids) + 1):
            slide(figure, "step", step)
            lines = figure.locator("[data-k^=sent]").all_text_contents()
            assert "".join(lines).replace("·", " ") == reader.text, (text, step)
            if stopped:
                assert "completes the stop string" in says(figure)
                break
            ahead = figure.locator('[data-k^=ahead][opacity="1"]').count()
            assert ahead == len(ids) - step, "as many tokens as the tokenizer has"
            if step < len(ids):
                stopped = bool(reader.append(ids[step]))


def test_the_queue_runs_as_the_scheduler_does(window: Any) -> None:
    from motions import REQUESTS

    from folo_lib import bundled_model_path, load_tokenizer
    from folo_lib.config import EngineConfig
    from folo_lib.engine import FCFSScheduler
    from folo_lib.inputs import InputProcessor
    from folo_lib.runner import SampledToken
    from folo_lib.sampling_params import SamplingParams

    tokenizer = load_tokenizer(bundled_model_path())
    processor = InputProcessor(tokenizer, vocab_size=2048, max_model_len=64)
    config = EngineConfig(device="cpu", block_size=4)
    scheduler = FCFSScheduler(config, num_blocks=8)
    figure = put(window, "queue")
    guess(figure, window)
    requests = {}
    for told in REQUESTS:
        params = SamplingParams(max_tokens=len(told.words), ignore_eos=True)
        [request] = processor.process_request(told.prompt, params, request_id=told.name)
        requests[request.sample_id] = request
        scheduler.add(request)
    for step in range(sum(len(told.words) for told in REQUESTS)):
        if step:
            figure.locator("[data-knob=next]").click()
        [one] = scheduler.schedule().scheduled
        request = requests[one.request_id]
        assert f"runs {one.num_tokens} token" in says(figure)
        assert f"of {request.request_id}," in says(figure)
        request.append_token(SampledToken(300))
        if request.status.is_finished:
            scheduler.finish(request)
        free = 8 - scheduler.get_stats().num_used_blocks
        assert f"Blocks free: {free} of 8." in says(figure)
    assert not figure.locator("[data-knob=next]").is_enabled()


def test_readers_leave_and_blocks_are_lost(window: Any) -> None:
    figure = put(window, "queue")
    guess(figure, window)
    for knob in ("forget", "leave", "next", "leave", "next"):
        figure.locator(f"[data-knob={knob}]").click()
    assert says(figure).startswith("Cleo needs 3 blocks and cannot start.")
    assert says(figure).endswith("Blocks free: 2 of 8, lost: 6.")
    assert figure.locator('[data-k^=lost][opacity="1"]').count() == 6
    figure.locator("[data-knob=reset]").click()
    figure.locator("[data-k=sign1]").focus()  # it waits
    window.keyboard.press("Enter")
    assert says(figure).startswith("Ben is withdrawn; it had no blocks yet.")
    ended = figure.locator("[data-k=ended0]").text_content()
    assert ended == "withdrawn before it ran"


def test_the_roofline_says_what_python_counts(window: Any) -> None:
    from folo_lib.course.motion.cards import CARDS, count_step, describe_step
    from folo_lib.course.widgets import MODEL_SHAPES

    figure = put(window, "roofline")
    guess(figure, window)
    cost, facts = count_step(MODEL_SHAPES["Qwen3-0.6B"]), MAKERS["roofline"]().facts
    cases = ("L4", 8, 128), ("H100", 1024, 128), ("H200", 32, 32768)
    for name, batch, context in cases:
        figure.locator("[data-knob=card]").select_option(label=name)
        slide(figure, "batch", facts["batches"].index(batch))
        slide(figure, "context", facts["contexts"].index(context))
        read = cost.weights + batch * context * cost.cache
        work = batch * (cost.products + context * cost.attention)
        times = read / CARDS[name].bandwidth / 1e9, work / CARDS[name].peak / 1e9
        expected = describe_step(batch, context, read, work, name, *times)
        assert says(figure) == expected


def test_a_gpu_is_chosen(window: Any) -> None:
    figure = put(window, "choice")
    guess(figure, window)
    assert says(figure).endswith("These do: A100, H100, H200.")
    figure.locator("[data-knob=dtype]").select_option(label="float8")
    assert says(figure).endswith("These do: RTX 4090, A100, H100, H200.")
    figure.locator("[data-knob=model]").select_option(label="Qwen3-32B")
    assert "RTX 4090" not in says(figure)
    slide(figure, "users", 9)
    assert says(figure).endswith("None of them does.")


EXAMPLES = {  # how the still pictures come about: press, or set a slider
    "race": ["many"] * 5,
    "roofline": [("batch", 6)],
    "queue": ["forget", "leave", "next", "next", "next"],
}


def words_drawn(figure: Any) -> list[str]:
    """The texts that can be seen, in the order of the drawing."""
    seen = "it => it.textContent && !it.closest('[opacity=\"0\"]')"
    return [
        text.text_content()
        for text in figure.locator("svg text").all()
        if text.evaluate(seen)
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_still_picture_shows_what_is_to_be_found(browser: Any, name: str) -> None:
    """With the script nothing of it is seen before the guess, and all of it can be reached."""
    bare = browser.new_context(java_script_enabled=False).new_page()
    still = put(bare, name)
    found, told = words_drawn(still), says(still)
    figure = put(browser.new_context().new_page(), name)
    first = words_drawn(figure), says(figure)
    assert first[0] != found and first[1] != told
    window = figure.page
    guess(figure, window)
    for act in EXAMPLES[name]:
        if isinstance(act, tuple):
            slide(figure, *act)
        else:
            figure.locator(f"[data-knob={act}]").click()
    assert words_drawn(figure) == found
    assert told.startswith(says(figure))
    bare.context.close()
    window.context.close()


def test_before_the_guess_nothing_is_given_away(window: Any) -> None:
    figure = put(window, "race")
    counts = figure.locator("[data-k^=count]").all_text_contents()
    assert counts == ["0"] * 8 and says(figure).startswith("Each token stands at its")
    figure = put(window, "roofline")
    assert figure.locator('[data-k^=trail][opacity="1"]').count() == 0
    assert says(figure).startswith("A step of 1 request reads")
    figure = put(window, "queue")
    assert figure.locator('[data-k^=lost][opacity="1"]').count() == 0
    assert says(figure).startswith("A step runs 6 tokens of Ann")
