"""How a page is laid out: install cell, links, captions, exercises, what a student writes."""

from __future__ import annotations

import ast
import base64
import re
import struct
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("notebooks/*.ipynb"))

sys.path.insert(0, str(ROOT / "tools"))
import run_pages  # noqa: E402  tools/ is not a package
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

MAX_WIDTH = 900  # pixels: 8 inches at 110 dpi, and the margin that a tight box adds


def cells_of(page: Path) -> list[Notebook]:
    cells: list[Notebook] = nbformat.read(page, as_version=4).cells
    return cells


def has_tag(cell: Notebook, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


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
    def test_begins_with_the_install_cell(self, page: Path) -> None:
        first = next(cell for cell in cells_of(page) if cell.cell_type == "code")
        assert first.id == "install"
        assert first.source == INSTALL
        assert not first.metadata
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
    assert isinstance(top, ast.FunctionDef | ast.ClassDef), source
    assert ast.get_docstring(top), source
    functions = [node for node in ast.walk(top) if isinstance(node, ast.FunctionDef)]
    assert functions
    for function in functions:
        assert ast.unparse(function.body[-1]) == "raise NotImplementedError", source
        documented = ast.get_docstring(function) is not None
        assert len(function.body) == 1 + documented, source
        assert function.returns, source
        arguments = [*function.args.args, *function.args.kwonlyargs]
        assert all(a.annotation for a in arguments if a.arg != "self"), source
    return top.name


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

    def test_nbconvert_shows_it(self) -> None:
        nbconvert = pytest.importorskip("nbconvert")
        page = self.make_page(nbformat.v4.new_markdown_cell("**Figure 1.** a < b."))
        run_pages.settle(page)
        exporter = nbconvert.HTMLExporter(template_name="classic")
        html, _ = exporter.from_notebook_node(page)
        assert 'alt="a &lt; b."' in html
