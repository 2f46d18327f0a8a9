"""Random Qwen models of many shapes, beside Hugging Face's with the same weights."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from folo_lib.qwen3 import Qwen3ForCausalLM

Config = Qwen2Config | Qwen3Config
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
SHORT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
TINY: dict[str, Any] = {
    "vocab_size": 2100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "dtype": "float32",
}
"""The shape that the tests of the benchmark measure, as fields of a Qwen3Config."""
# model_type, H, H_kv, D (None: E / H), tied, attention_bias, RoPE
CASES: dict[str, tuple[str, int, int, int | None, bool, bool, dict[str, Any]]] = {
    "qwen3 4/1": ("qwen3", 4, 1, 16, True, False, DEFAULT),
    "qwen3 6/3 untied": ("qwen3", 6, 3, 10, False, False, SHORT),
    "qwen3 3/3 bias": ("qwen3", 3, 3, 32, True, True, DEFAULT),
    "qwen3 14/2 untied bias": ("qwen3", 14, 2, 8, False, True, DEFAULT),
    "qwen3 5/5 linear": ("qwen3", 5, 5, 14, True, False, LINEAR),
    "qwen3 12/3 untied linear bias": ("qwen3", 12, 3, 6, False, True, LINEAR),
    "qwen3 2/1 yarn": ("qwen3", 2, 1, 64, True, False, YARN),
    "qwen3 7/1 untied yarn": ("qwen3", 7, 1, 16, False, False, YARN),
    "qwen3 6/3 yarn bias": ("qwen3", 6, 3, 18, True, True, YARN),
    "qwen3 1/1 untied": ("qwen3", 1, 1, 24, False, False, DEFAULT),
    "qwen2 14/2": ("qwen2", 14, 2, None, True, False, DEFAULT),
    "qwen2 3/1 untied": ("qwen2", 3, 1, None, False, False, SHORT),
    "qwen2 4/4 linear": ("qwen2", 4, 4, None, True, False, LINEAR),
    "qwen2 9/9 untied yarn": ("qwen2", 9, 9, None, False, False, YARN),
    "qwen2 6/3 yarn": ("qwen2", 6, 3, None, True, False, YARN),
    "qwen2 8/2 own head_dim": ("qwen2", 8, 2, 20, False, False, DEFAULT),
    "qwen2 7/1 untied linear": ("qwen2", 7, 1, None, False, False, LINEAR),
}


def make_config(case: str, **changes: Any) -> Config:
    """The case's config, its other sizes drawn by its place in the table."""
    model_type, heads, kv_heads, head_dim, tied, bias, rope = CASES[case]
    rng = random.Random(list(CASES).index(case))
    sizes: dict[str, Any] = {"hidden_size": rng.randrange(31, 90)}
    if head_dim is None:
        sizes["hidden_size"] = heads * rng.choice([8, 10, 12])
    else:
        sizes["head_dim"] = head_dim
    if model_type == "qwen3":
        sizes["attention_bias"] = bias
    fields = sizes | {
        "vocab_size": rng.randrange(201, 400, 2),
        "intermediate_size": rng.randrange(41, 170, 2),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-4]),
        "max_position_embeddings": 160,
        "tie_word_embeddings": tied,
        "rope_parameters": dict(rope),
    }
    kind = Qwen3Config if model_type == "qwen3" else Qwen2Config
    return kind(**(fields | changes))


def randomize(model: PreTrainedModel) -> None:
    """Norms between 0.5 and 1.5, biases, and matrices that keep the size of what they map."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.5)
        elif "embed" in name:
            nn.init.normal_(weight, std=0.1)
        else:
            nn.init.normal_(weight, std=1.2 * weight.shape[1] ** -0.5)


def make_reference(
    config: Config, attention: str = "eager", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    torch.manual_seed(config.vocab_size)
    model = AutoModelForCausalLM.from_config(  # the model writes into its config
        copy.deepcopy(config), attn_implementation=attention, dtype=dtype
    ).eval()
    randomize(model)
    return model.requires_grad_(False)


def load(config: Config, theirs: PreTrainedModel, backend: str) -> Qwen3ForCausalLM:
    ours = Qwen3ForCausalLM(config, backend).to(theirs.dtype).eval()
    ours.load_weights(theirs.state_dict().items())
    return ours.requires_grad_(False)


def assert_parity(ours: Tensor, theirs: Tensor) -> None:
    """The bound of the course: 1e-5 standard deviations of the logits, at least 1e-5."""
    assert ours.shape == theirs.shape
    error, bound = (ours - theirs).abs().max().item(), 1e-5 * theirs.std().item()
    assert error <= max(1e-5, bound), f"{error:.2e} is more than {bound:.2e}"
