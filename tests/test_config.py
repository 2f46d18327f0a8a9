"""config.py: every option is checked before any work, and says what is wrong with it."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from folo_lib import LLMEngine
from folo_lib.config import MODEL_RUNNERS, SCHEDULERS, EngineConfig
from folo_lib.cuda_graph import CompiledRunner, GraphRunner, PlainGraphRunner
from folo_lib.engine import FCFSScheduler
from folo_lib.kv_cache import TorchSDPABackend
from folo_lib.qwen3 import ATTENTION_BACKENDS
from folo_lib.runner import ModelRunner
from folo_lib.sampling_params import SamplingParams
from folo_lib.scheduler import ContinuousScheduler
from folo_lib.vllm_names import ABSENT_OPTIONS, ABSENT_PARAMS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class OwnScheduler(FCFSScheduler):
    pass


class TestValues:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": "int8"}, "unknown dtype 'int8'"),
            ({"device": "tpu"}, "tpu"),
            ({"attention_backend": "flash"}, "unknown attention backend 'flash'"),
            ({"decode": "fast"}, r"unknown decode 'fast': .* 'auto', 'eager'"),
            ({"scheduler": "lifo"}, "'lifo': choose one of 'continuous', 'fcfs'"),
            ({"max_model_len": 0}, "max_model_len=0 must be at least 1; None"),
            ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes=0 must be at least"),
            *[
                (
                    {"gpu_memory_utilization": share},
                    f"gpu_memory_utilization={share} must be above 0 and at most 1",
                )
                for share in (0, 0.0, -0.5, 1.01, 90, float("nan"))
            ],
            ({"block_size": 0}, "block_size=0 must be at least 1"),
            (
                {"max_num_seqs": 0},
                "max_num_seqs=0 must be at least 1, the requests that run at a time",
            ),
            (
                {"max_num_batched_tokens": -3},
                "max_num_batched_tokens=-3 must be at least 1, the tokens of a step",
            ),
            ({"seed": -5}, "seed=-5 must be from 0 to 18446744073709551615"),
            ({"seed": 2**64}, "must be from 0 to"),
            ({"decode": "eager", "enforce_eager": True}, None),
            (
                {"decode": "fast", "enforce_eager": True},
                "enforce_eager=True means decode='eager', and decode='fast'",
            ),
        ],
    )
    def test_ranges(self, options: dict[str, Any], message: str | None) -> None:
        if message is None:
            EngineConfig(**options)
            return
        with pytest.raises(ValueError, match=message):
            EngineConfig(**options)
        with pytest.raises(ValueError, match=message):  # nothing is looked for first
            LLMEngine("nobody/nothing", **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"max_model_len": "100"},
            {"max_model_len": 100.0},
            {"max_model_len": True},
            {"block_size": None},
            {"kv_cache_memory_bytes": 1e9},
            {"gpu_memory_utilization": "0.9"},
            {"gpu_memory_utilization": True},
            {"max_num_seqs": None},
            {"max_num_seqs": 8.0},
            {"max_num_batched_tokens": "2048"},
            {"max_num_batched_tokens": True},
            {"enable_prefix_caching": 1},
            {"enable_prefix_caching": None},
            {"async_scheduling": 1},
            {"async_scheduling": "auto"},
            {"seed": None},
            {"seed": 1.5},
            {"enforce_eager": 1},
            {"use_tqdm": None},
            {"decode": None},
            {"decode": ["eager"]},
            {"device": 0},
            {"attention_backend": ["torch_sdpa"]},
            {"scheduler": 3},
        ],
    )
    def test_types(self, options: dict[str, Any]) -> None:
        [(name, value)] = options.items()
        with pytest.raises(TypeError) as caught:
            EngineConfig(**options)
        assert f"{name}={value!r} must be" in str(caught.value)

    def test_numbers_of_numpy(self) -> None:
        numpy = pytest.importorskip("numpy")
        config = EngineConfig(
            max_model_len=numpy.int64(7),
            max_num_seqs=numpy.int32(3),
            seed=numpy.uint64(2**64 - 1),
        )
        assert (config.max_model_len, config.seed) == (7, 2**64 - 1)
        assert type(config.max_num_seqs) is int
        assert type(config.max_model_len) is int

    def test_the_host_runs_ahead_of_a_gpu_unless_told_otherwise(self) -> None:
        for told, ahead in ((None, (0, 1)), (False, (0, 0)), (True, (1, 1))):
            config = EngineConfig(device="cpu", async_scheduling=told)
            assert (config.get_num_ahead(CPU), config.get_num_ahead(CUDA)) == ahead

    def test_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            EngineConfig().seed = 3  # type: ignore[misc]


class TestOptions:
    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("max_model_length", "max_model_len"),
            ("max_len", "max_model_len"),
            ("backend", "attention_backend"),
            ("kv_cache_memory", "kv_cache_memory_bytes"),
            ("eager", "enforce_eager"),
            ("random_seed", "seed"),
            ("max_seqs", "max_num_seqs"),
            ("max_batched_tokens", "max_num_batched_tokens"),
            ("prefix_caching", "enable_prefix_caching"),
        ],
    )
    def test_one_that_does_not_exist(self, wrong: str, right: str) -> None:
        message = f"no option {wrong!r}: did you mean {right!r}"
        with pytest.raises(TypeError, match=message):
            LLMEngine(**{wrong: 1})

    def test_nothing_like_it(self) -> None:
        with pytest.raises(TypeError, match="no option 'xyz': there are dtype, device"):
            EngineConfig.from_options({"xyz": 1})


class TestOptionsOfVllm:
    """What `vllm.LLM` takes and this engine has not."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("quantization", "awq"),
            ("pipeline_parallel_size", 2),
            ("speculative_config", {"method": "ngram"}),
            ("enable_lora", True),
            ("guided_decoding", {"regex": "a"}),
            ("guided_decoding_backend", "xgrammar"),
            ("trust_remote_code", True),
            ("kv_cache_dtype", "fp8"),
            ("max_loras", 1),
        ],
    )
    def test_is_an_error_that_says_where_to_read_on(
        self, name: str, value: Any
    ) -> None:
        with pytest.raises(TypeError) as caught:
            LLMEngine("nobody/nothing", **{name: value})  # nothing is looked for
        said = str(caught.value)
        assert said.startswith(f"the engine has no option {name!r}: ")
        assert said.endswith("/docs/outgrow.md")
        assert len(said) < 260

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("quantization", None),
            ("pipeline_parallel_size", 1),
            ("enable_lora", False),
            ("trust_remote_code", False),
            ("enable_chunked_prefill", True),
            ("disable_log_stats", True),
        ],
    )
    def test_one_that_asks_for_nothing_is_let_through(
        self, name: str, value: Any
    ) -> None:
        assert EngineConfig.from_options({name: value, "seed": 3}).seed == 3

    def test_none_of_them_is_here(self) -> None:
        ours = {field.name for field in dataclasses.fields(EngineConfig)}
        assert not ours & {*ABSENT_OPTIONS}
        params = {field.name for field in dataclasses.fields(SamplingParams)}
        assert not params & {*ABSENT_PARAMS}

    def test_a_value_that_compares_oddly(self) -> None:
        with pytest.raises(TypeError, match="'quantization'"):
            EngineConfig.from_options({"quantization": torch.tensor([1, 2])})


