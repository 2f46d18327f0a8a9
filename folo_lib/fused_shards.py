"""The fused step of page 15 for a shard of a model: the sums of page 16 between its kernels.

A rank has some heads and some columns of the MLP, so its output projection and its down projection
give one part of what the residual stream grows by. Rank 0 adds the stream itself. Each sends its
part to all others as soon as it has it, and the sum of the parts is the new stream, on every rank;
`ticket_sums.py` says how they know that all parts have come.

The stream and the parts are float32 here, whatever the model's dtype is. In bfloat16 each part
would be rounded, rank 0's to the last digits of the stream, and the sum again; in float32 the
stream is nearer to the exact one than on a single GPU.

The embedding and the head are cut by tokens. A token that is another rank's has zeros, so the
sum of all is its embedding. Of the head each rank knows its own winner, packed as on page 15 in a
whole number below 2**56. It travels as two words, 16 bytes for each sequence and rank.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import EngineConfig
from .cuda_graph import GraphSize, StepGraphs, choose_wrap
from .early_start import let_next_start, wait_for_previous
from .fused_checks import FusionSizes
from .fused_decode import (
    MAX_FUSED_SEQS,
    FusedGraphs,
    FusedRunner,
    load_first_tiles,
    logger,
    multiply,
    unpack_token,
)
from .fused_vectors import VectorDecode
from .qwen3 import Qwen3ForCausalLM
from .runner import InFlightStep, RequestRows, StepLayout
from .sampling_kernels import TritonDraw
from .summed_layers import SummedLayers
from .symmetric_memory import DTYPES, SharedGroup
from .tensor_parallel import ShardedForCausalLM, VocabParallelEmbedding
from .ticket_sums import send, send_kernel, sum_kernel

__all__ = ["ShardedDecode", "ShardedGraphs", "ShardedRunner"]

SUM_BLOCK = 256  # numbers of a sum that a program makes


@triton.jit(do_not_specialize=["offset", "index"])
def part_kernel(
    y,
    w,
    x,
    addresses,
    offset,
    tickets,
    index,
    num_seqs,
    E: tl.constexpr,
    K: tl.constexpr,  # of the matrix
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
    RANKS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """`residual_kernel` of a shard: sends `y @ w.T`, and `x` with it if it `ADDS` that."""
    let_next_start(PDL)
    row = tl.program_id(0) * 8 * GROUPS
    tiles = load_first_tiles(w, row, 8, K, GROUPS)
    wait_for_previous(PDL)
    sequences = tl.arange(0, ROWS)[:, None]
    place = sequences * E + row + tl.arange(0, 8 * GROUPS)[None, :]
    exist = sequences < num_seqs
    before = tl.load(x + place, exist, 0.0) if ADDS else 0.0
    more = multiply(y, (), tiles, w, row, 8, num_seqs, 0.0, K, GROUPS, ROWS, False)
    send(before + more, place, exist, addresses, offset, tickets, index, RANKS)


@triton.jit(do_not_specialize=["offset", "index"])
def share_kernel(
    best,
    addresses,
    offset,
    tickets,
    index,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends the packed winners of this rank, `[ROWS]`; `best` is zeros afterwards.

    A word has room for 32 bits of the 56, so they go in two.
    """
    let_next_start(PDL)
    each = tl.arange(0, ROWS)
    ticket = ((tl.load(tickets) + index) & 0x7FFFFFFF).to(tl.int64)
    wait_for_previous(PDL)
    packed = tl.load(best + each)
    tl.store(best + each, tl.zeros([ROWS], tl.int64))
    for rank in tl.static_range(RANKS):
        theirs = tl.load(addresses + rank).to(tl.pointer_type(tl.int64), bitcast=True)
        place = theirs + offset + each
        tl.store(place, ((packed & 0xFFFFFFF) << 32) | ticket)
        tl.store(place + ROWS, ((packed >> 28) << 32) | ticket)


