"""One GPU and two: the benchmark's section `tensor_parallel`.

Two processes, a rank each, measure in the same run: what one sum costs, by each of the ways that
there are; and the time of a decode step of Qwen3's shapes, on one GPU (that of rank 0) and on
both. Weights are random and made on the device. Steps are launched by the runner that an engine
would have, and each is read while the next one runs. That tokens are right is for the tests: here
the weights of one GPU and of two are different ones.

Getting ready takes longer than measuring. So other processes compile everything first, side by
side, on models of one layer, and leave it in the caches of Triton and PyTorch.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from folo_lib.benchmark import BenchmarkError, Result
from folo_lib.config import EngineConfig
from folo_lib.cuda_graph import GraphRunner, GraphSize
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.runner import NewRequest, ScheduledRequest, StepPlan
from folo_lib.sampling_params import SamplingParams
from folo_lib.symmetric_memory import METHODS, ONE_KERNEL_BYTES, SymmetricGroup
from folo_lib.tensor_parallel import ShardedForCausalLM

if TYPE_CHECKING:
    from folo_lib.benchmark_bench import Bench

QWEN3: Mapping[str, Mapping[str, int]] = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
}
SIZE = 2  # ranks
CONTEXT = 128  # tokens of a sequence before the first step
BLOCK_SIZE = 16
MAX_SECONDS = 160  # that the whole may take


@dataclass(frozen=True)
class Case:
    """A decode step that is measured.

    Attributes:
        shape: a key of `QWEN3`.
        requests: sequences of the step.
        devices: 1, or `SIZE`.
    """

    shape: str
    requests: int
    devices: int


CASES = [
    Case("8B", 1, 2),
    Case("8B", 1, 1),
    Case("8B", 64, 2),
    Case("8B", 64, 1),
    Case("32B", 1, 2),
    Case("0.6B", 1, 2),
    Case("0.6B", 1, 1),
]


@dataclass(frozen=True)
class ParallelSizes:
    """How much is run.

    Attributes:
        kilobytes: of the sums.
        num_sums: in a graph.
        num_steps: of a run.
        num_runs: of each thing, after one that warms up.
    """

    kilobytes: Sequence[int] = (8, 16, 64, 256, 512, 1024, 2048, 4096, 8192)
    num_sums: int = 20
    num_steps: int = 48
    num_runs: int = 7


class MutedGroup(SymmetricGroup):
    """A `SymmetricGroup` that can leave its sums out, to show what they take.

    Attributes:
        is_muted: whether a sum is a copy of this rank's own part.
    """

    is_muted = False

    def allocate(self, *shape: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
        """See `SymmetricGroup`."""
        if self.is_muted:
            return torch.full(shape, fill, dtype=dtype, device=self.device)
        return super().allocate(*shape, dtype=dtype, fill=fill)

    def find_addresses(self, shared: Tensor) -> list[int]:
        """See `SymmetricGroup`; muted, a rank sends to itself alone."""
        return [shared.data_ptr()] if self.is_muted else super().find_addresses(shared)

    def all_reduce_by(self, method: str, x: Tensor) -> Tensor:
        """See `SymmetricGroup`."""
        return x.clone() if self.is_muted else super().all_reduce_by(method, x)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `SymmetricGroup`."""
        parts = [x] * self.size
        return torch.cat(parts, -1) if self.is_muted else super().all_gather(x)


def describe(seconds: Sequence[float], scale: float, unit: str) -> Result:
    """The middle one, how far they lie apart, and all of them."""
    median = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / median
    return {unit: scale * median, "spread": spread, "seconds": list(seconds)}


