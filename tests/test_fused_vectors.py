"""A sequence that is alone in a step of a wide model: page 15's step without tensor cores.

Wide models are slow in Triton's interpreter, so here narrow ones count as wide.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux")

from test_fused_decode import (
    DEVICE,
    Step,
    check_step,
    few_programs,
    has_pdl,
    make_model,
    make_model_with_outliers,
    no_gradients,
)
from test_fused_shards import HAS_GPU, check_shards, meetings

from folo_lib import fused_attention, fused_decode, fused_vectors
from folo_lib.fused_decode import FusedDecode

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


LAUNCHES = (
    "begin qkv+ attention+ residual+ gate_up+ residual+ "
    "qkv+ attention+ residual+ gate_up+ residual+ head+"
)


@pytest.mark.parametrize(
    ("kind", "num_seqs", "inner", "expected"),
    [
        (FusedDecode, 1, 1024, LAUNCHES.replace("begin qkv+", "begin qkv")),
        (
            fused_vectors.VectorDecode, 1, 1024,
            "begin vector_qkv attention+ vector_residual+ vector_gate_up+ vector_residual+ "
            "vector_qkv+ attention+ vector_residual+ vector_gate_up+ vector_residual+ "
            "vector_head+ draw+",
        ),
        (
            fused_vectors.VectorDecode, 1, 2048,
            "begin vector_qkv attention+ vector_residual+ vector_gate_up+ residual+ "
            "vector_qkv+ attention+ vector_residual+ vector_gate_up+ residual+ "
            "vector_head+ draw+",
        ),
        (
            fused_vectors.VectorDecode, 2, 1024,
            LAUNCHES.replace("begin qkv+", "begin qkv"),
        ),
    ],
    ids=["page 15", "one sequence", "a product with long rows", "two sequences"],
)  # fmt: skip
def test_which_kernels_run(
    kind: type[FusedDecode],
    num_seqs: int,
    inner: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In which order, and which of them (+) start before the one ahead has ended."""
    launched: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name.removesuffix("_kernel")

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                early = options.get("PDL", False)
                assert early is options.get("launch_pdl", False)
                launched.append(self.name + "+" * early)

            return launch

    for module in (fused_attention, fused_decode, fused_vectors):
        for name in [one for one in vars(module) if one.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name))
    monkeypatch.setattr(fused_vectors, "MOST_COLUMNS", 1024)
    step = Step(make_model(layers=2, intermediate_size=inner, **ROWS), [5] * num_seqs)
    max_blocks = step.rows.block_table.shape[1]
    step.run_fused(step.copy_caches(), kind(step.model, max_blocks, uses_pdl=True))
    assert launched == expected.split()


def test_of_equal_logits_the_lower_token() -> None:
    """They differ in float32, and no longer as they are written."""
    model = make_model(dtype=torch.float16, tie_word_embeddings=False, **ROWS)
    assert model.lm_head is not None
    model.lm_head.weight.zero_()
    for i, large in enumerate((500, -500)):  # whichever sign the two numbers have
        for token, small in ((40, 0), (130, 0.001), (140, -0.001)):
            row = torch.tensor([large, small])
            model.lm_head.weight[token + i, :2] = row.to(DEVICE)
    step = Step(model, [9])
    logits, token_ids = step.run_fused(step.copy_caches(), make_vectors(step))
    assert logits.eq(logits.max()).sum() == 3
    assert token_ids.item() in (40, 41) and token_ids.equal(logits.argmax(-1))


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
