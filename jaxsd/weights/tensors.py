"""Reads and writes the weights of one component (`unet/`, `vae/`, `text_encoder/`).

The header of a file, .safetensors or PyTorch's, tells every name, dtype and shape, so a file is
accepted or refused, with all that is wrong listed at once, before any tensor is read.
"""

import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.weights import quantised
from jaxsd.weights.entries import DTYPES, STORED, Entry, Mapped, Ranges, open_tensors
from jaxsd.weights.files import AnyPath, as_path, is_local, reading, replacing
from jaxsd.weights.headers import DIFFUSERS_FILE, component_entries
from jaxsd.weights.matching import match

# Where an array goes, of its name and shape; or one place for all of them.
Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

ALIGNMENT = 64  # bytes, of what XLA's CPU backend takes without a copy
BATCH = 1 << 24  # bytes of a file that are given back at once: each turn costs the program time


# --- Reading ---------------------------------------------------------------------------------


def load(
    path: str | os.PathLike,
    like: Net | Mapping[str, tuple[int, ...]],
    dtype: Any = None,
    variant: str | None = None,
    sharding: Placement | None = None,
) -> Params:
    """The weights of a component under the names, and in the shapes, that `like` asks for.

    path: a component folder, or a .safetensors, .bin, .pt or .ckpt file; on a disk, or in a bucket
    (gs://). like: a Net, or a dict from names to shapes. dtype: float32, float16 or bfloat16; by
    default each array keeps the dtype of the file, and weights in eight bits become float32.
    variant: "fp16", say: which of a folder's files, where it has that one. sharding: where the
    arrays go as they are read, by default to jax's first device; of a function (name, shape) ->
    Sharding, or one for all.

    JaxsdError if a file is missing, damaged, or differs from `like`: then the message lists every
    missing, unexpected and misshapen name.
    """
    entries, where = component_entries(path, variant)
    return read(entries, like, dtype, sharding, where)


def read(
    entries: Mapping[str, Entry],
    like: Net | Mapping[str, tuple[int, ...]],
    dtype: Any,
    sharding: Placement | None,
    where: AnyPath,
) -> Params:
    """As `load`, of tensors that are known by their headers; `where` is named in errors.

    On the host there is never more than one tensor besides those that are to stay there, and pages
    of files. As always in jax the arrays may be used at once, but need not be there yet.
    """
    shapes = like.shapes if isinstance(like, Net) else like
    wanted = None if dtype is None else as_dtype(dtype)
    sources = match(entries, shapes, where)
    files: dict[AnyPath, list[str]] = defaultdict(list)
    for name, source in sources.items():
        files[entries[source].file].append(name)
    params = {}
    releases = ThreadPoolExecutor(1)
    for file, names in files.items():
        # what was read, or is on its way to a device, must not pile up here; mapped pages may
        lazy = jax.default_backend() == "cpu" and is_local(file)
        batch: list[tuple[jax.Array, Entry]] = []
        waiting = 0  # bytes in the batch
        with reading(file), open_tensors(file) as tensors:
            for name in sorted(names, key=lambda name: entries[sources[name]].offset):
                entry = entries[sources[name]]
                array = tensors.get(entry).reshape(shapes[name])
                params[name] = _place(array, wanted, sharding, name)
                del array
                batch.append((params[name], entry))
                waiting += entry.span
                if not lazy:
                    _release(batch, tensors)
                    batch, waiting = [], 0
                elif waiting > BATCH:
                    releases.submit(_release, batch, tensors)
                    batch, waiting = [], 0
            releases.submit(_release, batch, tensors)
    releases.shutdown(wait=False)  # that is, once it has done what it was given
    return {name: params[name] for name in shapes}


def _place(
    array: np.ndarray, dtype: np.dtype | None, sharding: Placement | None, name: str
) -> jax.Array:
    """Puts a tensor on the devices; returns before it is there."""
    kept = array.dtype if dtype is None else dtype
    if callable(sharding):
        sharding = sharding(name, array.shape)
    if sharding is None:
        return jax.device_put(_host(array, kept))
    # each device is given its piece alone: no other host or device need hold the whole
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: _host(array[index], kept), dtype=kept
    )


def _release(batch: list[tuple[jax.Array, Entry]], tensors: Mapped | Ranges) -> None:
    """Gives the pages of tensors back once the arrays are there."""
    for placed, entry in batch:
        if not placed.is_deleted():  # given away meanwhile, to a program that donates it
            placed.block_until_ready()
        tensors.release(entry)


def _host(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array where XLA can take it from: on a CPU, what is aligned is taken as it is.

    So the pages of a mapped file become the parameters themselves, as in PyTorch, and are read when
    they are first used; the file may be replaced, but must not be cut, while they live. What is not
    aligned jax copies, behind the program's back. What is made here is aligned.
    """
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    size = array.size * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + size].view(dtype).reshape(array.shape)
    np.copyto(copy, array, casting="unsafe")
    return copy


# --- Writing ---------------------------------------------------------------------------------


def save(
    params: Params,
    path: str | os.PathLike,
    name: str = DIFFUSERS_FILE,
    dtype: Any = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> AnyPath:
    """Writes a component's weights, whole or not at all, and returns the file's path.

    path: the component's folder, in which `name` is written, or the path of a .safetensors file.
    dtype: float32, float16 or bfloat16, or int8 (`quantised.py`, which jaxsd alone reads); by
    default each array keeps its own. metadata: what the header says besides. JaxsdError if an array
    has another dtype or the target cannot be written.
    """
    path = as_path(path)
    file = path if path.suffix == ".safetensors" else path / name
    for key, value in params.items():
        if np.dtype(value.dtype) not in DTYPES.values():
            raise JaxsdError(f"cannot save {key}: {value.dtype} is not float32, float16, bfloat16")
    if quantised.is_asked_for(dtype):
        eight = quantised.kinds({key: value.shape for key, value in params.items()})
        told = {**quantised.METADATA, **metadata}
        write(file, eight, lambda key: quantised.stored(params, key), told)
        return file
    wanted = None if dtype is None else as_dtype(dtype)
    kept = {key: (wanted or np.dtype(value.dtype), value.shape) for key, value in params.items()}
    write(file, kept, lambda key: np.asarray(params[key], dtype=wanted), metadata)
    return file


def write(
    file: AnyPath,
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    array: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a .safetensors file, whole or not at all, asking for one array at a time by name.

    kinds: each array's dtype and shape, which must be what `array` returns. metadata: what the
    header says besides.
    """
    # Not safetensors' save_file, which makes files that only their owner may read and wants every
    # array on the host at once.
    known = {dtype: code for code, dtype in STORED.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (dtype, shape) in kinds.items()}
    # Each number in its place, and all but the odd ones where a reader can take them as they are.
    order = sorted(kinds, key=lambda k: (sizes[k] % ALIGNMENT > 0, -kinds[k][0].itemsize, k))
    end = 0
    for key in order:
        dtype, shape = kinds[key]
        start, end = end, end + sizes[key]
        header[key] = {
            "dtype": known[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            stream.write(array(key).tobytes())


def as_dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    except TypeError:
        found = None
    if found is None or found not in DTYPES.values():
        raise JaxsdError(f"dtype {dtype} is not supported: float32, float16 or bfloat16")
    return found
