"""The files of a data set, on this machine's disks or in a bucket: listed, and read by ranges."""

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.weights.files import as_path, reading, replacing

READERS = 32  # threads at a time, which wait for a disk or a bucket for the most part
MAX_PATTERN = 100_000  # files that braces may stand for


class File(NamedTuple):
    """A file: where it is, what it is called inside its data set, and its size in bytes."""

    path: str
    name: str
    size: int


def locate(files: Sequence[File], starts: np.ndarray, index: int) -> tuple[File, int]:
    """The file that holds entry `index`, and its place in there.

    starts: int64 [files + 1], the number of each file's first entry. IndexError beyond the last.
    """
    if not 0 <= index < starts[-1]:
        raise IndexError(index)
    number = int(np.searchsorted(starts, index, "right")) - 1
    return files[number], index - int(starts[number])


def is_remote(path: str) -> bool:
    """Whether a path is of a bucket (gs://) or the like, not of this machine."""
    return "://" in path


def file_system(path: str) -> tuple[Any, str]:
    """fsspec's file system of a bucket, and the path inside it; JaxsdError if there is none."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except Exception as error:  # of an unknown scheme, or a library that is not there
        raise JaxsdError(f"cannot open {path}: {error}") from None


def find_files(data: str) -> list[File]:
    """Every file that a path stands for, sorted by name; hidden ones are left out.

    data: a folder (with all below it), a file, or a pattern with braces or stars, such as
    `gs://bucket/{0000..0010}.tar` or `shards/*.parquet`. JaxsdError if there is nothing.
    """
    if _is_pattern(data):
        parts = [_matching(one) for one in expand_braces(data)]
        paths = sorted({path for part in parts for path in part})
        folder = re.split(r"[{*?\[]", data)[0].rpartition("/")[0]
        return [file for path in paths for file in _listed(path, folder)]
    with reading(as_path(data)):
        return sorted(_listed(data, data), key=lambda file: file.name)


def _is_pattern(data: str) -> bool:
    # A folder may be called "a[1]"; what stands there is meant.
    return any(c in data for c in "{*?[") and (is_remote(data) or not os.path.exists(data))


def expand_braces(pattern: str) -> list[str]:
    """The names that `{0000..0010}` and `{a,b}` stand for, in order, as a shell says them."""
    done, todo = [], [pattern]
    while todo:
        text = todo.pop(0)
        found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
        if not found:
            done.append(text)
        else:
            first, last, listed = found.groups()
            if listed is not None:
                words = listed.split(",")
            else:
                if int(last) - int(first) >= MAX_PATTERN:
                    raise JaxsdError(f"{pattern} stands for more than {MAX_PATTERN} files")
                words = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
            todo += [text[: found.start()] + word + text[found.end() :] for word in words]
        if len(done) + len(todo) > MAX_PATTERN:
            raise JaxsdError(f"{pattern} stands for more than {MAX_PATTERN} files")
    return done


def _matching(path: str) -> list[str]:
    if not any(c in path for c in "*?["):
        return [path]
    if is_remote(path):
        fs, inside = file_system(path)
        scheme = path.split("://")[0]
        with reading(as_path(path)):
            return [f"{scheme}://{str(found).lstrip('/')}" for found in fs.glob(inside)]
    return glob.glob(path, recursive=True)


def _listed(path: str, root: str) -> list[File]:
    """The files at or below a path, named from `root`."""
    if is_remote(path):
        fs, inside = file_system(path)
        scheme, top = path.split("://")[0], inside.rstrip("/")
        with reading(as_path(path)):
            found = {str(k): int(v["size"]) for k, v in fs.find(inside, detail=True).items()}
        base = file_system(root)[1].rstrip("/") if root != path else top
        rows = [File(f"{scheme}://{k.lstrip('/')}", k, size) for k, size in found.items()]
    else:
        top, base = os.path.abspath(path), os.path.abspath(root)
        if os.path.isfile(top):
            rows = [File(top, top, os.path.getsize(top))]
        else:
            rows = [_local(folder, name) for folder, _, names in os.walk(top) for name in names]
    if not rows:
        raise JaxsdError(f"{path} does not exist, or there is no file in it")
    named = [row._replace(name=_inside(row.name, base)) for row in rows]
    return [f for f in named if not any(part.startswith(".") for part in f.name.split("/"))]


def _local(folder: str, name: str) -> File:
    path = os.path.join(folder, name)
    try:
        return File(path, path, os.path.getsize(path))
    except OSError:  # a link to nothing: told when it is read
        return File(path, path, 0)


def _inside(path: str, base: str) -> str:
    """The name of a path inside a folder, with / between its parts; its last part for a file."""
    path, base = path.replace(os.sep, "/"), base.replace(os.sep, "/").rstrip("/") + "/"
    return path.removeprefix(base) if path.startswith(base) else path.rpartition("/")[2]


def read_bytes(path: str, start: int = 0, size: int | None = None) -> bytes:
    """`size` bytes of a file from `start`, or fewer where it ends; JaxsdError if it cannot be."""
    with reading(as_path(path)):
        if is_remote(path):
            fs, inside = file_system(path)
            return fs.cat_file(inside, start, None if size is None else start + size)
        with open(path, "rb") as stream:
            stream.seek(start)
            return stream.read(-1 if size is None else size)


def open_file(path: str) -> Any:
    """A binary file to read and seek in. In a bucket little is fetched beyond what is asked for."""
    with reading(as_path(path)):
        if is_remote(path):
            fs, inside = file_system(path)
            return fs.open(inside, "rb", block_size=1 << 16)
        return open(path, "rb")


def local_copy(file: File) -> str:
    """A path on this machine with the contents of a file, for libraries that map or open only such.

    What is in a bucket is copied once, into $JAXSD_CACHE or ~/.cache/jaxsd.
    """
    if not is_remote(file.path):
        return file.path
    home = Path(os.environ.get("JAXSD_CACHE", "~/.cache/jaxsd")).expanduser()
    copy = home / "data" / stamp([file._replace(name=file.path)]) / file.path.rpartition("/")[2]
    if not (copy.exists() and copy.stat().st_size == file.size):
        with replacing(copy) as temporary, open_file(file.path) as there, reading(as_path(copy)):
            with open(temporary, "wb") as here:
                shutil.copyfileobj(there, here, 1 << 24)
    return str(copy)


def stamp(files: Iterable[File]) -> str:
    """A short text that is another one as soon as a file has another name or size."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
