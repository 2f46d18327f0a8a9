"""rope.py against Hugging Face: equal to the last bit, or an error that names the field."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

from folo_lib.rope import (
    RotaryEmbedding,
    apply_rotary_emb,
    compute_cos_sin,
    compute_inv_freq,
    compute_rope,
    compute_yarn_attention_factor,
    compute_yarn_inv_freq,
    longest_context,
)

DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 10_240,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": DEFAULT,
    "theta 1e4": DEFAULT | {"rope_theta": 1e4},
    "theta int": DEFAULT | {"rope_theta": 5_000_000},
    "linear": LINEAR,
    "linear theta 1e4": LINEAR | {"rope_theta": 1e4, "factor": 2},
    "linear 7.3": LINEAR | {"factor": 7.3},
    "yarn": YARN,
    "yarn of Qwen3": YARN | {"original_max_position_embeddings": 32_768},
    "yarn theta 1e4": YARN
    | {"rope_theta": 1e4, "factor": 40, "original_max_position_embeddings": 1024},
    "yarn short": YARN | {"original_max_position_embeddings": 256, "factor": 3.7},
    "yarn ramp from below 0": YARN | {"original_max_position_embeddings": 100},
    "yarn ramp of length 0": YARN | {"original_max_position_embeddings": 6},
    "yarn factor 1": YARN | {"factor": 1.0},
    "yarn below 1": YARN | {"factor": 0.5},
    "yarn attention_factor": YARN | {"attention_factor": 0.7},
    "yarn attention_factor 0": YARN | {"attention_factor": 0.0},
    "yarn attention_factor None": YARN | {"attention_factor": None},
    "yarn no truncate": YARN | {"truncate": False},
    "yarn truncate None": YARN | {"truncate": None},
    "yarn betas": YARN | {"beta_fast": 16, "beta_slow": 2.5},
    "yarn betas None": YARN | {"beta_fast": None, "beta_slow": None},
    "yarn equal betas": YARN | {"beta_fast": 4, "beta_slow": 4, "truncate": False},
    "yarn mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn mscale alone": YARN | {"mscale": 0.707},
    "yarn mscale zero": YARN | {"mscale": 0.0, "mscale_all_dim": 1.0},
    "yarn mscale below 1": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "factor": 0.5},
}
HEAD_DIMS = [2, 6, 64, 96, 128]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_parameters = pytest.mark.parametrize(
    "parameters", PARAMETERS.values(), ids=PARAMETERS
)
each_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)


def hugging_face(
    head_dim: int, parameters: dict[str, Any]
) -> modeling_qwen3.Qwen3RotaryEmbedding:
    config = Qwen3Config(
        head_dim=head_dim,
        max_position_embeddings=40_960,
        rope_parameters=dict(parameters),
    )
    return modeling_qwen3.Qwen3RotaryEmbedding(config)


def some_positions() -> Tensor:
    edges = torch.tensor([0, 1, 2, 3000, 32_767, 32_768, 40_958, 40_959])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 40_960, (392,), generator=generator)
    return torch.cat((edges, drawn)).view(2, 200)  # [400] -> [B, S]


def without_sign(sin: Tensor) -> Tensor:
    """Hugging Face's sin, which has no minus in its first half."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


@each_head_dim
@each_parameters
def test_frequencies_equal_hugging_face(
    head_dim: int, parameters: dict[str, Any]
) -> None:
    reference = hugging_face(head_dim, parameters)
    inv_freq, attention_factor = compute_rope(head_dim, parameters)
    assert inv_freq.dtype == torch.float32
    assert inv_freq.device.type == "cpu"
    assert torch.equal(inv_freq, reference.inv_freq)
    assert attention_factor == reference.attention_scaling


