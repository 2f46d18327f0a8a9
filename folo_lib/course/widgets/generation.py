"""A generation to watch and to stop."""

from __future__ import annotations

import html
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from folo_lib.course.widgets.base import (
    STYLE,
    CourseWidget,
    drawable,
    drawing_lock,
    encode,
    float_slider,
    int_slider,
    paragraph,
    read_control,
    row,
    stack,
    text_field,
    to_png,
)
from folo_lib.engine import LLMEngine
from folo_lib.request import RequestOutput
from folo_lib.sampling_params import SamplingParams

SURE, UNSURE = 0.5, 0.1
"""From the one up a token is shown plain, below the other underlined twice."""


@dataclass(frozen=True)
class Piece:
    """Text that a token added, and the probability that the model gave it."""

    text: str
    probability: float

    @property
    def colour(self) -> str:
        """White for a token that was certain, orange for one that was not expected at all."""
        share = 1 - self.probability
        orange = (0xF2, 0xA0, 0x3D)
        return "#" + "".join(f"{round(255 - share * (255 - c)):02x}" for c in orange)

    @property
    def num_underlines(self) -> int:
        """0, 1 or 2: what the colour says, without colour."""
        return (self.probability < SURE) + (self.probability < UNSURE)


SAMPLES = Piece("from 50 %", 0.75), Piece("10 to 50 %", 0.3), Piece("below 10 %", 0.05)
"""One piece for each look, which the legend of a picture shows."""


def split_by_token(
    outputs: Iterator[RequestOutput],
) -> Iterator[tuple[RequestOutput, list[Piece]]]:
    """Each output of a stream with what is new in it, one piece for each new token.

    A token that ends within a character shows nothing; the next has the whole character.
    """
    length, num_tokens = 0, 0
    for output in outputs:
        sample = output.outputs[0]
        new = [
            entry[token_id]
            for token_id, entry in zip(
                sample.token_ids[num_tokens:],
                (sample.logprobs or [])[num_tokens:],
                strict=True,
            )
        ]
        texts = cut_text(
            sample.text[length:], [each.decoded_token or "" for each in new]
        )
        chances = [math.exp(each.logprob) for each in new]
        if len(texts) > len(new):  # text that was held back, and no token with it
            chances.append(1.0)
        yield output, [Piece(*pair) for pair in zip(texts, chances, strict=True)]
        length, num_tokens = len(sample.text), len(sample.token_ids)


def cut_text(text: str, tokens: Sequence[str]) -> list[str]:
    """Cuts text into one part for each of the tokens that brought it.

    What is no token's own text (half of a character, what was held back until it could be
    no stop string) goes to the token before the next one that is found, or to the last.
    """
    parts: list[str] = []
    for token in tokens[:-1]:
        place = text.find(token) if token else -1
        if place > 0 and parts:
            parts[-1] += text[:place]
            text, place = text[place:], 0
        end = place + len(token) if place >= 0 else 0
        parts.append(text[:end])
        text = text[end:]
    return [*parts, text] if tokens or text else []


def html_text(prompt: str, pieces: Sequence[Piece]) -> str:
    """The prompt in grey, then each piece on its colour; the tooltip has the number."""
    decoration = ("none", "underline 1px", "underline double 1px")
    spans = [
        f'<span title="{piece.probability:.1%}" style="background: {piece.colour}; '
        f'text-decoration: {decoration[piece.num_underlines]}; text-underline-offset: 3px">'
        f"{html.escape(piece.text)}</span>"
        for piece in pieces
        if piece.text
    ]
    return (
        '<div class="folo-live" style="background: white; color: black; border: 1px solid #999; '
        "padding: 8px 10px; max-width: 836px; min-height: 7em; line-height: 1.9; "
        'font-size: 14px; white-space: pre-wrap; box-sizing: border-box">'
        f'<span style="color: #555">{html.escape(prompt)}</span>{"".join(spans)}</div>'
    )


LEGEND = (
    "Probability of each token: white and plain from 50 %, underlined below, "
    "underlined twice below 10 %; the less expected, the darker."
)


