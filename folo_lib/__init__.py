"""FoloVLLM: an inference engine for Qwen3, grown page by page from notebooks.

Each name below is loaded from its module when it is first used, so that `import folo_lib`
costs no more than the modules you touch.
"""

import importlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folo_lib.checkpoint import (
        load_model as load_model,
        load_tokenizer as load_tokenizer,
    )
    from folo_lib.config import EngineConfig as EngineConfig
    from folo_lib.engine import EngineStats as EngineStats, LLMEngine as LLMEngine
    from folo_lib.kv_cache import (
        AttentionBackend as AttentionBackend,
        AttentionMetadata as AttentionMetadata,
        BlockAllocator as BlockAllocator,
    )
    from folo_lib.layers import RMSNorm as RMSNorm, SiLUAndMul as SiLUAndMul
    from folo_lib.qwen3 import (
        Qwen3ForCausalLM as Qwen3ForCausalLM,
        get_attention_backend as get_attention_backend,
    )
    from folo_lib.request import (
        CompletionOutput as CompletionOutput,
        RequestOutput as RequestOutput,
        RequestStatus as RequestStatus,
    )
    from folo_lib.rope import RotaryEmbedding as RotaryEmbedding
    from folo_lib.sampler import Sampler as Sampler
    from folo_lib.sampling_params import SamplingParams as SamplingParams
    from folo_lib.serving import AsyncLLMEngine as AsyncLLMEngine

__version__ = "0.2.0"

_MODULE_OF = {
    "RotaryEmbedding": "rope",
    "RMSNorm": "layers",
    "SiLUAndMul": "layers",
    "Qwen3ForCausalLM": "qwen3",
    "get_attention_backend": "qwen3",
    "load_model": "checkpoint",
    "load_tokenizer": "checkpoint",
    "AttentionBackend": "kv_cache",
    "AttentionMetadata": "kv_cache",
    "BlockAllocator": "kv_cache",
    "EngineConfig": "config",
    "Sampler": "sampler",
    "SamplingParams": "sampling_params",
    "CompletionOutput": "request",
    "RequestOutput": "request",
    "RequestStatus": "request",
    "EngineStats": "engine",
    "LLMEngine": "engine",
    "AsyncLLMEngine": "serving",
}

__all__ = ["__version__", "bundled_model_path", *_MODULE_OF]


def bundled_model_path() -> Path:
    """The folder of the checkpoint that comes with the package, a Qwen3 in miniature."""
    return Path(str(resources.files("folo_lib"))) / "assets" / "tiny-qwen3"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'folo_lib' has no attribute {name!r}")
    return getattr(importlib.import_module(f"folo_lib.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
