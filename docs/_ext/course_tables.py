"""Tables that are made at build time, so that they cannot be wrong: `{course} pages` and such."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any, ClassVar

from course_pages import find_pages, read_page
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import folo_lib
import folo_lib.exercises


def pages_table() -> str:
    """The pages in order, what each is about, and the minutes that it takes."""
    rows = ["| page | what it is about | minutes |", "|---|---|---|"]
    for page in find_pages():
        text = "\n".join(cell["source"] for cell in read_page(page)["cells"][:2])
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        summary = re.search(r"^> (.+)$", text, re.MULTILINE)
        minutes = re.search(r"(\d+) minutes", text)
        if not (title and summary and minutes):
            raise ValueError(f"{page.name} begins without title, summary or minutes")
        link = f"[{title[1]}](pages/{page.name})"
        rows.append(f"| {link} | {summary[1]} | {minutes[1]} |")
    return "\n".join(rows)


def names_table() -> str:
    """The names that `folo_lib` itself offers."""
    rows = ["| `from folo_lib import` | written in |", "|---|---|"]
    for name in folo_lib.__all__:
        module = folo_lib._MODULE_OF.get(name)
        if module:
            link = f"[`folo_lib.{module}`]({module}.md)"
            rows.append(f"| {{py:obj}}`{name} <folo_lib.{module}.{name}>` | {link} |")
    return "\n".join(rows)


def checks_list() -> str:
    """Every check of an exercise, by page."""
    parts = []
    for found in pkgutil.iter_modules(folo_lib.exercises.__path__):
        module = importlib.import_module(f"folo_lib.exercises.{found.name}")
        lines = [f"`folo_lib.exercises.{found.name}`", ""]
        for name, check in vars(module).items():
            if name.startswith("check_"):
                summary = (inspect.getdoc(check) or "").partition("\n\n")[0]
                lines.append(f"- `{name}`: {' '.join(summary.split())}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


class Course(SphinxDirective):
    """Markdown that a function writes."""

    required_arguments = 1
    writers: ClassVar[dict[str, Callable[[], str]]] = {
        "pages": pages_table,
        "names": names_table,
        "checks": checks_list,
    }

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # what it says changes without this file
        return self.parse_text_to_nodes(self.writers[self.arguments[0]]())


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("course", Course)
    return {"version": "1", "parallel_read_safe": True}
