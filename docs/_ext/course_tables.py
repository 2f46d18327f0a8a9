"""What Markdown files leave to the build, so that it cannot be out of date.

`<!-- made at build time: pages -->`, alone on a line, becomes what the function `pages` of
`WRITERS` returns.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import course_api
import course_benchmark
import course_front
import course_mutants
import run_pages
from course_pages import find_pages, read_page
from sphinx.application import Sphinx

import folo_lib.course.exercises


def pages_table() -> str:
    """The pages in order, what each is about, and the minutes that it takes."""
    rows = ["| page | what it is about | minutes |", "|---|---|---|"]
    for page in find_pages():
        head = run_pages.read_head(read_page(page))
        link = f"[{head.title}](pages/{page.name})"
        rows.append(f"| {link} | {head.summary} | {head.minutes} |")
    return "\n".join(rows)


def checks_list() -> str:
    """Every check of an exercise, by page."""
    parts = []
    for found in pkgutil.iter_modules(folo_lib.course.exercises.__path__):
        module = importlib.import_module(f"folo_lib.course.exercises.{found.name}")
        lines = [f"`folo_lib.course.exercises.{found.name}`", ""]
        for name, check in vars(module).items():
            if name.startswith("check_") and hasattr(check, "__wrapped__"):
                summary = (inspect.getdoc(check) or "").partition("\n\n")[0]
                lines.append(f"- `{name}`: {' '.join(summary.split())}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


WRITERS: dict[str, Callable[[], str]] = {
    "pages": pages_table,
    "names": course_api.names_table,
    "modules": course_api.modules_table,
    "checks": checks_list,
    "benchmark": course_benchmark.write_page,
    "front": course_front.write_front,
    "front_zh": course_front.write_chinese_front,
    "mutants": course_mutants.write_page,
}
PLACE = re.compile(r"^<!-- made at build time: (\w+) -->$", re.MULTILINE)


def fill_in(app: Sphinx, docname: str, content: list[str]) -> None:
    if PLACE.search(content[0]):
        app.env.note_reread()  # what it says changes without the file
        content[0] = PLACE.sub(lambda found: WRITERS[found[1]](), content[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", fill_in)
    return {"version": "1", "parallel_read_safe": True}
