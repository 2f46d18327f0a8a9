"""The command `folo`: what it shows on a terminal, in a pipe, and when something is wrong."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from folo_lib import (
    LLM,
    SamplingParams,
    bundled_model_path,
    cli,
    inputs as folo_inputs,
)
from folo_lib.cli import Printer, main, shade, split_by_news

ROOT = Path(__file__).resolve().parent.parent
STORY = "Once upon a time there was a young deer named Jonas who lived"
ESCAPE = re.compile(r"\033\[[\d;]*m")
LOOK = re.compile(r"\033\[([\d;]*)m(.*?)\033\[0m", re.DOTALL)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FOLO_MODEL", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(bundled_model_path(), device="cpu", use_tqdm=False)


@pytest.fixture
def at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is loaded once for all tests here."""
    monkeypatch.setattr("folo_lib.engine.LLMEngine", lambda *_, **__: llm)


def show(text: str, look: str = "", terminal: bool = True, plain: bool = False) -> str:
    out = Terminal() if terminal else io.StringIO()
    printer = Printer(out, plain)
    for char in text:  # a token at a time
        printer.write(char, look)
    printer.close()
    return out.getvalue()


class TestPrinter:
    def test_wraps_at_words(self) -> None:
        lines = show("A word is not cut in two, wherever the line ends.").split("\n")
        assert lines == ["A word is not cut in two, wherever the", "line ends.", ""]

    def test_a_word_longer_than_the_line_and_empty_lines(self) -> None:
        assert show("x" * 50 + " y\n\nz") == "x" * 50 + "\ny\n\nz\n"

    def test_words_are_shaded_and_spaces_are_not(self) -> None:
        assert show("a b", "1") == "\033[1ma\033[0m \033[1mb\033[0m\n"

    def test_chinese_wraps_too(self) -> None:
        lines = show("小猫" * 15).split("\n")
        assert [len(line) for line in lines] == [19, 11, 0]

    def test_an_accent_that_is_a_character_of_its_own_takes_no_room(self) -> None:
        word = "e\u0301" * 19
        assert show(f"{word} {word}") == f"{word} {word}\n"

    def test_what_is_no_terminal_gets_the_text_as_it_is(self) -> None:
        text = "two  spaces\tand\n" + "x " * 50
        assert show(text, "1", terminal=False) == text + "\n"

    @pytest.mark.parametrize("way", ["NO_COLOR", "plain", "TERM"])
    def test_no_colours(self, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if way != "plain":
            monkeypatch.setenv(way, "1" if way == "NO_COLOR" else "dumb")
        assert show("a b", "1", plain=way == "plain") == "a b\n"

    def test_a_text_cannot_move_the_cursor(self) -> None:
        assert show("a\033[2Jb\r\x07") == "a\ufffd[2Jb \ufffd\n"

    def test_shades(self) -> None:
        assert shade(0.5) == "" != shade(0.49) == shade(0.1) != shade(0.09)
        assert shade(0.09).startswith("4;")  # underlined, for who sees no colour


def make_output(text: str, chances: list[float], error: str | None = None) -> Any:
    logprobs = [{i: SimpleNamespace(logprob=c)} for i, c in enumerate(chances)]
    sample = SimpleNamespace(
        text=text, token_ids=list(range(len(chances))), logprobs=logprobs
    )
    return SimpleNamespace(outputs=[sample], error=error)


def test_half_of_a_character_counts_with_the_next() -> None:
    outputs = [make_output("a", [0.0]), make_output("a", [0.0, -3.0])]
    outputs.append(make_output("a🙂", [0.0, -3.0, -1.0]))
    [one, two] = split_by_news(iter(outputs))
    assert one == ("a", 1.0)
    assert two[0] == "🙂" and two[1] == pytest.approx(0.0498, abs=1e-4)


def test_a_request_that_fails_says_so_after_its_text() -> None:
    news = split_by_news(iter([make_output("a", [0.0], "the logits are NaN")]))
    assert next(news) == ("a", 1.0)
    with pytest.raises(ValueError, match="the logits are NaN"):
        next(news)


@pytest.mark.usefixtures("at_once")
class TestStory:
    def test_in_a_pipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["Once upon a time", "--temperature", "0", "--max-tokens", "9"])
        out, err = capsys.readouterr()
        assert (out, err) == (STORY.removesuffix(" lived") + " lived\n", "")

    def test_without_a_word(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["--temperature", "0", "--max-tokens", "9"])
        assert capsys.readouterr().out == STORY + "\n"

    def test_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        main(["run", "Once upon a time", "--temperature", "0", "--max-tokens", "9"])
        assert ESCAPE.sub("", out.getvalue()).replace("\n", " ") == STORY + " "
        looks = {word: look for look, word in LOOK.findall(out.getvalue())}
        assert looks.pop("Once") == looks.pop("upon") == looks.pop("a") == cli.BOLD
        params = SamplingParams(temperature=0, max_tokens=9, logprobs=0)
        *_, last = llm.stream("Once upon a time", params)
        for entry in last.outputs[0].logprobs or []:
            [score] = entry.values()
            word = (score.decoded_token or "").strip()
            assert looks.get(word, "") == shade(2.718281828**score.logprob), word
        assert {cli.UNSURE, cli.SURPRISED} <= {*looks.values()}
        assert "9 tokens in " in err.getvalue() and "greedy" in err.getvalue()
        assert "cut at --max-tokens" in err.getvalue()

    def test_a_seed_says_the_same_again(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = []
        for seed in ("5", "5", "6"):
            main(["Once", "--seed", seed, "--max-tokens", "20"])
            told.append(capsys.readouterr().out)
        assert told[0] == told[1] != told[2]

    def test_standard_input(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time"))
        main(["-", "--temperature", "0", "--max-tokens", "9"])
        assert capsys.readouterr().out == STORY + "\n"

    def test_ctrl_c_ends_the_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop(*_: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "write_stream", stop)
        with pytest.raises(SystemExit) as caught:
            main(["Once"])
        assert caught.value.code == 130
        assert capsys.readouterr().out == "Once\n"

    def test_a_pipe_that_nobody_reads_any_more_is_no_error(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """As with `folo ... | head`; what Python still flushes at its end goes nowhere."""
        with (tmp_path / "pipe").open("w") as pipe:

            class Closed(io.StringIO):
                def write(self, text: str) -> int:
                    raise BrokenPipeError

                def fileno(self) -> int:
                    return pipe.fileno()

            monkeypatch.setattr(sys, "stdout", Closed())
            main(["Once"])
            nowhere = os.stat(os.devnull)
            assert os.path.samestat(os.fstat(pipe.fileno()), nowhere)


@pytest.mark.usefixtures("at_once")
class TestChat:
    @pytest.fixture
    def say(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> Any:
        def say(*lines: str, options: tuple[str, ...] = ()) -> list[str]:
            monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
            main(["chat", "--temperature", "0", *options])
            return capsys.readouterr().out.splitlines()

        return say

    def test_answers_as_the_engine_does(self, say: Any, llm: LLM) -> None:
        first = say("Hello")
        params = SamplingParams(temperature=0, max_tokens=300)
        talk = [{"role": "user", "content": "Hello"}]
        [output] = llm.chat(talk, params, use_tqdm=False)
        assert first == output.outputs[0].text.splitlines()

        talk += [
            {"role": "assistant", "content": output.outputs[0].text},
            {"role": "user", "content": "Tell me a story."},
        ]
        [output] = llm.chat(talk, params, use_tqdm=False)
        said = say("Hello", "", "Tell me a story.", "/quit", "not heard")
        assert said == [*first, *output.outputs[0].text.splitlines()]

    def test_new_forgets(self, say: Any) -> None:
        assert say("Hello", "/new", "Hello") == say("Hello") * 2

    def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(
        self, say: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        talks: list[list[dict[str, str]]] = []
        template = folo_inputs.apply_chat_template

        def listen(tokenizer: Any, messages: Any, options: Any) -> str:
            talks.append(list(messages))
            return template(tokenizer, messages, options)

        def press(outputs: Any) -> Any:
            yield next(split_by_news(outputs))
            if len(talks) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(folo_inputs, "apply_chat_template", listen)
        monkeypatch.setattr(cli, "split_by_news", press)
        first, second = say("Hello", "Go on.")
        assert first.endswith(" ...") and not second.endswith(" ...")
        said = {"role": "assistant", "content": first}
        assert talks[1][1:] == [said, {"role": "user", "content": "Go on."}]

    def test_an_option_of_run(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
        main(["--chat", "--temperature", "0"])
        assert capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(["--chat", "Hello"])

    def test_the_oldest_is_forgotten_when_no_room_is_left(
        self, say: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heard: list[int] = []
        stream = llm.stream

        def listen(prompt: Any, params: Any) -> Any:
            heard.append(len(prompt["prompt_token_ids"]))
            return stream(prompt, params)

        monkeypatch.setattr(llm, "stream", listen)
        monkeypatch.setattr(llm, "max_model_len", 60)
        say(*["Hello"] * 6, options=("--max-tokens", "10"))
        assert len(heard) == 6 and max(heard) < 60
        assert heard[1] > heard[0]

    def test_a_question_that_can_never_fit_is_an_error(
        self, say: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(SystemExit, match=r"folo: error: .*max_model_len=4096"):
            say("Hello " * 5000)

    def test_what_is_told_first_and_thinking_reach_the_template(
        self, say: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []

        def spy(tokenizer: Any, messages: Any, options: Any) -> str:
            seen.append((messages[0], options))
            return "Hello"

        monkeypatch.setattr("folo_lib.inputs.apply_chat_template", spy)
        one_token = ("--max-tokens", "1", "--system", "Be brief.")
        for thinking in ((), ("--thinking",), ("--no-thinking",)):
            say("Hello", options=(*one_token, *thinking))
        told = {"role": "system", "content": "Be brief."}
        expected = [{}, {"enable_thinking": True}, {"enable_thinking": False}]
        assert seen == [(told, options) for options in expected]


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "/nowhere", "a"], "'/nowhere' is neither a folder nor a hub"),
            (["a", "--temperature", "9"], r"temperature=9\.0 must be at least 0 and"),
            (["a", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
            (["a", "--device", "tpu"], "tpu"),
            ([""], "the prompt is empty"),
            (["bench", "--runs", "1"], "take at least 5"),
        ],
    )
    def test_one_line_and_no_traceback(self, words: list[str], message: str) -> None:
        with pytest.raises(SystemExit, match=message) as caught:
            main(words)
        assert re.match(r"folo( bench)?: error: ", str(caught.value))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["chatt"], "did you mean chat?"),
            (["sevre", "--port", "80"], "did you mean serve?"),
            (["--modle", "x"], "--modle"),
            (["chat", "Hello"], "unrecognized arguments: Hello"),
            (["a", "--max-tokens", "x"], "invalid int value: 'x'"),
        ],
    )
    def test_words_that_nobody_knows(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("words", [["--help"], ["run", "-h"], ["chat", "-h"]])
    def test_help(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(words, prog="python -m folo_lib")
        assert not caught.value.code
        assert "usage: python -m folo_lib" in capsys.readouterr().out

    def test_serve_without_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "folo_lib.server", raising=False)
        monkeypatch.setitem(sys.modules, "fastapi", None)
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        with pytest.raises(SystemExit, match=r"is missing. Install the extra `serve`"):
            main(["serve"])

    def test_serve_gets_its_own_words(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("fastapi")
        pytest.importorskip("uvicorn")
        with pytest.raises(SystemExit):
            main(["serve", "--help"])
        assert "usage: folo serve" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_from_a_shell_on_a_terminal() -> None:
    import pty

    mine, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ("Once upon a time", "--temperature", "0", "--max-tokens", "9")
    command = [sys.executable, "-m", "folo_lib", *words]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=env
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(mine, 4096):
                shown += part
        except OSError:  # Linux says so that the other end is closed
            pass
        assert process.wait(timeout=60) == 0
    os.close(mine)
    text = shown.decode()
    story, _, remark = ESCAPE.sub("", text).replace("\r\n", "\n").partition("\n\n")
    assert story.replace("\n", " ") == STORY
    assert f"\033[{cli.SURPRISED}mdeer\033[0m" in text
    assert "9 tokens in " in remark
