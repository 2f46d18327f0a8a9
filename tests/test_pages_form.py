"""How a page is laid out: install cell, links, captions, exercises, what a student writes,
how much of it is code, and the map on page 00."""

from __future__ import annotations

import ast
import base64
import copy
import io
import re
import struct
import sys
import tokenize
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("notebooks/*.ipynb"))

sys.path.insert(0, str(ROOT / "tools"))
import layout  # noqa: E402  tools/ is not a package
import run_pages  # noqa: E402
import student  # noqa: E402

Notebook = nbformat.NotebookNode

INSTALL = """\
# On Colab and Kaggle this fetches the course; anywhere else it does nothing.
import os

if not os.path.exists("folo.mplstyle") and (
    "COLAB_RELEASE_TAG" in os.environ or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
):
    !git clone -q --depth 1 https://github.com/folovllm/FoloVLLM
    %pip install -q "./FoloVLLM[pages]"
    %cd -q FoloVLLM/notebooks"""

REPOSITORY = "https://github.com/folovllm/FoloVLLM"
COLAB = "https://colab.research.google.com/github/folovllm/FoloVLLM/blob/main/notebooks"
BINDER = "https://mybinder.org/v2/gh/folovllm/FoloVLLM/main?urlpath=lab/tree/notebooks"

MAX_CELL, MAX_CLASS, MAX_PAGE = 30, 80, 450  # lines of code, the first about 25

MAX_WIDTH = 900  # pixels: 8 inches at 110 dpi, and the margin that a tight box adds


def cells_of(page: Path) -> list[Notebook]:
    cells: list[Notebook] = nbformat.read(page, as_version=4).cells
    return cells


