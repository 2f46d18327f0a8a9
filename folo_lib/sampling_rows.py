"""What requests ask of the sampler: columns for a step, and rows on the device that outlive it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from folo_lib.sampling_params import SamplingParams

__all__ = [
    "FILTERS",
    "FLOATS",
    "INTS",
    "OFF",
    "PENALTIES",
    "BadWords",
    "SamplingMetadata",
    "SamplingRows",
    "TokenTables",
    "combine_wishes",
    "fill_bias",
    "forbid_bad_words",
    "move",
    "read_wishes",
]

PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
FILTERS = {"temperature": 0.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0}
OFF: dict[str, Any] = {**FILTERS, **dict.fromkeys(PENALTIES, 0.0)}
OFF["repetition_penalty"] = 1.0


def read_wishes(
    params: SamplingParams,
    num_prompt_tokens: int,
    stop_token_ids: Collection[int],
    bad_words_ids: Sequence[Sequence[int]],
    vocab_size: int,
) -> dict[str, Any]:
    """What a request asks for, by names of `SamplingMetadata`; what is off is left out.

    Filters of a greedy request are off, as its best token survives them. Penalties come
    as three or not at all. `min_positions` stands for `min_tokens`, if there is an id
    that it forbids; the tables `logit_bias` and `bad_words` have the value True.
    """
    values = {name: getattr(params, name) for name in OFF}
    if params.temperature == 0 or params.top_k == 1:
        values |= FILTERS
    if not 0 < values["top_k"] < vocab_size:
        values["top_k"] = 0
    asked = {name: value for name, value in values.items() if value != OFF[name]}
    if not asked.keys().isdisjoint(PENALTIES):
        asked |= {name: values[name] for name in PENALTIES}
    if params.logprobs is not None:
        all_or_some = vocab_size if params.logprobs == -1 else params.logprobs
        asked["num_logprobs"] = min(all_or_some, vocab_size)
    if params.min_tokens > 0 and any(0 <= i < vocab_size for i in stop_token_ids):
        asked["min_positions"] = num_prompt_tokens + params.min_tokens
    lengths = {len(word) for word in bad_words_ids}
    if params.logit_bias or params.allowed_token_ids is not None or 1 in lengths:
        asked["logit_bias"] = True
    return asked | ({"bad_words": True} if max(lengths, default=0) > 1 else {})


def combine_wishes(wishes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the host must know of a batch; see `SamplingMetadata` and `read_wishes`."""
    largest = max((wish.get("top_k", 0) for wish in wishes), default=0)
    nuclei = [wish for wish in wishes if "top_p" in wish]
    counts = [wish["num_logprobs"] for wish in wishes if "num_logprobs" in wish]
    return {
        "max_top_k": largest or None,
        "top_p_after_top_k": largest > 0 and all("top_k" in n for n in nuclei),
        "num_logprobs": max(counts, default=None),
    }


@dataclass
class SamplingMetadata:
    """What sampling needs to know in a step, one row per sequence; the name is vLLM's.

    None: no row asks for it.

    Attributes:
        seeds: `[B]` int64.
        sample_indices: `[B]` int64, which of the `n` samples of a request it is.
        positions: `[B]` int64, the place that the sampled token will take.
        rows: `[B]` int64, which of the `SamplingRows` they are.
        temperature: `[B]`, 0: greedy.
        min_p: `[B]`, 0: off.
        top_k: `[B]` int64, 0: all.
        max_top_k: the largest `top_k`, known to the host.
        top_p: `[B]` float64, 1: off.
        top_p_after_top_k: every row with a `top_p` below 1 has a `top_k`.
        repetition_penalty, frequency_penalty, presence_penalty: `[B]`, all or none.
        prompt_mask: `[B, V]` bool, with penalties.
        output_counts: `[B, V]` int32, with penalties.
        stop_token_mask: `[B, V]` bool, with `min_tokens`.
        min_positions: `[B]` int64, where stop ids become possible.
        logit_bias: `[B, V]` float32, added; `-inf` where an id may never come.
        bad_words: `[B, M, L]` int32, see `BadWords`.
        recent_tokens: `[B, L - 1]` int32, the latest of the output, with `bad_words`.
        num_logprobs: the most that a row asks for.
    """

    seeds: Tensor
    sample_indices: Tensor
    positions: Tensor
    rows: Tensor
    temperature: Tensor | None = None
    min_p: Tensor | None = None
    top_k: Tensor | None = None
    max_top_k: int | None = None
    top_p: Tensor | None = None
    top_p_after_top_k: bool = False
    repetition_penalty: Tensor | None = None
    frequency_penalty: Tensor | None = None
    presence_penalty: Tensor | None = None
    prompt_mask: Tensor | None = None
    output_counts: Tensor | None = None
    stop_token_mask: Tensor | None = None
    min_positions: Tensor | None = None
    logit_bias: Tensor | None = None
    bad_words: Tensor | None = None
    recent_tokens: Tensor | None = None
    num_logprobs: int | None = None

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        sample_indices: Sequence[int],
        num_prompt_tokens: Sequence[int],
        stop_token_ids: Sequence[Collection[int]],
        vocab_size: int,
        device: torch.device | str,
    ) -> SamplingMetadata:
        """For the first step of these requests, with the penalties' tables still empty.

        Args:
            params, seeds, sample_indices, num_prompt_tokens: `B` of each.
            stop_token_ids: those of each request, EOS included.
            vocab_size: `V`.
            device: where the tensors are.
        """
        rows = SamplingRows(len(params), vocab_size, device)
        numbers = zip(seeds, sample_indices, num_prompt_tokens, strict=True)
        for row, (seed, sample_index, length) in enumerate(numbers):
            own, stops = params[row], stop_token_ids[row]
            asked = read_wishes(own, length, stops, (), vocab_size)
            rows.set_columns(row, asked, seed, sample_index)
            rows.tables.set_row(row, asked, own, stop_token_ids=stops)
        index = torch.arange(len(params), device=device)
        positions = move(num_prompt_tokens, torch.int64, rows.device)
        return rows.gather(range(len(params)), index, positions)


