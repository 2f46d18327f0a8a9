"""Judging what lies in a checkpoint's folder: JSON, fields, formats, templates, numbers.

Nothing here is taught. Pages 02, 04 and 05 call it, so that damaged or odd input ends in
one `ValueError`, `TypeError` or `OSError` that names the file, the field and the cure.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen3Config

Fields = Mapping[str, Any]
FETCH_AGAIN = "fetch it again, or copy it from the model it belongs to"
MOST_POSITIONS = 2**24
PICKLES = (".bin", ".pt", ".pth", ".pkl")

# What a number must be: its type, and the least and largest value.
CONFIG_NUMBERS: dict[str, tuple[type, float, float]] = {
    "vocab_size": (int, 1, 2**24),
    "hidden_size": (int, 1, 2**24),
    "intermediate_size": (int, 1, 2**24),
    "num_hidden_layers": (int, 1, 4096),
    "num_attention_heads": (int, 1, 2**16),
    "num_key_value_heads": (int, 1, 2**16),
    "head_dim": (int, 2, 4096),
    "max_position_embeddings": (int, 1, MOST_POSITIONS),
    "rms_norm_eps": (float, 0, 1),
    "initializer_range": (float, 0, 1e30),
}
ROPE_NUMBERS: dict[str, tuple[type, float, float]] = {
    "rope_theta": (float, 1e-30, 1e15),
    "factor": (float, 1e-6, 1e6),
    "original_max_position_embeddings": (float, 1, MOST_POSITIONS),
    "attention_factor": (float, 0, 1e6),
    "beta_fast": (float, 0, 1e6),
    "beta_slow": (float, 0, 1e6),
    "mscale": (float, 0, 1e6),
    "mscale_all_dim": (float, 0, 1e6),
}
# Of classifiers only, so they are left out before transformers reads the rest.
UNUSED = ("num_labels", "id2label", "label2id", "problem_type")
# These may be null: then Hugging Face takes a default.
OPTIONAL = {"num_key_value_heads", "head_dim", *list(ROPE_NUMBERS)[3:]}


def check_numbers(
    fields: Fields, rules: Mapping[str, tuple[type, float, float]], name: str
) -> None:
    """Compares the fields that are there with their rules.

    Args:
        fields: by name.
        rules: `CONFIG_NUMBERS` or `ROPE_NUMBERS`, or a part of them.
        name: how to call a field, with `{}` in place of its own name.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    for field, (kind, low, high) in rules.items():
        value = fields.get(field, low)
        if value is None and field in OPTIONAL:
            continue
        kinds = (int,) if kind is int else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(
                f"{name.format(field)} is {shorten(repr(value))}: it must be {what} "
                f"from {low} to {high}."
            )


def check_rope_parameters(
    parameters: object,
    needed: Mapping[str, Sequence[str]],
    name: str = "rope_parameters",
) -> None:
    """Refuses RoPE parameters that cannot be computed.

    Args:
        parameters: a config's field.
        needed: the fields that each supported `rope_type` must have.
        name: of that field.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(
            f"{name} is {shorten(repr(parameters))}: it must be a mapping with "
            "rope_type and rope_theta."
        )
    rope_type = parameters.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in needed:
        raise ValueError(
            f'{name}["rope_type"]={shorten(repr(rope_type))} is not supported: it must '
            "be one of " + ", ".join(map(repr, needed))
        )
    for field in needed[rope_type]:
        if parameters.get(field) is None:
            raise ValueError(f'{name}["{field}"] is missing: {rope_type!r} needs it.')
    used = ROPE_NUMBERS if rope_type == "yarn" else needed[rope_type]
    rules = {field: ROPE_NUMBERS[field] for field in used}
    check_numbers(parameters, rules, f'{name}["{{}}"]')
    partial = parameters.get("partial_rotary_factor")
    if partial not in (None, 1) or isinstance(partial, bool):
        raise ValueError(
            f'{name}["partial_rotary_factor"]={shorten(repr(partial))} is not '
            "supported: it must be 1, so that all of head_dim is turned."
        )
    if rope_type == "yarn":
        if parameters["rope_theta"] <= 1:
            raise ValueError(f'{name}["rope_theta"] must be above 1 for yarn.')
        reach = parameters["factor"] * parameters["original_max_position_embeddings"]
        if reach > MOST_POSITIONS:
            raise ValueError(
                f"{name}: factor times original_max_position_embeddings is {reach:g}; "
                f"at most {MOST_POSITIONS} positions are supported."
            )


def check_config_fields(
    fields: Fields, rope_needed: Mapping[str, Sequence[str]]
) -> None:
    """Judges a `config.json` before transformers reads it.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    check_numbers(fields, CONFIG_NUMBERS, "{}")
    if fields.get("quantization_config") is not None:
        raise ValueError(
            f"quantization_config is {shorten(repr(fields['quantization_config']))}; "
            "supported: none: take the checkpoint without quantisation."
        )
    for field in ("dtype", "torch_dtype"):
        value = fields.get(field)
        if value is None:
            continue
        short = value.removeprefix("torch.") if isinstance(value, str) else ""
        found = getattr(torch, short, None)
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(
                f"{field} is {shorten(repr(value))}: it must be a dtype such as "
                "'bfloat16', 'float16' or 'float32'."
            )
    for field in ("rope_parameters", "rope_scaling"):
        rope = fields.get(field)
        if rope is None or rope == {}:
            continue
        if isinstance(rope, Mapping):  # what transformers adds to an older spelling
            rope = {
                "rope_type": rope.get("type", "default"),
                "rope_theta": fields.get("rope_theta", 10_000.0),
                "original_max_position_embeddings": fields.get(
                    "max_position_embeddings", 32_768
                ),
            } | dict(rope)
        check_rope_parameters(rope, rope_needed, field)
    check_numbers(fields, {"rope_theta": ROPE_NUMBERS["rope_theta"]}, "{}")


