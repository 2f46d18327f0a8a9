"""Numbers in the prose of pages 06 and 07 are those of the outputs beside them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Page, cell with the output, what the output says, cell with the prose, what the prose says.
CLAIMS = [
    ("06", "06-13", "312 tokens were run, of a text of 27", "06-14", "has run 312"),
    ("06", "06-07", "[0, 0, 0, 0, 0, 0]", "06-10", "changes nothing, in any layer"),
    ("06", "06-162", "1% of them used", "06-163", "one slot in a hundred"),
    ("06", "06-50", "9 free; 6 blocks: False", "06-49", "Nine are free"),
    ("06", "06-50", "9 free; 6 blocks: False", "06-52", "It will not fit"),
    ("06", "06-134", "64 sequences: 2,887", "06-135", "nearly three thousand"),
    ("06", "06-149", "71 operations for 64", "06-150", "71 are left"),
    ("06", "06-59", "as much as  10,394 tokens", "06-62", "from 10,394 tokens on"),
    ("06", "06-68", "served: 8704", "06-70", "8,704 tokens fit"),
    (
        "06",
        "06-82",
        "new +1        text: same   logits: WRONG",
        "06-83",
        "None of them",
    ),
    ("07", "07-07", "Near theage", "07-170", '"theage"'),
    ("07", "07-07", "the largest sun", "07-170", '"the largest sun"'),
    ("07", "07-10", "has 0.10%, and rank 66", "07-11", "one kite"),
    ("07", "07-12", "69% beyond", "07-13", "at 2.0 the tail has most"),
    ("07", "07-15", "14 tokens left", "07-16", "Fourteen good words"),
    ("07", "07-18", "793 in bfloat16", "07-19", "only 793 different"),
    ("07", "07-22", "0.115  0.802   0.917", "07-172", "five words have 0.802"),
    ("07", "07-24", "547 of 2048", "07-25", "more than a quarter"),
    ("07", "07-24", "keeps 57 tokens", "07-25", "a token more"),
    ("07", "07-32", "top_p -> min_p -> top_k : 10", "07-33", "10 tokens are left"),
    ("07", "07-32", "min_p -> top_p -> top_k : 9", "07-33", "after `min_p`, 9;"),
    ("07", "07-32", "top_k -> top_p -> min_p : 7", "07-33", "after `top_k`, 7,"),
    ("07", "07-58", "kite 0.34 ·red 0.26", "07-59", "four tenths"),
    ("07", "07-84", "friendly pig", "07-85", "a pig in it"),
    ("07", "07-158", "friendly owl", "07-159", "An owl takes her place"),
]


@cache
def cells_of(page: str) -> dict[str, dict[str, Any]]:
    [path] = ROOT.glob(f"notebooks/{page}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: cell for cell in cells}


def shown_by(page: str, cell: str) -> str:
    outputs = cells_of(page)[cell]["outputs"]
    return "".join("".join(output.get("text", [])) for output in outputs)


def told_by(page: str, cell: str) -> str:
    return "".join(cells_of(page)[cell]["source"])


@pytest.mark.parametrize(("page", "shown", "output", "told", "prose"), CLAIMS)
def test_prose_says_what_the_output_says(
    page: str, shown: str, output: str, told: str, prose: str
) -> None:
    assert output in shown_by(page, shown).replace("\n", " ")
    assert prose in told_by(page, told)


def test_the_work_grows_as_the_prose_of_page_06_says() -> None:
    lines = shown_by("06", "06-16").splitlines()
    millions = [int(line.split(":")[1].split()[0].replace(",", "")) for line in lines]
    factor = millions[-1] / millions[0]
    assert f"by a factor of {factor:.0f}." in told_by("06", "06-17")
