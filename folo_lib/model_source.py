"""From what a user names as the model to a model that is loaded."""

from __future__ import annotations

import sys
from os import PathLike

import torch

from folo_lib.checkpoint import find_checkpoint, load_model, read_config
from folo_lib.config import EngineConfig
from folo_lib.kv_cache import resolve_max_model_len
from folo_lib.model_weights import store_by_columns
from folo_lib.qwen3 import Qwen3ForCausalLM

__all__ = ["Source", "get_model"]

Source = str | PathLike[str] | Qwen3ForCausalLM
"""A folder, a hub id, or a model that is loaded."""


def get_model(model: Source, config: EngineConfig) -> Qwen3ForCausalLM:
    """Loads a model, unless it is loaded already; see `GPUWorker`.

    Loading can take minutes, so a length that the model was not made for is refused before.

    Raises:
        ValueError: if an option does not fit the model.
    """
    if not isinstance(model, Qwen3ForCausalLM):
        checkpoint = read_config(find_checkpoint(model))
        resolve_max_model_len(
            checkpoint, torch.float32, sys.maxsize, config.max_model_len
        )
        options = config.dtype, config.device, config.attention_backend
        loaded = load_model(model, *options, use_tqdm=config.use_tqdm)
        store_by_columns(loaded)
        return loaded
    for name in ("dtype", "device", "attention_backend"):
        value = getattr(config, name)
        if value != "auto":
            raise ValueError(
                f"{name}={value!r} comes with a model that is loaded, whose {name} is "
                "settled: give it to load_model, and leave it out here."
            )
    return model
