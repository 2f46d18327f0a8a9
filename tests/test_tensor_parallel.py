"""Several ranks give what one process gives, and one that fails takes the engine with it."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import models
import pytest
import schedules
import torch
from schedules import IS_SOAK, Schedule
from torch import Tensor

from folo_lib import LLMEngine, SamplingParams, bundled_model_path, parallel_checks
from folo_lib.checkpoint import find_weight_files, load_model, read_config
from folo_lib.config import EXECUTORS, EngineConfig
from folo_lib.course.ranks import ThreadGroup, run_ranks
from folo_lib.kv_cache import kv_bytes_per_token
from folo_lib.parallel_checks import RankError
from folo_lib.tensor_parallel import (
    GlooGroup,
    RankProcesses,
    ShardedForCausalLM,
    find_share,
    get_cache_memory,
    load_shard,
    read_shard,
)

BUNDLED = bundled_model_path()
GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUIET = {"device": "cpu", "dtype": "float32", "use_tqdm": False}


# --- One shard beside the whole, ranks in threads --------------------------------------

# model_type, H, H_kv, D, tied, bias; the vocabulary is odd, so that rows are left over.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3 4/1", {"num_key_value_heads": 2, "vocab_size": 203}),
    "untied": ("qwen3 7/1 untied yarn", {"num_attention_heads": 8, "vocab_size": 205}),
    "bias": (
        "qwen3 6/3 yarn bias",
        {"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "qwen2": ("qwen2 4/4 linear", {"num_key_value_heads": 2, "vocab_size": 203}),
    "qwen2 untied": ("qwen2 8/2 own head_dim", {"vocab_size": 201}),
}


@cache
def make_folder(shape: str, root: Path) -> Path:
    """A checkpoint of Hugging Face with random norms and biases."""
    case, changes = SHAPES[shape]
    theirs = models.make_reference(
        models.make_config(case, intermediate_size=64, **changes)
    )
    folder = root / shape.replace(" ", "-")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def run_sharded(
    folder: Path, size: int, spoil: Callable[[ShardedForCausalLM], None] = id
) -> list[Tensor]:
    """The logits of a batch of two, on each rank."""
    ids = torch.arange(2 * 11).view(2, 11) * 9 % 201
    config = EngineConfig(dtype="float32", device="cpu")

    def work(group: ThreadGroup) -> Tensor:
        shard = load_shard(folder, config, group)
        spoil(shard)
        logits: Tensor = shard.compute_logits(shard(ids))
        return logits

    return run_ranks(size, work)


def run_whole(folder: Path) -> Tensor:
    ids = torch.arange(2 * 11).view(2, 11) * 9 % 201
    model = load_model(folder, "float32", "cpu", use_tqdm=False)
    return model.compute_logits(model(ids))


@pytest.mark.parametrize("shape", SHAPES)
def test_shards_add_up_to_the_model(shape: str, root: Path) -> None:
    folder = make_folder(shape, root)
    sizes = parallel_checks.list_sizes(read_config(folder))
    assert sizes[:3] == [1, 2, 4]
    whole = run_whole(folder)
    for size in sizes:
        for logits in run_sharded(folder, size):
            models.assert_parity(logits, whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_all_ranks_make_the_checkpoint(shape: str, root: Path) -> None:
    folder = make_folder(shape, root)
    config, files = read_config(folder), find_weight_files(folder)
    whole = dict(read_shard(files, config, 0, 1))
    num_kv_heads = config.num_key_value_heads
    for size in parallel_checks.list_sizes(config):
        parts = [dict(read_shard(files, config, rank, size)) for rank in range(size)]
        for name, tensor in whole.items():
            own = [one[name] for one in parts if name in one]
            if ".o_proj.bias" in name:
                assert len(own) == 1
            if "norm" in name:
                assert all(torch.equal(one, tensor) for one in own)
                continue
            share = find_share(name, list(tensor.shape), config, 0, size)
            assert share is not None
            if ".k_proj." in name or ".v_proj." in name:
                # Each head as often as there are ranks for it, and in its order.
                own = own[:: max(1, size // num_kv_heads)]
            joined = torch.cat(own, share[0])
            assert torch.equal(joined[: len(tensor)], tensor), (name, size)
            assert not joined[len(tensor) :].any()


def test_a_shard_holds_its_part_and_no_more() -> None:
    config, files = read_config(BUNDLED), find_weight_files(BUNDLED)
    whole = sum(tensor.numel() for _, tensor in read_shard(files, config, 0, 1))
    for size, share in (
        (2, 0.502),
        (4, 0.276),
    ):  # norms, and heads that are there twice

        def count(group: ThreadGroup) -> int:
            config = EngineConfig(dtype="float32", device="cpu")
            shard = load_shard(BUNDLED, config, group)
            storages = (one.untyped_storage().nbytes() for one in shard.parameters())
            return sum(storages) // 4

        for num_numbers in run_ranks(size, count):
            assert num_numbers <= share * whole


def test_norms_of_heads_are_whole_and_heads_in_order(root: Path) -> None:
    config = read_config(make_folder("untied", root))  # 8 heads that share one
    name = "model.layers.0.self_attn.k_proj.weight"
    head_dim = config.head_dim
    for rank in range(8):
        assert find_share(name, [head_dim, 9], config, rank, 8) == (0, 0, head_dim)
    config.num_key_value_heads = 4
    starts = [find_share(name, [4 * head_dim, 9], config, i, 8) for i in range(8)]
    assert [one[1] // head_dim for one in starts if one] == [0, 0, 1, 1, 2, 2, 3, 3]


def count_sums(size: int) -> list[tuple[str, tuple[int, ...]]]:
    config = EngineConfig(dtype="float32", device="cpu")

    def work(group: ThreadGroup) -> Any:
        shard = load_shard(BUNDLED, config, group)
        shard.compute_logits(shard(torch.tensor([[1, 2, 3]])))
        return group.log

    return run_ranks(size, work)[0]


def test_two_sums_a_layer_one_for_the_embedding_and_a_gather() -> None:
    log = count_sums(2)
    assert log[0] == ("all_reduce", (1, 3, 192))
    assert log[1:-1] == [("all_reduce", (1, 3, 192))] * 12
    assert log[-1] == ("all_gather", (1, 3, 1024))


def test_a_head_that_differs_from_a_tied_embedding_is_kept(
    root: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(make_folder("tied", root), tmp_path / "head")
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[-3:] *= 2  # on one rank only
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="differs"):
        whole = run_whole(folder)
    with pytest.warns(UserWarning, match="differs"):
        for logits in run_sharded(folder, 2):
            models.assert_parity(logits, whole)


# --- Gloo --------------------------------------------------------------------------------


def run_gloo(size: int, path: Path, work: Callable[[GlooGroup], Any]) -> list[Any]:
    """What a function returns on each of `size` ranks of Gloo, which are threads here."""

    def start(group: ThreadGroup) -> Any:
        gloo = GlooGroup(group.rank, size, str(path / "store"), torch.device("cpu"))
        gloo.connect()
        return work(gloo)

    return run_ranks(size, start)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gloo_gives_every_rank_the_same_bits(size: int, tmp_path: Path) -> None:
    sizes = [*range(1, 40), 96, 192, 1000, 4097]

    def work(group: GlooGroup) -> list[Tensor]:
        noise = torch.Generator().manual_seed(group.rank)
        inputs = [torch.randn(n, generator=noise) for n in sizes]
        return [group.all_reduce(x) for x in inputs]

    first, *others = run_gloo(size, tmp_path, work)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


def test_gloo_rounds_16_bit_sums_once(tmp_path: Path) -> None:
    """Whichever the order of the ranks: the large number is on each of them, in each quarter."""

    def work(group: GlooGroup) -> Tensor:
        is_large = torch.arange(16) % 4 == group.rank
        return group.all_reduce(torch.where(is_large, 256.0, 1.0).bfloat16())

    for total in run_gloo(4, tmp_path, work):
        assert total.dtype == torch.bfloat16
        assert total.tolist() == [260.0] * 16  # 256 + 1 is 256 there


def test_gather_puts_ranks_side_by_side_in_every_row(tmp_path: Path) -> None:
    def work(group: GlooGroup) -> Tensor:
        return group.all_gather(10 * group.rank + torch.arange(6).view(3, 2))

    for gathered in run_gloo(2, tmp_path, work):
        assert gathered.tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [4, 5, 14, 15]]


def test_sums_and_gathers_wait_for_a_rank_that_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("folo_lib.tensor_parallel.CONNECT_SECONDS", 1)

    def work(group: GlooGroup) -> tuple[Tensor, Tensor]:
        found = []
        for add in group.all_reduce, group.all_gather:
            if group.rank:
                time.sleep(1.3)
            found.append(add(torch.ones(1)))
        return found[0], found[1]

    for total, gathered in run_gloo(2, tmp_path, work):
        assert (total.tolist(), gathered.tolist()) == ([2], [1, 1])


# --- The engine, ranks in processes ---------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick_processes() -> Iterator[None]:
    """Forked from one that has imported what takes seconds, but for those of scripts."""
    if sys.platform == "win32":
        yield
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["folo_lib.tensor_parallel", "transformers.models.qwen3.modeling_qwen3"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: context)
        yield


THREADS = "broken_ranks:ThreadExecutor"
PROCESSES = "folo_lib.tensor_parallel:ParallelExecutor"


def start_engine(size: int = 2, **options: Any) -> LLMEngine:
    return LLMEngine(tensor_parallel_size=size, **(QUIET | options))


def list_pids(engine: LLMEngine) -> list[int]:
    ranks = engine.executor.ranks  # type: ignore[attr-defined]
    return [process.pid for process in ranks.processes.values()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_end(pids: list[int], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < end, "a rank outlives the engine"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def two() -> Iterator[LLMEngine]:
    engine = start_engine()
    pids = list_pids(engine)
    folder = os.path.dirname(engine.executor.ranks.store)  # type: ignore[attr-defined]
    assert os.path.isdir(folder)
    yield engine
    engine.executor.close()  # type: ignore[attr-defined]
    wait_for_end(pids)
    assert not os.path.exists(folder)


def make_prompts() -> list[list[int]]:
    noise = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (20,), generator=noise).tolist()
    return [torch.randint(4, 2000, (n,), generator=noise).tolist() for n in lengths]


@cache
def run_alone() -> list[list[int]]:
    alone = LLMEngine(**QUIET).generate(make_prompts(), GREEDY, use_tqdm=False)
    return [one.outputs[0].token_ids for one in alone]


def test_two_ranks_write_what_one_process_writes(two: LLMEngine) -> None:
    outputs = two.generate(make_prompts(), GREEDY, use_tqdm=False)
    assert [one.outputs[0].token_ids for one in outputs] == run_alone()


def test_ranks_draw_alike_without_being_told(two: LLMEngine) -> None:
    params = SamplingParams(
        temperature=1.2, top_p=0.9, repetition_penalty=1.2, max_tokens=24, seed=5, n=3
    )
    prompts = make_prompts()[:5]
    outputs = two.generate(prompts, params, use_tqdm=False)
    alone = LLMEngine(**QUIET).generate(prompts, params, use_tqdm=False)
    for one, other in zip(outputs, alone, strict=True):
        for ours, its in zip(one.outputs, other.outputs, strict=True):
            assert ours.token_ids == its.token_ids


def test_bytes_of_a_decode_step_do_not_grow_with_the_prompt(two: LLMEngine) -> None:
    ranks, counts = two.executor.ranks, []  # type: ignore[attr-defined]
    for length in (8, 800):
        before = ranks.num_bytes
        request = two.add_request([5] * length, GREEDY)
        two.step()
        assert ranks.num_bytes - before > length  # the prompt goes out once
        before = ranks.num_bytes
        two.step()
        counts.append(ranks.num_bytes - before)
        two.abort_request(request)
        while two.has_unfinished_requests():
            two.step()
    assert counts[0] == pytest.approx(counts[1], abs=4)
    assert counts[0] < 400


def test_four_ranks_share_two_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXECUTORS, "several", THREADS)
    engine = start_engine(4)
    assert engine.executor.config.num_key_value_heads == 2
    threads = list(engine.executor.ranks.processes.values())  # type: ignore[attr-defined]
    outputs = engine.generate(make_prompts(), GREEDY, use_tqdm=False)
    whole = load_model(BUNDLED, "float32", "cpu", use_tqdm=False)
    for prompt, output, alone in zip(make_prompts(), outputs, run_alone(), strict=True):
        check_greedy(whole, prompt, output.outputs[0].token_ids, alone)
    del engine, outputs
    gc.collect()  # nobody has to close it
    assert len(threads) == 3
    assert not any(thread.is_alive() for thread in threads)


def test_the_cache_fits_the_rank_with_least_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever that is: all have as many blocks as it has room for."""
    part = kv_bytes_per_token(read_config(BUNDLED), torch.float32) // 2
    monkeypatch.setitem(EXECUTORS, "several", THREADS)
    for rooms in ((640, 320), (320, 640)):
        monkeypatch.setattr(
            "folo_lib.tensor_parallel.get_cache_memory",
            lambda config, group, rooms=rooms: rooms[group.rank] * part,
        )
        executor = start_engine(2, max_model_len=256).executor
        assert executor.num_blocks * executor.block_size == 320
        del executor
        gc.collect()


