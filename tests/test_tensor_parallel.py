"""Several ranks give what one process gives, and one that fails takes the engine with it."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import models
import pytest
import schedules
import torch
from schedules import Schedule
from torch import Tensor, nn

from folo_lib import LLMEngine, SamplingParams, bundled_model_path, parallel_checks
from folo_lib.checkpoint import find_weight_files, load_model, read_config
from folo_lib.config import EXECUTORS, EngineConfig
from folo_lib.course.ranks import ThreadGroup, run_ranks
from folo_lib.kv_cache import kv_bytes_per_token
from folo_lib.runner import ScheduledRequest, StepPlan
from folo_lib.tensor_parallel import (
    GlooGroup,
    ParallelExecutor,
    RankError,
    RankProcesses,
    RankSetup,
    ShardedForCausalLM,
    find_share,
    follow,
    load_shard,
    read_shard,
)

BUNDLED = bundled_model_path()
GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUIET = {"device": "cpu", "dtype": "float32", "use_tqdm": False}


# --- One shard beside the whole, ranks in threads --------------------------------------

# model_type, H, H_kv, D, tied, bias; the vocabulary is odd, so that rows are left over.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3 4/1", {"num_key_value_heads": 2, "vocab_size": 203}),
    "untied": ("qwen3 7/1 untied yarn", {"num_attention_heads": 8, "vocab_size": 205}),
    "bias": ("qwen3 6/3 yarn bias", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "qwen2": ("qwen2 4/4 linear", {"num_key_value_heads": 2, "vocab_size": 203}),
    "qwen2 untied": ("qwen2 8/2 own head_dim", {"vocab_size": 201}),
}


@cache
def make_folder(shape: str, root: Path) -> Path:
    """A checkpoint of Hugging Face with random norms and biases."""
    case, changes = SHAPES[shape]
    theirs = models.make_reference(
        models.make_config(case, intermediate_size=64, **changes)
    )
    folder = root / shape.replace(" ", "-")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def run_sharded(
    folder: Path, size: int, spoil: Callable[[ShardedForCausalLM], None] = id
) -> list[Tensor]:
    """The logits of a batch of two, on each rank."""
    ids = torch.arange(2 * 11).view(2, 11) * 9 % 201
    config = EngineConfig(dtype="float32", device="cpu")

    def work(group: ThreadGroup) -> Tensor:
        shard = load_shard(folder, config, group)
        spoil(shard)
        logits: Tensor = shard.compute_logits(shard(ids))
        return logits

    return run_ranks(size, work)


def run_whole(folder: Path) -> Tensor:
    ids = torch.arange(2 * 11).view(2, 11) * 9 % 201
    model = load_model(folder, "float32", "cpu", use_tqdm=False)
    return model.compute_logits(model(ids))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_shards_add_up_to_the_model(shape: str, size: int, root: Path) -> None:
    folder = make_folder(shape, root)
    if size not in parallel_checks.list_sizes(read_config(folder)):
        pytest.skip(f"{shape} has too few heads")
    whole = run_whole(folder)
    for logits in run_sharded(folder, size):
        models.assert_parity(logits, whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_all_ranks_make_the_checkpoint(shape: str, root: Path) -> None:
    folder = make_folder(shape, root)
    config, files = read_config(folder), find_weight_files(folder)
    whole = dict(read_shard(files, config, 0, 1))
    num_kv_heads = config.num_key_value_heads
    for size in parallel_checks.list_sizes(config):
        parts = [dict(read_shard(files, config, rank, size)) for rank in range(size)]
        for name, tensor in whole.items():
            own = [one[name] for one in parts if name in one]
            if ".o_proj.bias" in name:
                assert len(own) == 1
            if "norm" in name:
                assert all(torch.equal(one, tensor) for one in own)
                continue
            share = find_share(name, list(tensor.shape), config, 0, size)
            assert share is not None
            if ".k_proj." in name or ".v_proj." in name:
                # Each head as often as there are ranks for it, and in its order.
                own = own[:: max(1, size // num_kv_heads)]
            joined = torch.cat(own, share[0])
            assert torch.equal(joined[: len(tensor)], tensor), (name, size)
            assert not joined[len(tensor) :].any()


def test_norms_of_heads_are_whole_and_heads_in_order(root: Path) -> None:
    config = read_config(make_folder("untied", root))  # 8 heads that share one
    name = "model.layers.0.self_attn.k_proj.weight"
    head_dim = config.head_dim
    for rank in range(8):
        assert find_share(name, [head_dim, 9], config, rank, 8) == (0, 0, head_dim)
    config.num_key_value_heads = 4
    starts = [find_share(name, [4 * head_dim, 9], config, i, 8) for i in range(8)]
    assert [one[1] // head_dim for one in starts if one] == [0, 0, 1, 1, 2, 2, 3, 3]


def count_sums(size: int) -> list[tuple[str, tuple[int, ...]]]:
    config = EngineConfig(dtype="float32", device="cpu")

    def work(group: ThreadGroup) -> Any:
        shard = load_shard(BUNDLED, config, group)
        shard.compute_logits(shard(torch.tensor([[1, 2, 3]])))
        return group.log

    return run_ranks(size, work)[0]


def test_two_sums_a_layer_one_for_the_embedding_and_a_gather() -> None:
    log = count_sums(2)
    assert log[0] == ("all_reduce", (1, 3, 192))
    assert log[1:-1] == [("all_reduce", (1, 3, 192))] * 12
    assert log[-1] == ("all_gather", (1, 3, 1024))


def test_a_head_that_differs_from_a_tied_embedding_is_kept(
    root: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(make_folder("tied", root), tmp_path / "head")
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[-3:] *= 2  # on one rank only
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="differs"):
        whole = run_whole(folder)
    with pytest.warns(UserWarning, match="differs"):
        for logits in run_sharded(folder, 2):
            models.assert_parity(logits, whole)


# --- Gloo --------------------------------------------------------------------------------


def run_gloo(size: int, path: Path, work: Callable[[GlooGroup], Any]) -> list[Any]:
    """What a function returns on each of `size` ranks of Gloo, which are threads here."""

    def start(group: ThreadGroup) -> Any:
        gloo = GlooGroup(group.rank, size, str(path / "store"), torch.device("cpu"))
        gloo.connect()
        return work(gloo)

    return run_ranks(size, start)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gloo_gives_every_rank_the_same_bits(size: int, tmp_path: Path) -> None:
    sizes = [*range(1, 40), 96, 192, 1000, 4097]

    def work(group: GlooGroup) -> list[Tensor]:
        noise = torch.Generator().manual_seed(group.rank)
        inputs = [torch.randn(n, generator=noise) for n in sizes]
        return [group.all_reduce(x) for x in inputs]

    first, *others = run_gloo(size, tmp_path, work)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


def test_gloo_rounds_16_bit_sums_once(tmp_path: Path) -> None:
    values = [256.0, 1.0, 1.0, 1.0]  # in bfloat16 256 + 1 is 256

    def work(group: GlooGroup) -> Tensor:
        return group.all_reduce(torch.tensor([values[group.rank]]).bfloat16())

    for total in run_gloo(4, tmp_path, work):
        assert total.dtype == torch.bfloat16
        assert total.item() == 260.0


def test_gather_puts_ranks_side_by_side_in_every_row(tmp_path: Path) -> None:
    def work(group: GlooGroup) -> Tensor:
        return group.all_gather(10 * group.rank + torch.arange(6).view(3, 2))

    for gathered in run_gloo(2, tmp_path, work):
        assert gathered.tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [4, 5, 14, 15]]
