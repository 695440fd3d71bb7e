"""Our side: what every block of a module returns, compared while the model runs.

The program gets PyTorch's outputs by block name and gives back errors, a few numbers for each
block: outputs of our own are not kept. It runs twice. Running free, a block is fed what ours gave
before it, as when the model is used. Forced, each block's output is replaced by PyTorch's once it
has been compared, so the next is fed PyTorch's values and its error is its own. A block that holds
others is then charged only with what it does between them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsd import kernels
from jaxsd.compare.report import Error
from jaxsd.nn import Net, Params

See = Callable[[str, Any], Any]
# Feeds a bound module; what it returns is of no interest, its blocks are.
Feed = Callable[[Any, Mapping[str, Any]], Any]


def watch(module: Any, see: See, layers: bool = False) -> Any:
    """Lets `see(name, output)` see, and replace, what each block of this module object returns.

    Blocks are the modules that hold others, and single layers that are in no element of a list:
    `conv_in`, but not `down_blocks.0.resnets.0.conv1`, which is one with `layers`.
    """
    for path, inner in nnx.iter_modules(module):
        if _is_block(path, inner, layers):
            # Not attributes that NNX would make parameters or part of its graph of.
            object.__setattr__(inner, "_see", functools.partial(see, ".".join(map(str, path))))
            object.__setattr__(inner, "__class__", _watched(type(inner)))
    return module


def _is_block(path: tuple, module: Any, layers: bool) -> bool:
    if not path or isinstance(module, nnx.List):
        return False
    inner = [m for _, m in nnx.iter_modules(module) if m is not module]
    if inner:
        return True
    has_parameters = any(isinstance(value, nnx.Param) for value in vars(module).values())
    return has_parameters and (layers or not any(isinstance(part, int) for part in path[:-1]))


@functools.cache
def _watched(cls: type) -> type:
    """A subclass whose calls go by `_see`: of this object alone, other modules stay as they are."""

    def call(self, *args, **kwargs):
        return self._see(cls.__call__(self, *args, **kwargs))

    return type(cls.__name__, (cls,), {"__call__": call})


def outline(
    net: Net, feed: Feed, inputs: Mapping[str, np.ndarray], layers: bool = False
) -> dict[str, tuple[int, ...]]:
    """The shape of every block's output by its name, in the order of execution; nothing is run."""
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str, output: Any) -> Any:
        if isinstance(output, jax.Array):  # a block that returns several things: its parts are seen
            shapes.setdefault(name, output.shape)
        return output

    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in net.shapes.items()}
    jax.eval_shape(lambda p, x: (feed(watch(net.bind(p), see, layers), x), None)[1], params, inputs)
    return shapes


class Comparison:
    """The compiled program of a network with its blocks compared.

    errors(params, inputs, expected, forced) -> {block: [Error, ...]}
    for PyTorch's outputs {block: [reference, ...]}, the first of which replaces ours if `forced`.
    """

    def __init__(self, net: Net, feed: Feed, layers: bool = False):
        self._net, self._feed, self._layers = net, feed, layers
        self._program = kernels.jit(self._run)

    def errors(
        self,
        params: Params,
        inputs: Mapping[str, np.ndarray],
        expected: Mapping[str, list[np.ndarray]],
        forced: bool = False,
    ) -> dict[str, list[Error]]:
        found = self._program(params, dict(inputs), dict(expected), np.bool_(forced))
        return {name: [Error(*map(float, error)) for error in found[name]] for name in expected}

    def _run(self, params, inputs, expected, forced):
        found: dict[str, list[Any]] = {}

        def see(name: str, output: Any) -> Any:
            if name not in expected or name in found:
                return output
            found[name] = []
            for reference in expected[name]:
                error = output.astype(jnp.float32) - reference
                found[name].append((jnp.abs(error).max(), jnp.sqrt(jnp.square(error).mean())))
            return jnp.where(forced, expected[name][0].astype(output.dtype), output)

        self._feed(watch(self._net.bind(params), see, self._layers), inputs)
        return found