def test_ranks_of_one_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folo_lib.tensor_parallel.get_kv_cache_memory", lambda *_: 600)
    of_each = run_ranks(3, lambda group: get_cache_memory(EngineConfig(), group))
    assert of_each == [200] * 3
    config = EngineConfig(kv_cache_memory_bytes=600)  # of each, as it was asked for
    assert run_ranks(3, lambda group: get_cache_memory(config, group)) == [600] * 3


def check_greedy(
    model: Any, prompt: list[int], ours: list[int], its: list[int]
) -> None:
    """Equal, or each step on our own tokens within the rule of the design for near-ties."""
    if ours == its:
        return
    logits = model.compute_logits(model(torch.tensor(prompt + ours[:-1])))
    for row, token in zip(logits[len(prompt) - 1 :], ours, strict=True):
        assert row.max() - row[token] < 10 * 1e-5 * row.std()


# --- Random traffic -------------------------------------------------------------------


@cache
def get_small_models() -> Any:
    """As in `schedules`, with heads that two and four ranks can share."""
    return schedules.make_models(num_attention_heads=8, num_key_value_heads=2)


CACHES = (schedules.run_alone, schedules.make_engine_once)


@pytest.fixture
def traffic(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> Iterator[Callable[[int, str], Callable[..., LLMEngine]]]:
    """Lets the engines of `schedules` have several ranks."""
    alone = schedules.make_engine
    folder = root / "traffic"
    monkeypatch.setattr(schedules, "get_models", get_small_models)
    for one in CACHES:
        one.cache_clear()
    _, theirs, tokenizer = get_small_models()
    if not folder.exists():
        theirs.save_pretrained(folder)
    logging.disable(logging.ERROR)

    def use(size: int, executor: str) -> None:
        def make_engine(num_tokens: int = 2 * schedules.LONGEST, **options: Any) -> Any:
            if options.get("scheduler") == "fcfs":  # what an item gives alone
                return alone(num_tokens, **options)
            config = read_config(folder)
            whole = kv_bytes_per_token(config, torch.float32)
            options = {"max_model_len": min(num_tokens, schedules.LONGEST)} | options
            part = whole // config.num_key_value_heads * max(1, 2 // size)
            options["kv_cache_memory_bytes"] = num_tokens * part
            options |= {"tokenizer": tokenizer, "tensor_parallel_size": size}
            return LLMEngine(folder, **(QUIET | options))

        monkeypatch.setitem(EXECUTORS, "several", executor)
        monkeypatch.setattr(schedules, "make_engine", make_engine)

    yield use
    logging.disable(logging.NOTSET)
    for one in CACHES:
        one.cache_clear()


def run_traffic(seeds: range) -> None:
    num_right = 0
    for seed in seeds:
        try:
            num_right += Schedule(seed, True, seed % 2 == 1).run()["right"]
        except Exception as error:
            error.add_note(f"in schedule {seed}")
            raise
    assert num_right > len(seeds)


def test_random_traffic_on_two_ranks(traffic: Any) -> None:
    traffic(2, THREADS)
    run_traffic(range(4, 8))


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.parametrize(("size", "first", "most"), [(2, 8, 24), (4, 0, 10)])
def test_much_random_traffic(traffic: Any, size: int, first: int, most: int) -> None:
    """16 more schedules on two ranks, and 10 on four; under `make soak` all 50 on both."""
    traffic(size, THREADS)
    run_traffic(range(50) if IS_SOAK else range(first, most))


@pytest.mark.more
@pytest.mark.slow
def test_random_traffic_on_processes(traffic: Any) -> None:
    traffic(2, PROCESSES)
    run_traffic(range(50, 56))


# --- What can go wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executor", "text"),
    [
        ("FailsAtLoad", "rank 1 of 2 failed: MemoryError: no room for one more matrix"),
        ("KilledAtLoad", "rank 1 of 2 failed: its process was ended by SIGKILL"),
    ],
)
def test_a_rank_fails_while_it_loads(
    executor: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXECUTORS, "several", f"broken_ranks:{executor}")
    pids = note_pids(monkeypatch)
    begin = time.monotonic()
    with pytest.raises(RankError, match=text):
        start_engine()
    assert time.monotonic() - begin < 20  # 10 of them for the import of PyTorch
    wait_for_end(pids)