def build_config(
    family: type[Qwen2Config] | type[Qwen3Config], fields: Fields
) -> Qwen2Config | Qwen3Config:
    """The config of transformers that these fields mean.

    Raises:
        ValueError: naming the field that transformers stumbles over, if it is one.
    """
    cleaned = {name: value for name, value in fields.items() if name not in UNUSED}
    for name in cleaned.keys() & {"dtype", "torch_dtype"}:
        if isinstance(cleaned[name], str):
            cleaned[name] = cleaned[name].removeprefix("torch.")

    def build(some: Fields) -> Qwen2Config | Qwen3Config:
        # transformers writes into what it is given, so it is given a copy.
        config = family.from_dict(json.loads(json.dumps(some)))
        config.to_dict()
        return config

    try:
        return build(cleaned)
    except Exception as error:
        culprit = find_culprit(cleaned, build)
        if culprit is None:
            raise
        raise ValueError(
            f"{culprit} is {shorten(repr(cleaned[culprit]))}, which makes no sense to "
            f"transformers ({describe(error)}). Correct or remove the field."
        ) from error


def find_culprit(fields: Fields, attempt: Callable[[Fields], object]) -> str | None:
    """The one field without which `attempt` succeeds, if there is one."""
    for name in fields:
        try:
            attempt({key: value for key, value in fields.items() if key != name})
        except Exception:
            continue
        return name
    return None


def shorten(text: str, most: int = 200) -> str:
    """At most `most` characters, for a message."""
    return text if len(text) <= most else f"{text[:most]} ..."


