"""Samplers against the constants that diffusers' own tests publish."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import LINEAR, PICTURE, no_noise, run, standin, zero

from jaxsd.diffusion import grids, onestep
from jaxsd.diffusion.samplers import SAMPLERS, make_steps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.diffusion.steps import Predict
from jaxsd.families import FAMILIES


@pytest.mark.parametrize(
    "options, total",
    [
        ({}, 172.0067),
        ({"prediction_type": "v_prediction"}, 52.5302),
        ({"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295),
        ({"set_alpha_to_one": False, "beta_start": 0.01}, 149.0784),
    ],
)
def test_ddim_constants(options, total):
    schedule = dataclasses.replace(LINEAR, **options)
    # The noise levels are in the steps: one program for each prediction type.
    compiled = dataclasses.replace(LINEAR, prediction_type=schedule.prediction_type)
    end = run("ddim", compiled, standin, PICTURE, make_steps(schedule, "ddim", 10))
    assert abs(float(jnp.abs(end).sum()) - total) < 1e-2


@pytest.mark.parametrize("t, ahead, variance", [(420, 400, 0.14771), (980, 960, 0.32460)])
def test_ddim_variances(t, ahead, variance):
    """With a black picture and no noise left in it, a step with eta = 1 is its fresh noise."""
    steps = make_steps(LINEAR, "ddim", 50)
    i = int(np.flatnonzero(steps.t == t)[0])
    assert steps.t[i + 1] == ahead
    nothing = jnp.zeros((1, 1, 1, 1))
    fresh, _ = onestep.ddim(
        Predict(dataclasses.replace(LINEAR, clip_sample=False), zero),
        nothing,
        (),
        steps,
        jnp.int32(i),
        lambda k: nothing + 1,
        jnp.float32(1),
    )
    assert abs(float(fresh[0, 0, 0, 0]) ** 2 - variance) < 1e-5


class Slip(Predict):
    """The slip in the tests that the constants of Euler, Heun and LMS come from.

    Their loops hand the *scaled* sample, y / sqrt(1 + sigma^2), to step(), which wants y itself:
    what the network sees at the first look is our z / alpha.
    """

    def slope(self, x, t, alpha, sigma):
        first_look = jnp.asarray(t == self.denoise(x, t))
        eps = standin(jnp.where(first_look, x / alpha, x), t)
        return (x - sigma * eps) / alpha, eps


@pytest.mark.parametrize("name, total", [("euler", 10.0807), ("heun", 0.1233), ("lms", 1006.388)])
def test_constants_of_a_slip(name, total):
    schedule = dataclasses.replace(
        LINEAR, num_train_timesteps=1100, timestep_spacing="linspace", clip_sample=False
    )
    steps = make_steps(schedule, name, 10)
    y = PICTURE * (steps.sigma[0] / steps.alpha[0])
    history = (jnp.zeros_like(y),) * SAMPLERS[name].remembers
    for i in jnp.arange(10):
        y, history = _slipped(name, y, history, steps, i)
    assert abs(float(jnp.abs(y).sum()) - total) < 1e-2


@functools.partial(jax.jit, static_argnames="name")
def _slipped(name, y, history, steps, i):
    s = steps.at(i)
    z = s.alpha * (s.alpha * y)
    predict = Slip(LINEAR, lambda x, t: s.t)  # by which it knows the first look
    z, history = SAMPLERS[name].step(predict, z, history, steps, i, no_noise, 0.0)
    return z / s.next_alpha, history


@pytest.mark.parametrize("name, mean", [("dpmpp_2m", 0.3301), ("unipc", 0.2464)])
def test_solver_constants(name, mean):
    schedule = dataclasses.replace(
        LINEAR,
        timestep_spacing="linspace",
        clip_sample=False,
        final_sigmas_type="sigma_min",
        lower_order_final=name == "unipc",
    )
    end = run(name, schedule, standin, PICTURE, make_steps(schedule, name, 10))
    assert abs(float(jnp.abs(end).mean()) - mean) < 1e-3


@pytest.mark.parametrize("kind, total", [("epsilon", 198.1318), ("v_prediction", 67.3986)])
def test_pndm_constants(kind, total):
    schedule = Schedule.from_json({"_class_name": "PNDMScheduler", "prediction_type": kind})
    assert not schedule.skip_prk_steps
    end = run("pndm", schedule, standin, PICTURE, 10)
    assert abs(float(jnp.abs(end).sum()) - total) < 1e-2


def test_lcm_constant():
    end = run("lcm", Schedule.from_json({"_class_name": "LCMScheduler"}), standin, PICTURE, 1)
    assert abs(float(jnp.abs(end).sum()) - 18.7097) < 1e-2


def test_lms_grid():
    """Stable Diffusion's first noise levels for LMS with 70 steps."""
    schedule = dataclasses.replace(FAMILIES["sd1"].schedule, timestep_spacing="linspace")
    steps = make_steps(schedule, "lms", 70)
    np.testing.assert_allclose(steps.t[:3], [999, 984.5217, 970.0435], rtol=1e-6)
    ratios = steps.sigma[:3] / steps.alpha[:3]
    np.testing.assert_allclose(ratios, [14.6146, 13.3974, 12.3033], atol=1e-4)


def test_karras_levels():
    """EDM's 18 (Karras et al. 2022)."""
    karras = dataclasses.replace(LINEAR, use_karras_sigmas=True)
    levels = grids.respaced(karras, 80.0, 0.002, 18)
    np.testing.assert_allclose(levels[:4], [80, 57.586, 40.7856, 28.3746], rtol=1e-5)
    np.testing.assert_allclose(levels[-1], 0.002)
