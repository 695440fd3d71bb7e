"""Samplers against answers known in closed form and against published constants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd.diffusion import samplers
from jaxsd.diffusion.samplers import SAMPLERS, make_steps
from jaxsd.diffusion.schedule import Schedule, Steps
from jaxsd.errors import JaxsdError

LINEAR = Schedule()  # 1e-4 -> .02, eps, clipped: the schedule of diffusers' own tests
COSINE = Schedule(beta_schedule="cosine", prediction_type="v_prediction", clip_sample=False)
NO_KEYS = jax.random.split(jax.random.key(0), 4)


@functools.partial(jax.jit, static_argnames=("name", "schedule", "network"))
def part(name, schedule, network, x, history, keys, steps, start, stop, eta):
    return samplers.run(
        SAMPLERS[name], schedule, network, x, history, keys, steps, start, stop, eta
    )


def run(name, schedule, network, x, steps, keys=NO_KEYS, eta=0.0):
    """The whole loop, compiled once for each sampler, schedule and network."""
    if isinstance(steps, int):
        steps = make_steps(schedule, name, steps)
    history = tuple(jnp.zeros_like(x) for _ in range(SAMPLERS[name].remembers))
    start, stop = jnp.int32(0), jnp.asarray(steps.count)
    return part(name, schedule, network, x, history, keys, steps, start, stop, jnp.float32(eta))[0]


# --- Gaussian data: the best network and the exact answer are known ----------------------------


def zero(x, t):
    return jnp.zeros_like(x)


@pytest.mark.parametrize(
    "count, factor",
    [(1, 0), (2, 0.5), (4, 0.72855), (8, 0.85623), (64, 0.980906), (256, 0.995192)],
)
def test_ddim_on_unit_gaussian_data(count, factor):
    """The optimal v is 0, so that each step multiplies by cos(pi / 2N)."""
    z = jax.random.normal(jax.random.key(1), (4, 2, 2, 1))
    x = run("ddim", COSINE, zero, z, count)
    np.testing.assert_allclose(x, np.cos(np.pi / 2 / count) ** count * z, atol=1e-5)
    assert abs(np.cos(np.pi / 2 / count) ** count - factor) < 1e-5


SPREAD = 0.5  # the data's standard deviation


def best_v(x, t):
    """v of the posterior mean x0 = alpha s^2 z / (alpha^2 s^2 + sigma^2)."""
    alpha, sigma = (a[:, None, None, None] for a in COSINE.alpha_sigma(jnp.broadcast_to(t, (4,))))
    return alpha * sigma * (1 - SPREAD**2) / ((alpha * SPREAD) ** 2 + sigma**2) * x


def even_steps(count: int) -> Steps:
    """A grid of equal steps in log(alpha / sigma), from 2 to -2: no first or last step is odd."""
    log_snr = np.linspace(-2, 2, count + 1)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * log_snr)), 1 / np.sqrt(1 + np.exp(2 * log_snr))
    t = np.arctan2(sigma, alpha) * 2 / np.pi * 1000
    return samplers._steps(t[:-1], (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]))


def exact_factor(steps: Steps) -> float:
    """What the probability-flow ODE multiplies z by: it scales z to the marginal's width."""
    last = int(steps.count) - 1
    first = np.square(steps.alpha[0] * SPREAD) + np.square(steps.sigma[0])
    end = np.square(steps.next_alpha[last] * SPREAD) + np.square(steps.next_sigma[last])
    return float(np.sqrt(end / first))


def ode_error(name: str, steps: Steps) -> float:
    end = run(name, COSINE, best_v, jnp.ones((4, 1, 1, 1)), steps)
    return abs(float(end[0, 0, 0, 0]) - exact_factor(steps))


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    errors = [ode_error(name, even_steps(count)) for count in (16, 32, 64)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    print(name, errors, orders)
    assert abs(orders[-1] - order) < 0.2


# From pure noise to a clean picture, infinitely far in log SNR, the second order is one only up to
# a logarithm: dpmpp_2m is merely asked for a smaller error.
@pytest.mark.parametrize("name, most", [("ddim", 0.01), ("euler", 0.01), ("dpmpp_2m", 0.0005)])
def test_the_whole_way_converges(name, most):
    assert ode_error(name, make_steps(COSINE, name, 256)) < most


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 1.0)])
def test_renewed_noise_has_the_right_variance(name, eta):
    """Pure noise in, N(0, s^2) out; each picture with noise of its own."""
    keys = jax.random.split(jax.random.key(3), 4)
    x = run(name, COSINE, best_v, samplers.initial_noise(keys, (64, 64, 4)), 200, keys, eta)
    x = np.asarray(x, np.float64)
    # 65536 numbers: sampling errors of .6 % in the variance and .002 in the mean; the rest is the
    # bias of 200 steps.
    np.testing.assert_allclose(x.var(), SPREAD**2, rtol=0.03)
    assert abs(x.mean()) < 0.01
    assert np.abs(np.corrcoef(x.reshape(4, -1)) - np.eye(4)).max() < 0.04


