"""Batch inference over many machines with Ray Data: a file of prompts in, a folder of answers out.

    python examples/batch_ray.py prompts.jsonl answers --concurrency 2
    python examples/batch_ray.py prompts.parquet answers --num-gpus 1 --model Qwen/Qwen3-0.6B
    python examples/batch_ray.py prompts.jsonl answers --num-gpus 2 --model Qwen/Qwen3-8B

With several GPUs an engine splits the model over them, all of one machine: it gets
`tensor_parallel_size`, unless `--engine` says otherwise.

Each row of the input has a `prompt`, and may have a `seed` and columns of your own, an `id` say,
which come back as they are. The answers gain `text`, `num_tokens`, `finish_reason` and `error`, in
place of columns of these names. They are in any order, JSON Lines or Parquet like the input, in as
many files as there were batches.

A row that cannot be answered says why in `error`, and the others go on. An engine answers a batch
of rows together; its options, `max_num_seqs` say, go into `--engine`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data.datasource import BlockBasedFileDatasink, FileBasedDatasource

from folo_lib import LLMEngine, RequestOutput, SamplingParams

ANSWER = {
    "text": pa.string(),
    "num_tokens": pa.int64(),
    "finish_reason": pa.string(),
    "error": pa.string(),
}
Row = dict[str, Any]


def seed_of(row: Row) -> int:
    """The row's own seed, or one made from its prompt: the same on every machine."""
    seed = row.get("seed")
    if seed is not None:  # pandas makes floats of integers beside a gap
        return int(seed) if isinstance(seed, float) and seed.is_integer() else seed
    digest = hashlib.sha256(
        repr(row.get("prompt")).encode(errors="surrogatepass")
    ).digest()
    return int.from_bytes(digest[:7], "big")


def describe(output: RequestOutput) -> Row:
    """What is written about a request that ran."""
    sample = output.outputs[0]
    return {
        "text": sample.text,
        "num_tokens": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "error": output.error,
    }


def describe_error(error: Exception) -> Row:
    """What is written about a row that cannot be answered."""
    reason = f"{type(error).__name__}: {error}"
    return dict.fromkeys(ANSWER) | {"finish_reason": "error", "error": reason}


class Generate:
    """An actor: one engine, loaded once; the rows of a batch share its steps.

    Args:
        engine: arguments of `LLMEngine`.
        params: arguments of `SamplingParams`, for all rows.
        chat: each prompt is what a user says, and goes through the chat template.
    """

    def __init__(self, engine: Row, params: Row, chat: bool = False) -> None:
        self.engine = LLMEngine(use_tqdm=False, **engine)
        self.params, self.chat = params, chat

    def judge(self, row: Row | Exception) -> tuple[list[int], SamplingParams]:
        """What to ask for a row; a ValueError or TypeError if it cannot be answered."""
        if isinstance(row, Exception):
            raise row
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise TypeError(f"prompt is {prompt!r}, and text is expected.")
        if self.chat:
            message = {"role": "user", "content": prompt}
            prompt = self.engine.tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=False
            )
        params = SamplingParams(**{**self.params, "seed": seed_of(row)})
        request = self.engine.processor.process_request(prompt, params)[0]
        return request.prompt_token_ids, params

    def answer(self, rows: list[Row | Exception]) -> list[Row]:
        """An answer for each row, from one call of the engine for all that have one.

        An exception in place of a row is told in its answer.
        """
        answers: list[Row] = [{} for _ in rows]
        prompts, params, asked = [], [], []
        for row, answer in zip(rows, answers, strict=True):
            try:
                prompt, own = self.judge(row)
            except (TypeError, ValueError) as error:
                answer.update(describe_error(error))
            else:
                prompts.append(prompt)
                params.append(own)
                asked.append(answer)
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        for answer, output in zip(asked, outputs, strict=True):
            answer.update(describe(output))
        return answers

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Adds the columns of `ANSWER` to a batch, and leaves the others alone."""
        asked = [name for name in ("prompt", "seed") if name in batch.column_names]
        answers = self.answer(batch.select(asked).to_pylist() or [{}] * len(batch))
        batch = batch.drop_columns([n for n in ANSWER if n in batch.column_names])
        for name, kind in ANSWER.items():
            column = pa.array([answer[name] for answer in answers], kind)
            batch = batch.append_column(name, column)
        return batch


class GenerateLines(Generate):
    """`Generate` for batches of one column `line`, each a JSON object as bytes.

    Nothing guesses the types of a line's columns: its text is kept, and the answer written
    behind it. Arrow's own reader takes "2024-01-31" for a date and 2**63 for a float.
    """

    def __call__(self, batch: pa.Table) -> pa.Table:
        lines: list[bytes] = batch["line"].to_pylist()
        rows = [parse_line(line) for line in lines]
        answers = self.answer(rows)
        answered = map(extend_line, lines, rows, answers)
        return pa.table({"line": pa.array(answered, pa.binary())})


def parse_line(line: bytes) -> Row | Exception:
    """The JSON object of a line, or why there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return ValueError(f"the line is no JSON ({error}).")
    if not isinstance(row, dict):
        return TypeError('the line is no JSON object, such as {"prompt": "One day"}.')
    return row


