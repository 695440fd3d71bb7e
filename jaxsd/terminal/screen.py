"""A terminal's lines and pictures: where a picture stands, how large, and what replaces it."""

import secrets
import sys
from typing import Any

import numpy as np
from PIL import Image

from jaxsd.pictures import enlarged, to_pil
from jaxsd.terminal.detection import detect, is_terminal
from jaxsd.terminal.protocols import iterm2, kitty
from jaxsd.terminal.sixel import sixel

CELL = (10, 20)  # pixels of a character, where the terminal does not say: those of a VT340
ROWS = 20  # the most lines that a picture takes, of which the prompt and the paths are not pushed


class Screen:
    """Somewhere to show pictures, one below the other, or each in the place of the one before.

    protocol: kitty, iterm2 or sixel.
    """

    def __init__(self, stream: Any, protocol: str):
        self._stream, self._protocol = stream, protocol
        self._number = 0  # of the picture that may be replaced; kitty's
        self._rows = 0
        self._shown: np.ndarray | None = None

    def show(self, picture: np.ndarray) -> None:
        """Shows uint8 [h, w, 1 or 3]: where kitty is spoken in place of the last one, else below.

        One that is there already is not shown again.
        """
        if self._shown is not None and np.array_equal(self._shown, picture):
            return
        self._shown = picture
        columns, rows, cell = self._size()
        width, height = cell or CELL
        fitted = _fit(picture, columns * width, min(ROWS, max(1, rows - 2)) * height)
        lines = -(-len(fitted) // height)
        if self._protocol == "kitty":
            self._replace(fitted, lines, stretched=cell is None)
        else:
            drawn = iterm2(fitted, lines) if self._protocol == "iterm2" else sixel(fitted)
            self._stream.write(drawn + "\n")
        self._stream.flush()

    def _replace(self, picture: np.ndarray, lines: int, stretched: bool) -> None:
        """The cursor is below the picture, before and after."""
        if self._number and lines == self._rows:
            self._stream.write(f"\x1b[{lines}A\r")
        else:
            self._number = self._number or secrets.randbelow(2**32 - 1) + 1
            self._stream.write("\n" * lines + f"\x1b[{lines}A\r")  # scrolls where there is no room
        self._rows = lines
        drawn = kitty(picture, self._number, lines if stretched else None)
        self._stream.write(f"{drawn}\x1b[{lines}B\r")

    def next(self) -> None:
        """What was shown stays: the next picture has a place of its own."""
        self._number, self._rows, self._shown = 0, 0, None

    def _size(self) -> tuple[int, int, tuple[int, int] | None]:
        """(columns, lines, pixels of a character: width, height, if the terminal says)."""
        try:
            import fcntl
            import struct
            import termios

            packed = fcntl.ioctl(self._stream.fileno(), termios.TIOCGWINSZ, bytes(8))
            rows, columns, width, height = struct.unpack("HHHH", packed)
        except (ImportError, OSError, ValueError):
            rows = columns = width = height = 0
        if not (rows and columns):
            return 80, 24, None
        known = width >= columns and height >= rows
        return columns, rows, (width // columns, height // rows) if known else None


def open_screen(show: str = "auto", stream: Any = None) -> Screen | None:
    """A screen on this stream, by default stdout; None where none is wanted or nothing is shown.

    show: off, auto, or the protocol to speak, kitty, iterm2 or sixel, whatever the terminal says of
    itself. Without a terminal there is no screen in any case.
    """
    stream = stream or sys.stdout
    if show == "off" or not is_terminal(stream):
        return None
    protocol = detect(stream) if show == "auto" else show
    return None if protocol is None else Screen(stream, protocol)


def _fit(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Not larger than this many pixels; a tiny one enlarged, as far as it goes."""
    h, w = picture.shape[:2]
    if h <= height and w <= width:
        return enlarged(picture, height, width)
    share = min(width / w, height / h)
    size = max(1, int(w * share)), max(1, int(h * share))
    small = np.asarray(to_pil(picture).resize(size, Image.Resampling.LANCZOS))
    return small.reshape(*small.shape[:2], -1)
