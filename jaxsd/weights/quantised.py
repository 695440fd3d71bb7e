"""Weights in eight bits: a quarter of float32's size, for models that are shipped.

In such a .safetensors file a matrix or kernel NAME is int8, and NAME.scale holds a float32 for each
of its rows, the output channels: the weight is their product. Rounding is to the nearest and
symmetric, so that an error is at most 1/254 of its channel's greatest weight. Vectors, which are
few, are float16. The file's metadata says `"quantised": "int8"`; without that, int8 is no weight.
Reading makes float32 of it at once: nothing computes in eight bits, and no other library knows
the form.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsd.errors import JaxsdError

KEY, FORM = "quantised", "int8"
METADATA = {KEY: FORM}
SUFFIX = ".scale"
MOST = 127  # the greatest whole number: -128 is left out
MOST_SCALE = 1e36  # whose products are still finite

Kinds = dict[str, tuple[np.dtype, tuple[int, ...]]]


def is_asked_for(dtype: Any) -> bool:
    """Whether the dtype that someone wants weights to be kept in is this form."""
    return dtype is not None and np.dtype(np.int8) == dtype


# --- Reading ---------------------------------------------------------------------------------


def paired(entries: Mapping[str, Any], metadata: Any) -> dict[str, Any]:
    """A header's entries, each int8 one with its scales inside it; ValueError where they lack."""
    form = metadata.get(KEY) if isinstance(metadata, dict) else None
    if form is None:
        return dict(entries)
    if form != FORM:
        raise ValueError(f"its weights are quantised in a way that is not known: {form!r:.50}")
    eight = {name: entry for name, entry in entries.items() if entry.dtype == "I8"}
    scales = {name + SUFFIX for name in eight}
    found = {name: entry for name, entry in entries.items() if name not in scales}
    for name, entry in eight.items():
        scale = entries.get(name + SUFFIX)
        if scale is None:
            raise ValueError(f"{name} is int8, and {name}{SUFFIX} is not there")
        if not entry.shape or (scale.dtype, scale.shape) != ("F32", entry.shape[:1]):
            raise ValueError(
                f"{name}{SUFFIX} is {scale.dtype} {list(scale.shape)}, not a float32 for each row "
                f"of {list(entry.shape)}"
            )
        found[name] = entry._replace(scale=scale)
    return found


def restored(whole: np.ndarray, scales: np.ndarray, where: Any) -> np.ndarray:
    """The weights, float32, of int8 numbers [n, ...] and scales [n]; `where` is named in errors."""
    if not np.all((scales >= 0) & (scales <= MOST_SCALE)):  # of NaN neither is true
        raise JaxsdError(f"{where} is damaged: scales of int8 weights are not finite or below 0")
    return whole.astype(np.float32) * _by_row(scales, whole.ndim)


# --- Writing ---------------------------------------------------------------------------------


def kinds(shapes: Mapping[str, tuple[int, ...]]) -> Kinds:
    """The dtype and shape of each tensor of a file with parameters of these shapes."""
    found: Kinds = {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            found[name] = np.dtype(np.float16), shape
        else:
            found[name] = np.dtype(np.int8), shape
            found[name + SUFFIX] = np.dtype(np.float32), shape[:1]
    return found


def stored(params: Mapping[str, Any], name: str) -> np.ndarray:
    """A tensor of such a file; JaxsdError if its numbers are not finite."""
    of = name if name in params else name.removesuffix(SUFFIX)
    values = np.asarray(params[of], np.float32)
    if values.ndim < 2:
        with np.errstate(over="ignore"):
            kept = values.astype(np.float16)
        _check(kept, of)
        return kept
    scales = np.abs(values).max(tuple(range(1, values.ndim)), initial=0.0) / np.float32(MOST)
    _check(scales, of)
    if of != name:
        return scales
    divisors = np.where(scales == 0, np.float32(1), scales)  # of a channel that is nothing at all
    return np.rint(values / _by_row(divisors, values.ndim)).astype(np.int8)


def _by_row(scales: np.ndarray, dimensions: int) -> np.ndarray:
    return scales.reshape(-1, *[1] * (dimensions - 1))


def _check(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        raise JaxsdError(f"cannot save {name} in eight bits: it is not finite, or too large")
