"""Damaged folders: an error that names the file and the field, or a model that runs.

Every field of every JSON file in a checkpoint is replaced in turn, files are cut short,
bytes are flipped. Whatever comes of it must be a `ValueError`, a `TypeError` or an `OSError`
whose message names the file, or a model (a tokenizer) that works.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from folo_lib import bundled_model_path
from folo_lib.checkpoint import load_model, load_tokenizer

pytestmark = pytest.mark.more

NESTED: Any = "NESTED"  # 100,000 brackets
REMOVED: Any = "REMOVED"
BRACKETS = "[" * 100_000 + "]" * 100_000
DAMAGES: dict[str, Any] = {
    "null": None,
    "list": [],
    "object": {},
    "text": "x",
    "-1": -1,
    "0": 0,
    "1e30": 1e30,
    "10**30": 10**30,
    "true": True,
    "NaN": float("nan"),
    "nested list": [[[]]],
    "brackets": NESTED,
    "removed": REMOVED,
}
OURS = (ValueError, TypeError, OSError)
each_damage = pytest.mark.parametrize("damage", DAMAGES)

CONFIG = json.loads((bundled_model_path() / "config.json").read_text())
CONFIG_FIELDS = [
    *CONFIG,
    "torch_dtype",
    "quantization_config",
    "rope_theta",
    "rope_scaling",
    "id2label",
    "label2id",
    "auto_map",
    "tokenizer_class",
    "output_attentions",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "name_or_path",
    "attn_implementation",
    "per_layer_config",
]
SCALING: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 2048,
    "attention_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "truncate": True,
    "partial_rotary_factor": 1.0,
    "rope_theta": 1e6,
}
TOKENIZER = json.loads((bundled_model_path() / "tokenizer.json").read_text())
TOKENIZER_CONFIG_FIELDS = [
    "added_tokens_decoder",
    "additional_special_tokens",
    "auto_map",
    "backend",
    "bos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "eos_token",
    "errors",
    "extra_special_tokens",
    "model_max_length",
    "model_specific_special_tokens",
    "pad_token",
    "padding_side",
    "split_special_tokens",
    "tokenizer_class",
    "truncation_side",
    "unk_token",
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Damage makes transformers talk."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled checkpoint, its files linked; what is damaged is written anew."""
    target = tmp_path / "model"
    target.mkdir()
    for path in bundled_model_path().iterdir():
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copy(path, target)
    return target


def write(path: Path, text: str | bytes) -> None:
    """Anew, so that a linked original stays as it is."""
    path.unlink(missing_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def damaged_json(fields: Any, keys: tuple[Any, ...], damage: str) -> str:
    """The JSON text of `fields` with one value replaced or removed."""
    fields = copy.deepcopy(fields)
    place = fields
    for key in keys[:-1]:
        place = place[key]
    value = DAMAGES[damage]
    if value is not REMOVED:
        place[keys[-1]] = value
    elif isinstance(place, list) or keys[-1] in place:
        del place[keys[-1]]
    return json.dumps(fields).replace('"NESTED"', BRACKETS)


def run_model(folder: Path) -> None:
    model = load_model(folder, device="cpu", use_tqdm=False)
    with torch.inference_mode():
        model.compute_logits(model(torch.arange(7)[None]))


def run_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("Once upon a time").input_ids
    assert isinstance(tokenizer.decode(ids), str)


def judge(run: Callable[[Path], None], folder: Path, *names: str) -> str | None:
    """Runs; None if it went well, else the message, which must name one of the files."""
    try:
        run(folder)
    except OURS as error:
        module, message = type(error).__module__, str(error)
        assert module == "builtins", f"a foreign {type(error)!r}: {error}"
        kinds = (ValueError, TypeError)
        assert type(error) in kinds or isinstance(error, OSError), repr(error)
        assert any(str(folder / name) in message for name in names), message
        assert len(message) < 2000
        return message
    return None


class TestConfig:
    @each_damage
    @pytest.mark.parametrize("field", CONFIG_FIELDS)
    def test_fields(self, folder: Path, field: str, damage: str) -> None:
        write(folder / "config.json", damaged_json(CONFIG, (field,), damage))
        message = judge(run_model, folder, "config.json", ".")
        if message and DAMAGES[damage] is not NESTED:
            shape = re.search("mis-shaped|missing|unexpected", message)
            assert field in message or shape, message
        judge(run_tokenizer, folder, "config.json")

    @each_damage
    @pytest.mark.parametrize("rope_type", ["yarn", "linear", "default"])
    @pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
    @pytest.mark.parametrize("field", SCALING)
    def test_rope(
        self,
        folder: Path,
        spelling: str,
        rope_type: str,
        field: str,
        damage: str,
    ) -> None:
        rest = {k: v for k, v in CONFIG.items() if k != "rope_parameters"}
        fields = rest | {spelling: SCALING | {"rope_type": rope_type}}
        text = damaged_json(fields, (spelling, field), damage)
        write(folder / "config.json", text)
        message = judge(run_model, folder, "config.json", ".")
        if message and DAMAGES[damage] is not NESTED:
            assert field in message or "rope_type" in message, message
            assert spelling in message, message

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_key_value_heads": 3},
            {"num_attention_heads": 5},
            {"hidden_size": 2**24, "vocab_size": 2**24},
            {"hidden_size": 4, "head_dim": 4096, "num_attention_heads": 2**16},
            {"num_hidden_layers": 7},
            {"num_hidden_layers": 5},
            {"layer_types": ["full_attention"]},
            {"layer_types": ["sliding_attention"] * 6},
            {"layer_types": [["full_attention"]] * 6},
            {"max_position_embeddings": 2**25},
            {"tie_word_embeddings": False},
            {"attention_bias": True},
            {"quantization_config": "awq"},
            {"dtype": "int8"},
            {"dtype": "nn"},
            {"dtype": "torch.torch.float32"},
            {"dtype": {"text": "float32"}},
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}},
        ],
        ids=str,
    )
    def test_that_do_not_fit(self, folder: Path, changes: dict[str, Any]) -> None:
        write(folder / "config.json", json.dumps(CONFIG | changes))
        message = judge(run_model, folder, "config.json", ".")
        assert message, "loaded all the same"

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "3", BRACKETS, '{"a":' * 100_000, b"\xff\xfe{}"]
    )
    @pytest.mark.parametrize(
        "name", ["config.json", "tokenizer.json", "tokenizer_config.json"]
    )
    def test_files(self, folder: Path, name: str, text: str | bytes) -> None:
        write(folder / name, text)
        run = run_model if name == "config.json" else run_tokenizer
        assert judge(run, folder, name)


