"""What travels between a client and the server: OpenAI's requests, answers, chunks and errors."""

from __future__ import annotations

import codecs
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from folo_lib.request import CompletionOutput, Logprob, RequestOutput, TokenBytes
from folo_lib.sampling_params import SamplingParams

__all__ = [
    "ApiError",
    "ChatRequest",
    "CompletionRequest",
    "Transcript",
    "make_error",
    "read_validation_error",
]

MAX_LOGPROBS = 20
LEAST_LOGPROB = -9999.0
"""JSON knows no infinity; OpenAI and vLLM write this number."""

UNSUPPORTED: Mapping[str, tuple[Sequence[Any], str]] = {
    "tools": ([[]], "put what the model must know into a message"),
    "tool_choice": (["none", "auto"], "there are no tools"),
    "functions": ([[]], "put what the model must know into a message"),
    "function_call": (["none", "auto"], "there are no functions"),
    "parallel_tool_calls": ([True, False], "there are no tools"),
    "response_format": ([{"type": "text"}], "ask for the form in a message"),
    "structured_outputs": ([], "ask for the form in a message"),
    "reasoning_effort": ([], "chat_template_kwargs has enable_thinking, with Qwen3"),
    "verbosity": (["medium"], "set max_tokens"),
    "modalities": ([["text"]], "there is text only"),
    "audio": ([], "there is text only"),
    "prediction": ([], "leave it out"),
    "web_search_options": ([], "nothing is searched"),
    "moderation": ([], "nothing is moderated"),
    "service_tier": (["auto", "default"], "there is one tier"),
    "store": ([False], "nothing is stored"),
    "prompt_cache_options": ([], "the cache of prefixes is always on"),
    "prompt_cache_retention": ([], "the cache of prefixes is always on"),
    "echo": ([False], "it is for completions"),
    "suffix": ([""], "the model only goes on from a prompt"),
    "best_of": ([1], "set n, and choose yourself"),
    "use_beam_search": ([False], "set n, and choose yourself"),
    "length_penalty": ([1], "it is for beam search"),
    "prompt_logprobs": ([], "echo and logprobs of completions have them"),
    "priority": ([0], "first come, first served"),
}
"""Fields of OpenAI and vLLM that are refused unless neutral: when they are, and what to do.

Other unknown fields are refused too, as OpenAI does; vLLM ignores them.
"""

NO_TOOLS = "there are no tools, so put calls and what they gave into a content"
UNSUPPORTED_IN_MESSAGES: Mapping[str, str] = {
    "tool_calls": NO_TOOLS,
    "tool_call_id": NO_TOOLS,
    "function_call": NO_TOOLS,
    "audio": "there is text only",
}
"""The same for the fields of a message."""

SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
)


class ApiError(Exception):
    """What the client is told, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def from_value_error(cls, error: Exception) -> Self:
        """Of what the engine says of a prompt or of sampling params."""
        message = str(error)
        named = re.match(r"(\w+)(=| holds| is )", message)
        param = named[1] if named and named[1] in (*SAMPLING, "max_tokens") else None
        if "leave room for an answer" not in message:
            return cls(400, message, param)
        # LiteLLM and LangChain know the error by these words, others by its code.
        message = f"The prompt is too long: {message}"
        return cls(400, message, param, "context_length_exceeded")

    @property
    def body(self) -> dict[str, Any]:
        return make_error(self.status, self.message, self.param, self.code)


def make_error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": error}


def read_validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, in words of OpenAI's server."""
    first = max(errors, key=lambda error: len(error["loc"]))  # of a union: the nearest
    context = first.get("ctx", {})
    if first["type"] == "json_invalid":
        reason = context.get("error", "")
        return ApiError(400, f"The body of the request is not JSON: {reason}.")
    where = [part for part in first["loc"][1:] if not UNION_PART.match(str(part))]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in where)
    param = param.removeprefix(".")
    if first["type"] == "unsupported":
        inside = f"{param}." if param else ""  # a message has fields of its own
        message, param = inside + first["msg"], inside + context["param"]
        return ApiError(400, message, param, "unsupported_field")
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}"
    elif first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        cure = "" if param else ", sent as Content-Type: application/json"
        message = f"{param or 'The body'} must be a JSON object{cure}."
    elif first["type"] == "missing":
        message = f"Missing required parameter: {param}."
    elif first["type"] == "literal_error":  # of a part of a content
        message = f"{param}: {first['msg']}, for this server reads text only."
    else:
        message = f"{param or 'The body'}: {first['msg']}."
    return ApiError(400, message, param or None)


