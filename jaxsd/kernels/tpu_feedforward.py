"""For TPUs, the feed-forward of a transformer in one kernel, from its LayerNorm to its residual.

As in `tpu`, positions lie in the lanes of a tile and channels in the sublanes: of channels that
fill no whole tiles of 128 only those that are summed over are filled up, and what is four times as
wide as the input never leaves the chip's vector memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxsd.kernels import tpu
from jaxsd.kernels.split import in_rows, over_rows

POSITIONS = 1024  # most at a time
HIDDEN = 640  # most of the inner channels at a time
WIDEST = 640  # channels whose weights fit into vector memory, twice
MEMORY = 60 << 20  # bytes of it, that it has to have
LIMIT = 100 << 20  # of it, that the compiler may take where a chip has them


class Weights(NamedTuple):
    """Of LayerNorm [c], of GEGLU [2 h, c] and [2 h], and of the way out [c, h] and [c]."""

    scale: Any
    shift: Any
    inner: Any
    inner_bias: Any
    outer: Any
    outer_bias: Any


def feeds(shape: tuple[int, ...], dtype: Any, kind: str) -> bool:
    """Whether the kernel is for hidden states [b, t, c], and for this kind of chip."""
    _, t, c = shape
    if dtype != jnp.bfloat16 or t < POSITIONS or t % tpu.LANES or c % 64:
        return False
    return c <= WIDEST and tpu.vector_memory(kind) > MEMORY


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def feed_forward(
    x: Float[Array, "b t c"],
    weights: Weights,
    eps: float,
    split: NamedSharding | None = None,
    interpret: bool = False,
) -> Float[Array, "b t c"]:
    """x + outer(value * gelu(gate)), (value, gate) = inner(LayerNorm(x)), with all biases.

    split: of [b, ...], over several chips, each of which computes its own rows. interpret: on any
    machine, slowly. The gradient is the plain form's.
    """
    kernel = functools.partial(_local, eps=eps, interpret=interpret)
    return over_rows(kernel, split, len(x), (True, False))(x, weights)


def plain(x: jax.Array, weights: Weights, eps: float) -> jax.Array:
    """The same, in XLA's operations."""
    scale, shift, inner_bias, outer_bias = (
        vector.astype(jnp.float32).reshape(1, 1, -1)
        for vector in (weights.scale, weights.shift, weights.inner_bias, weights.outer_bias)
    )
    y = _normalised(x.astype(jnp.float32), -1, eps) * scale + shift
    y = y.astype(x.dtype) @ weights.inner.T + inner_bias.astype(x.dtype)
    value, gate = (part.astype(jnp.float32) for part in jnp.split(y, 2, -1))
    y = (value * gate * tpu.normal_cdf(gate)).astype(x.dtype) @ weights.outer.T
    return x + (y + outer_bias.astype(x.dtype))


def _normalised(x: jax.Array, axis: int, eps: float) -> jax.Array:
    x = x - x.mean(axis, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis, keepdims=True) + eps)


def _forward(x: Any, weights: Weights, eps: float, split: Any, interpret: bool) -> Any:
    return feed_forward(x, weights, eps, split, interpret), (x, weights)


def _backward(eps: float, split: Any, interpret: bool, given: Any, d_out: Any) -> Any:
    x, weights = given
    _, back = jax.vjp(functools.partial(plain, eps=eps), in_rows(x, split), weights)
    return back(d_out)


feed_forward.defvjp(_forward, _backward)


def _local(x: jax.Array, weights: Weights, eps: float, interpret: bool) -> jax.Array:
    b, t, c = x.shape
    h = weights.outer.shape[1]
    rows = next(n for n in range(POSITIONS, 0, -tpu.LANES) if t % n == 0)
    step = next(n for n in range(HIDDEN, 0, -tpu.LANES) if h % n == 0)

    def kernel(*refs: Any) -> None:
        x_ref, norm_ref, inner_ref, inner_bias_ref, outer_ref, outer_bias_ref, out_ref = refs
        x = x_ref[0].astype(jnp.float32)
        y = _normalised(x, 0, eps) * norm_ref[:, :1] + norm_ref[:, 1:]
        y = y.astype(x_ref.dtype)
        sums = x + outer_bias_ref[...]
        for at in range(0, h, step):
            value, gate = (
                tpu.product(inner_ref[n : n + step], y) + inner_bias_ref[n : n + step]
                for n in (at, h + at)
            )
            value *= gate * tpu.sigmoid(tpu.normal_logit(gate, tpu.TO_POWER))
            sums += tpu.product(outer_ref[:, at : at + step], value.astype(y.dtype))
        out_ref[0] = sums.astype(out_ref.dtype)

    given = [
        jnp.stack([weights.scale, weights.shift], -1).astype(jnp.float32),
        weights.inner,
        weights.inner_bias[:, None].astype(jnp.float32),
        weights.outer,
        weights.outer_bias[:, None].astype(jnp.float32),
    ]
    some = pl.BlockSpec((1, c, rows), lambda row, i: (row, 0, i))
    whole = [pl.BlockSpec(array.shape, lambda row, i: (0, 0)) for array in given]
    out = pl.pallas_call(
        kernel,
        grid=(b, t // rows),
        in_specs=[some, *whole],
        out_specs=some,
        out_shape=jax.ShapeDtypeStruct((b, c, t), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * x.size * h,
            transcendentals=2 * b * t * h,
            bytes_accessed=(2 * x.size + 3 * c * h) * x.dtype.itemsize,
        ),
        interpret=interpret,
    )(x.swapaxes(1, 2), *given)
    return out.swapaxes(1, 2)
