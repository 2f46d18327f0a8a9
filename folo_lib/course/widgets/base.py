"""What the widgets share: controls above a picture, shown as one mime bundle."""

from __future__ import annotations

import base64
import html
import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib import font_manager, image as png_files
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from folo_lib.course.figures import BLUE as BLUE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
STYLE: Any = {
    "figure.facecolor": "white",
    "figure.dpi": 110,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=[BLUE]),  # and lines without dashes
    "lines.linewidth": 1.8,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "text.parse_math": False,  # a token may hold dollar signs
}
drawing_lock = threading.Lock()  # matplotlib's settings are global

NOTE = "A still picture. In Jupyter, run this cell to {purpose}."
"""Stands below the picture of a widget where no kernel runs."""

BUSY = "folo-busy"
LOOK = """
.folo-widget { position: relative }
.folo-widget::after {
  content: "drawing \\2026"; position: absolute; left: 50%; top: 50%; padding: 3px 9px;
  background: #fff3c4; color: black; border: 1px solid #999; border-radius: 4px;
  visibility: hidden;
}
.folo-widget.folo-busy::after { visibility: visible; transition: visibility 0s 0.3s }
.folo-widget.folo-busy .widget-image { opacity: 0.45; transition: opacity 0s 0.3s }
"""
"""A picture that takes longer than 0.3 s to draw says so."""

HELP = """
const box = this.closest('.folo-widget');
if (box) {
  const name = () => {
    for (const knob of box.querySelectorAll('select, button, [role=slider]'))
      knob.setAttribute('data-lm-suppress-shortcuts', 'true');
    for (const knob of box.querySelectorAll('.widget-slider')) {
      const handle = knob.querySelector('[role=slider], .ui-slider-handle');
      const label = knob.querySelector('.widget-label');
      const value = knob.querySelector('.widget-readout');
      if (!handle || !label) continue;
      const wanted = {'aria-label': label.textContent};
      if (value) wanted['aria-valuetext'] = value.textContent;
      if (value && !isNaN(value.textContent)) wanted['aria-valuenow'] = value.textContent;
      for (const [key, text] of Object.entries(wanted))
        if (handle.getAttribute(key) !== text) handle.setAttribute(key, text);
    }
  };
  new MutationObserver(name).observe(box, {
    childList: true, subtree: true, characterData: true,
    attributes: true, attributeFilter: ['aria-valuenow'],
  });
  name();
}
"""
"""Names and exact values of sliders for those who hear them, which ipywidgets does not give, and
the arrow keys for a drop-down list, which JupyterLab keeps for itself where it is not told so."""


