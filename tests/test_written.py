"""The checks of what a student writes: each stub is named, each finished function passes."""

from __future__ import annotations

import importlib
import itertools
import linecache
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("TRITON_INTERPRET", "1")

from folo_lib.course import scenes, student as student_line, written
from folo_lib.course.exercises import NotYet, exercise, grade, require
from folo_lib.course.written import (
    Session,
    check_written,
    compare,
    difference,
    stop_unless_written,
    taught_functions,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import student  # noqa: E402  tools/ is not a package

FILES = itertools.count()


def read_taught() -> dict[str, list[str]]:
    """The sources of the taught cells, by the topic of their page."""
    pages = sorted(ROOT.glob("notebooks/*.ipynb"))
    cells = {page: nbformat.read(page, as_version=4).cells for page in pages}
    return {
        student.topic_of(page.name): [c.source for c in found if student.is_taught(c)]
        for page, found in cells.items()
        if any(map(student.is_taught, found))
    }


TAUGHT = read_taught()


def define(topic: str, source: str) -> dict[str, Any]:
    """What a cell defines, run after all before it; Triton reads kernels from their file."""
    names = dict(vars(importlib.import_module(f"folo_lib.{topic}")))
    names["__name__"] = "__main__"
    file = f"<cell {next(FILES)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), names)
    return names


@pytest.mark.parametrize("topic", TAUGHT)
class TestScenes:
    def test_finished_functions_pass_and_each_is_called(self, topic: str) -> None:
        if topic in ("paged_attention", "fused_decode"):
            pytest.importorskip("triton")
        for source in TAUGHT[topic]:
            names = define(topic, source)
            for top in student.top_names(source):
                inner = [n for n in taught_functions(source) if n.split(".")[0] == top]
                called = compare(topic, names[top]).counts
                assert set(called) == set(inner) or "@triton.jit" in source, inner

    def test_each_stub_is_named(self, topic: str) -> None:
        if topic in ("paged_attention", "fused_decode"):
            pytest.importorskip("triton")
        for source in TAUGHT[topic]:
            every = list(taught_functions(source))
            for name in every:
                others = [one for one in every if one != name]
                names = define(topic, student.stub(source, others))
                verdict = check_written(topic, names[name.partition(".")[0]])
                assert verdict.message == f"Not yet: {name} is still the stub."


def test_every_scene_has_a_page() -> None:
    functions = {
        n
        for n, x in vars(scenes).items()
        if getattr(x, "__module__", "") == scenes.__name__
    }
    assert set(TAUGHT) <= functions


def check(source: str, topic: str = "attention") -> str:
    """What is said of the last function of a source."""
    names = define(topic, source)
    return check_written(
        topic, names[list(taught_functions(source))[-1].partition(".")[0]]
    ).message


MASK = '''
def create_causal_mask(query_len, key_len, dtype=torch.float32, device=None):
    """A mask."""
    {body}
'''


class TestWords:
    """Wrong functions, and what is said of them."""

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("return None", "for create_causal_mask(1, 1) it returned None; wanted is"),
            (
                "return torch.zeros(query_len, key_len)",
                "it returned a float32 tensor [1, 1]; wanted is a float32 tensor "
                "[1, 1, 1, 1].",
            ),
            (
                "return torch.ones(1, 1, query_len, key_len).triu(1) * -torch.inf",
                "for create_causal_mask(1, 1) at [0, 0, 0, 0] of its result is nan; "
                "wanted is 0.",
            ),
            (
                "mask = torch.ones(query_len, key_len, dtype=torch.bool).triu(1)\n    "
                "return torch.zeros(1, 1, query_len, key_len, dtype=dtype)"
                ".masked_fill(mask, -torch.inf)",
                "for create_causal_mask(1, 5) at [0, 0, 0, 1] of its result is -inf; "
                "wanted is 0.",
            ),
            ("return undefined", "NameError in line 4: name 'undefined'"),
            ("exit(0)", "SystemExit in line 4"),
        ],
    )
    def test_of_a_mask(self, body: str, said: str) -> None:
        assert said in check(MASK.format(body=body))

    def test_an_error_that_is_not_raised(self) -> None:
        body = TAUGHT["attention"][0].split('"""')[-1].split("query_positions", 1)[1]
        said = check(MASK.format(body="query_positions" + body))
        assert "for create_causal_mask(0, 3) it returned" in said
        assert "wanted is a ValueError (query_len=0 must lie between 1" in said

    def test_an_argument_that_is_changed(self) -> None:
        source = 'def repeat_kv(x, n_rep):\n    """Repeats."""\n    return x.mul_(2)'
        said = check(
            source.replace("x.mul_(2)", "x.mul_(1).repeat_interleave(n_rep, -3)")
        )
        assert said == "Passed: repeat_kv"
        said = check(
            source.replace("x.mul_(2)", "x.repeat_interleave(n_rep, -3), x.zero_()")
        )
        assert said.startswith("Not yet: repeat_kv: for repeat_kv(a float32 tensor")

    def test_a_state_that_is_not_kept(self) -> None:
        source = next(s for s in TAUGHT["block_pool"] if "class BlockPool" in s)
        wrong = source.replace(
            "            self.ref_counts[block_id] += 1\n", "            pass\n"
        )
        assert wrong != source
        said = check_written(
            "block_pool", define("block_pool", wrong)["BlockPool"]
        ).message
        assert said.startswith("Not yet: BlockPool: after BlockPool.touch([")
        assert "self.ref_counts[0] is 1; wanted is 2." in said

    def test_a_name_that_the_module_lacks(self) -> None:
        assert "has nothing of that name" in check(
            'def other(x):\n    """What?"""\n    return x'
        )

    def test_a_loop_without_an_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from folo_lib.course import exercises

        monkeypatch.setattr(exercises, "MAX_SECONDS", 0.2)
        assert "still running" in check(MASK.format(body="while True: pass"))

    def test_the_finished_module_is_left_as_it_was(self) -> None:
        from folo_lib import attention

        before = dict(vars(attention))
        state = torch.get_rng_state()
        check(MASK.format(body="return None"))
        assert vars(attention) == before
        assert torch.equal(torch.get_rng_state(), state)

    def test_what_the_page_defines_later_is_lent_meanwhile(self) -> None:
        [source] = (s for s in TAUGHT["block_pool"] if "class PagedKVCacheManager" in s)
        names = define("block_pool", source)
        del names["find_faults"]
        verdict = check_written("block_pool", names["PagedKVCacheManager"])
        assert verdict and "find_faults" not in names

    def test_a_kernel_that_computes_something_else(self) -> None:
        pytest.importorskip("triton")
        source = next(s for s in TAUGHT["fused_decode"] if "def pack_scores" in s)
        wrong = source.replace("16777215 - token_ids", "token_ids")
        said = check_written(
            "fused_decode", define("fused_decode", wrong)["pack_scores"]
        ).message
        assert said.startswith("Not yet: pack_scores: what comes out of a kernel")

    def test_stops_with_words_and_without_a_traceback(self) -> None:
        names = define("attention", student.stub(TAUGHT["attention"][1]))
        with pytest.raises(NotYet, match=r"^Not yet: repeat_kv is still") as stopped:
            stop_unless_written("attention", names["repeat_kv"])
        assert stopped.value._render_traceback_() == [str(stopped.value)]


