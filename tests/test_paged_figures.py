"""What page 13 shares with nobody: its figures, and Triton where it is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgba

from folo_lib.course.figures import KEYS
from folo_lib.course.paged_figures import MASKED, draw_tiles, move_splits

ROOT = Path(__file__).resolve().parent.parent


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


class TestRecording:
    """The sentences of section 8 say what was recorded."""

    @pytest.fixture
    def record(self) -> dict[str, Any]:
        path = ROOT / "notebooks/data/paged_attention_h200.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @pytest.fixture
    def prose(self) -> str:
        path = ROOT / "notebooks/13_paged_attention.ipynb"
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        words = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        return "\n".join(words)

    def test_floors_are_bytes_at_the_speed_of_memory(
        self, record: dict[str, Any]
    ) -> None:
        for row in record["recording"]:
            if row["kernel"] == "decode":
                floor = row["bytes"] / record["read_gb_s"] / 1e3
                assert row["floor_us"] == pytest.approx(floor, abs=0.01)

    def test_words(self, record: dict[str, Any], prose: str) -> None:
        rows = {row["shape"]: row for row in record["recording"]}
        share = {
            name: row["floor_us"] / row["us"]
            for name, row in rows.items()
            if row["kernel"] == "decode"
        }
        assert "more than nine tenths of the speed of memory" in prose
        assert min(share["256x800"], share["256x200..1600"]) > 0.9
        assert "at three quarters" in prose
        assert 0.72 < share["1x32768"] < 0.78
        assert f"takes {rows['1x128']['us']:.0f} µs" in prose
        assert "well over a hundred operations" in prose
        assert 150 < 1000 * record["matmul_tflops"] / record["read_gb_s"] < 200
        assert "an H200 has 132 multiprocessors" in prose.replace("An", "an")
        assert record["multiprocessors"] == 132
        assert "faster than PyTorch's" in prose and "a little slower" in prose
        speed = {n: r["flash_us"] / r["us"] for n, r in rows.items() if "flash_us" in r}
        assert speed["8192"] > 1.1 and 0.8 < speed["4x512"] < 1
