"""platform.py: what the machine says of its memory and compilers, and threads that take turns."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from folo_lib import platform
from folo_lib.platform import (
    MAX_CPU_KV_CACHE,
    FairLock,
    can_compile,
    get_kv_cache_memory,
    get_physical_memory,
)


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A machine of 8 GiB, and the files in which its container may have a limit."""
    pages = {"SC_PHYS_PAGES": 2**21, "SC_PAGE_SIZE": 2**12}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    limits = [tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"]
    monkeypatch.setattr(platform, "CGROUP_LIMITS", tuple(map(str, limits)))
    monkeypatch.setattr(sys, "platform", "linux")
    return limits


class TestMemory:
    def test_the_machine(self, linux: list[Path]) -> None:
        assert get_physical_memory() == 2**33
        assert get_kv_cache_memory("cpu") == 2**31
        assert get_kv_cache_memory(torch.device("mps")) == 2**31

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize(
        ("text", "memory"),
        [("max\n", 2**33), ("1073741824\n", 2**30), (f"{2**63 - 4096}\n", 2**33)],
    )
    def test_a_container(
        self, linux: list[Path], which: int, text: str, memory: int
    ) -> None:
        linux[which].write_text(text)
        assert get_physical_memory() == memory
        assert get_kv_cache_memory("cpu") == memory // 4

    def test_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def global_memory_status_ex(pointer: Any) -> int:
            status = pointer._obj
            raw = bytes(status)
            assert len(raw) == 64  # sizeof(MEMORYSTATUSEX)
            assert int.from_bytes(raw[:4], "little") == 64  # dwLength
            total = (3 * 2**30).to_bytes(8, "little")
            ctypes.memmove(ctypes.addressof(status) + 8, total, 8)  # ullTotalPhys
            return 1

        kernel32 = SimpleNamespace(GlobalMemoryStatusEx=global_memory_status_ex)
        windll = SimpleNamespace(kernel32=kernel32)
        monkeypatch.setattr(ctypes, "windll", windll, raising=False)
        monkeypatch.setattr(sys, "platform", "win32")
        assert get_physical_memory() == 3 * 2**30

    def test_a_large_machine_is_not_emptied(
        self, linux: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "sysconf", lambda name: 2**20)
        assert get_kv_cache_memory("cpu") == MAX_CPU_KV_CACHE == 4 * 2**30

    def test_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def mem_get_info(device: object) -> tuple[int, int]:
            asked.append(device)
            return 10 * 2**30, 80 * 2**30

        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        assert get_kv_cache_memory("cuda:1") == 8 * 2**30
        assert asked == ["cuda:1"]

    @pytest.mark.parametrize(
        ("share", "gib"),
        [
            (1.0, 8),  # as much as without: 10 GiB are free
            (0.5, 8),  # 40 of 80 allowed, 20 taken: 10 are free
            (0.3, 3.2),  # 24 allowed, 20 taken, 4 left
            (0.25, None),  # nothing left
        ],
    )
    def test_a_share_of_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch, share: float, gib: float | None
    ) -> None:
        """80 GiB, of which this process has 20, and others 50."""
        info = 10 * 2**30, 80 * 2**30
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: info)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * 2**30)
        if gib is None:
            with pytest.raises(ValueError, match=r"gpu_memory_utilization=0\.25 of .*"):
                get_kv_cache_memory("cuda", share)
        else:
            assert get_kv_cache_memory("cuda", share) == int(gib * 2**30)

    def test_a_share_says_nothing_without_a_gpu(self) -> None:
        assert get_kv_cache_memory("cpu", 0.01) == get_kv_cache_memory("cpu")

    def test_here(self) -> None:
        assert 2**26 < get_kv_cache_memory("cpu") <= MAX_CPU_KV_CACHE
        assert get_physical_memory() > 2**28


