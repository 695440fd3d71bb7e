"""How the notebooks beside this file show pictures: whole pixels, enlarged."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from jaxsd.pictures import to_uint8

DPI = 100
TITLE_POINTS = 8
# Of the title's letters, as wide and as high as they are on average
LETTER, LINE = 0.6 * TITLE_POINTS / 72, 1.25 * TITLE_POINTS / 72
GAP = 0.08  # inches between pictures


def show(
    pictures: Sequence[Image.Image | np.ndarray],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int = 3,
) -> None:
    """Draws pictures of one size in rows, each pixel as `scale` x `scale` of the screen's.

    pictures: PIL images, uint8 arrays, or floats in [-1, 1] (what lies beyond is cut), [h, w],
    [h, w, 1] or [h, w, 3]; an array [n, h, w, c] is n of them. titles: one above each picture, in
    lines no wider than it. columns: by default all in one row. ValueError for another number of
    titles than of pictures.
    """
    arrays = [_pixels(picture) for picture in pictures]
    if titles is not None and len(titles) != len(arrays):
        raise ValueError(f"{len(titles)} titles for {len(arrays)} pictures")
    columns = columns or len(arrays)
    rows = -(-len(arrays) // columns)
    height, width = (side * scale / DPI for side in arrays[0].shape[:2])
    letters = max(4, int(width / LETTER))
    lines = [textwrap.fill(str(title), letters) for title in titles or [""] * len(arrays)]
    heights = [height + GAP + _above(lines[row * columns :][:columns]) for row in range(rows)]
    whole = columns * (width + GAP), sum(heights)
    figure = plt.figure(figsize=whole, dpi=DPI)
    for i, (array, text) in enumerate(zip(arrays, lines, strict=True)):
        row, column = divmod(i, columns)
        left, bottom = column * (width + GAP), whole[1] - sum(heights[: row + 1])
        place = (left / whole[0], bottom / whole[1], width / whole[0], height / whole[1])
        axes = figure.add_axes(place)
        axes.imshow(array, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="0.8", linewidth=0.5)  # where a picture's edge is white, too
        axes.set_title(text, fontsize=TITLE_POINTS, pad=2)


def _above(titles: Sequence[str]) -> float:
    """Inches for the longest of the titles in a row."""
    return LINE * max(1 + title.count("\n") if title else 0 for title in titles)


def _pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3]."""
    array = np.asarray(picture)
    if array.dtype != np.uint8:
        array = to_uint8(array.astype(np.float32))
    return array[:, :, 0] if array.ndim == 3 and array.shape[-1] == 1 else array
