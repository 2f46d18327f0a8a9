"""Plant bugs in a copy of the engine, one at a time, and see whether the tests notice.

    python tools/mutants.py [--module NAME ...] [--only ID ...] [--jobs N] [--again] [--gpu]
    python tools/mutants.py --take REPORT --only  # what another machine has found, and no more

`make mutants` calls it. The bugs stand in `tests/mutants/MODULE.toml`. What comes of each is kept
in `tests/mutants/report.json`, which `docs/mutants.md` shows. A result stands as long as mutant,
module and tests are unchanged, so a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "tests" / "mutants"
REPORT = TABLES / "report.json"
# fmt: off
PRELOADED = [  # what is slow to import, once for all
    "torch._dynamo", "triton.language", "safetensors.torch", "transformers.generation.utils",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3",
    "pytest", "hypothesis", "_hypothesis_pytestplugin", "openai", "uvicorn", "fastapi",
]
# fmt: on
SECONDS = 120  # after which tests are stopped: they hang
NOTICED = {"killed": "a test fails", "timeout": "one hangs", "crashed": "Python ends"}


Report = dict[str, dict[str, Any]]
Clean = dict[tuple[str, ...], float]


@cache
def parse(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


def find_statements(source: str, text: str) -> str:
    """Of a module, the lines of all statements that have some of the text."""
    first = source.count("\n", 0, source.index(text)) + 1
    last = first + text.count("\n")
    ends = [first, last]
    for node in parse(source):
        decorators = getattr(node, "decorator_list", ())
        start, stop = min(one.lineno for one in (node, *decorators)), node.end_lineno
        if stop is not None and start <= last and stop >= first:
            ends += [start, stop]
    return "".join(source.splitlines(keepends=True)[min(ends) - 1 : max(ends)])


def dump(source: str) -> str:
    """What Python reads, without comments."""
    return ast.dump(ast.parse(source))


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A bug, and who is to notice it.

    Attributes:
        module, id: where it is, and its name there.
        bug: what it is, in a sentence.
        old, new: a text that stands once in the module, and what replaces it.
        tests: what pytest is to run, as files or node ids.
        gpu: whether that needs a card.
        survives: why nobody notices it, if nobody does.
    """

    module: str
    id: str
    bug: str
    old: str
    new: str
    tests: tuple[str, ...]
    gpu: bool = False
    survives: str = ""

    @property
    def name(self) -> str:
        return f"{self.module}/{self.id}"

    @property
    def path(self) -> Path:
        return ROOT / "folo_lib" / f"{self.module}.py"

    def mutate(self, source: str) -> str:
        """The module with the bug; a ValueError if it cannot be planted."""
        if (count := source.count(self.old)) != 1:
            raise ValueError(
                f"{self.name}: its old text occurs {count} times, not once"
            )
        part = find_statements(source, self.old)
        if dump(part.replace(self.old, self.new)) == dump(part):
            raise ValueError(f"{self.name}: its new text changes nothing")
        return source.replace(self.old, self.new)

    def digest(self) -> str:
        """Of all that the result depends on: the mutant, its module, its tests."""
        named: dict[Path, set[tuple[str, ...]]] = {}
        for test in self.tests:
            file, *names = test.partition("[")[0].split("::")
            named.setdefault(ROOT / file, set()).add(tuple(names))
        texts = [self.path.read_text(encoding="utf-8")]
        texts += [read_tests(path, frozenset(named[path])) for path in sorted(named)]
        known = asdict(self) | {"bug": "", "survives": "", "texts": texts}
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


