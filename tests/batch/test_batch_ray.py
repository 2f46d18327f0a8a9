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


def read_lines(folder: Path) -> list[str]:
    """The lines of all files."""
    texts = [file.read_bytes().decode() for file in folder.iterdir()]
    assert all(text.endswith("\n") for text in texts)
    return [line for text in texts for line in text[:-1].split("\n")]


def read_rows(folder: Path) -> dict[Any, Row]:
    """The answers by their id."""
    rows = [json.loads(line) for line in read_lines(folder)]
    return {row.get("id"): row for row in rows}


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

    answers = read_rows(target)
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


LINES = [
    '{"id": "2024-01-31", "prompt": "One day", "score": 0.1234567890123456}',
    '{"id": "2024-01-31T10:00:00Z", "prompt": "2024-01-31"}',
    '{"id": "12:30", "prompt": "2024-01-31 10:00:00", "seed": 9223372036854775808}',
    '{"id": "big", "prompt": "One day", "seed": 18446744073709551615}',
    '{"id": "seed", "prompt": "One day", "seed": 7}',
    '{"id": 123456789012345678901234567890, "prompt": "A small boat", "none": null}',
    '{"id": 0.12345678901234567890123456789, "prompt": "A small boat", "x": 1e400}',
    '{"id": -0.0, "prompt": "The old mill", "x": [1, 1.0, "1", true, {"1": []}, 1E2]}',
    '{"id": "mixed", "prompt": "In a forest", "x": {"a": 1}, "score": "high"}',
    '{"id": "\\u00e4 \\ud800 \\u2028", "prompt": "One day \\u4f60 \\n", "": ""}',
    '{"id": "ä 🙂\u2028\u2029\x85", "prompt": "One day 🙂\u2028x", "x": "a"}',
    '  {  "id" : "spaces" , "prompt" : "One day"  }  ',
    '{"id": "twice", "id": "twice", "prompt": "One day"}',
]


def test_every_column_of_a_line_comes_back_as_it_went_in(
    batch_ray: ModuleType, cluster: None, tmp_path: Path
) -> None:
    """Dates, digits, seeds beyond 2**63, mixed types, spaces: the text of the line is kept."""
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers"
    source.write_bytes(("\ufeff" + "\r\n\n".join(LINES)).encode())

    run(batch_ray, source, target)

    answers = read_lines(target)
    assert len(answers) == len(LINES)
    for line in LINES:
        kept = line.strip()[:-1].strip()
        [answer] = [answer for answer in answers if answer.startswith(kept + ", ")]
        row, before = json.loads(answer), json.loads(line)
        assert list(row) == [*before, *batch_ray.ANSWER]
        assert row["error"] is None and 0 < row["num_tokens"] <= 8
        [text] = expected(batch_ray, [before]).values()
        assert row["text"] == text


def test_lines_that_are_no_rows_say_so_and_harm_nobody(
    batch_ray: ModuleType, cluster: None, tmp_path: Path
) -> None:
    source, target = tmp_path / "prompts.json", tmp_path / "answers"
    bad = [
        b'{"prompt": "One d',
        b'["One day"]',
        b"42",
        b"{}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "One day", "seed": 18446744073709551616}',
        b'{"prompt": "One day", "seed": 1.5}',
        b'{"prompt": "One day", "seed": "7"}',
        b'{"prompt": 20240131}',
        b"[" * 100_000,
    ]
    good = b'{"id": "good", "text": 3, "error": 0.5, "prompt": "One day"}'
    source.write_bytes(b"\n".join([*bad, good]))

    run(batch_ray, source, target)

    rows = [json.loads(line) for line in read_lines(target)]
    [kept] = [row for row in rows if row.get("id") == "good"]
    assert list(kept) == ["id", "prompt", *batch_ray.ANSWER] and kept["error"] is None
    rows.remove(kept)
    assert all(row["finish_reason"] == "error" and row["text"] is None for row in rows)
    errors = {row.get("line", row.get("seed", row.get("prompt"))): row for row in rows}
    assert len(errors) == len(bad) == len(rows)
    for key, said in {
        '{"prompt": "One d': "ValueError: the line is no JSON (Unterminated string",
        '["One day"]': "TypeError: the line is no JSON object",
        "42": "TypeError: the line is no JSON object",
        None: "TypeError: prompt is None, and text is expected.",
        '{"prompt": "\ufffd"}': "ValueError: the line is no JSON ('utf-8' codec",
        2**64: "ValueError: seed=18446744073709551616",
        1.5: "TypeError: seed=1.5",
        "7": "TypeError: seed='7'",
        20240131: "TypeError: prompt is 20240131, and text is expected.",
        "[" * 100_000: "ValueError: the line is no JSON (",
    }.items():
        assert errors[key]["error"].startswith(said), errors[key]["error"]