def note_pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that ranks are given from now on."""
    pids: list[int] = []
    start = RankProcesses.start

    def start_and_note(self: Any, *args: Any) -> Any:
        process = start(self, *args)
        assert process.pid
        pids.append(process.pid)
        return process

    monkeypatch.setattr(RankProcesses, "start", start_and_note)
    return pids


@pytest.mark.parametrize(
    ("executor", "size", "text"),
    [
        ("FailsInStep", 4, "rank 3 of 4 failed: MemoryError: no room for one more"),
        ("KilledInStep", 2, "rank 1 of 2 failed: its process was ended by SIGKILL"),
    ],
)
def test_a_rank_fails_in_a_step(
    executor: str, size: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXECUTORS, "several", f"broken_ranks:{executor}")
    engine = start_engine(size)
    pids = list_pids(engine)
    begin = time.monotonic()
    with pytest.raises(RankError, match=text):
        engine.generate(["Once upon", "The fox"], GREEDY, use_tqdm=False)
    assert time.monotonic() - begin < 10
    wait_for_end(pids)
    with pytest.raises(RankError, match=text):  # and again, at once
        engine.generate("Once upon", GREEDY, use_tqdm=False)


def test_a_rank_with_other_versions_or_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def identify(folder: Path) -> dict[str, str]:
        return parallel_checks.identify(folder) | {"torch": "1.0", "weights": "abc"}

    monkeypatch.setattr("folo_lib.tensor_parallel.identify", identify)
    read = "folo_lib.tensor_parallel.read_shard"
    monkeypatch.setattr(read, lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=r"rank 1 of 2 .*1\.0 on rank 0; its weights"):
        start_engine()


SCRIPT = """
import os, signal, threading, time
from folo_lib import LLMEngine, SamplingParams

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent may ignore it
    engine = LLMEngine(tensor_parallel_size=2, device="cpu", use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
    few = SamplingParams(temperature=0, max_tokens=8)
    [before] = engine.generate("The fox", few, use_tqdm=False)
    print(*[p.pid for p in engine.executor.ranks.processes.values()], flush=True)
    for _ in range(2):
        timer = threading.Timer(0.7, os.killpg, (os.getpgid(0), signal.SIGINT))
        timer.start()
        try:
            engine.generate(["Once upon a time", "The"], params, use_tqdm=False)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    [after] = engine.generate("The fox", few, use_tqdm=False)
    print(before.outputs[0].text == after.outputs[0].text, flush=True)
    time.sleep(100)
"""


def test_ctrl_c_ends_a_call_and_death_of_the_parent_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    # Gloo of torch 2.10 says on stdout that it is connected.
    lines = (one.strip() for one in process.stdout if not one.startswith("[Gloo]"))
    try:
        pids = [int(pid) for pid in next(lines).split()]
        assert pids and all(map(is_running, pids))
        assert [next(lines) for _ in range(2)] == ["interrupted"] * 2
        assert next(lines) == "True"
        assert all(map(is_running, pids))
    finally:
        process.kill()
        process.wait()
    wait_for_end(pids)


# --- What is refused before anything starts --------------------------------------------


def test_sizes_that_do_not_divide_the_model() -> None:
    with pytest.raises(
        ValueError, match=r"=3 does not divide .* take one of 1, 2, 4\."
    ):
        start_engine(3)
    config = read_config(BUNDLED)
    assert parallel_checks.list_sizes(config) == [1, 2, 4]
    config.num_attention_heads, config.num_key_value_heads = 24, 6
    config.intermediate_size = 96
    assert parallel_checks.list_sizes(config) == [1, 2, 3, 6, 12, 24]
    config.intermediate_size = 92
    assert parallel_checks.list_sizes(config) == [1, 2]


def test_a_model_that_is_loaded_is_on_one_device() -> None:
    model = load_model(BUNDLED, "float32", "cpu", use_tqdm=False)
    with pytest.raises(ValueError, match="needs the folder or hub id"):
        LLMEngine(model, tensor_parallel_size=2)


def test_options_are_checked_before_a_model_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for size in (0, -2):
        with pytest.raises(ValueError, match="must be at least 1, the devices"):
            LLMEngine("nowhere", tensor_parallel_size=size)
    with pytest.raises(TypeError, match="must be an int"):
        LLMEngine("nowhere", tensor_parallel_size=2.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="=4 is more than the 2 GPUs of this machine"):
        EngineConfig(tensor_parallel_size=4, device="cuda", dtype="float32")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        EngineConfig(tensor_parallel_size=2, device="cuda:1", dtype="float32")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="one 'mps'"):
        EngineConfig(tensor_parallel_size=2, device="mps")


def test_a_damaged_checkpoint_is_refused_before_a_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"hidden_size": 128}))
    pids = note_pids(monkeypatch)
    with pytest.raises(ValueError, match="mis-shaped"):
        start_engine(model=folder)
    assert not pids