def time_events(run: Callable[[], object], num_runs: int) -> list[float]:
    """Seconds of each run on the device's clock, after one that warms up."""
    seconds = []
    for _ in range(num_runs + 1):
        cuda: Any = torch.cuda  # which has no types here
        events = [cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        seconds.append(1e-3 * events[0].elapsed_time(events[1]))
    return seconds[1:]


def measure_sums(group: SymmetricGroup, sizes: ParallelSizes) -> list[Result]:
    """One sum in bfloat16, called and in a graph, by each of the ways.

    `group` is what an engine uses: the choice by size, and the copies around the kernel.
    """
    rows: list[Result] = []
    for kilobytes in sizes.kilobytes:
        x = torch.zeros(kilobytes * 512, dtype=torch.bfloat16, device=group.device)
        shared, total = group.buffer[: x.nbytes].view(x.dtype), torch.empty_like(x)
        ways: dict[str, Callable[[], object]] = {
            "one_kernel": lambda a=x: group.all_reduce_by("one_kernel", a),  # type: ignore[misc]
            "one_shot": lambda a=shared, b=total: (
                torch.ops.symm_mem.one_shot_all_reduce_out(  # type: ignore[misc]
                    a, "sum", group.name, b
                )
            ),
            "two_shot": lambda a=shared: torch.ops.symm_mem.two_shot_all_reduce_(  # type: ignore[misc]
                a, "sum", group.name
            ),
            "nccl": lambda a=x: dist.all_reduce(a),  # type: ignore[misc]
            "group": lambda a=x: group.all_reduce(a),  # type: ignore[misc]
        }
        if x.nbytes > ONE_KERNEL_BYTES:
            del ways["one_kernel"]
        for name, way in ways.items():

            def several(way: Callable[[], object] = way) -> None:
                for _ in range(sizes.num_sums):
                    way()

            several()
            torch.cuda.synchronize()
            cuda: Any = torch.cuda
            graph = cuda.CUDAGraph()
            with cuda.graph(graph, stream=cuda.Stream()):
                several()
            for place, run in (("called", several), ("graph", graph.replay)):
                seconds = time_events(run, sizes.num_runs)
                seconds = [one / sizes.num_sums for one in seconds]
                row = {"bytes": x.nbytes, "method": name, "place": place}
                rows.append(row | describe(seconds, 1e6, "us"))
    return rows


def make_model(
    case: Case, group: SymmetricGroup | None, num_layers: int | None
) -> Qwen3ForCausalLM:
    """A model or a shard with random weights, on this rank's GPU."""
    from transformers import Qwen3Config

    shape: dict[str, Any] = dict(QWEN3[case.shape])
    if num_layers is not None:
        shape["num_hidden_layers"] = num_layers
    config = Qwen3Config(
        **shape,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=4096,
        tie_word_embeddings=case.shape == "0.6B",
    )
    with torch.device("meta"):
        if group is None:
            model = Qwen3ForCausalLM(config, "triton")
        else:
            model = ShardedForCausalLM(config, group, "triton")
    model.to(torch.bfloat16).to_empty(device=torch.device("cuda"))
    model.model.rotary_emb.reset_parameters()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.detach().fill_(1)
        else:
            weight.detach().normal_(std=config.initializer_range)
    return model.eval().requires_grad_(False)


def make_runner(model: Qwen3ForCausalLM, case: Case, num_steps: int) -> GraphRunner:
    """The runner that an engine has, with the one graph that is needed here."""
    config = EngineConfig(
        max_num_seqs=case.requests,
        block_size=BLOCK_SIZE,
        tensor_parallel_size=case.devices,
    )
    runner: Any = config.get_model_runner(torch.device("cuda"))(model, config)
    runner.records = False
    length = CONTEXT + num_steps + BLOCK_SIZE
    runner.initialize_kv_caches(case.requests * -(-length // BLOCK_SIZE), length)
    for cache in [one for pair in runner.kv_caches for one in pair]:
        cache.zero_()
    record(runner, case)
    made: GraphRunner = runner
    return made


def record(runner: Any, case: Case) -> None:
    """Records the step, once more if there is one already."""
    runner.graphs = runner.graphs_class(runner, runner.draw_rows)
    runner.graphs.sizes = [GraphSize(case.requests, case.requests, True)]
    runner.graphs.record()


def start_requests(
    runner: GraphRunner, case: Case, params: SamplingParams | None = None
) -> StepPlan:
    """Requests in the middle of their answers; returns the plan of all steps that follow.

    They draw greedily, unless `params` are given.
    """
    blocks = runner.kv_caches[0][0].shape[0] // case.requests
    params = params or SamplingParams(temperature=0)
    names = [str(i) for i in range(case.requests)]
    new = [
        NewRequest(
            request_id=name,
            token_ids=[1] * CONTEXT,
            num_prompt_tokens=CONTEXT,
            num_computed_tokens=CONTEXT - 1,
            params=params,
        )
        for name in names
    ]
    scheduled = [
        ScheduledRequest(name, 1, list(range(i * blocks, (i + 1) * blocks)))
        for i, name in enumerate(names)
    ]
    runner.rows.reset()
    runner.launch(StepPlan(scheduled, new)).read()
    return StepPlan([ScheduledRequest(name, 1) for name in names])


def time_steps(
    runner: GraphRunner, case: Case, sizes: ParallelSizes, meet: Callable[[], None]
) -> list[float]:
    """Seconds of a step, in each run; what one draws is read while the next one runs."""
    seconds = []
    for _ in range(sizes.num_runs + 1):
        plan = start_requests(runner, case)
        torch.cuda.synchronize()
        meet()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        before = runner.launch(plan)
        for _ in range(sizes.num_steps - 1):
            step = runner.launch(plan)
            before.read()
            before = step
        before.read()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / sizes.num_steps)
    return seconds[1:]


def run_case(
    case: Case,
    group: MutedGroup,
    sizes: ParallelSizes,
    meet: Callable[[], None],
    num_layers: int | None = None,
) -> list[Result]:
    """A step of that case; on two devices in several variants."""
    model = make_model(case, group if case.devices > 1 else None, num_layers)
    runner = make_runner(model, case, sizes.num_steps)
    rows: list[Result] = []
    for variant in list_variants(case):
        group.is_muted = group.is_muted or not variant["has_sums"]
        if rows:
            record(runner, case)
        try:
            alone = group.is_muted or case.devices == 1
            seconds = time_steps(runner, case, sizes, (lambda: None) if alone else meet)
        finally:
            group.is_muted = not dist.is_initialized()
        row: Result = asdict(case) | variant | {"runner": type(runner).__name__}
        row |= {"graphs": type(runner.graphs).__name__}
        rows.append(row | describe(seconds, 1e3, "ms"))
    return rows


def list_variants(case: Case) -> list[Result]:
    """With sums on two devices; and with each rank's own part in place of them."""
    return [{"has_sums": True}] * (case.devices > 1) + [{"has_sums": False}]


def try_case(case: Case, group: MutedGroup, sizes: ParallelSizes) -> list[Result]:
    """Rows of a case, or the reason why there are none; what fails, fails on all ranks."""
    try:
        return run_case(
            case, group, sizes, lambda: dist.barrier(device_ids=[group.rank])
        )
    except Exception as error:
        traceback.print_exc()
        return [
            asdict(case) | {"left_out": f"{type(error).__name__}: {str(error)[:200]}"}
        ]


def free_memory() -> None:
    """Gives back what the last case had."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


def warm_up(rank: int, case: Case, store: str) -> None:
    """Compiles what a rank needs for a case, without the other rank."""
    try:
        group = MutedGroup(rank, SIZE, store, torch.device("cuda"))
        group.is_muted = True
        small = ParallelSizes(num_steps=2, num_runs=1)
        with torch.inference_mode():
            run_case(case, group, small, lambda: None, num_layers=2)
    except Exception:
        traceback.print_exc()


def run_rank(
    rank: int,
    store: str,
    sizes: ParallelSizes,
    cases: Sequence[Case],
    begin: Any,
    out: Any,
) -> None:
    """A rank: waits until all is compiled, measures, and sends rows as they come."""
    group = MutedGroup(rank, SIZE, store, torch.device("cuda"))
    group.connect()
    begin.wait()
    with torch.inference_mode():
        out.put((rank, "sums", measure_sums(group, sizes)))
        for case in cases:
            dist.barrier(device_ids=[rank])
            if rank < case.devices:
                rows = run_case(
                    case, group, sizes, lambda: dist.barrier(device_ids=[rank])
                )
                out.put((rank, "steps", rows))
            free_memory()
    out.put((rank, "end", []))
    group.close()


def describe_link() -> Result:
    """How the GPUs are connected, as `nvidia-smi` says it."""
    if shutil.which("nvidia-smi") is None:
        return {"link": None}
    command = ["nvidia-smi", "topo", "-m"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    words = [line.split() for line in lines if "GPU1" in line]
    own = [row for row in words if row and row[0].endswith("GPU1")]
    link = next(
        (word for row in own for word in row if word != "X" and "GPU" not in word), ""
    )
    cuda: Any = torch.cuda
    return {"link": link, "nccl": ".".join(map(str, cuda.nccl.version()))}


def collect(
    ranks: Sequence[Any], out: Any, start: float, found: dict[str, list[Result]]
) -> None:
    """Adds what rank 0 sends to `found`, until both have ended or something is wrong."""
    ended: set[int] = set()
    while len(ended) < SIZE:
        late = time.perf_counter() - start > MAX_SECONDS
        if out.empty() and (late or any(one.exitcode for one in ranks)):
            reason = "did not end in time" if late else "failed, see above"
            print(f"left out: the rest, since a rank {reason}", flush=True)
            return
        if out.empty():
            time.sleep(0.05)
            continue
        rank, name, rows = out.get()
        if name == "end":
            ended.add(rank)
        elif rank == 0:
            found[name] += rows
            for row in rows:
                shown = {k: v for k, v in row.items() if k != "seconds"}
                print(json.dumps(shown), flush=True)


def measure_ranks(
    sizes: ParallelSizes, cases: Sequence[Case]
) -> dict[str, list[Result]]:
    """Runs warm-ups and ranks, each in a process of its own; rank 0's rows.

    If a rank fails, what came before that is kept.

    Raises:
        BenchmarkError: if nothing was measured at all.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    context = multiprocessing.get_context("spawn")
    begin, out = context.Event(), context.Queue()
    found: dict[str, list[Result]] = {"sums": [], "steps": []}
    with tempfile.TemporaryDirectory() as scratch:
        store, start = str(Path(scratch) / "store"), time.perf_counter()
        args = sizes, cases, begin, out
        ranks = [
            context.Process(target=run_rank, args=(rank, store, *args))
            for rank in range(SIZE)
        ]
        warming = [
            context.Process(target=warm_up, args=(rank, case, store))
            for case in cases
            for rank in range(case.devices)
        ]
        try:
            for process in warming + ranks:
                process.start()
            for process in warming:
                process.join()
            print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
            begin.set()
            collect(ranks, out, start, found)
        finally:
            for process in warming + ranks:
                process.kill()
    if not found["steps"]:
        raise BenchmarkError("no step was measured; what the ranks say is above.")
    return found


def find_row(rows: Sequence[Result], case: Case, has_sums: bool) -> Result | None:
    """The row of a case."""
    wanted: Result = asdict(case) | {"has_sums": has_sums}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def compare(rows: Sequence[Result], cases: Sequence[Case]) -> list[Result]:
    """Of each step on two devices: its time in that on one, and the share of its sums."""
    ratios = []
    for case in cases:
        row = find_row(rows, case, has_sums=True)
        if row is None:
            continue
        ratio: Result = {"shape": case.shape, "requests": case.requests}
        one = find_row(rows, Case(case.shape, case.requests, 1), has_sums=False)
        muted = find_row(rows, case, has_sums=False)
        if one is not None:
            ratio["time"] = row["ms"] / one["ms"]
            ratio["speed"] = one["ms"] / row["ms"]
        if muted is not None:
            ratio["sums_ms"] = row["ms"] - muted["ms"]
            ratio["sums_share"] = ratio["sums_ms"] / row["ms"]
        print(json.dumps(ratio), flush=True)
        ratios.append(ratio)
    return ratios


def run_tensor_parallel(bench: Bench) -> Result:
    """The cost of a sum, and steps of Qwen3's shapes on one GPU and on two.

    On two H200s it takes about two minutes. With fewer GPUs than two it is left out.
    """
    if bench.device.type != "cuda" or torch.cuda.device_count() < SIZE:
        reason = f"it needs {SIZE} GPUs of one host"
        print(f"left out: {reason}", flush=True)
        return {"left_out": reason}
    sizes = ParallelSizes()
    found = measure_ranks(sizes, CASES)
    result: Result = {"devices": SIZE, **describe_link(), "methods": list(METHODS)}
    result |= {"context": CONTEXT, "sizes": asdict(sizes)}
    return result | found | {"ratios": compare(found["steps"], CASES)}
