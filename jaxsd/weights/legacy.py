"""Reads the header of PyTorch's files of before 1.6, without torch and safely.

Torchvision's weights, LPIPS' and many others of those years are still published so: five pickles in
a row (a magic number, a version, facts of the machine, the state dict, the keys of the storages),
then for each storage, in the order of the keys, its length in numbers and its plain bytes.
"""

import collections
import io
import os
import pickletools
import struct
from typing import Any

from jaxsd.errors import JaxsdError
from jaxsd.weights.entries import ITEMSIZES, Entry
from jaxsd.weights.files import AnyPath
from jaxsd.weights.pickles import MAX_PICKLE, Storage, entry_of, tensors_in, unpickle

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P"  # the first pickle's number


def read_legacy_header(stream: Any, file: AnyPath) -> dict[str, Entry]:
    """Every tensor of a checkpoint, by name, as `read_pickle_header` gives them.

    JaxsdError if the file is damaged or asks for anything but tensors and plain containers.
    """
    try:
        position = 0
        values, storages = [], {}
        for _ in range(5):
            program = _pickle_at(stream, position)
            position += len(program)
            value, named = unpickle(program, file)
            values.append(value)
            storages |= named
        _, version, machine, state, keys = values
        if version != 1001 or machine.get("little_endian") is not True:
            raise ValueError(f"it is of version {version}, or not in little-endian byte order")
        tensors = tensors_in(state)
        places = _places(stream, position, keys, storages)
        return {name: entry_of(file, name, tensor, places) for name, tensor in tensors.items()}
    except (JaxsdError, OSError):
        raise
    except Exception as error:  # pickle raises a dozen kinds on damaged bytes
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise JaxsdError(f"{file} is a damaged PyTorch file: {reason}") from None


def _pickle_at(stream: Any, position: int) -> bytes:
    """The bytes of the pickle that starts here: only its own instructions tell where it ends."""
    for size in (1 << 16, 1 << 22, MAX_PICKLE):
        stream.seek(position)
        data = stream.read(size)
        try:
            [(_, _, stop)] = collections.deque(pickletools.genops(io.BytesIO(data)), maxlen=1)
        except ValueError:
            if len(data) < size or size == MAX_PICKLE:  # there is no more of it
                raise
        else:
            return data[: (stop or 0) + 1]
    raise AssertionError("unreachable")


def _places(
    stream: Any, position: int, keys: Any, storages: dict[str, Storage]
) -> dict[str, tuple[int, int]]:
    """(offset in the file, bytes) of each storage."""
    size, places = stream.seek(0, os.SEEK_END), {}
    for key in keys:
        stream.seek(position)
        (numel,) = struct.unpack("<q", stream.read(8))
        storage, start = storages[key], position + 8
        held = numel * ITEMSIZES[storage.dtype]
        if numel != storage.numel or start + held > size:
            raise ValueError(f"storage {key} reaches beyond the end of the file")
        places[key] = start, held
        position = start + held
    return places
