"""The pages with widgets in JupyterLab, run and used by keyboard as a reader would."""

from __future__ import annotations

import itertools
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import nbformat
import pytest
from lab_server import ROOT, Lab

expect = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is missing: pip install -e '.[browser]'"
).expect
expect.set_options(timeout=60_000)

SLOW = 180_000  # milliseconds: a page runs in under 25 s on an idle machine
# What to turn, and which way there is room: of each widget of a page.
BUGS = {"Bug": "ArrowRight", "Its name": "ArrowDown"}
MEMORY = {
    "Model": "ArrowDown",
    "Context, tokens": "ArrowRight",
    "dtype": "ArrowUp",
    "Batch, requests": "ArrowLeft",
}
PAGES = {
    "01_attention": [BUGS],
    "03_layers": [BUGS],
    "04_qwen3": [BUGS],
    "05_checkpoint": [{"Layer": "ArrowLeft", "Head": "ArrowLeft"}],
    "06_kv_cache": [BUGS, MEMORY],
    "07_sampler": [{"Temperature": "ArrowRight", "Top-p (1: off)": "ArrowLeft"}],
}
WHOLE = "06_kv_cache"  # runs as it is; of the others only what the widgets need
SET_UP = """\
import matplotlib.pyplot as plt
from folo_lib import bundled_model_path, load_model, load_tokenizer
plt.style.use("folo.mplstyle")
model = load_model(bundled_model_path(), "float32", "cpu", use_tqdm=False)
tokenizer = load_tokenizer(bundled_model_path())
repeat = words = "stone garden river lamp. "
"""

BACK = {
    "ArrowLeft": "ArrowRight",
    "ArrowRight": "ArrowLeft",
    "ArrowDown": "ArrowUp",
    "ArrowUp": "ArrowDown",
}
# What a slider or a drop-down list says to those who hear it.
VALUE = "knob => knob.getAttribute('aria-valuetext') ?? knob.value"

# JupyterLab shows errors and what goes to stderr alike; a page has neither.
TROUBLE = '[data-mime-type="application/vnd.jupyter.stderr"]'
# "ran", "failed", or null while cells are still to run. Cells tagged raises-exception may fail.
STATE = """([may_fail, trouble]) => {
  const cells = [...document.querySelectorAll('.jp-Notebook .jp-Cell')];
  if (cells.some((cell, i) => !may_fail.includes(i) && cell.querySelector(trouble)))
    return 'failed';
  const code = cells.filter(  // a folded cell shows no number
    cell => cell.matches('.jp-CodeCell') && !cell.querySelector('.jp-InputPlaceholder'));
  const prompts = code.map(cell => cell.querySelector('.jp-InputPrompt').textContent);
  return code.length && prompts.every(text => /\\[\\d+\\]/.test(text)) ? 'ran' : null;
}"""
# What an image shows, as a number of its bytes; null while it is being replaced.
PICTURE = """async image => {
  try {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const digest = await crypto.subtle.digest('SHA-256', bytes);
    return image.naturalWidth ? new Uint32Array(digest).join() : null;
  } catch { return null; }
}"""


def run_page(window: Any, lab: Lab, name: str) -> str:
    """Opens a page and runs all its cells; how that ended."""
    cells = nbformat.read(lab.folder / f"{name}.ipynb", as_version=4).cells
    may_fail = [
        i
        for i, c in enumerate(cells)
        if "raises-exception" in c.metadata.get("tags", [])
    ]
    window.goto(f"{lab.url}/lab/workspaces/{name}/tree/{name}.ipynb")
    window.locator(".jp-Notebook .jp-Cell").nth(len(cells) - 1).wait_for(
        state="attached"
    )
    window.get_by_text("| Idle").wait_for()  # earlier, Run would ask for a kernel
    window.get_by_role("menuitem", name="Run", exact=True).click()
    window.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    state = window.wait_for_function(STATE, arg=[may_fail, TROUBLE], timeout=SLOW)
    return str(state.json_value())


