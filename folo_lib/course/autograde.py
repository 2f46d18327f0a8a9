"""Grades a submission, a page of the student edition or a Python file, in a process of its own.

    python -m folo_lib.course.autograde submission.py sampler apply_logit_bias
    python -m folo_lib.course.autograde 07_sampler.ipynb sampler --all

Only a verdict that the check itself has signed counts. The submission is loaded after the checks,
where it finds no key; what it prints goes nowhere; a process that ends early, in whatever way, has
signed nothing. A check that finds a function changed that it rests on signs no pass. A submission
gets no frames of the interpreter, in which there are a key and its owner, and no finished function
in place of its own. This stops shortcuts and accidents. It does not stop a determined attack: a
submission is code of somebody else, which runs in the same interpreter as the check. Run it where
it can do no harm, and read it.
"""

from __future__ import annotations

import argparse
import hmac
import importlib
import json
import linecache
import os
import pkgutil
import secrets
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import folo_lib
from folo_lib.course.exercises import NotYet, Verdict

__all__ = ["grade_file", "list_names", "load_submission"]

MAX_BYTES = 1_000_000
"""Of all verdicts together."""


def grade_file(
    submission: str | Path, topic: str, names: Sequence[str], timeout: float = 300.0
) -> dict[str, Verdict]:
    """The verdict on each name, none of which is passed unless its check has signed so.

    Args:
        submission: a page (`.ipynb`), of which only definitions and imports are run, or a
            Python file.
        topic: the module of the page, such as `"sampler"`.
        names: of exercises, and of what the student writes on the page.
        timeout: seconds for all of it.
    """
    key = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "verdicts"
        found.touch()
        given = {
            "key": key,
            "submission": str(Path(submission).resolve()),
            "topic": topic,
            "names": list(names),
            "found": str(found),
        }
        ended = "it ended the process"
        try:
            subprocess.run(
                [sys.executable, "-m", "folo_lib.course.autograde", "--child"],
                input=json.dumps(given).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            ended = f"it was still running after {timeout:g} seconds"
        with found.open("rb") as file:
            lines = file.read(MAX_BYTES).decode(errors="replace").split("\n")
    verdicts = {
        name: Verdict(False, f"Not yet: {name}: {ended}, or its file did.")
        for name in names
    }
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            signed = {field: record[field] for field in ("name", "passed", "message")}
            if hmac.compare_digest(record["signature"], sign(key, signed)):
                verdicts[signed["name"]] = Verdict(signed["passed"], signed["message"])
    return verdicts


def sign(key: str, signed: dict[str, Any]) -> str:
    """The signature of a verdict."""
    text = json.dumps(signed, sort_keys=True).encode()
    return hmac.new(key.encode(), text, "sha256").hexdigest()


def list_names(page: str | Path) -> list[str]:
    """What is to write on a page of the student edition, and its exercises, in order."""
    names: list[str] = []
    for tags, source in read_cells(Path(page)):
        if "exercise" in tags:
            names += _defined(source)
        elif "check" in tags:
            inner = source.partition("(")[2].rpartition(")")[0]
            names += [name.strip() for name in inner.split(",")[1:]]
    return names


def read_cells(page: Path) -> Iterator[tuple[list[str], str]]:
    """Tags and source of the code cells of a page."""
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield cell["metadata"].get("tags", []), "".join(cell["source"])


# The process in which a submission runs


def load_submission(path: Path, topic: str) -> dict[str, Any]:
    """The names that a submission defines."""
    module = types.ModuleType("submission")
    sys.modules["submission"] = module
    names = vars(module)
    if path.suffix != ".ipynb":
        _run(path.read_text(encoding="utf-8"), str(path), names)
        return names
    cells = list(read_cells(path))
    graded = [
        bool({"student", "exercise"} & set(tags)) or source.startswith("#| export")
        for tags, source in cells
    ]
    final = {
        name
        for (_, source), is_graded in zip(cells, graded, strict=True)
        if is_graded
        for name in _defined(source)
    }
    for i, ((_, source), is_graded) in enumerate(zip(cells, graded, strict=True)):
        file = f"{path.name}, code cell {i + 1}"
        if is_graded:
            _run(source, file, names)
            continue
        # Elsewhere imports and helpers count; what draws, measures and prints is left out.
        for part in _parts(source):
            if not set(_defined(part)) & final:
                with suppress(Exception):
                    _run(part, file, names)
    return names


def _run(source: str, file: str, names: dict[str, Any]) -> None:
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), names)


