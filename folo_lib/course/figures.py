"""What the figures of the course share: colours with a meaning, and shapes that come back.

    from folo_lib.course.figures import CACHE, draw_box, label_lines

A colour means the same on every page, and a hatch, a marker or a dash repeats it, so that it
survives a grey printer. `notebooks/folo.mplstyle` holds the rest of the look, and cycles
through the same colours. Every function draws into axes that the page made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from torch import Tensor

    from folo_lib.kv_cache import AttentionMetadata

# Okabe and Ito's colours, told apart by every eye, and what the course adds to them.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
ORANGE, AMBER, YELLOW, PINK = "#D55E00", "#E69F00", "#F0E442", "#CC79A7"
GREY, INDIGO = "#666666", "#332288"
PALE_BLUE, PALE_ORANGE, PALE_GREY = "#BFDDF0", "#F5C7A9", "#C8C8C8"
CYCLE = (BLUE, ORANGE, GREEN, PINK, BLACK)

Point = tuple[float, float]


class Look(NamedTuple):
    """How one thing looks on all pages."""

    colour: str
    hatch: str
    marker: str
    dash: str

    @property
    def bar(self) -> dict[str, Any]:
        """For bars, boxes and other patches."""
        return {
            "facecolor": self.colour,
            "hatch": self.hatch,
            "edgecolor": "black",
            "linewidth": 0.8,
        }

    @property
    def line(self) -> dict[str, Any]:
        """For `plot` and `errorbar`."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dash,
            "markeredgecolor": "black",
            "markeredgewidth": 0.8,
        }


QUERIES = Look(AMBER, "\\\\\\", "^", "--")
KEYS = Look(SKY, "", "o", "-")
VALUES = Look(GREEN, "..", "D", "-.")
CACHE = Look(PALE_BLUE, "////", "s", ":")
HOST = Look(PALE_GREY, "//", "s", "--")
DEVICE = Look(PINK, "", "o", "-")
PREFILL = Look(YELLOW, "..", "s", "--")
DECODE = Look(INDIGO, "", "o", "-")
US = Look(BLUE, "", "o", "-")
HUGGING_FACE = Look(ORANGE, "//", "s", "--")
HUGGING_FACE_STATIC = Look(PALE_ORANGE, "..", "^", "-.")
OTHER = Look(PINK, "xx", "D", ":")

TOGETHER = (
    (QUERIES, KEYS, VALUES, CACHE),
    (HOST, DEVICE),
    (PREFILL, DECODE),
    (US, HUGGING_FACE, HUGGING_FACE_STATIC, OTHER),
)
"""What appears in one figure, and so must be told apart."""

SYSTEMS = {
    "folo_lib": ("folo_lib", US),
    "huggingface": ("Hugging Face", HUGGING_FACE),
    "huggingface_static": ("Hugging Face,\nstatic cache", HUGGING_FACE_STATIC),
}


def look_of(system: str) -> tuple[str, Look]:
    """Label and look of a system of the benchmark; its own name where it is unknown."""
    return SYSTEMS.get(system, (system, OTHER))


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in matplotlib.colors.to_rgb(colour)
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "black" if luminance > 0.179 else "white"  # equal contrast with both


# Boxes and arrows


def draw_box(
    ax: Axes,
    corner: Point,
    size: Point = (1, 1),
    text: object = "",
    fontsize: float | None = None,
    **style: Any,
) -> Rectangle:
    """A box with text in its middle.

    Args:
        ax: where to draw.
        corner: x and y of the corner with the smallest numbers.
        size: width and height.
        text: what to write in it, black or white as its colour asks.
        fontsize: of the text.
        style: of the `Rectangle`; white with a black edge unless it says otherwise.
    """
    box = Rectangle(
        corner, *size, **{"facecolor": "white", "edgecolor": "black"} | style
    )
    ax.add_patch(box)
    if text != "":
        colour = matplotlib.colors.to_hex(box.get_facecolor())
        ink: dict[str, Any] = {"color": ink_on(colour), "fontsize": fontsize}
        if box.get_hatch():  # letters need a ground of one colour
            ink["bbox"] = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        x, y = corner[0] + size[0] / 2, corner[1] + size[1] / 2
        ax.text(x, y, str(text), ha="center", va="center", **ink)
    return box


