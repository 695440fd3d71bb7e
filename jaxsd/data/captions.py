"""Which column of a table, or field of a JSON object, is the caption."""

from collections.abc import Sequence
from typing import Any

from jaxsd.errors import JaxsdError

NAMES = ("text", "caption", "prompt", "captions", "description")


def choose_column(columns: Sequence[str], wanted: str | None, where: str) -> str | None:
    """The name of the caption's column among `columns`, those that hold text.

    wanted: what the user asked for. Without it, the first of NAMES that is there, whatever its
    case, or else the only column there is. None if there is no column at all: captions are empty.
    JaxsdError if there are several, and none has such a name.
    """
    if wanted is not None:
        if wanted not in columns:
            there = (
                f"the columns of text are {', '.join(columns)}" if columns else "none holds text"
            )
            raise JaxsdError(f"no caption column {wanted!r} in {where}: {there}")
        return wanted
    for name in NAMES:
        for column in columns:
            if column.lower() == name:
                return column
    if len(columns) > 1:
        raise JaxsdError(
            f"cannot tell which column of {where} is the caption: give --caption-column one of "
            f"{', '.join(columns)}"
        )
    return columns[0] if columns else None


def as_caption(value: Any) -> str:
    """A caption from a cell: text, the first of several texts, or nothing for what is empty.

    Half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark.
    """
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return "" if value is None else str(value).encode("utf-8", "replace").decode().strip()
