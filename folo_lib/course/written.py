"""What a learner wrote on a page of the student edition, compared with the finished function.

    from folo_lib.course.written import stop_unless_written

    stop_unless_written("attention", create_causal_mask)    # silent, or raises NotYet in words

A scene (`folo_lib.course.scenes`) uses the finished module as the page does. Each call of a taught
function in it is made twice, by the finished function and by the learner's on a copy of the
arguments. The first call with another result, or after which an argument is another, is named.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import enum
import functools
import importlib
import inspect
import math
import os
import random
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from folo_lib.course import scenes
from folo_lib.course.exercises import (
    NotYet,
    Verdict,
    exercise,
    is_stub,
    quiet,
    require,
)

__all__ = ["check_written", "stop_unless_written", "taught_functions"]

Function = ast.FunctionDef | ast.AsyncFunctionDef

PASSED: set[str] = set()
"""The names of what has passed since the page began."""


def stop_unless_written(topic: str, *solutions: Any) -> None:
    """Raises `NotYet`, in words, unless these do what those of `folo_lib.<topic>` do.

    Args:
        topic: the module that the page exports.
        solutions: functions and classes of the learner, under the names of the finished.
    """
    for solution in solutions:
        PASSED.discard(name_of(solution))
        check_written(topic, solution).grade()
        PASSED.add(name_of(solution))


def check_written(topic: str, solution: Any) -> Verdict:
    """The verdict on one function or class."""

    @exercise
    def check(solution: Any) -> None:
        compare(topic, solution)

    verdict = check(solution)
    # A kernel of Triton has no name of its own.
    return Verdict(
        verdict.passed, verdict.message.replace("JITFunction", name_of(solution))
    )


def taught_functions(source: str) -> dict[str, Function]:
    """The functions and methods of a cell that a student writes, by qualified name."""
    return dict(_visit(ast.parse(source).body, ""))


def _visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _visit(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, Function):
            special = node.name.startswith("__") and node.name.endswith("__")
            first = ast.unparse(node.body[1]) if len(node.body) > 1 else "..."
            empty = first == "..." or first.startswith("raise NotImplementedError")
            if ast.get_docstring(node) and not special and not empty:
                yield f"{prefix}{node.name}", node


# Comparing


class _Found(BaseException):
    """Leaves a scene, through whatever the engine catches."""


class Session:
    """One scene: what is compared in it, and the first difference."""

    def __init__(self) -> None:
        self.problem: Exception | None = None
        self.counts: dict[str, int] = {}
        self.busy = False
        self.name = ""  # of the one that is compared

    def spy(self, name: str, finished: Any, solution: Any) -> Callable[..., Any]:
        """The finished function; the first call that the solution answers otherwise ends all."""

        @functools.wraps(finished)
        def both(*args: Any, **kwargs: Any) -> Any:
            if self.busy:  # called by the solution
                if self.name == name and is_called_by(solution):
                    raise NotYet(f"it calls the finished {name} of folo_lib.")
                return finished(*args, **kwargs)
            self.counts[name] = self.counts.get(name, 0) + 1
            given = describe_call(name, args, kwargs)
            memo = {id(thing): thing for thing in scenes.SHARED}
            theirs = copy.deepcopy((args, kwargs), memo)
            wanted, raised = outcome(finished, args, kwargs)
            self.busy, self.name = True, name
            try:
                if isinstance(wanted, AbstractContextManager):
                    compare_contexts(given, finished, solution, theirs)
                else:
                    got = outcome(solution, *theirs)
                    compare_outcomes(given, got, (wanted, raised))
                    compare_arguments(given, finished, theirs, (args, kwargs))
            except Exception as problem:
                self.problem = problem
                raise _Found from None
            finally:
                self.busy = False
            if raised is not None:
                raise raised
            return iter(wanted) if inspect.isgeneratorfunction(finished) else wanted

        return both


def is_called_by(solution: Any) -> bool:
    """Whether the caller of the function that asks is a line of the solution's own file."""
    parts = [solution, *(vars(solution).values() if inspect.isclass(solution) else ())]
    codes = [getattr(inspect.unwrap(part), "__code__", None) for part in parts]
    file = sys._getframe(2).f_code.co_filename
    return any(code is not None and code.co_filename == file for code in codes)


def outcome(function: Any, args: Any, kwargs: Any) -> tuple[Any, BaseException | None]:
    """What a call returns (a list, if it yields), and what it raises."""
    try:
        result = function(*args, **kwargs)
        return (list(result) if inspect.isgenerator(result) else result), None
    except (NotYet, _Found):
        raise
    except (Exception, SystemExit) as error:
        return None, error


