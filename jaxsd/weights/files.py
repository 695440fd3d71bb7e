"""Paths of every kind, files written whole or not at all, and JSON objects beside the weights."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jaxsd.errors import JaxsdError, ReadFailed

LISTED = 20  # names of each kind in an error
# What a disk of this machine may say, a network's perhaps, and take back another time; of buckets
# all but these
PASSING = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ECONNRESET, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH),
)
LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)

if TYPE_CHECKING:
    AnyPath = Path
else:
    AnyPath = PurePath  # of which an epath.Path is one that does all that a Path does


def as_path(path: str | os.PathLike) -> AnyPath:
    """The path: pathlib's on this machine's disks, etils.epath's for gs:// and its like."""
    if isinstance(path, AnyPath):
        return path
    if "://" not in str(path):
        return Path(path)
    from etils import epath

    try:
        remote: Any = epath.Path(path)
        return remote
    except Exception as error:  # of an unknown scheme, or a library that is not there
        raise JaxsdError(f"cannot open {path}: {error}") from None


def is_local(path: AnyPath) -> bool:
    """Whether it is a file of this machine, which can be mapped into memory."""
    return isinstance(path, Path)


@contextlib.contextmanager
def reading(path: AnyPath, verb: str = "read") -> Iterator[None]:
    """Turns what the disk, or a bucket's library, raises inside into a JaxsdError.

    A ReadFailed if it may pass.
    """
    try:
        yield
    except JaxsdError:
        raise
    except OSError as error:
        lasts = error.errno not in PASSING if is_local(path) else isinstance(error, LASTING)
        kind = JaxsdError if lasts else ReadFailed
        raise kind(f"cannot {verb} {path}: {error.strerror or error}") from None
    except Exception as error:
        if is_local(path):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ReadFailed(f"cannot {verb} {path}: {reason}") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary local path, whose file takes the place of `path` at the end.

    Folders are made as needed. If anything is raised inside, interruption included, the temporary
    file goes away and what stood at `path` stays as it was. JaxsdError where the system refuses.
    """
    path = as_path(path)
    # Not tempfile: it would leave the weights readable by their owner alone, whatever the umask.
    name = f".{path.name}.{uuid.uuid4().hex}.tmp"
    temporary = (path.parent if is_local(path) else Path(tempfile.gettempdir())) / name
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if is_local(path):
            os.replace(temporary, path)
        else:  # in a bucket a file is there when it has been written to its end
            with reading(path, "write"), open(temporary, "rb") as here, path.open("wb") as there:
                shutil.copyfileobj(here, there, 1 << 24)
    except OSError as error:
        raise JaxsdError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def moving_into(folder: str | PurePath) -> Iterator[AnyPath]:
    """Yields a folder to write in, whose files stand in `folder` at the end, or not at all.

    In a bucket it is `folder` itself. JaxsdError where the system refuses.
    """
    target = as_path(folder)
    if not is_local(target):
        yield target
        return
    target = target.absolute()  # "." has no name that another could be made of
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        if not target.exists():
            partial.rename(target)
            return
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            place = target / file.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    except OSError as error:
        raise JaxsdError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


MAX_JSON = 100_000_000  # bytes; a tokenizer of a million words takes a third of it


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; JaxsdError if there is none or it is broken."""
    path = as_path(path)
    with reading(path):
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                if size > MAX_JSON:
                    raise JaxsdError(f"{path} takes {size} bytes: too many for JSON of this kind")
                stream.seek(0)
                text = stream.read()
        except FileNotFoundError:
            raise JaxsdError(f"{path} does not exist") from None
    try:
        values = json.loads(text.decode("utf-8"))
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


def listing(names: list[str]) -> str:
    """The first names of a list, for an error, and how many more there are."""
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
