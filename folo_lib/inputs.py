"""Judging what users pass: prompts, sampling parameters, messages and generation configs."""

from __future__ import annotations

import difflib
import json
import logging
import os
import random
import reprlib
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Number
from typing import TYPE_CHECKING, Any

from folo_lib.checkpoint import find_checkpoint
from folo_lib.request import (
    IncrementalDetokenizer,
    Request,
    RequestMetrics,
    TokenBytes,
)
from folo_lib.sampling_params import SamplingParams
from folo_lib.vllm_names import ABSENT_PROMPT_KEYS, keep_known

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = [
    "DefaultParams",
    "InputProcessor",
    "apply_chat_template",
    "default_sampling_params",
    "get_eos_token_ids",
    "load_generation_config",
    "read_variables",
    "to_token_ids",
]

logger = logging.getLogger(__name__)

CHAT_OPTIONS = (
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
)
"""Options of `chat` that every template has; others are variables that it must read."""

CHAT_VARIABLES = ("tools", "documents", "enable_thinking")
"""Well-known variables, which many templates read and others do not."""

TOKENIZING = ("tokenize", "padding", "truncation", "return_dict", "return_tensors")
"""Options of Hugging Face's `apply_chat_template` that have no meaning here."""

SAMPLING_NAMES = tuple(field.name for field in fields(SamplingParams))

