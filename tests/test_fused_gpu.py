"""Page 15's decode step on a card: long runs, random traffic, rounding, repeats and company.

The models are small in all but the numbers that the kernels ask for, so that Triton compiles each
of their variants in about a second. Layers are not compiled by PyTorch: those serve the steps that
read prompts, and test_fused_decode compares engines that do compile them. The numbers that are
measured are printed: `pytest -rP` shows them.
"""

from __future__ import annotations

import copy
import gc
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import models
import pytest
import schedules
import torch
from schedules import Schedule, check_integrity, get_runner
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config

from folo_lib import LLMEngine, SamplingParams, bundled_model_path
from folo_lib.checkpoint import load_model, load_tokenizer
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.runner import InFlightStep

pytest.importorskip("triton", reason="Triton runs on Linux")

from test_fused_decode import DEVICE, Step, gpu, has_pdl, on_gpu, step_slots

import folo_lib.cuda_graph as cuda_graph
from folo_lib.cuda_graph import Recorder
from folo_lib.fused_decode import FusedDecode, FusedGraphs, FusedRunner

pytestmark = [gpu, on_gpu]

WIDE, NARROW = torch.float32, torch.bfloat16
VOCAB_SIZE = 2048  # of the bundled tokenizer, whose ids the schedules draw
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "2048": {"hidden_size": 2048},
}
CACHE_BYTES = 2**29
NUM_STEPS = 500


@pytest.fixture(autouse=True)
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No gradients, no products in TF32, no layers that PyTorch compiles, few graphs of prompts.

    An engine that is left over is in a circle of references. It is collected here, so that its
    graphs do not end while another engine records its own.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    monkeypatch.setattr(FusedRunner, "compiles", False)
    monkeypatch.setattr(cuda_graph, "PROMPT_SIZES", (64,))
    monkeypatch.setattr(cuda_graph, "MIXED_SIZES", (256,))
    with torch.inference_mode():
        yield
    gc.collect()


Models = tuple[Qwen3ForCausalLM, PreTrainedModel]


@cache
def get_models(
    shape: str = "tied", layers: int = 2, spread: float = 0.125
) -> dict[torch.dtype, Models]:
    """Ours and Hugging Face's, in float32 and bfloat16, all with the same weights.

    The weights are random, the norms' too, and are numbers that bfloat16 can hold. The context
    decides which token is the likeliest. `spread` is a factor on the logits; with the default their
    standard deviation is below one, and the bound on the errors of float32 is 1e-5 flat.
    """
    config = Qwen3Config(**{
        "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": VOCAB_SIZE, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, **SHAPES[shape],
    })  # fmt: skip
    narrow = models.make_reference(config, "sdpa", NARROW)
    narrow.get_output_embeddings().weight.mul_(spread)
    wide = models.make_reference(config, "eager", WIDE)
    wide.load_state_dict(narrow.state_dict())
    return {
        theirs.dtype: (
            models.load(config, theirs, "triton").to(DEVICE),
            theirs.to(DEVICE),
        )
        for theirs in (wide, narrow)
    }


