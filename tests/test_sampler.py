"""The sampler against a brute-force reference in plain Python, and against statistics."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import logits_process

from folo_lib import (
    bundled_model_path,
    load_model,
    load_tokenizer,
    sampler,
    sampling_rows,
)
from folo_lib.sampler import (
    Sampler,
    SamplingMetadata,
    SamplingRows,
    apply_filters,
    apply_min_p_filtering,
    apply_penalties,
    apply_top_k_filtering,
    apply_top_k_top_p,
    apply_top_p_filtering,
    gather_logprobs,
    gumbel_noise,
    make_jumps,
    mask_early_stops,
    mix_bits,
)
from folo_lib.sampling_params import SamplingParams

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GREEDY = SamplingParams(temperature=0)
f32 = np.float32


def make_metadata(
    params: Sequence[SamplingParams],
    vocab_size: int,
    seeds: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    stop_token_ids: Sequence[Sequence[int]] | None = None,
) -> SamplingMetadata:
    rows = range(len(params))
    return SamplingMetadata.from_params(
        params,
        seeds=[100 + i for i in rows] if seeds is None else seeds,
        sample_indices=[i % 3 for i in rows],
        num_prompt_tokens=[5 + i for i in rows] if lengths is None else lengths,
        stop_token_ids=[[] for _ in rows] if stop_token_ids is None else stop_token_ids,
        vocab_size=vocab_size,
        device="cpu",
    )


def one_row(metadata: SamplingMetadata, row: int) -> SamplingMetadata:
    """The row cut out of a batch, with all columns that the batch has."""
    tensors = {k: v for k, v in vars(metadata).items() if isinstance(v, Tensor)}
    return dataclasses.replace(
        metadata, **{k: v[row : row + 1] for k, v in tensors.items()}
    )


def random_logits(rng: random.Random, vocab_size: int) -> list[float]:
    """Of all kinds: spread, tied, equal, with -inf, with one survivor."""
    kind = rng.choice(["normal", "steep", "tied", "equal", "holes", "one"])
    row = [rng.gauss(0, 8 if kind == "steep" else 2) for _ in range(vocab_size)]
    if kind == "tied":
        row = [round(x) / 2 for x in row]
    if kind == "equal":
        row = [row[0]] * vocab_size
    if kind == "holes":
        row = [x if rng.random() < 0.6 else -INF for x in row]
        row[rng.randrange(vocab_size)] = 1.0
    if kind == "one":
        row = [-INF] * vocab_size
        row[rng.randrange(vocab_size)] = rng.gauss(0, 2)
    return row


def random_params(rng: random.Random, greedy: float = 0.1) -> SamplingParams:
    def maybe(off: float, value: float) -> float:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        temperature=0 if rng.random() < greedy else rng.choice([0.01, 0.5, 0.7, 1, 2]),
        min_p=maybe(0, rng.choice([0.02, 0.1, 0.5, 1.0])),
        top_k=int(maybe(rng.choice([0, -1]), rng.choice([1, 2, 3, 7, 20, 10**6]))),
        top_p=maybe(1, rng.choice([1e-6, 0.1, 0.5, 0.8, 0.9, 0.99])),
        repetition_penalty=maybe(1, rng.choice([0.5, 1.2, 2.0])),
        frequency_penalty=maybe(0, rng.choice([-2.0, 0.5, 1.25])),
        presence_penalty=maybe(0, rng.choice([-0.75, 0.5, 2.0])),
    )


class BorderlineError(Exception):
    """The reference cannot say on which side of a threshold rounding puts a token."""


class Reference:
    """What a reader of the design would write: loops over lists of numbers."""

    @staticmethod
    def penalties(
        row: list[float], p: SamplingParams, prompt: set[int], output: list[int]
    ) -> list[float]:
        result = []
        for token, logit in enumerate(row):
            x = f32(logit)
            if token in prompt or token in output:
                penalty = f32(p.repetition_penalty)
                x = x / penalty if x > 0 else x * penalty
            x = x - f32(p.frequency_penalty) * f32(output.count(token))
            if token in output:
                x = x - f32(p.presence_penalty)
            result.append(float(x))
        return result

    @staticmethod
    def min_p(row: list[float], min_p: float) -> set[int]:
        best, kept = max(row), set()
        for token, logit in enumerate(row):
            if logit == -INF:
                continue
            ratio = math.exp(logit - best)
            if logit != best and abs(ratio - min_p) < 1e-5 * min_p:
                raise BorderlineError
            if ratio >= min_p:
                kept.add(token)
        return kept

    @staticmethod
    def top_k(row: list[float], k: int) -> set[int]:
        if k <= 0 or k >= len(row):
            return set(range(len(row)))
        last = sorted(row, reverse=True)[k - 1]
        return {token for token, logit in enumerate(row) if logit >= last}

    @staticmethod
    def top_p(row: list[float], p: float) -> set[int]:
        if p == 1:
            return set(range(len(row)))
        probs = Reference.softmax(row)
        kept, total = set(), 0.0
        for token in sorted(range(len(row)), key=lambda t: (-row[t], t)):
            kept.add(token)
            total += probs[token]
            if abs(total - p) < 2e-6:
                raise BorderlineError
            if total > p:
                break
        return kept

    @staticmethod
    def softmax(row: list[float]) -> list[float]:
        weights = [math.exp(x - max(row)) for x in row]
        return [w / math.fsum(weights) for w in weights]

    @staticmethod
    def filters(row: list[float], p: SamplingParams) -> list[float]:
        if p.temperature > 0:
            row = [float(f32(x) / f32(p.temperature)) for x in row]
        for name in ("min_p", "top_k", "top_p"):
            kept = getattr(Reference, name)(row, getattr(p, name))
            row = [x if token in kept else -INF for token, x in enumerate(row)]
        return row


def fill_tables(
    metadata: SamplingMetadata, prompts: list[set[int]], outputs: list[list[int]]
) -> None:
    if metadata.prompt_mask is None or metadata.output_counts is None:
        return
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for token in prompt:
            metadata.prompt_mask[row, token] = True
        for token in output:
            metadata.output_counts[row, token] += 1


def random_batches(
    seed: int, count: int, greedy: float = 0.1
) -> Iterator[
    tuple[
        Tensor, list[SamplingParams], SamplingMetadata, list[set[int]], list[list[int]]
    ]
]:
    rng = random.Random(seed)
    for _ in range(count):
        size, vocab_size = rng.randint(1, 6), rng.choice([1, 2, 3, 8, 40, 257])
        rows = [random_logits(rng, vocab_size) for _ in range(size)]
        logits = torch.tensor(rows).to(rng.choice([torch.float32, torch.bfloat16]))
        params = [random_params(rng, greedy) for _ in range(size)]
        prompts = [
            {rng.randrange(vocab_size) for _ in range(rng.randint(0, 5))}
            for _ in params
        ]
        outputs = [
            [rng.randrange(vocab_size) for _ in range(rng.randint(0, 9))]
            for _ in params
        ]
        metadata = make_metadata(params, vocab_size)
        fill_tables(metadata, prompts, outputs)
        yield logits, params, metadata, prompts, outputs


class TestAgainstBruteForce:
    def test_the_final_distribution(self) -> None:
        """Penalties, temperature and filters at once, rows of all kinds together."""
        compared = 0
        for logits, params, metadata, prompts, outputs in random_batches(1, 340, 0):
            scores = Sampler.apply_penalties(logits, metadata)
            ours = apply_filters(scores, metadata)
            assert ours.dtype == torch.float32
            for row, p in enumerate(params):
                if p.top_k == 1:  # greedy, so that no filter runs
                    continue
                expected = Reference.penalties(
                    logits[row].tolist(), p, prompts[row], outputs[row]
                )
                # The penalties may round once more or less; the filters see ours.
                torch.testing.assert_close(
                    scores[row].float(), torch.tensor(expected), rtol=1e-6, atol=1e-6
                )
                try:
                    expected = Reference.filters(scores[row].tolist(), p)
                except BorderlineError:
                    continue
                kept = [x > -INF for x in expected]
                assert ours[row].isfinite().tolist() == kept, p
                torch.testing.assert_close(
                    ours[row].softmax(-1),
                    torch.tensor(Reference.softmax(expected)),
                    rtol=1e-4,
                    atol=1e-6,
                )
                compared += 1
        assert compared >= 700

    def test_draws_stay_within(self) -> None:
        for logits, params, metadata, *_ in random_batches(2, 150, 0.3):
            scores = Sampler.apply_penalties(logits, metadata)
            allowed = apply_filters(scores, metadata)
            token_ids, logprobs = Sampler().sample(logits, metadata)
            assert logprobs is None
            assert token_ids.shape == (len(params),)
            assert token_ids.dtype == torch.int64
            for row, token in enumerate(token_ids.tolist()):
                assert allowed[row, token] > -INF
                if params[row].temperature == 0 or params[row].top_k == 1:
                    assert token == scores[row].argmax()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["min_p", "top_k", "top_p"])
    def test_each_filter_alone(self, name: str, dtype: torch.dtype) -> None:
        rng, compared = random.Random(3), 0
        function: Any = getattr(sampler, f"apply_{name}_filtering")
        values = {
            "min_p": [0.0, 1e-9, 0.1, 0.5, 1.0],
            "top_k": [-1, 0, 1, 2, 5, 40, 41, 1000],
            "top_p": [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0],
        }[name]
        for _ in range(150):
            rows = [random_logits(rng, 40) for _ in range(3)]
            logits = torch.tensor(rows).to(dtype)
            before = logits.clone()
            chosen = [rng.choice(values) for _ in rows]
            out = function(logits, torch.tensor(chosen))
            assert out.dtype == dtype
            assert torch.equal(logits, before)
            for row, value in enumerate(chosen):
                alone = function(logits[row : row + 1], value)
                assert torch.equal(alone[0], out[row])
                try:
                    kept = getattr(Reference, name)(logits[row].tolist(), value)
                except BorderlineError:
                    continue
                expected = [
                    x if token in kept else -INF
                    for token, x in enumerate(logits[row].tolist())
                ]
                assert out[row].tolist() == expected
                compared += 1
        assert compared > 300

    @pytest.mark.parametrize("ties", [0, 1, 30])
    def test_the_shortcut_equals_two_filters(self, ties: int) -> None:
        """topk of the largest k, and top_p after it, against full sorts."""
        rng = random.Random(4)
        for _ in range(100):
            rows = [random_logits(rng, 64) for _ in range(4)]
            for row in rows:
                row[20 : 20 + ties] = [row[20]] * ties
            logits = torch.tensor(rows)
            top_k = torch.tensor([rng.choice([1, 2, 5, 9]) for _ in rows])
            top_p = torch.tensor(
                [rng.choice([0.01, 0.3, 0.6, 0.95, 1.0]) for _ in rows],
                dtype=torch.float64,
            )
            top_k[0], top_p[0] = rng.choice([0, 9]), 1.0
            full = apply_top_k_filtering(logits, top_k)
            expected = apply_top_p_filtering(full, top_p)
            for largest in (9, 12, 63, 64):
                assert torch.equal(apply_top_k_top_p(logits, top_k, largest), full)
                short = apply_top_k_top_p(logits, top_k, largest, top_p)
                assert torch.equal(short, expected)

    def test_written_out(self) -> None:
        logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
        hidden = -INF
        for p, kept in [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)]:
            out = apply_top_p_filtering(logits, p)
            expected = logits.masked_fill(torch.arange(4) >= kept, hidden)
            assert torch.equal(out, expected)
        tied = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]])
        for k, kept_ids in [(1, [1, 3]), (2, [1, 3]), (3, [1, 2, 3, 4]), (5, range(5))]:
            out = apply_top_k_filtering(tied, k)[0]
            assert out.isfinite().nonzero().flatten().tolist() == list(kept_ids)
        # Of equals top_p takes the lower ids.
        out = apply_top_p_filtering(torch.zeros(1, 10), 0.31)[0]
        assert out.isfinite().tolist() == [True] * 4 + [False] * 6
        out = apply_min_p_filtering(logits, 0.3)[0]
        assert out.isfinite().tolist() == [True, True, False, False]

    def test_a_long_tail_is_counted(self) -> None:
        """Half of the mass is in 100,000 tokens that are a millionth each."""
        vocab_size = 100_001
        logits = torch.full((1, vocab_size), math.log(0.5 / 100_000))
        logits[0, 77] = math.log(0.5)
        kept = apply_top_p_filtering(logits, 0.75).isfinite().sum().item()
        assert abs(kept - 50_001) < 5

    @pytest.mark.parametrize(
        ("probs", "p", "count"),
        [
            ([0.5, 0.3, 0.2], 0.8, 2),
            ([0.4, 0.3, 0.2, 0.1], 0.9, 3),
            ([0.04] * 25, 0.6, 15),
        ],
    )
    def test_a_sum_that_meets_top_p(
        self, probs: list[float], p: float, count: int
    ) -> None:
        logits = torch.tensor([probs]).log()
        for top_p in (p, torch.tensor([p], dtype=torch.float64), torch.tensor([p])):
            kept = apply_top_p_filtering(logits, top_p)[0].isfinite()
            assert kept.nonzero().flatten().tolist() == list(range(count))

    @pytest.mark.parametrize("shift", [0.0, 10.0, -30.0])
    @pytest.mark.parametrize("parts", [10, 20])
    def test_every_round_distribution(self, parts: int, shift: float) -> None:
        """Of 2 to 6 tokens, in tenths and twentieths, against exact fractions."""
        rng, compared = random.Random(11), 0
        for size in range(2, 7):
            tails = itertools.combinations(range(1, parts), size - 1)
            counts = [
                [b - a for a, b in itertools.pairwise((0, *cut, parts))]
                for cut in tails
            ]
            shares = {tuple(sorted(c)): c for c in counts}  # one order of each
            rows = [rng.sample(c, size) for c in shares.values()]
            logits = (torch.tensor(rows) / parts).double().log().float() + shift
            for twentieths in range(1, 20):
                p = Fraction(twentieths, 20)
                kept = apply_top_p_filtering(logits, twentieths / 20).isfinite()
                column_p = torch.full((len(rows),), twentieths / 20)
                top_k = torch.full((len(rows),), size)
                short = apply_top_k_top_p(logits, top_k, size, column_p)
                assert torch.equal(short.isfinite(), kept)
                for row, ours in zip(rows, kept.tolist(), strict=True):
                    total, expected = Fraction(0), [False] * size
                    for token in sorted(range(size), key=lambda t: (-row[t], t)):
                        if total < p:
                            expected[token] = True
                        total += Fraction(row[token], parts)
                    assert ours == expected, (row, p)
                    compared += 1
        assert compared >= 600

    @pytest.mark.parametrize("vocab_size", [32_000, 151_936])
    @pytest.mark.parametrize("deviation", [0.0, 1.0, 5.0, 10.0])
    def test_large_vocabularies(self, vocab_size: int, deviation: float) -> None:
        """Against float64, to a thousandth of the count."""
        values = np.random.default_rng(0).standard_normal(vocab_size) * deviation
        logits = torch.from_numpy(values.astype(np.float32))[None]
        ordered = np.sort(logits[0].double().numpy())
        tail = np.exp(ordered - ordered[-1]).cumsum()  # of the unlikely ones
        for p in (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999, 1 - 1e-7):
            expected = vocab_size - int((tail <= (1 - p) * tail[-1]).sum())
            for top_p in (p, torch.tensor([p], dtype=torch.float64)):
                kept = int(apply_top_p_filtering(logits, top_p).isfinite().sum())
                assert abs(kept - expected) <= 1e-3 * expected, p

    def test_the_batch_asks_for_top_p_with_all_its_digits(self) -> None:
        values = np.random.default_rng(0).standard_normal((1, 151_936)) * 5
        logits = torch.from_numpy(values.astype(np.float32))
        expected = apply_top_p_filtering(logits, 0.99999).isfinite()
        metadata = make_metadata([SamplingParams(top_p=0.99999)], 151_936)
        assert torch.equal(apply_filters(logits, metadata).isfinite(), expected)

    def test_exactly_min_p_times_as_likely_stays(self) -> None:
        for best, other in itertools.product(range(1, 20), repeat=2):
            if other > best or other + best > 20:
                continue
            probs = torch.tensor([[best, other, 1e-9]], dtype=torch.float64) / 20
            for shift in (0, 4):
                logits = (probs.log() + shift).float()
                for step, edge in ((1.0, 2), (1.0001, 1 + (best == other))):
                    min_p = min(1.0, other / best * step)
                    kept = apply_min_p_filtering(logits, min_p).isfinite().sum()
                    assert kept == edge, (best, other, shift)

    def test_filters_equal_hugging_face(self) -> None:
        logits = 3 * torch.randn(6, 500)
        for k in (1, 10, 499):
            warper = logits_process.TopKLogitsWarper(k)
            assert torch.equal(apply_top_k_filtering(logits, k), warper(None, logits))
        for p in (0.05, 0.5, 0.95):
            warp_p = logits_process.TopPLogitsWarper(p)
            assert torch.equal(apply_top_p_filtering(logits, p), warp_p(None, logits))
            warp_m = logits_process.MinPLogitsWarper(p)
            assert torch.equal(apply_min_p_filtering(logits, p), warp_m(None, logits))


class TestPenalties:
    def apply(
        self,
        row: list[float],
        prompt: set[int],
        output: list[int],
        dtype: torch.dtype = torch.float32,
        **penalties: float,
    ) -> list[float]:
        metadata = make_metadata([SamplingParams(**penalties)], len(row))  # type: ignore[arg-type]
        fill_tables(metadata, [prompt], [output])
        logits = torch.tensor([row], dtype=dtype)
        out: list[float] = Sampler.apply_penalties(logits, metadata)[0].tolist()
        return out

    def test_repetition(self) -> None:
        row = [4.0, -4.0, 4.0, -4.0, 4.0, -4.0, 0.0]
        out = self.apply(row, {0, 1, 6}, [2, 2, 3], repetition_penalty=2)
        assert out == [2, -8, 2, -8, 4, -4, 0]
        out = self.apply(row, {0, 1, 6}, [2, 2, 3], repetition_penalty=0.5)
        assert out == [8, -2, 8, -2, 4, -4, 0]

    def test_frequency_counts_the_output_only(self) -> None:
        out = self.apply([1.0] * 4, {0, 1}, [1, 2, 2, 2], frequency_penalty=0.5)
        assert out == [1, 0.5, -0.5, 1]

    def test_presence_does_not_count(self) -> None:
        out = self.apply([1.0] * 4, {0, 1}, [1, 2, 2, 2], presence_penalty=0.5)
        assert out == [1, 0.5, 0.5, 1]

    def test_negative_ones_reward(self) -> None:
        out = self.apply([1.0] * 3, set(), [1, 2, 2], frequency_penalty=-1)
        assert out == [1, 2, 3]
        out = self.apply([1.0] * 3, {0}, [1, 2, 2], presence_penalty=-2)
        assert out == [1, 3, 3]

    def test_all_three_repetition_first(self) -> None:
        out = self.apply(
            [4.0, -4.0, 4.0],
            {0},
            [1, 2, 2],
            repetition_penalty=2,
            frequency_penalty=0.5,
            presence_penalty=1,
        )
        assert out == [2, -8 - 0.5 - 1, 2 - 1 - 1]

    def test_hidden_tokens_stay_hidden(self) -> None:
        out = self.apply(
            [-INF, 1.0],
            {0},
            [0, 0],
            repetition_penalty=0.5,
            frequency_penalty=-2,
            presence_penalty=-2,
        )
        assert out == [-INF, 1]

    def test_bfloat16_is_penalised_in_float32(self) -> None:
        out = self.apply([1.0], set(), [0], torch.bfloat16, presence_penalty=1 / 1024)
        assert out == [1 - 1 / 1024]

    def test_repetition_equals_hugging_face(self) -> None:
        for penalty in (0.3, 1.0, 1.1, 5.0):
            logits, ids = 5 * torch.randn(3, 50), torch.randint(0, 50, (3, 30))
            processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
            params = [SamplingParams(repetition_penalty=penalty)] * 3
            metadata = make_metadata(params, 50)
            # The first 20 are the prompt.
            fill_tables(
                metadata, [set(r[:20]) for r in ids.tolist()], ids[:, 20:].tolist()
            )
            ours = Sampler.apply_penalties(logits, metadata)
            assert torch.equal(ours, processor(ids, logits))

    def test_frequency_and_presence_as_in_vllm(self) -> None:
        logits, counts = torch.randn(4, 30), torch.randint(0, 4, (4, 30))
        frequency, presence = torch.randn(4), torch.randn(4)
        expected = logits.clone()
        for row in range(4):
            for token in range(30):
                if count := counts[row, token]:
                    expected[row, token] -= frequency[row] * count
                    expected[row, token] -= presence[row]
        none = torch.zeros(4, 30, dtype=torch.bool)
        ours = apply_penalties(
            logits, none, counts.int(), torch.ones(4), frequency, presence
        )
        assert torch.equal(ours, expected)

    def test_greedy_too(self) -> None:
        metadata = make_metadata([SamplingParams(temperature=0, presence_penalty=1)], 3)
        fill_tables(metadata, [set()], [[2]])
        token_ids, _ = Sampler().sample(torch.tensor([[1.0, 1.5, 2.0]]), metadata)
        assert token_ids.tolist() == [1]


class TestMinTokens:
    def sample(self, positions: list[int], params: SamplingParams) -> list[int]:
        size = len(positions)
        metadata = make_metadata(
            [params] * size, 4, lengths=[10] * size, stop_token_ids=[[1, 3]] * size
        )
        metadata.positions.copy_(torch.tensor(positions))
        logits = torch.tensor([[0.0, 2.0, 1.0, 3.0]]).expand(size, 4)
        ids: list[int] = Sampler().sample(logits, metadata)[0].tolist()
        return ids

    def test_until_then_and_not_longer(self) -> None:
        params = SamplingParams(temperature=0, min_tokens=3)
        # Output tokens 1, 2 and 3 take the positions 10, 11 and 12.
        assert self.sample([10, 11, 12, 13, 14], params) == [2, 2, 2, 3, 3]

    def test_sampled_rows_too(self) -> None:
        params = SamplingParams(temperature=2, min_tokens=20, max_tokens=100)
        drawn = self.sample(list(range(10, 110)), params)
        assert not {1, 3} & set(drawn[:20])
        assert {1, 3} <= set(drawn[20:])

    def test_off(self) -> None:
        metadata = make_metadata([GREEDY], 4, stop_token_ids=[[1, 3]])
        assert metadata.stop_token_mask is None
        assert metadata.min_positions is None

    def test_each_row_has_its_own(self) -> None:
        params = [SamplingParams(min_tokens=m) for m in (0, 2, 5)]
        metadata = make_metadata(
            params, 6, lengths=[7, 7, 7], stop_token_ids=[[1], [2, 5], [0, 99]]
        )
        metadata.positions.fill_(9)
        out = mask_early_stops(torch.zeros(3, 6), metadata)
        hidden = [row.isinf().nonzero().flatten().tolist() for row in out]
        assert hidden == [[], [], [0]]
        metadata.positions.fill_(8)
        out = mask_early_stops(torch.zeros(3, 6), metadata)
        hidden = [row.isinf().nonzero().flatten().tolist() for row in out]
        assert hidden == [[], [2, 5], [0]]

    def test_min_meets_max(self) -> None:
        """The last allowed token may not be EOS, and the text ends for its length."""
        params = SamplingParams(temperature=0, min_tokens=2, max_tokens=2)
        output = self.sample([10], params) + self.sample([11], params)
        assert output == [2, 2]
        assert Sampler.check_stop_conditions(output, params, 3, [3], 2) == (
            "length",
            None,
        )

    def test_the_log_probability_is_of_the_raw_logits(self) -> None:
        params = SamplingParams(temperature=0, min_tokens=3, logprobs=1)
        metadata = make_metadata([params], 4, lengths=[10], stop_token_ids=[[3]])
        logits = torch.tensor([[0.0, 2.0, 1.0, 3.0]])
        token_ids, logprobs = Sampler().sample(logits, metadata)
        assert logprobs is not None
        assert token_ids.tolist() == [1]
        assert logprobs.token_ids.tolist() == [[1, 3]]
        assert logprobs.ranks.tolist() == [2]
        torch.testing.assert_close(
            logprobs.logprobs, logits.log_softmax(-1)[:, [1, 3]], rtol=0, atol=0
        )


class TestStopConditions:
    EOS, OTHER_EOS = 90, 91

    def check(
        self,
        output: list[int],
        max_tokens: int = 10,
        eos: int | None = 90,
        **kwargs: Any,
    ) -> tuple[str, int | None] | None:
        params = SamplingParams(max_tokens=None, **kwargs)
        return Sampler.check_stop_conditions(
            output, params, eos, [self.EOS, self.OTHER_EOS], max_tokens
        )

    def test_goes_on(self) -> None:
        assert self.check([1, 2, 3]) is None
        assert self.check([1, 2, 3], stop_token_ids=[4]) is None

    def test_only_the_last_token_counts(self) -> None:
        assert self.check([90, 91, 5, 1], stop_token_ids=[5]) is None

    def test_eos(self) -> None:
        assert self.check([1, 90]) == ("stop", None)

    def test_a_second_eos_names_itself(self) -> None:
        assert self.check([1, 91]) == ("stop", 91)

    def test_without_a_tokenizer_every_eos_names_itself(self) -> None:
        assert self.check([1, 90], eos=None) == ("stop", 90)

    def test_stop_token_id(self) -> None:
        assert self.check([1, 5], stop_token_ids=[4, 5]) == ("stop", 5)

    def test_eos_that_is_a_stop_id_too(self) -> None:
        assert self.check([90], stop_token_ids=[90]) == ("stop", None)

    def test_ignore_eos(self) -> None:
        for eos in (90, 91):
            assert self.check([1, eos], ignore_eos=True) is None
            assert self.check([1, eos], 2, ignore_eos=True) == ("length", None)
            assert self.check([1, eos], ignore_eos=True, stop_token_ids=[eos]) == (
                "stop",
                eos,
            )

    def test_stop_ids_hold_under_ignore_eos(self) -> None:
        assert self.check([5], ignore_eos=True, stop_token_ids=[5]) == ("stop", 5)

    def test_length(self) -> None:
        assert self.check([1, 2], 3) is None
        assert self.check([1, 2, 3], 3) == ("length", None)
        assert self.check([1], 1) == ("length", None)

    def test_stopping_on_the_last_allowed_token_reads_stop(self) -> None:
        assert self.check([1, 2, 90], 3) == ("stop", None)
        assert self.check([1, 2, 91], 3) == ("stop", 91)
        assert self.check([1, 2, 5], 3, stop_token_ids=[5]) == ("stop", 5)

    def test_not_before_min_tokens(self) -> None:
        for token in (90, 91, 5):
            kwargs: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": [5]}
            assert self.check([token], **kwargs) is None
            assert self.check([1, token], **kwargs) is None
            verdict = self.check([1, 2, token], **kwargs)
            assert verdict is not None
            assert verdict[0] == "stop"


class TestLogprobs:
    def test_map_changes_each_tensor(self) -> None:
        logits, ids = torch.randn(3, 9), torch.tensor([4, 0, 8])
        out = gather_logprobs(logits, ids, 2)
        last = out.map(lambda tensor: tensor[-1:])
        again = gather_logprobs(logits[-1:], ids[-1:], 2)
        assert type(last) is type(out)
        assert set(vars(out)) == {"token_ids", "logprobs", "ranks"}
        for name, value in vars(again).items():
            assert torch.equal(getattr(last, name), value), name
            assert getattr(out, name).shape[0] == 3

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_brute_force(self, dtype: torch.dtype) -> None:
        rng = random.Random(5)
        for _ in range(60):
            size, vocab_size = rng.randint(1, 4), rng.choice([1, 2, 7, 60])
            rows = [random_logits(rng, vocab_size) for _ in range(size)]
            logits = torch.tensor(rows).to(dtype)
            token_ids = torch.tensor([rng.randrange(vocab_size) for _ in range(size)])
            num_logprobs = rng.choice([0, 1, vocab_size // 2, vocab_size])
            out = gather_logprobs(logits, token_ids, num_logprobs)
            assert out.logprobs.dtype == torch.float32
            exact = logits.float().log_softmax(-1)
            for row in range(size):
                probs = Reference.softmax(logits[row].tolist())
                expected = [math.log(p) if p else -INF for p in probs]
                torch.testing.assert_close(
                    exact[row], torch.tensor(expected), rtol=1e-5, atol=1e-5
                )
                values = exact[row].tolist()
                order = sorted(range(vocab_size), key=lambda t: (-values[t], t))
                chosen = token_ids[row].item()
                ids = [chosen, *order[:num_logprobs]]
                assert out.token_ids[row].tolist() == ids
                assert out.logprobs[row].tolist() == [values[int(i)] for i in ids]
                rank = 1 + sum(v > values[int(chosen)] for v in values)
                assert out.ranks[row].item() == rank

    def test_of_the_raw_logits(self) -> None:
        params = SamplingParams(
            temperature=0.5, top_k=1, repetition_penalty=2, logprobs=2
        )
        metadata = make_metadata([params], 4)
        fill_tables(metadata, [{3}], [[]])
        logits = torch.tensor([[1.0, 2.5, 0.0, 3.0]])
        token_ids, out = Sampler().sample(logits, metadata)
        assert out is not None
        assert token_ids.tolist() == [1]
        assert out.token_ids.tolist() == [[1, 3, 1]]
        assert out.ranks.tolist() == [2]
        expected = logits.log_softmax(-1)[:, [1, 3, 1]]
        assert torch.equal(out.logprobs, expected)

    def test_how_many(self) -> None:
        def largest(*wanted: int | None) -> int | None:
            params = [SamplingParams(logprobs=k) for k in wanted]
            return make_metadata(params, 50).num_logprobs

        assert largest(None, None) is None
        assert largest(None, 0) == 0
        assert largest(3, None, 5) == 5
        assert largest(3, -1) == 50
        assert largest(10**9) == 50

    def test_more_for_a_neighbour_changes_nothing(self) -> None:
        logits = torch.randn(3, 90).round()
        ids = torch.tensor([1, 2, 3])
        few, many = (gather_logprobs(logits, ids, k) for k in (4, 90))
        assert torch.equal(few.token_ids, many.token_ids[:, :5])
        assert torch.equal(few.logprobs, many.logprobs[:, :5])


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Chi-square: how often chance alone strays so far; rare tokens are pooled."""
    expected = probs.double() * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, chi_square / 2))


