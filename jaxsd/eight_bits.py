"""Weights that stay in eight bits while a network computes: memory for some exactness.

A weight NAME is int8, or a uint8 with the bits of a float8_e4m3fn; NAME.scale is a float32 for each
of its rows, the output channels. Their product takes the weight's place where a layer uses it, and
is then forgotten. (What files hold in eight bits is `weights/quantised.py`.)
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsd.errors import JaxsdError
from jaxsd.kernels import cpu, platform

SUFFIX = ".scale"
# dtype, and the greatest number that is used
FORMS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
# The rest of a UNet is small, and what enters and leaves it passes there
PARTS = ("down_blocks.", "mid_block.", "up_blocks.")


class Eight:
    """A weight in eight bits, as layers see it."""

    def __init__(self, small: jax.Array, scale: jax.Array):
        self.small, self.scale = small, scale

    def __getitem__(self, index: object) -> "Eight":
        return self  # as an array answers to [...]

    def at_work(self, x: jax.Array) -> jax.Array:
        """The weight in the dtype of `x`, which is to meet it.

        Made to depend on x, which is new in each step: else the compiler restores all weights
        before the loop over the steps, and keeps them. On CPU it would keep copies of floats as
        bits as well: so they are held as bits, and bits are what depends on x.
        """
        small, scale = self.small, self.scale
        if platform() == "cpu":
            small |= cpu.zero_of(x).astype(small.dtype)
        else:
            small, scale, _ = jax.lax.optimization_barrier((small, scale, x))
        if small.dtype == jnp.uint8:
            small = jax.lax.bitcast_convert_type(small, jnp.float8_e4m3fn)
        return (small.astype(jnp.float32) * by_row(scale, small.ndim)).astype(x.dtype)


def by_row(scale: Float[Array, " n"], dimensions: int) -> jax.Array:
    """A scale for each row [n], shaped to multiply weights [n, ...] of so many dimensions."""
    return scale.reshape(-1, *[1] * (dimensions - 1))


def is_quantised(params: Mapping[str, jax.Array]) -> bool:
    """Whether any of the parameters is in eight bits."""
    return any(name.endswith(SUFFIX) for name in params)


def quantised(params: Mapping[str, jax.Array], form: str) -> dict[str, jax.Array]:
    """A UNet's parameters with the matrices and kernels of its blocks in eight bits.

    form: "int8", with an error of at most 1/254 of the row's greatest weight, or "fp8", with one of
    at most 1/16 of each weight (as long as it is not 2^-15 times smaller than the greatest).
    JaxsdError for another.
    """
    if form not in FORMS:
        raise JaxsdError(f"weights in eight bits are {' or '.join(FORMS)}, not {form!r:.50}")
    found = {}
    for name, weight in params.items():
        if name.startswith(PARTS) and weight.ndim > 1:
            found[name], found[name + SUFFIX] = _quantised(weight, form)
        else:
            found[name] = weight
    return found


@functools.partial(jax.jit, static_argnums=1)
def _quantised(weight: jax.Array, form: str) -> tuple[jax.Array, jax.Array]:
    dtype, most = FORMS[form]
    values = weight.astype(jnp.float32)
    scale = jnp.abs(values).max(tuple(range(1, values.ndim))) / most
    divisors = jnp.where(scale == 0, 1.0, scale)  # of a channel that is nothing at all
    values = values / by_row(divisors, values.ndim)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.rint(values).astype(dtype), scale
    return jax.lax.bitcast_convert_type(values.astype(dtype), jnp.uint8), scale
