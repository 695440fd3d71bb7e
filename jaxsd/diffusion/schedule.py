"""Noise schedules, and the one place where prediction types are converted.

z_t = alpha_t x + sigma_t eps with alpha^2 + sigma^2 = 1 throughout the library, also for samplers
that others write in the coordinates z / alpha. Time t runs from 0 (clean) to `num_train_timesteps`
(noise), in the units that the network is fed.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsd.errors import JaxsdError
from jaxsd.models.config import Config

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# 1 / alpha is bounded where eps must be divided by it: log SNR >= -20, as in Salimans & Ho 2022.
MIN_ALPHA = math.exp(-10)


def x0_and_eps(
    prediction_type: str, prediction: jax.Array, z: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The clean picture and the noise that a prediction implies.

    epsilon: x = (z - sigma eps) / alpha. sample: eps = (z - alpha x) / sigma.
    v_prediction (Salimans & Ho 2022, appendix D): x = alpha z - sigma v, eps = alpha v + sigma z.
    """
    if prediction_type == "epsilon":
        return (z - sigma * prediction) / jnp.maximum(alpha, MIN_ALPHA), prediction
    if prediction_type == "sample":
        return prediction, (z - alpha * prediction) / jnp.maximum(sigma, MIN_ALPHA)
    if prediction_type == "v_prediction":
        return alpha * z - sigma * prediction, alpha * prediction + sigma * z
    raise ValueError(f"prediction_type is one of {PREDICTION_TYPES}, not {prediction_type!r}")