def split_mix(x: int) -> int:
    """The finaliser with Python's unbounded integers."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def column(value: int, size: int) -> Tensor:
    return torch.full((size,), value)


class TestNoise:
    def test_mix_bits_equals_python(self) -> None:
        rng = random.Random(6)
        xs = [rng.randrange(-(2**63), 2**63) for _ in range(1000)]
        xs += [0, 1, -1, 2**63 - 1, -(2**63)]
        ours = mix_bits(torch.tensor(xs))
        assert [x % 2**64 for x in ours.tolist()] == [split_mix(x) for x in xs]
        for shape in [(1005, 1), (5, 201), (3, 67, 5)]:
            assert torch.equal(mix_bits(torch.tensor(xs).view(shape)).flatten(), ours)

    def test_mix_bits_is_the_generator_of_the_paper(self) -> None:
        """The first numbers of SplitMix64 from seed 1234567, as published."""
        gamma = 0x9E3779B97F4A7C15
        states = [(1234567 + i * gamma) % 2**64 for i in range(1, 4)]
        signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
        assert [x % 2**64 for x in mix_bits(signed).tolist()] == [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
        ]

    def test_equals_python(self) -> None:
        rng, vocab_size = random.Random(7), 23
        rows = [
            (rng.randrange(-(2**63), 2**63), rng.randrange(8), rng.randrange(2**20))
            for _ in range(9)
        ]
        ours = gumbel_noise(*torch.tensor(rows).T, vocab_size)
        for (seed, index, position), row in zip(rows, ours.tolist(), strict=True):
            state = split_mix(
                seed * 0xD1342543DE82EF95
                + index * 0xAEF17502108EF2D9
                + position * 0xF1357AEA2E62A9C5
            )
            for token, noise in enumerate(row):
                bits = split_mix(state + (token + 1) * 0x9E3779B97F4A7C15)
                v = (bits % 2**63) / 2**63
                assert noise == pytest.approx(-math.log(-math.log1p(-v)), abs=1e-5)

    def test_committed_values(self) -> None:
        """Seeds keep their meaning from release to release."""
        noise = gumbel_noise(column(42, 1), column(0, 1), column(7, 1), 4)[0]
        expected = torch.tensor([-0.3460636, -1.0081596, -1.1241522, 0.3900314])
        torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-6)

    def test_any_batch_shape_gives_the_same_bits(self) -> None:
        size, vocab_size = 37, 1013
        rng = random.Random(8)
        seeds = torch.tensor([rng.randrange(-(2**63), 2**63) for _ in range(size)])
        indices, positions = torch.arange(size) % 4, torch.arange(size) * 31
        whole = gumbel_noise(seeds, indices, positions, vocab_size)
        assert whole.shape == (size, vocab_size)
        assert whole.dtype == torch.float32
        for rows in [[0], [36], [5, 6], [6, 5], list(range(36, -1, -1)), [3] * 11]:
            part = gumbel_noise(seeds[rows], indices[rows], positions[rows], vocab_size)
            assert torch.equal(part, whole[rows])
        # Nor does a token's noise depend on the size of the vocabulary.
        short = gumbel_noise(seeds, indices, positions, 100)
        assert torch.equal(short, whole[:, :100])

    @pytest.mark.parametrize("vocab_size", [1, 2, 1013, 151_936])
    def test_jumps_at_hand_change_no_bit(self, vocab_size: int) -> None:
        rng = random.Random(vocab_size)
        seeds = torch.tensor([rng.randrange(-(2**63), 2**63) for _ in range(3)])
        columns = seeds, torch.arange(3), 31 * torch.arange(3)
        jumps = make_jumps(vocab_size, "cpu")
        assert (jumps.shape, jumps.dtype) == ((vocab_size,), torch.int64)
        before = jumps.clone()
        made = gumbel_noise(*columns, vocab_size)
        for _ in range(2):  # nor does a draw change the jumps
            assert torch.equal(gumbel_noise(*columns, vocab_size, jumps), made)
            one = gumbel_noise(*(x[:1] for x in columns), vocab_size, jumps)
            assert torch.equal(one, made[:1])
        assert torch.equal(jumps, before)
        other = gumbel_noise(*columns, vocab_size, jumps + 1)  # they are what is used
        assert not torch.equal(other, made)

    @pytest.mark.parametrize("walking", [0, 1, 2])
    def test_follows_the_gumbel_distribution(self, walking: int) -> None:
        columns = [column(3, 500), column(1, 500), column(40, 500)]
        columns[walking] = torch.arange(500)
        noise = gumbel_noise(*columns, 1000).double()
        uniform = (-(-noise).exp()).exp()
        assert uniform.min() > 0
        assert uniform.max() < 1
        bins = (uniform * 1000).long().flatten().bincount(minlength=1000)
        assert p_value(bins, torch.full((1000,), 1e-3)) > 1e-4
        # Kolmogorov and Smirnov: the largest distance, over every row and every token.
        for values in (uniform, uniform.T.contiguous()):
            count = values.shape[1]
            steps = (torch.arange(count) + 0.5) / count
            distance = (values.sort(dim=1).values - steps).abs().amax(dim=1)
            assert distance.max() < 2.5 / count**0.5  # p = 7e-6 for each

    def test_neighbours_are_unrelated(self) -> None:
        size, vocab_size = 300, 1000
        base = [torch.arange(size) % 20, torch.arange(size) // 20, column(50, size)]

        def uniform(seeds: int, indices: int, positions: int) -> Tensor:
            shifts = (seeds, indices, positions)
            columns = [c + s for c, s in zip(base, shifts, strict=True)]
            noise = gumbel_noise(*columns, vocab_size)
            return (-(-noise.double()).exp()).exp() - 0.5

        bound = 5 / (size * vocab_size) ** 0.5  # five standard deviations
        ours = uniform(0, 0, 0)
        shifts = [
            (0, 0, 1),
            (0, 0, 2),
            (40, 0, 0),
            (0, 40, 0),
            (100, 0, -1),
            (1, 100, -1),
            (2**32, 0, 0),
            (2**62, 0, 0),
        ]
        for shift in shifts:
            theirs = uniform(*shift)
            for roll in (0, 1, -1, 2):
                correlation = 12 * (ours * theirs.roll(roll, dims=1)).mean()
                assert abs(correlation) < bound, (shift, roll)
        for roll in (1, 2, 3, 64, 256):
            assert 12 * (ours * ours.roll(roll, dims=1)).mean().abs() < bound
        for roll in (1, 2, 20, 40):
            assert 12 * (ours * ours.roll(roll, dims=0)).mean().abs() < bound

    @pytest.mark.parametrize("pair", ["tokens", "positions", "seeds", "indices"])
    def test_pairs_fill_the_square(self, pair: str) -> None:
        """Chi-square over 16 x 16 cells sees dependence that correlation does not."""
        size = 400
        columns = {"seeds": column(1, size), "indices": column(0, size)}
        columns["positions"] = column(9, size)
        walking = "positions" if pair == "tokens" else pair
        columns[walking] = torch.arange(size)
        noise = gumbel_noise(
            columns["seeds"], columns["indices"], columns["positions"], 1000
        )
        cell = ((-(-noise.double()).exp()).exp() * 16).long()
        if pair == "tokens":
            first, second = cell[:, 0::2], cell[:, 1::2]
        else:
            first, second = cell[0::2], cell[1::2]
        counts = (first * 16 + second).flatten().bincount(minlength=256)
        assert p_value(counts, torch.full((256,), 1 / 256)) > 1e-4

    def test_no_two_draws_share_their_noise(self) -> None:
        grid = torch.cartesian_prod(
            torch.arange(-8, 24), torch.arange(8), torch.arange(64)
        )
        noise = gumbel_noise(*grid.T, 2)
        assert len(noise.unique(dim=0)) == len(grid)

    def test_the_far_tail_is_not_a_staircase(self) -> None:
        noise = gumbel_noise(torch.arange(400), column(0, 400), column(0, 400), 5000)
        tail = noise[noise > 11].double()
        expected = noise.numel() * -math.expm1(-math.exp(-11))
        assert abs(len(tail) - expected) < 5 * expected**0.5
        # From 24-bit uniform numbers these would all be whole.
        steps = 2**24 * (-tail).exp()
        assert ((steps - steps.round()).abs() > 0.01).float().mean() > 0.9

    @pytest.mark.parametrize("bits", [0, -1, 1, 2**63 - 1, -(2**63), 2**62])
    def test_finite_whatever_the_hash_says(
        self, bits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sampler, "mix_bits", lambda x: torch.full_like(x, bits))
        noise = gumbel_noise(column(0, 2), column(0, 2), column(0, 2), 3)
        assert noise.isfinite().all()
        if bits == 0:
            assert (noise > 40).all()

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_draws_have_the_distribution(self, temperature: float) -> None:
        logits = 2 * torch.randn(1, 60)
        params = SamplingParams(temperature=temperature, top_p=0.95, seed=1)
        size = 5000
        metadata = make_metadata([params] * size, 60, seeds=[1] * size)
        metadata.positions = torch.arange(size)
        token_ids, _ = Sampler().sample(logits.expand(size, 60), metadata)
        counts = token_ids.bincount(minlength=60)
        one = one_row(metadata, 0)
        assert p_value(counts, apply_filters(logits, one).softmax(-1)[0]) > 1e-4
        off = (logits / temperature / 1.2).softmax(-1)[0]
        assert p_value(counts, off) < 1e-4  # the test can fail


class TestBatch:
    def test_a_row_does_not_depend_on_its_neighbours(self) -> None:
        """Bit for bit: filtered logits, token, log-probabilities; alone, in any company."""
        rng = random.Random(9)
        for logits, params, _, prompts, outputs in random_batches(10, 120, 0.3):
            everyone, vocab_size = list(range(len(params))), logits.shape[1]
            for row in everyone:
                params[row] = dataclasses.replace(
                    params[row],
                    logprobs=rng.choice([None, 0, 2, -1]),
                    min_tokens=rng.choice([0, 3]) if vocab_size > 1 else 0,
                )
            seeds = [rng.randrange(2**64) for _ in params]
            stops = [[rng.randrange(vocab_size)] for _ in params]
            batches = [[row] for row in everyone]
            batches += [rng.sample(everyone, len(everyone)), everyone]
            results = []
            for rows in batches:
                metadata = make_metadata(
                    [params[r] for r in rows],
                    vocab_size,
                    seeds=[seeds[r] for r in rows],
                    lengths=[5 + r for r in rows],
                    stop_token_ids=[stops[r] for r in rows],
                )
                metadata.sample_indices = torch.tensor(rows)
                fill_tables(
                    metadata, [prompts[r] for r in rows], [outputs[r] for r in rows]
                )
                tokens, logprobs = Sampler().sample(logits[rows], metadata)
                scores = Sampler.apply_penalties(logits[rows], metadata)
                results.append((tokens, apply_filters(scores, metadata), logprobs))
            tokens, scores, logprobs = results[-1]
            for rows, (few, few_scores, few_logprobs) in zip(
                batches, results, strict=True
            ):
                assert torch.equal(few, tokens[rows])
                for i, row in enumerate(rows):
                    if params[row].temperature > 0 and params[row].top_k != 1:
                        assert torch.equal(few_scores[i], scores[row])
                if few_logprobs is None or logprobs is None:
                    continue
                width = few_logprobs.token_ids.shape[1]
                assert torch.equal(few_logprobs.ranks, logprobs.ranks[rows])
                for name in ("token_ids", "logprobs"):
                    theirs = getattr(logprobs, name)[rows][:, :width]
                    assert torch.equal(getattr(few_logprobs, name), theirs)

    @pytest.mark.parametrize("vocab_size", [1013, 2048])
    def test_big_batches_too(self, vocab_size: int) -> None:
        size = 50
        params = [
            SamplingParams(top_p=0.9, top_k=5 * (i % 7), temperature=0.5 + i / 100)
            for i in range(size)
        ]
        logits = 2 * torch.randn(size, vocab_size)
        whole = make_metadata(params, vocab_size)
        tokens, _ = Sampler().sample(logits, whole)
        scores = apply_filters(logits, whole)
        for row in range(0, size, 7):
            alone = make_metadata([params[row]], vocab_size, [100 + row], [5 + row])
            alone.sample_indices = whole.sample_indices[row : row + 1]
            mine = logits[row : row + 1].clone()
            assert torch.equal(Sampler().sample(mine, alone)[0], tokens[row : row + 1])
            assert torch.equal(apply_filters(mine, alone)[0], scores[row])

    def test_the_same_question_has_the_same_answer(self) -> None:
        logits, metadata = (
            torch.randn(4, 100),
            make_metadata([SamplingParams()] * 4, 100),
        )
        first = Sampler().sample(logits, metadata)[0]
        torch.manual_seed(99)
        torch.rand(5)
        assert torch.equal(Sampler().sample(logits, metadata)[0], first)

    @pytest.mark.parametrize("name", ["seeds", "sample_indices", "positions"])
    def test_what_identifies_a_draw_changes_it(self, name: str) -> None:
        metadata = make_metadata([SamplingParams()] * 64, 1000)
        logits = torch.zeros(64, 1000)
        before = Sampler().sample(logits, metadata)[0]
        getattr(metadata, name).add_(1)
        after = Sampler().sample(logits, metadata)[0]
        assert (before != after).float().mean() > 0.9

    def test_leaves_its_arguments_alone(self) -> None:
        for logits, _, metadata, *_ in random_batches(11, 20):
            copies = {
                k: v.clone() for k, v in vars(metadata).items() if torch.is_tensor(v)
            }
            before = logits.clone()
            Sampler().sample(logits, metadata)
            assert torch.equal(logits, before)
            for name, value in copies.items():
                assert torch.equal(getattr(metadata, name), value)

    def test_greedy_takes_the_first_of_equals(self) -> None:
        logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
        for params in ([GREEDY] * 2, [GREEDY, SamplingParams(), GREEDY][:2]):
            token_ids, _ = Sampler().sample(logits, make_metadata(params, 3))
            assert token_ids[0] == 1

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_top_k_1_is_greedy(self, dtype: torch.dtype) -> None:
        """Whatever the temperature, and the lowest id of equals."""
        logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0]] * 64).to(dtype)
        params = [
            SamplingParams(top_k=1, temperature=t, top_p=p, min_p=m)
            for t in (0.01, 0.3, 1, 2)
            for p in (0.5, 1)
            for m in (0, 1)
        ] * 4
        for company in ([], [SamplingParams(top_k=3)], [GREEDY]):
            batch = params[: 64 - len(company)] + company
            metadata = make_metadata(batch, 5)
            drawn = Sampler().sample(logits[: len(batch)], metadata)[0]
            assert set(drawn[: len(batch) - len(company)].tolist()) == {1}

    def test_other_ties_stay(self) -> None:
        logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]] * 200)
        two = make_metadata([SamplingParams(top_k=2)] * 200, 4)
        assert set(Sampler().sample(logits, two)[0].tolist()) == {1, 3}
        best = make_metadata([SamplingParams(min_p=1)] * 200, 4)
        assert set(Sampler().sample(logits, best)[0].tolist()) == {1, 3}


def not_finite(rows: int, vocab_size: int) -> dict[str, Tensor]:
    """Rows that no token can be drawn from."""
    nan = torch.full((rows, vocab_size), math.nan)
    one_nan, infinite = torch.randn(2, rows, vocab_size)
    one_nan[:, 3] = math.nan
    infinite[:, 5] = INF
    return {
        "all NaN": nan,
        "one NaN": one_nan,
        "infinite": infinite,
        "nothing left": torch.full((rows, vocab_size), -INF),
    }


class TestNotFinite:
    KINDS = ("all NaN", "one NaN", "infinite", "nothing left")

    @pytest.mark.parametrize("kind", KINDS)
    def test_whatever_is_asked_for(self, kind: str) -> None:
        rng = random.Random(12)
        for _ in range(60):
            params = [
                dataclasses.replace(
                    random_params(rng, 0.3), logprobs=rng.choice([None, 0, 3])
                )
                for _ in range(4)
            ]
            bad = not_finite(4, 40)[kind]
            token_ids, _ = Sampler().sample(bad, make_metadata(params, 40))
            assert token_ids.tolist() == [-1] * 4, params

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_neighbours_draw_what_they_draw(
        self, kind: str, dtype: torch.dtype
    ) -> None:
        for logits, params, metadata, prompts, outputs in random_batches(13, 40, 0.3):
            size, vocab_size = logits.shape
            logits = logits.to(dtype)
            expected, _ = Sampler().sample(logits, metadata)
            bad = not_finite(1, max(vocab_size, 6))[kind][:, -vocab_size:].to(dtype)
            metadata = make_metadata(
                [*params, SamplingParams(logprobs=2)],
                vocab_size,
                [*(100 + i for i in range(size)), 5],
                [*(5 + i for i in range(size)), 9],
            )
            fill_tables(metadata, [*prompts, set()], [*outputs, []])
            token_ids, logprobs = Sampler().sample(torch.cat([logits, bad]), metadata)
            assert torch.equal(token_ids[:-1], expected)
            assert logprobs is not None
            if not bad.amax().isfinite():
                assert token_ids[-1] == -1

    def test_a_forbidden_id_does_not_hide_a_nan(self) -> None:
        for value in (math.nan, INF):
            logits = torch.tensor([[1.0, value, 2.0]])
            for temperature in (0, 1):
                params = SamplingParams(temperature=temperature, min_tokens=3)
                metadata = make_metadata([params], 3, stop_token_ids=[[1]])
                assert Sampler().sample(logits, metadata)[0].tolist() == [-1]

    @pytest.mark.parametrize("temperature", [0, 1])
    def test_every_id_forbidden(self, temperature: float) -> None:
        params = SamplingParams(temperature=temperature, min_tokens=1, logprobs=2)
        metadata = make_metadata([params], 3, stop_token_ids=[[0, 1, 2]])
        assert Sampler().sample(torch.randn(1, 3), metadata)[0].tolist() == [-1]

    def test_large_and_finite_is_no_fault(self) -> None:
        for scale in (1e4, 1e30, 3e38):
            logits = scale * torch.tensor([[0.5, 1.0, -1.0]])
            for params in (GREEDY, SamplingParams(temperature=0.01), SamplingParams()):
                token_ids, _ = Sampler().sample(logits, make_metadata([params], 3))
                assert token_ids.tolist() == [1]


class TestExtremes:
    """The ends of every parameter's range, on logits of every size."""

    VALUES: ClassVar[dict[str, list[float]]] = {
        "temperature": [0, 5e-324, 1e-38, 0.01, 2],
        "top_p": [5e-324, 1e-12, 1e-7, 1 - 2**-53, 1],
        "min_p": [0, 5e-324, 1e-45, 1 - 2**-53, 1],
        "top_k": [-1, 0, 1, 2, 2**62],
        "repetition_penalty": [5e-324, 1e-38, 1, 3e38, 1.7e308],
        "presence_penalty": [-2, 5e-324, 2],
        "frequency_penalty": [-2, 5e-324, 2],
        "seed": [-(2**63), -1, 0, 2**63, 2**64 - 1],
    }

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [1e-40, 1.0, 1e4])
    def test_draws_a_token_that_may_be_drawn(
        self, scale: float, dtype: torch.dtype
    ) -> None:
        rng = random.Random(14)
        for _ in range(150):
            chosen: dict[str, Any] = {
                name: rng.choice(values)
                for name, values in self.VALUES.items()
                if rng.random() < 0.5
            }
            params = SamplingParams(**chosen, logprobs=2)
            logits = (scale * torch.randn(1, 50)).to(dtype)
            metadata = make_metadata([params], 50, [chosen.get("seed", 1)])
            fill_tables(metadata, [{1, 2, 3}], [[2, 3, 3, 4, 49] * 50])
            token_ids, logprobs = Sampler().sample(logits, metadata)
            assert logprobs is not None
            assert logprobs.logprobs.isfinite().all()
            scores = Sampler.apply_penalties(logits, metadata)
            assert scores.isfinite().all(), chosen
            allowed = apply_filters(scores, metadata)
            assert allowed[0, token_ids[0]].isfinite(), chosen
            least = {"temperature": 0, "top_k": 1}
            if any(chosen.get(name) == value for name, value in least.items()):
                assert token_ids[0] == scores.argmax()
            elif chosen.get("top_p", 1) <= 1e-12 or chosen.get("min_p", 0) == 1:
                taken = scores[0, token_ids[0]].item()
                assert taken == pytest.approx(scores.max().item())

    def test_a_tiny_repetition_penalty_does_not_overflow(self) -> None:
        logits = torch.tensor([[9.0, 3.0, 7.0, 5.0, -1.0]])
        for penalty in (5e-324, 1e-38, 1e-20):
            params = SamplingParams(temperature=0, repetition_penalty=penalty)
            metadata = make_metadata([params], 5)
            fill_tables(metadata, [{1, 2, 4}], [[3]])
            assert Sampler().sample(logits, metadata)[0].tolist() == [2]

    def test_a_huge_one_neither(self) -> None:
        logits = torch.tensor([[9.0, 0.0, 7.0, -1.0, -3.0]])
        for penalty in (1e20, 3e38, 1.7e308):
            params = SamplingParams(temperature=0, repetition_penalty=penalty)
            metadata = make_metadata([params], 5)
            fill_tables(metadata, [{0, 1, 2, 3}], [[4]])
            scores = Sampler.apply_penalties(logits, metadata)
            assert scores.isfinite().all()
            assert scores[0, 3] > scores[0, 4]
            assert Sampler().sample(logits, metadata)[0].tolist() == [0]

    def test_the_bundled_model(self) -> None:
        """Greedy after "Once upon a time": 257 came of an overflow."""
        path = bundled_model_path()
        ids = load_tokenizer(path).encode("Once upon a time")
        with torch.inference_mode():
            model = load_model(path, "float32", "cpu", use_tqdm=False)
            logits = model.compute_logits(model(torch.tensor([ids]))[:, -1])
        params = SamplingParams(temperature=0, repetition_penalty=1e-38)
        metadata = make_metadata([params], logits.shape[-1])
        fill_tables(metadata, [set(ids)], [[]])
        assert Sampler().sample(logits, metadata)[0].tolist() == [1452]

    @pytest.mark.parametrize("temperature", [0.01, 1.0])
    def test_noise_counts_beside_large_logits(self, temperature: float) -> None:
        """Two equals far from zero are drawn equally often, not the lower id more."""
        size = 4000
        logits = torch.tensor([[-1e4, 1e4, 1e4, 0.0]]).expand(size, 4)
        params = [SamplingParams(temperature=temperature)] * size
        metadata = make_metadata(params, 4, lengths=list(range(size)))
        token_ids, _ = Sampler().sample(logits, metadata)
        counts = token_ids.bincount(minlength=4)
        assert p_value(counts, torch.tensor([0, 0.5, 0.5, 0])) > 1e-4

    def test_an_eos_id_of_minus_one_forbids_nothing(self) -> None:
        params = SamplingParams(temperature=0, min_tokens=3)
        metadata = make_metadata([params], 4, stop_token_ids=[[-1]])
        assert metadata.stop_token_mask is None
        logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        assert Sampler().sample(logits, metadata)[0].tolist() == [3]
        metadata = make_metadata([params], 4, stop_token_ids=[[-1, 2, 4]])
        assert metadata.stop_token_mask is not None
        assert metadata.stop_token_mask.tolist() == [[False, False, True, False]]

    def test_logprobs_of_no_token_are_those_of_the_first(self) -> None:
        logits = torch.randn(2, 9)
        out = gather_logprobs(logits, torch.tensor([-1, 4]), 2)
        assert out.token_ids[:, 0].tolist() == [0, 4]
        assert out.logprobs.isfinite().all()