def has_tag(cell: Notebook, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def is_exported(cell: Notebook) -> bool:
    return cell.cell_type == "code" and cell.source.startswith("#| export")


def count_code_lines(source: str) -> int:
    """Lines with code on them: no comments, no blank ones, no docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
    layout |= {tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            end = value.end_lineno or value.lineno
            lines.difference_update(range(value.lineno, end + 1))
    return len(lines)


def holds_class_or_kernel(source: str) -> bool:
    nodes = list(ast.walk(ast.parse(source)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    marks = [ast.unparse(mark) for each in functions for mark in each.decorator_list]
    kernels = any(mark.startswith("triton.") for mark in marks)
    return kernels or any(isinstance(node, ast.ClassDef) for node in nodes)


def pictures(cell: Notebook) -> list[Notebook]:
    """The outputs that are figures."""
    outputs = cell.get("outputs", [])
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize(
    ("where", "folder", "fetches"),
    [
        ("COLAB_RELEASE_TAG", "content", True),
        ("KAGGLE_KERNEL_RUN_TYPE", "working", True),
        ("COLAB_RELEASE_TAG", "notebooks", False),  # run once more
        ("KAGGLE_KERNEL_RUN_TYPE", "notebooks", False),
        (None, "content", False),
        (None, "notebooks", False),
    ],
)
def test_install_cell_fetches_the_course_on_colab_and_kaggle_alone(
    where: str | None,
    folder: str,
    fetches: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("content", "working", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "notebooks" / "folo.mplstyle").touch()
    monkeypatch.chdir(tmp_path / folder)
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    if where is not None:
        monkeypatch.setenv(where, "Interactive")
    shell = Mock()
    code = TransformerManager().transform_cell(INSTALL)
    exec(compile(code, "install", "exec"), {"get_ipython": lambda: shell})
    done = [call.args for call in shell.mock_calls]
    expected = [
        (f"git clone -q --depth 1 {REPOSITORY}",),
        ("pip", 'install -q "./FoloVLLM[pages]"'),
        ("cd", "-q FoloVLLM/notebooks"),
    ]
    assert done == (expected if fetches else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
class TestPages:
    def test_exported_cells_are_short(self, page: Path) -> None:
        for cell in filter(is_exported, cells_of(page)):
            most = MAX_CLASS if holds_class_or_kernel(cell.source) else MAX_CELL
            lines = count_code_lines(cell.source)
            assert lines <= most, f"cell {cell.id}: {lines} lines of code, not {most}"

    def test_exports_no_more_than_can_be_read(self, page: Path) -> None:
        exported = filter(is_exported, cells_of(page))
        lines = sum(count_code_lines(cell.source) for cell in exported)
        assert lines <= MAX_PAGE, lines

    def test_a_word_and_an_output_stand_between_exported_cells(
        self, page: Path
    ) -> None:
        found = {"word", "output"}
        for cell in cells_of(page):
            if is_exported(cell) and cell.id != "imports":
                assert found == {"word", "output"}, f"before {cell.id}: only {found}"
                found = set()
            elif cell.cell_type == "markdown":
                found.add("word")
            elif cell.cell_type == "code" and cell.outputs:
                found.add("output")

    def test_begins_with_the_install_cell(self, page: Path) -> None:
        first = next(cell for cell in cells_of(page) if cell.cell_type == "code")
        assert first.id == "install"
        assert first.source == INSTALL
        assert first.metadata == {"jupyter": {"source_hidden": True}}
        assert not first.outputs

    def test_links_to_its_copies_under_the_summary(self, page: Path) -> None:
        _, summary, links, *_ = cells_of(page)[0].source.split("\n\n")
        assert summary.startswith("> ")
        colab = f"[Open in Colab]({COLAB}/{page.name})"
        binder = f"[Open in Binder]({BINDER}/{page.name})"
        assert links.split("\n")[0].strip() == f"{colab} · {binder}"

    def test_each_figure_has_its_caption_behind_it(self, page: Path) -> None:
        cells = cells_of(page)
        for cell, behind in pairwise([*cells, None]):
            caption = behind and run_pages.read_caption(behind)
            figures = pictures(cell)
            if figures:
                assert caption, f"cell {cell.id}: no caption behind it"
            else:
                assert not caption, f"cell {cell.id}: a caption, but no figure"
            for output in figures:
                alt = output.metadata.get("image/png", {}).get("alt")
                assert alt == caption, f"cell {cell.id}: tools/run_pages.py --save"

    def test_figures_are_numbered(self, page: Path) -> None:
        numbers = [
            int(number)
            for cell in cells_of(page)
            if cell.cell_type == "markdown"
            for number in re.findall(r"^\*\*Figure (\d+)\.\*\*", cell.source, re.M)
        ]
        assert numbers == list(range(1, len(numbers) + 1))
        assert numbers, "no figure"

    def test_figures_fit_the_page(self, page: Path) -> None:
        for cell in cells_of(page):
            for output in pictures(cell):
                png = base64.b64decode(output.data["image/png"])
                width, _ = struct.unpack(">II", png[16:24])
                assert width <= MAX_WIDTH, f"cell {cell.id}: {width} pixels"

    def test_exercises_are_stubs_with_a_task_and_a_check(self, page: Path) -> None:
        cells = cells_of(page)
        places = [i for i, cell in enumerate(cells) if has_tag(cell, "exercise")]
        assert len(places) >= 2
        for number, i in enumerate(places, start=1):
            task, cell, check = cells[i - 1 : i + 2]
            assert task.cell_type == "markdown"
            assert re.search(rf"^\*\*{number}\. .+[.?]\*\* ", task.source, re.M), (
                cell.id
            )
            name = stub_name(cell.source)
            call = f"check_{name}({name})"
            assert check.source.split("\n")[-1] == call, check.id
            assert [output.get("data") for output in check.outputs] == [
                {"text/plain": f"Not yet: {name} is still the stub."}
            ], check.id

    def test_student_tag_is_on_exported_cells_with_a_body_to_write(
        self, page: Path
    ) -> None:
        for cell in filter(student.is_taught, cells_of(page)):
            assert cell.cell_type == "code"
            assert cell.source.startswith("#| export\n"), cell.id
            assert student.taught_functions(cell.source), cell.id
            assert not has_tag(cell, "exercise"), cell.id


def stub_name(source: str) -> str:
    """The name of the one function or class in an exercise's cell; its body must be a stub."""
    (top,) = ast.parse(source).body
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    assert isinstance(top, kinds | ast.ClassDef), source
    assert ast.get_docstring(top), source
    functions = [node for node in ast.walk(top) if isinstance(node, kinds)]
    assert functions
    for function in functions:
        assert ast.unparse(function.body[-1]) == "raise NotImplementedError", source
        documented = ast.get_docstring(function) is not None
        assert len(function.body) == 1 + documented, source
        assert function.returns, source
        arguments = [*function.args.args, *function.args.kwonlyargs]
        assert all(a.annotation for a in arguments if a.arg != "self"), source
    return top.name


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = 1", 1),
        ("# a comment\n\nx = 1  # another\n", 1),
        ("x = [\n    1,\n\n    2,\n]", 4),
        ('def f():\n    """One.\n\n    Two.\n    """\n    return 1', 2),
        ('class A:\n    """Text."""\n\n    x: int\n    """What x is."""', 2),
        ('text = """One\n\nThree"""', 3),
    ],
)
def test_lines_of_code_are_counted(source: str, lines: int) -> None:
    assert count_code_lines(source) == lines


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    pass", False),
        ("class A:\n    pass", True),
        ("@triton.jit\ndef f():\n    pass", True),
        ("@triton.autotune(configs=[], key=[])\n@triton.jit\ndef f():\n    pass", True),
        ("@torch.compile\ndef f():\n    pass", False),
    ],
)
def test_classes_and_kernels_are_known(source: str, found: bool) -> None:
    assert holds_class_or_kernel(source) is found


