"""Stored pictures are compared with those that a page draws now."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import pictures  # noqa: E402  tools/ is not a package

pytest_plugins = ["pytester"]


def draw(
    last: float = 3, title: str = "Ten animals", colour: str = "C0", width: float = 7
) -> bytes:
    figure, ax = plt.subplots(figsize=(width, 3.2))
    ax.plot([1, 4, 2, last], color=colour)
    ax.set(title=title, xlabel="token", ylabel="probability in %")
    return encode(figure)


def encode(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def change(png: bytes, how: str) -> bytes:
    """The picture as another machine might draw it."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    pixels = np.asarray(image)
    changed = {
        "softer edges": lambda: image.filter(ImageFilter.GaussianBlur(0.6)),
        "a pixel away": lambda: Image.fromarray(np.roll(pixels, (1, 1), (0, 1))),
        "a row less": lambda: Image.fromarray(pixels[:-1]),
    }[how]()
    buffer = io.BytesIO()
    changed.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["softer edges", "a pixel away", "a row less"])
def test_another_machine_may_draw_a_little_differently(how: str) -> None:
    png = draw()
    assert change(png, how) != png
    assert pictures.find_difference(png, change(png, how)) is None


@pytest.mark.parametrize(
    "other",
    [{"last": 2.5}, {"title": "Ten words"}, {"colour": "C1"}, {"width": 6}],
    ids=str,
)
def test_another_figure_is_noticed(other: dict[str, float | str]) -> None:
    found = pictures.find_difference(draw(), draw(**other))  # type: ignore[arg-type]
    assert found and ("pixels" if "width" in other else "% of the picture") in found


def test_a_transparent_ground_counts_as_white() -> None:
    figure, ax = plt.subplots()
    ax.plot([1, 2])
    clear, white = io.BytesIO(), io.BytesIO()
    figure.savefig(clear, transparent=True)
    figure.savefig(white, facecolor="white")
    plt.close(figure)
    assert pictures.find_difference(clear.getvalue(), white.getvalue()) is None


CODE = """\
import matplotlib.pyplot as plt
plt.plot([1, 4, 2, {last}])
plt.show()"""


def make_cell(last: float, tags: Sequence[str] = ()) -> nbformat.NotebookNode:
    """Draws a line that ends at 3; stored is one that ends at `last`."""
    figure, ax = plt.subplots()
    ax.plot([1, 4, 2, last])
    words = (
        f"<Figure size {figure.bbox.width:.0f}x{figure.bbox.height:.0f} with 1 Axes>"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight", dpi=figure.dpi)
    plt.close(figure)
    data = {
        "image/png": base64.b64encode(buffer.getvalue()).decode(),
        "text/plain": words,
    }
    output = nbformat.v4.new_output("display_data", data)
    return nbformat.v4.new_code_cell(
        CODE.format(last=3),
        outputs=[output],
        execution_count=1,
        metadata={"tags": [*tags]},
    )


def test_nbval_fails_at_a_stale_picture(pytester: pytest.Pytester) -> None:
    pytest.importorskip("nbval")
    cells = [make_cell(3), make_cell(2), make_cell(2, ["nbval-ignore-output"])]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    page = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(page, pytester.path / "page.ipynb")
    for name in ("conftest.py", "tools/pictures.py"):
        target = pytester.path / name
        target.parent.mkdir(exist_ok=True)
        target.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    result = pytester.runpytest_subprocess(
        "--nbval", "page.ipynb", "-p", "no:cacheprovider"
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["*page.ipynb::Cell 1*", "*The stored picture is stale: *"]
    )
    assert list((pytester.path / "build" / "pictures").glob("page-*.png"))