def move(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers as a tensor, sent to the device without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def fill_bias(
    bias: Tensor, params: SamplingParams, bad_words_ids: Sequence[Sequence[int]] = ()
) -> None:
    """Writes what is added to a request's logits at every step.

    Args:
        bias: `[V]` float32, overwritten; `-inf` where an id may never come.
        params: of the request; its `logit_bias` and `allowed_token_ids` are read.
        bad_words_ids: of which those of one token are forbidden here.
    """
    bias.zero_()
    if params.allowed_token_ids is not None:
        allowed = move(params.allowed_token_ids, torch.int64, bias.device)
        bias.fill_(float("-inf")).index_fill_(0, allowed, 0.0)
    if params.logit_bias:
        biased = move(list(params.logit_bias), torch.int64, bias.device)
        values = move(list(params.logit_bias.values()), bias.dtype, bias.device)
        bias.index_add_(0, biased, values)
    single = [word[0] for word in bad_words_ids if len(word) == 1]
    forbidden = move(single, torch.int64, bias.device)
    bias.index_fill_(0, forbidden, float("-inf"))


ANY, NONE, NEVER = -1, -2, -3  # matches every token; no token yet; no word


class BadWords:
    """Words of several tokens that must not be written, and each row's latest tokens.

    Attributes:
        words: `[R, M, L]` int32, each ends in the last column; before it `ANY`. A row
            with fewer words is filled up with `NEVER`.
        recent: `[R, L - 1]` int32, the latest tokens of the output, before it `NONE`.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.words = torch.empty(num_rows, 0, 1, dtype=torch.int32, device=device)
        self.recent = torch.empty(num_rows, 0, dtype=torch.int32, device=device)

    def set_row(
        self, row: int, words: Sequence[Sequence[int]], output_token_ids: Sequence[int]
    ) -> None:
        """Overwrites the row; of `words` those of one token are left to `fill_bias`."""
        words = [word for word in words if len(word) > 1]
        self.make_room(len(words), max(map(len, words), default=1))
        most, longest = self.words.shape[1:]
        if most == 0:
            return
        padded = [[ANY] * (longest - len(word)) + list(word) for word in words]
        padded += [[NEVER] * longest] * (most - len(words))
        self.words[row] = move(padded, torch.int32, self.words.device)
        latest = [NONE] * (longest - 1) + list(output_token_ids[1 - longest :])
        self.recent[row] = move(latest[1 - longest :], torch.int32, self.words.device)

    def make_room(self, most: int, longest: int) -> None:
        """Makes the tables wide enough for so many words of so many tokens."""
        wider = max(0, longest - self.words.shape[2])
        more = max(0, most - self.words.shape[1])
        if wider or more:
            with torch.inference_mode(False):  # tensors that anybody may change
                words = pad(self.words, (wider, 0), value=ANY)
                self.words = pad(words, (0, 0, 0, more), value=NEVER)
                self.recent = pad(self.recent, (wider, 0), value=NONE)

    def record(self, rows: Tensor, token_ids: Tensor) -> None:
        """Appends a token to each of these rows, both `[B]`; -1 appends none."""
        recent, token_ids = self.recent.index_select(0, rows), token_ids[:, None]
        longer = torch.cat([recent[:, 1:], token_ids.to(recent.dtype)], dim=1)
        recent = torch.where(token_ids >= 0, longer, recent)
        self.recent.index_copy_(0, rows, recent)


def forbid_bad_words(logits: Tensor, words: Tensor, recent: Tensor) -> Tensor:
    """`-inf` for the last token of each word whose others have been written.

    Args:
        logits: `[B, V]`.
        words: `[B, M, L]`, see `BadWords`.
        recent: `[B, L - 1]`.
    """
    before, last = words[..., :-1], words[..., -1].long().clamp(min=0)
    matches = ((before == recent[:, None]) | (before == ANY)).all(dim=-1)  # [B, M]
    added = torch.zeros_like(matches, dtype=logits.dtype)
    return logits.scatter_add(1, last, added.masked_fill(matches, float("-inf")))


class TokenTables:
    """What each row asks of single ids: tables `[R, V]`, made when the first row asks.

    Attributes:
        made: the tables that there are, by their names in `SamplingMetadata`.
    """

    DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "prompt_mask": torch.bool,
        "output_counts": torch.int32,
        "stop_token_mask": torch.bool,
        "logit_bias": torch.float32,
    }

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.shape, self.device = (num_rows, vocab_size), device
        self.made: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """The table of that name, `[R, V]`, full of zeros when first asked for."""
        if name not in self.made:
            with torch.inference_mode(False):  # a tensor that anybody may change
                self.made[name] = torch.zeros(
                    self.shape, dtype=self.DTYPES[name], device=self.device
                )
        return self.made[name]

    def set_row(
        self,
        row: int,
        asked: Mapping[str, Any],
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        stop_token_ids: Collection[int] = (),
        output_token_ids: Sequence[int] = (),
        bad_words_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        """Overwrites the row in all tables; `asked` is what `read_wishes` has read."""
        for table in self.made.values():
            table[row].zero_()
        to_ids = partial(move, dtype=torch.int64, device=self.device)
        if "repetition_penalty" in asked:
            self.get("prompt_mask")[row].index_fill_(0, to_ids(prompt_token_ids), True)
            written = to_ids(output_token_ids)
            ones = torch.ones_like(written, dtype=torch.int32)
            self.get("output_counts")[row].scatter_add_(0, written, ones)
        if "min_positions" in asked:
            stops = to_ids([i for i in stop_token_ids if 0 <= i < self.shape[1]])
            self.get("stop_token_mask")[row].index_fill_(0, stops, True)
        if "logit_bias" in asked:
            fill_bias(self.get("logit_bias")[row], params, bad_words_ids)

    def record(self, rows: Tensor, token_ids: Tensor) -> None:
        """Counts a token in each of these rows, both `[B]`; -1 counts nothing."""
        counts = self.made["output_counts"]
        places = rows * self.shape[1] + token_ids.clamp(min=0)
        drawn = (token_ids >= 0).to(counts.dtype)
        counts.view(-1).scatter_add_(0, places, drawn)


FLOATS = ("temperature", "min_p", "top_p", *PENALTIES)
INTS = ("seeds", "sample_indices", "top_k", "min_positions")


class SamplingRows:
    """What each running request asks of the sampler: one row each, kept on the device.

    Args:
        num_rows: `R`, the most requests that have a row at once.
        vocab_size: `V`.
        device: where the rows are.

    Attributes:
        last_token_ids: `[R]` int64, what each drew last; 0 if that was no token.
    """

    NEEDED_BY: ClassVar[dict[str, str]] = {  # tables that a step does not change
        "prompt_mask": "repetition_penalty",
        "stop_token_mask": "min_positions",
        "logit_bias": "logit_bias",
    }

    def __init__(
        self, num_rows: int, vocab_size: int, device: torch.device | str
    ) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        # 1 - top_p needs the digits of float64, which Apple's GPUs do not have.
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        self.floats = torch.zeros(num_rows, len(FLOATS), dtype=exact, device=device)
        self.ints = torch.zeros(num_rows, len(INTS), dtype=torch.int64, device=device)
        self.tables = TokenTables(num_rows, vocab_size, self.device)
        self.bad_words = BadWords(num_rows, self.device)
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.asked: list[dict[str, Any]] = [{} for _ in range(num_rows)]
        self.gathered: tuple[list[int], dict[str, Any]] | None = None
        self.united: tuple[list[int], set[str]] = [], set()

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        sample_index: int,
        prompt_token_ids: Sequence[int],
        stop_token_ids: Collection[int],
        output_token_ids: Sequence[int] = (),
        bad_words_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        """A request takes the row; nothing is left of the one that had it before.

        Args:
            row: from 0 to `R - 1`.
            params: of the request, checked against the vocabulary.
            seed: of its noise, 64 bits.
            sample_index: which of the `n` samples of its prompt it is.
            prompt_token_ids: its prompt.
            stop_token_ids: EOS and stop ids, which `min_tokens` forbids at first.
            output_token_ids: what it has written, if it comes back.
            bad_words_ids: the ids of each word that it must not write.
        """
        ids = prompt_token_ids, stop_token_ids, output_token_ids, bad_words_ids
        length, size = len(prompt_token_ids), self.vocab_size
        asked = read_wishes(params, length, stop_token_ids, bad_words_ids, size)
        self.set_columns(row, asked, seed, sample_index)
        self.tables.set_row(row, asked, params, *ids)
        self.bad_words.set_row(row, bad_words_ids, output_token_ids)

    def set_columns(
        self, row: int, asked: dict[str, Any], seed: int, sample_index: int
    ) -> None:
        """Overwrites the single numbers of the row."""
        known = {**OFF, "min_positions": 0, **asked, "sample_indices": sample_index}
        known["seeds"] = (seed + 2**63) % 2**64 - 2**63  # as 64 bits
        for packed, names in ((self.floats, FLOATS), (self.ints, INTS)):
            host = torch.tensor([known[name] for name in names], dtype=packed.dtype)
            host = host.pin_memory() if self.device.type == "cuda" else host
            packed[row].copy_(host, non_blocking=True)
        self.asked[row], self.gathered, self.united = asked, None, ([], set())

    def get_wishes(self, rows: Sequence[int]) -> set[str]:
        """What these rows ask for, all together; see `read_wishes`."""
        if self.united[0] != list(rows):
            self.united = list(rows), set().union(*(self.asked[row] for row in rows))
        return self.united[1]

    def gather(
        self, rows: Sequence[int], index: Tensor, positions: Tensor
    ) -> SamplingMetadata:
        """What the sampler needs to know in a step that draws for these rows.

        Args:
            rows: `B` different ones, known to the host.
            index: the same, `[B]` int64 on the device.
            positions: `[B]` int64, the place that each drawn token will take.
        """
        if self.gathered is None or self.gathered[0] != list(rows):
            self.gathered = list(rows), self.gather_columns(rows, index)
        step = SamplingMetadata(positions=positions, rows=index, **self.gathered[1])
        if step.repetition_penalty is not None:
            step.output_counts = self.tables.get("output_counts").index_select(0, index)
        if step.bad_words is not None:
            step.recent_tokens = self.bad_words.recent.index_select(0, index)
        return step

    def gather_columns(self, rows: Sequence[int], index: Tensor) -> dict[str, Any]:
        """What stays the same as long as these rows run on; `gather` keeps it."""
        asked = {"seeds", "sample_indices"} | self.get_wishes(rows)
        exact = self.floats.index_select(0, index).T.contiguous()  # [6, B]
        ints = self.ints.index_select(0, index).T.contiguous()  # [4, B]
        columns = dict(zip(FLOATS + INTS, [*exact.float(), *ints], strict=True))
        columns["top_p"] = exact[FLOATS.index("top_p")]
        found = {name: value for name, value in columns.items() if name in asked}
        for name, wish in self.NEEDED_BY.items():
            if wish in asked:
                found[name] = self.tables.get(name).index_select(0, index)
        if "bad_words" in asked:
            found["bad_words"] = self.bad_words.words.index_select(0, index)
        return found | combine_wishes([self.asked[row] for row in rows])

    def record(self, metadata: SamplingMetadata, token_ids: Tensor) -> None:
        """After a step: keeps and counts what was drawn, without waiting for the device.

        Args:
            metadata: of the draw.
            token_ids: `[B]`; a row whose id is -1 has drawn nothing, and nothing is counted.
        """
        known = token_ids.clamp(min=0)  # -1 is no token that could run
        self.last_token_ids.index_copy_(0, metadata.rows, known)
        if metadata.output_counts is not None:
            self.tables.record(metadata.rows, token_ids)
        if metadata.bad_words is not None:
            self.bad_words.record(metadata.rows, token_ids)
