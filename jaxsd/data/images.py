"""From a picture's bytes to pixels of a given shape: decoded, scaled, cropped, mirrored."""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxsd.errors import JaxsdError
from jaxsd.pictures import as_seen, check_size

Crop = Literal["center", "random"]
# Pillow knows others, one of which runs a program to be read.
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height change places


def read_size(head: bytes) -> tuple[int, int]:
    """(height, width) as the picture is seen, from a file's first bytes.

    JaxsdError if they are not enough, no picture's, or promise too many pixels.
    """
    with _opened(head) as opened:
        return _size(opened)


def _size(opened: Image.Image) -> tuple[int, int]:
    check_size(opened)
    # Of other formats the EXIF may stand at the end, after all the pixels.
    tags = opened.getexif() if opened.format in ("JPEG", "MPO") or "exif" in opened.info else {}
    height, width = opened.height, opened.width
    return (width, height) if tags.get(ORIENTATION, 1) in (5, 6, 7, 8) else (height, width)


def make_image(
    encoded: bytes,
    shape: tuple[int, int],
    rng: np.random.Generator,
    crop: Crop = "center",
    flip: bool = False,
) -> dict[str, np.ndarray]:
    """A picture as an example of training, scaled with Lanczos' filter to just cover a shape.

    shape: (height, width). crop: where the shape is cut out. flip: mirrored in half of all cases.
    Returns "image" uint8 [height, width, 3], and int32 [2] each, as Stable Diffusion XL is told
    them: "original_size" (height, width) of the file, "crop" (top, left) of the shape in the scaled
    picture, "target_size", the shape. JaxsdError if the bytes cannot be decoded.
    """
    height, width = shape
    with _opened(encoded) as opened:
        original = _size(opened)
        scale = max(height / original[0], width / original[1])
        scaled = [max(n, round(scale * side)) for n, side in zip(shape, original, strict=True)]
        room = scaled[0] - height, scaled[1] - width
        mirrored = flip and rng.random() < 0.5
        top, left = (int(rng.integers(r + 1)) if crop == "random" else r // 2 for r in room)
        # A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8, but at no less than twice
        # what is needed: the filter has the last word.
        needed = 2 * scale * opened.width, 2 * scale * opened.height
        opened.draft(None, (max(1, round(needed[0])), max(1, round(needed[1]))))
        image = as_seen(opened)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Only what is kept is scaled: of a thread of pixels, the whole would fill the memory.
    x, y = image.width / scaled[1], image.height / scaled[0]
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    image = image.resize((width, height), Image.Resampling.LANCZOS, box)
    return {
        "image": np.asarray(image),
        "original_size": np.array(original, np.int32),
        "crop": np.array((top, left), np.int32),
        "target_size": np.array(shape, np.int32),
    }


@contextlib.contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    """A picture to be looked at inside; what a dozen decoders raise there becomes a JaxsdError."""
    try:
        with _quiet, Image.open(io.BytesIO(encoded), formats=KINDS) as opened:
            yield opened
    except UnidentifiedImageError:
        raise JaxsdError(f"cannot be decoded: none of {', '.join(KINDS)}") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(f"cannot be decoded: {reason}") from None


class _Quiet:
    """Hides warnings while any thread is inside: Pillow remarks on what is odd, and reads it.

    `warnings.catch_warnings` alone is for one thread: of two, the second would restore what the
    first one has set.
    """

    def __init__(self):
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.saved = warnings.catch_warnings()
                self.saved.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *raised: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.saved.__exit__(None, None, None)


_quiet = _Quiet()
