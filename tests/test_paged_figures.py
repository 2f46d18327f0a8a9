"""What page 13 shares with nobody: its figures, and Triton where it is not installed."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgba

from folo_lib.course.figures import KEYS
from folo_lib.course.paged_figures import MASKED, draw_tiles, move_splits


def run(code: str) -> str:
    """What a fresh interpreter prints, with a notebook's shell but no notebook."""
    head = "from IPython.core.interactiveshell import InteractiveShell\n"
    head += "shell = InteractiveShell.instance()\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestWithoutTriton:
    def test_kernels_can_be_defined_and_marked_cells_say_why_they_do_not_run(
        self,
    ) -> None:
        printed = run(
            """
            import importlib.util, sys
            find = importlib.util.find_spec
            hidden = lambda name, *a: None if name == "triton" else find(name, *a)
            importlib.util.find_spec = hidden
            import folo_lib.course.triton_setup as setup
            setup.prepare_triton()
            shell.run_cell('''
            import triton, triton.language as tl
            @triton.jit
            def one(x, SIZE: tl.constexpr): ...

            @triton.jit(do_not_specialize=["x"])
            def two(x): ...
            ''').raise_error()
            assert "triton" not in sys.modules  # nobody else takes it for the real one
            for kernel in (shell.user_ns["one"], shell.user_ns["two"]):
                try: kernel[(1,)](3)
                except ImportError as error: print(error)
            shell.run_cell_magic("triton", "", "print('it ran')")
            """
        )
        lines = printed.splitlines()
        assert lines[0] == "Triton is not installed: kernels are shown and not run."
        assert (
            lines[1:] == ["Triton is not installed here, so this cell was not run."] * 3
        )

    def test_with_it_marked_cells_run_and_their_errors_are_seen(self) -> None:
        pytest.importorskip("triton")
        printed = run(
            """
            from folo_lib.course.triton_setup import prepare_triton
            prepare_triton()
            shell.run_cell_magic("triton", "", "x = 3\\nprint('it ran')")
            print(shell.user_ns["x"])
            try: shell.run_cell_magic("triton", "", "1 / 0")
            except ZeroDivisionError: print("seen")
            """
        )
        assert "interpreted\nit ran\n3\n" in printed and printed.endswith("seen\n")

    def test_too_late(self) -> None:
        pytest.importorskip("triton")
        printed = run(
            """
            import os
            os.environ.pop("TRITON_INTERPRET", None)
            import triton
            from folo_lib.course.triton_setup import prepare_triton
            try: prepare_triton()
            except RuntimeError as error: print(error)
            """
        )
        assert "restart the kernel" in printed


def test_every_tile_is_read_once_and_merged_at_the_end() -> None:
    figure = move_splits(6, 3)
    lifted = []
    for state in figure.states:
        lifted += [p.key for p in state.pieces if p.look is KEYS]
    assert sorted(lifted) == [f"tile {i}" for i in range(6)]
    assert [p.text for p in figure.states[-1].pieces][-1] == "merged answer"


@pytest.mark.parametrize(("query_len", "cached"), [(20, 0), (9, 14), (8, 16)])
def test_tiles_are_dark_pale_or_white(query_len: int, cached: int) -> None:
    fig, ax = plt.subplots()
    draw_tiles(ax, query_len, cached, rows=8, tile=4)
    for box in ax.patches:
        left, top = (int(x) for x in box.get_xy())
        rows = range(top, top + int(box.get_height()))
        keys = range(left, left + 4)
        seen = [key <= cached + row for row in rows for key in keys]
        colour = KEYS.colour if all(seen) else MASKED if any(seen) else "white"
        assert box.get_facecolor() == to_rgba(colour)
    plt.close(fig)