@each_head_dim
@each_parameters
def test_table_and_rotation_equal_hugging_face(
    head_dim: int, parameters: dict[str, Any]
) -> None:
    rope = RotaryEmbedding(head_dim, 40_960, parameters)
    reference = hugging_face(head_dim, parameters)
    positions = some_positions()
    generator = torch.Generator().manual_seed(1)
    qk = torch.randn(2, 2, 200, 3, head_dim, generator=generator)  # two of [B, S, H, D]
    for dtype in DTYPES:
        q, k = qk.to(dtype)
        hf_cos, hf_sin = reference(q, positions)  # [B, S, D]
        cos, sin = rope(positions, dtype)
        assert cos.dtype == sin.dtype == dtype
        assert cos.shape == sin.shape == (2, 200, 1, head_dim)
        assert torch.equal(cos.squeeze(-2), hf_cos)
        assert torch.equal(without_sign(sin).squeeze(-2), hf_sin)

        expected = modeling_qwen3.apply_rotary_pos_emb(
            q, k, hf_cos, hf_sin, unsqueeze_dim=2
        )
        assert torch.equal(apply_rotary_emb(q, cos, sin), expected[0])
        assert torch.equal(apply_rotary_emb(k, cos, sin), expected[1])


def test_every_row_equals_hugging_face() -> None:
    positions = torch.arange(40_960)[None]
    for parameters in (DEFAULT, LINEAR, YARN):
        rope = RotaryEmbedding(128, 40_960, parameters)
        cos, sin = hugging_face(128, parameters)(torch.empty(0), positions)
        assert torch.equal(rope.cos[:40_960, 0], cos[0])
        assert torch.equal(without_sign(rope.sin[:40_960, 0]), sin[0])


@pytest.mark.parametrize("config_type", [Qwen2Config, Qwen3Config])
def test_reads_a_config_as_it_comes(config_type: type) -> None:
    config = config_type()  # transformers fills in rope_type and rope_theta
    rope = RotaryEmbedding(64, 100, config.rope_parameters)
    assert torch.equal(
        rope.inv_freq, compute_inv_freq(64, config.rope_parameters["rope_theta"])
    )
    old = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    config = config_type(rope_scaling=old, rope_theta=1e6)
    assert (
        RotaryEmbedding(64, 100, config.rope_parameters).max_position_embeddings == 128
    )


def test_any_leading_shape() -> None:
    rope = RotaryEmbedding(8, 32, DEFAULT)
    positions = torch.tensor([[3, 0, 31], [7, 7, 1]])
    x = torch.randn(2, 3, 4, 8)  # [B, S, H, D]
    batched = apply_rotary_emb(x, *rope(positions))
    flat = apply_rotary_emb(x.flatten(0, 1), *rope(positions.flatten()))
    assert torch.equal(batched.flatten(0, 1), flat)
    one = apply_rotary_emb(x[0, 0], *rope(torch.tensor(3)))
    assert torch.equal(one, batched[0, 0])


def test_score_depends_on_distance_only() -> None:
    inv_freq = compute_inv_freq(64, 1e4)
    q, k = torch.randn(2, 50, 1, 64, dtype=torch.float64)
    q_at, k_at = torch.randint(0, 1000, (2, 50)).double()

    def score(shift: int) -> Tensor:
        turned_q = apply_rotary_emb(q, *compute_cos_sin(q_at + shift, inv_freq))
        turned_k = apply_rotary_emb(k, *compute_cos_sin(k_at + shift, inv_freq))
        return (turned_q * turned_k).sum(-1)

    torch.testing.assert_close(score(30_000), score(0), rtol=0, atol=1e-9)


