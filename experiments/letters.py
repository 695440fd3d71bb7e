"""Handwritten letters as the digits' scans are: what `digits` has never seen, to teach it.

A letter is a few strokes, jittered, drawn with a round pen on a bitmap of 32x32; a scan counts the
ink in blocks of 4x4, as the digits' were made (Alpaydin & Kaynak 1998). `digits.colour_scan` makes
pictures of both in the same way, so that only the shape is new.
"""

import numpy as np

from jaxsd.data import digits

BITMAP = 32
# Lines from point to point, (x, y) from the top left corner to (1, 1)
STROKES: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "A": (((0.0, 1.0), (0.5, 0.0), (1.0, 1.0)), ((0.2, 0.62), (0.8, 0.62))),
    "E": (((1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (1.0, 1.0)), ((0.0, 0.5), (0.8, 0.5))),
    "H": (((0.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (1.0, 1.0)), ((0.0, 0.5), (1.0, 0.5))),
    "K": (((0.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (0.05, 0.5), (1.0, 1.0))),
    "M": (((0.0, 1.0), (0.0, 0.0), (0.5, 0.55), (1.0, 0.0), (1.0, 1.0)),),
    "N": (((0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (1.0, 0.0)),),
    "T": (((0.0, 0.0), (1.0, 0.0)), ((0.5, 0.0), (0.5, 1.0))),
    "X": (((0.0, 0.0), (1.0, 1.0)), ((1.0, 0.0), (0.0, 1.0))),
}


def draw_letter(letter: str, rng: np.random.Generator) -> np.ndarray:
    """A scan float32 [8, 8] of ink in [0, 1], a multiple of 1/16: no two are alike.

    Points move by .05 of the letter's size (standard deviation), the whole is turned by up to 8
    degrees, sheared, and made narrower or wider; pens are 3 to 5 of 32 pixels thick.
    """
    turn, shear = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(-0.15, 0.15)
    width, height = rng.uniform(0.5, 0.68), rng.uniform(0.78, 0.88)
    radius = rng.uniform(1.5, 2.5)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    place = turned @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([width, height])
    centres = (np.arange(BITMAP) + 0.5) / BITMAP - 0.5
    pixels = np.stack(np.meshgrid(centres, centres), -1)  # [32, 32, 2], x before y
    ink = np.zeros((BITMAP, BITMAP), bool)
    for line in STROKES[letter]:
        points = np.array(line) - 0.5 + rng.normal(0, 0.05, (len(line), 2))
        points = points @ place.T
        for start, end in zip(points, points[1:], strict=False):
            ink |= _distance(pixels, start, end) * BITMAP < radius
    side = BITMAP // digits.SCAN_SIZE
    blocks = ink.reshape(digits.SCAN_SIZE, side, digits.SCAN_SIZE, side)
    return blocks.mean((1, 3)).astype(np.float32)


def _distance(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of points [..., 2] to the line between two of them."""
    way = end - start
    share = np.clip(((pixels - start) @ way) / max(way @ way, 1e-9), 0, 1)
    return np.linalg.norm(pixels - start - share[..., None] * way, axis=-1)


def draw_letters(letter: str, count: int, seed: int) -> np.ndarray:
    """[count, 8, 8]; each depends on the seed and its number alone."""
    rngs = [np.random.default_rng([seed, ord(letter), i]) for i in range(count)]
    return np.stack([draw_letter(letter, rng) for rng in rngs])
