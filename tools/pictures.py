"""Whether two pictures show the same, for figures drawn on different days or machines.

    from pictures import find_difference

    find_difference(stored, drawn)  # None, or in words what differs

Fonts are spaced a little differently by other versions of matplotlib, and a dot lies elsewhere
where rounding does, so pixels are not compared one by one: the picture is cut into squares, and
the mean colour of a square may be that of a place nearby. What counts is how many squares differ.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SQUARE = 8  # pixels on a side
SHIFT = 1  # pixel by which a picture may lie elsewhere
LEVELS = 14  # of 255, by which red, green or blue of a square may differ in the mean
SHARE = 0.001  # of all squares, how many may differ
SIZE = 0.03  # by how much width and height may differ

Pixels = NDArray[np.float64]


def read_pixels(png: bytes) -> Pixels:
    """The picture on white, `[height, width, 3]` from 0 to 255."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"), dtype=float)


def mean_squares(pixels: Pixels) -> Pixels:
    """The mean colour of each square."""
    height, width = (size // SQUARE for size in pixels.shape[:2])
    squares = pixels[: height * SQUARE, : width * SQUARE]
    means: Pixels = squares.reshape(height, SQUARE, width, SQUARE, 3).mean(axis=(1, 3))
    return means


def share_that_differs(stored: Pixels, drawn: Pixels) -> float:
    """How many of the squares are other ones, wherever `drawn` lies within `SHIFT`."""
    height, width = np.minimum(stored.shape[:2], drawn.shape[:2])
    stored, drawn = stored[:height, :width], drawn[:height, :width]
    wanted = mean_squares(stored)
    best = np.full(wanted.shape[:2], np.inf)
    for down in range(-SHIFT, SHIFT + 1):
        for right in range(-SHIFT, SHIFT + 1):
            moved = np.roll(drawn, (down, right), axis=(0, 1))
            apart = np.abs(mean_squares(moved) - wanted).max(axis=-1)
            best = np.minimum(best, apart)
    return float((best > LEVELS).mean())


def find_difference(stored: bytes, drawn: bytes) -> str | None:
    """What differs between two PNGs, in words; None if they show the same."""
    if stored == drawn:
        return None
    one, other = read_pixels(stored), read_pixels(drawn)
    for a, b in zip(one.shape, other.shape, strict=True):
        if abs(a - b) > max(3, SIZE * a):
            sizes = [f"{each.shape[1]} x {each.shape[0]}" for each in (one, other)]
            return f"{sizes[0]} pixels are stored, {sizes[1]} were drawn"
    share = share_that_differs(one, other)
    if share > SHARE:
        return f"{share:.2%} of the picture differ, and {SHARE:.1%} may"
    return None
