"""Noise schedules, and the one place where prediction types are converted.

z_t = alpha_t x + sigma_t eps with alpha^2 + sigma^2 = 1 throughout the library, also for samplers
that others write in the coordinates z / alpha. Time t runs from 0 (clean) to `num_train_timesteps`
(noise), in the units that the network is fed.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsd.diffusion.schedulers import SCHEDULER_CLASSES
from jaxsd.errors import JaxsdError
from jaxsd.models.config import Config

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BOTH = "both"  # x and eps, twice the channels: a word of ours, unknown to diffusers
# 1 / alpha is bounded where eps must be divided by it: log SNR >= -20, as in Salimans & Ho 2022.
MIN_ALPHA = math.exp(-10)


def x0_and_eps(
    prediction_type: str, prediction: jax.Array, z: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The clean picture and the noise that a prediction implies.

    epsilon: x = (z - sigma eps) / alpha. sample: eps = (z - alpha x) / sigma.
    v_prediction (Salimans & Ho 2022, appendix D): x = alpha z - sigma v, eps = alpha v + sigma z.
    """
    if prediction_type == BOTH:
        prediction_type, prediction = as_one(prediction_type, prediction, alpha, sigma)
    if prediction_type == "epsilon":
        return (z - sigma * prediction) / jnp.maximum(alpha, MIN_ALPHA), prediction
    if prediction_type == "sample":
        return prediction, (z - alpha * prediction) / jnp.maximum(sigma, MIN_ALPHA)
    if prediction_type == "v_prediction":
        return alpha * z - sigma * prediction, alpha * prediction + sigma * z
    raise ValueError(f"prediction_type is one of {PREDICTION_TYPES}, not {prediction_type!r}")


