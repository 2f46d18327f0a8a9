"""After the last cell of a page, `pytest --nbval` compares what it holds with folo_lib."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import page_drift  # noqa: E402  tools/ is not a package

LOOK = """
import pathlib, sys
sys.path.insert(0, {tools!r})
import page_drift
page_drift.check(pathlib.Path({page!r}), globals())
"""


class Drift(pytest.Item):
    """Runs in the kernel that has run the page."""

    def runtest(self) -> None:
        kernel: Any = self.parent.kernel  # type: ignore[union-attr]
        code = LOOK.format(tools=str(TOOLS), page=str(self.path))
        number, content = kernel.execute_cell_input(code, allow_stdin=False), None
        while content is None:
            reply = kernel.get_message("shell", timeout=120)
            if reply["parent_header"].get("msg_id") == number:
                content = reply["content"]
        if content["status"] != "ok":
            raise AssertionError(content.get("evalue") or content["status"])

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name}: what it defines is in folo_lib"


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Iterator[None]:
    found: Any = yield
    for file in found:
        if type(file).__name__ == "IPyNbFile" and page_drift.read_exports(file.path)[0]:
            add_item(file)
    return found


def add_item(file: Any) -> None:
    collect = file.collect

    def collect_and_look() -> Iterator[pytest.Item]:
        yield from collect()
        yield Drift.from_parent(file, name="is what folo_lib imports")

    file.collect = collect_and_look
