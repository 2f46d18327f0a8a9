"""The layers of page 15 for a shard of a model, with its sums in the norms after them.

Page 16's layers add up what a product gives, and the next kernel adds the sum to the residual
stream and norms it. Here one kernel does all of that, between the product of this rank and the
next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from .cuda_graph import Function
from .fused_decode import FusedLayers
from .kv_cache import AttentionMetadata
from .layers import RMSNorm
from .qwen3 import Qwen3DecoderLayer, Qwen3MLP
from .symmetric_memory import TICKET_BYTES, SharedGroup
from .tensor_parallel import ShardedForCausalLM
from .ticket_sums import EMPTY, add_norm_kernel

__all__ = ["SummedLayers"]


def run_mlp(mlp: Qwen3MLP, x: Tensor) -> Tensor:
    """This rank's part of what the MLP gives, `[N, E]`."""
    return F.linear(mlp.act_fn(mlp.gate_up_proj(x)), mlp.down_proj.weight)


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
        self.group, self.mlp = cast(SharedGroup, model.group), wrap(run_mlp)
        weight = model.model.embed_tokens.weight
        self.row_words = weight.shape[1] * weight.element_size() // 4
        self.most_rows = TICKET_BYTES // (4 * self.row_words)
        shape = 2, self.group.size, self.most_rows * self.row_words
        self.words = self.group.allocate(*shape, dtype=torch.int32, fill=EMPTY.value)
        addresses = self.group.find_addresses(self.words)
        self.addresses = torch.tensor(addresses, device=weight.device)
        self.turns = self.addresses.new_zeros(self.most_rows, dtype=torch.int32)

    def add_norm(
        self, part: Tensor, residual: Tensor, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """The normed sum, and the sum, of `residual` and all ranks' `part`; all `[N, E]`."""
        num_ranks = len(self.group.find_addresses(self.words))
        if len(part) > self.most_rows:
            part, num_ranks = self.group.all_reduce(part), 1
        normed, stream = torch.empty_like(part), torch.empty_like(part)
        tensors = part, residual, norm.weight, normed, stream
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
            BLOCK=triton.next_power_of_2(self.row_words),
            FLOAT=part.dtype == torch.float32,
            num_warps=8,
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
            part = self.mlp(mlp, x)
        final, _ = self.add_norm(part, residual, model.norm)
        return final