OBEYED = {
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
"""Fields of a generation config, and what they are called in `SamplingParams`."""

OBEYED_IF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

IGNORED = {
    "begin_suppress_tokens": None,
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "sequence_bias": None,
    "suppress_tokens": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""Fields that Hugging Face's `generate()` obeys and this engine does not, when neutral."""

IGNORED_IF_SAMPLING = {
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
    "typical_p": 1,
}


@dataclass(frozen=True, kw_only=True)
class DefaultParams(SamplingParams):
    """`SamplingParams` of a generation config that asks for what they have no name for.

    Attributes:
        max_length: most tokens of prompt and output together; None: no such limit.
        bad_words_ids: the ids of each word that is not to be written.
    """

    max_length: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()


def to_token_ids(prompt: Any, vocab_size: int) -> list[int]:
    """A prompt of token ids as a list of ints.

    Args:
        prompt: a sequence of ints, or a tensor or array `[S]`.
        vocab_size: `V`.

    Raises:
        TypeError: if it is not a sequence of ints.
        ValueError: if it has not one dimension, or an id is not in the vocabulary.
    """
    shape = list(getattr(prompt, "shape", [1]))
    if len(shape) != 1:
        raise ValueError(
            f"prompt has shape {shape}, and [S] is expected: pass a batch as a list of "
            "lists of ids, without the padding, which the model would read as text."
        )
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        raise TypeError(
            f"prompt is a {type(prompt).__name__}, and a str or a sequence of token "
            f"ids is expected: {_cure(prompt)}."
        )
    if set(map(type, values)) == {int} and 0 <= min(values) <= max(values) < vocab_size:
        return list(values)  # nearly always: nothing is looked at one by one
    for at, token_id in enumerate(values):
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise TypeError(
                f"prompt has {reprlib.repr(token_id)} at position {at}, and token ids "
                "are ints: pass text as a str, and several prompts as a list of them."
            )
        if not 0 <= int(token_id) < vocab_size:
            raise ValueError(
                f"prompt has token id {token_id} at position {at}, and ids go from 0 "
                f"to {vocab_size - 1}: was it made with another model's tokenizer?"
            )
    return [int(token_id) for token_id in values]


def _cure(prompt: Any) -> str:
    """What to pass in place of a prompt of the wrong kind."""
    if isinstance(prompt, Mapping):
        if "text" in prompt:
            return "pass what its 'text' holds, or call it 'prompt'"
        if "role" in prompt:
            return "it is a message of a conversation, so pass the messages to chat()"
        if "prompt_embeds" in prompt:
            return "embeddings are not taken"
        return (
            "a dict has 'prompt' or 'prompt_token_ids', and of a tokenizer's output "
            "take .input_ids"
        )
    if isinstance(prompt, (bytes, bytearray)):
        return "Decode bytes, as in prompt.decode()"
    if isinstance(prompt, (set, frozenset)):
        return "a set has no order, so pass a list"
    if isinstance(prompt, os.PathLike):
        return "read the file and pass its text"
    return "pass list(prompt)" if hasattr(prompt, "__iter__") else "pass one of them"


PROMPT_KEYS = ("prompt", "prompt_token_ids")
"""Of a prompt that is a dict, as vLLM takes it: its text, its ids, or both."""


def open_prompt(prompt: Any) -> tuple[Any, str | None]:
    """What is to be run of a prompt, text or ids, and its text if that is known.

    Args:
        prompt: as it is, or in a dict under `"prompt"` or `"prompt_token_ids"`; if there are
            both, the ids are run.

    Raises:
        TypeError: if a dict has other keys, or text and ids are mixed up.
    """
    text: Any
    if not isinstance(prompt, Mapping) or not any(
        name in prompt for name in PROMPT_KEYS
    ):
        return prompt, prompt if isinstance(prompt, str) else None
    kept = keep_known("a prompt has no key", prompt, PROMPT_KEYS, ABSENT_PROMPT_KEYS)
    text, ids = kept.get("prompt"), kept.get("prompt_token_ids")
    if not isinstance(text, str | None):
        raise TypeError(
            f"'prompt' holds a {type(text).__name__}, and text is expected there: token "
            "ids go under 'prompt_token_ids'."
        )
    if isinstance(ids, str):
        raise TypeError(
            "'prompt_token_ids' holds a str, and ids are expected there: text goes under "
            "'prompt'."
        )
    if text is None and ids is None:
        raise TypeError(
            "the prompt has neither text nor ids: give it 'prompt' or 'prompt_token_ids'."
        )
    return text if ids is None else ids, text


class InputProcessor:
    """Turns prompts into requests, and says what is wrong with those it cannot.

    Several threads may use one: a lock keeps them apart where the tokenizer works, its
    chat template is filled in, or a seed is drawn.

    Args:
        tokenizer: byte-level; None: there is no text, only ids.
        vocab_size: `V` of the model.
        max_model_len: most tokens of prompt and output together.
        eos_token_ids: all that end a text; those that are no ids of the model end none.
        default_params: for prompts without any; None: those of `SamplingParams`.
        seed: of the random seeds for requests without one.

    Raises:
        ValueError: if the tokenizer is not byte-level, or its chat template is broken.
        TypeError: if the seed is not an int.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
        default_params: SamplingParams | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(f"seed={seed!r} must be an int.")
        self.tokenizer = tokenizer
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.eos_token_id: int | None = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_ids = tuple(i for i in eos_token_ids if 0 <= i < vocab_size)
        self.default_params = default_params or SamplingParams()
        self.token_bytes = None if tokenizer is None else TokenBytes(tokenizer)
        # `Random` takes -5 for 5, but not for "-5".
        self._seeds = random.Random(int(seed) if seed >= 0 else str(int(seed)))
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._special: dict[str, int] = {}  # texts that skip_special_tokens leaves out
        if tokenizer is not None:
            added = tokenizer.added_tokens_decoder.items()
            self._special = {token.content: i for i, token in added if token.special}
            _check_templates(tokenizer)

    def process_request(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        arrival_time: float | None = None,
    ) -> list[Request]:
        """The requests of one prompt, one for each sample.

        Args:
            prompt: a str, or a sequence, tensor or array of token ids, or a dict with
                either, see `open_prompt`.
            request_id: None makes a UUID.
            arrival_time: of `time.perf_counter()`; None is now.
        """
        now = time.perf_counter() if arrival_time is None else arrival_time
        if not isinstance(request_id, str | None):
            raise TypeError(f"request_id={request_id!r} must be a str, or None.")
        [group] = self._make_requests([prompt], params, now, request_id=request_id)
        return group

    def process_requests(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[list[Request]]:
        """The requests of each prompt; all prompts are checked before any is made.

        Args:
            prompts: a str, token ids, a dict with either, or a list, array or iterator of
                those.
            params: one for all of them, or one for each; None: the defaults.
        """
        now = time.perf_counter()
        if isinstance(prompts, Iterator):
            prompts = list(prompts)
        elif hasattr(prompts, "tolist") and len(getattr(prompts, "shape", ())) == 1:
            prompts = prompts.tolist()
        several = isinstance(prompts, Sequence) and not isinstance(
            prompts, (str, bytes, bytearray)
        )
        if not several or (len(prompts) > 0 and isinstance(prompts[0], Number)):
            prompts = [prompts]
        return self._make_requests(prompts, params, now)

    def process_chat(
        self,
        messages: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[list[Request]]:
        """The requests of one conversation, or of each of a list of them.

        Args:
            messages: dicts with `role` and `content`, or a list of such conversations.
            params: one for all of them, or one for each; None: the defaults.
            options: see `apply_chat_template`.
        """
        now = time.perf_counter()
        if isinstance(messages, (str, bytes, Mapping)):
            raise TypeError(
                f"messages is a {type(messages).__name__}: pass a list of dicts with "
                "'role' and 'content', such as [{'role': 'user', 'content': 'Hello'}]; "
                "text without roles goes to generate()."
            )
        if hasattr(messages, "tolist"):
            messages = messages.tolist()
        elif isinstance(messages, Iterator):
            messages = list(messages)
        if not isinstance(messages, Sequence):
            raise TypeError(
                f"messages is a {type(messages).__name__}: pass a list of dicts with "
                "'role' and 'content', or a list of such lists."
            )
        several = len(messages) == 0 or isinstance(messages[0], (list, tuple))
        texts = []
        for position, conversation in enumerate(messages if several else [messages]):
            name = f"messages[{position}]" if several else "messages"
            with self._lock:
                texts.append(
                    apply_chat_template(self.tokenizer, conversation, options, name)
                )
        return self._make_requests(texts, params, now, is_chat=True)

    def _make_requests(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams | None] | None,
        now: float,
        is_chat: bool = False,
        request_id: str | None = None,
    ) -> list[list[Request]]:
        """Checks all prompts and params, then makes the requests of each prompt.

        Args:
            request_id: of a single prompt; None: a UUID for each.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        elif isinstance(params, Iterator):
            params = list(params)
        if isinstance(params, str) or not isinstance(params, Sequence):
            raise TypeError(_not_params(params))
        if len(params) != len(prompts):
            raise ValueError(
                f"there are {len(params)} sampling params and {len(prompts)} prompts: "
                "pass one for each, or a single one for all."
            )
        each = [self.default_params if own is None else own for own in params]
        texts: list[str | None] = []
        token_ids, limits = [], []
        bad_words: list[tuple[tuple[int, ...], ...]] = []
        for position, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            try:
                what, text = open_prompt(prompt)
                texts.append(text)
                token_ids.append(self.encode(what, not is_chat))
                limits.append(self.check_params(own, len(token_ids[-1])))
                again = position > 0 and own is each[position - 1]
                bad_words.append(
                    bad_words[-1] if again else self.get_bad_words_ids(own)
                )
            except (TypeError, ValueError) as error:
                if len(prompts) == 1:
                    raise
                kind = TypeError if isinstance(error, TypeError) else ValueError
                name = "messages" if is_chat else "prompts"
                raise kind(f"{name}[{position}]: {error}") from error
        with self._lock:  # after the checks: a call that fails draws nothing
            seeds = [
                self._seeds.getrandbits(63) if own.seed is None else own.seed
                for own in each
            ]
        groups = []
        for text, ids, own, max_tokens, seed, words in zip(
            texts, token_ids, each, limits, seeds, bad_words, strict=True
        ):
            group_id = str(uuid.uuid4()) if request_id is None else request_id
            groups.append(
                [
                    Request(
                        request_id=group_id,
                        index=index,
                        prompt=text,
                        prompt_token_ids=ids,
                        params=own,
                        seed=seed,
                        max_tokens=max_tokens,
                        eos_token_id=self.eos_token_id,
                        eos_token_ids=self.eos_token_ids,
                        bad_words_ids=words,
                        detokenizer=IncrementalDetokenizer(self.token_bytes, own)
                        if self.token_bytes is not None and own.detokenize
                        else None,
                        metrics=RequestMetrics(now),
                    )
                    for index in range(own.n)
                ]
            )
        return groups

    def encode(self, prompt: Any, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, which may be ids already."""
        if not isinstance(prompt, str):
            return to_token_ids(prompt, self.vocab_size)
        if self.tokenizer is None:
            raise ValueError(
                f"prompt {prompt[:40]!r} is text, and there is no tokenizer: pass "
                "token ids, or give the engine a tokenizer."
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt has {prompt[error.start]!r} at position {error.start}, half a "
                "surrogate pair and no character: mend it where it was decoded."
            ) from None
        with self._lock:  # two settings at once, and it raises "Already borrowed"
            ids = self.tokenizer(
                prompt, add_special_tokens=add_special_tokens
            ).input_ids
        return to_token_ids(ids, self.vocab_size)

    def check_params(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        """How many tokens a prompt may get: `max_tokens`, or the fewer there is room for.

        Raises:
            TypeError: if these are not `SamplingParams`.
            ValueError: if the model cannot serve them, or the prompt is empty, or leaves
                no room for one token or for `min_tokens`.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(_not_params(params))
        self._check_stops(params)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if (value or 0) > self.vocab_size:
                raise ValueError(
                    f"{name}={value} is more than the {self.vocab_size} tokens of the "
                    "vocabulary: -1 asks for all."
                )
        limit, name = self.max_model_len, "max_model_len"
        cure = "raise max_model_len"
        max_length = params.max_length if isinstance(params, DefaultParams) else None
        if max_length is not None and max_length < limit:
            limit, name = max_length, "max_length"
            cure = "pass sampling params, for max_length is of the generation config"
        room = limit - num_prompt_tokens
        if num_prompt_tokens == 0:
            raise ValueError(
                "the prompt is empty: the model needs a token to go on from."
            )
        if room < 1:
            raise ValueError(
                f"the prompt has {num_prompt_tokens} tokens, and with {name}={limit} at "
                f"most {limit - 1} leave room for an answer: shorten it, or {cure}."
            )
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens={params.min_tokens} does not fit: the prompt has "
                f"{num_prompt_tokens} of {name}={limit} tokens. Ask for at most {room}, "
                f"shorten the prompt, or {cure}."
            )
        return min(room, params.max_tokens or room)

    def _check_stops(self, params: SamplingParams) -> None:
        """Can each stop be found, and is each id in the vocabulary?"""
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop={params.stop!r} is looked for in the text, and without a "
                "tokenizer there is none: use stop_token_ids."
            )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            beyond = [i for i in getattr(params, name) or () if i >= self.vocab_size]
            if beyond:
                raise ValueError(
                    f"{name} holds {beyond[0]}, and ids go from 0 to "
                    f"{self.vocab_size - 1}: leave it out."
                )
        for text, token_id in self._special.items():
            found = [stop for stop in params.stop or () if text in stop]
            if found and params.skip_special_tokens and text not in self._warned:
                self._warned.add(text)
                logger.warning(
                    "stop=%r will not be found: %r is a special token, which "
                    "skip_special_tokens=True leaves out of the text. Use "
                    "stop_token_ids=[%d], or skip_special_tokens=False.",
                    found[0],
                    text,
                    token_id,
                )

    def get_bad_words_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The ids of each word that must not be written, in all ways to write it.

        A word of `bad_words` is written in two ways, at the start of a text and after a
        space. `bad_words_ids` of a generation config are ids already; an EOS id among
        them forbids nothing, as in Hugging Face.

        Raises:
            ValueError: if there is no tokenizer, an id is not in the vocabulary, or no id
                is left that could be drawn at first.
        """
        found: list[tuple[int, ...]] = []
        if params.bad_words:
            if self.tokenizer is None:
                raise ValueError(
                    f"bad_words={params.bad_words!r} are text, and there is no tokenizer: "
                    "forbid ids with logit_bias or allowed_token_ids."
                )
            bare = [word.lstrip(" ") for word in params.bad_words]
            texts = [prefix + word for word in bare for prefix in ("", " ")]
            with self._lock:
                written = self.tokenizer(texts, add_special_tokens=False).input_ids
            found += [tuple(word) for word in written if word]
        if isinstance(params, DefaultParams):
            eos = {(token_id,) for token_id in self.eos_token_ids}
            found += [word for word in params.bad_words_ids if word not in eos]
        for word in found:
            if max(word) >= self.vocab_size:
                raise ValueError(
                    f"a bad word has the ids {list(word)}, and ids go from 0 to "
                    f"{self.vocab_size - 1}: leave it out of bad_words, or of the "
                    "generation config's bad_words_ids."
                )
        self._check_choice(params, found)
        return tuple(dict.fromkeys(found))

    def _check_choice(
        self, params: SamplingParams, bad_words_ids: Sequence[tuple[int, ...]]
    ) -> None:
        """Raises an error if no token could be drawn at first."""
        reasons = []
        allowed = params.allowed_token_ids
        if allowed is not None:
            reasons.append(f"allowed_token_ids leaves {len(allowed)}")
        forbidden = {word[0] for word in bad_words_ids if len(word) == 1}
        if forbidden:
            reasons.append(f"bad words of one token forbid {len(forbidden)}")
        if params.min_tokens > 0:
            stops = {*(params.stop_token_ids or ())}
            stops.update(() if params.ignore_eos else self.eos_token_ids)
            reasons.append(
                f"min_tokens={params.min_tokens} forbids at first the {len(stops)} ids "
                "that end a text, which are EOS and stop_token_ids"
            )
            forbidden |= stops
        if len(forbidden) >= self.vocab_size or forbidden.issuperset(
            range(self.vocab_size) if allowed is None else allowed
        ):
            cure = "Set min_tokens=0, or forbid" if params.min_tokens > 0 else "Forbid"
            raise ValueError(
                f"{', and '.join(reasons)}, so of all {self.vocab_size} ids of the "
                f"vocabulary none is left to draw. {cure} fewer."
            )


def _not_params(value: Any) -> str:
    cure = "pass SamplingParams(temperature=0), for example"
    if isinstance(value, Mapping):
        cure = "pass SamplingParams(**params), if that is what the dict holds"
    elif type(value).__name__ == "GenerationConfig":
        cure = "pass folo_lib.inputs.default_sampling_params(params)"
    return f"sampling_params is a {type(value).__name__}, not SamplingParams: {cure}."


def _check_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises an error for a chat template that is broken."""
    templates: Any = tokenizer.chat_template
    if not isinstance(templates, Mapping):
        templates = {} if templates is None else {"default": templates}
    for name, template in templates.items():
        try:
            if not isinstance(template, str):
                raise ValueError(f"the chat template is a {type(template).__name__}")
            read_variables(template)
        except ValueError as error:
            raise ValueError(
                f"{error}. It is {name!r} of the tokenizer {tokenizer.name_or_path!r}: "
                "mend it (chat_template.jinja or tokenizer_config.json), or set "
                "tokenizer.chat_template = None."
            ) from error


@lru_cache
def read_variables(template: str) -> frozenset[str]:
    """The variables that a chat template reads, beside `messages`.

    Raises:
        ValueError: if it is not Jinja.
    """
    from jinja2 import TemplateSyntaxError, ext, meta, nodes, parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """Hugging Face's tag around what an assistant says; it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(template)
        environment.compile(tree)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is broken in line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # nested too deeply, ...
        raise ValueError(
            f"the chat template is broken: {type(error).__name__}: {error}"
        ) from error
    # A name that the template sets somewhere is its own, unless it first asks for it.
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    for asks in tree.find_all((nodes.Test, nodes.Filter)):
        if asks.name in ("defined", "undefined", "default", "d"):
            own -= {getattr(asks.node, "name", None)}
    given = {"messages", "raise_exception", "strftime_now", *environment.globals}
    return frozenset(meta.find_undeclared_variables(tree) - own - given)


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any] | None = None,
    name: str = "messages",
) -> str:
    """A conversation as the text of a prompt.

    Args:
        tokenizer: with a chat template.
        messages: each a dict with `role` and `content`, which is a str or a list of parts
            `{"type": "text", "text": ...}`, joined as they are.
        options: `chat_template`, `add_generation_prompt` (True), `continue_final_message`
            (True instead: the last message is not closed), and the variables that the
            template reads, such as `tools` or `enable_thinking`, here or in
            `chat_template_kwargs`.
        name: of the conversation, in messages of errors.

    Raises:
        TypeError: if an option is one that nobody reads, or of a wrong kind.
        ValueError: if there is no template, or it or a message cannot be used.
    """
    options = dict(options or {})
    extra = options.pop("chat_template_kwargs", None)
    if not isinstance(extra, Mapping | None):
        raise TypeError(f"chat_template_kwargs={reprlib.repr(extra)} must be a dict.")
    options = {**(extra or {}), **options}
    template = options.pop("chat_template", None)
    if not isinstance(template, str | None):
        raise TypeError(f"chat_template={reprlib.repr(template)} must be a str.")
    if tokenizer is None or not (template or tokenizer.chat_template):
        raise ValueError(
            "this checkpoint has no chat template, so it may be a base model: use "
            "generate() with text, or pass chat_template=..."
        )
    template = tokenizer.get_chat_template(template, options.get("tools"))
    _check_options(options, read_variables(template))
    conversation = _check_messages(messages, name)
    continues = options.pop("continue_final_message", False)
    adds_prompt = options.pop("add_generation_prompt", not continues)
    if continues and adds_prompt:
        raise ValueError(
            "continue_final_message=True goes on with the last message, and "
            "add_generation_prompt=True begins a new one: choose one of them."
        )
    options |= {"add_generation_prompt": adds_prompt, "chat_template": template}

    def write(conversation: list[dict[str, Any]]) -> str:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, continue_final_message=continues, **options
        )
        return str(text)

    try:
        return write(conversation)
    except Exception as error:  # a template may raise anything
        said = f"{type(error).__name__}: {error}"
    for end in range(1, len(conversation)):  # up to which message does it say so?
        try:
            write(conversation[:end])
        except Exception as error:
            if said == f"{type(error).__name__}: {error}":
                conversation = conversation[:end]
                break
    raise ValueError(
        f"{name}[{len(conversation) - 1}] cannot be written with the chat template, which "
        f"says: {said}"
    )


def _check_options(options: dict[str, Any], variables: frozenset[str]) -> None:
    """Raises an error for an option that neither the engine nor the template reads."""
    for name in ("tools", "documents"):
        wanted = options.pop(name, None)
        if not isinstance(wanted, list | tuple | None):
            raise TypeError(f"{name}={reprlib.repr(wanted)} must be a list.")
        if wanted:  # None and [] ask for nothing
            options[name] = wanted
    for name, kinds in [
        ("add_generation_prompt", bool),
        ("continue_final_message", bool | str),  # a str names the field to continue
    ]:
        if not isinstance(options.get(name, False), kinds):
            value = reprlib.repr(options[name])
            raise TypeError(f"{name}={value} must be True or False.")
    real = sorted({*CHAT_OPTIONS, *variables})
    for name, value in options.items():
        if name in real:
            continue
        [near] = difflib.get_close_matches(
            str(name), [*real, *SAMPLING_NAMES], n=1, cutoff=0.6
        ) or [""]
        shown = f"{name}={reprlib.repr(value)}"
        if name in CHAT_VARIABLES:
            cure = "the template has no place for it, so it can change nothing."
        elif name in TOKENIZING:
            cure = "leave it out, for chat() makes tokens of the text by itself."
        elif near in real:
            cure = f"did you mean {near}?"
        elif near:
            value = reprlib.repr(value)
            cure = f"it goes into sampling_params, as SamplingParams({near}={value})."
        else:
            cure = "leave it out."
        raise TypeError(
            f"{shown} is an option that neither chat() nor the chat template of this "
            f"model reads: {cure} The options are {', '.join(real)}."
        )


def _check_messages(messages: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a conversation, with content that every template can write."""
    example = "[{'role': 'user', 'content': 'Hello'}]"
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            f"messages is {reprlib.repr(messages)}: pass a list of dicts with 'role' and "
            f"'content', such as {example}, or a list of such lists. See {name}."
        )
    checked = []
    for position, message in enumerate(messages):
        where = f"{name}[{position}]"
        if hasattr(message, "model_dump"):  # as the openai client returns it
            message = message.model_dump(exclude_none=True)
        if not isinstance(message, Mapping):
            raise TypeError(
                f"{where} is a {type(message).__name__}, and a dict with 'role' and "
                f"'content' is expected: messages are passed as {example}."
            )
        if not isinstance(message.get("role"), str):
            raise ValueError(
                f"messages is {reprlib.repr(messages)}: pass a list of dicts with 'role' "
                f"and 'content', such as {example}. {where} has no role."
            )
        content = message.get("content")
        calls = message.get("tool_calls")
        if content is None and isinstance(calls, list | tuple) and calls:
            content = ""
        if isinstance(content, (list, tuple)):
            content = "".join(_text_of_part(part, where) for part in content)
        if content is None:
            raise ValueError(
                f"{where}, of role {message['role']!r}, has no content, and no "
                "tool_calls: give it text, or leave the message out."
            )
        if not isinstance(content, str):
            raise TypeError(
                f"{where}, of role {message['role']!r}, has content of type "
                f"{type(content).__name__}: pass text; json.dumps() makes it of data."
            )
        checked.append({**message, "content": content})
    return checked


