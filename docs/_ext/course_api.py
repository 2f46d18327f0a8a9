"""The API reference: a page for each module of `folo_lib`, and the tables that lead to them.

The pages go to `docs/modules/`, which git ignores. So a new module needs no file here, and nothing
is said twice.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import run_pages
from course_pages import DOCS, find_pages, read_page, write_if_changed
from sphinx.application import Sphinx

import folo_lib

MODULES = DOCS / "modules"
APART = {"__main__", "course"}  # the one is a command, the other has pages of its own

# What a module is about, where no public name of the package says it: it comes first.
MATTERS = {
    "benchmark": "System",
    "block_pool": "PagedKVCacheManager",
    "cuda_graph": "GraphRunner",
    "fused_decode": "FusedRunner",
    "paged_attention": "TritonBackend",
    "qwen3": "Qwen3ForCausalLM",
    "runner": "ModelRunner",
    "scheduler": "ContinuousScheduler",
}


@cache
def find_modules() -> dict[str, Path | None]:
    """Each module with the page that writes it, or else the first that uses it or its family.

    In the order of the pages; what no page uses comes last.
    """
    names = {module.name for module in pkgutil.iter_modules(folo_lib.__path__)}
    pages = find_pages()
    exported: dict[str, Path] = {}
    used: dict[str, Path] = {}
    for page in pages:
        cells = read_page(page)["cells"]
        text = "\n".join(c["source"] for c in cells if c["cell_type"] == "code")
        for name in re.findall(r"^#\| default_exp (\w+)", text, re.MULTILINE):
            exported[name] = page
        for name in re.findall(r"\bfolo_lib\.(\w+)", text):
            used.setdefault(name, page)
    found: dict[str, Path | None] = {}
    for name in sorted(names):
        family = name.partition("_")[0]
        places = exported.get(name), exported.get(family), used.get(name)
        found[name] = next(filter(None, [*places, used.get(family)]), None)

    def place(name: str) -> tuple[int, bool]:
        page = found[name]
        return pages.index(page) if page else len(pages), name not in exported

    return {name: found[name] for name in sorted(names, key=place)}


def is_written_on(name: str, page: Path) -> bool:
    """Whether the page exports the module, and does not only use it."""
    return page.stem.partition("_")[2] == name


def name_members(module: ModuleType) -> list[str]:
    """What a module offers, and what matters most first."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and getattr(value, "__module__", None) == module.__name__
        ]
    names = [name for name in names if is_described(getattr(module, name))]
    topic = module.__name__.rpartition(".")[2]
    public = [n for n, where in folo_lib._MODULE_OF.items() if where == topic]
    first = ["LLMEngine", MATTERS.get(topic, ""), *public]
    rank = {name: number for number, name in reversed([*enumerate(first)])}
    return sorted(names, key=lambda name: rank.get(name, len(first)))


def is_described(value: Any) -> bool:
    is_code = inspect.isclass(value) or inspect.isroutine(value)
    return (is_code or hasattr(value, "fn")) and bool(inspect.getdoc(value))


def summarise(value: Any) -> str:
    """The first sentence of a docstring, for a cell of a table."""
    first = (inspect.getdoc(value) or "").partition("\n\n")[0]
    return " ".join(first.split()).replace("|", r"\|")


def write_module(name: str, page: Path | None) -> str:
    """The page of a module: what it offers in a table, then all of it."""
    module = importlib.import_module(f"folo_lib.{name}")
    lines = [f"# `folo_lib.{name}`", ""]
    if page is None:
        lines += ["Written by hand."]
    else:
        title = run_pages.read_head(read_page(page)).title
        link = f"[{title}](../pages/{page.name})"
        by_hand = f"Written by hand, for page {link}."
        lines += [f"Written on page {link}." if is_written_on(name, page) else by_hand]
    members = name_members(module)
    if len(members) > 1:
        lines += ["", "| name | what it is |", "|---|---|"]
        for member in members:
            target = f"{{py:obj}}`{member} <folo_lib.{name}.{member}>`"
            lines.append(f"| {target} | {summarise(getattr(module, member))} |")
    lines += [
        "",
        "```{eval-rst}",
        f".. automodule:: folo_lib.{name}",
        "   :no-members:",
        "",
    ]
    for member in members:
        kind = "class" if inspect.isclass(getattr(module, member)) else "function"
        lines.append(f".. auto{kind}:: folo_lib.{name}.{member}")
    return "\n".join([*lines, "```", ""])


def write_modules(app: Sphinx) -> None:
    """Make `docs/modules/` what the package says."""
    modules = {n: page for n, page in find_modules().items() if n not in APART}
    wanted = {MODULES / f"{name}.md" for name in modules}
    for stale in {*MODULES.glob("*.md")} - wanted:
        stale.unlink()
    for name, page in modules.items():
        text = write_module(name, page)
        write_if_changed(MODULES / f"{name}.md", text.encode())


def names_table() -> str:
    """The names that `folo_lib` itself offers, those that most programs need first."""
    first = ["LLMEngine", "SamplingParams", "RequestOutput", "AsyncLLMEngine"]
    modules = folo_lib._MODULE_OF
    names = [*first, *(name for name in modules if name not in first)]
    rows = ["| `from folo_lib import` | what it is | written in |", "|---|---|---|"]
    for name in names:
        module = modules[name]
        real = folo_lib._ALIASES.get(name, name)
        target = f"{{py:obj}}`{name} <folo_lib.{module}.{real}>`"
        what = summarise(getattr(folo_lib, real))
        if real != name:
            what = f"vLLM's name for `{real}`."
        rows.append(f"| {target} | {what} | [`{module}`](../modules/{module}.md) |")
    return "\n".join(rows)


def modules_table() -> str:
    """Every module with a line of its own, by the page that needs it, and the menu of them."""
    rows = ["| module | what it holds | page |", "|---|---|---|"]
    menu = []
    for name, page in find_modules().items():
        if name in APART:
            continue
        module = importlib.import_module(f"folo_lib.{name}")
        title = page.stem.partition("_")[0] if page else ""
        link = f"[{title}](../pages/{page.name})" if page else ""
        rows.append(
            f"| [`{name}`](../modules/{name}.md) | {summarise(module)} | {link} |"
        )
        menu.append(f"/modules/{name}")
    toctree = ["```{toctree}", ":hidden:", ":titlesonly:", "", *menu, "course", "```"]
    return "\n".join([*rows, "", *toctree])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write_modules)
    return {"version": "1", "parallel_read_safe": True}
