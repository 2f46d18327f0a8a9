"""With --nbval the pictures of a page are compared too, which nbval itself leaves out.

A cell whose figure shows times is tagged `nbval-ignore-output`, as one whose text does.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
DRAWN = ROOT / "build" / "pictures"


def read_pictures(outputs: Any) -> list[bytes]:
    """The pictures among the outputs of a cell, as PNG."""
    found = (output.get("data", {}).get("image/png") for output in outputs)
    return [base64.b64decode(text) for text in found if text]


def compare_pictures(cell: Any, drawn: list[bytes], stored: list[bytes]) -> list[str]:
    """What is wrong with the stored pictures of a cell, in words."""
    sys.path.insert(0, str(ROOT / "tools"))
    from pictures import find_difference

    if len(stored) != len(drawn):
        return [f"{len(stored)} pictures are stored, {len(drawn)} were drawn"]
    troubles = []
    for one, other in zip(stored, drawn, strict=True):
        if difference := find_difference(one, other):
            DRAWN.mkdir(parents=True, exist_ok=True)
            file = DRAWN / f"{Path(cell.fspath).stem}-{cell.cell.get('id')}.png"
            file.write_bytes(other)
            where = file.relative_to(ROOT)
            troubles.append(f"The stored picture is stale: {difference}. See {where}.")
    return troubles


def pytest_configure(config: Any) -> None:
    try:
        from nbval.plugin import IPyNbCell
    except ImportError:  # without nbval no page is run
        return
    compare_text = IPyNbCell.compare_outputs

    def compare_outputs(
        self: Any, test: Any, ref: Any, skip_compare: Any = None
    ) -> bool:
        if not compare_text(self, test, ref, skip_compare):
            return False
        troubles = compare_pictures(self, read_pictures(test), read_pictures(ref))
        self.comparison_traceback.extend(troubles)
        return not troubles

    IPyNbCell.compare_outputs = compare_outputs
