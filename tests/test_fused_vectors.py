"""A sequence that is alone in a step of a wide model: page 15's step without tensor cores.

Wide models are slow in Triton's interpreter, so here narrow ones count as wide.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux")

from test_fused_decode import (
    Step,
    check_step,
    few_programs,
    has_pdl,
    make_model,
    make_model_with_outliers,
    no_gradients,
)
from test_fused_shards import HAS_GPU, check_shards, meetings

from folo_lib import fused_vectors

__all__ = ["few_programs", "meetings", "no_gradients"]  # fixtures


@pytest.fixture(autouse=True)
def narrow_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_vectors, "WIDE_FROM", 1024)
    if not HAS_GPU:  # as the interpreter runs one program after another
        monkeypatch.setattr(fused_vectors, "NUM_PROGRAMS", 3)
        monkeypatch.setattr(fused_vectors, "BLOCK_NUMBERS", 2**15)


def make_vectors(step: Step) -> fused_vectors.VectorDecode:
    max_blocks = step.rows.block_table.shape[1]
    return fused_vectors.VectorDecode(step.model, max_blocks, has_pdl())


@pytest.mark.parametrize("fields", [
    {}, {"hidden_size": 2048, "intermediate_size": 3072, "tie_word_embeddings": False},
])  # fmt: skip
def test_one_sequence(fields: dict[str, int]) -> None:
    """Rows of one piece, of two, and of three where four would be a power of two."""
    check_step(make_model(**fields), [70], make_vectors)


@pytest.mark.skipif(HAS_GPU, reason="see test_tensor_parallel_gpu.py")
def test_two_ranks() -> None:
    model = make_model(heads=16, kv_heads=4, layers=2, intermediate_size=2048, vocab_size=192)
    check_shards(model, [35], 2)


def test_float16_is_as_near_as_the_plain_path() -> None:
    narrow, wide = make_model_with_outliers(1024), make_model(tie_word_embeddings=False)
    wide.load_state_dict(narrow.state_dict())
    step = Step(narrow, [40])
    plain = step.run_plain(step.copy_caches())
    ours, token_ids = step.run_fused(step.copy_caches(), make_vectors(step))
    step.model = wide
    exact = step.run_plain([(k.float(), v.float()) for k, v in step.copy_caches()])
    assert ours.isfinite().all() and token_ids.equal(ours.argmax(-1))
    errors = [(one.float() - exact).square().mean().sqrt() for one in (ours, plain)]
    assert errors[0] <= 1.2 * errors[1]


def test_a_logit_that_is_not_finite() -> None:
    model = make_model()
    model.model.embed_tokens.weight[3] = float("nan")
    step = Step(model, [4])
    step.tokens.clamp_(min=4)
    step.rows.last_token_ids[step.row_index] = step.tokens
    _, token_ids = step.run_fused(step.copy_caches(), make_vectors(step))
    assert token_ids.tolist() == [-1]


def test_how_a_matrix_is_cut() -> None:
    """Blocks of 32 kB, of whole rows and of whole pieces."""
    for columns, rows, pieces in ((2048, 8, 1), (4096, 4, 2), (6144, 2, 4), (3072, 4, 4)):
        block = fused_vectors.choose_block(columns)
        if HAS_GPU:
            assert (block["R"], block["PIECES"]) == (rows, pieces)
        assert block["PIECES"] * block["WIDE"] >= columns
    assert torch.cuda.is_available() == HAS_GPU