def _text_of_part(part: Any, where: str) -> str:
    """The text of one part of a message."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind != "text":
        named = repr(kind) if kind is not None else f"kind {type(part).__name__}"
        raise ValueError(
            f"{where} has a part of type {named}, and this model reads text only: pass "
            "parts of the form {'type': 'text', 'text': ...}."
        )
    if not isinstance(part.get("text"), str):
        raise ValueError(
            f"{where} has a text part with text={reprlib.repr(part.get('text'))}: a str "
            "is expected."
        )
    return str(part["text"])


def load_generation_config(model: str | os.PathLike[str]) -> GenerationConfig | None:
    """The `generation_config.json` of a folder or hub id; None if it has none.

    Raises:
        ValueError: if it is damaged, or a field of it cannot be obeyed; the message names
            file, field and value.
    """
    path = find_checkpoint(model) / "generation_config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({type(error).__name__}: {error}): fetch it again, or "
            "remove it to go without."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, and an object with fields is "
            "expected: fetch it again, or remove it to go without."
        )
    _read_eos_token_ids(content.get("eos_token_id"), str(path))
    _read_params(content, str(path))
    from transformers import GenerationConfig

    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(path.parent)
    except Exception as error:  # whatever transformers says of a field
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    return config


def get_eos_token_ids(
    generation_config: Any, config: Any = None, tokenizer: Any = None
) -> list[int]:
    """The ids that end a text, as in vLLM: the checkpoint's and the tokenizer's.

    Args:
        generation_config: names the checkpoint's; each argument may be None.
        config: of the model, asked where the generation config names none.
        tokenizer: whose own EOS id is added.

    Raises:
        ValueError: if one of them names something that is not an id, nor a list of ids.
    """
    found: list[int] = []
    for name, source in [
        ("generation_config", generation_config),
        ("config", config),
        ("tokenizer", tokenizer),
    ]:
        if name != "config" or not found:
            where = getattr(source, "name_or_path", None) or name
            found += _read_eos_token_ids(getattr(source, "eos_token_id", None), where)
    return list(dict.fromkeys(found))


def _read_eos_token_ids(value: Any, where: str) -> list[int]:
    """What `eos_token_id` names: nothing, an id, or several."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if values is None:
        return []
    values = values if isinstance(values, (list, tuple)) else [values]
    for token_id in values:
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise ValueError(
                f"{where}: eos_token_id={reprlib.repr(value)} must be an int or a list of "
                f"ints, and {reprlib.repr(token_id)} is none: correct it there."
            )
    return [int(token_id) for token_id in values]