def wait_for_picture(image: Any, wanted: Callable[[str], bool]) -> str:
    """What the image shows as soon as it is what is wanted."""
    deadline = time.monotonic() + 60
    while True:
        picture = image.evaluate(PICTURE)
        if picture and wanted(picture):
            return str(picture)
        assert time.monotonic() < deadline, "the picture stayed as it was"
        time.sleep(0.05)


def trouble_in(window: Any) -> str:
    return "\n".join(window.locator(TROUBLE).all_inner_texts())


def test_a_failing_cell_is_noticed(window: Any, lab: Lab) -> None:
    """Else the tests below would prove nothing."""
    cell = nbformat.v4.new_code_cell
    cells = [cell("1 / 0", metadata={"tags": ["raises-exception"]}), cell("2 / 0")]
    for name, count in (("allowed", 1), ("failing", 2)):
        write_page(lab, name, cells[:count])
    assert run_page(window, lab, "allowed") == "ran"
    assert run_page(window, lab, "failing") == "failed"
    assert "ZeroDivisionError" in trouble_in(window)


def test_it_opens_at_the_tour_with_its_contents_beside_it(
    window: Any, lab: Lab
) -> None:
    """The settings of tools/jupyter are applied, and saving writes into the copy alone."""
    status = ["git", "status", "--porcelain", "notebooks"]
    before = subprocess.check_output(status, cwd=ROOT)
    page = lab.folder / "00_tour.ipynb"
    cells = nbformat.read(page, as_version=4).cells
    window.goto(f"{lab.url}/")
    shown = window.locator(".jp-Notebook .jp-Cell")
    shown.nth(len(cells) - 1).wait_for(state="attached")  # all, seen or not
    contents = window.locator(".jp-TableOfContents:visible")
    expect(contents).to_contain_text("2. It writes")
    expect(window.locator(".jp-FileBrowser:visible")).to_have_count(0)
    expect(window.get_by_text("| Idle")).to_be_visible()
    folded = [c.id for c in cells if c.metadata.get("jupyter", {}).get("source_hidden")]
    hidden = window.locator(".jp-Notebook .jp-Cell .jp-InputPlaceholder")
    expect(hidden).to_have_count(len(folded))
    asked = window.locator(".jp-toastContainer, .Toastify__toast")
    assert not asked.filter(has_text="news").count()
    written = page.stat().st_mtime_ns
    window.keyboard.press("Control+s")  # as autosave does after two minutes
    deadline = time.monotonic() + 30
    while page.stat().st_mtime_ns == written and time.monotonic() < deadline:
        time.sleep(0.1)
    assert page.stat().st_mtime_ns != written
    assert subprocess.check_output(status, cwd=ROOT) == before


def write_page(lab: Lab, name: str, cells: list[Any]) -> None:
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, lab.folder / f"{name}.ipynb")


def test_the_arrow_keys_turn_the_knobs_of_a_page(window: Any, lab: Lab) -> None:
    assert run_page(window, lab, WHOLE) == "ran", trouble_in(window)
    cells = nbformat.read(lab.folder / f"{WHOLE}.ipynb", as_version=4).cells
    places = [i for i, cell in enumerate(cells) if has_widget(cell)]
    turn_knobs(window, dict(zip(places, PAGES[WHOLE], strict=True)))


def test_the_arrow_keys_turn_the_knobs_of_other_pages(window: Any, lab: Lab) -> None:
    """Their cells with widgets on a page of their own, which saves running all the others."""
    cells, knobs = [nbformat.v4.new_code_cell(SET_UP)], {}
    for name in [one for one in PAGES if one != WHOLE]:
        page = nbformat.read(lab.folder / f"{name}.ipynb", as_version=4)
        found = [cell for cell in page.cells if has_widget(cell)]
        knobs |= dict(zip(itertools.count(len(cells)), PAGES[name], strict=False))
        assert len(found) == len(PAGES[name])
        cells += found
    write_page(lab, "widgets", cells)
    assert run_page(window, lab, "widgets") == "ran", trouble_in(window)
    turn_knobs(window, knobs)