# --- Constants published in diffusers' own tests ----------------------------------------------


def standin(x, t):
    return x * (t / (t + 1))


def no_noise(k):
    raise AssertionError("a deterministic sampler asked for noise")


PICTURE = jnp.asarray(
    np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) / 768
)


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
    fresh, _ = samplers.ddim(
        lambda *_: (nothing, nothing),
        nothing,
        (),
        steps,
        jnp.int32(i),
        lambda k: nothing + 1,
        jnp.float32(1),
    )
    assert abs(float(fresh[0, 0, 0, 0]) ** 2 - variance) < 1e-5


def test_euler_constant():
    """10.0807 comes about by a slip in diffusers' test, repeated here.

    Its loop hands the *scaled* sample, y / sqrt(1 + sigma^2), to step(), which wants y = z / alpha.
    """
    schedule = dataclasses.replace(
        LINEAR, num_train_timesteps=1100, timestep_spacing="linspace", clip_sample=False
    )
    steps = make_steps(schedule, "euler", 10)
    y = PICTURE * (steps.sigma[0] / steps.alpha[0])
    for i in jnp.arange(10):
        s = steps.at(i)
        y = s.alpha * y  # the slip
        eps = standin(y, s.t)
        z = s.alpha * y
        x0 = (z - s.sigma * eps) / s.alpha
        z, _ = samplers.euler(
            lambda *_, x0=x0, eps=eps: (x0, eps), z, (), steps, i, no_noise, jnp.float32(0)
        )
        y = z / s.next_alpha
    assert abs(float(jnp.abs(y).sum()) - 10.0807) < 1e-2


def test_dpmpp_2m_constant():
    """.3301 is for a grid that stops at the schedule's first noise level, not at none."""
    schedule = dataclasses.replace(LINEAR, timestep_spacing="linspace", clip_sample=False)
    steps = make_steps(schedule, "dpmpp_2m", 10)
    least = schedule.alphas_cumprod[0]
    steps.next_alpha[9], steps.next_sigma[9] = np.sqrt(least), np.sqrt(1 - least)
    end = run("dpmpp_2m", schedule, standin, PICTURE, steps)
    assert abs(float(jnp.abs(end).mean()) - 0.3301) < 1e-3


# --- The loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_in_parts_is_the_loop(name):
    keys = jax.random.split(jax.random.key(5), 4)
    schedule = dataclasses.replace(LINEAR, clip_sample=False)
    steps, eta = make_steps(schedule, name, 9), jnp.float32(0.5)
    x = samplers.initial_noise(keys, (2, 2, 1))
    history = tuple(jnp.zeros_like(x) for _ in range(SAMPLERS[name].remembers))
    advance = functools.partial(part, name, schedule, standin)

    whole, remembered = advance(x, history, keys, steps, jnp.int32(0), jnp.int32(9), eta)
    for start, stop in ((0, 1), (1, 4), (4, 4), (4, 9)):
        x, history = advance(x, history, keys, steps, jnp.int32(start), jnp.int32(stop), eta)
    np.testing.assert_array_equal(x, whole)
    for ours, theirs in zip(history, remembered, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_noise_depends_on_the_pictures_key_alone():
    keys = jax.random.split(jax.random.key(6), 4)
    schedule = dataclasses.replace(LINEAR, clip_sample=False)
    together = run("ddpm", schedule, standin, jnp.ones((4, 2, 2, 1)), 5, keys)
    turned = run("ddpm", schedule, standin, jnp.ones((4, 2, 2, 1)), 5, keys[::-1])
    np.testing.assert_array_equal(together, turned[::-1])
    assert len(np.unique(np.asarray(together))) == together.size


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_impossible_numbers_of_steps(schedule, name):
    for count in (0, -3, 1001):
        with pytest.raises(JaxsdError, match=f"not {count}$"):
            make_steps(schedule, name, count)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_go_from_noise_to_picture(name, spacing):
    schedule = dataclasses.replace(LINEAR, timestep_spacing=spacing, steps_offset=1)
    for count in (1, 2, 3, 7, 30, 600, 999, 1000):
        steps = make_steps(schedule, name, count)
        t, alpha, sigma, next_alpha, next_sigma = (row[:count] for row in steps[:5])
        assert steps.count == count
        assert np.all(np.diff(t) < 0) and 0 <= t[-1] and t[0] <= 999
        assert np.all(np.diff(sigma / alpha) < 0)
        assert np.all(next_sigma <= sigma)
        # DDIM counts T // count back, which for some counts just reaches t = 0.
        least = np.sqrt(1 - schedule.alphas_cumprod[0]) if name == "ddim" else 0
        assert next_sigma[-1] == 0 or abs(next_sigma[-1] - least) < 1e-6
        for a, s in ((alpha, sigma), (next_alpha, next_sigma)):
            np.testing.assert_allclose(a * a + s * s, 1, rtol=1e-6)


def test_an_unknown_sampler():
    with pytest.raises(JaxsdError, match="'plms'.*ddim, ddpm, euler, dpmpp_2m"):
        make_steps(LINEAR, "plms", 10)
