"""Triton's interpreter, several times as fast: what it does again and again is done once.

    from folo_lib.course.interpreter import make_interpreter_quick

    make_interpreter_quick()    # once Triton is imported, with TRITON_INTERPRET set

What kernels compute stays the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

__all__ = ["make_interpreter_quick"]

# Of Triton 3.6 to 3.9.
PARTS = (
    "_LangPatchScope",
    "_get_np_dtype",
    "_patch_lang",
    "ReduceOps",
    "interpreter_builder",
    "tl",
)


def make_interpreter_quick() -> None:
    """Changes the interpreter of this process, if there is one and it is not changed yet.

    An interpreter of other parts, of another version of Triton, stays as it is.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if hasattr(interpreter, "is_quick"):
        return
    if not all(hasattr(interpreter, name) for name in PARTS):
        return
    interpreter.is_quick = True
    interpreter._patch_lang = patch_once(interpreter)
    interpreter._get_np_dtype = remember_by_name(interpreter._get_np_dtype)
    reduce = interpreter.ReduceOps
    reduce.generic_reduce = reduce_whole_slices(reduce.generic_reduce)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # without it, what checks of overflow find is dropped
        builder.options = replace(builder.options, sanitize_overflow=False)


def patch_once(interpreter: Any) -> Callable[[Any], Any]:
    """Has a launch replace Triton's functions once.

    The interpreter looks through Triton's modules for what it has to replace when a kernel
    starts, and again whenever that calls a function, be it `tl.sum` or `tl.cdiv`.
    """
    patch, language = interpreter._patch_lang, interpreter.tl
    done: set[Any] = set()  # modules, and the functions that see no others

    def patch_what_is_new(function: Any) -> Any:
        nothing = interpreter._LangPatchScope()
        if function in done:
            return nothing
        done.add(function)
        names = function.__globals__.values()
        modules = language, language.core
        found = {one for one in modules if any(one is value for value in names)}
        if found <= done:
            return nothing
        scope = patch(function)
        done.update(found)
        restore = scope.restore

        def restore_all() -> None:
            restore()
            done.clear()

        scope.restore = restore_all
        return scope

    return patch_what_is_new


def remember_by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's type for one of Triton's, which is otherwise looked up in a table made anew."""
    known: dict[str, Any] = {}

    def find_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    return find_once


def reduce_whole_slices(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Has `tl.reduce` combine slices, and not one number with another."""

    def reduce_slices(self: Any, input: Sequence[Any]) -> Any:
        if self.axis is None or self.keep_dims:
            return reduce(self, input)
        size = input[0].handle.data.shape[self.axis]
        total: Any = None
        for i in range(size):
            parts = [
                self.to_tensor(one.handle.data.take(i, self.axis), one.dtype)
                for one in input
            ]
            total = parts if total is None else self.combine_fn.fn(*total, *parts)
            total = total if isinstance(total, tuple | list) else [total]
        return total

    return reduce_slices