@pytest.mark.parametrize(
    ("got", "wanted", "found"),
    [
        (1, 1, None),
        (1.0, 1, None),
        (True, 1, None),
        (float("nan"), float("nan"), None),
        (float("nan"), 1.0, ("", "nan", "1.0")),
        ([1, 2], (1, 2), None),
        ([1, 2], [1, 3], ("[1]", "2", "3")),
        ([1], [1, 3], ("", "[1]", "[1, 3]")),
        ({"a": 1}, {"a": 2}, ("[a]", "1", "2")),
        ({"a": 1}, {"b": 1}, ("", "a dict of ['a']", "one of ['b']")),
        (None, 3, ("", "None", "3")),
        ("a", None, ("", "'a'", "None")),
        (torch.zeros(2), torch.tensor([0.0, 1.0]), ("[1]", "0", "1")),
        (
            torch.zeros(2),
            torch.zeros(2).double(),
            ("", "a float32 tensor [2]", "a float64 tensor [2]"),
        ),
        (nn.Linear(2, 2, False), "x", ("", "Linear", "'x'")),
    ],
)
def test_difference(got: Any, wanted: Any, found: tuple[str, str, str] | None) -> None:
    result = difference(got, wanted, "")
    if found is not None and isinstance(wanted, dict):
        assert result is not None and result[1:] == found[1:]
    else:
        assert result == found