UNION_PART = re.compile(r"(str|int|list\[.*|constrained-.*|function-.*)$")
"""How pydantic names the branches of a union, which are no part of the request."""


class Strict(BaseModel):
    """Values are taken as they are: "5" is no number, and 1 is not true."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage so far in every chunk
    include_obfuscation: bool | None = None  # pads at OpenAI; no padding is all right


def ranged(**limits: float) -> Any:
    """A field whose range stands in the OpenAPI document. The engine checks it.

    Its errors say what to do, and pydantic's do not.
    """
    return Field(None, json_schema_extra={**limits})


class CommonRequest(Strict):
    """What both routes take. None always means the default."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # sampling; those that are None are taken from the checkpoint, as `generate` does
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = ranged(minimum=0, maximum=2)
    top_p: float | None = ranged(exclusiveMinimum=0, maximum=1)
    max_tokens: int | None = ranged(minimum=1)
    seed: int | None = ranged(minimum=-(2**63), exclusiveMaximum=2**64)
    stop: str | list[str] | None = None
    presence_penalty: float | None = ranged(minimum=-2, maximum=2)
    frequency_penalty: float | None = ranged(minimum=-2, maximum=2)
    logit_bias: dict[str, float] | None = None
    # vLLM's
    top_k: int | None = ranged(minimum=-1)
    min_p: float | None = ranged(minimum=0, maximum=1)
    repetition_penalty: float | None = ranged(exclusiveMinimum=0)
    min_tokens: int | None = ranged(minimum=0)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    # say who asks, which changes no answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, body: Any) -> Any:
        """Names a field that is not supported; one with a neutral value is dropped."""
        if not isinstance(body, dict):
            return body
        dropped = UNSUPPORTED.keys() - cls.model_fields.keys()
        for name, (neutral, advice) in UNSUPPORTED.items():  # tools before tool_choice
            if name not in body or name not in dropped:
                continue
            value = body[name]
            alike = [one for one in neutral if type(one) is type(value)]
            same_as_n = name == "best_of" and value == (body.get("n") or 1)
            if value is not None and value not in alike and not same_as_n:
                raise PydanticCustomError(
                    "unsupported",
                    "{param} is not supported by this server: {advice}.",
                    {"param": name, "advice": advice},
                )
        return {name: body[name] for name in body if name not in dropped}

    @model_validator(mode="after")
    def check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "unsupported",
                "stream_options is only allowed with stream=true.",
                {"param": "stream_options"},
            )
        return self

    @property
    def include_usage(self) -> bool:
        options = self.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def has_echo(self) -> bool:
        """Whether the answer begins with its prompt, which completions may ask for."""
        return False

    @property
    def has_no_answer(self) -> bool:
        """Whether it asks for its prompt alone, for the log-probabilities as a rule."""
        return self.has_echo and self.max_tokens == 0

    def make_params(
        self, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """The sampling params that were asked for.

        Raises:
            ValueError: if a value is out of its range.
        """
        given = {name: getattr(self, name) for name in SAMPLING}
        given = {name: value for name, value in given.items() if value is not None}
        if max_tokens is not None:
            given["max_tokens"] = max_tokens
        return replace(defaults, **given, logprobs=logprobs)


class CompletionRequest(CommonRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @property
    def prompts(self) -> list[Any]:
        """One or several, each a text or token ids."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return prompt if several else [prompt]

    @property
    def has_echo(self) -> bool:
        return bool(self.echo)

    def get_params(self, defaults: SamplingParams) -> SamplingParams:
        """`max_tokens` is 16 unless said, as OpenAI's.

        The engine always draws a token; `Transcript` leaves it out for `has_no_answer`.
        """
        num_tokens = 16 if self.max_tokens is None else self.max_tokens
        if self.min_tokens is not None and self.max_tokens is None:
            num_tokens = max(num_tokens, self.min_tokens)
        if self.has_no_answer:
            if (self.min_tokens or 0) > 0:
                raise ValueError(
                    f"min_tokens={self.min_tokens} must be at most max_tokens=0: lower "
                    "the one or raise the other."
                )
            num_tokens, defaults = 1, replace(defaults, min_tokens=0)
        params = self.make_params(defaults, num_tokens, self.logprobs)
        return replace(params, prompt_logprobs=self.logprobs if self.echo else None)


def leave_out_empty(fields: dict[str, Any], needed: str) -> dict[str, Any]:
    """Fields that say something; many clients send all that they know, most of them empty.

    The needed one may be the empty string, which is a text.
    """
    nothing: tuple[Any, ...] = (None, "", [], {})
    return {
        name: value
        for name, value in fields.items()
        if value not in nothing or (name == needed and value == "")
    }


class TextPart(Strict):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def drop_empty(cls, part: Any) -> Any:
        return leave_out_empty(part, "text") if isinstance(part, dict) else part


class Message(Strict):
    role: str
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_empty(cls, message: Any) -> Any:
        """Clients send answers back with all their empty fields, and empty answers too."""
        if not isinstance(message, dict):
            return message
        kept = leave_out_empty(message, "content")
        for name, advice in UNSUPPORTED_IN_MESSAGES.items():
            if name in kept:
                raise PydanticCustomError(
                    "unsupported",
                    "{param} is not supported by this server: {advice}.",
                    {"param": name, "advice": advice},
                )
        empty = {"content": ""} if message.get("role") == "assistant" else {}
        return empty | kept

    def to_dict(self) -> dict[str, str]:
        """As `LLMEngine.chat` takes it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class ChatRequest(CommonRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = ranged(minimum=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # vLLM's
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "unsupported",
                "top_logprobs is only allowed with logprobs=true.",
                {"param": "top_logprobs"},
            )
        if "chat_template" in (self.chat_template_kwargs or ()):
            raise PydanticCustomError(
                "unsupported",
                "chat_template is a program, and this server runs its own alone.",
                {"param": "chat_template_kwargs"},
            )
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise PydanticCustomError(
                "unsupported",
                "max_tokens and max_completion_tokens are the same: leave one out.",
                {"param": "max_tokens"},
            )
        return self

    @property
    def options(self) -> dict[str, Any]:
        """For the chat template."""
        names = (
            "chat_template_kwargs",
            "add_generation_prompt",
            "continue_final_message",
        )
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def get_params(self, defaults: SamplingParams) -> SamplingParams:
        """Up to the model's limit unless said."""
        num_tokens = self.max_completion_tokens or self.max_tokens
        if self.max_completion_tokens == 0 or self.max_tokens == 0:
            num_tokens = 0  # which is refused
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        params = self.make_params(defaults, num_tokens, logprobs)
        return params if num_tokens else replace(params, max_tokens=None)


@dataclass
class Sent:
    """How much of a sample the client has."""

    num_tokens: int = 0
    num_characters: int = 0
    offset: int = 0  # of the next token, as `text_offset` counts
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    has_role: bool = False
    has_ended: bool = False


class Transcript:
    """Turns the outputs of a request into OpenAI's answer, whole or in chunks.

    Args:
        asked: the request.
        token_bytes: of the tokenizer.
    """

    def __init__(
        self, asked: ChatRequest | CompletionRequest, token_bytes: TokenBytes
    ) -> None:
        self.asked, self.token_bytes = asked, token_bytes
        self.is_chat = isinstance(asked, ChatRequest)
        kind = "chat.completion" if self.is_chat else "text_completion"
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        self.head: dict[str, Any] = {
            "id": prefix + uuid.uuid4().hex,
            "object": kind,
            "created": int(time.time()),
            "model": asked.model,
        }
        self.chunk_head = self.head | {
            "object": kind + ".chunk" if self.is_chat else kind
        }
        self.sent: dict[int, Sent] = {}
        self.latest: dict[int, RequestOutput] = {}  # by prompt

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer, of one output for each prompt."""
        choices = []
        for place, output in enumerate(outputs):
            self.latest[place] = output
            for sample in self.read(output):
                index = place * len(output.outputs) + sample.index
                scores = self.make_logprobs(sample, Sent(), output)
                choice: dict[str, Any] = {"index": index}
                if self.is_chat:
                    message = {"role": "assistant", "content": sample.text}
                    choice |= {"message": message | {"refusal": None}}
                else:
                    choice |= {"text": sample.text}
                choice["logprobs"] = scores
                choice["finish_reason"] = sample.finish_reason
                choices.append(choice)
        return self.head | {"choices": choices, "usage": self.make_usage()}

    def chunks(self, output: RequestOutput, place: int = 0) -> Iterator[str]:
        """Events with what is new in an output of a prompt."""
        self.latest[place] = output
        for sample in self.read(output):
            index = place * len(output.outputs) + sample.index
            sent = self.sent.setdefault(index, Sent())
            if not sent.has_ended:
                for choice in self.new_choices(sample, sent, index, output):
                    yield self.event(choice)

    def read(self, output: RequestOutput) -> list[CompletionOutput]:
        """The samples as the client gets them: with `echo` each goes on from its prompt."""
        asked = self.asked
        if not asked.has_echo:
            return output.outputs
        ids, scores = output.prompt_token_ids, output.prompt_logprobs or []
        if asked.logprobs is not None and len(scores) < len(ids):
            return []  # another sample was faster, and the first is still reading
        entries = [entry or {} for entry in scores]  # nothing is known of the first
        samples = []
        for sample in output.outputs:
            if asked.has_no_answer:
                reason = sample.finish_reason and "length"  # whatever the token was
                sample = replace(sample, text="", token_ids=[], finish_reason=reason)
            whole = replace(
                sample,
                text=self.join(output, sample),
                token_ids=ids + sample.token_ids,
            )
            if sample.logprobs is not None:
                whole.logprobs = entries + sample.logprobs[: len(sample.token_ids)]
            samples.append(whole)
        return samples

    def join(self, output: RequestOutput, sample: CompletionOutput) -> str:
        """Prompt and answer; a character that is cut between the two is put together."""
        if output.prompt is not None:
            return output.prompt + sample.text
        raw = b"".join(self.token_bytes[i] for i in output.prompt_token_ids)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        prompt = decoder.decode(raw)
        if not decoder.getstate()[0]:
            return prompt + sample.text
        rest = b"".join(self.token_bytes[i] for i in sample.token_ids[:3])
        for size in range(1, 4):  # bytes that may be missing; each is a � in the answer
            character = decoder.decode(rest[size - 1 : size])
            if len(character) == 1 and character != "\ufffd":
                return prompt + character + sample.text[size:]
            if character:
                break
        else:
            if sample.finish_reason is None:
                return prompt  # until it is known what the piece becomes
        return prompt + "\ufffd" + sample.text

    def new_choices(
        self, sample: CompletionOutput, sent: Sent, index: int, output: RequestOutput
    ) -> Iterator[dict[str, Any]]:
        text = sample.text[sent.num_characters :]
        scores = self.make_logprobs(sample, sent, output)
        sent.num_characters += len(text)
        sent.num_tokens = len(sample.token_ids)
        sent.has_ended = sample.finish_reason is not None
        base: dict[str, Any] = {"index": index}
        if self.is_chat:
            if not sent.has_role:
                sent.has_role = True
                delta = {"role": "assistant", "content": ""}
                yield base | {"delta": delta, "logprobs": None, "finish_reason": None}
            if text or scores:
                delta = {"content": text}
                yield base | {"delta": delta, "logprobs": scores, "finish_reason": None}
            if sent.has_ended:
                base |= {"delta": {}, "logprobs": None}
                yield base | {"finish_reason": sample.finish_reason}
        elif text or scores or sent.has_ended:
            base |= {"text": text, "logprobs": scores}
            yield base | {"finish_reason": sample.finish_reason}

    def event(self, choice: Mapping[str, Any]) -> str:
        """A chunk with one choice, as a server-sent event."""
        chunk = self.chunk_head | {"choices": [choice]}
        options = self.asked.stream_options
        if options is not None and options.include_usage:
            so_far = options.continuous_usage_stats
            chunk["usage"] = self.make_usage() if so_far else None
        return f"data: {json.dumps(chunk)}\n\n"

    def last_events(self) -> Iterator[str]:
        """The usage, if the client wants it, and the end."""
        if self.asked.include_usage:
            chunk = self.chunk_head | {"choices": [], "usage": self.make_usage()}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    def make_usage(self) -> dict[str, Any]:
        """How many tokens went in and came out; of the first how many were cached."""
        outputs = self.latest.values()
        num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
        num_cached = sum(
            min(output.num_cached_tokens, len(output.prompt_token_ids))
            for output in outputs  # several samples may each find the whole prompt
        )
        samples = [sample for output in outputs for sample in output.outputs]
        num_output = sum(len(sample.token_ids) for sample in samples)
        if self.asked.has_no_answer:
            num_output = 0
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def make_logprobs(
        self, sample: CompletionOutput, sent: Sent, output: RequestOutput
    ) -> dict[str, Any] | None:
        """Of the tokens that the client does not have yet; None if it wants none."""
        if sample.logprobs is None:
            return None
        new = sample.logprobs[sent.num_tokens :]
        if self.is_chat:
            content = [self.describe_token(entry) for entry in new]
            return {"content": content, "refusal": None} if content else None
        ids = sample.token_ids[sent.num_tokens :]
        chosen = [entry.get(token_id) for token_id, entry in zip(ids, new, strict=True)]
        tops = [
            {self.spell(i): clamp(one) for i, one in self.find_top(entry)} or None
            for entry in new
        ]
        scores = {
            "tokens": [self.spell(token_id) for token_id in ids],
            "token_logprobs": [one and clamp(one) for one in chosen],
            "top_logprobs": tops,
            "text_offset": self.find_offsets(ids, sent, output),
        }
        return scores if ids else None

    def find_offsets(
        self, ids: Sequence[int], sent: Sent, output: RequestOutput
    ) -> list[int]:
        """How many characters of the text stand before each new token.

        A piece of a character begins where the character does, and a special token that the
        answer leaves out has no length.
        """
        asked, offsets = self.asked, []
        num_echoed = len(output.prompt_token_ids) if asked.has_echo else 0
        skipped = (
            () if asked.skip_special_tokens is False else self.token_bytes.special_ids
        )
        for place, token_id in enumerate(ids, sent.num_tokens):
            if place == num_echoed and asked.has_echo and output.prompt is not None:
                sent.offset = len(output.prompt)  # its tokens may spell é as one letter
            offsets.append(sent.offset)
            if place < num_echoed or token_id not in skipped:
                raw = self.token_bytes[token_id]
                sent.offset += len(sent.decoder.decode(raw))
        return offsets

    def find_top(self, entry: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
        """The likeliest tokens that were asked for, and in completions the chosen one."""
        asked = self.asked
        if isinstance(asked, ChatRequest):
            most = asked.top_logprobs or 0
            found = [(i, one) for i, one in entry.items() if one.rank <= most]
            return sorted(found, key=lambda pair: pair[1].rank)
        return sorted(entry.items(), key=lambda pair: pair[1].rank)

    def describe_token(self, entry: Mapping[int, Logprob]) -> dict[str, Any]:
        """A token, and those that were likely in its place, in the form of chats."""
        token_id, chosen = next(iter(entry.items()))
        top = [self.describe(i, one) for i, one in self.find_top(entry)]
        return self.describe(token_id, chosen) | {"top_logprobs": top}

    def describe(self, token_id: int, one: Logprob) -> dict[str, Any]:
        text, raw = self.get_text(token_id), list(self.token_bytes[token_id])
        return {"token": text, "logprob": clamp(one), "bytes": raw}

    def spell(self, token_id: int) -> str:
        """A token in completions: OpenAI spells out the bytes of a piece of a character.

        As � several of the likeliest tokens would be one.
        """
        raw = self.token_bytes[token_id]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def get_text(self, token_id: int) -> str:
        return self.token_bytes[token_id].decode(errors="replace")


def clamp(one: Logprob) -> float:
    """A log-probability that JSON can hold."""
    return max(one.logprob, LEAST_LOGPROB)
