"""The benchmark's file: where results come from, and which may stand in one file."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from folo_lib.benchmark import Result
from folo_lib.benchmark_bench import Bench
from folo_lib.benchmark_systems import QWEN3_0_6B


def get_driver() -> str | None:
    """The version of the GPU's driver; None without `nvidia-smi`."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return None
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.stdout else None


def get_processor() -> str:
    """The name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def describe_setup(bench: Bench, weights: str) -> Result:
    """Everything that must be equal for two results to stand in one file."""
    import transformers

    on_gpu = bench.device.type == "cuda"
    name = torch.cuda.get_device_name(bench.device) if on_gpu else get_processor()
    config = bench.config
    shape = {key: getattr(config, key, None) for key in QWEN3_0_6B}
    return {
        "device": name,
        "driver": get_driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "folo_lib": importlib.import_module("folo_lib").__version__,
        "weights": weights,
        "shape": shape | {"dtype": str(bench.dtype).removeprefix("torch.")},
        "sizes": asdict(bench.sizes),
    }


def open_record(path: Path | None, setup: Result) -> Result:
    """The results in a file, to go on with; new ones if there is no such file.

    Raises:
        ValueError: if they were made elsewhere, or it is another kind of file.
    """
    setup = json.loads(json.dumps(setup))  # as it will be read again
    if path is None or not path.is_file():
        return {"setup": setup, "sections": {}}
    try:
        record: Result = json.loads(path.read_text(encoding="utf-8"))
        recorded, _ = dict(record["setup"]), dict(record["sections"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path.name} holds no results of this benchmark: name another file with "
            "--out."
        ) from None
    differs = [key for key in setup if recorded.get(key) != setup[key]]
    if differs:
        raise ValueError(
            f"{path.name} was recorded with another {', '.join(differs)}: results of "
            "two setups do not belong in one file, so name another with --out."
        )
    return record


def save_record(record: Result, path: Path | None) -> None:
    """Writes the results so far, or leaves the old file as it was."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".tmp")
        half.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        half.replace(path)
