"""The adversarial term of the last stages: who learns from what, and what leaves the training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxsd.diffusion import jumps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.objectives import Now
from jaxsd.objectives.adversarial import PREFIX, Critic
from jaxsd.objectives.distillation import Teacher
from jaxsd.objectives.progressive import Progressive

COSINE = Schedule(beta_schedule="cosine", prediction_type="v_prediction")
NOW = Now(jax.random.key(3))


@pytest.fixture(scope="module")
def stage():
    """The last stage of a student in pixels, without the term and with it, and a batch."""
    base = tiny.ddpm(schedule=jumps.student_schedule(COSINE))
    base.initial = tiny.parameters(base.net)
    teacher = Teacher(base.net, base.initial, base.schedule)
    plain = Progressive(base, teacher, 1)
    batch = jax.tree.map(jnp.asarray, tiny.ddpm_batch(4))
    return plain, dataclasses.replace(plain, adversarial_weight=0.25), batch


@pytest.fixture(scope="module")
def gradients(stage):
    """Of both losses by all parameters, and what was logged."""
    plain, fooling, batch = stage
    params = fooling.init(jax.random.key(0))

    def of(student):
        gradient = jax.jit(jax.value_and_grad(student.loss, has_aux=True))
        (loss, told), grads = gradient(params, student.aux, batch, NOW)
        return loss, told, grads

    return of(plain), of(fooling)


def test_each_learns_from_its_own_loss_alone(stage, gradients):
    plain, fooling, batch = stage
    (error, _, by_error), (loss, told, both) = gradients
    own = [name for name in both if name.startswith(PREFIX)]
    assert own and all(np.abs(both[name]).max() > 0 for name in own)
    assert not any(np.asarray(by_error[name]).any() for name in own)
    np.testing.assert_allclose(told["error"], error, rtol=1e-6)
    parts = error + 0.25 * told["adversarial"] + told["discriminator"]
    np.testing.assert_allclose(loss, parts, rtol=1e-6)

    # The student's share grows with the weight, the discriminator's does not
    harder = dataclasses.replace(fooling, adversarial_weight=0.5)
    params = fooling.init(jax.random.key(0))
    grads = jax.jit(jax.grad(lambda p, aux: harder.loss(p, aux, batch, NOW)[0]))(params, harder.aux)
    for name, value in grads.items():
        if name in own:
            np.testing.assert_allclose(value, both[name], rtol=1e-5, atol=1e-8)
        else:
            pull, push = by_error[name], both[name] - by_error[name]
            np.testing.assert_allclose(value, pull + 2 * push, rtol=1e-4, atol=1e-6)


def test_the_discriminator_learns_to_tell_and_the_student_to_be_taken_for_its_teacher(stage):
    """On two ends that differ: a descent of either lowers its own loss."""
    plain, fooling, batch = stage
    critic, teacher = Critic(fooling.teacher, 1.0), fooling.teacher
    rungs = jumps.ladder(fooling.schedule, 1)
    start, end = (rungs.at(jnp.full(4, i)) for i in (0, 1))
    key = jax.random.key(1)
    z, real, made = (jax.random.normal(k, (4, 8, 8, 1)) for k in jax.random.split(key, 3))
    made = 0.5 * made + 1
    told = fooling.example({}, fooling.aux, batch, key).cond

    def loss(params, made):
        return critic.loss(params, teacher.params, (z, start, end), (real, made), told, None)

    @jax.jit
    def apart(params, rate):
        by = jax.grad(lambda params: loss(params, made)[0])(params)
        return {name: value - rate * jnp.sign(by[name]) for name, value in params.items()}

    params = critic.init(jax.random.key(2))
    for rate in np.linspace(3e-3, 0, 100, dtype=np.float32):
        params = apart(params, rate)
    found = loss(params, made)[1]
    assert found["logits_real"] > found["logits_fake"] + 1 and found["discriminator"] < np.log(2)

    nearer = jax.jit(jax.grad(lambda made: loss(params, made)[0]))
    before, moved = found["adversarial"], made
    for _ in range(30):
        moved = moved - 3.0 * nearer(moved)
    assert loss(params, moved)[1]["adversarial"] < 0.8 * before


def test_the_student_that_leaves_is_an_ordinary_model(stage):
    _, fooling, _ = stage
    params = fooling.init(jax.random.key(0))
    assert fooling.pipeline(params).params["unet"].keys() == fooling.net.shapes.keys()
    assert params.keys() - fooling.net.shapes.keys() == {
        PREFIX + name for name in Critic(fooling.teacher, 1.0).net.shapes
    }
