"""The student edition: it fails where a body is missing, and passes when the body is put back."""

from __future__ import annotations

import ast
import io
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("notebooks/*.ipynb"))

sys.path.insert(0, str(ROOT / "tools"))
import student  # noqa: E402  tools/ is not a package

from folo_lib.course.written import taught_functions  # noqa: E402

TAUGHT = [
    page
    for page in PAGES
    if any(map(student.is_taught, nbformat.read(page, as_version=4).cells))
]


@dataclass
class Attempt:
    """One student's way through a page, who writes a function when a cell asks for it."""

    written: list[str] = field(default_factory=list)
    problem: str | None = None


def attempt(original: Path, folder: Path) -> Attempt:
    """Runs a page of the student edition in `folder`; to be called in a process of its own.

    Where a cell fails after a stub was called, the original's body comes back and the page runs
    again from that function's cell, each cell with the random state that it had before. With the
    last body back the page is the original, letter by letter, and `make test` runs that one
    anyway: here it ends when the cell that failed last has passed.
    """
    shell = make_shell(folder)
    called: list[str] = []

    class Called(NotImplementedError):
        """Remembers the stub that raised it, in case the page swallows it."""

        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            if args and str(args[0]).startswith("write "):
                called.append(str(args[0]).removeprefix("write "))

    shell.user_ns["NotImplementedError"] = Called
    bodies, cells = code_cells(original), code_cells(folder / original.name)
    home = {
        name: at
        for at, cell in enumerate(bodies)
        if student.is_taught(cell)
        for name in taught_functions(cell.source)
    }
    made = Attempt()
    states: dict[int, Tensor] = {}
    at, failed = 0, -1
    while at < len(cells) and (at <= failed or len(made.written) < len(home)):
        torch.set_rng_state(states.setdefault(at, torch.get_rng_state()))
        result = shell.run_cell(cells[at].source)
        error = result.error_before_exec or result.error_in_exec
        if error is None:
            if unfair := refuse(shell, bodies[at], original, made.written, called):
                made.problem = unfair
                return made
            at += 1
            continue
        # Swallowed calls count only where nothing else explains the failure.
        names = (
            called[-1:] if isinstance(error, Called) else list(dict.fromkeys(called))
        )
        if not names:
            made.problem = f"{cells[at].id}: {type(error).__name__}: {error}"
            return made
        made.written += names
        failed, at = at, min(home[name] for name in names)
        for cell in {home[name] for name in names}:
            cells[cell].source = student.stub(bodies[cell].source, made.written)
        called.clear()

    untouched = sorted(home.keys() - set(made.written))
    if untouched:
        made.problem = f"nothing on the page fails without {', '.join(untouched)}"
    elif [cell.source for cell in cells] != [cell.source for cell in bodies]:
        made.problem = "with all bodies back, the page is not the original"
    return made


def refuse(
    shell: Any,
    body: student.Notebook,
    page: Path,
    written: list[str],
    called: list[str],
) -> str | None:
    """What the check after a cell says of it, if it is complete and does not pass.

    It may call stubs of other cells, and says so then.
    """
    if not student.is_taught(body) or set(taught_functions(body.source)) - set(written):
        return None
    num_called = len(called)
    result = shell.run_cell(
        "from folo_lib.course.written import stop_unless_written\n"
        + student.make_check(body, student.topic_of(page.name)).source
    )
    del called[num_called:]
    error = result.error_in_exec
    calls_a_stub = error is not None and "is still the stub" in str(error)
    return None if error is None or calls_a_stub else f"{body.id}: {error}"


def make_shell(folder: Path) -> Any:
    """What runs cells like a kernel, in this process, without a word and without drawing."""
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell
    from matplotlib import pyplot as plt
    from traitlets.config import Config

    torch.set_num_threads(1)
    matplotlib.use("agg")
    plt.show = lambda: plt.close("all")
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.stdout = sys.stderr = io.StringIO()
    config = Config({"HistoryManager": {"enabled": False}})
    shell = InteractiveShell.instance(config=config)
    shell.showtraceback = lambda *args, **kwargs: None
    return shell


def code_cells(page: Path) -> list[student.Notebook]:
    """Without those that the edition adds: the page itself must notice what is missing."""
    cells = nbformat.read(page, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and not is_added(cell)]


def is_added(cell: student.Notebook) -> bool:
    return student.is_check(cell) or cell.id in (
        "student-edition",
        "student-start",
        "student-end",
    )


