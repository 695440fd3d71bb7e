"""How arrays lie on several chips: each has the rows, and the heads, of its own pictures."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float


def pieces(split: NamedSharding | None, axis: int) -> int:
    """Over how many chips an axis is split."""
    if split is None or axis >= len(split.spec):
        return 1
    return _pieces(split, split.spec[axis])


def _pieces(split: NamedSharding, axes: Any) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(split.mesh.shape[name] for name in names)


def divides(split: NamedSharding, axes: Any, size: int) -> bool:
    """Whether an axis of this size can be split over these axes of the mesh."""
    return size % _pieces(split, axes) == 0


def rows_each(rows: int, split: NamedSharding | None) -> int:
    """How many of so many rows each chip has: all, where they do not divide."""
    count = pieces(split, 0)
    return rows // count if rows % count == 0 else rows


def over_rows(
    kernel: Callable, split: NamedSharding | None, rows: int, by_row: Sequence[bool]
) -> Callable:
    """The kernel on each chip's rows; by_row: of which arguments these are parts.

    XLA itself can divide no kernel. Rows that do not divide stay whole.
    """
    if split is None:
        return kernel
    axes = split.spec[0] if divides(split, split.spec[0], rows) else None
    spec, whole = PartitionSpec(axes), PartitionSpec()
    specs = tuple(spec if own else whole for own in by_row)
    return jax.shard_map(kernel, mesh=split.mesh, in_specs=specs, out_specs=spec, check_vma=False)


def in_rows(x: Float[Array, "b ..."], split: NamedSharding | None) -> Float[Array, "b ..."]:
    """The same, each chip with its own rows.

    What a program makes of its batches (noise, or pictures side by side for guidance) does not say
    where it lies. Where weights are split, the compiler may then have each chip compute a piece of
    every picture, and send pictures about, which are larger than weights. Rows that do not divide
    are left to it.
    """
    if split is None or x.ndim < 2 or not divides(split, split.spec[0], len(x)):
        return x
    spec = PartitionSpec(split.spec[0], *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(split.mesh, spec))