def has_widget(cell: Any) -> bool:
    words = "from folo_lib.course.widgets import"
    return cell.cell_type == "code" and words in cell.source


def turn_knobs(window: Any, knobs: dict[int, dict[str, str]]) -> None:
    """Each there and back, of the widgets in some cells."""
    pairs = [(i, *pair) for i, widget in knobs.items() for pair in widget.items()]
    for i, label, there in pairs:
        cell = window.locator(".jp-Notebook .jp-Cell").nth(i)
        widget = cell.locator(
            f'.jp-OutputArea-output:has(img.widget-image):has(label:text-is("{label}"))'
        )
        expect(widget).to_have_count(1)
        image = widget.locator("img.widget-image")
        first = wait_for_picture(image, bool)
        sentence = widget.get_by_role("status")
        slider = widget.get_by_role("slider", name=label, exact=True)
        handle = slider.or_(widget.get_by_role("combobox", name=label, exact=True))
        value, words = handle.evaluate(VALUE), sentence.inner_text()
        handle.focus()
        window.keyboard.press(there)
        wait_for_picture(image, lambda picture, first=first: picture != first)
        assert handle.evaluate(VALUE) != value
        expect(sentence).not_to_have_text(words)
        window.keyboard.press(BACK[there])
        wait_for_picture(image, lambda picture, first=first: picture == first)
        expect(sentence).to_have_text(words)
        assert handle.evaluate(VALUE) == value
        expect(handle).to_be_focused()
    assert not window.locator(".jupyter-widgets-error-widget").count()


def test_generate_and_stop(window: Any, lab: Lab) -> None:
    assert run_page(window, lab, "10_engine") == "ran", trouble_in(window)
    widget = window.locator(".jp-OutputArea-output:has(.folo-live)")
    expect(widget).to_have_count(1)
    text, status = widget.locator(".folo-live"), widget.get_by_role("status").first
    generate = widget.get_by_role("button", name="Generate")
    stop = widget.get_by_role("button", name="Stop")

    def watch_it_grow(times: int) -> None:
        for _ in range(times):
            expect(text).not_to_have_text(str(text.text_content()))

    generate.focus()
    window.keyboard.press("Enter")
    watch_it_grow(4)
    window.keyboard.press("Tab")
    expect(stop).to_be_focused()
    window.keyboard.press("Enter")
    expect(status).to_contain_text("abort")
    summary = str(status.text_content())
    made = re.search(r"(\d+) tokens", summary)
    free = re.search(r"blocks free: (\d+) of (\d+)", summary)
    assert made and 3 <= int(made[1]) < 120, summary
    assert free and free[1] == free[2], summary  # the request gave its cache back

    generate.click()  # the engine is ready for the next
    expect(status).to_contain_text("Generating")
    watch_it_grow(2)
    stop.click()
    expect(status).to_contain_text("abort")
    assert not window.locator(".jupyter-widgets-error-widget").count()


def test_a_figure_is_moved_by_keyboard_without_leaving_it(
    window: Any, lab: Lab
) -> None:
    """JupyterLab takes arrows and letters for itself unless it is told not to."""
    source = (
        "from folo_lib.course.motion.attention import slide_mask\n"
        "slide_mask('She had a red kite'.split())"
    )
    cell = nbformat.v4.new_code_cell
    write_page(lab, "moving", [cell(source), cell("'the next'")])
    assert run_page(window, lab, "moving") == "ran", trouble_in(window)
    figure = window.locator(".folo-moving")
    expect(figure).to_have_count(1)
    figure.locator(".guess").first.focus()
    window.keyboard.press("Enter")
    slider = figure.locator("[data-knob=T]")
    expect(slider).to_be_visible()
    slider.focus()
    before = figure.locator(".says").inner_text()
    window.keyboard.press("ArrowRight")
    expect(figure.locator(".says")).not_to_have_text(before)
    expect(slider).to_be_focused()
    window.keyboard.press("ArrowLeft")
    expect(figure.locator(".says")).to_have_text(before)
    expect(slider).to_be_focused()
    assert window.locator(".jp-Notebook .jp-Cell").count() == 2
