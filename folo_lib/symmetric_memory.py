"""Sums over the GPUs of one host, in memory that all of them can read.

NCCL, PyTorch's library for what several GPUs do together, is made for long messages. PyTorch's
symmetric memory is quicker where they are short: each GPU maps the buffers of all others into its
own address space, and one kernel reads from all of them and adds. Two of PyTorch's kernels are
used here, neither with NVLink multicast:

- *One shot*: every rank reads all buffers whole, and adds. Right where a message is short.
- *Two shots*: every rank adds a part of its own, and writes that part into all buffers. Each reads
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

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["SymmetricSum"]

# Up to how many bytes one shot and two shots are quicker than NCCL, by rule. Measured by the
# benchmark's section `tensor_parallel`.
ONE_SHOT_BYTES = 512 * 2**10
TWO_SHOT_BYTES = 8 * 2**20
DTYPES = (torch.bfloat16, torch.float32)  # that the kernels add


class SymmetricSum:
    """Sums over all ranks of a group: by symmetric memory if that is quicker, else by NCCL.

    Args:
        group: whose ranks are GPUs of one host; all of them create their sum together.
        device: of this rank.
        max_bytes: of the longest message that takes the symmetric buffer.

    Raises:
        RuntimeError: if the GPUs cannot read each other's memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        max_bytes: int = TWO_SHOT_BYTES,
    ) -> None:
        self.group, self.device, self.max_bytes = group, device, max_bytes
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.buffer = self.allocate(max_bytes, dtype=torch.uint8)

    def allocate(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros of that shape on each rank, which all ranks can read; a collective call."""
        import torch.distributed._symmetric_memory as symmetric

        tensor: Tensor = symmetric.empty(*shape, dtype=dtype, device=self.device)
        symmetric.rendezvous(tensor, self.group)
        tensor.zero_()
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group, device_ids=[self.device.index or 0])
        return tensor

    def choose(self, tensor: Tensor) -> str:
        """The name of what adds that message up: `one_shot`, `two_shot` or `nccl`."""
        size = tensor.nbytes
        fits = size <= self.max_bytes and size % 16 == 0 and tensor.dtype in DTYPES
        if fits and size <= ONE_SHOT_BYTES:
            return "one_shot"
        return "two_shot" if fits and size <= TWO_SHOT_BYTES else "nccl"

    def add_up(self, shared: Tensor, out: Tensor) -> None:
        """Writes into `out` the sum over ranks of what is in `shared`, in one shot.

        `shared` is a contiguous part of what `allocate` gave, the same part on all ranks.
        """
        name = self.group.group_name
        torch.ops.symm_mem.one_shot_all_reduce_out(shared, "sum", name, out)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, as a new tensor; `tensor` is contiguous and is not changed."""
        return self.run(self.choose(tensor), tensor)

    def run(self, name: str, tensor: Tensor) -> Tensor:
        """`all_reduce` by the kernel of that name."""
        if name == "nccl":
            total = tensor.clone()
            dist.all_reduce(total, group=self.group)
            return total
        shared = self.buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        shared.copy_(tensor)
        if name == "one_shot":
            total = torch.empty_like(tensor)
            self.add_up(shared, total)
            return total
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self.group.group_name)
        return shared.clone()
