"""Terminals for the tests: what was written becomes pixels and lines again."""

import base64
import io
import re

import numpy as np
from PIL import Image

KITTY = re.compile(r"\x1b_G([^;\x1b]*);([^\x1b]*)\x1b\\")
ITERM2 = re.compile(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07")
SIXEL = re.compile(r'\x1bP0;1q"1;1;(\d+);(\d+)([^\x1b]*)\x1b\\')
TOKEN = re.compile(KITTY.pattern + r"|\x1b\[(\d+)([AB])|(\r)|(\n)")


def pixels(data: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        return np.asarray(image.convert("RGB"))


def keys(text: str, separator: str = ",") -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split(separator) if pair)


class Kitty:
    """Lines, a cursor, and pictures by number: what they are, and in which line they stand."""

    def __init__(self, lines: int = 24, cell: int = 20):
        self.lines, self.cell = lines, cell
        self.line, self.scrolled = 0, 0
        self.shown: dict[int, tuple[int, np.ndarray]] = {}
        self.seen: list[np.ndarray] = []
        self._data, self._keys = "", {}

    def write(self, text: str) -> None:
        for match in TOKEN.finditer(text):
            told, data, count, way, _, newline = match.groups()
            if way is not None:
                moved = self.line + int(count) * (1 if way == "B" else -1)
                assert 0 <= moved < self.lines, "the cursor would stop at the edge"
                self.line = moved
            elif newline is not None:
                self.scrolled += self.line == self.lines - 1
                self.line = min(self.line + 1, self.lines - 1)
            elif data is not None:
                self._piece(keys(told), data)

    def _piece(self, told: dict[str, str], data: str) -> None:
        assert len(data) <= 4096 and (told["m"] == "0" or len(data) % 4 == 0)
        self._keys = told if "a" in told else self._keys
        self._data += data
        if told["m"] == "1":
            return
        assert self._keys.items() >= {"a": "T", "f": "100", "q": "2", "C": "1"}.items()
        picture, self._data = pixels(self._data), ""
        number = int(self._keys["i"])
        assert 0 < number < 2**32
        rows = int(self._keys["r"]) if "r" in self._keys else -(-len(picture) // self.cell)
        assert self.line + rows <= self.lines, "it would not be seen whole"
        self.seen.append(picture)
        self.shown[number] = (self.scrolled + self.line, picture)


def of_iterm2(text: str) -> list[np.ndarray]:
    found = []
    for told, data in ITERM2.findall(text):
        assert keys(told, ";")["inline"] == "1"
        assert int(keys(told, ";")["size"]) == len(base64.b64decode(data))
        found.append(pixels(data))
    return found


def of_sixel(text: str) -> list[np.ndarray]:
    """Pictures, after DEC's manual: colours in percents, six rows a line, `!` for repetition."""
    found = []
    for width, height, body in SIXEL.findall(text):
        picture = np.full((int(height), int(width), 3), -1, int)
        colours, colour, x, top = {}, -1, 0, 0
        for match in re.finditer(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)(.)|(\$)|(-)|(.)", body):
            number, *percents, times, repeated, back, down, single = match.groups()
            if number is not None:
                colour = int(number)
                if percents[0] is not None:
                    colours[colour] = [round(int(p) * 255 / 100) for p in percents]
            elif back or down:
                x, top = 0, top + (6 if down else 0)
            else:
                bits = ord(repeated or single) - 63
                assert 0 <= bits < 64
                for row in (row for row in range(6) if bits >> row & 1):
                    assert (picture[top + row, x : x + int(times or 1)] == -1).all()
                    picture[top + row, x : x + int(times or 1)] = colours[colour]
                x += int(times or 1)
        assert (picture >= 0).all(), "a pixel was left out"
        found.append(picture)
    return found