@cache
def read_tests(path: Path, named: frozenset[tuple[str, ...]]) -> str:
    """A file without the tests that are not `named`, by their classes and functions."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()

    def leave_out(body: Sequence[ast.stmt], inside: tuple[str, ...]) -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            here = (*inside, node.name)
            if not node.name.lower().startswith("test"):
                continue  # all of them may need it
            if any(one == here[: len(one)] for one in named):
                continue
            if any(here == one[: len(here)] for one in named):
                leave_out(node.body, here)
                continue
            first = min(one.lineno for one in (node, *node.decorator_list)) - 1
            lines[first : node.end_lineno] = [""] * len(lines[first : node.end_lineno])

    leave_out(ast.parse(text).body, ())
    return "\n".join(line for line in lines if line)


def read_mutants() -> list[Mutant]:
    """All of them; `tests` at the top of a file is for those that name none."""
    found = []
    for path in sorted(TABLES.glob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for entry in table["mutants"]:
            tests = tuple(entry.get("tests", table["tests"]))
            found.append(Mutant(**entry | {"module": path.stem, "tests": tests}))
    return found


def make_copy(copy: Path) -> Path:
    """What the tests need."""
    for name in ("folo_lib", "tests"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def run_pytest(copy: Path, tests: Sequence[str]) -> None:
    """Runs in a process of its own, which has imported what is slow to import already."""
    os.setsid()
    with (copy / "said").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(copy)
    shutil.rmtree(".hypothesis", ignore_errors=True)  # no hint from another run
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = False  # all but the module is the same in the next run
    import folo_lib

    assert folo_lib.__file__ == str(copy / "folo_lib" / "__init__.py")
    options = ["-x", "-q", "-m", "not more", "--tb=line", "-rpfE", "--basetemp=temp"]
    options += ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]  # it is slow
    if find_spec("hypothesis"):  # the same examples each time, and none made smaller
        from hypothesis import Phase, settings

        chosen, phases = settings.get_profile("ci"), (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", chosen, phases=phases)
        options += ["-p", "_hypothesis_pytestplugin", "--hypothesis-profile=mutants"]
    import pytest

    os._exit(pytest.main([*tests, *options]))


def run_tests(copy: Path, tests: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Pytest's exit status, None if it hangs, and what it said."""
    # A process is forked from one that has only imported; with a card it has to be a fresh one.
    method = "forkserver" if "TRITON_INTERPRET" in os.environ else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_pytest, args=(copy, tests))
    process.start()
    process.join(limit)
    status = process.exitcode
    with suppress(ProcessLookupError):  # with what it has started
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    return status, (copy / "said").read_text(errors="replace")


