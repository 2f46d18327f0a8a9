"""Judging what users pass: prompts, sampling parameters, messages and generation configs."""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from folo_lib.checkpoint import find_checkpoint
from folo_lib.request import (
    IncrementalDetokenizer,
    Request,
    RequestMetrics,
    TokenBytes,
)
from folo_lib.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = [
    "InputProcessor",
    "apply_chat_template",
    "default_sampling_params",
    "get_eos_token_ids",
    "load_generation_config",
    "to_token_ids",
]


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
            "ids is expected. Decode bytes; of a tokenizer's output take .input_ids."
        )
    if set(map(type, values)) == {int} and 0 <= min(values) <= max(values) < vocab_size:
        return list(values)  # nearly always: nothing is looked at one by one
    for at, token_id in enumerate(values):
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise TypeError(
                f"prompt has {token_id!r} at position {at}, and token ids are ints."
            )
        if not 0 <= int(token_id) < vocab_size:
            raise ValueError(
                f"prompt has token id {token_id} at position {at}, and ids go from 0 "
                f"to {vocab_size - 1}: was it made with another model's tokenizer?"
            )
    return [int(token_id) for token_id in values]


class InputProcessor:
    """Turns prompts into requests, and says what is wrong with those it cannot.

    Args:
        tokenizer: byte-level; None: there is no text, only ids.
        vocab_size: `V` of the model.
        max_model_len: most tokens of prompt and output together.
        eos_token_ids: all that end a text.
        default_params: for prompts without any; None: those of `SamplingParams`.
        seed: of the random seeds for requests without one.
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
        self.tokenizer = tokenizer
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.eos_token_id: int | None = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_ids = tuple(eos_token_ids)
        self.default_params = default_params or SamplingParams()
        self.token_bytes = None if tokenizer is None else TokenBytes(tokenizer)
        self._seeds = random.Random(seed)
        self._lock = threading.Lock()

    def process_request(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        arrival_time: float | None = None,
    ) -> list[Request]:
        """The requests of one prompt, one for each sample.

        Args:
            prompt: a str, or a sequence, tensor or array of token ids.
            request_id: None makes a UUID.
            arrival_time: of `time.perf_counter()`; None is now.
        """
        now = time.perf_counter() if arrival_time is None else arrival_time
        [group] = self._make_requests([prompt], params, now)
        for request in group:
            request.request_id = request_id or request.request_id
        return group

    def process_requests(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[list[Request]]:
        """The requests of each prompt; all prompts are checked before any is made.

        Args:
            prompts: a str, token ids, or a list of either.
            params: one for all of them, or one for each; None: the defaults.
        """
        now = time.perf_counter()
        several = isinstance(prompts, Sequence) and not isinstance(
            prompts, (str, bytes)
        )
        if not several or (len(prompts) > 0 and isinstance(prompts[0], Integral)):
            prompts = [prompts]
        return self._make_requests(prompts, params, now)

    def process_chat(
        self,
        messages: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: Mapping[str, Any] = {},
    ) -> list[list[Request]]:
        """The requests of one conversation, or of each of a list of them."""
        now = time.perf_counter()
        single = len(messages) > 0 and isinstance(messages[0], Mapping)
        conversations = [messages] if single else messages
        texts = [apply_chat_template(self.tokenizer, c, options) for c in conversations]
        return self._make_requests(texts, params, now, add_special_tokens=False)

    def _make_requests(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams | None] | None,
        now: float,
        add_special_tokens: bool = True,
    ) -> list[list[Request]]:
        if params is None or isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if isinstance(params, (str, Mapping)) or not isinstance(params, Sequence):
            raise TypeError(f"params is a {type(params).__name__}, not SamplingParams.")
        if len(params) != len(prompts):
            raise ValueError(
                f"there are {len(params)} sampling params and {len(prompts)} prompts: "
                "pass one for each, or a single one for all."
            )
        each = [self.default_params if own is None else own for own in params]
        checked = []
        for position, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            try:
                ids = self.encode(prompt, add_special_tokens)
                checked.append((prompt, ids, own, self.check_params(own, len(ids))))
            except (TypeError, ValueError) as error:
                if len(prompts) == 1:
                    raise
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"prompts[{position}]: {error}") from error
        groups = []
        for prompt, ids, own, max_tokens in checked:
            seed = self._seeds.getrandbits(63) if own.seed is None else own.seed
            request_id = str(uuid.uuid4())
            groups.append(
                [
                    Request(
                        request_id=request_id,
                        index=index,
                        prompt=prompt if isinstance(prompt, str) else None,
                        prompt_token_ids=ids,
                        params=own,
                        seed=seed,
                        max_tokens=max_tokens,
                        eos_token_id=self.eos_token_id,
                        eos_token_ids=self.eos_token_ids,
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
        ids = self.tokenizer(prompt, add_special_tokens=add_special_tokens).input_ids
        return to_token_ids(ids, self.vocab_size)

    def check_params(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        """How many tokens a prompt may get: `max_tokens`, or the fewer there is room for.

        Raises:
            TypeError: if these are not `SamplingParams`.
            ValueError: if the model cannot serve them, or the prompt is empty, or leaves
                no room for one token or for `min_tokens`.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params is a {type(params).__name__}, not SamplingParams.")
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop={params.stop!r} is looked for in the text, and without a "
                "tokenizer there is none: use stop_token_ids."
            )
        beyond = [i for i in params.stop_token_ids or () if i >= self.vocab_size]
        if beyond:
            raise ValueError(
                f"stop_token_ids holds {beyond[0]}, and ids go from 0 to "
                f"{self.vocab_size - 1}."
            )
        if (params.logprobs or 0) > self.vocab_size:
            raise ValueError(
                f"logprobs={params.logprobs} is more than the {self.vocab_size} tokens "
                "of the vocabulary: -1 asks for all."
            )
        room = self.max_model_len - num_prompt_tokens
        if num_prompt_tokens == 0:
            raise ValueError(
                "the prompt is empty: the model needs a token to go on from."
            )
        if room < 1:
            raise ValueError(
                f"the prompt has {num_prompt_tokens} tokens, and with max_model_len="
                f"{self.max_model_len} at most {self.max_model_len - 1} leave room for "
                "an answer: shorten it, or raise max_model_len."
            )
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens={params.min_tokens} does not fit: the prompt has "
                f"{num_prompt_tokens} of max_model_len={self.max_model_len} tokens. Ask "
                f"for at most {room}, shorten the prompt, or raise max_model_len."
            )
        return min(room, params.max_tokens or room)


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> str:
    """A conversation as the text of a prompt.

    Args:
        tokenizer: with a chat template.
        messages: each a dict with `role` and `content`.
        options: for Hugging Face's `apply_chat_template`, and for the template.

    Raises:
        ValueError: if there is no template, or no conversation.
    """
    template = options.get("chat_template") or getattr(tokenizer, "chat_template", None)
    if tokenizer is None or template is None:
        raise ValueError(
            "this checkpoint has no chat template, so it may be a base model: use "
            "generate() with text, or pass chat_template=..."
        )
    if not messages or not all("role" in message for message in messages):
        raise ValueError(
            f"messages is {messages!r}: pass a list of dicts with 'role' and "
            "'content', such as [{'role': 'user', 'content': 'Hello'}]."
        )
    conversation: Any = list(messages)
    options = {"add_generation_prompt": True, **options, "tokenize": False}
    return str(tokenizer.apply_chat_template(conversation, **options))


