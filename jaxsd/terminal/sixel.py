"""Sixel, DEC's pictures of 1983: six rows at a time, one colour after another.

The format: DEC's VT330/VT340 Programmer Reference Manual, chapter 14.
"""

import math
import re

import numpy as np
from PIL import Image

from jaxsd.pictures import to_pil

COLOURS = 256  # that terminals of today hold
SAMPLED = 128  # squared, the pixels by which they are chosen: all would take seconds
BAND = 6  # rows of pixels that one line of characters tells
REPEATED = re.compile(rb"(.)\1{3,}")


def sixel(picture: np.ndarray) -> str:
    """The picture [h, w, 1 or 3], uint8, in at most 256 colours; the cursor goes past its end.

    A colour is told in percents, so that it may be off by 2 of 255.
    """
    indices, palette = _quantise(picture)
    height, width = indices.shape
    written = [f'\x1bP0;1q"1;1;{width};{height}']
    for i, colour in enumerate(palette):
        red, green, blue = (round(int(c) * 100 / 255) for c in colour)
        written.append(f"#{i};2;{red};{green};{blue}")
    for top in range(0, height, BAND):
        written.append(_band(indices[top : top + BAND], len(palette)) + "-")
    return "".join(written)[:-1] + "\x1b\\"


def _quantise(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of each pixel's colour [h, w], the colours [n, 3])."""
    image = to_pil(picture).convert("RGB")
    pixels = np.asarray(image).reshape(-1, 3)
    palette, indices = np.unique(pixels, axis=0, return_inverse=True)
    if len(palette) > COLOURS:
        step = math.ceil(math.sqrt(len(pixels)) / SAMPLED)
        sampled = Image.fromarray(np.asarray(image)[::step, ::step])
        few = sampled.quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=1)
        palette = np.asarray(few.getpalette(), np.uint8).reshape(-1, 3)
        indices = np.asarray(image.quantize(palette=few, dither=Image.Dither.NONE))
    return indices.reshape(image.height, image.width), palette


def _band(indices: np.ndarray, colours: int) -> str:
    """Up to six rows: for each colour a character a column, whose bits say which rows have it."""
    rows, width = indices.shape
    bits = np.zeros((colours, width), np.uint8)
    for row in range(rows):  # a column has one colour in a row: no index comes twice
        bits[indices[row], np.arange(width)] |= 1 << row
    lines = []
    for colour in np.flatnonzero(bits.any(axis=1)):
        characters = (bits[colour] + 63).tobytes().rstrip(b"?")
        packed = REPEATED.sub(lambda run: b"!%d%s" % (len(run[0]), run[1]), characters)
        lines.append(f"#{colour}{packed.decode('ascii')}")
    return "$".join(lines)
