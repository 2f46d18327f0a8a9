"""FoloVLLM: an inference engine for Qwen3, grown page by page from notebooks.

Example:
    >>> from folo_lib import LLM, SamplingParams
    >>> llm = LLM()  # the bundled checkpoint; LLM("Qwen/Qwen3-0.6B") is a real one
    >>> params = SamplingParams(temperature=0, max_tokens=6)
    >>> for output in llm.stream("Once upon a time", params):
    ...     pass  # after every token
    >>> output.outputs[0].text
    ' there was a young deer named'

`generate` runs many prompts to their end, `chat` conversations. In a shell, `folo "Once upon a
time"` does the same as above, and `folo chat` talks.

Each name below is loaded from its module when it is first used, so that `import folo_lib`
costs no more than the modules you touch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folo_lib.checkpoint import (
        load_model as load_model,
        load_tokenizer as load_tokenizer,
    )
    from folo_lib.config import EngineConfig as EngineConfig
    from folo_lib.engine import LLMEngine as LLMEngine
    from folo_lib.engine_stats import EngineStats as EngineStats
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

    LLM = LLMEngine  # vLLM's name

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
    "EngineStats": "engine_stats",
    "LLM": "engine",
    "LLMEngine": "engine",
    "AsyncLLMEngine": "serving",
}

_ALIASES = {"LLM": "LLMEngine"}

__all__ = ["__version__", "bundled_model_path", *_MODULE_OF]


def bundled_model_path() -> Path:
    """The folder of the checkpoint that comes with the package, a Qwen3 in miniature.

    Example:
        >>> from folo_lib import bundled_model_path
        >>> bundled_model_path().name
        'tiny-qwen3'
    """
    return Path(__file__).parent / "assets" / "tiny-qwen3"


def _list_modules() -> list[str]:
    import pkgutil  # a third of the time of `import folo_lib`, were it at the top

    names = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in names if not name.startswith("_")]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        module = importlib.import_module(f"folo_lib.{_MODULE_OF[name]}")
        return getattr(module, _ALIASES.get(name, name))
    error = f"module 'folo_lib' has no attribute {name!r}"
    if name.startswith("_") or name not in _list_modules():
        raise AttributeError(error)
    try:
        return importlib.import_module(f"folo_lib.{name}")
    except ImportError as missing:  # of an extra that is not installed
        raise AttributeError(f"{error}: {missing}") from missing


def __dir__() -> list[str]:
    return sorted({*__all__, *_list_modules()})
