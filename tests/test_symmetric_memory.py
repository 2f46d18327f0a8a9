"""When a group of GPUs ends, told by a stand-in for `torch.distributed`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux")

from folo_lib import symmetric_memory as module
from folo_lib.symmetric_memory import SymmetricGroup

CPU = torch.device("cpu")


class Distributed:
    """Notes when a default group begins and ends."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.group = SimpleNamespace(WORLD=None)

    def is_initialized(self) -> bool:
        return self.log[-1:] == ["begin"]

    def init_process_group(self, *_: Any, **__: Any) -> None:
        assert not self.is_initialized()
        self.log.append("begin")
        self.group.WORLD = SimpleNamespace(group_name=str(len(self.log)))

    def destroy_process_group(self) -> None:
        assert self.is_initialized()
        self.log.append("end")

    def __getattr__(self, name: str) -> Any:
        assert name in ("FileStore", "barrier")
        return lambda *_, **__: None


@pytest.fixture(autouse=True)
def distributed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Distributed]:
    fake, stream = Distributed(), SimpleNamespace(query=lambda: True)
    monkeypatch.setattr(module, "dist", fake)
    monkeypatch.setattr(module, "ABANDONED", [])
    monkeypatch.setattr(module, "naming_lost_rank", nullcontext)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(
        SymmetricGroup, "allocate", lambda *shape, dtype, fill=0: torch.full((1,), fill)
    )
    monkeypatch.setattr(SymmetricGroup, "find_addresses", lambda *_: [0])
    yield fake


def connect() -> SymmetricGroup:
    group = SymmetricGroup(0, 2, "store", torch.device("cuda"))
    group.device = CPU
    group.connect()
    return group


def test_an_abandoned_group_is_ended_by_the_next_one(distributed: Distributed) -> None:
    """And not by the collection that finds it, which frees graphs later than it tells of it.

    Holding itself, it looks like the group of an engine.
    """
    group: Any = connect()
    group.itself = group
    del group
    gc.collect()
    assert distributed.log == ["begin"]
    second = connect()
    assert distributed.log == ["begin", "end", "begin"]
    second.close()
    second.close()
    assert distributed.log == ["begin", "end"] * 2
    del second
    gc.collect()
    assert module.ABANDONED == []


def test_a_group_that_is_held_stays(distributed: Distributed) -> None:
    group = connect()
    with pytest.raises(ValueError, match="end that first"):
        connect()
    assert distributed.log == ["begin"]
    group.close()


def test_a_group_after_one_that_somebody_else_has_ended(
    distributed: Distributed,
) -> None:
    connect()
    gc.collect()
    module.leave(CPU)
    group = connect()
    with pytest.raises(ValueError, match="end that first"):
        connect()
    assert distributed.log == ["begin", "end", "begin"]
    group.close()


def test_the_group_of_somebody_else_stays(distributed: Distributed) -> None:
    connect()
    gc.collect()
    module.leave(CPU)
    distributed.init_process_group()
    with pytest.raises(ValueError, match="end that first"):
        connect()
    assert distributed.log == ["begin", "end", "begin"]


def test_a_group_whose_card_is_busy_cannot_be_ended(
    distributed: Distributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect()
    gc.collect()
    stream = SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    with pytest.raises(ValueError, match="end that first"):
        connect()
    assert distributed.log == ["begin"]


def test_a_group_that_never_connected_has_nothing_to_end(
    distributed: Distributed,
) -> None:
    SymmetricGroup(0, 2, "store", torch.device("cuda")).close()
    gc.collect()
    assert distributed.log == module.ABANDONED == []
