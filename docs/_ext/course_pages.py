"""The pages of the course, from `notebooks/` into the site, and links that are right in both.

Sphinx reads only what lies under `docs/`. So the pages are copied to `docs/pages/`, which git
ignores, and on the way what is of no use to a reader of the site is taken out: the cell that
installs the course and the directives of the export.

Markdown in `docs/` is read on GitHub as well, which knows no directives. There `<!-- on the site:`,
alone on a line, begins a comment, and here what stands in it up to `-->` counts. What stands
between `<!-- on GitHub -->` and `<!-- end -->` is left out here.
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
COPIES = DOCS / "pages"
REPOSITORY = "https://github.com/folovllm/FoloVLLM"
sys.path.insert(0, str(ROOT / "tools"))  # no package; other modules here use it too

DIRECTIVE = re.compile(r"#\|\s*(\w+).*\n?")
FIGURE = "**Figure "
MOVING = 'class="folo-moving'  # as folo_lib.course.moving and .motion write it
FOLDED = "hide-input"  # what myst-nb calls it
LINKS_LINE = re.compile(
    r"^\[Open in Colab\]\((\S+)\) · \[Open in Binder\]\((\S+)\)", re.M
)
ON_THE_SITE = re.compile(r"^<!-- on the site:\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
ON_GITHUB = re.compile(
    r"^<!-- on GitHub -->\n.*?^<!-- end -->\n", re.MULTILINE | re.DOTALL
)
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")
INLINE_LINK = re.compile(r"(?<=\]\()(?!#)([^()\s]+)(?=\)|\s+\")")
NAMED_LINK = re.compile(r"^(\[[^\]]+\]:\s+)(\S+)", re.MULTILINE)
SCHEME = re.compile(r"[a-z][a-z+.-]*:", re.IGNORECASE)

Notebook = dict[str, Any]
logger = logging.getLogger(__name__)


def find_pages() -> list[Path]:
    """The pages in the order of the course."""
    folder = ROOT / "notebooks"
    return [
        *sorted(folder.glob("[0-9][0-9]_*.ipynb")),
        *sorted(folder.glob("appendix_*.ipynb")),
    ]


def read_page(page: Path) -> Notebook:
    notebook: Notebook = json.loads(page.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def map_link(link: str, file: Path, place: Path) -> str:
    """The same link for the site.

    Args:
        link: as it stands in `file`.
        file: in the repository.
        place: in `docs/`, from where the site is built.
    """
    path, hash_sign, fragment = link.partition("#")
    if SCHEME.match(link) or not path:
        return link
    target = Path(os.path.normpath(file.parent / path))
    if target.parent == ROOT / "notebooks" and target.suffix == ".ipynb":
        target = COPIES / target.name
    elif not target.is_relative_to(DOCS) and target.exists() and target != ROOT:
        kind = "tree" if target.is_dir() else "blob"
        name = target.relative_to(ROOT).as_posix()
        return f"{REPOSITORY}/{kind}/main/{name}{hash_sign}{fragment}"
    relative = Path(os.path.relpath(target, place.parent)).as_posix()
    return f"{relative}{hash_sign}{fragment}"


def map_links(text: str, file: Path, place: Path) -> str:
    """Markdown with its links mapped, but for those in code."""

    def outside_code(part: str) -> str:
        part = INLINE_LINK.sub(lambda found: map_link(found[1], file, place), part)
        return NAMED_LINK.sub(
            lambda found: found[1] + map_link(found[2], file, place), part
        )

    def outside_fences(part: str) -> str:
        return map_between(SPAN, part, outside_code)

    return map_between(FENCE, text, outside_fences)


def map_between(
    pattern: re.Pattern[str], text: str, change: Callable[[str], str]
) -> str:
    """The text with what lies between the matches changed."""
    parts, at = [], 0
    for found in pattern.finditer(text):
        parts += [change(text[at : found.start()]), found[0]]
        at = found.end()
    return "".join([*parts, change(text[at:])])


def transform_code(cell: dict[str, Any]) -> None:
    """Take out the directives of the export; what they export is known by a tag.

    What JupyterLab folds is folded here too, and a figure that a reader can move is shown instead
    of its picture.
    """
    tags = cell["metadata"].setdefault("tags", [])
    if any(found[1] == "export" for found in DIRECTIVE.finditer(cell["source"])):
        tags.append("export")
    if cell["metadata"].get("jupyter", {}).get("source_hidden"):
        tags.append(FOLDED)
    cell["source"] = DIRECTIVE.sub("", cell["source"])
    for output in cell["outputs"]:
        if MOVING in "".join(output.get("data", {}).get("text/html", "")):
            del output["data"]["image/png"]
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        if alt:
            cell["metadata"]["mystnb"] = {"image": {"alt": alt}}


def is_shown(cell: dict[str, Any]) -> bool:
    """Whether a reader of the site has a use for the cell."""
    if cell["cell_type"] != "code":
        return True
    directives = {found[1] for found in DIRECTIVE.finditer(cell["source"])}
    return cell.get("id") != "install" and not directives & {"default_exp", "hide"}


def fold_code(cells: list[dict[str, Any]]) -> None:
    """Fold what sets a page up before its first section, and what only draws."""
    heads = (i for i, cell in enumerate(cells) if cell["source"].startswith("## "))
    first = next(heads, 0)
    for number, (cell, after) in enumerate(pairwise([*cells, {"source": ""}])):
        if cell["cell_type"] == "code":
            tags = cell["metadata"]["tags"]
            has_picture = any(
                {"image/png", "text/html"} & {*output.get("data", {})}
                for output in cell["outputs"]
            )
            if has_picture and after["source"].startswith(FIGURE):
                tags.append("figure")
            if FOLDED not in tags and (number < first or "figure" in tags):
                tags.append(FOLDED)


def write_links(page: Path, colab: str, binder: str) -> str:
    """Where a page can be opened and its source be read, in place of the page's own line."""
    topic = page.stem.partition("_")[2]
    name = html.escape(page.name)
    module = ROOT / "folo_lib" / f"{topic}.py"
    links = [
        f'<a href="{colab}">Open in Colab</a>',
        f'<a href="{binder}" title="JupyterLab on Binder">Open in Binder</a>',
        "<details><summary>Open in Lab</summary><p>In your clone of the repository, "
        "<code>make lab</code> opens JupyterLab in the browser. "
        f"This page is <code>{name}</code> there.</p></details>",
        f'<a href="{REPOSITORY}/blob/main/notebooks/{name}">View notebook</a>',
    ]
    if module.is_file():
        links.append(f'<a href="../_modules/folo_lib/{topic}.html">View {topic}.py</a>')
        links.append(f'<a href="../modules/{topic}.html">API</a>')
    return "\n".join(
        ['<nav class="page-links" aria-label="This page">', *links, "</nav>\n\n"]
    )


