"""The look at what a page holds after its last cell: it passes, and it can fail."""

from __future__ import annotations

import importlib
import json
import linecache
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "notebooks"

sys.path.insert(0, str(ROOT / "tools"))
import page_drift  # noqa: E402  tools/ is not a package


def run_cells(page: Path) -> dict[str, Any]:
    """What the exported cells of a page define, as its kernel would hold it."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # dataclasses look up their module there
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("#| export"):
            name = f"<cell {cell['id']}>"
            lines = source.splitlines(keepends=True)
            linecache.cache[name] = (len(source), None, lines, name)
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


@pytest.fixture(autouse=True)
def main() -> Iterator[None]:
    before = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = before


def compare(page: str, **changes: Any) -> list[str]:
    path = PAGES / f"{page}.ipynb"
    stem, names = page_drift.read_exports(path)
    module: ModuleType = importlib.import_module(f"folo_lib.{stem}")
    namespace = run_cells(path)
    for name, change in changes.items():
        change(namespace, namespace[name])
    found: list[str] = page_drift.Comparison(namespace, module, names).find_drift()
    return found


@pytest.mark.parametrize(
    "page",
    [
        one.stem
        for one in sorted(PAGES.glob("*.ipynb"))
        if page_drift.read_exports(one)[0]
    ],
)
def test_exported_cells_hold_what_the_module_holds(page: str) -> None:
    assert compare(page) == []


DRAFT = """
def top_k(logits, k):
    return logits.topk(k)
"""


def replace(namespace: dict[str, Any], value: Any) -> None:
    linecache.cache["<draft>"] = (1, None, DRAFT.splitlines(keepends=True), "<draft>")
    exec(compile(DRAFT, "<draft>", "exec"), namespace)
    namespace[value.__name__] = namespace["top_k"]


def patch_method(namespace: dict[str, Any], value: Any) -> None:
    value.forward = lambda self, x: x


def add_method(namespace: dict[str, Any], value: Any) -> None:
    value.extra = 1


def remove(namespace: dict[str, Any], value: Any) -> None:
    del namespace[value.__name__]


def change_default(namespace: dict[str, Any], value: Any) -> None:
    value.__defaults__ = (None,) * len(value.__defaults__)


@pytest.mark.parametrize(
    ("page", "name", "change", "said"),
    [
        ("01_attention", "repeat_kv", replace, "repeat_kv: other code"),
        ("01_attention", "naive_attention", remove, "no longer on the page"),
        ("01_attention", "create_causal_mask", change_default, "another defaults"),
        ("03_layers", "RMSNorm", patch_method, "RMSNorm.forward: "),
        ("03_layers", "SiLUAndMul", add_method, "SiLUAndMul.extra: only here"),
        (
            "10_engine",
            "NOT_FINITE",
            lambda n, _: n.update(NOT_FINITE="?"),
            "NOT_FINITE = ",
        ),
        (
            "10_engine",
            "fail",
            lambda n, _: n.update(RequestStatus=0),
            "RequestStatus is",
        ),
        (
            "13_paged_attention",
            "PER_STEP",
            lambda n, _: n.update(PER_STEP={}),
            "PER_STEP",
        ),
        (
            "09_request",
            "Request",
            lambda _, v: setattr(v, "text", property(len)),
            "Request.text",
        ),
    ],
)
def test_a_page_that_went_another_way(
    page: str, name: str, change: Any, said: str
) -> None:
    found = compare(page, **{name: change})
    assert found and any(said in line for line in found), found


@pytest.mark.more
@pytest.mark.slow
def test_nbval_takes_the_look_after_the_last_cell(tmp_path: Path) -> None:
    """And fails where a cell after the export has replaced what was exported."""
    page = json.loads((PAGES / "03_layers.ipynb").read_text(encoding="utf-8"))
    cells = [one for one in page["cells"] if one["cell_type"] == "code"]
    kept = [one for one in cells if "".join(one["source"]).startswith("#|")]
    broken = {
        "cell_type": "code",
        "execution_count": None,
        "id": "broken",
        "metadata": {},
    }
    broken |= {"outputs": [], "source": ["RMSNorm.forward = None"]}
    for number, extra in (("good", []), ("bad", [broken])):
        text = json.dumps(page | {"cells": [*kept, *extra]})
        (tmp_path / f"{number}.ipynb").write_text(text, encoding="utf-8")
    # As if the two lay among the pages.
    text = (PAGES / "conftest.py").read_text(encoding="utf-8")
    place = "Path(__file__).resolve().parent.parent"
    assert text.count(place) == 1
    text = text.replace(place, f"Path({str(ROOT)!r})")
    (tmp_path / "conftest.py").write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--nbval-lax",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert "bad.ipynb::is what folo_lib imports" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "RMSNorm.forward" in done.stdout
    assert "good.ipynb::is what folo_lib imports" not in done.stdout
    assert "1 failed" in done.stdout