@triton.jit(do_not_specialize_on_alignment=["rows"], do_not_specialize=["index"])
def choose_kernel(
    words,  # [RANKS, 2, ROWS]
    tickets,
    index,
    rows,
    token_ids,
    last_token_ids,
    num_seqs,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Waits for the winners of all ranks, and writes the best of them as tokens."""
    each = tl.arange(0, ROWS)
    base = tl.load(tickets)
    ticket = (base + index) & 0x7FFFFFFF
    top = tl.zeros([ROWS], tl.int64)
    missing = 1
    while missing > 0:
        top = tl.zeros([ROWS], tl.int64)
        wrong = tl.zeros([ROWS], tl.int32)
        for rank in tl.static_range(RANKS):
            place = words + rank * 2 * ROWS + each
            low = tl.load(place, volatile=True)
            high = tl.load(place + ROWS, volatile=True)
            wrong |= (low.to(tl.int32) ^ ticket) | (high.to(tl.int32) ^ ticket)
            top = tl.maximum(top, ((high >> 32) << 28) | (low >> 32))
        missing = tl.max((wrong != 0).to(tl.int32), 0)
    wait_for_previous(PDL)
    drawn, exist = unpack_token(top), each < num_seqs
    row = tl.load(rows + each, mask=exist, other=0)
    tl.store(token_ids + each, drawn, mask=exist)
    tl.store(last_token_ids + row, tl.maximum(drawn, 0), mask=exist)
    tl.store(tickets, base + index + 1)


class ShardedDecode(VectorDecode):
    """`FusedDecode` of one rank's shard; all ranks run the same steps at the same time.

    Args:
        model: the shard, of which `find_obstacle` finds none; its group is a `SharedGroup`.
        max_blocks: of a sequence.
        uses_pdl: see `FusedDecode`.
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
        self.first_id = embedding.start
        group, size, most = self.group, model.config.hidden_size, MAX_FUSED_SEQS
        self.out = torch.zeros(most, size, device=group.device)
        self.x = torch.zeros_like(self.out)
        self.words = [self.make_words(most * size) for _ in range(2)]
        self.winners = self.make_words(2 * most)
        self.tickets = torch.full(
            (1,), 128, dtype=torch.int32, device=group.device
        )  # words that nobody has sent are zeros
        self.index = 0

    def make_words(self, length: int) -> tuple[Tensor, Tensor]:
        """Room for `length` words of each rank, `[ranks, length]`, and where all have it."""
        shape = self.group.size, length
        words = self.group.allocate(*shape, dtype=torch.int64)
        places = self.group.find_addresses(words)
        return words, torch.tensor(places, device=words.device)

    def choose_words(self) -> tuple[Tensor, dict[str, Any]]:
        """Those of the next sum, and how `send` finds them."""
        self.index += 1
        words, addresses = self.words[self.index % 2]
        slot = min(self.group.rank, len(addresses) - 1)
        return words, {
            "addresses": addresses,
            "offset": slot * words.shape[1],
            "tickets": self.tickets,
            "index": self.index,
        }

    def add_up(self, words: Tensor, num_seqs: int) -> None:
        """Launches the sum of what all ranks send there: `x`."""
        launch: Any = sum_kernel
        num_numbers = num_seqs * self.x.shape[1]
        launch[(triton.cdiv(num_numbers, SUM_BLOCK),)](
            words,
            self.x,
            self.tickets,
            self.index,
            num_numbers,
            words.shape[1],
            RANKS=len(self.words[0][1]),
            BLOCK=SUM_BLOCK,
            num_warps=4,
            **self.pdl,
        )

    def join(self, num_seqs: int) -> None:
        """`x` becomes the sum of `out` over all ranks."""
        self.index = 0
        words, sending = self.choose_words()
        num_numbers = num_seqs * self.x.shape[1]
        launch: Any = send_kernel
        launch[(triton.cdiv(num_numbers, 1024),)](
            self.out,
            num_numbers=num_numbers,
            RANKS=len(sending["addresses"]),
            BLOCK=1024,
            **sending,
        )
        self.add_up(words, num_seqs)

    def run_residual(self, y: Tensor, w: Tensor, sizes: FusionSizes) -> None:
        """Launches a product and the sum of it over ranks; rank 0 adds the old `x`."""
        words, sending = self.choose_words()
        if len(sending["addresses"]) == 1:  # nobody to add to, when a sum is left out
            return super().run_residual(y, w, sizes)
        sending |= {"RANKS": len(sending["addresses"]), "ADDS": self.group.rank == 0}
        if self.is_vector(sizes, w):
            self.run_vector_residual(y, w, **sending)
        else:
            launch: Any = part_kernel
            launch[(len(w) // (8 * sizes.residual_groups),)](
                y,
                w,
                self.x,
                num_seqs=sizes.num_seqs,
                E=w.shape[0],
                K=w.shape[1],
                GROUPS=sizes.residual_groups,
                ROWS=sizes.rows,
                num_warps=8,
                **sending,
                **self.pdl,
            )
        self.add_up(words, sizes.num_seqs)

    def run_head(
        self,
        row_index: Tensor,
        rows: RequestRows,
        logits: Tensor,
        token_ids: Tensor,
        sizes: FusionSizes,
    ) -> None:
        """See `FusedDecode`; `logits` `[B, V / ranks]` are those of the shard."""
        super().run_head(row_index, rows, logits, token_ids, sizes)
        words, addresses = self.winners
        slot = min(self.group.rank, len(addresses) - 1)
        self.index += 1
        shape = {"RANKS": len(addresses), "ROWS": MAX_FUSED_SEQS, "num_warps": 1}
        share: Any = share_kernel
        share[(1,)](
            self.best,
            addresses,
            slot * words.shape[1],
            self.tickets,
            self.index,
            **shape,
            **self.pdl,
        )
        choose: Any = choose_kernel
        choose[(1,)](
            words,
            self.tickets,
            self.index,
            row_index,
            token_ids,
            rows.last_token_ids,
            sizes.num_seqs,
            **shape,
            **self.pdl,
        )


class ShardedDraw(TritonDraw):
    """`TritonDraw` from logits `[B, V / ranks]` of a shard, without top_k and top_p.

    Args:
        num_seqs: the most rows of a call.
        model: the shard.
    """

    def __init__(self, num_seqs: int, model: ShardedForCausalLM) -> None:
        embedding, self.group = model.model.embed_tokens, model.group
        assert isinstance(embedding, VocabParallelEmbedding)
        self.rank, self.num_ranks = self.group.rank, self.group.size
        self.first_id, weight = embedding.start, embedding.weight
        super().__init__(num_seqs, len(weight), weight.device)  # as many slices on all
        own = model.config.vocab_size - self.first_id
        self.num_tokens = max(0, min(len(weight), own))
        for part in self.scratch.maxima, self.scratch.scores, self.scratch.ids:
            part.zero_()

    def share(self, found: Tensor) -> Tensor:
        """A sum, to which each rank adds zeros for the slices of the others."""
        return self.group.all_reduce(found)


class ShardedGraphs(FusedGraphs):
    """`FusedGraphs` of a shard, whose logits come together only where a draw needs them.

    Attributes:
        own_logits: `[max_num_seqs, V / ranks]`, of the shard.
    """

    decode_class = "folo_lib.fused_shards:ShardedDecode"

    @torch.inference_mode()
    def record(self) -> None:
        """Records all steps and draws."""
        model, num_seqs = self.get_model(), len(self.logits)
        num_tokens = len(model.model.embed_tokens.weight)
        self.own_logits = self.logits.new_zeros(num_seqs, num_tokens)
        self.sharded_draw = ShardedDraw(num_seqs, model)
        super().record()

    def get_model(self) -> ShardedForCausalLM:
        """The shard."""
        model = self.runner.model
        assert isinstance(model, ShardedForCausalLM)
        return model

    def gather(self, size: GraphSize) -> None:
        """Fills `logits` with what all ranks have."""
        num_seqs = size.num_seqs
        everybody = self.get_model().group.all_gather(self.own_logits[:num_seqs])
        self.logits[:num_seqs].copy_(everybody[:, : self.logits.shape[1]])

    def run_step(self, size: GraphSize) -> None:
        """The model on `inputs`; what a graph records."""
        if not self.is_fused(size):
            return super().run_step(size)
        step = self.inputs.split(size), self.runner.rows, self.runner.kv_caches
        self.fused.run(*step, self.own_logits, self.token_ids)

    def keep_logits(self, last: Tensor) -> None:
        """See `StepGraphs`."""
        own = Qwen3ForCausalLM.compute_logits(self.get_model(), last)
        self.own_logits[: len(last)].copy_(own)

    def run_draw(self, size: GraphSize, is_random: bool, filters: bool = False) -> None:
        """From `own_logits` to `token_ids`; what a graph records."""
        if filters:
            self.gather(size)
            return super().run_draw(size, is_random, filters)
        self.draw_from(self.own_logits, self.sharded_draw, size, filters)


class ShardedRunner(FusedRunner):
    """`FusedRunner` for a shard of a model, if its ranks can read each other's memory."""

    def __init__(
        self, model: Qwen3ForCausalLM, config: EngineConfig | None = None
    ) -> None:
        super().__init__(model, config)
        if self.graphs_class is not FusedGraphs:
            return
        if hasattr(getattr(model, "group", None), "find_addresses"):
            self.graphs_class = ShardedGraphs
            if self.dtype in DTYPES:
                assert isinstance(model, ShardedForCausalLM)
                wrap = choose_wrap(model.model.embed_tokens.weight, self.compiles)
                self.forward = SummedLayers(model, wrap)
        else:
            self.graphs_class = StepGraphs
            logger.info("decode='fused' is 'graph' for ranks without shared memory.")

    def draw_step(
        self, graphs: StepGraphs, step: StepLayout, size: GraphSize
    ) -> InFlightStep:
        """See `GraphRunner.draw_step`; what is not in a graph needs all logits too."""
        if isinstance(graphs, ShardedGraphs) and step.drawing:
            wishes = self.rows.sampling.get_wishes(step.draw_rows)
            if graphs.find_draw(size, wishes) is None:
                graphs.gather(size)
        return super().draw_step(graphs, step, size)
