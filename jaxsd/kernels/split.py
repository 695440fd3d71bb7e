"""How arrays lie on several chips: each has the rows, and the heads, of its own pictures."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float


def divides(split: NamedSharding, axes: Any, size: int) -> bool:
    """Whether an axis of this size can be split over these axes of the mesh."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return size % math.prod(split.mesh.shape[name] for name in names) == 0


def rows_each(rows: int, split: NamedSharding | None) -> int:
    """How many of so many rows each chip has."""
    if split is None or not divides(split, split.spec[0], rows):
        return rows
    names = split.spec[0] or ()
    names = (names,) if isinstance(names, str) else names
    return rows // math.prod(split.mesh.shape[name] for name in names)


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
