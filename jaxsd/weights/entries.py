"""What a file's header says about its tensors, and the tensors themselves, mapped and not read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

# As safetensors spells them.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: str  # as safetensors spells it: "F32", "BF16", "I64", ...
    shape: tuple[int, ...]
    offset: int  # of its first entry, in bytes from the start of the file
    strides: tuple[int, ...] | None = None  # in bytes; None is row-major without gaps


class Mapped:
    """A file's tensors by name, as views of its pages: nothing is read before it is used.

    The header must have been checked: entries lie inside the file and have dtypes of DTYPES.
    """

    def __init__(self, file: Path, entries: Mapping[str, Entry]):
        empty = not file.stat().st_size  # which cannot be mapped
        self._bytes = np.empty(0, np.uint8) if empty else np.memmap(file, np.uint8, mode="r")
        self._entries = entries

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, offset, strides = self._entries[name]
        if math.prod(shape) == 0:
            return np.empty(shape, DTYPES[dtype])
        return np.ndarray(shape, DTYPES[dtype], self._bytes, offset, strides)
