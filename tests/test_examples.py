"""The documents and the examples: what they show runs, what they quote is still said."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from folo_lib import (
    EngineConfig,
    LLMEngine,
    SamplingParams,
    bundled_model_path,
    load_model,
)

ROOT = Path(__file__).resolve().parent.parent
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
NAMES = ("teach", "outgrow", "names", "next", "troubleshooting", "glossary")
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32", "use_tqdm": False}
GITHUB = "https://github.com/folovllm/FoloVLLM/"


def read(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of a language, in lists too."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```$"
    found = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(body) for _, body in found]


# The example course


def run_pytest(folder: Path, *arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_example_course_passes_its_own_workflow(tmp_path: Path) -> None:
    """Copied out of the repository, as a teacher would."""
    folder = tmp_path / "course"
    shutil.copytree(EXAMPLES / "one_page_course", folder)
    workflow = yaml.safe_load((folder / "workflow.yml").read_text("utf-8"))
    steps = [step.get("run", "") for step in workflow["jobs"]["lesson"]["steps"]]
    checks = [step.removeprefix("pytest ") for step in steps if "pytest" in step]
    assert checks == ["--nbval lesson.ipynb", "test_solution.py"]
    run_pytest(folder, "--nbval", "lesson.ipynb", "test_solution.py")


def test_commands_name_the_branch_while_there_is_no_tag() -> None:
    """With the first release they name its tag, and this test the version."""
    texts = [
        path.read_text("utf-8")
        for path in (EXAMPLES / "one_page_course").iterdir()
        if path.is_file()
    ]
    texts += [read("teach"), read("outgrow")]
    text = (
        "".join(texts)
        .replace("git+{course}@", "FoloVLLM@")
        .replace("{course}/raw/", "FoloVLLM@")
    )
    refs = re.findall(r"FoloVLLM@([\w.]+)", text)
    assert len(refs) >= 4 and set(refs) == {"main"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda logits, a: logits.masked_fill(
                logits < a * logits.amax() ** 2, -torch.inf
            ),
            "0.18",
        ),
        (lambda logits, a: logits.softmax(-1), "kept [True, True, True, True]"),
        (lambda logits, a: logits.masked_fill_(logits < 0, -torch.inf), "not yet"),
        (lambda logits, a: logits[:1], "[2, 4] became [1, 4]"),
        (lambda logits, a: None, "returned NoneType"),
    ],
)
def test_check_of_the_example_course(
    wrong: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "one_page_course"))
    checks = importlib.import_module("checks")
    verdict = checks.check_apply_top_a_filtering(wrong)
    assert not verdict and message.lower() in verdict.message.lower()


# The translation for vLLM, which needs no vLLM


@pytest.fixture
def translation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("vllm_same_parameters")


# vllm.SamplingParams, its fields that we have too, and their defaults, as of 2026.
VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}


def test_names_and_defaults_are_vllms(translation: ModuleType) -> None:
    ours = {field.name: field.default for field in fields(SamplingParams)}
    assert MISSING not in ours.values() and ours == VLLM_DEFAULTS
    values = translation.to_vllm_sampling(SamplingParams())
    assert values == VLLM_DEFAULTS | {"stop": [], "stop_token_ids": [], "bad_words": []}
    for name in VLLM_DEFAULTS:
        assert f"`{name}`" in read("outgrow"), f"{name} is not in the table"


def test_every_sampling_parameter_is_handed_over(translation: ModuleType) -> None:
    settings: dict[str, Any] = {
        "n": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
        "stop": ["\n\n", "END"],
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "max_tokens": 99,
        "min_tokens": 5,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "logit_bias": {5: -1.5},
        "allowed_token_ids": [5, 6, 7],
        "bad_words": ["cat"],
        "detokenize": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    assert translation.to_vllm_sampling(SamplingParams(**settings)) == settings
    one = translation.to_vllm_sampling(SamplingParams(stop="END", seed=-1))
    assert one["stop"] == ["END"] and one["seed"] == 2**64 - 1


def test_engine_arguments_are_translated(translation: ModuleType) -> None:
    values = translation.to_vllm_engine(
        "a/b",
        torch.bfloat16,
        512,
        "eager",
        kv_cache_memory_bytes=1000,
        seed=3,
        max_num_seqs=8,
        max_num_batched_tokens=100,
        enable_prefix_caching=False,
        block_size=32,
    )
    assert values == {
        "model": "a/b",
        "seed": 3,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "use_tqdm_on_load": True,
        "max_logprobs": -1,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1000,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 100,
        "enable_prefix_caching": False,
        "block_size": 32,
    }
    plain = translation.to_vllm_engine()
    assert not {"max_model_len", "block_size"} & plain.keys()
    assert plain["max_num_seqs"] == 256 and plain["max_num_batched_tokens"] == 2048
    assert plain["enable_prefix_caching"] is True
    for name in ("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching"):
        assert plain[name] == getattr(EngineConfig, name)
    assert translation.to_vllm_engine()["model"] == str(bundled_model_path())
    assert translation.to_vllm_engine(dtype="float16")["dtype"] == "float16"


def test_every_engine_argument_is_in_the_table() -> None:
    names = {*LLMEngine.__init__.__annotations__} - {"return", "options"}
    names |= {field.name for field in fields(EngineConfig)}
    assert len(names) > 12
    for name in names:
        assert re.search(rf"^\| [^|]*`{name}\b", read("outgrow"), re.MULTILINE), name


# What the documents show


@pytest.mark.parametrize("name", NAMES)
def test_python_in_documents_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks marked `python` of a document, one after the other, as one module."""
    text = read(name)
    module = ModuleType(f"document_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    qwen3 = importlib.import_module("folo_lib.qwen3")
    config = importlib.import_module("folo_lib.config")
    for table in (qwen3.ATTENTION_BACKENDS, config.MODEL_RUNNERS):
        for key in ("counting", "never"):
            monkeypatch.setitem(table, key, "")  # removed afterwards
    for code in blocks(text, "python"):
        exec(compile(code, f"{name}.md", "exec"), module.__dict__)
    for code in blocks(text, "py"):
        compile(code.replace(", ...)", ")"), f"{name}.md", "exec")
    printed = capsys.readouterr().out
    assert not printed or printed in blocks(text, "text")


def anchors(text: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            yield link


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    text = read(name)
    assert (
        len(
            re.findall(
                r"^# ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
            )
        )
        == 1
    )
    for link in anchors(text):
        assert (DOCS / link).is_file(), link
    for path in re.findall(GITHUB + r"(?:blob|tree)/main/([\w./-]+)", text):
        assert (ROOT / path).exists(), path


def test_sections_that_documents_name_exist() -> None:
    found = 0
    pattern = r"\(\.\./notebooks/(\w+)\.ipynb\),\s+section (\d+)"
    for name in NAMES:
        for page, number in re.findall(pattern, read(name)):
            book = json.loads((ROOT / "notebooks" / f"{page}.ipynb").read_text("utf-8"))
            text = "\n".join("".join(cell["source"]) for cell in book["cells"])
            assert re.search(rf"^## {number}\. ", text, re.MULTILINE), (
                name,
                page,
                number,
            )
            found += 1
    assert found >= 8


def test_names_of_the_field_are_names_here() -> None:
    text = "".join(map(read, NAMES))
    names = set(re.findall(r"`(folo_lib(?:\.\w+)+)`", text))
    modules = "|".join(path.stem for path in (ROOT / "folo_lib").glob("*.py"))
    here = set(re.findall(rf"`((?:{modules})\.\w[\w.]*)`", read("names")))
    assert len(here) > 50
    names |= {f"folo_lib.{name}" for name in here}
    for name in names:
        pkgutil.resolve_name(name)  # raises if there is no such thing


# Messages quoted in the troubleshooting page


@contextmanager
def changed_checkpoint(tmp_path: Path, **config: Any) -> Iterator[Path]:
    folder = tmp_path / "model"
    shutil.copytree(bundled_model_path(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def load_changed(tmp_path: Path, **config: Any) -> None:
    with changed_checkpoint(tmp_path, **config) as folder:
        load_model(folder, use_tqdm=False)


def load_cut(tmp_path: Path) -> None:
    with changed_checkpoint(tmp_path) as folder:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        load_model(folder, use_tqdm=False)


def load_quantised(tmp_path: Path) -> None:
    with changed_checkpoint(tmp_path) as folder:
        path, name = folder / "model.safetensors", "model.embed_tokens.weight"
        tensors = load_file(path)
        save_file({name: tensors[name].to(torch.float8_e4m3fn)}, path)
        load_model(folder, use_tqdm=False)


def chat_without_template() -> None:
    engine = LLMEngine(load_model(bundled_model_path(), use_tqdm=False))
    engine.chat([{"role": "user", "content": "Hello"}])


def ask(prompt: str) -> None:
    LLMEngine(max_model_len=64, **CPU).generate(prompt, use_tqdm=False)


ROPE = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
PROVOKED: list[Callable[[Path], Any]] = [
    lambda path: load_changed(path, rope_parameters=ROPE),
    lambda path: load_changed(path, model_type="llama"),
    lambda path: load_changed(path, intermediate_size=256),
    load_cut,
    load_quantised,
    lambda path: chat_without_template(),
    lambda path: LLMEngine("Qwen/Qwen3-0.6B"),
    lambda path: LLMEngine("./no/such/folder"),
    lambda path: LLMEngine(device="mps"),
    lambda path: LLMEngine(decode="cuda_graph"),
    lambda path: LLMEngine(decode="graph", **CPU),
    lambda path: LLMEngine(attention_backend="flash"),
    lambda path: LLMEngine(dtype="fp16"),
    lambda path: LLMEngine(kv_cache_memory_bytes=50_000, **CPU),
    lambda path: LLMEngine(kv_cache_memory_bytes=10**7, **CPU),
    lambda path: ask("word " * 200),
    lambda path: ask(""),
    lambda path: SamplingParams(n=2, temperature=0),
    lambda path: SamplingParams(temperature=0.001),
]
IN_SOURCE = {  # these need a hub, and a GPU
    "Layers are not compiled: that needs Triton, a C compiler, and for bfloat16 "
    "compute capability 8.": (
        "cuda_graph",
        '"Triton, a C compiler, and for bfloat16 compute capability 8"',
    ),
    "the hub has no model 'Qwen/Qwen3-0.6C', or wants a login (`hf auth login`).": (
        "checkpoint_checks",
        'f"the hub has no model {model!r}, or wants a login (`hf auth login`)."',
    ),
}


def test_quoted_messages_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")

    def unreachable(*_: Any, **__: Any) -> None:
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    said = ""
    with caplog.at_level(logging.WARNING, "folo_lib"):
        for provoke in PROVOKED:
            try:
                provoke(tmp_path)
            except (ValueError, OSError) as error:
                said += f"{error}\n"
    said += "\n".join(record.getMessage() for record in caplog.records)
    said = said.replace(f"{tmp_path / 'model'}{os.sep}", "")
    said = said.replace(f"{tmp_path}{os.sep}", "")
    said = re.sub(r"(deserializing header: ).*(\): fetch)", r"\1...\2", said)

    [first, *quotes] = blocks(read("troubleshooting"), "text")
    assert first.startswith("there was a little deer")  # a text, not a message
    # Messages are wrapped, and a blank line stands between two.
    lines = [" ".join(m.split()) for quote in quotes for m in quote.split("\n\n")]
    assert len(lines) > 18
    for line in lines:
        if line in IN_SOURCE:
            module, fragment = IN_SOURCE[line]
            source = (ROOT / "folo_lib" / f"{module}.py").read_text("utf-8")
            assert fragment in source, line
        else:
            assert line in said.splitlines(), line


def test_numbers_of_the_troubleshooting_page() -> None:
    """4,096 and 40,960 tokens of Qwen3-0.6B, in bytes; and the EOS ids of the bundled model."""
    token = 2 * 28 * 8 * 128 * 2
    assert (round(4096 * token / 1e6), round(40960 * token / 1e9, 1)) == (470, 4.7)
    assert LLMEngine(max_model_len=64, **CPU).processor.eos_token_ids == (2045, 2043)


# Glossary, citation, Binder


def test_glossary_is_sorted_and_complete() -> None:
    rows = [
        line.split("|")[1:-1] for line in read("glossary").splitlines() if "|" in line
    ][2:]
    terms = [row[0].strip().lower() for row in rows]
    assert len(terms) >= 50 and terms == sorted(set(terms))
    for row in rows:
        assert len(row) == 4 and all(cell.strip() for cell in row), row
        assert re.search(r"[。]\s*$", row[2]) and ".<br>" in row[2], row[0]


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert {"message", "title", "type", "repository-code"} <= citation.keys()


def test_binder_installs_what_pyproject_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    script = (ROOT / ".binder" / "postBuild").read_text("utf-8")
    extras = re.findall(r"\.\[([\w,]+)\]", script)
    assert extras and all(e in project["optional-dependencies"] for e in extras)
    environment = yaml.safe_load(
        (ROOT / ".binder" / "environment.yml").read_text("utf-8")
    )
    assert environment["dependencies"] == ["python=3.12", "pip"]
    subprocess.run(["bash", "-n", ROOT / ".binder" / "postBuild"], check=True)
    assert os.name == "nt" or os.access(ROOT / ".binder" / "postBuild", os.X_OK)
