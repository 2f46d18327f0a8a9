"""The layers of page 15 for a shard of a model, with its sums in the norms after them.

Page 16's layers add up what a product gives, and the next kernel adds the sum to the residual
stream and norms it. Here one kernel does all of that, between the product of this rank and the
next one.

Half a matrix makes half as many programs. Where those of the MLP's first product fit on the card
together, a kernel of our own is quicker than PyTorch's, and the activation is a part of it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .cuda_graph import Function
from .fused_decode import FusedLayers
from .kv_cache import AttentionMetadata
from .layers import RMSNorm
from .qwen3 import Qwen3DecoderLayer, Qwen3MLP
from .symmetric_memory import ONE_KERNEL_BYTES, SharedGroup
from .tensor_parallel import ShardedForCausalLM
from .ticket_sums import EMPTY, add_norm_kernel

__all__ = ["SummedLayers"]


MOST_ROWS = 64
"""For which `gate_up_kernel` was tried."""
COLUMNS = 64
"""Of the MLP, that a program of it makes."""


@triton.jit(do_not_specialize=["num_rows"])
def gate_up_kernel(
    x,  # [num_rows, K]
    w,  # [2 * INNER, K], gate before up
    y,  # [num_rows, INNER]
    num_rows,
    INNER: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BK: tl.constexpr,
):
    """`silu(x @ gate.T) * (x @ up.T)`, some columns for all rows a program."""
    rows, k = tl.arange(0, ROWS)[:, None], tl.arange(0, BK)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inputs, weights = x + rows * K + k[None, :], w + columns[:, None] * K + k[None, :]
    exist = rows < num_rows
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, K, BK):
        tile = tl.load(inputs + first, mask=exist, other=0.0)
        left = tl.load(weights + first)
        right = tl.load(weights + INNER * K + first)
        gate = tl.dot(tile, tl.trans(left), gate, input_precision="ieee")
        up = tl.dot(tile, tl.trans(right), up, input_precision="ieee")
    opened = gate * tl.sigmoid(gate) * up
    tl.store(y + rows * INNER + columns, opened.to(y.dtype.element_ty), mask=exist)


def fills_one_round(mlp: Qwen3MLP, device: torch.device) -> bool:
    """Whether the programs of `gate_up_kernel` run together, and more than half the card works."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    has_room = properties.shared_memory_per_multiprocessor > 200 * 1024
    count, most = mlp.down_proj.in_features // COLUMNS, properties.multi_processor_count
    return has_room and most // 2 < count <= most


def run_gate_up(mlp: Qwen3MLP, x: Tensor) -> Tensor:
    """What goes into the second product of the MLP, for at most `MOST_ROWS` rows."""
    w, inner = mlp.gate_up_proj.weight, mlp.down_proj.in_features
    y = x.new_empty(len(x), inner)
    launch: Any = gate_up_kernel
    launch[(inner // COLUMNS,)](
        x,
        w,
        y,
        len(x),
        INNER=inner,
        K=x.shape[1],
        ROWS=max(16, triton.next_power_of_2(len(x))),
        COLUMNS=COLUMNS,
        BK=256 // x.element_size(),
        num_warps=4,
        num_stages=4,
    )
    return y


def run_activation(mlp: Qwen3MLP, x: Tensor) -> Tensor:
    """The same for any number of rows."""
    opened: Tensor = mlp.act_fn(mlp.gate_up_proj(x))
    return opened


class SummedLayers(FusedLayers):
    """`FusedLayers` of a shard, of a dtype that symmetric memory adds up.

    Args:
        model: the shard, of which `find_obstacle` finds none.
        wrap: see `LayerwiseModel`.
    """

    def __init__(
        self, model: ShardedForCausalLM, wrap: Callable[[Function], Function]
    ) -> None:
        super().__init__(model, wrap)
        self.group, self.activate = cast(SharedGroup, model.group), wrap(run_activation)
        weight = model.model.embed_tokens.weight
        self.row_words = weight.shape[1] * weight.element_size() // 4
        self.most_rows = ONE_KERNEL_BYTES // (4 * self.row_words)
        shape = 2, self.group.size, self.most_rows * self.row_words
        self.words = self.group.allocate(*shape, dtype=torch.int32, fill=EMPTY.value)
        addresses = self.group.find_addresses(self.words)
        self.addresses = torch.tensor(addresses, device=weight.device)
        self.turns = self.addresses.new_zeros(self.most_rows, dtype=torch.int32)
        mlp = cast(Qwen3DecoderLayer, model.model.layers[0]).mlp
        self.fills_one_round = fills_one_round(mlp, weight.device)

    def add_norm(
        self, part: Tensor, residual: Tensor, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """The normed sum, and the sum, of `residual` and all ranks' `part`; all `[N, E]`."""
        num_ranks = len(self.group.find_addresses(self.words))
        if len(part) > self.most_rows:
            part, num_ranks = self.group.all_reduce(part), 1
        normed, stream = torch.empty_like(part), torch.empty_like(part)
        tensors = part, residual, norm.weight, normed, stream
        block = triton.next_power_of_2(self.row_words)
        launch: Any = add_norm_kernel
        launch[(len(part),)](
            *(one.view(torch.int32) for one in tensors),
            self.words,
            self.addresses,
            self.turns,
            self.words.shape[2],
            norm.eps,
            W=self.row_words,
            RANK=self.group.rank,
            RANKS=num_ranks,
            BLOCK=block,
            FLOAT=part.dtype == torch.float32,
            num_warps=min(8, max(1, block // 64)),  # no thread shares its words
        )
        return normed, stream

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Final hidden states `[N, E]` of a step; see `Qwen3Model.forward`."""
        model = self.model.model
        residual, cos, sin = self.embed(self.model, input_ids, positions)
        part = torch.zeros_like(residual)  # x + 0: all layers run alike
        for layer, kv_cache in zip(model.layers, kv_caches, strict=True):
            assert isinstance(layer, Qwen3DecoderLayer)
            attention, mlp = layer.self_attn, layer.mlp
            x, residual = self.add_norm(part, residual, layer.input_layernorm)
            projected = (attention.qkv_proj(x),)
            output = self.attend(layer, projected, (cos, sin), kv_cache, metadata)
            part = F.linear(output.flatten(-2), attention.o_proj.weight)
            x, residual = self.add_norm(part, residual, layer.post_attention_layernorm)
            is_ours = self.fills_one_round and len(x) <= MOST_ROWS
            y = run_gate_up(mlp, x) if is_ours else self.activate(mlp, x)
            part = F.linear(y, mlp.down_proj.weight)
        final, _ = self.add_norm(part, residual, model.norm)
        return final