def compare_outcomes(
    given: str,
    got: tuple[Any, BaseException | None],
    wanted: tuple[Any, BaseException | None],
) -> None:
    (result, error), (expected, raised) = got, wanted
    if error is not None and raised is None:
        if not is_stub(error) and isinstance(error, Exception):
            error.add_note(f"It was called as {given}.")
        raise error
    if raised is not None:
        kind = type(raised).__name__
        if error is None:
            returned = f"it returned {brief(result)}; wanted is a {kind}"
            raise NotYet(f"for {given} {returned} ({_first_line(raised)}).")
        if is_stub(error) and not isinstance(raised, NotImplementedError):
            raise error
        require(
            isinstance(error, Exception) and type(error).__name__ == kind,
            f"for {given} it raised {type(error).__name__} ({_first_line(error)}); "
            f"wanted is a {kind} ({_first_line(raised)}).",
        )
        return
    found = difference(result, expected, "")
    if found is not None:
        where, is_, should = found
        place = f"at {where} of its result" if where else "it returned"
        there = f"{place} is {is_}" if where else f"{place} {is_}"
        raise NotYet(f"for {given} {there}; wanted is {should}.")


def compare_contexts(given: str, finished: Any, solution: Any, call: Any) -> None:
    """Two context managers, when all goes well in them and when Ctrl-C comes."""

    def use(function: Any, args: Any, kwargs: Any, interrupt: bool) -> str:
        try:
            with function(*args, **kwargs):
                if interrupt:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return "KeyboardInterrupt passed on"
        return "nothing raised"

    for interrupt in (False, True):
        memo = {id(thing): thing for thing in scenes.SHARED}
        ours, theirs = (copy.deepcopy(call, dict(memo)) for _ in range(2))
        when = f"{given}, when Ctrl-C comes in it," if interrupt else given
        wanted = outcome(use, (finished, *ours, interrupt), {})
        got = outcome(use, (solution, *theirs, interrupt), {})
        compare_outcomes(when, got, wanted)
        compare_arguments(when, finished, theirs, ours)


def compare_arguments(given: str, finished: Any, theirs: Any, ours: Any) -> None:
    """What a call has left of its arguments; a fresh copy of them was given to each."""
    try:
        named = inspect.signature(finished).bind(*ours[0], **ours[1]).arguments
        got = inspect.signature(finished).bind(*theirs[0], **theirs[1]).arguments
    except TypeError:
        return
    for name, wanted in named.items():
        found = difference(got[name], wanted, name)
        if found is not None:
            where, is_, should = found
            raise NotYet(f"after {given} {where} is {is_}; wanted is {should}.")


def difference(
    got: Any, wanted: Any, path: str, seen: set[tuple[int, int]] | None = None
) -> tuple[str, str, str] | None:
    """Where two values differ first, and what stands there; None if they are equal."""
    seen = set() if seen is None else seen
    if got is wanted or (id(got), id(wanted)) in seen:
        return None
    seen.add((id(got), id(wanted)))
    other = path, brief(got), brief(wanted)
    if isinstance(wanted, Tensor):
        return _tensor_difference(got, wanted, path)
    if isinstance(wanted, enum.Enum):
        same = isinstance(got, enum.Enum) and got.name == wanted.name
        return None if same else other
    if isinstance(wanted, int | float) and not isinstance(got, Tensor):
        if not isinstance(got, int | float):
            return other
        close = math.isclose(got, wanted, rel_tol=1e-5, abs_tol=1e-9)
        return None if close or got != got != wanted != wanted else other
    if isinstance(wanted, str | bytes | torch.dtype | torch.device) or wanted is None:
        return None if got == wanted else other
    if isinstance(wanted, Mapping):
        if not isinstance(got, Mapping):
            return other
        if set(got) == set(wanted):
            keys = [(key, key) for key in wanted]
        elif len(got) == len(wanted):  # copies of requests, say, in their order
            keys = list(zip(got, wanted, strict=True))
        else:
            keys = []
        if len(keys) < len(wanted) or any(difference(*pair, "") for pair in keys):
            return (
                path,
                f"a dict of {brief(list(got))}",
                f"one of {brief(list(wanted))}",
            )
        pairs = ((f"{path}[{brief(b)}]", got[a], wanted[b]) for a, b in keys)
        return _first(pairs, seen)
    if isinstance(wanted, Sequence | deque):
        if not isinstance(got, Sequence | deque) or len(got) != len(wanted):
            return other
        pairs = (
            (f"{path}[{i}]", a, b)
            for i, (a, b) in enumerate(zip(got, wanted, strict=True))
        )
        return _first(pairs, seen)
    if isinstance(wanted, Set):
        return None if got == wanted else other
    plain_callable = inspect.isroutine(wanted) or isinstance(wanted, type)
    if plain_callable or not hasattr(wanted, "__dict__"):
        return None if type(got).__name__ == type(wanted).__name__ else other
    if type(got).__name__ != type(wanted).__name__:
        return other
    ours, theirs = vars(wanted), vars(got)
    pairs = (
        (f"{path}.{key}".lstrip("."), theirs.get(key), ours[key])
        for key in ours
        if key in theirs or ours[key] is not None
    )
    return _first(pairs, seen)


