"""The batch inference example, on a Ray of two CPUs that this test starts and stops."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is missing: pip install -e '.[batch]'")
pa = pytest.importorskip("pyarrow")

import ray  # noqa: E402
from pyarrow import parquet  # noqa: E402

from folo_lib import LLMEngine, SamplingParams  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PARAMS = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 8}
ENGINE = {"max_model_len": 64, "device": "cpu", "dtype": "float32"}
PROMPTS = ["Once upon a time", "One day", "A small boat", "The old mill", "In a forest"]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def batch_ray() -> Iterator[ModuleType]:
    """The example as a module that Ray's workers can import as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import batch_ray

        yield batch_ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    variables = {
        "PYTHONPATH": str(EXAMPLES),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    ray.init(
        num_cpus=2,
        num_gpus=0,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()
    assert not ray.is_initialized()


def run(batch_ray: ModuleType, source: Path, target: Path, *options: str) -> None:
    sizes = ["--batch-size", "2", "--concurrency", "2", "--num-cpus", "0.5"]
    settings = ["--params", json.dumps(PARAMS), "--engine", json.dumps(ENGINE)]
    batch_ray.main([str(source), str(target), *sizes, *settings, *options])


def read_lines(folder: Path) -> dict[int, Row]:
    """The answers by their id."""
    lines = [
        line
        for file in folder.iterdir()
        for line in file.read_text("utf-8").splitlines()
    ]
    rows = [json.loads(line) for line in lines]
    return {row["id"]: row for row in rows}


def expected(batch_ray: ModuleType, rows: list[Row]) -> dict[int, str]:
    """The same prompts through an engine of our own, all in one call."""
    params = [SamplingParams(**PARAMS, seed=batch_ray.seed_of(row)) for row in rows]
    outputs = LLMEngine(**ENGINE, use_tqdm=False).generate(
        [row["prompt"] for row in rows], params, use_tqdm=False
    )
    pairs = zip(rows, outputs, strict=True)
    return {row["id"]: output.outputs[0].text for row, output in pairs}


def test_answers_are_the_engines_own_and_bad_rows_harm_nobody(
    batch_ray: ModuleType, cluster: None, tmp_path: Path
) -> None:
    good: list[Row] = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    good[1]["seed"] = 11
    bad: list[Row] = [
        {"id": 90, "prompt": ""},
        {"id": 91, "prompt": None},
        {"id": 92, "prompt": "word " * 100},
        {"id": 93},
        {"id": 94, "prompt": "One day", "seed": -(2**63)},
    ]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers"
    rows = [*good[:2], *bad, *good[2:]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    run(batch_ray, source, target)

    answers = read_lines(target)
    assert set(answers) == {row["id"] for row in rows}
    texts = expected(batch_ray, [*good, bad[-1]])
    assert {i: answers[i]["text"] for i in texts} == texts
    assert all(answers[i]["error"] is None for i in texts)
    assert all(answers[i]["num_tokens"] == 8 for i in texts)
    assert len(list(target.iterdir())) > 1, "one file: the rows were not shared out"
    errors = {i: answers[i]["error"] for i in (90, 91, 92, 93)}
    assert errors[90].startswith("ValueError: the prompt is empty")
    assert (
        errors[91] == errors[93] == "TypeError: prompt is None, and text is expected."
    )
    assert errors[92].startswith("ValueError: the prompt has ")
    assert all(answers[i]["finish_reason"] == "error" for i in errors)


def test_parquet_chat_and_columns_of_ones_own(
    batch_ray: ModuleType, cluster: None, tmp_path: Path
) -> None:
    source, target = tmp_path / "questions.parquet", tmp_path / "answers"
    columns = {
        "id": [3, 4],
        "prompt": ["What is the KV cache?", "Hi"],
        "tags": [["a"], []],
    }
    parquet.write_table(pa.table(columns), source)

    run(batch_ray, source, target, "--chat")

    rows = {row["id"]: row for row in parquet.read_table(target).to_pylist()}
    assert [rows[i]["tags"] for i in (3, 4)] == [["a"], []]
    engine = LLMEngine(**ENGINE, use_tqdm=False)
    for i in (3, 4):
        question = {"role": "user", "content": rows[i]["prompt"]}
        params = SamplingParams(**PARAMS, seed=batch_ray.seed_of(rows[i]))
        [output] = engine.chat([question], params, use_tqdm=False)
        assert rows[i]["text"] == output.outputs[0].text


def test_engines_that_would_hold_every_cpu_are_refused(
    batch_ray: ModuleType, cluster: None, tmp_path: Path
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "One day"}\n', "utf-8")
    with pytest.raises(SystemExit, match="one must be left to read and write"):
        run(batch_ray, source, tmp_path / "answers", "--num-cpus", "1")


def test_arguments_are_judged_first(batch_ray: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exists: name a new folder"):
        batch_ray.main(["prompts.jsonl", str(tmp_path)])
    fresh = str(tmp_path / "fresh")
    with pytest.raises(SystemExit, match="n is more than 1"):
        batch_ray.main(["prompts.jsonl", fresh, "--params", '{"n": 2}'])
    with pytest.raises(ValueError, match="top_p"):
        batch_ray.main(["prompts.jsonl", fresh, "--params", '{"top_p": 2}'])


def test_a_request_that_fails_while_it_runs_harms_nobody(
    batch_ray: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = batch_ray.Generate(ENGINE, PARAMS)
    execute, calls = generate.engine.executor.execute_model, 0

    def fails_once(plans: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the device is on fire")
        return execute(plans)

    monkeypatch.setattr(generate.engine.executor, "execute_model", fails_once)
    rows = generate(pa.table({"prompt": PROMPTS[:3]})).to_pylist()
    assert [row["error"] for row in rows] == [
        "RuntimeError: the device is on fire",
        None,
        None,
    ]
    assert [row["num_tokens"] for row in rows] == [2, 8, 8]
    assert [row["finish_reason"] for row in rows] == ["error", "length", "length"]


def test_a_batch_of_bad_rows_only_has_the_same_columns(batch_ray: ModuleType) -> None:
    generate = batch_ray.Generate(ENGINE, PARAMS)
    good = generate(pa.table({"prompt": ["One day"]}))
    bad = generate(pa.table({"prompt": pa.array([None], pa.string())}))
    assert good.schema == bad.schema
