"""One thread, one seed, the same examples; Triton's interpreter without a GPU, and no chatter."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from folo_lib.course.interpreter import make_interpreter_quick

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
# The same examples each time, so that a change and not luck turns a test red. Others are tried
# where somebody asks for them: FOLO_EXPLORE=1.
hypothesis.settings.register_profile("steady", derandomize=True)
if "FOLO_EXPLORE" not in os.environ:
    hypothesis.settings.load_profile("steady")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What tests import is no garbage: no collection looks through it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        make_interpreter_quick()
        gc.freeze()
        gc.enable()


@pytest.fixture
def young_garbage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A measurement collects garbage first: here what is new, not all that tests import."""
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: collect(1))
    yield
    gc.freeze()  # which the measurement has undone


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
