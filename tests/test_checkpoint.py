"""checkpoint.py: the shapes of real checkpoints equal Hugging Face; damage is named."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import safetensors
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from folo_lib import Qwen3ForCausalLM, bundled_model_path, checkpoint
from folo_lib.checkpoint import (
    find_checkpoint,
    find_weight_files,
    load_model,
    load_tokenizer,
    read_config,
    read_weights,
    resolve_attention_backend,
    resolve_device,
    resolve_dtype,
)
from folo_lib.kv_cache import TorchSDPABackend
from folo_lib.qwen3 import ATTENTION_BACKENDS

Config = dict[str, Any]
Weights = dict[str, Tensor]

# config.json as it lies on the hub, but for the number of layers: 28 and 24 there.
QWEN3_06B: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN25_05B: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMALL: Config = QWEN3_06B | {
    "head_dim": 16,
    "hidden_size": 48,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
SMALL2: Config = QWEN25_05B | {
    "hidden_size": 56,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "vocab_size": 320,
}
QWEN3_NAMES = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
QWEN2_NAMES = [f"self_attn.{p}_proj.bias" for p in "qkv"]


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a checkpoint by its name on the hub, written out by hand."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q = config["num_attention_heads"] * head_dim
    kv = config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, inner),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
    }
    if config["model_type"] == "qwen3":
        layer |= dict.fromkeys(QWEN3_NAMES, (head_dim,))
    else:
        layer |= dict(zip(QWEN2_NAMES, [(q,), (kv,), (kv,)], strict=True))
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    # Qwen3-0.6B has its head in the file, though it is tied; Qwen2.5-0.5B has not.
    if not config["tie_word_embeddings"] or config["model_type"] == "qwen3":
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return dict(sorted(shapes.items()))


def random_weights(config: Config, seed: int = 0) -> Weights:
    """bfloat16, norms and biases random too: ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in tensor_shapes(config).items():
        if "norm" in name:
            weight = torch.rand(shape, generator=generator) + 0.5
        else:
            weight = torch.empty(shape).normal_(0, 0.02, generator=generator)
            weight *= 25 if name.endswith("bias") else 1
        weights[name] = weight.bfloat16()
    if config["tie_word_embeddings"] and "lm_head.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return weights


def write_folder(
    folder: Path, config: Config, weights: Weights, num_shards: int = 1
) -> Path:
    """A checkpoint; its shards take turns, so that q, k and v lie apart."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {
        name: f"model-{i % num_shards + 1:05d}-of-{num_shards:05d}.safetensors"
        for i, name in enumerate(weights)
    }
    for file in sorted(set(weight_map.values())):
        shard = {n: w for n, w in weights.items() if weight_map[n] == file}
        save_file(shard, folder / file, {"format": "pt"})
    size = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def assert_exact(model: Qwen3ForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """Every weight of the model is the one in the files, to the last bit."""
    views = model.hf_weights()
    for name, tensor in stored_weights(folder):
        if name == "lm_head.weight" and model.lm_head is None:
            continue
        view = views.pop(name)
        assert view.dtype == dtype
        assert torch.equal(view, tensor.to(dtype)), name
    assert not views, f"not in the files: {sorted(views)}"


def logits_of(model: Qwen3ForCausalLM, input_ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model.compute_logits(model(input_ids))
    return logits


def greedy(model: Qwen3ForCausalLM, input_ids: Tensor, count: int) -> list[int]:
    """Without a cache: everything again for each token."""
    ids = input_ids
    with torch.inference_mode():
        for _ in range(count):
            logits = model.compute_logits(model(ids)[:, -1:])
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    return ids[0, input_ids.shape[1] :].tolist()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """The bound of design section 3 for float32."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    bound = max(1e-5, 1e-5 * theirs.std().item())
    assert (ours - theirs).abs().max().item() <= bound


@dataclass
class Reference:
    """Checkpoints with one set of weights, and what Hugging Face makes of them."""

    folders: dict[str, Path]
    input_ids: Tensor
    logits: Tensor
    tokens: list[int]


