"""Where arrays live: parallelism is decided here, outside the models.

The mesh has three axes. Batches are split by rows over `data` and `fsdp` together. Parameters, and
whatever is kept for each of them (averages, moments), are split over `fsdp` along one axis each and
over `tensor` where a rule says so; every device holds its piece, and `jax.jit` inserts what gathers
the pieces for use and adds up the gradients (ZeRO, Rajbhandari et al. 2020, stage 3). With
fsdp = tensor = 1 every device holds everything, which is plain data parallelism.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsd.errors import JaxsdError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))
HEADS = PartitionSpec(("data", "fsdp"), "tensor")  # of attention, after the rows
WHOLE = PartitionSpec()

# Below this many numbers an array is cheaper to keep everywhere than to gather at each use.
SMALLEST = 1 << 14


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the arrays of parameters whose name matches are split.

    pattern: a regular expression, searched for in the name. axes: for each axis of the array, the
    axis of the mesh that it is split over, or None. () leaves arrays whole. Otherwise the rule is
    for arrays with as many axes (what an optimizer keeps of a parameter may have fewer), and an
    axis that does not divide stays whole.
    """

    pattern: str
    axes: tuple[str | None, ...]


# The first that matches counts. Where none does, the longest axis that divides goes over `fsdp`, if
# the array is not small. Attention and feed-forward layers go over `tensor` as in
# Megatron-LM (Shoeybi et al. 2019): the first layer by outputs, the second by inputs, so that what
# lies between them never has to be gathered. LoRA's factors are split as the weight is to which
# their product is added, so that each device makes its own piece of it.
_FIRST = r"(to_[qkv]|[qkv]_proj|fc1|ff\.net\.0\.proj)"
_SECOND = r"(to_out\.0|out_proj|fc2|ff\.net\.2)"
RULES = (
    Rule(rf"\b{_FIRST}\.weight$", ("tensor", "fsdp")),
    Rule(rf"\b{_FIRST}\.bias$", ("tensor",)),
    Rule(rf"\b{_SECOND}\.weight$", ("fsdp", "tensor")),
    Rule(rf"\b{_FIRST}\.lora_A\.weight$", (None, "fsdp")),
    Rule(rf"\b{_FIRST}\.lora_B\.weight$", ("tensor", None)),
    Rule(rf"\b{_SECOND}\.lora_A\.weight$", (None, "tensor")),
    Rule(rf"\b{_SECOND}\.lora_B\.weight$", ("fsdp", None)),
)


