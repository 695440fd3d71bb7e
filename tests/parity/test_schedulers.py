"""Samplers against diffusers' schedulers: the same timesteps, and every step the same, float32.

diffusers' Euler works on y = z / alpha, the others on z, as we do.
"""

import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import nchw, nhwc, relative_error

from jaxsd import weights
from jaxsd.diffusion import samplers
from jaxsd.diffusion.samplers import SAMPLERS, make_steps
from jaxsd.diffusion.schedule import PREDICTION_TYPES, Schedule
from jaxsd.families import FAMILIES

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-5  # of one step, from the same latents
LOOP_TOLERANCE = 1e-4  # of a whole loop, in which rounding is carried on and magnified

SPACINGS = ("leading", "trailing", "linspace")
COUNTS = (1, 2, 10, 30)
SD = FAMILIES["sd1"].schedule
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
START = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


def network(z: np.ndarray, t: float) -> np.ndarray:
    """Something not linear in z, bounded, and of another kind at every t."""
    return np.tanh(0.7 * z + np.sin(0.01 * t) + 0.3 * np.roll(z, 1, axis=1)).astype(np.float32)


def fresh(i: int) -> np.ndarray:
    return np.random.default_rng(100 + i).normal(size=START.shape).astype(np.float32)


def reference(name: str, schedule: Schedule, count: int):
    config = schedule.to_json()
    for ours in ("_class_name", "clip_sample", "clip_sample_range", "set_alpha_to_one"):
        if ours not in CLASSES[name]._get_init_keys(CLASSES[name]):
            config.pop(ours)
    scheduler = CLASSES[name](**config)
    scheduler.set_timesteps(count)
    return scheduler


class Reference:
    """A scheduler of diffusers in our coordinates: z [b, h, w, c], NumPy."""

    def __init__(self, name: str, schedule: Schedule, count: int, eta: float, monkeypatch):
        self.scheduler = reference(name, schedule, count)
        self.name, self.eta, self.i = name, eta, 0
        # DDPMScheduler takes no noise from its caller.
        noise = lambda *args, **kwargs: nchw(fresh(self.i))  # noqa: E731
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)

    def alpha(self, i: int) -> float:
        """1 / sqrt(1 + sigma^2) for Euler, whose samples are z / alpha."""
        if self.name != "euler":
            return 1.0
        return float((1 + self.scheduler.sigmas[i].double() ** 2) ** -0.5)

    def step(self, z: np.ndarray, said: np.ndarray) -> np.ndarray:
        t = self.scheduler.timesteps[self.i]
        y = nchw(z) / self.alpha(self.i)
        self.scheduler.scale_model_input(y, t)  # Euler finds its place, and warns without
        options = {}
        if self.name == "ddim":
            options = {"eta": self.eta, "variance_noise": nchw(fresh(self.i)) if self.eta else None}
        y = self.scheduler.step(nchw(said), t, y, **options).prev_sample
        self.i += 1
        return nhwc(y) * np.float32(self.alpha(self.i))


@functools.partial(jax.jit, static_argnames=("name", "schedule"))
def our_step(name, schedule, said, z, history, steps, i, noise, eta):
    """One step of `samplers.run` with a prediction, and a noise, that are given."""
    sampler = dataclasses.replace(SAMPLERS[name], step=with_noise(SAMPLERS[name].step, noise))
    keys = jax.random.split(jax.random.key(0), z.shape[0])
    denoise = lambda x, t: said  # noqa: E731
    return samplers.run(sampler, schedule, denoise, z, history, keys, steps, i, i + 1, eta)


def with_noise(step, noise):
    def with_given(predict, x, history, steps, i, _, eta):
        return step(predict, x, history, steps, i, lambda k: noise, eta)

    return with_given