class Ops(TorchDispatchMode):
    """Names and output sizes of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


def ops_of(params: list[SamplingParams], vocab_size: int) -> Ops:
    metadata = make_metadata(params, vocab_size, stop_token_ids=[[1, 2]] * len(params))
    logits = torch.randn(len(params), vocab_size)
    with Ops() as ops:
        Sampler().sample(logits, metadata)
    return ops


EVERYTHING = [
    GREEDY,
    SamplingParams(temperature=0.7, top_k=20, top_p=0.95),
    SamplingParams(min_p=0.1, top_p=0.9, logprobs=3),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=1, min_tokens=4),
]
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "index",
    "index_put_",
    "repeat_interleave",
    "lift_fresh",
    "scalar_tensor",
}


class TestCost:
    def test_greedy_looks_at_the_logits_once(self) -> None:
        once = ["max", "sub", "ne", "masked_fill"]  # the last three on one number a row
        assert ops_of([GREEDY] * 3, 500).names == once
        filtered = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1)
        assert ops_of([filtered], 500).names == once
        assert ops_of([SamplingParams(temperature=2, top_k=1)], 500).names == once

    def test_rows_and_vocabulary_cost_no_operations(self) -> None:
        small = ops_of(EVERYTHING, 40).names
        assert ops_of(EVERYTHING * 20, 40).names == small
        assert ops_of(EVERYTHING, 4000).names == small
        assert len(small) < 170

    def test_the_common_ways_are_short(self) -> None:
        plain = ops_of([SamplingParams(temperature=0.7)], 500).names
        assert len(plain) <= 50
        top_k = ops_of([SamplingParams(top_k=20)], 500).names
        assert len(top_k) <= 60
        assert "topk" in top_k
        both = ops_of([SamplingParams(top_k=20, top_p=0.9)], 500).names
        assert "sort" not in top_k + both
        assert "sort" in ops_of([SamplingParams(top_p=0.9)], 500).names
        neighbour = SamplingParams(top_p=0.9)
        assert "sort" in ops_of([SamplingParams(top_k=20), neighbour], 500).names

    def test_topk_looks_no_further_than_the_largest_k(self) -> None:
        ops = ops_of([SamplingParams(top_k=k) for k in (3, 17, 0)], 500)
        assert [args[1] for name, args in ops.calls if name == "topk"] == [17]

    def test_nothing_waits_for_the_device(self) -> None:
        names = set(ops_of(EVERYTHING, 300).names)
        assert not names & WAITING

    def test_runs_on_tensors_without_numbers(self) -> None:
        mode = FakeTensorMode()
        for params in ([GREEDY], EVERYTHING, EVERYTHING[1:2]):
            metadata = make_metadata(params, 64, stop_token_ids=[[1]] * len(params))
            fakes = {
                name: mode.from_tensor(value)
                for name, value in vars(metadata).items()
                if torch.is_tensor(value)
            }
            with mode:
                token_ids, _ = Sampler().sample(
                    torch.randn(len(params), 64), dataclasses.replace(metadata, **fakes)
                )
            assert token_ids.shape == (len(params),)

    def test_compiles_as_one_graph(self) -> None:
        metadata = make_metadata(EVERYTHING, 64, stop_token_ids=[[1]] * 4)
        logits = torch.randn(4, 64)

        def sample(logits: Tensor) -> tuple[Tensor, Tensor]:
            token_ids, logprobs = Sampler().sample(logits, metadata)
            assert logprobs is not None
            return token_ids, logprobs.logprobs

        compiled = torch.compile(sample, backend="aot_eager", fullgraph=True)
        for ours, eager in zip(compiled(logits), sample(logits), strict=True):
            assert torch.equal(ours, eager)


class TestMetadata:
    def test_greedy_asks_for_nothing(self) -> None:
        metadata = make_metadata([GREEDY, GREEDY], 9)
        asked = {
            k for k, v in vars(metadata).items() if v is not None and v is not False
        }
        assert asked == {"seeds", "sample_indices", "positions", "rows"}

    def test_columns(self) -> None:
        params = [
            SamplingParams(top_k=4, min_p=0.25),
            SamplingParams(temperature=0, top_k=7, top_p=0.5, min_p=0.5),
            SamplingParams(temperature=0.5, top_k=-1, top_p=0.75),
            SamplingParams(top_k=9),
        ]
        metadata = make_metadata(params, 9)
        expected = {
            "temperature": [1, 0, 0.5, 1],
            "top_k": [4, 0, 0, 0],
            "top_p": [1, 1, 0.75, 1],
            "min_p": [0.25, 0, 0, 0],
            "positions": [5, 6, 7, 8],
            "sample_indices": [0, 1, 2, 0],
            "seeds": [100, 101, 102, 103],
        }
        for name, values in expected.items():
            assert getattr(metadata, name).tolist() == values, name
        assert metadata.max_top_k == 4
        assert not metadata.top_p_after_top_k
        for name in ("top_k", "seeds", "sample_indices", "positions"):
            assert getattr(metadata, name).dtype == torch.int64
        assert metadata.repetition_penalty is metadata.prompt_mask is None

    @pytest.mark.parametrize(
        "penalty",
        [{"repetition_penalty": 2}, {"frequency_penalty": 2}, {"presence_penalty": 2}],
    )
    def test_penalties_come_together(self, penalty: dict[str, Any]) -> None:
        metadata = make_metadata([SamplingParams(), SamplingParams(**penalty)], 9)
        name = next(iter(penalty))
        off = {"repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0}
        for column_name, value in off.items():
            values = [value, 2 if column_name == name else value]
            assert getattr(metadata, column_name).tolist() == values
        assert metadata.prompt_mask is not None
        assert metadata.output_counts is not None
        assert metadata.prompt_mask.dtype == torch.bool
        assert metadata.output_counts.dtype == torch.int32
        assert metadata.prompt_mask.shape == metadata.output_counts.shape == (2, 9)
        assert not metadata.prompt_mask.any()
        assert not metadata.output_counts.any()

    def test_seeds_are_64_bits(self) -> None:
        seeds = [0, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63), 2**64 + 5]
        metadata = make_metadata([GREEDY] * 7, 9, seeds=seeds)
        expected = [0, 2**63 - 1, -(2**63), -1, -1, -(2**63), 5]
        assert metadata.seeds.tolist() == expected


@dataclasses.dataclass
class Asker:
    """A request as a test plays it: what `set_row` is told, and its output so far."""

    params: SamplingParams
    seed: int
    prompt: list[int]
    stops: list[int]
    bad_words: list[list[int]]
    output: list[int] = dataclasses.field(default_factory=list)
    index: int = 0

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)

    def sit(self, rows: SamplingRows, row: int) -> None:
        rows.set_row(
            row,
            self.params,
            self.seed,
            self.index,
            self.prompt,
            self.stops,
            self.output,
            self.bad_words,
        )

    def expected(self, logits: list[float]) -> list[float]:
        """Logits with bans, biases and penalties, by loops over lists."""
        p, row = self.params, list(logits)
        for token in range(len(row)):
            if p.logit_bias and token in p.logit_bias:
                row[token] = float(f32(row[token]) + f32(p.logit_bias[token]))
            if p.allowed_token_ids is not None and token not in p.allowed_token_ids:
                row[token] = -INF
            if token in self.stops and len(self.output) < p.min_tokens:
                row[token] = -INF
        for *before, last in self.bad_words:
            if self.output[len(self.output) - len(before) :] == before:
                row[last] = -INF
        return Reference.penalties(row, p, set(self.prompt), self.output)


def random_asker(rng: random.Random, vocab_size: int, plain: float = 0.3) -> Asker:
    def ids(most: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(0, most))]

    def words() -> list[list[int]]:
        return [[*ids(3), rng.randrange(vocab_size)] for _ in range(rng.randint(0, 5))]

    def maybe(value: Any, off: Any = None) -> Any:
        return value if rng.random() < 0.4 else off

    params = random_params(rng, 0.3)
    if rng.random() < plain:
        params = rng.choice([GREEDY, SamplingParams(), SamplingParams(top_k=3)])
    elif rng.random() < 0.8:
        allowed = ids(vocab_size) or [0]
        bias = {i: rng.choice([-100, -1.5, 0.25, 3, 100]) for i in ids(4)}
        changes = {
            "logit_bias": maybe(bias),
            "allowed_token_ids": maybe(allowed),
            "min_tokens": maybe(rng.randint(1, 5), 0),
            "logprobs": maybe(rng.choice([0, 2, -1])),
        }
        params = dataclasses.replace(params, **changes)
    bad_words = words() if params != GREEDY and rng.random() < 0.5 else []
    stops = list(dict.fromkeys([*ids(2), -1, vocab_size]))
    return Asker(
        params, rng.getrandbits(64), ids(6), stops, bad_words, [], ids(1) != []
    )


class Watched:
    """The scores that tokens were drawn from, after bans, biases and penalties."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scores = torch.empty(0)
        filters, draw = sampler.apply_filters, sampler.draw_tokens

        def watch_filters(logits: Tensor, metadata: SamplingMetadata) -> Tensor:
            self.scores = logits
            return filters(logits, metadata)

        def watch_draw(logits: Tensor, metadata: SamplingMetadata) -> Tensor:
            if metadata.temperature is None:
                self.scores = logits
            return draw(logits, metadata)

        monkeypatch.setattr(sampler, "apply_filters", watch_filters)
        monkeypatch.setattr(sampler, "draw_tokens", watch_draw)