def _first(
    pairs: Iterable[tuple[str, Any, Any]], seen: set[tuple[int, int]]
) -> tuple[str, str, str] | None:
    found = (difference(got, wanted, path, seen) for path, got, wanted in pairs)
    return next((one for one in found if one is not None), None)


def _tensor_difference(
    got: Any, wanted: Tensor, path: str
) -> tuple[str, str, str] | None:
    if not isinstance(got, Tensor):
        return path, brief(got), brief(wanted)
    same = got.shape == wanted.shape and got.dtype == wanted.dtype
    if not same or got.is_meta != wanted.is_meta:
        return path, tensor_form(got), tensor_form(wanted)
    if got.is_meta or not wanted.numel():
        return None
    got, wanted = got.detach().cpu(), wanted.detach().cpu()
    small = wanted.dtype in (torch.float16, torch.bfloat16)
    rtol, atol = (2e-2, 2e-2) if small else (1e-4, 1e-5)
    close = torch.isclose(got, wanted, rtol=rtol, atol=atol, equal_nan=True)
    if close.all():
        return None
    place = tuple((~close).nonzero()[0].tolist()) if wanted.dim() else ()
    where = f"{path}{list(place)}" if place else path
    values = (f"{x[place].item():.6g}" for x in (got.double(), wanted.double()))
    return (where or "its only place", *values)  # type: ignore[return-value]


def tensor_form(x: Tensor) -> str:
    """Such as "a float32 tensor [2, 3]"."""
    return f"a {str(x.dtype).removeprefix('torch.')} tensor {list(x.shape)}"


def brief(x: Any) -> str:
    """A value in a few words."""
    if isinstance(x, Tensor):
        few = x.dim() <= 1 and x.numel() <= 8 and not x.is_meta
        return f"tensor({x.tolist()})" if few else tensor_form(x)
    if isinstance(x, torch.dtype):
        return str(x).removeprefix("torch.")
    if isinstance(x, list | tuple):
        inner = ", ".join(map(brief, x[:6])) + (", ..." if len(x) > 6 else "")
        return f"({inner})" if isinstance(x, tuple) else f"[{inner}]"
    if hasattr(x, "sample_id"):
        return f"request {x.sample_id!r}"
    plain = x is None or isinstance(x, int | float | str | bytes | dict | set | range)
    if plain or isinstance(x, enum.Enum):
        return _short(x)
    if isinstance(x, type) or callable(x):
        return getattr(x, "__name__", type(x).__name__)
    return f"a {type(x).__name__}"


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def describe_call(name: str, args: Any, kwargs: Any) -> str:
    """Such as "create_causal_mask(2, 6)"."""
    shown = [brief(x) for x in args[1 if "." in name else 0 :]]
    shown += [f"{key}={brief(x)}" for key, x in kwargs.items()]
    return f"{name}({', '.join(shown)})"


def _first_line(error: BaseException) -> str:
    return (str(error).split("\n") or [""])[0][:160]


# Patching the finished module


def compare(topic: str, solution: Any) -> Session:
    """Runs the scene of a page; raises what the first difference calls for."""
    try:
        module = importlib.import_module(f"folo_lib.{topic}")
    except ImportError:  # of pages 13 and 15, where there is no Triton
        require_no_stub(solution)
        return Session()
    name = name_of(solution)
    require(
        hasattr(module, name),
        f"folo_lib.{topic} has nothing of that name. Keep the name of the page.",
    )
    finished, session = getattr(module, name), Session()
    if inspect.isclass(solution) and inspect.isfunction(finished):
        raise NotYet(f"{name} is a class; the page asks for a function.")
    if find_kernel(finished) is not None:
        compare_kernels(module, name, solution)
        return session
    scene = getattr(scenes, topic)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        state = random.getstate()
        stack.callback(random.setstate, state)
        stack.enter_context(quiet())
        # Both calls are made at the same time.
        stack.enter_context(mock.patch.object(time, "perf_counter", lambda: 0.5))
        for owner, key, spied in find_spies(module, finished, solution, session):
            _replace(stack, owner, key, spied)
        torch.manual_seed(0)
        stack.callback(scenes.SHARED.clear)
        lend_names(stack, module, solution)
        with contextlib.suppress(_Found):
            scene(module)
    if session.problem is not None:
        raise session.problem
    return session


