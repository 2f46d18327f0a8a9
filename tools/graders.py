"""Write what graders need: a course for nbgrader, tests for otter, a file for pytest.

`tools/student.py` calls it. In the folder that it writes:

    nbgrader/   nbgrader_config.py and source/PAGE/PAGE.ipynb, for `nbgrader generate_assignment`
    otter/      PAGE/ with the student's page, tests/ and requirements.txt, for `otter generate`
    pytest/     test_PAGE.py, for Classroom 50, Gradescope, Codio and whatever else runs pytest
    solved/     the pages with all solutions, the exercises' too

A check is worth one point: of each cell in which there is something to write, and of each exercise.
"""

from __future__ import annotations

import ast
import copy
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nbformat
import student
from run_pages import PAGES, ROOT

from folo_lib.course.written import taught_functions

Notebook = nbformat.NotebookNode
INSTALL = "folo-lib @ git+https://github.com/folovllm/FoloVLLM"


class Task(NamedTuple):
    """What a point is given for: the cell with the student's work, and the check."""

    name: str
    cell: Notebook
    check: str


def find_tasks(page: Notebook, topic: str) -> list[Task]:
    """What is graded on a page, in order."""
    return list(_find_tasks(page, topic))


def _find_tasks(page: Notebook, topic: str) -> Iterator[Task]:
    for cell in page.cells:
        if student.is_taught(cell):
            names = student.top_names(cell.source)
            call = f'stop_unless_written("{topic}", {", ".join(names)})'
            source = (
                f"from folo_lib.course.written import stop_unless_written\n\n{call}"
            )
            yield Task(cell.id.replace("-", "_"), cell, source)
        elif "exercise" in cell.metadata.get("tags", []):
            name = name_of(cell.source)
            source = (
                "from folo_lib.course.exercises import grade\n"
                f"from folo_lib.course.exercises.{topic} import check_{name}\n\n"
                f"grade(check_{name}, {name})"
            )
            yield Task(name, cell, source)


def name_of(source: str) -> str:
    """The one function or class of an exercise's stub."""
    (top,) = ast.parse(source).body
    assert isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    return top.name


def read_solutions(stem: str) -> dict[str, str]:
    """The source of each solution, with all that its block imports and defines."""
    text = (ROOT / "docs" / "solutions" / f"{stem}.md").read_text(encoding="utf-8")
    found, before = {}, ""
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        before += block
        for node in ast.parse(block).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[node.name] = before.strip()
    return found


def without_outputs(notebook: Notebook) -> Notebook:
    page = copy.deepcopy(notebook)
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = student.mend_links(cell.source)
    return page


def make_solved_page(notebook: Notebook, stem: str) -> Notebook:
    """The page with the solutions of its exercises."""
    page, solutions = without_outputs(notebook), read_solutions(stem)
    for cell in page.cells:
        if "exercise" in cell.metadata.get("tags", []):
            cell.source = solutions[name_of(cell.source)]
    return page


# nbgrader


def mark_solutions(source: str) -> str:
    """The source with the marks between which nbgrader puts a stub."""
    lines = source.split("\n")
    for _, node in reversed(taught_functions(source).items()):
        docstring = node.body[0]
        indent = " " * docstring.col_offset
        body = lines[docstring.end_lineno : node.end_lineno]
        lines[docstring.end_lineno : node.end_lineno] = [
            f"{indent}### BEGIN SOLUTION",
            *body,
            f"{indent}### END SOLUTION",
        ]
    return "\n".join(lines)


def make_nbgrader_page(notebook: Notebook, topic: str) -> Notebook:
    """The page as nbgrader's `source`: with solutions, marks, and cells that give points."""
    page, tasks = without_outputs(notebook), find_tasks(notebook, topic)
    by_id = {task.cell.id: task for task in tasks}
    cells: list[Notebook] = []
    for cell in page.cells:
        cells.append(cell)
        task = by_id.get(cell.id)
        if task is None:
            continue
        if student.is_taught(cell):
            cell.source = mark_solutions(cell.source)
        else:
            stub = "raise NotImplementedError"
            marked = (
                r"\1### BEGIN SOLUTION\n\1raise NotImplementedError\n\1### END SOLUTION"
            )
            cell.source = re.sub(
                rf"^( +){stub}$", marked, cell.source, flags=re.MULTILINE
            )
        cell.metadata["nbgrader"] = describe_cell(task.name, solution=True)
        check = nbformat.v4.new_code_cell(task.check, id=f"{cell.id[:56]}-points")
        check.metadata["nbgrader"] = describe_cell(
            f"{task.name}_points", solution=False
        )
        cells.append(check)
    page.cells = cells
    return page


