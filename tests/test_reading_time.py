"""The rule of the reading times, and the tool that writes them wherever they stand."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import layout  # noqa: E402
import reading_time  # noqa: E402  tools/ is not a package
import run_pages  # noqa: E402

code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def minutes(*cells: nbformat.NotebookNode) -> int:
    return reading_time.estimate_minutes(nbformat.v4.new_notebook(cells=list(cells)))


class TestRule:
    def test_words_lines_cells_and_figures_count(self) -> None:
        assert minutes() == 5
        assert minutes(text("word " * 3000)) == 20
        assert minutes(code("x = 1\n" * 240)) == 20
        assert minutes(*[code("") for _ in range(100)]) == 20
        data = {"image/png": "iVBORw0KGgo="}
        out = [nbformat.v4.new_output("display_data", data)]
        drawn = [code("", outputs=out) for _ in range(40)]
        assert minutes(*drawn) == 30  # 8 to run them, 20 to look

    def test_what_is_not_read_does_not_count(self) -> None:
        lines = "x = 1\n" * 600
        assert minutes(code(lines, id="install")) == 5
        assert minutes(code(lines, metadata={"tags": ["exercise"]})) == 5
        assert minutes(code("import torch\n" * 600 + "\n" * 600)) == 5

    def test_docstrings_and_comments_are_prose(self) -> None:
        source = 'def f():\n    """One two three."""\n    return 1  # four five\n'
        lines, prose = reading_time.split_code(source)
        assert lines == 2
        assert reading_time.count_words(prose) == 5

    def test_lines_over_several_tokens_and_magics(self) -> None:
        assert reading_time.split_code('x = """a\n\nb"""\n')[0] == 3
        assert reading_time.split_code("%cd x\n!ls\ny = (\n    1,\n)")[0] == 3
        assert reading_time.split_code("def broken(:\n  x") == (2, "")

    def test_links_count_by_their_text(self) -> None:
        linked = "See [page 02](02_rope.ipynb#a-b-c), <b>q</b>."
        assert reading_time.count_words(linked) == 4

    def test_hours(self) -> None:
        assert [reading_time.name_hours(n) for n in (5, 60, 145)] == [
            "5 min",
            "1 h 00",
            "2 h 25",
        ]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files with minutes, elsewhere."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "README.zh.md", "docs/syllabus.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(reading_time, "ROOT", tmp_path)
    monkeypatch.setattr(layout, "PAGES", tmp_path / "notebooks")
    return tmp_path


def test_writes_the_same_minutes_everywhere_and_only_once(copy: Path) -> None:
    expected = reading_time.read_minutes()
    for _, write in list(reading_time.list_changes(expected)):
        write()
    assert not list(reading_time.list_changes(reading_time.read_minutes()))
    for page in run_pages.find_pages():
        before = nbformat.read(ROOT / "notebooks" / page.name, as_version=4)
        after = nbformat.read(page, as_version=4)
        assert run_pages.read_head(after).minutes == expected[page.name]
        assert [c.id for c in after.cells] == [c.id for c in before.cells]
    tour = (copy / "notebooks" / "00_tour.ipynb").read_text(encoding="utf-8")
    for name in ("README.md", "README.zh.md"):
        readme = (copy / name).read_text(encoding="utf-8")
        rows = re.findall(
            r"^\| \[.+?\]\(notebooks/([\w.]+)\) \| .+? \| (\d+) \|", readme, re.M
        )
        assert {page: int(number) for page, number in rows} == expected
    rows = re.findall(r"\| \[.+?\]\(([\w.]+)\) \| .+? \| (\d+) \|", tour)
    assert len(rows) == len(expected) - 1
    assert all(expected[page] == int(number) for page, number in rows)


def test_a_row_of_the_syllabus_has_the_sum_of_its_pages() -> None:
    row = "| 1 | [a](../notebooks/a.ipynb), [b](../notebooks/b.ipynb) | x | 0 min |\n| 2 | y | 5 min |"
    renewed = reading_time.write_syllabus(row, {"a.ipynb": 50, "b.ipynb": 45})
    assert renewed.split("\n")[0].endswith("| x | 1 h 35 |")
    assert renewed.endswith("| 2 | y | 5 min |")


def test_the_minutes_that_stand_there_are_those_of_the_rule() -> None:
    others = [
        path.name for path, _ in reading_time.list_changes(reading_time.read_minutes())
    ]
    assert not others, "run tools/reading_time.py"