def parse_rule(text: str) -> Rule:
    """The rule in PATTERN=AXES, such as `conv_out=-` or `mid_block.*to_q.weight=tensor,fsdp`.

    AXES are those of the mesh, with - for an axis of the array that stays whole; - alone leaves
    arrays whole. JaxsdError for anything else.
    """
    pattern, equals, names = text.rpartition("=")
    axes = tuple(None if name == "-" else name for name in names.split(","))
    used = [axis for axis in axes if axis is not None]
    if not equals or not pattern or not {*used} <= {*AXES} or len({*used}) < len(used):
        raise JaxsdError(
            f"cannot read the sharding rule {text!r}: write PATTERN=AXES, where AXES are - or one "
            f"of {', '.join(AXES)} for each axis of the array, as in 'to_q.weight=tensor,fsdp'"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise JaxsdError(f"sharding rule {text!r} is no regular expression: {error}") from None
    return Rule(pattern, axes if used else ())


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """The mesh of all devices (or of these); data = -1 is whatever the other axes leave.

    The devices of one process are neighbours in it, `tensor` nearest, so that each process holds
    one block of a batch's rows whatever the machine. JaxsdError if the sizes are not those of the
    devices there are.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    named = f"fsdp {fsdp}" + (f" x tensor {tensor}" if tensor != 1 else "")
    if fsdp < 1 or tensor < 1 or len(devices) % (fsdp * tensor):
        raise JaxsdError(f"{named} must divide {len(devices)} devices")
    data = len(devices) // (fsdp * tensor) if data == -1 else data
    if data * fsdp * tensor != len(devices):
        raise JaxsdError(f"data {data} x {named} is not {len(devices)} devices")
    shape = np.array(devices).reshape(data, fsdp, tensor)
    return Mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


# --- Parameters ------------------------------------------------------------------------------


def spec(
    name: str,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Sequence[Rule] = RULES,
    smallest: int = SMALLEST,
) -> PartitionSpec:
    """How an array of this shape, kept for the parameter of this name, is split over the mesh."""
    for rule in rules:
        if re.search(rule.pattern, name) and len(rule.axes) in (0, len(shape)):
            pairs = zip(rule.axes, shape, strict=False)
            return _trimmed(
                [axis if axis and _splits(axis, n, mesh) else None for axis, n in pairs]
            )
    if math.prod(shape) < smallest:
        return WHOLE
    axes: list[str | None] = [None] * len(shape)
    if whole := [n for n in shape if _splits("fsdp", n, mesh)]:
        axes[shape.index(max(whole))] = "fsdp"
    return _trimmed(axes)


def _splits(axis: str, length: int, mesh: Mesh | AbstractMesh) -> bool:
    return mesh.shape[axis] > 1 and length % mesh.shape[axis] == 0


def _trimmed(axes: list[str | None]) -> PartitionSpec:
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def shardings(
    tree: Any, mesh: Mesh, rules: Sequence[Rule] = RULES, smallest: int = SMALLEST
) -> Any:
    """A NamedSharding for every array of a tree (of a TrainState, say, or its shapes).

    What belongs to a parameter is known by the last key on its path: parameters, averages and the
    states of every optax optimizer are dicts under the parameters' names. The rest is whole.
    """

    def of(path: tuple, array: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = str(names[-1]) if names else ""
        return NamedSharding(mesh, spec(name, array.shape, mesh, rules, smallest))

    return jax.tree_util.tree_map_with_path(of, tree)


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Arrays made or read inside lie in the host's memory, not on the first device.

    For weights that are to be spread later, or are needed now and then: what uses one of them
    together with arrays of a device takes it there for as long. Where jax is told to leave the CPU
    alone (JAX_PLATFORMS), nothing changes.
    """
    try:
        [host, *_] = jax.local_devices(backend="cpu")
    except RuntimeError:
        return contextlib.nullcontext()
    return jax.default_device(host)


def place(tree: Any, placement: Any) -> Any:
    """Puts arrays, alike in every process, where they belong; each device gets its piece alone."""

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, placement)


def gather(tree: Any) -> Any:
    """The whole arrays on the host, for the first process alone; the others get a tree of None.

    To be called by all processes, since each has pieces; one array at a time is whole on a device.
    """

    def fetch(array: jax.Array) -> np.ndarray | None:
        if not array.is_fully_addressable and not array.is_fully_replicated:
            assert isinstance(array.sharding, NamedSharding)
            array = _whole(array.sharding.mesh)(array)
        if jax.process_index() > 0:
            return None
        whole = np.empty(array.shape, array.dtype)
        for shard in array.addressable_shards:
            if shard.replica_id == 0:  # piece by piece: of a whole one jax would keep the copy
                whole[shard.index] = shard.data
        return whole

    return jax.tree.map(fetch, tree)


@functools.cache
def _whole(mesh: Mesh) -> Any:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, WHOLE))


# --- Batches ---------------------------------------------------------------------------------


def share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process holds the i-th of the n equal blocks of every batch's rows."""
    index = jax.process_index()
    ranks = [
        rank
        for rank, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"]))
        if any(device.process_index == index for device in devices)
    ]
    count = mesh.shape["data"] * mesh.shape["fsdp"] // len(ranks)
    return ranks[0] // len(ranks), count


def split(batch: Any, mesh: Mesh) -> Any:
    """Makes a batch of the rows that each process brings (`share`), split over the devices."""
    rows, (_, blocks) = NamedSharding(mesh, ROWS), share(mesh)

    def put(array: Any) -> jax.Array:
        shape = (array.shape[0] * blocks, *array.shape[1:])
        return jax.make_array_from_process_local_data(rows, np.asarray(array), shape)

    return jax.tree.map(put, batch)


def split_rows(tree: Any, rows: NamedSharding | None) -> Any:
    """Splits what one process has of each array's rows; whole where they do not divide, or None."""
    if rows is None:
        return tree
    pieces = math.prod(rows.mesh.shape.values())
    return jax.tree.map(lambda a: a if len(a) % pieces else jax.device_put(a, rows), tree)


def filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows, the first one repeated at the end up to `count`: one program does for all batches."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])
