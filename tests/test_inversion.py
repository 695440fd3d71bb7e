"""From pictures to noise and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxsd.components import Component
from jaxsd.diffusion import jumps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.editing.inversion import invert
from jaxsd.nn import Net
from jaxsd.objectives import Now
from jaxsd.objectives.distillation import Teacher
from jaxsd.objectives.progressive import Progressive
from jaxsd.pipeline import Pipeline

COSINE = jumps.student_schedule(Schedule(beta_schedule="cosine", prediction_type="v_prediction"))


@pytest.fixture(scope="module")
def made():
    base = tiny.ddpm(schedule=COSINE)
    params = tiny.parameters(base.net)
    # Mild, as a trained network is: else fifty steps lead far from a path
    params |= {name: 0.1 * params[name] for name in ("conv_out.weight", "conv_out.bias")}
    pictures = [np.uint8(127.5 * (p + 1)) for p in tiny.pictures(2, 1)]
    return base, params, Pipeline(Component(base.net, params), COSINE), pictures


def test_a_picture_comes_back_the_nearer_the_more_steps(made):
    _, _, pipe, pictures = made
    errors = []
    for steps in (4, 16, 64):
        noise = invert(pipe, pictures, "7", steps)
        cond = pipe.encode(["7"] * 2)
        back = pipe.denoise(noise, cond, None, steps=steps, sampler="ddim")
        given = np.stack(pictures) / np.float32(127.5) - 1
        errors.append(float(np.abs(np.asarray(back) - given).max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.05


def test_one_prediction_is_the_sampler_s(made):
    """Of the first step of DDIM, with guidance and without."""
    _, _, pipe, _ = made
    x, cond, uncond = pipe.noise([0, 1]), pipe.encode(["7", "3"]), pipe.encode(["", ""])
    for scale in (1.0, 3.0):
        said = pipe.predict(x, 1000.0, cond, uncond, scale)
        drawn = pipe.denoise(x, cond, uncond, steps=1, guidance_scale=scale, sampler="ddim")
        np.testing.assert_allclose(-said, drawn, atol=1e-5)  # x = alpha z - sigma v, alpha = 0


def test_an_encoder_is_taught_what_inversion_does(made):
    """In one step: two of the teacher's from the picture to noise."""
    base, params, pipe, pictures = made

    class Silent(Net):
        def __init__(self):
            self.config = base.net.config

        def __call__(self, params, z, t, dropout_key=None, **told):
            return jnp.zeros_like(z)

    quiet = dataclasses.replace(base)
    quiet.net = Silent()
    teacher = Teacher(base.net, params, COSINE)
    student = Progressive(quiet, teacher, 1, weighting="snr+1", encoder=True)
    x0 = jnp.stack([jnp.asarray(p, jnp.float32) / 127.5 - 1 for p in pictures])
    batch = {"image": x0, "label": jnp.full(2, 7)}
    loss, _ = student.loss(params, student.aux, batch, Now(jax.random.key(0)))
    # v = (cos d z - z'') / sin d with d = -pi / 2 is z''
    np.testing.assert_allclose(loss, jnp.square(invert(pipe, pictures, "7", 2)).mean(), rtol=1e-5)