def default_sampling_params(config: GenerationConfig | None) -> SamplingParams:
    """What a generation config says, in the words of `SamplingParams`.

    Fields that Hugging Face's `generate()` would obey and this engine does not are named
    in a warning. Also different: `generate()` applies `min_p` after `top_p`, this engine
    before; and it leaves a stop string in the text.

    Args:
        config: of the checkpoint; None: the defaults of `SamplingParams`.

    Returns:
        Greedy unless `do_sample` is set. `max_tokens` is 16 unless the config limits the
        length; `DefaultParams` where it does so by `max_length`, or has `bad_words_ids`.

    Raises:
        ValueError: if a field cannot be obeyed, naming it.
    """
    if config is None:
        return SamplingParams()
    if not hasattr(config, "do_sample"):
        raise TypeError(
            f"generation_config is a {type(config).__name__}: pass transformers' "
            "GenerationConfig, or None."
        )
    unset = type(config)()  # before transformers 5.9 or so, max_length is 20 if not set
    named = {
        name: value
        for name, value in vars(config).items()
        if name != "max_length" or value != unset.max_length
    }
    params = _read_params(named, "generation_config")
    neutral: dict[str, Any] = {
        **IGNORED,
        **(IGNORED_IF_SAMPLING if config.do_sample else {}),
    }
    ignored = [
        f"{name}={reprlib.repr(named[name])}"
        for name, usual in neutral.items()
        if named.get(name) not in (None, usual, [], {})
    ]
    if ignored:
        logger.warning(
            "The generation config asks for what this engine does not do: %s.",
            ", ".join(ignored),
        )
    return params


