"""Which models the kernels of page 15 can run."""

from __future__ import annotations

import torch

from .qwen3 import Attention, Qwen3ForCausalLM

__all__ = ["find_obstacle"]


def find_obstacle(model: Qwen3ForCausalLM) -> str | None:
    """Why a model cannot run in the kernels of this page, or None if it can."""
    config = model.config
    attention = next(one for one in model.modules() if isinstance(one, Attention))
    num_heads, num_kv_heads, _ = attention.heads
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": num_heads * attention.head_dim,
    }
    odd = [f"{name}={size}" for name, size in sizes.items() if size % 1024]
    dtype, group = model.model.embed_tokens.weight.dtype, num_heads // num_kv_heads
    rules = {
        "no q/k norm": attention.q_norm is None,
        "biases": attention.qkv_proj.bias is not None
        or attention.o_proj.bias is not None,
        f"{', '.join(odd)}, not a multiple of 1024": bool(odd),
        f"hidden_size={config.hidden_size}, above 4096": config.hidden_size > 4096,
        f"head_dim={attention.head_dim}, not 128": attention.head_dim != 128,
        f"{group} query heads per key head": group not in (1, 2, 4, 8),
        f"vocab_size={config.vocab_size}": config.vocab_size % 32 != 0,
        f"{dtype}": dtype not in (torch.bfloat16, torch.float16, torch.float32),
    }
    return next((name for name, is_broken in rules.items() if is_broken), None)
