"""What every page has alike: cells that are stored folded, and links to the pages around it.

    python tools/layout.py           write both into the pages
    python tools/layout.py --check   say which pages are not so

A reader comes for the text, the pictures and the code that is taught. What sets a page up before
its first section, and what only draws a figure, is folded in JupyterLab and on the site; a click
opens it. The second line of links under the summary leads to the page before and the next one.
"""

from __future__ import annotations

import argparse
import json
import re
import symtable
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "notebooks"
LINKS = re.compile(
    r"^(\[Open in Colab\]\(\S+\) · \[Open in Binder\]\(\S+?\)) *(?:\n← .*|\n\[.*→)?$",
    re.MULTILINE,
)

Cell = dict[str, Any]
Notebook = dict[str, Any]


def find_pages() -> list[Path]:
    """The pages in the order of the course; notebooks with other names are no pages."""
    patterns = ("[0-9][0-9]_*.ipynb", "appendix_*.ipynb")
    return [p for pattern in patterns for p in sorted(PAGES.glob(pattern))]


def source_of(cell: Cell) -> str:
    """The text of a cell, which a file holds as a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def only_draws(cell: Cell) -> bool:
    """Whether nothing but a figure comes out of a cell, which ends in showing it.

    The call of a widget or of a moving figure stays open: a reader runs it.
    """
    outputs = cell["outputs"]
    pictures = all("image/png" in output.get("data", {}) for output in outputs)
    return bool(outputs) and pictures and source_of(cell).endswith("plt.show()")


def find_names(source: str) -> tuple[set[str], set[str]]:
    """The global names that a cell binds, and those that it reads and does not bind."""
    lines = source.splitlines()
    if lines and lines[0].startswith("%%"):
        lines[0] = ""
    plain = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines]
    table = symtable.symtable("\n".join(plain), "cell", "exec")
    bound = {each.get_name() for each in table.get_symbols() if each.is_assigned()}
    read, scopes = set(), [table]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        top = scope is table
        read |= {
            each.get_name()
            for each in scope.get_symbols()
            if each.is_referenced() and (top or each.is_global())
        }
    return bound, read - bound


def is_needed(cell: Cell, later: list[Cell]) -> bool:
    """Whether a later cell reads a name that this one has bound."""
    bound, _ = find_names(source_of(cell))
    for other in later:
        if other["cell_type"] == "code":
            rebound, read = find_names(source_of(other))
            if bound & read:
                return True
            bound -= rebound
    return False


def is_open(cell: Cell) -> bool:
    """Whether a reader writes in a cell, or is taught by it wherever it stands."""
    tags = cell["metadata"].get("tags", [])
    return bool({"exercise", "student", "open"} & set(tags))


def fold(cells: list[Cell]) -> None:
    """Folds the code of what sets a page up, of what only draws, and of what is tagged "folded"."""
    heads = (i for i, cell in enumerate(cells) if source_of(cell).startswith("## "))
    first = next(heads, 0)
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        jupyter = dict(cell["metadata"].get("jupyter", {}))
        jupyter.pop("source_hidden", None)
        draws = only_draws(cell) and not is_needed(cell, cells[number + 1 :])
        says_so = "folded" in cell["metadata"].get("tags", [])
        if (number < first or draws or says_so) and not is_open(cell):
            jupyter["source_hidden"] = True
        if jupyter:
            cell["metadata"]["jupyter"] = jupyter
        else:
            cell["metadata"].pop("jupyter", None)


def read_title(page: Path) -> str:
    """What a page is called, "01 · Attention"."""
    head = source_of(json.loads(page.read_text(encoding="utf-8"))["cells"][0])
    return head.partition("\n")[0].removeprefix("# ")


def link_neighbours(head: str, page: Path, pages: list[Path]) -> str:
    """The first cell of a page with its line of links to the page before and the next one."""
    place = [other.name for other in pages].index(page.name)
    links = []
    if place > 0:
        before = pages[place - 1]
        links.append(f"← [{read_title(before)}]({before.name})")
    if place + 1 < len(pages):
        after = pages[place + 1]
        links.append(f"[{read_title(after)}]({after.name}) →")
    line = " | ".join(links)
    return LINKS.sub(lambda found: f"{found[1]}  \n{line}", head, count=1)


def lay_out(page: Path, pages: list[Path]) -> str:
    """The text of a page's file as it should be."""
    notebook: Notebook = json.loads(page.read_text(encoding="utf-8"))
    fold(notebook["cells"])
    head = notebook["cells"][0]
    head["source"] = link_neighbours(source_of(head), page, pages).splitlines(True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fold cells and link the pages.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    pages = find_pages()
    stale = []
    for page in pages:
        text = lay_out(page, pages)
        if text != page.read_text(encoding="utf-8"):
            stale.append(page.name)
            if not options.check:
                page.write_text(text, encoding="utf-8", newline="\n")
    print(*stale or ["All pages are laid out."], sep="\n")
    if stale and options.check:
        sys.exit("python tools/layout.py")


if __name__ == "__main__":
    main()