def compare(name: str, schedule: Schedule, count: int, eta: float, monkeypatch):
    """The greatest relative errors of one step, and at the end of the whole loop."""
    # The spacing is in `steps`: with one name for all there is one program for all.
    compiled = dataclasses.replace(schedule, timestep_spacing="leading")
    steps = make_steps(schedule, name, count)
    theirs = Reference(name, schedule, count, eta, monkeypatch)
    free = Reference(name, schedule, count, eta, monkeypatch)
    history = loop_history = tuple(jnp.zeros(START.shape) for _ in range(SAMPLERS[name].remembers))
    z = loop = expected = START
    worst = 0.0
    for i in range(count):
        t, noise = float(steps.t[i]), fresh(i)
        ours = functools.partial(our_step, name, compiled, steps=steps, i=jnp.int32(i), noise=noise)
        said = network(expected, t)
        after, history = ours(said=said, z=expected, history=history, eta=jnp.float32(eta))
        expected = theirs.step(expected, said)
        worst = max(worst, relative_error(after, expected))
        loop, loop_history = ours(
            said=network(np.asarray(loop), t), z=loop, history=loop_history, eta=jnp.float32(eta)
        )
        z = free.step(z, network(z, t))
    return worst, relative_error(loop, z)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "name, eta",
    [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", 0.0), ("euler", 0.0), ("dpmpp_2m", 0.0)],
)
def test_every_step(name, eta, spacing, kind, monkeypatch, record_property):
    if name == "euler" and kind == "sample":
        pytest.skip("EulerDiscreteScheduler has no such prediction type")
    schedule = dataclasses.replace(SD, prediction_type=kind, timestep_spacing=spacing)
    errors = {count: compare(name, schedule, count, eta, monkeypatch) for count in COUNTS}
    print(name, eta, spacing, kind, errors)
    record_property("relative_errors", str(errors))
    assert max(step for step, _ in errors.values()) <= TOLERANCE
    assert max(loop for _, loop in errors.values()) <= LOOP_TOLERANCE


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_with_clipping(name, eta, monkeypatch):
    schedule = Schedule(clip_sample=True, clip_sample_range=0.8)
    for count in COUNTS:
        step, loop = compare(name, schedule, count, eta, monkeypatch)
        assert step <= TOLERANCE and loop <= LOOP_TOLERANCE


# --- Tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [1000, 1100, 37])
def test_noise_levels_are_the_same_to_the_last_bit(kind, count):
    options = {"beta_schedule": kind, "num_train_timesteps": count}
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
    np.testing.assert_array_equal(Schedule(**options).alphas_cumprod, theirs)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps(name, spacing, offset):
    schedule = dataclasses.replace(SD, timestep_spacing=spacing, steps_offset=offset)
    # With 999 steps and more their leading timesteps, offset by 1, leave the table.
    for count in (*range(1, 41), 50, 99, 250, 333, 500, 998):
        steps, theirs = make_steps(schedule, name, count), reference(name, schedule, count)
        np.testing.assert_allclose(steps.t[:count], theirs.timesteps[:count].numpy(), rtol=1e-6)
        if name == "euler":
            z_scale = float(theirs.init_noise_sigma) / (1 + float(theirs.sigmas[0]) ** 2) ** 0.5
            if spacing != "leading":
                np.testing.assert_allclose(steps.init_scale, z_scale, rtol=1e-6)
            else:
                assert steps.init_scale == 1 and abs(z_scale - 1) < 1e-6
        else:
            assert steps.init_scale == theirs.init_noise_sigma == 1


@pytest.mark.parametrize("theirs", [*CLASSES.values(), diffusers.PNDMScheduler])
def test_their_files_open(theirs, tmp_path):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs(**config).save_pretrained(tmp_path)
    values = weights.read_json(tmp_path / "scheduler_config.json")
    schedule = Schedule.from_json(values)
    assert schedule.class_name == theirs.__name__
    for name in ("timestep_spacing", "clip_sample", "set_alpha_to_one", "steps_offset"):
        assert getattr(schedule, name) == values.get(name, getattr(schedule, name))
    again = theirs.from_config(schedule.to_json())
    for name, value in again.config.items():
        if name in values:
            assert value == values[name], name
    assert torch.equal(again.alphas_cumprod, theirs(**config).alphas_cumprod)
