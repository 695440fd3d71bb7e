"""Reads and writes the weights of one component (`unet/`, `vae/`, `text_encoder/`).

The header of a file, .safetensors or PyTorch's, tells every name, dtype and shape, so a file is
accepted or refused, with all that is wrong listed at once, before any tensor is read.
"""

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.weights.entries import DTYPES, Entry, Mapped
from jaxsd.weights.files import read_json, replacing
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
LISTED = 20  # names of each kind in an error

# diffusers before 0.13 named the VAE's attention layers so, as the CompVis weights still do.
OLD_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


# --- Reading ---------------------------------------------------------------------------------


def load(
    path: str | os.PathLike,
    like: Net | Mapping[str, tuple[int, ...]],
    dtype: Any = None,
    variant: str | None = None,
) -> Params:
    """The weights of a component under the names, and in the shapes, that `like` asks for.

    path: a component folder, or a .safetensors, .bin, .pt or .ckpt file. like: a Net, or a dict
    from names to shapes. dtype: float32, float16 or bfloat16; by default each array keeps the dtype
    of the file. variant: "fp16", say: which of a folder's files, where it has that one.

    JaxsdError if a file is missing, damaged, or differs from `like`: then the message lists every
    missing, unexpected and misshapen name.
    """
    wanted = None if dtype is None else _dtype(dtype)
    shapes = like.shapes if isinstance(like, Net) else like
    headers = {file: read_entries(file) for file in component_files(path, variant)}
    merged = {name: entry for entries in headers.values() for name, entry in entries.items()}
    if len(merged) < sum(map(len, headers.values())):
        raise JaxsdError(f"{path} holds a tensor in two of its {len(headers)} files")
    sources = match(merged, shapes, Path(path) if len(headers) > 1 else next(iter(headers)))
    names = {source: name for name, source in sources.items()}
    params = {}
    for file, entries in headers.items():
        tensors = Mapped(file, entries)
        for source in entries.keys() & names.keys():
            name = names[source]
            # A copy: the file may be replaced or cut while the array lives.
            params[name] = jnp.array(tensors[source].reshape(shapes[name]), dtype=wanted)
    return {name: params[name] for name in shapes}


def component_files(path: str | os.PathLike, variant: str | None = None) -> list[Path]:
    """The files of weights that a component folder (or the path of a file) stands for.

    A folder may hold several forms: `choose_files` says which one is taken.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            file = "" if path.suffix else f": no {DIFFUSERS_FILE} or {TRANSFORMERS_FILE} to read"
            raise JaxsdError(f"{path} does not exist{file}")
        return [path]
    names = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    chosen = choose_files(names, variant)
    if chosen and chosen[0].endswith(".json"):
        return _shards(path / chosen[0])
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
    one, safetensors before PyTorch's, whole before sharded. Empty if none is there.
    """
    for part in (f".{variant}", "") if variant else ("",):
        for stem, kind in FILES:
            if (whole := f"{stem}{part}.{kind}") in names:
                return [whole]
            if (index := f"{stem}.{kind}.index{part}.json") in names:
                shard = re.compile(rf"{stem}{part}-\d+-of-\d+\.{kind}")
                return [index, *filter(shard.fullmatch, names)]
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index (name -> file) speaks of, all beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise JaxsdError(f"{index} has no weight_map from names to files")
    shards = sorted(set(places.values()))
    if outside := [name for name in shards if name != Path(name).name or name in ("", "..")]:
        raise JaxsdError(f"{index} points outside its folder: {_listing(outside)}")
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise JaxsdError(f"{index.parent} lacks {_listing(missing)}, which {index.name} names")
    return [index.parent / name for name in shards]


