"""Sums over the GPUs of one host, in memory that all of them can read.

NCCL, PyTorch's library for what several GPUs do together, is made for long messages. PyTorch's
symmetric memory is quicker where they are short: each GPU maps the buffers of all others into its
own address space, and one kernel reads from all of them and adds. Two of PyTorch's kernels are
used here, neither with NVLink multicast:

- One shot: every rank reads all buffers whole, and adds. Right where a message is short.
- Two shots: every rank adds a part of its own, and writes that part into all buffers. Each reads
  less, and waits one time more.

What the kernels promise (read in PyTorch's source, `CUDASymmetricMemoryOps.cu`): a block waits at
the begin until the blocks of its number have begun on all ranks, by when everything that was
launched before has ended there, and at the end until they have read. So after the kernel a rank
may overwrite its buffer: no peer reads it any more. One buffer serves all sums that follow one
another on one stream, there is no second one to alternate with, and a graph can be replayed as
often as wanted. All ranks add in the order of the ranks, so all have the same bits. bfloat16 is
rounded after each addition: with two ranks once, as a sum in float32 would be.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .tensor_parallel import CONNECT_SECONDS, naming_lost_rank

__all__ = ["METHODS", "SymmetricGroup"]

METHODS = "one_shot", "two_shot", "nccl"
# Up to how many bytes the first two are the quickest, by rule, so that every start adds alike.
# Measured by the benchmark's section `tensor_parallel`.
ONE_SHOT_BYTES = 512 * 2**10
TWO_SHOT_BYTES = 8 * 2**20
DTYPES = (torch.bfloat16, torch.float32)  # that PyTorch's kernels add

CONNECTED: weakref.WeakValueDictionary[int, SymmetricGroup] = (
    weakref.WeakValueDictionary()
)
"""The groups of this process; a compiled layer knows its own by a number."""


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
    such group at a time, as it is PyTorch's default one.

    Attributes:
        buffer: that all ranks can read.
    """

    numbers = itertools.count()

    def __init__(self, rank: int, size: int, store: str, device: torch.device) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.device = torch.device("cuda", rank)
        self.number = next(self.numbers)
        self.end: Callable[[], object] = list  # nothing is to be left yet
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
        if dist.is_initialized():
            raise ValueError(
                "this process has a torch.distributed group already: end that first, or the "
                "engine that has it; a process has one engine of several GPUs at a time."
            )
        c10d: Any = dist
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
            end = weakref.finalize(self, leave, self.device)
            end.atexit = False  # the end of the process does it
            self.end = end
            self.buffer = self.allocate(TWO_SHOT_BYTES, dtype=torch.uint8)

    def allocate(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros of that shape that all ranks can read; all ranks call it together."""
        import torch.distributed._symmetric_memory as symmetric

        tensor: Tensor = symmetric.empty(*shape, dtype=dtype, device=self.device)
        handle = symmetric.rendezvous(tensor, self.world)
        self.addresses[tensor.data_ptr()] = list(handle.buffer_ptrs)
        tensor.zero_()
        torch.cuda.synchronize(self.device)
        dist.barrier(
            device_ids=[self.device.index]
        )  # nobody reads before all are zeros
        return tensor

    def add_up(self, shared: Tensor, out: Tensor) -> None:
        """Writes into `out` the sum over ranks of what is in `shared`, in one shot.

        `shared` is a contiguous part of what `allocate` gave, the same part on all ranks.
        """
        torch.ops.symm_mem.one_shot_all_reduce_out(shared, "sum", self.name, out)

    def find_addresses(self, shared: Tensor) -> list[int]:
        """Where a kernel here finds what `allocate` gave each rank at the same time."""
        return self.addresses[shared.data_ptr()]

    def choose(self, x: Tensor) -> str:
        """Which of `METHODS` adds up messages of that size."""
        if x.dtype not in DTYPES or x.nbytes % 16 or x.nbytes > TWO_SHOT_BYTES:
            return "nccl"
        return "one_shot" if x.nbytes <= ONE_SHOT_BYTES else "two_shot"

    def all_reduce_by(self, method: str, x: Tensor) -> Tensor:
        """`all_reduce` by one of `METHODS`."""
        if method == "nccl":
            total = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total)
            return total
        shared = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        if method == "one_shot":
            total = torch.empty_like(shared)
            self.add_up(shared, total)
            return total
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self.name)
        return shared.clone()

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
        """Lets the others go."""
        self.end()


@torch.library.custom_op("folo_lib::all_reduce", mutates_args=())
def all_reduce(x: Tensor, number: int) -> Tensor:
    """The sum over the ranks of the group of that number."""
    group = CONNECTED[number]
    return group.all_reduce_by(group.choose(x), x)


@all_reduce.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