def test_columns_of_parquet_keep_their_types_and_values(batch_ray: ModuleType) -> None:
    """Nanoseconds, unsigned seeds and dictionaries, which Python's own types would change."""
    columns = {
        "prompt": pa.array(PROMPTS[:2]),
        "seed": pa.array([2**63, None], pa.uint64()),
        "time": pa.array([1, 2**62 + 1], pa.time64("ns")),
        "stamp": pa.array([2**62 + 1, None], pa.timestamp("ns", "UTC")),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "pairs": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int8())),
        "half": pa.array([0.1, 0.2], pa.float32()),
        "day": pa.array([0, 19_753], pa.date32()),
        "error": pa.array([1, 2]),
    }
    batch = pa.table(columns)
    answers = batch_ray.Generate(ENGINE, PARAMS)(batch)
    assert answers.drop_columns(list(batch_ray.ANSWER)).equals(
        batch.drop_columns(["error"])
    )
    assert answers["error"].to_pylist() == [None, None]
    assert answers["num_tokens"].to_pylist() == [8, 8]


def test_a_seed_that_pandas_made_a_float_is_the_same_seed(
    batch_ray: ModuleType,
) -> None:
    generate = batch_ray.Generate(ENGINE, PARAMS)
    texts = [
        generate(pa.table({"prompt": ["One day", "One day"], "seed": seeds}))["text"]
        for seeds in ([11, None], [11.0, None])
    ]
    assert texts[0].equals(texts[1])
    assert (
        generate(pa.table({"id": [1, 2]}))["error"].to_pylist()
        == ["TypeError: prompt is None, and text is expected."] * 2
    )


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


def test_a_step_that_fails_takes_its_requests_and_no_others(
    batch_ray: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = batch_ray.Generate(ENGINE | {"max_num_seqs": 2}, PARAMS)
    launch, calls = generate.engine.executor.launch, 0

    def fails_once(plan: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the device is on fire")
        return launch(plan)

    monkeypatch.setattr(generate.engine.executor, "launch", fails_once)
    rows = generate(pa.table({"prompt": PROMPTS[:3]})).to_pylist()
    burnt = "RuntimeError: the device is on fire"
    assert [row["error"] for row in rows] == [burnt, burnt, None]
    assert [row["num_tokens"] for row in rows] == [2, 2, 8]
    assert [row["finish_reason"] for row in rows] == ["error", "error", "length"]


def test_the_rows_of_a_batch_share_steps_and_the_bad_ones_take_none(
    batch_ray: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = batch_ray.Generate(ENGINE, PARAMS)
    launch, widths = generate.engine.executor.launch, list[int]()

    def count(plan: Any) -> Any:
        widths.append(len(plan.scheduled))
        return launch(plan)

    monkeypatch.setattr(generate.engine.executor, "launch", count)
    rows = generate(pa.table({"prompt": [*PROMPTS, ""]})).to_pylist()
    assert widths == [len(PROMPTS)] * 8
    assert [row["error"] is None for row in rows] == [True] * 5 + [False]


def test_a_batch_of_bad_rows_only_has_the_same_columns(batch_ray: ModuleType) -> None:
    generate = batch_ray.Generate(ENGINE, PARAMS)
    good = generate(pa.table({"prompt": ["One day"]}))
    bad = generate(pa.table({"prompt": pa.array([None], pa.string())}))
    assert good.schema == bad.schema


def test_an_engine_is_split_over_the_gpus_that_it_gets(batch_ray: ModuleType) -> None:
    def options(*given: str) -> Row:
        parsed = batch_ray.make_parser().parse_args(["in", "out", *given])
        made: Row = batch_ray.make_engine_options(parsed)
        return made

    assert options() == options("--num-gpus", "1") == options("--num-gpus", "0.5") == {}
    two = options("--num-gpus", "2", "--model", "m", "--engine", '{"seed": 3}')
    assert two == {"seed": 3, "model": "m", "tensor_parallel_size": 2}
    own = options("--num-gpus", "2", "--engine", '{"tensor_parallel_size": 1}')
    assert own == {"tensor_parallel_size": 1}
    with pytest.raises(SystemExit, match="as a whole"):
        options("--num-gpus", "1.5")
