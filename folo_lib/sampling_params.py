"""How a request wants its tokens drawn and when it wants to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from folo_lib.vllm_names import ABSENT_PARAMS, explain_unknown

__all__ = ["SamplingParams"]

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 0.01
"""Below it, and above 0, logits divided by the temperature overflow in half precision."""

MAX_N = 16_384
"""Most samples of a prompt, as in vLLM."""

MAX_LOGIT_BIAS = 100.0
"""Larger biases, up or down, count as this much."""


@explain_unknown("SamplingParams has no parameter", ABSENT_PARAMS)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Names, defaults and ranges of vLLM's `SamplingParams`.

    Attributes:
        n: samples of each prompt, up to 16,384; sample `i` draws with its own noise.
        temperature: 0 is greedy, the most likely token; above 0, logits are divided by it.
            In [0, 2]; between 0 and 0.01 it is raised to 0.01, with a warning.
        top_p: keep the fewest most likely tokens whose probabilities reach it. In (0, 1].
        top_k: keep the `k` most likely tokens, ties included; 0 or -1: all.
        min_p: keep tokens at least `min_p` times as likely as the likeliest. In [0, 1].
        presence_penalty: subtracted from the logits of tokens in the output. In [-2, 2].
        frequency_penalty: the same for each time that the token occurs. In [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of tokens in
            prompt or output, as in Hugging Face. Above 0.
        seed: makes the draw repeatable, in [-2**63, 2**64); None takes a fresh seed, which
            the output names.
        max_tokens: most tokens to make; None: up to the model's limit.
        min_tokens: tokens to make before EOS, a stop id or a stop string may end it.
        stop: string or strings whose appearance in the text ends it.
        stop_token_ids: token ids that end it, beside the checkpoint's EOS ids.
        ignore_eos: go on after EOS.
        include_stop_str_in_output: leave the stop string, or the text of the token that
            stopped, in the text.
        logprobs: log-probabilities of this many most likely tokens at each step, and of
            the chosen one; -1: of all tokens. None: none.
        prompt_logprobs: the same for each token of the prompt after the first. The whole
            prompt is run for them, so nothing of it is taken from the prefix cache.
        logit_bias: a dict from token id to what is added to its logit, clamped to
            [-100, 100].
        allowed_token_ids: no other ids are drawn; None: all are allowed.
        bad_words: strings that are not written, neither as they are nor after a space.
            Only what is written counts, not the prompt.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: make text at all.

    Numbers may be of NumPy's types; sequences become tuples, and `logit_bias` a dict of its
    own.

    Raises:
        ValueError: if a value is out of range, naming it, the range and a way out.
        TypeError: if a value is of the wrong kind; True is not a number here.

    Example:
        >>> from folo_lib import SamplingParams
        >>> SamplingParams(temperature=0.8, stop="\\n").stop
        ('\\n',)
        >>> SamplingParams(temperature=5)
        Traceback (most recent call last):
        ValueError: temperature=5 must be at least 0 and at most 2; 0 is greedy.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        self._normalize_stops()
        self._normalize_bans()
        self._check_bool("ignore_eos")
        self._check_bool("include_stop_str_in_output")
        self._check_bool("skip_special_tokens")
        self._check_bool("detokenize")
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop={self.stop!r} is looked for in the text, and detokenize=False makes "
                "none: set detokenize=True, or stop at stop_token_ids."
            )
        self._check_int("n", at_least=1)
        if self.n > MAX_N:
            raise ValueError(
                f"n={self.n} must be at most {MAX_N}: for more samples pass the prompt "
                "several times."
            )
        self._check_int("top_k", at_least=-1, cure="0 or -1 keeps all tokens")
        self._check_int("min_tokens", at_least=0)
        if self.max_tokens is not None:
            self._check_int(
                "max_tokens", at_least=1, cure="None goes to the model's limit"
            )
            if self.min_tokens > self.max_tokens:
                raise ValueError(
                    f"min_tokens={self.min_tokens} must be at most max_tokens="
                    f"{self.max_tokens}: lower the one or raise the other."
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, at_least=-1, cure="-1 is all, None is none")
        if self.seed is not None:
            self._check_int("seed", at_least=-(2**63), cure="None takes a fresh seed")
            if self.seed >= 2**64:
                raise ValueError(
                    f"seed={self.seed} must be below 2**64: 64 bits is what the noise "
                    "is made from. None takes a fresh seed."
                )
        self._check_float("temperature", 0, 2, cure="0 is greedy")
        self._check_float("top_p", 0, 1, above=True, cure="1 keeps all tokens")
        self._check_float("min_p", 0, 1, cure="0 keeps all tokens")
        self._check_float("presence_penalty", -2, 2, cure="0 is off")
        self._check_float("frequency_penalty", -2, 2, cure="0 is off")
        self._check_float(
            "repetition_penalty", 0, math.inf, above=True, cure="1 is off"
        )
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"n={self.n} with temperature=0 would make the same greedy text {self.n} "
                "times: set n=1, or a temperature above 0."
            )
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning(
                "temperature=%g is raised to %g, below which logits overflow; "
                "0 is greedy.",
                self.temperature,
                MIN_TEMPERATURE,
            )
            self._set("temperature", MIN_TEMPERATURE)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the way of a frozen dataclass

    def _normalize_stops(self) -> None:
        """Makes `stop` and `stop_token_ids` tuples."""
        stop = self.stop
        strings = (stop,) if isinstance(stop, str) else _as_tuple("stop", stop)
        for string in strings:
            if not isinstance(string, str):
                raise TypeError(f"stop holds {string!r}: it takes a string or several.")
            if not string:
                raise ValueError(
                    f"stop={stop!r} holds an empty string, which is found everywhere: "
                    "leave it out."
                )
        self._set("stop", strings)
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        cure = "Strings go into stop."
        self._set(
            "stop_token_ids",
            tuple(_as_token_id("stop_token_ids", i, cure) for i in stop_token_ids),
        )

    def _normalize_bans(self) -> None:
        """Makes `bad_words` and `allowed_token_ids` tuples, and `logit_bias` a dict."""
        if isinstance(self.bad_words, str):
            raise TypeError(
                f"bad_words={self.bad_words!r} must be a sequence of strings: pass "
                f"[{self.bad_words!r}]."
            )
        words = _as_tuple("bad_words", self.bad_words)
        for word in words:
            if not isinstance(word, str):
                raise TypeError(
                    f"bad_words holds {word!r}: it takes strings. Ids go into logit_bias, "
                    "with -100, or all others into allowed_token_ids."
                )
            if not word.strip(" "):
                raise ValueError(
                    f"bad_words holds {word!r}, and a word is more than spaces: leave it "
                    "out."
                )
            try:
                word.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"bad_words holds {word!r}, where {word[error.start]!r} is half a "
                    "surrogate pair and no character: leave it out."
                ) from None
        self._set("bad_words", tuple(dict.fromkeys(words)))
        if self.allowed_token_ids is not None:
            name, cure = "allowed_token_ids", "Text is to be tokenized first."
            allowed = _as_tuple(name, self.allowed_token_ids)
            if not allowed:
                raise ValueError(
                    "allowed_token_ids is empty, so there is nothing to draw: name an id, "
                    "or None, which allows all."
                )
            ids = tuple(_as_token_id(name, i, cure) for i in allowed)
            self._set(name, tuple(dict.fromkeys(ids)))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(
                    f"logit_bias={self.logit_bias!r} must be a dict from token id to what "
                    "is added to its logit, or None."
                )
            items = self.logit_bias.items()
            self._set("logit_bias", dict(_as_bias(*item) for item in items))

    def _check_bool(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False.")

    def _check_int(self, name: str, at_least: int, cure: str = "") -> None:
        value = getattr(self, name)
        hint = f"; {cure}." if cure else "."
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(
                f"{name}={value!r} must be an int of at least {at_least}{hint}"
            )
        if value < at_least:
            raise ValueError(f"{name}={value} must be at least {at_least}{hint}")
        self._set(name, int(value))

    def _check_float(
        self, name: str, low: float, high: float, cure: str, above: bool = False
    ) -> None:
        """Checks for a finite number from `low` (or `above` it) to `high`."""
        value = getattr(self, name)
        limits = f"{'above' if above else 'at least'} {low}"
        limits += " and finite" if high == math.inf else f" and at most {high}"
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} must be a number {limits}; {cure}.")
        number = float(value)
        if not (low <= number <= high and math.isfinite(number)) or (
            above and number == low
        ):
            raise ValueError(f"{name}={value} must be {limits}; {cure}.")
        self._set(name, number)


def _as_token_id(name: str, token_id: Any, cure: str) -> int:
    if isinstance(token_id, bool) or not isinstance(token_id, Integral):
        raise TypeError(
            f"{name} holds {token_id!r}: it takes ids, which are ints. {cure}"
        )
    if token_id < 0:
        raise ValueError(
            f"{name} holds {token_id}: ids are 0 or more, and below the size of the "
            "vocabulary."
        )
    return int(token_id)


def _as_bias(token_id: Any, value: Any) -> tuple[int, float]:
    """An entry of `logit_bias`; JSON, whose keys are strings, may write `"5"` for 5."""
    if isinstance(token_id, str) and token_id.isascii() and token_id.isdigit():
        token_id = int(token_id)
    cure = "Text is to be tokenized first."
    checked = _as_token_id("logit_bias", token_id, cure)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"logit_bias holds {value!r} for id {checked}: a number is expected, which "
            "is added to its logit."
        )
    number = float(value)
    if math.isnan(number):
        raise ValueError(
            f"logit_bias holds nan for id {checked}: a bias is from -{MAX_LOGIT_BIAS:g} "
            f"to {MAX_LOGIT_BIAS:g}."
        )
    return checked, max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, number))


def _as_tuple(name: str, values: Iterable[Any] | None) -> tuple[Any, ...]:
    try:
        return () if values is None else tuple(values)
    except TypeError:
        raise TypeError(f"{name}={values!r} must be a sequence, or None.") from None