def run_rows(
    rows: SamplingRows, running: dict[int, Asker], logits: Tensor
) -> tuple[SamplingMetadata, Tensor, Any]:
    """One step of these rows, with its tokens recorded; the askers are told nothing."""
    index = torch.tensor(list(running), dtype=torch.int64)
    positions = torch.tensor([asker.position for asker in running.values()])
    metadata = rows.gather(list(running), index, positions)
    token_ids, logprobs = Sampler().sample(logits, metadata)
    rows.record(metadata, token_ids)
    return metadata, token_ids, logprobs


class TestRows:
    """Rows that are set, gathered, recorded, given up and taken again, in any order."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("vocab_size", [5, 40, 257])
    def test_random_lives(
        self, vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rng, watched = random.Random(vocab_size), Watched(monkeypatch)
        rows, seated = SamplingRows(6, vocab_size, "cpu"), dict[int, Asker]()
        waiting: list[Asker] = []
        compared = banned = 0
        for _ in range(250):
            for row in list(seated):
                what = rng.random()
                if what < 0.06:  # it ends
                    del seated[row]
                elif what < 0.12:  # it is preempted
                    waiting.append(seated.pop(row))
            free = [row for row in range(6) if row not in seated]
            rng.shuffle(free)
            for row in free:
                if rng.random() < 0.5:
                    back = waiting and rng.random() < 0.5
                    asker = waiting.pop(0) if back else random_asker(rng, vocab_size)
                    asker.sit(rows, row)
                    seated[row] = asker
            ids = rng.sample(list(seated), rng.randint(0, len(seated)))
            if not ids:
                continue
            running = {row: seated[row] for row in ids}
            logits = torch.tensor([random_logits(rng, vocab_size) for _ in ids])
            logits = logits.to(dtype)
            _, token_ids, logprobs = run_rows(rows, running, logits)
            scores = watched.scores.float()
            for i, asker in enumerate(running.values()):
                wanted = torch.tensor(asker.expected(logits[i].tolist()))
                torch.testing.assert_close(scores[i], wanted, rtol=1e-5, atol=1e-5)
                alone = SamplingRows(1, vocab_size, "cpu")
                asker.sit(alone, 0)
                _, token_id, mine = run_rows(alone, {0: asker}, logits[i : i + 1])
                assert torch.equal(watched.scores[0].float(), scores[i])
                assert token_id.item() == token_ids[i].item()
                if mine is not None:
                    size = mine.logprobs.shape[1]
                    assert torch.equal(mine.logprobs[0], logprobs.logprobs[i, :size])
                compared += 1
                banned += int((wanted == -INF).any())
            for asker, token_id in zip(
                running.values(), token_ids.tolist(), strict=True
            ):
                if token_id >= 0:
                    assert asker.expected([0.0] * vocab_size)[token_id] > -INF
                    asker.output.append(token_id)
        assert compared > 400
        assert banned > 150

    def test_a_row_written_anew_is_the_row_that_stayed(self) -> None:
        """After a preemption: another row, another neighbour, the same metadata."""
        rng = random.Random(5)
        for _ in range(60):
            vocab_size = rng.choice([5, 40])
            rows = SamplingRows(4, vocab_size, "cpu")
            askers = {row: random_asker(rng, vocab_size, 0) for row in (2, 0)}
            for row, asker in askers.items():
                asker.sit(rows, row)
            for _ in range(rng.randint(0, 8)):
                logits = torch.randn(2, vocab_size)
                _, token_ids, _ = run_rows(rows, askers, logits)
                for asker, token in zip(
                    askers.values(), token_ids.tolist(), strict=True
                ):
                    asker.output += [token] * (token >= 0)
            asker, places = askers[2], torch.tensor([2])
            position = torch.tensor([asker.position])
            stayed = rows.gather([2], places, position)
            random_asker(rng, vocab_size, 0).sit(rows, 3)
            asker.sit(rows, 3)
            anew = rows.gather([3], torch.tensor([3]), position)
            for name, value in vars(stayed).items():
                if isinstance(value, Tensor) and name != "rows":
                    other = getattr(anew, name)
                    # Longer or more words of others have widened these tables.
                    if name == "bad_words":
                        other = other[:, : value.shape[1], -value.shape[2] :]
                    if name == "recent_tokens":
                        other = other[:, -value.shape[1] :]
                    assert torch.equal(value, other), name
                elif name != "rows":
                    assert value == getattr(anew, name), name

    def test_a_row_that_sits_out_keeps_its_counts(self) -> None:
        rows = SamplingRows(3, 10, "cpu")
        params = SamplingParams(temperature=0, presence_penalty=2, frequency_penalty=1)
        ada = Asker(params, 1, [1, 2], [], [[4, 5]])
        ben = Asker(GREEDY, 2, [1], [], [])
        ada.sit(rows, 1)
        ben.sit(rows, 2)
        logits = torch.zeros(2, 10)
        logits[:, 4] = 1.0
        metadata, token_ids, _ = run_rows(rows, {1: ada, 2: ben}, logits)
        assert token_ids.tolist() == [4, 4]
        for _ in range(3):
            metadata, token_ids, _ = run_rows(rows, {2: ben}, logits[:1])
            assert metadata.output_counts is None
            assert metadata.recent_tokens is None
        index = torch.tensor([1])
        metadata = rows.gather([1], index, torch.tensor([3]))
        assert metadata.output_counts is not None
        assert metadata.output_counts[0].tolist() == [0, 0, 0, 0, 1] + [0] * 5
        assert metadata.recent_tokens is not None
        assert metadata.recent_tokens.tolist() == [[4]]

    def test_minus_one_counts_nothing(self) -> None:
        rows = SamplingRows(2, 6, "cpu")
        asker = Asker(SamplingParams(presence_penalty=1), 1, [2], [], [[1, 2, 3]], [1])
        asker.sit(rows, 0)
        index = torch.tensor([0])
        for token in (-1, 4, -1):
            rows.record(rows.gather([0], index, index + 2), torch.tensor([token]))
        metadata = rows.gather([0], index, index + 3)
        assert metadata.output_counts is not None
        assert metadata.output_counts.tolist() == [[0, 1, 0, 0, 1, 0]]
        assert metadata.recent_tokens is not None
        assert metadata.recent_tokens.tolist() == [[1, 4]]

    def test_tables_are_made_when_asked_for_and_then_stay(self) -> None:
        rows = SamplingRows(4, 50, "cpu")
        Asker(GREEDY, 1, [1], [3], []).sit(rows, 0)
        Asker(SamplingParams(top_p=0.5), 1, [1], [3], []).sit(rows, 1)
        assert not rows.tables.made
        wishes = {
            "output_counts": {"presence_penalty": 1.0},
            "stop_token_mask": {"min_tokens": 2},
            "logit_bias": {"logit_bias": {3: 1.0}},
        }
        for name, wish in wishes.items():
            assert name not in rows.tables.made
            Asker(SamplingParams(**wish), 1, [1], [3], []).sit(rows, 2)  # type: ignore[arg-type]
            assert rows.tables.made[name].shape == (4, 50)
        where = {name: table.data_ptr() for name, table in rows.tables.made.items()}
        rng = random.Random(2)
        for _ in range(40):
            random_asker(rng, 50).sit(rows, rng.randrange(4))
        now = {name: table.data_ptr() for name, table in rows.tables.made.items()}
        assert now == where

    def test_wishes_are_forgotten_when_a_row_changes_hands(self) -> None:
        rows = SamplingRows(3, 10, "cpu")
        warm = SamplingParams(temperature=0.5)
        picky = SamplingParams(temperature=0, top_k=2, min_tokens=3)
        for row, params in enumerate((GREEDY, warm, picky)):
            Asker(params, row, [1], [3], []).sit(rows, row)
        assert rows.get_wishes([0]) == set()
        assert rows.get_wishes([1]) == {"temperature"}
        both = rows.get_wishes([0, 1])
        assert both == rows.get_wishes((0, 1)) == rows.get_wishes([1, 0])
        assert both == {"temperature"}
        assert "temperature" not in rows.get_wishes([2])
        assert rows.get_wishes([2]) >= {"min_positions"}
        assert rows.get_wishes([0, 1, 2]) == both | rows.get_wishes([2])
        assert rows.get_wishes([]) == set()
        for asked in ([0, 1], [0], [1, 0]):  # what was asked last is kept
            rows.get_wishes(asked)
            rows.gather(asked, torch.tensor(asked), torch.tensor(asked))
            Asker(SamplingParams(presence_penalty=1), 7, [1], [3], []).sit(rows, 0)
            assert "repetition_penalty" in rows.get_wishes(asked)
            found = rows.gather(asked, torch.tensor(asked), torch.tensor(asked))
            assert found.output_counts is not None
            Asker(GREEDY, 8, [1], [3], []).sit(rows, 0)
            assert rows.get_wishes(asked) <= {"temperature"}
            found = rows.gather(asked, torch.tensor(asked), torch.tensor(asked))
            assert found.output_counts is None

    def test_a_row_leaves_the_others_alone(self) -> None:
        rng, rows = random.Random(6), SamplingRows(3, 30, "cpu")
        for row in range(3):
            random_asker(rng, 30, 0).sit(rows, row)
        for _ in range(50):
            row = rng.randrange(3)
            others = [other for other in range(3) if other != row]
            before = {n: t[others].clone() for n, t in rows.tables.made.items()}
            random_asker(rng, 30, 0).sit(rows, row)
            for name, table in before.items():
                assert torch.equal(rows.tables.made[name][others], table)

    def test_a_large_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng, watched = random.Random(7), Watched(monkeypatch)
        size, vocab_size = 300, 64
        rows = SamplingRows(size, vocab_size, "cpu")
        order = rng.sample(range(size), size)
        running = {row: random_asker(rng, vocab_size) for row in order}
        for row, asker in running.items():
            asker.output = [rng.randrange(vocab_size) for _ in range(rng.randint(0, 6))]
            asker.sit(rows, row)
        logits = torch.randn(size, vocab_size)
        run_rows(rows, running, logits)
        expected = [
            asker.expected(row)
            for asker, row in zip(running.values(), logits.tolist(), strict=True)
        ]
        torch.testing.assert_close(
            watched.scores, torch.tensor(expected), rtol=1e-5, atol=1e-5
        )

    def test_what_nobody_asks_for_is_none(self) -> None:
        rows = SamplingRows(4, 20, "cpu")
        everything = SamplingParams(
            presence_penalty=1, logit_bias={3: 1}, min_tokens=1, logprobs=1, min_p=0.1
        )
        Asker(everything, 1, [1], [3], [[1, 2]]).sit(rows, 0)
        Asker(GREEDY, 1, [1], [3], []).sit(rows, 3)
        index = torch.tensor([3])
        plain = vars(rows.gather([3], index, index))
        assert {n for n, v in plain.items() if v is not None and v is not False} == {
            "seeds",
            "sample_indices",
            "positions",
            "rows",
        }
        both = rows.gather([3, 0], torch.tensor([3, 0]), torch.tensor([1, 1]))
        assert both.logit_bias is not None
        assert both.logit_bias[0].abs().sum() == 0
        assert both.num_logprobs == 1
        assert both.temperature is not None
        assert both.temperature.tolist() == [0, 1]

    def test_columns_are_kept_while_the_rows_run_on(self) -> None:
        rows = SamplingRows(2, 20, "cpu")
        Asker(SamplingParams(logit_bias={1: 2.0}), 1, [1], [3], []).sit(rows, 0)
        index = torch.tensor([0])
        first = rows.gather([0], index, index + 1)
        again = rows.gather([0], index, index + 2)
        assert again.temperature is first.temperature
        assert again.logit_bias is first.logit_bias
        assert first.positions.tolist() == [1]
        assert again.positions.tolist() == [2]
        Asker(GREEDY, 5, [1], [3], []).sit(rows, 1)
        Asker(GREEDY, 6, [1], [3], []).sit(rows, 0)
        assert rows.gather([0], index, index).seeds.tolist() == [6]
        assert rows.gather([1], index + 1, index).seeds.tolist() == [5]
        running = [0, 1]
        assert rows.gather(running, torch.arange(2), index).seeds.tolist() == [6, 5]
        running.reverse()  # the same list, and no longer the same rows
        index = torch.tensor(running)
        assert rows.gather(running, index, index).seeds.tolist() == [5, 6]

    def test_seeds_of_64_bits_and_exact_top_p(self) -> None:
        rows = SamplingRows(1, 20, "cpu")
        asker = Asker(SamplingParams(top_p=0.99999), 2**64 - 1, [1], [], [])
        asker.sit(rows, 0)
        metadata = rows.gather([0], torch.tensor([0]), torch.tensor([1]))
        assert metadata.seeds.tolist() == [-1]
        assert metadata.top_p is not None
        assert metadata.top_p.tolist() == [0.99999]
        assert metadata.temperature is not None
        assert metadata.temperature.dtype == torch.float32

    def test_rows_made_in_inference_mode_may_change_outside(self) -> None:
        rows = SamplingRows(2, 10, "cpu")
        asker = Asker(SamplingParams(presence_penalty=1), 1, [1], [], [[1, 2]])
        with torch.inference_mode():
            asker.sit(rows, 0)
            run_rows(rows, {0: asker}, torch.randn(1, 10))
        asker.sit(rows, 1)
        run_rows(rows, {0: asker, 1: asker}, torch.randn(2, 10))

    def test_a_plain_greedy_step_costs_next_to_nothing(self) -> None:
        rows = SamplingRows(64, 1000, "cpu")
        Asker(GREEDY, 1, [1], [], []).sit(rows, 5)
        running, index = [5], torch.tensor([5])
        with Ops() as ops:
            rows.gather(running, index, index)
            first = len(ops.names)
            metadata = rows.gather(running, index, index)
            rows.record(metadata, index)
        # Nothing is gathered after the first time; what was drawn is kept, and not counted.
        assert ops.names[first:] == ["clamp", "index_copy_"]
        assert rows.last_token_ids.tolist() == [5 * (row == 5) for row in range(64)]
        rows.record(metadata, torch.tensor([-1]))
        assert rows.last_token_ids[5] == 0  # -1 could not run
        best = INF
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(200):
                rows.gather(running, index, index)
            best = min(best, (time.perf_counter() - start) / 200)
        assert best < 5e-5  # some microseconds, and room for a slow machine

    def test_nothing_waits_for_the_device(self) -> None:
        rows = SamplingRows(8, 40, "cpu")
        running = {}
        for row in range(8):
            running[row] = random_asker(random.Random(row), 40, 0)
            running[row].sit(rows, row)
        index, positions = torch.arange(8), torch.full((8,), 9)
        tokens, logits = torch.arange(8), torch.randn(8, 40)
        metadata = rows.gather(range(8), index, positions)
        assert metadata.bad_words is not None
        assert metadata.logit_bias is not None
        assert metadata.output_counts is not None
        with Ops() as ops:
            metadata = rows.gather(range(8), index, positions)
            Sampler().sample(logits, metadata)
            rows.record(metadata, tokens)
        assert not set(ops.names) & WAITING


class TestBadWords:
    def words_at(
        self, words: list[list[int]], output: list[int], vocab_size: int = 12
    ) -> list[int]:
        """The ids that may not come after this output."""
        rows = SamplingRows(1, vocab_size, "cpu")
        Asker(GREEDY, 1, [1, 2, 3], [], words, output).sit(rows, 0)
        index = torch.tensor([0])
        metadata = rows.gather([0], index, index)
        scores = torch.zeros(1, vocab_size)
        if metadata.logit_bias is not None:
            scores = scores + metadata.logit_bias
        if metadata.bad_words is not None:
            assert metadata.recent_tokens is not None
            scores = sampling_rows.forbid_bad_words(
                scores, metadata.bad_words, metadata.recent_tokens
            )
        return (scores[0] == -INF).nonzero().flatten().tolist()

    @pytest.mark.parametrize(
        ("words", "output", "forbidden"),
        [
            ([[5]], [], [5]),
            ([[5], [6]], [5, 6], [5, 6]),
            ([[1, 2, 3]], [], []),  # the prompt does not count
            ([[4, 5]], [4], [5]),
            ([[4, 5]], [4, 6], []),
            ([[4, 5]], [6, 4], [5]),
            ([[4, 5, 6]], [5], []),  # only a part of the word is there
            ([[4, 5, 6]], [4, 5], [6]),
            ([[4, 5, 6]], [4, 5, 4, 5], [6]),
            ([[4, 5, 6]], [4, 5, 5], []),
            ([[4, 4, 4]], [4, 4, 4], [4]),
            ([[4, 5], [7, 4, 8]], [7, 4], [5, 8]),
            ([[4, 5], [7, 4, 5]], [7, 4], [5]),  # the same id twice
            ([[4, 5], [8, 5]], [8], [5]),  # one of two matches
            ([[4, 5], [0, 0]], [4], [5]),
            ([[0, 0]], [], []),  # an id of 0 is no empty place
            ([[0, 1]], [0], [1]),
        ],
    )
    def test_written_out(
        self, words: list[list[int]], output: list[int], forbidden: list[int]
    ) -> None:
        assert self.words_at(words, output) == forbidden

    def test_a_row_of_many_and_a_row_of_none(self) -> None:
        rng = random.Random(8)
        words = [
            [rng.randrange(50) for _ in range(rng.randint(2, 6))] for _ in range(80)
        ]
        output = [rng.randrange(50) for _ in range(30)]
        for end in range(31):
            expected = {
                w[-1]
                for w in words
                if output[:end][max(0, end - len(w) + 1) :] == w[:-1]
            }
            assert set(self.words_at(words, output[:end], 50)) == expected

    def test_longer_words_of_a_neighbour_change_nothing(self) -> None:
        """The tables grow while a row is in the middle of a word."""
        rows, index = SamplingRows(3, 12, "cpu"), torch.tensor([1])
        Asker(GREEDY, 1, [1], [], [[4, 5, 6], [7, 8]], [4, 5]).sit(rows, 1)
        for number in range(2, 5):
            longer = [[9] * (2 * number)] * (2 * number)
            Asker(GREEDY, 1, [1], [], longer).sit(rows, 2)
            metadata = rows.gather([1], index, index)
            assert metadata.bad_words is not None
            assert metadata.recent_tokens is not None
            scores = sampling_rows.forbid_bad_words(
                torch.zeros(1, 12), metadata.bad_words, metadata.recent_tokens
            )
            assert (scores[0] == -INF).nonzero().flatten().tolist() == [6]

    def test_nan_stays_nan(self) -> None:
        rows = SamplingRows(1, 4, "cpu")
        params = SamplingParams(temperature=0, allowed_token_ids=[1, 2])
        asker = Asker(params, 1, [1], [], [[1, 2], [3]], [1])
        asker.sit(rows, 0)
        logits = torch.tensor([[0.0, 0.0, math.nan, 0.0]])
        assert run_rows(rows, {0: asker}, logits)[1].tolist() == [-1]

    @pytest.mark.parametrize("temperature", [0, 1])
    def test_nothing_left_to_draw(self, temperature: float) -> None:
        rows = SamplingRows(2, 4, "cpu")
        params = SamplingParams(temperature=temperature, allowed_token_ids=[2])
        stuck = Asker(params, 1, [1], [], [[1, 2]], [1])
        free = Asker(params, 1, [1], [], [[1, 2]], [3])
        stuck.sit(rows, 0)
        free.sit(rows, 1)
        drawn = run_rows(rows, {0: stuck, 1: free}, torch.randn(2, 4))[1]
        assert drawn.tolist() == [-1, 2]


class TestBias:
    def test_draws_follow_the_bias(self) -> None:
        """Chi-square: a bias of log 3 makes a token three times as likely."""
        size, params = 4000, SamplingParams(logit_bias={2: math.log(3)})
        metadata = make_metadata([params] * size, 5, lengths=list(range(size)))
        logits = torch.tensor([0.5, -1.0, 0.0, 1.0, 0.25]).expand(size, 5)
        counts = Sampler().sample(logits, metadata)[0].bincount(minlength=5)
        weights = logits[0].exp() * torch.tensor([1, 1, 3, 1, 1])
        assert p_value(counts, weights / weights.sum()) > 1e-4

    def test_log_probabilities_are_the_raw_ones(self) -> None:
        params = SamplingParams(
            temperature=0, logprobs=2, logit_bias={0: 100.0}, allowed_token_ids=[0, 3]
        )
        logits = torch.tensor([[-3.0, 1.0, 2.0, 0.0]])
        token_ids, logprobs = Sampler().sample(logits, make_metadata([params], 4))
        assert token_ids.tolist() == [0]
        assert logprobs is not None
        assert logprobs.token_ids.tolist() == [[0, 2, 1]]
        assert torch.equal(
            logprobs.logprobs, logits.log_softmax(-1).gather(1, logprobs.token_ids)
        )

    def test_bias_and_allowed_together(self) -> None:
        """A bias does not bring back what is not allowed, nor a word that is bad."""
        params = SamplingParams(
            temperature=0, logit_bias={0: 100.0, 1: 100.0}, allowed_token_ids=[1, 2]
        )
        bias = torch.full((4,), 7.0)
        sampling_rows.fill_bias(bias, params, [[1], [2, 3]])
        assert bias.tolist() == [-INF, -INF, 0, -INF]

    def test_a_bias_comes_before_the_penalties(self) -> None:
        """What it lifts above 0 is divided, not multiplied."""
        params = SamplingParams(
            temperature=0, logit_bias={0: 3.0}, repetition_penalty=2.0
        )
        metadata = make_metadata([params], 3)
        fill_tables(metadata, [{0}], [[]])
        logits = torch.tensor([[-1.0, 0.5, 0.75]])  # (-1 + 3) / 2 = 1
        assert Sampler().sample(logits, metadata)[0].tolist() == [0]

    def test_half_precision_takes_small_biases(self) -> None:
        """In bfloat16 itself 64 + 0.125 would be 64."""
        params = SamplingParams(temperature=0, logit_bias={1: 0.125})
        for dtype in DTYPES:
            logits = torch.tensor([[64.0, 64.0, 1.0]]).to(dtype)
            assert Sampler().sample(logits, make_metadata([params], 3))[0] == 1


NO_GPU = "compares a GPU with the CPU, and there is no CUDA device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
class TestOnAGPU:
    def on(
        self, device: str, vocab_size: int
    ) -> tuple[list[SamplingParams], SamplingMetadata]:
        params = [*EVERYTHING, SamplingParams(top_k=1, temperature=2)]
        params += [SamplingParams(temperature=0.6, top_k=50)] * 3
        rows = range(len(params))
        metadata = SamplingMetadata.from_params(
            params,
            seeds=list(rows),
            sample_indices=[0 for _ in rows],
            num_prompt_tokens=[5 for _ in rows],
            stop_token_ids=[[1, 2] for _ in rows],
            vocab_size=vocab_size,
            device=device,
        )
        return params, metadata

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_draws_what_the_cpu_draws_and_does_not_wait(
        self, dtype: torch.dtype
    ) -> None:
        vocab_size = 151_936
        params, ours = self.on("cuda", vocab_size)
        _, expected = self.on("cpu", vocab_size)
        logits = (3 * torch.randn(len(params), vocab_size)).to(dtype)
        logits[:, 7::5000] = logits.amax(dim=-1, keepdim=True)  # many equals
        logits[4, 9] = math.nan
        on_gpu = logits.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            token_ids, _ = Sampler().sample(on_gpu, ours)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert token_ids.tolist() == Sampler().sample(logits, expected)[0].tolist()
        assert token_ids[4] == -1

    def test_sums_that_meet_top_p(self) -> None:
        logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25] * 4]).log()
        for p in (0.4, 0.5, 0.7, 0.75, 0.9):
            on_gpu = apply_top_p_filtering(logits.cuda(), p)
            assert torch.equal(on_gpu.cpu(), apply_top_p_filtering(logits, p))
