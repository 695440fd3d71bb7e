"""Where the state of a training lives: the mesh and the rules that its options ask for."""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from jaxsd import kernels, sharding
from jaxsd.errors import JaxsdError
from jaxsd.objectives import Objective
from jaxsd.training.optimizers import make_optimizer
from jaxsd.training.options import Options
from jaxsd.training.step import (
    Aux,
    TrainState,
    compiler_options,
    init_state,
    initial_params,
    state_of,
)


def make_mesh(options: Options, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that the options ask for; JaxsdError if they do not fit the devices."""
    mesh = sharding.make_mesh(-1, options.fsdp, options.tensor, devices)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.batch_size // options.accumulate % shares:
        parts = f" in {options.accumulate} parts" if options.accumulate > 1 else ""
        raise JaxsdError(f"batch_size {options.batch_size}{parts} must divide by {shares} devices")
    return mesh


def place_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    options: Options,
    mesh: Mesh,
    restore: Callable[[Any], TrainState | None] = lambda like: None,
) -> tuple[TrainState, Aux]:
    """The state, and what all steps read, spread over the mesh.

    restore(shapes) gives the state to go on with, if there is one; else it is the one before the
    first step. Only the initial parameters are ever whole on a device, and never two states there.
    """
    trained, frozen = initial_params(objective, options)
    new = functools.partial(state_of, optimizer=optimizer)
    shapes = spread(jax.eval_shape(new, trained), options, mesh)
    state = restore(shapes)
    if state is None:
        where = jax.tree.map(lambda shape: shape.sharding, shapes)
        state = jax.jit(new, out_shardings=where)(_place(trained, options, mesh))
    return state, _place(Aux(objective.aux, frozen), options, mesh)


def spread(shapes: Any, options: Options, mesh: Mesh) -> Any:
    """Shapes of arrays with where these go, by the options' rules and ours."""
    rules = (*map(sharding.parse_rule, options.shard), *sharding.RULES)
    where = sharding.shardings(shapes, mesh, rules)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        where,
    )


def _place(tree: Any, options: Options, mesh: Mesh) -> Any:
    shapes = spread(tree, options, mesh)
    return sharding.place(tree, jax.tree.map(lambda shape: shape.sharding, shapes))


def compile_step(step: Callable[..., Any], state: TrainState, options: Options) -> Any:
    """Jits a step for states that are placed as this one is (an array, or its shape, of each).

    The new state takes the place of the old one, which is gone; metrics are whole everywhere.
    """
    where = jax.tree.map(lambda array: array.sharding, state)
    mesh = where.step.mesh
    platform = mesh.devices.flat[0].platform  # which need not be that of the machine that compiles

    @functools.wraps(step)
    def told(*arguments: Any) -> Any:
        with kernels.compiling_for(platform, NamedSharding(mesh, sharding.HEADS)):
            return step(*arguments)

    return jax.jit(
        told,
        donate_argnums=0,
        out_shardings=(where, NamedSharding(mesh, sharding.WHOLE)),
        compiler_options=compiler_options(options, platform),
    )


class Split(NamedTuple):
    """Parameters that are split alike, with what is kept of them: a row of a table."""

    axes: str  # of the mesh, for each axis of the array; - for one that is whole
    arrays: int
    example: str  # the largest parameter
    whole: int  # bytes
    piece: int  # bytes on each device


def describe(objective: Objective, options: Options, mesh: Mesh) -> list[Split]:
    """How a training's state is split, the most bytes first."""
    optimizer = make_optimizer(options)
    shapes, _ = jax.eval_shape(lambda: init_state(objective, optimizer, options))
    groups: dict[str, list[tuple[str, Any]]] = collections.defaultdict(list)
    for path, array in jax.tree_util.tree_leaves_with_path(spread(shapes, options, mesh)):
        spec = [*array.sharding.spec, *[None] * array.ndim][: array.ndim]
        axes = ",".join(axis or "-" for axis in spec) if any(spec) else "whole"
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        groups[axes].append((names[-1] if names else "", array))
    rows = [
        Split(
            axes,
            len(arrays),
            max(arrays, key=lambda pair: pair[1].size)[0],
            sum(array.size * array.dtype.itemsize for _, array in arrays),
            sum(
                math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
                for _, array in arrays
            ),
        )
        for axes, arrays in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.whole)
