"""A sequence that is alone in a step of a wide model: page 15's step without tensor cores.

Wide models are slow in Triton's interpreter, so here narrow ones count as wide.
"""

from __future__ import annotations

from typing import Any

import pytest

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


ROWS = {"vocab_size": 192}  # in blocks of 64


@pytest.fixture(autouse=True)
def narrow_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_vectors, "WIDE_FROM", 1024)
    if not HAS_GPU:  # as the interpreter runs one program after another
        monkeypatch.setattr(fused_vectors, "NUM_PROGRAMS", 3)
        monkeypatch.setattr(fused_vectors, "BLOCK_NUMBERS", 2**16)


def make_vectors(step: Step) -> fused_vectors.VectorDecode:
    max_blocks = step.rows.block_table.shape[1]
    return fused_vectors.VectorDecode(step.model, max_blocks, has_pdl())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "hidden_size": 2048,
            "intermediate_size": 3072,
            "tie_word_embeddings": False,
        },
    ],
    ids=["pieces of 1,024", "pieces of 2,048, and three where four are a power of two"],
)
def test_one_sequence(fields: dict[str, Any]) -> None:
    check_step(make_model(**ROWS, **fields), [70], make_vectors)


def test_several_sequences_run_as_before() -> None:
    check_step(make_model(**ROWS), [5, 20], make_vectors)


def test_rows_that_are_too_long_run_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_vectors, "MOST_COLUMNS", 512)
    monkeypatch.setattr(fused_vectors, "vector_residual_kernel", None)
    check_step(make_model(**ROWS), [5], make_vectors)


@pytest.mark.skipif(HAS_GPU, reason="see test_tensor_parallel_gpu.py")
def test_two_ranks() -> None:
    model = make_model(heads=16, kv_heads=4, intermediate_size=2048, vocab_size=256)
    check_shards(model, [35], 2)


def test_float16_is_as_near_as_the_plain_path() -> None:
    """With numbers that would be infinite in float16 if they were multiplied there."""
    narrow = make_model_with_outliers(1024, **ROWS)
    wide = make_model(tie_word_embeddings=False, **ROWS)
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
    model = make_model(**ROWS)
    model.model.embed_tokens.weight[3] = float("nan")
    step = Step(model, [4])
    step.tokens.clamp_(min=4)
    step.rows.last_token_ids[step.row_index] = step.tokens
    fused = make_vectors(step)
    for _ in range(2):  # nothing of the first is left for the second
        _, token_ids = step.run_fused(step.copy_caches(), fused)
        assert token_ids.tolist() == [-1] and not fused.best.any()


def test_how_a_matrix_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8,192 numbers at most, in whole rows, as many as a power of two."""
    monkeypatch.undo()
    for columns, matrices, expected in (
        (2048, 1, (4, 1, 2048)),
        (4096, 1, (2, 2, 2048)),
        (4096, 2, (1, 2, 2048)),
        (6144, 1, (1, 4, 2048)),
        (3072, 1, (2, 4, 1024)),
    ):
        cut = fused_vectors.choose_block(columns, matrices)
        assert (cut["R"], cut["PIECES"], cut["WIDE"]) == expected