class Tape:
    """The logits and the likeliest tokens of each step in which an engine draws.

    Args:
        engine: all of whose requests are greedy.
        forced: for each of these steps the tokens that are drawn instead, so that another engine's
            text is read. Without them nothing but the notes is added to what the engine does.

    Attributes:
        logits, tokens: of each step `[B, V]` and `[B]`, before any token is forced; in the order
            of the requests' rows, since a step has an order of its own.
        num_fused: how many of the steps ran in `FusedDecode`.
    """

    def __init__(
        self, engine: LLMEngine, forced: Sequence[Tensor] | None = None
    ) -> None:
        self.runner, self.forced = get_runner(engine), forced
        self.logits: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.num_fused = 0
        sampler = self.runner.sampler
        self.sample_well, sampler.sample = sampler.sample, self.sample
        if getattr(self.runner, "graphs", None) is not None:
            self.draw_step_well = self.runner.draw_step
            self.runner.draw_step = self.draw_step

    def note(self, logits: Tensor, own: Tensor, rows: Tensor) -> Tensor | None:
        """What is drawn instead of `own`, if that is so."""
        order = rows.argsort()
        self.logits.append(logits.float()[order])
        self.tokens.append(own[order])
        if self.forced is None:
            return None
        drawn = self.forced[len(self.tokens) - 1][order.argsort()]
        self.runner.rows.last_token_ids.index_copy_(0, rows, drawn)
        return drawn

    def sample(self, logits: Tensor, sampling: Any) -> tuple[Tensor, None]:
        """In place of `Sampler.sample`."""
        own, _ = self.sample_well(logits, sampling)
        drawn = self.note(logits, own, sampling.rows)
        return own if drawn is None else drawn, None

    def draw_step(self, graphs: FusedGraphs, step: Any, size: Any) -> InFlightStep:
        """In place of `GraphRunner.draw_step`."""
        handle: InFlightStep = self.draw_step_well(graphs, step, size)
        if not step.drawing:
            return handle
        self.num_fused += graphs.is_fused(size)
        select = self.runner.select_drawing(step)
        rows = select(graphs.inputs.split(size)[0])
        drawn = self.note(select(graphs.logits), select(graphs.token_ids), rows)
        if drawn is None:
            return handle
        return InFlightStep.send(step.drawing, drawn, None, [])


def write(
    model: Qwen3ForCausalLM,
    decode: str,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    forced: Sequence[Tensor] | None = None,
    **options: Any,
) -> tuple[Tape, list[list[int]]]:
    """What happens while an engine answers the prompts, and its answers."""
    options = {"max_num_seqs": len(prompts), "max_model_len": 2048} | options
    engine = LLMEngine(
        model, decode=decode, kv_cache_memory_bytes=CACHE_BYTES, **options
    )
    if decode == "fused":
        assert isinstance(get_runner(engine).graphs, FusedGraphs)
    tape = Tape(engine, forced)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = engine.generate(list(map(list, prompts)), params, use_tqdm=False)
    return tape, [list(one.outputs[0].token_ids) for one in outputs]


