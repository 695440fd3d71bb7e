"""Pictures in and out: files and PIL images to arrays, and small things done with pixels."""

import base64
import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from jaxsd.errors import JaxsdError

Picture = str | Path | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture]  # one for all images, or one for each
MAX_PIXELS = 100_000_000  # of a picture that is read; a few bytes can promise billions


def read(picture: Picture) -> Image.Image:
    """A picture as people see it: RGB, turned as its EXIF says, what is transparent on white.

    picture: a file, a PIL image, or uint8 [h, w], [h, w, 1] or [h, w, 3]. JaxsdError if it cannot
    be read or has more than a hundred million pixels.
    """
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    try:
        if isinstance(picture, Image.Image):
            return as_seen(picture)
        # Pillow remarks on what is odd in a file, and reads it all the same.
        with warnings.catch_warnings(), open(picture, "rb") as stream:
            warnings.simplefilter("ignore")
            with Image.open(stream) as opened:
                check_size(opened)
                return as_seen(opened)
    except Exception as error:  # a dozen kinds, from as many decoders
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(f"cannot read the picture {picture}: {reason}") from None


def check_size(opened: Image.Image) -> None:
    """ValueError for a file that promises more pixels than are read."""
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(f"{opened.width}x{opened.height} pixels; a hundred million are the most")


def as_seen(image: Image.Image) -> Image.Image:
    """RGB, turned as the EXIF says, what is transparent on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if "A" in image.getbands() or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits: of 16, or between 0 and 1 if they are fractions."""
    top = 1.0 if values.dtype.kind == "f" and values.max(initial=0) <= 1 else 65535.0
    return np.clip(values / top * 255, 0, 255).astype(np.uint8)


def _from_array(picture: np.ndarray) -> Image.Image:
    grey = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[-1] == 1)
    if picture.dtype != np.uint8 or not (grey or (picture.ndim == 3 and picture.shape[-1] == 3)):
        raise JaxsdError(
            f"an array of pixels is uint8 [h, w], [h, w, 1] or [h, w, 3], not {picture.dtype} "
            f"{list(picture.shape)}"
        )
    return Image.fromarray(picture.squeeze(-1) if picture.ndim == 3 and grey else picture).convert(
        "RGB"
    )


def to_model(picture: Picture, height: int, width: int, channels: int = 3) -> np.ndarray:
    """float32 [height, width, 3 or 1] in [-1, 1], resized as diffusers does (Lanczos)."""
    image = read(picture).convert("L" if channels == 1 else "RGB")
    resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    return resized.reshape(height, width, channels) / np.float32(127.5) - 1


def to_mask(picture: Picture, height: int, width: int) -> np.ndarray:
    """float32 [height, width, 1]: 1 where the picture is light (to be painted anew), else 0."""
    grey = read(picture).convert("L").resize((width, height), Image.Resampling.LANCZOS)
    return (np.asarray(grey, np.float32)[:, :, None] >= 127.5).astype(np.float32)


def one_or_each(pictures: Pictures, count: int) -> list[Picture]:
    """One picture for all of `count` images, or one for each; JaxsdError for another number."""
    one = isinstance(pictures, (str, Path, Image.Image, np.ndarray))
    several = [pictures] if one else list(pictures)
    if len(several) not in (1, count):
        raise JaxsdError(f"{len(several)} pictures for {count} seeds: give one, or one for each")
    return several


def fitting_size(
    picture: Picture, area: int, unit: int, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """(height, width) of the picture's shape and about this area, multiples of `unit`.

    If one of them is given, it is kept and the other follows from the picture's shape.
    """
    own_width, own_height = read(picture).size
    scale = math.sqrt(area / (own_width * own_height))
    if height is not None:
        scale = height / own_height
    elif width is not None:
        scale = width / own_width
    sides = [max(unit, round(side * scale / unit) * unit) for side in (own_height, own_width)]
    return sides[0] if height is None else height, sides[1] if width is None else width


def tile(pictures: np.ndarray | Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """A grid [H, W, 3] of uint8 pictures [n, h, w, 1 or 3], row by row, with a thin grey line."""
    pictures = np.asarray(pictures)
    pictures = np.broadcast_to(pictures, (*pictures.shape[:-1], 3))
    n, h, w, _ = pictures.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    line = max(1, h // 32)
    grid = np.full((rows * (h + line) - line, columns * (w + line) - line, 3), 128, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (h + line), (i % columns) * (w + line)
        grid[y : y + h, x : x + w] = picture
    return grid


def enlarged(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel of [h, w, c] as a square, as large as fits into this many pixels; or as it is."""
    h, w = picture.shape[:2]
    times = max(1, min(height // h, width // w))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """From [-1, 1] to 0 ... 255, clipped and rounded."""
    return np.round(np.clip(np.asarray(pictures) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def to_pil(picture: np.ndarray) -> Image.Image:
    """A PIL image, RGB or grey, of a uint8 array [h, w, 3 or 1]."""
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def png(picture: Image.Image | np.ndarray, notes: Mapping[str, Any] | None = None) -> bytes:
    """A PNG file of a PIL image, or of uint8 [h, w, 3 or 1], with `notes` as text chunks."""
    info = PngInfo()
    for name, value in (notes or {}).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        info.add_itxt(name, text)
    image = picture if isinstance(picture, Image.Image) else to_pil(picture)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def webp(image: Image.Image) -> bytes:
    """A small WebP file, which loses a little."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format="WEBP", quality=80)
    return file.getvalue()


def data_address(file: bytes, kind: str) -> str:
    """A picture's file, png or webp, as an address that holds it: for HTML in one piece."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode('ascii')}"


def write_png(
    picture: Image.Image | np.ndarray, path: Path, notes: Mapping[str, Any] | None = None
) -> Path:
    """Writes what `png` makes, whole or not at all."""
    from jaxsd.weights.files import replacing  # processes that decode do without it

    with replacing(path) as temporary:
        temporary.write_bytes(png(picture, notes))
    return path


# Of an animation: the side that tiny pictures are enlarged to, the side up to which every pixel is
# kept (noise compresses badly), and the milliseconds of a frame and of the last one
TINY_SIDE, EXACT_SIDE = 256, 256
FRAME_MS, LAST_MS = 150, 2000


def write_animation(
    frames: Sequence[np.ndarray], path: Path, notes: Mapping[str, Any] | None = None
) -> Path:
    """Writes an animated WebP, whole or not at all, that stays at its last frame for a while.

    frames: uint8 [h, w, 1 or 3]. Tiny ones are enlarged, pixels to squares; up to 256 x 256 they
    come back exactly, larger ones nearly. notes: as a JSON object in EXIF's ImageDescription.
    """
    from jaxsd.weights.files import replacing

    height, width = frames[0].shape[:2]
    images = [to_pil(enlarged(f, TINY_SIDE, TINY_SIDE)).convert("RGB") for f in frames]
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(notes or {})  # EXIF is ASCII, and so is this
    exact = max(height, width) <= EXACT_SIDE
    with replacing(path) as temporary:
        images[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=images[1:],
            duration=[FRAME_MS] * (len(images) - 1) + [LAST_MS],
            loop=0,
            lossless=exact,
            quality=75 if exact else 90,  # without loss: how hard to try
            exif=exif,
        )
    return path
