"""Several GPUs: engines on two beside one, sums, and the fused step of a shard.

What CPUs can show is in `test_tensor_parallel.py` and `test_fused_shards.py`. Those that compile
many kernels or layers are marked `slow`.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from folo_lib import LLMEngine, SamplingParams, bundled_model_path

HAS_GPUS = torch.cuda.is_available() and torch.cuda.device_count() >= 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPUS, reason="needs two CUDA devices"),
]

VOCAB = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose halves can be fused, in float32."""
    from folo_lib.benchmark_systems import write_random_checkpoint

    path = tmp_path_factory.mktemp("checkpoint")
    shape = {
        "vocab_size": VOCAB, "hidden_size": 1024, "intermediate_size": 2048,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "dtype": "float32",
    }  # fmt: skip
    write_random_checkpoint(path, shape, torch.device("cpu"))
    return path


def start(folder: Path, size: int, decode: str, **options: Any) -> LLMEngine:
    options = {
        "device": "cuda", "dtype": "float32", "max_model_len": 512, "max_num_seqs": 4,
        "kv_cache_memory_bytes": 2**27, "use_tqdm": False, **options,
    }  # fmt: skip
    return LLMEngine(folder, decode=decode, tensor_parallel_size=size, **options)


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No engine of a test is left for the next one, also if the test has failed."""
    yield
    from folo_lib.symmetric_memory import leave

    gc.collect()
    leave(torch.device("cuda", 0))
    torch.cuda.empty_cache()


def make_prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [rng.choices(range(VOCAB), k=rng.randrange(1, 90)) for _ in range(20)]


def write(engine: LLMEngine, prompts: Any, params: Any) -> list[list[int]]:
    outputs = engine.generate(prompts, params, use_tqdm=False)
    assert not any(one.error for one in outputs)
    return [one.outputs[0].token_ids for one in outputs]


def run_schedule(
    engine: LLMEngine, seed: int, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Requests that come and go in random steps, each beside itself alone."""
    rng = random.Random(seed)
    waiting = rng.sample(range(len(prompts)), 8)
    aborted, running = set(), {}
    while waiting or engine.has_unfinished_requests():
        if waiting and rng.random() < 0.5:
            i = waiting.pop()
            length = rng.randrange(1, len(expected[i]) + 1)
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            running[engine.add_request(prompts[i], params)] = i, length
        if running and rng.random() < 0.05:
            aborted.add(rng.choice(list(running)))
            engine.abort_request(list(aborted)[-1])
        for output in engine.step():
            if output.finished and output.request_id not in aborted:
                i, length = running.pop(output.request_id)
                assert output.outputs[0].token_ids == expected[i][:length]


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = [
    SamplingParams(temperature=0.9, seed=1, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=2, top_k=20, max_tokens=16, ignore_eos=True),
    SamplingParams(
        temperature=0.9, seed=3, top_p=0.8, repetition_penalty=1.3, max_tokens=16,
        ignore_eos=True,
    ),
    SamplingParams(temperature=0, presence_penalty=0.5, max_tokens=16, ignore_eos=True),
]  # fmt: skip


def check_engine(folder: Path, decode: str, **options: Any) -> LLMEngine:
    """20 prompts, draws of all kinds and 10 schedules, as one GPU writes them eagerly."""
    prompts = make_prompts()
    one = start(folder, 1, "eager")
    expected, drawn = write(one, prompts, GREEDY), write(one, prompts[:4], DRAWN)
    del one
    two = start(folder, 2, decode, **options)
    assert write(two, prompts, GREEDY) == expected
    assert write(two, prompts[:4], DRAWN) == drawn
    for seed in range(10):
        run_schedule(two, seed, prompts, expected)
    return two


def test_engines_on_two_gpus_and_on_one_agree(folder: Path) -> None:
    """With graphs of steps up to 64 tokens; longer ones run eagerly."""
    check_engine(folder, "graph_plain", max_num_batched_tokens=64)


@pytest.mark.slow
def test_fused_engines_on_two_gpus_and_eager_ones_on_one_agree(folder: Path) -> None:
    """With one sequence at a time, as each further size of a step is compiled anew."""
    from folo_lib.fused_shards import ShardedGraphs

    engine = check_engine(folder, "fused", max_num_seqs=1, max_num_batched_tokens=64)
    assert type(engine.executor.worker.runner.graphs) is ShardedGraphs  # type: ignore[attr-defined]


@pytest.mark.slow
def test_compiled_layers_on_two_gpus(folder: Path) -> None:
    prompts = make_prompts()[:6]
    expected = write(start(folder, 1, "eager"), prompts, GREEDY)
    gc.collect()
    two = start(folder, 2, "graph", max_num_seqs=2, max_num_batched_tokens=64)
    assert write(two, prompts, GREEDY) == expected


