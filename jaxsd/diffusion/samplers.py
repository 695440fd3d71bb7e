"""Samplers: each is one function that takes the latents one step towards the clean picture.

A sampler is `step(predict, x, history, steps, i, noise, eta) -> (x, history)`:
    predict(x, t, alpha, sigma) -> (x0, eps): the network's view of x, guidance inside;
    x: latents [b, h, w, c] = alpha x0 + sigma eps; history: what a multistep method remembers;
    steps, i: the grid and the (traced) index of this step; noise(k): the k-th fresh N(0, 1) of this
    step, from each image's own key; eta: how much of the noise to renew, where that is free.

To add one: write the function, and a row in SAMPLERS.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion.denoise import Denoise
from jaxsd.diffusion.schedule import MAX_STEPS, Schedule, Step, Steps, x0_and_eps
from jaxsd.errors import JaxsdError

Predict = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Noise = Callable[[int], jax.Array]
History = tuple[jax.Array, ...]


# --- Grids: (schedule, count) -> t, (alpha, sigma) before and after each step, initial scale ---


def _bar_pair(bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.sqrt(bar), np.sqrt(1 - bar)


def ddim_grid(schedule: Schedule, count: int) -> Steps:
    """Whole timesteps; each step goes T // count back, and the last to alpha_0 or to 1.

    That a step's end is counted off (and not the next timestep) is diffusers' rule.
    """
    bar = schedule.alphas_cumprod.astype(np.float64)
    t = schedule.timesteps(count).astype(int)
    previous = t - schedule.num_train_timesteps // count
    last = 1.0 if schedule.set_alpha_to_one else bar[0]
    ahead = np.where(previous >= 0, bar[np.maximum(previous, 0)], last)
    return _steps(t, _bar_pair(bar[t]), _bar_pair(ahead))


def ddpm_grid(schedule: Schedule, count: int) -> Steps:
    """Whole timesteps; each step ends where the next begins, the last at the clean picture."""
    bar = schedule.alphas_cumprod.astype(np.float64)
    bar = np.append(bar[schedule.timesteps(count).astype(int)], 1.0)
    return _steps(schedule.timesteps(count), _bar_pair(bar[:-1]), _bar_pair(bar[1:]))


def sigma_grid(schedule: Schedule, count: int) -> Steps:
    """Timesteps that may be fractional, sigma / alpha interpolated there, the last step to 0.

    The first latents have the standard deviation sigma_max (in z / alpha), not that of the noised
    data, unless the spacing is "leading": k-diffusion's convention, kept by diffusers.
    """
    leading = schedule.timestep_spacing == "leading"
    return _to_clean(schedule, schedule.timesteps(count, rounded=False), scaled=not leading)


def dpm_grid(schedule: Schedule, count: int) -> Steps:
    """Whole timesteps, one more than asked for and the cleanest dropped; the last step to 0."""
    t = schedule.timesteps(count)
    most = min(schedule.num_train_timesteps, MAX_STEPS)
    if schedule.timestep_spacing == "trailing" or count == most:  # which leaves nothing to drop
        return _to_clean(schedule, t, scaled=False)
    return _to_clean(schedule, schedule.timesteps(count + 1)[:-1], scaled=False)


def _to_clean(schedule: Schedule, t: np.ndarray, scaled: bool) -> Steps:
    bar = schedule.alphas_cumprod.astype(np.float64)
    ratio = np.append(np.interp(t, np.arange(len(bar)), np.sqrt((1 - bar) / bar)), 0)
    alpha = 1 / np.sqrt(1 + ratio * ratio)
    sigma = ratio * alpha
    scale = sigma[0] if scaled else 1.0
    return _steps(t, (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]), scale)


def continuous_grid(schedule: Schedule, count: int) -> Steps:
    """Equal steps from t = T to 0, on a schedule defined everywhere, for every sampler."""
    n = schedule.num_train_timesteps
    if not 1 <= count <= MAX_STEPS:
        raise JaxsdError(f"steps must be from 1 to {MAX_STEPS}, not {count}")
    angles = np.linspace(1, 0, count + 1) * np.pi / 2
    alphas, sigmas = np.cos(angles), np.sin(angles)
    return _steps(
        angles[:-1] * (2 / np.pi) * n, (alphas[:-1], sigmas[:-1]), (alphas[1:], sigmas[1:])
    )


def _steps(t, now, ahead, init_scale: float = 1.0) -> Steps:
    rows = [
        np.pad(np.asarray(row, np.float32), (0, MAX_STEPS - len(t))) for row in (t, *now, *ahead)
    ]
    return Steps(*rows, np.int32(len(t)), np.float32(init_scale))  # pyright: ignore


# --- Samplers --------------------------------------------------------------------------------


def _gained(s: Step) -> jax.Array:
    """beta = 1 - (alpha / alpha')^2, the variance that the noise gains from the step's end to t.

    As a product of differences, of whichever of alpha and sigma is small: in float32 the plain form
    loses four digits near the picture.
    """
    by_sigma = (s.sigma - s.next_sigma) * (s.sigma + s.next_sigma)
    by_alpha = (s.next_alpha - s.alpha) * (s.next_alpha + s.alpha)
    gained = jnp.where(s.sigma < s.alpha, by_sigma, by_alpha) / jnp.square(s.next_alpha)
    return jnp.maximum(gained, 0.0)


def ddim(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DDIM (Song et al. 2020), eq. 12; eta = 0 is deterministic, eta = 1 renews as DDPM does."""
    s = steps.at(i)
    x0, eps = predict(x, s.t, s.alpha, s.sigma)
    renewed = eta * s.next_sigma / s.sigma * jnp.sqrt(_gained(s))
    kept = jnp.sqrt(jnp.maximum(jnp.square(s.next_sigma) - jnp.square(renewed), 0.0))
    return s.next_alpha * x0 + kept * eps + renewed * noise(0), history


def ddpm(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Ancestral sampling (Ho et al. 2020), eq. 7: the posterior q(z_s | z_t, x0), "fixed small"."""
    s = steps.at(i)
    x0, _ = predict(x, s.t, s.alpha, s.sigma)
    ratio = s.alpha / s.next_alpha
    beta = _gained(s)
    mean = (s.next_alpha * beta * x0 + ratio * jnp.square(s.next_sigma) * x) / jnp.square(s.sigma)
    return mean + jnp.sqrt(beta) * s.next_sigma / s.sigma * noise(0), history


def euler(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Euler's method for dy/dr = (y - x0) / r, y = z / alpha, r = sigma / alpha.

    Karras et al. 2022 (2206.00364), section 2, without churn. y' = y + (r' - r) (y - x0) / r is
    here written in z. In exact arithmetic it is DDIM with eta = 0; the grid sets the two apart.
    """
    s = steps.at(i)
    x0, _ = predict(x, s.t, s.alpha, s.sigma)
    shrink = s.next_sigma / s.sigma  # (r' alpha') / (r alpha), finite where alpha = 0
    return s.next_alpha * x0 + shrink * (x - s.alpha * x0), history


def dpmpp_2m(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order from the previous prediction.

    The first step, and a last one that ends at sigma = 0, are of first order.
    """
    s, before = steps.at(i), steps.at(jnp.maximum(i - 1, 0))
    x0, _ = predict(x, s.t, s.alpha, s.sigma)

    def half_log_snr(alpha, sigma):
        return jnp.log(jnp.maximum(alpha, 1e-20) / jnp.maximum(sigma, 1e-20))

    h = half_log_snr(s.next_alpha, s.next_sigma) - half_log_snr(s.alpha, s.sigma)
    h_before = half_log_snr(s.alpha, s.sigma) - half_log_snr(before.alpha, before.sigma)
    first_order = (i == 0) | (s.next_sigma == 0) | (before.alpha < 1e-6)
    weight = jnp.where(first_order, 0.0, h / (2 * jnp.where(first_order, 1.0, h_before)))
    d = x0 + weight * (x0 - history[0])
    return s.next_sigma / s.sigma * x + s.next_alpha * -jnp.expm1(-h) * d, (x0,)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS: the step, its grid on discrete schedules, how many arrays it remembers."""

    step: Callable
    grid: Callable[[Schedule, int], Steps]
    remembers: int = 0
    uses_eta: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, ddim_grid, uses_eta=True),
    "ddpm": Sampler(ddpm, ddpm_grid),
    "euler": Sampler(euler, sigma_grid),
    "dpmpp_2m": Sampler(dpmpp_2m, dpm_grid, remembers=1),
}
# The sampler that continues in the spirit of the scheduler class a folder names.
DEFAULT_SAMPLER = {
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}


def get_sampler(name: str) -> Sampler:
    """Looks a sampler up; JaxsdError names the ones there are."""
    if name not in SAMPLERS:
        raise JaxsdError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def make_steps(schedule: Schedule, sampler: str, count: int) -> Steps:
    """The grid of `count` steps; JaxsdError if the schedule has fewer."""
    return (continuous_grid if schedule.continuous else get_sampler(sampler).grid)(schedule, count)


def run(
    sampler: Sampler,
    schedule: Schedule,
    denoise: Denoise,
    x: jax.Array,
    history: History,
    keys: jax.Array,
    steps: Steps,
    start: jax.Array,
    stop: jax.Array,
    eta: jax.Array,
) -> tuple[jax.Array, History]:
    """Steps start ... stop - 1 of the loop, inside `jax.jit`; start and stop are traced.

    x: latents [b, h, w, c], float32. history: as the last call returned it, zeros at first. keys: a
    PRNG key for each image. One program thus serves the whole loop, and any part of it for a caller
    who wants to look at the latents in between.
    """

    def predict(x, t, alpha, sigma):
        x0, eps = x0_and_eps(schedule.prediction_type, denoise(x, t), x, alpha, sigma)
        if schedule.clip_sample:  # the noise stays as predicted, as in diffusers
            x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
        return x0, eps

    def body(i, carry):
        def noise(k: int) -> jax.Array:
            def one(key):
                key = jax.random.fold_in(jax.random.fold_in(key, i + 1), k)
                return jax.random.normal(key, x.shape[1:], x.dtype)

            return jax.vmap(one)(keys)

        return sampler.step(predict, *carry, steps, i, noise, eta)

    return jax.lax.fori_loop(start, stop, body, (x, history))


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The N(0, 1) that sampling starts from, each image's from its own key: [b, *shape]."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape, jnp.float32))(
        keys
    )