def read_entries(file: Path) -> dict[str, Entry]:
    """What a file of weights holds, by its first bytes; JaxsdError if it is neither kind."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(16)
    except OSError as error:
        raise JaxsdError(f"cannot read {file}: {error.strerror or error}") from error
    if start.startswith(b"PK"):
        return read_pickle_header(file)
    # The magic number in PyTorch's own format, pickled; a tar archive before that.
    if start.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P"):
        raise JaxsdError(
            f"{file} is in the format of PyTorch before 1.6: load it there, and save it again "
            "with torch.save or as safetensors"
        )
    return read_header(file)


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor's dtype and shape; JaxsdError unless the file holds exactly what it promises.

    Reads the header alone, and never more bytes than the file has.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
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
    except OSError as error:
        raise JaxsdError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        entries, data = _parse(json.loads(text.decode("utf-8")), 8 + length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise JaxsdError(f"{file} has a broken safetensors header: {error}") from None
    promised = 8 + length + data
    if size < promised:
        raise JaxsdError(f"{file} is truncated: {size} bytes where its header promises {promised}")
    if size > promised:
        raise JaxsdError(f"{file} is damaged: {size} bytes where its header promises {promised}")
    return entries


def _parse(header: dict[str, Any], start: int) -> tuple[dict[str, Entry], int]:
    """The entries and the number of data bytes from `start`; ValueError where the header lies."""
    entries, spans = {}, []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [first, last, *shape]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{name} has shape {shape} at bytes {first} to {last}")
        if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name}, {dtype} {shape}, cannot take {last - first} bytes")
        entries[name] = Entry(str(dtype), tuple(shape), start + first)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):  # the format allows neither gaps nor overlaps
        if first != end or last < first:
            raise ValueError(f"{name} is at bytes {first} to {last}, not from {end}")
        end = last
    return entries, end


def match(
    header: dict[str, Entry], shapes: Mapping[str, tuple[int, ...]], file: Path
) -> dict[str, str]:
    """Which tensor of the file each wanted name is; JaxsdError lists everything that differs."""
    sources, unexpected, misshapen, alien = {}, [], [], []
    for source in sorted(header, key=lambda name: name not in shapes):  # true names first
        name = wanted_name(source, shapes)
        if name is None:
            continue
        if name not in shapes or name in sources:
            unexpected.append(source)
            continue
        sources[name] = source
        dtype, shape = header[source][:2]
        if not same_shape(name, shape, shapes[name]):
            misshapen.append(f"{name} {list(shape)} instead of {list(shapes[name])}")
        if dtype not in DTYPES:
            alien.append(f"{name} {dtype}")
    problems = {
        "missing": [name for name in shapes if name not in sources],
        "unexpected": unexpected,
        "misshapen": misshapen,
        "not float32, float16 or bfloat16": alien,
    }
    lists = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in problems.items() if names]
    if lists:
        raise JaxsdError(f"{file} does not fit the model: {'; '.join(lists)}")
    return sources


def wanted_name(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name in `shapes` that a file's `name` stands for; None if it is to be ignored.

    A name without any counterpart comes back as it is.
    """
    if name in shapes:
        return name
    if name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: a constant, not a weight
        return None
    candidates = [f"text_model.{name}"]  # transformers >= 5.6 leaves out this prefix
    candidates += [name.replace(old, new) for old, new in OLD_ATTENTION.items() if old in name]
    return next((c for c in candidates if c in shapes), name)


def same_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shape is the wanted one, or that of an old VAE's attention, a 1x1 convolution."""
    attention = any(f"{new}weight" in name for new in OLD_ATTENTION.values())
    return shape == tuple(wanted) or (attention and shape == (*wanted, 1, 1))


def _listing(names: list[str]) -> str:
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


# --- Writing ---------------------------------------------------------------------------------


def save(
    params: Params, path: str | os.PathLike, name: str = DIFFUSERS_FILE, dtype: Any = None
) -> Path:
    """Writes a component's weights, whole or not at all, and returns the file's path.

    path: the component's folder, in which `name` is written, or the path of a .safetensors file.
    dtype: float32, float16 or bfloat16; by default each array keeps its own. JaxsdError if an array
    has another dtype or the target cannot be written.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / name
    wanted = None if dtype is None else _dtype(dtype)
    known = {dtype: code for code, dtype in DTYPES.items()}
    for key, value in params.items():
        if np.dtype(value.dtype) not in known:
            raise JaxsdError(f"cannot save {key}: {value.dtype} is not float32, float16, bfloat16")

    # Not safetensors' save_file, which makes files that only their owner may read and wants every
    # array on the host at once.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(
        params, key=lambda key: (-(wanted or params[key].dtype).itemsize, key)
    )  # aligned
    end = 0
    for key in order:
        kept = wanted or np.dtype(params[key].dtype)
        start, end = end, end + params[key].size * kept.itemsize
        shape = list(params[key].shape)
        header[key] = {"dtype": known[kept], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            stream.write(np.asarray(params[key], dtype=wanted).tobytes())
    return file


def _dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    except TypeError:
        found = None
    if found is None or found not in DTYPES.values():
        raise JaxsdError(f"dtype {dtype} is not supported: float32, float16 or bfloat16")
    return found
