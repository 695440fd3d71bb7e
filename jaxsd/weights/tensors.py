"""Reads and writes the .safetensors file of one component (`unet/`, `vae/`, `text_encoder/`).

The header of a file tells every name, dtype and shape, so a file is accepted or refused, with all
that is wrong listed at once, before any tensor is read.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.weights.files import replacing

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_FILE = "model.safetensors"

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
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
    path: str | os.PathLike, like: Net | Mapping[str, tuple[int, ...]], dtype: Any = None
) -> Params:
    """The weights of a component under the names, and in the shapes, that `like` asks for.

    path: a component folder or a .safetensors file. like: a Net, or a dict from names to shapes.
    dtype: float32, float16 or bfloat16; by default each array keeps the dtype of the file.

    JaxsdError if the file is missing, damaged, or differs from `like`: then the message lists every
    missing, unexpected and misshapen name.
    """
    wanted = None if dtype is None else _dtype(dtype)
    shapes = like.shapes if isinstance(like, Net) else like
    file = component_file(path)
    header = read_header(file)
    sources = match(header, shapes, file)
    params = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name, source in sources.items():
                array = tensors.get_tensor(source).reshape(shapes[name])
                params[name] = jnp.asarray(array if wanted is None else array.astype(wanted))
    except (SafetensorError, OSError) as error:
        raise JaxsdError(f"{file} is not a valid safetensors file: {error}") from error
    return params


def component_file(path: str | os.PathLike) -> Path:
    """The .safetensors file that a component folder (or the path of a file) stands for."""
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            file = "" if path.suffix else f": no {DIFFUSERS_FILE} or {TRANSFORMERS_FILE} to read"
            raise JaxsdError(f"{path} does not exist{file}")
        return path
    for name in (DIFFUSERS_FILE, TRANSFORMERS_FILE):
        if (path / name).is_file():
            return path / name
    names = sorted(p.name for p in path.iterdir() if p.is_file())
    found = [n for n in names if n.endswith(".safetensors") and not n.startswith(".")]
    if len(found) == 1:
        return path / found[0]
    if found:
        raise JaxsdError(
            f"{path} holds {', '.join(found)}: give the path of one of them, or name it "
            f"{DIFFUSERS_FILE} (a file in several shards has to be saved as one)"
        )
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise JaxsdError(f"{path} holds only {pickles[0]}; save it with safe_serialization=True")
    raise JaxsdError(f"{path} holds neither {DIFFUSERS_FILE} nor {TRANSFORMERS_FILE}")


class Entry(NamedTuple):
    """What a header says about one tensor."""

    dtype: str  # as safetensors spells it: "F32", "BF16", "I64", ...
    shape: tuple[int, ...]


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
                raise JaxsdError(f"{file} is not a safetensors file ({size} bytes)")
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
        entries, data = _parse(json.loads(text.decode("utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise JaxsdError(f"{file} has a broken safetensors header: {error}") from None
    promised = 8 + length + data
    if size < promised:
        raise JaxsdError(f"{file} is truncated: {size} bytes where its header promises {promised}")
    if size > promised:
        raise JaxsdError(f"{file} is damaged: {size} bytes where its header promises {promised}")
    return entries


def _parse(header: dict[str, Any]) -> tuple[dict[str, Entry], int]:
    """The entries and the number of data bytes after the header; ValueError where it lies."""
    entries, end = {}, 0
    for name, value in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [first, last, *shape]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{name} has shape {shape} at bytes {first} to {last}")
        if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name}, {dtype} {shape}, cannot take {last - first} bytes")
        entries[name] = Entry(str(dtype), tuple(shape))
        end = max(end, last)
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
        dtype, shape = header[source]
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
