"""The body of a request for pictures: OpenAI's fields, and those that diffusion has besides."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxsd.serving.limits import Refused


class Body(BaseModel):
    """As in OpenAI's `images.generate`; what is there and says nothing here has one value alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None  # "auto", or WIDTHxHEIGHT
    response_format: Literal["b64_json", "url"] | None = None
    user: str | None = None  # for those who keep accounts
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None

    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    sampler: str | None = None
    image: str | None = None  # base64
    mask: str | None = None
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = None


def parse(data: bytes) -> Body:
    """Refused, with the field's name, for what is no JSON or no such request."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused('the body must be JSON, such as {"prompt": "a red seven"}') from None
    if not isinstance(value, dict):
        raise Refused('the body must be a JSON object, such as {"prompt": "a red seven"}')
    try:
        return Body.model_validate(value)
    except ValidationError as error:
        raise _sentence(error.errors(include_url=False)[0]) from None


def _sentence(error: Any) -> Refused:
    name = str(error["loc"][0]) if error["loc"] else None
    if error["type"] == "missing":
        return Refused(f"{name} is missing", name)
    if error["type"] == "extra_forbidden":
        return Refused(f"{name} is not known; there are {', '.join(Body.model_fields)}", name)
    said = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return Refused(f"{name} must be {said}, not {_short(error['input'])}", name)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "512x768"."""
    width, cross, height = text.partition("x")
    sides = [side for side in (width, height) if side.isascii() and side.isdigit()]
    if not cross or len(sides) < 2 or max(map(len, sides)) > 6:
        raise Refused(f"size must be WIDTHxHEIGHT, such as 512x512, not {_short(text)}", "size")
    return int(width), int(height)