@pytest.fixture(scope="module")
def edition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tool = ROOT / "tools" / "student.py"
    graders = folder / "graders"
    command = [sys.executable, tool, "--output", folder, "--graders", graders]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """A fresh process for each page, forked from one that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch._dynamo",
            "transformers.models.qwen2.modeling_qwen2",
            "transformers.models.qwen3.modeling_qwen3",
            "matplotlib.pyplot",
            "IPython.core.interactiveshell",
        ]
    )
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield pool


@pytest.mark.more
@pytest.mark.parametrize("page", TAUGHT, ids=lambda page: page.stem)
def test_fails_without_each_body_and_passes_with_all(
    page: Path, edition: Path, processes: ProcessPoolExecutor
) -> None:
    made = processes.submit(attempt, page, edition).result(timeout=300)
    assert made.problem is None, f"after {made.written}: {made.problem}"


def test_every_page_with_a_module_has_something_to_write() -> None:
    exporting = {
        page
        for page in PAGES
        if any("#| default_exp" in cell.source for cell in code_cells(page))
    }
    # What page 17 exports lives in an event loop: no call on a copy can be made there, and the
    # exercises are what is left to write.
    apart = {"17_serving"}
    assert {page.stem for page in exporting - set(TAUGHT)} == apart


class TestEdition:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
    def test_differs_from_the_page_in_stubs_outputs_links_and_what_is_added(
        self, page: Path, edition: Path
    ) -> None:
        original = nbformat.read(page, as_version=4)
        copy = nbformat.read(edition / page.name, as_version=4)
        nbformat.validate(copy)
        if page in TAUGHT:
            assert copy.cells[1].source.startswith("**Student edition.**")
            assert f"/notebooks/{page.name})" in copy.cells[1].source
        assert copy.metadata == original.metadata
        kept = [cell for cell in copy.cells if not is_added(cell)]
        for cell, written in zip(kept, original.cells, strict=True):
            assert (cell.id, cell.metadata) == (written.id, written.metadata)
            if cell.cell_type == "code":
                assert student.is_taught(cell) == (cell.source != written.source)
            assert not cell.get("outputs")
            assert not cell.get("execution_count")

    @pytest.mark.parametrize("page", TAUGHT, ids=lambda page: page.stem)
    def test_a_check_comes_after_each_stub_and_the_line_that_counts_before_all(
        self, page: Path, edition: Path
    ) -> None:
        cells = nbformat.read(edition / page.name, as_version=4).cells
        start = next(i for i, cell in enumerate(cells) if cell.id == "student-start")
        assert cells[start - 1].id == "install"
        names = []
        for i, cell in enumerate(cells):
            assert student.is_check(cell) == (i > 0 and student.is_taught(cells[i - 1]))
            if student.is_check(cell):
                assert i > start
                call = ast.parse(cell.source).body[0].value
                assert call.func.id == "stop_unless_written"
                topic, *objects = call.args
                assert topic.value == student.topic_of(page.name)
                names += [one.id for one in objects]
                assert max(map(len, cell.source.split("\n"))) <= 88
        listed = ast.parse(cells[start].source).body[-1].value.args[0]
        assert ast.literal_eval(listed) == names

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
    def test_links_lead_neither_to_a_dead_file_nor_to_a_solved_page_to_run(
        self, page: Path, edition: Path
    ) -> None:
        cells = nbformat.read(edition / page.name, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        assert "colab.research" not in text and "mybinder" not in text
        assert "docs/solutions" not in text
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            beside = (edition / link.partition("#")[0]).exists()
            assert link.startswith(("http", "#", "…")) or beside, link

    @pytest.mark.parametrize("page", TAUGHT, ids=lambda page: page.stem)
    def test_note_names_what_is_to_write_and_each_name_once(
        self, page: Path, edition: Path
    ) -> None:
        cells = nbformat.read(edition / page.name, as_version=4).cells
        names = [
            line.strip().removeprefix('raise NotImplementedError("write ')[:-2]
            for cell in filter(student.is_taught, cells)
            for line in cell.source.split("\n")
            if line.strip().startswith('raise NotImplementedError("write ')
        ]
        assert len(set(names)) == len(names) > 0
        listed = ", ".join(f"`{name}`" for name in names)
        assert f"What you write on this page: {listed}." in cells[1].source

    def test_has_beside_it_what_pages_need(self, edition: Path) -> None:
        assert (edition / "folo.mplstyle").is_file()
        assert (edition / "tiny_model" / "corpus.py").is_file()
        assert "do not solve" in (edition / "AGENTS.md").read_text(encoding="utf-8")
        assert {path.name for path in (edition / "data").iterdir()} == {
            path.name for path in (ROOT / "notebooks" / "data").iterdir()
        }
        assert not list(edition.rglob("__pycache__"))

    def test_leaves_a_page_alone_that_is_there_already(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        page = TAUGHT[0]
        target = tmp_path / page.name

        def write(*flags: str) -> str:
            where = ["--output", str(tmp_path), "--graders", str(tmp_path / "graders")]
            command = ["student.py", *flags, *where, str(page)]
            monkeypatch.setattr(sys, "argv", command)
            student.main()
            return capsys.readouterr().out

        fresh = write()
        assert "functions to write" in fresh
        stubs = target.read_text(encoding="utf-8")
        target.write_text("an evening's work", encoding="utf-8")
        assert "left alone" in write()
        assert target.read_text(encoding="utf-8") == "an evening's work"
        assert write("--fresh") == fresh
        assert target.read_text(encoding="utf-8") == stubs


SOURCE = textwrap.dedent(
    '''\
    #| export
    LIMIT = 3  # stays


    @decorated
    def double(x: int, *, by: int = 2) -> int:  # a remark
        """Twice `x`.

        Longer.
        """
        # how
        def times(y):
            """Nested."""
            return y * by

        return times(x)  # done


    def bare(x):
        return x


    class Shape(Base):
        """A shape."""

        sides = 4

        def __init__(self, side: float) -> None:
            """Stays."""
            self.side = side

        @property
        def area(self) -> float:
            """Of the square."""

            return self.side**2

        @abstractmethod
        def name(self) -> str:
            """What a subclass says."""

        def later(self) -> str:
            """Of a subclass too."""
            raise NotImplementedError


    print(double(LIMIT))
    '''
)
STUBBED = textwrap.dedent(
    '''\
    #| export
    LIMIT = 3  # stays


    @decorated
    def double(x: int, *, by: int = 2) -> int:  # a remark
        """Twice `x`.

        Longer.
        """
        raise NotImplementedError("write double")


    def bare(x):
        return x


    class Shape(Base):
        """A shape."""

        sides = 4

        def __init__(self, side: float) -> None:
            """Stays."""
            self.side = side

        @property
        def area(self) -> float:
            """Of the square."""
            raise NotImplementedError("write Shape.area")

        @abstractmethod
        def name(self) -> str:
            """What a subclass says."""

        def later(self) -> str:
            """Of a subclass too."""
            raise NotImplementedError


    print(double(LIMIT))
    '''
)


class TestStub:
    def test_keeps_all_but_the_bodies(self) -> None:
        assert list(taught_functions(SOURCE)) == ["double", "Shape.area"]
        assert student.stub(SOURCE) == STUBBED

    def test_leaves_what_is_written(self) -> None:
        assert student.stub(SOURCE, ["double", "Shape.area"]) == SOURCE
        half = student.stub(SOURCE, ["Shape.area"])
        assert 'NotImplementedError("write double")' in half
        assert "return self.side**2" in half

    def test_is_its_own_stub(self) -> None:
        assert taught_functions(STUBBED) == {}
        assert student.stub(STUBBED) == STUBBED


@pytest.mark.more
class TestAttempt:
    """The judge itself, on small pages."""

    def judge(
        self, sources: list[str], folder: Path, processes: ProcessPoolExecutor
    ) -> Attempt:
        page = nbformat.v4.new_notebook()
        for number, source in enumerate(["# Title", *sources]):
            if number == 0:
                cell = nbformat.v4.new_markdown_cell(source, id="title")
            else:
                tags = ["student"] if source.startswith("#| export") else []
                cell = nbformat.v4.new_code_cell(
                    source, id=f"c{number}", metadata={"tags": tags} if tags else {}
                )
            page.cells.append(cell)
        original = folder / "original.ipynb"
        nbformat.write(page, original)
        edition = folder / "edition"
        edition.mkdir()
        copy = student.make_student_page(page, original.name)
        nbformat.write(copy, edition / original.name)
        return processes.submit(attempt, original, edition).result(timeout=60)

    ADD = '#| export\ndef add(a, b):\n    """The sum."""\n    return a + b'
    MUL = '#| export\ndef mul(a, b):\n    """The product."""\n    return a * b'

    def test_writes_bodies_in_the_order_in_which_they_are_asked_for(
        self, tmp_path: Path, processes: ProcessPoolExecutor
    ) -> None:
        cells = [self.ADD, self.MUL, "x = 1", "assert mul(x, 3) == 3\nadd(x, 1)"]
        made = self.judge(cells, tmp_path, processes)
        assert made == Attempt(["mul", "add"])

    def test_a_function_that_no_cell_calls(
        self, tmp_path: Path, processes: ProcessPoolExecutor
    ) -> None:
        made = self.judge([self.ADD, self.MUL, "add(1, 2)"], tmp_path, processes)
        assert made.problem == "nothing on the page fails without mul"

    def test_a_call_that_is_swallowed_must_fail_later(
        self, tmp_path: Path, processes: ProcessPoolExecutor
    ) -> None:
        swallow = "try:\n    y = add(1, 2)\nexcept Exception:\n    y = 0"
        made = self.judge([self.ADD, swallow], tmp_path, processes)
        assert made.problem == "nothing on the page fails without add"
        (tmp_path / "b").mkdir()
        made = self.judge([self.ADD, swallow, "assert y"], tmp_path / "b", processes)
        assert made == Attempt(["add"])

    def test_a_page_that_fails_by_itself(
        self, tmp_path: Path, processes: ProcessPoolExecutor
    ) -> None:
        made = self.judge([self.ADD, "assert add(1, 2) == 4"], tmp_path, processes)
        assert made.written == ["add"]
        assert made.problem == "c2: AssertionError: "

    def test_cells_that_run_again_draw_the_same_numbers(
        self, tmp_path: Path, processes: ProcessPoolExecutor
    ) -> None:
        draw = "import torch\ntorch.manual_seed(0)\nfirst = []"
        cells = [draw, self.ADD, "first.append(torch.rand(1).item())"]
        cells += ["add(1, 2)\nassert first[0] == first[1], first"]
        made = self.judge(cells, tmp_path, processes)
        assert made == Attempt(["add"])
