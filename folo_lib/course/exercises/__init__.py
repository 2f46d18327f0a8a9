"""Checks of the pages' exercises: each takes a solution and says what is still wrong with it.

    from folo_lib.course.exercises.sampler import check_apply_top_n_sigma

    check_apply_top_n_sigma(my_function)    # shows "Passed: ..." or "Not yet: ..."
    grade(check_apply_top_n_sigma, my_function)     # silent, or raises: for a grader

One module for each page, one check for each exercise, named after the function that it checks.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import signal
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["NotYet", "Verdict", "exercise", "grade", "is_stub", "quiet", "require"]


@dataclass(frozen=True)
class Verdict:
    """What a check found; true if the solution passed, and shown as its message."""

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def grade(self) -> None:
        """Raises `NotYet` with the message unless the solution passed.

        A grader counts a cell as passed when nothing is raised in it.
        """
        if not self.passed:
            raise NotYet(self.message)

    def __repr__(self) -> str:
        # JupyterLab would break lines in the middle of a word.
        lines = self.message.split("\n")
        return "\n".join(
            textwrap.fill(line, 88, break_on_hyphens=False) for line in lines
        )


MAX_SECONDS = 10.0


class NotYet(Exception):
    """What is still wrong with a solution, in words for the learner."""

    def _render_traceback_(self) -> list[str]:
        # What IPython shows in place of a traceback, of which no line is the learner's.
        return repr(Verdict(False, str(self))).split("\n")


def require(condition: Any, message: str) -> None:
    """Raises `NotYet(message)` unless the condition holds."""
    if not condition:
        raise NotYet(message)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Ends a loop that never ends, by the processor's time and not the clock's.

    Not on Windows, which has no such signal, nor in a thread, which would not get it.
    """
    here = threading.current_thread() is threading.main_thread()
    if not (here and hasattr(signal, "SIGVTALRM")):
        yield
        return

    def stop(*_: Any) -> None:
        raise NotYet(
            f"it is still running after {MAX_SECONDS:g} seconds. Is there a loop whose "
            "condition never becomes false?"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def exercise(check: Callable[[Any], None]) -> Callable[[Any], Verdict]:
    """Makes a check that returns a `Verdict` of one that raises `NotYet`.

    A stub that raises NotImplementedError, and any other error in the learner's code, is a
    verdict too, and so is a loop without an end, or an exit: a page with unsolved exercises runs
    to its end. Where a page is to stop, or a grader to see it: `grade(check, solution)`.
    """

    @functools.wraps(check)
    def judge(solution: Any) -> Verdict:
        name = getattr(solution, "__name__", type(solution).__name__)
        try:
            with _time_limit():
                check(solution)
        except NotYet as reason:
            return Verdict(False, f"Not yet: {name}: {reason}")
        except (Exception, SystemExit) as error:
            if is_stub(error):
                part = str(error).removeprefix("write ") or name
                return Verdict(False, f"Not yet: {part} is still the stub.")
            where = _line_of(error, solution)
            kind = type(error).__name__
            notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
            return Verdict(False, f"Not yet: {name}: {kind}{where}: {error}{notes}")
        return Verdict(True, f"Passed: {name}")

    return judge


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing printed, logged or warned of comes out.

    nbgrader gives a cell with anything on its standard error no points.
    """
    nowhere, level = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def grade(check: Callable[[Any], Verdict], solution: Any) -> None:
    """Raises `NotYet` unless a solution passes its check, and is silent otherwise."""
    with quiet():
        verdict = check(solution)
    verdict.grade()


def is_stub(error: BaseException) -> bool:
    """Whether an error is a stub's; one with other words is from elsewhere, torch perhaps."""
    if not isinstance(error, NotImplementedError):
        return False
    return not error.args or str(error.args[0]).startswith("write ")


def _line_of(error: BaseException, solution: Any) -> str:
    """Such as " in line 3" of the learner's cell or file; empty if the error is from elsewhere."""
    module = getattr(solution, "__module__", None)
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == module
    ]
    return f" in line {lines[-1]}" if lines else ""
