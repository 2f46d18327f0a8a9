"""A shard's layers, whose sums are in the norms after them, beside the whole model.

Without GPUs the ranks are processes that share memory, each with Triton's interpreter, so a kernel
that waits for the other rank does wait here.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
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
    """Ranks that are processes of one host, and what `SummedLayers` needs of them."""

    def __init__(self, rank: int, shared: Sequence[Tensor], barrier: Any) -> None:
        self.rank, self.size, self.shared, self.barrier = (
            rank,
            len(shared),
            shared,
            barrier,
        )
        self.device, self.sums = torch.device("cpu"), 0

    def allocate(self, *shape: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
        part = self.shared[self.rank].view(-1)[: torch.Size(shape).numel()]
        part.fill_(fill)
        self.barrier.wait()
        return part.view(dtype).view(shape)

    def find_addresses(self, shared: Tensor) -> list[int]:
        return [one.data_ptr() for one in self.shared]

    def all_reduce(self, x: Tensor) -> Tensor:
        """Through the end of what is shared, where no words are."""
        self.sums += 1
        ends = [one[-x.numel() :].view(x.dtype) for one in self.shared]
        ends[self.rank].copy_(x.flatten())
        self.barrier.wait()
        total = torch.stack(ends).sum(0).view(x.shape)
        self.barrier.wait()
        return total


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


def run_rank(rank: int, shared: Sequence[Tensor], barrier: Any, answers: Any) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with torch.inference_mode():
            run_layers(HostGroup(rank, shared, barrier))
        answers.put(None)
    except BaseException:
        answers.put(traceback.format_exc())
        barrier.abort()


def test_two_ranks_and_the_whole_model() -> None:
    context = multiprocessing.get_context("spawn")
    shared = [torch.zeros(2**20, dtype=torch.int32).share_memory_() for _ in range(2)]
    barrier, answers = context.Barrier(2), context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(rank, shared, barrier, answers))
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
