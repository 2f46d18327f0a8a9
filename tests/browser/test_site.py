"""The documentation site, built and opened in a browser without a network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "docs"
WIDE, PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 800}

LOOK = """() => ({
  images: [...document.querySelectorAll("article img")].map(image => ({
    alt: image.alt,
    drawn: image.naturalWidth,
    shown: image.getBoundingClientRect().width - 10,
  })),
  links: [...document.querySelectorAll("a[href]")].map(link => link.href),
  ids: [...document.querySelectorAll("[id]")].map(element => element.id),
  text: document.querySelector("article").innerText,
  tracebacks: document.querySelectorAll(".cell_output .output.traceback").length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


@pytest.fixture(scope="module")
def site() -> Path:
    """The site, made again where something has changed."""
    for name in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(name, reason=f"{name} is missing: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going"]
    done = subprocess.run(
        [*command, "--quiet", "docs", str(SITE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return SITE


def files(site: Path) -> list[Path]:
    """What a reader opens; the listings of the source are as plain as they are many."""
    pages = [path for path in site.rglob("*.html") if "_modules" not in path.parts]
    assert {"index.html", "benchmark.html"} <= {path.name for path in pages}
    return sorted(pages)


@pytest.fixture(scope="module")
def found(browser: Any, site: Path) -> dict[Path, dict[str, Any]]:
    """What a browser sees of each page, wide and narrow, light and dark."""
    return dict(visit(browser, site))


def visit(browser: Any, site: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    light = browser.new_context(viewport=WIDE, color_scheme="light", offline=True)
    dark = browser.new_context(viewport=PHONE, color_scheme="dark", offline=True)
    wide, narrow = light.new_page(), dark.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    for tab in (wide, narrow):
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("requestfailed", lambda request: complaints.append(request.url))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "console",
            lambda said: said.type == "error" and complaints.append(said.text),
        )
    for path in files(site):
        asked.clear()
        complaints.clear()
        for tab in (wide, narrow):
            tab.goto(path.as_uri(), wait_until="load")
        seen = wide.evaluate(LOOK)
        seen["narrow"] = narrow.evaluate(LOOK)
        seen["asked"], seen["complaints"] = [*asked], [*complaints]
        yield path, seen
    light.close()
    dark.close()


def test_no_page_asks_the_network(found: dict[Path, dict[str, Any]]) -> None:
    for path, seen in found.items():
        outside = [url for url in seen["asked"] if not is_local(url)]
        assert not outside, f"{path.name} asks for {outside}"
        assert not seen["complaints"], f"{path.name}: {seen['complaints']}"


def is_local(url: str) -> bool:
    return url.startswith((SITE.as_uri() + "/", "data:", "blob:"))


def test_every_picture_is_shown_described_and_large_enough(
    found: dict[Path, dict[str, Any]],
) -> None:
    troubles = []
    for path, seen in found.items():
        pairs = zip(seen["images"], seen["narrow"]["images"], strict=True)
        for number, (image, narrow) in enumerate(pairs, 1):
            said = image["alt"].strip()  # the file's name, if nobody said more
            if not image["drawn"]:
                trouble = "is not shown"
            elif not said or said.endswith(".png"):
                trouble = "has no alternative text"
            elif image["shown"] < 0.8 * image["drawn"]:
                trouble = f"is shrunk: {image['shown']:.0f} of {image['drawn']} pixels"
            elif narrow["shown"] < 0.65 * narrow["drawn"]:
                trouble = f"is shrunk on a phone: {narrow['shown']:.0f} pixels"
            else:
                continue
            troubles.append(f"{path.name}, picture {number}, {trouble}")
    assert not troubles, "\n".join(troubles)


def test_no_page_is_wider_than_its_window(found: dict[Path, dict[str, Any]]) -> None:
    for path, seen in found.items():
        assert seen["overflow"] <= 0, path.name
        assert seen["narrow"]["overflow"] <= 0, f"{path.name} on a phone"


def test_every_link_leads_to_something(found: dict[Path, dict[str, Any]]) -> None:
    ids = {path: {*seen["ids"]} for path, seen in found.items()}
    for path, seen in found.items():
        for link in seen["links"]:
            parts = urlsplit(link)
            if parts.scheme != "file":
                assert parts.scheme == "https", f"{path.name}: {link}"
                continue
            target = Path(unquote(parts.path))
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in ids:
                assert unquote(parts.fragment) in ids[target], f"{path.name}: {link}"


def test_pages_show_all_that_was_saved_in_them(
    found: dict[Path, dict[str, Any]],
) -> None:
    notebooks = sorted((ROOT / "docs" / "pages").glob("*.ipynb"))
    assert notebooks
    for page in notebooks:
        seen = found[SITE / "pages" / f"{page.stem}.html"]
        notebook = nbformat.read(page, as_version=4)
        outputs = [
            output
            for cell in notebook.cells
            if cell.cell_type == "code"
            for output in cell.outputs
        ]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        errors = sum(output.output_type == "error" for output in outputs)
        assert len(seen["images"]) == pictures, page.name
        assert seen["tracebacks"] == errors, page.name
        for trouble in (
            "Error displaying widget",
            "Loading widget",
            "COLAB_RELEASE_TAG",
        ):
            assert trouble not in seen["text"], page.name


def test_search_works_without_a_server(window: Any, site: Path) -> None:
    window.context.set_offline(True)
    window.goto(f"{(site / 'search.html').as_uri()}?q=repetition")
    window.wait_for_selector("#search-results li a")
    links = window.locator("#search-results li a").all_inner_texts()
    assert any("Sampler" in link for link in links)


def test_dark_figures_keep_their_white_ground(browser: Any, site: Path) -> None:
    context = browser.new_context(color_scheme="dark", offline=True)
    tab = context.new_page()
    tab.goto((site / "pages" / "07_sampler.html").as_uri())
    colours = tab.evaluate(
        """() => ["body", ".cell_output img"].map(
             it => getComputedStyle(document.querySelector(it)).backgroundColor)"""
    )
    context.close()
    assert colours[1] == "rgb(255, 255, 255)" != colours[0]
