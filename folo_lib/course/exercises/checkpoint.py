"""Checks of page 05's exercises: a header counted, a model cut into shards, LoRA merged."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require
from folo_lib.qwen3 import split_merged

__all__ = ["check_count_numbers", "check_merge_lora", "check_split_into_shards"]

Weights = dict[str, Tensor]
Header = dict[str, dict[str, Any]]
Counter = Callable[[Header], int]
Splitter = Callable[[Weights, int], tuple[dict[str, Weights], dict[str, Any]]]
Merger = Callable[[Weights, Weights, float], None]


def _make_header(shapes: dict[str, list[int]], dtype: str = "BF16") -> Header:
    """As safetensors writes it, for tensors of these shapes."""
    header: Header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header


def _require_count(
    solution: Counter, header: Header, wanted: int, shapes: object
) -> None:
    before = json.dumps(header)
    got = solution(header)
    require(
        isinstance(got, int),
        f"it gives a {type(got).__name__}, not an int, for the shapes {shapes}.",
    )
    require(json.dumps(header) == before, "it changed the header that it was given.")
    require(got == wanted, f"the shapes {shapes} give {got} instead of {wanted}.")


@exercise
def check_count_numbers(solution: Counter) -> None:
    """Headers of a few tensors, one difficulty after the other."""
    cases: list[dict[str, list[int]]] = [
        {"a": [3]},
        {"a": [3, 4]},
        {"a": [3, 4], "b": [5]},
        {"a": [2, 3, 4]},
        {"scale": []},
        {"empty": [0, 7], "a": [2]},
    ]
    for shapes in cases:
        wanted = sum(math.prod(shape) for shape in shapes.values())
        for dtype in ("BF16", "F32"):
            header = _make_header(shapes, dtype)
            _require_count(solution, header, wanted, f"{shapes} in {dtype}")
    header = _make_header({"a": [6]})
    del header["__metadata__"]
    _require_count(solution, header, 6, "{'a': [6]}, without __metadata__,")


def _num_bytes(weights: Weights) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def _cut(weights: Weights, max_bytes: int) -> list[list[str]]:
    """The names by shard: in order, and a new shard where the next tensor does not fit."""
    shards: list[list[str]] = []
    used = 0
    for name, tensor in weights.items():
        size = _num_bytes({name: tensor})
        if not shards or used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _require_shards(
    solution: Splitter, weights: Weights, max_bytes: int, what: str
) -> None:
    """Files, their names and their index, against the rule written with lists."""
    before = list(weights.items())
    result = solution(weights, max_bytes)
    require(
        isinstance(result, tuple) and len(result) == 2,
        f"it gives a {type(result).__name__}; wanted is a pair, the files and the index.",
    )
    files, index = result
    for part, value in (("files", files), ("index", index)):
        kind = type(value).__name__
        require(isinstance(value, dict), f"the {part} are a {kind}, not a dict.")
    unchanged = len(weights) == len(before) and all(
        weights.get(name) is tensor for name, tensor in before
    )
    require(unchanged, f"{what}: it changed the dict of weights that it was given.")
    _require_contents(files, weights, max_bytes, f"{what}, max_bytes = {max_bytes}")

    groups = _cut(weights, max_bytes)
    names = [
        f"model-{i:05}-of-{len(groups):05}.safetensors"
        for i in range(1, len(groups) + 1)
    ]
    require(
        list(files) == names, f"{what}: the files are {list(files)}, wanted: {names}."
    )
    _require_index(index, weights, dict(zip(names, groups, strict=True)), what)


def _require_contents(
    files: dict[str, Weights], weights: Weights, max_bytes: int, what: str
) -> None:
    """Each tensor once, no shard too large, none begun too early."""
    for file, shard in files.items():
        kind = type(shard).__name__
        require(isinstance(shard, dict), f"{what}: {file} is a {kind}, not a dict.")
        require(
            shard, f"{what}: {file} is empty, and a file without tensors is useless."
        )
        for name, tensor in shard.items():
            require(name in weights, f"{what}: {file} holds an unknown {name!r}.")
            same = (
                isinstance(tensor, Tensor)
                and tensor.dtype == weights[name].dtype
                and torch.equal(tensor, weights[name])
            )
            require(same, f"{what}: {name!r} in {file} is not the tensor it was.")
    stored = [name for shard in files.values() for name in shard]
    lost = [name for name in weights if name not in stored]
    require(not lost, f"{what}: no file holds {lost}. What becomes of the last shard?")
    twice = sorted({name for name in stored if stored.count(name) > 1})
    require(not twice, f"{what}: {twice} stand in more than one file.")
    for file, shard in files.items():
        size = _num_bytes(shard)
        require(
            size <= max_bytes or len(shard) == 1,
            f"{what}: {file} holds {list(shard)}, {size} bytes, and only a tensor that is "
            "larger by itself may exceed max_bytes.",
        )
    got, wanted = [list(shard) for shard in files.values()], _cut(weights, max_bytes)
    sizes = {name: _num_bytes({name: tensor}) for name, tensor in weights.items()}
    require(
        got == wanted,
        f"{what}: sizes {sizes} were cut into {got}, wanted: {wanted}. Keep the order, and "
        "begin a new shard only where the next tensor would make this one larger than "
        "max_bytes.",
    )


def _require_index(
    index: dict[str, Any], weights: Weights, groups: dict[str, list[str]], what: str
) -> None:
    for key in ("metadata", "weight_map"):
        require(key in index, f"{what}: the index lacks {key!r}; it has {list(index)}.")
    weight_map = {name: file for file, names in groups.items() for name in names}
    got = index["weight_map"]
    require(
        got == weight_map,
        f"{what}: weight_map is {got}, wanted: {weight_map}, from tensor to file.",
    )
    total = _num_bytes(weights)
    metadata = index["metadata"]
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    require(
        size == total,
        f"{what}: the index's metadata is {metadata}, wanted: a total_size of {total}, in "
        "bytes and over all files.",
    )
    try:
        json.dumps(index)
    except TypeError as error:
        require(False, f"{what}: json cannot write the index: {error}.")


def _bytes(**sizes: int) -> Weights:
    """Tensors of so many bytes each, all different."""
    return {
        name: torch.arange(size, dtype=torch.uint8) + i
        for i, (name, size) in enumerate(sizes.items())
    }


@exercise
def check_split_into_shards(solution: Splitter) -> None:
    """Shards and index of many dicts of tensors, against the rule written with lists."""
    _require_shards(solution, _bytes(a=4), 10, "one tensor")
    _require_shards(solution, _bytes(a=4, b=4), 10, "two that fit")
    _require_shards(solution, _bytes(a=4, b=6, c=1), 10, "two that fill a shard")
    _require_shards(
        solution, _bytes(z=6, b=6, a=2), 10, "names not in alphabetic order"
    )
    _require_shards(solution, _bytes(big=20, a=4), 10, "a large tensor first")
    _require_shards(solution, _bytes(a=4, big=20, b=4), 10, "a large tensor between")
    _require_shards(solution, _bytes(a=4, big=20), 10, "a large tensor last")
    narrow = {"a": torch.ones(2, 2), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    _require_shards(solution, narrow, 24, "16 bytes in float32, 8 in bfloat16")
    whole = torch.arange(6.0).reshape(3, 2)
    views = {"q": whole[:1], "k": whole[1:2], "v": whole[2:]}
    _require_shards(solution, views, 16, "three views of one matrix, 8 bytes each")
    many = _bytes(**{f"layer.{i}": 1 for i in range(12)})
    _require_shards(solution, many, 1, "twelve shards")
    rng = random.Random(0)
    for max_bytes in (1, 8, 30, 200):
        sizes = {f"t{i}": rng.randint(1, 20) for i in range(30)}
        _require_shards(solution, _bytes(**sizes), max_bytes, "random sizes")


PREFIX = "base_model.model."
QKV = "model.layers.0.self_attn.qkv_proj.weight"
Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
DOWN = "model.layers.0.mlp.down_proj"


def _model(dtype: torch.dtype = torch.float32) -> tuple[Weights, Weights]:
    """Our parameters, and the views of them under the names of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(*shape, generator=generator).to(dtype)
        for name, shape in ((QKV, (8, 6)), (f"{DOWN}.weight", (6, 10)))
    }
    views: Weights = {}
    for name, parameter in parameters.items():
        views |= split_merged(name, parameter, [2, 1, 1])
    return parameters, views


