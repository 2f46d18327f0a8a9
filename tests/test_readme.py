"""The README in both languages: links, pages, numbers, pictures, and code that runs."""

from __future__ import annotations

import json
import re
import statistics
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import yaml

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
BINDER = "https://mybinder.org/v2/gh/folovllm/FoloVLLM/main?urlpath=lab/tree/notebooks"
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
    path = ROOT / "notebooks" / "data" / "benchmark_h200.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def rows_of(record: dict[str, Any], section: str) -> dict[Any, dict[str, Any]]:
    """The latest rows, by system, or by system and length where there are several."""
    rows = record["sections"][section][-1]["rows"]
    if section == "prefill":
        return {(row["system"], row["prompt_tokens"]): row for row in rows}
    return {row["system"]: row for row in rows}


def without_comments(code: str) -> list[str]:
    return [re.sub(r"\s+# .*$", "", line) for line in code.splitlines()]


# Both languages


def test_each_links_to_the_other_in_its_first_line() -> None:
    for name, other in (NAMES, NAMES[::-1]):
        assert f"]({other})" in TEXTS[name].partition("\n")[0]


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
    english, chinese = (LINK.findall(text)[1:] for text in TEXTS.values())
    assert sorted(english) == sorted(chinese)


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
    assert len(links) > 40
    for link in links:
        if not link.startswith((COLAB, BINDER)):
            assert "://" not in link, f"{link}: unknown to the test"
            assert (ROOT / link).exists(), link


