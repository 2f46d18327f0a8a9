"""The bugs that `make mutants` plants can be planted, and the command tells who is noticed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import mutants  # noqa: E402  tools/ is not a package

ALL = mutants.read_mutants()
REPORT = json.loads(mutants.REPORT.read_text(encoding="utf-8"))
ENGINE = (
    "attention layers rope qwen3 checkpoint kv_cache sampler runner request engine scheduler "
    "block_pool paged_attention cuda_graph fused_decode fused_attention fused_vectors ticket_sums "
    "sampling_kernels serving server inputs config tensor_parallel"
)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def find_test(test: str) -> bool:
    """Whether there is a file, class or function of that name; parameters are not looked at."""
    file, *names = test.partition("[")[0].split("::")
    if not (ROOT / file).is_file():
        return False
    body: list[ast.stmt] = parse(ROOT / file).body
    for name in names:
        found = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        ]
        if not found:
            return False
        body = found[0].body
    return True


def test_each_can_be_planted() -> None:
    """Its old text stands once in the module, and Python can read the new one."""
    sources = {one.path: one.path.read_text(encoding="utf-8") for one in ALL}
    for one in ALL:
        one.mutate(sources[one.path])


def test_each_names_tests_that_there_are() -> None:
    tests = {test: one.name for one in ALL for test in one.tests}
    assert [(name, test) for test, name in tests.items() if not find_test(test)] == []
    assert find_test("tests/test_mutants.py::test_each_can_be_planted")
    assert not find_test("tests/test_mutants.py::TestNothing::test_each_can_be_planted")


def test_each_is_one_bug_in_a_sentence() -> None:
    names = Counter(one.name for one in ALL)
    assert max(names.values()) == 1
    for one in ALL:
        assert one.bug[0] in "`1" or one.bug[0].isupper(), one.name
        assert one.bug.endswith(".") and "|" not in one.bug, one.name
        assert one.gpu is one.id.startswith("gpu-"), one.name


def test_there_are_enough_in_every_module_of_the_engine() -> None:
    numbers = Counter(one.module for one in ALL if not one.gpu)
    assert {name: numbers[name] for name in ENGINE.split() if numbers[name] < 7} == {}
    assert sum(numbers.values()) >= 120
    assert len([one for one in ALL if one.gpu]) >= 12


def test_95_of_100_are_noticed_and_the_others_explained() -> None:
    assert REPORT.keys() <= {one.name for one in ALL}
    tried = [one for one in ALL if one.name in REPORT]
    unnoticed = [one for one in tried if REPORT[one.name]["result"] == "survived"]
    assert len(unnoticed) <= 0.05 * len(tried)
    assert [one.name for one in unnoticed if not one.survives] == []
    assert [one.name for one in ALL if one.survives and one not in unnoticed] == []
    assert len(tried) >= 120  # the page says how many have not been tried


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("torch", "numpy", "times, not once"),
        ("no such text", "other", "occurs 0 times"),
        ("import math\n", "import math  # twice\n", "changes nothing"),
    ],
)
def test_what_cannot_be_planted_is_told(old: str, new: str, message: str) -> None:
    one = mutants.Mutant(module="rope", id="x", bug="", old=old, new=new, tests=())
    with pytest.raises(ValueError, match=message):
        one.mutate(one.path.read_text(encoding="utf-8"))


def test_a_result_outlives_a_change_of_other_tests(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(
        "import pytest\n\n"
        "def help_all(): ...\n\n"
        "class TestA:\n    size = 3\n\n"
        "    @pytest.mark.slow\n    def test_one(self): ...\n\n"
        "    @pytest.mark.more\n    def test_two(self): ...\n\n"
        "@pytest.mark.gpu\ndef test_three(): ...\n"
    )
    read = mutants.read_tests
    one = read(path, frozenset({("TestA", "test_one")}))
    for text in ("help_all", "size = 3", "mark.slow", "test_one"):
        assert text in one
    for text in ("mark.more", "test_two", "mark.gpu", "test_three"):
        assert text not in one
    assert "test_two" in read(path, frozenset({("TestA",)}))
    assert "test_three" in read(path, frozenset({("test_three",), ("TestA",)}))
    assert "test_three" in read(path, frozenset({()}))  # the whole file


PACKAGE = "def double(x):\n    return 2 * x\n"
TESTS = """
from folo_lib.small import double

def test_double():
    assert double(2) == 4

def test_nothing():
    assert True
"""
TABLE = """
tests = ["tests/test_small.py"]

[[mutants]]
id = "triples"
bug = "It triples."
old = "2 * x"
new = "3 * x"

[[mutants]]
id = "squares"
bug = "It squares."
old = "2 * x"
new = "x * x"
survives = "2 is tried alone."

[[mutants]]
id = "hangs"
bug = "It never ends."
old = "    return 2 * x"
new = "    while True: pass"

[[mutants]]
id = "crashes"
bug = "It ends Python."
old = "    return 2 * x"
new = "    import os; os.kill(os.getpid(), 11)"
"""


def run_tool(
    folder: Path, *arguments: str, seconds: int = 120
) -> subprocess.CompletedProcess[str]:
    """The command in a course of one function, with nothing to import beforehand."""
    program = f"import mutants; mutants.PRELOADED, mutants.SECONDS = ['pytest'], {seconds}; mutants.main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder / "tools",
        capture_output=True,
        text=True,
    )


def test_the_command(tmp_path: Path) -> None:
    files = {
        "folo_lib/__init__.py": "",
        "folo_lib/small.py": PACKAGE,
        "tests/test_small.py": TESTS,
        "tests/mutants/small.toml": TABLE,
        "tests/mutants/report.json": "{}",
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['more']\n",
        "tools/mutants.py": (ROOT / "tools" / "mutants.py").read_text(encoding="utf-8"),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    run_tool(tmp_path, "--only", "hangs", seconds=3)
    done = run_tool(tmp_path, "--jobs", "2")
    assert done.returncode == 1, done.stderr  # somebody survives
    report = json.loads((tmp_path / "tests/mutants/report.json").read_text())
    assert {name: entry["result"] for name, entry in report.items()} == {
        "small/triples": "killed",
        "small/squares": "survived",
        "small/hangs": "timeout",
        "small/crashes": "crashed",
    }
    assert report["small/triples"]["by"] == "test_small.py::test_double"
    assert "Of 4 bugs 3 are noticed (75.0 %)" in done.stdout
    assert (tmp_path / "folo_lib/small.py").read_text() == PACKAGE

    again = run_tool(tmp_path)  # all is known
    assert again.stdout.startswith("0 mutants") and again.returncode == 0
    (tmp_path / "tests/test_small.py").write_text(TESTS.replace("== 4", "== 5"))
    broken = run_tool(tmp_path, "--only", "triples")
    assert broken.returncode != 0 and "small/triples: 1 without it" in broken.stdout
    (tmp_path / "folo_lib/small.py").write_text("")
    gone = run_tool(tmp_path)
    assert gone.returncode != 0 and "occurs 0 times" in gone.stderr