class CourseWidget(ABC):
    """Shows itself as a live widget and, in the same output, as a picture.

    Attributes:
        name: of the function that made it.
        controls: by name, in the order of the tab key.
        box: all of it, an ipywidgets box.
    """

    name: str
    controls: dict[str, Any]
    box: Any
    purpose = "move the sliders"

    @abstractmethod
    def picture(self) -> bytes:
        """What stands for the widget where no kernel runs, as PNG."""

    def still(self) -> bytes:
        """The picture, and below it a line that says how to get the widget."""
        return add_note(self.picture(), NOTE.format(purpose=self.purpose))

    @abstractmethod
    def alt_text(self) -> str:
        """The picture in words."""

    def __repr__(self) -> str:
        return f"{self.name}: controls in JupyterLab, a picture elsewhere"

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One output with the live view and the picture; each front end takes its best."""
        data = {
            "text/plain": repr(self),
            "image/png": base64.b64encode(self.still()).decode(),
            WIDGET_VIEW: {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.box.model_id,
            },
        }
        return data, {"image/png": {"alt": self.alt_text()}}


class Explorer(CourseWidget):
    """Controls above a picture that is drawn anew when one of them changes.

    Args:
        name: of the function that makes it.
        controls: by name.
        draw: takes the values of the controls by name, and returns the figure and a sentence that
            says what it shows. A ValueError is shown in place of the sentence.
    """

    def __init__(
        self,
        name: str,
        controls: dict[str, Any],
        draw: Callable[..., tuple[Figure, str]],
    ) -> None:
        self.name, self.controls, self._draw = name, controls, draw
        layout = {"max_width": "100%", "align_self": "flex-start"}  # never enlarged
        self.image = widgets.Image(format="png", layout=layout)
        self.caption = widgets.HTML()
        self._sentence = ""
        self._refresh()
        for control in controls.values():
            control.observe(self._on_change, names="value")
        self.box = stack([row(controls.values()), self.image, self.caption])

    def picture(self) -> bytes:
        return bytes(self.image.value)

    def alt_text(self) -> str:
        return self._sentence

    def _refresh(self) -> None:
        values = {name: read_control(c) for name, c in self.controls.items()}
        with drawing_lock, mpl.rc_context(STYLE):
            figure, sentence = self._draw(**values)
            png = to_png(figure)
        self._sentence = sentence
        self.image.value = png
        self.caption.value = paragraph(sentence)

    def _on_change(self, change: Any) -> None:
        self.box.add_class(BUSY)
        try:
            self._refresh()
        except ValueError as error:
            self.caption.value = paragraph(f"Nothing new to show: {error}")
        finally:
            self.box.remove_class(BUSY)


def to_png(figure: Figure) -> bytes:
    """The figure as PNG: the same figure, the same bytes."""
    buffer = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def add_note(png: bytes, text: str) -> bytes:
    """A picture with a line of small text below it."""
    above = png_files.imread(io.BytesIO(png))[..., :3]  # [height, width, 3] from 0 to 1
    width = above.shape[1]
    with drawing_lock, mpl.rc_context(STYLE):
        dpi = mpl.rcParams["figure.dpi"]
        strip = Figure(figsize=(width / dpi, 0.26))
        strip.set_layout_engine("none")
        strip.text(0.012, 0.45, text, fontsize=9, va="center", style="italic")
        below = png_files.imread(io.BytesIO(to_png(strip)))[:, :width, :3]
    # Rounding may have taken a column.
    below = np.pad(below, ((0, 0), (0, width - below.shape[1]), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    both = np.concatenate((above, below))
    save: Any = png_files.imsave  # its types know no None
    save(buffer, both, format="png", metadata={"Software": None})
    return buffer.getvalue()


def paragraph(text: str) -> str:
    """Plain text as HTML that breaks its lines."""
    return f'<div role="status" style="line-height: 1.5; white-space: normal; max-width: 836px">{html.escape(text)}</div>'


def row(children: Any) -> Any:
    """Side by side, on several lines where the window is narrow."""
    return widgets.Box(
        list(children), layout={"display": "flex", "flex_flow": "row wrap"}
    )


def stack(children: Sequence[Any]) -> Any:
    """One below the other, with the look and the help that every widget has."""
    assistance = html.escape(HELP, quote=True)
    look = widgets.HTML(f'<style onload="{assistance}">{LOOK}</style>')
    look.layout.height = look.layout.margin = "0"
    box = widgets.VBox([*children, look], layout={"overflow": "hidden"})
    box.add_class("folo-widget")
    return box


def options(description: str, width: str = "370px") -> dict[str, Any]:
    """What every control has: a label, and one update when the hand lets go."""
    return {
        **describe(description, width),
        "continuous_update": False,
    }


def describe(description: str, width: str = "370px") -> dict[str, Any]:
    """A label, and a width that the window may cut."""
    return {
        "description": description,
        "style": {"description_width": "145px"},
        "layout": {"width": width, "max_width": "98%"},
    }


def choice_slider(description: str, choices: Sequence[Any], value: Any) -> Any:
    """A slider over a list in order; its readout has room for nine letters."""
    return widgets.SelectionSlider(
        options=list(choices), value=value, **options(description)
    )


def choice_menu(description: str, choices: Sequence[Any], value: Any) -> Any:
    """A drop-down list of names."""
    return widgets.Dropdown(options=list(choices), value=value, **describe(description))


def int_slider(description: str, low: int, high: int, value: int) -> Any:
    return widgets.IntSlider(value=value, min=low, max=high, **options(description))


def float_slider(
    description: str, low: float, high: float, step: float, value: float
) -> Any:
    return widgets.FloatSlider(
        value=value,
        min=low,
        max=high,
        step=step,
        readout_format=".2f",
        **options(description),
    )


NEW_LINE = "\u21b5"
"""Stands for a line break in a text field, which has one line, and in labels."""


def text_field(description: str, value: str) -> Any:
    shown = value.replace("\n", NEW_LINE)
    return widgets.Text(value=shown, **options(description, width="740px"))


def read_control(control: Any) -> Any:
    """The value of a control; the text of a field with its line breaks."""
    value = control.value
    return value.replace(NEW_LINE, "\n") if isinstance(value, str) else value


def drawable(text: str, font: str = "DejaVu Sans") -> str:
    """The text with a square for every character that the font lacks."""
    glyphs = font_manager.get_font(font_manager.findfont(font))
    return "".join(c if glyphs.get_char_index(ord(c)) else "\u25a1" for c in text)


def token_label(token: bytes, limit: int = 12) -> str:
    """A token as a label: spaces visible, bytes of a split character in hex."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "<" + token.hex(" ").upper() + ">"
    for invisible, sign in ((" ", "\u00b7"), ("\n", NEW_LINE), ("\t", "\u21e5")):
        text = text.replace(invisible, sign)
    text = text if len(text) <= limit else text[: limit - 1] + "\u2026"
    return drawable("".join(c if c.isprintable() else "\u25a1" for c in text))


def encode(
    tokenizer: PreTrainedTokenizerBase, name: str, text: Any, limit: int
) -> list[int]:
    """The ids of a text that is not empty, at most `limit` of them.

    Raises:
        TypeError: if it is not text.
        ValueError: if there is nothing in it.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}, and text is expected.")
    ids = list(tokenizer(text).input_ids)
    if not ids:
        raise ValueError(f"{name} is empty: type at least one word.")
    return ids[:limit]