def draw_row(
    ax: Axes,
    corner: Point,
    texts: Iterable[object],
    colours: str | Sequence[str] = "white",
    **style: Any,
) -> None:
    """Boxes of size 1, side by side.

    Args:
        ax: where to draw.
        corner: of the first box.
        texts: one for each box.
        colours: one for all, or one for each.
        style: of every box, as in `draw_box`.
    """
    fills = cycle([colours]) if isinstance(colours, str) else iter(colours)
    for i, text in enumerate(texts):
        place = (corner[0] + i, corner[1])
        draw_box(ax, place, text=text, facecolor=next(fills), **style)


def draw_arrow(ax: Axes, start: Point, end: Point, **style: Any) -> None:
    """An arrow from `start` to `end`; `style` is that of `arrowprops`."""
    ax.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": "black"} | style
    )


def draw_vector(
    ax: Axes, tip: Sequence[float], label: str = "", colour: str = "black"
) -> None:
    """A vector from the origin of a plane, with its name beyond the tip."""
    x, y = float(tip[0]), float(tip[1])
    ax.quiver(
        x,
        y,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.012,
        color=colour,
        zorder=2,
    )
    ax.text(1.25 * x, 1.25 * y, label, ha="center", va="center")


# Labels


def label_lines(ax: Axes, gap: float = 6, **style: Any) -> None:
    """Writes the label of each line at its right end, in place of a legend.

    Args:
        ax: whose lines were drawn with `label=`. Its right margin is widened by hand.
        gap: between line and text, in points.
        style: of the text.
    """
    for line in ax.get_lines():
        label = str(line.get_label())
        if not label.startswith("_"):
            x, y = np.asarray(line.get_xydata())[-1].tolist()
            look = {"color": line.get_color(), "va": "center"} | style
            ax.annotate(label, (x, y), (gap, 0), textcoords="offset points", **look)


def label_ticks(axis: Axis, numbers: Iterable[float]) -> None:
    """Ticks at these numbers and nowhere else, written with commas: 8,192."""
    places = list(numbers)
    axis.set_ticks(places, [f"{number:,}" for number in places])
    axis.set_ticks([], minor=True)


def set_titles(
    axes: Iterable[Axes], titles: Iterable[str], fontsize: float = 9
) -> None:
    """A title for each of several axes, small, such as what was measured and when."""
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=fontsize)


def write_values(ax: Axes, values: Tensor, **style: Any) -> None:
    """Writes each number of a heat map from 0 to 1 into its cell, white where it is dark.

    Args:
        ax: where `imshow(values, vmin=0, vmax=1)` was drawn with a map of blues.
        values: `[rows, columns]`.
        style: of the text.
    """
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            look = {"color": "white" if value > 0.6 else "black"} | style
            text = f"{value:.2f}".removeprefix("0")  # .62 leaves room for large letters
            ax.text(x, y, text, ha="center", va="center", **look)


# The model as a whole: pages 00 to 04

STEPS = {  # what, left, bottom, width, text, the page that builds it
    "embed": (2, 3, 13, "embedding", "04"),
    "norm": (21, 17, 8, "norm", "03"),
    "qkv": (31, 17, 8, "q, k, v", "01"),
    "rotate": (41, 17, 8, "rotate", "02"),
    "attend": (51, 17, 8, "attend", "01"),
    "norm 2": (66, 17, 8, "norm", "03"),
    "mlp": (76, 17, 8, "MLP", "03"),
    "head": (90, 3, 13, "norm, head", "04"),
}


