"""Which models the kernels of page 15 can run, and in which pieces."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .qwen3 import Attention, Qwen3ForCausalLM

__all__ = ["FusionSizes", "choose_fusion_sizes", "find_obstacle"]


def find_obstacle(model: Qwen3ForCausalLM) -> str | None:
    """Why a model cannot run in the kernels of this page, or None if it can."""
    config = model.config
    attention = next(one for one in model.modules() if isinstance(one, Attention))
    num_heads, num_kv_heads, _ = attention.heads
    embedding = model.model.embed_tokens.weight
    vocab_size = len(embedding)  # of a shard fewer than the config says
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": num_heads * attention.head_dim,
    }
    odd = [f"{name}={size}" for name, size in sizes.items() if size % 1024]
    dtype, group = embedding.dtype, num_heads // num_kv_heads
    rules = {
        "no q/k norm": attention.q_norm is None,
        "biases": attention.qkv_proj.bias is not None
        or attention.o_proj.bias is not None,
        f"{', '.join(odd)}, not a multiple of 1024": bool(odd),
        f"hidden_size={config.hidden_size}, above 4096": config.hidden_size > 4096,
        f"head_dim={attention.head_dim}, not 128": attention.head_dim != 128,
        f"{group} query heads per key head": group not in (1, 2, 4, 8),
        f"vocab_size={vocab_size}": vocab_size % 32 != 0,
        f"{dtype}": dtype not in (torch.bfloat16, torch.float16, torch.float32),
    }
    return next((name for name, is_broken in rules.items() if is_broken), None)


class FusionSizes(NamedTuple):
    """How the kernels of a step of `num_seqs` sequences are cut.

    They are multiplied together as `rows`, a power of two. Each program of a product has
    some rows of a matrix, counted in eights. With one of `head_stages`, the head brings no
    tile to the shared memory ahead of time.
    """

    num_seqs: int
    rows: int
    qkv_groups: int
    head_groups: int
    residual_groups: int
    head_stages: int = 3


def choose_fusion_sizes(
    num_seqs: int, dtype: torch.dtype, hidden_size: int
) -> FusionSizes:
    """By rule, so that every start has the same; found by trying, on an H200.

    Those for rows of more than 2,048 numbers have not been tried against others: they are what
    fits into the registers of a program and into its shared memory.
    """
    rows = 1 if num_seqs == 1 else max(4, 1 << (num_seqs - 1).bit_length())
    stages = 3 if hidden_size <= 2048 else 1
    if dtype == torch.float32:  # for checks: numbers of four bytes need twice the room
        return FusionSizes(num_seqs, rows, 1, 1, 1, stages)
    if hidden_size > 2048:
        groups = (1, 4, 1) if rows < 8 else (2, 4, 2)
    else:
        groups = (2, 2, 1) if rows < 8 else (4, 2, 2)
    return FusionSizes(num_seqs, rows, *groups, stages)
