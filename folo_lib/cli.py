"""The command `folo`: a story in the terminal, a talk, the benchmark, the server."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import random
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from folo_lib import __version__, bundled_model_path

if TYPE_CHECKING:
    from folo_lib.engine import LLMEngine
    from folo_lib.request import RequestOutput
    from folo_lib.sampling_params import SamplingParams

__all__ = ["Printer", "main", "make_parser"]

PROMPT = "Once upon a time"
COMMANDS = ("run", "chat", "bench", "serve")

BOLD, DIM, PLAIN = "1", "2", ""
UNSURE, SURPRISED = "30;48;5;223", "4;30;48;5;215"
"""Looks of a token, as numbers of ANSI escapes: black on orange, the second underlined."""


def shade(probability: float) -> str:
    """How a token looks: the less the model expected it, the darker, as in the course."""
    if probability >= 0.5:
        return PLAIN
    return UNSURE if probability >= 0.1 else SURPRISED


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Printer:
    """Writes text as it comes: shaded and wrapped at words on a terminal, else as it is.

    Args:
        out: where to.
        plain: no colours, even on a terminal; `$NO_COLOR` says the same.
    """

    def __init__(self, out: TextIO, plain: bool = False) -> None:
        self.out, self.wraps = out, is_terminal(out)
        self.shades = self.wraps and not plain and not os.environ.get("NO_COLOR")
        self.word: list[tuple[str, str]] = []  # characters that wait for its end
        self.column = 0
        self.after_space = False

    def write(self, text: str, look: str = PLAIN) -> None:
        """Takes more text. On a terminal a word is shown when it is whole."""
        if not self.wraps:
            self.out.write(text)
            self.column = 1  # a line has begun, however long it is
        else:
            for char in text:
                self._take(char, look)
        self.out.flush()

    def close(self) -> None:
        """Shows what waits, and ends the line."""
        self._show_word()
        if self.column:
            self._newline()
        self.out.flush()

    def _take(self, char: str, look: str) -> None:
        if char == "\n":
            self._show_word()
            self._newline()
        elif char.isspace():
            self._show_word()
            self.after_space = self.column > 0
        else:
            # What a model writes must not move the cursor.
            self.word.append((char if char.isprintable() else "\ufffd", look))
            if count_columns(char) == 2:  # Chinese has no spaces to wait for
                self._show_word()

    def _show_word(self) -> None:
        if not self.word:
            return
        columns = sum(count_columns(char) for char, _ in self.word)
        if self.column and self.column + self.after_space + columns > self._width():
            self._newline()
        if self.after_space:
            self.out.write(" ")
        before = PLAIN
        for char, look in self.word:
            if self.shades and look != before:
                self.out.write("\033[0m" if before else "")
                self.out.write(f"\033[{look}m" if look else "")
                before = look
            self.out.write(char)
        self.out.write("\033[0m" if before else "")
        self.column += self.after_space + columns
        self.word, self.after_space = [], False

    def _newline(self) -> None:
        self.out.write("\n")
        self.column, self.after_space = 0, False

    def _width(self) -> int:
        return max(1, shutil.get_terminal_size().columns - 1)


def count_columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 1 + (unicodedata.east_asian_width(char) in "WF")


def split_by_news(outputs: Iterator[RequestOutput]) -> Iterator[tuple[str, float]]:
    """What each output of a stream adds, with the probability of the least likely token of it.

    Where a token shows nothing, as half of a character does, it counts with the next.

    Raises:
        ValueError: if the request ends with an error.
    """
    length, num_tokens, chance = 0, 0, 1.0
    for output in outputs:
        sample = output.outputs[0]
        new_ids = sample.token_ids[num_tokens:]
        scores = (sample.logprobs or [])[num_tokens:]
        for token_id, entry in zip(new_ids, scores, strict=True):
            chance = min(chance, math.exp(entry[token_id].logprob))
        num_tokens += len(new_ids)
        if text := sample.text[length:]:
            yield text, chance
            length, chance = len(sample.text), 1.0
        if output.error:
            raise ValueError(output.error)


def make_parser(prog: str = "folo") -> argparse.ArgumentParser:
    """The arguments of `folo`; `bench` and `serve` have parsers of their own."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="An inference engine for Qwen3, at work. Without a command it is run: "
        f'{prog} "Once upon a time".',
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    bundled = "default: $FOLO_MODEL, else the bundled checkpoint"
    add("--model", help=f"a folder or hub id, such as Qwen/Qwen3-0.6B; {bundled}")
    add("--max-tokens", type=int, default=300, help="most tokens to write (300)")
    own = "default: the checkpoint's own"
    add("--temperature", type=float, help=f"0 is greedy; {own}")
    add("--top-p", type=float, help=own)
    add("--top-k", type=int, help=own)
    add("--seed", type=int, help="makes the same text again; default: a new one")
    add("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU if any")
    add("--dtype", default="auto", help="float32, bfloat16, float16; default: auto")
    add("--plain", action="store_true", help="no shades, as with NO_COLOR=1")
    shades = (
        "A token is shaded if the model gave it less than 50 %, and underlined too if less "
        "than 10 %. Where the output is no terminal, text is written as it is."
    )
    about = "go on from a text, token by token"
    run = commands.add_parser(
        "run", parents=[options], help=about, description=about, epilog=shades
    )
    what = f"the text; - reads standard input; default: {PROMPT}"
    run.add_argument("prompt", nargs="?", default=PROMPT, help=what)
    run.add_argument("--chat", action="store_true", help="talk, as `chat` does")
    about = "talk to the model; /new begins anew, /quit or Ctrl-D ends"
    chat = commands.add_parser(
        "chat", parents=[options], help=about, description=about, epilog=shades
    )
    for talking in (run, chat):
        talking.add_argument("--system", help="of a chat: what the model is told first")
        talking.add_argument(
            "--thinking",
            action=argparse.BooleanOptionalAction,
            help="of a chat: whether a Qwen3 thinks before it answers",
        )
    for name, about in (
        ("bench", "measure this engine beside others; bench --help says more"),
        ("serve", "OpenAI's routes over HTTP; serve --help says more"),
    ):
        commands.add_parser(name, help=about, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "folo") -> None:
    """The command `folo`, and `python -m folo_lib`; see `--help`."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows code page has no emoji
            stream.reconfigure(errors="replace")
    if words[:1] == ["bench"]:
        from folo_lib.benchmark_cli import main as bench

        bench(words[1:], prog=f"{prog} bench")
    elif words[:1] == ["serve"]:
        serve(words[1:], prog)
    else:
        talk_or_tell(make_parser(prog), words, prog)


def serve(words: Sequence[str], prog: str) -> None:
    """`folo serve`, if what it needs is installed."""
    try:
        from folo_lib.server import main as run_server
    except ModuleNotFoundError as error:
        sys.exit(
            f"{prog} serve: error: {error.name} is missing. Install the extra `serve`, in a "
            'clone of the repository with: pip install -e ".[serve]"'
        )
    run_server(words, prog=f"{prog} serve")


def talk_or_tell(parser: argparse.ArgumentParser, words: list[str], prog: str) -> None:
    """`folo run` and `folo chat`."""
    if not words or words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        first = words[0] if words else "-"
        near = difflib.get_close_matches(first, COMMANDS, n=1, cutoff=0.75)
        if near and not first.startswith("-"):
            parser.error(
                f"there is no command {first!r}: did you mean {near[0]}? If it is a "
                f"prompt: {prog} run {first}"
            )
        words = ["run", *words]
    args = parser.parse_args(words)
    if sys.platform == "win32":
        os.system("")  # makes older consoles read escapes
    printer = Printer(sys.stdout, args.plain)
    try:
        chats = args.command == "chat" or args.chat
        if chats and args.command == "run" and args.prompt != PROMPT:
            parser.error("--chat asks for what to say itself: leave the prompt out.")
        engine, params = load(args)
        if chats:
            chat(engine, params, args, printer)
        else:
            tell(engine, params, args.prompt, printer)
    except BrokenPipeError:  # of `folo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        printer.close()
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{prog}: error: {error}")


def load(args: argparse.Namespace) -> tuple[LLMEngine, SamplingParams]:
    """The engine, and what was asked for on top of the checkpoint's own parameters."""
    from folo_lib.engine import LLMEngine
    from folo_lib.sampling_params import SamplingParams

    asked: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("temperature", "top_p", "top_k", "seed")
        if getattr(args, name) is not None
    }
    asked |= {"max_tokens": args.max_tokens, "logprobs": 0}
    asked.setdefault("seed", random.randrange(10**6))
    SamplingParams(**asked)  # before anything is loaded
    model = args.model or os.environ.get("FOLO_MODEL") or bundled_model_path()
    engine = LLMEngine(
        model,
        device=args.device,
        dtype=args.dtype,
        use_tqdm=is_terminal(sys.stderr) and model != bundled_model_path(),
    )
    return engine, replace(engine.processor.default_params, **asked)


