"""Small things done with arrays of pixels."""

import math
from collections.abc import Sequence

import numpy as np


def tile(pictures: np.ndarray | Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """A grid [H, W, 3] of uint8 pictures [n, h, w, 1 or 3], row by row, with a thin grey line."""
    pictures = np.asarray(pictures)
    pictures = np.broadcast_to(pictures, (*pictures.shape[:-1], 3))
    n, h, w, _ = pictures.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    line = max(1, h // 32)
    grid = np.full((rows * (h + line) - line, columns * (w + line) - line, 3), 128, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (h + line), (i % columns) * (w + line)
        grid[y : y + h, x : x + w] = picture
    return grid


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """From [-1, 1] to 0 ... 255, clipped and rounded."""
    return np.round(np.clip(np.asarray(pictures) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
