"""Grading in a process of its own: what passes, and what does not get through."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from folo_lib.course.autograde import grade_file, list_names

ROOT = Path(__file__).resolve().parent.parent
NAME = "apply_logit_bias"
WRONG = f"def {NAME}(logits, biases):\n    return logits.float()\n"
WRITTEN = "apply_min_p_filtering"
WALK = f"""\
import inspect, os, sys
frame = sys._getframe()
while frame:
    if "seal" in frame.f_locals:
        frame.f_locals["write"]("{NAME}", True, "Passed")
        os._exit(0)
    frame = frame.f_back
"""
CHEATS = {
    "exits with success": "raise SystemExit(0)\n",
    "exits when it is called": f"def {NAME}(logits, biases):\n    raise SystemExit(0)\n",
    "ends the process": f"import os\ndef {NAME}(logits, biases):\n    os._exit(0)\n",
    "ends the process at once": "import os\nos._exit(0)\n",
    "prints the line": f"print('Passed: {NAME}')\n"
    f'print(\'{{"name": "{NAME}", "passed": true, "message": "", "signature": ""}}\')\n'
    + WRONG,
    "replaces the module": "import sys, types\n"
    "from folo_lib.course.exercises import Verdict\n"
    "fake = types.ModuleType('fake')\n"
    f"fake.check_{NAME} = lambda solution: Verdict(True, 'Passed')\n"
    "sys.modules['folo_lib.course.exercises.sampler'] = fake\n" + WRONG,
    "replaces require": "import folo_lib.course.exercises.sampler as checks\n"
    "checks.require = lambda *args: None\n" + WRONG,
    "replaces the code of require": "from folo_lib.course import exercises\n"
    "exercises.require.__code__ = (lambda condition, message: None).__code__\n" + WRONG,
    "replaces what a verdict says": "from folo_lib.course.exercises import Verdict\n"
    "Verdict.__bool__ = lambda self: True\n"
    "Verdict.passed = property(lambda self: True)\n" + WRONG,
    "replaces a function of torch": "import torch\n"
    "torch.equal = torch.allclose = lambda *args, **kwargs: True\n" + WRONG,
    "equals everything": "class Yes:\n    __eq__ = lambda self, other: True\n"
    "    __getattr__ = lambda self, name: lambda *args, **kwargs: Yes()\n"
    f"def {NAME}(logits, biases):\n    return Yes()\n",
    "prints without end": f"def {NAME}(logits, biases):\n"
    "    while True:\n        print('Passed' * 1000)\n",
    "prints without end, deaf to signals": "import signal\n"
    f"def {NAME}(logits, biases):\n    signal.signal(signal.SIGVTALRM, signal.SIG_IGN)\n"
    "    while True:\n        print('Passed' * 1000)\n",
    "interrupts": f"def {NAME}(logits, biases):\n    raise KeyboardInterrupt\n",
    "leaves a last word": "import atexit, os\natexit.register(lambda: os._exit(0))\n"
    f"def {NAME}(logits, biases):\n    raise KeyboardInterrupt\n",
    "imports the finished one": f"from folo_lib.sampler import {WRITTEN}\n" + WRONG,
    "calls the finished one": "import folo_lib.sampler as finished\n"
    f"def {WRITTEN}(*args):\n    return finished.{WRITTEN}(*args)\n" + WRONG,
    "is a class that calls the finished one": "import folo_lib.sampler as finished\n"
    f"class {WRITTEN}:\n    def __new__(cls, *args):\n"
    f"        return finished.{WRITTEN}(*args)\n" + WRONG,
    "walks the frames": WALK + WRONG,
    "walks the frames when it is called": f"def {NAME}(logits, biases):\n"
    + "".join(f"    {line}\n" for line in WALK.splitlines()),
    "walks the frames of an error": "import os\ntry:\n    1 / 0\n"
    "except ZeroDivisionError as error:\n    frame = error.__traceback__.tb_frame\n"
    + WALK[WALK.index("while") :]
    + WRONG,
    "asks inspect for frames": WALK.replace("sys._getframe()", "inspect.currentframe()")
    + WRONG,
    "searches the memory": "import gc, os\nfor one in gc.get_objects():\n"
    "    if getattr(one, '__qualname__', '') == 'run_child.<locals>.write':\n"
    f"        one('{NAME}', True, 'Passed')\n        os._exit(0)\n" + WRONG,
    "is another name": "def apply_bias(logits, biases):\n    return logits\n",
    "is a stub": f"def {NAME}(logits, biases):\n    raise NotImplementedError\n",
    "is wrong": WRONG,
}
FEW = ("exits with success", "calls the finished one", "walks the frames")


def solution() -> str:
    text = (ROOT / "docs/solutions/07_sampler.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(blocks)


def write(folder: Path, source: str) -> Path:
    path = folder / "submission.py"
    path.write_text(source, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, id=name, marks=() if name in FEW else pytest.mark.more)
        for name, source in CHEATS.items()
    ],
)
def test_what_is_not_right_gets_nothing(source: str, tmp_path: Path) -> None:
    if "SIGVTALRM" in source and sys.platform == "win32":
        pytest.skip("Windows has no such signal")
    path = write(tmp_path, source)
    names, timeout = [NAME, WRITTEN], 12 if "SIG_IGN" in source else 25
    for verdict in grade_file(path, "sampler", names, timeout).values():
        assert not verdict.passed
        assert verdict.message.startswith("Not yet: ")


def test_a_solution_passes_and_the_command_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, solution() + "\nprint('words')\n")
    command = [sys.executable, "-m", "folo_lib.course.autograde", str(path), "sampler"]
    done = subprocess.run(
        [*command, NAME],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"Passed: {NAME}\n1 of 1 points\n")


@pytest.mark.more
def test_a_page_is_graded_by_its_definitions(tmp_path: Path) -> None:
    """What draws, fails or takes long elsewhere on the page is not run."""
    sys.path.insert(0, str(ROOT / "tools"))
    import student

    page = nbformat.read(ROOT / "notebooks/01_attention.ipynb", as_version=4)
    made = student.make_student_page(page, "01_attention.ipynb")
    cells = {cell.id: cell for cell in made.cells}
    path = tmp_path / "01_attention.ipynb"
    nbformat.write(made, path)
    names = list_names(path)
    assert names == [
        "create_causal_mask",
        "repeat_kv",
        "naive_attention",
        "create_window_mask",
        "online_attention",
    ]
    for cell in page.cells:
        if cell.id in ("repeat-kv", "create-causal-mask"):
            cells[cell.id].source = cell.source
    cells["repeat-kv-check"].source = "while True: pass"
    cells["install"].source = "from somewhere import nothing\nrepeat_kv = None"
    nbformat.write(made, path)
    verdicts = grade_file(path, "attention", names)
    assert [verdict.passed for verdict in verdicts.values()] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert verdicts["naive_attention"].message == (
        "Not yet: naive_attention is still the stub."
    )
