"""Files written whole or not at all, and the JSON objects that stand beside the weights."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsd.errors import JaxsdError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes the place of `path` at the end.

    Folders are made as needed. If anything is raised inside, interruption included, the temporary
    file goes away and what stood at `path` stays as it was. JaxsdError where the system refuses.
    """
    path = Path(path)
    # Not tempfile: it would leave the weights readable by their owner alone, whatever the umask.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise JaxsdError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; JaxsdError if there is none or it is broken."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JaxsdError(f"{path} does not exist") from None
    except OSError as error:
        raise JaxsdError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise JaxsdError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise JaxsdError(f"{path} holds a JSON {type(values).__name__}, not an object {{...}}")
    return values


def write_json(path: str | os.PathLike, values: dict[str, Any]) -> None:
    """Writes a JSON object, whole or not at all; JaxsdError if the target cannot be written."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
