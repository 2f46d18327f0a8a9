"""What the host knows for `paged_attention`: where its kernels run, how long contexts can be."""

from __future__ import annotations

import torch
import triton

from folo_lib.kv_cache import AttentionMetadata

__all__ = ["find_longest", "find_triton_fault", "is_recording"]


def find_triton_fault(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run there, and the cure; None: they can.

    Args:
        capability: the compute capability that they need.
    """
    cure = "choose attention_backend='torch_sdpa'"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return (
            f"attention_backend='triton' needs a CUDA device, not {device.type!r}: {cure}, or "
            "set TRITON_INTERPRET=1 before Python starts, to try it."
        )
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return (
            f"attention_backend='triton' needs compute capability {capability[0]}.{capability[1]}, "
            f"and {torch.cuda.get_device_name(device)} has {found}: {cure}."
        )
    return None


def is_recording(metadata: AttentionMetadata) -> bool:
    """Whether a CUDA graph is being recorded, to be replayed with other lengths."""
    on_gpu = metadata.seq_lens.is_cuda
    return on_gpu and torch.cuda.is_current_stream_capturing()


def find_longest(metadata: AttentionMetadata, num_queries: int) -> int:
    """The most keys that all queries of a sequence see, as far as the host knows.

    Where the host knows no lengths, or they will change, it is the width of the block table.

    Args:
        num_queries: 1 looks at the sequences that run one token; more, at the others.
    """
    known = list(zip(metadata.query_lens_list, metadata.seq_lens_list, strict=False))
    if is_recording(metadata):
        known = []
    seen = [end - new + 1 for new, end in known if (new == 1) == (num_queries == 1)]
    return max(seen, default=metadata.block_table.shape[1] * metadata.block_size)