def _read_bad_words_ids(value: Any, where: str) -> tuple[tuple[int, ...], ...]:
    """What `bad_words_ids` names: nothing, or a list of lists of ids."""
    words = () if value is None else value
    for word in words if isinstance(words, list | tuple) else [words]:
        ids = word if isinstance(word, list | tuple) else ()
        if not ids or any(type(i) is not int or i < 0 for i in ids):
            raise ValueError(
                f"{where}: bad_words_ids={reprlib.repr(value)} must be a list of words, "
                f"each a list of ids, and {reprlib.repr(word)} is none: correct it there."
            )
    return tuple(tuple(word) for word in words)


def _read_params(fields: Mapping[str, Any], where: str) -> SamplingParams:
    """The sampling params of a generation config, or an error that names the field."""
    samples = fields.get("do_sample") or False
    if not isinstance(samples, bool):
        raise ValueError(f"{where}: do_sample={samples!r} must be true or false.")
    names = dict(OBEYED)
    if samples:
        names |= {name: name for name in OBEYED_IF_SAMPLING}
    values: dict[str, Any] = {"top_k": 50} if samples else {"temperature": 0.0}
    values |= {
        ours: fields[theirs]
        for theirs, ours in names.items()
        if fields.get(theirs) is not None
    }
    kind: type[SamplingParams] = SamplingParams
    bad_words_ids = _read_bad_words_ids(fields.get("bad_words_ids"), where)
    if bad_words_ids:
        kind = DefaultParams
        values["bad_words_ids"] = bad_words_ids
    if "max_tokens" not in values:
        max_length = fields.get("max_length")
        if max_length is not None:
            if type(max_length) is not int or max_length < 1:
                raise ValueError(
                    f"{where}: max_length={max_length!r} must be an int of at least 1."
                )
            kind = DefaultParams
            values |= {"max_length": max_length, "max_tokens": None}
        elif type(values.get("min_tokens")) is int:
            values["max_tokens"] = max(
                SamplingParams.max_tokens or 0, values["min_tokens"]
            )
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        for theirs, ours in names.items():
            if ours in values:
                try:
                    SamplingParams(**{"max_tokens": None, ours: values[ours]})
                except (TypeError, ValueError) as own:
                    raise ValueError(
                        f"{where}: {theirs}={reprlib.repr(values[ours])} cannot be "
                        f"obeyed: {own} Correct it there."
                    ) from error
        raise ValueError(f"{where}: {error}") from error