def describe(error: BaseException) -> str:
    """What a foreign error says, in one short line."""
    words = " ".join(str(error).split())
    return shorten(f"{type(error).__name__}: {words}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors inside become a `ValueError` that begins with `path`.

    What is one of ours and names the path already, an `OSError` and a `MemoryError` pass
    as they are. Errors of Rust libraries may be panics, which are no `Exception`.
    """
    try:
        yield
    except (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        builtin = type(error).__module__ == "builtins"
        named = str(path) in str(error)
        if builtin and (isinstance(error, OSError) or named) and is_ours(error):
            raise
        if is_ours(error):
            raise type(error)(f"{path}: {error}") from error
        raise ValueError(
            f"{path} is damaged or makes no sense ({describe(error)}): {FETCH_AGAIN}."
        ) from error


def is_ours(error: BaseException) -> bool:
    """Whether an error has one of the three classes that the loader raises."""
    if isinstance(error, OSError):
        return type(error).__module__ == "builtins"
    return type(error) in (ValueError, TypeError)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if it is damaged, nested too deeply, or no object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, no JSON object ({describe(error)}): {FETCH_AGAIN}."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path} is damaged, no JSON object but a {type(fields).__name__}: "
            f"{FETCH_AGAIN}."
        )
    return fields


def read_index(path: Path) -> list[str]:
    """The files that an index names, each once, in order.

    Raises:
        ValueError: if the index is damaged, or names a file that is not beside it.
    """
    names = read_json(path).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    wanted = r"[^/]{1,200}[.]safetensors"  # files beside the index
    if not names or not all(re.fullmatch(wanted, str(name)) for name in names):
        raise ValueError(f"{path} is damaged (weight_map): fetch it again.")
    return sorted(set(names))


def check_weight_files(folder: Path, files: Sequence[Path]) -> None:
    """Refuses a folder whose weights have another format, or that has none.

    Args:
        folder: without an index.
        files: the safetensors files found in it.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they are an adapter's, or there are other formats only.
    """
    no_model = all(path.name.startswith("adapter_") for path in files)
    if no_model and (other_format := name_other_format(folder)):
        raise ValueError(other_format)
    if not files and any(path.suffix in PICKLES for path in folder.iterdir()):
        raise ValueError(
            f"{folder} has pickled weights only, and loading a pickle can run any "
            "code. Convert them: model.save_pretrained(folder) in transformers."
        )
    if not files:
        raise FileNotFoundError(f"{folder} has no weights (*.safetensors).")


def name_other_format(folder: Path) -> str | None:
    """What a folder without a config or without weights of its own is, and the cure."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} is a LoRA adapter (adapter_config.json) and no whole model. Merge "
            "it into its base model with peft, `model.merge_and_unload()`, then "
            "`save_pretrained(folder)`, and load that folder."
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        return (
            f"{folder} holds a GGUF file ({gguf[0].name}), the format of llama.cpp. Load "
            "the checkpoint it was made from: safetensors with a config.json."
        )
    return None


def explain_hub_error(model: str, error: Exception) -> OSError:
    """What the hub's refusal means, and the cure."""
    from huggingface_hub import errors

    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"the hub has no model {model!r}, or wants a login (`hf auth login`)."
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return ConnectionError(
            f"{model!r} is not a folder here, not in the hub's cache, and the hub "
            f"cannot be reached. Go online once, run `hf download {model}`, or pass "
            "the path of a folder."
        )
    return ConnectionError(
        f"{model!r} is not a folder here and could not be fetched from the hub "
        f"({describe(error)}). Run `hf download {model}`, or pass the path of a folder."
    )


def refuse_file(path: Path) -> None:
    """Says what to pass in place of a path to a file.

    Raises:
        NotADirectoryError: always.
    """
    if path.suffix == ".gguf":
        cure = "GGUF is the format of llama.cpp; pass the folder it was made from"
    else:
        cure = f"pass its folder, {str(path.parent)!r}"
    raise NotADirectoryError(f"{str(path)!r} is a file and no folder: {cure}.")


def check_config(config: Qwen2Config | Qwen3Config) -> None:
    """Refuses what this model does not compute.

    Raises:
        ValueError: naming the field, its value and what is supported.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in ("qwen2", "qwen3"):
        raise ValueError(
            f"config.model_type is {model_type!r}; supported: 'qwen2', 'qwen3'."
        )
    check_numbers(vars(config), CONFIG_NUMBERS, "config.{}")
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    supported = {
        "hidden_act": (config.hidden_act == "silu", "'silu'"),
        "layer_types": (
            all(kind == "full_attention" for kind in config.layer_types or ()),
            "'full_attention' only: no sliding window (set use_sliding_window=false)",
        ),
        "num_key_value_heads": (
            heads % kv_heads == 0,
            f"a divisor of num_attention_heads={heads}",
        ),
        "quantization_config": (
            getattr(config, "quantization_config", None) is None,
            "none: take the checkpoint without quantisation",
        ),
    }
    for field, (is_supported, what) in supported.items():
        if not is_supported:
            value = getattr(config, field)
            raise ValueError(f"config.{field} is {value!r}; supported: {what}.")


def is_equal(weight: Tensor, stored: Tensor) -> bool:
    """Whether a stored tensor is this weight, once it has its dtype and device.

    Some thousand rows at a time, so that no second copy of a large matrix is made.
    """
    pairs = zip(torch.split(weight, 4096), torch.split(stored, 4096), strict=True)
    return all(torch.equal(mine, theirs.to(mine)) for mine, theirs in pairs)


def summarize_problems(problems: Mapping[str, Sequence[str]]) -> str:
    """At most ten lines about tensors that do not fit.

    Args:
        problems: by kind (`missing`, `unexpected`, `mis-shaped`), one text per tensor.
    """
    counts = {kind: len(texts) for kind, texts in problems.items() if texts}
    lines = ["weights and config are not of one checkpoint:"]
    all_fit = sum(counts.values()) <= 9
    if not all_fit:
        shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        lines = [f"weights and config are not of one checkpoint ({shown}):"]
    for kind in counts:
        texts = problems[kind]
        few = len(texts) if all_fit or len(texts) <= 3 else 2
        lines += [f"{kind}: {text}" for text in texts[:few]]
        if few < len(texts):
            lines.append(f"{kind}: and {len(texts) - few} more")
    return "\n  ".join(lines)


def warn_of_untied_head() -> None:
    """Says once that a tied config has a head of its own."""
    warnings.warn(
        "config.tie_word_embeddings is true, but lm_head.weight in the file differs from "
        "the embedding: the stored head is used, as in transformers 5. Set "
        "tie_word_embeddings to false in config.json to silence this.",
        UserWarning,
        stacklevel=2,
    )


def warn_of_non_finite(weights: Mapping[str, Tensor], where: Path) -> None:
    """Warns if a weight is NaN or infinite, naming up to five of the tensors.

    The least and the largest number of a tensor tell (NaN is handed on); all of them are
    read in one go, so that a GPU is waited for once. It is the cheapest exact way: in
    bfloat16 on a CPU, `isfinite().all()` takes 40 times as long.
    """
    extremes = [torch.stack(weight.aminmax()).float() for weight in weights.values()]
    flags = torch.stack(extremes).isfinite().all(-1).tolist()  # [tensors, 2]
    pairs = zip(weights.items(), flags, strict=True)
    bad = {name: weight.dtype for (name, weight), finite in pairs if not finite}
    if bad:
        shown = ", ".join(list(bad)[:5]) + (", ..." if len(bad) > 5 else "")
        dtype = str(next(iter(bad.values()))).removeprefix("torch.")
        warnings.warn(
            f"{where}: {len(bad)} tensors hold NaN or infinity as {dtype}, so that the "
            f"model's answers will be noise: {shown}. Fetch the weights again; if the "
            "dtype is float16, load with dtype='bfloat16' or 'float32'.",
            UserWarning,
            stacklevel=3,
        )


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Compiles every chat template, so that a broken one is told before the first chat.

    Raises:
        ValueError: if a template is no text, or not Jinja.
    """
    from jinja2 import TemplateSyntaxError

    templates: Any = tokenizer.chat_template
    if templates is None:
        return
    named = templates if isinstance(templates, dict) else {"chat_template": templates}
    for name, template in named.items():
        if not isinstance(template, str):
            raise ValueError(f"{name} is {shorten(repr(template))}: it must be a text.")
        try:
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}],
                chat_template=template,
                tokenize=False,
            )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{name} is broken in line {error.lineno}: {error.message}. Correct it."
            ) from error
        except Exception:
            continue  # it compiles; what it demands of a conversation, chat will tell


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of transformers, tried out; no code from the folder is run.

    All it needs of `config.json` is the family, so that is all it is shown.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    path = folder / "config.json"
    fields = read_json(path) if path.is_file() else {}
    config = None if fields else PreTrainedConfig()
    if fields.get("model_type") in ("qwen2", "qwen3"):
        config = AutoConfig.for_model(fields["model_type"])
    elif fields and not isinstance(fields.get("model_type"), str):
        raise ValueError(
            f"{path} has model_type {shorten(repr(fields.get('model_type')))}: it must "
            "be a text, such as 'qwen3'."
        )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, config=config, trust_remote_code=False
    )
    check_chat_template(tokenizer)
    tokenizer.decode(tokenizer("a").input_ids)
    return tokenizer


