"""What the benchmark measures beside our engine and Hugging Face's: rungs and peers."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from folo_lib import bundled_model_path
from folo_lib.benchmark import FoloLib, Run, System
from folo_lib.benchmark_workloads import QWEN3_0_6B as QWEN3_0_6B
from folo_lib.checkpoint import DTYPES, load_model
from folo_lib.kv_cache import (
    AttentionMetadata,
    TorchNaiveBackend,
    reshape_and_cache_kv,
)
from folo_lib.qwen3 import Attention, Qwen3ForCausalLM


def write_random_checkpoint(
    folder: Path, shape: Mapping[str, Any], device: torch.device
) -> None:
    """A checkpoint of that shape, with the bundled tokenizer so that it loads."""
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    config = Qwen3Config(**shape, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    dtype = DTYPES[shape["dtype"]]
    weights = model.hf_weights().items()
    copies = {name: w.to("cpu", dtype, copy=True) for name, w in weights}
    save_file(copies, folder / "model.safetensors", {"format": "pt"})
    for path in bundled_model_path().glob("tokenizer*.json"):
        shutil.copy(path, folder)


@torch.inference_mode()
def recompute_all(
    model: Qwen3ForCausalLM, prompt: list[int], num_tokens: int
) -> Iterator[int]:
    """The next tokens without a cache: the whole text through the model, each time."""
    device = model.model.embed_tokens.weight.device
    ids = list(prompt)
    for _ in range(num_tokens):
        hidden_states = model(torch.tensor(ids, device=device))  # [S, E]
        ids.append(int(model.compute_logits(hidden_states[-1]).argmax()))
        yield ids[-1]


class GrowingCacheBackend(TorchNaiveBackend):
    """One sequence, its keys and values concatenated; the cache is a list of two."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Any,
        metadata: AttentionMetadata,
    ) -> Tensor:
        new = (x.transpose(0, 1)[None] for x in (key, value))  # [1, H_kv, S, D]
        kv_cache[:] = reshape_and_cache_kv(*new, *kv_cache)
        query = query.transpose(0, 1)[None]  # [S, H, D] -> [1, H, S, D]
        return self.attend(query, *kv_cache)[0].transpose(0, 1)


@torch.inference_mode()
def grow_cache(
    model: Qwen3ForCausalLM, prompt: list[int], num_tokens: int
) -> Iterator[int]:
    """The next tokens with a cache that grows; the model has `GrowingCacheBackend`."""
    device = model.model.embed_tokens.weight.device
    caches: Any = [[None, None] for _ in model.model.layers]
    empty = torch.empty(0)
    unused = AttentionMetadata(
        block_size=1,
        slot_mapping=empty,
        block_table=empty,
        query_start_loc=empty,
        seq_lens=empty,
        query_lens_list=[],
        seq_lens_list=[],
    )
    new, start = list(prompt), 0
    for _ in range(num_tokens):
        positions = torch.arange(start, start + len(new), device=device)
        ids = torch.tensor(new, device=device)
        hidden_states = model(ids, positions, caches, unused)  # [S, E]
        start += len(new)
        new = [int(model.compute_logits(hidden_states[-1]).argmax())]
        yield new[0]


class Loop:
    """A generator of tokens, with a clock.

    Args:
        tokens: takes a prompt and a number of tokens.
    """

    def __init__(
        self, name: str, tokens: Callable[[list[int], int], Iterator[int]]
    ) -> None:
        self.name, self.tokens = name, tokens

    def generate(self, prompt: list[int], num_tokens: int) -> Run:
        """See `System`. Each token is an int on the host, so the device is done."""
        start = time.perf_counter()
        tokens = self.tokens(prompt, num_tokens)
        first = next(tokens)
        ttft = time.perf_counter() - start
        token_ids = [first, *tokens]
        return Run(token_ids, ttft, time.perf_counter() - start)


def make_loops(folder: Path, device: torch.device, dtype: torch.dtype) -> list[System]:
    """The rungs below the engine."""
    model = load_model(folder, dtype, device, "torch_naive", use_tqdm=False)
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = GrowingCacheBackend()
    return [
        Loop("no cache", partial(recompute_all, model)),
        Loop("growing cache", partial(grow_cache, model)),
    ]


RUNGS: Mapping[str, Mapping[str, Any]] = {
    "preallocated": {"attention_backend": "torch_naive", "decode": "eager"},
    "SDPA": {"attention_backend": "torch_sdpa", "decode": "eager"},
}


def make_rungs(
    folder: Path, device: torch.device, dtype: torch.dtype, max_model_len: int
) -> tuple[list[System], dict[str, str]]:
    """The ladder's rungs from the bottom, and why others are left out."""
    rungs = make_loops(folder, device, dtype)
    left_out: dict[str, str] = {}
    for name, options in RUNGS.items():
        try:
            rung = FoloLib(folder, device, dtype, max_model_len, name, **options)
        except ValueError as error:
            left_out[name] = str(error)
        else:
            rungs.append(rung)
    return rungs, left_out


Answer = Callable[[list[int], int], list[int]]


class Peer:
    """Another engine; its TTFT is of a run apart, with the prompt turned round."""

    def __init__(self, name: str, answer: Answer) -> None:
        self.name, self.answer = name, answer

    def generate(self, prompt: list[int], num_tokens: int) -> Run:
        """See `System`."""
        times = [time.perf_counter()]
        self.answer(prompt[::-1], 1)
        times.append(time.perf_counter())
        token_ids = self.answer(prompt, num_tokens)
        times.append(time.perf_counter())
        return Run(token_ids, times[1] - times[0], times[2] - times[1])


def start_vllm(folder: Path, max_model_len: int) -> Answer:
    """vLLM's `LLM`. Written from its documentation, not tried with this benchmark."""
    vllm: Any = importlib.import_module("vllm")
    options = {"gpu_memory_utilization": 0.3, "enable_prefix_caching": False}
    llm = vllm.LLM(model=str(folder), max_model_len=max_model_len, **options)

    def answer(prompt: list[int], num_tokens: int) -> list[int]:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True
        )
        [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    return answer


def start_nano_vllm(folder: Path, max_model_len: int) -> Answer:
    """nano-vllm's `LLM`, which has no greedy mode; likewise not tried."""
    nano: Any = importlib.import_module("nanovllm")
    llm = nano.LLM(str(folder), max_model_len=max_model_len, gpu_memory_utilization=0.5)

    def answer(prompt: list[int], num_tokens: int) -> list[int]:
        params = nano.SamplingParams(
            temperature=1e-5, max_tokens=num_tokens, ignore_eos=True
        )
        return list(llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"])

    return answer


PEERS = {"vllm": start_vllm, "nanovllm": start_nano_vllm}


def start_peers(folder: Path, max_model_len: int) -> list[System]:
    """Those that are installed."""
    return [
        Peer(name, start(folder, max_model_len))
        for name, start in PEERS.items()
        if importlib.util.find_spec(name)
    ]
