"""What the host knows for `paged_attention`: where its kernels run, how long contexts can be."""

from __future__ import annotations

import torch
import triton

from folo_lib.kv_cache import AttentionMetadata

__all__ = [
    "count_tiles",
    "find_longest",
    "find_triton_fault",
    "is_recording",
    "list_lengths",
]


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


def list_lengths(
    metadata: AttentionMetadata, num_queries: int
) -> list[tuple[int, int]]:
    """Of each sequence that a plan is about the tokens that run, and all keys.

    Empty where the host knows no lengths, or they will change.

    Args:
        num_queries: tokens of a tile. 1 looks at the sequences that run one token; more, at the
            others.
    """
    if is_recording(metadata):
        return []
    known = zip(metadata.query_lens_list, metadata.seq_lens_list, strict=False)
    return [pair for pair in known if (pair[0] == 1) == (num_queries == 1)]


def count_tiles(metadata: AttentionMetadata, num_queries: int) -> int:
    """How many tiles there are, or can be at most; see `list_lengths`."""
    if known := list_lengths(metadata, num_queries):
        return sum(-(-new // num_queries) for new, _ in known)
    num_seqs, num_tokens = len(metadata.seq_lens), len(metadata.slot_mapping)
    # Each sequence may waste part of a tile.
    return num_seqs if num_queries == 1 else num_seqs + num_tokens // num_queries


def find_longest(metadata: AttentionMetadata, num_queries: int) -> int:
    """The most keys that all queries of a sequence see, or can see; see `list_lengths`."""
    seen = [length - new + 1 for new, length in list_lengths(metadata, num_queries)]
    width = metadata.block_table.shape[1] * metadata.block_size
    return max(1, *seen) if seen else width
