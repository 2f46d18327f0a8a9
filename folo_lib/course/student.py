"""The line at the top of a page of the student edition that says how far it has come."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, cast

from IPython.core.getipython import get_ipython
from IPython.display import HTML, display

from folo_lib.course import written
from folo_lib.course.exercises import NotYet

__all__ = ["show_progress"]


def show_progress(names: Sequence[str]) -> None:
    """Shows how many of the functions and classes are written, and where a run has stopped.

    What stands there is renewed after each cell, so that after Run All the reader finds the place.

    Args:
        names: what is to be written on the page.
    """
    written.PASSED.clear()
    html_, show, shell = cast(Any, HTML), cast(Any, display), cast(Any, get_ipython())
    handle = show(html_(describe(names, None, "")), display_id=True)
    if shell is None or handle is None:
        return

    def update(result: Any) -> None:
        error = result.error_before_exec or result.error_in_exec
        text = describe(names, error, result.info.raw_cell or "")
        handle.update(html_(text))

    for callback in list(shell.events.callbacks["post_run_cell"]):
        if callback.__module__ == __name__:  # of this cell, when it ran before
            shell.events.unregister("post_run_cell", callback)
    shell.events.register("post_run_cell", update)


def describe(names: Sequence[str], error: BaseException | None, cell: str) -> str:
    """The line, as HTML."""
    done = [name for name in names if name in written.PASSED]
    text = f"<b>{len(done)} of {len(names)} written.</b> "
    if error is not None:
        lines = [line for line in cell.split("\n") if line and not line.startswith("#")]
        first = html.escape(lines[0] if lines else "")
        said = str(error) if isinstance(error, NotYet) else _name(error)
        text += (
            f"The page stopped at the cell that begins <code>{first}</code>. "
            f"{html.escape(said)}"
        )
    elif len(done) == len(names):
        text += "Nothing is left to write; the exercises are at the end."
    else:
        left = next(name for name in names if name not in done)
        text += f"Next: <code>{html.escape(left)}</code>."
    return text


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