def test_yarn_keeps_fast_pairs_and_slows_the_others() -> None:
    kept = compute_inv_freq(128, 1e6)
    yarn = compute_yarn_inv_freq(128, 1e6, 4.0, 32_768)
    turns = 32_768 * kept / (2 * math.pi)
    assert torch.equal(yarn[turns >= 32], kept[turns >= 32])
    slow = turns < 0.8  # truncate moves the end of the ramp to the next whole pair
    torch.testing.assert_close(yarn[slow], kept[slow] / 4)
    assert compute_yarn_attention_factor(4.0) == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("asked", "factor", "original", "rows"),
    [(40_960, 4.0, 32_768, 131_072), (200, 2.0, 64, 200), (10, 1.5, 11, 17)],
)
def test_yarn_table_reaches_as_far_as_its_factor(
    asked: int, factor: float, original: int, rows: int
) -> None:
    parameters = YARN | {"factor": factor, "original_max_position_embeddings": original}
    rope = RotaryEmbedding(8, asked, parameters)
    assert rope.max_position_embeddings == rows
    assert rope.cos.shape == rope.sin.shape == (rows, 1, 8)
    assert longest_context(asked, parameters) == rows


@pytest.mark.parametrize("parameters", [DEFAULT, LINEAR, {}])
def test_the_context_is_the_config_s_without_yarn(parameters: dict[str, Any]) -> None:
    assert longest_context(40_960, parameters) == 40_960


def test_a_table_on_meta_costs_nothing() -> None:
    with torch.device("meta"):
        rope = RotaryEmbedding(128, 2**24, DEFAULT)
    assert rope.cos.shape == (2**24, 1, 128)


BAD_NUMBERS = ["4", [], {}, True, math.nan, math.inf, -1.0, -3, 10**400, 1e30 * 10]
ROPE_DAMAGES = [
    (kind, field, value)
    for kind, fields in [
        (DEFAULT, ["rope_theta"]),
        (LINEAR, ["rope_theta", "factor"]),
        (YARN, ["rope_theta", "factor", "original_max_position_embeddings"]),
        (YARN, ["beta_fast", "beta_slow", "mscale", "mscale_all_dim"]),
        (YARN, ["attention_factor"]),
    ]
    for field in fields
    for value in BAD_NUMBERS
]


@pytest.mark.parametrize(("parameters", "field", "value"), ROPE_DAMAGES, ids=str)
def test_a_number_that_makes_no_sense_is_named(
    parameters: dict[str, Any], field: str, value: object
) -> None:
    with pytest.raises(ValueError) as error:
        RotaryEmbedding(8, 4, parameters | {field: value})
    assert f'rope_parameters["{field}"] is {value!r}'[:200] in str(error.value)
    assert "it must be a number from" in str(error.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rope_theta": 1}, "rope_theta"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"factor": 0}, "factor"),
        ({"factor": 1e5}, "factor times original_max_position_embeddings is 1.02"),
    ],
    ids=str,
)
def test_yarn_at_the_edge_is_named(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        RotaryEmbedding(8, 4, YARN | change)
    with pytest.raises(ValueError, match=part):
        longest_context(4, YARN | change)


@pytest.mark.parametrize("parameters", ["yarn", None, 3, [], [("rope_type", "yarn")]])
def test_parameters_that_are_no_mapping_are_told(parameters: Any) -> None:
    with pytest.raises(ValueError, match=r"rope_parameters is .* mapping"):
        RotaryEmbedding(8, 4, parameters)


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "4", None, 10**30])
def test_a_number_of_positions_out_of_range_is_named(number: Any) -> None:
    with pytest.raises(ValueError, match="max_position_embeddings is"):
        RotaryEmbedding(8, number, DEFAULT)


