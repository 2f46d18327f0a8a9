"""Sums over the GPUs of one host, in memory that all of them can read and write.

NCCL, PyTorch's library for what several GPUs do together, is made for long messages. PyTorch's
symmetric memory is quicker where they are short: each GPU maps the buffers of all others into its
own address space. Two ways are used here, neither with NVLink multicast:

- One kernel, for short messages: it writes this rank's part into the memory of all others, and
  adds up theirs as they come; see `ticket_sums.py`.
- Two shots, a kernel of PyTorch's: every rank adds a part of its own, and writes that part into
  all buffers. Each reads less, and waits one time more.

What PyTorch's kernel promises (read in its source, `CUDASymmetricMemoryOps.cu`): a block waits at
the begin until the blocks of its number have begun on all ranks, by when everything that was
launched before has ended there, and at the end until they have read. So after the kernel a rank
may overwrite its buffer: no peer reads it any more. One buffer serves all sums that follow one
another on one stream, and a graph can be replayed as often as wanted. All ranks add in the order
of the ranks, so all have the same bits. In two shots bfloat16 is rounded after each addition, in
one kernel once; with two ranks that is the same.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .tensor_parallel import CONNECT_SECONDS, RankGroup, naming_lost_rank

__all__ = ["METHODS", "SharedGroup", "SymmetricGroup"]

METHODS = "one_kernel", "two_shot", "nccl"
# Up to how many bytes the first two are the quickest, by rule, so that every start adds alike.
# Measured by the benchmark's section `tensor_parallel`.
ONE_KERNEL_BYTES = 2**20
TWO_SHOT_BYTES = 8 * 2**20
DTYPES = (torch.bfloat16, torch.float32)  # that both add
PROGRAM_WORDS = (
    512  # of four bytes, that a program adds up; few enough for all to run at once
)


class SharedGroup(RankGroup, Protocol):
    """Ranks that can read and write each other's memory; `SymmetricGroup` has them.

    Their `all_reduce` leaves its argument as it is.
    """

    def allocate(self, *shape: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
        """A tensor full of that number, which all ranks can read; all call it together."""
        ...

    def find_addresses(self, shared: Tensor) -> list[int]:
        """Where a kernel here finds what `allocate` gave each rank at the same time."""
        ...


CONNECTED: weakref.WeakValueDictionary[int, SymmetricGroup] = (
    weakref.WeakValueDictionary()
)
"""The groups of this process; a compiled layer knows its own by a number."""


ABANDONED: list[Any] = []
"""PyTorch's groups of those of ours that nobody holds any more.

