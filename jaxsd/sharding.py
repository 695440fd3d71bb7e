"""Where arrays live: parallelism is decided here, outside the models.

Pictures and batches are split over the `data` axis of the mesh, parameters are copied to every
device; `jax.jit` then inserts the collectives.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices (default all) along one axis, `data`."""
    count = jax.device_count() if devices is None else devices
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies every array to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(tree: Any, mesh: Mesh) -> Any:
    """Splits the first axis of every array over the mesh; it must divide."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))