def _defined(source: str) -> list[str]:
    import ast

    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in body if isinstance(node, kinds)]


def _parts(source: str) -> list[str]:
    """The imports and definitions of a cell, one by one; none if it has magics."""
    import ast

    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    kinds = (
        ast.Import
        | ast.ImportFrom
        | ast.FunctionDef
        | ast.AsyncFunctionDef
        | ast.ClassDef
    )
    return [ast.unparse(node) for node in body if isinstance(node, kinds)]


def find_check(topic: str, name: str) -> Callable[[Any], Verdict]:
    """The check of an exercise, or that of what is written on the page."""
    from folo_lib.course.written import check_written

    module = importlib.import_module(f"folo_lib.course.exercises.{topic}")
    check: Callable[[Any], Verdict] | None = getattr(module, f"check_{name}", None)
    return check or (lambda solution: check_written(topic, solution))


def take_fingerprint() -> dict[tuple[str, ...], Any]:
    """What the checks rest on: functions and classes of torch, of this package, of Python."""
    import builtins
    import math
    import random

    import torch

    found: dict[tuple[str, ...], Any] = {}
    spaces: dict[str, Any] = {
        "builtins": builtins,
        "math": math,
        "random": random,
        "torch": torch,
    }
    spaces |= {"torch.testing": torch.testing, "torch.Tensor": torch.Tensor}
    spaces |= {
        name: module
        for name, module in sys.modules.items()
        if name.startswith("folo_lib")
    }
    for name, space in list(spaces.items()):
        for key, value in list(vars(space).items()):
            if not callable(value):
                continue
            found[name, key] = value, getattr(value, "__code__", None)
            own = getattr(value, "__module__", "") or ""
            if isinstance(value, type) and own.startswith("folo_lib"):
                for inner, part in list(vars(value).items()):
                    if callable(part):
                        code = getattr(part, "__code__", None)
                        found[name, key, inner] = part, code
    return found


def find_change(before: dict[tuple[str, ...], Any]) -> str | None:
    """The first thing that is another now."""
    now = take_fingerprint()
    for place, (value, code) in before.items():
        other, other_code = now.get(place, (None, None))
        if other is not value or other_code is not code:
            return ".".join(place)
    return None