def name_of(x: Any) -> str:
    """Of a function, a class, or a kernel of Triton."""
    inner = getattr(x, "fn", getattr(x, "function", x))
    return str(getattr(inner, "__name__", type(x).__name__))


def find_kernel(x: Any) -> Any:
    """The Python function of a Triton kernel, or of its stand-in; None for anything else."""
    if is_stand_in(x):
        return x.function
    return getattr(x, "fn", None) if hasattr(x, "arg_names") else None


def is_stand_in(x: Any) -> bool:
    """Of `folo_lib.course.triton_setup`, which needs IPython, and this does not."""
    return type(x).__module__ == "folo_lib.course.triton_setup"


def compare_kernels(module: Any, name: str, solution: Any) -> None:
    """What a kernel gives in Triton's interpreter; where that is missing, its source alone."""
    kernel = find_kernel(solution)
    require(kernel is not None, "it is no Triton kernel: keep @triton.jit above it.")
    require_no_stub(kernel)
    if is_stand_in(solution) or not os.environ.get("TRITON_INTERPRET"):
        return
    from folo_lib.course import kernel_scenes

    finished, scene = getattr(module, name), getattr(kernel_scenes, _topic(module))
    wanted = scene(name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        for place in (module, kernel_scenes):
            if vars(place).get(name) is finished:
                _replace(stack, place, name, solution)
        got = scene(name)
    found = difference(got, wanted, "")
    if found is not None:
        where, is_, should = found
        raise NotYet(
            f"what comes out of a kernel that uses it is wrong: at {where} it is {is_}; "
            f"wanted is {should}."
        )


def require_no_stub(solution: Any) -> None:
    """Looks for a stub's line in the source; nothing is run."""
    solution = find_kernel(solution) or solution
    for line in textwrap.dedent(inspect.getsource(solution)).split("\n"):
        if line.strip().startswith("raise NotImplementedError"):
            raise NotImplementedError(f"write {name_of(solution)}")


def _topic(module: Any) -> str:
    return str(module.__name__).rpartition(".")[2]


def find_spies(
    module: Any, finished: Any, solution: Any, session: Session
) -> Iterator[tuple[Any, str, Any]]:
    """Where to put which spies: owner, attribute, spy."""
    if find_kernel(finished) is not None:
        return
    if not isinstance(finished, type):
        require(callable(solution), f"it is a {type(solution).__name__}, no function.")
        name = name_of(finished)
        spied = session.spy(name, finished, solution)
        for place in [module, *_modules()]:
            for key, value in list(vars(place).items()):
                if value is finished:
                    yield place, key, spied
        return
    require(isinstance(solution, type), "it is no class.")
    source = textwrap.dedent(inspect.getsource(finished))
    for name in taught_functions(source):
        key = name.rpartition(".")[2]
        ours, theirs = vars(finished)[key], vars(solution).get(key)
        require(theirs is not None, f"{name} is missing.")
        if not isinstance(theirs, type(ours)):
            raise NotYet(
                f"{name} is a {type(theirs).__name__}; wanted is a "
                f"{type(ours).__name__}, as in the page's first line of it."
            )
        yield finished, key, _wrap(name, ours, theirs, session)


def _wrap(name: str, ours: Any, theirs: Any, session: Session) -> Any:
    """A spy of the kind that the attribute is."""
    if isinstance(ours, property):
        return property(session.spy(name, ours.fget, theirs.fget))
    if isinstance(ours, functools.cached_property):
        return property(session.spy(name, ours.func, theirs.func))
    if isinstance(ours, staticmethod):
        return staticmethod(session.spy(name, ours.__func__, theirs.__func__))
    return session.spy(name, ours, theirs)


def _modules() -> list[Any]:
    """The modules of the package; not those of the course, which hold references."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("folo_lib.") and not name.startswith("folo_lib.course")
    ]


def lend_names(stack: contextlib.ExitStack, module: Any, solution: Any) -> None:
    """What the page defines only later is the finished one's meanwhile."""
    parts = (
        [solution, *vars(solution).values()]
        if isinstance(solution, type)
        else [solution]
    )
    spaces = {}
    for part in parts:
        part = getattr(part, "fget", getattr(part, "func", part))
        part = inspect.unwrap(part) if callable(part) else part
        part = getattr(part, "__func__", part)
        if inspect.isfunction(part):
            spaces[id(part.__globals__)] = part.__globals__
    for space in spaces.values():
        for name, value in vars(module).items():
            if name not in space and not name.startswith("__"):
                space[name] = value
                stack.callback(space.pop, name, None)


def _replace(stack: contextlib.ExitStack, owner: Any, key: str, value: Any) -> None:
    stack.callback(setattr, owner, key, vars(owner)[key])
    setattr(owner, key, value)
