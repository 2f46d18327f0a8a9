"""The options of an engine, written once and checked before anything is loaded."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch

from folo_lib.checkpoint import (
    resolve_attention_backend,
    resolve_device,
    resolve_dtype,
)
from folo_lib.kv_cache import DEFAULT_BLOCK_SIZE
from folo_lib.platform import check_devices
from folo_lib.vllm_names import ABSENT_OPTIONS, keep_known

if TYPE_CHECKING:
    from folo_lib.engine import Scheduler
    from folo_lib.model_source import Source
    from folo_lib.runner import GPUExecutor, ModelRunner

__all__ = ["EXECUTORS", "MODEL_RUNNERS", "SCHEDULERS", "EngineConfig"]

MODEL_RUNNERS = {
    "eager": "folo_lib.runner:ModelRunner",
    "compile": "folo_lib.cuda_graph:CompiledRunner",
    "graph_plain": "folo_lib.cuda_graph:PlainGraphRunner",
    "graph": "folo_lib.cuda_graph:GraphRunner",
    "fused": "folo_lib.fused_decode:FusedRunner",
}
SHARD_RUNNERS = {"fused": "folo_lib.fused_shards:ShardedRunner"}
"""Those that run a model on several devices in another way."""
SCHEDULERS = {
    "continuous": "folo_lib.scheduler:ContinuousScheduler",
    "fcfs": "folo_lib.engine:FCFSScheduler",
}
EXECUTORS = {
    "one": "folo_lib.runner:GPUExecutor",
    "several": "folo_lib.tensor_parallel:ParallelExecutor",
}
"""Where the executor for one device is found, and the one for several."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs; the names are vLLM's where vLLM has the option.

    Attributes:
        dtype, device: see `load_model`. A model that is loaded has them, and its attention
            backend, so then all three are left out.
        attention_backend: a name in `folo_lib.qwen3.ATTENTION_BACKENDS`; `"auto"`: `"triton"`
            on a GPU that can run it, `"torch_ragged"` on a CPU in float32, else `"torch_sdpa"`.
        max_model_len: most tokens of a prompt and its output together; None: as many as the
            model was made for and the memory holds.
        block_size: tokens in a block of the KV cache.
        kv_cache_memory_bytes: set aside for the cache; None: see `get_kv_cache_memory`.
        gpu_memory_utilization: share of the whole memory of the GPU that the engine may use,
            weights included, above 0 and at most 1; None: what is free after loading. Where
            there is no GPU, or `kv_cache_memory_bytes` is given, it changes nothing.
        decode: how steps run, a name in `MODEL_RUNNERS`: `"eager"`, kernel by kernel;
            `"compile"`, layers compiled; `"graph_plain"`, a step replayed as one CUDA graph;
            `"graph"`, both; `"fused"`, the same with fused kernels where the model allows it.
            `"auto"`: `"fused"` on a GPU, else `"eager"`. Where one of them cannot be had, a
            warning says once what is done instead.
        enforce_eager: the same as `decode="eager"`.
        scheduler: a name in `SCHEDULERS`, or what makes a scheduler of an `EngineConfig` and
            the number of blocks in the cache.
        max_num_seqs: most requests that run at a time; each has a row in the runner.
        max_num_batched_tokens: most tokens of a step, of all its requests together. A longer
            prompt is read in chunks, so that others are not kept waiting for it. A request that
            runs has a token in every step, so no more than this many run at a time either.
        enable_prefix_caching: whether requests that begin alike share the blocks of their
            beginnings. These two and `max_num_seqs` are for `scheduler="continuous"`.
        async_scheduling: whether a step is launched before the tokens of the last one are read,
            so that the device does not wait for the host; None: on a CUDA device.
        tensor_parallel_size: how many devices share each matrix of the model, one process for
            each (page 16); on a CPU, how many processes. `kv_cache_memory_bytes` is then what
            each of them sets aside.
        seed: of the seeds for requests that have none; 0 to 2**64 - 1.
        use_tqdm: show progress bars while loading.

    Raises:
        ValueError: if a value is unknown, out of its range, or not to be had on this machine.
        TypeError: if it is of the wrong type.

    Example:
        >>> from folo_lib import EngineConfig
        >>> EngineConfig(max_num_seqs=8).max_num_batched_tokens
        2048
        >>> EngineConfig(max_num_seqs=0)
        Traceback (most recent call last):
        ValueError: max_num_seqs=0 must be at least 1, the requests that run at a time.
    """

    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"
    attention_backend: str = "auto"
    max_model_len: int | None = None
    block_size: int = DEFAULT_BLOCK_SIZE
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    decode: str = "auto"
    enforce_eager: bool = False
    scheduler: str | Callable[[EngineConfig, int], Scheduler] = "continuous"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = None
    tensor_parallel_size: int = 1
    seed: int = 0
    use_tqdm: bool = True

    def __post_init__(self) -> None:
        for name, kinds in (
            ("device", (str, torch.device)),
            ("attention_backend", str),
            ("decode", str),
            ("enforce_eager", bool),
            ("enable_prefix_caching", bool),
            ("use_tqdm", bool),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds):
                wanted = "True or False" if kinds is bool else "a name"
                raise TypeError(f"{name}={value!r} must be {wanted}.")
        if not isinstance(self.async_scheduling, bool | None):
            raise TypeError(
                f"async_scheduling={self.async_scheduling!r} must be True or False; None "
                "leaves it to the engine."
            )
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device, None)
        # "auto" never fails, and warns where it is used.
        if self.attention_backend != "auto":
            resolve_attention_backend(self.attention_backend, device, dtype)
        if self.enforce_eager and self.decode not in ("auto", "eager"):
            raise ValueError(
                f"enforce_eager=True means decode='eager', and decode={self.decode!r}: "
                "leave one of them out."
            )
        self.get_model_runner(device)
        self._check_int("block_size", 1)
        self._check_int("max_num_seqs", 1, hint=", the requests that run at a time")
        self._check_int("max_num_batched_tokens", 1, hint=", the tokens of a step")
        self._check_int("seed", 0, 2**64 - 1)
        self._check_int("tensor_parallel_size", 1, hint=", the devices of the model")
        if self.tensor_parallel_size > 1:
            check_devices(device, self.tensor_parallel_size)
        for name in ("max_model_len", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                self._check_int(name, 1, hint="; None leaves it to the engine")
        self._check_share("gpu_memory_utilization")
        if isinstance(self.scheduler, str):
            _find("scheduler", self.scheduler, SCHEDULERS)
        elif not callable(self.scheduler):
            raise TypeError(
                f"scheduler={self.scheduler!r} must be a name or a class: one of "
                f"{', '.join(map(repr, SCHEDULERS))}, or what makes a scheduler of an "
                "EngineConfig and a number of blocks."
            )

    def _check_int(
        self, name: str, low: int, high: int | None = None, hint: str = ""
    ) -> None:
        value = getattr(self, name)
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} must be an int {limits}{hint}.")
        number = int(value)
        if number < low or (high is not None and number > high):
            raise ValueError(f"{name}={value} must be {limits}{hint}.")
        object.__setattr__(self, name, number)  # the way of a frozen dataclass

    def _check_share(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        limits = "above 0 and at most 1; None leaves it to the engine"
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} must be a number {limits}.")
        number = float(value)
        if not 0 < number <= 1:  # NaN neither
            raise ValueError(f"{name}={value} must be {limits}.")
        object.__setattr__(self, name, number)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """The config of an engine's keyword arguments.

        Raises:
            TypeError: naming an option that does not exist, and the nearest that does, or
                what is here in place of an option of vLLM.
        """
        names = [field.name for field in fields(cls)]
        what = "the engine has no option"
        return cls(**keep_known(what, options, names, ABSENT_OPTIONS))

    def get_model_runner(self, device: torch.device) -> type[ModelRunner]:
        """The class that `decode` names; `"auto"` is `"fused"` on a GPU, else `"eager"`.

        Args:
            device: where the model is, or will be.

        Raises:
            ValueError: if no runner has that name.
        """
        name = "eager" if self.enforce_eager else self.decode
        if name == "auto":
            name = "fused" if device.type == "cuda" else "eager"
        if name == "fused" and find_spec("triton") is None:
            name = "graph"  # which says what is missing
        paths = MODEL_RUNNERS | (SHARD_RUNNERS if self.tensor_parallel_size > 1 else {})
        runner: type[ModelRunner] = _find("decode", name, paths, "auto")
        return runner

    def get_num_ahead(self, device: torch.device) -> int:
        """How many steps may be unread when the next one is scheduled: none, or one.

        Args:
            device: of the model. On a CPU a step is computed when it is launched, so there is
                nothing to gain.
        """
        run_ahead = self.async_scheduling
        return int(device.type == "cuda" if run_ahead is None else run_ahead)

    def make_executor(self, model: Source) -> GPUExecutor:
        """Loads a model on as many devices as `tensor_parallel_size` says.

        Args:
            model: see `LLMEngine`.
        """
        path = EXECUTORS["one" if self.tensor_parallel_size == 1 else "several"]
        executor: GPUExecutor = pkgutil.resolve_name(path)(model, self)
        return executor

    def make_scheduler(self, num_blocks: int) -> Scheduler:
        """A scheduler for a cache of that many blocks."""
        make = self.scheduler
        if isinstance(make, str):
            make = _find("scheduler", make, SCHEDULERS)
        scheduler: Scheduler = make(self, num_blocks)
        return scheduler


def _find(option: str, name: str, table: Mapping[str, str], *others: str) -> Any:
    """What a table names as `"module:object"`, imported now that it is used."""
    if name not in table:
        choices = ", ".join(map(repr, (*others, *table)))
        raise ValueError(f"unknown {option} {name!r}: choose one of {choices}.")
    return pkgutil.resolve_name(table[name])
