"""Numbers as vectors: the sinusoidal embeddings of time and of the guidance scale."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsd.nn import Linear


def timestep_embedding(
    t: Float[Array, " b"], channels: int, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "b c"]:
    """Sinusoidal embedding of time (0 ... 1000), Vaswani et al. 2017; frequencies 1 ... 1e-4."""
    half = channels // 2
    frequencies = jnp.exp(
        -math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    )
    angles = t[:, None] * frequencies[None]
    pair = (
        (jnp.cos(angles), jnp.sin(angles))
        if flip_sin_to_cos
        else (jnp.sin(angles), jnp.cos(angles))
    )
    return jnp.pad(jnp.concatenate(pair, -1), ((0, 0), (0, channels % 2)))


def guidance_scale_embedding(w: Float[Array, " b"], channels: int) -> Float[Array, "b c"]:
    """What a network distilled from guidance (Luo et al. 2023, LCM) is told as `timestep_cond`.

    w: the guidance scale less one, as LCM counts it. channels: the UNet's `time_cond_proj_dim`.
    """
    return timestep_embedding(1000.0 * w, channels, flip_sin_to_cos=False, freq_shift=1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, linear; with `condition_channels` a projected condition is added first."""

    def __init__(self, inputs: int, outputs: int, condition_channels: int | None = None):
        self.linear_1 = Linear(inputs, outputs)
        self.cond_proj = (
            None if condition_channels is None else Linear(condition_channels, inputs, bias=False)
        )
        self.linear_2 = Linear(outputs, outputs)

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(jax.nn.silu(self.linear_1(x)))