class Finished:
    """Stands for a finished function or class while a submission is loaded."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotYet(f"it calls the finished {self.__name__} of folo_lib.")


@contextmanager
def hidden(topic: str, names: Sequence[str]) -> Iterator[None]:
    """What is to be written cannot be imported, by a submission that is loaded meanwhile."""
    for found in pkgutil.iter_modules(folo_lib.__path__):
        if (
            found.name != "__main__"
        ):  # else one that is imported later would miss a name
            with suppress(ImportError):
                importlib.import_module(f"folo_lib.{found.name}")
    module = importlib.import_module(f"folo_lib.{topic}")
    finished = {name: vars(module)[name] for name in names if name in vars(module)}
    try:
        for name in finished:
            setattr(module, name, Finished(name))
        yield
    finally:
        for name, value in finished.items():
            setattr(module, name, value)


FRAMES = ("tb_frame", "gi_frame", "cr_frame", "ag_frame")
WATCHED = (
    "sys._getframe", "sys._current_frames", "sys._current_exceptions", "sys.settrace",
    "sys.setprofile", "gc.get_objects", "gc.get_referrers", "gc.get_referents",
)  # fmt: skip


def keep_frames() -> None:
    """From now on, code that is not of Python or of a package gets no frames, nor all objects.

    An audit hook cannot be taken out again. What asks is known by its file.
    """
    # An environment may take packages from another, as one for graders does.
    packages = [
        path for path in sys.path if path.endswith(("site-packages", "dist-packages"))
    ]
    places = {*sysconfig.get_paths().values(), *folo_lib.__path__, *packages}
    trusted = tuple({*places, *map(os.path.realpath, places), "<frozen "})
    getframe, busy = sys._getframe, False

    def is_asked_from_outside(near: int) -> bool:
        frame: types.FrameType | None = getframe(2)
        while frame is not None and near:
            file = frame.f_code.co_filename
            if not file.startswith(trusted):
                return True
            # These two hand on what they find.
            near += file.endswith(("inspect.py", "traceback.py")) - 1
            frame = frame.f_back
        return False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal busy
        asks = (
            event in WATCHED
            or (event == "object.__getattr__" and args[1] in FRAMES)
            or event.startswith("ctypes.")
            or (event == "open" and str(args[0]).startswith("/proc/"))
        )
        if busy or not asks:
            return
        busy = True
        try:
            if is_asked_from_outside(2):
                raise ValueError("a submission does not look into the interpreter")
        finally:
            busy = False

    sys.addaudithook(hook)


def run_child() -> None:
    """Reads what to do, loads the checks, then the submission, and signs each verdict."""
    given = json.loads(sys.stdin.buffer.read())
    sys.stdin.close()
    names, topic, path = given["names"], given["topic"], Path(given["submission"])
    if path.suffix == ".ipynb":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    checks = {name: find_check(topic, name) for name in names}
    # What replaces functions of torch when it is imported, now and not in a submission.
    for module in (f"folo_lib.{topic}", "torch._dynamo"):
        with suppress(ImportError):
            importlib.import_module(module)
    file, key = open(given["found"], "a", encoding="utf-8"), given["key"]  # noqa: SIM115
    end, compare, dumps, seal = os._exit, find_change, json.dumps, sign
    del given

    def write(name: str, passed: bool, message: str) -> None:
        signed = {"name": name, "passed": passed, "message": message[:4000]}
        record = signed | {"signature": seal(key, signed)}
        file.write(dumps(record) + "\n")
        file.flush()

    before = take_fingerprint()
    keep_frames()
    try:
        with hidden(topic, names):
            found = load_submission(path, topic)
    except BaseException as error:
        message = f"the file ends with {type(error).__name__}: {error}"
        for name in names:
            write(name, False, f"Not yet: {name}: {message}")
        end(1)
    for name in names:
        if name not in found:
            write(name, False, f"Not yet: {name} is not defined.")
            continue
        if isinstance(found[name], Finished):
            write(name, False, f"Not yet: {name} is imported from folo_lib.")
            continue
        verdict = checks[name](found[name])
        passed, message = verdict.passed is True, verdict.message
        if changed := compare(before):
            passed, message = False, f"Not yet: {name}: {changed} was changed."
        write(name, passed, message)
    end(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Grade a submission.")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("submission", nargs="?", help="a page or a Python file")
    parser.add_argument("topic", nargs="?", help="the module of the page: sampler")
    parser.add_argument("names", nargs="*", help="functions and classes to grade")
    parser.add_argument("--all", action="store_true", help="all that the page asks for")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    options = parser.parse_args()
    if options.child:
        run_child()
    if not options.submission or not options.topic:
        parser.error("name a submission and the module of its page")
    names = list_names(options.submission) if options.all else options.names
    if not names:
        parser.error("name what to grade, or a page of the student edition and --all")
    verdicts = grade_file(options.submission, options.topic, names, options.timeout)
    for verdict in verdicts.values():
        print(verdict)
    num_passed = sum(verdict.passed for verdict in verdicts.values())
    print(f"{num_passed} of {len(verdicts)} points")
    sys.exit(num_passed < len(verdicts))


if __name__ == "__main__":
    main()