def draw_prompts(lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(sum(lengths))
    return [rng.choices(range(VOCAB_SIZE), k=length) for length in lengths]


def rms(error: Tensor) -> Tensor:
    """Root mean square over the vocabulary and whatever comes before, but for the first dim."""
    return error.flatten(1).square().mean(1).sqrt()


# --- 500 greedy tokens ----------------------------------------------------------------


MANY = [1, 17, 62, 63, 64, 65, 127, 200, 400, 600, 700, 900, 1000, 1022, 1023, 1024]


@pytest.mark.parametrize(
    ("shape", "block_size", "max_num_seqs", "lengths"),
    [
        ("tied", 16, 1, [1]),
        ("untied", 4, 1, [63, 1000]),  # one after the other
        ("tied", 1, 2, [600, 40]),
        ("untied", 16, 3, [65, 1023, 5]),
        ("tied", 4, 5, [1, 64, 700, 129, 1024]),
        ("untied", 1, 5, [1000, 2, 63]),
        ("tied", 16, 8, MANY[::2]),
        ("untied", 4, 8, MANY[1::2]),
        ("tied", 4, 16, MANY),
        ("untied", 16, 16, MANY),
        ("tied", 16, 7, MANY[3:11]),  # one waits for a row
        ("tied", 1, 16, MANY[:5]),
        ("2048", 16, 1, [900]),
        ("2048", 4, 3, [1, 600, 62]),
    ],
)  # fmt: skip
def test_five_hundred_greedy_tokens(
    shape: str, block_size: int, max_num_seqs: int, lengths: list[int]
) -> None:
    """float32: the eager engine reads the fused one's tokens, and would have drawn them.

    The fused engine runs as it is. Where the eager one would have drawn another token, its two
    best logits are nearer to each other than ten times the error of the logits.
    """
    model, _ = get_models(shape)[WIDE]
    options = {"block_size": block_size, "max_num_seqs": max_num_seqs}
    prompts = draw_prompts(lengths)
    ours, texts = write(model, "fused", prompts, NUM_STEPS, **options)
    exact, same = write(model, "eager", prompts, NUM_STEPS, ours.tokens, **options)
    assert texts == same
    assert ours.num_fused >= NUM_STEPS - 1
    assert all(len(set(text)) > NUM_STEPS // 10 for text in texts)
    logits, expected = torch.cat(ours.logits), torch.cat(exact.logits)
    error = (logits - expected).abs().max().item()
    bound = 1e-5 * max(1.0, expected.std().item())
    best = expected.topk(2).values
    differs = torch.cat(ours.tokens) != torch.cat(exact.tokens)
    assert len(differs) == NUM_STEPS * len(lengths)
    print(f"error {error:.1e} of {bound:.1e}, {differs.sum()} of {len(differs)} exempt")
    assert error <= bound
    assert not (differs & (best[:, 0] - best[:, 1] >= 10 * error)).any()
    assert differs.sum() <= max(1, len(differs) // 1000)


# --- Random schedules -----------------------------------------------------------------


@cache
def get_schedule_models() -> tuple[Qwen3ForCausalLM, Any, Any]:
    """As `schedules.get_models`, with logits on the host."""
    ours, theirs = get_models(spread=1.0)[WIDE]

    def run(token_ids: Tensor) -> Any:
        return SimpleNamespace(logits=theirs(token_ids.to(DEVICE)).logits.cpu())

    return ours, run, load_tokenizer(bundled_model_path())


run_alone: Any = cache(schedules.run_alone.__wrapped__)
"""Eagerly, once in a process; the answers in `schedules` are another model's."""


def check_fused(engine: LLMEngine) -> None:
    assert isinstance(get_runner(engine).graphs, FusedGraphs)
    check_integrity(engine)


@pytest.mark.parametrize("part", range(10))
def test_random_schedules(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 in all, in float32: each request gets what it gets alone, or a near-tie."""
    make_eager = partial(schedules.make_engine, decode="eager")
    monkeypatch.setattr(schedules, "get_models", get_schedule_models)
    monkeypatch.setattr(schedules, "make_engine", make_eager)
    monkeypatch.setattr(schedules, "run_alone", run_alone)
    tally: Counter[str] = Counter()
    for seed in range(10 * part, 10 * part + 10):
        schedule = Schedule(seed, small=True, run_ahead=True)
        schedule.options["decode"] = "fused"
        try:
            tally += schedule.run(check_fused)
        except Exception as error:
            error.add_note(f"in Schedule({seed}, True, True)")
            raise
        gc.collect()
    print(dict(tally))
    assert tally["right"] > 20 and tally["ties"] <= 3


# --- bfloat16 -------------------------------------------------------------------------


def record_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode graphs of `max_num_seqs` sequences only, since all run to the same end."""
    monkeypatch.setattr(cuda_graph, "choose_decode_sizes", lambda most: [most])


@pytest.mark.parametrize("num_seqs", [8, 16])
def test_bfloat16_is_as_near_to_float32_as_the_plain_path(
    num_seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of 256 steps, and no further from it at the end; all read the same tokens.

    A step's error is the root mean square over the vocabulary and the sequences: over that of one
    sequence, chance has too much of a say.
    """
    record_one_size(monkeypatch)
    both = get_models(layers=4, spread=1.0)
    prompts = draw_prompts([1 + 12 * i for i in range(num_seqs)])
    exact, _ = write(both[WIDE][0], "eager", prompts, 256)
    errors = {}
    for decode in ("fused", "eager"):
        tape, _ = write(both[NARROW][0], decode, prompts, 256, exact.tokens)
        pairs = zip(tape.logits, exact.logits, strict=True)
        errors[decode] = rms(torch.stack([ours - it for ours, it in pairs]))
        assert decode == "eager" or tape.num_fused == 255
    ours, plain = errors["fused"][1:], errors["eager"][1:]  # the first reads prompts
    ratios, last = ours / plain, slice(-64, None)
    growth = (ours[last].mean() / plain[last].mean()).item()
    print(
        f"{num_seqs} sequences: error {ours.mean():.2e}, plain {plain.mean():.2e}, "
        f"ratio {ratios.mean():.3f}, at most {ratios.max():.3f}, last quarter {growth:.3f}"
    )
    assert ratios.max() <= 1.2
    assert growth <= 1.2


@cache
def write_stories() -> Tensor:
    """Eight times 250 tokens that the bundled model writes on a CPU; `[8, 250]`."""
    model = load_model(bundled_model_path(), "float32", "cpu", use_tqdm=False)
    engine = LLMEngine(
        model, load_tokenizer(bundled_model_path()), decode="eager",
        kv_cache_memory_bytes=2**26, max_model_len=512,
    )  # fmt: skip
    params = [
        SamplingParams(temperature=1, seed=i, max_tokens=249, ignore_eos=True)
        for i in range(8)
    ]
    begin = [engine.tokenizer.encode("One")[:1]] * 8
    outputs = engine.generate(begin, params, use_tqdm=False)
    return torch.tensor([begin[0] + list(one.outputs[0].token_ids) for one in outputs])


def test_bfloat16_reads_a_text_as_hugging_face_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2,000 tokens, one by one: divergence from float32, and the loss.

    The bundled model itself has another shape than the kernels ask for, so its text is read by a
    random model. What the text is matters little there: divergence and loss are compared with those
    of the same weights in float32. Each loss is a mean of 1,992 numbers, in which errors of
    rounding largely cancel; what remains above one in a thousand would be no rounding.
    """
    record_one_size(monkeypatch)
    both, ids = get_models(layers=4, spread=1.0), write_stories().to(DEVICE)
    assert ids.numel() == 2000 and int(ids.max()) < VOCAB_SIZE
    forced = [*ids.T[1:].contiguous(), ids.new_zeros(8)]
    logits = {"float32": both[WIDE][1](ids).logits}
    for decode in ("fused", "eager"):
        prompts = ids[:, :1].tolist()
        tape, texts = write(both[NARROW][0], decode, prompts, ids.shape[1], forced)
        assert [text[:-1] for text in texts] == ids[:, 1:].tolist()
        assert decode == "eager" or tape.num_fused == ids.shape[1]
        logits[decode] = torch.stack(tape.logits, 1)
    logits["huggingface"] = both[NARROW][1](ids).logits
    losses, divergences = {}, {}
    exact = logits["float32"].double().log_softmax(-1)
    for name, own in logits.items():
        logprobs = own.double().log_softmax(-1)
        divergence = (exact.exp() * (exact - logprobs)).sum(-1).mean()
        loss = -logprobs[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        losses[name], divergences[name] = loss.item(), divergence.item()
    for name in logits:
        print(f"{name}: loss {losses[name]:.6f}, divergence {divergences[name]:.3e}")
    assert divergences["fused"] <= 1.2 * divergences["huggingface"]
    assert divergences["fused"] <= 1.2 * divergences["eager"]
    for name in ("float32", "huggingface", "eager"):
        assert math.isclose(losses["fused"], losses[name], rel_tol=1e-3), name


# --- Repeats --------------------------------------------------------------------------


def equal_to_the_bit(one: Tensor, other: Tensor) -> bool:
    """NaN is what it is, and 0 is not -0."""
    return one.view(torch.uint8).equal(other.view(torch.uint8))


@pytest.mark.parametrize("num_seqs", [1, 3, 8, 16])
def test_a_recorded_step_repeats_to_the_bit(num_seqs: int) -> None:
    """20 replays at five lengths, with kernels that overlap and without: all the same.

    Before each, what the step reads is put back, and what it must write itself is NaN: its logits,
    its scratch memory, and all of the cache that nobody has written.
    """
    model, _ = get_models()[NARROW]
    for length in (1, 63, 257, 1025, 4100):
        step = Step(model, [length + 5 * i for i in range(num_seqs)])
        columns, caches = step.get_columns(), step.copy_caches()
        logits = torch.zeros(num_seqs, VOCAB_SIZE, dtype=NARROW, device=DEVICE)
        token_ids, expected = step.tokens.clone(), []
        for uses_pdl in [False, True] if has_pdl() else [False]:
            fused = FusedDecode(model, step.rows.block_table.shape[1], uses_pdl)
            run = partial(fused.run, columns, step.rows, caches, logits, token_ids)
            replay = Recorder(DEVICE).record(run)
            own = fused.x, fused.qkv, fused.attended, fused.y, *fused.scratch[:3]
            for _ in range(20):
                for tensor in (logits, *own):
                    tensor.fill_(float("nan"))
                token_ids.fill_(-7)
                step.rows.last_token_ids[step.row_index] = step.tokens
                for pair, old in zip(caches, step.kv_caches, strict=True):
                    for one, before in zip(pair, old, strict=True):
                        one.copy_(before)
                replay()
                results = [
                    logits, token_ids, step.rows.last_token_ids, *sum(caches, ()),
                ]  # fmt: skip
                if not expected:
                    expected = [one.clone() for one in results]
                    assert logits.isfinite().all() and (token_ids >= 0).all()
                    assert logits.argmax(-1).equal(token_ids)
                for result, first in zip(results, expected, strict=True):
                    assert equal_to_the_bit(result, first), (length, uses_pdl)


# --- Company --------------------------------------------------------------------------


def choose(step: Step, chosen: Tensor) -> Step:
    """A step of some sequences of another, in that order, over the same rows."""
    few = copy.copy(step)
    few.size = len(chosen)
    few.starts = torch.arange(few.size + 1, device=DEVICE)
    for name in ("row_index", "seq_lens", "slots", "tokens", "input_ids"):
        setattr(few, name, getattr(step, name)[chosen])
    return few


def pad_all_but(step: Step, i: int) -> Step:
    """The same step, in which all sequences but one are padding."""
    alone, others = copy.copy(step), torch.arange(step.size, device=DEVICE) != i
    alone.seq_lens = step.seq_lens.masked_fill(others, 0)
    alone.slots = step.slots.masked_fill(others, -1)
    return alone


def run_fused(step: Step) -> list[Tensor]:
    """Logits, tokens, and what was stored, of each sequence; the step can run again."""
    step.rows.last_token_ids[step.row_index] = step.tokens
    caches = step.copy_caches()
    return [*step.run_fused(caches), *step_slots(step, caches)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert equal_to_the_bit(one, other)


@pytest.mark.parametrize("dtype", [WIDE, NARROW])
@pytest.mark.parametrize("num_seqs", [4, 8, 16])
def test_company_changes_no_bit(num_seqs: int, dtype: torch.dtype) -> None:
    """Neither who is beside a sequence, nor its place in the step, nor how many there are.

    Only a number that rounds up to another power of two changes the order of a sum. So a sequence
    in a step of one is compared by the rule of the course: in float32 its logits are equal but for
    1e-5 standard deviations, and in bfloat16 neither of the two is further from float32 than 1.2
    times the plain path.
    """
    wide, narrow = (get_models()[one][0] for one in (WIDE, NARROW))
    step = Step(
        wide if dtype == WIDE else narrow, [1 + 271 * i for i in range(num_seqs)]
    )
    together = run_fused(step)
    order = torch.randperm(num_seqs).to(DEVICE)
    assert_same(run_fused(choose(step, order)), [one[order] for one in together])
    few = order[: num_seqs // 2 + 1]  # which rounds up to the same power of two
    assert_same(run_fused(choose(step, few)), [one[few] for one in together])
    alone = []
    for i in range(num_seqs):
        padded = run_fused(pad_all_but(step, i))
        assert_same(
            [one[i : i + 1] for one in padded], [one[i : i + 1] for one in together]
        )
        alone.append(run_fused(choose(step, order.new_tensor([i])))[0])
    plain, ours = step.run_plain(step.copy_caches()).float(), torch.cat(alone).float()
    if dtype == WIDE:
        bound = 1e-5 * max(1.0, plain.std().item())
        for one in (ours, together[0]):
            assert (one - plain).abs().max() <= bound
        assert (ours - together[0]).abs().max() <= bound
        return
    step.model = wide
    exact = step.run_plain([(k.float(), v.float()) for k, v in step.copy_caches()])
    errors = [
        (one.float() - exact).square().mean().sqrt().item()
        for one in (ours, together[0], plain)
    ]
    print(
        f"{num_seqs}: alone {errors[0]:.2e}, together {errors[1]:.2e}, plain {errors[2]:.2e}"
    )
    assert max(errors[:2]) <= 1.2 * errors[2]
