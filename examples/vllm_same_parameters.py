"""The same checkpoint, prompts and sampling parameters in folo_lib and in vLLM, side by side.

    pip install vllm
    python examples/vllm_same_parameters.py Qwen/Qwen3-0.6B

Needs a GPU and vLLM, so it is not among the programs that this repository runs. The two functions
that translate arguments need neither, and are tested.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from typing import Any

import torch

from folo_lib import LLMEngine, SamplingParams, bundled_model_path

PROMPTS = ["Once upon a time", "The capital of France is", "1, 2, 3, 4,"]


def to_vllm_sampling(params: SamplingParams) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` that ask for the same.

    The names are the same; tuples become lists. vLLM reads a seed of -1 as none at all, and
    torch's generators, which it seeds, take the same 64 bits as 2**64 - 1.
    """
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    values["stop"] = list(params.stop or ())
    values["stop_token_ids"] = list(params.stop_token_ids or ())
    values["bad_words"] = list(params.bad_words or ())
    if params.allowed_token_ids is not None:
        values["allowed_token_ids"] = list(params.allowed_token_ids)
    if params.seed == -1:
        values["seed"] = 2**64 - 1
    return values


def to_vllm_engine(
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    max_model_len: int | None = None,
    decode: str = "auto",
    enforce_eager: bool = False,
    seed: int = 0,
    kv_cache_memory_bytes: int | None = None,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    enable_prefix_caching: bool = True,
    block_size: int | None = None,
    use_tqdm: bool = True,
    max_logprobs: int = -1,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for those of `LLMEngine`; those that it lacks are not taken.

    Args:
        max_num_seqs, max_num_batched_tokens: named, since vLLM's own defaults depend on the GPU.
        max_logprobs: of vLLM, which allows 20 unless told otherwise; -1 is no limit, as here.
    """
    model = model or os.environ.get("FOLO_MODEL") or bundled_model_path()
    values: dict[str, Any] = {"model": os.fspath(model), "seed": seed}
    values["dtype"] = str(dtype).removeprefix("torch.")
    values["enforce_eager"] = enforce_eager or decode == "eager"
    values["use_tqdm_on_load"] = use_tqdm
    values["max_logprobs"] = max_logprobs
    values["max_num_seqs"] = max_num_seqs
    values["max_num_batched_tokens"] = max_num_batched_tokens
    values["enable_prefix_caching"] = enable_prefix_caching
    # None means "work it out" to vLLM, so what is None is left out.
    optional = {"max_model_len": max_model_len, "block_size": block_size}
    optional["kv_cache_memory_bytes"] = kv_cache_memory_bytes
    return values | {k: v for k, v in optional.items() if v is not None}


def main(model: str) -> None:
    """Greedy answers of both, which should be equal up to near ties of bfloat16."""
    vllm: Any = importlib.import_module("vllm")
    params = SamplingParams(temperature=0, max_tokens=32)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 2048}
    # vLLM first: it wants an empty GPU. Both get a fixed piece of it for their caches.
    options["kv_cache_memory_bytes"] = 2**30
    llm = vllm.LLM(**to_vllm_engine(model, **options))
    theirs = llm.generate(PROMPTS, vllm.SamplingParams(**to_vllm_sampling(params)))
    ours = LLMEngine(model, **options).generate(PROMPTS, params)
    for our, their in zip(ours, theirs, strict=True):
        same = our.outputs[0].token_ids == list(their.outputs[0].token_ids)
        print(f"{our.prompt!r}: {'same tokens' if same else 'different tokens'}")
        print("  folo_lib", repr(our.outputs[0].text))
        print("  vLLM    ", repr(their.outputs[0].text))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen3-0.6B")
