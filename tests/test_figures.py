"""The drawing helpers of the pages: what a colour means, who can see it, what is drawn."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
import matplotlib as mpl
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from folo_lib.attention import create_causal_mask, repeat_kv
from folo_lib.course import figures
from folo_lib.course.figures import CACHE, KEYS, QUERIES, Look
from folo_lib.kv_cache import AttentionMetadata

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
STYLE = mpl.rc_params_from_file(
    ROOT / "notebooks" / "folo.mplstyle", use_default_template=False
)
LOOKS = {name: look for name, look in vars(figures).items() if isinstance(look, Look)}


@pytest.fixture
def ax() -> Any:
    return Figure(figsize=(6, 4)).subplots()


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def boxes(ax: Any, look: Look) -> list[tuple[float, float]]:
    """Where boxes of this colour stand."""
    colour = to_hex(look.colour)
    patches = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    return [p.get_xy() for p in patches if to_hex(p.get_facecolor()) == colour]


# The palette


def test_every_meaning_has_a_look() -> None:
    meanings = {"QUERIES", "KEYS", "VALUES", "CACHE", "HOST", "DEVICE"}
    meanings |= {"PREFILL", "DECODE", "HUGGING_FACE", "US"}
    assert meanings <= {*LOOKS}
    together = [look for group in figures.TOGETHER for look in group]
    assert sorted(together) == sorted(LOOKS.values())


def test_a_colour_means_one_thing() -> None:
    colours = [look.colour for name, look in LOOKS.items() if name != "OTHER"]
    assert len(set(colours)) == len(colours)


def test_the_style_cycles_through_the_palette() -> None:
    cycle = STYLE["axes.prop_cycle"].by_key()
    assert [to_hex(c).upper() for c in cycle["color"]] == [*figures.CYCLE]
    dashes = list(zip(cycle["color"], cycle["linestyle"], strict=True))
    assert len({dash for _, dash in dashes[:4]}) == 4


def test_widgets_look_like_pages() -> None:
    pytest.importorskip("ipywidgets")
    from folo_lib.course.widgets import base

    assert base.BLUE == figures.BLUE
    own = {"axes.prop_cycle", "axes.grid"}  # one colour, and a grid where it helps
    for name in STYLE.keys() & base.STYLE.keys() - own:
        assert STYLE[name] == mpl.RcParams({name: base.STYLE[name]})[name], name


def test_widgets_take_their_colours_from_the_palette() -> None:
    palette = {v for v in vars(figures).values() if isinstance(v, str) and v[0] == "#"}
    for path in (ROOT / "folo_lib/course/widgets").glob("*.py"):
        found = {*re.findall(r'"(#[0-9A-F]{6})"', path.read_text(encoding="utf-8"))}
        assert not found & palette, path.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_take_their_colours_from_the_palette(page: Path) -> None:
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            assert not re.search(r'"#?[0-9A-Fa-f]{6}"', source), source


# Machado, Oliveira and Fernandes 2009, severity 1: what is seen without one kind of cone.
BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
XYZ = torch.tensor(
    ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
)


def to_lab(colour: str, blindness: str) -> torch.Tensor:
    """CIELAB of a colour as somebody sees it: equal distances are equally visible."""
    rgb = torch.tensor(to_rgb(colour))
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (torch.tensor(BLINDNESS[blindness], dtype=torch.float32) @ linear).clamp(
        0, 1
    )
    xyz = XYZ @ seen / torch.tensor((0.9505, 1.0, 1.089))
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)))


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_every_eye_tells_apart_what_stands_together(blindness: str) -> None:
    for group in [*figures.TOGETHER, figures.CYCLE]:
        colours = [look.colour if isinstance(look, Look) else look for look in group]
        for one, other in combinations(colours, 2):
            distance = to_lab(one, blindness) - to_lab(other, blindness)
            assert distance.norm() > 15, (one, other)


def test_what_stands_together_differs_without_colour() -> None:
    for group in figures.TOGETHER:
        for sign in ("hatch", "marker", "dash"):
            assert len({getattr(look, sign) for look in group}) == len(group), sign


@pytest.mark.parametrize("name", LOOKS)
def test_looks_can_be_drawn(name: str, ax: Any) -> None:
    look = LOOKS[name]
    [bar] = ax.bar([0], [1], **look.bar)
    assert to_hex(bar.get_facecolor()) == to_hex(look.colour)
    assert (bar.get_hatch() or "") == look.hatch
    [line] = ax.plot([0, 1], **look.line)
    assert (line.get_marker(), line.get_linestyle()) == (look.marker, look.dash)
    ax.figure.canvas.draw()


def test_systems_have_a_label_and_a_look() -> None:
    assert figures.look_of("folo_lib") == ("folo_lib", figures.US)
    assert figures.look_of("huggingface")[1] == figures.HUGGING_FACE
    assert figures.look_of("vllm") == ("vllm", figures.OTHER)


@pytest.mark.parametrize(
    ("colour", "ink"),
    [
        ("white", "black"),
        ("black", "white"),
        (figures.YELLOW, "black"),
        (figures.INDIGO, "white"),
        (figures.SKY, "black"),
        ("0.2", "white"),
    ],
)
def test_ink_can_be_read(colour: str, ink: str) -> None:
    assert figures.ink_on(colour) == ink


# Boxes, arrows and labels


def test_a_box_has_its_text_in_the_middle(ax: Any) -> None:
    box = figures.draw_box(ax, (2, 3), (4, 2), 17, facecolor="black")
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((2, 3), 4, 2)
    [text] = ax.texts
    assert (text.get_position(), text.get_text()) == ((4, 4), "17")
    assert text.get_color() == "white"
    assert figures.draw_box(ax, (0, 0)).get_facecolor() == (1, 1, 1, 1)
    assert len(ax.texts) == 1  # none without text
    figures.draw_box(ax, (0, 0), text=0)
    assert ax.texts[-1].get_text() == "0"


def test_text_on_a_hatch_has_a_ground(ax: Any) -> None:
    figures.draw_box(ax, (0, 0), text="A0", **CACHE.bar)
    [text] = ax.texts
    assert to_hex(text.get_bbox_patch().get_facecolor()) == to_hex(CACHE.colour)


def test_a_row_is_boxes_side_by_side(ax: Any) -> None:
    figures.draw_row(ax, (1, 2), "abc", ["white", KEYS.colour, "white"])
    assert [patch.get_xy() for patch in ax.patches] == [(1, 2), (2, 2), (3, 2)]
    assert texts(ax) == ["a", "b", "c"]
    assert boxes(ax, KEYS) == [(2, 2)]
    figures.draw_row(ax, (0, 0), range(2), KEYS.colour)
    assert len(boxes(ax, KEYS)) == 3


def test_an_arrow_leads_from_start_to_end(ax: Any) -> None:
    figures.draw_arrow(ax, (0, 0), (1, 1), linestyle="--")
    [arrow] = ax.texts
    assert arrow.xy == (1, 1) and arrow.get_position() == (0, 0)
    assert arrow.arrow_patch.get_linestyle() == "--"


def test_lines_are_labelled_where_they_end(ax: Any) -> None:
    ax.plot([1, 2, 3], [10, 20, 30], color="red", label="up")
    ax.plot(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 4.0]), label="down")
    ax.plot([0, 9], [0, 0])  # no label
    figures.label_lines(ax, fontsize=8)
    assert texts(ax) == ["up", "down"]
    assert [text.xy for text in ax.texts] == [(3, 30), (2, 4)]
    assert ax.texts[0].get_color() == "red" and ax.texts[0].get_fontsize() == 8


def test_ticks_are_numbers_with_commas(ax: Any) -> None:
    ax.set_xscale("log", base=2)
    figures.label_ticks(ax.xaxis, {128: "a", 8192: "b"})
    assert [label.get_text() for label in ax.get_xticklabels()] == ["128", "8,192"]
    assert not len(ax.xaxis.get_minorticklocs())


def test_titles_of_several_axes() -> None:
    axes = Figure().subplots(1, 2)
    figures.set_titles(axes, ["recorded", "now"])
    assert [ax.get_title() for ax in axes] == ["recorded", "now"]
    with pytest.raises(ValueError):
        figures.set_titles(axes, ["one"])


def test_values_of_a_heat_map(ax: Any) -> None:
    figures.write_values(ax, torch.tensor([[0.0, 0.62], [1.0, 0.5]]), fontsize=7)
    assert texts(ax) == [".00", ".62", "1.00", ".50"]
    assert [text.get_color() for text in ax.texts] == [
        *("black", "white", "white", "black")
    ]
    assert [text.get_position() for text in ax.texts] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
    ]


# Attention


@pytest.mark.parametrize(("new", "length"), [(6, 6), (2, 6), (1, 6), (3, 4)])
def test_a_mask_is_drawn_as_it_is(ax: Any, new: int, length: int) -> None:
    visible = create_causal_mask(new, length)[0, 0] == 0
    figures.draw_mask(ax, visible, "title")
    cached = length - new
    assert boxes(ax, CACHE) == [
        (j, i + cached) for i in range(new) for j in range(cached)
    ]
    wanted = [(j, i + cached) for i, j in visible.nonzero().tolist() if j >= cached]
    assert boxes(ax, KEYS) == wanted
    assert texts(ax).count("−∞") == int((~visible).sum())
    assert len(ax.patches) == length * length
    assert ("cached" in texts(ax)) == (cached > 0)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_heads_are_drawn_to_their_partners(ax: Any, num_kv_heads: int) -> None:
    heads = torch.arange(num_kv_heads).view(-1, 1, 1)
    partners = repeat_kv(heads, 4 // num_kv_heads).flatten().tolist()
    figures.draw_heads(ax, partners, "")
    ends = [line.get_xdata()[1] for line in ax.get_lines()]
    places = [text.get_position()[0] for text in ax.texts if "KV" in text.get_text()]
    assert ends == pytest.approx([places[partner] for partner in partners])
    assert f"cache: {num_kv_heads / 4:.0%}" in texts(ax)


def test_a_lookup_shows_query_and_keys(ax: Any) -> None:
    figures.draw_lookup(ax, torch.tensor([1.0, 0.0]), torch.eye(2))
    assert texts(ax) == ["key 0", "key 1", "query"]
    assert ax.get_lines()[0].get_color() == QUERIES.colour


def test_a_step_is_written_into_its_slots(ax: Any) -> None:
    metadata = AttentionMetadata(
        block_size=4,
        slot_mapping=torch.tensor([1, 4, 5, 6]),
        block_table=torch.tensor([[2, 0], [1, 0]]),
        query_start_loc=torch.tensor([0, 1, 4]),
        seq_lens=torch.tensor([6, 3]),
        query_lens_list=[1, 3],
        seq_lens_list=[6, 3],
    )
    figures.draw_step(ax, metadata, block_size=4)
    inside = {text.get_position(): text.get_text() for text in ax.texts}
    in_cache = {x: inside.get((x + 0.5, 0.5)) for x in range(12)}
    names = {0: "A4", 1: "A5", 4: "B0", 5: "B1", 6: "B2"}
    names |= {8: "A0", 9: "A1", 10: "A2", 11: "A3"}
    assert in_cache == {x: names.get(x) for x in range(12)}
    assert [inside[x + 0.5, 3.5] for x in range(4)] == ["A5", "B0", "B1", "B2"]
    assert [x for x, y in boxes(ax, CACHE) if y == 0] == [0, 8, 9, 10, 11]
    arrows = [text for text in ax.texts if text.get_text() == ""]
    assert [arrow.xy[0] - 0.5 for arrow in arrows] == [1, 4, 5, 6]


# The map


def test_the_map_has_every_page() -> None:
    numbers = [page.stem[:2] for page in PAGES if page.stem[:2] != "00"]
    assert sorted(figures.PARTS) == numbers
    for page in PAGES[1:]:
        first = json.loads(page.read_text(encoding="utf-8"))["cells"][0]["source"]
        title = "".join(first).split("\n")[0]
        said = figures.PARTS[page.stem[:2]][4].replace("\n", " ")
        number, words = title.removeprefix("# ").split(" · ")
        name = words.removesuffix("s") if page.stem[:2] == "09" else words
        assert not said or said.startswith(f"{number} {name}"), page.name


def test_parts_of_the_map_do_not_overlap() -> None:
    for (one, a), (other, b) in combinations(figures.PARTS.items(), 2):
        apart = a[0] + a[2] < b[0] or b[0] + b[2] < a[0]
        apart |= a[1] + a[3] < b[1] or b[1] + b[3] < a[1]
        inside = other == "04" or one == "04"  # the model holds its layers
        assert apart or (inside and {one, other} & {"01", "02", "03"}), (one, other)


@pytest.mark.parametrize("here", ["", *figures.PARTS])
def test_the_map_says_where_the_reader_is(ax: Any, here: str) -> None:
    figures.draw_map(ax, here)
    framed = [
        p for p in ax.patches if to_hex(p.get_edgecolor()).upper() == figures.BLUE
    ]
    assert len(framed) == bool(here)
    assert ("you are here" in texts(ax)) == bool(here)
    if here:
        assert framed[0].get_xy() == figures.PARTS[here][:2]


def test_the_map_says_what_travels(ax: Any) -> None:
    figures.draw_map(ax, travels={"ids": "4 ids", "04": "04 Qwen3: 6 layers"})
    assert {"4 ids", "04 Qwen3: 6 layers", "weights"} <= {*texts(ax)}
    with pytest.raises(ValueError, match=r"'99'.*'01'"):
        figures.draw_map(ax, "99")


class TestTransformer:
    def draw(self, **kwargs: Any) -> Any:
        ax = Figure(figsize=(8, 2.5)).subplots()
        figures.draw_transformer(ax, **kwargs)
        return ax

    def framed(self, ax: Any) -> int:
        return sum(
            to_hex(box.get_edgecolor()) == figures.BLUE.lower() for box in ax.patches
        )

    def test_every_step_has_its_text_and_page(self) -> None:
        ax = self.draw(text="in", answer="out", num_layers=28)
        texts = [text.get_text() for text in ax.texts]
        assert {step[3] for step in figures.STEPS.values()} <= set(texts)
        assert {"in", "out", "a layer, 28 times in a row"} <= set(texts)
        assert self.framed(ax) == 0

    def test_here_is_framed(self) -> None:
        assert self.framed(self.draw(here=["qkv", "attend"])) == 2

    def test_an_unknown_step(self) -> None:
        with pytest.raises(ValueError, match="atend"):
            self.draw(here=["atend"])

    def test_boxes_do_not_overlap(self) -> None:
        spans = [
            (left, left + width, bottom)
            for left, bottom, width, *_ in figures.STEPS.values()
        ]
        for (a, b, y), (c, d, z) in combinations(spans, 2):
            assert y != z or b <= c or d <= a
