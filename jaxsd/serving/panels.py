"""What the page shows of a picture that is being drawn, as HTML with the pictures inside it."""

import dataclasses
import html
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxsd.pictures import data_address, png, to_pil, webp
from jaxsd.serving.models import Request, Served
from jaxsd.serving.service import file_of

TINY = 128  # pictures up to this side are shown with their pixels as squares, and never compressed
THUMBNAIL = 96
EMPTY = '<div class="jaxsd-empty">Say what to draw, and press Draw.</div>'


def escape(text: str) -> str:
    """Text inside HTML that is also a template of Gradio's, in JavaScript and in Handlebars."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;").replace("`", "&#96;")


@dataclasses.dataclass
class Panel:
    """One model's picture, from the first noise to the last step."""

    name: str
    request: Request | None = None
    frames: list[str] = dataclasses.field(default_factory=list)  # small, as addresses
    shown: str = ""  # the <img> as large as it goes
    done: float = 0.0
    file: bytes | None = None
    said: str = ""  # an error's sentence

    def look(self, step: int, count: int, picture: np.ndarray) -> None:
        """A picture on the way."""
        tiny = max(picture.shape[:2]) <= TINY
        self.done = step / (count + 1)
        address = data_address(png(picture), "png") if tiny else _webp(picture)
        self.frames.append(address if tiny else _webp(picture, THUMBNAIL))
        self.shown = _img(address, "on the way", tiny)

    def finish(self, model: Served, picture: np.ndarray) -> None:
        assert self.request is not None
        file = file_of(model, self.request, picture)
        address, tiny = data_address(file, "png"), max(picture.shape[:2]) <= TINY
        name = f"{self.name.replace('/', '-')}-seed{self.request.seed}.png"
        self.shown = (
            f'<a href="{address}" download="{escape(name)}" title="Save the picture">'
            f"{_img(address, self.request.prompt, tiny)}</a>"
        )
        self.file, self.done = file, 1.0  # last, since another thread may be showing it

    def html(self) -> str:
        title = f"<h3>{escape(self.name)}</h3>"
        if self.said or self.request is None:
            return (
                f'<figure class="jaxsd-panel" data-state="refused">{title}'
                f'<p class="jaxsd-said" role="alert">{escape(_sentence(self.said))}</p></figure>'
            )
        r = self.request
        state = "done" if self.file else "running" if self.frames else "waiting"
        inside = self.shown or "<span>waiting for the first steps …</span>"
        frame = f'<div class="jaxsd-frame" style="--shape: {r.width} / {r.height}">{inside}</div>'
        progress = "" if self.file else f'<progress max="1" value="{self.done:.3f}"></progress>'
        tiny = ' class="tiny"' if max(r.width, r.height) <= TINY else ""
        strip = "".join(f'<img{tiny} src="{frame}" alt="">' for frame in self.frames)
        strip = f'<div class="jaxsd-strip" aria-hidden="true">{strip}</div>' if strip else ""
        caption = f"{_count(r.steps, 'step')}, {r.sampler}, guidance {r.guidance_scale:g}, "
        caption += f"seed {r.seed}" + ("" if r.strength is None else f", strength {r.strength:g}")
        return (
            f'<figure class="jaxsd-panel" data-state="{state}">{title}{frame}{progress}{strip}'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )


def together(panels: Sequence[Panel]) -> str:
    inside = "".join(panel.html() for panel in panels)
    return f'<div class="jaxsd-panels" aria-live="polite">{inside}</div>'


def _webp(picture: np.ndarray, side: int | None = None) -> str:
    image = to_pil(picture)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return data_address(webp(image), "webp")


def _img(address: str, alt: str, tiny: bool) -> str:
    return f'<img{" class=tiny" if tiny else ""} src="{address}" alt="{escape(alt)}">'


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
