"""Draws in Triton against page 07's `Sampler`.

Without a GPU they run in Triton's interpreter, on small vocabularies in small tiles; those marked
`gpu` draw from a whole vocabulary on the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from folo_lib import SamplingParams
from folo_lib.sampler import (
    Sampler,
    SamplingRows,
    apply_filters,
    gumbel_noise,
    integer_weights,
)

pytest.importorskip("triton", reason="Triton runs on Linux")

from folo_lib import sampling_kernels as module
from folo_lib.sampling_kernels import TritonDraw, tl, triton

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
NAN, INF = float("nan"), float("inf")
SIZE = 300
"""Of the vocabulary: two tiles and a part of a third."""

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
interpreted = pytest.mark.skipif(HAS_GPU, reason="replaces a part of a kernel")

WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"min_p": 0.1},
    {"top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 2.0, "min_p": 0.02, "top_k": 40, "top_p": 0.5},
    {"temperature": 0.05, "min_p": 0.3, "top_p": 0.9},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small vocabularies have several tiles and slices; a GPU keeps its own."""
    if not HAS_GPU:
        monkeypatch.setattr(module, "TILE", tl.constexpr(128))
        monkeypatch.setattr(module, "MAX_SLICES", tl.constexpr(4))
        monkeypatch.setattr(module, "MAX_LISTED", tl.constexpr(256))