class LiveGeneration(CourseWidget):
    """Text that grows as the engine makes it, with a button that stops the request.

    The request is followed in a thread of its own, so that the click on Stop finds the kernel
    free. Other cells may use the engine meanwhile: callers take turns, step by step.

    Args:
        engine: with a tokenizer.
        prompt: to begin with.
    """

    purpose = "generate"

    def __init__(self, engine: LLMEngine, prompt: str) -> None:
        if engine.tokenizer is None:
            raise ValueError("the engine has no tokenizer, and so no text to show.")
        encode(engine.tokenizer, "prompt", prompt, 1)
        self.name, self.engine = "live_generation", engine
        longest = max(1, min(400, engine.max_model_len // 2))
        self.controls = {
            "prompt": text_field("Prompt", prompt),
            "temperature": float_slider("Temperature", 0, 2, 0.05, 0.8),
            "seed": int_slider("Seed", 0, 99, 0),
            "max_tokens": int_slider("Most tokens", 1, longest, min(120, longest)),
            "pace": int_slider("Tokens/s at most", 2, 200, 20),
            "generate": widgets.Button(description="Generate", icon="play"),
            "stop": widgets.Button(description="Stop", icon="stop"),
        }
        self.controls["prompt"].continuous_update = True  # Enter finds it up to date
        self.controls["prompt"].on_msg(self._on_enter)
        self._show_buttons(running=False)
        self.text = widgets.HTML(html_text(prompt, []))
        self.status = widgets.HTML(paragraph("Press Generate, or Enter in the prompt."))
        self.controls["generate"].on_click(lambda button: self.generate())
        self.controls["stop"].on_click(lambda button: self.stop())
        *settings, start, stop = self.controls.values()
        legend = widgets.HTML(paragraph(LEGEND))
        self.box = stack(
            [row(settings), row([start, stop]), self.text, self.status, legend]
        )
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._example: list[Piece] | None = None
        self._example_prompt = ""

    @property
    def is_running(self) -> bool:
        """Whether text is being made."""
        return self._thread is not None and self._thread.is_alive()

    def generate(self) -> None:
        """Starts a generation and returns at once; while one runs, does nothing."""
        if self.is_running:
            return
        self._stopping.clear()
        self.status.value = paragraph("Generating.")
        self._show_buttons(running=True)
        self._thread = threading.Thread(
            target=self._run, daemon=True, name="live_generation"
        )
        self._thread.start()

    def stop(self) -> None:
        """Aborts the request that runs, if any; returns at once."""
        self._stopping.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the generation has ended; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.is_running

    def _on_enter(self, field: Any, content: Any, buffers: Any) -> None:
        if content.get("event") == "submit":
            self.generate()

    def _show_buttons(self, running: bool) -> None:
        """Stop can be pressed while there is something to stop, and is red then."""
        start, stop = self.controls["generate"], self.controls["stop"]
        stop.disabled, stop.button_style = not running, "danger" if running else ""
        start.button_style = "" if running else "primary"

    def picture(self) -> bytes:
        """A generation of the prompt as it was at first, run to its end.

        The first call shows it in the widget too.
        """
        if self._example is None:
            prompt = self._example_prompt = read_control(self.controls["prompt"])
            stream = self.engine.stream(prompt, self._params())
            self._example = [p for _, new in split_by_token(stream) for p in new]
            if self._thread is None:
                self.text.value = html_text(prompt, self._example)
                self.status.value = paragraph(
                    "This is an example. Press Generate, or Enter in the prompt, to make another."
                )
        with drawing_lock, mpl.rc_context(STYLE):
            return to_png(draw_generation(self._example_prompt, self._example)[0])

    def alt_text(self) -> str:
        text = "".join(piece.text for piece in self._example or [])
        return f"{LEGEND} The text: {self._example_prompt}{text}"

    def _params(self) -> SamplingParams:
        names = ("temperature", "seed", "max_tokens")
        return SamplingParams(logprobs=0, **{n: self.controls[n].value for n in names})

    def _run(self) -> None:
        try:
            self._follow(read_control(self.controls["prompt"]))
        except Exception as error:  # a thread has nobody else to tell
            self.status.value = paragraph(f"Not generated: {error}")
        finally:
            self._show_buttons(running=False)

    def _follow(self, prompt: str) -> None:
        """Streams a request to its end, or aborts it."""
        self.text.value = html_text(prompt, [])
        pieces: list[Piece] = []
        started, shown = time.perf_counter(), 0.0
        told = started
        for output, new in split_by_token(self.engine.stream(prompt, self._params())):
            pieces += new
            now = time.perf_counter()
            if now - shown > 0.1 or output.finished:  # the whole text travels each time
                self.text.value, shown = html_text(prompt, pieces), now
            if output.finished:
                self.status.value = paragraph(self._summary(output, now - started))
            else:
                if now - told > 1:  # not at every token, since it is read aloud
                    speed, told = len(pieces) / (now - started), now
                    said = f"Generating: {len(pieces)} tokens, {speed:.0f} tokens/s."
                    self.status.value = paragraph(said)
                due = started + len(pieces) / self.controls["pace"].value
                if self._stopping.wait(max(0.0, due - now)):
                    self.engine.abort_request(output.request_id)

    def _summary(self, output: RequestOutput, seconds: float) -> str:
        sample = output.outputs[0]
        ends = {
            "abort": "Stopped",
            "stop": "Finished",
            "length": "At its limit",
            "error": f"Failed ({output.error})",
        }
        count = len(sample.token_ids)
        text = (
            f"{ends[sample.finish_reason or 'error']}: finish_reason is "
            f"\u201c{sample.finish_reason}\u201d, "
            f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s."
        )
        stats = self.engine.stats()
        free = stats.num_blocks - stats.num_used_blocks
        return f"{text} Cache blocks free: {free} of {stats.num_blocks}."


def live_generation(engine: LLMEngine, prompt: str) -> LiveGeneration:
    """Streamed text, each token coloured by its probability, with Generate and Stop.

    Args:
        engine: with a tokenizer.
        prompt: to begin with.

    Raises:
        TypeError: if `prompt` is not text.
        ValueError: if it is empty, or the engine has no tokenizer.
    """
    return LiveGeneration(engine, prompt)


WORD = re.compile(r" *\S*")


def lay_out(pieces: Sequence[Piece], width: int) -> Iterator[tuple[int, int, Piece]]:
    """Line, column and text of what fits on lines of `width` characters.

    Lines break before a space where they can, so that none begins with a comma.
    """
    line = column = 0
    for i, piece in enumerate(pieces):
        text = piece.text
        rest_of_word = WORD.match("".join(each.text for each in pieces[i:]))
        needed = rest_of_word.end() if rest_of_word else 0
        if needed > width:
            needed = len(text)  # a token is not torn apart where its word must be
        if column and column + needed > width:
            line, column, text = line + 1, 0, text.lstrip(" ")
        for number, rest in enumerate(text.split("\n")):
            part = rest
            if number:
                line, column = line + 1, 0
            while part:
                if column >= width:
                    line, column = line + 1, 0
                chunk, part = part[: width - column], part[width - column :]
                yield line, column, Piece(chunk, piece.probability)
                column += len(chunk)


FONT, FONT_SIZE = "DejaVu Sans Mono", 10
ADVANCE, PITCH = 0.602 * FONT_SIZE / 72, 0.27  # of a character and a line, in inches
WIDTH, MARGIN = 7.6, 0.3  # inches
FAINT = "#555555"


def draw_generation(
    prompt: str, pieces: Sequence[Piece]
) -> tuple[Figure, list[list[Artist]]]:
    """The text of a finished generation, as the widget colours it.

    Returns:
        The figure, and what was drawn for each word of the prompt and then for each piece, in
        the order of the text, so that it can be shown one after the other.
    """
    columns = int((WIDTH - 2 * MARGIN) / ADVANCE)
    words = [Piece(word, 1.0) for word in split_words(prompt)]
    places = list(lay_out([*words, *pieces], columns))
    num_prompt = len(list(lay_out(words, columns)))
    num_lines = max((line for line, _, _ in places), default=0) + 1
    height = (num_lines + 1.6) * PITCH + 2 * MARGIN
    figure = Figure(figsize=(WIDTH, height))
    figure.set_layout_engine("none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")
    frame = (0.06, 0.06), WIDTH - 0.12, height - 0.12
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.6", "linewidth": 0.8}
    ax.add_patch(FancyBboxPatch(*frame, "round,pad=0,rounding_size=0.08", **look))
    x, y = MARGIN, MARGIN + (num_lines + 0.6) * PITCH
    for piece in SAMPLES:
        draw_piece(ax, x, y, piece)
        x += (len(piece.text) + 3) * ADVANCE
    legend = "probability that the model gave the token"
    ax.text(x, y + PITCH * 0.6, legend, fontsize=9, color=FAINT)
    drawn = []
    for number, (line, column, piece) in enumerate(places):
        corner = MARGIN + column * ADVANCE, MARGIN + line * PITCH
        ink = FAINT if number < num_prompt else "black"
        drawn.append(draw_piece(ax, *corner, piece, ink))
    return figure, drawn


def draw_piece(
    ax: Axes, x: float, y: float, piece: Piece, ink: str = "black"
) -> list[Artist]:
    """One piece on its colour and with its underlines, its top left corner at `x`, `y`."""
    span = len(piece.text) * ADVANCE
    ground = Rectangle((x, y), span, PITCH * 0.8, color=piece.colour, lw=0)
    text = drawable(piece.text, FONT)
    style: dict[str, Any] = {"family": FONT, "fontsize": FONT_SIZE, "color": ink}
    drawn = [ax.add_patch(ground), ax.text(x, y + PITCH * 0.6, text, **style)]
    for i in range(piece.num_underlines):
        low = y + PITCH * (0.7 + 0.09 * i)
        drawn += ax.plot([x, x + span], [low, low], "k-", linewidth=0.8)
    return drawn


def split_words(text: str) -> list[str]:
    """The text in pieces that end before a space, so that lines break there."""
    words = text.split(" ")
    return [words[0], *(" " + word for word in words[1:])]