def as_one(
    prediction_type: str, prediction: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> tuple[str, jax.Array]:
    """A prediction as one picture, and of which type: "both" as v, any other as it is.

    Salimans & Ho 2022, section 4, merge x' and eps' [..., 2c] to x = sigma^2 x' + alpha (z - sigma
    eps'). Of that picture v is alpha eps' - sigma x', whatever z.
    """
    if prediction_type != BOTH:
        return prediction_type, prediction
    x0, eps = jnp.split(prediction, 2, -1)
    return "v_prediction", alpha * eps - sigma * x0


def prediction_target(
    prediction_type: str, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """What the network should say of z = alpha x0 + sigma eps; v = alpha eps - sigma x0."""
    targets = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
    return targets[prediction_type]


MAX_STEPS = 1000
# Written whatever the class: another one, made of this file, would mean something else without.
SWITCHED = ("clip_sample", "set_alpha_to_one")
READ_BY_RUN = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "variance_type",
    "skip_prk_steps",
    "algorithm_type",
    "solver_type",
    "timestep_scaling",
)


@dataclasses.dataclass(frozen=True)
class Schedule(Config):
    """A noise schedule and how to step through it: diffusers' `scheduler/scheduler_config.json`.

    `beta_schedule`: "linear", "scaled_linear" (Stable Diffusion: linear in sqrt(beta)),
    "squaredcos_cap_v2" (Nichol & Dhariwal 2021), "sigmoid" (GeoDiff), or our continuous "cosine",
    alpha = cos(pi t / 2T) (Salimans & Ho 2022), which diffusers has no word for: its file says
    squaredcos_cap_v2, which is near, and adds `"continuous_schedule": "cosine"`. `trained_betas`
    takes the place of all of them. `class_name` is the diffusers class that the file names; it
    decides the default sampler. `prediction_type` may also be "both", x and eps. Switches that only
    some samplers have do nothing in the others, but those of the grid are refused there
    (`samplers.make_steps`). `default_steps` and `default_guidance_scale` stand in the file only if
    they are set; diffusers reads past them.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False  # 2305.08891, algorithm 1
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True  # whether DDIM's and PNDM's last step ends clean, or at t = 0
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False  # dynamic (Saharia et al. 2022); takes the place of clipping
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    class_name: str = "DDIMScheduler"
    variance_type: str | None = "fixed_small"  # of DDPM: the posterior's, or "fixed_large": beta
    skip_prk_steps: bool = True  # whether PNDM starts without Runge-Kutta steps
    # Grids of samplers that count in sigma / alpha: at most one of the four use_*
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    lambda_min_clipped: float = -math.inf
    # DPM-Solver and UniPC
    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    # LCM and TCD
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    # Ours, of students that are made for few steps: what is meant where a caller names none
    default_steps: int | None = None
    default_guidance_scale: float | None = None

    # What shipped files say that touches nothing here.
    NEUTRAL = {
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
        "shift_terminal": (None,),
        "predict_x0": (True,),
        "disable_corrector": ((),),
        "solver_p": (None,),
    }
    IGNORED = (
        "flow_shift",  # read only with use_flow_sigmas
        "time_shift_type",  # read only with use_dynamic_shifting
    )

    def __post_init__(self):
        choices = {
            "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "cosine"),
            "prediction_type": (*PREDICTION_TYPES, BOTH),
            "timestep_spacing": ("leading", "trailing", "linspace"),
            "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None),
            "final_sigmas_type": ("zero", "sigma_min"),
            "interpolation_type": ("linear", "log_linear"),
            "timestep_type": ("discrete", "continuous"),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_order": (1, 2, 3),
            "solver_type": ("midpoint", "heun", "bh1", "bh2"),
            "class_name": tuple(SCHEDULER_CLASSES),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                listed = ", ".join(map(str, allowed))
                raise ValueError(f"{name}={value!r} is not supported; there are {listed}")
        if not 0 < self.num_train_timesteps <= 100_000:
            raise ValueError(f"num_train_timesteps={self.num_train_timesteps} is out of range")
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(self.trained_betas)} values for "
                    f"num_train_timesteps={self.num_train_timesteps}"
                )
            if not all(0 < beta < 1 for beta in self.trained_betas):
                raise ValueError("trained_betas must lie between 0 and 1")
        if self.default_steps is not None and not 1 <= self.default_steps <= MAX_STEPS:
            raise ValueError(f"default_steps={self.default_steps} is not from 1 to {MAX_STEPS}")
        scale = self.default_guidance_scale
        if scale is not None and not 0 <= scale < math.inf:
            raise ValueError(f"default_guidance_scale={scale} is not a guidance scale from 0 on")
        if len(grids := self.sigma_switches) > 1:
            raise ValueError(f"{' and '.join(grids)} cannot be used together")

    def for_run(self) -> "Schedule":
        """What `samplers.run` reads, all else as usual: static where the grid is traced.

        Schedules that differ in their grids alone thus share one compiled program.
        """
        return Schedule(**{name: getattr(self, name) for name in READ_BY_RUN})

    @property
    def sigma_switches(self) -> tuple[str, ...]:
        """Which of the switches for other noise levels is on."""
        kinds = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
        return tuple(f"use_{kind}" for kind in kinds if getattr(self, f"use_{kind}"))

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str = "scheduler_config.json") -> "Schedule":
        """Of a scheduler_config.json and its class's defaults; JaxsdError lists the unknown."""
        values = dict(values)
        name = values.get("_class_name", "DDIMScheduler")
        if continuous := values.pop("continuous_schedule", None):
            values["beta_schedule"] = continuous
        return super().from_json(_class_defaults(name) | values, where)

    def to_json(self) -> dict[str, Any]:
        """What a scheduler_config.json says: all that the class knows, else the unusual."""
        values = super().to_json()
        name = values.pop("class_name")
        # What the class knows, and what else is out of the ordinary and would be lost.
        defaults, usual = SCHEDULER_CLASSES[name].defaults, dataclasses.asdict(Schedule())
        usual |= _class_defaults(name)
        kept = {*defaults, *SWITCHED}
        values = {k: v for k, v in values.items() if k in kept or v != usual[k]}
        if self.beta_schedule == "cosine":
            values |= {"beta_schedule": "squaredcos_cap_v2", "continuous_schedule": "cosine"}
        return {"_class_name": name, **values}

    @property
    def pictures_predicted(self) -> int:
        """How many times the channels of its input a network gives back."""
        return 2 if self.prediction_type == BOTH else 1

    @property
    def continuous(self) -> bool:
        """Whether the schedule is defined at every real t, not by a table of betas."""
        return self.beta_schedule == "cosine" and self.trained_betas is None

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """The variance that each timestep adds, float32, as PyTorch has it to the last bit."""
        n, f32 = self.num_train_timesteps, np.float32
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, f32)
        elif self.beta_schedule == "linear":
            betas = _torch_linspace(self.beta_start, self.beta_end, n)
        elif self.beta_schedule == "scaled_linear":
            roots = _torch_linspace(self.beta_start**0.5, self.beta_end**0.5, n)
            betas = roots * roots
        elif self.beta_schedule == "sigmoid":
            sigmoid = 1 / (1 + np.exp(-_torch_linspace(-6.0, 6.0, n)))
            betas = sigmoid * f32(self.beta_end - self.beta_start) + f32(self.beta_start)
        else:
            bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(f32)
        return _zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha_t^2 for t = 0 ... T-1: the table that PyTorch comes to, to the last bit."""
        if self.continuous:
            n = self.num_train_timesteps
            return (np.cos(np.arange(n) / n * np.pi / 2) ** 2).astype(np.float32)
        return _cumprod(np.float32(1) - self.betas)

    @functools.cached_property
    def ratios(self) -> np.ndarray:
        """sigma_t / alpha_t for t = 0 ... T-1, float32 as in PyTorch.

        Without any signal left it would be infinite: diffusers then takes alpha = 2^-12.
        """
        bar = self.alphas_cumprod
        bar = np.where(bar == 0, np.float32(2.0**-24), bar)
        return np.sqrt((1 - bar) / bar)

    def alpha_sigma(
        self, t: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(alpha, sigma) at times t in the network's units, also between whole ones.

        Between whole times of a discrete schedule sigma / alpha is interpolated linearly.
        """
        if self.continuous:
            angle = t * (math.pi / 2 / self.num_train_timesteps)
            return jnp.cos(angle), jnp.sin(angle)
        n = self.num_train_timesteps
        ratios = jnp.asarray(self.ratios, jnp.float32)
        ratio = jnp.interp(t, jnp.arange(n, dtype=jnp.float32), ratios)
        alpha = jax.lax.rsqrt(1 + ratio * ratio)
        if self.alphas_cumprod[-1] == 0:  # zero terminal SNR: the last time is noise alone
            noise = t >= n - 1
            return jnp.where(noise, 0.0, alpha), jnp.where(noise, 1.0, ratio * alpha)
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

    def timesteps(
        self, count: int, rounded: bool = True, usable: int | None = None, spacing: str = ""
    ) -> np.ndarray:
        """`count` times from noisy to clean by `timestep_spacing` (diffusers' set_timesteps).

        Lin et al. 2023 (2305.08891), table 2, names the spacings. `rounded=False` keeps linspace's
        fractions, as Euler does. `usable`: only the cleanest of the timesteps.
        """
        n, spacing = self.num_train_timesteps, spacing or self.timestep_spacing
        usable = n if usable is None else usable
        if not 1 <= count <= min(n, MAX_STEPS):
            raise JaxsdError(f"steps must be from 1 to {min(n, MAX_STEPS)}, not {count}")
        if self.continuous:
            return n * (np.arange(count, 0, -1) / count)
        if spacing == "leading":
            times = (np.arange(count) * (usable // count))[::-1].astype(np.float64)
            # The offset must not lead out of the table, as it would with all n steps.
            return times + min(self.steps_offset, n - 1 - times[0])
        if spacing == "trailing":
            return np.round(np.arange(usable, 0, -n / count)[:count]) - 1
        times = np.linspace(0, usable - 1, count)[::-1]
        return np.round(times) if rounded else times


def _class_defaults(name: str) -> dict[str, Any]:
    """What a file of this class means where it says nothing."""
    if name not in SCHEDULER_CLASSES:
        return {"class_name": name}  # refused by name with the rest
    plain = {"class_name": name, "clip_sample": False, "timestep_spacing": "linspace"}
    return plain | SCHEDULER_CLASSES[name].defaults


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    """torch.cumprod in float32: the product is kept in double and rounded once for each t."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Lin et al. 2023 (2305.08891), algorithm 1: shifts and scales alpha so that it ends at 0."""
    alpha = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = alpha[0], alpha[-1]
    alpha = (alpha - last) * (first / (first - last))
    bar = alpha * alpha
    return np.float32(1) - np.append(bar[:1], bar[1:] / bar[:-1])


def _torch_linspace(first: float, last: float, count: int) -> np.ndarray:
    """torch.linspace in float32: a float32 step, counted from the nearer end, rounded once."""
    start, stop = np.float32(first), np.float32(last)
    step = np.float64((stop - start) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    rising, falling = start + step * i, stop - step * (count - 1 - i)
    return np.where(i < max(count // 2, 1), rising, falling).astype(np.float32)
