"""What folo_lib promises to its users: every public name, its signature and its defaults.

    python tools/api_snapshot.py            print what differs from tests/api.txt
    python tools/api_snapshot.py --write    accept it, once CHANGELOG.md names it

Public is what stands in `folo_lib.__all__` or in the `__all__` of a module, and in its classes what
does not begin with an underscore. The text is read off the source, so that it is the same on every
Python, and for modules whose extra is not installed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "folo_lib"
SNAPSHOT = ROOT / "tests" / "api.txt"
HEADER = """\
# The public names of folo_lib, one a line, with signatures and defaults. Written by `make api`,
# which asks that CHANGELOG.md names what has changed.
"""


def read_all(tree: ast.Module) -> list[str]:
    """The names in `__all__`, as far as they are written there as strings."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            assert isinstance(node.value, ast.List)
            return [e.value for e in node.value.elts if isinstance(e, ast.Constant)]
    return []


def find_definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a module or class binds, those under an `if` or `try` included."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    yield ast.unparse(part), node
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), node
        elif isinstance(node, (ast.If, ast.Try)):
            for part in (node.body, node.orelse):
                yield from find_definitions(part)


def describe(name: str, node: ast.stmt) -> Iterator[str]:
    """The lines for one name, and for what is public in it if it is a class."""
    if isinstance(node, ast.ClassDef):
        made_by = [f"@{ast.unparse(one)} " for one in node.decorator_list]
        bases = [ast.unparse(one) for one in [*node.bases, *node.keywords]]
        yield f"{''.join(made_by)}class {name}({', '.join(bases)})"
        for inner, definition in find_definitions(node.body):
            if not inner.startswith("_") or inner in ("__init__", "__call__"):
                yield from describe(f"{name}.{inner}", definition)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        made_by = [f"@{ast.unparse(one)} " for one in node.decorator_list]
        word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        arguments = f"({ast.unparse(node.args)})"
        yield f"{''.join(made_by)}{word} {name}{arguments}{returns}"
    elif isinstance(node, ast.AnnAssign):
        value = f" = {ast.unparse(node.value)}" if node.value else ""
        yield f"{name}: {ast.unparse(node.annotation)}{value}"
    elif isinstance(node, ast.Assign):
        yield f"{name} = {ast.unparse(node.value)}"


def read_api(lib: Path = LIB) -> list[str]:
    """The public names of the package in `lib`, one a line."""
    package = ast.parse((lib / "__init__.py").read_text(encoding="utf-8"))
    definitions = dict(find_definitions(package.body))
    table = ast.literal_eval(definitions["_MODULE_OF"].value)  # type: ignore[attr-defined]
    lines = [f"folo_lib.{name} of {table[name]}" for name in sorted(table)]
    for name in read_all(package):
        value = definitions[name]
        # The version is another with each release, and no promise.
        lines += (
            [f"folo_lib.{name}"]
            if name == "__version__"
            else describe(f"folo_lib.{name}", value)
        )
    for path in sorted(lib.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        definitions = dict(find_definitions(tree.body))
        for name in read_all(tree) if path.stem != "__init__" else []:
            lines += describe(f"{path.stem}.{name}", definitions[name])
    return lines


def read_snapshot() -> list[str]:
    lines = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def find_changes(old: list[str], new: list[str]) -> list[str]:
    """Lines that went, with `-` before them, and lines that came, with `+`."""
    return [line for line in difflib.ndiff(old, new) if line.startswith(("- ", "+ "))]


def get_name(line: str) -> str:
    """`engine.LLMEngine.step` of the line that describes it."""
    line = re.sub(r"^(@.*? )?(async )?(def|class) ", "", line)
    found = re.match(r"[\w.]+", line)
    assert found is not None, line
    return found[0]


def find_unnamed(changes: list[str], changelog: str) -> list[str]:
    """Names of the package itself among the changes that CHANGELOG.md does not mention.

    A module's other names may change without a word to users; what `folo_lib` shows may not.

    Args:
        changes: of `find_changes`.
        changelog: whose first section says what comes next.
    """
    section = re.split(r"^## ", changelog, flags=re.MULTILINE)[1]
    every_name = [get_name(line) for line in read_api()]
    every_name += [get_name(change[2:]) for change in changes]
    shown = {
        n.removeprefix("folo_lib.") for n in every_name if n.startswith("folo_lib.")
    }
    names = set()
    for change in changes:
        _, owner, *inner = get_name(change[2:]).split(".")
        if owner in shown:
            names.add(inner[0] if inner and inner[0] != "__init__" else owner)
    return sorted(n for n in names if not re.search(rf"\b{re.escape(n)}\b", section))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the public API with its snapshot."
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="accept the API as it is into tests/api.txt",
    )
    write = parser.parse_args().write
    api = read_api()
    changes = find_changes(read_snapshot() if SNAPSHOT.exists() else [], api)
    print("\n".join(changes) or "The API is that of tests/api.txt.")
    if not write or not changes:
        return
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if SNAPSHOT.exists() and (unnamed := find_unnamed(changes, changelog)):
        sys.exit(
            "\nUnder its first heading CHANGELOG.md does not say what has become of: "
            f"{', '.join(unnamed)}. Write it there, then run `make api` again."
        )
    SNAPSHOT.write_text(HEADER + "\n".join(api) + "\n", encoding="utf-8", newline="\n")
    print(f"\nwrote {SNAPSHOT.relative_to(ROOT)}: {len(api)} lines")


if __name__ == "__main__":
    main()
