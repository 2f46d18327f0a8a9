"""Every exercise of every page: its stub does not pass, its solution does; what verdicts say."""

from __future__ import annotations
import __future__

import ast
import importlib
import linecache
import random
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

import folo_lib.course.exercises
from folo_lib.course.exercises import NotYet, Verdict, exercise, require

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(ROOT.glob("notebooks/*.ipynb"))
MAX_SECONDS = 4.0  # well below the limit for loops without an end

Check = Callable[[Any], Verdict]


def topic(page: Path) -> str:
    return page.stem.partition("_")[2]


@cache
def stubs(page: Path) -> dict[str, str]:
    """The source of each stub by its name, in the order of the page."""
    cells = nbformat.read(page, as_version=4).cells
    sources = [
        cell.source
        for cell in cells
        if cell.cell_type == "code" and "exercise" in cell.metadata.get("tags", [])
    ]
    return {_name_of(source): source for source in sources}


def _name_of(source: str) -> str:
    (top,) = ast.parse(source).body
    assert isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    return top.name


@cache
def solutions(page: Path) -> dict[str, Any]:
    """What the Python blocks of the page's solutions define, executed in one namespace."""
    text = (ROOT / "docs" / "solutions" / f"{page.stem}.md").read_text("utf-8")
    names: dict[str, Any] = {"__name__": f"solutions_{page.stem}"}
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
        name = f"{page.stem}-{i}.md"
        # Triton reads the source of a kernel, and finds it there.
        linecache.cache[name] = len(block), None, block.splitlines(True), name
        exec(compile(block, name, "exec"), names)
    return names


def checks(page: Path) -> dict[str, Check]:
    """What `exercise` made of a page's checks, by the name of what they check."""
    module = importlib.import_module(f"folo_lib.course.exercises.{topic(page)}")
    return {
        name.removeprefix("check_"): check
        for name, check in vars(module).items()
        if name.startswith("check_") and hasattr(check, "__wrapped__")
    }


EXERCISES = [(page, name) for page in PAGES for name in stubs(page)]


