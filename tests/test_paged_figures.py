"""What page 13 shares with nobody: its figures, and Triton where it is not installed."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgba

from folo_lib.course.figures import DECODE, KEYS
from folo_lib.course.paged_figures import (
    MASKED,
    draw_gather,
    draw_gpu,
    draw_programs,
    draw_rounds,
    draw_speeds,
    draw_tiles,
    move_splits,
)

ROOT = Path(__file__).resolve().parent.parent
RECORDING = ROOT / "notebooks/data/paged_attention_h200.json"


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
    running = [[(float(i), 1.0), (i + 0.5, 1.5)] for i in range(3)]
    names, weights = ["x", "y", "z"], [0.2, 0.5, 0.3]
    figure = move_splits(["a", "b", "c", "d", "e", "f"], names, running, weights)
    lifted = []
    for state in figure.states:
        lifted += [p.key for p in state.pieces if p.look is KEYS]
    assert sorted(lifted) == [f"tile {i}" for i in range(6)]
    last = [piece.text for piece in figure.states[-1].pieces]
    assert last[-1].startswith("the answer")
    assert [text for text in last if text.startswith("its weight")] == [
        "its weight: 20%",
        "its weight: 50%",
        "its weight: 30%",
    ]
    assert figure.pictured is figure.states[-1]
    after = [[p.text for p in state.pieces] for state in figure.states[2:5:2]]
    assert "max 2.00, sum 1.00" in after[0] and "max 2.50, sum 1.50" in after[1]
    assert after[1].count("what was there: × 0.71") == 3  # 2 ** -0.5


def test_a_gpu_has_as_many_programs_as_run_at_once() -> None:
    fig, ax = plt.subplots()
    draw_gpu(ax, num_programs=3, num_processors=132)
    written = [text.get_text() for text in ax.texts]
    assert written.count("a program") == 3
    assert any("131 more" in text for text in written)
    plt.close(fig)


def test_each_key_head_has_all_programs() -> None:
    fig, ax = plt.subplots()
    split = [[0, 0, 0, 384, 2, 0], [0, 0, 384, 700, 2, 0]]
    draw_programs(ax, [*split, [2, 1, 0, 9, 1, 2], [-1] * 6], num_heads=3)
    texts = [text.get_text() for text in ax.texts]
    for words in ("0\n0 to 384", "0\n384 to 700", "2\n0 to 9"):
        assert texts.count(f"sequence {words}") == 3
    assert texts.count("ends at once") == 3
    faces = [box.get_facecolor() for box in ax.patches]
    assert faces.count(to_rgba(DECODE.colour)) == 6
    assert faces.count(to_rgba(KEYS.colour)) == 3  # nothing to merge
    plt.close(fig)


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


def test_a_tile_comes_from_the_blocks_of_its_tokens() -> None:
    fig, ax = plt.subplots()
    draw_gather(ax, list("abcdef"), [2, 0, 1], num_blocks=4, tile=4)
    starts = [line.get_xdata()[0] for line in ax.lines]
    assert starts == pytest.approx([block * 2.6 + 1 for block in (2, 0, 1)])
    assert sum(text.get_text() == "a" for text in ax.texts) == 2
    assert {"tile 0", "tile 1", "block 3"} <= {text.get_text() for text in ax.texts}
    plt.close(fig)


def test_rounds_have_programs_and_times() -> None:
    fig, ax = plt.subplots()
    rounds = {"few": [(7, 4.0)], "many": [(10, 2.0), (10, 2.0), (5, 1.0)]}
    draw_rounds(ax, rounds, [4.2, 5.0], places=10)
    dark = [box for box in ax.patches if box.get_facecolor() == to_rgba(DECODE.colour)]
    assert [box.get_width() for box in dark] == [4, 2, 2, 1]
    assert [-box.get_height() for box in dark] == [0.7, 1, 1, 0.5]
    assert [line.get_xdata()[0] for line in ax.lines] == [4.2, 5.0]
    plt.close(fig)


def test_speeds_are_shares_of_the_speed_of_memory() -> None:
    row = {"shape": "2x30..40", "floor_us": 8.0, "us": 10.0, "torch_sdpa_us": 40.0}
    fig, ax = plt.subplots()
    draw_speeds(ax, [row, row | {"torch_sdpa_us": 1000.0}])
    assert [box.get_width() for box in ax.patches] == pytest.approx([80, 20, 80, 0.8])
    written = [text.get_text() for text in ax.texts]
    assert written[:4] == ["ours, 80 %", "PyTorch, 20 %", "80 %", "less than 1 %"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2 × 30 to 40"] * 2
    plt.close(fig)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_the_script_of_the_recording_writes_what_the_page_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On small shapes, in the interpreter, with a clock that stands still."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    script = importlib.import_module("record_kernels")
    for name, small in {
        "DEVICE": torch.device("cpu"),
        "DTYPE": torch.float32,
        "HEADS": 4,
        "KV_HEADS": 2,
        "HEAD_DIM": 16,
        "BLOCK_SIZE": 4,
        "NUM_BLOCKS": 512,
        "STORED": 3,
        "DECODES": {"3x40": [40] * 3, "1x200": [200]},
        "PREFILLS": {"9": ([9], [9]), "6 after 8": ([6], [14])},
        "SPLIT": ("1x200",),
        "LONG": "1x200",
    }.items():
        monkeypatch.setattr(script, name, small)
    card = {"device": "none", "multiprocessors": 8, "matmul_tflops": 1.0}
    card |= {"read_gb_s": 1.0, "copy_gb_s": 1.0}
    monkeypatch.setattr(script, "describe_card", lambda: card)
    monkeypatch.setattr(script, "measure", lambda calls, *_: len([f() for f in calls]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # Its sums overflow, as they may; the interpreter of Triton 3.6 refuses that.
    monkeypatch.setattr(script, "read_once", lambda *_: None)
    for name, few in (("time_host", {"rounds": 1}), ("make_steps", {"most": 1})):
        few = functools.partial(getattr(script, name), **few)
        monkeypatch.setattr(script, name, few)
    made = script.record()
    kept = json.loads(RECORDING.read_text(encoding="utf-8"))
    assert (
        made.keys() == kept.keys() and made["host_us"].keys() <= kept["host_us"].keys()
    )
    assert made["stages"].keys() == kept["stages"].keys()
    for part in ("recording", "splits"):
        keys = {row.get("kernel"): row.keys() for row in kept[part]}
        assert {row.get("kernel"): row.keys() for row in made[part]} == keys
    assert made["recording"][0]["bytes"] == 2 * 120 * 2 * 16 * 4


class TestRecording:
    """The sentences of section 8 say what was recorded."""

    @pytest.fixture
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(RECORDING.read_text(encoding="utf-8"))
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

    def test_the_copies_are_what_figure_1_says(self, record: dict[str, Any]) -> None:
        """Three to six times as fast, says the text below figure 7."""
        rows = [row for row in record["recording"] if row["kernel"] == "decode"]
        ratios = [row["torch_sdpa_us"] / row["us"] for row in rows]
        assert (round(min(ratios)), round(max(ratios))) == (3, 6)

    def test_words(self, record: dict[str, Any], prose: str) -> None:
        rows = {row["shape"]: row for row in record["recording"]}
        us = {name: row["us"] for name, row in rows.items()}
        floor = {name: row.get("floor_us") for name, row in rows.items()}
        taken = {(row["shape"], row["splits"]): row["us"] for row in record["splits"]}
        long = [taken["1x32768", n] for n in (1, 16, 32, 64)]
        eight = {n: taken["8x8192", n] for n in (4, 6, 8)}
        mixed = {n: taken["1x8000 and 31x300", n] for n in (1, 16)}
        twenty = {n: taken["20x3000", n] for n in (1, 2)}
        shares = {
            n: -(-20 * 3000 // (n * record["multiprocessors"] // 8)) for n in (2, 3)
        }
        stages = record["stages"]

        def share(shape: str, time: float | None = None) -> str:
            return f"{floor[shape] / (time or us[shape]):.0%}".replace("%", " %")

        for words in (
            f"the 256 requests are read at {share('256x800')} of the speed of memory, "
            f"or at {share('256x200..1600')} where their lengths differ, and the 8 long "
            f"conversations at {share('8x8192')}. So is the one of 30,000 tokens",
            f"are together {record['copy_gb_s'] / 1e3:.2f} TB/s",
            f"The 64 of one length reach {share('64x800')}",
            f"{64 * 8} programs, of which {3 * record['multiprocessors']} run at once, "
            f"and the last {64 * 8 - 3 * record['multiprocessors']} have",
            f"128 tokens take {us['1x128']:.0f} µs, and so {us['8x512']:.0f} µs for "
            f"8 × 512 tokens are not as bad as their {share('8x512')} look",
            f"is read at {share('1x32768')}: {us['1x32768']:.0f} µs, of which the "
            f"floor is {floor['1x32768']:.0f}",
            f"only 396 run at once. Our kernel has {rows['1x32768']['splits']}, and "
            "takes little longer than with 32",
            f"with six splits, {eight[6]:.0f} µs, than with eight, {eight[8]:.0f} µs",
            f"read 268 MB in {eight[4]:.0f} µs, which is "
            f"{rows['8x8192']['bytes'] / eight[4] / 1e6:.1f} TB/s",
            "into one round. Our kernel uses six",
            f"31 short answers wait {mixed[1]:.0f} µs for the long one. Our kernel cuts "
            f"it into {rows['1x8000 and 31x300']['splits']} and leaves the others whole, "
            f"and they take {us['1x8000 and 31x300']:.0f} µs",
            f"with 16 splits it would be 376 programs and {mixed[16]:.0f} µs",
            "which make 32, 4 and 13 splits (the nearest that was measured is 16), "
            "would be faster than three in these three columns, by one or two percent "
            "in the first two and by more in the third",
            f"have shares of {shares[2]:,}",
            f"nobody is split, and that takes {twenty[1]:.0f} µs",
            f"a share is {shares[3]:,} tokens, each request has two splits, and they take "
            f"{us['20x3000']:.0f} µs",
            f"for 256 requests that takes {us['256 sequences']:.0f} µs",
            f"our other kernel takes {us['256 tokens']:.0f} µs",
            "It is six for 256 requests of unequal lengths",
            "well over a hundred operations",
            f"An H200 has {record['multiprocessors']} multiprocessors",
            "a factor of fourteen",
            "64 are too many: they take longer again",
            "Of the ten microseconds above the floor, about two belong to any kernel",
            "About two more belong to the merge, and without its early start it would be "
            "nearly three. The five or six between",
            f"16 splits are 128 programs, and they read 134 MB in {long[1]:.0f} µs: that "
            f"is {rows['1x32768']['bytes'] / long[1] / 1e6:.1f} TB/s, little more than half",
            f"is {rows['8192']['flash_us'] / us['8192']:.2f} times as fast as PyTorch's",
            f"after 30,000 tokens takes {us['20 after 30000']:.0f} µs, where one program "
            f"for each key head would have taken "
            f"{rows['20 after 30000']['whole_us']:.0f}. PyTorch's kernel splits",
            f"a little slower, at {rows['4x512']['flash_us'] / us['4x512']:.2f}",
            "less than half of what the card can multiply",
            f"A decode step of 8 requests with 512 tokens spends {us['8x512']:.0f} µs in the attention of a layer, and Python "
            f"needed {record['host_us']['decode, as a function']:.0f} µs to launch it",
        ):
            assert words in prose, words
        assert round(rows["256x200..1600"]["torch_sdpa_us"] / us["256x200..1600"]) == 6
        assert 150 < 1000 * record["matmul_tflops"] / record["read_gb_s"] < 200
        assert 13.6 < long[0] / us["1x32768"] < 14.5 and long[3] > us["1x32768"]
        assert 1 < us["1x32768"] / long[2] < 1.05
        assert 8 * 16 < record["multiprocessors"] < 8 * 32
        parts = floor["1x32768"], stages["reading_us"], stages["without_merge_us"]
        steps = [b - a for a, b in pairwise([*parts, stages["us"]])]
        assert [round(step) for step in steps] == [2, 5, 2] and 5 < steps[1] < 6
        assert 2.6 < stages["no_early_start_us"] - stages["without_merge_us"] < 3
        splits = {row["shape"]: row.get("splits") for row in record["recording"]}
        assert splits["8x8192"] == 6 and splits["256x800"] == splits["32x600"] == 1
        # With fewer workers each of the four would have about so many splits.
        for fewer, ours in ((long[2], us["1x32768"]), (eight[4], us["8x8192"])):
            assert 0.005 < 1 - fewer / ours < 0.025
        assert round(us["1x32768"] - floor["1x32768"]) == 10
        assert mixed[16] < us["1x8000 and 31x300"] and us["20x3000"] < twenty[1]
        assert 2 * shares[2] > 3000 and 2 * shares[3] <= 3000 and splits["20x3000"] == 2
        assert share("8x8192") == share("1x30000 and 63x500")
        assert (
            0.5 < rows["1x32768"]["bytes"] / long[1] / record["read_gb_s"] / 1e3 < 0.6
        )
        question = rows["20 after 30000"]
        assert question["flash_us"] < question["whole_us"] / 5
        assert rows["8192"]["tflops"] < record["matmul_tflops"] / 2
