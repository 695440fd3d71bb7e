"""Forms for NVIDIA GPUs: attention by cuDNN, and norms whose sums keep the whole chip busy."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

# From so many pixels on sums over them are taken in two steps: of one, XLA gives a column of
# channels to one multiprocessor, and a picture of 64x64 with 320 channels to six of all 132.
PIXELS = 256


def flash(device: Any, shape: tuple[int, ...], keys: int, dtype: jnp.dtype) -> bool:
    """Whether cuDNN's fused attention takes this shape, on this GPU, and is worth a call.

    It computes half precision, with heads of up to 128 channels (256 from Hopper on), in eights.
    device: as JAX has it; None where it is not known, which is no.
    """
    kind = getattr(device, "device_kind", "")
    if "NVIDIA" not in kind or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = float(device.compute_capability)
    most = 256 if capability >= 9 else 128
    channels = shape[-1]
    return capability >= 8 and channels <= most and channels % 8 == 0 and shape[1] * keys >= 1 << 14


def attention(
    q: Float[Array, "b t h d"], k: Float[Array, "b s h d"], v: Float[Array, "b s h d"], causal: bool
) -> Float[Array, "b t h d"]:
    """cuDNN's, which never writes the scores to memory; where `flash`."""

    def fused(q: Any, k: Any, v: Any, **lengths: Any) -> Any:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, implementation="cudnn", **lengths
        )

    def forward(*given: jax.Array) -> tuple[jax.Array, Any]:
        # JAX has no gradient of odd numbers of queries or keys, of which the 77 of a prompt are one
        even = q.shape[1] % 2 == k.shape[1] % 2 == 0
        form = fused if even else functools.partial(_in_pairs, fused)
        out, pull = jax.vjp(form, *given)
        # Named, what the gradient wants of it is kept by `rematerialise("selective")`
        return out, jax.tree.map(lambda x: checkpoint_name(x, "attention"), pull)

    whole = jax.custom_vjp(fused)
    whole.defvjp(forward, lambda pull, cotangent: pull(cotangent))
    return whole(q, k, v)


def _in_pairs(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of even numbers of queries and keys, of which the last may not count.

    attend(q, k, v, query_seq_lengths=[b], key_value_seq_lengths=[b]), as in `jax.nn`.
    """
    lengths = {
        "query_seq_lengths": jnp.full(len(q), q.shape[1], jnp.int32),
        "key_value_seq_lengths": jnp.full(len(k), k.shape[1], jnp.int32),
    }
    even = [jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v)]
    return attend(*even, **lengths)[:, : q.shape[1]]


def in_order(x: jax.Array) -> jax.Array:
    """The same, in memory in the order of its axes.

    cuDNN's gradients of kernels come with channels last. XLA would keep that order for the whole
    update, and transpose parameters, moments and averages into it and back.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def moments(
    x: Float[Array, "b *space c"], groups: int
) -> tuple[Float[Array, "b groups"], Float[Array, "b groups"]]:
    """Mean and variance over space and each group of channels, of float32, in one reading of x.

    Both of differences from the group's first channel in the middle: E[d^2] - E[d]^2 of x itself
    would lose all digits where the mean is much larger than the deviation. (So does this where that
    one number is a thousand deviations off.)
    """
    b, *space, c = x.shape
    middle = tuple(size // 2 for size in space)
    one = jax.lax.stop_gradient(x[(slice(None), *middle, slice(None, None, c // groups))])
    d = x - jnp.repeat(one, c // groups, -1).reshape(b, *[1] * len(space), c)
    pixels = tuple(range(1, x.ndim - 1))
    axes = pixels[-1:] if math.prod(space) >= PIXELS else pixels
    sums = jnp.stack([d.mean(axes), jnp.square(d).mean(axes)])
    sums = sums.mean(tuple(range(2, sums.ndim - 1)))
    mean, square = sums.reshape(2, b, groups, -1).mean(-1)
    return one + mean, jnp.maximum(square - jnp.square(mean), 0)
