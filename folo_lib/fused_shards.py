"""The fused step of page 15 for a shard of a model: the sums of page 16 between its kernels.

A rank has some heads and some columns of the MLP, so its output projection and its down projection
give one part of what the residual stream grows by. Rank 0 adds the stream itself. All write into a
buffer that all can read, and the sum of those buffers is the new stream, on every rank.

The stream and the parts are float32 here, whatever the model's dtype is. In bfloat16 each part
would be rounded, rank 0's to the last digits of the stream, and the sum again; in float32 the
stream is nearer to the exact one than on a single GPU.

The embedding and the head are cut by tokens. A token that is another rank's has zeros, so the
sum of all is its embedding. Of the head each rank knows its own winner, packed as on page 15 in a
whole number below 2**56. Three pieces of it, of 24 and 16 bits, are exact as float32. Every rank
writes its pieces to a place of its own, where all others have zeros, so that the same sum hands
everybody's winners to everybody: 12 bytes for each sequence and rank.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import EngineConfig
from .cuda_graph import GraphSize, StepGraphs
from .fused_decode import (
    MAX_FUSED_SEQS,
    FusedDecode,
    FusedGraphs,
    FusedRunner,
    logger,
    unpack_token,
)
from .qwen3 import Qwen3ForCausalLM
from .runner import InFlightStep, RequestRows, StepLayout
from .tensor_parallel import RankGroup, ShardedForCausalLM, VocabParallelEmbedding

__all__ = ["ShardedDecode", "ShardedGraphs", "ShardedRunner", "SharedGroup"]

PIECES = tl.constexpr(4)  # of a winner; the last one is always 0, for a row of 16 bytes


class SharedGroup(RankGroup, Protocol):
    """What a fused shard needs of its ranks; `SymmetricGroup` has it."""

    def allocate(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros that all ranks can read."""
        ...

    def add_up(self, shared: Tensor, out: Tensor) -> None:
        """Writes into `out` the sum over ranks of what is in `shared`."""