NCCL ends only after all graphs that have its kernels. Where Python collects an engine, it tells of
the group before it frees the graphs, so a group that ended then would wait for them for ever. The
next group ends it.
"""


def leave(device: torch.device) -> None:
    """Ends this process's part of PyTorch's default group.

    A sum that waits for a rank which is gone never ends, and nothing that waits for it would; then
    the group is left as it is until the process ends.
    """
    if dist.is_initialized() and torch.cuda.current_stream(device).query():
        dist.destroy_process_group()


class SymmetricGroup:
    """Ranks on GPUs of one host; see `RankGroup`.

    Short sums go through symmetric memory, others and gathers through NCCL. A process has one
    such group at a time, as it is PyTorch's default one. It stays that until the next one connects,
    or until somebody closes it or calls `leave`.

    Attributes:
        buffer: that all ranks can read.
    """

    numbers = itertools.count()

    def __init__(self, rank: int, size: int, store: str, device: torch.device) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.device = torch.device("cuda", rank)
        self.number = next(self.numbers)
        self.end: weakref.finalize[Any, SymmetricGroup] | None = None
        self.addresses: dict[int, list[int]] = {}  # of what `allocate` gave
        CONNECTED[self.number] = self
        torch.cuda.set_device(self.device)  # Triton launches there

    def connect(self) -> None:
        """Finds the others, and makes the buffer.

        Raises:
            LostRankError: if they do not come, or cannot read each other's memory.
            ValueError: if this process has a default group already.
        """
        if dist.is_initialized():
            gc.collect()  # perhaps it is that of an engine which nobody holds any more
            if any(one is dist.group.WORLD for one in ABANDONED):
                leave(self.device)
        if dist.is_initialized():
            raise ValueError(
                "this process has a torch.distributed group already: end that first, or the "
                "engine that has it; a process has one engine of several GPUs at a time."
            )
        ABANDONED.clear()
        c10d: Any = dist
        from .ticket_sums import EMPTY

        with naming_lost_rank():
            dist.init_process_group(
                "nccl",
                store=c10d.FileStore(self.store, self.size),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=10 * CONNECT_SECONDS),
                device_id=self.device,
            )
            world: Any = dist.group.WORLD
            self.world, self.name = world, str(world.group_name)
            self.end = weakref.finalize(self, ABANDONED.append, world)
            self.end.atexit = False  # the end of the process does it
            self.buffer = self.allocate(TWO_SHOT_BYTES, dtype=torch.uint8)
            shape = 2, self.size, ONE_KERNEL_BYTES // 4
            self.words = self.allocate(*shape, dtype=torch.int32, fill=EMPTY.value)
            addresses = self.find_addresses(self.words)
            self.word_addresses = torch.tensor(addresses, device=self.device)
            num_programs = ONE_KERNEL_BYTES // 4 // PROGRAM_WORDS
            self.turns = torch.zeros(
                num_programs, dtype=torch.int32, device=self.device
            )

    def allocate(self, *shape: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
        """A tensor full of that number, which all ranks can read; all call it together."""
        import torch.distributed._symmetric_memory as symmetric

        tensor: Tensor = symmetric.empty(*shape, dtype=dtype, device=self.device)
        handle = symmetric.rendezvous(tensor, self.world)
        self.addresses[tensor.data_ptr()] = list(handle.buffer_ptrs)
        tensor.fill_(fill)
        torch.cuda.synchronize(self.device)
        dist.barrier(
            device_ids=[self.device.index]
        )  # nobody writes before all are filled
        return tensor

    def find_addresses(self, shared: Tensor) -> list[int]:
        """Where a kernel here finds what `allocate` gave each rank at the same time."""
        return self.addresses[shared.data_ptr()]

    def choose(self, x: Tensor) -> str:
        """Which of `METHODS` adds up messages of that size."""
        if x.dtype not in DTYPES or x.nbytes % 16 or x.nbytes > TWO_SHOT_BYTES:
            return "nccl"
        return "one_kernel" if x.nbytes <= ONE_KERNEL_BYTES else "two_shot"

    def all_reduce_by(self, method: str, x: Tensor) -> Tensor:
        """`all_reduce` by one of `METHODS`."""
        if method == "nccl":
            total = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total)
            return total
        if method == "one_kernel":
            return self.exchange(x.contiguous())
        shared = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self.name)
        return shared.clone()

    def exchange(self, x: Tensor) -> Tensor:
        """`all_reduce` in one kernel; `x` has at most `ONE_KERNEL_BYTES`."""
        from .ticket_sums import exchange_kernel

        total, num_words = torch.empty_like(x), x.nbytes // 4
        launch: Any = exchange_kernel
        launch[(-(-num_words // PROGRAM_WORDS),)](
            x.view(-1).view(torch.int32),
            total.view(-1).view(torch.int32),
            self.words,
            self.word_addresses,
            self.turns,
            num_words,
            self.words.shape[2],
            RANK=self.rank,
            RANKS=self.size,
            BLOCK=PROGRAM_WORDS,
            FLOAT=x.dtype == torch.float32,
            num_warps=4,
        )
        return total

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `RankGroup`; in a compiled layer it is one operator that stays as it is."""
        total: Tensor = torch.ops.folo_lib.all_reduce(x, self.number)
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """See `RankGroup`."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(parts, x.contiguous())
        return torch.cat(parts.unbind(), -1)

    def close(self) -> None:
        """Lets the others go; what graphs have recorded of the group is gone by then."""
        if self.end is not None and self.end.detach():
            leave(self.device)


@torch.library.custom_op("folo_lib::all_reduce", mutates_args=())
def all_reduce(x: Tensor, number: int) -> Tensor:
    """The sum over the ranks of the group of that number."""
    group = CONNECTED[number]
    return group.all_reduce_by(group.choose(x), x)


@all_reduce.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