@pytest.mark.parametrize(
    ("page", "name"), EXERCISES, ids=[f"{p.stem}-{name}" for p, name in EXERCISES]
)
class TestExercises:
    def test_stub_does_not_pass(self, page: Path, name: str) -> None:
        # What the page has imported is not there: annotations stay unevaluated, and names that
        # a class needs at once are those of the page's module.
        names: dict[str, Any] = {}
        if (ROOT / "folo_lib" / f"{topic(page)}.py").exists():
            names.update(vars(importlib.import_module(f"folo_lib.{topic(page)}")))
        lazy = __future__.annotations.compiler_flag
        exec(compile(stubs(page)[name], name, "exec", flags=lazy), names)
        verdict = checks(page)[name](names[name])
        assert isinstance(verdict, Verdict)
        assert not verdict
        assert verdict.message == f"Not yet: {name} is still the stub."

    def test_solution_passes_in_seconds_and_leaves_no_trace(
        self, page: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check, solution = checks(page)[name], solutions(page)[name]
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(1)
        random.seed(1)
        torch_before, before = torch.get_rng_state(), random.getstate()
        start = time.process_time()
        first = check(solution)
        took = time.process_time() - start
        assert first.passed, first
        assert first.message == f"Passed: {name}"
        assert torch.equal(torch.get_rng_state(), torch_before)
        assert random.getstate() == before
        assert took < MAX_SECONDS
        assert not list(tmp_path.iterdir())
        # Seeded by itself: another state of the global generators changes nothing.
        torch.manual_seed(2)
        assert check(solution) == first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
class TestPages:
    def test_exercises_checks_and_solutions_belong_together(self, page: Path) -> None:
        assert set(checks(page)) == set(stubs(page))
        assert set(stubs(page)) <= set(solutions(page))

    def test_page_and_solutions_use_the_same_titles(self, page: Path) -> None:
        cells = nbformat.read(page, as_version=4).cells
        prose = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
        _, _, exercises = prose.partition("### Exercises\n")
        titles = re.findall(r"^\*\*(\d+\. .+?)\.?\*\*", exercises, re.M)
        text = (ROOT / "docs" / "solutions" / f"{page.stem}.md").read_text("utf-8")
        assert text.startswith("# Solutions: ")
        assert re.findall(r"^## (.*)", text, re.M) == titles
        assert len(titles) == len(stubs(page))

    def test_checks_are_documented(self, page: Path) -> None:
        for name, check in checks(page).items():
            assert check.__name__ == f"check_{name}"
            assert check.__doc__


def test_there_is_no_module_without_a_page() -> None:
    modules = {
        path.stem for path in (ROOT / "folo_lib" / "course" / "exercises").glob("*.py")
    }
    assert modules - {"__init__"} == {topic(page) for page in PAGES}
    texts = {path.stem for path in (ROOT / "docs" / "solutions").glob("*.md")}
    assert texts - {"index"} == {page.stem for page in PAGES}


@exercise
def check_double(solution: Callable[[int], int]) -> None:
    """Twice a number."""
    for x in (1, 3):
        result = solution(x)
        require(result % 2 == 0, f"double({x}) is odd: {result}.")
        require(result == 2 * x, f"double({x}) gives {result}, not {2 * x}.")


class TestVerdict:
    def test_passed(self) -> None:
        def double(x: int) -> int:
            return x + x

        verdict = check_double(double)
        assert verdict
        assert verdict == Verdict(True, "Passed: double")
        assert repr(verdict) == "Passed: double"

    def test_wrong_answer_says_what_the_check_says(self) -> None:
        def double(x: int) -> int:
            return 2

        verdict = check_double(double)
        assert not verdict
        assert repr(verdict) == "Not yet: double: double(3) gives 2, not 6."

    def test_stub(self) -> None:
        def double(x: int) -> int:
            """Twice `x`."""
            raise NotImplementedError

        assert repr(check_double(double)) == "Not yet: double is still the stub."

    def test_stub_of_a_class(self) -> None:
        class Doubler:
            def __call__(self, x: int) -> int:
                raise NotImplementedError

        @exercise
        def check_doubler(solution: type[Callable[[int], int]]) -> None:
            require(solution()(1) == 2, "no.")

        assert repr(check_doubler(Doubler)) == "Not yet: Doubler is still the stub."
        assert check_double(Doubler()).message == "Not yet: Doubler is still the stub."

    def test_error_with_its_type_line_and_message(self) -> None:
        lines = ["def double(x):", "    y = x + x", "    return int('x' * y)"]
        names: dict[str, Any] = {"__name__": "learner"}
        exec("\n".join(lines), names)
        verdict = check_double(names["double"])
        assert not verdict
        assert verdict.message == (
            "Not yet: double: ValueError in line 3: "
            "invalid literal for int() with base 10: 'xx'"
        )

    def test_line_is_the_learners_and_not_that_of_a_library(self) -> None:
        names: dict[str, Any] = {"__name__": "learner", "torch": torch}
        exec(
            "def double(x):\n    return torch.nn.Linear(2, 2)(torch.ones(1, 3))", names
        )
        verdict = check_double(names["double"])
        assert verdict.message.startswith(
            "Not yet: double: RuntimeError in line 2: mat1"
        )

    def test_result_on_which_the_check_stumbles_has_no_line(self) -> None:
        def double(x: int) -> str | None:
            return None

        double.__module__ = "learner"
        verdict = check_double(double)
        assert verdict.message.startswith("Not yet: double: TypeError: unsupported")

    def test_not_implemented_in_a_library_is_no_stub(self) -> None:
        def double(x: int) -> int:
            raise NotImplementedError("'double' for 'Half'")

        verdict = check_double(double)
        assert "NotImplementedError in line" in verdict.message
        assert verdict.message.endswith(": 'double' for 'Half'")

    @pytest.mark.skipif(not hasattr(signal, "SIGVTALRM"), reason="no such signal")
    def test_loop_without_an_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def double(x: int) -> int:
            while x:
                pass
            return x

        monkeypatch.setattr(folo_lib.course.exercises, "MAX_SECONDS", 0.1)
        handler = signal.getsignal(signal.SIGVTALRM)
        verdict = check_double(double)
        assert verdict.message.startswith(
            "Not yet: double: it is still running after 0.1"
        )
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
        assert signal.getsignal(signal.SIGVTALRM) is handler

    def test_in_a_thread_there_is_no_limit(self) -> None:
        with ThreadPoolExecutor() as pool:
            assert pool.submit(check_double, lambda x: x + x).result()

    def test_interrupt_is_not_a_verdict(self) -> None:
        def double(x: int) -> int:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            check_double(double)

    def test_solution_that_is_no_function(self) -> None:
        assert check_double(3).message.startswith("Not yet: int: TypeError: 'int'")

    def test_check_keeps_its_name_and_docstring(self) -> None:
        assert check_double.__name__ == "check_double"
        assert check_double.__doc__ == "Twice a number."

    def test_require(self) -> None:
        require(True, "no.")
        require([1], "no.")
        with pytest.raises(NotYet, match=r"^no\.$"):
            require([], "no.")