@triton.jit
def share_kernel(best, shared, ROWS: tl.constexpr):
    """Packed winners `[B]` to their pieces `[B, PIECES]`; `best` is zeros afterwards."""
    each = tl.arange(0, ROWS)
    packed = tl.load(best + each)
    place = shared + each * PIECES
    tl.store(place, (packed % 16777216).to(tl.float32))
    tl.store(place + 1, (packed // 16777216 % 65536).to(tl.float32))
    tl.store(place + 2, (packed // 1099511627776).to(tl.float32))
    tl.store(best + each, tl.zeros([ROWS], tl.int64))


@triton.jit(do_not_specialize_on_alignment=["rows"])
def choose_kernel(
    pieces,  # [RANKS, ROWS, PIECES]
    rows,
    token_ids,
    last_token_ids,  # [B], [B], [R]
    num_seqs,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The best of the winners of all ranks, for each sequence."""
    each = tl.arange(0, ROWS)
    top = tl.zeros([ROWS], tl.int64)
    for rank in tl.static_range(RANKS):
        place = pieces + (rank * ROWS + each) * PIECES
        low, middle = tl.load(place).to(tl.int64), tl.load(place + 1).to(tl.int64)
        high = tl.load(place + 2).to(tl.int64)
        top = tl.maximum(top, high * 1099511627776 + middle * 16777216 + low)
    drawn, exist = unpack_token(top), each < num_seqs
    row = tl.load(rows + each, mask=exist, other=0)
    tl.store(token_ids + each, drawn, mask=exist)
    tl.store(last_token_ids + row, tl.maximum(drawn, 0), mask=exist)


class ShardedDecode(FusedDecode):
    """`FusedDecode` of one rank's shard; all ranks run the same steps at the same time.

    Args:
        model: the shard, of which `find_obstacle` finds none; its group is a `SharedGroup`.
        max_blocks: of a sequence.
        uses_pdl: see `FusedDecode`. The kernel after a sum is launched when the sum has ended, as
            PyTorch's kernel does not let it start before.
    """

    draws = False

    def __init__(
        self, model: Qwen3ForCausalLM, max_blocks: int, uses_pdl: bool = False
    ) -> None:
        super().__init__(model, max_blocks, uses_pdl)
        assert isinstance(model, ShardedForCausalLM)
        embedding = model.model.embed_tokens
        assert isinstance(embedding, VocabParallelEmbedding)
        self.group: SharedGroup = cast(SharedGroup, model.group)
        self.first_id, self.adds = embedding.start, self.group.rank == 0
        size, allocate = model.config.hidden_size, self.group.allocate
        self.out = allocate(MAX_FUSED_SEQS, size, dtype=torch.float32)
        self.x = torch.zeros_like(self.out)
        # It lets the next one start, but does not start before the sum has ended.
        self.pdl_joined = self.pdl | ({"launch_pdl": False} if uses_pdl else {})
        shape = self.group.size, MAX_FUSED_SEQS, PIECES.value
        self.shared = allocate(*shape, dtype=torch.float32)
        self.pieces = torch.zeros_like(self.shared)

    def join(self, num_seqs: int) -> None:
        """`x` becomes the sum of `out` over all ranks."""
        self.group.add_up(self.out[:num_seqs], self.x[:num_seqs])

    def run(
        self,
        columns: Sequence[Tensor],
        rows: RequestRows,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        logits: Tensor,
        token_ids: Tensor,
    ) -> None:
        """See `FusedDecode.run`; `logits` `[B, V / ranks]` are those of the shard."""
        super().run(columns, rows, kv_caches, logits, token_ids)
        share: Any = share_kernel
        share[(1,)](self.best, self.shared[self.group.rank], ROWS=MAX_FUSED_SEQS)
        self.group.add_up(self.shared, self.pieces)
        choose: Any = choose_kernel
        choose[(1,)](
            self.pieces,
            columns[0],
            token_ids,
            rows.last_token_ids,
            len(columns[1]),
            RANKS=self.group.size,
            ROWS=MAX_FUSED_SEQS,
        )


class ShardedGraphs(FusedGraphs):
    """`FusedGraphs` of a shard, whose logits come together only where a draw needs them.

    Attributes:
        own_logits: `[MAX_FUSED_SEQS, V / ranks]`, of the shard.
    """

    decode_class = ShardedDecode

    @torch.inference_mode()
    def record(self) -> None:
        """Records all steps and draws."""
        num_tokens = len(self.runner.model.model.embed_tokens.weight)
        self.own_logits = self.logits.new_zeros(MAX_FUSED_SEQS, num_tokens)
        super().record()

    def gather(self, size: GraphSize) -> None:
        """Fills `logits` with what all ranks have, after a fused step."""
        model, num_seqs = self.runner.model, size.num_seqs
        assert isinstance(model, ShardedForCausalLM)
        everybody = model.group.all_gather(self.own_logits[:num_seqs])
        self.logits[:num_seqs].copy_(everybody[:, : self.logits.shape[1]])

    def run_step(self, size: GraphSize) -> None:
        """The model on `inputs`; what a graph records."""
        if not self.is_fused(size):
            return super().run_step(size)
        step = self.inputs.split(size), self.runner.rows, self.runner.kv_caches
        self.fused.run(*step, self.own_logits, self.token_ids)

    def run_draw(self, size: GraphSize, is_random: bool, filters: bool = False) -> None:
        """From `logits` to `token_ids`; what a graph records."""
        if self.is_fused(size):
            self.gather(size)
        super().run_draw(size, is_random, filters)


class ShardedRunner(FusedRunner):
    """`FusedRunner` for a shard of a model, if its ranks can read each other's memory."""

    def __init__(
        self, model: Qwen3ForCausalLM, config: EngineConfig | None = None
    ) -> None:
        super().__init__(model, config)
        if self.graphs_class is not FusedGraphs:
            return
        if hasattr(getattr(model, "group", None), "add_up"):
            self.graphs_class = ShardedGraphs
        else:
            self.graphs_class = StepGraphs
            logger.info("decode='fused' is 'graph' for ranks without shared memory.")

    def draw_step(
        self, graphs: StepGraphs, step: StepLayout, size: GraphSize
    ) -> InFlightStep:
        """See `GraphRunner.draw_step`; what is not in a graph needs all logits too."""
        if isinstance(graphs, ShardedGraphs) and graphs.is_fused(size) and step.drawing:
            wishes = self.rows.sampling.get_wishes(step.draw_rows)
            if graphs.find_draw(size, wishes) is None:
                graphs.gather(size)
        return super().draw_step(graphs, step, size)
