"""How long a page takes, by a rule, and the minutes wherever they stand.

    python tools/reading_time.py            write them: heads, both READMEs, page 00, the syllabus
    python tools/reading_time.py --check    only say which are others
    python tools/reading_time.py docs/syllabus.md     write them there alone

The rule is for a first reading, in which cells are run and outputs looked at, exercises apart. Its
speeds are estimates, chosen once for all pages; nobody has been timed.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from run_pages import ROOT, Notebook, find_pages, read_head

WORDS_PER_MINUTE = (
    150  # of explanations, one after the other, that are to be understood
)
LINES_PER_MINUTE = 12  # of code
CELL_MINUTES = 0.2  # to run a cell and see what comes out
FIGURE_MINUTES = 0.5
STEP = 5
PLUMBING = ("install", "#| default_exp")


def estimate_minutes(notebook: Notebook) -> int:
    """The reading time of a page in minutes, a multiple of five."""
    words = lines = cells = figures = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            words += count_words(cell.source)
            continue
        if cell.id in PLUMBING or cell.source.startswith(PLUMBING):
            continue
        if "exercise" in cell.metadata.get("tags", []):
            continue
        code, prose = split_code(cell.source)
        words, lines, cells = words + count_words(prose), lines + code, cells + 1
        pictures = (out.get("data", {}) for out in cell.outputs)
        figures += any("image/png" in data for data in pictures)
    minutes = words / WORDS_PER_MINUTE + lines / LINES_PER_MINUTE
    minutes += CELL_MINUTES * cells + FIGURE_MINUTES * figures
    return max(STEP, STEP * round(minutes / STEP))


def count_words(text: str) -> int:
    """Words to read: the text of a link and not its address, no markup."""
    text = re.sub(r"\]\([^)]*\)|<[^>]*>", " ", text)
    return len(re.findall(r"\w[\w.,'’-]*", text))


def split_code(source: str) -> tuple[int, str]:
    """The lines of code of a cell, imports apart, and the words of docstrings and comments."""
    source = re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE)
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return sum(bool(line.strip()) for line in source.split("\n")), ""
    silent: set[int] = set()
    prose = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            silent.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        text = node.value if isinstance(node, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            silent.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            prose.append(text.value)
    blank = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    spoken: set[int] = set()
    for token in tokens:
        if token.type == tokenize.COMMENT:
            prose.append("" if token.string.startswith("#|") else token.string)
        elif token.type not in (*blank, tokenize.ENDMARKER):
            spoken.update(range(token.start[0], token.end[0] + 1))
    return len(spoken - silent), " ".join(prose)


# Where the minutes stand


def read_minutes() -> dict[str, int]:
    """By file name."""
    return {
        page.name: estimate_minutes(nbformat.read(page, as_version=4))
        for page in find_pages()
    }


def name_hours(minutes: int) -> str:
    """Such as "2 h 20"."""
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02}" if hours else f"{rest} min"


def write_rows(text: str, minutes: dict[str, int]) -> str:
    """The column of minutes in the rows of a table whose first link is a page."""

    def renew(match: re.Match[str]) -> str:
        return f"{match[1]}{minutes[match[2]]}{match[3]}"

    row = r"^(\| \[[^\]]+\]\((?:notebooks/)?([\w.]+\.ipynb)\) \| .+? \| )\d+( \|)"
    return re.sub(row, renew, text, flags=re.MULTILINE)


def write_readme(text: str, minutes: dict[str, int]) -> str:
    """The rows, and the hours of all pages together."""
    hours = round(sum(minutes.values()) / 60)
    text = re.sub(
        r"About [\w-]+ hours of reading", f"About {hours} hours of reading", text
    )
    text = re.sub(
        r"[一二三四五六七八九十\d]+ ?个小时", f"{hours} 个小时", text, count=1
    )
    return write_rows(text, minutes)


def write_syllabus(text: str, minutes: dict[str, int]) -> str:
    """The last column of each row that links to pages: the sum of theirs."""

    def renew(match: re.Match[str]) -> str:
        pages = re.findall(r"\]\(\.\./notebooks/([\w.]+\.ipynb)\)", match[1])
        total = sum(minutes[page] for page in pages)
        return f"{match[1]} | {name_hours(total)} |" if pages else match[0]

    row = r"^(\|.*) \| (?:\d+ h \d\d|\d+ min) \|$"
    text = re.sub(row, renew, text, flags=re.MULTILINE)
    hours = round(sum(minutes.values()) / 60)
    return re.sub(r"\d+ hours of reading", f"{hours} hours of reading", text)


def list_changes(minutes: dict[str, int]) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The files in which something else stands, and what writes each."""
    texts = {
        ROOT / "README.md": write_readme,
        ROOT / "README.zh.md": write_readme,
        ROOT / "docs" / "syllabus.md": write_syllabus,
    }
    for path, renew in texts.items():
        old = path.read_text(encoding="utf-8")
        new = renew(old, minutes)
        if new != old:
            yield path, lambda path=path, new=new: write_text(path, new)  # type: ignore[misc]
    for page in find_pages():
        notebook = nbformat.read(page, as_version=4)
        old_cells = [cell.source for cell in notebook.cells]
        head = notebook.cells[0]
        number = minutes[page.name]
        new_time = f"**Reading time** {number} minutes"
        head.source = re.sub(r"\*\*Reading time\*\* \d+ minutes", new_time, head.source)
        if page.stem == "00_tour":
            for cell in notebook.cells[1:]:
                cell.source = write_rows(cell.source, minutes)
        assert read_head(notebook).minutes == number
        if [cell.source for cell in notebook.cells] != old_cells:
            yield page, lambda page=page, made=notebook: nbformat.write(made, page)  # type: ignore[misc]


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the reading time of the pages.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("files", nargs="*", type=Path, help="default: all")
    options = parser.parse_args()
    wanted = {path.resolve() for path in options.files}
    minutes, others = read_minutes(), []
    for path, write in list_changes(minutes):
        if wanted and path not in wanted:
            continue
        others.append(path)
        if not options.check:
            write()
    for name, number in minutes.items():
        print(f"{name:28} {number:4} minutes")
    print(f"{'together':28} {sum(minutes.values()) / 60:4.1f} hours")
    for path in others:
        said = "has other minutes" if options.check else "written"
        print(f"{path.relative_to(ROOT)}: {said}")
    sys.exit(bool(others) and options.check)


if __name__ == "__main__":
    main()
