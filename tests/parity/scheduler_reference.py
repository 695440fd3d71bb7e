"""Diffusers' schedulers in our coordinates, with noise that is given, beside our samplers."""

import dataclasses
import functools
import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch_reference import nchw, nhwc, relative_error

from jaxsd.diffusion import samplers
from jaxsd.diffusion.samplers import SAMPLERS, make_steps
from jaxsd.diffusion.schedule import Schedule

ROWS = 62  # evaluations of the longest run
SHAPE = (2, 3, 4, 3)
START = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
NOISE = np.random.default_rng(1).normal(size=(ROWS, *SHAPE)).astype(np.float32)
THEIRS = [name for name, row in SAMPLERS.items() if not row.ours]
CLASSES = {name: getattr(diffusers, SAMPLERS[name].scheduler) for name in THEIRS}
BY_SIGMA = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm2",
    "dpm2_ancestral",
    "lms",
)  # samples z / alpha
TWICE = ("heun", "dpm2", "dpm2_ancestral")  # two evaluations in each step but the last
DRAWING = tuple(
    f"diffusers.schedulers.scheduling_{name}.randn_tensor"
    for name in (
        "ddim",
        "ddpm",
        "euler_ancestral_discrete",
        "k_dpm_2_ancestral_discrete",
        "dpmsolver_multistep",
        "dpmsolver_singlestep",
        "lcm",
        "tcd",
    )
)


def their_network(z: torch.Tensor, t: float) -> torch.Tensor:
    """Something not linear in z, bounded, and of another kind at every t."""
    return torch.tanh(0.7 * z + math.sin(0.002 * t) + 0.3 * torch.roll(z, 1, 2))


def our_network(z, t):
    return jnp.tanh(0.7 * z + jnp.sin(0.002 * t) + 0.3 * jnp.roll(z, 1, 1))


def reference(name: str, schedule: Schedule, count: int | None, **custom):
    """Their scheduler for our sampler, its switches as the schedule says, timesteps set."""
    keys = CLASSES[name]._get_init_keys(CLASSES[name])
    config = {key: v for key, v in dataclasses.asdict(schedule).items() if key in keys}
    if name.startswith(("dpmpp_2m", "dpmpp_3m")):
        config["solver_order"] = int(name[len("dpmpp_")])
        config["algorithm_type"] = "sde-dpmsolver++" if "sde" in name else "dpmsolver++"
    scheduler = made(CLASSES[name], json.dumps(config))
    scheduler.set_timesteps(count, **custom)
    return scheduler


@functools.lru_cache(maxsize=8)
def made(kind, config: str):
    """Made once: some need half a second. Setting the timesteps resets all that they remember."""
    return kind(**json.loads(config))


def trajectory(
    name, schedule, count, monkeypatch, eta=0.0, begin=0, stop=None, z=None, double=False, **custom
):
    """Their latents z before the first step and after each, from `begin` on: [n + 1, b, h, w, c].

    Without `z` to begin with, a picture and noise are mixed as theirs for image-to-image.
    `double`: from their float32 tables, but in double precision.
    """
    scheduler = reference(name, schedule, count, **custom)
    evaluations = 2 if name in TWICE else 1
    row = begin

    for draw in DRAWING:
        monkeypatch.setattr(draw, lambda *args, **kwargs: nchw(NOISE[row]))

    def alpha(i: int) -> float:
        if name not in BY_SIGMA:
            return 1.0
        return float((1 + scheduler.sigmas[evaluations * i].double() ** 2) ** -0.5)

    # What is left to them, they take the second of equal timesteps for the first.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin * evaluations)
    first = scheduler.timesteps[begin * evaluations]
    if z is None:
        y = scheduler.add_noise(nchw(START), nchw(NOISE[-1]), first[None])
    else:
        y = nchw(z) / alpha(begin)
    if double:
        y, scheduler.sigmas = y.double(), scheduler.sigmas.double()
        monkeypatch.setattr(torch, "float32", torch.float64)  # what they would turn latents to
    options = {"eta": eta} if name in ("ddim", "tcd") else {}
    passed = [nhwc(y) * alpha(begin)]
    place = begin * evaluations
    while place < len(scheduler.timesteps) and row != stop:
        for _ in range(min(evaluations, len(scheduler.timesteps) - place)):
            t = scheduler.timesteps[place]
            said = their_network(scheduler.scale_model_input(y, t), float(t))
            y = scheduler.step(said, t, y, **options).prev_sample
            place += 1
        row += 1
        end = alpha(row) if place < len(scheduler.timesteps) else _end_alpha(name, scheduler)
        passed.append(nhwc(y) * end)
    return np.stack(passed).astype(np.float32)


def _end_alpha(name: str, scheduler) -> float:
    if name not in BY_SIGMA:
        return 1.0
    place = len(scheduler.timesteps)
    return float((1 + scheduler.sigmas[place].double() ** 2) ** -0.5)


@functools.partial(jax.jit, static_argnames=("name", "schedule"))
def ours(name, schedule, passed, noise, steps, eta):
    """Each step from their latents, and the whole run from their first."""
    row = SAMPLERS[name]

    def step(predict, x, history, steps, i, _, eta):
        return row.step(predict, x, history, steps, i, lambda k: noise[i], eta)

    sampler = dataclasses.replace(row, step=step)
    keys = jax.random.split(jax.random.key(0), SHAPE[0])
    start = tuple(jnp.zeros(SHAPE) for _ in range(row.remembers))
    run = functools.partial(samplers.run, sampler, schedule, our_network)

    def one(history, i):
        x, history = run(passed[i], history, keys, steps, i, i + 1, eta)
        return history, x

    _, each = jax.lax.scan(one, start, jnp.arange(ROWS, dtype=jnp.int32))
    whole, _ = run(passed[steps.first], start, keys, steps, steps.first, steps.count, eta)
    return each, whole


def compare(
    name,
    schedule,
    count,
    monkeypatch,
    eta=0.0,
    begin=0,
    stop=None,
    z=START,
    double=False,
    **custom,
):
    """The greatest relative errors of one step, and at the end of the whole run."""
    with monkeypatch.context() as patch:
        theirs = trajectory(name, schedule, count, patch, eta, begin, stop, z, double, **custom)
    steps = make_steps(schedule, name, count or 0, **custom)
    steps = steps._replace(first=np.int32(begin))
    last = begin + len(theirs) - 1
    assert stop or steps.count == last
    steps = steps._replace(count=np.int32(last))
    if z is None:  # they begin with a noised picture: so do we
        alpha, sigma = steps.alpha[begin], steps.sigma[begin]
        theirs[0] = alpha * START + sigma * NOISE[-1]
    passed = np.zeros((ROWS, *SHAPE), np.float32)
    passed[begin:last] = theirs[:-1]
    run = ours(name, schedule.for_run(), passed, NOISE, steps, jnp.float32(eta))
    each, whole = map(np.asarray, run)
    errors = [relative_error(each[begin + i], z) for i, z in enumerate(theirs[1:])]
    return np.max(errors), relative_error(whole, theirs[-1])
