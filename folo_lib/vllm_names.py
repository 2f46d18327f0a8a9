"""What users of vLLM type: names that work here as there, and a word on those that are not here."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ABSENT_OPTIONS",
    "ABSENT_PARAMS",
    "ABSENT_PROMPT_KEYS",
    "READ_ON",
    "VllmNames",
    "explain_unknown",
    "keep_known",
    "name_model",
]

READ_ON = "https://github.com/folovllm/FoloVLLM/blob/main/docs/outgrow.md"
"""Where it says what vLLM has besides, and how to go there."""

Absent = Mapping[str, tuple[str, tuple[Any, ...]]]
"""By name: what is here instead, and the values that ask for nothing, which are let through."""

ONE_HOST = "tensor_parallel_size is what there is, for the devices of one host"
WEIGHTS = "weights are float32, bfloat16 or float16 here, see dtype"
TEXT_ONLY = "this engine reads text"
NO_CODE = "only code of this package is run, and a checkpoint's own never"
NO_LORA = "weights are run as the checkpoint has them, without adapters"
NO_GRAMMAR = (
    "no grammar is enforced; allowed_token_ids, logit_bias and stop are what there is"
)
LOCAL = "download what you want with huggingface_hub, and pass its folder as model"
IN_CONFIG = "it is read from the checkpoint's config.json: change it in a copy"

ABSENT_OPTIONS: Absent = {
    "pipeline_parallel_size": (ONE_HOST, (1,)),
    "data_parallel_size": (ONE_HOST, (1,)),
    "distributed_executor_backend": (ONE_HOST, (None, "uni", "mp")),
    "enable_expert_parallel": (ONE_HOST, (False,)),
    "quantization": (WEIGHTS, (None,)),
    "kv_cache_dtype": ("the cache has the dtype of the model", ("auto",)),
    "load_format": ("weights are read from safetensors", ("auto", "safetensors")),
    "cpu_offload_gb": ("weights and cache lie on one device", (0,)),
    "swap_space": ("a request that is preempted is computed again", (0,)),
    "speculative_config": ("one token is drawn at a time", (None,)),
    "enable_lora": (NO_LORA, (False,)),
    "lora_modules": (NO_LORA, (None,)),
    "max_loras": (NO_LORA, ()),
    "max_lora_rank": (NO_LORA, ()),
    "guided_decoding": (NO_GRAMMAR, (None,)),
    "guided_decoding_backend": (NO_GRAMMAR, (None,)),
    "structured_outputs_config": (NO_GRAMMAR, (None,)),
    "trust_remote_code": (NO_CODE, (False,)),
    "revision": (LOCAL, (None,)),
    "tokenizer_revision": (LOCAL, (None,)),
    "download_dir": (LOCAL, (None,)),
    "tokenizer_mode": ("the checkpoint's own tokenizer is used", ("auto",)),
    "skip_tokenizer_init": (
        "pass a model that is loaded: with it come token ids only",
        (False,),
    ),
    "hf_overrides": (IN_CONFIG, (None,)),
    "rope_scaling": (IN_CONFIG, (None,)),
    "limit_mm_per_prompt": (TEXT_ONLY, (None,)),
    "mm_processor_kwargs": (TEXT_ONLY, (None,)),
    "enable_chunked_prefill": ("long prompts are always read in chunks", (None, True)),
    "num_gpu_blocks_override": ("kv_cache_memory_bytes says it in bytes", (None,)),
    "compilation_config": ("decode says how a step runs", (None,)),
    "scheduling_policy": ("it is first come, first served", ("fcfs",)),
    "scheduler_cls": ("scheduler takes a name or a class", (None,)),
    "disable_log_stats": ("nothing is logged, stats() tells", (True, False)),
    "max_logprobs": ("there is no such limit", (None, 20, -1)),
}
"""Options of vLLM's `LLM` that this engine has not."""

