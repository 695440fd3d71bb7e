"""Pictures inside the page: the files' own bytes, or a smaller picture where these are many."""

import functools
import io
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from jaxsd.pictures import check_size, data_address, webp

SHOWN = 12  # of each name, evenly spaced over the steps, the first and the last among them
WHOLE = 300_000  # bytes of a file up to which it is embedded as it is
SIDE = 640  # of what stands for a larger one, a WebP
BUDGET = 6_000_000  # bytes of all pictures of a page; a third more as base64


class Album:
    """Figures, as long as the budget lasts."""

    def __init__(self, top: Path, budget: int = BUDGET):
        self._top, self._left = top, budget

    def figures(self, name: str, pictures: list[tuple[int, Path]], shown: int = SHOWN) -> str:
        """The newest first, which the budget is spent on before the older ones."""
        chosen = spread(pictures, shown)[::-1]
        written, without = [], 0
        for step, file in chosen:
            if (figure := self._figure(name, step, file)) is None:
                without += 1
            else:
                written.append(figure)
        told = []
        if len(chosen) < len(pictures):
            told.append(f"{len(chosen)} of {len(pictures)} pictures")
        if without:
            told.append(f"{without} left out: unreadable, or too large for one page")
        note = f'<p class="note">{"; ".join(told)}; all are in {escape(name)}_*.png.</p>'
        return f'<div class="album">{"".join(written)}</div>' + (note if told else "")

    def _figure(self, name: str, step: int, file: Path) -> str | None:
        try:
            stat = file.stat()
            kind, data, width, height = embedded(file, stat.st_mtime_ns, stat.st_size)
        except Exception:  # gone, or in pieces: a dozen kinds, from as many parts of a decoder
            return None
        if len(data) > self._left:
            return None
        self._left -= len(data)
        source = data_address(data, kind)
        times = max(1, 256 // max(width, height))
        size = f'width="{width * times}" height="{height * times}"'
        place = quote(file.relative_to(self._top).as_posix())
        small = ' class="pixels"' if times > 1 else ""
        picture = f'<img src="{source}" {size}{small} alt="{escape(name)} at step {step}">'
        caption = f"<figcaption>step {step:,}</figcaption>"
        return f'<figure><a href="{place}">{picture}</a>{caption}</figure>'


def spread(items: list, count: int) -> list:
    """At most so many of them, evenly, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


@functools.lru_cache(64)  # a training makes its page again and again of the same files
def embedded(file: Path, changed: int, size: int) -> tuple[str, bytes, int, int]:
    """(png or webp, bytes, width, height) of what is embedded for a file of this state."""
    data = file.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        check_size(image)
        width, height = image.size
        image.load()
        if len(data) <= WHOLE:
            return "png", data, width, height
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        return "webp", webp(image), *image.size