def hugging_face(folder: Path, input_ids: Tensor, count: int) -> tuple[Tensor, Any]:
    """Float32 logits and greedy tokens."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), f"the names are not those of Hugging Face: {info}"
    with torch.inference_mode():
        logits = model(input_ids).logits
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return logits, output[0, input_ids.shape[1] :].tolist()


@pytest.fixture(
    scope="module",
    params=[QWEN3_06B, QWEN25_05B],
    ids=["Qwen3-0.6B", "Qwen2.5-0.5B"],
)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reference]:
    root = tmp_path_factory.mktemp("real")
    weights = random_weights(request.param)
    folders = {
        "one file": write_folder(root / "one", request.param, weights),
        "sharded": write_folder(root / "sharded", request.param, weights, 3),
    }
    del weights
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(request.param["vocab_size"], (1, 37), generator=generator)
    yield Reference(
        folders, input_ids, *hugging_face(folders["one file"], input_ids, 16)
    )
    shutil.rmtree(root)  # pytest would keep a gigabyte of each of three runs


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "small", SMALL, random_weights(SMALL))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "sharded", SMALL, random_weights(SMALL), 3)


class TestRealShapes:
    @pytest.mark.parametrize("kind", ["one file", "sharded"])
    def test_equals_hugging_face(self, reference: Reference, kind: str) -> None:
        folder = reference.folders[kind]
        model = load_model(folder, device="cpu", use_tqdm=False)
        assert_exact(model, folder, torch.float32)  # so "auto" is float32 on a CPU
        assert_close(logits_of(model, reference.input_ids), reference.logits)
        assert greedy(model, reference.input_ids, 16) == reference.tokens

    def test_config_survives_the_old_style(self, reference: Reference) -> None:
        config = read_config(reference.folders["one file"])
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
        assert config.dtype in (torch.bfloat16, "bfloat16")

    def test_shards_lie_apart(self, reference: Reference) -> None:
        files = find_weight_files(reference.folders["sharded"])
        assert len(files) == 3
        of_layer_0 = [
            {n for n in dict(read_weights([path], headers_only=True)) if ".0." in n}
            for path in files
        ]
        assert all(of_layer_0)


class TestHub:
    @pytest.mark.slow
    @pytest.mark.parametrize("repo", ["Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B"])
    def test_real_checkpoint(self, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            if not isinstance(huggingface_hub.try_to_load_from_cache(repo, file), str):
                pytest.skip(f"{repo} is not in the hub's cache ({file} is missing)")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        text = "A KV cache holds the keys and values of"
        input_ids = load_tokenizer(repo)(text, return_tensors="pt").input_ids
        logits, tokens = hugging_face(find_checkpoint(repo), input_ids, 16)
        model = load_model(repo, device="cpu", use_tqdm=False)
        assert_close(logits_of(model, input_ids), logits)
        assert greedy(model, input_ids, 16) == tokens

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty cache of the hub."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return tmp_path / "hub"

    def test_a_cached_id_works_offline(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        repo = cache / "models--someone--small-1.5"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        folder = repo / "snapshots" / ("0" * 40)
        write_folder(folder, SMALL, random_weights(SMALL))
        shutil.copy(bundled_model_path() / "tokenizer.json", folder)
        shutil.copy(bundled_model_path() / "tokenizer_config.json", folder)
        assert find_checkpoint("someone/small-1.5").samefile(folder)
        model = load_model("someone/small-1.5", device="cpu", use_tqdm=False)
        assert_exact(model, folder, torch.float32)
        assert load_tokenizer("someone/small-1.5").encode("a")

    @pytest.mark.parametrize("load", [load_model, load_tokenizer])
    def test_offline(
        self,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        load: Callable[[str], object],
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match=r"'Qwen/Qwen3-0\.6B'") as raised:
            load("Qwen/Qwen3-0.6B")
        for cure in ("Go online once", "hf download Qwen/Qwen3-0.6B", "a folder"):
            assert cure in str(raised.value)

    def test_hub_out_of_reach(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody
        with pytest.raises(ConnectionError, match="hf download someone/small"):
            load_model("someone/small")

    def test_no_such_model_on_the_hub(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class NoSuchRepo(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), NoSuchRepo) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", address)
            try:
                with pytest.raises(FileNotFoundError, match=r"no model 'a/b'.*login"):
                    load_model("a/b")
            finally:
                server.shutdown()

    @pytest.mark.parametrize(
        "arguments",
        [
            {"dtype": "float23"},
            {"device": "banana"},
            {"attention_backend": "flash"},
        ],
        ids=str,
    )
    def test_arguments_are_checked_before_a_download(
        self, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str]
    ) -> None:
        def download(*args: object, **options: object) -> None:
            pytest.fail("asked the hub before looking at the arguments")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(ValueError, match=next(iter(arguments.values()))):
            load_model("someone/small", **arguments)

    @pytest.mark.parametrize(
        "name",
        ["no-such-folder", "/no/such/folder", "a/b/c", "./a b", "../x", "~/none"],
    )
    def test_neither_folder_nor_hub_id(
        self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for load in (load_model, load_tokenizer):
            with pytest.raises(FileNotFoundError, match="neither a folder nor") as info:
                load(name)
            assert repr(name) in str(info.value)

    def test_a_folder_goes_before_a_hub_id(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(small.parent.parent)
        assert find_checkpoint(f"{small.parent.name}/small").samefile(small)

    def test_a_tilde_is_the_home_folder(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(small.parent))
        monkeypatch.setenv("USERPROFILE", str(small.parent))
        assert find_checkpoint("~/small").samefile(small)


class Faultless(TorchSDPABackend):
    """In place of page 13's, on a GPU that can run it."""


