"""What a file's header says about its tensors, and the tensors themselves, mapped and not read."""

import math
import mmap
from typing import NamedTuple, Optional

import ml_dtypes
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.weights import quantised
from jaxsd.weights.files import AnyPath, is_local

# As safetensors spells them.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What is read as it stands; of int8 with scales weights are made (`quantised.py`).
STORED = DTYPES | {"I8": np.dtype(np.int8)}
SCALED = "I8 with scales"
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
    scale: Optional["Entry"] = None  # of weights in eight bits

    @property
    def kind(self) -> str:
        """How its numbers are kept: its dtype, or SCALED."""
        return self.dtype if self.scale is None else SCALED

    @property
    def is_weight(self) -> bool:
        """Whether weights can be made of it: float32, float16, bfloat16, or int8 with scales."""
        return self.dtype in DTYPES or self.kind == SCALED

    @property
    def size(self) -> int:
        """The bytes of its numbers, with those of its scales."""
        own = ITEMSIZES.get(self.dtype, 0) * math.prod(self.shape)
        return own + (self.scale.size if self.scale else 0)

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
        array = _array(entry, self._map, entry.offset)
        return _whole(array, entry, self)

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
        return _whole(_array(entry, data, 0), entry, self)

    def release(self, entry: Entry) -> None:
        pass


def open_tensors(file: AnyPath) -> Mapped | Ranges:
    """What gives a file's tensors, within a `with`: a file of this machine is mapped.

    Entries must have been checked: they lie inside the file and are weights.
    """
    return Mapped(file) if is_local(file) else Ranges(file)


def _array(entry: Entry, data: mmap.mmap | bytes | None, offset: int) -> np.ndarray:
    if not entry.span:
        return np.empty(entry.shape, STORED[entry.dtype])
    return np.ndarray(entry.shape, STORED[entry.dtype], data, offset, entry.strides)


def _whole(array: np.ndarray, entry: Entry, tensors: Mapped | Ranges) -> np.ndarray:
    if entry.scale is None:
        return array
    return quantised.restored(array, tensors.get(entry.scale), entry.file)
