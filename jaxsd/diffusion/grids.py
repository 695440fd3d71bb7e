"""Grids: (schedule, what is asked for) -> timesteps and noise levels of each step.

Each follows one scheduler of diffusers to the last quirk; `samplers.make_steps` picks the right
one. Times are those of the network; ratios are sigma / alpha, which diffusers calls sigmas.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxsd.diffusion.schedule import MAX_STEPS, Schedule
from jaxsd.diffusion.steps import Level, Steps, chain, make_grid
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Ask:
    """How many steps, or through which timesteps or sigmas; from which part of the noise on."""

    count: int
    timesteps: Sequence[float | int] | None = None
    sigmas: Sequence[float | int] | None = None
    strength: float = 1.0


Grid = Callable[[Schedule, Ask], Steps]


def levels(schedule: Schedule, t: np.ndarray, last: float = 1.0) -> Level:
    """(alpha, sigma) at times of the schedule; before its first, alpha^2 is `last`."""
    if schedule.continuous:
        angle = np.round(t, 9) * (np.pi / 2 / schedule.num_train_timesteps)
        return np.cos(angle), np.sin(angle)
    bar = schedule.alphas_cumprod.astype(np.float64)
    t = t.astype(int)
    bar = np.where(t >= 0, bar[np.clip(t, 0, len(bar) - 1)], last)
    return np.sqrt(bar), np.sqrt(1 - bar)


def time_of(schedule: Schedule, ratios: np.ndarray) -> np.ndarray:
    """The times at which the noise has these levels: interpolated in log(sigma / alpha).

    The table's logarithms are float32, as in diffusers: where times are cut off to whole ones, the
    rounding decides between 998 and 999.
    """
    ratios = np.maximum(ratios, 1e-10)
    if schedule.continuous:
        return np.arctan(ratios) * (2 / np.pi * schedule.num_train_timesteps)
    table = np.log(schedule.ratios).astype(np.float64)
    return np.interp(np.log(ratios), table, np.arange(len(table), dtype=float))


def _last_alpha(schedule: Schedule) -> float:
    return 1.0 if schedule.set_alpha_to_one else float(schedule.alphas_cumprod[0])


def _times(schedule: Schedule, ask: Ask, **options) -> np.ndarray:
    if ask.timesteps is None:
        return schedule.timesteps(ask.count, **options)
    return np.asarray(ask.timesteps, np.float64)


# --- Samplers that count in timesteps ---------------------------------------------------------


def ddim_grid(schedule: Schedule, ask: Ask) -> Steps:
    """Whole timesteps; each step goes T // count back, and the last to alpha_0 or to 1.

    That a step's end is counted off (and not the next timestep) is diffusers' rule.
    """
    t = _times(schedule, ask)
    ahead = t - schedule.num_train_timesteps // ask.count
    return make_grid(t, levels(schedule, t), levels(schedule, ahead, _last_alpha(schedule)))


def stochastic_grid(schedule: Schedule, ask: Ask) -> Steps:
    """DDIM's; mid_* is where the step after this one ends, the last step's own end."""
    steps = continuous_grid(schedule, ask) if schedule.continuous else ddim_grid(schedule, ask)
    alpha, sigma = (np.append(row[1:], row[-1]) for row in (steps.next_alpha, steps.next_sigma))
    return steps._replace(mid_alpha=alpha, mid_sigma=sigma)  # pyright: ignore


def ddpm_grid(schedule: Schedule, ask: Ask) -> Steps:
    """Whole timesteps; each step ends where the next begins, the last at the clean picture."""
    t = np.append(_times(schedule, ask), -1)
    alpha, sigma = levels(schedule, t)
    return make_grid(t[:-1], (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]))


def pndm_grid(schedule: Schedule, ask: Ask) -> Steps:
    """A row for every evaluation: one more than steps, or nine with a Runge-Kutta start.

    Without that start the second timestep comes twice: it repeats the first step as Heun would,
    from mid_*, one step before it. With it, each of the first three steps has four rows, all of
    which start at its beginning.
    """
    t = schedule.timesteps(ask.count)
    stride = schedule.num_train_timesteps // ask.count
    if schedule.continuous:
        stride = schedule.num_train_timesteps / ask.count
    if schedule.skip_prk_steps:
        rows = np.sort(np.append(t, t[1:2]))[::-1]
        start, end, before = rows, rows - stride, rows + stride
    else:
        if ask.count < 4:
            raise JaxsdError("pndm with skip_prk_steps=False needs at least 4 steps")
        if schedule.continuous:
            raise JaxsdError("pndm on a continuous schedule needs skip_prk_steps=True")
        half = stride // 2
        warm = np.stack([t[:3], t[1:4] + half, t[1:4] + half, t[1:4]], axis=1).ravel()
        rows = np.append(warm, t[3:])
        start = np.append(np.repeat(warm[::4], 4), t[3:])
        end = np.append(warm - half * np.tile([1, 0, 1, 0], 3), t[3:] - stride)
        before = start
    last = _last_alpha(schedule)
    steps = make_grid(rows, levels(schedule, start), levels(schedule, end, last))
    mid_alpha, mid_sigma = levels(schedule, np.minimum(before, schedule.num_train_timesteps))
    return steps._replace(mid_alpha=mid_alpha, mid_sigma=mid_sigma)  # pyright: ignore


def consistency_times(schedule: Schedule, ask: Ask) -> np.ndarray:
    """Of the timesteps that the student was trained on, `count`, equally far apart.

    With `strength` < 1 of the cleanest part of them only: an image-to-image run begins there.
    """
    if ask.timesteps is not None or schedule.continuous:
        return ask.strength * _times(schedule, ask)
    trained = schedule.original_inference_steps
    if not 0 < trained <= schedule.num_train_timesteps:
        raise JaxsdError(
            f"original_inference_steps must be from 1 to {schedule.num_train_timesteps}, "
            f"not {trained}"
        )
    stride = schedule.num_train_timesteps // trained
    t = (np.arange(int(trained * ask.strength), 0, -1) * stride - 1).astype(float)
    schedule.timesteps(ask.count)  # refuses impossible counts
    if ask.count > len(t):
        raise JaxsdError(
            f"steps must be from 1 to {len(t)}, not {ask.count}: that is original_inference_steps "
            f"{trained} x strength {ask.strength:g}"
        )
    return t[np.floor(np.linspace(0, len(t), ask.count, endpoint=False)).astype(int)]


def lcm_grid(schedule: Schedule, ask: Ask) -> Steps:
    """The student's timesteps; each step ends where the next begins, the last at the picture."""
    t = np.append(consistency_times(schedule, ask), -1)
    alpha, sigma = levels(schedule, t if not schedule.continuous else np.maximum(t, 0))
    return make_grid(t[:-1], (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]))


