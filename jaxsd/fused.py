"""Parts of blocks that are one operation on some machines; elsewhere their layers, one by one.

Not in trainings: gradients would compute again what is made on the way, which takes as long as what
is gained, and where they are to do so anyway, what is costly must be found stored by itself.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsd import kernels
from jaxsd.kernels.tpu_feedforward import Weights
from jaxsd.nn import Conv2d, GroupNorm, LayerNorm, Linear, for_gradients, weight_at_work


def fuses_convolution(conv: Conv2d, x: Float[Array, "b h w c"]) -> bool:
    """Whether `normed_convolution` is one operation for this x, and faster than three."""
    plain = (conv.kernel, conv.stride, conv.padding) == (3, 1, ((1, 1), (1, 1)))
    return plain and not for_gradients() and kernels.fuses_convolution(x, conv.outputs)


def normed_convolution(
    norm: GroupNorm,
    conv: Conv2d,
    x: Float[Array, "b h w c"],
    row: Float[Array, "b c2"] | None,
    residual: Float[Array, "b h w c2"] | None,
) -> Float[Array, "b h w c2"]:
    """conv(silu(norm(x))) + row + residual; where `fuses_convolution`."""
    scale, shift = (array.reshape(len(x), -1) for array in norm.affine(x))
    bias = jnp.zeros((len(x), conv.outputs), jnp.float32)
    if conv.bias is not None:
        bias = bias + conv.bias[...].astype(jnp.float32)[None]
    if row is not None:
        bias = bias + row.astype(jnp.float32)
    weight = weight_at_work(conv.weight, x)
    return kernels.normed_convolution(x, scale, shift, weight, bias, residual)


def fuses_feed_forward(x: Float[Array, "b t c"]) -> bool:
    """Whether `normed_feed_forward` is one operation for this x, and faster than six."""
    return not for_gradients() and kernels.fuses_feed_forward(x)


def normed_feed_forward(
    norm: LayerNorm, inner: Linear, outer: Linear, x: Float[Array, "b t c"]
) -> Float[Array, "b t c"]:
    """x + outer(value * gelu(gate)), (value, gate) = inner(norm(x)); where `fuses_feed_forward`."""
    assert inner.bias is not None and outer.bias is not None
    weights = Weights(
        norm.weight[...],
        norm.bias[...],
        weight_at_work(inner.weight, x),
        inner.bias[...],
        weight_at_work(outer.weight, x),
        outer.bias[...],
    )
    return kernels.feed_forward(x, weights, norm.eps)
