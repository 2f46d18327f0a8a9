"""The page of planted bugs: the score, and who notices each, as `tools/mutants.py` found."""

from __future__ import annotations

import json
import sys

from course_pages import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from mutants import (  # tools/ is not a package
    NOTICED,
    REPORT,
    Report,
    describe_score,
    read_mutants,
)


def write_page() -> str:
    """Scores on a CPU and on a card, then a table for each module."""
    mutants = read_mutants()
    report: Report = json.loads(REPORT.read_text(encoding="utf-8"))
    dates = sorted(entry["date"] for entry in report.values())
    parts = []
    for gpu, where in ((False, "On a CPU"), (True, "On a card")):
        own = [one for one in mutants if one.gpu is gpu]
        parts.append(f"**{where}.** {describe_score(own, report)}")
    if dates:
        parts.append(f"The last one was tried on {dates[-1]}.")
    for module in dict.fromkeys(one.module for one in mutants):
        rows = ["| bug | noticed by |", "|---|---|"]
        for one in mutants:
            if one.module == module:
                entry = report.get(one.name, {"result": "not tried", "by": ""})
                test = entry["by"].rpartition("::")[2].partition("[")[0]
                how = f"`{test}`" if test else NOTICED.get(entry["result"], "")
                if entry["result"] == "survived":
                    how = f"**nobody**: {one.survives}"
                rows.append(f"| {one.bug} | {how or entry['result']} |")
        parts += [f"## {module}", "\n".join(rows)]
    return "\n\n".join(parts)
