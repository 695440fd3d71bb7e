"""Samplers that remember nothing: each step looks at the latents it is given, once or twice.

The protocol is that of `samplers.py`: `step(predict, x, history, steps, i, noise, eta)`.
"""

import jax
import jax.numpy as jnp

from jaxsd.diffusion.schedule import Schedule
from jaxsd.diffusion.steps import History, Noise, Predict, Step, Steps


def gained(alpha, sigma, next_alpha, next_sigma) -> jax.Array:
    """beta = 1 - (alpha / alpha')^2, the variance that the noise gains from the step's end to t.

    As a product of differences, of whichever of alpha and sigma is small: in float32 the plain form
    loses four digits near the picture.
    """
    by_sigma = (sigma - next_sigma) * (sigma + next_sigma)
    by_alpha = (next_alpha - alpha) * (next_alpha + alpha)
    difference = jnp.where(sigma < alpha, by_sigma, by_alpha)
    return jnp.maximum(difference / jnp.square(next_alpha), 0.0)


def _gained(s: Step) -> jax.Array:
    return gained(s.alpha, s.sigma, s.next_alpha, s.next_sigma)


def ddim(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DDIM (Song et al. 2020), eq. 12; eta = 0 is deterministic, eta = 1 renews as DDPM does."""
    s = steps.at(i)
    x0, eps = predict(x, s.t, s.alpha, s.sigma)
    renewed = eta * s.next_sigma / s.sigma * jnp.sqrt(_gained(s))
    kept = jnp.sqrt(jnp.maximum(jnp.square(s.next_sigma) - jnp.square(renewed), 0.0))
    return s.next_alpha * x0 + kept * eps + renewed * noise(0), history


def ddpm(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Ancestral sampling (Ho et al. 2020), eq. 7: the posterior q(z_s | z_t, x0).

    Its variance is the posterior's, or with variance_type "fixed_large" all that the step gains,
    then also in the last step unless that begins at t = 0.
    """
    s = steps.at(i)
    x0, _ = predict(x, s.t, s.alpha, s.sigma)
    ratio = s.alpha / s.next_alpha
    beta = _gained(s)
    mean = (s.next_alpha * beta * x0 + ratio * jnp.square(s.next_sigma) * x) / jnp.square(s.sigma)
    scale = s.next_sigma / s.sigma
    if predict.schedule.variance_type == "fixed_large":
        scale = jnp.where(s.t > 0, 1.0, 0.0)
    return mean + jnp.sqrt(beta) * scale * noise(0), history


# --- k-diffusion's, for y = z / alpha and r = sigma / alpha: dy/dr = (y - x0) / r --------------


def euler(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Euler's method for dy/dr = (y - x0) / r, y = z / alpha, r = sigma / alpha.

    Karras et al. 2022 (2206.00364), section 2, without churn. y' = y + (r' - r) (y - x0) / r is
    here written in z. In exact arithmetic it is DDIM with eta = 0; the grid sets the two apart.
    """
    s = steps.at(i)
    x0, d = predict.slope(x, s.t, s.alpha, s.sigma)
    return s.next_alpha * x0 + s.next_sigma * d, history


def _ancestral(s: Step) -> tuple[jax.Array, jax.Array]:
    """The parts of sigma' that are kept and renewed: (r'/r, sqrt(1 - (r'/r)^2)).

    Karras et al. call them sigma_down / sigma' and sigma_up / sigma'.
    """
    kept = s.next_sigma * s.alpha / (s.next_alpha * s.sigma)
    return kept, jnp.sqrt(_gained(s)) / s.sigma


def euler_ancestral(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Euler to less noise than the step's end has, and fresh noise up to it (k-diffusion)."""
    s = steps.at(i)
    x0, d = predict.slope(x, s.t, s.alpha, s.sigma)
    kept, renewed = _ancestral(s)
    return s.next_alpha * x0 + s.next_sigma * (kept * d + renewed * noise(0)), history


def _two_looks(predict: Predict, x, s: Step, kept, weight: float) -> jax.Array:
    """y + (kept r' - r) d', with d' = `weight` of the slope at the second point, else the first.

    Where the second point has no noise left there is nothing to see: Euler's method.
    """
    x0, d = predict.slope(x, s.t, s.alpha, s.sigma)

    def twice():
        there = s.mid_alpha * x0 + s.mid_sigma * d
        _, second = predict.slope(there, s.mid_t, s.mid_alpha, s.mid_sigma)
        change = weight * (second - d)
        far = s.next_alpha * s.sigma / s.alpha
        return s.next_alpha * x0 + s.next_sigma * kept * (d + change) - far * change

    once = s.next_alpha * x0 + s.next_sigma * kept * d
    return jax.lax.cond(s.mid_sigma > 0, twice, lambda: once)


def heun(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Heun's method (Karras et al. 2022, algorithm 1, without churn): the mean of both slopes."""
    return _two_looks(predict, x, steps.at(i), 1.0, 0.5), history


def dpm2(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DPM-Solver-2 in Karras' coordinates (k-diffusion): the slope half way in log r."""
    return _two_looks(predict, x, steps.at(i), 1.0, 1.0), history


def dpm2_ancestral(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DPM-Solver-2 to less noise than the step's end has, and fresh noise up to it."""
    s = steps.at(i)
    kept, renewed = _ancestral(s)
    return _two_looks(predict, x, s, kept, 1.0) + s.next_sigma * renewed * noise(0), history


# --- Students that were taught to jump --------------------------------------------------------


def boundary(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(c_skip, c_out) of a consistency function c_skip z + c_out x0, which is z at t = 0.

    Luo et al. 2023 (2310.04378), section 4.1, with t times `timestep_scaling` and sigma_data = .5.
    """
    t = t * schedule.timestep_scaling
    width = jnp.square(t) + 0.25
    return 0.25 / width, t / jnp.sqrt(width)


def lcm(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Multistep consistency sampling (Luo et al. 2023, 2310.04378): jump to x0, noise it anew."""
    s = steps.at(i)
    x0, _ = predict(x, s.t, s.alpha, s.sigma)
    skip, out = boundary(predict.schedule, s.t)
    x0 = out * x0 + skip * x
    return s.next_alpha * x0 + s.next_sigma * noise(0), history


def ddim_stochastic(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DDIM over two steps of the grid, and fresh noise for one of them back.

    The N-step stochastic sampler of Meng et al. 2023 (2210.03142): z_s = (alpha_s / alpha_k) z_k +
    sigma_{s|k} eps, k two steps ahead and s one. The last step is DDIM's.
    """
    s = steps.at(i)
    x0, eps = predict(x, s.t, s.alpha, s.sigma)
    landed = s.mid_alpha * x0 + s.mid_sigma * eps
    renewed = jnp.sqrt(gained(s.next_alpha, s.next_sigma, s.mid_alpha, s.mid_sigma))
    return s.next_alpha / s.mid_alpha * landed + renewed * noise(0), history


def tcd(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Trajectory consistency (Zheng et al. 2024, 2402.19159, algorithm 4); eta is its gamma.

    Jumps to the time (1 - gamma) of the step's end and noises back up to the end.
    """
    s = steps.at(i)
    x0, eps = predict(x, s.t, s.alpha, s.sigma)
    bar = jnp.asarray(predict.schedule.alphas_cumprod)[
        jnp.floor((1.0 - eta) * s.mid_t).astype(jnp.int32)
    ]
    alpha, sigma = jnp.sqrt(bar), jnp.sqrt(1 - bar)
    renewed = jnp.sqrt(gained(s.next_alpha, s.next_sigma, alpha, sigma))
    landed = alpha * x0 + sigma * eps
    return s.next_alpha / alpha * landed + renewed * noise(0), history
