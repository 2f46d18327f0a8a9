"""What the machine offers: devices, memory for the cache, compilers, a lock taken in turn."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from types import TracebackType

import torch
from torch import Tensor

__all__ = [
    "FairLock",
    "can_compile",
    "check_devices",
    "get_kv_cache_memory",
    "get_physical_memory",
    "hold_interrupts",
    "resolve_device",
]

CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
MAX_CPU_KV_CACHE = 4 * 2**30
GPU_MEMORY_SHARE = 0.8


def get_physical_memory() -> int:
    """Bytes of main memory: the machine's, or its container's limit if smaller."""
    if sys.platform == "win32":
        import ctypes

        # MEMORYSTATUSEX: its own size first, then seven more numbers of 8 bytes.
        status = (ctypes.c_ulonglong * 8)(64)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status[1])
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, CGROUP_LIMITS):
        limit = path.read_text().strip() if path.is_file() else "max"
        limits += [int(limit)] if limit.isdigit() else []
    return min(limits)


def get_kv_cache_memory(
    device: torch.device | str, utilization: float | None = None
) -> int:
    """Bytes to set aside for the KV cache unless told otherwise; ask after loading.

    Args:
        device: CUDA: `GPU_MEMORY_SHARE` of what is free now. Otherwise a quarter of the main
            memory, at most `MAX_CPU_KV_CACHE`.
        utilization: share of the whole GPU memory that this process may use; None: all that
            is free. What a step computes takes its part of it too, so here as well the cache
            gets `GPU_MEMORY_SHARE` of what is left.

    Raises:
        ValueError: if nothing of that share is left.
    """
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if utilization is not None:
            allowed = int(total * utilization)
            taken = torch.cuda.memory_reserved(device)
            if allowed <= taken:
                raise ValueError(
                    f"gpu_memory_utilization={utilization} of the GPU's {total:,} bytes is "
                    f"{allowed:,}, and {taken:,} are taken already, by the model among "
                    "others: raise it, or take a smaller model or dtype."
                )
            free = min(free, allowed - taken)
        return int(free * GPU_MEMORY_SHARE)
    return min(get_physical_memory() // 4, MAX_CPU_KV_CACHE)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """`"auto"` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: if the device has no such name, or is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = torch.device("meta")
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if resolved.type not in here:
        raise ValueError(
            f"unknown device {device!r}: use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        )
    if not 0 <= (resolved.index or 0) < here[resolved.type]:
        raise ValueError(
            f"device {device!r} is not on this machine, which has {here}: use 'auto'."
        )
    return resolved


def check_devices(device: torch.device, size: int) -> None:
    """Whether a model can be shared by that many devices of this kind.

    Args:
        device: the first of them.
        size: how many; on a CPU they are processes, as many as you like.

    Raises:
        ValueError: if there are fewer, or they cannot speak to each other.
    """
    if not torch.distributed.is_available():
        raise ValueError(
            f"tensor_parallel_size={size} needs torch.distributed, which this PyTorch was "
            "built without: install another build, or leave the size at 1."
        )
    if device.type == "mps":
        raise ValueError(
            f"tensor_parallel_size={size} needs several devices, and there is one 'mps': "
            "take device='cpu', or leave the size at 1."
        )
    if device.index is not None and device.type == "cuda":
        raise ValueError(
            f"tensor_parallel_size={size} takes the first {size} GPUs, and device='{device}' "
            "is one: write device='cuda', and choose with CUDA_VISIBLE_DEVICES."
        )
    if device.type == "cuda" and size > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel_size={size} is more than the {torch.cuda.device_count()} GPUs of "
            "this machine: take no more than there are."
        )


def can_compile(weight: Tensor) -> bool:
    """Whether there are Triton, a C compiler and a GPU that is new enough for both.

    Args:
        weight: of the model, on its device and in its dtype.
    """
    compilers = os.environ.get("CC"), "cc", "gcc", "clang"
    has_compiler = any(which(name) for name in compilers if name)
    if not weight.is_cuda or not has_compiler or find_spec("triton") is None:
        return False
    oldest = (8, 0) if weight.dtype == torch.bfloat16 else (7, 0)
    return torch.cuda.get_device_capability(weight.device) >= oldest


@contextmanager
def hold_interrupts(give_up: Callable[[], None]) -> Iterator[None]:
    """Lets Ctrl-C wait until the block ends; the second one calls `give_up`.

    For what several processes do together, and must not leave halfway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread gets Ctrl-C
        return
    presses: list[int] = []

    def hold(number: int, _: object) -> None:
        presses.append(number)
        if len(presses) > 1:
            give_up()

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if presses:
            signal.raise_signal(signal.SIGINT)


class FairLock:
    """A lock that threads get in the order in which they asked; who has it may enter again.

    `threading.Lock` promises no order. A loop that lets it go and asks again at once may get it
    before a thread that has to wake up first, again and again.
    """

    def __init__(self) -> None:
        self._guard = threading.RLock()  # of what follows, held for an instant only
        self._waiting: deque[tuple[int, threading.Event]] = deque()
        self._owner: int | None = None  # a thread
        self._depth = 0  # how many times it has entered

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._guard:
            if self._owner in (None, thread):
                self._owner, self._depth = thread, self._depth + 1
                return
            turn = threading.Event()
            self._waiting.append((thread, turn))
        try:
            turn.wait()
        except (
            BaseException
        ):  # Ctrl-C: it leaves the queue, or passes on what it just got
            with self._guard:
                if turn.is_set():
                    self._pass_on()
                else:
                    self._waiting.remove((thread, turn))
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._guard:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                if self._waiting:
                    self._pass_on()

    def _pass_on(self) -> None:
        self._owner, self._depth = None, 0
        if self._waiting:
            self._owner, turn = self._waiting.popleft()
            self._depth = 1
            turn.set()
