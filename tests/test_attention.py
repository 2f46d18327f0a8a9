"""attention.py against sums written out, and against Hugging Face bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import brute_force, random_qkv
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from folo_lib.attention import create_causal_mask, naive_attention, repeat_kv

each_heads = pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (6, 3), (4, 1), (12, 3), (14, 2), (8, 1)]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


class TestCreateCausalMask:
    def test_against_a_loop(self) -> None:
        for key_len in range(1, 10):
            for query_len in range(1, key_len + 1):
                mask = create_causal_mask(query_len, key_len)
                assert mask.shape == (1, 1, query_len, key_len)
                for i in range(query_len):
                    for j in range(key_len):
                        seen = j <= i + key_len - query_len
                        assert mask[0, 0, i, j].item() == (0 if seen else -INF)

    def test_one_decode_token_sees_everything(self) -> None:
        assert torch.equal(create_causal_mask(1, 7), torch.zeros(1, 1, 1, 7))

    @pytest.mark.parametrize(
        ("query_len", "key_len"), [(5, 4), (2, 1), (1, 0), (0, 0), (0, 3), (-1, 3)]
    )
    def test_lengths_that_cannot_be_are_named(
        self, query_len: int, key_len: int
    ) -> None:
        with pytest.raises(
            ValueError, match=rf"query_len={query_len}\b.*key_len={key_len}\b"
        ):
            create_causal_mask(query_len, key_len)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype_and_device(self, dtype: torch.dtype) -> None:
        mask = create_causal_mask(2, 3, dtype)
        assert mask.dtype == dtype
        assert mask.tolist() == [[[[0, 0, -INF], [0, 0, 0]]]]
        assert create_causal_mask(2, 3, dtype, "meta").device.type == "meta"


class TestRepeatKV:
    @pytest.mark.parametrize("n_rep", [1, 2, 7])
    @pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
    def test_query_head_finds_its_own(
        self, leading: tuple[int, ...], n_rep: int
    ) -> None:
        x = torch.randn(*leading, 3, 5, 4)
        repeated = repeat_kv(x, n_rep)
        assert repeated.shape == (*leading, 3 * n_rep, 5, 4)
        for head in range(3 * n_rep):
            assert torch.equal(repeated[..., head, :, :], x[..., head // n_rep, :, :])


class TestNaiveAttention:
    @each_heads
    @pytest.mark.parametrize(
        ("query_len", "key_len"), [(1, 1), (1, 11), (7, 7), (3, 13), (12, 13)]
    )
    def test_against_brute_force_and_sdpa(
        self, heads: int, kv_heads: int, query_len: int, key_len: int
    ) -> None:
        for head_dim, scale in [(6, 6**-0.5), (10, 0.7)]:
            query, key, value = random_qkv(
                heads, kv_heads, query_len, key_len, head_dim, batch=2
            )
            mask = create_causal_mask(query_len, key_len)
            ours = naive_attention(query, key, value, scale, mask)
            rows = zip(query, key, value, strict=True)
            exact = torch.stack([brute_force(*row, scale) for row in rows])
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6)
            theirs = F.scaled_dot_product_attention(
                query, key, value, mask, scale=scale, enable_gqa=True
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)

    def test_without_a_mask_everything_is_seen(self) -> None:
        query, key, value = random_qkv(6, 2, 5, 9, 8, batch=3)
        torch.testing.assert_close(
            naive_attention(query, key, value, 0.4),
            F.scaled_dot_product_attention(
                query, key, value, scale=0.4, enable_gqa=True
            ),
        )

    def test_a_mask_is_added_and_need_not_be_causal(self) -> None:
        query, key, value = random_qkv(4, 2, 5, 9, 8, batch=3)
        mask = torch.randn(3, 1, 5, 9).masked_fill(torch.rand(3, 1, 5, 9) < 0.2, -INF)
        mask[..., 4] = 0
        torch.testing.assert_close(
            naive_attention(query, key, value, 0.4, mask),
            F.scaled_dot_product_attention(
                query, key, value, mask, scale=0.4, enable_gqa=True
            ),
        )

    @pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
    def test_any_leading_shape(self, leading: tuple[int, ...]) -> None:
        query = torch.randn(*leading, 6, 5, 4)
        key, value = torch.randn(2, *leading, 2, 9, 4)
        out = naive_attention(query, key, value, 0.5, create_causal_mask(5, 9)[0, 0])
        assert out.shape == query.shape
        for index in torch.cartesian_prod(*map(torch.arange, (1, *leading))).view(
            -1, 1 + len(leading)
        ):
            row = tuple(index[1:].tolist())
            exact = brute_force(query[row], key[row], value[row], 0.5)
            torch.testing.assert_close(out[row].double(), exact, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("masked", [False, True])
    def test_equals_the_eager_attention_of_hugging_face_bit_for_bit(
        self, dtype: torch.dtype, masked: bool
    ) -> None:
        query, key, value = (2 * x.to(dtype) for x in random_qkv(14, 2, 9, 21, 16, 2))
        mask = create_causal_mask(9, 21, dtype) if masked else None
        module = torch.nn.Module().eval()
        module.num_key_value_groups = 7
        theirs, _ = eager_attention_forward(module, query, key, value, mask, 0.25)
        ours = naive_attention(query, key, value, 0.25, mask)
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.transpose(1, 2))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_softmax_runs_in_float32(self, dtype: torch.dtype) -> None:
        # A processor may do so by itself and round afterwards: look at the operation.
        seen = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
                if func is torch.ops.aten._softmax.default:
                    seen.append(args[0].dtype)
                return func(*args, **(kwargs or {}))

        query, key, value = (x.to(dtype) for x in random_qkv(4, 2, 3, 3, 8, batch=1))
        with Watch():
            naive_attention(query, key, value, 1.0)
        assert seen == [torch.float32]

    @pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (2, 4), (7, 3), (1, 2)])
    def test_heads_that_cannot_share_are_named(self, heads: int, kv_heads: int) -> None:
        query, key, value = random_qkv(heads, kv_heads, 2, 2, 4, batch=1)
        with pytest.raises(
            ValueError,
            match=rf"{heads} query heads.* {kv_heads} key.*num_attention_heads"
            r".*multiple.*num_key_value_heads",
        ):
            naive_attention(query, key, value, 0.5)