@each_language
def test_make_and_tools_know_the_commands(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake ([a-z-]+)", FENCE.sub("", TEXTS[name]))
    targets += re.findall(r"\bmake ([a-z-]+)", TEXTS[name])
    assert {"run", "test", "lab", "student", "docs"} <= {*targets}
    assert {"test-browser", "test-batch"} <= {*targets}
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


@each_language
def test_the_citation_is_that_of_the_file(name: str) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    [bibtex] = [
        code for language, code in FENCE.findall(TEXTS[name]) if language == "bibtex"
    ]
    fields = dict(re.findall(r"(\w+)\s+= \{+([^{}]+)\}", bibtex))
    assert fields == {
        "title": citation["title"],
        "author": citation["authors"][0]["name"],
        "version": str(citation["version"]),
        "url": citation["url"],
    }


# The pages


@each_language
def test_the_table_has_every_page_and_its_minutes(name: str) -> None:
    rows = re.findall(
        r"^\| \[(.+?)\]\(notebooks/([\w.]+)\) \| .+? \| (\d+) \| \[Colab\]\((\S+)\) · "
        r"\[Binder\]\((\S+)\) \|$",
        TEXTS[name],
        re.MULTILINE,
    )
    total = 0
    expected = []
    for page in PAGES:
        head = run_pages.read_head(nbformat.read(page, as_version=4))
        copies = f"{COLAB}/{page.name}", f"{BINDER}/{page.name}"
        expected.append((head.title, page.name, str(head.minutes), *copies))
        total += head.minutes
    assert rows == expected
    words = {6: ("six hours", "六个小时"), 7: ("seven hours", "七个小时")}
    words |= {8: ("eight hours", "八个小时"), 9: ("nine hours", "九个小时")}
    words |= {10: ("ten hours", "十个小时")}
    assert words[round(total / 60)][NAMES.index(name)] in TEXTS[name], total


# The numbers


@each_language
def test_ratios_are_those_of_the_recording(
    name: str, drawing: ModuleType, record: dict[str, Any]
) -> None:
    text = TEXTS[name]
    times, to = (" times", "to") if name == "README.md" else (" 倍", "到")
    ratios = drawing.read_ratios(record)
    median, least, most = ratios["huggingface_static"]
    assert f"**{median:.1f}{times}**" in text
    assert f"{least:.2f} {to} {most:.2f}" in text
    median, least, most = ratios["huggingface"]
    assert f"**{median:.0f}{times}**" in text
    assert f"{least:.0f} {to} {most:.0f}" in text

    rows = rows_of(record, "prefill")
    pattern = {
        "README.md": r"Reading, .* ([\d.]+) times as early .* at (\d+) .* ([\d.]+) times at ([\d,]+)",
        "README.zh.md": r"提示词为 (\d+) 个词元时.*的 (\d+) 倍；([\d,]+) .*只有 ([\d.]+) 倍",
    }
    found = re.search(pattern[name], text)
    assert found
    near, size, far, long = found.groups()
    if name == "README.zh.md":
        size, near, long, far = found.groups()
    for length, said in ((size, near), (long, far)):
        pair = [
            rows[system, int(length.replace(",", ""))]
            for system in ("huggingface", "folo_lib")
        ]
        ratio = statistics.median(drawing.paired_ratios(*pair, "ttft"))
        digits = len(said.partition(".")[2])
        assert said == f"{ratio:.{digits}f}"


@each_language
def test_memory_and_the_floor_are_those_of_the_recording(
    name: str, record: dict[str, Any]
) -> None:
    memory = rows_of(record, "memory")
    for system in ("folo_lib", "huggingface"):
        assert f"{memory[system]['peak'] / 1e9:.3f} GB" in TEXTS[name]
    decode = record["sections"]["decode"][-1]["rows"][0]
    assert decode["system"] == "folo_lib"
    ms = "ms" if name == "README.md" else "毫秒"
    assert f"{1e3 * decode['tpot']['median']:.2f} {ms}" in TEXTS[name]
    [floor] = [
        row["seconds"]
        for row in record["sections"]["roofline"][-1]["rows"]
        if row["context"] == decode["prompt_tokens"]
    ]
    assert f"{1e3 * floor:.2f} {ms}" in TEXTS[name]


@each_language
def test_the_caption_says_what_was_measured(name: str, record: dict[str, Any]) -> None:
    setup = record["setup"]
    text = TEXTS[name]
    [caption] = [
        line for line in text.splitlines() if line.startswith("*") and "H200" in line
    ]
    for key in ("device", "driver", "cuda", "torch", "transformers", "python"):
        assert setup[key] in caption, key
    assert "Qwen3-0.6B" in caption and "Qwen3-0.6B's shape" in setup["weights"]
    decode = record["sections"]["decode"][-1]
    prefill = record["sections"]["prefill"][-1]
    assert (
        decode["date"][:10] == prefill["date"][:10] and decode["date"][:10] in caption
    )
    row = decode["rows"][0]
    assert len(row["tpot"]["values"]) == 5
    for number in (row["prompt_tokens"], row["output_tokens"]):
        assert str(number) in caption


@each_language
def test_no_recording_is_left_out(
    name: str, drawing: ModuleType, record: dict[str, Any]
) -> None:
    times, ratios = [], []
    for section in record["sections"]["decode"]:
        alone = {"sections": {"decode": [section]}}
        ours = rows_of(alone, "decode")["folo_lib"]
        times.append(f"{1e3 * ours['tpot']['median']:.2f}")
        ratios.append(f"{drawing.read_ratios(alone)['huggingface_static'][0]:.2f}")
    assert len(times) >= 2
    comma, last = (", ", " and ") if name == "README.md" else ("、", " 和 ")
    for found in (times, ratios):
        assert f"{comma.join(found[:-1])}{last}{found[-1]} " in TEXTS[name]


@each_language
def test_starts_take_as_long_as_recorded(name: str, record: dict[str, Any]) -> None:
    rows = record["sections"]["cold_start"][-1]["rows"]
    assert [row["compile_cache"] for row in rows] == ["empty", "filled"]
    for row in rows:
        unit = "s" if name == "README.md" else "秒"
        assert f" {row['first_token_seconds']:.0f} {unit}" in TEXTS[name]


@each_language
def test_the_plot_in_words(name: str, record: dict[str, Any]) -> None:
    [alt] = [alt for alt, path in IMAGE.findall(TEXTS[name]) if "benchmark" in path]
    for row in rows_of(record, "decode").values():
        assert f" {1 / row['tpot']['median']:.0f}" in alt
    times = {
        key: 1e3 * row["ttft"]["median"]
        for key, row in rows_of(record, "prefill").items()
    }
    ours = [value for (system, _), value in times.items() if system == "folo_lib"]
    theirs = [value for (system, _), value in times.items() if system == "huggingface"]
    for number in (f"{ours[0]:.1f}", f"{ours[-1]:.0f}"):
        assert f" {number} " in alt
    for number in (min(theirs), max(theirs)):
        assert f" {number:.0f} " in alt


# The pictures


@each_language
def test_pictures_are_there_small_and_described(name: str) -> None:
    pictures = IMAGE.findall(TEXTS[name])
    assert len(pictures) == 2
    for alt, path in pictures:
        assert len(alt) > 80, path
        assert (ROOT / path).stat().st_size < 500_000


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
    assert (
        len(left.patches) == 3 and len({bar.get_hatch() for bar in left.patches}) == 3
    )
    assert len({line.get_linestyle() for line in right.lines}) == 2
    assert {axis.get_xlabel() for axis in (left, right)} == {
        "tokens per second",
        "tokens in the prompt",
    }


# The code


def test_python_in_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks marked `python`, one after the other, as one module."""
    from folo_lib.qwen3 import ATTENTION_BACKENDS

    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(ATTENTION_BACKENDS, "mine", "")  # removed afterwards
    for name in reversed(NAMES):  # but for comments they are the same
        codes = [code for kind, code in FENCE.findall(TEXTS[name]) if kind == "python"]
        programs = [compile(code, name, "exec") for code in codes]
    for program in programs:
        exec(program, module.__dict__)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in printed[:2]] == ["Once", "There"]
    assert printed[2].startswith("The KV cache")
    assert all(f"# {printed[-1]}\n" in text for text in TEXTS.values())
    assert module.__dict__["logits"].shape[0] == 1


@each_language
def test_figures_of_many_requests_are_the_recorded_ones(name: str) -> None:
    path = ROOT / "notebooks" / "data" / "batch_cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    section = record["sections"]["batch"][-1]

    def ratio(rows: list[dict[str, Any]], slow: str, time: str = "total") -> str:
        values = {row["system"]: row[time]["values"] for row in rows}
        fast = values.get("folo_lib") or values["with prefix caching"]
        pairs = zip(values[slow], fast, strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.1f}"

    together, many = section["together"]["rows"], section["many"]["rows"]
    prefix = ratio(section["prefix"]["rows"], "without", "ttft")
    times = {
        "en": [
            f"{ratio(together, 'huggingface, padded')} times as fast as in one padded",
            f"{ratio(together, 'folo_lib, one by one')} times as fast as one after",
            f"{ratio(many, 'huggingface, batches')} times as fast as in batches of 64",
            f"wait {prefix} times less",
        ],
        "zh": [
            f"填充成一个批次的 {ratio(together, 'huggingface, padded')} 倍",
            f"逐个运行的 {ratio(together, 'folo_lib, one by one')} 倍",
            f"每批 64 个的 {ratio(many, 'huggingface, batches')} 倍",
            f"缩短到 1/{prefix}",
        ],
    }
    for text in [section["date"][:10], *times["zh" if "zh" in name else "en"]]:
        assert text in TEXTS[name]
