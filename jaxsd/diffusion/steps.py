"""What a sampler is given: the grid of steps, and the network as it sees it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion.denoise import Denoise
from jaxsd.diffusion.schedule import MAX_STEPS, Schedule, x0_and_eps

Noise = Callable[[int], jax.Array]
History = tuple[jax.Array, ...]
FAR = 1e9
ROWS = MAX_STEPS + 9  # PNDM's Runge-Kutta start evaluates nine times more than there are steps


class Step(NamedTuple):
    """One row of `Steps`: scalars."""

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    next_alpha: jax.Array
    next_sigma: jax.Array
    mid_t: jax.Array
    mid_alpha: jax.Array
    mid_sigma: jax.Array
    gap: jax.Array
    order: jax.Array


class Steps(NamedTuple):
    """A sampling grid: step i goes from (alpha, sigma)[i], seen at timestep t[i], to next_*[i].

    Arrays of ROWS float32 of which the first `count` are meant, so that the number of steps can
    change without compiling anew. Where one step ends the next one need not begin: DDIM's
    historical grids overlap unless the number of steps divides 1000.

    `first` is the step that a run begins with (image-to-image); multistep methods start anew there:
    `steps._replace(first=np.int32(12))`. The latents at its start are alpha x0 + sigma eps.
    """

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    next_alpha: jax.Array
    next_sigma: jax.Array
    mid_t: jax.Array  # mid_*: the second point of samplers that look twice, or look elsewhere
    mid_alpha: jax.Array
    mid_sigma: jax.Array
    gap: jax.Array  # log(alpha / sigma) at the step's end less that at its start
    order: jax.Array  # int32: the highest order that a multistep method may use in this step
    count: jax.Array  # int32
    init_scale: jax.Array  # initial latents are this times N(0, 1)
    first: jax.Array  # int32

    def at(self, i: jax.Array) -> Step:
        """Row i (traced) of the grid."""
        return Step(*(jnp.asarray(values)[i] for values in self[: len(Step._fields)]))


Level = tuple[np.ndarray, np.ndarray]  # (alpha, sigma), float64


def make_grid(
    t: np.ndarray, now: Level, ahead: Level, init_scale: float = 1.0, first: int = 0
) -> Steps:
    """Steps from `now` to `ahead`, seen at `t`; arrays of one length, not padded yet."""
    t = np.asarray(t, np.float64)
    order = np.full(len(t), 4, np.int32)
    rows = (t, *now, *ahead, t, *now, log_snr_gap(now, ahead), order)
    return Steps(*rows, np.int32(len(t)), np.float32(init_scale), np.int32(first))  # pyright: ignore


def log_snr_gap(now: Level, ahead: Level) -> np.ndarray:
    """The length of steps in log(alpha / sigma), FAR from pure noise or to none.

    Worked out here: as a difference of float32 numbers it would lose half of its digits.
    """
    far = (now[0] < 1e-6) | (ahead[1] < 1e-6)
    ratio = np.where(far, 1, ahead[0] * now[1]) / np.where(far, 1, now[0] * ahead[1])
    return np.where(far, FAR, np.log(ratio))


def chain(t: np.ndarray, ratios: np.ndarray, init_scale: float = 1.0) -> Steps:
    """Steps through the noise levels sigma / alpha, of which there is one more than times."""
    alpha = 1 / np.sqrt(1 + ratios * ratios)
    sigma = ratios * alpha
    return make_grid(t, (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]), init_scale)


def padded(steps: Steps) -> Steps:
    """The grid as compiled programs take it: float32, ROWS long."""
    columns = len(Step._fields)
    rows = [np.pad(row, (0, ROWS - len(row))) for row in steps[:columns]]
    rows = [np.asarray(row, np.float32) for row in rows[:-1]] + [rows[-1].astype(np.int32)]
    return Steps(*rows, *steps[columns:])  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class Predict:
    """The network, guidance inside: `predict(x, t, alpha, sigma)` is what it makes of x.

    x: latents [b, h, w, c] = alpha x0 + sigma eps; the rest are scalars. Returns (x0, eps).
    """

    schedule: Schedule
    denoise: Denoise

    def __call__(self, x, t, alpha, sigma) -> tuple[jax.Array, jax.Array]:
        return self.split(self.denoise(x, t), x, alpha, sigma)

    def split(self, prediction, x, alpha, sigma) -> tuple[jax.Array, jax.Array]:
        """(x0, eps) from a prediction, x0 thresholded or clipped if the schedule says so.

        The noise stays as predicted, as in diffusers.
        """
        schedule = self.schedule
        x0, eps = x0_and_eps(schedule.prediction_type, prediction, x, alpha, sigma)
        if schedule.thresholding:
            x0 = dynamic_threshold(
                x0, schedule.dynamic_thresholding_ratio, schedule.sample_max_value
            )
        elif schedule.clip_sample:
            x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
        return x0, eps

    def slope(self, x, t, alpha, sigma) -> tuple[jax.Array, jax.Array]:
        """(x0, dy/dr) where dy/dr = (y - x0) / r is solved, y = z / alpha, r = sigma / alpha.

        That is eps, and is not worked out again from x0 unless that was clipped: near the picture
        the difference would be all rounding.
        """
        x0, eps = self(x, t, alpha, sigma)
        if self.schedule.thresholding or self.schedule.clip_sample:
            eps = (x - alpha * x0) / sigma
        return x0, eps


def dynamic_threshold(x0: jax.Array, ratio: float, most: float) -> jax.Array:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3) of each picture [b, h, w, c].

    Clips at the `ratio` quantile of |x0|, but at 1 at least and at `most` at most, and divides by
    that bound.
    """
    size = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), ratio, axis=1)
    bound = jnp.clip(size, 1.0, most)[:, None, None, None]
    return jnp.clip(x0, -bound, bound) / bound
