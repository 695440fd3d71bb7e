"""A convolutional network over a picture too large for memory: tile by tile, blended together."""

from collections.abc import Callable
from typing import Any

import numpy as np

OVERLAP = 0.25  # of a tile, at least, as in diffusers


def tiled(
    function: Callable[[np.ndarray], Any], x: np.ndarray, tile: int, scale: int | float
) -> np.ndarray:
    """function([b, t, t, c]) of every tile of x [b, h, w, c], put together as [b, h s, w s, d].

    tile: the side of a tile, in positions of x; all have one size, so that one program serves them.
    scale: how much larger the output is: 8 for a decoder, 1/8 for an encoder. Where tiles overlap
    (a quarter of a tile or more) each counts for the more the farther the place is from its edge.
    A function that looks at a whole tile (a VAE's attention and norms do) gives a little other
    values than at once, the less the larger the tile.
    """
    unit = max(1, round(1 / scale))  # of an encoder: tiles begin where latents do
    starts = [_starts(side, min(tile, side), unit) for side in x.shape[1:3]]
    height, width = (min(tile, side) for side in x.shape[1:3])
    weight = (
        _ramp(round(height * scale))[:, None, None] * _ramp(round(width * scale))[None, :, None]
    )
    total, weights = None, np.zeros([*(round(side * scale) for side in x.shape[1:3]), 1])
    for top in starts[0]:
        for left in starts[1]:
            part = np.asarray(function(x[:, top : top + height, left : left + width]))
            if total is None:
                total = np.zeros((len(x), *weights.shape[:2], part.shape[-1]), np.float32)
            y, rows = round(top * scale), part.shape[1]
            z, columns = round(left * scale), part.shape[2]
            total[:, y : y + rows, z : z + columns] += part * weight[None].astype(np.float32)
            weights[y : y + rows, z : z + columns] += weight
    assert total is not None
    total /= weights[None].astype(np.float32)
    return total


def _starts(side: int, tile: int, unit: int) -> list[int]:
    """Where tiles begin: evenly spread, at multiples of `unit`, the last one ending at the edge."""
    step = max(1, int(tile * (1 - OVERLAP)))
    count = 1 + -(-(side - tile) // step)
    return [unit * round(i * (side - tile) / max(count - 1, 1) / unit) for i in range(count)]


def _ramp(count: int) -> np.ndarray:
    """Weights that rise from the edges inwards over the overlap."""
    distance = np.minimum(np.arange(count), np.arange(count)[::-1]) + 0.5
    return np.minimum(distance / max(count * OVERLAP, 1), 1.0)
