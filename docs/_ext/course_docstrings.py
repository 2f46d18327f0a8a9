"""Docstrings of `folo_lib` for autodoc: their backticks and indented code as reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

CODE = re.compile(r"(\w?)(?<!`)`([^`]+)`(?!`)(\w?)")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
EXAMPLE = re.compile(r"(^ *>>> .*(?:\n.*\S.*)*)", re.MULTILINE)
SPECIAL = re.compile(r"(?<=\w)_(?!\w)|(?<=\S)\*(?=\S)|\|")


def mark_code(found: re.Match[str]) -> str:
    before, code, behind = found.groups()
    role = f":py:obj:`{code}`" if IDENTIFIER.fullmatch(code) else f"``{code}``"
    return f"{before}{before and chr(92) + ' '}{role}{behind and chr(92) + ' '}{behind}"


def convert(text: str) -> str:
    """Single backticks become references or code, and nothing else is markup.

    Examples, from a `>>>` to the next blank line, stay as they are.
    """
    kept = EXAMPLE.split(text)
    return "".join(part if i % 2 else mark(part) for i, part in enumerate(kept))


def mark(text: str) -> str:
    parts, at = [], 0
    for found in CODE.finditer(text):
        parts += [SPECIAL.sub(r"\\\g<0>", text[at : found.start()]), mark_code(found)]
        at = found.end()
    return "".join([*parts, SPECIAL.sub(r"\\\g<0>", text[at:])])


def convert_docstring(lines: list[str]) -> list[str]:
    """Blocks that are indented behind an empty line are code, the rest is prose."""
    blocks: list[list[str]] = [[]]
    is_code = [False]
    for number, line in enumerate(lines):
        indented = line.startswith("    ")
        begins = indented and number > 0 and not lines[number - 1].strip()
        if not is_code[-1] and begins and is_flush(blocks[-1]):
            blocks.append([line])
            is_code.append(True)
        elif is_code[-1] and line.strip() and not indented:
            blocks.append([line])
            is_code.append(False)
        else:
            blocks[-1].append(line)
    out: list[str] = []
    for block, code in zip(blocks, is_code, strict=True):
        text = "\n".join(block)
        if code:
            out += [".. code-block:: python", "", *block]
        else:
            out += convert(text).split("\n")
    return out


def is_flush(block: list[str]) -> bool:
    """Whether the last paragraph is not indented."""
    last = next((line for line in reversed(block) if line.strip()), "")
    return bool(last) and not last.startswith(" ")


def process(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """autodoc's event, before napoleon's turn."""
    if name.split(".")[0] == "folo_lib":
        lines[:] = convert_docstring(lines)


def forget_object(app: Sphinx, doctree: nodes.document) -> None:
    """That a class is an object need not be said."""
    for paragraph in [*doctree.findall(nodes.paragraph)]:
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("doctree-read", forget_object)
    return {"version": "1", "parallel_read_safe": True}
