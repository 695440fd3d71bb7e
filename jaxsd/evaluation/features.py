"""What distances between sets of pictures are measured on: a function from pictures to features.

Either Inception's (`inception`), which makes the distances FID and KID, or the digit judge's
(`digit_judge`). All take uint8 pictures, since that is what files hold and what people see.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import kernels, weights
from jaxsd.components import Component
from jaxsd.data import digits
from jaxsd.errors import JaxsdError
from jaxsd.evaluation.judge import judges
from jaxsd.models.inception import CLASSIFIER, InceptionV3
from jaxsd.nn import Net, Params
from jaxsd.sharding import filled


@dataclasses.dataclass(frozen=True)
class Features:
    """A function from pictures, uint8 [n, h, w, c], to features [n, d]."""

    function: Callable[[np.ndarray], np.ndarray]
    frechet: str = "fd"  # what a Fréchet distance of these features is called
    kernel: str = "kd"  # and a kernel distance

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return self.function(pictures)


def load_inception(file: str | os.PathLike) -> Component:
    """The network of the FID from pytorch-fid's file, pt_inception-2015-12-05-6726825d.pth.

    Or from a .safetensors file with the same names. JaxsdError for any other weights.
    """
    net = Net(InceptionV3())
    params = weights.load(file, net.shapes | CLASSIFIER, np.float32)
    return Component(net, {name: params[name] for name in net.shapes})


def inception(file: str | os.PathLike, batch_size: int = 32) -> Features:
    """Inception's 2048 features, float32, of pictures of any size."""
    component = load_inception(file)
    program = Batched(component.net.__call__, batch_size)

    def features(pictures: np.ndarray) -> np.ndarray:
        x = coloured(pictures).astype(np.float32) / np.float32(127.5) - 1
        return program(component.params, x)

    return Features(features, "fid", "kid")


class Batched:
    """A function of (params, rows [b, ...]) -> [b, ...], compiled, for any number of rows.

    At most `most` at a time. Fewer are filled up to the largest batch so far, rather than compiled
    for anew.
    """

    def __init__(self, function: Callable[..., jax.Array], most: int):
        self._program, self._most, self._length = kernels.jit(function), most, 0

    def __call__(self, params: Params, rows: np.ndarray) -> np.ndarray:
        self._length = max(self._length, min(self._most, len(rows)))
        found = []
        for start in range(0, len(rows), self._length):
            part = rows[start : start + self._length]
            whole = jnp.asarray(filled(part, self._length))
            found.append(np.asarray(self._program(params, whole))[: len(part)])
        return np.concatenate(found)


def digit_features(pictures: np.ndarray) -> np.ndarray:
    """The judge's 64 features of scans [n, 8, 8, 1] or coloured pictures [n, 32, 32, 3]."""
    if pictures.shape[1:] == (8, 8, 1):
        return judges().features(pictures.astype(np.float64) / 127.5 - 1)
    if pictures.shape[1:] == (32, 32, 3):
        return judges().features(2 * digits.recover(pictures / 255)[0] - 1)
    raise JaxsdError(
        f"the digit judge knows pictures of 8x8x1 or 32x32x3, not {list(pictures.shape[1:])}: "
        "give the weights of Inception"
    )


def digit_judge() -> Features:
    """The judge's features, where pictures are digits: `digit_features`."""
    return Features(digit_features)


def coloured(pictures: np.ndarray) -> np.ndarray:
    """Three channels, of one or three."""
    return np.broadcast_to(pictures, (*pictures.shape[:-1], 3))