def test_modules_differ_by_their_weights() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert difference(other, one, "") is None
    with torch.no_grad():
        other.bias += 1
    assert difference(other, one, "") is not None


def test_a_session_counts_and_keeps_the_first_difference() -> None:
    session = Session()
    spy = session.spy("double", lambda x: 2 * x, lambda x: x + x)
    assert spy(2) == 4 and spy(3) == 6
    assert session.counts == {"double": 2} and session.problem is None


class TestGrade:
    @staticmethod
    @exercise
    def check_noisy(solution: Any) -> None:
        require(solution(1) == 2, "no.")

    def test_is_silent_and_raises_where_a_verdict_only_shows(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        import logging
        import warnings

        def noisy(x: int) -> int:
            print("words")
            warnings.warn("a warning", stacklevel=1)
            logging.getLogger("learner").error("an error")
            return 2 * x

        grade(self.check_noisy, noisy)
        with pytest.raises(NotYet, match=r"^Not yet: <lambda>: no\.$"):
            grade(self.check_noisy, lambda x: x)
        assert capfd.readouterr() == ("", "")

    def test_an_exit_is_no_pass(self) -> None:
        def leave(x: int) -> int:
            raise SystemExit(0)

        with pytest.raises(NotYet, match="SystemExit"):
            grade(self.check_noisy, leave)
        assert not self.check_noisy(leave)


class TestProgress:
    def test_counts_and_says_what_is_next(self) -> None:
        written.PASSED.clear()
        text = student_line.describe(["a", "b"], None, "")
        assert "0 of 2 written" in text and "<code>a</code>" in text
        written.PASSED.update("ab")
        assert "Nothing is left" in student_line.describe(["a", "b"], None, "")
        written.PASSED.clear()

    def test_says_where_it_stopped(self) -> None:
        error = AssertionError("1 < 2")
        text = student_line.describe(["a"], error, "#| export\n\nassert x < y\n")
        assert "begins <code>assert x &lt; y</code>" in text
        assert "AssertionError: 1 &lt; 2" in text
        stop = NotYet("Not yet: a is still the stub.")
        assert "</code>. Not yet: a is" in student_line.describe(["a"], stop, "b()")

    def test_is_renewed_after_each_cell(self) -> None:
        from IPython.core.interactiveshell import InteractiveShell
        from IPython.utils.capture import capture_output
        from traitlets.config import Config

        config = Config({"HistoryManager": {"enabled": False}})
        shell = InteractiveShell.instance(config=config)
        shell.showtraceback = lambda *args, **kwargs: None  # type: ignore[method-assign]
        try:
            with capture_output() as shown:
                for _ in range(2):  # a second run of the cell adds no second line
                    shell.run_cell(student.START.format(names='["repeat_kv"]'))
                shell.run_cell(
                    "def repeat_kv(x, n_rep):\n    raise NotImplementedError"
                )
                shell.run_cell('stop_unless_written("attention", repeat_kv)')
            *_, last = shown.outputs
            assert "repeat_kv is still the stub" in last.data["text/html"]
            hooks = shell.events.callbacks["post_run_cell"]
            assert sum(h.__module__ == student_line.__name__ for h in hooks) == 1
        finally:
            InteractiveShell.clear_instance()


def test_a_tensor_of_many_is_described_by_its_form() -> None:
    assert written.brief(torch.zeros(2, 3)) == "a float32 tensor [2, 3]"
    assert written.brief(torch.tensor([1, 2])) == "tensor([1, 2])"
    big: list[Tensor] = [torch.zeros(1)] * 9
    assert written.brief(big).endswith(", ...]")