def tcd_grid(schedule: Schedule, ask: Ask) -> Steps:
    """As LCM's, but the last step ends at t = 0; mid_t is the time at which a step ends."""
    t = np.append(consistency_times(schedule, ask), 0)
    alpha, sigma = levels(schedule, t)
    steps = make_grid(t[:-1], (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]))
    return steps._replace(mid_t=t[1:])  # pyright: ignore


def continuous_grid(schedule: Schedule, ask: Ask) -> Steps:
    """Equal steps from t = T to 0, on a schedule defined everywhere."""
    t = np.append(schedule.timesteps(ask.count), 0)
    alpha, sigma = levels(schedule, t)
    return make_grid(t[:-1], (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]))


# --- Samplers that count in sigma / alpha -----------------------------------------------------


def respaced(
    schedule: Schedule, high: float, low: float, count: int, ends: bool = False
) -> np.ndarray:
    """`count` ratios from high to low, as the schedule's switch says.

    Karras et al. 2022, eq. 5, rho = 7; exponential: equal steps of the logarithm, which Lu et al.
    2022 step through as well; beta: quantiles of Beta(.6, .6) (2407.12173). `ends`: whether
    sigma_min and sigma_max take the place of high and low.
    """
    if ends:
        high = high if schedule.sigma_max is None else schedule.sigma_max
        low = low if schedule.sigma_min is None else schedule.sigma_min
    if schedule.use_karras_sigmas:
        return np.linspace(high ** (1 / 7), low ** (1 / 7), count) ** 7
    if schedule.use_beta_sigmas:
        from scipy.special import betaincinv  # half a second, for those who want it

        return low + betaincinv(0.6, 0.6, np.linspace(1, 0, count)) * (high - low)
    return np.exp(np.linspace(np.log(high), np.log(low), count))


