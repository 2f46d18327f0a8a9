"""Draw the pictures of the README: the model telling a story, the benchmark, and the badges.

    python tools/draw_readme.py

The story is told by the model as it is now, with a seed, so that it is the same every time. The
benchmark is what notebooks/data/throughput_h200.json holds. A badge says what has really run, and
is a file here, since one from a server could say anything. All go to docs/_static/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from folo_lib import LLMEngine, SamplingParams  # noqa: E402
from folo_lib.course.throughput_figures import (  # noqa: E402
    draw_systems,
    draw_tpot,
    read_recording,
)
from folo_lib.course.widgets.base import STYLE  # noqa: E402
from folo_lib.course.widgets.generation import (  # noqa: E402
    Piece,
    draw_generation,
    split_by_token,
    split_words,
)

STATIC = ROOT / "docs" / "_static"
RECORD = ROOT / "notebooks" / "data" / "throughput_h200.json"

PROMPT = "Once upon a time"
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=200, logprobs=0)

Result = dict[str, Any]


# The story


def tell_story() -> list[Piece]:
    """What the bundled model adds to the prompt, token by token."""
    engine = LLMEngine(device="cpu", dtype="float32", use_tqdm=False)
    stream = split_by_token(engine.stream(PROMPT, PARAMS))
    return [piece for _, new in stream for piece in new]


DPI = 200
TOKEN_MS, FIRST_MS, LAST_MS = 70, 2500, 6000


def draw_story(pieces: Sequence[Piece]) -> list[Image.Image]:
    """The whole story, then the prompt alone, then one more token in each picture.

    The whole comes first because it is what stands still where nothing may move.
    """
    with matplotlib.rc_context(STYLE):
        figure, drawn = draw_generation(PROMPT, pieces)
        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        for artist in chain.from_iterable(drawn):
            artist.set_visible(False)
        canvas.draw()
        pictures = []
        for artists in drawn:
            for artist in artists:
                artist.set_visible(True)
                figure.draw_artist(artist)
            pictures.append(
                Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
            )
    return [pictures[-1], *pictures[len(split_words(PROMPT)) - 1 :]]


def save_animation(pictures: Sequence[Image.Image], path: Path) -> None:
    """As a GIF that runs twice and then rests on its last picture."""
    palette = pictures[0].quantize(64, dither=Image.Dither.NONE)
    frames = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    colours = palette.getpalette() or []
    corner = 3 * int(frames[0].tobytes()[0])
    colours[corner : corner + 3] = [255] * 3  # a palette may miss white by a little
    for frame in frames:
        frame.putpalette(colours)
    first, *rest = frames
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=[FIRST_MS, 800, *[TOKEN_MS] * (len(rest) - 2), LAST_MS],
        loop=1,
        disposal=1,
        optimize=False,
    )


# The benchmark


def draw_benchmark(record: Result) -> Figure:
    """Tokens per second of many requests, and the time per token of a few."""
    figure = Figure(figsize=(8, 3.1), dpi=200)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)  # inches of white
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    draw_systems(left, record)
    left.set_title("256 mixed requests: more is better")
    left.set_xlabel("tokens per second")
    draw_tpot(right, record, "requests")
    right.set(xlabel="requests at once", ylabel="time per token (ms)")
    right.set_title("A few requests: less is better")
    return figure


# The badges


def write_badge(left: str, right: str, colour: str = "#005a8d") -> str:
    """Two words in boxes, as SVG; `textLength` holds their widths whatever the font is."""
    widths = [round(6.6 * len(text) + 14) for text in (left, right)]
    boxes, x = [], 0
    for text, width, fill in zip((left, right), widths, ("#444", colour), strict=True):
        boxes.append(
            f'<rect x="{x}" width="{width}" height="22" fill="{fill}"/>'
            f'<text x="{x + width / 2}" y="15" textLength="{width - 14}">{text}</text>'
        )
        x += width
    look = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="22" role="img" '
        f'aria-label="{left}: {right}"><g {look} text-anchor="middle">'
        f"{''.join(boxes)}</g></svg>\n"
    )


def list_badges(record: Result) -> dict[str, str]:
    """The name of each badge's file, and what is in it."""
    card = record["setup"]["device"].removeprefix("NVIDIA ")
    date = record["sections"]["throughput"][-1]["date"][:10]
    return {
        "badge-colab.svg": write_badge("Colab", "open the tour", "#b3470f"),
        "badge-linux.svg": write_badge("make test", "passes on Linux"),
        "badge-h200.svg": write_badge("measured", f"{card}, {date}"),
        "badge-licence.svg": write_badge("licence", "Apache-2.0"),
    }


def main() -> None:
    story = STATIC / "talking.gif"
    save_animation(draw_story(tell_story()), story)
    record = read_recording(RECORD)
    plot = STATIC / "benchmark.png"
    with matplotlib.rc_context(fname=ROOT / "notebooks" / "folo.mplstyle"):
        figure = draw_benchmark(record)
        figure.savefig(plot, dpi=200, metadata={"Software": None})
    badges = {STATIC / name: svg for name, svg in list_badges(record).items()}
    for path, svg in badges.items():
        path.write_text(svg, encoding="utf-8")
    for path in (story, plot, *badges):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