ABSENT_PARAMS: Absent = {
    "guided_decoding": (NO_GRAMMAR, (None,)),
    "structured_outputs": (NO_GRAMMAR, (None,)),
    "best_of": ("n samples are made, and you choose", (None,)),
    "use_beam_search": ("tokens are drawn, or greedy", (False,)),
    "length_penalty": ("it belongs to beam search", (1.0,)),
    "early_stopping": ("it belongs to beam search", (False,)),
    "logits_processors": (
        "logit_bias, allowed_token_ids and bad_words are what there is",
        (None,),
    ),
    "truncate_prompt_tokens": ("cut the prompt yourself, as token ids", (None,)),
    "spaces_between_special_tokens": (
        "none are put there, as with Qwen's tokenizer in vLLM",
        (True, False),
    ),
    "output_kind": ("stream() gives all that there is, after every token", (None,)),
    "extra_args": ("nobody reads them", (None,)),
}
"""Parameters of vLLM's `SamplingParams` that ours has not."""

ABSENT_PROMPT_KEYS: Absent = {
    "multi_modal_data": (TEXT_ONLY, (None,)),
    "multi_modal_uuids": (TEXT_ONLY, (None,)),
    "mm_processor_kwargs": (TEXT_ONLY, (None,)),
    "prompt_embeds": ("a prompt is text or token ids", (None,)),
    "cache_salt": ("requests that begin alike share their beginnings", (None,)),
}
"""Keys of vLLM's prompts that ours have not."""


def keep_known(
    what: str, given: Mapping[str, Any], known: Sequence[str], absent: Absent
) -> dict[str, Any]:
    """The options that are here; those of vLLM that ask for nothing are left out.

    Args:
        what: the words before the name, such as `"the engine has no option"`.
        given: by name.
        known: the names that are here.
        absent: what vLLM has besides.

    Raises:
        TypeError: naming one that does not exist here, and what to do.
    """
    kept = {}
    for name, value in given.items():
        if name in known:
            kept[name] = value
        elif name in absent:
            instead, neutral = absent[name]
            if not any(value is x or (value == x) is True for x in neutral):
                raise TypeError(
                    f"{what} {name!r}: {instead}. How this engine and vLLM differ: "
                    f"{READ_ON}"
                )
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            if near:
                raise TypeError(f"{what} {name!r}: did you mean {near[0]!r}?")
            raise TypeError(f"{what} {name!r}: there are {', '.join(known)}")
    return kept


Class = TypeVar("Class")


def explain_unknown(what: str, absent: Absent) -> Callable[[type[Class]], type[Class]]:
    """Makes a dataclass say what `keep_known` says of names that it does not know."""

    def explain(cls: type[Class]) -> type[Class]:
        init: Any = cls.__init__
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]

        @functools.wraps(init)
        def __init__(self: Class, *args: Any, **given: Any) -> None:
            init(self, *args, **keep_known(what, given, known, absent))

        setattr(cls, "__init__", __init__)  # noqa: B010  mypy forbids to assign it
        return cls

    return explain


def name_model(model: str) -> str:
    """What a folder is called, without the path to it; or a hub id as it is."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


class VllmNames:
    """What an engine answers by the names of vLLM's `LLM`, and how it looks when printed."""

    tokenizer: PreTrainedTokenizerBase | None

    def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, of transformers; None: the engine takes and gives token ids."""
        return self.tokenizer

    def __repr__(self) -> str:
        """One line: which model, where it runs, and how busy it is."""
        engine: Any = self  # what it is made of, an engine says
        executor, stats = engine.executor, engine.scheduler.get_stats()
        path = getattr(executor.config, "name_or_path", "")
        name = name_model(path) if path else "a loaded model"
        dtype = str(executor.dtype).removeprefix("torch.")
        return (
            f"<{type(self).__name__} {name}: {dtype} on "
            f"{executor.worker.runner.device}, "
            f"max_model_len={executor.max_model_len}, "
            f"{stats.num_used_blocks} of {stats.num_blocks} blocks used, "
            f"{stats.num_running} running, {stats.num_waiting} waiting>"
        )
