"""Options that may be given several times, and those of two parts: `--lora a.safetensors:0.8`."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

T = TypeVar("T")
# Given once for each: --lora a --lora b. A list after one flag would swallow what follows.
Several = Annotated[tuple[T, ...], tyro.conf.UseAppendAction]


def split(text: str, kind: Any, default: Any) -> tuple[str, Any]:
    """The two parts of "file:value"; a colon inside the file's name or address is part of it."""
    name, colon, value = text.rpartition(":")
    if not colon or value.startswith("//") or Path(text).exists():
        return text, default
    try:
        return name, kind(value)
    except ValueError:
        return text, default
