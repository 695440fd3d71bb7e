"""Classifier-free guidance: several predictions of one larger batch become one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (x [b, h, w, c], t [b], **conditioning) -> prediction [b, h, w, c]
Network = Callable[..., jax.Array]
Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Conditioning = dict[str, Any]  # keyword arguments of the network, each [b, ...]


def guided(
    network: Network,
    conditions: Sequence[Conditioning],
    scales: Float[Array, "k b"],
    guidance_rescale: Float[Array, ""],
) -> Denoise:
    """The function (x, t) -> prediction with the conditions and the guidance inside.

    conditions: k + 1, each telling the network more than the one before; scales: how far to go on
    in the direction of each further one, for each image. With predictions p_0 ... p_k the result is
    p_0 + sum_i s_i (p_i - p_{i-1}): for (nothing, prompt) it is u + s (c - u) (Ho & Salimans 2022,
    with s = 1 + w), for (nothing, picture, picture and prompt) InstructPix2Pix (2211.09800, eq. 3).
    It is the same rule for eps, x and v, all linear in one another. One condition is used alone.
    `guidance_rescale` (2305.08891, eq. 15-16) pulls the result's standard deviation to p_k's.
    """
    told = side_by_side(conditions)
    return asking(network, told, len(conditions), scales, guidance_rescale)


def side_by_side(conditions: Sequence[Conditioning]) -> Conditioning:
    """All conditions as one, for `asking`: of each image one stands by the other."""
    return conditions[0] if len(conditions) == 1 else jax.tree.map(_together, *conditions)


def asking(
    network: Network,
    told: Conditioning,
    count: int,
    scales: Float[Array, "k b"],
    guidance_rescale: Float[Array, ""],
) -> Denoise:
    """As `guided`, of `count` conditions that are side by side already."""
    if count == 1:
        return lambda x, t: network(x, jnp.broadcast_to(t, x.shape[:1]), **told)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, x.shape[:1])
        said = network(_together(*[x] * count), _together(*[t] * count), **told)
        each = said.reshape(-1, count, *said.shape[1:])
        said = [each[:, i] for i in range(count)]
        prediction = said[0]
        for scale, less, more in zip(scales, said, said[1:], strict=False):
            prediction = prediction + scale[:, None, None, None] * (more - less)
        axes = (1, 2, 3)
        spread = said[-1].std(axes, ddof=1, keepdims=True)
        ratio = spread / prediction.std(axes, ddof=1, keepdims=True)
        # Unasked for, it must not count: 0 / 0 where a network says the same everywhere
        ratio = jnp.where(guidance_rescale > 0, ratio, 1.0)
        return prediction * (1 + guidance_rescale * (ratio - 1))

    return denoise


def _together(*arrays: jax.Array) -> jax.Array:
    """k arrays [b, ...] as one [b k, ...], in which what is of one image stands side by side.

    So it stays on one device where the images are split over several: one array after the other
    would be other rows for most of them, and each would compute them all.
    """
    return jnp.stack(arrays, 1).reshape(-1, *arrays[0].shape[1:])