@pytest.mark.parametrize("head_dim", [0, -2])
def test_a_head_without_pairs_is_an_error(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim={head_dim}"):
        RotaryEmbedding(head_dim, 4, DEFAULT)


@pytest.mark.parametrize("parameters", [DEFAULT, LINEAR])
def test_table_has_the_rows_asked_for(parameters: dict[str, Any]) -> None:
    rope = RotaryEmbedding(8, 17, parameters)
    assert rope.max_position_embeddings == len(rope.cos) == len(rope.sin) == 17
    with pytest.raises(IndexError):
        rope(torch.tensor([17]))


@pytest.mark.parametrize("parameters", [DEFAULT, LINEAR, YARN])
def test_built_on_meta_then_filled(parameters: dict[str, Any]) -> None:
    fresh = RotaryEmbedding(96, 500, parameters)
    with torch.device("meta"):
        rope = RotaryEmbedding(96, 500, parameters)
    assert rope.cos.is_meta and rope.sin.is_meta
    rope.to_empty(device="cpu")
    for table in (rope.cos, rope.sin):
        table.fill_(math.nan)
    rope.reset_parameters()
    assert torch.equal(rope.cos, fresh.cos)
    assert torch.equal(rope.sin, fresh.sin)


def test_filled_under_meta_too() -> None:
    fresh = RotaryEmbedding(64, 50, YARN)
    rope = RotaryEmbedding(64, 50, YARN)
    with torch.device("meta"):
        rope.cos.zero_()
        rope.reset_parameters()
    assert torch.equal(rope.cos, fresh.cos)


def test_float32_under_another_default_dtype() -> None:
    fresh = RotaryEmbedding(64, 4000, YARN)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rope = RotaryEmbedding(64, 4000, YARN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    assert torch.equal(rope.cos, fresh.cos)


def test_model_cast_to_bfloat16_refills_from_float32() -> None:
    fresh = RotaryEmbedding(64, 4000, DEFAULT)
    rope = RotaryEmbedding(64, 4000, DEFAULT).to(torch.bfloat16)
    assert torch.equal(rope.cos, fresh.cos.to(torch.bfloat16))
    rope.reset_parameters()
    assert torch.equal(rope.cos, fresh.cos.to(torch.bfloat16))


def test_tables_are_in_no_checkpoint() -> None:
    rope = RotaryEmbedding(8, 4, DEFAULT)
    assert not rope.state_dict()
    assert dict(rope.named_buffers()).keys() == {"cos", "sin"}


def test_the_config_is_left_alone() -> None:
    parameters = dict(YARN)
    RotaryEmbedding(8, 4, parameters)
    assert parameters == YARN


@pytest.mark.parametrize(
    "rope_type", ["llama3", "dynamic", "longrope", "YARN", "", None]
)
def test_unknown_type_is_named(rope_type: str | None) -> None:
    with pytest.raises(ValueError) as error:
        RotaryEmbedding(8, 4, DEFAULT | {"rope_type": rope_type})
    for part in (
        'rope_parameters["rope_type"]',
        repr(rope_type),
        "default",
        "linear",
        "yarn",
    ):
        assert part in str(error.value)


def test_missing_type_is_no_default() -> None:
    with pytest.raises(ValueError, match="rope_type"):
        compute_rope(8, {"type": "yarn", "rope_theta": 1e6})


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        (DEFAULT, "rope_theta"),
        (LINEAR, "rope_theta"),
        (LINEAR, "factor"),
        (YARN, "rope_theta"),
        (YARN, "factor"),
        (YARN, "original_max_position_embeddings"),
    ],
)
def test_missing_field_is_named(parameters: dict[str, Any], field: str) -> None:
    without = {name: value for name, value in parameters.items() if name != field}
    for incomplete in (without, parameters | {field: None}):
        with pytest.raises(
            ValueError, match=rf'rope_parameters\["{field}"\] is missing'
        ):
            RotaryEmbedding(8, 4, incomplete)


@pytest.mark.parametrize("parameters", [DEFAULT, LINEAR, YARN])
def test_partial_rotation_is_an_error(parameters: dict[str, Any]) -> None:
    for value in (0.5, 0):
        with pytest.raises(ValueError, match=rf"partial_rotary_factor.*{value}"):
            compute_rope(8, parameters | {"partial_rotary_factor": value})
    for value in (1, 1.0, None):
        inv_freq, _ = compute_rope(8, parameters | {"partial_rotary_factor": value})
        assert torch.equal(inv_freq, compute_rope(8, parameters)[0])


@pytest.mark.parametrize("parameters", [DEFAULT, LINEAR, YARN])
def test_odd_head_dim_is_an_error(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head_dim=7"):
        RotaryEmbedding(7, 4, parameters)