class Faulty(TorchSDPABackend):
    """In place of page 13's, where it can run nothing."""

    asked: ClassVar[list[tuple[torch.device, torch.dtype]]] = []

    @staticmethod
    def find_fault(device: torch.device, dtype: torch.dtype) -> str:
        Faulty.asked.append((device, dtype))
        return "triton is unwell: choose 'torch_sdpa'"


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestAttentionBackend:
    """`"auto"` on a GPU, without one."""

    def put(self, monkeypatch: pytest.MonkeyPatch, backend: type) -> None:
        name = f"{__name__}:{backend.__name__}"
        monkeypatch.setitem(ATTENTION_BACKENDS, "triton", name)

    def uninstall_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "folo_lib.paged_attention", raising=False)

    def make_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
    ) -> None:
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        for name, value in (("capability", capability), ("name", "Some GPU")):
            answer = partial(lambda value, device: value, value)
            monkeypatch.setattr(torch.cuda, f"get_device_{name}", answer)

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
    def test_auto_is_triton_on_a_gpu_that_can_run_it(
        self,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        capability: tuple[int, int],
    ) -> None:
        self.make_gpu(monkeypatch, capability)
        assert resolve_attention_backend("auto", CUDA, torch.bfloat16) == "triton"
        assert resolve_attention_backend("triton", CUDA, torch.bfloat16) == "triton"
        assert not caplog.records

    @pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
    def test_auto_says_that_a_gpu_is_too_old(
        self,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        capability: tuple[int, int],
    ) -> None:
        self.make_gpu(monkeypatch, capability)
        assert resolve_attention_backend("auto", CUDA, torch.float32) == "torch_sdpa"
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        for part in ("runs on 'torch_sdpa'", "8.0", "Some GPU", str(capability)):
            assert part in record.getMessage()
        with pytest.raises(ValueError, match=r"8\.0.*Some GPU.*'torch_sdpa'"):
            resolve_attention_backend("triton", CUDA, torch.float32)
        assert len(caplog.records) == 1

    def test_auto_says_that_triton_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.uninstall_triton(monkeypatch)
        assert resolve_attention_backend("auto", CUDA, torch.float32) == "torch_sdpa"
        [record] = caplog.records
        assert "pip install triton" in record.getMessage()
        with pytest.raises(ValueError, match=r"pip install triton.*'torch_sdpa'"):
            resolve_attention_backend("triton", CUDA, torch.float32)
        assert len(caplog.records) == 1

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    def test_auto_asks_for_triton_on_a_gpu_only(
        self,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        device: str,
    ) -> None:
        self.put(monkeypatch, Faulty)
        backend = resolve_attention_backend("auto", torch.device(device), torch.float32)
        assert backend == ("torch_ragged" if device == "cpu" else "torch_sdpa")
        assert not caplog.records

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_auto_on_a_cpu_looks_at_the_dtype(self, dtype: torch.dtype) -> None:
        assert resolve_attention_backend("auto", CPU, dtype) == "torch_sdpa"
        with pytest.raises(ValueError, match=r"'torch_ragged'.*'torch_sdpa'"):
            resolve_attention_backend("torch_ragged", CPU, dtype)

    def test_the_backend_is_asked_about_this_device_and_dtype(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.put(monkeypatch, Faulty)
        Faulty.asked.clear()
        device = torch.device("cuda", 3)
        resolve_attention_backend("auto", device, torch.float16)
        assert Faulty.asked == [(device, torch.float16)]

    @pytest.mark.parametrize("name", ["torch_naive", "torch_sdpa"])
    def test_torch_runs_everywhere(self, name: str) -> None:
        for device in (CPU, CUDA, torch.device("mps")):
            assert resolve_attention_backend(name, device, torch.float32) == name

    @pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
    def test_an_unknown_name_is_told_the_choices(self, device: torch.device) -> None:
        with pytest.raises(ValueError, match=r"'flash'.*'auto'.*'torch_sdpa'"):
            resolve_attention_backend("flash", device, torch.float32)

    @pytest.mark.parametrize(
        ("backend", "chosen"), [(Faultless, "Faultless"), (Faulty, "TorchSDPABackend")]
    )
    def test_a_model_is_told_once_what_it_runs_on(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        backend: type,
        chosen: str,
    ) -> None:
        """On a GPU that is none: its memory is the CPU's."""
        self.put(monkeypatch, backend)
        monkeypatch.setattr(checkpoint, "resolve_device", lambda device: CUDA)
        to_empty = nn.Module.to_empty
        on_cpu = lambda module, *, device: to_empty(module, device=CPU)  # noqa: E731
        monkeypatch.setattr(nn.Module, "to_empty", on_cpu)
        folder = write_folder(tmp_path / "m", SMALL, random_weights(SMALL))
        model = load_model(folder, use_tqdm=False)
        attention = model.model.layers[0].self_attn
        assert type(attention.backend).__name__ == chosen
        assert len(caplog.records) == (backend is Faulty)

    def test_a_fault_is_told_before_a_download(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def download(*args: object, **options: object) -> None:
            pytest.fail("asked the hub before looking at the backend")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        self.put(monkeypatch, Faulty)
        with pytest.raises(ValueError, match="triton is unwell"):
            load_model("someone/small", device="cpu", attention_backend="triton")


class TestLoading:
    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"], ids=str)
    @pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["qwen3", "qwen2"])
    def test_dtype(self, tmp_path: Path, dtype: Any, config: Config) -> None:
        folder = write_folder(tmp_path / "m", config, random_weights(config), 2)
        model = load_model(folder, dtype=dtype, device="cpu", use_tqdm=False)
        wanted = getattr(torch, str(dtype).removeprefix("torch."))
        assert_exact(model, folder, wanted)
        logits = logits_of(model, torch.arange(9)[None])
        assert logits.dtype == wanted
        assert logits.isfinite().all()

    @pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["qwen3", "qwen2"])
    def test_bfloat16_errs_no_more_than_hugging_face(
        self, tmp_path: Path, config: Config
    ) -> None:
        folder = write_folder(tmp_path / "m", config, random_weights(config))
        generator = torch.Generator().manual_seed(2)
        input_ids = torch.randint(config["vocab_size"], (4, 64), generator=generator)
        exact = logits_of(load_model(folder, device="cpu", use_tqdm=False), input_ids)
        ours = load_model(folder, "bfloat16", "cpu", use_tqdm=False)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.inference_mode():
            their_error = (theirs(input_ids).logits.float() - exact).square().mean()
        our_error = (logits_of(ours, input_ids).float() - exact).square().mean()
        assert 0 < our_error.sqrt() <= 1.2 * their_error.sqrt()

    @pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64])
    def test_files_in_other_dtypes(self, tmp_path: Path, stored: torch.dtype) -> None:
        weights = {name: w.to(stored) for name, w in random_weights(SMALL).items()}
        folder = write_folder(tmp_path / "m", SMALL, weights)
        model = load_model(folder, device="cpu", use_tqdm=False)
        assert_exact(model, folder, torch.float32)

    @pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["qwen3", "qwen2"])
    def test_untied_head(self, tmp_path: Path, config: Config) -> None:
        config = config | {"tie_word_embeddings": False}
        folder = write_folder(tmp_path / "m", config, random_weights(config), 2)
        model = load_model(folder, device="cpu", use_tqdm=False)
        assert_exact(model, folder, torch.float32)
        assert model.lm_head is not None
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        input_ids = torch.arange(11)[None]
        logits, tokens = hugging_face(folder, input_ids, 8)
        assert_close(logits_of(model, input_ids), logits)
        assert greedy(model, input_ids, 8) == tokens

    @pytest.mark.parametrize("with_head", [True, False])
    def test_tied_head_in_the_file_or_not(
        self, tmp_path: Path, with_head: bool
    ) -> None:
        weights = random_weights(SMALL)
        if not with_head:
            del weights["lm_head.weight"]
        folder = write_folder(tmp_path / "m", SMALL, weights)
        model = load_model(folder, device="cpu", use_tqdm=False)
        assert model.lm_head is None
        assert_exact(model, folder, torch.float32)

    @pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["qwen3", "qwen2"])
    @pytest.mark.parametrize("order", ["one file", "head first", "embedding first"])
    @pytest.mark.parametrize("head", ["flipped", "equal", "alone"])
    def test_a_tied_config_with_a_head_in_the_file(
        self,
        tmp_path: Path,
        config: Config,
        order: str,
        head: str,
        recwarn: pytest.WarningsRecorder,
    ) -> None:
        """As transformers 5: a stored head that differs is used, with one warning."""
        weights = random_weights(config)
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = (
            embedding.flip(0) if head == "flipped" else embedding
        )
        if head == "alone":
            del weights["model.embed_tokens.weight"]
        weights = {name: weight.clone() for name, weight in weights.items()}
        folder = write_folder(tmp_path / "m", config, weights)
        if order != "one file":  # the file named 1 is read first
            first = "lm_head" if order == "head first" else "model.embed_tokens"
            (folder / "model.safetensors").unlink()
            some = {n: w for n, w in weights.items() if n.startswith(first)}
            rest = {n: w for n, w in weights.items() if n not in some}
            weight_map = dict.fromkeys(some, "1.safetensors")
            weight_map |= dict.fromkeys(rest, "2.safetensors")
            save_file(some, folder / "1.safetensors", {"format": "pt"})
            save_file(rest, folder / "2.safetensors", {"format": "pt"})
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        model = load_model(folder, device="cpu", use_tqdm=False)
        told = [str(w.message) for w in recwarn if "lm_head.weight" in str(w.message)]
        assert len(told) == (head == "flipped")
        assert (model.lm_head is not None) == (head == "flipped")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        input_ids = torch.arange(40)[None]
        with torch.inference_mode():
            assert_close(logits_of(model, input_ids), theirs(input_ids).logits)
        assert not any(p.requires_grad for p in model.parameters())

    def test_a_head_of_its_own_has_the_dtype_of_the_model(self, small: Path) -> None:
        weights = random_weights(SMALL)
        weights["lm_head.weight"] = weights["lm_head.weight"].flip(0).contiguous()
        save_file(weights, small / "model.safetensors")
        with pytest.warns(UserWarning, match="differs"):
            model = load_model(small, "bfloat16", "cpu", use_tqdm=False)
        assert model.lm_head is not None
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])

    @pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["qwen3", "qwen2"])
    def test_a_saved_base_model(self, tmp_path: Path, config: Config) -> None:
        """Names without `model.`, and the frequencies that old checkpoints carry."""
        weights = {
            name.removeprefix("model."): weight
            for name, weight in random_weights(config).items()
            if name != "lm_head.weight"
        }
        folder = write_folder(tmp_path / "m", config, weights, 2)
        input_ids = torch.arange(40)[None]
        theirs, _ = hugging_face(folder, input_ids, 1)
        model = load_model(folder, device="cpu", use_tqdm=False)
        assert_close(logits_of(model, input_ids), theirs)
        for name in ("rotary_emb.inv_freq", "layers.1.self_attn.rotary_emb.inv_freq"):
            weights[name] = torch.ones(8)
        again = write_folder(tmp_path / "n", config, weights)
        model = load_model(again, device="cpu", use_tqdm=False)
        assert_close(logits_of(model, input_ids), theirs)

    @pytest.mark.parametrize(
        "name",
        ["adapter_model.safetensors", "consolidated.safetensors", "a.safetensors"],
    )
    def test_other_safetensors_beside_the_model(self, small: Path, name: str) -> None:
        save_file({"x": torch.ones(2)}, small / name)
        assert find_weight_files(small) == [small / "model.safetensors"]
        load_model(small, device="cpu", use_tqdm=False)

    @pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
    def test_dtype_by_torchs_own_name(self, small: Path, field: str, name: str) -> None:
        config = {k: v for k, v in SMALL.items() if k != "torch_dtype"}
        config[field] = f"torch.{name}"
        (small / "config.json").write_text(json.dumps(config))
        stored = read_config(small).dtype
        assert resolve_dtype("auto", torch.device("cuda"), stored) == getattr(
            torch, name
        )
        load_model(small, device="cpu", use_tqdm=False)

    @pytest.mark.parametrize("config", [None, {"torch_dtype": "torch.bfloat16"}])
    def test_a_tokenizer_needs_little_of_the_config(
        self, tmp_path: Path, config: Config | None
    ) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled_model_path() / name, tmp_path)
        if config:
            (tmp_path / "config.json").write_text(json.dumps(SMALL | config))
        expected = load_tokenizer(bundled_model_path()).encode("Once upon a time")
        assert load_tokenizer(tmp_path).encode("Once upon a time") == expected

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_weights_that_are_not_finite(
        self, small: Path, value: float, recwarn: pytest.WarningsRecorder
    ) -> None:
        load_model(small, device="cpu", use_tqdm=False)
        assert not recwarn
        weights = random_weights(SMALL)
        bad = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
        for name in bad:
            weights[name].view(-1)[7] = value
        save_file(weights, small / "model.safetensors")
        load_model(small, device="cpu", use_tqdm=False)
        (warned,) = recwarn
        for part in (str(small), *bad, "2 tensors", "NaN", "float32"):
            assert part in str(warned.message)
        assert "k_proj" not in str(warned.message)

    def test_weights_too_large_for_float16(self, small: Path) -> None:
        weights = random_weights(SMALL)
        weights["model.layers.0.mlp.down_proj.weight"][3, 4] = 1e30
        save_file(weights, small / "model.safetensors")
        with pytest.warns(
            UserWarning, match=r"(?s)layers\.0\.mlp\.down_proj.*bfloat16"
        ):
            load_model(small, "float16", "cpu", use_tqdm=False)

    def test_huge_but_finite_weights_are_no_reason_to_warn(
        self, small: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        weights = {name: w.float() for name, w in random_weights(SMALL).items()}
        weights["model.layers.0.mlp.down_proj.weight"].fill_(3e38)  # the sum overflows
        save_file(weights, small / "model.safetensors")
        load_model(small, device="cpu", use_tqdm=False)
        assert not recwarn

    @pytest.mark.parametrize("factor", [4.0, 4])
    def test_qwens_recipe_for_yarn(self, tmp_path: Path, factor: float) -> None:
        """`max_position_embeddings` stays; 4 times 64 positions equal Hugging Face."""
        scaling = {"rope_type": "yarn", "factor": factor}
        scaling["original_max_position_embeddings"] = 64
        config = SMALL | {"max_position_embeddings": 80, "rope_scaling": scaling}
        folder = write_folder(tmp_path / "m", config, random_weights(config))
        input_ids = torch.arange(256)[None] % 320
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = load_model(folder, device="cpu", use_tqdm=False)
        for length in (80, 81, 256):
            ids = input_ids[:, :length]
            with torch.inference_mode():
                assert_close(logits_of(model, ids), theirs(ids).logits)

    @pytest.mark.parametrize(
        "rope_scaling",
        [
            {"type": "linear", "factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ],
        ids=str,
    )
    def test_rope_scaling_in_the_old_style(
        self, tmp_path: Path, rope_scaling: Config
    ) -> None:
        config = SMALL | {"rope_scaling": rope_scaling}
        folder = write_folder(tmp_path / "m", config, random_weights(config))
        input_ids = torch.arange(100)[None]
        logits, _ = hugging_face(folder, input_ids, 1)
        model = load_model(folder, device="cpu", use_tqdm=False)
        assert_close(logits_of(model, input_ids), logits)

    @pytest.mark.parametrize("backend", ["torch_naive", "torch_sdpa"])
    def test_backends(self, small: Path, backend: str) -> None:
        input_ids = torch.arange(40)[None]
        model = load_model(str(small), "float32", "cpu", backend, use_tqdm=False)
        layer = model.model.layers[0]
        assert layer.self_attn.backend.get_name() == backend  # type: ignore[union-attr]
        assert_close(logits_of(model, input_ids), hugging_face(small, input_ids, 1)[0])

    def test_is_ready_for_inference(self, small: Path) -> None:
        model = load_model(small, device="cpu", use_tqdm=False)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
        assert model.model.rotary_emb.cos[0].eq(1).all()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_the_rope_table_is_rounded_once(self, small: Path, dtype: str) -> None:
        """Angles in float32, then the model's dtype, as Hugging Face does it."""
        exact = load_model(small, "float32", "cpu", use_tqdm=False).model.rotary_emb
        half = load_model(small, dtype, "cpu", use_tqdm=False).model.rotary_emb
        assert torch.equal(half.cos, exact.cos.to(getattr(torch, dtype)))
        assert torch.equal(half.sin, exact.sin.to(getattr(torch, dtype)))

    def test_auto_dtype_is_the_checkpoints_on_a_gpu(self) -> None:
        cuda, cpu = torch.device("cuda"), torch.device("cpu")
        assert resolve_dtype("auto", cuda, "bfloat16") == torch.bfloat16
        assert resolve_dtype("auto", cuda, torch.float16) == torch.float16
        assert resolve_dtype("auto", cuda, None) == torch.bfloat16
        assert resolve_dtype("auto", cpu, "bfloat16") == torch.float32
        assert resolve_dtype("float16", cpu, "bfloat16") == torch.float16

    def test_auto_device(self) -> None:
        there = "cuda" if torch.cuda.is_available() else "cpu"
        assert resolve_device("auto") == torch.device(there)
        assert resolve_device() == torch.device(there)
        assert resolve_device("cpu") == resolve_device(torch.device("cpu"))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu(self, sharded: Path) -> None:
        model = load_model(sharded, use_tqdm=False)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        assert_exact(model.cpu(), sharded, torch.bfloat16)

    def test_few_tensors_are_alive_at_once(
        self, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Streams: never more than the tensor that is copied and the next one."""
        alive: set[int] = set()
        counts: list[int] = []
        serial = itertools.count()

        class Counting:
            def __init__(self, *args: Any, **options: Any) -> None:
                self.opened = safetensors.safe_open(*args, **options)
                self.file = self.opened.__enter__()

            def __enter__(self) -> Counting:
                return self

            def __exit__(self, *error: Any) -> None:
                self.opened.__exit__(*error)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def get_tensor(self, name: str) -> Tensor:
                tensor = self.file.get_tensor(name)
                number = next(serial)
                alive.add(number)
                weakref.finalize(tensor, alive.discard, number)
                counts.append(len(alive))
                return tensor

        monkeypatch.setattr(checkpoint, "safe_open", Counting)
        load_model(sharded, device="cpu", use_tqdm=False)
        assert len(counts) >= len(tensor_shapes(SMALL)) - 1
        assert max(counts) <= 2
        assert not alive

    def test_each_tensor_is_read_once(self, sharded: Path) -> None:
        names = [name for name, _ in read_weights(find_weight_files(sharded))]
        assert sorted(names) == list(tensor_shapes(SMALL))
        headers = dict(read_weights(find_weight_files(sharded), headers_only=True))
        assert {n: tuple(t.shape) for n, t in headers.items()} == tensor_shapes(SMALL)
        assert all(t.is_meta for t in headers.values())

    def test_progress_bar(
        self, small: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        load_model(small, device="cpu")
        shown = capsys.readouterr()
        assert not shown.out
        count = len(tensor_shapes(SMALL))
        assert "Loading weights" in shown.err
        assert f"{count}/{count}" in shown.err

    def test_silent_without_progress_bar(
        self, small: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        load_model(small, device="cpu", use_tqdm=False)
        shown = capsys.readouterr()
        assert not shown.out
        assert not shown.err

    def test_tokenizer(self) -> None:
        tokenizer = load_tokenizer(bundled_model_path())
        assert tokenizer.decode(tokenizer.encode("Once upon a time")) == (
            "Once upon a time"
        )
        assert tokenizer.chat_template

    def test_leaves_the_default_device_and_dtype_alone(self, small: Path) -> None:
        load_model(small, "bfloat16", "cpu", use_tqdm=False)
        assert torch.get_default_dtype() == torch.float32
        assert torch.empty(1).device.type == "cpu"


@pytest.mark.usefixtures("no_work")
class TestBadInput:
    """Each error comes before a number is read or memory for weights is set aside."""

    @pytest.fixture
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class HeadersOnly:
            def __init__(self, *args: Any, **options: Any) -> None:
                self.opened = safetensors.safe_open(*args, **options)

            def __enter__(self) -> HeadersOnly:
                self.file = self.opened.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self.opened.__exit__(*error)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def get_tensor(self, name: str) -> Tensor:
                pytest.fail(f"read {name} before the error")

        def to_empty(self: nn.Module, **options: Any) -> nn.Module:
            pytest.fail("took memory for the weights before the error")

        monkeypatch.setattr(checkpoint, "safe_open", HeadersOnly)
        monkeypatch.setattr(nn.Module, "to_empty", to_empty)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def fails(
        self, folder: Path, kind: type[Exception], *parts: str, **options: Any
    ) -> str:
        """Loading raises exactly this kind, and the message holds all parts."""
        with pytest.raises(kind) as raised:
            load_model(folder, **({"use_tqdm": False, "device": "cpu"} | options))
        assert type(raised.value) is kind
        message = str(raised.value)
        for part in parts:
            assert part in message
        return message

    def test_the_fixture_notices_work(self, small: Path) -> None:
        with pytest.raises(pytest.fail.Exception, match="memory"):
            load_model(small, device="cpu")
        with pytest.raises(pytest.fail.Exception, match="read lm_head"):
            list(read_weights(find_weight_files(small)))

    def test_no_config(self, small: Path) -> None:
        (small / "config.json").unlink()
        self.fails(small, FileNotFoundError, str(small), "config.json")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        self.fails(tmp_path, FileNotFoundError, str(tmp_path), "config.json")

    def test_no_weights(self, small: Path) -> None:
        (small / "model.safetensors").unlink()
        self.fails(small, FileNotFoundError, str(small), "no weights", "safetensors")

    def test_no_tokenizer(self, small: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json") as raised:
            load_tokenizer(small)
        assert type(raised.value) is FileNotFoundError
        assert str(small) in str(raised.value)
        assert "copy it" in str(raised.value)

    @pytest.mark.parametrize(
        "text", ["", "{", '{"vocab_size": 7', "[]", "[1]", "3", '"q"', "null", "\x00"]
    )
    def test_config_is_no_json_object(self, small: Path, text: str) -> None:
        (small / "config.json").write_text(text)
        self.fails(small, ValueError, str(small / "config.json"), "JSON object")

    def test_config_is_not_utf8(self, small: Path) -> None:
        (small / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
        self.fails(small, ValueError, str(small / "config.json"))

    @pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "foo", None, 3])
    def test_model_type(self, tmp_path: Path, model_type: object) -> None:
        folder = write_folder(
            tmp_path / "m", SMALL | {"model_type": model_type}, random_weights(SMALL)
        )
        where = str(folder / "config.json")
        self.fails(folder, ValueError, where, repr(model_type), "'qwen2'", "'qwen3'")

    def test_no_model_type(self, small: Path) -> None:
        config = {k: v for k, v in SMALL.items() if k != "model_type"}
        (small / "config.json").write_text(json.dumps(config))
        self.fails(small, ValueError, "model_type", "'qwen3'")

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e6,
                    "factor": 2.0,
                }
            },
            {"rope_scaling": {"rope_type": "foo", "factor": 2.0}},
        ],
        ids=[
            "dynamic",
            "dynamic by its old name",
            "llama3",
            "dynamic, new style",
            "foo",
        ],
    )
    def test_rope_type(self, small: Path, rope: Config) -> None:
        config = {k: v for k, v in SMALL.items() if k not in rope}
        (small / "config.json").write_text(json.dumps(config | rope))
        scaling = next(iter(rope.values()))
        name = scaling.get("rope_type", scaling.get("type"))
        self.fails(small, ValueError, f"{name!r}", "rope", "'default'", "'yarn'")

    @pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
    @pytest.mark.parametrize("rope_type", ["linear", "yarn"])
    def test_rope_without_its_factor(
        self, small: Path, field: str, rope_type: str
    ) -> None:
        config = {k: v for k, v in SMALL.items() if k != "rope_scaling"}
        for rope in ({"rope_type": rope_type}, {"type": rope_type}):
            (small / "config.json").write_text(json.dumps(config | {field: rope}))
            message = f'{field}["factor"] is missing: {rope_type!r} needs it'
            self.fails(small, ValueError, str(small / "config.json"), message)

    @pytest.mark.parametrize("with_config", [False, True])
    def test_a_lora_adapter(self, small: Path, with_config: bool) -> None:
        (small / "adapter_config.json").write_text("{}")
        (small / "model.safetensors").rename(small / "adapter_model.safetensors")
        if not with_config:
            (small / "config.json").unlink()
        self.fails(small, ValueError, str(small), "LoRA", "merge_and_unload")

    @pytest.mark.parametrize("with_config", [False, True])
    def test_a_gguf_folder(self, small: Path, with_config: bool) -> None:
        (small / "model.safetensors").rename(small / "qwen3-q4.gguf")
        if not with_config:
            (small / "config.json").unlink()
        self.fails(small, ValueError, str(small), "GGUF", "qwen3-q4.gguf", "llama.cpp")

    @pytest.mark.parametrize(
        ("name", "cure"),
        [
            ("model.safetensors", "pass its folder"),
            ("config.json", "pass its folder"),
            ("qwen3.gguf", "llama.cpp"),
        ],
    )
    def test_a_path_to_a_file(self, small: Path, name: str, cure: str) -> None:
        (small / name).touch()
        for load in (load_model, load_tokenizer):
            with pytest.raises(NotADirectoryError) as raised:
                load(small / name)
            assert str(small / name) in str(raised.value)
            assert cure in str(raised.value)

    @pytest.mark.parametrize("model", [None, 3, b"folder", [], {}, 1.5])
    def test_what_is_no_path(self, model: Any) -> None:
        for load in (load_model, load_tokenizer):
            with pytest.raises(TypeError, match="pass the path of a folder"):
                load(model)

    @pytest.mark.parametrize("model", ["~no-such-user/x", "a\0b", "x" * 5000])
    def test_odd_paths(self, model: str) -> None:
        for load in (load_model, load_tokenizer):
            with pytest.raises(OSError):
                load(model)

    @pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["qwen3", "qwen2"])
    def test_sliding_window(self, tmp_path: Path, config: Config) -> None:
        config = config | {
            "sliding_window": 128,
            "use_sliding_window": True,
            "max_window_layers": 1,
        }
        folder = write_folder(tmp_path / "m", config, random_weights(config))
        self.fails(folder, ValueError, "sliding", "use_sliding_window=false")

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
            ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "divisor"]),
            (
                {"quantization_config": {"quant_method": "awq", "bits": 4}},
                ["quantization_config", "awq", "without quantisation"],
            ),
            ({"head_dim": 15}, ["head_dim", "15", "even"]),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_other_fields(self, small: Path, change: Config, parts: list[str]) -> None:
        (small / "config.json").write_text(json.dumps(SMALL | change))
        self.fails(small, ValueError, *parts)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("hidden_size", "many"), ("num_hidden_layers", None), ("vocab_size", 1.5)],
    )
    def test_a_field_of_the_wrong_type(
        self, small: Path, field: str, value: object
    ) -> None:
        (small / "config.json").write_text(json.dumps(SMALL | {field: value}))
        self.fails(small, ValueError, field)

    @pytest.mark.parametrize("share", [0.0001, 0.3, 0.99])
    @pytest.mark.parametrize("kind", ["one file", "a shard"])
    def test_truncated(
        self, small: Path, sharded: Path, share: float, kind: str
    ) -> None:
        folder = small if kind == "one file" else sharded
        path = sorted(folder.glob("*.safetensors"))[-1]
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        self.fails(folder, ValueError, str(path), "cut short", "fetch it again")

    def test_one_byte_short(self, small: Path) -> None:
        path = small / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.fails(small, ValueError, str(path), "fetch it again")

    @pytest.mark.parametrize(
        "garbage",
        [
            b"",
            b"\x00" * 8,
            b"<html><title>404 Not Found</title></html>" * 9,
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
            (50).to_bytes(8, "little") + b"{" * 50,
            (1 << 62).to_bytes(8, "little") + b"{}",
            b"PK\x03\x04" + b"\x00" * 400,
        ],
        ids=["empty", "zeros", "html", "git-lfs", "not JSON", "huge header", "zip"],
    )
    def test_header(self, small: Path, garbage: bytes) -> None:
        path = small / "model.safetensors"
        path.write_bytes(garbage)
        self.fails(small, ValueError, str(path), "damaged", "fetch it again")

    def test_wrong_offsets(self, small: Path) -> None:
        path = small / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].replace(b"[48]", b"[47]", 1)
        path.write_bytes(data[:8] + header + data[8 + size :])
        self.fails(small, ValueError, str(path), "damaged")

    @pytest.mark.parametrize("num_shards", [1, 3])
    def test_every_wrong_tensor_is_named(self, tmp_path: Path, num_shards: int) -> None:
        weights = random_weights(SMALL)
        gone = ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
        for name in gone:
            del weights[name]
        extra = ["model.layers.2.mlp.up_proj.weight", "visual.patch_embed.weight"]
        for name in extra:
            weights[name] = torch.ones(2, 2)
        weights["model.layers.0.mlp.down_proj.weight"] = torch.ones(80, 48)
        weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(1)
        folder = write_folder(tmp_path / "m", SMALL, weights, num_shards)
        message = self.fails(
            folder,
            ValueError,
            *(f"missing: {name}" for name in gone),
            *(f"unexpected: {name}" for name in extra),
            "mis-shaped: model.layers.0.mlp.down_proj.weight",
            "[80, 48]",
            "[48, 80]",
            "mis-shaped: model.layers.0.self_attn.q_norm.weight",
            "[16]",
        )
        assert message.count("missing:") == 2
        assert message.count("unexpected:") == 2
        assert message.count("mis-shaped:") == 2
        assert "lm_head" not in message

    @pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["qwen3", "qwen2"])
    def test_every_single_tensor_is_wanted(
        self, tmp_path: Path, config: Config
    ) -> None:
        weights = random_weights(config)
        folder = write_folder(tmp_path / "m", config, weights)
        tied_pair = {"lm_head.weight", "model.embed_tokens.weight"}  # one is enough
        for gone in weights:
            if tied_pair <= weights.keys() and gone in tied_pair:
                continue
            some = {name: w for name, w in weights.items() if name != gone}
            save_file(some, folder / "model.safetensors")
            message = self.fails(folder, ValueError, f"missing: {gone}")
            assert message.count("\n") == 1

    def test_a_missing_untied_head(self, small: Path) -> None:
        config = SMALL | {"tie_word_embeddings": False}
        (small / "config.json").write_text(json.dumps(config))
        weights = random_weights(SMALL)
        del weights["lm_head.weight"]
        save_file(weights, small / "model.safetensors")
        self.fails(small, ValueError, "missing: lm_head.weight")

    def test_a_config_of_another_size(self, small: Path) -> None:
        config = SMALL | {"hidden_size": 64, "num_hidden_layers": 3}
        (small / "config.json").write_text(json.dumps(config))
        message = self.fails(
            small,
            ValueError,
            str(small),
            "(11 missing, 21 mis-shaped)",
            "missing: model.layers.2.input_layernorm.weight",
            "missing: and 9 more",
            "is [320, 48], the config says [320, 64]",
            "mis-shaped: and 19 more",
        )
        assert message.count("\n") == 6

    def test_the_weights_of_the_other_family(self, small: Path) -> None:
        save_file(
            random_weights(SMALL | {"model_type": "qwen2"}), small / "model.safetensors"
        )
        self.fails(small, ValueError, "missing: model.layers.0.self_attn.q_norm.weight")

    def test_a_missing_shard(self, sharded: Path) -> None:
        for number in (1, 3):
            (sharded / f"model-0000{number}-of-00003.safetensors").unlink()
        self.fails(
            sharded,
            FileNotFoundError,
            str(sharded),
            "model-00001-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
            "not complete",
        )

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "{}",
            "null",
            '{"weight_map": null}',
            '{"weight_map": []}',
            '{"weight_map": {"a": 3}}',
            '{"weight_map": {"a": ["b"]}}',
            '{"weight_map": {"a": null}}',
            '{"weight_map": {}}',
        ],
    )
    def test_a_damaged_index(self, sharded: Path, text: str) -> None:
        path = sharded / "model.safetensors.index.json"
        path.write_text(text)
        self.fails(sharded, ValueError, str(path), "damaged", "fetch it again")

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "w.pkl"]
    )
    def test_pickled_weights_only(self, small: Path, name: str) -> None:
        (small / "model.safetensors").rename(small / name)
        self.fails(small, ValueError, str(small), "pickle", "save_pretrained")

    def test_pickles_beside_safetensors_are_passed_over(self, small: Path) -> None:
        (small / "pytorch_model.bin").write_bytes(b"never opened")
        assert find_weight_files(small) == [small / "model.safetensors"]

    @pytest.mark.parametrize(
        ("dtype", "name"),
        [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")],
    )
    def test_quantised_weights(
        self, tmp_path: Path, dtype: torch.dtype, name: str
    ) -> None:
        weights = random_weights(SMALL)
        one = "model.layers.1.mlp.up_proj.weight"
        weights[one] = weights[one].to(dtype)
        folder = write_folder(tmp_path / "m", SMALL, weights)
        file = str(folder / "model.safetensors")
        self.fails(folder, ValueError, one, file, name, "BF16", "not quantised")

    @pytest.mark.parametrize(
        "dtype", ["float23", "int8", torch.int8, torch.float64, "", None]
    )
    def test_dtype(self, small: Path, dtype: Any) -> None:
        self.fails(
            small, ValueError, repr(dtype), "'auto'", "float32", "bfloat16", dtype=dtype
        )

    @pytest.mark.parametrize("device", ["banana", "", "cuda:x", "cpu cpu", "gpu"])
    def test_unknown_device(self, small: Path, device: str) -> None:
        self.fails(small, ValueError, repr(device), "'auto'", "'cpu'", device=device)

    @pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
    def test_no_gpu(
        self, small: Path, monkeypatch: pytest.MonkeyPatch, device: Any
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        self.fails(small, ValueError, repr(device), "'auto'", "'cpu'", device=device)

    def test_a_gpu_too_many(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        self.fails(small, ValueError, "'cuda:7'", "'auto'", "'cpu'", device="cuda:7")

    def test_no_mps(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        self.fails(small, ValueError, "'mps'", "'auto'", "'cpu'", device="mps")

    @pytest.mark.parametrize("device", ["meta", "xpu", "vulkan"])
    def test_devices_of_torch_that_are_not_ours(self, small: Path, device: str) -> None:
        self.fails(small, ValueError, repr(device), "'auto'", "'cpu'", device=device)

    @pytest.mark.parametrize("backend", ["flash", "", "TORCH_SDPA"])
    def test_backend(self, small: Path, backend: str) -> None:
        self.fails(
            small,
            ValueError,
            repr(backend),
            "'torch_naive'",
            "'torch_sdpa'",
            attention_backend=backend,
        )
