"""What an Orbax checkpoint of parameters holds, from its headers, without jax or orbax."""

import json
from typing import Any

import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.weights.entries import ITEMSIZES, Entry, row_major
from jaxsd.weights.files import AnyPath, is_local, read_json

FOLDER = "orbax"  # in a component folder, in place of a file of weights
MAX_HEADER = 1 << 20  # bytes of one array's
CODES = {
    **{f"float{8 * size}": f"F{8 * size}" for size in (2, 4, 8)},
    **{f"int{8 * size}": f"I{8 * size}" for size in (1, 2, 4, 8)},
    **{f"uint{8 * size}": f"U{8 * size}" for size in (1, 2, 4, 8)},
    **{"bfloat16": "BF16", "bool": "BOOL"},
}


def is_orbax(folder: AnyPath) -> bool:
    """Whether a folder is an Orbax checkpoint that was written to its end."""
    return (folder / "_METADATA").is_file()


def read_orbax_header(folder: AnyPath) -> dict[str, Entry]:
    """The dtype and shape of every array in a checkpoint, nested names joined by dots.

    JaxsdError if the checkpoint is damaged. Offsets mean nothing: the arrays lie in chunks.
    """
    names = _names(folder)
    try:
        import tensorstore

        local = {"driver": "file", "path": f"{folder.absolute()}/"}
        base = local if is_local(folder) else f"{folder}/"  # tensorstore knows gs:// as well
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        headers = {name: store.read(f"{name}/.zarray") for name in names}
        return {name: _entry(folder, headers[name].result().value) for name in names}
    except Exception as error:  # tensorstore has its own, and damaged JSON others
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(f"{folder} is a damaged Orbax checkpoint: {reason}") from None


def _names(folder: AnyPath) -> list[str]:
    """The arrays that the checkpoint's table of contents speaks of."""
    tree = read_json(folder / "_METADATA").get("tree_metadata")
    names = []
    try:
        for value in tree.values():  # pyright: ignore[reportOptionalMemberAccess]
            if value["value_metadata"]["value_type"] != "None":
                names.append(".".join(str(step["key"]) for step in value["key_metadata"]))
    except (AttributeError, KeyError, TypeError):
        raise JaxsdError(f"{folder}/_METADATA is damaged: it has no tree of arrays") from None
    return names


def _entry(folder: AnyPath, header: bytes) -> Entry:
    if len(header) > MAX_HEADER:
        raise ValueError("an array's header is too long")
    values: dict[str, Any] = json.loads(header)
    dtype = CODES.get(values["dtype"]) or CODES.get(str(np.dtype(values["dtype"])))
    shape = tuple(values["shape"])
    if dtype is None or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise ValueError(f"an array of {values['dtype']}, shape {shape}")
    return Entry(folder, dtype, shape, 0, row_major(shape, ITEMSIZES[dtype]))
