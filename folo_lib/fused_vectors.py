"""Products of page 15 for a single sequence of a wide model: a matrix times one vector.

Page 15's kernels keep what they multiply in a program's registers, ready for the tensor cores. A
row of 1,024 numbers leaves room for much besides; rows of 4,096 fill the registers, so that a
multiprocessor has one program at a time, and while that one waits for its inputs or adds up,
nothing is on its way from memory. For one vector the tensor cores do 15 of 16 multiplications for
nothing anyway.

Here a thread multiplies by itself. Its columns are the same in all rows, so what it needs of the
vector stays in a few registers. Each program takes one block of rows after another, and the next
block is on its way while the sums of this one are made. Products and sums are in float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .early_start import let_next_start, wait_for_previous
from .fused_checks import FusionSizes
from .fused_decode import FusedDecode, pack_scores, unpack_token
from .qwen3 import Qwen3DecoderLayer
from .runner import RequestRows
from .ticket_sums import send

__all__ = ["NUM_PROGRAMS", "VectorDecode", "choose_block"]

THREADS = tl.constexpr(256)
NUM_PROGRAMS = 528
"""Four for each multiprocessor of an H200."""
BLOCK_NUMBERS = 8192
"""Of a matrix, that a program has on their way at a time: 16 kB in two bytes each."""
WIDE_FROM = 4096
"""Models whose rows have that many numbers run in these kernels when they are alone."""
MOST_COLUMNS = 8192
"""Longer rows leave the registers no room; the tensor cores are as quick there."""


def choose_block(num_columns: int, num_matrices: int = 1) -> dict[str, int]:
    """How a matrix is cut: `R` rows at a time, each in `PIECES` of `WIDE` numbers.

    The number of pieces is a power of two, and those that do not exist are not read. `R` divides
    the rows of every matrix that page 15's kernels run.
    """
    wide = 2048 if num_columns % 2048 == 0 else 1024
    most = max(1, BLOCK_NUMBERS // (num_columns * num_matrices))
    return {
        "R": 1 << (most.bit_length() - 1),
        "PIECES": triton.next_power_of_2(num_columns // wide),
        "WIDE": wide,
        "num_warps": 8,
    }


def choose_launch(
    kernel: Any, num_rows: int, num_columns: int, num_matrices: int = 1
) -> tuple[Any, dict[str, int]]:
    """A kernel with its programs, and how it cuts its matrix."""
    block = choose_block(num_columns, num_matrices)
    return kernel[(min(NUM_PROGRAMS, num_rows // block["R"]),)], block


@triton.jit
def load_vector(x, K: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr):
    """`[K]` as float32 `[PIECES, WIDE]`, zeros where that is more."""
    pieces, columns = tl.arange(0, PIECES)[:, None], tl.arange(0, WIDE)[None, :]
    place = x + pieces * WIDE + columns
    return tl.load(place, mask=pieces < K // WIDE, other=0.0).to(tl.float32)


@triton.jit
def load_block(
    w,
    row,
    end,
    K: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`R` rows of `[..., K]` from `row` on, if they come before `end`: `[R, PIECES, WIDE]`."""
    rows = row + tl.arange(0, R)[:, None, None]
    pieces = tl.arange(0, PIECES)[None, :, None]
    columns = tl.arange(0, WIDE)[None, None, :]
    place = w + rows * K + pieces * WIDE + columns
    return tl.load(place, mask=(rows < end) & (pieces < K // WIDE), other=0.0)


@triton.jit
def multiply_block(
    block, vector, R: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr
):
    """What each thread has of the products of `R` rows: float32 `[R, THREADS]`."""
    products = block.to(tl.float32) * vector[None, :, :]
    products = tl.reshape(products, (R, PIECES, THREADS, WIDE // THREADS))
    return tl.sum(tl.sum(products, 3), 1)


@triton.jit
def vector_qkv_kernel(
    x,
    norm_weight,
    w,
    qkv,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, then queries, keys and values."""
    let_next_start(PDL)
    first, stride = tl.program_id(0) * R, tl.num_programs(0) * R
    block = load_block(w, first, N, K, R, PIECES, WIDE)
    norm = load_vector(norm_weight, K, PIECES, WIDE)
    wait_for_previous(PDL)
    vector = load_vector(x, K, PIECES, WIDE)
    scale = tl.rsqrt(tl.sum(vector * vector) / K + eps)
    vector *= norm
    for row in tl.range(first, N, stride):
        parts = multiply_block(block, vector, R, PIECES, WIDE)
        following = row + stride
        block = load_block(w, following, N, K, R, PIECES, WIDE)
        y = tl.sum(parts, 1) * scale
        tl.store(qkv + row + tl.arange(0, R), y.to(qkv.dtype.element_ty))


@triton.jit
def vector_gate_up_kernel(
    x,
    norm_weight,
    w,
    y,
    eps,
    INNER: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, gate, up and SwiGLU: the `INNER` numbers of `y`."""
    let_next_start(PDL)
    first, stride = tl.program_id(0) * R, tl.num_programs(0) * R
    gates = load_block(w, first, INNER, K, R, PIECES, WIDE)
    ups = load_block(w, INNER + first, 2 * INNER, K, R, PIECES, WIDE)
    norm = load_vector(norm_weight, K, PIECES, WIDE)
    wait_for_previous(PDL)
    vector = load_vector(x, K, PIECES, WIDE)
    scale = tl.rsqrt(tl.sum(vector * vector) / K + eps)
    vector *= norm
    for row in tl.range(first, INNER, stride):
        following = row + stride
        gate = multiply_block(gates, vector, R, PIECES, WIDE)
        gates = load_block(w, following, INNER, K, R, PIECES, WIDE)
        up = multiply_block(ups, vector, R, PIECES, WIDE)
        ups = load_block(w, INNER + following, 2 * INNER, K, R, PIECES, WIDE)
        gate, up = tl.sum(gate, 1) * scale, tl.sum(up, 1) * scale
        opened = gate * tl.sigmoid(gate) * up
        tl.store(y + row + tl.arange(0, R), opened.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["offset", "index"])
def vector_residual_kernel(
    y,
    w,
    x,
    addresses,
    offset,
    tickets,
    index,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    WIDE: tl.constexpr,
    RANKS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """`x += y @ w.T`; with `RANKS`, the part of that which is this rank's, sent to all.

    Rank 0's part has `x` in it, if that `ADDS`.
    """
    let_next_start(PDL)
    first, stride = tl.program_id(0) * R, tl.num_programs(0) * R
    block = load_block(w, first, E, K, R, PIECES, WIDE)
    wait_for_previous(PDL)
    vector = load_vector(y, K, PIECES, WIDE)
    for row in tl.range(first, E, stride):
        parts = multiply_block(block, vector, R, PIECES, WIDE)
        following = row + stride
        block = load_block(w, following, E, K, R, PIECES, WIDE)
        place = row + tl.arange(0, R)
        more = tl.sum(parts, 1)
        if ADDS:
            more += tl.load(x + place).to(tl.float32)
        if RANKS == 0:
            tl.store(x + place, more.to(x.dtype.element_ty))
        else:
            send(more, place, place < E, addresses, offset, tickets, index, RANKS)


@triton.jit
def vector_head_kernel(
    x,
    norm_weight,
    w,
    logits,
    best,
    eps,
    V: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Norm and all logits; the likeliest token stays packed in `best`."""
    let_next_start(PDL)
    first, stride = tl.program_id(0) * R, tl.num_programs(0) * R
    block = load_block(w, first, V, K, R, PIECES, WIDE)
    norm = load_vector(norm_weight, K, PIECES, WIDE)
    wait_for_previous(PDL)
    vector = load_vector(x, K, PIECES, WIDE)
    scale = tl.rsqrt(tl.sum(vector * vector) / K + eps)
    vector *= norm
    top = tl.zeros([R], tl.int64)
    for row in tl.range(first, V, stride):
        parts = multiply_block(block, vector, R, PIECES, WIDE)
        following = row + stride
        block = load_block(w, following, V, K, R, PIECES, WIDE)
        scores = (tl.sum(parts, 1) * scale).to(logits.dtype.element_ty)
        ids = row + tl.arange(0, R)
        tl.store(logits + ids, scores)
        top = tl.maximum(top, pack_scores(scores.to(tl.float32), FIRST + ids))
    tl.atomic_max(best, tl.max(top, 0), sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["rows"])
def draw_kernel(best, rows, token_ids, last_token_ids, PDL: tl.constexpr):
    """The likeliest token of the one sequence; `best` is zero afterwards."""
    row = tl.load(rows)
    wait_for_previous(PDL)
    drawn = unpack_token(tl.load(best))
    tl.store(token_ids, drawn)
    tl.store(last_token_ids + row, tl.maximum(drawn, 0))
    tl.store(best, 0)


class VectorDecode(FusedDecode):
    """`FusedDecode` that multiplies without tensor cores where one sequence is alone."""

    def is_vector(self, sizes: FusionSizes, w: Tensor) -> bool:
        """Whether a product with `w` runs in this module's kernels."""
        is_wide = self.model.config.hidden_size >= WIDE_FROM
        return sizes.num_seqs == 1 and is_wide and w.shape[1] <= MOST_COLUMNS

    def run_qkv(
        self, layer: Qwen3DecoderLayer, sizes: FusionSizes, pdl: dict[str, bool]
    ) -> None:
        """See `FusedDecode`."""
        norm, w = layer.input_layernorm, layer.self_attn.qkv_proj.weight
        if not self.is_vector(sizes, w):
            return super().run_qkv(layer, sizes, pdl)
        launch, block = choose_launch(vector_qkv_kernel, *w.shape)
        launch(self.x, norm.weight, w, self.qkv, norm.eps, *w.shape, **block, **pdl)

    def run_residual(self, y: Tensor, w: Tensor, sizes: FusionSizes) -> None:
        """See `FusedDecode`."""
        if not self.is_vector(sizes, w):
            return super().run_residual(y, w, sizes)
        nowhere = dict.fromkeys(("addresses", "tickets"))
        self.run_vector_residual(y, w, offset=0, index=0, RANKS=0, ADDS=True, **nowhere)

    def run_vector_residual(self, y: Tensor, w: Tensor, **sending: Any) -> None:
        """Launches `vector_residual_kernel`."""
        launch, block = choose_launch(vector_residual_kernel, *w.shape)
        size = {"E": w.shape[0], "K": w.shape[1]}
        launch(y, w, self.x, **size, **sending, **block, **self.pdl)

    def run_gate_up(self, layer: Qwen3DecoderLayer, sizes: FusionSizes) -> None:
        """See `FusedDecode`."""
        norm, w = layer.post_attention_layernorm, layer.mlp.gate_up_proj.weight
        if not self.is_vector(sizes, w):
            return super().run_gate_up(layer, sizes)
        shape = len(w) // 2, w.shape[1]
        launch, block = choose_launch(vector_gate_up_kernel, *shape, num_matrices=2)
        launch(self.x, norm.weight, w, self.y, norm.eps, *shape, **block, **self.pdl)

    def run_head(
        self,
        row_index: Tensor,
        rows: RequestRows,
        logits: Tensor,
        token_ids: Tensor,
        sizes: FusionSizes,
    ) -> None:
        """See `FusedDecode`."""
        norm, w = self.model.model.norm, self.head.weight
        if not self.is_vector(sizes, w):
            return super().run_head(row_index, rows, logits, token_ids, sizes)
        launch, block = choose_launch(vector_head_kernel, *w.shape)
        launch(
            self.x,
            norm.weight,
            w,
            logits,
            self.best,
            norm.eps,
            *w.shape,
            FIRST=self.first_id,
            **block,
            **self.pdl,
        )
        if self.draws:
            draw: Any = draw_kernel
            draw[(1,)](self.best, row_index, token_ids, rows.last_token_ids, **self.pdl)
