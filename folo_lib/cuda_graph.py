"""What a step waits for: compiled layers, graphs by batch size, draws on the device."""

import logging
import os
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, chain
from shutil import which
from typing import NamedTuple

import torch
from torch import Tensor

from .config import EngineConfig
from .kv_cache import AttentionMetadata
from .qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM
from .runner import (
    InFlightStep,
    ModelRunner,
    StepLayout,
    StepPlan,
    lay_end_to_end,
    make_input_batch,
)
from .sampler import SamplingMetadata, apply_filters, draw_tokens, make_jumps, move

logger = logging.getLogger(__name__)


# --- compiled layers
def run_embedding(
    model: Qwen3ForCausalLM, input_ids: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the first layer: `[N, E]`, cos and sin."""
    hidden_states = model.model.embed_tokens(input_ids)
    return hidden_states, *model.model.rotary_emb(positions, hidden_states.dtype)


def run_layer(
    layer: Qwen3DecoderLayer, hidden_states: Tensor, residual: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    """One layer; the weights are inputs like any other, so all layers share its code."""
    return layer(hidden_states, residual, *rest)


def run_norm(
    model: Qwen3ForCausalLM, hidden_states: Tensor, residual: Tensor
) -> Tensor:
    """After the last layer: `[N, E]`."""
    return model.model.norm(hidden_states, residual)[0]


class CompiledModel:
    """A model whose layers are compiled, each in two pieces around the attention.

    Args:
        model: is not changed.
        wrap: what compiles a function.
    """

    def __init__(self, model: Qwen3ForCausalLM, wrap: Callable) -> None:
        self.model = model
        self.embed, self.layer, self.norm = map(
            wrap, (run_embedding, run_layer, run_norm)
        )

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        residual, cos, sin = self.embed(self.model, input_ids, positions)
        hidden_states = torch.zeros_like(residual)  # x + 0: all layers run alike
        for layer, kv_cache in zip(self.model.model.layers, kv_caches, strict=True):
            hidden_states, residual = self.layer(
                layer, hidden_states, residual, cos, sin, kv_cache, metadata
            )
        return self.norm(self.model, hidden_states, residual)


def can_compile(weight: Tensor) -> bool:
    """Whether there are Triton, a C compiler and a GPU that is new enough for both."""
    if not weight.is_cuda:
        return False
    compilers = os.environ.get("CC"), "cc", "gcc", "clang"
    has_compiler = any(which(name) for name in compilers if name)
    oldest = (8, 0) if weight.dtype == torch.bfloat16 else (7, 0)
    is_new = torch.cuda.get_device_capability(weight.device) >= oldest
    return is_new and has_compiler and find_spec("triton") is not None


# --- static inputs
class GraphSize(NamedTuple):
    """The shape of a step that a graph can hold.

    Attributes:
        num_seqs, num_tokens: how many at most.
        is_decode: each sequence runs one token.
    """

    num_seqs: int
    num_tokens: int
    is_decode: bool


PROMPT_SIZES = (16, 32, 64, 128, 256, 512)  # of a prompt that is alone in a step
MIXED_SIZES = (64, 128, 256, 512, 1024, 1536, 2048)  # of all tokens of a step


def choose_decode_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences with one token each; the last is `max_num_seqs` itself."""
    sizes = [1, 2, 4, 8, *range(16, 64, 16), *range(64, 128, 32)]
    sizes += range(128, max_num_seqs, 32)
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def choose_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> list[GraphSize]:
    """Which graphs are recorded, from the smallest of each kind."""
    decode = [GraphSize(n, n, True) for n in choose_decode_sizes(max_num_seqs)]
    longer = [GraphSize(1, n, False) for n in PROMPT_SIZES]
    if max_num_seqs > 1:
        longer += [GraphSize(max_num_seqs, n, False) for n in MIXED_SIZES]
    return decode + [size for size in longer if size.num_tokens <= max_num_batched_tokens]


def find_size(
    sizes: Sequence[GraphSize], num_seqs: int, num_tokens: int
) -> GraphSize | None:
    """The smallest that holds a step; None if none does."""
    fitting = [
        size
        for size in sizes
        if size.num_seqs >= num_seqs
        and size.num_tokens >= num_tokens
        and size.is_decode == (num_tokens == num_seqs)
    ]
    return min(fitting, default=None)


class StaticInputs:
    """Where graphs read a step from: tensors that stay where they are."""

    def __init__(
        self, sizes: Sequence[GraphSize], padding_row: int, device: torch.device
    ) -> None:
        longest = max(sum(self.count(size)) for size in sizes)
        self.packed = torch.zeros(longest, dtype=torch.int64, device=device)
        self.padding_row = padding_row

    @staticmethod
    def count(size: GraphSize) -> list[int]:
        """How many numbers each column has; those of sequences come first."""
        return [size.num_seqs] * 2 + [size.num_seqs + 1] + [size.num_tokens] * 3

    def split(self, size: GraphSize) -> Sequence[Tensor]:
        """`rows, seq_lens, starts` of sequences, `input_ids, positions, slots` of tokens."""
        lengths = self.count(size)
        return torch.split(self.packed[: sum(lengths)], lengths)

    def load(self, step: StepLayout, size: GraphSize) -> None:
        """Copies a step there, padded with sequences and tokens that are nobody's."""
        num_tokens = len(step.input_ids)
        num_seqs = size.num_seqs - len(step.rows)
        zeros = [0] * (size.num_tokens - num_tokens)
        columns = (
            step.rows, [self.padding_row] * num_seqs,
            step.seq_lens, [0] * num_seqs,
            accumulate(step.query_lens, initial=0), [num_tokens] * num_seqs,
            step.input_ids, zeros,
            step.positions, zeros,
            step.slots, [-1] * len(zeros),
        )
        numbers = torch.frombuffer(array("q", chain(*columns)), dtype=torch.int64)
        if self.packed.is_cuda:
            numbers = numbers.pin_memory()
        self.packed[: len(numbers)].copy_(numbers, non_blocking=True)


# --- draws
def draw_rows(
    logits: Tensor,
    positions: Tensor,
    rows: Tensor,
    floats: Tensor,
    ints: Tensor,
    jumps: Tensor,
    is_random: bool,
) -> Tensor:
    """Page 07's draw for rows that ask for nothing but a temperature, `[B]`."""
    seeds, sample_indices = ints[rows, 0], ints[rows, 1]
    metadata = SamplingMetadata(seeds, sample_indices, positions, rows)
    if is_random:
        metadata.temperature = floats[rows, 0].float()
        logits = apply_filters(logits, metadata)
    return draw_tokens(logits, metadata, jumps)


# --- recording
def record(run: Callable[[], None], pool, stream) -> Callable[[], None]:
    """Records the kernels that `run` launches; on a CPU the result is `run` itself."""
    if pool is None:
        return run
    run()  # compiles, and loads kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        run()
    return graph.replay


class GraphRunner(ModelRunner):
    """Replays a step as one graph where a graph of its size was recorded."""

    compiles = True
    records = True

    def __init__(
        self, model: Qwen3ForCausalLM, config: EngineConfig | None = None
    ) -> None:
        super().__init__(model, config)
        weight = model.model.embed_tokens.weight
        wrap: Callable = lambda function: function
        if self.compiles and can_compile(weight):
            wrap = partial(torch.compile, dynamic=True)
        elif self.compiles and weight.is_cuda:
            needs = "Triton, a C compiler, and for bfloat16 compute capability 8"
            logger.warning("Layers are not compiled: that needs %s.", needs)
        self.forward = CompiledModel(model, wrap)
        self.draw_rows = wrap(draw_rows)

    def initialize_kv_caches(self, num_blocks: int, max_model_len: int) -> None:
        super().initialize_kv_caches(num_blocks, max_model_len)
        self.graphs: dict[GraphSize, Callable[[], None]] = {}
        self.draws: dict[tuple[int, bool], Callable[[], None]] = {}
        backend = self.model.model.layers[0].self_attn.backend
        if self.records and backend.supports_cuda_graph:
            self.record_all()

    @torch.inference_mode()
    def record_all(self) -> None:
        """Records a graph of each size, and a draw for each number of sequences."""
        num_seqs, device = self.config.max_num_seqs, self.device
        sizes = choose_sizes(num_seqs, self.config.max_num_batched_tokens)
        self.inputs = StaticInputs(sizes, num_seqs, device)
        vocab_size = self.model.config.vocab_size
        self.logits = torch.zeros(num_seqs, vocab_size, dtype=self.dtype, device=device)
        self.jumps = make_jumps(vocab_size, device)
        self.tokens = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        pool = stream = None
        if device.type == "cuda":
            pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        by_tokens = sorted(sizes, key=lambda size: size.num_tokens, reverse=True)
        for size in by_tokens:  # from the largest, whose memory the others share
            self.inputs.load(StepLayout(), size)
            self.graphs[size] = record(partial(self.run_model, size), pool, stream)
            if size.is_decode:
                for is_random in (False, True):
                    run = partial(self.run_draw, size, is_random)
                    self.draws[size.num_seqs, is_random] = record(run, pool, stream)

    def run_model(self, size: GraphSize) -> None:
        """From `inputs` to `logits`: what a graph records."""
        rows, seq_lens, starts, input_ids, positions, slots = self.inputs.split(size)
        tokens = torch.arange(size.num_tokens, device=slots.device)
        owners = torch.searchsorted(starts[1:], tokens, right=True)
        owners = owners.clamp(max=size.num_seqs - 1)
        drawn = self.rows.last_token_ids[rows[owners]]
        input_ids = torch.where(input_ids < 0, drawn, input_ids)
        lens = [1] if size.is_decode else [2] if size.num_seqs == 1 else [1, 2]
        metadata = AttentionMetadata(
            block_size=self.config.block_size,
            slot_mapping=slots,
            block_table=self.rows.block_table.index_select(0, rows),
            query_start_loc=starts,
            seq_lens=seq_lens,
            query_lens_list=lens,  # says only whether there are decodes and prompts
            seq_lens_list=[],
        )
        hidden_states = self.forward(input_ids, positions, self.kv_caches, metadata)
        last = (starts[1:] - 1).clamp(min=0)
        logits = self.model.compute_logits(hidden_states.index_select(0, last))
        self.logits[: size.num_seqs].copy_(logits)

    def run_draw(self, size: GraphSize, is_random: bool) -> None:
        """From `logits` to `tokens`."""
        rows, seq_lens, *_ = self.inputs.split(size)
        n, sampling = size.num_seqs, self.rows.sampling
        kept = sampling.floats, sampling.ints, self.jumps
        drawn = self.draw_rows(self.logits[:n], seq_lens, rows, *kept, is_random)
        self.tokens[:n].copy_(drawn)
        self.rows.last_token_ids.index_copy_(0, rows, drawn.clamp(min=0))

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Starts a step: as a graph, if there is one of its size, else as before."""
        self.rows.update(plan)
        step = lay_end_to_end(self.rows, plan, self.config.block_size)
        if not plan.scheduled:
            return InFlightStep()
        size = None
        if self.graphs and not step.scoring:
            size = find_size(tuple(self.graphs), len(step.rows), len(step.input_ids))
        if size is None:
            return self.run(make_input_batch(self.rows, step, self.config.block_size))
        self.inputs.load(step, size)
        self.graphs[size]()
        return self.draw_step(step, size)

    def draw_step(self, step: StepLayout, size: GraphSize) -> InFlightStep:
        """Draws for those sequences of a step that are at the end of what is known."""
        if not step.drawing:
            return InFlightStep()
        own, sampling = step.draw_rows, self.rows.sampling
        n, places = len(step.rows), None
        if len(own) < n:
            drawing = set(own)
            places = [i for i, row in enumerate(step.rows) if row in drawing]
            places = move(places, torch.int64, self.device)
        select = lambda x: x[:n] if places is None else x.index_select(0, places)
        wishes = sampling.get_wishes(own)
        if wishes <= {"temperature"}:
            self.draws[size.num_seqs, bool(wishes)]()
            return InFlightStep.send(step.drawing, select(self.tokens), None, [])
        rows, seq_lens, *_ = map(select, self.inputs.split(size)[:2])
        metadata = sampling.gather(own, rows, seq_lens)
        drawn = self.draw(select(self.logits), metadata)
        return InFlightStep.send(step.drawing, *drawn, [])


class CompiledRunner(GraphRunner):
    """Compiled layers, launched one by one."""

    records = False


class PlainGraphRunner(GraphRunner):
    """Graphs of PyTorch's own kernels."""

    compiles = False
