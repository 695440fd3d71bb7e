"""Parquet and Arrow tables of pictures, as Hugging Face's `datasets` writes them.

The column of pictures holds their bytes, or structs {bytes, path} of them.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxsd.data.captions import as_caption, choose_column
from jaxsd.data.files import File, is_remote, local_copy, locate, open_file, stamp
from jaxsd.errors import JaxsdError

IMAGE_NAMES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
GROUPS = 16  # row groups kept in memory in each process; `datasets` writes 100 rows to each


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of some files. `starts` int64 [files + 1]: the number of each file's first row."""

    files: Sequence[File]
    starts: np.ndarray
    image: str
    caption: str | None
    read: Callable[[File, int, tuple[str, ...]], dict[str, Any]]
    readers = GROUPS // 2  # of more, each would push out the groups of others

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = (self.image,) if self.caption is None else (self.image, self.caption)
        row = self.read(*locate(self.files, self.starts, index), columns)
        image = row[self.image]
        if isinstance(image, dict):
            image = image.get("bytes")
        if image is None:
            raise JaxsdError(f"{self.name(index)} holds no bytes of its picture")
        caption = as_caption(row[self.caption]) if self.caption is not None else ""
        return {"image": image, "caption": caption, "name": self.name(index)}

    def name(self, index: int) -> str:
        file, row = locate(self.files, self.starts, index)
        return f"{file.name}:{row}"

    def head(self, index: int, size: int) -> bytes:
        return self[index]["image"]  # the row is read whole, whatever is wanted of it

    def stamp(self) -> str:
        return stamp(self.files)


def parquet_files(files: Sequence[File], caption_column: str | None = None) -> Table:
    """The rows of Parquet files, read a row group at a time."""
    counts, schemas = [], []
    for file in files:
        with _reading(file):
            counts.append(_parquet(file).metadata.num_rows)
            schemas.append(_parquet(file).schema_arrow)
    return _table(files, counts, schemas, caption_column, _parquet_row)


def arrow_files(files: Sequence[File], caption_column: str | None = None) -> Table:
    """The rows of Arrow files or streams, mapped into memory.

    What `datasets` has cached of other tables (cache-*.arrow) is left out.
    """
    kept = [file for file in files if not file.name.rpartition("/")[2].startswith("cache-")]
    counts, schemas = [], []
    for file in kept:
        with _reading(file):
            counts.append(_arrow(file).num_rows)
            schemas.append(_arrow(file).schema)
    return _table(kept, counts, schemas, caption_column, _arrow_row)


def _table(
    files: Sequence[File],
    counts: Sequence[int],
    schemas: Sequence[Any],
    caption_column: str | None,
    read: Callable[[File, int, tuple[str, ...]], dict[str, Any]],
) -> Table:
    if not files:
        raise JaxsdError(
            "no tables but those that `datasets` has cached: name the files themselves"
        )
    image, caption = _columns(schemas[0], caption_column, files[0].path)
    for file, schema in zip(files, schemas, strict=True):
        if lacking := {image, caption} - {None, *schema.names}:
            raise JaxsdError(
                f"{file.path} has no column {sorted(lacking)[0]!r}, which {files[0].path} has"
            )
    starts = np.cumsum([0, *counts], dtype=np.int64)
    return Table(files, starts, image, caption, read)


def _columns(schema: Any, caption_column: str | None, where: str) -> tuple[str, str | None]:
    """The columns of pictures and of captions."""
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)

    def is_picture(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind)

    pictures = [field.name for field in schema if is_picture(field.type)]
    named = [name for word in IMAGE_NAMES for name in pictures if name.lower() == word]
    if not pictures or (len(pictures) > 1 and not named):
        there = f"bytes are in {', '.join(pictures)}" if pictures else ", ".join(schema.names)
        raise JaxsdError(
            f"{where} has no column `image` of bytes or of structs {{bytes, path}}, but {there}"
        )
    texts = [field.name for field in schema if is_text(field.type)]
    return (named or pictures)[0], choose_column(texts, caption_column, where)


# --- reading: what is open stays open, in each process for itself -------------------------------

_LOCK = threading.Lock()


@contextlib.contextmanager
def _reading(file: File) -> Iterator[None]:
    """Turns what pyarrow raises over a broken file into a JaxsdError."""
    try:
        yield
    except (OSError, ValueError, _library().ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(f"cannot read {file.path}: {reason}") from None


def _library() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise JaxsdError(
            "Parquet and Arrow need the library pyarrow: pip install 'jaxsd[data]'"
        ) from None
    return pyarrow


@functools.lru_cache(maxsize=256)
def _parquet(file: File) -> Any:
    _library()
    from pyarrow import parquet

    return parquet.ParquetFile(open_file(file.path) if is_remote(file.path) else file.path)


@functools.lru_cache(maxsize=GROUPS)
def _group(file: File, group: int, columns: tuple[str, ...]) -> Any:
    return _parquet(file).read_row_group(group, list(columns), use_threads=False)


@functools.lru_cache(maxsize=256)
def _group_starts(file: File) -> np.ndarray:
    metadata = _parquet(file).metadata
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return np.cumsum([0, *counts], dtype=np.int64)


def _parquet_row(file: File, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
    with _reading(file):
        with _LOCK:  # a ParquetFile is for one thread at a time
            starts = _group_starts(file)
            group = int(np.searchsorted(starts, row, "right")) - 1
            table = _group(file, group, columns)
        return _row(table, row - int(starts[group]), columns)


@functools.cache
def _arrow(file: File) -> Any:
    pyarrow = _library()
    from pyarrow import ipc

    mapped = pyarrow.memory_map(local_copy(file))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (ipc.open_file if is_file else ipc.open_stream)(mapped).read_all()


def _arrow_row(file: File, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
    with _reading(file):
        return _row(_arrow(file), row, columns)


def _row(table: Any, row: int, columns: Sequence[str]) -> dict[str, Any]:
    return {name: table.column(name)[row].as_py() for name in columns}


def read_rows(raw: bytes, where: str) -> list[dict[str, Any]]:
    """The rows of a small Parquet file, such as the metadata of a folder of pictures."""
    pyarrow = _library()
    from pyarrow import parquet

    with _reading(File(where, where, len(raw))):
        return parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