class Faulty(TorchSDPABackend):
    @staticmethod
    def find_fault(device: torch.device, dtype: torch.dtype) -> str:
        return f"unwell with {dtype} on {device}"


class TestAttentionBackend:
    def test_a_fault_is_told_with_the_options(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(ATTENTION_BACKENDS, "triton", f"{__name__}:Faulty")
        monkeypatch.setattr("folo_lib.config.resolve_device", lambda device: CUDA)
        with pytest.raises(ValueError, match=r"unwell with torch.float16 on cuda:0"):
            EngineConfig(attention_backend="triton", dtype="float16")
        EngineConfig(attention_backend="torch_naive")
        EngineConfig()
        assert not caplog.records  # the model is told, which may run elsewhere


class TestLookUp:
    def test_runners(self) -> None:
        fused_runner: type[ModelRunner] = GraphRunner  # where there is no Triton
        if find_spec("triton"):
            from folo_lib.fused_decode import FusedRunner

            fused_runner = FusedRunner
        by_name = {
            "eager": ModelRunner,
            "compile": CompiledRunner,
            "graph_plain": PlainGraphRunner,
            "graph": GraphRunner,
            "fused": fused_runner,
        }
        assert list(MODEL_RUNNERS) == list(by_name)
        for name, runner in by_name.items():
            for device in (CPU, CUDA):
                assert EngineConfig(decode=name).get_model_runner(device) is runner
        for options in ({}, {"decode": "auto"}):
            assert EngineConfig(**options).get_model_runner(CUDA) is fused_runner
            for device in (CPU, torch.device("mps")):
                assert EngineConfig(**options).get_model_runner(device) is ModelRunner
        assert EngineConfig(enforce_eager=True).get_model_runner(CUDA) is ModelRunner

    def test_fused_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("folo_lib.config.find_spec", lambda name: None)
        for options in ({"decode": "fused"}, {}):
            assert EngineConfig(**options).get_model_runner(CUDA) is GraphRunner

    def test_every_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("folo_lib.config.resolve_device", lambda device: CUDA)
        for name in MODEL_RUNNERS:
            runner = EngineConfig(decode=name).get_model_runner(CUDA)
            assert issubclass(runner, ModelRunner)
        for name in SCHEDULERS:
            assert EngineConfig(scheduler=name).make_scheduler(3) is not None

    def test_schedulers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = EngineConfig(scheduler="fcfs", block_size=4).make_scheduler(9)
        assert type(made) is FCFSScheduler
        assert (made.allocator.num_blocks, made.allocator.block_size) == (9, 4)
        own = EngineConfig(scheduler=OwnScheduler)
        assert type(own.make_scheduler(1)) is OwnScheduler
        monkeypatch.setitem(SCHEDULERS, "own", f"{__name__}:OwnScheduler")
        assert type(EngineConfig(scheduler="own").make_scheduler(1)) is OwnScheduler

    def test_the_default_runs_many_requests(self) -> None:
        config = EngineConfig()
        assert (config.max_num_seqs, config.max_num_batched_tokens) == (256, 2048)
        assert config.enable_prefix_caching
        made = EngineConfig(block_size=4).make_scheduler(9)
        assert type(made) is ContinuousScheduler
        assert made.get_stats().num_blocks == 9

    def test_what_makes_a_scheduler_gets_the_config_and_the_blocks(self) -> None:
        got: list[tuple[EngineConfig, int]] = []

        def make(config: EngineConfig, num_blocks: int) -> FCFSScheduler:
            got.append((config, num_blocks))
            return FCFSScheduler(config, num_blocks)

        config = EngineConfig(scheduler=make, block_size=8)
        config.make_scheduler(5)
        assert got == [(config, 5)]
