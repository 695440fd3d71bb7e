"""Samplers against answers known in closed form; the loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd.diffusion import grids, onestep, samplers
from jaxsd.diffusion.samplers import SAMPLERS, make_steps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.diffusion.steps import ROWS, Predict, Step, Steps, chain
from jaxsd.errors import JaxsdError

LINEAR = Schedule()  # 1e-4 -> .02, eps, clipped: the schedule of diffusers' own tests
COSINE = Schedule(beta_schedule="cosine", prediction_type="v_prediction", clip_sample=False)
TRAILING = dataclasses.replace(
    LINEAR, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
)
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
    schedule = schedule.for_run()
    history = tuple(jnp.zeros_like(x) for _ in range(SAMPLERS[name].remembers))
    start, stop = jnp.int32(0), jnp.asarray(steps.count)
    return part(name, schedule, network, x, history, keys, steps, start, stop, jnp.float32(eta))[0]


def standin(x, t):
    """A network for those who only count: the one of diffusers' own tests."""
    return x * (t / (t + 1))


def no_noise(k):
    raise AssertionError("a deterministic sampler asked for noise")


PICTURE = jnp.asarray(
    np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) / 768
)


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


def test_one_stochastic_step_is_ddims():
    z = jax.random.normal(jax.random.key(1), (4, 2, 2, 1))
    both = [run(name, COSINE, standin, z, 1) for name in ("ddim", "ddim_stochastic")]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("schedule", [COSINE, TRAILING], ids=["continuous", "discrete"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_stochastic_steps_on_unit_gaussian_data(count, schedule):
    """A step to k is a turn by phi_t - phi_k; fresh noise then fills up to s. The last is DDIM's.

    What a step makes of the latents and of its noise is read off where the other is zero.
    """
    steps = make_steps(schedule, "ddim_stochastic", count)
    predict, one = Predict(schedule, zero), jnp.ones((1, 1, 1, 1))
    ends = np.append(np.asarray(steps.t[:count], np.float64), 0 if schedule.continuous else -1)
    alpha, sigma = grids.levels(schedule, ends)
    angle, variance = np.arctan2(sigma, alpha), 1.0
    for i in range(count):
        latents, noise = (
            float(
                onestep.ddim_stochastic(
                    *(predict, x, (), steps, jnp.int32(i), lambda k, eps=eps: eps, 0.0)
                )[0][0, 0, 0, 0]
            )
            for x, eps in ((one, 0 * one), (0 * one, one))
        )
        s, k = i + 1, min(i + 2, count)
        rho = alpha[s] / alpha[k]
        np.testing.assert_allclose(latents, rho * np.cos(angle[i] - angle[k]), rtol=1e-5)
        np.testing.assert_allclose(noise**2, 1 - rho**2, rtol=1e-5, atol=1e-7)
        variance = latents**2 * variance + noise**2
    assert noise == 0
    keys = jax.random.split(jax.random.key(3), 4)
    x = run(
        "ddim_stochastic", schedule, zero, samplers.initial_noise(keys, (64, 64, 4)), steps, keys
    )
    # 65536 numbers: the variance is known to sqrt(2 / 65536) = .55 %
    np.testing.assert_allclose(np.asarray(x, np.float64).var(), variance, rtol=4 * 0.0055)


SPREAD = 0.5  # the data's standard deviation


def best_v(x, t):
    """v of the posterior mean x0 = alpha s^2 z / (alpha^2 s^2 + sigma^2)."""
    alpha, sigma = (a[:, None, None, None] for a in COSINE.alpha_sigma(jnp.broadcast_to(t, (4,))))
    return alpha * sigma * (1 - SPREAD**2) / ((alpha * SPREAD) ** 2 + sigma**2) * x


def even_steps(name: str, count: int) -> Steps:
    """Equal steps in log(alpha / sigma), from 2 to -2: no first or last step is odd; float64."""
    ratios = np.exp(np.linspace(2, -2, count + 1))
    return with_rows(name, chain(grids.time_of(COSINE, ratios[:-1]), ratios))


def with_rows(name: str, steps: Steps) -> Steps:
    """What `make_steps` adds to a grid, but without its lower orders at the end, and in float64."""
    count = len(steps.t)
    if SAMPLERS[name].second:
        steps = SAMPLERS[name].second(COSINE, steps)
        steps = steps._replace(mid_t=grids.time_of(COSINE, steps.mid_sigma / steps.mid_alpha))
    orders = {
        "dpmpp_2m": 2,
        "dpmpp_3m": 3,
        "unipc": 2,
        "dpmpp_singlestep": np.arange(count) % 3 + 1,
    }
    steps = steps._replace(order=np.broadcast_to(orders.get(name, 4), count).astype(np.int32))
    columns = [np.pad(row, (0, ROWS - count)) for row in steps[: len(Step._fields)]]
    return Steps(*columns, *steps[len(Step._fields) :])


def width(alpha, sigma):
    """The standard deviation of z, by which the probability-flow ODE scales it."""
    return np.sqrt(np.square(alpha * SPREAD) + np.square(sigma))


def exact_factor(steps: Steps, start: int = 0) -> float:
    last = int(steps.count) - 1
    end = width(steps.next_alpha[last], steps.next_sigma[last])
    return float(end / width(steps.alpha[start], steps.sigma[start]))


def ode_error(name: str, steps: Steps) -> float:
    end = run(name, COSINE, best_v, jnp.ones((4, 1, 1, 1)), steps)
    return abs(float(end[0, 0, 0, 0]) - exact_factor(steps))


def exact_history(name: str, steps: Steps, start: int) -> tuple[float, ...]:
    """What the method would remember at `start`, where z = 1, had it gone the exact way."""
    z = [
        width(steps.alpha[i], steps.sigma[i]) / width(steps.alpha[start], steps.sigma[start])
        for i in range(start)
    ][::-1]
    alpha, sigma = steps.alpha[:start][::-1], steps.sigma[:start][::-1]
    x0 = alpha * SPREAD**2 * z / width(alpha, sigma) ** 2
    if name == "lms":
        return tuple(((z - alpha * x0) / sigma)[:3])
    return (z[0], *x0[:3]) if name == "unipc" else tuple(x0[: SAMPLERS[name].remembers])


@pytest.mark.parametrize(
    "name, order, exact",
    [
        ("ddim", 1, False),
        ("euler", 1, False),
        ("heun", 2, False),
        ("dpm2", 2, False),
        ("dpmpp_2m", 2, False),
        ("dpmpp_3m", 2, True),  # not 3: diffusers weights the second difference by half
        ("dpmpp_singlestep", 3, False),
        ("unipc", 3, False),  # order 2, and the corrector adds one
        ("lms", 4, True),
    ],
)
def test_order_of_convergence(name, order, exact):
    """In float64, whose rounding the third order does not reach.

    Methods that start with an Euler step are of second order for that alone; `exact` gives them the
    right past instead.
    """
    start, errors, counts = 3 if exact else 0, [], (24, 48, 96)
    with jax.enable_x64(True):
        for count in counts:
            steps = even_steps(name, count)
            x = jnp.ones((4, 1, 1, 1), jnp.float64)
            past = exact_history(name, steps, start) if exact else (0.0,) * SAMPLERS[name].remembers
            history = tuple(x * value for value in past)
            rows = jnp.int32(start), jnp.int32(count)
            end, _ = part(name, COSINE, best_v, x, history, NO_KEYS, steps, *rows, jnp.zeros(()))
            errors.append(abs(float(end[0, 0, 0, 0]) - exact_factor(steps, start)))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    print(name, errors, orders)
    assert abs(orders[-1] - order) < 0.2


def best_eps(x, t):
    alpha, sigma = (a[:, None, None, None] for a in COSINE.alpha_sigma(jnp.broadcast_to(t, (4,))))
    return sigma / ((alpha * SPREAD) ** 2 + sigma**2) * x


def test_order_of_pndm():
    """Of fourth order, as far as its first steps, of lower order, are not yet felt.

    On equal steps of sigma / alpha, for which the weights of Adams and Bashforth are made.
    """
    schedule, errors = dataclasses.replace(COSINE, prediction_type="epsilon"), []
    with jax.enable_x64(True):
        for count in (48, 96, 192):
            ratios = np.linspace(6, 0.5, count + 1)
            even = chain(grids.time_of(COSINE, ratios[:-1]), ratios)
            rows = np.array([0, 1, *range(1, count)])
            steps = even._replace(
                **{name: getattr(even, name)[rows] for name in Step._fields}
                | {"mid_alpha": even.alpha[rows - 1], "mid_sigma": even.sigma[rows - 1]},
                count=np.int32(count + 1),
            )
            steps = with_rows("pndm", steps)
            x = jnp.ones((4, 1, 1, 1), jnp.float64)
            ends = jnp.int32(0), jnp.int32(count + 1)
            rest = (0 * x,) * 5, NO_KEYS, steps, *ends, jnp.zeros(())
            end, _ = part("pndm", schedule, best_eps, x, *rest)
            errors.append(abs(float(end[0, 0, 0, 0]) - exact_factor(steps)))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    print(errors, orders)
    assert abs(orders[-1] - 4) < 0.2


# From pure noise to a clean picture, infinitely far in log SNR, the second order is one only up to
# a logarithm: dpmpp_2m is merely asked for a smaller error.
@pytest.mark.parametrize("name, most", [("ddim", 0.01), ("euler", 0.01), ("dpmpp_2m", 0.0005)])
def test_the_whole_way_converges(name, most):
    assert ode_error(name, make_steps(COSINE, name, 256)) < most


@pytest.mark.parametrize(
    "name, eta",
    [
        ("ddpm", 0.0),
        ("ddim", 1.0),
        ("euler_ancestral", 0.0),
        ("dpm2_ancestral", 0.0),
        ("dpmpp_2m_sde", 0.0),
    ],
)
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


# --- The loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_in_parts_is_the_loop(name):
    keys = jax.random.split(jax.random.key(5), 4)
    schedule = dataclasses.replace(LINEAR, clip_sample=False)
    steps, eta = make_steps(schedule, name, 9), jnp.float32(0.5)
    schedule, count = schedule.for_run(), int(steps.count)
    x = samplers.initial_noise(keys, (2, 2, 1))
    history = tuple(jnp.zeros_like(x) for _ in range(SAMPLERS[name].remembers))
    advance = functools.partial(part, name, schedule, standin)

    whole, remembered = advance(x, history, keys, steps, jnp.int32(0), jnp.int32(count), eta)
    for start, stop in ((0, 1), (1, 4), (4, 4), (4, count)):
        x, history = advance(x, history, keys, steps, jnp.int32(start), jnp.int32(stop), eta)
    np.testing.assert_array_equal(x, whole)
    for ours, theirs in zip(history, remembered, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "name, eta",
    [("ddpm", 0.0), ("ddim", 1.0), ("euler_ancestral", 0.0), ("dpm2_ancestral", 0.0)]
    + [("dpmpp_2m_sde", 0.0), ("dpmpp_3m_sde", 0.0), ("lcm", 0.0), ("tcd", 0.5)]
    + [("ddim_stochastic", 0.0)],
)
def test_noise_depends_on_the_pictures_key_alone(name, eta):
    keys = jax.random.split(jax.random.key(6), 4)
    schedule = dataclasses.replace(LINEAR, clip_sample=False)
    together = run(name, schedule, standin, jnp.ones((4, 2, 2, 1)), 5, keys, eta)
    turned = run(name, schedule, standin, jnp.ones((4, 2, 2, 1)), 5, keys[::-1], eta)
    np.testing.assert_array_equal(together, turned[::-1])
    assert len(np.unique(np.asarray(together))) == together.size


def test_what_is_done_after_each_step():
    """Inpainting by blending sees the latents of each step, and which it was."""

    def kept(x, i):
        return x.at[:, 0].set(i.astype(jnp.float32))

    steps = make_steps(LINEAR, "euler", 5)
    once = jax.jit(
        lambda x: samplers.run(
            *(SAMPLERS["euler"], LINEAR, standin, x, (), NO_KEYS, steps),
            *(jnp.int32(0), jnp.asarray(steps.count), jnp.float32(0), kept),
        )[0]
    )
    end = once(jnp.ones((4, 2, 2, 1)))
    np.testing.assert_array_equal(end[:, 0], 4)
    free = run("euler", LINEAR, standin, jnp.ones((4, 2, 2, 1)), 5)
    np.testing.assert_allclose(end[:, 1], free[:, 1], rtol=1e-6)  # two programs


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_that_begins_late_remembers_nothing(name):
    """Whatever lies in the history, and in the rows before, does not matter."""
    schedule = dataclasses.replace(LINEAR, clip_sample=False)
    steps = make_steps(schedule, name, 9)._replace(first=np.int32(3))
    spoilt = steps._replace(**{n: np.array(getattr(steps, n)) for n in ("alpha", "sigma", "gap")})
    for column in (spoilt.alpha, spoilt.sigma, spoilt.gap):
        column[:3] = 0.7
    ends = []
    for rows, value in ((steps, 0.0), (spoilt, 5.0)):
        x = jnp.ones((4, 2, 2, 1))
        history = (value * x,) * SAMPLERS[name].remembers
        bounds = jnp.int32(3), jnp.asarray(steps.count)
        network = schedule.for_run(), standin
        ends.append(part(name, *network, x, history, NO_KEYS, rows, *bounds, jnp.float32(0))[0])
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_impossible_numbers_of_steps(schedule, name):
    for count in (0, -3, 1001):
        with pytest.raises(JaxsdError, match=f"not {count}(:.*)?$"):
            make_steps(schedule, name, count)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_go_from_noise_to_picture(name, spacing):
    schedule = dataclasses.replace(LINEAR, timestep_spacing=spacing, steps_offset=1)
    for count in (1, 2, 3, 7, 30, 600, 999, 1000):
        if name in ("lcm", "tcd") and count > 50:
            continue  # their students know 50 timesteps
        steps = make_steps(schedule, name, count)
        rows = count + (name == "pndm" and count > 1)  # the second timestep comes twice
        assert steps.count == rows
        t, alpha, sigma, next_alpha, next_sigma = (row[:rows] for row in steps[:5])
        falls = np.diff(t) < 0
        if rows > count:
            assert not falls[1]
            t, alpha, sigma = (np.delete(row, 1) for row in (t, alpha, sigma))
            next_alpha, next_sigma = np.delete(next_alpha, 1), np.delete(next_sigma, 1)
        assert np.all(np.diff(t) < 0)
        assert 0 <= t[-1] and t[0] <= 999
        assert np.all(np.diff(sigma / alpha) < 0)
        assert np.all(next_sigma <= sigma)
        # DDIM counts T // count back, which for some counts just reaches t = 0.
        least = np.sqrt(1 - schedule.alphas_cumprod[0])
        least = least if name in ("ddim", "ddim_stochastic", "pndm", "tcd") else 0
        assert next_sigma[-1] == 0 or abs(next_sigma[-1] - least) < 1e-6
        for a, s in ((alpha, sigma), (next_alpha, next_sigma)):
            np.testing.assert_allclose(a * a + s * s, 1, rtol=1e-6)


def test_an_unknown_sampler():
    with pytest.raises(JaxsdError, match="'plms'.*ddim, ddpm, euler, dpmpp_2m"):
        make_steps(LINEAR, "plms", 10)
