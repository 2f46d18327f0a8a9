"""RMSNorm and SiLUAndMul against Hugging Face, and what the parity does not show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from folo_lib.layers import RMSNorm, SiLUAndMul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
leading_shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
seeds = st.integers(0, 2**16)


def random_norm(
    size: int, dtype: torch.dtype = torch.float32, eps: float = 1e-6
) -> RMSNorm:
    """Random weights, because ones hide a norm that ignores its own."""
    norm = RMSNorm(size, eps).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class TestRMSNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
    def test_equals_hugging_face_bit_for_bit(
        self, dtype: torch.dtype, eps: float
    ) -> None:
        ours, theirs = random_norm(192, dtype, eps), Qwen3RMSNorm(192, eps).to(dtype)
        theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
        for scale in (1e-3, 1, 40):
            x = (scale * random(64, 192)).to(dtype)
            assert torch.equal(ours(x), theirs(x))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [64, 128, 192, 896, 1536, 2560, 3584, 5120])
    def test_equals_hugging_face_at_the_sizes_of_models(
        self, size: int, dtype: torch.dtype, device: str
    ) -> None:
        """Not all are powers of two: there a division and a product with 1/n differ."""
        ours = random_norm(size, dtype).to(device)
        theirs = Qwen3RMSNorm(size).to(device, dtype)
        theirs.load_state_dict(ours.state_dict())
        for rows in (1, 7, 64):
            x = (3 * random(rows, size)).to(device, dtype)
            residual = random(rows, size, seed=1).to(device, dtype)
            assert torch.equal(ours(x), theirs(x))
            normed, total = ours(x, residual)
            assert torch.equal(total, x + residual)
            assert torch.equal(normed, theirs(total))

    @pytest.mark.parametrize("device", DEVICES)
    def test_is_nothing_but_a_weight_and_eps(self, device: str) -> None:
        """Wherever it is made or sent to, on the meta device too."""
        with torch.device("meta"):
            norm = RMSNorm(8, 1e-5)
        norm = norm.to_empty(device=device).half()
        nn.init.ones_(norm.weight)
        assert list(norm.state_dict()) == ["weight"]
        assert norm.eps == 1e-5
        x = torch.full((1, 8), 6e4, dtype=torch.float16, device=device)
        assert torch.equal(norm(x), torch.ones_like(x))

    def test_a_wide_input_meets_a_narrow_weight_as_in_hugging_face(self) -> None:
        for x_dtype, weight_dtype in [
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ]:
            ours = random_norm(64, weight_dtype)
            theirs = Qwen3RMSNorm(64).to(weight_dtype)
            theirs.load_state_dict(ours.state_dict())
            x = random(5, 64, dtype=x_dtype)
            assert ours(x).dtype == theirs(x).dtype == torch.float32
            assert torch.equal(ours(x), theirs(x))

    @given(shape=leading_shapes, seed=seeds, dtype=st.sampled_from(DTYPES))
    @settings(max_examples=40, deadline=None)
    def test_any_leading_shape_row_by_row(
        self, shape: tuple[int, ...], seed: int, dtype: torch.dtype
    ) -> None:
        norm, x = random_norm(24, dtype), random(*shape, 24, dtype=dtype, seed=seed)
        out = norm(x)
        rows = torch.stack([norm(row) for row in x.reshape(-1, 24)]).view_as(x)
        assert out.shape == x.shape
        torch.testing.assert_close(out, rows)

    @given(shape=leading_shapes, seed=seeds, dtype=st.sampled_from(DTYPES))
    @settings(max_examples=40, deadline=None)
    def test_fused_equals_unfused_bit_for_bit(
        self, shape: tuple[int, ...], seed: int, dtype: torch.dtype
    ) -> None:
        norm = random_norm(48, dtype)
        x = random(*shape, 48, dtype=dtype, seed=seed)
        residual = random(*shape, 48, dtype=dtype, seed=seed + 1)
        before = x.clone(), residual.clone()
        normed, new_residual = norm(x, residual)
        assert torch.equal(new_residual, x + residual)
        assert torch.equal(normed, norm(x + residual))
        assert torch.equal(x, before[0])
        assert torch.equal(residual, before[1])

    def test_a_stack_of_layers_is_the_same_grouped_either_way(self) -> None:
        norms = [random_norm(32, torch.bfloat16) for _ in range(5)]
        layers = [nn.Linear(32, 32).bfloat16() for _ in range(4)]
        stream = start = random(7, 32, dtype=torch.bfloat16)
        normed, residual = norms[0](start), start
        for i, layer in enumerate(layers):
            stream = stream + layer(norms[i](stream))
            normed, residual = norms[i + 1](layer(normed), residual)
        assert torch.equal(residual, stream)
        assert torch.equal(normed, norms[-1](stream))

    @given(seed=seeds, scale=st.floats(0.1, 1e4))
    @settings(max_examples=40, deadline=None)
    def test_keeps_the_direction_and_sets_the_length(
        self, seed: int, scale: float
    ) -> None:
        x = scale * random(3, 128, seed=seed)
        out = RMSNorm(128)(x)
        torch.testing.assert_close(
            out.norm(dim=-1), torch.full((3,), 128**0.5), rtol=1e-3, atol=0
        )
        torch.testing.assert_close(F.cosine_similarity(out, x), torch.ones(3))

    def test_keeps_the_mean_that_layer_norm_takes_away(self) -> None:
        x = random(4, 64) + 3
        assert RMSNorm(64)(x).mean() > 0.5
        centred = x - x.mean(-1, keepdim=True)
        torch.testing.assert_close(
            RMSNorm(64, 0.0)(centred),
            F.layer_norm(x, (64,), eps=0.0),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_one_loud_head_leaves_the_others_alone(self) -> None:
        norm, q = random_norm(16), random(5, 4, 16)
        loud = q.clone()
        loud[:, 3] *= 100
        assert torch.equal(norm(loud)[:, :3], norm(q)[:, :3])

    def test_eps_is_inside_the_root_and_matters_for_tiny_inputs(self) -> None:
        x = torch.full((1, 8), 1e-3)
        torch.testing.assert_close(RMSNorm(8, 1e-6)(x), torch.full((1, 8), 0.5**0.5))
        torch.testing.assert_close(RMSNorm(8, 3e-6)(x), torch.full((1, 8), 0.5))
        torch.testing.assert_close(RMSNorm(8, 0.0)(x), torch.ones(1, 8))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zeros_give_zeros_with_finite_gradients(self, dtype: torch.dtype) -> None:
        x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
        out = RMSNorm(8).to(dtype)(x)
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(out))
        assert x.grad is not None
        assert x.grad.isfinite().all()

    def test_large_float16_values_do_not_overflow(self) -> None:
        x = torch.full((1, 16), 6e4, dtype=torch.float16)
        assert torch.equal(RMSNorm(16).half()(x), torch.ones_like(x))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        norm, x = random_norm(16, dtype), random(3, 16, dtype=dtype)
        assert norm(x).dtype == dtype
        assert [out.dtype for out in norm(x, x)] == [dtype, dtype]

    def test_gradients_equal_those_of_the_formula(self) -> None:
        norm = random_norm(16)
        x, residual = (random(3, 16, seed=i).requires_grad_() for i in range(2))
        normed, stream = norm(x, residual)
        (normed * random(3, 16, seed=2) + stream.square()).sum().backward()

        w64, x64, r64 = (
            t.detach().double().requires_grad_() for t in (norm.weight, x, residual)
        )
        total = x64 + r64
        expected = w64 * total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        (expected * random(3, 16, seed=2).double() + total.square()).sum().backward()
        for ours, exact in [(norm.weight, w64), (x, x64), (residual, r64)]:
            assert ours.grad is not None
            torch.testing.assert_close(
                ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-5
            )

    def test_autocast_keeps_a_float32_stream(self) -> None:
        norm, linear, stream = random_norm(32), nn.Linear(32, 32), random(4, 32)
        with torch.autocast("cpu", torch.bfloat16):
            x = linear(stream)
            normed, new_stream = norm(x, stream)
        assert x.dtype == torch.bfloat16
        assert new_stream.dtype == normed.dtype == torch.float32
        assert torch.equal(normed, norm(x.float() + stream))
        normed.sum().backward()
        assert linear.weight.grad is not None

    def test_compiles_as_one_graph(self) -> None:
        norm, x = random_norm(32), random(4, 32)
        compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), norm(x))
        for ours, eager in zip(compiled(x, x), norm(x, x), strict=True):
            torch.testing.assert_close(ours, eager)

    def test_starts_with_ones(self) -> None:
        assert torch.equal(RMSNorm(8).weight, torch.ones(8))


class TestSiLUAndMul:
    @given(
        shape=leading_shapes,
        size=st.integers(1, 40),
        seed=seeds,
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=60, deadline=None)
    def test_gate_is_the_first_half(
        self, shape: tuple[int, ...], size: int, seed: int, dtype: torch.dtype
    ) -> None:
        gate, up = (random(*shape, size, dtype=dtype, seed=seed + i) for i in range(2))
        out = SiLUAndMul()(torch.cat([gate, up], dim=-1))
        assert out.dtype == dtype
        torch.testing.assert_close(out, F.silu(gate) * up)

    def test_equals_the_formula_in_float64(self) -> None:
        x = random(5, 32, dtype=torch.float64)
        expected = x[:, :16] / (1 + (-x[:, :16]).exp()) * x[:, 16:]
        torch.testing.assert_close(SiLUAndMul()(x), expected)

    def test_equals_the_mlp_of_hugging_face(self) -> None:
        mlp = Qwen3MLP(Qwen3Config(hidden_size=48, intermediate_size=112))
        x = random(3, 5, 48)
        gate_up = F.linear(x, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        ours = mlp.down_proj(SiLUAndMul()(gate_up))
        torch.testing.assert_close(ours, mlp(x), rtol=1e-5, atol=1e-6)

    def test_equals_the_mlp_of_hugging_face_in_bfloat16_bit_for_bit(self) -> None:
        mlp = Qwen3MLP(Qwen3Config(hidden_size=64, intermediate_size=128)).bfloat16()
        x = 4 * random(6, 64, dtype=torch.bfloat16)
        # The projections apart: merged, a matrix product may round in another order.
        gate_up = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=-1)
        assert torch.equal(mlp.down_proj(SiLUAndMul()(gate_up)), mlp(x))

    @pytest.mark.parametrize("size", [1, 3, 7])
    def test_an_odd_size_is_named(self, size: int) -> None:
        with pytest.raises(ValueError, match=rf"size {size}\b.*odd.*intermediate_size"):
            SiLUAndMul()(torch.zeros(2, size))

    def test_gradients(self) -> None:
        x = random(3, 10, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(SiLUAndMul(), x)

    def test_autocast_and_compile(self) -> None:
        act, x = SiLUAndMul(), random(3, 10)
        with torch.autocast("cpu", torch.bfloat16):
            assert act(x.bfloat16()).dtype == torch.bfloat16
            assert torch.equal(act(x), F.silu(x[:, :5]) * x[:, 5:])
        compiled = torch.compile(act, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), act(x))

    def test_has_no_parameters(self) -> None:
        assert not SiLUAndMul().state_dict()
