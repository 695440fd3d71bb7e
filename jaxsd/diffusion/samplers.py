"""Samplers: each is one function that takes the latents one step towards the clean picture.

A sampler is `step(predict, x, history, steps, i, noise, eta) -> (x, history)`:
    predict(x, t, alpha, sigma) -> (x0, eps): the network's view of x, guidance inside;
    x: latents [b, h, w, c] = alpha x0 + sigma eps; history: what a multistep method remembers;
    steps, i: the grid and the (traced) index of this step; noise(k): the k-th fresh N(0, 1) of this
    step, from each image's own key; eta: how much of the noise to renew, where that is free.

To add one: write the function (`onestep.py`, `multistep.py`), and a row in SAMPLERS.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion import grids, multistep, onestep
from jaxsd.diffusion.denoise import Denoise
from jaxsd.diffusion.grids import Ask, Grid
from jaxsd.diffusion.schedule import MAX_STEPS, Schedule
from jaxsd.diffusion.schedulers import SCHEDULER_CLASSES
from jaxsd.diffusion.steps import History, Predict, Steps, padded
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS: the step, its grid on discrete schedules, how many arrays it remembers.

    scheduler: the class of diffusers that it follows, or with `ours` only its grid: diffusers has
    no such sampler. continuous: its grid on schedules without timesteps. second: finds the grid's
    mid_*. orders(schedule, count): the highest order of each step. uses_eta: whether `eta` says
    something to it. custom: what can be given instead of a number of steps.
    """

    step: Callable
    scheduler: str
    grid: Grid
    continuous: Grid = grids.continuous_grid
    second: Callable[[Schedule, Steps], Steps] | None = None
    orders: Callable[[Schedule, int], np.ndarray] | None = None
    remembers: int = 0
    uses_eta: bool = False
    custom: tuple[str, ...] = ()
    ours: bool = False


def _multistep(step: Callable, order: int) -> Sampler:
    return Sampler(
        step,
        "DPMSolverMultistepScheduler",
        grids.dpm_grid,
        orders=functools.partial(grids.multistep_orders, order=order),
        remembers=order - 1,
        custom=("timesteps",),
    )


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(onestep.ddim, "DDIMScheduler", grids.ddim_grid, uses_eta=True),
    "ddpm": Sampler(onestep.ddpm, "DDPMScheduler", grids.ddpm_grid, custom=("timesteps",)),
    "euler": Sampler(
        onestep.euler,
        "EulerDiscreteScheduler",
        grids.sigma_grid,
        custom=("timesteps", "sigmas"),
    ),
    "dpmpp_2m": _multistep(multistep.dpmpp, 2),
    "dpmpp_3m": _multistep(multistep.dpmpp, 3),
    "dpmpp_2m_sde": _multistep(multistep.dpmpp_sde, 2),
    "dpmpp_3m_sde": _multistep(multistep.dpmpp_sde, 3),
    "dpmpp_singlestep": Sampler(
        multistep.dpmpp_singlestep,
        "DPMSolverSinglestepScheduler",
        grids.singlestep_grid,
        orders=grids.singlestep_orders,
        remembers=3,
        custom=("timesteps",),
    ),
    "unipc": Sampler(
        multistep.unipc,
        "UniPCMultistepScheduler",
        grids.unipc_grid,
        orders=grids.unipc_orders,
        remembers=4,
    ),
    "euler_ancestral": Sampler(
        onestep.euler_ancestral, "EulerAncestralDiscreteScheduler", grids.sigma_grid
    ),
    "heun": Sampler(
        onestep.heun,
        "HeunDiscreteScheduler",
        grids.sigma_grid,
        second=grids.end_as_middle,
        custom=("timesteps",),
    ),
    "dpm2": Sampler(
        onestep.dpm2,
        "KDPM2DiscreteScheduler",
        grids.rounded_sigma_grid,
        second=grids.geometric_middle,
    ),
    "dpm2_ancestral": Sampler(
        onestep.dpm2_ancestral,
        "KDPM2AncestralDiscreteScheduler",
        grids.rounded_sigma_grid,
        second=grids.ancestral_middle,
    ),
    "lms": Sampler(multistep.lms, "LMSDiscreteScheduler", grids.sigma_grid, remembers=3),
    "pndm": Sampler(multistep.pndm, "PNDMScheduler", grids.pndm_grid, grids.pndm_grid, remembers=5),
    "lcm": Sampler(
        onestep.lcm, "LCMScheduler", grids.lcm_grid, grids.lcm_grid, custom=("timesteps",)
    ),
    "ddim_stochastic": Sampler(
        onestep.ddim_stochastic,
        "DDIMScheduler",
        grids.stochastic_grid,
        grids.stochastic_grid,
        ours=True,
    ),
    "tcd": Sampler(
        onestep.tcd,
        "TCDScheduler",
        grids.tcd_grid,
        grids.tcd_grid,
        uses_eta=True,
        custom=("timesteps",),
    ),
}
# The sampler that continues in the spirit of the scheduler class a folder names.
DEFAULT_SAMPLER = {name: known.sampler for name, known in SCHEDULER_CLASSES.items()}
DPM_SOLVERS = {
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
}
# Switches that make another grid: a sampler whose class has no such switch must not ignore it.
GRID_SWITCHES = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "sigma_min",
    "sigma_max",
    "final_sigmas_type",
    "interpolation_type",
    "timestep_type",
    "lambda_min_clipped",
)


