"""A shard's layers, whose sums are in the norms after them, beside the whole model.

Without GPUs the ranks are processes that share memory, each with Triton's interpreter, so a kernel
that waits for the other rank does wait here.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="see test_tensor_parallel_gpu.py"
)

SEQ_LENS = (70, 1, 16, 33, 5)


class HostGroup:
    """Ranks that are processes of one host, and what shards need of them.

    What `allocate` gives lies at the same place of what each rank shares, and what is added up or
    gathered goes through the end of that.
    """

    def __init__(self, rank: int, shared: Sequence[Tensor], barrier: Any) -> None:
        self.rank, self.size, self.shared = rank, len(shared), shared
        self.barrier, self.device = barrier, torch.device("cpu")
        self.used, self.sums = 0, 0

    def allocate(self, *shape: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize // 4
        part = self.shared[self.rank][self.used : self.used + count].view(dtype)
        self.used += -(-count // 16) * 16
        self.barrier.wait()  # nobody writes into what is filled later
        part.fill_(fill)
        self.barrier.wait()
        return part.view(shape)

    def find_addresses(self, shared: Tensor) -> list[int]:
        place = shared.data_ptr() - self.shared[self.rank].data_ptr()
        return [one.data_ptr() + place for one in self.shared]

    def show(self, x: Tensor) -> list[Tensor]:
        """What all ranks show."""
        ends = [one.view(x.dtype)[-x.numel() :] for one in self.shared]
        ends[self.rank].copy_(x.flatten())
        self.barrier.wait()
        parts = [one.clone().view(x.shape) for one in ends]
        self.barrier.wait()
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        self.sums += 1
        return torch.stack(self.show(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.show(x), -1)


def run_layers(group: HostGroup) -> None:
    """Twice with words in all places, of which none may be left over, and once without."""
    from test_fused_decode import BLOCK_SIZE, Step, make_model
    from test_fused_shards import cut_caches, make_shard

    from folo_lib.kv_cache import AttentionMetadata
    from folo_lib.summed_layers import SummedLayers

    torch.manual_seed(0)
    whole = make_model(
        heads=16, kv_heads=4, layers=2, intermediate_size=2048, vocab_size=192
    )
    step, count = Step(whole, SEQ_LENS), len(SEQ_LENS)
    metadata = AttentionMetadata(
        block_size=BLOCK_SIZE, slot_mapping=step.slots,
        block_table=step.rows.block_table[step.row_index], query_start_loc=step.starts,
        seq_lens=step.seq_lens, query_lens_list=[1] * count, seq_lens_list=list(SEQ_LENS),
    )  # fmt: skip
    theirs, place = step.copy_caches(), step.seq_lens - 1
    expected = whole.model(step.tokens, place, theirs, metadata)
    shard: Any = make_shard(whole, group)
    layers = SummedLayers(shard, lambda function: function)
    most = layers.most_rows
    for most_rows, is_half in ((most, False), (most, True), (count - 1, True)):
        layers.most_rows, layers.fills_one_round, group.sums = most_rows, is_half, 0
        mine = cut_caches(step.copy_caches(), group.rank, group.size)
        hidden = layers(step.tokens, place, mine, metadata)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
        for one, other in zip(mine, cut_caches(theirs, group.rank, 2), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5, equal_nan=True)
        assert group.sums == (1 if most_rows >= count else 6)  # and that of embeddings


PARAMS = {
    "a": {"temperature": 0.0},
    "b": {"temperature": 0.9, "seed": 1},
    "c": {"temperature": 0.9, "seed": 2, "top_k": 5},
    "d": {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3},
}


def write_tokens(runner: Any, num_steps: int) -> list[dict[str, int]]:
    """What requests draw that come one after another, the last of them when two have gone."""
    from folo_lib.runner import NewRequest, ScheduledRequest, StepPlan
    from folo_lib.sampling_params import SamplingParams

    def start(name: str, length: int, block: int, *gone: str) -> StepPlan:
        prompt, blocks = [7 * i % 190 for i in range(length)], [block, block + 1]
        params = SamplingParams(**PARAMS[name])
        new = NewRequest(
            request_id=name, token_ids=prompt, num_prompt_tokens=length, params=params
        )
        scheduled = [ScheduledRequest(name, length, blocks)]
        return StepPlan(scheduled, [new], finished_ids=gone)

    def go_on(*names: str) -> StepPlan:
        return StepPlan([ScheduledRequest(name, 1) for name in names])

    plans = [start("a", 9, 0), start("b", 1, 2), go_on("a", "b"), start("c", 20, 4)]
    plans += (
        [go_on("a", "c", "b")]
        + [go_on("b")] * (num_steps - 6)
        + [start("d", 3, 6, "a", "c")]
    )
    plans += [go_on("b", "d")]
    drawn = []
    for plan in plans:
        tokens = runner.launch(plan).read().tokens
        drawn.append({name: one.token_id for name, one in tokens.items()})
    return drawn


def run_runners(group: HostGroup) -> None:
    """The runner of a shard, with fused steps and without, writes what the whole model does."""
    import test_fused_decode as fused
    from test_fused_shards import make_shard

    from folo_lib import fused_decode
    from folo_lib.config import EngineConfig
    from folo_lib.fused_checks import FusionSizes, choose_fusion_sizes
    from folo_lib.fused_shards import ShardedGraphs, ShardedRunner
    from folo_lib.runner import ModelRunner
    from folo_lib.summed_layers import SummedLayers

    def few_programs(*sizes: Any) -> FusionSizes:
        return FusionSizes(sizes[0], choose_fusion_sizes(*sizes).rows, 4, 4, 4)

    fused_decode.choose_fusion_sizes = few_programs
    torch.manual_seed(0)
    whole = fused.make_model(
        heads=16, kv_heads=4, intermediate_size=2048, vocab_size=192, backend="triton"
    )
    options: Any = {"max_num_seqs": 3, "max_num_batched_tokens": 32, "block_size": 16}
    alone = ModelRunner(whole, EngineConfig(**options))
    alone.initialize_kv_caches(8, 32)
    expected = write_tokens(alone, 7)
    assert len({token for one in expected for token in one.values()}) > 5
    shard: Any = make_shard(whole, group, "triton")
    runner: Any = ShardedRunner(shard, EngineConfig(**options, tensor_parallel_size=2))
    assert isinstance(runner.forward, SummedLayers)
    runner.initialize_kv_caches(8, 32)
    assert isinstance(runner.graphs, ShardedGraphs)
    assert write_tokens(runner, 7) == expected
    runner.initialize_kv_caches(8, 32)
    runner.graphs.is_fused = lambda size: False
    assert write_tokens(runner, 7) == expected


def run_rank(
    work: Callable[[HostGroup], None],
    rank: int,
    shared: Sequence[Tensor],
    barrier: Any,
    answers: Any,
) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with torch.inference_mode():
            work(HostGroup(rank, shared, barrier))
        answers.put(None)
    except BaseException:
        answers.put(traceback.format_exc())
        barrier.abort()


@pytest.mark.parametrize(
    "work", [run_layers, pytest.param(run_runners, marks=pytest.mark.more)]
)
def test_two_ranks_and_the_whole_model(work: Callable[[HostGroup], None]) -> None:
    context = multiprocessing.get_context("spawn")
    shared = [torch.zeros(2**21, dtype=torch.int32).share_memory_() for _ in range(2)]
    barrier, answers = context.Barrier(2, timeout=100), context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(work, rank, shared, barrier, answers))
        for rank in range(2)
    ]
    try:
        for process in ranks:
            process.start()
        for _ in ranks:
            error = answers.get(timeout=200)
            assert error is None, error
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_which_products_are_in_a_kernel_of_our_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8B on two ranks makes 96 programs, on one 192 and on four 48; an A10 has no room."""
    from folo_lib.summed_layers import fills_one_round

    cuda = torch.device("cuda")
    for inner, multiprocessors, room, expected in (
        (6144, 132, 228, True),
        (12288, 132, 228, False),
        (3072, 132, 228, False),
        (6144, 108, 164, False),
        (6144, 72, 100, False),
    ):
        card = SimpleNamespace(
            multi_processor_count=multiprocessors,
            shared_memory_per_multiprocessor=room * 1024,
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, x=card: x)
        mlp: Any = SimpleNamespace(down_proj=SimpleNamespace(in_features=inner))
        assert fills_one_round(mlp, cuda) is expected
        assert not fills_one_round(mlp, torch.device("cpu"))