def test_bfloat16_scores_as_near_as_one_gpu(folder: Path) -> None:
    """Log-probabilities of given texts: their error against float32, by root mean square."""
    prompts = [one for one in make_prompts() if len(one) > 30][:6]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def score(size: int, dtype: str) -> torch.Tensor:
        engine = start(folder, size, "eager", dtype=dtype, enable_prefix_caching=False)
        scores = []
        for output in engine.generate(prompts, params, use_tqdm=False):
            for place in output.prompt_logprobs or []:
                scores += (
                    [] if place is None else [one.logprob for one in place.values()]
                )
        return torch.tensor(scores)

    exact, one, two = (
        score(*case) for case in [(1, "float32"), (1, "bfloat16"), (2, "bfloat16")]
    )
    assert len(exact) > 200
    errors = [(scores - exact).square().mean().sqrt().item() for scores in (two, one)]
    print("two and one:", errors)
    assert errors[0] <= 1.2 * errors[1]


# --- Ranks of their own, to look at what no engine shows -------------------------------


def run_rank(rank: int, store: str, work: Callable[[Any], None], answers: Any) -> None:
    from folo_lib.symmetric_memory import SymmetricGroup

    try:
        group = SymmetricGroup(rank, 2, store, torch.device("cuda"))
        group.connect()
        with torch.inference_mode():
            work(group)
        answers.put(None)
        dist.barrier(device_ids=[rank])
        group.close()
    except BaseException:
        answers.put(traceback.format_exc())


