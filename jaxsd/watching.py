"""Pictures on their way, where one looks: in a notebook, in a terminal, or nowhere.

images = pipe("a red seven", seeds=[0, 1], callback=jaxsd.watch(pipe, every=5))
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.networks import Callback, Networks
from jaxsd.pictures import enlarged, png, tile
from jaxsd.previews import previewer
from jaxsd.terminal.screen import open_screen

SIDE = 256  # pixels that a tiny picture is enlarged to in a notebook


def watch(pipe: Networks, every: int = 1, how: str = "vae", show: str = "auto") -> Callback:
    """A `callback` for `pipe(...)`, `pipe.sample` and `pipe.denoise` that shows what has become.

    After steps `every`, 2 `every`, ...: the pictures of the call as one grid, in a notebook in one
    place, in a terminal as `sample.py --show` does. It may be used for several calls, each of which
    has a place of its own. Where nothing can be shown it does nothing.

    how: what decodes them, vae, linear, or a TAESD's folder (`previews.previewer`). show: auto,
    off, or for a terminal the protocol to speak: kitty, iterm2 or sixel. JaxsdError for another.
    """
    if every < 1:
        raise JaxsdError(f"every must be at least 1, not {every}")
    if show not in ("auto", "kitty", "iterm2", "sixel", "off"):
        raise JaxsdError(f"show must be auto, kitty, iterm2, sixel or off, not {show!r}")
    place = _Notebook() if show == "auto" and _in_notebook() else open_screen(show)
    if place is None:
        return lambda i, t, latents: None
    return _callback(place, every, previewer(pipe, how))


def _callback(place: Any, every: int, preview: Callable[[jax.Array], np.ndarray]) -> Callback:
    last = -1

    def look(i: int, t: float, latents: jax.Array) -> None:
        nonlocal last
        if i <= last:  # of another call
            place.next()
        last = i
        if (i + 1) % every == 0:
            place.show(tile(preview(latents)))

    return look


def _in_notebook() -> bool:
    """Whether this is a kernel that others ask for what they show."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class _Notebook:
    """As a `terminal.screen.Screen`, the output of a cell."""

    def __init__(self):
        self._handle: Any = None

    def show(self, picture: np.ndarray) -> None:
        from IPython.display import Image, display

        image = Image(png(enlarged(picture, SIDE, SIDE)), format="png")
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)

    def next(self) -> None:
        self._handle = None