def rewrite(path: Path, text: str) -> None:
    """Writes a module, and forgets what Python made of it."""
    path.write_text(text, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()  # Python trusts it if time and size are those of this one


def find_idle(tests: Sequence[str], said: str) -> list[str]:
    """Those of which nothing has passed: they have been skipped, for example."""
    return [test for test in tests if f"PASSED {test}" not in said]


def run_clean(copy: Path, name: str, tests: Sequence[str], limit: float) -> float:
    """Runs tests without a bug, and returns how many seconds they take.

    Raises:
        RuntimeError: if they do not pass: then they notice nothing.
    """
    begin = time.perf_counter()
    status, said = run_tests(copy, tests, limit)
    if status != 0 or find_idle(tests, said):
        raise RuntimeError(f"{name}: {status} without it\n{said[-3000:]}")
    return time.perf_counter() - begin


def try_mutant(copy: Path, clean: Clean, mutant: Mutant) -> dict[str, Any]:
    """Plants a bug in a copy and runs its tests; what came of it, for the report.

    `clean` are tests that are known to pass without a bug, and how long they take. Those that
    notice this one are tried and added.

    Raises:
        RuntimeError: if they do not pass without it, or if no test has run.
    """
    begin, path = time.perf_counter(), copy / "folo_lib" / mutant.path.name
    source = path.read_text(encoding="utf-8")
    rewrite(path, mutant.mutate(source))
    status, said = run_tests(copy, mutant.tests, SECONDS)
    rewrite(path, source)
    result = {0: "survived", 1: "killed", None: "timeout"}.get(status, "crashed")
    by = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", said, re.MULTILINE)
    idle = find_idle(mutant.tests, said)
    if {0: bool(idle), 1: by is None}.get(status, (status or 0) > 1):
        raise RuntimeError(f"{mutant.name}: status {status}\n{said[-3000:]}")
    killer = by[1] if by and result == "killed" else ""
    if by and mutant.gpu:  # a kernel that does not compile would be no bug
        print(f"{mutant.name}: {by[0]}", flush=True)
    tests = (killer.partition("[")[0],) if killer else mutant.tests
    if result != "survived" and not {tests, mutant.tests} & clean.keys():
        clean[tests] = run_clean(copy, mutant.name, tests, 5 * SECONDS)
    if result == "timeout" and clean[tests] > SECONDS / 3:
        raise RuntimeError(f"{mutant.name}: slow without it too")
    return {
        "result": result,
        "by": killer.removeprefix("tests/"),
        "seconds": round(time.perf_counter() - begin),
        "date": date.today().isoformat(),
        "digest": mutant.digest(),
    }


def try_mutants(
    chosen: Sequence[Mutant], jobs: int
) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """Each of them with what came of it, as they come; what cannot be tried is printed.

    On a card the tests of a mutant run without it first, which also compiles all that it leaves
    as it was.
    """
    clean: Clean = {}
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def with_copy(call: Callable[[Path], Any]) -> Any:
        copy = copies.get()
        try:
            return call(copy)
        finally:
            copies.put(copy)

    def check(one: Mutant) -> None:
        name, tests = " ".join(one.tests), one.tests
        seconds = with_copy(lambda copy: run_clean(copy, name, tests, SECONDS))
        print(f"{seconds:4.0f} s  {name}: passed without a bug", flush=True)
        clean[tests] = seconds

    def work(one: Mutant) -> Any:
        if one.gpu:
            checks[one.tests].result()
        return with_copy(lambda copy: try_mutant(copy, clean, one))

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for i in range(jobs):
            copies.put(make_copy(Path(folder, str(i))))
        pool = ThreadPoolExecutor(jobs)
        try:
            firsts = {one.tests: one for one in chosen if one.gpu}.values()
            checks = {one.tests: pool.submit(check, one) for one in firsts}
            futures = {pool.submit(work, one): one for one in chosen}
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except RuntimeError as fault:
                    print(fault, flush=True)
        finally:  # of Ctrl-C too
            pool.shutdown(cancel_futures=True)


def write_report(mutants: Sequence[Mutant], report: Report) -> None:
    """Writes what is known, in the order of the mutants, and forgets those that are gone."""
    known = {one.name: report[one.name] for one in mutants if one.name in report}
    REPORT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def describe_score(mutants: Sequence[Mutant], report: Report) -> str:
    """How many of them are noticed, in a sentence or two."""
    tried = [report[one.name]["result"] for one in mutants if one.name in report]
    if not tried:
        return f"None of {len(mutants)} bugs has been tried."
    number = sum(result in NOTICED for result in tried)
    ways = ", ".join(f"{how} {tried.count(way)} times" for way, how in NOTICED.items())
    share = f"{100 * number / len(tried):.1f} %"
    left = f" {n} have not been tried." if (n := len(mutants) - len(tried)) else ""
    known = [(one, report[one.name]["digest"]) for one in mutants if one.name in report]
    if old := sum(one.digest() != digest for one, digest in known):
        left += f" {old} were tried before their module or tests last changed."
    return f"Of {len(tried)} bugs {number} are noticed ({share}): {ways}.{left}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--module", nargs="*", help="of these modules only")
    parser.add_argument("--only", nargs="*", help="these only: id or module/id")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--again", action="store_true", help="also what is known")
    parser.add_argument("--gpu", action="store_true", help="those that need a card")
    parser.add_argument("--take", type=Path, help="a report from another machine")
    args = parser.parse_args()
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    settings["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of what was killed
    os.environ |= settings if args.gpu else settings | {"TRITON_INTERPRET": "1"}
    mutants = read_mutants()
    report: Report = json.loads(REPORT.read_text(encoding="utf-8"))
    for one in mutants:
        one.mutate(one.path.read_text(encoding="utf-8"))  # all, before any work
    if args.take:
        taken: Report = json.loads(args.take.read_text(encoding="utf-8"))
        for one in mutants:  # what is known there of what stands here
            if (entry := taken.get(one.name, {})).get("digest") == one.digest():
                report[one.name] = entry
    chosen = [
        one
        for one in mutants
        if one.gpu is args.gpu
        and (args.module is None or one.module in args.module)
        and (args.only is None or {one.id, one.name} & set(args.only))
        and (args.again or report.get(one.name, {}).get("digest") != one.digest())
    ]
    print(f"{len(chosen)} mutants")
    number = 0
    for one, entry in try_mutants(chosen, args.jobs):
        report[one.name] = entry
        write_report(mutants, report)
        said = entry["by"] or entry["result"].upper()
        print(f"{entry['seconds']:4} s  {one.name}: {said}", flush=True)
        number += entry["result"] in NOTICED
    write_report(mutants, report)
    print(describe_score([one for one in mutants if one.gpu is args.gpu], report))
    sys.exit(number < len(chosen))


if __name__ == "__main__":
    main()