def transform_page(page: Path) -> Notebook:
    """A page as the site shows it."""
    notebook = read_page(page)
    place = COPIES / page.name
    notebook["cells"] = [cell for cell in notebook["cells"] if is_shown(cell)]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            transform_code(cell)
    fold_code(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = map_links(cell["source"], page, place)
            cell["source"] = LINKS_LINE.sub(
                lambda found: write_links(page, found[1], found[2]), cell["source"]
            )
            if cell["source"].startswith(FIGURE):
                cell["source"] = "{.figure-caption}\n" + cell["source"]
    notebook["metadata"]["language_info"] = {
        "name": "python",
        "pygments_lexer": "ipython3",
    }
    return notebook


def write_if_changed(path: Path, content: bytes) -> None:
    """Leave a file that is right already, so that Sphinx need not read it again."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def copy_pages(app: Sphinx) -> None:
    """Make `docs/pages/` what `notebooks/` says."""
    pages = find_pages()
    for stale in {*COPIES.glob("*.ipynb")} - {COPIES / page.name for page in pages}:
        stale.unlink()
    for page in pages:
        text = json.dumps(transform_page(page), indent=1, ensure_ascii=False)
        write_if_changed(COPIES / page.name, text.encode())


def choose_the_site(text: str) -> str:
    """A document without what is meant for GitHub, and with what GitHub cannot show."""
    return ON_THE_SITE.sub(lambda found: found[1], ON_GITHUB.sub("", text))


def map_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Map the links of a Markdown file; those of the pages were mapped when copied."""
    file = Path(app.env.doc2path(docname))
    if file.suffix == ".md":
        content[0] = map_links(choose_the_site(content[0]), file, file)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", map_source)
    return {"version": "1", "parallel_read_safe": True}