class Batch:
    """Rows of a batch, which lie elsewhere in the tables, in another order.

    Args:
        wishes: of each row, arguments of `SamplingParams`.
        logits: `[B, V]`.
        positions: of each row.
        seeds: of each row.
    """

    def __init__(
        self,
        wishes: Sequence[dict[str, Any]],
        logits: Tensor,
        positions: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.logits, count = logits.to(DEVICE), len(wishes)
        self.vocab_size = logits.shape[-1]
        self.tables = SamplingRows(count + 3, self.vocab_size, DEVICE)
        self.own = [count + 1 - i for i in range(count)]
        for i, (row, wish) in enumerate(zip(self.own, wishes, strict=True)):
            seed = 77 * i + 5 if seeds is None else seeds[i]
            self.tables.set_row(row, SamplingParams(**wish), seed, i % 3, [1], [])
        self.rows = torch.tensor(self.own, device=DEVICE)
        places = range(10, 10 + count) if positions is None else positions
        self.positions = torch.tensor(list(places), device=DEVICE)
        self.token_ids = torch.full((count,), 99, device=DEVICE)
        self.last_token_ids = torch.full((count + 3,), 88, device=DEVICE)

    @property
    def metadata(self) -> Any:
        return self.tables.gather(self.own, self.rows, self.positions)

    def expect(self) -> list[int]:
        """What page 07 draws."""
        return Sampler().sample(self.logits, self.metadata)[0].tolist()

    def draw(self, filters: bool = True, draw: TritonDraw | None = None) -> list[int]:
        draw = draw or make_draw(len(self.rows), self.vocab_size)
        tables = self.rows, self.tables.floats, self.tables.ints
        written = self.token_ids, self.last_token_ids
        draw(self.logits, self.positions, *tables, *written, filters)
        return self.token_ids.tolist()

    def check(self, filters: bool = True) -> None:
        assert self.draw(filters) == self.expect()


def make_draw(num_rows: int, vocab_size: int) -> TritonDraw:
    """With scratch memory that is full of what was there before."""
    draw = TritonDraw(num_rows, vocab_size, DEVICE)
    for tensor in draw.scratch:
        tensor.fill_(NAN if tensor.is_floating_point() else 2**30 + 7)
    return draw


def make_logits(count: int, size: int = SIZE, scale: float = 3.0) -> Tensor:
    return torch.randn(count, size) * scale


class TestAgainstTheSampler:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_batch_whose_rows_are_all_unlike(self, seed: int) -> None:
        torch.manual_seed(seed)
        Batch(WISHES, make_logits(len(WISHES))).check()

    def test_a_row_does_not_depend_on_its_neighbours(self) -> None:
        logits = make_logits(len(WISHES))
        together = Batch(WISHES, logits).draw()
        for i in (1, 4, 6):
            alone = Batch([WISHES[i]], logits[i : i + 1], [10 + i], [77 * i + 5])
            alone.tables.ints[alone.rows, 1] = i % 3
            assert alone.draw() == together[i : i + 1]

    @pytest.mark.parametrize("filters", [False, True])
    def test_temperatures_alone(self, filters: bool) -> None:
        temperatures = [0, 0.01, 0.3, 1, 2] * 8
        wishes = [{"temperature": float(t)} for t in temperatures]
        Batch(wishes, make_logits(len(wishes))).check(filters)

    def test_min_p_needs_no_filters(self) -> None:
        wishes = [{"min_p": p} for p in (0.01, 0.1, 0.5, 0.9)] * 3
        Batch(wishes, make_logits(len(wishes), scale=1.0)).check(filters=False)

    @pytest.mark.parametrize("size", [1, 2, 100, 128, 129, 256])
    def test_sizes_of_the_vocabulary(self, size: int) -> None:
        wishes = [WISHES[0], WISHES[1], WISHES[4], WISHES[5]]
        Batch(wishes, make_logits(len(wishes), size)).check()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        Batch(WISHES, make_logits(len(WISHES)).to(dtype)).check()

    def test_ties(self) -> None:
        """Logits that are multiples of one half: a cut goes through equals."""
        logits = make_logits(len(WISHES), scale=1.0).mul(2).round().div(2)
        Batch(WISHES, logits).check()

    def test_a_row_in_a_longer_tensor(self) -> None:
        logits = make_logits(4, SIZE + 20)[:, :SIZE]
        assert not logits.is_contiguous()
        Batch(WISHES[1:5], logits).check()

    def test_filters_that_leave_all_or_one(self) -> None:
        wishes: list[dict[str, Any]] = [
            {"top_k": 1},
            {"top_k": SIZE - 1},
            {"top_k": SIZE},
            {"top_k": SIZE + 7},
            {"top_k": -1},
            {"top_p": 1e-6},
            {"top_p": 0.999999},
            {"top_p": 1 - 1e-12},
            {"min_p": 1.0},
            {"min_p": 1e-9},
            {"top_k": 2, "top_p": 1e-6},
        ]
        Batch(wishes, make_logits(len(wishes), scale=1.0)).check()


class TestGreedy:
    @pytest.mark.parametrize("filters", [False, True])
    def test_of_equals_the_first(self, filters: bool) -> None:
        """Within a tile, in two tiles of a slice, in two slices."""
        pairs = [(3, 4), (100, 299), (5, 130), (140, 270), (127, 128), (0, 299)]
        logits = make_logits(len(pairs), scale=1.0)
        for row, pair in zip(logits, pairs, strict=True):
            row[list(pair)] = 9.0
        batch = Batch([{"temperature": 0.0}] * len(pairs), logits)
        assert batch.draw(filters) == [first for first, _ in pairs]

    @pytest.mark.parametrize("num_slices", [1, 2])
    def test_of_equals_in_a_lane_the_first(
        self, num_slices: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the same place of two tiles that one program takes."""
        monkeypatch.setattr(
            TritonDraw, "choose_num_slices", lambda self, num_rows: num_slices
        )
        pairs = [(5, 133), (6, 262), (130, 258), (7, 134)]
        logits = make_logits(len(pairs), scale=1.0)
        for row, pair in zip(logits, pairs, strict=True):
            row[list(pair)] = 9.0
        batch = Batch([{"temperature": 0.0}] * len(pairs), logits)
        assert batch.draw() == [first for first, _ in pairs]

    def test_filters_in_the_tables_are_off(self) -> None:
        """With one of them, noise would choose among the likeliest."""
        logits = make_logits(3, scale=1.0)
        logits[:, 40:60] = 9.0
        batch = Batch([{"temperature": 0.0}] * 3, logits)
        batch.tables.floats[batch.rows[0], 1] = 0.5  # min_p
        batch.tables.ints[batch.rows[1], 2] = 7  # top_k
        batch.tables.floats[batch.rows[2], 2] = 0.5  # top_p
        assert batch.draw() == [40, 40, 40]


class TestWhatCannotBeDrawn:
    @pytest.mark.parametrize("filters", [False, True])
    def test_is_minus_one(self, filters: bool) -> None:
        wishes = [WISHES[0], WISHES[1], WISHES[4], WISHES[5], WISHES[1]]
        wishes = wishes if filters else [{"temperature": 0.0}, WISHES[1]] * 2 + [{}]
        for bad in (NAN, INF):
            logits = make_logits(5)
            logits[0, 0] = logits[1, 299] = logits[2, 150] = logits[3, 200] = bad
            batch = Batch(wishes, logits)
            drawn = batch.draw(filters)
            assert drawn == batch.expect()
            assert drawn[:4] == [-1] * 4 and drawn[4] >= 0
            last = batch.last_token_ids[batch.rows].tolist()
            assert last == [0] * 4 + drawn[4:]

    def test_nothing_but_minus_infinity(self) -> None:
        batch = Batch([WISHES[0], WISHES[5]], torch.full((2, SIZE), -INF))
        assert batch.draw() == batch.expect() == [-1, -1]

    def test_what_is_forbidden_is_not_drawn(self) -> None:
        """More candidates are wanted than there are."""
        logits = make_logits(5, scale=1.0)
        allowed = [2, 77, 128, 299]
        forbidden = [i for i in range(SIZE) if i not in allowed]
        logits[:, forbidden] = -INF
        wishes = [{}, {"top_k": 9}, {"top_p": 0.999}, {"top_k": 9, "top_p": 0.9}]
        batch = Batch([*wishes, {"min_p": 0.01}], logits)
        batch.check()
        assert set(batch.token_ids.tolist()) <= set(allowed)

    def test_the_largest_numbers(self) -> None:
        """Logits that overflow when they are divided by a temperature of 0.01."""
        logits = make_logits(4, scale=1e36)
        batch = Batch([{"temperature": 0.01}, {}, {"top_k": 3}, {"top_p": 0.5}], logits)
        batch.check()
        assert min(batch.token_ids.tolist()) >= 0


@triton.jit
def weights_kernel(distances, weights, ID_BITS: tl.constexpr):
    places = tl.arange(0, 1024)
    tl.store(weights + places, module.weigh(tl.load(distances + places), ID_BITS))


@triton.jit
def noise_kernel(step, noise):
    row, ids = tl.program_id(0), tl.arange(0, 1024)
    v = module.make_uniform(module.start_noise(step, row), ids)
    found = module.make_noise(v)
    tl.store(noise + row * 1024 + ids, found)


def test_weights_are_rounded_to_even() -> None:
    """Of a vocabulary so large that weights are small, and a fraction counts."""
    distances = torch.linspace(0, 20, 1024, device=DEVICE)
    weights = torch.zeros(1024, dtype=torch.int64, device=DEVICE)
    weights_kernel[1,](distances, weights, 40)
    expected = integer_weights(-distances[None], 2**39)[0]
    close = (weights - expected).abs() <= 1e-6 * expected
    assert close.float().mean() > 0.98


class TestNoise:
    def test_is_that_of_page_07(self) -> None:
        """Of any token, not only of the one that wins."""
        batch = Batch([{}] * 8, torch.zeros(8, 1024), seeds=[3**i for i in range(8)])
        tables = batch.rows, batch.tables.floats, batch.tables.ints
        written = batch.token_ids, batch.last_token_ids
        step = module.Step(
            batch.logits, 1024, 1024, 0, 0, 1, batch.positions, *tables, *written
        )
        noise = torch.zeros(8, 1024, device=DEVICE)
        noise_kernel[8,](step, noise)
        seeds, sample_indices = batch.tables.ints[batch.rows, :2].T
        expected = gumbel_noise(seeds, sample_indices, batch.positions, 1024)
        torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-6)

    def test_seeds_of_64_bits(self) -> None:
        seeds = [0, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, 12345678901234567890]
        Batch([{}] * len(seeds), torch.zeros(len(seeds), SIZE), seeds=seeds).check()

    def test_positions_and_sample_indices(self) -> None:
        positions = [0, 1, 2**31, 2**40 + 3, 131071]
        batch = Batch([{}] * 5, torch.zeros(5, SIZE), positions)
        batch.tables.ints[batch.rows, 1] = torch.tensor(
            [0, 1, 63, 2**33, -5], device=DEVICE
        )
        batch.check()

    def test_the_highest_of_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What wins among many is far in the tail, where `1 - v` has few digits left."""
        size, count = 2000, 60
        if not HAS_GPU:
            monkeypatch.setattr(module, "TILE", tl.constexpr(2048))
        logits = torch.zeros(count, size)
        Batch([{}] * count, logits, range(count)).check(filters=False)


@interpreted
class TestThreshold:
    """Noise that points at one token: it is drawn if it is kept, otherwise the best is."""

    @pytest.fixture(autouse=True)
    def pointed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(step: Any, row: Any) -> Any:
            return tl.load(step.positions + row)

        def make_uniform(state: Any, ids: Any) -> Any:
            return tl.where(ids == state, 0.0, 0.9)

        def make_noise(v: Any) -> Any:
            return tl.where(v == 0, 1e6, 0.0)

        monkeypatch.setattr(module, "start_noise", start)
        monkeypatch.setattr(module, "make_uniform", make_uniform)
        monkeypatch.setattr(module, "make_noise", make_noise)

    def check(self, wishes: Sequence[dict[str, Any]], logits: Tensor) -> Tensor:
        """The last token that is kept and the first that is not; `[B]`, how many are."""
        batch = Batch(wishes, logits)
        kept = apply_filters(batch.logits, batch.metadata).isfinite()
        # Stable: of equals the lower ids come first.
        order = batch.logits.float().argsort(dim=-1, descending=True, stable=True)
        count = kept.sum(dim=-1)
        assert torch.equal(kept.gather(-1, order).sum(-1), count)
        last = order.gather(-1, count[:, None] - 1)[:, 0]
        assert kept.gather(-1, last[:, None]).all()
        batch.positions = last
        assert batch.draw() == last.tolist()
        first = order.gather(-1, count[:, None].clamp(max=logits.shape[-1] - 1))[:, 0]
        is_dropped = ~kept.gather(-1, first[:, None])[:, 0]
        batch.positions = first
        best = torch.where(is_dropped, order[:, 0], first)
        assert batch.draw() == best.tolist()
        return count

    @pytest.mark.parametrize("scale", [0.3, 3.0])
    def test_on_random_rows(self, scale: float) -> None:
        self.check(WISHES[2:], make_logits(len(WISHES) - 2, scale=scale))

    def test_among_equals(self) -> None:
        logits = make_logits(len(WISHES) - 2, scale=1.0).mul(2).round().div(2)
        self.check(WISHES[2:], logits)

    def test_all_are_equal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More at the cut than the list of a row holds; top_k keeps all of them."""
        wishes: list[dict[str, Any]] = [
            {"top_p": 0.011},
            {"top_p": 0.5},
            {"top_k": 3},
            {"top_k": 3, "top_p": 0.9},
            {"min_p": 1.0, "top_p": 0.995},
        ]
        monkeypatch.setattr(module, "TILE", tl.constexpr(512))
        count = self.check(wishes, torch.ones(5, SIZE))
        assert count.tolist() == [4, 150, 300, 270, 299]

    def test_a_list_that_is_too_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_LISTED", tl.constexpr(8))
        monkeypatch.setattr(module, "TILE", tl.constexpr(256))
        wishes = [{"top_k": 50}, {"top_k": 60, "top_p": 0.7}, {"top_p": 0.5}]
        more = [{"min_p": 0.85, "top_k": 100, "top_p": 0.9}]
        self.check([*wishes, *more], make_logits(4, scale=0.1))

    def test_a_list_that_is_full_to_the_last_place(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_LISTED", tl.constexpr(8))
        logits = -torch.arange(SIZE).float().expand(3, -1)
        self.check([{"top_k": 7}, {"top_k": 8}, {"top_k": 9}], logits)

    def test_far_apart(self) -> None:
        """The threshold is in the last bin, or far below what a slice looks at."""
        wishes: list[dict[str, Any]] = [
            {"top_k": 40},
            {"top_k": 299},
            {"temperature": 2.0, "top_p": 1 - 1e-12},
            {"temperature": 2.0, "top_k": 100, "top_p": 0.99},
            {"temperature": 2.0, "min_p": 1e-9},
        ]
        self.check(wishes, make_logits(len(wishes), scale=30.0))

    def test_exactly_at_the_mass(self) -> None:
        """A hundredth each, and as many as `top_p` has hundredths but for its rounding."""
        logits = torch.full((4, SIZE), -INF)
        logits[:, 60:160] = 0.0
        hundredths = [{"top_p": 0.41}, {"top_p": 0.47}, {"top_p": 0.9}]
        count = self.check([*hundredths, {"top_k": 100, "top_p": 0.41}], logits)
        assert count.tolist() == [41, 47, 90, 41]

    def test_exactly_at_min_p(self) -> None:
        logits = torch.full((3, SIZE), -INF)
        logits[:, 5:15] = -torch.arange(10) * torch.tensor(2.0).log()
        wishes = [
            {"min_p": 0.25},
            {"min_p": 0.2501},
            {"min_p": 0.25, "temperature": 0.5},
        ]
        assert self.check(wishes, logits).tolist() == [3, 2, 2]


class TestCalls:
    @pytest.mark.parametrize("num_slices", [1, 2, 3])
    def test_any_number_of_slices(
        self, num_slices: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            TritonDraw, "choose_num_slices", lambda self, num_rows: num_slices
        )
        Batch(WISHES[1:6], make_logits(5)).check()

    def test_one_for_all_calls(self) -> None:
        """Larger and smaller batches, with filters and without."""
        draw = make_draw(8, SIZE)
        for count, filters in ((8, True), (3, True), (8, False), (1, True), (8, True)):
            wishes = WISHES[:count] if filters else WISHES[:2] * 4
            batch = Batch(wishes, make_logits(count))
            assert batch.draw(filters, draw) == batch.expect()

    def test_a_list_begins_empty(self) -> None:
        """What the call before has listed would win: it is as likely as the best."""
        wishes = [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.9}]
        batch = Batch(wishes, make_logits(3, scale=1.0))
        draw = make_draw(3, SIZE)
        draw.scratch.counts.fill_(9)
        draw.scratch.listed.copy_(torch.arange(draw.scratch.listed.shape[1]) % SIZE)
        assert batch.draw(draw=draw) == batch.expect()

    def test_nothing_else_is_written(self) -> None:
        batch = Batch(WISHES[:4], make_logits(4))
        before = batch.logits.clone()
        drawn = batch.draw()
        assert torch.equal(batch.logits, before)
        assert batch.last_token_ids[batch.rows].tolist() == drawn
        assert (batch.last_token_ids == 88).sum() == 3

    def test_rows_that_pad_a_graph(self) -> None:
        """Several rows of nobody, with whatever logits were there."""
        batch = Batch(WISHES[1:3], make_logits(2))
        batch.rows = torch.cat([batch.rows, torch.tensor([4, 4], device=DEVICE)])
        batch.positions = torch.cat([batch.positions, batch.positions * 0])
        batch.logits = torch.cat([batch.logits, make_logits(2).to(DEVICE) * NAN])
        batch.token_ids = torch.full((4,), 99, device=DEVICE)
        assert batch.draw()[:2] == Batch(WISHES[1:3], batch.logits[:2]).expect()

    @pytest.mark.parametrize(
        ("num_rows", "vocab_size", "expected"),
        [(1, 151936, 149), (16, 151936, 66), (256, 151936, 5), (4096, 151936, 1)],
    )
    def test_number_of_slices(
        self,
        num_rows: int,
        vocab_size: int,
        expected: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(module, "count_multiprocessors", lambda device: 132)
        draw = TritonDraw(1, vocab_size, "cpu")
        assert draw.choose_num_slices(num_rows) == expected


QWEN_SIZE = 151936


@gpu
@on_gpu
class TestOnTheCard:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("scale", [0.6, 3.0])
    def test_a_whole_vocabulary(self, dtype: torch.dtype, scale: float) -> None:
        """All but a few of 512 tokens: a score may differ in its last bits."""
        wishes = [WISHES[i % len(WISHES)] for i in range(64)]
        equal = 0
        for start in range(0, 512, 64):
            logits = (torch.randn(64, QWEN_SIZE, device=DEVICE) * scale).to(dtype)
            batch = Batch(wishes, logits, range(start, start + 64))
            pairs = zip(batch.draw(), batch.expect(), strict=True)
            equal += sum(ours == theirs for ours, theirs in pairs)
        assert equal >= 510

    def test_candidates_in_every_tile(self) -> None:
        """Equally likely, so all programs of a row count and list at the same time."""
        logits = torch.full((64, QWEN_SIZE), -INF)
        logits[:, 5 :: module.TILE.value] = 0.0
        wishes: list[dict[str, Any]] = [{"top_k": 40}, {"top_p": 0.5}]
        batch = Batch(wishes * 32, logits)
        for _ in range(4):
            pairs = zip(batch.draw(), batch.expect(), strict=True)
            assert sum(ours != theirs for ours, theirs in pairs) <= 1
            batch.positions += 1

    @pytest.mark.parametrize("count", [1, 16, 256])
    def test_in_a_graph(self, count: int) -> None:
        """Recorded once, replayed on other logits and other rows."""
        draw = make_draw(count, QWEN_SIZE)
        wishes = [WISHES[i % len(WISHES)] for i in range(count)]
        logits = torch.randn(count, QWEN_SIZE, device=DEVICE)
        batch = Batch(wishes, logits.bfloat16())
        batch.draw(draw=draw)
        graph = torch.cuda.CUDAGraph()
        tables = batch.rows, batch.tables.floats, batch.tables.ints
        written = batch.token_ids, batch.last_token_ids
        with torch.cuda.graph(graph):
            draw(batch.logits, batch.positions, *tables, *written, True)
        for _ in range(3):
            batch.logits.normal_().mul_(4)
            batch.positions += 1
            graph.replay()
            pairs = zip(batch.token_ids.tolist(), batch.expect(), strict=True)
            assert sum(ours != theirs for ours, theirs in pairs) <= 1
