"""Execute the pages in order, each in a fresh kernel, and stop at the first error.

Executed copies go to build/pages; with --save the outputs go into the pages themselves.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from layout import PAGES as PAGES, ROOT, find_pages, fold
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

COPIES = ROOT / "build" / "pages"
WIDGET = "application/vnd.jupyter.widget-view+json"
CAPTION = re.compile(r"\*\*Figure \d+\.\*\* (.+?)(?:\n\n|\Z)", re.DOTALL)
Notebook = nbformat.NotebookNode


class PageError(Exception):
    """A page that did not run to its end; the message is for the reader."""


class Head(NamedTuple):
    """What a page says of itself under its title."""

    title: str
    summary: str
    minutes: int


def read_head(notebook: Notebook) -> Head:
    """Title, summary and reading time, which nothing else may say otherwise.

    Raises:
        ValueError: if one of them is missing.
    """
    text = notebook["cells"][0]["source"]
    found = [
        re.search(pattern, text, re.MULTILINE)
        for pattern in (r"^# (.+)$", r"^> (.+)$", r"\*\*Reading time\*\* (\d+) minutes")
    ]
    if not all(found):
        raise ValueError(f"A page begins without title, summary or minutes:\n{text}")
    title, summary, minutes = (match[1] for match in found if match)
    return Head(title, summary, int(minutes))


def execute(page: Path, notebook: Notebook, bar: tqdm[Any]) -> None:
    """Run all cells of `notebook`, filling in its outputs."""
    at = 0

    def started(cell: Notebook, cell_index: int) -> None:
        nonlocal at
        at = cell_index

    def finished(cell: Notebook, cell_index: int, execute_reply: Any) -> None:
        bar.update()

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        timeout=900,
        resources={"metadata": {"path": str(page.parent)}},
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
        on_cell_start=started,
        on_cell_executed=finished,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        trace = "\n".join(notebook.cells[at].outputs[-1].get("traceback", []))
        line = re.search(r"In\[\d+\], line (\d+)", plain(trace))
        message = f"{error.ename}: {error.evalue}"
        raise PageError(
            report(page, notebook, at, message, line and int(line[1]))
        ) from None
    except CellTimeoutError:
        message = f"The cell was still running after {client.timeout} seconds."
        raise PageError(report(page, notebook, at, message)) from None
    except DeadKernelError:
        message = "The kernel died, perhaps for want of memory."
        raise PageError(report(page, notebook, at, message)) from None


def plain(text: str) -> str:
    """The text without its terminal colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def report(
    page: Path, notebook: Notebook, at: int, message: str, line: int | None = None
) -> str:
    """Say which cell of which page failed, show its source, and mark the line if it is known."""
    numbered = [
        f"{'->' if number == line else '  '} {number:3} | {text}"
        for number, text in enumerate(notebook.cells[at].source.splitlines(), start=1)
    ]
    prompt = f"In [{notebook.cells[at].execution_count or '*'}]"
    where = f"{page.name}, cell {at + 1} of {len(notebook.cells)} ({prompt}), failed:"
    return "\n".join([where, "", *numbered, "", message])


def read_caption(cell: Notebook) -> str | None:
    """The caption that a cell begins with, without "Figure 1." and without markup."""
    caption = cell.cell_type == "markdown" and CAPTION.match(cell.source)
    if not caption:
        return None
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", " ".join(caption[1].split()))
    for mark in ("`", r"\*\*", r"\*", r"\$"):
        text = re.sub(rf"{mark}(?=\S)(.+?)(?<=\S){mark}", r"\1", text)
    return text


def describe(notebook: Notebook) -> None:
    """Give each figure the caption in the cell behind it as alt text, where nbconvert looks."""
    for cell, behind in pairwise(notebook.cells):
        caption = read_caption(behind)
        for output in cell.get("outputs", []):
            if caption and "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", {})["alt"] = caption


def settle(notebook: Notebook) -> None:
    """Drop what differs from run to run and between machines; describe the figures."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        )
        for output in cell.get("outputs", []):
            # A widget lives only as long as its kernel; the picture or text beside it stays.
            output.get("data", {}).pop(WIDGET, None)
            if (
                output.output_type == "error"
            ):  # frames outside the page name this machine's folders
                output.traceback = [
                    frame
                    for frame in output.traceback
                    if not plain(frame).startswith("File ")
                ]
    describe(notebook)
    fold(notebook.cells)


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute the pages in order.")
    parser.add_argument(
        "--save", action="store_true", help="save the outputs into the pages"
    )
    parser.add_argument(
        "pages", nargs="*", type=Path, metavar="PAGE", help="default: all"
    )
    options = parser.parse_args()
    pages = [page.resolve() for page in options.pages] or find_pages()
    notebooks = [nbformat.read(page, as_version=4) for page in pages]
    code = [
        cell for book in notebooks for cell in book.cells if cell.cell_type == "code"
    ]
    cells = sum(bool(cell.source.strip()) for cell in code)
    COPIES.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    # disable=None: no bar where the output is not a terminal.
    with tqdm(total=cells, unit=" cells", disable=None, dynamic_ncols=True) as bar:
        for page, notebook in zip(pages, notebooks, strict=True):
            bar.set_description(page.stem)
            page_start = time.perf_counter()
            try:
                execute(page, notebook, bar)
            except PageError as error:
                bar.close()
                nbformat.write(notebook, COPIES / page.name)
                copy = (COPIES / page.name).relative_to(ROOT)
                sys.exit(f"\n{error}\n\nThe page as far as it ran: {copy}")
            if options.save:
                settle(notebook)
            nbformat.write(notebook, page if options.save else COPIES / page.name)
            bar.write(
                f"{page.name:32} {time.perf_counter() - page_start:6.1f} s",
                file=sys.stdout,
            )

    print(
        f"\n{len(pages)} pages ran without an error in {time.perf_counter() - start:.0f} s."
    )
    if not options.save:
        print(
            "Where to look next:\n"
            f"  {COPIES.relative_to(ROOT)}/   the pages with the outputs of this run\n"
            "  make lab       the pages in JupyterLab; begin with 00_tour.ipynb\n"
            "  README.md      the map of the course"
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
