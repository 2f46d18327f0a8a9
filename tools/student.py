"""Write the student edition: the pages with the bodies of the taught functions left to write.

    python tools/student.py                        all pages, into build/student
    python tools/student.py --output FOLDER PAGE   one page, elsewhere

In cells tagged `student`, each function and method with a docstring keeps its signature and the
docstring and raises NotImplementedError; `__init__` and the like stay. A page that is there
already is left alone, because somebody may have written in it; --fresh replaces it.
"""

from __future__ import annotations

import argparse
import ast
import copy
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import nbformat
from run_pages import PAGES, ROOT, find_pages

PYTHON = ".venv/bin/python"
Function = ast.FunctionDef | ast.AsyncFunctionDef
Notebook = nbformat.NotebookNode

NOTE = """\
**Student edition.** What you write on this page: {names}.

Each of them raises `NotImplementedError` now; its docstring says what it must do. Put your code in
place of that line and run the page from the top: it stops where something is still missing, and the
page's own checks stop it where something is wrong. Where a cell only prints or draws,
`notebooks/{page}` shows what should come out. Whatever is imported from `folo_lib` is the finished
package, so no page needs what you wrote on another."""


def taught_functions(source: str) -> dict[str, Function]:
    """The functions and methods of a cell that a student writes, by qualified name."""
    return dict(_visit(ast.parse(source).body, ""))


def _visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _visit(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, Function):
            special = node.name.startswith("__") and node.name.endswith("__")
            first = ast.unparse(node.body[1]) if len(node.body) > 1 else "..."
            empty = first == "..." or first.startswith("raise NotImplementedError")
            if ast.get_docstring(node) and not special and not empty:
                yield f"{prefix}{node.name}", node


def stub(source: str, written: Collection[str] = ()) -> str:
    """The source with the taught bodies, except the `written` ones, left to write."""
    lines = source.split("\n")
    for name, node in reversed(taught_functions(source).items()):
        if name in written:
            continue
        docstring = node.body[0]
        indent = " " * docstring.col_offset
        lines[docstring.end_lineno : node.end_lineno] = [
            f'{indent}raise NotImplementedError("write {name}")'
        ]
    return "\n".join(lines)


def is_taught(cell: Notebook) -> bool:
    return "student" in cell.metadata.get("tags", [])


def names_to_write(notebook: Notebook) -> list[str]:
    cells = filter(is_taught, notebook.cells)
    return [name for cell in cells for name in taught_functions(cell.source)]


def make_student_page(notebook: Notebook, name: str) -> Notebook:
    """The page `name` with stubs, without outputs, and with a note under its title."""
    page = copy.deepcopy(notebook)
    names = names_to_write(page)
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if is_taught(cell):
            cell.source = stub(cell.source)
    if names:
        listed = ", ".join(f"`{name}`" for name in names)
        note = nbformat.v4.new_markdown_cell(
            NOTE.format(names=listed, page=name), id="student-edition"
        )
        page.cells.insert(1, note)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the student edition.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "student")
    parser.add_argument(
        "--fresh", action="store_true", help="replace pages that are there already"
    )
    parser.add_argument(
        "pages", nargs="*", type=Path, metavar="PAGE", help="default: all"
    )
    options = parser.parse_args()
    folder: Path = options.output
    # Style, data and tiny_model: what the pages find beside them.
    shutil.copytree(
        PAGES,
        folder,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.ipynb", "__pycache__", ".*"),
    )
    for page in options.pages or find_pages():
        target = folder / page.name
        if target.exists() and not options.fresh:
            print(f"{page.name:28} is there already and was left alone")
            continue
        notebook = nbformat.read(page, as_version=4)
        nbformat.write(make_student_page(notebook, page.name), target)
        print(f"{page.name:28} {len(names_to_write(notebook)):2} functions to write")

    print(f"\nThe pages are in {folder}; open them with")
    print(f"  {PYTHON} -m jupyterlab {folder}")
    if ROOT / "build" in folder.resolve().parents:
        print("`make clean` removes that folder. Keep what you write in another:")
        print(f"  {PYTHON} tools/student.py --output FOLDER")


if __name__ == "__main__":
    main()