def run_ranks(work: Callable[[Any], None], path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    arguments = [(rank, str(path / "store"), work, answers) for rank in range(2)]
    ranks = [context.Process(target=run_rank, args=one) for one in arguments]
    for one in ranks:
        one.start()
    try:
        for _ in ranks:
            error = answers.get(timeout=90)
            assert error is None, error
    finally:
        for one in ranks:
            one.join(10)
            one.kill()


def gather(x: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def add_and_repeat(group: Any) -> None:
    """Each way is right, the same on all ranks, and keeps its order in a graph."""
    from folo_lib.symmetric_memory import METHODS, ONE_KERNEL_BYTES

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in ((3, 8), (1, 4096), (100, 4104), (300, 4096)):
            torch.manual_seed(group.rank)
            x = torch.randn(shape, device=group.device).to(dtype)
            exact = torch.stack(gather(x)).double().sum(0).to(dtype)
            methods = METHODS[x.nbytes > ONE_KERNEL_BYTES :]
            for method in methods if dtype != torch.float16 else [group.choose(x)]:
                total = group.all_reduce_by(method, x)
                assert total.equal(exact), (method, dtype, shape)
                assert all(one.equal(total) for one in gather(total))
    # Sums that follow one another in one buffer: each needs what the last one gave.
    x = torch.zeros(2048, device=group.device)
    start = torch.full_like(x, float(group.rank + 1))

    def run() -> None:
        x.copy_(start)
        for _ in range(50):
            x.copy_(group.all_reduce(x) / 2 + group.rank)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        run()
    a, b = 1.0, 2.0
    for _ in range(50):
        total = (a + b) / 2
        a, b = total, total + 1
    for _ in range(100):
        x.zero_()
        graph.replay()
        assert x.eq(b if group.rank else a).all()


def test_sums_are_right_and_keep_their_order(tmp_path: Path) -> None:
    run_ranks(add_and_repeat, tmp_path)


def decode_fused(group: Any) -> None:
    """bfloat16: as near to float32 as the plain path, and the same in every replay."""
    sys.path.insert(0, str(Path(__file__).parent))
    from test_fused_decode import Step, make_model
    from test_fused_shards import cut_caches, make_shard

    from folo_lib.fused_shards import ShardedDecode

    torch.manual_seed(0)
    with torch.device("cuda"):
        whole = make_model(
            16, 4, 4, torch.bfloat16, "triton", intermediate_size=2048,
            vocab_size=VOCAB, tie_word_embeddings=False,
        )  # fmt: skip
        wide = make_model(
            16, 4, 4, torch.float32, "triton", intermediate_size=2048,
            vocab_size=VOCAB, tie_word_embeddings=False,
        )  # fmt: skip
    wide.load_state_dict(whole.state_dict())
    shard = make_shard(whole, group, "triton")
    errors = {"ours": 0.0, "plain": 0.0}
    fused = None
    for length in (1, 300, 1025):
        torch.manual_seed(length)
        step = Step(whole, [length])
        step.input_ids = step.tokens.clone()
        fused = ShardedDecode(shard, step.rows.block_table.shape[1], True)
        caches = cut_caches(step.copy_caches(), group.rank, 2)
        logits = torch.zeros(1, VOCAB // 2, dtype=torch.bfloat16, device="cuda")
        token_ids = torch.zeros(1, dtype=torch.int64, device="cuda")
        arguments = step.get_columns(), step.rows, caches, logits, token_ids
        fused.run(*arguments)
        ours = torch.cat(gather(logits), -1).float()
        assert token_ids.tolist() == ours.argmax(-1).tolist()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            fused.run(*arguments)
        first = logits.clone()
        for _ in range(20):
            logits.zero_()
            graph.replay()
            assert logits.equal(first)
        plain = step.run_plain(step.copy_caches()).float()
        exact_caches = [(k.float(), v.float()) for k, v in step.copy_caches()]
        step.model = wide
        exact = step.run_plain(exact_caches)
        for name, one in (("ours", ours), ("plain", plain)):
            errors[name] += (one - exact).square().mean().sqrt().item()
    print(group.rank, errors)
    assert errors["ours"] <= 1.2 * errors["plain"]


def test_the_fused_step_of_a_shard(tmp_path: Path) -> None:
    run_ranks(decode_fused, tmp_path)


def decode_vectors(group: Any) -> None:
    """As if the model was a wide one."""
    from folo_lib import fused_vectors

    fused_vectors.WIDE_FROM = 1024
    decode_fused(group)


def test_the_fused_step_of_a_wide_shard(tmp_path: Path) -> None:
    run_ranks(decode_vectors, tmp_path)


def decode_many(group: Any) -> None:
    """More sequences than are fused: layers with sums in their norms, and draws from shards."""
    from folo_lib import benchmark_tensor_parallel as benchmark
    from folo_lib.fused_decode import FusedLayers
    from folo_lib.sampling_kernels import TritonDraw

    case = benchmark.Case("8B", 20, 2)
    torch.manual_seed(group.rank)
    model = benchmark.make_model(case, group, 2)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:  # the same on both
            torch.manual_seed(len(name))
            weight.normal_(1, 0.2)
    runner = benchmark.make_runner(model, case, 8)
    graphs: Any = runner.graphs
    [size] = graphs.steps
    tables, token_ids = runner.rows, torch.zeros(20, dtype=torch.int64, device="cuda")
    draw = TritonDraw(20, model.config.vocab_size, "cuda")
    for params in (
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=0.8, min_p=0.1, seed=5),
    ):
        benchmark.start_requests(runner, case, params)
        row_index, seq_lens, *_ = graphs.inputs.split(size)
        logits = group.all_gather(graphs.own_logits)[:, : model.config.vocab_size]
        kept = tables.sampling.floats, tables.sampling.ints
        last = torch.zeros_like(tables.last_token_ids)
        draw(logits.contiguous(), seq_lens, row_index, *kept, token_ids, last, False)
        assert graphs.token_ids.equal(token_ids), params
        assert tables.last_token_ids[row_index].equal(token_ids)
    # As near to exact sums and norms as sums and norms that are apart.
    place = torch.arange(150, device="cuda") % 64
    for num_tokens in (20, 150):  # the second are too many for one kernel
        x = torch.randint(1000, (num_tokens,), device="cuda")
        dist.broadcast(x, 0)
        step = make_prompts_of_one(runner, num_tokens)
        ours, theirs = (
            layers(x, place[:num_tokens], runner.kv_caches, step).float()
            for layers in (runner.forward, FusedLayers(model, lambda one: one))
        )
        error = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        print(group.rank, num_tokens, "differ by", error.item())
        assert 0 < error < 0.01


def make_prompts_of_one(runner: Any, count: int) -> Any:
    """Metadata of sequences that run their only token."""
    from folo_lib.kv_cache import AttentionMetadata

    ones = torch.ones(count, dtype=torch.int64, device="cuda")
    blocks = torch.arange(count, device="cuda")
    assert count <= len(runner.kv_caches[0][0])
    return AttentionMetadata(
        block_size=16, slot_mapping=blocks * 16, block_table=blocks[:, None],
        query_start_loc=torch.arange(count + 1, device="cuda"), seq_lens=ones,
        query_lens_list=[1] * count, seq_lens_list=[1] * count,
    )  # fmt: skip


def test_many_sequences_on_two_gpus(tmp_path: Path) -> None:
    run_ranks(decode_many, tmp_path)


def test_more_ranks_than_gpus() -> None:
    size = 2 ** torch.cuda.device_count().bit_length()
    with pytest.raises(ValueError, match=f"tensor_parallel_size={size}"):
        LLMEngine(bundled_model_path(), device="cuda", tensor_parallel_size=size)
