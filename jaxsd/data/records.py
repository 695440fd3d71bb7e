"""ArrayRecord files, and what a record of ours is: arrays and texts in safetensors' format.

A record is the bytes of a safetensors file: arrays by name, and texts by name in its metadata. It
is read without running anything, and any safetensors library reads it. A picture is
{"image": uint8 [n], its encoded bytes, "caption": text, "name": text}; cached latents, and whatever
else is computed once, are records of the same kind.
"""

import contextlib
import dataclasses
import functools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsd.data.captions import as_caption, choose_column
from jaxsd.data.files import READERS, File, local_copy, locate, stamp
from jaxsd.errors import JaxsdError

SUFFIX = ".array_record"
_LOCK = threading.Lock()


def encode_record(values: Mapping[str, np.ndarray | bytes | str]) -> bytes:
    """The bytes of a record. `bytes` become uint8 [n], and are arrays when they are read."""
    from safetensors.numpy import save

    arrays = {k: _as_array(v) for k, v in values.items() if not isinstance(v, str)}
    return save(arrays, {k: v for k, v in values.items() if isinstance(v, str)})


def _as_array(value: np.ndarray | bytes) -> np.ndarray:
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    return np.ascontiguousarray(value)


def decode_record(record: bytes) -> dict[str, Any]:
    """The arrays and texts of a record; JaxsdError if it is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(record)  # which checks the header that is read again here, for its texts
        size = int.from_bytes(record[:8], "little")
        texts = json.loads(record[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise JaxsdError(f"a record that is not in safetensors' format: {reason}") from None
    return {**texts, **arrays}


def write_records(path: str, records: Iterable[Mapping[str, np.ndarray | bytes | str]]) -> int:
    """Writes an ArrayRecord file on this machine; returns the number of records in it.

    It is there whole or not at all.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    from jaxsd.weights.files import replacing

    count = 0
    with replacing(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")  # a record is read by itself
        try:
            for record in records:
                writer.write(encode_record(record))
                count += 1
        finally:
            writer.close()
    return count


@dataclasses.dataclass(frozen=True)
class Records:
    """Random access to records. `starts` int64 [files + 1]: the number of each file's first one."""

    files: Sequence[File]
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, row = locate(self.files, self.starts, index)
        with _reading(file), _LOCK:  # not every version reads from several threads at once
            raw = _reader(file).read([row])[0]
        return decode_record(raw)

    def name(self, index: int) -> str:
        file, row = locate(self.files, self.starts, index)
        return f"{file.name}:{row}"

    def stamp(self) -> str:
        return stamp(self.files)


def open_records(files: Sequence[File]) -> Records:
    """The records of ArrayRecord files; those in a bucket are copied to this machine first."""
    counts = []
    for file in files:
        with _reading(file):
            counts.append(_reader(file).num_records())
    return Records(files, np.cumsum([0, *counts], dtype=np.int64))


@contextlib.contextmanager
def _reading(file: File) -> Iterator[None]:
    """Turns what the library raises over a broken file into a JaxsdError."""
    try:
        yield
    except JaxsdError:
        raise
    except Exception as error:  # it raises errors of its own and of every kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(f"cannot read {file.path} as an ArrayRecord: {reason}") from None


@functools.lru_cache(maxsize=256)
def _reader(file: File) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(local_copy(file), "readahead_buffer_size:0")
    if not reader.ok():  # else a file that is cut off would pass for an empty one
        raise JaxsdError(f"{file.path} is not a whole ArrayRecord file: fetch or make it again")
    return reader


@dataclasses.dataclass(frozen=True)
class PictureRecords:
    """Pictures and captions as records."""

    records: Records
    caption: str
    readers = READERS

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = record.get("image")
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 1):
            raise JaxsdError(f"{self.name(index)} has no `image`, uint8 [n], the encoded picture")
        caption = as_caption(record.get(self.caption))
        return {"image": image.tobytes(), "caption": caption, "name": self.name(index)}

    def name(self, index: int) -> str:
        return self.records.name(index)

    def head(self, index: int, size: int) -> bytes:
        return self[index]["image"]

    def stamp(self) -> str:
        return self.records.stamp()


def picture_records(files: Sequence[File], caption_column: str | None = None) -> PictureRecords:
    """Pictures in ArrayRecord files that `write_records` wrote. Captions are their `caption`."""
    source = PictureRecords(open_records(files), caption_column or "caption")
    if len(source):  # other kinds of records, and a mistyped column, are told at once
        source[0]
        texts = [name for name, value in source.records[0].items() if isinstance(value, str)]
        choose_column(texts, caption_column, files[0].path)
    return source
