"""Triton on a page: interpreted, so that no GPU is needed, or a stand-in where it is missing.

    from folo_lib.course.triton_setup import prepare_triton

    prepare_triton()    # before `import triton`

Afterwards a cell that begins with `%%triton` runs if Triton is installed, and else prints one
sentence. Cells that only define kernels need no mark: the stand-in takes them as they are.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from IPython.core.getipython import get_ipython

from .interpreter import make_interpreter_quick

__all__ = ["Kernel", "prepare_triton"]

MISSING = "Triton is not installed here, so this cell was not run."


class Kernel:
    """What `triton.jit` makes of a function where Triton is missing: a name that cannot run."""

    def __init__(self, function: Any = None, **_: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **_: Any) -> Any:
        if self.function is None:  # @triton.jit(...) with options
            return Kernel(*args)
        raise ImportError(MISSING)

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(MISSING)


class Constexpr:
    """What stands in the head of a kernel, or above it: a number that is known early."""

    def __init__(self, value: Any) -> None:
        self.value = value


def make_stand_in() -> dict[str, ModuleType]:
    """Modules of Triton's names: kernels can be defined, and not run."""
    names = "triton", "triton.language", "triton.language.extra"
    package, language, *rest = made = [
        ModuleType(name) for name in (*names, "triton.language.extra.cuda")
    ]
    for module in made:
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.__path__ = []
    vars(package).update(jit=Kernel, language=language)
    vars(language)["constexpr"] = Constexpr
    gates = {"gdc_launch_dependents": Kernel(), "gdc_wait": Kernel()}
    vars(rest[-1]).update(gates)
    return {module.__name__: module for module in made}


def lend_stand_in(shell: Any) -> None:
    """Lets cells import the stand-in, and nobody else: PyTorch would try to use it."""
    import_module("torch._dynamo")  # looks for Triton, and had better not find this
    stand_in = make_stand_in()

    def show(info: Any) -> None:
        if "import triton" in (info.raw_cell or ""):
            sys.modules.update(stand_in)

    def hide(_: Any) -> None:
        for name in stand_in:
            sys.modules.pop(name, None)

    shell.events.register("pre_run_cell", show)
    shell.events.register("post_run_cell", hide)


def prepare_triton() -> None:
    """Sets Triton's interpreter, or lends a stand-in where it is missing; prints which.

    Raises:
        RuntimeError: if Triton was imported before, when it is too late to choose.
    """
    shell: Any = get_ipython()
    has_triton = find_spec("triton") is not None
    if "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("Triton is loaded already: restart the kernel of this page.")
    if has_triton:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
        import triton

        make_interpreter_quick()
        print(f"Triton {triton.__version__.split('+')[0]}, interpreted")
    else:
        lend_stand_in(shell)
        print("Triton is not installed: kernels are shown and not run.")

    def run_cell(_: str, cell: str) -> None:
        if has_triton:
            shell.run_cell(cell).raise_error()
        else:
            print(MISSING)

    shell.register_magic_function(run_cell, "cell", "triton")