def _adapter(weights: Weights, ranks: dict[str, int]) -> Weights:
    """A and B for each module, all B first."""
    generator = torch.Generator().manual_seed(1)
    pairs: Weights = {}
    for half in "BA":
        for module, r in ranks.items():
            out, inner = weights[f"{module}.weight"].shape
            shape = (out, r) if half == "B" else (r, inner)
            values = torch.randn(*shape, generator=generator)
            pairs[f"{PREFIX}{module}.lora_{half}.weight"] = values
    return pairs


def _require_merged(
    solution: Merger, ranks: dict[str, int], alpha: float, what: str
) -> None:
    """In place, against a double loop over the entries of the products."""
    _, weights = _model()
    adapter = _adapter(weights, ranks)
    wanted = {name: tensor.clone() for name, tensor in weights.items()}
    for module, r in ranks.items():
        lora_a, lora_b = (
            adapter[f"{PREFIX}{module}.lora_{half}.weight"] for half in "AB"
        )
        for row in range(lora_b.shape[0]):
            delta = (lora_b[row, :, None] * lora_a).sum(0)  # [in]
            wanted[f"{module}.weight"][row] += alpha / r * delta
    given = {name: tensor.clone() for name, tensor in adapter.items()}
    _call(solution, weights, adapter, alpha, what)
    kept = adapter.keys() == given.keys() and all(
        torch.equal(adapter[name], tensor) for name, tensor in given.items()
    )
    require(kept, f"{what}: it changed the adapter.")
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        named = module in ranks
        why = f"r = {ranks[module]}, alpha = {alpha}" if named else "not in the adapter"
        here = wanted[name] - tensor
        where = divmod(int(here.abs().argmax()), tensor.shape[1])
        require(
            torch.allclose(tensor, wanted[name], atol=1e-4, rtol=1e-4),
            f"{what}: {name}[{where[0]}, {where[1]}] is {tensor[where].item():.4f}, wanted: "
            f"{wanted[name][where].item():.4f} ({why}).",
        )


