"""What the sections of the benchmark share: sizes, and systems started when needed."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from folo_lib.benchmark import (
    MAX_SPREAD,
    MIN_RUNS,
    FoloLib,
    HuggingFace,
    Result,
    System,
    check_reference,
    check_tokens,
    describe_ratio,
    load_exact,
    load_huggingface,
    make_prompt,
    make_reference,
    measure,
)
from folo_lib.benchmark_systems import make_rungs, start_peers
from folo_lib.benchmark_workloads import ThroughputSizes
from folo_lib.checkpoint import load_model, read_config
from folo_lib.qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen3Config


@dataclass(frozen=True)
class BatchSizes:
    """How much each part of the section `batch` runs.

    Attributes:
        together: requests that fit into one batch.
        many: requests of which `together` run at a time.
        shortest, longest: tokens of a prompt, and of an answer.
        before: requests that put the blocks in disorder, before one runs alone.
        conversations, system_tokens: that share a system prompt, and its length.
        question_tokens: the longest that follows it; the shortest has `shortest`.
        max_tokens, num_tokens: what requests ask for, and about what they take.
        num_steps: of which a share is one value.
        contexts: after which the plan of a step is weighed.
    """

    together: int = 64
    many: int = 512
    shortest: int = 16
    longest: int = 128
    before: int = 200
    conversations: int = 32
    system_tokens: int = 1024
    question_tokens: int = 32
    max_tokens: int = 2048
    num_tokens: int = 100
    num_steps: int = 10
    contexts: Sequence[int] = (10, 4000)


@dataclass(frozen=True)
class TimelineSizes:
    """How much the section `timeline` runs.

    Attributes:
        batches: numbers of requests that write at the same time.
        traced: those of them of which a trace is kept.
        prompt_tokens: of each request.
        num_steps, num_traced: steps that are clocked, and steps of a trace.
    """

    batches: Sequence[int] = (1, 64, 256)
    traced: Sequence[int] = (1, 64)
    prompt_tokens: int = 128
    num_steps: int = 20
    num_traced: int = 3


@dataclass(frozen=True)
class LatencySizes:
    """How much the section `latency` runs.

    Attributes:
        contexts: after which the time per token of one request is measured.
        num_tokens: of the answer there.
        running, prompt_tokens: requests that write when a long prompt arrives, and the
            length of their own prompts.
        long_prompt: its length.
        num_steps: in which the longest gap is looked for before that.
        num_runs: of the whole of it.
    """

    contexts: Sequence[int] = (128, 8192)
    num_tokens: int = 32
    running: int = 64
    prompt_tokens: int = 128
    long_prompt: int = 8192
    num_steps: int = 50
    num_runs: int = 5


@dataclass(frozen=True)
class Sizes:
    """How long the prompts and answers of each section are.

    Attributes:
        prompt_tokens, output_tokens: of one prompt, end to end.
        prompts: lengths of which the time to the first token is measured.
        contexts: lengths after which the time per token is measured.
        context_tokens, ladder_tokens: of the answers there, and of the rungs.
        bandwidth_bytes: read at a time, to find out how fast that goes.
        batch: of many requests at once; not cut, as it says what it needs.
        throughput, timeline, latency: of the sections of those names; `waterfall` runs the
            workload of the first, and `tpot` a few of its equal requests.
        starts: fresh processes for each of the fast rungs of the section `waterfall`, and of
            the section `tpot`.
        together: how many of them get ready side by side; five with the cache that the mixed
            requests need fill an H200.
    """

    prompt_tokens: int = 128
    output_tokens: int = 256
    prompts: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    contexts: Sequence[int] = (128, 512, 2048, 8192)
    context_tokens: int = 32
    ladder_tokens: int = 64
    bandwidth_bytes: int = 2**32
    batch: BatchSizes = BatchSizes()
    throughput: ThroughputSizes = field(default_factory=ThroughputSizes)
    timeline: TimelineSizes = TimelineSizes()
    latency: LatencySizes = LatencySizes()
    starts: int = 5
    together: int = 5

    def cut(self, max_model_len: int) -> Sizes:
        """Without what a model cannot hold."""
        longest = max_model_len - self.context_tokens
        many = self.throughput
        most = max_model_len - many.context_tokens
        few = [length for length in many.contexts if length <= most]
        return replace(
            self,
            throughput=replace(many, contexts=few),
            prompts=[length for length in self.prompts if length <= longest],
            contexts=[length for length in self.contexts if length <= longest],
        )

    @property
    def max_model_len(self) -> int:
        """What an engine must hold for all of it."""
        longest = max([*self.prompts, *self.contexts], default=0)
        ours = longest + self.context_tokens
        return max(ours, self.prompt_tokens + self.output_tokens)


QUICK = Sizes(
    output_tokens=64,
    prompts=(32, 128, 512, 2048),
    contexts=(128, 512, 2048),
    ladder_tokens=32,
    bandwidth_bytes=2**27,
    batch=BatchSizes(
        together=16, many=32, before=20, conversations=8, system_tokens=256, num_steps=4
    ),
    throughput=ThroughputSizes(
        num_requests=16,
        shortest=10,
        longest=60,
        equal=(4, 8),
        prompt_tokens=32,
        output_tokens=32,
        num_runs=2,
        num_theirs=8,
        contexts=(128, 512),
        context_tokens=16,
    ),
    timeline=TimelineSizes(
        batches=(1, 4, 8), traced=(1, 4), prompt_tokens=16, num_steps=5, num_traced=2
    ),
    latency=LatencySizes(
        contexts=(128, 512),
        running=4,
        prompt_tokens=16,
        long_prompt=3000,
        num_steps=5,
        num_runs=2,
    ),
    starts=2,
    together=2,
)


@dataclass
class Bench:
    """What the sections share. Systems are started when first needed.

    Attributes:
        waterfall_rungs: that the section `waterfall` runs; none: all.
        batch_parts: the same for the section `batch`.
    """

    folder: Path
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    num_runs: int = MIN_RUNS
    max_spread: float = MAX_SPREAD
    waterfall_rungs: Sequence[str] = ()
    batch_parts: Sequence[str] = ()

    @cached_property
    def config(self) -> Qwen2Config | Qwen3Config:
        return read_config(self.folder)

    @cached_property
    def ours(self) -> FoloLib:
        length = self.sizes.max_model_len
        return FoloLib(self.folder, self.device, self.dtype, length)

    @cached_property
    def model(self) -> Qwen3ForCausalLM:
        """Ours without an engine, for its logits."""
        return load_model(self.folder, self.dtype, self.device, use_tqdm=False)

    @cached_property
    def theirs(self) -> HuggingFace:
        return HuggingFace(load_huggingface(self.folder, self.device, self.dtype))

    @cached_property
    def exact(self) -> Qwen3ForCausalLM:
        return load_exact(self.folder, self.device, self.dtype)

    @cached_property
    def peers(self) -> list[System]:
        on_gpu = self.device.type == "cuda"
        return start_peers(self.folder, self.sizes.max_model_len) if on_gpu else []

    @cached_property
    def rungs(self) -> tuple[list[System], dict[str, str]]:
        sizes = self.sizes
        length = sizes.prompt_tokens + max(sizes.ladder_tokens, sizes.output_tokens)
        return make_rungs(self.folder, self.device, self.dtype, length)

    def free_memory(self) -> None:
        """Gives back what nobody holds: a new cache takes what the device says is free."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self, systems: Sequence[System], num_tokens: int) -> Result:
        """What the tokens of the systems were compared with, and how it went."""
        prompt = make_prompt(self.config.vocab_size, self.sizes.prompt_tokens)
        models = self.model, self.exact
        reference = make_reference(self.theirs, *models, prompt, num_tokens)
        check_reference(reference, self.dtype)
        lost = {system.name: check_tokens(system, reference) for system in systems}
        result: Result = {"steps": num_tokens, "decided": reference.num_decided}
        result |= {"error": reference.error / reference.std, "near_ties_lost": lost}
        print(f"tokens agree where decided: {json.dumps(result)}", flush=True)
        return result

    def measure(
        self,
        systems: Sequence[System],
        prompt_len: int,
        num_tokens: int,
        times: Sequence[str],
    ) -> list[Result]:
        """See the function `measure`."""
        options = self.config.vocab_size, self.num_runs, self.max_spread
        return measure(systems, prompt_len, num_tokens, *options, times)

    def compare(
        self,
        others: Sequence[System],
        prompt_len: int,
        num_tokens: int,
        times: Sequence[str],
    ) -> list[Result]:
        """Ours and others in turns; prints their ratios too, which is what counts."""
        rows = self.measure([self.ours, *others], prompt_len, num_tokens, times)
        for row in rows[1:]:
            for name in times:
                print(describe_ratio(row, rows[0], name), flush=True)
        return rows
