"""What a file's header says about its tensors, and the tensors themselves, mapped and not read."""

import mmap
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.weights.files import AnyPath, is_local

# As safetensors spells them.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bytes of a number of each dtype that safetensors and PyTorch files hold.
ITEMSIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}


class Entry(NamedTuple):
    """One tensor of a file."""

    file: AnyPath
    dtype: str  # as safetensors spells it: "F32", "BF16", "I64", ...
    shape: tuple[int, ...]
    offset: int  # of its first entry, in bytes from the start of the file
    strides: tuple[int, ...]  # in bytes

    @property
    def span(self) -> int:
        """Bytes from the first to the last entry."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return ITEMSIZES[self.dtype] + sum((n - 1) * stride for n, stride in steps)


def row_major(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides, in bytes, of a tensor without gaps."""
    strides = []
    for length in reversed(shape):
        strides.append(itemsize)
        itemsize *= length
    return tuple(reversed(strides))


class Mapped:
    """A file's tensors as views of its pages: nothing is read before it is used."""

    def __init__(self, file: AnyPath):
        self._file = file

    def __enter__(self) -> "Mapped":
        with open(self._file, "rb") as stream:
            size = stream.seek(0, 2)
            # nothing cannot be mapped
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the map goes when its last view does

    def get(self, entry: Entry) -> np.ndarray:
        """The tensor, not to be used after `release`."""
        return _array(entry, self._map, entry.offset)

    def release(self, entry: Entry) -> None:
        """Gives the pages back: without this the whole file would count as memory in use."""
        first = entry.offset - entry.offset % mmap.PAGESIZE
        if self._map is not None and entry.span and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, entry.offset + entry.span - first)


class Ranges:
    """A file's tensors, each read by its range: for buckets."""

    def __init__(self, file: AnyPath):
        self._file = file

    def __enter__(self) -> "Ranges":
        self._stream = self._file.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def get(self, entry: Entry) -> np.ndarray:
        self._stream.seek(entry.offset)
        data = self._stream.read(entry.span)
        if len(data) < entry.span:
            raise JaxsdError(f"{entry.file} became shorter while it was read")
        return _array(entry, data, 0)

    def release(self, entry: Entry) -> None:
        pass


def open_tensors(file: AnyPath) -> Mapped | Ranges:
    """What gives a file's tensors, within a `with`: a file of this machine is mapped.

    Entries must have been checked: they lie inside the file and have dtypes of DTYPES.
    """
    return Mapped(file) if is_local(file) else Ranges(file)


def _array(entry: Entry, data: mmap.mmap | bytes | None, offset: int) -> np.ndarray:
    if not entry.span:
        return np.empty(entry.shape, DTYPES[entry.dtype])
    return np.ndarray(entry.shape, DTYPES[entry.dtype], data, offset, entry.strides)
