"""A first look at two GPUs: sums, a compiled layer, the fused step of a shard, an engine.

    python tools/try_ranks.py OUT

Prints a traceback for each part that fails, and goes on. Takes a minute.
"""

# ruff: noqa: B023
# mypy: ignore-errors

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
START = time.time()
SHAPE = {"hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936,
         "tie_word_embeddings": False, "max_position_embeddings": 4096}  # fmt: skip


def say(*words: Any) -> None:
    print(f"[{time.time() - START:5.1f}]", *words, flush=True)


@contextlib.contextmanager
def part(name: str, rank: int = 0) -> Iterator[None]:
    begin = time.time()
    try:
        yield
        say(f"rank {rank}: {name} took {time.time() - begin:.1f} s")
    except Exception:
        say(f"rank {rank}: {name} FAILED\n{traceback.format_exc()}")


def record(run: Callable[[], Any]) -> Callable[[], None]:
    import torch

    run()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def measure(run: Callable[[], Any], count: int, runs: int = 7) -> list[float]:
    """Microseconds of each of the `count` things that a run does, sorted."""
    import torch

    times = []
    for _ in range(runs + 2):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        times.append(1e3 * first.elapsed_time(last) / count)
    return sorted(times[2:])


def try_sums(group: Any, out: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    symm: Any = torch.ops.symm_mem
    for dtype in (torch.bfloat16, torch.float32):
        for length in (8, 4096, 65536, 262144 + 8):
            torch.manual_seed(group.rank)
            x = torch.randn(length, device=group.device).to(dtype)
            parts = [torch.empty_like(x) for _ in range(group.size)]
            dist.all_gather(parts, x)
            exact = torch.stack(parts).double().sum(0).to(dtype)
            for method in ("one_shot", "two_shot", "nccl"):
                total = group.all_reduce_by(method, x)
                others = [torch.empty_like(x) for _ in range(group.size)]
                dist.all_gather(others, total)
                same = all(one.equal(others[0]) for one in others)
                assert total.equal(exact), (
                    method,
                    dtype,
                    length,
                    (total - exact).abs().max(),
                )
                assert same, (method, dtype, length)
    for size in (8, 16, 64, 256, 512, 1024, 2048, 4096, 8192):
        x = torch.zeros(size * 512, dtype=torch.bfloat16, device=group.device)
        shared, total = group.buffer[: x.nbytes].view(x.dtype), torch.empty_like(x)
        n, row = 20, {}  # type: ignore[var-annotated]
        ways: dict[str, Callable[[], Any]] = {
            "nccl": lambda: dist.all_reduce(x),
            "one_shot": lambda: group.add_up(shared, total),
            "two_shot": lambda: symm.two_shot_all_reduce_(shared, "sum", group.name),
            "group": lambda: group.all_reduce(x),
            "copy": lambda: total.copy_(x),
        }
        for name, way in ways.items():

            def run(way: Any = way) -> None:
                for _ in range(20):
                    way()

            if name in ("nccl", "one_shot"):
                row[name + " called"] = measure(run, n)
            row[name] = measure(record(run), n)
        out[f"{size} kB"] = row
        if group.rank == 0:
            say(
                size,
                "kB",
                {
                    k: [round(v[0], 1), round(statistics.median(v), 1), round(v[-1], 1)]
                    for k, v in row.items()
                },
            )


def try_compiled(group: Any) -> None:
    import torch

    from folo_lib.tensor_parallel import RowParallelLinear

    torch.manual_seed(0)
    linear = RowParallelLinear(256, 512, False, group).to(group.device, torch.bfloat16)

    def run(x: Any, residual: Any) -> Any:
        total = linear(x) + residual
        return total * total.float().pow(2).mean(-1, keepdim=True).rsqrt(), total

    options = {"pattern_matcher": False}
    compiled = torch.compile(run, dynamic=True, options=options)
    with torch.inference_mode():
        for rows in (64, 100, 3):
            torch.manual_seed(1)
            x = torch.randn(rows, 256, device=group.device).bfloat16()
            residual = torch.randn(rows, 512, device=group.device).bfloat16()
            for one, other in zip(compiled(x, residual), run(x, residual), strict=True):
                torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        made = []
        replay = record(lambda: made.append(compiled(x, residual)))
        expected = [one.clone() for one in run(x, residual)]
        for _ in range(3):
            made[-1][0].zero_()
            replay()
            torch.testing.assert_close(made[-1][0], expected[0], rtol=2e-2, atol=2e-2)


def make_whole(layers: int) -> Any:
    import torch
    from test_fused_decode import make_model

    torch.manual_seed(0)
    with torch.device("cuda"):
        return make_model(32, 8, layers, torch.bfloat16, "triton", **SHAPE)


class Alone:
    """Sums of one rank, to compile its kernels without the others."""

    def __init__(self, rank: int) -> None:
        import torch

        self.rank, self.size, self.device = rank, 2, torch.device("cuda", rank)

    def allocate(self, *shape: int, dtype: Any) -> Any:
        import torch

        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def add_up(self, shared: Any, out: Any) -> None:
        out.copy_(shared)


class Decode:
    """A fused step of one sequence after 256 tokens, of a shard or of a whole model."""

    def __init__(
        self, layers: int, group: Any = None, cut: Any = None, **change: Any
    ) -> None:
        import torch
        from test_fused_decode import Step
        from test_fused_shards import cut_caches, make_shard
        from transformers import Qwen3Config

        from folo_lib.fused_decode import FusedDecode
        from folo_lib.fused_shards import ShardedDecode
        from folo_lib.tensor_parallel import ShardedForCausalLM

        if group is None:
            self.model = cut or make_whole(layers)
        elif cut is not None:
            self.model = make_shard(cut, group)
        else:
            config = Qwen3Config(
                num_hidden_layers=layers,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                **SHAPE,
            )
            with torch.device("cuda"):
                self.model = ShardedForCausalLM(config, group, "triton").bfloat16()
        torch.manual_seed(5)
        self.step = Step(cut or self.model, [256])
        caches = self.step.copy_caches()
        if group is not None and cut is not None:
            caches = cut_caches(caches, group.rank, group.size)
        self.caches, rows = caches, self.step.rows
        self.step.input_ids = (
            self.step.tokens.clone()
        )  # a step does not depend on the last
        blocks = rows.block_table.shape[1]
        if group is None:
            self.fused: Any = FusedDecode(self.model, blocks, True)
        else:
            self.fused = ShardedDecode(self.model, blocks, True)
        for name, value in change.items():
            setattr(self.fused, name, value)
        size = len(self.model.model.embed_tokens.weight)
        self.logits = torch.zeros(1, size, dtype=torch.bfloat16, device="cuda")
        self.tokens = torch.zeros(1, dtype=torch.int64, device="cuda")

    def run(self) -> None:
        self.fused.run(
            self.step.get_columns(),
            self.step.rows,
            self.caches,
            self.logits,
            self.tokens,
        )

    def time(self, count: int = 50) -> list[float]:
        replay = record(self.run)

        def several() -> None:
            for _ in range(count):
                replay()

        return [one / 1e3 for one in measure(several, count, 5)]


def warm(kind: int) -> None:
    """Compiles the kernels of a whole step (2), or of a rank, into Triton's cache."""
    with part(f"compiling {kind}", kind):
        import torch

        torch.cuda.set_device(kind % 2)
        with torch.inference_mode():
            Decode(1, None if kind == 2 else Alone(kind)).run()
            torch.cuda.synchronize()


def try_fused(group: Any, out: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    whole = make_whole(4)
    ours = Decode(4, group, whole)
    ours.run()
    torch.cuda.synchronize()
    parts = [torch.empty_like(ours.logits) for _ in range(2)]
    dist.all_gather(parts, ours.logits)
    logits, tokens = torch.cat(parts, -1).float(), ours.tokens.item()
    step = ours.step
    plain = step.run_plain(step.copy_caches()).float()
    exact_caches = [(k.float(), v.float()) for k, v in step.copy_caches()]
    alone = Decode(4, None, whole)
    alone.run()
    step.model = whole.float()
    exact = step.run_plain(exact_caches)
    error = lambda one: (one.float() - exact).square().mean().sqrt().item()  # noqa: E731
    errors = {
        "shards": error(logits),
        "one": error(alone.logits),
        "plain": error(plain),
    }
    say(
        f"rank {group.rank}: std {exact.std().item():.3f}, errors {errors}, token {tokens}",
        f"of argmax {logits.argmax().item()}, alone {alone.tokens.item()}",
    )
    assert tokens == logits.argmax().item()
    replay, first = record(ours.run), ours.logits.clone()
    for _ in range(20):
        replay()
        assert ours.logits.equal(first)
    out["errors"] = errors


def time_fused(group: Any, out: dict[str, Any]) -> None:
    import torch

    shard = Decode(36, group)
    out["two"] = shard.time()
    fused = shard.fused
    fused.pdl_joined = fused.pdl
    out["two, launched early"] = shard.time()
    fused.pdl_joined = fused.pdl | {"launch_pdl": False}
    fused.join = lambda n: fused.x[:n].copy_(fused.out[:n])
    out["two, copies for sums"] = shard.time()
    fused.join = lambda n: None
    out["two, nothing for sums"] = shard.time()
    shard.model = fused.model = None
    torch.cuda.empty_cache()
    if group.rank == 0:
        out["one"] = Decode(36).time()
        times = {k: statistics.median(v) for k, v in out.items() if k != "errors"}
        say("8B, ms a step:", {name: round(time, 3) for name, time in times.items()})


def run_rank(rank: int, store: str, folder: str) -> None:
    import torch

    results: dict[str, Any] = {"sums": {}, "fused": {}}
    with part("connecting", rank):
        from folo_lib.symmetric_memory import SymmetricGroup

        group = SymmetricGroup(rank, 2, store, torch.device("cuda"))
        group.connect()
    with torch.inference_mode():
        with part("sums", rank):
            try_sums(group, results["sums"])
        with part("a compiled layer", rank):
            try_compiled(group)
        while not all(Path(folder, f"warm{i}").exists() for i in range(3)):
            time.sleep(0.1)
        with part("the fused step", rank):
            try_fused(group, results["fused"])
        with part("times of 8B", rank):
            time_fused(group, results["fused"])
    with part("closing", rank):
        group.close()
    Path(folder, f"try_ranks_{rank}.json").write_text(json.dumps(results))


def warm_and_tell(kind: int, folder: str) -> None:
    warm(kind)
    Path(folder, f"warm{kind}").write_text("")


def main() -> None:
    folder = sys.argv[1]
    for command in (
        ["nvidia-smi", "topo", "-m"],
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv"],
    ):
        print(
            subprocess.run(command, capture_output=True, text=True).stdout, flush=True
        )
    context = multiprocessing.get_context("spawn")
    store = os.path.join(tempfile.mkdtemp(), "store")
    ranks = [
        context.Process(target=run_rank, args=(i, store, folder)) for i in range(2)
    ]
    others = [context.Process(target=warm_and_tell, args=(i, folder)) for i in range(3)]
    for one in others + ranks:
        one.start()
    for one in others + ranks:
        one.join()
    import torch

    import folo_lib

    say("torch", torch.__version__, "nccl", torch.cuda.nccl.version())
    with part("an engine"):
        texts = []
        for size in (1, 2):
            begin = time.time()
            engine = folo_lib.LLMEngine(
                folo_lib.bundled_model_path(), dtype="float32", device="cuda",
                decode="eager", max_model_len=256, kv_cache_memory_bytes=2**26,
                tensor_parallel_size=size,
            )  # fmt: skip
            params = folo_lib.SamplingParams(temperature=0, max_tokens=24)
            prompts = ["She had a red kite. One day Mira took the", "Once", "The dog"]
            outputs = engine.generate(prompts, params, use_tqdm=False)
            texts.append([one.outputs[0].text for one in outputs])
            say(size, f"{time.time() - begin:.1f} s", texts[-1][0])
        assert texts[0] == texts[1]
        say("the engines agree")


if __name__ == "__main__":
    main()
