"""How kitty and iTerm2 are told a picture; each function gives the characters to write.

kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol/. iTerm2, and WezTerm and mintty after it:
https://iterm2.com/documentation-images.html.
"""

import base64

import numpy as np

from jaxsd.pictures import png

PIECE = 4096  # the most characters of base64 in one of kitty's sequences


def kitty(picture: np.ndarray, number: int, rows: int | None = None) -> str:
    """The picture [h, w, 1 or 3], uint8, pixel by pixel from the cursor on, which stays.

    number: in [1, 2^32), the picture's name in the terminal. What was shown under it goes away.
    rows: scaled to so many lines.
    """
    data = base64.b64encode(png(picture)).decode("ascii")
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    # q=2: no answer, which would be taken for what the user types; C=1: the cursor stays
    keys = f"a=T,f=100,i={number},p=1,q=2,C=1,{'' if rows is None else f'r={rows},'}"
    written = []
    for i, piece in enumerate(pieces):
        more = int(i + 1 < len(pieces))
        written.append(f"\x1b_G{keys if i == 0 else ''}m={more};{piece}\x1b\\")
    return "".join(written)


def iterm2(picture: np.ndarray, rows: int) -> str:
    """The picture [h, w, 1 or 3], uint8, `rows` lines high; the cursor goes past its end."""
    file = png(picture)
    keys = f"inline=1;size={len(file)};height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File={keys}:{base64.b64encode(file).decode('ascii')}\x07"
