"""Between pictures: from prompt to prompt, from noise to noise, and the grid of both.

latents = grid(pipe, ["a red seven", "a blue three"], seeds=[0, 1], columns=5, rows=4, steps=30)
pictures = [pipe.decode_array(row) for row in latents]

Noise lies on a sphere, near enough: the chord between two draws leads through latents that are too
short, which no model was trained on, so noise goes along the arc (Shoemake 1985, "Animating
rotation with quaternion curves"; White 2016, 1609.04468). What prompts are read as goes straight.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsd.diffusion.denoise import Conditioning
from jaxsd.errors import JaxsdError
from jaxsd.pipeline import Pipeline

# The sine of an angle below which arc and chord differ by less than float32 can tell.
PARALLEL = 1e-4


def slerp(
    a: Float[Array, "n h w c"], b: Float[Array, "n h w c"], shares: float | Sequence[float]
) -> Float[Array, "n h w c"]:
    """Noise on the arc from a to b, each picture's latents taken as one vector.

    shares: from 0, which is a to the last bit, to 1, which is b; one for all pictures or one for
    each. The result is turned from a by its share of the angle between the two and, where these are
    equally long, as long as they. Where they are parallel, or opposite, so that no arc is the
    shortest, it lies on the chord.
    """
    share = jnp.asarray(np.broadcast_to(np.asarray(shares, np.float32), len(a)))
    x, y = _unit(a), _unit(b)
    # Kahan's formula: an arc cosine loses half of the digits of a small angle
    angle = 2 * jnp.arctan2(jnp.linalg.norm(x - y, axis=1), jnp.linalg.norm(x + y, axis=1))
    sine = jnp.sin(angle)
    chord = jnp.abs(sine) < PARALLEL

    def weight(part: jax.Array) -> jax.Array:
        arc = jnp.sin(part * angle) / jnp.where(chord, 1.0, sine)
        return jnp.where(chord, part, arc)[:, None, None, None]

    return weight(1 - share) * a + weight(share) * b


def _unit(latents: jax.Array) -> jax.Array:
    rows = latents.reshape(len(latents), -1)
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(length == 0, 1.0, length)


def lerp(a: Conditioning, b: Conditioning, shares: float | Sequence[float]) -> Conditioning:
    """What a UNet is told, on the straight way from a to b: text states, and XL's pooled ones.

    a, b: as `pipe.encode` returns them, arrays [n, ...] of equal shapes. shares: as of `slerp`.
    JaxsdError for classes that are numbers, between which there is nothing.
    """

    def mix(x: jax.Array, y: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise JaxsdError("this model looks its classes up by number: there is none in between")
        share = np.broadcast_to(np.asarray(shares, np.float32), len(x)).reshape(
            -1, *(1,) * (x.ndim - 1)
        )
        return (jnp.asarray(1 - share) * x + jnp.asarray(share) * y).astype(x.dtype)

    return jax.tree.map(mix, a, b)


def grid(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    columns: int | None = None,
    rows: int | None = None,
    *,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    **how: Any,
) -> jax.Array:
    """Clean latents [rows, columns, h, w, c]: from prompt to prompt across, from seed to seed down.

    prompts, seeds: one or several, each the next stop of a way along which columns and rows are
    evenly spread; by default there is one for each stop. Where a stop is met, the latents are those
    that `pipe.sample` makes of its prompt and seed, but with samplers that add noise on the way:
    there every row adds that of the first seed. A row is a batch. how: of `pipe.denoise`, such as
    steps, guidance_scale and sampler. JaxsdError for what cannot be.
    """
    across = _spread(prompts, columns, "prompts", "columns")
    down = _spread(seeds, rows, "seeds", "rows")
    default = pipe.default_size
    size = default[0] if height is None else height, default[1] if width is None else width
    chunks = pipe.chunks([*prompts, negative_prompt])
    ids = pipe.size_ids(size)
    first, second, shares = across
    cond = lerp(pipe.encode(first, 0, chunks, ids), pipe.encode(second, 0, chunks, ids), shares)
    uncond = None
    if not pipe.guidance_embedded:
        ids = pipe.size_ids(size, negative=True)
        uncond = pipe.encode([negative_prompt] * len(first), 0, chunks, ids)
    drawn = []
    for one, other, share in zip(*down, strict=True):
        noise = slerp(pipe.noise([one], *size), pipe.noise([other], *size), share)
        noise = jnp.repeat(noise, len(first), 0)
        same = [seeds[0]] * len(first)
        drawn.append(pipe.denoise(noise, cond, uncond, seeds=same, **how))
    return jnp.stack(drawn)


def _spread(
    stops: Sequence[Any], count: int | None, name: str, places: str
) -> tuple[list[Any], list[Any], list[float]]:
    """For each of `count` places along the stops the one before, the one after, and its share."""
    if isinstance(stops, str) or not len(stops):
        raise JaxsdError(f"{name}: give a list of one or more")
    count = len(stops) if count is None else count
    if count < 1:
        raise JaxsdError(f"{places} must be at least 1, not {count}")
    last = len(stops) - 1
    at = np.linspace(0, last, count)
    before = np.minimum(at.astype(int), max(last - 1, 0))
    after = np.minimum(before + 1, last)
    shares = [float(share) for share in at - before]
    return [stops[i] for i in before], [stops[i] for i in after], shares
