"""Formulas, typeset by matplotlib when the site is built.

Sphinx would leave them to MathJax, which a reader's browser fetches from somebody else's server.
So `html_math_renderer` is set to the renderer here, which writes each formula as SVG into the
page, in the colour of the text around it, with its source as the text for screen readers.
"""

from __future__ import annotations

import html
import io
import re
from typing import Any

import matplotlib as mpl
from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from sphinx.application import Sphinx

INK = "#123456"  # stands for the colour of the text
STYLE: Any = {"mathtext.fontset": "stix", "svg.fonttype": "path", "svg.hashsalt": "x"}


def draw_formula(tex: str, size: float) -> str:
    """The formula as an `<svg>` element.

    Args:
        tex: what stands between the dollar signs; matplotlib knows a part of TeX.
        size: of its letters, in points.

    Raises:
        ValueError: if matplotlib cannot typeset it.
    """
    source, buffer = " ".join(tex.split()), io.BytesIO()
    with mpl.rc_context(STYLE):
        font = FontProperties(size=size)
        depth = math_to_image(f"${source}$", buffer, font, format="svg", color=INK)
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    for unwanted in ("metadata", "style"):  # the style would hold for the whole page
        svg = re.sub(rf"<{unwanted}\b.*?</{unwanted}>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, flags=re.S)  # a white ground
    label = html.escape(source, quote=True)
    look = f'role="img" aria-label="{label}" style="vertical-align: {-depth:.2f}pt"'
    return svg.replace("<svg", f"<svg {look}", 1).replace(INK, "currentColor")


def write_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(draw_formula(node.astext(), 12))
    raise nodes.SkipNode


def write_block(translator: Any, node: nodes.math_block) -> None:
    formula = draw_formula(node.astext(), 14)
    translator.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer(
        "course_formulas", (write_inline, None), (write_block, None)
    )
    return {"version": "1", "parallel_read_safe": True}
