"""The examples in the docstrings of the public names, and of the package itself, are run."""

from __future__ import annotations

import doctest
import warnings
from typing import Any

import pytest

import folo_lib

NAMES = [name for name in folo_lib.__all__ if name != "__version__"]


@pytest.fixture(autouse=True)
def bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that the examples mean."""
    monkeypatch.delenv("FOLO_MODEL", raising=False)


def run(name: str, docstring: str) -> doctest.TestResults:
    """Runs an example as a reader would, who has typed nothing before it."""
    test = doctest.DocTestParser().get_doctest(docstring, {}, name, None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL * 0)
    found: list[str] = []
    runner.run(test, out=found.append)
    assert not runner.failures, "".join(found)
    return doctest.TestResults(runner.failures, runner.tries)


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_an_example_that_runs(name: str) -> None:
    shown: Any = getattr(folo_lib, name)
    assert run(name, shown.__doc__).attempted >= 2


def test_the_package_begins_with_an_example() -> None:
    assert folo_lib.__doc__ is not None
    title, blank, heading, first, *_ = folo_lib.__doc__.splitlines()
    assert title and not blank
    assert heading == "Example:"
    assert first.strip().startswith(">>> from folo_lib import")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("folo_lib", folo_lib.__doc__).attempted >= 4


def test_a_wrong_example_is_noticed() -> None:
    with pytest.raises(AssertionError, match="Expected"):
        run("wrong", ">>> 1 + 1\n3\n")
