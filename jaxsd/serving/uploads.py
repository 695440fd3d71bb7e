"""Pictures from strangers: a few bytes can promise billions of pixels, or be no picture at all."""

import base64
import binascii
import io

from PIL import Image

from jaxsd.data.images import KINDS
from jaxsd.pictures import as_seen
from jaxsd.serving.limits import Limits, Refused, TooLarge


def read(data: bytes, limits: Limits, param: str = "image") -> Image.Image:
    """An RGB picture of a file's bytes; TooLarge or Refused, before its pixels are decoded."""
    if len(data) > limits.upload_bytes:
        raise TooLarge(f"{param} has {len(data)} bytes; {limits.upload_bytes} are the most", param)
    try:
        with Image.open(io.BytesIO(data), formats=KINDS) as opened:
            pixels = opened.width * opened.height
            if pixels <= limits.upload_pixels:
                return as_seen(opened)
    except Exception as error:  # a dozen kinds, from as many decoders; Pillow's own bomb among them
        kind = type(error).__name__
        if not kind.startswith("DecompressionBomb"):
            raise Refused(
                f"{param} cannot be read: it must be a whole picture, {', '.join(KINDS)}", param
            ) from None
        raise TooLarge(_too_many(param, "far too many", limits), param) from None
    raise TooLarge(_too_many(param, f"{opened.width}x{opened.height}", limits), param)


def _too_many(param: str, found: str, limits: Limits) -> str:
    return f"{param} has {found} pixels; {limits.upload_pixels} are the most"


def read_base64(text: str, limits: Limits, param: str = "image") -> Image.Image:
    """As `read`, of base64, with or without "data:image/png;base64," before it."""
    head, comma, tail = text.partition(",")
    text = tail if comma and head.startswith("data:") else text
    if len(text) > limits.upload_bytes * 4 // 3 + 4:
        raise TooLarge(f"{param} has more than {limits.upload_bytes} bytes", param)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{param} must be a picture's bytes in base64", param) from None
    return read(data, limits, param)
