"""The command line of `python -m folo_lib.benchmark`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from folo_lib import bundled_model_path
from folo_lib.benchmark import (
    MAX_SPREAD,
    MIN_RUNS,
    BenchmarkError,
    Result,
    check_bounds,
)
from folo_lib.benchmark_batch import PARTS
from folo_lib.benchmark_bench import QUICK, Bench, Sizes
from folo_lib.benchmark_records import describe_setup, open_record, save_record
from folo_lib.benchmark_sections import SECTIONS, parse_alone
from folo_lib.benchmark_systems import QWEN3_0_6B, write_random_checkpoint
from folo_lib.benchmark_waterfall import RUNGS
from folo_lib.checkpoint import (
    find_checkpoint,
    read_config,
    resolve_device,
    resolve_dtype,
)
from folo_lib.vllm_names import name_model


def make_parser(prog: str = "python -m folo_lib.benchmark") -> argparse.ArgumentParser:
    """The arguments of `python -m folo_lib.benchmark`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure folo_lib beside Hugging Face's generate().",
        epilog="Weights are random ones of Qwen3-0.6B's shape unless --model is given; "
        "--quick on a CPU takes the bundled checkpoint.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer, shorter runs: a minute a section")
    add("--out", type=Path, metavar="FILE.json", help="record here, and go on from it")
    add(
        "--sections",
        nargs="+",
        choices=list(SECTIONS),
        metavar="NAME",
        help=f"run these ({', '.join(SECTIONS)}), even if FILE has them; "
        "default: those that FILE has not",
    )
    add(
        "--rungs",
        nargs="+",
        choices=list(RUNGS),
        default=[],
        metavar="RUNG",
        help=f"only these of `waterfall` ({', '.join(RUNGS)}); a file may hold parts",
    )
    add(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=[],
        metavar="PART",
        help=f"only these of `batch` ({', '.join(PARTS)})",
    )
    add("--model", help="a folder or hub id instead of random weights")
    add("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU if any")
    add("--dtype", default="auto", help="float32, bfloat16, float16; default: auto")
    add("--runs", type=int, default=MIN_RUNS, help=f"at least {MIN_RUNS}, the default")
    limit = f"(p90 - p10) / median at most; default and upper limit {MAX_SPREAD}"
    add("--max-spread", type=float, default=MAX_SPREAD, help=limit)
    add("--alone", nargs=6, help=argparse.SUPPRESS)
    return parser


def describe_command(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command with those arguments, and no folder in it."""
    shown = dict(vars(args))
    shown["out"] = args.out and args.out.name
    shown["model"] = args.model and name_model(args.model)
    words = ["python", "-m", "folo_lib.benchmark"]
    for name, value in shown.items():
        if value != parser.get_default(name):
            words.append("--" + name.replace("_", "-"))
            values = value if isinstance(value, list) else [value]
            words += [str(value) for value in values if value is not True]
    return shlex.join(words)


def choose_weights(
    args: argparse.Namespace, device: torch.device, scratch: Path
) -> tuple[Path, str]:
    """A checkpoint's folder, and what its weights are, in words."""
    if args.model is not None:
        return find_checkpoint(args.model), name_model(args.model)
    if args.quick and device.type == "cpu":
        return bundled_model_path(), "the bundled checkpoint"
    print("writing random weights", flush=True)
    write_random_checkpoint(scratch, QWEN3_0_6B, device)
    return scratch, "random weights of Qwen3-0.6B's shape"


def run_section(bench: Bench, name: str, command: str) -> Result:
    """One recording of a section."""
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    result = SECTIONS[name](bench)
    seconds = round(time.perf_counter() - start, 1)
    bench.free_memory()
    print(f"== {name}: {seconds} s\n", flush=True)
    return {"date": date, "command": command, "seconds": seconds, **result}


def run_all(
    bench: Bench,
    sections: Sequence[str] | None,
    weights: str,
    path: Path | None,
    command: str,
) -> Result:
    """Runs sections and records them, each as soon as it is done.

    Args:
        sections: names; None: those that the file has not.
        weights: what the model's weights are, in words.
        path: of the JSON; None: nothing is written.
        command: that asks for this.

    Raises:
        BenchmarkError: at the end, if a section was refused or has failed.
    """
    setup = describe_setup(bench, weights)
    record = open_record(path, setup)
    refused = []
    for name in SECTIONS if sections is None else sections:
        if sections is None and name in record["sections"]:
            print(f"== {name}: in the file already\n", flush=True)
            continue
        try:
            result = run_section(bench, name, command)
        except RuntimeError as error:
            if not isinstance(error, BenchmarkError):
                traceback.print_exc()
            refused.append(name)
            print(f"== {name}: refused: {error}\n", flush=True)
            bench.free_memory()
            continue
        if path is not None:
            record = open_record(path, setup)  # with what another command has added
        record["sections"].setdefault(name, []).append(result)
        save_record(record, path)
    if refused:
        raise BenchmarkError(f"refused: {', '.join(refused)}; the reasons are above.")
    return record


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m folo_lib.benchmark"
) -> None:
    """`python -m folo_lib.benchmark`, and `folo bench`; see `--help`."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if args.alone:
        print(json.dumps(parse_alone(args.alone)))
        return
    command = describe_command(parser, args)
    try:
        check_bounds(args.runs, args.max_spread)
        device = resolve_device(args.device)
        with tempfile.TemporaryDirectory() as scratch:
            folder, weights = choose_weights(args, device, Path(scratch))
            config = read_config(folder)
            dtype = resolve_dtype(args.dtype, device, config.dtype)
            sizes = (QUICK if args.quick else Sizes()).cut(
                config.max_position_embeddings
            )
            options = args.runs, args.max_spread, args.rungs, args.parts
            bench = Bench(folder, device, dtype, sizes, *options)
            run_all(bench, args.sections, weights, args.out, command)
    except (ValueError, OSError, BenchmarkError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
