"""The documentation site, built and opened in a browser without a network."""

from __future__ import annotations

import functools
import html
import http.server
import os
import re
import subprocess
import sys
import threading
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
    drawn: image.naturalWidth / (image.src.endsWith("/benchmark.png") ? 2 : 1), // fine print
    shown: image.getBoundingClientRect().width - 10,
  })),
  text: document.querySelector("article").innerText,
  tracebacks: document.querySelectorAll(".cell_output .output.traceback").length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


@pytest.fixture(scope="module")
def site() -> Path:
    """The site, made again where something has changed."""
    for name in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(name, reason=f"{name} is missing: pip install -e '.[docs]'")
    if is_new():
        return SITE
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going"]
    done = subprocess.run(
        [*command, "--quiet", "docs", str(SITE)],
        cwd=ROOT,
        # Kernels that are interpreted, as the tests have them, are not described.
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return SITE


def is_new() -> bool:
    """Whether nothing that the site is made of has changed since `make docs`."""
    built = SITE / "searchindex.js"  # written at the end of each build
    command = ["git", "ls-files"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [
        one for one in done.stdout.splitlines() if not one.startswith("tests/test_")
    ]
    sources = [ROOT / name for name in names if not name.startswith("tests/browser/")]
    if done.returncode or not built.is_file():
        return False
    last = built.stat().st_mtime
    return all(path.exists() and path.stat().st_mtime <= last for path in sources)


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


def test_every_link_leads_to_something(site: Path) -> None:
    """Of all pages, the listings of the source too; what leads out must be of the web."""
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    ids = {
        path: {html.unescape(one) for one in re.findall(r'\bid="([^"]+)"', text)}
        for path, text in texts.items()
    }
    troubles = []
    for path, text in texts.items():
        for link in map(html.unescape, re.findall(r'\b(?:href|src)="([^"]*)"', text)):
            parts = urlsplit(link)
            if parts.scheme:
                allowed = ("https", "data")
                ours = re.match(
                    r"https://github\.com/folovllm/FoloVLLM/\w+/main/([^#?]*)", link
                )
                lost = ours and not (ROOT / unquote(ours[1])).exists()
                if parts.scheme not in allowed or lost:
                    troubles.append(f"{path.relative_to(site)}: {link}")
                continue
            name = unquote(parts.path)
            target = (path.parent / name).resolve() if name else path
            known = ids.get(target)
            fragment = unquote(parts.fragment)
            if not target.is_file() or (known and fragment and fragment not in known):
                troubles.append(f"{path.relative_to(site)}: {link}")
    assert len(texts) > 100 and not troubles, "\n".join(troubles)


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


def test_search_works_without_a_server_and_says_what_it_lacks(
    window: Any, site: Path
) -> None:
    window.context.set_offline(True)
    window.goto(f"{(site / 'search.html').as_uri()}?q=repetition")
    window.wait_for_selector("#search-results li a")
    links = window.locator("#search-results li a").all_inner_texts()
    assert any("Sampler" in link for link in links)
    note = window.locator(".search-note").inner_text()
    assert "cannot show the lines that match" in note and "http.server" in note


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """The site over http, as the note on the search says."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def test_search_over_http_shows_the_lines_that_match(window: Any, served: str) -> None:
    window.goto(f"{served}/search.html?q=preemption")
    window.wait_for_selector("#search-results li p.context")
    texts = window.locator("#search-results li p.context").all_inner_texts()
    assert any("preempt" in text.lower() for text in texts)
    assert not window.locator(".search-note").count()
    window.goto(f"{served}/search.html?q=抢占")
    window.wait_for_selector("#search-results li a")
    links = window.locator("#search-results li a").all_inner_texts()
    assert any("Glossary" in link for link in links)


def test_the_front_page(window: Any, site: Path) -> None:
    for name, start in (("index", "Start with the tour"), ("zh", "从导览页开始")):
        window.goto((site / f"{name}.html").as_uri())
        button = window.get_by_role("link", name=start)
        assert button.get_attribute("href") == "pages/00_tour.html"
        assert window.locator(".cards section").count() == 4
        assert window.locator(".numbers strong").count() == 3
        repository = window.locator("nav.top .repository")
        assert repository.is_visible()
        last = window.locator("figure.story p span").last
        opacity = "it => +getComputedStyle(it).opacity"
        assert 0 < last.evaluate(opacity) < 0.5  # its turn comes, and it is there
        last.evaluate("it => it.getAnimations()[0].finish()")
        assert last.evaluate(opacity) == 1
        window.locator("figure.story button").click()
        last = window.locator("figure.story p span").last
        assert last.evaluate(opacity) < 0.5  # told again


def test_the_story_stands_still_for_those_who_ask(browser: Any, site: Path) -> None:
    context = browser.new_context(reduced_motion="reduce", offline=True)
    tab = context.new_page()
    tab.goto((site / "index.html").as_uri())
    last = tab.locator("figure.story p span").last
    assert last.evaluate("it => it.getAnimations().length") == 0
    context.close()


def test_code_can_be_copied(browser: Any, site: Path) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    cases = {
        "index.html": ("make run", "git clone https://github.com/folovllm/FoloVLLM"),
        "modules/engine.html": (">>> engine =", "from folo_lib import LLMEngine"),
        "pages/01_attention.html": ("def look_at_yourself", "def look_at_yourself("),
    }
    for name, (words, wanted) in cases.items():
        tab.goto((site / name).as_uri())
        block = tab.locator("article div.highlight", has_text=words).first
        block.hover()
        block.get_by_role("button", name="Copy").click()
        block.get_by_role("button", name="Copied").wait_for()
        text = tab.evaluate("navigator.clipboard.readText()")
        assert text.startswith(wanted) and ">>>" not in text
        assert "there was a young deer" not in text  # an output
    context.close()


def test_a_page_folds_its_set_up_and_says_where_to_open_it(
    window: Any, site: Path
) -> None:
    window.goto((site / "pages" / "01_attention.html").as_uri())
    links = window.locator(".page-links").inner_text()
    for words in ("Colab", "Binder", "Lab", "notebook", "attention.py", "API"):
        assert words in links
    lab = window.locator(".page-links details")
    assert not lab.locator("p").is_visible()
    lab.locator("summary").click()
    assert "make lab" in lab.locator("p").inner_text()
    folded = window.locator("details.hide").first
    assert not folded.locator("pre").is_visible()
    folded.locator("summary").click()
    assert folded.locator("pre").is_visible()
    source = window.get_by_role("link", name="View attention.py")
    source.click()
    assert "def naive_attention" in window.locator("article").inner_text()


def test_figures_can_be_moved_here_too(window: Any, site: Path) -> None:
    window.goto((site / "pages" / "07_sampler.html").as_uri())
    figure = window.locator(".folo-moving").first
    knobs = figure.locator(".knobs")
    assert not knobs.is_visible()
    figure.locator(".guess").first.click()
    assert knobs.is_visible()


def test_the_glossary_can_be_read_on_a_phone(browser: Any, site: Path) -> None:
    context = browser.new_context(viewport=PHONE, offline=True)
    tab = context.new_page()
    tab.goto((site / "glossary.html").as_uri())
    widths = tab.evaluate(
        """() => [...document.querySelectorAll("#glossary tbody tr")].slice(0, 20).map(
             row => row.cells[2].getBoundingClientRect().width)"""
    )
    assert len(widths) == 20 and min(widths) > 300
    context.close()


def test_what_is_wider_than_a_phone_fades_where_there_is_more(
    browser: Any, site: Path
) -> None:
    context = browser.new_context(viewport=PHONE, offline=True)
    page = context.new_page()
    page.goto((site / "pages" / "12_block_pool.html").as_uri())
    for inside in ("img", ".folo-moving > svg"):
        box = page.locator(f".cell_output:has({inside})").first
        box.scroll_into_view_if_needed()
        page.wait_for_function("box => box.matches('.more')", arg=box.element_handle())
        box.evaluate("box => box.scrollTo(box.scrollWidth, 0)")
        page.wait_for_function("box => !box.matches('.more')", arg=box.element_handle())
    for name in ("acceptance", "mutants"):  # rows are cards there
        page.goto((site / f"{name}.html").as_uri())
        assert not page.locator(".table-wrapper.more").count()
        assert page.locator("table.docutils").first.evaluate(
            "table => table.scrollWidth <= table.parentElement.clientWidth"
        )
    context.close()


def test_dark_figures_keep_their_white_ground(browser: Any, site: Path) -> None:
    context = browser.new_context(color_scheme="dark", offline=True)
    tab = context.new_page()
    tab.goto((site / "pages" / "07_sampler.html").as_uri())
    colours = tab.evaluate(
        """() => ["body", ".cell_output img"].map(
             it => getComputedStyle(document.querySelector(it)).backgroundColor)"""
    )
    dimmed = "getComputedStyle(document.querySelector('.cell_output img')).filter"
    assert tab.evaluate(dimmed) == "brightness(0.86)"
    tab.emulate_media(color_scheme="light")
    assert tab.evaluate(dimmed) == "none"
    context.close()
    assert colours[1] == "rgb(255, 255, 255)" != colours[0]