def load_generation_config(model: str | os.PathLike[str]) -> GenerationConfig | None:
    """The `generation_config.json` of a folder or hub id; None if it has none."""
    folder = find_checkpoint(model)
    if not (folder / "generation_config.json").is_file():
        return None
    from transformers import GenerationConfig

    config: GenerationConfig = GenerationConfig.from_pretrained(folder)
    return config


def get_eos_token_ids(*sources: Any) -> list[int]:
    """The EOS ids of the first source that names any, as a list.

    Args:
        sources: generation config, model config, tokenizer; each may be None.
    """
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def default_sampling_params(config: GenerationConfig | None) -> SamplingParams:
    """What a generation config says, in the words of `SamplingParams`.

    Args:
        config: of the checkpoint; None: the defaults of `SamplingParams`.

    Returns:
        Greedy unless `do_sample` is set; `max_tokens` is 16 unless it is named.
    """
    if config is None:
        return SamplingParams()
    names = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
    if config.do_sample:
        names |= {name: name for name in ("temperature", "top_k", "top_p", "min_p")}
    values: dict[str, Any] = {"top_k": 50} if config.do_sample else {"temperature": 0.0}
    for theirs, ours in names.items():
        if getattr(config, theirs, None) is not None:
            values[ours] = getattr(config, theirs)
    return SamplingParams(**values)
