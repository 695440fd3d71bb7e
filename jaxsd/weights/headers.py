"""The headers of files of weights, .safetensors or PyTorch's, and which files a folder stands for.

A header tells every name, dtype and shape; nothing else is read here, and neither jax nor a device
is needed.
"""

import json
import math
import os
import re
import struct
from collections.abc import Sequence
from typing import Any

from jaxsd.errors import JaxsdError
from jaxsd.weights import quantised
from jaxsd.weights.entries import ITEMSIZES, Entry, row_major
from jaxsd.weights.files import AnyPath, as_path, listing, read_json, reading
from jaxsd.weights.legacy import MAGIC, read_legacy_header
from jaxsd.weights.pickles import read_pickle_header

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_FILE = "model.safetensors"
# (stem, kind) of what diffusers and transformers have written over the years, best first.
FILES = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
MAX_HEADER = 100_000_000  # bytes; the format's own limit


def component_entries(
    path: str | os.PathLike, variant: str | None = None
) -> tuple[dict[str, Entry], AnyPath]:
    """Every tensor of a component folder (or a file), and the path to name in an error."""
    files = component_files(path, variant)
    headers = [read_entries(file) for file in files]
    merged = {name: entry for header in headers for name, entry in header.items()}
    if len(merged) < sum(map(len, headers)):
        raise JaxsdError(f"{path} holds a tensor in two of its {len(headers)} files")
    return merged, as_path(path) if len(files) > 1 else files[0]


def component_files(path: str | os.PathLike, variant: str | None = None) -> list[AnyPath]:
    """The files of weights that a component folder (or the path of a file) stands for.

    A folder may hold several forms: `choose_files` says which one is taken.
    """
    path = as_path(path)
    with reading(path):
        if not path.is_dir():
            if not path.exists():
                none = "" if path.suffix else f": no {DIFFUSERS_FILE} or {TRANSFORMERS_FILE}"
                raise JaxsdError(f"{path} does not exist{none and none + ' to read'}")
            return [path]
        names = sorted(p.name for p in path.iterdir() if p.is_file() and p.name[0] != ".")
    chosen = choose_files(names, variant)
    if chosen and chosen[0].endswith(".json"):
        return _shards(path / chosen[0], names)
    if chosen:
        return [path / chosen[0]]
    found = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if len(found) == 1:
        return [path / found[0]]
    if found:
        raise JaxsdError(f"{path} holds {', '.join(found)}: name one of them, or their variant")
    raise JaxsdError(f"{path} holds neither {DIFFUSERS_FILE} nor {TRANSFORMERS_FILE}")


def choose_files(names: Sequence[str], variant: str | None = None) -> list[str]:
    """The form to read, of those in a folder with these files: a file, or an index and its shards.

    diffusers' and transformers' names are looked for in this order: the variant before the plain
    one and eight bits last, safetensors before PyTorch's, whole before sharded. Empty if none is
    there.
    """
    for part in (*([f".{variant}"] if variant else []), "", f".{quantised.FORM}"):
        for stem, kind in FILES:
            if (whole := f"{stem}{part}.{kind}") in names:
                return [whole]
            if (index := f"{stem}.{kind}.index{part}.json") in names:
                shard = re.compile(rf"{re.escape(stem + part)}-\d+-of-\d+\.{kind}")
                return [index, *filter(shard.fullmatch, names)]
    return []


def _shards(index: AnyPath, names: Sequence[str]) -> list[AnyPath]:
    """The files that an index (name -> file) speaks of, all beside it."""
    places = read_json(index).get("weight_map")
    told = places.values() if isinstance(places, dict) else ()
    if not told or not all(isinstance(name, str) for name in told):
        raise JaxsdError(f"{index} has no weight_map from names to files")
    shards = sorted(set(told))
    if outside := [name for name in shards if not name or {*"/\\"} & {*name} or name == ".."]:
        raise JaxsdError(f"{index} points outside its folder: {listing(outside)}")
    if missing := [name for name in shards if name not in names]:
        raise JaxsdError(f"{index.parent} lacks {listing(missing)}, which {index.name} names")
    return [index.parent / name for name in shards]


def read_entries(file: AnyPath) -> dict[str, Entry]:
    """What a file of weights holds, by its first bytes; JaxsdError if it is neither kind."""
    with reading(file), file.open("rb") as stream:
        start = stream.read(16)
        if start.startswith(b"PK"):
            return read_pickle_header(stream, file)
        if start.startswith(MAGIC):
            return read_legacy_header(stream, file)
        return _read_safetensors(stream, file)


def _read_safetensors(stream: Any, file: AnyPath) -> dict[str, Entry]:
    """Every tensor's dtype and shape; JaxsdError unless the file holds exactly what it promises.

    Reads the header alone, and never more bytes than the file has.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    start = stream.read(9)
    # Eight bytes of length, then JSON: any other ninth byte is another kind of file.
    if len(start) < 9 or start[8:] != b"{":
        raise JaxsdError(f"{file} is not a safetensors file, nor PyTorch's ({size} bytes)")
    length = struct.unpack("<Q", start[:8])[0]
    if length > MAX_HEADER:
        raise JaxsdError(f"{file} is not a safetensors file (a header of {length} bytes)")
    if 8 + length > size:
        raise JaxsdError(
            f"{file} is truncated: {size} bytes where its header alone takes {8 + length}"
        )
    text = b"{" + stream.read(length - 1)
    try:
        entries, data = _parse(file, json.loads(text.decode("utf-8")), 8 + length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise JaxsdError(f"{file} has a broken safetensors header: {error}") from None
    promised = 8 + length + data
    if size < promised:
        raise JaxsdError(f"{file} is truncated: {size} bytes where its header promises {promised}")
    if size > promised:
        raise JaxsdError(f"{file} is damaged: {size} bytes where its header promises {promised}")
    return entries


def _parse(file: AnyPath, header: dict[str, Any], start: int) -> tuple[dict[str, Entry], int]:
    """The entries and the number of data bytes from `start`; ValueError where the header lies."""
    entries, spans = {}, []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [first, last, *shape]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{name} has shape {shape} at bytes {first} to {last}")
        size = ITEMSIZES.get(dtype, 0)
        if size and last - first != math.prod(shape) * size:
            raise ValueError(f"{name}, {dtype} {shape}, cannot take {last - first} bytes")
        strides = row_major(tuple(shape), size)
        entries[name] = Entry(file, str(dtype), tuple(shape), start + first, strides)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):  # the format allows neither gaps nor overlaps
        if first != end or last < first:
            raise ValueError(f"{name} is at bytes {first} to {last}, not from {end}")
        end = last
    return quantised.paired(entries, header.get("__metadata__")), end