def draw_transformer(
    ax: Axes,
    here: Iterable[str] = (),
    text: str = "… took the",
    answer: str = " kite",
    num_layers: int = 6,
) -> None:
    """The whole model: a stream from left to right, and the detours that add to it.

    Args:
        ax: of a figure that is about 8 by 2.4 inches.
        here: keys of `STEPS`, which are framed as the place where the reader is.
        text: what goes in.
        answer: what comes out.
        num_layers: how often the middle is repeated.

    Raises:
        ValueError: if `here` names no step.
    """
    here = set(here)
    if unknown := here - STEPS.keys():
        raise ValueError(f"no step {sorted(unknown)}: choose from {list(STEPS)}")
    stream: dict[str, Any] = {"color": "0.45", "linewidth": 4, "zorder": 0}
    ax.plot([15, 90], [6, 6], **stream, solid_capstyle="butt")
    ax.text(52.5, 2, "the stream: one vector for each token", ha="center", color="0.35")
    draw_box(
        ax, (17.5, -1), (70.5, 29), facecolor="none", edgecolor="0.5", linestyle="--"
    )
    ax.text(52.5, 29.5, f"a layer, {num_layers} times in a row", ha="center")
    for start, end, steps in (
        (19.3, 61.5, ("norm", "qkv", "rotate", "attend")),
        (64.3, 86, ("norm 2", "mlp")),
    ):
        draw_arrow(ax, (start, 6.8), (STEPS[steps[0]][0] + 1.5, 16.8))
        for one, other in pairwise(steps):
            left, width = STEPS[one][0], STEPS[one][2]
            draw_arrow(ax, (left + width, 20), (STEPS[other][0], 20))
        left, width = STEPS[steps[-1]][0], STEPS[steps[-1]][2]
        draw_arrow(ax, (left + width - 1.5, 16.8), (end, 7.2))
        ax.text(
            end,
            6,
            "+",
            ha="center",
            va="center",
            size=13,
            weight="bold",
            bbox={"boxstyle": "circle,pad=0.05", "facecolor": "white"},
        )
    for name, (left, bottom, width, what, page) in STEPS.items():
        look: dict[str, Any] = {"facecolor": "white"}
        if name in here:
            look = {"facecolor": PALE_BLUE, "edgecolor": BLUE, "linewidth": 2.5}
        draw_box(ax, (left, bottom), (width, 6), what, fontsize=9, **look)
        style: dict[str, Any] = {"color": "0.35"}
        if name in here:
            style = {"color": BLUE, "weight": "bold"}
        said = f"page {page}" if bottom < 10 else page
        ax.text(left + width / 2, bottom + 6.6, said, ha="center", fontsize=8, **style)
    ax.text(8.5, 16, text, ha="center", weight="bold")
    draw_arrow(ax, (8.5, 15.5), (8.5, 12.3))
    ax.text(96.5, 16, answer, ha="center", weight="bold")
    draw_arrow(ax, (96.5, 12.3), (96.5, 15.5))
    ax.set(xlim=(0, 105), ylim=(-2, 33))
    ax.axis("off")


# Page 01: attention


def draw_lookup(ax: Axes, query: Tensor, keys: Tensor) -> None:
    """A query of two numbers, as a broad band, among keys in the plane.

    Args:
        ax: where to draw.
        query: `[2]`.
        keys: `[T, 2]`.
    """
    x, y = query.tolist()
    band: dict[str, Any] = {"linewidth": 14, "solid_capstyle": "butt", "zorder": 0}
    ax.plot([0, x], [0, y], color=QUERIES.colour, linestyle="-", **band)
    for i, key in enumerate(keys):
        draw_vector(ax, key.tolist(), f"key {i}", KEYS.colour)
    ax.text(x / 2, y / 2 - 0.35, "query", ha="center")
    ax.set(xlim=(-1.7, 1.7), ylim=(-0.5, 1.5), aspect="equal")
    ax.axis("off")


def draw_mask(ax: Axes, visible: Tensor, title: str) -> None:
    """Who may see whom: the square of all positions, of which a step computes the last rows.

    Args:
        ax: where to draw.
        visible: `[S, T]`, True where a query may see a key.
        title: of the picture.
    """
    num_queries, num_keys = visible.shape
    num_cached = num_keys - num_queries
    for row in range(num_cached):  # done by earlier steps
        for column in range(num_keys):
            draw_box(ax, (column, row), edgecolor="0.7", linestyle=":", zorder=1)
    for row, seen in enumerate(visible.tolist(), start=num_cached):
        for column, is_seen in enumerate(seen):
            look = (CACHE if column < num_cached else KEYS).bar if is_seen else {}
            text = "" if is_seen else "−∞"
            draw_box(ax, (column, row), text=text, fontsize=9, zorder=2, **look)
    for name, start, end in (("cached", 0, num_cached), ("new", num_cached, num_keys)):
        if start < end:
            ax.plot([start + 0.1, end - 0.1], [-0.3, -0.3], "k-", lw=2)
            ax.text((start + end) / 2, -0.5, name, ha="center", va="bottom")
    middles = [i + 0.5 for i in range(num_keys)]
    ax.set_xticks(middles, [str(i) for i in range(num_keys)])
    ax.set_yticks(middles, [str(i) for i in range(num_keys)])
    ax.set(xlim=(-0.1, num_keys + 0.1), ylim=(num_keys + 0.1, -1.4), title=title)
    ax.set(aspect="equal", xlabel="key position")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(False)


