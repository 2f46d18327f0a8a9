"""Numbers in the prose of pages 00 to 07 and 16 are those of an output on the same page."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Page, what the prose says, the cell that says it, what the output says, and its cell.
CLAIMS = (
    ("00_tour", "to read all 512", "00-23", "in which 512 tokens were read", "00-22"),
    ("00_tour", "65 blocks are in use", "00-53", "65 for all", "00-52"),
    ("00_tour", "312 tokens in all", "00-71", "312 tokens were read", "00-70"),
    ("01_attention", "` kite` with 60 %", "01-110", "kite  60.0%", "01-111"),
    ("01_attention", "` red` with 39 %", "01-110", "red  39.1%", "01-111"),
    ("01_attention", "takes 79 % of", "01-15", "winner 79 %", "01-13"),
    ("01_attention", "stuck at 256", "01-24", "bfloat16: 256.0", "01-116"),
    ("02_rope", "23 pairs against 2", "02-22", "1,000,000: 23 of 64", "02-21"),
    ("02_rope", "7 pairs into a ramp of 17", "02-135", "pair 23 makes", "02-134"),
    ("02_rope", "7 pairs into a ramp of 17", "02-135", "pair 40 makes", "02-134"),
    ("02_rope", "slowed by 4", "02-135", "keep 0.00, speed x 0.25", "02-134"),
    ("02_rope", "loss is 0.9, and not 2.3", "02-108", "1.1 0.9 0.9 ", "02-106"),
    ("02_rope", "loss is 0.9, and not 2.3", "02-108", "1.2 2.0 2.3 ", "02-106"),
    ("02_rope", "Alone it costs nothing", "02-108", "sharper 0.4 0.4", "02-106"),
    ("02_rope", "and ends at 0.7", "02-108", "0.5 0.5 0.7 0.7 ", "02-106"),
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
    ("06_kv_cache", "has run 312", "06-14", "312 tokens were run, of a", "06-13"),
    ("06_kv_cache", "changes nothing, in any", "06-10", "[0, 0, 0, 0, 0, 0]", "06-07"),
    ("06_kv_cache", "half a gigabyte", "06-31", "537.4 MB copied", "06-30"),
    ("06_kv_cache", "one slot in a hundred", "06-163", "1% of them used", "06-162"),
    ("06_kv_cache", "Nine are free", "06-49", "9 free; 6 blocks: False", "06-50"),
    ("06_kv_cache", "It will not fit", "06-52", "9 free; 6 blocks: False", "06-50"),
    ("06_kv_cache", "Half of the work", "06-122", "1,400 places for 701", "06-164"),
    ("06_kv_cache", "three thousand, 45", "06-135", "64 sequences: 2,887", "06-134"),
    ("06_kv_cache", "71 are left", "06-150", "71 operations for 64", "06-149"),
    ("06_kv_cache", "from 10,394 tokens", "06-62", "as much as  10,394", "06-59"),
    ("06_kv_cache", "8,704 tokens fit", "06-70", "served: 8704", "06-68"),
    ("06_kv_cache", "None of them", "06-83", "text: same   logits: WRONG", "06-82"),
    ("07_sampler", '"theage"', "07-170", "Near theage", "07-07"),
    ("07_sampler", '"the largest sun"', "07-170", "the largest sun", "07-07"),
    ("07_sampler", "one has a kite", "07-11", "has 0.10%, and rank 66", "07-10"),
    ("07_sampler", "at 2.0 the tail has most", "07-13", "69% beyond", "07-12"),
    ("07_sampler", "Fourteen good words", "07-16", "14 tokens left", "07-15"),
    ("07_sampler", "only 793 different", "07-19", "793 in bfloat16", "07-18"),
    ("07_sampler", "five words have 0.802", "07-172", "0.115  0.802   0.917", "07-22"),
    ("07_sampler", "more than a quarter", "07-25", "547 of 2048", "07-24"),
    ("07_sampler", "a token more", "07-25", "keeps 57 tokens", "07-24"),
    ("07_sampler", "10 tokens are left", "07-33", "min_p -> top_k : 10", "07-32"),
    (
        "07_sampler",
        "after `min_p`, 9;",
        "07-33",
        "min_p -> top_p -> top_k : 9",
        "07-32",
    ),
    (
        "07_sampler",
        "after `top_k`, 7,",
        "07-33",
        "top_k -> top_p -> min_p : 7",
        "07-32",
    ),
    ("07_sampler", "four tenths", "07-59", "kite 0.34 ·red 0.26", "07-58"),
    ("07_sampler", "needs four operations", "07-82", "  4 operations", "07-81"),
    ("07_sampler", "Three are kept", "07-183", "[400.0, 200.0, 200.0, 0.0", "07-117"),
    ("07_sampler", "the 40 that are lacking", "07-183", "lacking: 40", "07-182"),
    ("07_sampler", "600 of the 640", "07-183", "needed: 640", "07-182"),
    ("07_sampler", "a pig in it", "07-85", "friendly pig", "07-84"),
    ("07_sampler", "An owl takes her place", "07-159", "friendly owl", "07-158"),
    ("16_tensor_parallel", "has 65.5 GB of weights", "16-06", "32B : 65.5 GB", "16-05"),
    (
        "16_tensor_parallel",
        "sum of the four is 260",
        "16-16",
        "= [260.0, 260.0",
        "16-15",
    ),
    (
        "16_tensor_parallel",
        "Four read 27.5 %",
        "16-32",
        "ranks: 4, 1.68 MB each, 27.5%",
        "16-31",
    ),
    (
        "16_tensor_parallel",
        "Two ranks read half each",
        "16-32",
        "ranks: 2, 3.05 MB each, 50.1%",
        "16-31",
    ),
    ("16_tensor_parallel", "takes 13 sums", "16-35", "13 sums and 1 gather", "16-34"),
    (
        "16_tensor_parallel",
        "three biases too many",
        "16-37",
        "too much by 3.0 biases",
        "16-36",
    ),
    ("16_tensor_parallel", "1.36 times as long", "16-39", "['1.36', '0.83']", "16-38"),
    (
        "16_tensor_parallel",
        "ranks 0 and 1 both hold",
        "16-23",
        "key/value heads [[0], [0], [1], [1]]",
        "16-22",
    ),
    (
        "16_tensor_parallel",
        "less than 2.6 µs",
        "16-65",
        "a sum may take  2.6 µs",
        "16-64",
    ),
    (
        "16_tensor_parallel",
        "half of 0.30 ms, and 57",
        "16-65",
        "reads for  0.30 ms, has  57",
        "16-64",
    ),
    (
        "16_tensor_parallel",
        "allows 25.9 µs",
        "16-65",
        "a sum may take 25.9 µs",
        "16-64",
    ),
    (
        "16_tensor_parallel",
        "Qwen3-32B 62.0 µs",
        "16-65",
        "a sum may take 62.0 µs",
        "16-64",
    ),
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
    assert shown in cells(page)[output].replace("\n", " ")


def test_the_work_grows_as_the_prose_of_page_06_says() -> None:
    lines = cells("06_kv_cache")["06-16"].splitlines()
    millions = [int(line.split(":")[1].split()[0].replace(",", "")) for line in lines]
    factor = millions[-1] / millions[0]
    assert f"by a factor of {factor:.0f}." in cells("06_kv_cache")["06-17"]