# The heads of the pages say how long they take. Whatever repeats it is compared with them.


def read_map() -> list[tuple[str, str, str, str]]:
    """Title, file, what is built and minutes, as the table of page 00 has them."""
    text = "\n".join(cell.source for cell in cells_of(ROOT / "notebooks/00_tour.ipynb"))
    row = r"^\| \[(.+?)\]\(([\w.]+)\) \| (.+?) \| (\d+) \|$"
    return re.findall(row, text, re.MULTILINE)


def test_the_map_of_page_00_has_every_page_and_its_minutes() -> None:
    pages = [page for page in PAGES if page.stem != "00_tour"]
    heads = [run_pages.read_head(nbformat.read(page, as_version=4)) for page in pages]
    assert [(title, name, int(minutes)) for title, name, _, minutes in read_map()] == [
        (head.title, page.name, head.minutes)
        for head, page in zip(heads, pages, strict=True)
    ]


def test_page_00_and_the_readme_say_the_same_is_built() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for _, name, built, _ in read_map():
        if not name.startswith("appendix"):  # "of this page" there
            assert f"(notebooks/{name}) | {built} |" in readme


class TestAltText:
    """tools/run_pages.py --save gives each figure its caption."""

    def make_page(self, behind: Notebook) -> Notebook:
        data = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 1x1>"}
        text = nbformat.v4.new_output("stream", text="words\n")
        figure = nbformat.v4.new_output("display_data", data)
        code = nbformat.v4.new_code_cell("plot()", outputs=[text, figure])
        return nbformat.v4.new_notebook(cells=[code, behind])

    @pytest.mark.parametrize(
        ("source", "alt"),
        [
            ("**Figure 1.** A line.", "A line."),
            ("**Figure 12.** Two\nlines.\n\nMore text.", "Two lines."),
            ("**Figure 2.** `a_b * 2`, *not* **c**.", "a_b * 2, not c."),
            ("**Figure 2.** As on [page 02](02_rope.ipynb).", "As on page 02."),
            ("**Figure 2.** $q$ and 2 * 3 * 4.", "q and 2 * 3 * 4."),
        ],
    )
    def test_is_the_caption_without_markup(self, source: str, alt: str) -> None:
        page = self.make_page(nbformat.v4.new_markdown_cell(source))
        run_pages.settle(page)
        text, figure = page.cells[0].outputs
        assert figure.metadata == {"image/png": {"alt": alt}}
        assert "metadata" not in text
        nbformat.validate(page)

    @pytest.mark.parametrize(
        "behind",
        [
            nbformat.v4.new_markdown_cell("See **Figure 1.** A line."),
            nbformat.v4.new_markdown_cell("Some text.\n\n**Figure 1.** A line."),
            nbformat.v4.new_code_cell("**Figure 1.** A line."),
        ],
    )
    def test_only_a_caption_counts(self, behind: Notebook) -> None:
        page = self.make_page(behind)
        run_pages.settle(page)
        assert page.cells[0].outputs[1].metadata == {}

    @pytest.mark.parametrize("template", ["classic", "lab", "reveal"])
    def test_nbconvert_shows_it(self, template: str) -> None:
        """The default template does with the course's settings, which JupyterLab loads too."""
        nbconvert = pytest.importorskip("nbconvert")
        config = pytest.importorskip("traitlets.config")
        page = self.make_page(nbformat.v4.new_markdown_cell("**Figure 1.** a < b."))
        run_pages.settle(page)
        before = copy.deepcopy(page)
        for name in ("nbconvert", "server"):
            loader = config.PyFileConfigLoader(
                f"jupyter_{name}_config.py", str(ROOT / "tools" / "jupyter")
            )
            exporter = nbconvert.HTMLExporter(
                template_name=template, config=loader.load_config()
            )
            html, _ = exporter.from_notebook_node(page)
            [picture] = re.findall(r"<img[^>]*>", html)
            assert 'alt="a &lt; b."' in picture and "base64,iVBORw0KGgo=" in picture
        assert page == before