def extend_line(line: bytes, row: Row | Exception, answer: Row) -> bytes:
    """The line with an answer behind its columns; one that is no JSON object as a column `line`."""
    kept = line.decode("utf-8-sig", errors="replace").strip()
    if isinstance(row, Exception):
        kept = json.dumps({"line": kept}, ensure_ascii=False)
    elif row.keys() & ANSWER:
        kept = json.dumps(
            {k: row[k] for k in row if k not in ANSWER}, ensure_ascii=False
        )
    added = json.dumps(answer, ensure_ascii=False)
    columns = [kept[1:-1].rstrip(), added[1:-1]]
    return f"{{{', '.join(filter(None, columns))}}}".encode(errors="surrogatepass")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Answer a file of prompts with Ray Data."
    )
    parser.add_argument("source", help="a .jsonl or .parquet file, or a folder of them")
    parser.add_argument(
        "target", help="a folder for the answers; it must not exist yet"
    )
    parser.add_argument(
        "--model", help="a folder or hub id that every machine can reach"
    )
    parser.add_argument(
        "--params", type=json.loads, default={}, help="SamplingParams as JSON"
    )
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="LLMEngine as JSON"
    )
    parser.add_argument("--chat", action="store_true", help="use the chat template")
    parser.add_argument(
        "--batch-size", type=int, default=256, help="rows that an engine gets together"
    )
    parser.add_argument("--concurrency", type=int, default=1, help="how many engines")
    parser.add_argument("--num-gpus", type=float, default=0, help="of each engine")
    parser.add_argument("--num-cpus", type=float, default=1, help="of each engine")
    parser.add_argument(
        "--address", help="of a Ray cluster, 'auto' for the one around you"
    )
    return parser


class LineReader(FileBasedDatasource):
    """The lines of files, as bytes: `read_text` would cut them at U+2028 too."""

    def _read_stream(self, f: pa.NativeFile, path: str) -> Iterator[pa.Table]:
        lines = filter(None, map(bytes.strip, io.BufferedReader(f)))
        while some := list(islice(lines, 1000)):
            yield pa.table({"line": pa.array(some, pa.binary())})


class LineWriter(BlockBasedFileDatasink):
    """Writes a column `line` as the lines of a file."""

    def write_block_to_file(self, block: Any, file: pa.NativeFile) -> None:
        for line in block.to_arrow()["line"].to_pylist():
            file.write(line + b"\n")


def is_parquet(source: str) -> bool:
    """Whether the input is Parquet, a file or a folder of files, and not JSON Lines."""
    path = Path(source)
    names = [path.name] if path.is_file() else [file.name for file in path.glob("*.*")]
    if not names:
        raise FileNotFoundError(f"{source!r} is neither a file nor a folder of files.")
    return all(name.endswith(".parquet") for name in names)


def make_engine_options(options: argparse.Namespace) -> Row:
    """Arguments of `LLMEngine`; Ray shows an engine no other GPUs than its own."""
    engine: Row = dict(options.engine)
    if options.model:
        engine["model"] = options.model
    if options.num_gpus > 1:
        if not options.num_gpus.is_integer():
            raise SystemExit(
                f"--num-gpus {options.num_gpus:g}: above one, GPUs come as a whole."
            )
        engine.setdefault("tensor_parallel_size", int(options.num_gpus))
    return engine


def check_cpus(options: argparse.Namespace) -> None:
    """Exits if the engines would hold every CPU: reading and writing would wait for ever."""
    held, there = (
        options.concurrency * options.num_cpus,
        ray.cluster_resources().get("CPU", 0),
    )
    if there - held < 1:
        raise SystemExit(
            f"{options.concurrency} engines of {options.num_cpus:g} CPUs hold {held:g} of the "
            f"cluster's {there:g}, and one must be left to read and write: lower --concurrency "
            "or --num-cpus."
        )


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    if Path(options.target).exists():
        raise SystemExit(f"{options.target} exists: name a new folder.")
    if SamplingParams(**options.params).n > 1:  # other mistakes are told here too, once
        raise SystemExit(
            "n is more than 1: a row holds one answer. Repeat the prompt instead."
        )
    engine = make_engine_options(options)
    if not ray.is_initialized():
        ray.init(address=options.address)
    check_cpus(options)
    parquet = is_parquet(options.source)
    if parquet:
        rows = ray.data.read_parquet(options.source)
    else:
        extensions = ["jsonl", "json"]
        reader = LineReader(options.source, file_extensions=extensions)
        rows = ray.data.read_datasource(reader)
    # One file is one block, and one block goes to one engine: cut it up first.
    rows = rows.repartition(target_num_rows_per_block=options.batch_size)
    answers = rows.map_batches(
        Generate if parquet else GenerateLines,
        fn_constructor_kwargs={
            "engine": engine,
            "params": options.params,
            "chat": options.chat,
        },
        batch_size=options.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=options.concurrency),
        num_gpus=options.num_gpus,
        num_cpus=options.num_cpus,
    )
    if parquet:
        answers.write_parquet(options.target)
    else:
        answers.write_datasink(LineWriter(options.target, file_format="jsonl"))


if __name__ == "__main__":
    main()
