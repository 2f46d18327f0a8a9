"""How many functions a reader walks through from `generate` to a token.

Counted is one decode step, as `sys.setprofile` sees it: every function of `folo_lib` that is
entered, once. Apart are the model (what `Qwen3ForCausalLM` calls in `forward` and in
`compute_logits`), comprehensions, and what dataclasses generate. Properties and the lock count.
"""

import sys
from collections.abc import Iterator
from types import FrameType

import pytest

import folo_lib
from folo_lib import LLMEngine, SamplingParams

FOLDER = folo_lib.__path__[0]
MODEL = {"Qwen3ForCausalLM.forward", "Qwen3ForCausalLM.compute_logits"}
STEP = "LLMEngine.advance"

TO_THE_STEP = [STEP, "FairLock.__enter__", "run_step"]
FCFS = ["FCFSScheduler.schedule", "RequestProgress.num_uncomputed_tokens"]
CONTINUOUS = [
    "ContinuousScheduler.schedule",
    "ContinuousScheduler.schedule_running",
    "RequestProgress.num_uncomputed_tokens",
    "PagedKVCacheManager.publish",
]
TO_THE_TOKEN = [
    "GPUExecutor.launch",
    "ModelRunner.launch",
    "RequestRows.update",
    "lay_end_to_end",
    "ModelRunner.run",
    "make_input_batch",
    "to_device",
    "SamplingRows.gather",
    "Sampler.sample",
    "draw_tokens",
    "SamplingRows.record",
    "InFlightStep.send",
    "to_host",
    "InFlightStep.read",
]
TO_THE_TEXT = [
    "take_outputs",
    "Request.append_token",
    "check_stop_conditions",
    "IncrementalDetokenizer.append",
    "RequestMetrics.record_token",
    "FairLock.__exit__",
]


def trace_steps(engine: LLMEngine, params: SamplingParams) -> list[list[str]]:
    """The functions that each step of a request enters, in the order of their first calls."""
    steps: list[list[str]] = []
    inside_model = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal inside_model
        code = frame.f_code
        name = code.co_qualname
        if event not in ("call", "return") or not code.co_filename.startswith(FOLDER):
            return
        if name in MODEL:
            inside_model += 1 if event == "call" else -1
        elif event == "call" and not inside_model and not name.endswith(">"):
            if name == STEP:
                steps.append([])
            if steps and name not in steps[-1]:
                steps[-1].append(name)

    sys.setprofile(profile)
    try:
        engine.generate("Once upon a time there was", params, use_tqdm=False)
    finally:
        sys.setprofile(None)
    return steps


@pytest.fixture(scope="module", params=["continuous", "fcfs"])
def path(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    engine = LLMEngine(
        device="cpu", dtype="float32", scheduler=request.param, use_tqdm=False
    )
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    trace_steps(engine, params)  # warms up
    steps = trace_steps(engine, params)
    assert len(steps) >= 8
    yield request.param, steps[3]


def test_the_way_to_a_token(path: tuple[str, list[str]]) -> None:
    """A function more on it is a hop that every reader makes: say in review what it carries."""
    scheduler, names = path
    own = CONTINUOUS if scheduler == "continuous" else FCFS
    assert names == [*TO_THE_STEP, *own, *TO_THE_TOKEN, *TO_THE_TEXT]


def test_a_token_is_on_the_host_after_21(path: tuple[str, list[str]]) -> None:
    _, names = path
    assert names.index("InFlightStep.read") < 21
