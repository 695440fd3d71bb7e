"""What distillation asks of the process: the times of few-step samplers, and targets of jumps.

A student takes one step where its teacher takes two. The algebra is that of Salimans & Ho 2022
(2202.00512, algorithm 2 and appendix G), written with the angle phi = atan2(sigma, alpha), which
is exact at both ends of any variance-preserving schedule.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion.grids import levels
from jaxsd.diffusion.schedule import Schedule, x0_and_eps
from jaxsd.errors import JaxsdError


class Level(NamedTuple):
    """Times in the network's units and how noisy they are: arrays of one shape, float32."""

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array

    def at(self, i: jax.Array) -> "Level":
        """The levels of rungs i [n] (traced): one for each image."""
        return Level(*(jnp.asarray(values)[i] for values in self))

    def each(self) -> tuple[jax.Array, jax.Array]:
        """(alpha, sigma), [b, 1, 1, 1], to go with pictures."""
        return self.alpha[:, None, None, None], self.sigma[:, None, None, None]


def student_schedule(
    schedule: Schedule, prediction_type: str | None = None, class_name: str = "DDIMScheduler"
) -> Schedule:
    """The teacher's noise levels, and steps that begin at pure noise and end at the picture.

    Its latents are not clipped on the way: a target is where the teacher's steps lead.
    """
    return dataclasses.replace(
        schedule,
        class_name=class_name,
        prediction_type=prediction_type or schedule.prediction_type,
        timestep_spacing="trailing",
        steps_offset=0,
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
    )


def ladder(schedule: Schedule, steps: int) -> Level:
    """The `steps` + 1 levels of that many steps from noise to the clean picture.

    On a schedule of whole timesteps those of "trailing" spacing (2305.08891, table 2): T - 1 first,
    and a ladder of half as many steps has every second of its levels. The picture itself has no
    timestep; there the network is told 0. JaxsdError for more steps than can be told apart.
    """
    t = np.append(schedule.timesteps(steps, spacing="trailing"), 0 if schedule.continuous else -1)
    alpha, sigma = levels(schedule, t)
    rows = (np.maximum(t, 0), alpha, sigma)
    return Level(*(np.asarray(row, np.float32) for row in rows))  # pyright: ignore


def reverse(levels: Level) -> Level:
    """From the picture to noise, as DDIM's encoder goes."""
    return Level(*(values[::-1] for values in levels))


def noised(x0: jax.Array, eps: jax.Array, level: Level) -> jax.Array:
    """z = alpha x0 + sigma eps: [b, h, w, c] at the level of each."""
    alpha, sigma = level.each()
    return alpha * x0 + sigma * eps


def jump(kind: str, prediction: jax.Array, z: jax.Array, here: Level, there: Level) -> jax.Array:
    """DDIM's step (eta = 0, without clipping) between two levels, in either direction."""
    x0, eps = x0_and_eps(kind, prediction, z, *here.each())
    return noised(x0, eps, there)


def explains(
    z: jax.Array, end: jax.Array, here: Level, there: Level
) -> tuple[jax.Array, jax.Array]:
    """(x0, eps) of which one DDIM step leads from z to `end`: what a student has to say.

    The paper's x0 = (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha), written as
    v = (cos d z - z'') / sin d with d = phi - phi'': nothing is divided by that may vanish.
    """
    alpha, sigma = here.each()
    alpha_end, sigma_end = there.each()
    sine = sigma * alpha_end - alpha * sigma_end
    cosine = alpha * alpha_end + sigma * sigma_end
    v = (cosine * z - end) / sine
    return alpha * z - sigma * v, alpha * v + sigma * z


def stages(start: int, end: int, factor: int = 2) -> list[int]:
    """The steps of each student, start / 2 ... end; JaxsdError unless division leads there."""
    if factor < 2:
        raise JaxsdError(f"factor must be at least 2, not {factor}")
    found, steps = [], start
    while steps > end and steps % factor == 0:
        steps //= factor
        found.append(steps)
    if not found or steps != end or end < 1:
        raise JaxsdError(
            f"from {start} steps no division by {factor} leads to {end}: take 64 and 4, say, or "
            "64 and 1"
        )
    return found
