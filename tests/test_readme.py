"""The README in both languages: links, pages, numbers, pictures, and code that runs."""

from __future__ import annotations

import copy
import json
import re
import statistics
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("README.md", "README.zh.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
PAGES = sorted(
    [
        *ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"),
        *ROOT.glob("notebooks/appendix_*.ipynb"),
    ]
)
REPOSITORY = "https://github.com/folovllm/FoloVLLM"
COLAB = "https://colab.research.google.com/github/folovllm/FoloVLLM/blob/main/notebooks"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")

sys.path.insert(0, str(ROOT / "tools"))
import run_pages  # noqa: E402  tools/ is not a package

each_language = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    """tools/draw_readme.py, which is not in a package."""
    pytest.importorskip("ipywidgets")
    import draw_readme

    return draw_readme


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    path = ROOT / "notebooks" / "data" / "throughput_h200.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def without_comments(code: str) -> list[str]:
    return [re.sub(r"\s+# .*$", "", line) for line in code.splitlines()]


# Both languages


def test_each_links_to_the_other_beside_its_badges() -> None:
    for name, other in (NAMES, NAMES[::-1]):
        assert f"]({other})" in TEXTS[name].splitlines()[2]


def test_both_have_the_same_structure() -> None:
    headings = {
        name: re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE)
        for name, text in TEXTS.items()
    }
    assert headings[NAMES[0]] == headings[NAMES[1]]
    assert headings[NAMES[0]].count("#") == 1
    shapes = {
        name: re.findall(r"^(?:- |\||!\[|\*(?=[^*])|```\w+)", text, re.MULTILINE)
        for name, text in TEXTS.items()
    }
    assert shapes[NAMES[0]] == shapes[NAMES[1]]


def test_both_show_the_same_code() -> None:
    english, chinese = (FENCE.findall(text) for text in TEXTS.values())
    assert len(english) >= 7
    for (language, code), (other_language, translated) in zip(
        english, chinese, strict=True
    ):
        assert language == other_language
        assert without_comments(code) == without_comments(translated)


def test_both_lead_to_the_same_places() -> None:
    """But for the headings of their own, which are in the same order, and the front page."""
    headings, places = [], []
    for text in TEXTS.values():
        titles = re.findall(r"^## (.+)$", FENCE.sub("", text), re.MULTILINE)
        anchors = ["#" + title.lower().replace(" ", "-") for title in titles]
        links = [link for link in LINK.findall(text) if link not in NAMES]
        inner = [link for link in links if link.startswith("#")]
        headings.append([anchors.index(link) for link in inner])
        outer = {*links} - {*inner}
        places.append({link.replace("docs/zh.md", "docs/index.md") for link in outer})
    assert places[0] == places[1] and headings[0] == headings[1]


def test_both_name_the_same_numbers() -> None:
    english, chinese = (
        re.findall(r"\d[\d.,]*\d", re.sub(r"\]\([^)]*\)", "", FENCE.sub("", text)))
        for text in TEXTS.values()
    )
    assert sorted(set(english)) == sorted(set(chinese))


@each_language
def test_the_commands_stand_in_the_first_screen(name: str) -> None:
    first = "\n".join(TEXTS[name].splitlines()[:12])
    assert f"git clone {REPOSITORY} && cd FoloVLLM" in first
    assert "\nmake run " in first and "\nmake test " in first


# What they point at


@each_language
def test_links_lead_somewhere(name: str) -> None:
    links = LINK.findall(FENCE.sub("", TEXTS[name]))
    assert len(links) > 30
    assert sum(link.startswith(COLAB) for link in links) == 1  # one button
    for link in links:
        if not link.startswith(("#", COLAB)):
            assert "://" not in link, f"{link}: unknown to the test"
            assert (ROOT / link).exists(), link


@each_language
def test_make_and_tools_know_the_commands(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake ([a-z-]+)", FENCE.sub("", TEXTS[name]))
    targets += re.findall(r"\bmake ([a-z-]+)", TEXTS[name])
    assert {"run", "test", "lab", "student", "docs"} <= {*targets}
    for target in {*targets}:
        assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.M), target
    for path in re.findall(r"python (tools/\w+\.py)", TEXTS[name]):
        assert (ROOT / path).is_file(), path