def describe_cell(grade_id: str, solution: bool) -> dict[str, object]:
    """nbgrader's metadata of a cell, of the schema's version 3."""
    metadata: dict[str, object] = {
        "grade": not solution,
        "grade_id": grade_id,
        "locked": not solution,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
    return metadata if solution else metadata | {"points": 1}


NBGRADER_CONFIG = """\
c = get_config()
c.CourseDirectory.course_id = "folo"
# A page takes up to half a minute, and a cell of it longer than nbgrader's 30 seconds on a
# busy machine.
c.ExecutePreprocessor.timeout = 300
"""


# otter and pytest


def make_otter_test(task: Task) -> str:
    """A test file of otter, of the kind that passes unless an exception is raised."""
    names = sorted(
        {task.name}
        if "exercise" in task.cell.metadata.get("tags", [])
        else set(student.top_names(task.cell.source))
    )
    body = task.check.replace("\n", "\n    ").replace("\n    \n", "\n\n")
    return (
        "from otter.test_files import test_case\n\n"
        "OK_FORMAT = False\n\n"
        f'name = "{task.name}"\npoints = 1\n\n\n'
        f'@test_case(name="{task.name}", points=1, hidden=False)\n'
        f"def test_{task.name}({', '.join(names)}):\n    {body}\n"
    )


PYTEST = '''\
"""Grades {page}: one test for each point. Lay it beside the page, and run pytest.

The environment variable FOLO_SUBMISSION names a page, or a Python file, that lies elsewhere.
"""

import os
from pathlib import Path

import pytest

from folo_lib.course.autograde import grade_file
from folo_lib.course.exercises import Verdict

PAGE = os.environ.get("FOLO_SUBMISSION", Path(__file__).with_name("{page}"))
TASKS = {tasks}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    """What the checks say, in a process of their own."""
    names = [name for group in TASKS.values() for name in group]
    return grade_file(PAGE, "{topic}", names)


@pytest.mark.parametrize("task", TASKS)
def test_point(task: str, verdicts: dict[str, Verdict]) -> None:
    for name in TASKS[task]:
        assert verdicts[name].passed, verdicts[name].message
'''


def make_pytest_file(page_name: str, topic: str, tasks: Sequence[Task]) -> str:
    """A test file that needs nothing but pytest and folo_lib."""
    lines = "".join(f"    {task.name!r}: {_graded(task)!r},\n" for task in tasks)
    text = PYTEST.format(page=page_name, topic=topic, tasks="{\n" + lines + "}")
    return text.replace("'", '"')


def _graded(task: Task) -> list[str]:
    if student.is_taught(task.cell):
        return student.top_names(task.cell.source)
    return [task.name]


def copy_beside(page: Path, folder: Path) -> None:
    """What a page finds beside it: the style, and what it names of the rest."""
    shutil.copy(PAGES / "folo.mplstyle", folder)
    text = page.read_text(encoding="utf-8")
    for name in ("data", "tiny_model"):
        if name in text:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                PAGES / name, folder / name, dirs_exist_ok=True, ignore=ignore
            )


def write_graders(pages: Sequence[Path], folder: Path) -> None:
    """Writes the folders anew for these pages; what else is there stays."""
    for name in ("nbgrader", "pytest", "solved"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    config = folder / "nbgrader" / "nbgrader_config.py"
    config.write_text(NBGRADER_CONFIG, encoding="utf-8")
    for page in pages:
        stem, topic = page.stem, student.topic_of(page.name)
        notebook = nbformat.read(page, as_version=4)
        tasks = find_tasks(notebook, topic)
        source = folder / "nbgrader" / "source" / stem
        otter = folder / "otter" / stem
        for place in (source, otter / "tests"):
            place.mkdir(parents=True, exist_ok=True)
        copy_beside(page, source)
        copy_beside(page, otter)
        nbformat.write(make_nbgrader_page(notebook, topic), source / page.name)
        nbformat.write(
            student.make_student_page(notebook, page.name), otter / page.name
        )
        nbformat.write(make_solved_page(notebook, stem), folder / "solved" / page.name)
        (otter / "requirements.txt").write_text(f"{INSTALL}\n", encoding="utf-8")
        for task in tasks:
            test = otter / "tests" / f"{task.name}.py"
            test.write_text(make_otter_test(task), encoding="utf-8")
        file = folder / "pytest" / f"test_{stem}.py"
        text = make_pytest_file(page.name, topic, tasks)
        file.write_text(text, encoding="utf-8")
