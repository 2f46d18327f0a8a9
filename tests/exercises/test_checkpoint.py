"""Checks of page 05's exercises refuse plausible mistakes, and say which."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib.course.exercises.checkpoint import (
    check_count_numbers,
    check_merge_lora,
    check_split_into_shards,
)

Weights = dict[str, Tensor]
Files = dict[str, Weights]


Header = dict[str, dict[str, Any]]


def shapes_of(header: Header) -> list[list[int]]:
    return [entry["shape"] for name, entry in header.items() if name[0] != "_"]


def from_bytes(header: Header) -> int:
    offsets = [e["data_offsets"] for e in header.values() if "data_offsets" in e]
    return sum(end - start for start, end in offsets) // 2


def metadata_taken_out(header: Header) -> int:
    del header["__metadata__"]
    return sum(math.prod(shape) for shape in shapes_of(header))


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (lambda h: sum(math.prod(e["shape"]) for e in h.values()), "KeyError"),
        (lambda h: sum(sum(shape) for shape in shapes_of(h)), "give 7 instead of 12"),
        (lambda h: sum(s[0] * s[-1] for s in shapes_of(h)), "give 9 instead of 3"),
        (lambda h: math.prod(shapes_of(h)[0]), "give 12 instead of 17"),
        (
            lambda h: sum(math.prod(s) for s in shapes_of(h) if s),
            "{'scale': []} in BF16 give 0 instead of 1",
        ),
        (from_bytes, "{'a': [3]} in F32 give 6 instead of 3"),
        (metadata_taken_out, "changed the header"),
        (
            lambda h: float(sum(math.prod(s) for s in shapes_of(h))),
            "a float, not an int",
        ),
        (lambda h: len(h) - 1, "give 1 instead of 3"),
    ],
)
def test_count_numbers(attempt: Callable[[Header], Any], fragment: str) -> None:
    verdict = check_count_numbers(attempt)
    assert not verdict
    assert fragment in verdict.message.replace("\n", " ")


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def greedy(
    weights: Weights, max_bytes: int, size: Callable[[Tensor], int] = size_of
) -> list[Weights]:
    shards: list[Weights] = []
    used = 0
    for name, tensor in weights.items():
        if not shards or used + size(tensor) > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size(tensor)
    return shards


def named(
    shards: list[Weights], width: int = 5, first: int = 1
) -> tuple[Files, dict[str, Any]]:
    last = f"of-{len(shards):0{width}}.safetensors"
    files = {f"model-{i:0{width}}-{last}": s for i, s in enumerate(shards, first)}
    weight_map = {name: file for file, shard in files.items() for name in shard}
    total = sum(size_of(x) for shard in shards for x in shard.values())
    return files, {"metadata": {"total_size": total}, "weight_map": weight_map}


def right(weights: Weights, max_bytes: int) -> tuple[Files, dict[str, Any]]:
    return named(greedy(weights, max_bytes))


def loses_the_last(weights: Weights, max_bytes: int) -> Any:
    shards, shard = [], {}
    for name, tensor in weights.items():
        if shard and sum(map(size_of, shard.values())) + size_of(tensor) > max_bytes:
            shards.append(shard)
            shard = {}
        shard[name] = tensor
    return named(shards)


def opens_before_the_first(weights: Weights, max_bytes: int) -> Any:
    shards: list[Weights] = [{}]
    for name, tensor in weights.items():
        if sum(map(size_of, shards[-1].values())) + size_of(tensor) > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    return named(shards)


def one_too_many(weights: Weights, max_bytes: int) -> Any:
    shards: list[Weights] = [{}]
    for name, tensor in weights.items():
        if sum(map(size_of, shards[-1].values())) > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    return named(shards)


def strictly_below(weights: Weights, max_bytes: int) -> Any:
    return named(greedy(weights, max_bytes - 1))


def counts_numbers(weights: Weights, max_bytes: int) -> Any:
    return named(greedy(weights, max_bytes, Tensor.numel))


def four_bytes_each(weights: Weights, max_bytes: int) -> Any:
    floats = all(x.is_floating_point() for x in weights.values())
    size = (lambda x: 4 * x.numel()) if floats else size_of
    return named(greedy(weights, max_bytes, size))


def counts_storage(weights: Weights, max_bytes: int) -> Any:
    return named(greedy(weights, max_bytes, lambda x: x.untyped_storage().nbytes()))


def alphabetic(weights: Weights, max_bytes: int) -> Any:
    return named(greedy(dict(sorted(weights.items())), max_bytes))


def large_ones_apart(weights: Weights, max_bytes: int) -> Any:
    small = {n: x for n, x in weights.items() if size_of(x) <= max_bytes}
    large = [{n: x} for n, x in weights.items() if n not in small]
    return named(greedy(small, max_bytes) + large)


def short_numbers(weights: Weights, max_bytes: int) -> Any:
    return named(greedy(weights, max_bytes), width=1)


def counts_from_zero(weights: Weights, max_bytes: int) -> Any:
    return named(greedy(weights, max_bytes), first=0)


def empties_its_input(weights: Weights, max_bytes: int) -> Any:
    shards = greedy(weights, max_bytes)
    weights.clear()
    return named(shards)


def lists_by_file(weights: Weights, max_bytes: int) -> Any:
    files, index = right(weights, max_bytes)
    by_file = {file: list(shard) for file, shard in files.items()}
    return files, index | {"weight_map": by_file}


def map_alone(weights: Weights, max_bytes: int) -> Any:
    files, index = right(weights, max_bytes)
    return files, index["weight_map"]


def size_of_the_last(weights: Weights, max_bytes: int) -> Any:
    files, index = right(weights, max_bytes)
    last = sum(map(size_of, list(files.values())[-1].values()))
    return files, index | {"metadata": {"total_size": last}}


def size_as_a_tensor(weights: Weights, max_bytes: int) -> Any:
    files, index = right(weights, max_bytes)
    total = torch.tensor(index["metadata"]["total_size"])
    return files, index | {"metadata": {"total_size": total}}


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (loses_the_last, "What becomes of the last shard?"),
        (opens_before_the_first, "a large tensor first"),
        (one_too_many, "two that fill a shard, max_bytes = 10: "),
        (strictly_below, "two that fill a shard"),
        (counts_numbers, "holds ['q', 'k', 'v'], 24 bytes"),
        (four_bytes_each, "16 bytes in float32, 8 in bfloat16"),
        (counts_storage, "three views of one matrix"),
        (alphabetic, "names not in alphabetic order"),
        (large_ones_apart, "a large tensor"),
        (short_numbers, "wanted: ['model-00001-of-00001.safetensors']"),
        (counts_from_zero, "the files are ['model-00000-of-00001.safetensors']"),
        (empties_its_input, "changed the dict of weights"),
        (lists_by_file, "from tensor to file"),
        (map_alone, "the index lacks 'metadata'"),
        (size_of_the_last, "over all files"),
        (size_as_a_tensor, "json cannot write the index"),
        (lambda weights, max_bytes: named([weights]), "may exceed max_bytes"),
        (lambda weights, max_bytes: greedy(weights, max_bytes), "wanted is a pair"),
        (lambda weights, max_bytes: None, "gives a NoneType"),
    ],
)
def test_split_into_shards(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_split_into_shards(attempt)
    assert not verdict
    assert fragment in verdict.message


def test_hugging_face_splits_alike_where_no_tensor_is_too_large() -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    weights = {f"t{i}": torch.zeros(i % 7 + 1, 3) for i in range(40)}
    theirs = split_torch_state_dict_into_shards(weights, max_shard_size=200)
    files, index = right(weights, 200)
    assert theirs.filename_to_tensors == {f: list(shard) for f, shard in files.items()}
    assert theirs.tensor_to_filename == index["weight_map"]
    assert theirs.metadata == index["metadata"]


PREFIX = "base_model.model."


def paired(adapter: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    ends = ".lora_A.weight", ".lora_B.weight"
    modules = dict.fromkeys(
        name.removesuffix(ends[0]).removesuffix(ends[1]) for name in adapter
    )
    for module in modules:
        for end in ends:
            if module + end not in adapter:
                raise ValueError(f"{module}{end} is missing.")
    return {
        module.removeprefix(PREFIX): (
            adapter[module + ends[0]],
            adapter[module + ends[1]],
        )
        for module in modules
    }


def delta_of(pair: tuple[Tensor, Tensor], alpha: float) -> Tensor:
    return alpha / len(pair[0]) * (pair[1] @ pair[0])


def without_alpha(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, (a, b) in paired(adapter).items():
        weights[f"{module}.weight"] += b @ a


def without_the_rank(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, (a, b) in paired(adapter).items():
        weights[f"{module}.weight"] += alpha * (b @ a)


def by_the_input_size(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, (a, b) in paired(adapter).items():
        weights[f"{module}.weight"] += alpha / b.shape[0] * (b @ a)


def one_rank_for_all(weights: Weights, adapter: Weights, alpha: float) -> None:
    pairs = paired(adapter)
    r = len(next(iter(pairs.values()))[0])
    for module, (a, b) in pairs.items():
        weights[f"{module}.weight"] += alpha / r * (b @ a)


def wrong_way_round(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, (a, b) in paired(adapter).items():
        weights[f"{module}.weight"] += alpha / len(a) * (a @ b)


def new_tensors(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, pair in paired(adapter).items():
        name = f"{module}.weight"
        weights[name] = weights[name] + delta_of(pair, alpha)


def of_a_local_name(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, pair in paired(adapter).items():
        weight = weights[f"{module}.weight"]
        weight = weight + delta_of(pair, alpha)


def rounds_twice(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, pair in paired(adapter).items():
        weight = weights[f"{module}.weight"]
        weight += delta_of(pair, alpha).to(weight.dtype)


def passes_over_strangers(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, pair in paired(adapter).items():
        if f"{module}.weight" in weights:
            weight = weights[f"{module}.weight"]
            weight.copy_(weight.float() + delta_of(pair, alpha))


def looks_up_while_adding(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, pair in paired(adapter).items():
        if f"{module}.weight" not in weights:
            raise ValueError(f"no {module}")
        weight = weights[f"{module}.weight"]
        weight.copy_(weight.float() + delta_of(pair, alpha))


def leaves_it_to_the_dict(weights: Weights, adapter: Weights, alpha: float) -> None:
    for module, pair in paired(adapter).items():
        weight = weights[f"{module}.weight"]
        weight.copy_(weight.float() + delta_of(pair, alpha))


def passes_over_lonely_halves(weights: Weights, adapter: Weights, alpha: float) -> None:
    whole = {
        name: tensor
        for name, tensor in adapter.items()
        if name.replace("lora_A", "lora_B") in adapter
        and name.replace("lora_B", "lora_A") in adapter
    }
    pairs = paired(whole)
    for module in pairs:
        if f"{module}.weight" not in weights:
            raise ValueError(f"no {module}")
    leaves_it_to_the_dict(weights, whole, alpha)


def uses_up_the_adapter(weights: Weights, adapter: Weights, alpha: float) -> None:
    leaves_it_to_the_dict(weights, adapter, alpha)
    adapter.clear()


def in_the_order_of_the_file(weights: Weights, adapter: Weights, alpha: float) -> None:
    names = list(adapter)
    for a, b in zip(names[::2], names[1::2], strict=True):
        module = a.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        weight = weights[f"{module}.weight"]
        weight += delta_of((adapter[a], adapter[b]), alpha)


@pytest.mark.parametrize(
    ("attempt", "fragment"),
    [
        (without_alpha, "rank 1: model.layers.0.mlp.down_proj.weight["),
        (without_the_rank, "r = 4, alpha = 8.0"),
        (by_the_input_size, "[[1, 2], [3, 4], [5, 6]] with"),
        (one_rank_for_all, "three ranks in one adapter"),
        (wrong_way_round, "RuntimeError"),
        (new_tensors, "Write into the tensor that is there"),
        (of_a_local_name, "became [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]"),
        (rounds_twice, "round the sum only"),
        (passes_over_strangers, "passed over in silence"),
        (looks_up_while_adding, "some weights were changed before the error"),
        (leaves_it_to_the_dict, "gives KeyError"),
        (passes_over_lonely_halves, "a lora_B without its lora_A was passed over"),
        (uses_up_the_adapter, "changed the adapter"),
        (in_the_order_of_the_file, "KeyError"),
        (lambda weights, adapter, alpha: None, "became [[1.0, 2.0]"),
        (lambda weights, adapter, alpha: weights.clear(), "names came into"),
    ],
)
def test_merge_lora(attempt: Callable[..., Any], fragment: str) -> None:
    verdict = check_merge_lora(attempt)
    assert not verdict
    assert fragment in verdict.message


def test_global_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    check_split_into_shards(right)
    check_merge_lora(looks_up_while_adding)
    assert torch.equal(torch.random.get_rng_state(), state)
