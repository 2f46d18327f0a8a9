"""Which attention backend runs: the one that was asked for, or the best that can."""

from __future__ import annotations

import logging

import torch

from folo_lib.qwen3 import get_attention_backend

__all__ = ["resolve_attention_backend"]

logger = logging.getLogger(__name__)


def resolve_attention_backend(
    name: str, device: torch.device, dtype: torch.dtype
) -> str:
    """`"auto"` is `"triton"` on a GPU that can run it, `"torch_ragged"` on a CPU in float32.

    Elsewhere it is `"torch_sdpa"`.

    A backend that was asked for by name is never exchanged for another. With `"auto"` the
    next best is taken, and the log says why.

    Raises:
        ValueError: if there is no such backend, or it cannot run there.
    """
    if name == "auto" and device.type != "cuda":
        fault = get_attention_backend("torch_ragged").find_fault(device, dtype)
        return "torch_ragged" if fault is None else "torch_sdpa"
    wanted = "triton" if name == "auto" else name
    try:
        if fault := get_attention_backend(wanted).find_fault(device, dtype):
            raise ValueError(fault)
    except ValueError as error:  # a fault, or Triton is not installed
        if name != "auto":
            raise
        logger.warning("Attention runs on 'torch_sdpa'. %s", error)
        return "torch_sdpa"
    return wanted
