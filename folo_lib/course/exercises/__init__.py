"""Checks of the pages' exercises: each takes a solution and says what is still wrong with it.

    from folo_lib.course.exercises.sampler import check_apply_top_n_sigma

    check_apply_top_n_sigma(my_function)    # shows "Passed: ..." or "Not yet: ..."
    assert check_apply_top_n_sigma(my_function)     # in a teacher's own tests

One module for each page, one check for each exercise, named after the function that it checks.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["NotYet", "Verdict", "exercise", "require"]


@dataclass(frozen=True)
class Verdict:
    """What a check found; true if the solution passed, and shown as its message."""

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        # JupyterLab would break lines in the middle of a word.
        lines = self.message.split("\n")
        return "\n".join(
            textwrap.fill(line, 88, break_on_hyphens=False) for line in lines
        )


MAX_SECONDS = 10.0


class NotYet(Exception):
    """What is still wrong with a solution, in words for the learner."""


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
    verdict too, and so is a loop without an end: a page with unsolved exercises runs to its end.
    """

    @functools.wraps(check)
    def judge(solution: Any) -> Verdict:
        name = getattr(solution, "__name__", type(solution).__name__)
        try:
            with _time_limit():
                check(solution)
        except NotYet as reason:
            return Verdict(False, f"Not yet: {name}: {reason}")
        except Exception as error:
            # One with a message comes from somewhere else, torch for instance.
            if isinstance(error, NotImplementedError) and not error.args:
                return Verdict(False, f"Not yet: {name} is still the stub.")
            where = _line_of(error, solution)
            kind = type(error).__name__
            return Verdict(False, f"Not yet: {name}: {kind}{where}: {error}")
        return Verdict(True, f"Passed: {name}")

    return judge


def _line_of(error: Exception, solution: Any) -> str:
    """Such as " in line 3" of the learner's cell or file; empty if the error is from elsewhere."""
    module = getattr(solution, "__module__", None)
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == module
    ]
    return f" in line {lines[-1]}" if lines else ""
