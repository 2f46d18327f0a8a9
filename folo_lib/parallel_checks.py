"""What a rank must be and have before it reads a weight, and how the end of one is told."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from folo_lib import __version__
from folo_lib.checkpoint import (
    find_checkpoint,
    find_weight_files,
    read_config,
    read_weights,
)
from folo_lib.checkpoint_checks import naming
from folo_lib.kv_cache import resolve_max_model_len
from folo_lib.qwen3 import Qwen3ForCausalLM
from folo_lib.runner import InFlightStep, StepOutput

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen3Config

    from folo_lib.config import EngineConfig
    from folo_lib.model_source import Source

    ModelConfig = Qwen2Config | Qwen3Config
else:
    ModelConfig = Any  # transformers takes long to import

__all__ = [
    "ModelConfig",
    "RankError",
    "RankFailure",
    "WatchedStep",
    "catch_warnings",
    "check_checkpoint",
    "check_heads",
    "check_identity",
    "check_source",
    "describe_exit",
    "explain_failures",
    "identify",
    "leave_to_parent",
    "list_sizes",
    "make_store",
    "remove_store",
    "repeat_warnings",
]


def list_sizes(config: ModelConfig) -> list[int]:
    """The numbers of ranks that a model can be cut into.

    Query heads and the columns of the MLP are divided evenly. Key/value heads are too, or,
    where there are fewer of them than ranks, each of them is held by equally many ranks.
    """
    num_heads, inner = config.num_attention_heads, config.intermediate_size
    num_kv_heads = config.num_key_value_heads or num_heads
    return [
        size
        for size in range(1, num_heads + 1)
        if num_heads % size == 0
        and inner % size == 0
        and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    ]


def check_heads(config: ModelConfig, size: int) -> None:
    """Whether a model can be cut into that many parts.

    Raises:
        ValueError: naming the sizes that it can be cut into.
    """
    sizes = list_sizes(config)
    if size not in sizes:
        heads = config.num_attention_heads
        raise ValueError(
            f"tensor_parallel_size={size} does not divide this model, which has {heads} query "
            f"heads, {config.num_key_value_heads or heads} key/value heads and "
            f"intermediate_size={config.intermediate_size}: take one of "
            f"{', '.join(map(str, sizes))}."
        )


def check_source(model: Source) -> str | os.PathLike[str]:
    """The folder or hub id; a model that is loaded is all on one device.

    Raises:
        ValueError: if the model is loaded.
    """
    if isinstance(model, Qwen3ForCausalLM):
        raise ValueError(
            "tensor_parallel_size above 1 needs the folder or hub id of a checkpoint: each "
            "rank reads its own part of it, and a model that is loaded is on one device."
        )
    return model


def check_checkpoint(model: Source, config: EngineConfig) -> Path:
    """Everything that can be wrong before a weight is read; returns the folder.

    Raises:
        FileNotFoundError, ValueError: as `load_model` does, and if the model cannot be
            cut into that many parts.
    """
    folder = find_checkpoint(check_source(model))
    checkpoint, files = read_config(folder), find_weight_files(folder)
    check_heads(checkpoint, config.tensor_parallel_size)
    limits = torch.float32, sys.maxsize, config.max_model_len
    resolve_max_model_len(checkpoint, *limits)
    with naming(folder / "config.json"), torch.device("meta"):
        whole = Qwen3ForCausalLM(checkpoint)
    with naming(folder):  # on meta: only names and shapes are compared
        whole.load_weights(read_weights(files, headers_only=True))
    return folder


def identify(folder: Path) -> dict[str, str]:
    """What must be the same on all ranks, told without reading a weight.

    Args:
        folder: of a checkpoint.

    Returns:
        Versions, and a digest of the config, and of the names, sizes, dates and headers of
        the weight files.
    """
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} ".encode())
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")  # of a safetensors header
            digest.update(file.read(min(size, 2**27)))
    return {
        "folo_lib": __version__,
        "torch": torch.__version__,
        "weights": digest.hexdigest()[:12],
    }


def check_identity(folder: Path, wanted: dict[str, str]) -> None:
    """Whether this process is like rank 0.

    Args:
        folder: of a checkpoint.
        wanted: what `identify` gave on rank 0.

    Raises:
        ValueError: naming what differs.
    """
    own = identify(folder)
    differs = [name for name in wanted if own[name] != wanted[name]]
    if differs:
        raise ValueError(
            "; ".join(
                f"its {name} is {own[name]}, and {wanted[name]} on rank 0"
                for name in differs
            )
            + ": all ranks need the same versions and the same files."
        )


class RankError(RuntimeError):
    """A rank has failed, and the engine with it."""


@dataclass(frozen=True)
class RankFailure:
    """How a rank ended, as plain data.

    Attributes:
        message: of the error.
        details: its traceback.
        is_refusal: whether it saw before it began that it does not fit the others.
        is_consequence: whether it ended because another one had.
    """

    message: str
    details: str = ""
    is_refusal: bool = False
    is_consequence: bool = False

    @classmethod
    def from_error(
        cls, error: BaseException, is_refusal: bool, is_consequence: bool
    ) -> RankFailure:
        """Of an error that is being handled."""
        message = f"{type(error).__name__}: {error}"
        return cls(message, traceback.format_exc(), is_refusal, is_consequence)


def explain_failures(failures: Mapping[int, RankFailure], size: int) -> Exception:
    """The error that says which rank was the first to fail, and how.

    Args:
        failures: by rank.
        size: how many ranks there are.
    """
    causes = [i for i in sorted(failures) if not failures[i].is_consequence]
    rank = next(iter([*causes, *sorted(failures)]), None)
    if rank is None:
        return RankError("a rank has lost the others, and none of them says why.")
    failure = failures[rank]
    text = f"rank {rank} of {size} failed: {failure.message}"
    error = ValueError(text) if failure.is_refusal else RankError(text)
    if failure.details:
        error.add_note(f"On rank {rank}: {failure.details}")
    return error


def describe_exit(code: int | None) -> str:
    """How a process ended that said nothing, by its exit code."""
    if code is None:
        return "it closed its pipe and did not end."
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as a system does that runs out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}."
    return (
        f"its process ended with exit code {code} and said nothing. In a script, what makes "
        'the engine belongs under `if __name__ == "__main__":`, since each rank imports the '
        "script."
    )


def make_store() -> str:
    """The path of a file that is not there yet, in a folder of its own."""
    return os.path.join(tempfile.mkdtemp(prefix="folo-ranks-"), "store")


def remove_store(store: str) -> None:
    """Removes the folder of `make_store`; again does nothing."""
    shutil.rmtree(os.path.dirname(store), ignore_errors=True)


def leave_to_parent(store: str) -> None:
    """Leaves Ctrl-C to the process that started this one, and ends as soon as that is gone.

    It ends whatever it does, in the middle of a sum too.

    Args:
        store: of `make_store`, removed then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(store,), daemon=True).start()


def _end_with_parent(store: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        remove_store(store)
        os._exit(1)


@contextmanager
def catch_warnings() -> Iterator[list[str]]:
    """Keeps what a block warns of to itself.

    Yields:
        A list, which holds the texts of `UserWarning`s after the block.
    """
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(one.message) for one in caught if one.category is UserWarning]


def repeat_warnings(texts: Iterable[list[str]]) -> None:
    """Warns of what ranks were warned of, each thing once."""
    for text in dict.fromkeys(text for some in texts for text in some):
        warnings.warn(text, stacklevel=4)


@dataclass(frozen=True)
class WatchedStep(InFlightStep):
    """A step on several GPUs. Results never come if a rank is gone; `check` raises then."""

    check: Callable[[], None] = print

    @classmethod
    def of(cls, step: InFlightStep, check: Callable[[], None]) -> WatchedStep:
        """The same step, watched."""
        parts = {one.name: getattr(step, one.name) for one in fields(step)}
        return cls(**parts, check=check)

    def read(self) -> StepOutput:
        """See `InFlightStep.read`."""
        arrival: Any = self.arrival
        while arrival is not None and not arrival.query():
            self.check()
        return super().read()
