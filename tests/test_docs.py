"""The documentation site, as far as it can be checked without building it."""

from __future__ import annotations

import copy
import fnmatch
import importlib
import json
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import folo_lib

ROOT = Path(__file__).resolve().parent.parent
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "notebooks"
PAGES = sorted(
    [*NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"), *NOTEBOOKS.glob("appendix_*.ipynb")]
)
MARKDOWN = sorted(
    path
    for path in DOCS.rglob("*.md")
    if not {"pages", "modules", "_ext"} & {*path.relative_to(DOCS).parts[:-1]}
)
FENCE = re.compile(r"^(`{3,})(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)


def extension(name: str) -> ModuleType:
    """One of the modules in docs/_ext."""
    pytest.importorskip(
        "sphinx", reason="Sphinx is missing: pip install -e '.[docs]', or make docs"
    )
    folder = str(DOCS / "_ext")
    sys.path.insert(0, folder)
    try:
        __import__(name)
        return sys.modules[name]
    finally:
        sys.path.remove(folder)


@pytest.fixture
def pages() -> ModuleType:
    return extension("course_pages")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    path = list(sys.path)
    try:
        return runpy.run_path(str(DOCS / "conf.py"))
    finally:
        sys.path[:] = path


def entries(file: Path) -> list[str]:
    """What the toctrees of a file list, from `docs/`."""
    found = []
    for fence in FENCE.finditer(file.read_text(encoding="utf-8")):
        head, *lines = fence[2].splitlines()
        if head == "{toctree}":
            names = [line for line in lines if line and not line.startswith(":")]
            folder = file.parent.relative_to(DOCS)
            found += [(folder / name).as_posix() for name in names if "<" not in name]
    return found


def test_nothing_is_executed_and_nothing_fetched(config: dict[str, Any]) -> None:
    assert config["nb_execution_mode"] == "off"
    assert config["nb_ipywidgets_js"] == {}
    assert not {"sphinx.ext.intersphinx", "sphinx.ext.mathjax"} & {
        *config["extensions"]
    }
    for name in [*config["html_css_files"], *config["html_js_files"]]:
        code = (DOCS / "_static" / name).read_text(encoding="utf-8")
        assert not re.search(r"https:|//\w+\.|@import|fetch\(", code), name


def test_a_picture_goes_before_a_live_widget(config: dict[str, Any]) -> None:
    order = {mime: rank for _, mime, rank in config["nb_mime_priority_overrides"]}
    assert order["image/png"] == 0
    assert order["application/vnd.jupyter.widget-view+json"] is None


def without_the_site(file: Path) -> str:
    """A document as GitHub shows it, which leaves comments out."""
    return re.sub(r"<!--.*?-->\n?", "", file.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: file.stem)
def test_a_document_can_be_read_on_github(file: Path) -> None:
    text = without_the_site(file)
    plain = FENCE.sub("", text)
    assert not re.search(r"^`{3,}\{|^:{3,}|^\{[.#]|\{[a-z:]+\}`", text, re.MULTILINE)
    for link in re.findall(r"\]\(([^()\s#]+)(?:#[^()\s]*)?\)", plain):
        if ":" not in link:
            target = (file.parent / link).resolve()
            assert target.exists(), link
            known = subprocess.run(
                ["git", "check-ignore", "--quiet", str(target)], cwd=ROOT
            )
            assert known.returncode, f"{link} is not committed"
    for title, body in re.findall(r"^(#+ .+)\n((?:(?!#).*\n?)*)", plain, re.MULTILINE):
        assert body.strip() or FENCE.search(text) or title.startswith("# "), title
    assert len(plain.split()) > 15, "an empty page"


def test_what_is_only_on_github_is_not_on_the_site(pages: ModuleType) -> None:
    text = "a\n\n<!-- on GitHub -->\nb\n<!-- end -->\n<!-- on the site:\nc\n-->\n"
    assert pages.choose_the_site(text) == "a\n\nc\n\n"
    for file in MARKDOWN:
        made = pages.choose_the_site(file.read_text(encoding="utf-8"))
        assert not re.search("on GitHub -->|on the site:|<!-- end", made), file


def test_every_document_is_in_one_toctree() -> None:
    known = {path.relative_to(DOCS).with_suffix("").as_posix() for path in MARKDOWN}
    known |= {f"pages/{page.stem}" for page in PAGES}
    listed: list[str] = []
    for file in MARKDOWN:
        here = file.relative_to(DOCS).with_suffix("").as_posix()
        for entry in entries(file):
            matches = sorted(known & {*fnmatch.filter(known, entry)} - {here})
            assert matches, f"{here} lists {entry}, which is nothing"
            listed += matches
    listed.append("api/course")  # by the menu that course_api makes
    assert sorted(listed) == sorted(known - {"index"})


def test_the_pages_are_listed_in_order() -> None:
    listed = entries(DOCS / "index.md")
    assert listed[:2] == ["pages", "pages/*"]  # Sphinx sorts what a pattern matches
    assert [page.stem for page in PAGES][-1].startswith("appendix")


@pytest.fixture
def api() -> ModuleType:
    return extension("course_api")


def test_every_module_has_its_reference(api: ModuleType) -> None:
    modules = {module.name for module in pkgutil.iter_modules(folo_lib.__path__)}
    assert {*api.find_modules()} == modules
    menu = api.modules_table().partition("```")[2]
    for name in modules - api.APART:
        assert f"\n/modules/{name}\n" in menu
    assert "\ncourse\n" in menu
    for page in PAGES:  # a page that exports a module is the one that is named
        found = api.find_modules().get(page.stem.partition("_")[2])
        assert found is None or found == page


def test_what_matters_comes_first(api: ModuleType) -> None:
    from folo_lib import engine, paged_attention, scheduler

    assert api.name_members(engine)[0] == "LLMEngine"
    assert api.name_members(scheduler)[0] == "ContinuousScheduler"
    assert api.name_members(paged_attention)[0] == "TritonBackend"
    for name, matters in api.MATTERS.items():
        assert name in api.find_modules()
        assert hasattr(importlib.import_module(f"folo_lib.{name}"), matters), name


def test_the_reference_of_a_module(api: ModuleType) -> None:
    text = api.write_module("engine", NOTEBOOKS / "10_engine.ipynb")
    assert "Written on page [10 · Engine](../pages/10_engine.ipynb)." in text
    assert "| {py:obj}`LLMEngine <folo_lib.engine.LLMEngine>` | " in text
    assert "\n.. autoclass:: folo_lib.engine.LLMEngine\n" in text
    text = api.write_module("config", NOTEBOOKS / "10_engine.ipynb")
    assert "Written by hand, for page [10 · Engine]" in text


def test_copies_of_the_pages_are_not_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "check-ignore", "--quiet", "docs/pages/00_tour.ipynb"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_site_can_show_the_mathematics_of_a_page(page: Path) -> None:
    draw_formula = extension("course_formulas").draw_formula
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"`[^`]*`", "", FENCE.sub("", "".join(cell["source"])))
            for block, inline in re.findall(
                r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, re.DOTALL
            ):
                draw_formula(block or inline, 12)
            assert not re.search(r"\\\(|\\\[|\\begin\{", text), text


def test_a_formula_becomes_a_drawing_in_the_colour_of_the_text() -> None:
    draw_formula = extension("course_formulas").draw_formula
    svg = draw_formula("\\frac{a}{b} < 1", 12)
    assert svg.startswith("<svg ") and svg.rstrip().endswith("</svg>")
    assert 'aria-label="\\frac{a}{b} &lt; 1"' in svg
    assert "currentColor" in svg and "#" not in re.sub(r'"#[\w-]+"', "", svg)
    assert svg == draw_formula("\\frac{a}{b} < 1", 12)
    with pytest.raises(ValueError):
        draw_formula("\\begin{cases}", 12)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_loses_only_what_no_reader_needs(pages: ModuleType, page: Path) -> None:
    before, after = pages.read_page(page), pages.transform_page(page)
    kept = [cell.get("id") for cell in after["cells"]]
    gone = [cell for cell in before["cells"] if cell.get("id") not in kept]
    for cell in gone:
        first = cell["source"].partition("\n")[0]
        assert cell["id"] == "install" or first.startswith(
            ("#| default_exp", "#| hide")
        )
    for cell in after["cells"]:
        assert cell["cell_type"] != "code" or "#|" not in cell["source"]


def test_links_of_a_page(pages: ModuleType) -> None:
    page, place = NOTEBOOKS / "00_tour.ipynb", DOCS / "pages" / "00_tour.ipynb"
    cases = {
        "01_attention.ipynb": "01_attention.ipynb",
        "01_attention.ipynb#2-part": "01_attention.ipynb#2-part",
        "../docs/solutions/00_tour.md": "../solutions/00_tour.md",
        "../folo_lib/rope.py": f"{pages.REPOSITORY}/blob/main/folo_lib/rope.py",
        "../examples": f"{pages.REPOSITORY}/tree/main/examples",
        "https://arxiv.org/abs/1910.07467": "https://arxiv.org/abs/1910.07467",
        "#here": "#here",
    }
    for link, wanted in cases.items():
        assert pages.map_links(f"see [it]({link}).", page, place) == (
            f"see [it]({wanted})."
        )


def test_links_of_a_document(pages: ModuleType) -> None:
    file = DOCS / "solutions" / "00_tour.md"
    text = "[a](../../notebooks/00_tour.ipynb) [b]\n\n[b]: ../names.md\n"
    wanted = "[a](../pages/00_tour.ipynb) [b]\n\n[b]: ../names.md\n"
    assert pages.map_links(text, file, file) == wanted
    for code in (
        "```md\n[a](../../notebooks/00_tour.ipynb)\n```\n",
        "A call `kernel[(2,)](numbers)`, and ``a`[0](1)`` too.",
    ):
        assert pages.map_links(code, file, file) == code
    page = NOTEBOOKS / "00_tour.ipynb"
    text = "`a[0](1)` [`b`](01_attention.ipynb#x)"
    assert pages.map_links(text, page, DOCS / "index.md") == text.replace(
        "(01", "(pages/01"
    )


def test_a_caption_and_an_alternative_text(pages: ModuleType) -> None:
    image = {"data": {"image/png": ""}, "metadata": {"image/png": {"alt": "A line."}}}
    cell = {
        "cell_type": "code",
        "source": "#| export\nplot()",
        "metadata": {},
        "outputs": [image],
    }
    pages.transform_code(cell)
    assert cell["source"] == "plot()"
    assert cell["metadata"] == {
        "tags": ["export"],
        "mystnb": {"image": {"alt": "A line."}},
    }


def test_backticks_of_docstrings() -> None:
    convert = extension("course_docstrings").convert
    assert convert("`[B, V]` and `-inf`, *args, a_ | b.") == (
        "``[B, V]`` and ``-inf``, *args, a\\_ \\| b."
    )
    assert convert("Of `top_k`s; like `Sampler.sample`.") == (
        "Of :py:obj:`top_k`\\ s; like :py:obj:`Sampler.sample`."
    )


def test_indented_code_of_docstrings() -> None:
    convert = extension("course_docstrings").convert_docstring
    example = ["Of `x`.", "", "Example:", "    >>> a_, *b = `c` | d  # `", "    1_", ""]
    assert convert([*example, "a_ too"]) == [
        "Of :py:obj:`x`.",
        *example[1:],
        "a\\_ too",
    ]
    assert convert(["So:", "", "    f(`x`)", "", "And `y`."]) == [
        "So:",
        "",
        ".. code-block:: python",
        "",
        "    f(`x`)",
        "",
        "And :py:obj:`y`.",
    ]
    section = ["Args:", "    x: `y`.", "", "    z: more."]
    assert convert(section) == ["Args:", "    x: :py:obj:`y`.", "", "    z: more."]


def test_tables_that_are_made_at_build_time() -> None:
    tables = extension("course_tables")
    lines = tables.pages_table().splitlines()
    assert len(lines) == 2 + len(PAGES)
    for page, line in zip(PAGES, lines[2:], strict=True):
        assert f"](pages/{page.name}) |" in line and re.search(r"\| \d+ \|$", line)
    names = tables.course_api.names_table()
    assert names.index("LLMEngine <folo_lib.engine.LLMEngine>") < names.index("RMSNorm")
    assert "`LLM <folo_lib.engine.LLMEngine>` | vLLM's name for `LLMEngine`." in names
    assert "- `check_apply_top_n_sigma`: " in tables.checks_list()
    asked = {
        name
        for path in MARKDOWN
        for name in tables.PLACE.findall(path.read_text(encoding="utf-8"))
    }
    assert asked == {*tables.WRITERS}


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that writes the benchmark page, in a repository without a GPU's results."""
    module = extension("course_benchmark")
    monkeypatch.setattr(module, "GPU_RECORD", ROOT / tmp_path / "gpu.json")
    return module


def test_the_benchmark_of_a_cpu_says_what_it_is(benchmark: ModuleType) -> None:
    text = benchmark.write_page()
    assert "## On a CPU\n\n**This is not a GPU.**" in text
    assert "## One prompt, one answer" in text and "| folo_lib | " in text


def test_the_benchmark_of_a_gpu(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads(benchmark.CPU_RECORD.read_text(encoding="utf-8"))
    record["setup"] |= {"device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0"}
    decode = record["sections"]["decode"]
    decode.append(copy.deepcopy(decode[0]))
    peer = copy.deepcopy(decode[1]["rows"][0]) | {"system": "vllm"}
    decode[1]["rows"].append(peer)
    benchmark.GPU_RECORD.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    text = benchmark.write_page()
    assert "measured on one **NVIDIA H200**, one request at a time" in text
    assert text.startswith("![Tokens per second with 256 mixed requests: folo_lib ")
    assert text.index("| folo_lib |") < text.index("## Set-up")
    assert "| driver, CUDA | 580.1, 13.0 |" in text
    assert "| vLLM | " in text and "The last of 2 recordings." in text
    assert "not a GPU" not in text


def test_the_numbers_of_the_front_page_are_those_of_the_readme() -> None:
    front = extension("course_front")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text, unit in (
        (front.write_front(), "ms"),
        (front.write_chinese_front(), "毫秒"),
    ):
        ratio, alone = re.findall(r"<strong>([\d.]+) ", text)
        assert f"**{ratio} times**" in readme and f"**{alone} ms**" in readme
        assert f"<strong>{alone} {unit}</strong>" in text
        for page in PAGES:
            assert f'href="pages/{page.stem}.html"' in text
        assert "".join(re.findall(r'<span class="u\d" [^>]*title[^>]*>([^<]*)', text))


def test_the_speed_up_is_of_paired_runs(benchmark: ModuleType) -> None:
    slow = {"tpot": {"values": [4.0, 9.0, 4.0]}}
    fast = {"tpot": {"values": [2.0, 3.0, 4.0]}}
    assert benchmark.times_faster(slow, fast, "tpot") == "2.00 (1.00 to 3.00)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_that_is_counted_is_missing(page: Path) -> None:
    """Sections, planted bugs, figures and exercises: one page had lost a heading unnoticed."""
    cells = json.loads(page.read_text("utf-8"))["cells"]
    prose = [c["source"] for c in cells if c["cell_type"] == "markdown"]
    text = "\n".join("".join(source) for source in prose)
    for pattern in (
        r"^## (\d+)\. ",
        r"^\*\*Bug (\d+)",
        r"^\*\*Figure (\d+)\.",
        r"^\*\*(\d+)\. ",
    ):
        numbers = [int(number) for number in re.findall(pattern, text, re.M)]
        assert numbers == list(range(1, len(numbers) + 1)), pattern
