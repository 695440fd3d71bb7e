"""Classifier-free guidance: two predictions of one doubled batch become one."""

from collections.abc import Callable
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
    cond: Conditioning,
    uncond: Conditioning | None,
    guidance_scale: Float[Array, ""] | Float[Array, " b"],
    guidance_rescale: Float[Array, ""],
) -> Denoise:
    """The function (x, t) -> prediction with the condition and the guidance inside.

    u + s (c - u) (Ho & Salimans 2022, with s = 1 + w); it is the same rule for eps, x and v, all
    linear in one another. Without `uncond` the condition alone is used, at half the work.
    `guidance_rescale` (2305.08891, eq. 15-16) pulls the result's standard deviation to c's.
    """
    if uncond is None:
        return lambda x, t: network(x, jnp.broadcast_to(t, x.shape[:1]), **cond)

    both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, (2 * x.shape[0],))
        u, c = jnp.split(network(jnp.concatenate([x, x]), t, **both), 2)
        scale = jnp.broadcast_to(guidance_scale, x.shape[:1])[:, None, None, None]
        prediction = u + scale * (c - u)
        axes = (1, 2, 3)
        ratio = c.std(axes, ddof=1, keepdims=True) / prediction.std(axes, ddof=1, keepdims=True)
        return prediction * (1 + guidance_rescale * (ratio - 1))

    return denoise
