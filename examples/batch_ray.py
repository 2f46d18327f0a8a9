"""Batch inference over many machines with Ray Data: a file of prompts in, a folder of answers out.

    python examples/batch_ray.py prompts.jsonl answers --concurrency 2
    python examples/batch_ray.py prompts.parquet answers --num-gpus 1 --model Qwen/Qwen3-0.6B

Each line of the input has a `prompt`, and may have a `seed` and columns of your own, an `id` say,
which are kept. The answers gain `text`, `num_tokens`, `finish_reason` and `error`. They are in
any order, JSON Lines or Parquet like the input, in as many files as there were batches.

A row that cannot be answered says why in `error`, and the others go on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from folo_lib import LLMEngine, RequestOutput, SamplingParams
from folo_lib.engine import apply_chat_template

ANSWER = {
    "text": pa.string(),
    "num_tokens": pa.int64(),
    "finish_reason": pa.string(),
    "error": pa.string(),
}
Row = dict[str, Any]


def seed_of(row: Row) -> int:
    """The row's own seed, or one made from its prompt: the same on every machine."""
    if row.get("seed") is not None:
        return int(row["seed"])
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


class Generate:
    """An actor: one engine, loaded once, that answers one batch after the other.

    Args:
        engine: arguments of `LLMEngine`.
        params: arguments of `SamplingParams`, for all rows.
        chat: each prompt is what a user says, and goes through the chat template.
    """

    def __init__(self, engine: Row, params: Row, chat: bool = False) -> None:
        self.engine = LLMEngine(use_tqdm=False, **engine)
        self.params, self.chat = params, chat

    def submit(self, row: Row) -> str:
        """Queues a row; a ValueError or TypeError if it cannot be answered."""
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise TypeError(f"prompt is {prompt!r}, and text is expected.")
        if self.chat:
            message = {"role": "user", "content": prompt}
            prompt = apply_chat_template(self.engine.tokenizer, [message], {})
        params = SamplingParams(**{**self.params, "seed": seed_of(row)})
        return self.engine.add_request(prompt, params)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Adds the columns of `ANSWER` to a batch."""
        rows = batch.to_pylist()
        waiting: dict[str, Row] = {}
        for row in rows:
            row.update(dict.fromkeys(ANSWER))
            try:
                waiting[self.submit(row)] = row
            except (TypeError, ValueError) as error:
                row.update(
                    finish_reason="error", error=f"{type(error).__name__}: {error}"
                )
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    waiting[output.request_id].update(describe(output))
        kept = [field for field in batch.schema if field.name not in ANSWER]
        schema = pa.schema(
            [*kept, *(pa.field(name, kind) for name, kind in ANSWER.items())]
        )
        return pa.Table.from_pylist(rows, schema)


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
    parser.add_argument("--batch-size", type=int, default=64, help="rows at a time")
    parser.add_argument("--concurrency", type=int, default=1, help="how many engines")
    parser.add_argument("--num-gpus", type=float, default=0, help="of each engine")
    parser.add_argument("--num-cpus", type=float, default=1, help="of each engine")
    parser.add_argument(
        "--address", help="of a Ray cluster, 'auto' for the one around you"
    )
    return parser


def read(source: str) -> ray.data.Dataset:
    """Rows of a JSON Lines or Parquet file, or of a folder of such files."""
    path = Path(source)
    names = [path.name] if path.is_file() else [file.name for file in path.glob("*.*")]
    if not names:
        raise FileNotFoundError(f"{source!r} is neither a file nor a folder of files.")
    if all(name.endswith(".parquet") for name in names):
        return ray.data.read_parquet(source)
    return ray.data.read_json(source, file_extensions=["jsonl", "json"])


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
    if not ray.is_initialized():
        ray.init(address=options.address)
    check_cpus(options)
    engine = options.engine | ({"model": options.model} if options.model else {})
    # One file is one block, and one block goes to one engine: cut it up first.
    rows = read(options.source).repartition(
        target_num_rows_per_block=options.batch_size
    )
    answers = rows.map_batches(
        Generate,
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
    if options.source.endswith(".parquet"):
        answers.write_parquet(options.target)
    else:
        answers.write_json(options.target, force_ascii=False)


if __name__ == "__main__":
    main()