def write_stream(outputs: Iterator[RequestOutput], printer: Printer) -> str:
    """Shows a stream as it comes; returns its text."""
    parts = []
    for text, probability in split_by_news(outputs):
        printer.write(text, shade(probability))
        parts.append(text)
    return "".join(parts)


def tell(
    engine: LLMEngine, params: SamplingParams, prompt: str, printer: Printer
) -> None:
    """The prompt and what follows it, and on a terminal how fast that was."""
    prompt = sys.stdin.read() if prompt == "-" else prompt
    last: list[RequestOutput] = []

    def remember() -> Iterator[RequestOutput]:
        for output in stream:
            last[:] = [output]
            yield output

    start = time.perf_counter()
    stream = engine.stream(prompt, params)  # an error before a word is shown
    printer.write(prompt, BOLD)
    try:
        write_stream(remember(), printer)
    finally:
        printer.close()
    seconds = time.perf_counter() - start
    legend = "Shaded: less than 50 % expected; underlined: less than 10 %. "
    note(legend * printer.shades + describe(last[0], params, seconds), printer)


def describe(output: RequestOutput, params: SamplingParams, seconds: float) -> str:
    sample, metrics = output.outputs[0], output.metrics
    number = len(sample.token_ids)
    parts = [
        f"{number} token{'s' * (number != 1)} in {seconds:.1f} s",
        f"first after {1e3 * (metrics.ttft or 0):.0f} ms",
        f"{1 / metrics.tpot:.0f} tokens/s" if metrics.tpot else "",
        "greedy" if params.temperature == 0 else f"seed {sample.seed}",
        "cut at --max-tokens" if sample.finish_reason == "length" else "",
    ]
    return ", ".join(filter(None, parts))