def start(*targets: Any) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class TestFairLock:
    def test_one_at_a_time(self) -> None:
        lock, inside, most = FairLock(), 0, 0

        def loop() -> None:
            nonlocal inside, most
            for _ in range(200):
                with lock:
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0)
                    inside -= 1

        for thread in start(*[loop] * 4):
            thread.join()
        assert (most, inside) == (1, 0)

    def test_first_come_first_served(self) -> None:
        lock, order = FairLock(), []

        def enter(name: int) -> Any:
            def run() -> None:
                with lock:
                    order.append(name)

            return run

        with lock:
            threads = []
            for name in range(8):
                threads += start(enter(name))
                wait_until(lambda n=name: len(lock._waiting) == n + 1)
        for thread in threads:
            thread.join()
        assert order == list(range(8))

    def test_a_busy_loop_lets_others_in(self) -> None:
        """Each of four loops gets its turn before anybody gets two more."""
        lock, turns = FairLock(), [0] * 4
        spread: list[int] = []
        begin = threading.Barrier(4)

        def loop(i: int) -> Any:
            def run() -> None:
                begin.wait()
                for _ in range(100):
                    with lock:
                        turns[i] += 1
                        if len(lock._waiting) == 3:
                            spread.append(max(turns) - min(turns))
                        time.sleep(1e-4)

            return run

        for thread in start(*map(loop, range(4))):
            thread.join()
        assert turns == [100] * 4
        assert len(spread) > 50
        assert max(spread[8:]) <= max(spread[:8]) + 2  # nobody falls behind

    def test_who_has_it_may_enter_again(self) -> None:
        lock, seen = FairLock(), []
        with lock:
            with lock:
                pass
            [other] = start(lambda: [seen.append("in") for _ in [lock.__enter__()]])
            time.sleep(0.02)
            assert not seen
        other.join()
        assert seen == ["in"]

    def test_an_error_inside_gives_it_back(self) -> None:
        lock = FairLock()
        with pytest.raises(ZeroDivisionError), lock:
            _ = 1 / 0
        assert lock._owner is None

    @pytest.mark.parametrize("its_turn_had_come", [False, True])
    def test_ctrl_c_while_waiting(
        self, its_turn_had_come: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It leaves the queue; or, if its turn had come, the next one gets it."""

        class Interrupted(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                if its_turn_had_come:
                    super().wait()
                raise KeyboardInterrupt

        lock, ends = FairLock(), []

        def enter() -> None:
            try:
                with lock:
                    ends.append("in")
            except KeyboardInterrupt:
                ends.append("interrupted")

        with lock:
            monkeypatch.setattr(
                platform,
                "threading",
                SimpleNamespace(Event=Interrupted, get_ident=threading.get_ident),
            )
            threads = start(enter)
            if its_turn_had_come:
                wait_until(lambda: len(lock._waiting) == 1)
            else:
                wait_until(lambda: ends == ["interrupted"])
                assert not lock._waiting
            monkeypatch.undo()
            threads += start(enter)
            wait_until(lambda: len(lock._waiting) == len(threads) - len(ends))
        for thread in threads:
            thread.join(10)
        assert ends == ["interrupted", "in"]
        assert lock._owner is None


class TestCanCompile:
    """Of a weight on a GPU, which needs no GPU to be asked about."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has gcc, Triton, and a GPU of compute capability 7.5."""
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(platform, "which", {"gcc": "/usr/bin/gcc"}.get)
        monkeypatch.setattr(platform, "find_spec", {"triton": "found"}.get)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    @staticmethod
    def make_weight(dtype: torch.dtype, is_cuda: bool = True) -> Any:
        return SimpleNamespace(dtype=dtype, is_cuda=is_cuda, device="cuda:0")

    def test_all_that_it_needs(self) -> None:
        assert can_compile(self.make_weight(torch.float32))
        assert can_compile(self.make_weight(torch.float16))
        assert not can_compile(self.make_weight(torch.float32, is_cuda=False))
        assert not can_compile(torch.zeros(1))

    def test_bfloat16_needs_a_newer_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not can_compile(self.make_weight(torch.bfloat16))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert can_compile(self.make_weight(torch.bfloat16))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
        assert not can_compile(self.make_weight(torch.float32))

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "which", lambda name: None)
        assert not can_compile(self.make_weight(torch.float32))
        monkeypatch.setattr(platform, "which", {"my-cc": "/opt/my-cc"}.get)
        assert not can_compile(self.make_weight(torch.float32))
        monkeypatch.setenv("CC", "my-cc")
        assert can_compile(self.make_weight(torch.float32))

    def test_no_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "find_spec", lambda name: None)
        assert not can_compile(self.make_weight(torch.float32))
