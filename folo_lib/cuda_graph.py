"""What a step waits for: compiled layers, graphs by size of the step, draws on the device."""

import logging
import os
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, chain
from shutil import which
from typing import Any, ClassVar, NamedTuple, TypeVar

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
from .sampler import SamplingMetadata, apply_filters, gumbel_noise, make_jumps, move

logger = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])


# --- compiled layers
def run_embedding(
    model: Qwen3ForCausalLM, input_ids: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the first layer: `[N, E]`, and the cos and sin of all layers."""
    hidden_states = model.model.embed_tokens(input_ids)
    return hidden_states, *model.model.rotary_emb(positions, hidden_states.dtype)


def run_layer(layer: Qwen3DecoderLayer, *arguments: Any) -> tuple[Tensor, Tensor]:
    """One layer. Its weights are inputs like any other, so all layers share one code."""
    return layer(*arguments)


def run_norm(
    model: Qwen3ForCausalLM, hidden_states: Tensor, residual: Tensor
) -> Tensor:
    """The norm after the last layer: `[N, E]`."""
    return model.model.norm(hidden_states, residual)[0]


# --- compiled model
class LayerwiseModel:
    """`Qwen3Model.forward` layer by layer, with three functions that may be compiled.

    Args:
        model: is not changed. Its attention backend reads lengths on the device.
        wrap: what compiles a function, or leaves it as it is.
    """

    def __init__(
        self, model: Qwen3ForCausalLM, wrap: Callable[[Function], Function]
    ) -> None:
        self.model = model
        self.embed, self.norm = wrap(run_embedding), wrap(run_norm)
        self.layer = wrap(run_layer)

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Final hidden states `[N, E]` of a step; see `Qwen3Model.forward`."""
        # Code is compiled anew for other numbers on the host. These two lists stay the
        # same from step to step: they say only if one token runs, or several.
        query_lens = sorted({min(length, 2) for length in metadata.query_lens_list})
        metadata = AttentionMetadata(
            block_size=metadata.block_size,
            slot_mapping=metadata.slot_mapping,
            block_table=metadata.block_table,
            query_start_loc=metadata.query_start_loc,
            seq_lens=metadata.seq_lens,
            query_lens_list=query_lens,
            seq_lens_list=[],
        )
        residual, cos, sin = self.embed(self.model, input_ids, positions)
        hidden_states = torch.zeros_like(residual)  # x + 0: all layers run alike
        for layer, kv_cache in zip(self.model.model.layers, kv_caches, strict=True):
            hidden_states, residual = self.layer(
                layer, hidden_states, residual, cos, sin, kv_cache, metadata
            )
        return self.norm(self.model, hidden_states, residual)


# --- draw rows
def draw_rows(
    logits: Tensor,
    positions: Tensor,
    rows: Tensor,
    floats: Tensor,
    ints: Tensor,
    jumps: Tensor,
    is_random: bool,
) -> Tensor:
    """Draws for rows that ask for a temperature at most: `[B, V] -> [B]`.

    Args:
        logits: `[B, V]`.
        positions: `[B]`, that the drawn tokens take.
        rows: `[B]`, of `SamplingRows`.
        floats, ints: of `SamplingRows`.
        jumps: of `make_jumps`.
        is_random: False: the likeliest for all.
    """
    seeds, sample_indices, scores = ints[rows, 0], ints[rows, 1], logits
    if is_random:
        temperature, size = floats[rows, 0].float(), logits.shape[-1]
        sampling = SamplingMetadata(seeds, sample_indices, positions, rows, temperature)
        noise = gumbel_noise(seeds, sample_indices, positions, size, jumps)
        is_drawn = temperature.sign()[:, None]  # [B, 1], 0 or 1
        scores = torch.addcmul(apply_filters(logits, sampling), noise, is_drawn)
    # Page 07 takes the maximum and its place. A compiler makes two passes of that; the
    # place alone takes one, and a logit that is not finite has its place there too.
    token_ids = scores.argmax(dim=-1)
    best = logits.gather(-1, token_ids[:, None]).squeeze(-1)
    return token_ids.masked_fill(best - best != 0, -1)


# --- sizes
class GraphSize(NamedTuple):
    """How much a graph holds.

    Attributes:
        num_seqs, num_tokens: of a step at most.
        is_decode: each sequence runs one token.
    """

    num_seqs: int
    num_tokens: int
    is_decode: bool


PROMPT_SIZES = 16, 32, 64, 128, 256, 512  # tokens of a prompt that is alone in a step
MIXED_SIZES = 64, 128, 256, 512, 1024, 1536, 2048  # of all that run in a step


def choose_decode_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences with one token each; the last is `max_num_seqs` itself."""
    sizes = [1, 2, 4, 8, 16, 32, 48, 64, 96, *range(128, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def choose_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> list[GraphSize]:
    """The graphs to record."""
    decode = [GraphSize(n, n, True) for n in choose_decode_sizes(max_num_seqs)]
    longer = [GraphSize(1, n, False) for n in PROMPT_SIZES]
    if max_num_seqs > 1:
        longer += [GraphSize(max_num_seqs, n, False) for n in MIXED_SIZES]
    return decode + [one for one in longer if one.num_tokens <= max_num_batched_tokens]


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


# --- static inputs
class StaticInputs:
    """Where graphs read a step from: numbers that stay where they are.

    Args:
        sizes: of all graphs.
        padding_row: of `RequestRows`, that belongs to nobody.
        device: of the graphs.
    """

    def __init__(
        self, sizes: Sequence[GraphSize], padding_row: int, device: torch.device
    ) -> None:
        longest = max(sum(self.count_numbers(size)) for size in sizes)
        self.packed = torch.zeros(longest, dtype=torch.int64, device=device)
        self.padding_row = padding_row

    @staticmethod
    def count_numbers(size: GraphSize) -> list[int]:
        """How many numbers each column has."""
        return [size.num_seqs] * 2 + [size.num_seqs + 1] + [size.num_tokens] * 3

    def split(self, size: GraphSize) -> Sequence[Tensor]:
        """Views of the columns.

        Returns:
            Of sequences `rows`, `seq_lens` and `query_start_loc`, of tokens
            `input_ids`, `positions` and `slot_mapping`. Where the first three lie does
            not depend on the number of tokens.
        """
        lengths = self.count_numbers(size)
        return torch.split(self.packed[: sum(lengths)], lengths)

    def load(self, step: StepLayout, size: GraphSize) -> None:
        """Copies a step there, filled up with sequences and tokens that do nothing."""
        num_tokens = len(step.input_ids)
        num_seqs = size.num_seqs - len(step.rows)
        zeros = [0] * (size.num_tokens - num_tokens)
        starts = accumulate(step.query_lens, initial=0)
        columns = (
            (step.rows, [self.padding_row] * num_seqs),
            (step.seq_lens, [0] * num_seqs),
            (starts, [num_tokens] * num_seqs),
            (step.input_ids, zeros),
            (step.positions, zeros),
            (step.slots, [-1] * len(zeros)),
        )
        numbers = array("q", chain.from_iterable(chain.from_iterable(columns)))
        host = torch.frombuffer(numbers, dtype=torch.int64)
        if self.packed.is_cuda:
            host = host.pin_memory()
        self.packed[: len(host)].copy_(host, non_blocking=True)


# --- record
class Recorder:
    """Records what is launched, as CUDA graphs that share their memory.

    Args:
        device: on a CPU there is nothing to record, and what is recorded is run again.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.memory = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(device)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What launches all kernels of `run` again, on the same tensors.

        `run` reads and writes tensors that stay where they are, and never waits.
        """
        if not self.is_cuda:
            return run
        run()  # compiles, and loads kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, stream=self.stream):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


# --- step graphs
class StepGraphs:
    """Graphs of a runner's steps: from `inputs` to `logits`, and from there to `tokens`.

    Args:
        runner: has a model, caches and rows.
        draw: `draw_rows`, perhaps compiled.

    Attributes:
        inputs: what a step reads.
        logits: `[max_num_seqs, V]`, of the last token of each sequence.
        token_ids: `[max_num_seqs]`, what was drawn from them.
        steps, draws: what launches a step, and a draw with or without temperatures.
    """

    def __init__(self, runner: ModelRunner, draw: Callable[..., Tensor]) -> None:
        self.runner, self.draw, device = runner, draw, runner.device
        num_seqs, vocab_size = runner.config.max_num_seqs, runner.model.config.vocab_size
        self.sizes = choose_sizes(num_seqs, runner.config.max_num_batched_tokens)
        self.inputs = StaticInputs(self.sizes, runner.rows.num_rows, device)
        self.jumps = make_jumps(vocab_size, device)
        self.logits = torch.zeros(num_seqs, vocab_size, dtype=runner.dtype, device=device)
        self.token_ids = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        self.steps: dict[GraphSize, Callable[[], None]] = {}
        self.draws: dict[tuple[int, bool], Callable[[], None]] = {}

    @torch.inference_mode()
    def record(self) -> None:
        """Records from the largest size on, whose memory serves the smaller ones too."""
        recorder = Recorder(self.runner.device)
        for size in sorted(self.sizes, key=lambda size: -size.num_tokens):
            self.inputs.load(StepLayout(), size)
            self.steps[size] = recorder.record(partial(self.run_step, size))
            for is_random in (False, True) if size.is_decode else ():
                run = partial(self.run_draw, size, is_random)
                self.draws[size.num_seqs, is_random] = recorder.record(run)

    def run_step(self, size: GraphSize) -> None:
        """The model on `inputs`; what a graph records."""
        runner, last_token_ids = self.runner, self.runner.rows.last_token_ids
        rows, seq_lens, starts, input_ids, positions, slots = self.inputs.split(size)
        # A token that the host has not read yet stands as -1: its sequence drew it last.
        tokens = torch.arange(size.num_tokens, device=rows.device)
        owners = torch.searchsorted(starts[1:], tokens, right=True)
        owners = owners.clamp(max=size.num_seqs - 1)  # padding is nobody's
        drawn = last_token_ids[rows[owners]]
        metadata = AttentionMetadata(
            block_size=runner.config.block_size,
            slot_mapping=slots,
            block_table=runner.rows.block_table.index_select(0, rows),
            query_start_loc=starts,
            seq_lens=seq_lens,
            query_lens_list=[1] if size.is_decode else [1, 2][-size.num_seqs :],
            seq_lens_list=[],
        )
        input_ids = torch.where(input_ids < 0, drawn, input_ids)
        hidden_states = runner.forward(input_ids, positions, runner.kv_caches, metadata)
        last = hidden_states.index_select(0, (starts[1:] - 1).clamp(min=0))
        self.logits[: size.num_seqs].copy_(runner.model.compute_logits(last))

    def run_draw(self, size: GraphSize, is_random: bool) -> None:
        """From `logits` to `token_ids`; what a graph records."""
        rows, seq_lens, *_ = self.inputs.split(size)
        tables, logits = self.runner.rows, self.logits[: size.num_seqs]
        kept = tables.sampling.floats, tables.sampling.ints, self.jumps
        token_ids = self.draw(logits, seq_lens, rows, *kept, is_random)
        self.token_ids[: size.num_seqs].copy_(token_ids)
        tables.last_token_ids.index_copy_(0, rows, token_ids.clamp(min=0))


# --- can compile
def can_compile(weight: Tensor) -> bool:
    """Whether there are Triton, a C compiler and a GPU that is new enough for both."""
    compilers = os.environ.get("CC"), "cc", "gcc", "clang"
    has_compiler = any(which(name) for name in compilers if name)
    if not weight.is_cuda or not has_compiler or find_spec("triton") is None:
        return False
    oldest = (8, 0) if weight.dtype == torch.bfloat16 else (7, 0)
    return torch.cuda.get_device_capability(weight.device) >= oldest


def choose_wrap(weight: Tensor, compiles: bool) -> Callable[[Function], Function]:
    """What compiles a function, if that is wanted and possible, or leaves it."""
    if compiles and can_compile(weight):
        # For any number of tokens. Without the patterns the residual is not added in the
        # matrix product, which is slow at that, but in the norm after it.
        return partial(torch.compile, dynamic=True, options={"pattern_matcher": False})
    if compiles and weight.is_cuda:
        needs = "Triton, a C compiler, and for bfloat16 compute capability 8"
        logger.warning("Layers are not compiled: that needs %s.", needs)
    return lambda function: function


# --- graph runner
class GraphRunner(ModelRunner):
    """`ModelRunner` that replays a step as one graph where there is one of its size.

    Steps that are longer than the longest graph, and those of which log-probabilities
    of a prompt are wanted, run the compiled layers one by one.

    Attributes:
        graphs: None if steps are not recorded.
    """

    compiles: ClassVar[bool] = True
    records: ClassVar[bool] = True

    def __init__(
        self, model: Qwen3ForCausalLM, config: EngineConfig | None = None
    ) -> None:
        super().__init__(model, config)
        self.graphs: StepGraphs | None = None
        backend = model.model.layers[0].self_attn.backend
        self.is_static = backend.supports_cuda_graph
        if not self.is_static:
            asked, name = self.config.decode, backend.get_name()
            message = "decode=%r needs attention_backend='triton', not %r: steps run eagerly."
            logger.warning(message, asked, name)
            return
        wrap = choose_wrap(model.model.embed_tokens.weight, self.compiles)
        self.forward = LayerwiseModel(model, wrap)
        self.draw_rows = wrap(draw_rows)

    def initialize_kv_caches(self, num_blocks: int, max_model_len: int) -> None:
        """Allocates what steps need, and records the graphs."""
        super().initialize_kv_caches(num_blocks, max_model_len)
        if self.records and self.is_static:
            self.graphs = StepGraphs(self, self.draw_rows)
            self.graphs.record()

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Starts a step, of which nothing is awaited."""
        self.rows.update(plan)
        step = lay_end_to_end(self.rows, plan, self.config.block_size)
        if not plan.scheduled:
            return InFlightStep()
        if self.graphs is not None and not step.scoring:
            counts = len(step.rows), len(step.input_ids)
            if size := find_size(self.graphs.sizes, *counts):
                self.graphs.inputs.load(step, size)
                self.graphs.steps[size]()
                return self.draw_step(self.graphs, step, size)
        return self.run(make_input_batch(self.rows, step, self.config.block_size))

    def draw_step(
        self, graphs: StepGraphs, step: StepLayout, size: GraphSize
    ) -> InFlightStep:
        """Draws for the sequences whose last known token has run.

        Whatever a request may ask for besides a temperature is not in a graph: then the
        sampler of page 07 takes the logits, and nothing waits either.
        """
        if not step.drawing:
            return InFlightStep()
        drawing, num_seqs = step.draw_rows, len(step.rows)
        select: Callable[[Tensor], Tensor] = partial(torch.narrow, dim=0, start=0, length=num_seqs)
        if len(drawing) < num_seqs:
            own = set(drawing)
            chosen = [i for i, row in enumerate(step.rows) if row in own]
            index = move(chosen, torch.int64, self.device)
            select = partial(torch.index_select, dim=0, index=index)
        wishes = self.rows.sampling.get_wishes(drawing)
        if wishes <= {"temperature"}:
            graphs.draws[size.num_seqs, bool(wishes)]()
            return InFlightStep.send(step.drawing, select(graphs.token_ids), None, [])
        rows, seq_lens, *_ = map(select, graphs.inputs.split(size)[:2])
        sampling = self.rows.sampling.gather(drawing, rows, seq_lens)
        drawn = self.draw(select(graphs.logits), sampling)
        return InFlightStep.send(step.drawing, *drawn, [])


class CompiledRunner(GraphRunner):
    """Compiled layers, launched one by one."""

    records = False


class PlainGraphRunner(GraphRunner):
    """Graphs of PyTorch's own kernels, nothing compiled."""

    compiles = False
