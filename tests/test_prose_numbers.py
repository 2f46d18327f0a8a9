"""Numbers in the prose of the first pages are those of an output on the same page."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Page, what the prose says, the cell that says it, what the output says, and its cell.
CLAIMS = (
    ("03_layers", "from 0.15 to more than a billion", "03-73", "'1.2e+09'", "03-72"),
    ("03_layers", "some billions", "03-09", "'4.34e+09', '7.87'", "03-07"),
    ("03_layers", "become 0.2 and 1.4", "03-12a", "[0.2000, 1.4000]", "03-75"),
    ("03_layers", "makes 2.8", "03-12a", "[0.2000, 2.8000]", "03-75"),
    ("03_layers", "1/√2 = 0.707", "03-16", "0.001      0.707", "03-15"),
    ("03_layers", "a quarter of the elements", "03-20", " 26%", "03-19"),
    ("03_layers", "from 0.15 to nearly 100", "03-55", "97.5", "03-53"),
    ("03_layers", "nine operations and 21", "03-32", "9 operations, 21", "03-31"),
    ("03_layers", "nearly 8", "03-77", "7.8561", "03-76"),
    ("03_layers", "a ninth of the numbers", "03-79", "11.43%", "03-78"),
    ("04_qwen3", "128 wide, twice", "04-08", "head_dim            = 128", "04-07"),
    ("04_qwen3", "512 rows: 256", "04-a3", "-> [512, 192]", "04-a2"),
    ("04_qwen3", "= 96 rows", "04-92", "weight [96, 48]", "04-77"),
    ("04_qwen3", "stacked to 6144 rows", "04-18", "[6144, 1024]", "04-79"),
    ("04_qwen3", "406 MiB, for 0.6", "04-a4", "406 MiB", "04-24"),
    ("04_qwen3", "rows 2048 to 3071", "04-27", "rows 2048 to 3071", "04-62"),
    ("04_qwen3", "made one of 0.9", "04-41", "0.9 ('q_norm', 'k_norm')", "04-99"),
    ("05_checkpoint", "is 7,264", "05-53", "7264 bytes of header", "05-08"),
    ("05_checkpoint", "3 to 11 of the 68", "05-a3", "57 tensors: ", "05-a2"),
    ("05_checkpoint", "at most 13 %", "05-a9", "13% of all", "05-a8"),
    ("05_checkpoint", "7,315 tokens where 121", "05-50", "7,315 tokens read", "05-48"),
    ("05_checkpoint", "a thousand times", "05-50", "1,024 times as many", "05-48"),
)


@cache
def cells(page: str) -> dict[str, str]:
    """The prose of each cell, or what its code has printed."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{page}.ipynb", as_version=4)
    return {
        cell.id: cell.source
        if cell.cell_type == "markdown"
        else "".join(
            output.get("text") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )
        for cell in notebook.cells
    }


@pytest.mark.parametrize(
    ("page", "claim", "prose", "shown", "output"),
    CLAIMS,
    ids=[f"{page}-{claim}" for page, claim, *_ in CLAIMS],
)
def test_prose_says_what_was_shown(
    page: str, claim: str, prose: str, shown: str, output: str
) -> None:
    assert claim in cells(page)[prose]
    assert shown in cells(page)[output]