class TestLayout:
    """tools/layout.py folds cells and links the pages."""

    def make_cells(self) -> list[Notebook]:
        png = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})
        said = nbformat.v4.new_output("stream", text="1\n")
        code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
        return [
            text("# 01 · Attention"),
            code("import os"),
            text("## 1. A start"),
            code("import os"),
            code("ax.plot(1)\nplt.show()", outputs=[png]),
            code("print(1)\nplt.show()", outputs=[said, png]),
            code("explorer()", outputs=[png]),
            code("plt.show()"),
            code("plt.show()", outputs=[png], metadata={"tags": ["open"]}),
        ]

    def test_what_sets_up_or_only_draws_is_folded(self) -> None:
        cells = self.make_cells()
        cells[6].metadata["jupyter"] = {"source_hidden": True, "other": 1}
        layout.fold(cells)
        folded = [c.metadata.get("jupyter", {}).get("source_hidden") for c in cells]
        assert [i for i, is_folded in enumerate(folded) if is_folded] == [1, 4]
        assert cells[6].metadata == {"jupyter": {"other": 1}}
        assert cells[8].metadata == {"tags": ["open"]}

    def test_what_says_so_is_folded(self) -> None:
        cells = self.make_cells()
        cells[5].metadata["tags"] = ["folded"]
        layout.fold(cells)
        assert cells[5].metadata["jupyter"] == {"source_hidden": True}

    def test_what_is_written_in_is_open(self) -> None:
        for tag in ("exercise", "student"):
            cells = self.make_cells()
            cells[1].metadata["tags"] = [tag]
            layout.fold(cells)
            assert "jupyter" not in cells[1].metadata

    @pytest.mark.parametrize(
        ("drawn", "later", "is_folded"),
        [
            ("scores = [1]", "print(scores)", False),
            ("scores = [1]", "def f():\n    return scores", False),
            ("scores = [1]", "scores = [2]\nprint(scores)", True),
            ("scores = [1]", "def f(scores):\n    return scores", True),
            ("scores = [1]", "%%time\n%pip list\nprint(1)", True),
            ("for i in range(3): ax.plot(i)", "for i in range(2): print(i)", True),
        ],
    )
    def test_what_computes_for_later_cells_stays_open(
        self, drawn: str, later: str, is_folded: bool
    ) -> None:
        cells = self.make_cells()
        cells[4].source = f"{drawn}\nplt.show()"
        cells[5].source = later
        layout.fold(cells)
        assert ("jupyter" in cells[4].metadata) is is_folded

    def test_saving_a_page_keeps_it(self) -> None:
        page = nbformat.v4.new_notebook(cells=self.make_cells())
        run_pages.settle(page)
        assert page.cells[4].metadata == {"jupyter": {"source_hidden": True}}
        assert page.cells[5].metadata == {}

    def test_links_are_written_once_and_follow_the_pages(self) -> None:
        pages = layout.find_pages()
        head = f"# 01 · A\n\n> B\n\n[Open in Colab]({COLAB}/a) · [Open in Binder]({BINDER}/a)\n\nC"
        first = layout.link_neighbours(head, pages[0], pages)
        assert "Binder](" in first and "← " not in first
        assert f"  \n[01 · Attention]({pages[1].name}) →\n\nC" in first
        second = layout.link_neighbours(first, pages[1], pages)
        assert f"  \n← [00 · Tour]({pages[0].name}) | [02 · RoPE]" in second
        assert layout.link_neighbours(second, pages[1], pages) == second
        last = layout.link_neighbours(second, pages[-1], pages)
        assert last.count("←") == 1 and "→" not in last
        assert layout.link_neighbours(last, pages[0], pages) == first

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
    def test_every_page_is_laid_out(self, page: Path) -> None:
        text = layout.lay_out(page, layout.find_pages())
        assert text == page.read_text(encoding="utf-8"), "python tools/layout.py"