def prediction_target(
    prediction_type: str, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """What the network should say of z = alpha x0 + sigma eps; v = alpha eps - sigma x0."""
    targets = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
    return targets[prediction_type]


class Steps(NamedTuple):
    """A sampling grid: step i goes from (alpha, sigma)[i], seen at timestep t[i], to next_*[i].

    Arrays of MAX_STEPS float32 of which the first `count` are meant, so that the number of steps
    can change without compiling anew. Where one step ends the next one need not begin: DDIM's
    historical grids overlap unless the number of steps divides 1000.
    """

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    next_alpha: jax.Array
    next_sigma: jax.Array
    count: jax.Array  # int32
    init_scale: jax.Array  # initial latents are this times N(0, 1)

    def at(self, i: jax.Array) -> "Step":
        return Step(*(jnp.asarray(values)[i] for values in self[:5]))


class Step(NamedTuple):
    """One row of `Steps`: scalars."""

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    next_alpha: jax.Array
    next_sigma: jax.Array


MAX_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Schedule(Config):
    """A noise schedule, as in diffusers' `scheduler/scheduler_config.json`.

    `beta_schedule`: "linear", "scaled_linear" (Stable Diffusion: linear in sqrt(beta)),
    "squaredcos_cap_v2" (Nichol & Dhariwal 2021), or our continuous "cosine", alpha = cos(pi t / 2T)
    (Salimans & Ho 2022), which diffusers has no word for: its file says squaredcos_cap_v2, which is
    near, and adds `"continuous_schedule": "cosine"`.
    `class_name` is the diffusers class that the file names; it decides the default sampler.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    class_name: str = "DDIMScheduler"

    # What shipped files say that touches nothing here (PNDM's, Euler's and DPM-Solver's switches
    # included).
    NEUTRAL = {
        "trained_betas": (None,),
        "thresholding": (False,),
        "rescale_betas_zero_snr": (False,),
        "interpolation_type": ("linear",),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "sigma_min": (None,),
        "sigma_max": (None,),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
        "variance_type": ("fixed_small", "fixed_small_log", None),
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "lower_order_final": (True,),
        "euler_at_final": (False,),
        "lambda_min_clipped": (-math.inf,),
        "use_lu_lambdas": (False,),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
    }
    IGNORED = (
        "skip_prk_steps",
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "flow_shift",  # read only with use_flow_sigmas
        "time_shift_type",  # read only with use_dynamic_shifting
    )

    def __post_init__(self):
        choices = {
            "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "cosine"),
            "prediction_type": PREDICTION_TYPES,
            "timestep_spacing": ("leading", "trailing", "linspace"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, not {getattr(self, name)!r}")
        if not 0 < self.num_train_timesteps <= 100_000:
            raise ValueError(f"num_train_timesteps={self.num_train_timesteps} is out of range")

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str = "scheduler_config.json") -> "Schedule":
        values = dict(values)
        name = values.get("_class_name", "DDIMScheduler")
        # Each diffusers class has defaults of its own for what its file leaves out.
        defaults: dict[str, Any] = {"class_name": name}
        if name not in ("DDIMScheduler", "DDPMScheduler"):
            defaults |= {"clip_sample": False, "set_alpha_to_one": name != "PNDMScheduler"}
        if name not in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"):
            defaults["timestep_spacing"] = "linspace"
        if continuous := values.pop("continuous_schedule", None):
            values["beta_schedule"] = continuous
        return super().from_json(defaults | values, where)

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        values = {"_class_name": values.pop("class_name"), **values}
        if self.beta_schedule == "cosine":
            values |= {"beta_schedule": "squaredcos_cap_v2", "continuous_schedule": "cosine"}
        return values

    @property
    def continuous(self) -> bool:
        """Whether the schedule is defined at every real t, not by a table of betas."""
        return self.beta_schedule == "cosine"

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha_t^2 for t = 0 ... T-1: the table that PyTorch comes to, to the last bit.

        Betas are float32; their product is kept in double and rounded once for each t.
        """
        n, f32 = self.num_train_timesteps, np.float32
        if self.beta_schedule == "cosine":
            return (np.cos(np.arange(n) / n * np.pi / 2) ** 2).astype(f32)
        if self.beta_schedule == "linear":
            betas = _torch_linspace(self.beta_start, self.beta_end, n)
        elif self.beta_schedule == "scaled_linear":
            roots = _torch_linspace(self.beta_start**0.5, self.beta_end**0.5, n)
            betas = roots * roots
        else:
            bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(f32)
        return np.cumprod(f32(1) - betas, dtype=np.float64).astype(f32)

    def alpha_sigma(
        self, t: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(alpha, sigma) at times t in the network's units, also between whole ones.

        Between whole times of a discrete schedule sigma / alpha is interpolated linearly.
        """
        if self.continuous:
            angle = t * (math.pi / 2 / self.num_train_timesteps)
            return jnp.cos(angle), jnp.sin(angle)
        bar = self.alphas_cumprod.astype(np.float64)
        ratios = jnp.asarray(np.sqrt((1 - bar) / bar), jnp.float32)
        ratio = jnp.interp(t, jnp.arange(len(bar), dtype=jnp.float32), ratios)
        alpha = jax.lax.rsqrt(1 + ratio * ratio)
        return alpha, ratio * alpha

    def random_times(self, key: jax.Array, count: int, continuous: bool) -> Float[Array, " n"]:
        """Training times: uniform in [0, T) (stratified over the batch), or whole and independent.

        Stratified times (Kingma et al. 2021, "low-discrepancy") lower the variance of the loss.
        """
        n = self.num_train_timesteps
        if not continuous:
            # A continuous schedule at discrete times has the grid 1 ... T (t = 0 has no noise).
            return jax.random.randint(key, (count,), 0, n).astype(jnp.float32) + float(
                self.continuous
            )
        start = jax.random.uniform(key, ())
        strata = (start + jnp.arange(count, dtype=jnp.float32) / count) % 1.0
        return strata * (n if self.continuous else n - 1)

    def timesteps(self, count: int, rounded: bool = True) -> np.ndarray:
        """`count` times from noisy to clean by `timestep_spacing` (diffusers' set_timesteps).

        Lin et al. 2023 (2305.08891), table 2, names the spacings. `rounded=False` keeps linspace's
        fractions, as Euler does.
        """
        n, spacing = self.num_train_timesteps, self.timestep_spacing
        if not 1 <= count <= min(n, MAX_STEPS):
            raise JaxsdError(f"steps must be from 1 to {min(n, MAX_STEPS)}, not {count}")
        if spacing == "leading":
            times = (np.arange(count) * (n // count))[::-1].astype(np.float64)
            # The offset must not lead out of the table, as it would with all n steps.
            return times + min(self.steps_offset, n - 1 - times[0])
        if spacing == "trailing":
            return np.round(np.arange(n, 0, -n / count)[:count]) - 1
        times = np.linspace(0, n - 1, count)[::-1]
        return np.round(times) if rounded else times


def _torch_linspace(first: float, last: float, count: int) -> np.ndarray:
    """torch.linspace in float32: a float32 step, counted from the nearer end, rounded once."""
    start, stop = np.float32(first), np.float32(last)
    step = np.float64((stop - start) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    rising, falling = start + step * i, stop - step * (count - 1 - i)
    return np.where(i < max(count // 2, 1), rising, falling).astype(np.float32)