def sigma_grid(schedule: Schedule, ask: Ask) -> Steps:
    """Timesteps that may be fractional, sigma / alpha interpolated there, the last step to 0.

    The first latents have the standard deviation sigma_max (in z / alpha), not that of the noised
    data, unless the spacing is "leading": k-diffusion's convention, kept by diffusers.
    """
    ratios, table = np.asarray(ask.sigmas or (), np.float64), schedule.ratios.astype(np.float64)
    if ask.sigmas is not None:
        t = time_of(schedule, ratios[:-1])
    else:
        t = _times(schedule, ask, rounded=False).astype(np.float32).astype(np.float64)
        ratios = np.append(np.interp(t, np.arange(len(table)), table), final_ratio(schedule))
        if schedule.interpolation_type == "log_linear":  # ends at the least noise, never at none
            ratios = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), len(t) + 1))
        if schedule.sigma_switches:
            high, low = ratios[0], ratios[-2]
            if schedule.interpolation_type == "log_linear":
                low = ratios[-1]
            ratios = respaced(schedule, high, low, len(t), ends=True)
            t, ratios = time_of(schedule, ratios), np.append(ratios, final_ratio(schedule))
    if schedule.timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        t = np.log(ratios[: len(t)]) / 4
    steps = chain(t, ratios)
    leading = schedule.timestep_spacing == "leading"
    return steps if leading else steps._replace(init_scale=np.float32(steps.sigma[0]))


def final_ratio(schedule: Schedule) -> float:
    """Where the last step ends: at the picture, or at the least noise of the schedule."""
    return 0.0 if schedule.final_sigmas_type == "zero" else float(schedule.ratios[0])


def rounded_sigma_grid(schedule: Schedule, ask: Ask) -> Steps:
    """As `sigma_grid`, but whole timesteps for Karras' noise levels: KDPM2's."""
    steps = sigma_grid(schedule, ask)
    return steps._replace(t=np.round(steps.t)) if schedule.use_karras_sigmas else steps  # pyright: ignore


def dpm_grid(schedule: Schedule, ask: Ask) -> Steps:
    """Whole timesteps, one more than asked for and the cleanest dropped; the last step to 0.

    Other noise levels run over the whole schedule. Their timesteps are rounded for Karras' and
    Lu's levels, though not if betas are "squaredcos_cap_v2", and else cut off.
    """
    rounded = schedule.beta_schedule != "squaredcos_cap_v2"
    return _dpm_grid(schedule, ask, schedule.timestep_spacing, rounded)


def singlestep_grid(schedule: Schedule, ask: Ask) -> Steps:
    """As `dpm_grid`, with linspace whatever the schedule says: the class knows no other."""
    return _dpm_grid(schedule, ask, "linspace")


def unipc_grid(schedule: Schedule, ask: Ask) -> Steps:
    """As `dpm_grid`, but other noise levels may end at sigma_min, twice if that is the last."""
    return _dpm_grid(schedule, ask, schedule.timestep_spacing, ends=True)


