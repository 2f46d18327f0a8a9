"""Draw the two pictures of the README: the bundled model telling a story, and the benchmark.

    python tools/draw_readme.py

The story is told by the model as it is now, with a seed, so that it is the same every time. The
benchmark is what notebooks/data/benchmark_h200.json holds. Both go to docs/_static/.
"""

from __future__ import annotations

import json
import statistics
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
from folo_lib.benchmark import paired_ratios  # noqa: E402
from folo_lib.course.figures import label_ticks, look_of  # noqa: E402
from folo_lib.course.widgets.base import STYLE  # noqa: E402
from folo_lib.course.widgets.generation import (  # noqa: E402
    Piece,
    draw_generation,
    split_by_token,
    split_words,
)

STATIC = ROOT / "docs" / "_static"
RECORD = ROOT / "notebooks" / "data" / "benchmark_h200.json"

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

SYSTEMS = {
    "folo_lib": "folo_lib",
    "huggingface_static": "Hugging Face,\nstatic cache, compiled",
    "huggingface": "Hugging Face,\ndefault",
}


def read_rows(record: Result, section: str) -> list[Result]:
    """What the latest recording of a section holds."""
    rows: list[Result] = record["sections"][section][-1]["rows"]
    return rows


def read_ratios(record: Result) -> dict[str, tuple[float, float, float]]:
    """Time per token of the others over ours, of paired runs: median, least and greatest."""
    rows = {row["system"]: row for row in read_rows(record, "decode")}
    return {
        name: (statistics.median(ratios), min(ratios), max(ratios))
        for name in rows
        if name != "folo_lib"
        for ratios in [paired_ratios(rows[name], rows["folo_lib"])]
    }


def draw_benchmark(record: Result) -> Figure:
    """Tokens per second at batch 1, and time to the first token by length of the prompt."""
    figure = Figure(figsize=(8, 3.1), dpi=200)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)  # inches of white
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))

    rows = {row["system"]: row for row in read_rows(record, "decode")}
    names = [name for name in SYSTEMS if name in rows]
    for place, name in enumerate(names):
        times = rows[name]["tpot"]
        speed = 1 / times["median"]
        left.barh(place, speed, height=0.6, **look_of(name)[1].bar)
        slow, fast = 1 / max(times["values"]), 1 / min(times["values"])
        left.plot([slow, fast], [place, place], color="black", linewidth=2.5)
        left.text(fast + 15, place, f"{speed:,.0f}", va="center")
    left.set_yticks(range(len(names)), [SYSTEMS[name] for name in names])
    left.invert_yaxis()
    left.set(xlabel="tokens per second", xlim=(0, 880), xticks=range(0, 801, 200))
    left.set_title("Writing: more is better", loc="left")
    left.grid(axis="y", visible=False)
    left.tick_params(axis="y", length=0)

    prefill = read_rows(record, "prefill")
    for name in ("folo_lib", "huggingface"):
        found = [row for row in prefill if row["system"] == name]
        lengths = [row["prompt_tokens"] for row in found]
        times = [1e3 * row["ttft"]["median"] for row in found]
        right.plot(lengths, times, markersize=5, **look_of(name)[1].line)
    right.annotate("Hugging Face, default", (32, 76), fontsize=10)
    right.annotate("folo_lib", (900, 2.7), fontsize=10)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    label_ticks(right.xaxis, lengths[::2])
    label_ticks(right.yaxis, [2, 5, 10, 20, 50, 100])
    right.set(
        xlabel="tokens in the prompt",
        ylabel="time to the first token, ms",
        ylim=(1.8, 120),
    )
    right.set_title("Reading: less is better", loc="left")
    return figure


def main() -> None:
    story = STATIC / "talking.gif"
    save_animation(draw_story(tell_story()), story)
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    plot = STATIC / "benchmark.png"
    with matplotlib.rc_context(fname=ROOT / "notebooks" / "folo.mplstyle"):
        figure = draw_benchmark(record)
        figure.savefig(plot, dpi=200, metadata={"Software": None})
    for path in (story, plot):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")
    for name, ratios in read_ratios(record).items():
        print(f"{name}: {' / '.join(f'{ratio:.3g}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