class TestTokenizer:
    @each_damage
    @pytest.mark.parametrize("field", TOKENIZER)
    def test_fields(self, folder: Path, field: str, damage: str) -> None:
        text = damaged_json(TOKENIZER, (field,), damage)
        write(folder / "tokenizer.json", text)
        judge(run_tokenizer, folder, "tokenizer.json")

    @each_damage
    @pytest.mark.parametrize(
        ("part", "field"),
        [
            (part, field)
            for part in ("model", "pre_tokenizer", "decoder", "normalizer")
            if isinstance(TOKENIZER[part], dict)
            for field in TOKENIZER[part]
        ],
    )
    def test_parts(self, folder: Path, part: str, field: str, damage: str) -> None:
        text = damaged_json(TOKENIZER, (part, field), damage)
        write(folder / "tokenizer.json", text)
        judge(run_tokenizer, folder, "tokenizer.json")

    @each_damage
    @pytest.mark.parametrize(
        "keys",
        [
            *(("added_tokens", 0, field) for field in TOKENIZER["added_tokens"][0]),
            ("added_tokens", 0),
            ("model", "merges", 0),
            ("model", "vocab", "a"),
        ],
        ids=str,
    )
    def test_entries(self, folder: Path, keys: tuple[Any, ...], damage: str) -> None:
        write(folder / "tokenizer.json", damaged_json(TOKENIZER, keys, damage))
        judge(run_tokenizer, folder, "tokenizer.json")

    @pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel", "GPT"])
    def test_another_model(self, folder: Path, kind: str) -> None:
        fields = copy.deepcopy(TOKENIZER)
        fields["model"]["type"] = kind
        write(folder / "tokenizer.json", json.dumps(fields))
        judge(run_tokenizer, folder, "tokenizer.json")

    @each_damage
    @pytest.mark.parametrize("field", TOKENIZER_CONFIG_FIELDS)
    def test_settings(self, folder: Path, field: str, damage: str) -> None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        text = damaged_json(settings, (field,), damage)
        write(folder / "tokenizer_config.json", text)
        if field == "chat_template":
            (folder / "chat_template.jinja").unlink()
        message = judge(run_tokenizer, folder, "tokenizer_config.json")
        if message and DAMAGES[damage] is not NESTED:
            assert field in message, message

    @pytest.mark.parametrize("share", range(0, 100, 7))
    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_cut_short(self, folder: Path, name: str, share: int) -> None:
        text = (folder / name).read_bytes()
        write(folder / name, text[: len(text) * share // 100])
        assert judge(run_tokenizer, folder, name)

    @pytest.mark.parametrize("seed", range(60))
    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_flipped_byte(self, folder: Path, name: str, seed: int) -> None:
        text = bytearray((folder / name).read_bytes())
        rng = random.Random(seed)
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        write(folder / name, bytes(text))
        judge(run_tokenizer, folder, name)

    @pytest.mark.parametrize(
        "text", ["[]", "null", "3", "{", '{"eos_token": 3}', "[" * 100_000]
    )
    @pytest.mark.parametrize(
        "name", ["special_tokens_map.json", "added_tokens.json", "vocab.json"]
    )
    def test_older_files(self, folder: Path, name: str, text: str) -> None:
        write(folder / name, text)
        judge(run_tokenizer, folder, name, "tokenizer.json")

    @pytest.mark.parametrize(
        "vocab", ["{}", "[]", "null", '{"a": "b"}', '{"a": 1.5}', "{"]
    )
    @pytest.mark.parametrize("merges", ["", "a", "a b c", None, b"\xff"])
    def test_slow_files(self, folder: Path, vocab: str, merges: Any) -> None:
        (folder / "tokenizer.json").unlink()
        write(folder / "vocab.json", vocab)
        if merges is not None:
            write(folder / "merges.txt", merges)
        names = ["vocab.json", "merges.txt", "tokenizer_config.json"]
        judge(run_tokenizer, folder, *names)

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}",
            "{{ messages",
            "{% endif %}",
            "{{ messages | }}",
            "{% if %}a{% endif %}",
            "{% set %}",
            "{% frobnicate %}",
            "{{ a b }}",
            "{{ messages | no_such_filter }}",
            "{% include %}",
        ],
    )
    @pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
    def test_chat_template(self, folder: Path, template: str, where: str) -> None:
        if where == "chat_template.jinja":
            write(folder / where, template)
        else:
            (folder / "chat_template.jinja").unlink()
            settings = json.loads((folder / where).read_text())
            write(folder / where, json.dumps(settings | {"chat_template": template}))
        message = judge(run_tokenizer, folder, where)
        assert message and "chat_template" in message
        assert "line 1" in message

    @pytest.mark.parametrize("text", [b"\xff\xfe", b"{{ \xff }}"])
    def test_a_chat_template_that_is_no_text(self, folder: Path, text: bytes) -> None:
        write(folder / "chat_template.jinja", text)
        assert judge(run_tokenizer, folder, "chat_template.jinja")

    @pytest.mark.parametrize(
        "template",
        [
            "{{ raise_exception('system first') }}",
            "{{ messages[1].content }}",
            "{{ messages[0]['content'] + 1 }}",
            "{{ 1 / 0 }}",
            "",
        ],
    )
    def test_what_a_template_demands_is_left_to_chat(
        self, folder: Path, template: str
    ) -> None:
        write(folder / "chat_template.jinja", template)
        assert judge(run_tokenizer, folder, "chat_template.jinja") is None