@contextmanager
def naming_tokenizer_file(folder: Path) -> Iterator[None]:
    """Errors inside become a `ValueError` that names the tokenizer file to blame."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if is_ours(error) and str(folder) in str(error):
            raise
        with naming(blame_tokenizer_file(folder, error)):
            raise


def blame_tokenizer_file(folder: Path, error: BaseException) -> Path:
    """Which file made the tokenizer fail; a damaged JSON file raises on its own."""
    for path in sorted(folder.glob("*.jinja")) + sorted(folder.glob("*.txt")):
        with naming(path):
            path.read_text(encoding="utf-8")
    found = [path for path in TOKENIZER_FILES if (folder / path).is_file()]
    for name in found:
        read_json(folder / name)
    if "chat_template" in str(error) and (folder / "chat_template.jinja").is_file():
        return folder / "chat_template.jinja"
    if "tokenizer.json" in found:
        from tokenizers import Tokenizer

        with naming(folder / "tokenizer.json"):
            Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        culprit = find_culprit(read_json(settings), lambda some: retry(folder, some))
        if culprit is not None:
            raise ValueError(
                f"{settings}: {culprit} is {shorten(repr(read_json(settings)[culprit]))}, "
                f"which makes no sense ({describe(error)}). Correct or remove the field."
            ) from error
    others = [name for name in found if name not in ("config.json", settings.name)]
    return folder / (others or found or [settings.name])[0]


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


def retry(folder: Path, settings: Fields) -> None:
    """Opens the tokenizer with other settings."""
    with tempfile.TemporaryDirectory() as name:
        for path in (*TOKENIZER_FILES, "merges.txt", "chat_template.jinja"):
            if (folder / path).is_file():
                Path(name, path).write_bytes((folder / path).read_bytes())
        Path(name, "tokenizer_config.json").write_text(json.dumps(settings))
        open_tokenizer(Path(name))