def _call(
    solution: Merger, weights: Weights, adapter: Weights, alpha: float, what: str
) -> None:
    """Merges, and looks whether the same tensors are still there."""
    before = dict(weights)
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    solution(weights, adapter, alpha)
    require(
        weights.keys() == before.keys(),
        f"{what}: names came into the weights or left them.",
    )
    for name, tensor in weights.items():
        if tensor is before[name]:
            continue
        same = torch.equal(before[name], copies[name])
        require(
            tensor.data_ptr() == before[name].data_ptr() and not same,
            f"{what}: weights[{name!r}] is another tensor now, and the model still has the "
            "old one. Write into the tensor that is there.",
        )


def _require_refused(
    solution: Merger, weights: Weights, adapter: Weights, named: str, what: str
) -> None:
    """A ValueError that names the trouble, before anything has been changed."""
    before = {name: tensor.clone() for name, tensor in weights.items()}
    try:
        solution(weights, adapter, 1.0)
    except ValueError as error:
        require(
            named in str(error), f"{what}: the error does not name {named}: {error}"
        )
    except KeyError as error:
        require(False, f"{what} gives KeyError: {error}; say it with a ValueError.")
    else:
        require(False, f"{what} was passed over in silence: a ValueError, naming it.")
    same = all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    require(same, f"{what}: some weights were changed before the error. Check first.")


@exercise
def check_merge_lora(solution: Merger) -> None:
    """Merged weights against a double loop; in place, rounded once, all or nothing."""
    simple = {f"{DOWN}.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    adapter = {
        f"{PREFIX}{DOWN}.lora_A.weight": torch.tensor([[1.0, 10.0]]),
        f"{PREFIX}{DOWN}.lora_B.weight": torch.tensor([[1.0], [0.0], [2.0]]),
    }
    _call(solution, simple, adapter, 1.0, "a weight of [3, 2], r = 1, alpha = 1")
    got, wanted = simple[f"{DOWN}.weight"].tolist(), [[2, 12], [3, 4], [7, 26]]
    require(
        got == wanted,
        f"[[1, 2], [3, 4], [5, 6]] with A = [[1, 10]], B = [[1], [0], [2]], alpha = 1 became "
        f"{got}, wanted: {wanted}.",
    )
    _require_merged(solution, {DOWN: 1}, 3.0, "rank 1")
    _require_merged(solution, {DOWN: 4}, 8.0, "rank 4")
    _require_merged(solution, {Q: 2, V: 3, DOWN: 4}, 16.0, "three ranks in one adapter")

    parameters, weights = _model()
    before = parameters[QKV].clone()
    _call(solution, weights, _adapter(weights, {K: 2}), 2.0, "one of q, k and v")
    rows = (parameters[QKV] != before).any(dim=1).tolist()
    require(
        rows == [False] * 4 + [True] * 2 + [False] * 2,
        f"k_proj is rows 4 and 5 of the merged matrix; changed were {rows}.",
    )

    wide = {f"{DOWN}.weight": torch.tensor([[-1.0]], dtype=torch.bfloat16)}
    halves = {
        f"{PREFIX}{DOWN}.lora_A.weight": torch.tensor([[1 + 2.0**-9]]),
        f"{PREFIX}{DOWN}.lora_B.weight": torch.tensor([[1.0]]),
    }
    _call(solution, wide, halves, 1.0, "a bfloat16 weight")
    result = wide[f"{DOWN}.weight"]
    require(result.dtype == torch.bfloat16, f"bfloat16 became {result.dtype}.")
    require(
        result.item() == 2.0**-9,
        f"a bfloat16 weight of -1 plus 1.001953125 became {result.item():g}, wanted: "
        "0.00195312. Add in float32, and round the sum only.",
    )

    _, weights = _model()
    good = _adapter(weights, {DOWN: 2})
    unknown = "model.layers.7.mlp.down_proj"
    stray = {name.replace(DOWN, unknown): tensor for name, tensor in good.items()}
    _require_refused(
        solution, weights, good | stray, unknown, "an adapter for a layer 7 of 1"
    )
    for half, other in ("AB", "BA"):
        lonely = _adapter(weights, {Q: 2})
        del lonely[f"{PREFIX}{Q}.lora_{half}.weight"]
        what = f"a lora_{other} without its lora_{half}"
        _require_refused(solution, weights, good | lonely, Q, what)