def get_sampler(name: str) -> Sampler:
    """Looks a sampler up; JaxsdError names the ones there are."""
    if name not in SAMPLERS:
        raise JaxsdError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def default_sampler(schedule: Schedule) -> str:
    """The sampler of the scheduler that a folder ships; JaxsdError if it is not among ours."""
    if schedule.class_name != "DPMSolverMultistepScheduler":
        return DEFAULT_SAMPLER[schedule.class_name]
    kind = schedule.algorithm_type, schedule.solver_order
    if kind not in DPM_SOLVERS:
        raise JaxsdError(f"no sampler for solver_order={kind[1]} of {schedule.class_name}: 2 or 3")
    return DPM_SOLVERS[kind]


def make_steps(
    schedule: Schedule,
    sampler: str,
    count: int,
    *,
    timesteps: Sequence[float | int] | None = None,
    sigmas: Sequence[float | int] | None = None,
    strength: float = 1.0,
) -> Steps:
    """The grid of `count` steps; pndm has a row for each evaluation, which are more.

    timesteps, sigmas (sigma / alpha, one more than steps): in place of `count`, falling, for the
    samplers whose scheduler in diffusers takes them. strength: how much of the way from noise an
    image-to-image run goes; sets `first`, but lcm and tcd make `count` steps of that part, as
    diffusers' pipeline for LCM does. JaxsdError for what the schedule or the sampler cannot do.
    """
    chosen = get_sampler(sampler)
    _refuse_switches(schedule, sampler, chosen)
    if timesteps is not None or sigmas is not None:
        _refuse_custom(schedule, sampler, chosen, timesteps, sigmas)
        count = len(sigmas) - 1 if sigmas is not None else len(timesteps or ())
    if not 0 < strength <= 1:
        raise JaxsdError(f"strength must be above 0 and at most 1, not {strength:g}")
    ask = Ask(count, timesteps, sigmas, strength)
    steps = (chosen.continuous if schedule.continuous else chosen.grid)(schedule, ask)
    if chosen.second:
        steps = chosen.second(schedule, steps)
        # From pure noise r falls from infinity, and a second slope would be weighted by it.
        mid_sigma = np.where(steps.alpha < 1e-6, 0, steps.mid_sigma)
        steps = steps._replace(mid_sigma=mid_sigma)  # pyright: ignore
    if chosen.orders:
        steps = steps._replace(order=chosen.orders(schedule, len(steps.t)))  # pyright: ignore
    if sampler not in ("lcm", "tcd"):
        skipped = count - min(int(count * strength), count)
        if skipped == count:
            raise JaxsdError(f"strength {strength:g} of {count} steps is less than one step")
        steps = steps._replace(first=np.int32(skipped))  # pyright: ignore
    return padded(steps)


