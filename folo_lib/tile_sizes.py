"""How the kernels of `paged_attention` are cut, and what a GPU has room for.

Found by trying, on an H200; another card may want other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

__all__ = [
    "DECODE",
    "MEDIUM_PREFILL",
    "PREFILL",
    "SMALL_DECODE",
    "SMALL_PREFILL",
    "TileSizes",
    "choose_decode_sizes",
    "choose_prefill_sizes",
    "count_multiprocessors",
]


@dataclass(frozen=True)
class TileSizes:
    """How a kernel is cut, and how many warps and stages of loads it gets.

    Attributes:
        tile: tokens of keys and values that are looked at together.
        num_warps: groups of 32 threads that work on a tile.
        num_stages: tiles in the pipeline, one in use and others on their way.
        rows: rows of queries, tokens times heads, that look together.
        min_chunk: keys up to which a context is not split.
        num_programs: that run at once on a multiprocessor.

    Example:
        >>> from folo_lib.tile_sizes import DECODE
        >>> DECODE.tile, DECODE.num_programs
        (128, 3)
    """

    tile: int
    num_warps: int
    num_stages: int
    rows: int = 16
    min_chunk: int = 256
    num_programs: int = 3

    def count_queries(self, group: int) -> int:
        """Tokens of a query tile of several, two at least, with `group` heads each.

        Example:
            >>> from folo_lib.tile_sizes import PREFILL
            >>> PREFILL.count_queries(group=2)
            64
        """
        heads = 1 << (group - 1).bit_length()  # rounded up to a power of two
        return max(self.rows, 2 * heads) // group


PREFILL = TileSizes(128, 8, 3, rows=128, num_programs=1)
MEDIUM_PREFILL = TileSizes(64, 4, 2, rows=64, num_programs=1)
SMALL_PREFILL = TileSizes(32, 4, 2, rows=32, num_programs=1)
"""See `choose_prefill_sizes`."""
DECODE = TileSizes(128, 4, 2)
# For float32, of which twice as much lies in the registers of a thread.
SMALL_DECODE = TileSizes(64, 4, 2)


def choose_decode_sizes(dtype: torch.dtype) -> TileSizes:
    """What fits into the registers of a thread.

    Example:
        >>> import torch
        >>> from folo_lib.tile_sizes import choose_decode_sizes
        >>> choose_decode_sizes(torch.float32).tile
        64
    """
    return SMALL_DECODE if dtype == torch.float32 else DECODE


@cache
def choose_prefill_sizes(
    dtype: torch.dtype, head_dim: int, device: torch.device
) -> TileSizes:
    """What fits into the registers and the shared memory of a multiprocessor.

    Args:
        head_dim: rounded up to a power of two.
    """
    if dtype == torch.float32 or head_dim > 128:
        return SMALL_PREFILL
    if device.type != "cuda":
        return MEDIUM_PREFILL
    properties = torch.cuda.get_device_properties(device)
    has_room = properties.shared_memory_per_multiprocessor > 200 * 1024
    return PREFILL if has_room else MEDIUM_PREFILL


@cache
def count_multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 8 without one."""
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
