"""`make coverage`: what counts, what is told apart, and when it fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import coverage_report  # noqa: E402  tools/ is not a package


def region(lines: int, of: int, branches: int, out_of: int) -> dict[str, Any]:
    values = dict(
        zip(coverage_report.COUNTS, (lines, of, branches, out_of), strict=True)
    )
    return {"summary": values}


def make_record(**functions: dict[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for name, one in functions.items():
        stem, _, function = name.partition("__")
        path = f"folo_lib/{stem}.py"
        functions_of = files.setdefault(path, {"functions": {}})["functions"]
        functions_of[function.replace("__", ".")] = one
    return {"files": files}


SETTINGS = {
    "not_engine": ["benchmark"],
    "gpu_only": {"runner.Graph": "records"},
    "least_lines": 90,
    "least_branches": 80,
}


def test_counts_are_those_of_the_engine_without_what_needs_a_gpu() -> None:
    record = make_record(
        runner__=region(10, 10, 0, 0),
        runner__run=region(9, 10, 4, 5),
        runner__Graph__record=region(0, 50, 0, 9),
        benchmark__run=region(0, 100, 0, 100),
    )
    modules, on_gpu, unknown = coverage_report.summarize(record, SETTINGS)
    assert "benchmark" not in modules and "engine" in modules
    assert dict(modules["runner"]) == {
        "covered_lines": 19,
        "num_statements": 20,
        "covered_branches": 4,
        "num_branches": 5,
    }
    assert on_gpu["runner.Graph"]["num_statements"] == 50
    assert unknown == []
    assert coverage_report.report(record, SETTINGS) == []


def test_an_exercise_is_not_the_module_whose_name_it_bears() -> None:
    record = make_record(runner__run=region(9, 10, 4, 5))
    record["files"]["folo_lib/course/exercises/runner.py"] = {
        "functions": {"check": region(1, 90, 0, 40)}
    }
    modules, _, _ = coverage_report.summarize(record, SETTINGS)
    assert modules["runner"]["num_statements"] == 10


@pytest.mark.parametrize(
    ("run", "graph", "said"),
    [
        ((8, 10, 5, 5), "runner__Graph", "of the lines"),
        ((10, 10, 3, 5), "runner__Graph", "of the branches"),
        ((10, 10, 5, 5), "runner__Graphs", "runner.Graph is named"),
    ],
)
def test_what_it_fails_on(run: tuple[int, ...], graph: str, said: str) -> None:
    record = make_record(
        **{"runner__run": region(*run), f"{graph}__record": region(0, 0, 0, 0)}
    )
    faults = coverage_report.report(record, SETTINGS)
    assert len(faults) == 1 and said in faults[0]


def test_what_needs_a_gpu_has_a_reason_and_is_there() -> None:
    settings = coverage_report.read_settings()
    assert set(SETTINGS) == set(settings)
    for name, reason in settings["gpu_only"].items():
        assert len(reason.split()) >= 4, name
        module, *rest = name.split(".")
        text = (ROOT / "folo_lib" / f"{module}.py").read_text(encoding="utf-8")
        assert f"class {rest[-1]}" in text or f"def {rest[-1]}(" in text, name