def evaluations(sampler: str, steps: Steps) -> int:
    """How often a run through the grid asks the network.

    Once for each row, and again where a sampler that looks twice has noise left to look at.
    """
    rows = slice(int(steps.first), int(steps.count))
    twice = get_sampler(sampler).second is not None
    return len(steps.t[rows]) + (int((steps.mid_sigma[rows] > 0).sum()) if twice else 0)


def _refuse_switches(schedule: Schedule, name: str, sampler: Sampler) -> None:
    known = () if schedule.continuous else SCHEDULER_CLASSES[sampler.scheduler].defaults
    usual = {field.name: field.default for field in dataclasses.fields(Schedule)}
    for switch in GRID_SWITCHES:
        value = getattr(schedule, switch)
        if switch not in known and value is not None and value != usual[switch]:
            on = "a continuous schedule" if schedule.continuous else f"the sampler {name}"
            raise JaxsdError(f"{on} cannot do {switch}={value!r}; set it to {usual[switch]!r}")


def _refuse_custom(schedule, name: str, sampler: Sampler, timesteps, sigmas) -> None:
    kind, values = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
    if timesteps is not None and sigmas is not None:
        raise JaxsdError("give timesteps or sigmas, not both")
    if kind not in sampler.custom:
        able = [other for other, row in SAMPLERS.items() if kind in row.custom]
        raise JaxsdError(f"the sampler {name} takes no {kind} of yours; {', '.join(able)} do")
    if schedule.continuous:
        raise JaxsdError(f"a continuous schedule takes no {kind} of yours")
    if schedule.sigma_switches and kind == "timesteps":
        raise JaxsdError(f"timesteps of yours cannot go with {schedule.sigma_switches[0]}")
    if not 1 <= len(values) - (kind == "sigmas") <= MAX_STEPS:
        raise JaxsdError(f"{len(values)} {kind} are not from 1 to {MAX_STEPS} steps")
    most = schedule.num_train_timesteps - 1 if kind == "timesteps" else np.inf
    array = np.asarray(values, np.float64)
    if not (np.all(np.diff(array) < 0) and array[-1] >= 0 and array[0] <= most):
        limit = f" from {most} on" if kind == "timesteps" else ""
        raise JaxsdError(f"{kind} must fall{limit}, and not below 0")


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
    after: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, History]:
    """Steps start ... stop - 1 of the loop, inside `jax.jit`; start and stop are traced.

    x: latents [b, h, w, c], float32. history: as the last call returned it, zeros at first. keys: a
    PRNG key for each image. One program thus serves the whole loop, and any part of it for a caller
    who wants to look at the latents in between. `after(x, i)` may change the latents after step i,
    to blend in what inpainting keeps.
    """
    body = make_body(sampler, schedule, denoise, keys, steps, eta, after)
    return jax.lax.fori_loop(start, stop, body, (x, history))


def make_body(
    sampler: Sampler,
    schedule: Schedule,
    denoise: Denoise,
    keys: jax.Array,
    steps: Steps,
    eta: jax.Array,
    after: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[[jax.Array, tuple[jax.Array, History]], tuple[jax.Array, History]]:
    """Step i of the loop of `run`, which has the arguments: (i, (x, history)) -> (x, history)."""
    predict = Predict(schedule, denoise)

    def body(i, carry):
        x = carry[0]

        def noise(k: int) -> jax.Array:
            def one(key):
                key = jax.random.fold_in(jax.random.fold_in(key, i + 1), k)
                return jax.random.normal(key, x.shape[1:], x.dtype)

            return jax.vmap(one)(keys)

        x_after, history = sampler.step(predict, *carry, steps, i, noise, eta)
        return (after(x_after, i) if after else x_after), history

    return body


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The N(0, 1) that sampling starts from, each image's from its own key: [b, *shape]."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape, jnp.float32))(
        keys
    )