def draw_heads(ax: Axes, kv_heads: Sequence[int], title: str) -> None:
    """Which query head reads which key/value head.

    Args:
        ax: where to draw.
        kv_heads: for each query head, the key/value head that it reads.
        title: of the picture.
    """
    num_heads, num_kv_heads = len(kv_heads), len(set(kv_heads))
    places = [(g + 0.5) * num_heads / num_kv_heads for g in range(num_kv_heads)]
    for head, group in enumerate(kv_heads):
        ax.plot([head + 0.5, places[group]], [1, 0], "k-", lw=1.2, zorder=1)
        corner = (head + 0.15, 0.8)
        draw_box(ax, corner, (0.7, 0.4), f"Q{head}", facecolor=QUERIES.colour, zorder=2)
    for group, x in enumerate(places):
        text, fill = f"KV{group}", CACHE.colour
        draw_box(ax, (x - 0.45, -0.25), (0.9, 0.5), text, facecolor=fill, zorder=2)
    share = f"cache: {num_kv_heads / num_heads:.0%}"
    ax.text(num_heads / 2, -0.75, share, ha="center")
    ax.set(xlim=(0, num_heads), ylim=(-0.85, 1.3), title=title)
    ax.axis("off")


def draw_step(ax: Axes, metadata: AttentionMetadata, block_size: int) -> None:
    """The tokens of a step end to end above a cache, and arrows into their slots.

    Args:
        ax: where to draw.
        metadata: of a step with a few short sequences, which are called A, B, ...
        block_size: slots in a block.
    """
    tables, lengths = metadata.block_table.tolist(), metadata.seq_lens.tolist()
    owned = [
        row[: -(-length // block_size)]
        for row, length in zip(tables, lengths, strict=True)
    ]
    names = "ABCDEFGH"[: len(lengths)]
    num_blocks = 1 + max(max(blocks) for blocks in owned)
    cached = {
        blocks[i // block_size] * block_size + i % block_size: f"{name}{i}"
        for name, blocks, length in zip(names, owned, lengths, strict=True)
        for i in range(length)
    }
    slots = metadata.slot_mapping.tolist()
    for slot in range(num_blocks * block_size):
        look = KEYS.bar if slot in slots else CACHE.bar if slot in cached else {}
        draw_box(ax, (slot, 0), text=cached.get(slot, ""), **look)
    for place, slot in enumerate(slots):
        draw_box(ax, (place, 3), text=cached[slot], **KEYS.bar)
        draw_arrow(ax, (place + 0.5, 3), (slot + 0.5, 1))
    starts = metadata.query_start_loc.tolist()
    for start in starts:
        ax.plot([start, start], [2.8, 4.15], "k-", lw=3)
    for block in range(num_blocks):
        left, right = block * block_size + 0.15, (block + 1) * block_size - 0.15
        ax.plot([left, right], [-0.15, -0.15], "k-", lw=4)
        ax.text((left + right) / 2, -0.75, f"block {block}", ha="center")
    for line, (name, blocks) in enumerate(zip(names, owned, strict=True)):
        y = 3.5 - 1.2 * line
        ax.text(len(slots) + 4.6, y + 0.5, name, va="center")
        shown = [*blocks, *["–"] * (len(tables[line]) - len(blocks))]
        draw_row(ax, (len(slots) + 5, y), shown, "0.93")
    ax.text(len(slots) + 5, 4.75, "block_table")
    ax.text(0, 4.25, "the step, end to end")
    ax.text(len(slots) + 0.3, 3.5, f"query_start_loc: {starts}", va="center")
    ax.text(max(slots[-1], len(slots)) - 0.4, 2, "slot_mapping", va="center")
    ax.set(xlim=(-0.2, num_blocks * block_size + 0.2), ylim=(-0.9, 5.3))
    ax.axis("off")


# The map of the course

PARTS = {  # page: left, bottom, width, height, text
    "09": (16, 47, 18, 12, "09 Request\nids and text, stops"),
    "10": (42, 47, 16, 9, "10 Engine\nstep by step"),
    "11": (42, 60, 16, 9, "11 Scheduler\nwho runs next"),
    "12": (83, 35, 16, 9, "12 Block pool\nwho has what"),
    "08": (66, 47, 16, 12, "08 Runner\none step for all"),
    "04": (25, 15, 48, 25, ""),
    "03": (27, 19, 14, 13, "03 Layers\nnorm, MLP"),
    "02": (42, 19, 14, 13, "02 RoPE\npositions"),
    "01": (57, 19, 14, 13, "01 Attention\nlooks back"),
    "06": (83, 19, 16, 13, "06 KV cache\nkeys and values"),
    "07": (25, 0, 20, 10, "07 Sampler\nfilters and draws"),
    "05": (53, 0, 20, 10, "05 Checkpoint\nweights from disk"),
    "13": (73.8, 20, 8.4, 11, "13 Paged\nattention"),
    "14": (87, 47, 12, 12, "14 CUDA\ngraphs"),
    "15": (87, 62, 12, 8, "15 Fused\ndecode"),
    "16": (0, 9, 13, 12, "16 Tensor\nparallel\nmany devices"),
    "17": (0, 61, 13, 9, "17 Serving\nmany clients"),
    "18": (83, 0, 16, 10, "18 Benchmark\nmeasures it all"),
}
ASIDE = ("18",)
SIGNS = {
    "04": (49, 17),
    "08": (74, 61),
    "09": (25, 61),
    "10": (46.5, 45),
    "13": (80, 14),
}
"""Where "you are here" stands if an arrow or a word is right below the box."""
WAYS: tuple[
    tuple[Point, Point, str, Point], ...
] = (  # from, to, what travels, where that is written
    ((13, 56), (16, 56), "text", (6.5, 56)),
    ((16, 50), (13, 50), "text, grown", (6.5, 50)),
    ((34, 53), (42, 53), "ids", (38, 55)),
    ((58, 53), (66, 53), "", (62, 55)),
    ((43.5, 56), (43.5, 60), "", (50, 58)),
    ((22, 65.5), (22, 59), "", (22, 62)),
    ((84.5, 64.5), (84.5, 44), "blocks", (71, 66.5)),
    ((97.5, 35), (97.5, 32), "", (91, 33)),
    ((70, 47), (70, 40), "ids, positions", (60.5, 43.5)),
    ((71, 25.5), (73.8, 25.5), "", (77, 28)),
    ((35, 15), (35, 10), "scores", (42, 12.3)),
    ((63, 10), (63, 15), "weights", (69, 12.3)),
    ((20, 5), (20, 47), "next id", (15.5, 26)),
)


def draw_map(
    ax: Axes, here: str = "", travels: Mapping[str, str] | None = None
) -> None:
    """A request's way through the engine; the number in a box is the page that builds it.

    Args:
        ax: of a figure that is about 8 by 4.9 inches.
        here: the number of a page, such as "01", which is then framed.
        travels: what to write at an arrow in place of "text", "ids", "scores" and so on.

    Raises:
        ValueError: if the map has no page of that number.
    """
    if here and here not in PARTS:
        raise ValueError(f"no page {here!r} on the map: choose one of {sorted(PARTS)}")
    style: dict[str, Any] = {"ha": "center", "va": "center", "size": 9}
    for page, (left, bottom, width, height, text) in PARTS.items():
        look: dict[str, Any] = {"facecolor": "0.93" if page == "04" else "white"}
        look["linestyle"] = "--" if page in ASIDE else "-"
        if page == here:
            look = {"facecolor": PALE_BLUE, "edgecolor": BLUE, "linewidth": 2.5}
        draw_box(ax, (left, bottom), (width, height), text, fontsize=9, **look)
    for start, end, what, where in WAYS:
        both = end == (73.8, 25.5)  # the cache is written and read
        draw_arrow(ax, start, end, arrowstyle="<|-|>" if both else "-|>")
        said = (travels or {}).get(what, what)
        ax.text(*where, said, fontstyle="italic", **style)
    said = (travels or {}).get("04", "04 Qwen3: the layers")
    ax.text(49, 36, said, **style)
    ax.plot([20, 25], [5, 5], "k-", lw=1)  # from the sampler, then up
    ax.plot([58, 84.5], [64.5, 64.5], "k-", lw=1)  # from the scheduler, then down
    ax.plot([13, 22], [65.5, 65.5], "k-", lw=1)  # from the clients, then down
    ax.plot([82, 87], [53, 53], "k-", lw=1)
    if here != "15":  # or else "you are here" stands there
        ax.plot([93, 93], [59, 62], "k-", lw=1)  # from the graphs to their kernels
    ax.plot([82.2, 83], [25.5, 25.5], "k-", lw=1)  # from the kernels to the cache
    ax.plot([13, 25], [17, 17], "k-", lw=1)  # from the ranks to what they share
    if here:
        left, bottom, width, height, _ = PARTS[here]
        place = SIGNS.get(here, (left + width / 2, bottom - 2))
        style |= {"color": BLUE, "weight": "bold"}
        ax.text(*place, "you are here", **style)
    ax.set(xlim=(-1, 100), ylim=(-3, 70.5))
    ax.axis("off")