class TestWeights:
    @pytest.fixture
    def index(self, folder: Path) -> dict[str, Any]:
        """Two shards and their index, which lies in the folder."""
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        names = sorted(weights)
        weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in ("0.safetensors", "1.safetensors"):
            some = {n: weights[n] for n in names if weight_map[n] == file}
            safetensors.torch.save_file(some, folder / file)
        (folder / "model.safetensors").unlink()
        index = {"metadata": {"total_size": 6}, "weight_map": weight_map}
        write(folder / "model.safetensors.index.json", json.dumps(index))
        run_model(folder)
        return index

    @each_damage
    @pytest.mark.parametrize(
        "keys",
        [("metadata",), ("weight_map",), ("weight_map", "model.norm.weight")],
        ids=str,
    )
    def test_index(
        self,
        folder: Path,
        index: dict[str, Any],
        keys: tuple[str, ...],
        damage: str,
    ) -> None:
        name = "model.safetensors.index.json"
        write(folder / name, damaged_json(index, keys, damage))
        message = judge(run_model, folder, name, ".")
        if message:
            assert name in message

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "3", BRACKETS, '{"a":' * 100_000, b"\xff\xfe{}"]
    )
    def test_index_file(
        self, folder: Path, index: dict[str, Any], text: str | bytes
    ) -> None:
        write(folder / "model.safetensors.index.json", text)
        assert judge(run_model, folder, "model.safetensors.index.json")

    @pytest.mark.parametrize(
        "name", ["../x", "/etc/passwd", "a\0b", "x" * 5000, "", ".", "config.json"]
    )
    def test_index_names(self, folder: Path, index: dict[str, Any], name: str) -> None:
        index["weight_map"]["model.norm.weight"] = name
        write(folder / "model.safetensors.index.json", json.dumps(index))
        assert judge(run_model, folder, "model.safetensors.index.json", ".")

    @pytest.mark.parametrize("share", range(0, 100, 9))
    def test_cut_short(self, folder: Path, share: int) -> None:
        data = (folder / "model.safetensors").read_bytes()
        write(folder / "model.safetensors", data[: len(data) * share // 100])
        assert judge(run_model, folder, "model.safetensors")

    @pytest.mark.parametrize("seed", range(80))
    def test_a_flipped_bit_of_the_header(self, folder: Path, seed: int) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        size = int.from_bytes(data[:8], "little")
        rng = random.Random(seed)
        data[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
        write(folder / "model.safetensors", bytes(data))
        judge(run_model, folder, "model.safetensors", ".")

    @each_damage
    @pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets", None])
    def test_header_fields(self, folder: Path, field: str | None, damage: str) -> None:
        data = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        keys = ("model.norm.weight", field) if field else ("model.norm.weight",)
        text = damaged_json(header, keys, damage).encode()
        damaged = len(text).to_bytes(8, "little") + text + data[8 + size :]
        write(folder / "model.safetensors", damaged)
        assert judge(run_model, folder, "model.safetensors", ".")
