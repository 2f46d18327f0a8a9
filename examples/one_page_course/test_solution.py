"""The stub of the lesson fails its check, and the teacher's solution passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import solution
import torch
from checks import check_apply_top_a_filtering

LESSON = Path(__file__).with_name("lesson.ipynb")


def test_solution_passes() -> None:
    assert check_apply_top_a_filtering(solution.apply_top_a_filtering)


def test_stub_fails() -> None:
    cells = json.loads(LESSON.read_text(encoding="utf-8"))["cells"]
    [stub] = [cell for cell in cells if "exercise" in cell["metadata"].get("tags", ())]
    names: dict[str, Any] = {"torch": torch}
    exec("".join(stub["source"]), names)
    verdict = check_apply_top_a_filtering(names["apply_top_a_filtering"])
    assert not verdict and "still the stub" in verdict.message