@each_language
def test_extras_are_those_of_the_package(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = re.findall(r'"\.\[([\w,]+)\]"', TEXTS[name])
    assert extras
    for extra in ",".join(extras).split(","):
        assert extra in project["optional-dependencies"]
    oldest = project["requires-python"].removeprefix(">=")
    assert re.search(rf"Python {re.escape(oldest)} ", TEXTS[name])


# The pages


@each_language
def test_the_table_has_every_page_and_its_minutes(name: str) -> None:
    rows = re.findall(
        r"^\| \[(.+?)\]\(notebooks/([\w.]+)\) \| .+? \| (\d+) \|$",
        TEXTS[name],
        re.MULTILINE,
    )
    total = 0
    expected = []
    for page in PAGES:
        head = run_pages.read_head(nbformat.read(page, as_version=4))
        expected.append((head.title, page.name, str(head.minutes)))
        total += head.minutes
    assert rows == expected
    hours = round(total / 60)
    written = f"{hours} hours", f"{hours} 个小时"
    assert written[NAMES.index(name)] in TEXTS[name], total


# The numbers


def list_speeds(record: dict[str, Any]) -> dict[str, float]:
    """Tokens per second on the mixed workload, of vLLM's starts the better one."""
    made = record["sections"]["throughput"][-1]
    starts = [one["mixed"]["tokens_per_second"] for one in record["sections"]["vllm"]]
    return {
        "folo_lib": made["folo_lib"]["mixed"]["tokens_per_second"],
        "vLLM": max(starts),
        "Hugging Face": made["huggingface"]["rows"][0]["tokens_per_second"],
        "memory": made["folo_lib"]["mixed"]["floor_tokens_per_second"],
    }


def list_tpots(record: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds per token with 1 to 16 requests, of vLLM's starts the faster one."""
    starts = [one["tpot"]["rows"] for one in record["sections"]["vllm"]]
    theirs = [min(row["tpot_ms"] for row in same) for same in zip(*starts, strict=True)]
    ours = [row["tpot_ms"] for row in record["sections"]["tpot"][-1]["rows"]]
    return {"folo_lib": ours[:5], "vLLM": theirs[:5]}


@each_language
def test_figures_are_those_of_the_recording(name: str, record: dict[str, Any]) -> None:
    times, ms = (" times", "ms") if name == "README.md" else (" 倍", "毫秒")
    speeds, tpots = list_speeds(record), list_tpots(record)
    floor = record["sections"]["tpot"][-1]["floor"]["ms"]
    ratio = speeds["folo_lib"] / speeds["vLLM"]
    ours, theirs = (tpots[system][0] for system in ("folo_lib", "vLLM"))
    figures = pytest.importorskip("folo_lib.course.throughput_figures")
    starts = figures.join_waterfall(record)["rows"][-1]["starts"]
    more = [one["tokens_per_second"] / speeds["vLLM"] for one in starts]
    to = " to " if name == "README.md" else " 到 "
    for words in (
        f"**{ratio:.2f}{times}**", f"**{ours:.2f} {ms}**", f"{theirs:.2f} {ms}",
        f"{floor:.3f} {ms}", f"**{min(more):.2f}{to}{max(more):.2f}{times}**",
    ):  # fmt: skip
        assert words in TEXTS[name], words


@each_language
def test_the_caption_says_what_was_measured(name: str, record: dict[str, Any]) -> None:
    setup, sections = record["setup"], record["sections"]
    lines = TEXTS[name].splitlines()
    [caption] = [line for line in lines if line.startswith("*") and "H200" in line]
    for key in ("device", "driver", "cuda", "torch", "python"):
        assert setup[key] in caption, key
    assert f"vLLM {sections['vllm'][-1]['versions']['vllm']}" in caption
    assert "Qwen3-0.6B" in caption and "Qwen3-0.6B's shape" in setup["weights"]
    dates = {sections[one][-1]["date"][:10] for one in ("throughput", "tpot", "vllm")}
    assert len(dates) == 1 and dates.pop() in caption
    sizes = setup["sizes"]["throughput"]
    keys = "num_requests shortest longest prompt_tokens output_tokens"
    for key in keys.split():
        assert f"{sizes[key]:,}" in caption


@each_language
def test_the_plot_in_words(name: str, record: dict[str, Any]) -> None:
    [alt] = [alt for alt, path in IMAGE.findall(TEXTS[name]) if "benchmark" in path]
    for speed in list_speeds(record).values():
        assert f" {speed:,.0f}" in alt
    for times in list_tpots(record).values():
        for number in (min(times), max(times)):
            assert f" {number:.2f}" in alt


# The pictures


@each_language
def test_pictures_are_there_small_and_described(name: str) -> None:
    pictures = IMAGE.findall(TEXTS[name])
    large = [(alt, path) for alt, path in pictures if not path.endswith(".svg")]
    assert len(large) == 2
    for alt, path in pictures:
        assert len(alt) > (80 if (alt, path) in large else 8), path
        assert (ROOT / path).stat().st_size < 500_000


def test_badges_say_what_is_so(drawing: ModuleType, record: dict[str, Any]) -> None:
    badges = drawing.list_badges(record)
    assert {path.name for path in drawing.STATIC.glob("badge-*")} == {*badges}
    for name, svg in badges.items():
        stored = (drawing.STATIC / name).read_text(encoding="utf-8")
        assert stored == svg, f"run tools/draw_readme.py: {name} is out of date"
        assert all(f"docs/_static/{name})" in text for text in TEXTS.values())
    assert "H200, 2026-11-30" in badges["badge-h200.svg"]


def find_difference(stored: Any, drawn: Any) -> float:
    """The most that any twentieth of one picture is darker or lighter than of the other.

    Between 0 and 255. Fonts and versions of matplotlib move letters by a pixel or two; a bar of
    another length, or another word, changes more than that.
    """
    assert abs(stored.width - drawn.width) <= 0.02 * stored.width
    assert abs(stored.height - drawn.height) <= 0.04 * stored.height
    size = 80, round(80 * stored.height / stored.width)
    grey = [
        np.asarray(one.convert("RGB").convert("L").resize(size), float)
        for one in (stored, drawn)
    ]
    return float(np.abs(grey[0] - grey[1]).max())


def test_the_stored_plot_is_that_of_the_recording(
    drawing: ModuleType, record: dict[str, Any], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")

    def draw(record: dict[str, Any]) -> Any:
        with drawing.matplotlib.rc_context(fname=ROOT / "notebooks" / "folo.mplstyle"):
            drawing.draw_benchmark(record).savefig(tmp_path / "plot.png", dpi=200)
        return image.open(tmp_path / "plot.png")

    stored = image.open(drawing.STATIC / "benchmark.png")
    assert find_difference(stored, draw(record)) < 25
    other = copy.deepcopy(record)
    for start in other["sections"]["vllm"]:
        start["mixed"]["tokens_per_second"] *= 0.9
    assert find_difference(stored, draw(other)) > 50


def test_the_stored_story_is_the_drawn_one(drawing: ModuleType) -> None:
    image = pytest.importorskip("PIL.Image")

    def draw(pieces: list[Any]) -> Any:
        with drawing.matplotlib.rc_context(drawing.STYLE):
            figure, _ = drawing.draw_generation(drawing.PROMPT, pieces)
            figure.set_dpi(drawing.DPI)
            canvas = drawing.FigureCanvasAgg(figure)
            canvas.draw()
        return image.fromarray(np.asarray(canvas.buffer_rgba()))

    pieces = drawing.tell_story()
    stored = image.open(drawing.STATIC / "talking.gif")
    assert find_difference(stored, draw(pieces)) < 25
    pieces[6] = drawing.Piece(pieces[6].text, 1 - pieces[6].probability)
    assert find_difference(stored, draw(pieces)) > 40


def test_the_story_is_the_models_own(drawing: ModuleType) -> None:
    story = drawing.PROMPT + "".join(piece.text for piece in drawing.tell_story())
    for text in TEXTS.values():
        [alt] = [alt for alt, path in IMAGE.findall(text) if "talking" in path]
        assert alt.endswith(story.strip())


def test_the_animation_ends_calmly(drawing: ModuleType, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    animation = image.open(ROOT / "docs" / "_static" / "talking.gif")
    assert animation.info["loop"] == 1  # once more, and then it rests
    assert animation.n_frames > 100
    whole = animation.convert("RGB")
    assert whole.getpixel((0, 0)) == (255, 255, 255)  # for dark themes too
    animation.seek(animation.n_frames - 1)
    assert animation.convert("RGB").tobytes() == whole.tobytes()

    pieces = [drawing.Piece(" a", 0.9), drawing.Piece(" deer", 0.05)]
    frames = drawing.draw_story(pieces)
    assert len(frames) == 1 + 1 + len(pieces)
    assert frames[0].tobytes() == frames[-1].tobytes() != frames[1].tobytes()
    drawing.save_animation(frames, tmp_path / "small.gif")
    assert image.open(tmp_path / "small.gif").n_frames == len(frames)


def test_the_plot_can_be_drawn(drawing: ModuleType, record: dict[str, Any]) -> None:
    left, right = drawing.draw_benchmark(record).axes
    assert len({bar.get_hatch() for bar in left.patches}) == 3
    assert len(right.lines) == 3  # the last is what memory allows
    titles = [
        axis.get_title(loc) for axis in (left, right) for loc in ("left", "center")
    ]
    assert sum(map(bool, titles)) == 2  # the helpers' own are replaced


# The code


def test_python_in_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks marked `python`, each as a module of its own."""
    from folo_lib.qwen3 import ATTENTION_BACKENDS

    monkeypatch.setitem(ATTENTION_BACKENDS, "mine", "")  # removed afterwards
    for name in reversed(NAMES):  # but for comments they are the same
        codes = [code for kind, code in FENCE.findall(TEXTS[name]) if kind == "python"]
        programs = [compile(code, name, "exec") for code in codes]
    modules = []
    for number, program in enumerate(programs):
        modules.append(ModuleType(f"readme_{number}"))
        monkeypatch.setitem(sys.modules, modules[-1].__name__, modules[-1])
        exec(program, modules[-1].__dict__)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in printed[:2]] == ["Once", "There"]
    assert printed[2].startswith("The KV cache")
    assert any("logits" in module.__dict__ for module in modules)


def test_figures_of_many_requests_are_the_recorded_ones() -> None:
    path = ROOT / "notebooks" / "data" / "batch_cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    section = record["sections"]["batch"][-1]
    text = " ".join((ROOT / "docs" / "benchmark.md").read_text("utf-8").split())

    def ratio(rows: list[dict[str, Any]], slow: str, time: str = "total") -> str:
        values = {row["system"]: row[time]["values"] for row in rows}
        fast = values.get("folo_lib") or values["with prefix caching"]
        pairs = zip(values[slow], fast, strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.1f}"

    together, many = section["together"]["rows"], section["many"]["rows"]
    prefix = ratio(section["prefix"]["rows"], "without", "ttft")
    alone = section["one"]["rows"]
    fresh = ratio(alone, "huggingface")
    used = [row for row in alone if row["system"] != "folo_lib"]
    used = [row | {"system": row["system"].partition(",")[0]} for row in used]
    # "in a fresh engine and after 200 others"
    assert fresh == ratio(used, "huggingface")
    for words in (
        section["date"][:10],
        f"one greedy request runs {fresh} times as fast as",
        f"{ratio(together, 'huggingface, padded')} times as fast as in one padded",
        f"{ratio(together, 'folo_lib, one by one')} times as fast as one after",
        f"{ratio(many, 'huggingface, batches')} times as fast as in batches of 64",
        f"wait {prefix} times less",
    ):
        assert words in text
