"""Every promise of docs/acceptance.md leads to a page, tests and a figure that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "acceptance.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| **")]

# What the course is asked to promise, in the words of the table.
ASKED = [
    "attention and masks",
    "backends",
    "norm",
    "rope",
    "model",
    "loading",
    "tied head",
    "caches",
    "slot mapping",
    "filters",
    "seeds",
    "penalties",
    "stops",
    "runner",
    "worker",
    "executor",
    "processing of inputs",
    "engine",
    "metrics",
    "scheduler",
    "paging",
    "prefix caching",
    "flash attention",
    "graphs",
    "fused decode",
    "serving",
    "equality with hugging face",
    "benchmark",
    "bundled checkpoint",
    "export",
    "nbval",
]


@cache
def find_tests(path: Path) -> set[str]:
    """The ids of the tests and classes of tests in a file, without parameters."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            inner = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {node.name, *(f"{node.name}::{name}" for name in inner)}
        elif isinstance(node, ast.Assign):  # of a machine of hypothesis
            found |= {ast.unparse(target) for target in node.targets}
    return {name for name in found if "test" in name.lower()}


@cache
def read_headings(page: Path) -> str:
    cells = nbformat.read(page, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_everything_that_was_asked_for_is_promised() -> None:
    promised = [re.search(r"\*\*(.+?)\.\*\*", row) for row in ROWS]
    names = [found[1].lower() for found in promised if found]
    assert len(set(names)) == len(names) == len(ROWS) >= 30
    assert set(ASKED) <= set(names)
    assert "tensor" in TEXT.lower()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"\W+", "-", row[4:30]))
def test_a_row_leads_somewhere(row: str) -> None:
    _, _promise, page_cell, tests, seen, _ = row.split("|")
    page = re.search(r"\(\.\./(notebooks/\w+\.ipynb)\)", page_cell)
    assert page is not None and (ROOT / page[1]).exists()
    prose = read_headings(ROOT / page[1])
    check_tests(tests)
    places = [part.strip() for part in seen.split(",")]
    assert places
    for place in places:
        if figure := re.fullmatch(r"Figure (\d+)", place):
            assert f"**Figure {figure[1]}.**" in prose
        elif section := re.fullmatch(r"section (\d+)", place):
            assert re.search(rf"^## {section[1]}\. ", prose, re.MULTILINE)
        else:
            recording = re.fullmatch(r"\[(\S+)\]\(\.\./(notebooks/data/\1)\)", place)
            assert recording is not None and (ROOT / recording[2]).exists(), place


def check_tests(text: str) -> None:
    named = re.findall(r"`(tests/\w+\.py)::([\w:]+)`", text)
    assert named and text.count("`") == 2 * len(named), text
    for path, name in named:
        assert (ROOT / path).exists(), path
        assert name in find_tests(ROOT / path), f"{path} has no {name}"


def test_tests_outside_the_table_exist_too() -> None:
    for line in TEXT.splitlines():
        if "::" in line and not line.startswith("|"):
            for path, name in re.findall(r"`(tests/\w+\.py)::([\w:]+)`", line):
                assert name in find_tests(ROOT / path)


def test_it_is_linked_from_where_one_looks() -> None:
    assert "acceptance" in (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert "acceptance.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", ["test_attention.py::test_no", "test_no.py::test_a"])
def test_what_does_not_exist_is_noticed(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_tests(f"`tests/{wrong}`")