def note(text: str, printer: Printer) -> None:
    """A remark beside the text, on standard error, for people who look on."""
    if is_terminal(sys.stderr):
        text = f"\033[{DIM}m{text}\033[0m" if printer.shades else text
        print(f"\n{text}", file=sys.stderr)


def chat(
    engine: LLMEngine,
    params: SamplingParams,
    args: argparse.Namespace,
    printer: Printer,
) -> None:
    """Reads lines and answers each, until there are no more."""
    options = {} if args.thinking is None else {"enable_thinking": args.thinking}
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(system)
    typed = is_terminal(sys.stdin)
    if typed:
        note("/new begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer.", printer)
        with suppress(ImportError):
            import readline  # noqa: F401  arrow keys; Windows has none
    while True:
        try:
            line = input("\nYou: " if typed else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/new":
            messages = list(system)
        elif line:
            messages.append({"role": "user", "content": line})
            messages = answer(engine, params, options, messages, system, printer)


def answer(
    engine: LLMEngine,
    params: SamplingParams,
    options: dict[str, Any],
    messages: list[dict[str, str]],
    system: list[dict[str, str]],
    printer: Printer,
) -> list[dict[str, str]]:
    """Writes the answer to the last message; returns the conversation with it."""
    from folo_lib.inputs import apply_chat_template

    first = len(system)
    while True:
        text = apply_chat_template(engine.tokenizer, messages, options)
        ids = engine.processor.encode(text, add_special_tokens=False)
        if len(ids) < engine.max_model_len or len(messages) <= first + 2:
            break
        messages = messages[:first] + messages[first + 2 :]
        note("The oldest question and answer are forgotten: no room is left.", printer)
    said: list[str] = []
    try:
        stream = engine.stream({"prompt_token_ids": ids}, params)
        for new, probability in split_by_news(stream):
            printer.write(new, shade(probability))
            said.append(new)
    except KeyboardInterrupt:
        said.append(" ...")
        printer.write(" ...")
    finally:
        printer.close()
    return [*messages, {"role": "assistant", "content": "".join(said)}]
