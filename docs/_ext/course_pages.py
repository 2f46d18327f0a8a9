"""The pages of the course, from `notebooks/` into the site, and links that are right in both.

Sphinx reads only what lies under `docs/`. So the pages are copied to `docs/pages/`, which git
ignores, and on the way what is of no use to a reader of the site is taken out: the cell that
installs the course and the directives of the export.
"""

from __future__ import annotations

import base64
import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
COPIES = DOCS / "pages"
REPOSITORY = "https://github.com/folovllm/FoloVLLM"

DIRECTIVE = re.compile(r"#\|\s*(\w+).*\n?")
FIGURE = "**Figure "
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
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

    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [outside_code(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, outside_code(text[at:])])


def transform_code(cell: dict[str, Any]) -> None:
    """Take out the directives of the export; what they export is known by a tag."""
    if any(found[1] == "export" for found in DIRECTIVE.finditer(cell["source"])):
        cell["metadata"].setdefault("tags", []).append("export")
    cell["source"] = DIRECTIVE.sub("", cell["source"])
    for output in cell["outputs"]:
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        if alt:
            cell["metadata"]["mystnb"] = {"image": {"alt": alt}}


def is_shown(cell: dict[str, Any]) -> bool:
    """Whether a reader of the site has a use for the cell."""
    if cell["cell_type"] != "code":
        return True
    directives = {found[1] for found in DIRECTIVE.finditer(cell["source"])}
    return cell.get("id") != "install" and not directives & {"default_exp", "hide"}


def transform_page(page: Path) -> Notebook:
    """A page as the site shows it."""
    notebook = read_page(page)
    place = COPIES / page.name
    notebook["cells"] = [cell for cell in notebook["cells"] if is_shown(cell)]
    for cell, behind in pairwise([*notebook["cells"], {"source": ""}]):
        if cell["cell_type"] == "code":
            transform_code(cell)
            has_picture = any("image/png" in o.get("data", {}) for o in cell["outputs"])
            has_caption = behind["source"].startswith(FIGURE)
            if has_picture and has_caption:
                cell["metadata"].setdefault("tags", []).append("figure")
        elif cell["cell_type"] == "markdown":
            cell["source"] = map_links(cell["source"], page, place)
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
    write_if_changed(COPIES / "talking.png", find_picture("live_generation(", pages))


def find_picture(code: str, pages: list[Path]) -> bytes:
    """The first picture that a cell with this code shows; of all cells if there is none."""
    cells = [cell for page in pages for cell in read_page(page)["cells"]]
    cells.sort(key=lambda cell: code not in cell["source"])
    pictures = (
        output["data"]["image/png"]
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    )
    return base64.b64decode("".join(next(pictures)))


def map_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Map the links of a Markdown file; those of the pages were mapped when copied."""
    file = Path(app.env.doc2path(docname))
    if file.suffix == ".md":
        content[0] = map_links(content[0], file, file)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", map_source)
    return {"version": "1", "parallel_read_safe": True}
