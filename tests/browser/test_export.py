"""Every page as a file of HTML, opened without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from lab_server import PAGES
from nbconvert import HTMLExporter

# Without these two, a page asks a CDN for MathJax and RequireJS; it needs neither.
OFFLINE = {"mathjax_url": "", "require_js_url": ""}
NAMES = [
    p.stem for p in sorted([*PAGES.glob("[0-9]*_*.ipynb"), *PAGES.glob("app*.ipynb")])
]
WIDGETS = {
    "01_attention": 1,
    "03_layers": 1,
    "04_qwen3": 1,
    "05_checkpoint": 1,
    "06_kv_cache": 2,
    "07_sampler": 1,
    "10_engine": 1,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_stands_alone(window: Any, tmp_path: Path, name: str) -> None:
    notebook = nbformat.read(PAGES / f"{name}.ipynb", as_version=4)
    html, _ = HTMLExporter(**OFFLINE).from_notebook_node(notebook)
    file = tmp_path / f"{name}.html"
    file.write_text(html, encoding="utf-8")

    asked: list[str] = []
    complaints: list[str] = []

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        if route.request.url == file.as_uri():
            route.continue_()
        else:
            route.abort()

    window.context.set_offline(True)
    window.route("**/*", answer)
    window.on("pageerror", lambda error: complaints.append(str(error)))
    window.goto(file.as_uri(), wait_until="load")
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert not complaints

    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    kinds = ("image/png", "image/svg+xml", "image/jpeg")
    figures = [o for o in outputs if any(kind in o.get("data", {}) for kind in kinds)]
    # A figure that moves brings a picture too, for places that show no HTML.
    moving = [o for o in figures if "folo-moving" in o.data.get("text/html", "")]
    images = window.locator(".jp-Notebook img, main img")
    widths = images.evaluate_all("all => all.map(image => image.naturalWidth)")
    assert len(widths) == len(figures) - len(moving) and all(widths)
    drawn = window.locator(".folo-moving")
    assert drawn.count() == len(moving) == drawn.locator("css=:scope:has(svg)").count()
    for figure in drawn.all():
        if figure.locator(".guess").count():  # moved by hand, once somebody has guessed
            assert not figure.locator(".knobs").is_visible()
            figure.locator(".guess").first.click()
            assert figure.locator(".knobs").get_attribute("hidden") is None
            continue
        says = figure.locator(".says")
        before = says.inner_text()
        figure.locator(".next").click()
        assert says.inner_text() != before
        figure.locator(".back").click()
        assert says.inner_text() == before
    assert not complaints

    expected = sum(
        any(o.output_type == "error" for o in cell.outputs)
        for cell in notebook.cells
        if "raises-exception" in cell.metadata.get("tags", [])
    )
    text = window.locator("body").inner_text()
    assert text.count("Traceback (most recent call last)") <= expected
    assert sum(o.output_type == "error" for o in outputs) == expected
    for trouble in ("Error displaying widget", "Loading widget", "model not found"):
        assert trouble not in text


@pytest.mark.parametrize("name", WIDGETS)
def test_a_widget_has_left_its_picture(name: str) -> None:
    notebook = nbformat.read(PAGES / f"{name}.ipynb", as_version=4)
    cells = [c for c in notebook.cells if "folo_lib.course.widgets import" in c.source]
    code = [c for c in cells if c.cell_type == "code"]
    assert len(code) == WIDGETS[name]
    assert all("image/png" in cell.outputs[-1].data for cell in code)
