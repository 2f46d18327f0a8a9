"""nbgrader, otter and pytest themselves, on what `make student` writes: stubs 0, solutions all.

`make test-more` runs the tests of the first two once more in `.venv-graders`, where they are, if
they can be had.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import graders  # noqa: E402  tools/ is not a package
import student  # noqa: E402

PAGES = sorted(ROOT.glob("notebooks/*.ipynb"))
PAGE = ROOT / "notebooks" / "03_layers.ipynb"
STEM = PAGE.stem
POINTS = len(graders.find_tasks(nbformat.read(PAGE, as_version=4), "layers"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graders")
    graders.write_graders([PAGE], folder)
    return folder


def need(module: str, package: str) -> None:
    reason = f"{package} is not installed: pip install -e '.[graders]'"
    pytest.importorskip(module, reason=reason)


def run(*command: str, folder: Path) -> str:
    """Runs a module of this Python, whose kernel is that of this Python too."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    bin_first = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kernel = {"PYTHONPATH": path, "PATH": bin_first, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | kernel,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def copy_solutions(page: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The page with what the solved one has in the student's cells."""
    solved = nbformat.read(folder / "solved" / PAGE.name, as_version=4)
    sources = {cell.id: cell.source for cell in solved.cells}
    for cell in page.cells:
        is_exercise = "exercise" in cell.metadata.get("tags", [])
        if student.is_taught(cell) or is_exercise:
            cell.source = sources[cell.id]
    return page


@pytest.mark.more
def test_nbgrader(folder: Path) -> None:
    need("nbgrader", "nbgrader")
    course = folder / "nbgrader"
    run("nbgrader", "generate_assignment", STEM, folder=course)
    release = nbformat.read(course / "release" / STEM / PAGE.name, as_version=4)
    for cell in release.cells:
        assert "SOLUTION" not in cell.source
        if cell.metadata.get("nbgrader", {}).get("solution"):
            assert "raise NotImplementedError()" in cell.source
    for name in ("stub", "solved"):
        place = course / "submitted" / name / STEM
        place.mkdir(parents=True)
        page = copy_solutions(release, folder) if name == "solved" else release
        nbformat.write(page, place / PAGE.name)
    run("nbgrader", "autograde", STEM, folder=course)
    run("nbgrader", "export", folder=course)
    with (course / "grades.csv").open(encoding="utf-8") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    scores = {name: float(row["score"]) for name, row in rows.items()}
    assert scores == {"stub": 0, "solved": POINTS}
    assert {float(row["max_score"]) for row in rows.values()} == {POINTS}


@pytest.mark.more
def test_otter(folder: Path) -> None:
    need("otter", "otter-grader")
    place = folder / "otter" / STEM
    stub = nbformat.read(place / PAGE.name, as_version=4)
    nbformat.write(copy_solutions(stub, folder), place / "solved.ipynb")
    said = run("otter", "check", PAGE.name, "-t", "tests", folder=place)
    assert said.count("Test case failed") == POINTS
    assert "Not yet: fold_norm is still the stub." in said
    files = sorted(path.name for path in place.glob("*") if path.suffix == ".mplstyle")
    run("otter", "generate", "-t", "tests", "-o", "a.zip", *files, folder=place)
    for name, points in ((PAGE.name, 0), ("solved.ipynb", POINTS)):
        out = place / f"out-{points}"
        out.mkdir()
        run(
            "otter",
            "run",
            name,
            "-a",
            "a.zip",
            "-o",
            out.name,
            "--no-logo",
            folder=place,
        )
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        scored = [test for test in results["tests"] if "score" in test]
        assert sum(test["max_score"] for test in scored) == POINTS
        assert sum(test["score"] for test in scored) == points


@pytest.mark.more
def test_pytest_file(folder: Path, tmp_path: Path) -> None:
    page = student.make_student_page(nbformat.read(PAGE, as_version=4), PAGE.name)
    nbformat.write(page, tmp_path / PAGE.name)
    solved = folder / "solved" / PAGE.name
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for submission, words in (
        (tmp_path / PAGE.name, f"{POINTS} failed"),
        (solved, f"{POINTS} passed"),
    ):
        done = subprocess.run(
            [*command, str(folder / "pytest" / f"test_{STEM}.py")],
            cwd=tmp_path,
            env=os.environ
            | {"FOLO_SUBMISSION": str(submission), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert words in done.stdout, done.stdout[-2000:]
        if submission != solved:
            assert "Not yet: RMSNorm.normalize is still the stub." in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
class TestFiles:
    """Of all pages, without the graders."""

    def test_source_of_nbgrader(self, page: Path) -> None:
        notebook = nbformat.read(page, as_version=4)
        topic = student.topic_of(page.name)
        made = graders.make_nbgrader_page(notebook, topic)
        nbformat.validate(made)
        found: dict[str, Any] = {
            cell.metadata["nbgrader"]["grade_id"]: cell
            for cell in made.cells
            if "nbgrader" in cell.metadata
        }
        tasks = graders.find_tasks(notebook, topic)
        assert len(found) == 2 * len(tasks) and len(tasks) >= 2
        for task in tasks:
            work, check = found[task.name], found[f"{task.name}_points"]
            assert work.source.count("### BEGIN SOLUTION") >= 1
            assert work.source.count("BEGIN") == work.source.count("END SOLUTION")
            plain = [x for x in work.source.split("\n") if "SOLUTION" not in x]
            assert "\n".join(plain) == task.cell.source
            assert check.metadata["nbgrader"]["locked"]
            assert check.metadata["nbgrader"]["points"] == 1
            compile(check.source, task.name, "exec")

    def test_solved_page_has_all_solutions_and_no_solved_cell_is_a_stub(
        self, page: Path
    ) -> None:
        notebook = nbformat.read(page, as_version=4)
        made = graders.make_solved_page(notebook, page.stem)
        for cell in made.cells:
            tags = cell.metadata.get("tags", [])
            assert not cell.get("outputs")
            if "exercise" in tags:
                assert "raise NotImplementedError" not in cell.source
                compile(cell.source, cell.id, "exec")

    def test_files_of_otter_and_pytest_compile(self, page: Path) -> None:
        notebook = nbformat.read(page, as_version=4)
        topic = student.topic_of(page.name)
        tasks = graders.find_tasks(notebook, topic)
        for task in tasks:
            compile(graders.make_otter_test(task), task.name, "exec")
        compile(graders.make_pytest_file(page.name, topic, tasks), page.stem, "exec")
