"""The figure of page 05: a safetensors file at three scales."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from folo_lib.course.figures import GREY, KEYS, QUERIES, VALUES

__all__ = ["draw_safetensors"]

COLOURS = {
    "embed_tokens": GREY,
    "q_proj": QUERIES.colour,
    "k_proj": KEYS.colour,
    "v_proj": VALUES.colour,
    "o_proj": "white",
    "mlp": "0.88",
}


def draw_safetensors(axes: Sequence[Axes], path: Path) -> None:
    """Its first 24 bytes, the end of its header, and the whole file to scale.

    Args:
        axes: three, from top to bottom.
        path: of a checkpoint in one file, of a few million bytes.
    """
    with path.open("rb") as file:
        beginning = file.read(24)
        size = int.from_bytes(beginning[:8], "little")
        file.seek(8)
        header = json.loads(file.read(size))
    nearest, near, whole = axes
    for i, byte in enumerate(beginning):
        nearest.barh(0, 1, 1, i, color="0.85" if i < 8 else "white", ec="0.3")
        shown = f"{byte:02x}" if i < 8 else chr(byte)
        nearest.text(i + 0.5, 0, shown, ha="center", va="center", family="monospace")
    nearest.set(xlim=(0, 24), xticks=range(0, 25, 4))
    for ax in (near, whole):
        draw_tensors(ax, header, 8 + size)
    end = 8 + size
    near.set(xlim=(0, 12_000), xticks=[0, 4000, end, 12_000])
    near.text(end / 2, 0, "header (JSON)", ha="center", va="center")
    place, text = (end + 12_000) / 2, "the embedding begins"
    near.text(place, 0, text, ha="center", va="center", color="white")
    whole.set(xlim=(0, path.stat().st_size), ylim=(-0.55, 1.1))
    whole.set_xticks(range(0, 6_000_001, 1_000_000), [str(n) for n in range(7)])
    whole.set_xlabel("place in the file, in million bytes")
    for place, name in [(0.4, "embedding"), (1.09, "MLP"), (1.53, "attention")]:
        whole.text(place * 1e6, 0.6, name, ha="center", fontsize=9)
    for ax, title in zip(axes, ("24 bytes", "12 kB", "6.1 MB, all"), strict=True):
        ax.set(yticks=[], ylabel=title)
        ax.grid(False)


def draw_tensors(ax: Axes, header: dict[str, dict[str, list[int]]], begin: int) -> None:
    """The tensors of a file to scale, coloured by kind, after a header of `begin` bytes."""
    for name, entry in header.items():
        first, last = entry.get("data_offsets", (0, 0))
        for part, colour in COLOURS.items():
            if part in name:  # a norm is too thin
                ax.barh(
                    0, last - first, 1, begin + first, color=colour, ec="0.3", lw=0.8
                )
    ax.barh(0, begin, 1, color="white", ec="0.3")