def _dpm_grid(
    schedule: Schedule, ask: Ask, spacing: str, rounded: bool = True, ends: bool = False
) -> Steps:
    table, count, last = schedule.ratios.astype(np.float64), ask.count, final_ratio(schedule)
    usable = len(table) - int((-np.log(table) < schedule.lambda_min_clipped).sum())
    options = {"usable": usable, "spacing": spacing}
    if schedule.sigma_switches:
        schedule.timesteps(count)  # refuses impossible counts
        ratios = respaced(schedule, table[-1], table[0], count, ends)
        t = time_of(schedule, ratios)
        if rounded and (schedule.use_karras_sigmas or schedule.use_lu_lambdas):
            t = np.round(t)
        last = ratios[-1] if ends and last > 0 else last
        return chain(np.trunc(t), np.append(ratios, last))
    if ask.timesteps is not None or spacing == "trailing":
        t = _times(schedule, ask, **options)
    elif count == min(len(table), MAX_STEPS):  # which leaves nothing to drop
        t = schedule.timesteps(count, **options)
    else:
        schedule.timesteps(count)
        t = schedule.timesteps(count + 1, **options)[:-1]
    return chain(t, np.append(np.interp(t, np.arange(len(table)), table), last))


# --- Second points ----------------------------------------------------------------------------


def end_as_middle(schedule: Schedule, steps: Steps) -> Steps:
    """Heun's second look is at the step's end, seen at the next step's timestep."""
    t = np.append(steps.t[1:], 0)
    return steps._replace(mid_t=t, mid_alpha=steps.next_alpha, mid_sigma=steps.next_sigma)  # pyright: ignore


def geometric_middle(schedule: Schedule, steps: Steps) -> Steps:
    """DPM-Solver-2's is half way in log(sigma / alpha)."""
    ratios = np.sqrt(steps.sigma / steps.alpha * steps.next_sigma / steps.next_alpha)
    return _middle(schedule, steps, ratios)


def ancestral_middle(schedule: Schedule, steps: Steps) -> Steps:
    """Half way to the noise r'^2 / r, to which more is then added: that is the step's end, r'."""
    return _middle(schedule, steps, np.asarray(steps.next_sigma / steps.next_alpha))


def _middle(schedule: Schedule, steps: Steps, ratios: np.ndarray) -> Steps:
    alpha = 1 / np.sqrt(1 + ratios * ratios)
    t = time_of(schedule, ratios)
    return steps._replace(mid_t=t, mid_alpha=alpha, mid_sigma=alpha * ratios)  # pyright: ignore


# --- Orders -----------------------------------------------------------------------------------


def multistep_orders(schedule: Schedule, count: int, order: int) -> np.ndarray:
    """DPM-Solver++: lower at the end of few steps, and first where no noise is left."""
    orders = np.full(count, order)
    few = schedule.lower_order_final and count < 15
    if few:
        orders[-2:] = np.minimum(orders[-2:], 2)
    if few or schedule.euler_at_final or schedule.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders


def singlestep_orders(schedule: Schedule, count: int) -> np.ndarray:
    """Groups of 1, 2, ... `solver_order`; the last ones lower, and first where no noise is left."""
    order = schedule.solver_order
    zero = schedule.final_sigmas_type == "zero"
    orders = np.arange(count) % order + 1
    if schedule.lower_order_final or zero or count % order:
        # diffusers' lists: a full last group is cut down, 1 2 3 -> 1 2 1 and 1 2 -> 1 1
        if order > 1 and count % order == 0:
            orders[-1] = 1
        if zero:
            orders[-1] = 1
    return orders


def unipc_orders(schedule: Schedule, count: int) -> np.ndarray:
    """UniPC: no more than the steps that are left; first where no noise is left."""
    orders = np.full(count, schedule.solver_order)
    if schedule.lower_order_final:
        orders = np.minimum(orders, np.arange(count, 0, -1))
    if schedule.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders
