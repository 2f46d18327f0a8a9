"""Whether what a page has defined, once all its cells have run, is what folo_lib imports.

`tools/export.py --check` compares the modules with the exported cells as text. It cannot see that a
later cell has put another function under the same name, or that a name means one thing on the page
and another in the module. So `notebooks/conftest.py` has each page's kernel look at what it holds
after the last cell, when `pytest --nbval` runs the pages: functions by the code that they were made
from and by what the global names in it stand for, classes by their members, constants by their
values. What is the same in all of these gives the same outputs.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_exports(page: Path) -> tuple[str, list[str]]:
    """The module of a page, and the names that its exported cells bind; "" for none."""
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(one["source"]) for one in cells if one["cell_type"] == "code"]
    named = (re.search(r"^#\|\s*default_exp (\w+)", source, re.M) for source in sources)
    module = next((found[1] for found in named if found), "")
    names: dict[str, None] = {}
    for source in sources:
        if source.startswith("#| export"):
            for node in ast.parse(source).body:
                names |= dict.fromkeys(find_names(node))
    return module, list(names)


def find_names(node: ast.stmt) -> Iterator[str]:
    """The names that a definition binds; an import binds what is another's."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    elif isinstance(node, (ast.If, ast.Try, ast.With)):
        for inner in [*node.body, *getattr(node, "orelse", ())]:
            yield from find_names(inner)


class Comparison:
    """A page's namespace beside the module that was exported from it.

    Args:
        page: its globals.
        module: of folo_lib.
        names: those that the page exports.
    """

    def __init__(
        self, page: Mapping[str, Any], module: types.ModuleType, names: list[str]
    ) -> None:
        self.page, self.module, self.names = page, module, names
        self.homes = re.compile(rf"\b(__main__|{re.escape(module.__name__)})\b")

    def find_drift(self) -> list[str]:
        """What differs, one line for each; a name that a page lacks is one, too."""
        found: list[str] = []
        for name in self.names:
            if name not in self.page:
                found.append(f"{name}: no longer on the page")
            elif not hasattr(self.module, name):
                found.append(f"{name}: not in the module")
            else:
                pair = self.page[name], getattr(self.module, name)
                found += [f"{name}{where}" for where in self.compare(*pair)]
        return found

    def describe(self, value: Any) -> str:
        """A text that is the same for the same thing on the page and in the module."""
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        return self.homes.sub("here", text)

    def compare(self, ours: Any, theirs: Any) -> Iterator[str]:
        """Where two objects differ."""
        if ours is theirs:
            return
        ours, theirs = unwrap(ours), unwrap(theirs)
        if self.describe(type(ours)) != self.describe(type(theirs)):
            yield f": a {type(ours).__name__} here, a {type(theirs).__name__} there"
        elif isinstance(ours, types.FunctionType):
            yield from self.compare_functions(ours, theirs)
        elif isinstance(ours, type):
            yield from self.compare_classes(ours, theirs)
        elif self.describe(ours) != self.describe(theirs):
            yield f" = {self.describe(ours)[:80]} here, {self.describe(theirs)[:80]} there"

    def compare_functions(
        self, ours: types.FunctionType, theirs: types.FunctionType
    ) -> Iterator[str]:
        if read_source(ours) != read_source(theirs):
            yield ": other code"
        for part in ("__defaults__", "__kwdefaults__", "__annotations__"):
            pair = getattr(ours, part), getattr(theirs, part)
            if self.describe(pair[0]) != self.describe(pair[1]):
                yield f": another {part.strip('_')}"
        for name in find_globals(ours.__code__):
            if name not in self.names:  # those are compared by themselves
                pair = find_value(name, ours), find_value(name, theirs)
                if self.describe(pair[0]) != self.describe(pair[1]):
                    yield f": {name} is something else there"

    def compare_classes(self, ours: type, theirs: type) -> Iterator[str]:
        if self.describe(ours.__mro__) != self.describe(theirs.__mro__):
            yield ": other bases"
        mine, its = read_members(ours), read_members(theirs)
        for name in mine.keys() ^ its.keys():
            yield f".{name}: only {'here' if name in mine else 'there'}"
        for name in mine.keys() & its.keys():
            yield from (f".{name}{w}" for w in self.compare(mine[name], its[name]))


def unwrap(value: Any) -> Any:
    """The function under a decorator, a descriptor or a Triton kernel."""
    for part in ("fget", "func", "__func__", "fn"):
        inner = inspect.getattr_static(value, part, None)
        inner = getattr(value, part, None) if inner is not None else None
        if not isinstance(value, type) and isinstance(inner, types.FunctionType):
            return inspect.unwrap(inner)
    return inspect.unwrap(value) if callable(value) else value


def find_globals(code: types.CodeType) -> set[str]:
    """The global names that a function reads, with those of functions inside it."""
    names = {one.argval for one in dis.get_instructions(code) if "GLOBAL" in one.opname}
    for inner in code.co_consts:
        names |= find_globals(inner) if isinstance(inner, types.CodeType) else set()
    return names


def find_value(name: str, function: types.FunctionType) -> Any:
    missing = getattr(builtins, name, "nothing")
    return function.__globals__.get(name, missing)


def read_source(function: types.FunctionType) -> str:
    """The code that a function was made from, without what formatting may change.

    Not its bytecode: that depends on whether the cell itself imports what the function uses.
    """
    if function.__code__.co_filename == "<string>":
        return ""  # a dataclass wrote it, from its fields
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = inspect.cleandoc(node.value)  # docstrings are indented anew
        elif isinstance(node, ast.ImportFrom):  # nbdev writes some of them relative
            node.level, node.module = 0, (node.module or "").removeprefix("folo_lib.")
    return ast.dump(tree)


# What the interpreter writes into a class; `__init__` and the like count, as members.
INTERNAL = {"__dict__", "__weakref__", "__module__", "__abstractmethods__"}
INTERNAL |= {"_abc_impl", "__dataclass_params__", "__firstlineno__", "__hash__"}
INTERNAL |= {
    "__static_attributes__",
    "__slotnames__",
    "__parameters__",
    "__subclasshook__",
}


def read_members(owner: type) -> dict[str, Any]:
    members = {k: v for k, v in vars(owner).items() if k not in INTERNAL}
    members["__doc__"] = inspect.getdoc(owner)
    slots = (types.MemberDescriptorType, types.GetSetDescriptorType)
    return {k: v for k, v in members.items() if not isinstance(v, slots)}


def check(page: Path, namespace: Mapping[str, Any]) -> None:
    """Raises AssertionError with what differs; called in the page's own kernel."""
    stem, names = read_exports(page)
    module = importlib.import_module(f"folo_lib.{stem}")
    drift = Comparison(namespace, module, names).find_drift()
    assert not drift, f"{page.name} and folo_lib.{stem} differ:\n" + "\n".join(drift)
