"""Schedules against published numbers, and the three prediction types against one another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd.diffusion.schedule import PREDICTION_TYPES, Schedule, prediction_target, x0_and_eps
from jaxsd.errors import JaxsdError
from jaxsd.families import FAMILIES

SD = FAMILIES["sd1"].schedule
COSINE = Schedule(beta_schedule="cosine")


def test_stable_diffusions_noise_levels():
    bar = SD.alphas_cumprod
    assert bar.shape == (1000,) and bar.dtype == np.float32
    # The published ones come from double precision, 1e-6 away from the float32 table in use.
    np.testing.assert_allclose(bar[[0, 500, 999]], [0.99915, 0.2763327, 0.0046601], rtol=2e-6)
    sigma = np.sqrt((1 - bar[[0, 999]].astype(float)) / bar[[0, 999]])
    np.testing.assert_allclose(sigma, [0.0291672, 14.61464], rtol=2e-5)


@pytest.mark.parametrize(
    "name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "cosine"]
)
def test_noise_grows_with_time(name):
    bar = Schedule(beta_schedule=name).alphas_cumprod
    assert np.all(np.diff(bar) < 0) and np.all((bar > 0) & (bar <= 1))


def test_zero_terminal_snr():
    """2305.08891: the published alpha^2 in the middle, and no signal at the end."""
    zero = dataclasses.replace(SD, rescale_betas_zero_snr=True)
    assert abs(zero.alphas_cumprod[500] - 0.2410188) < 1e-6 and zero.alphas_cumprod[-1] == 0
    alpha, sigma = zero.alpha_sigma(jnp.asarray([0.0, 998.5, 999.0]))
    np.testing.assert_allclose(alpha[0], SD.alphas_cumprod[0] ** 0.5, rtol=1e-6)
    assert 0 < alpha[1] < 1e-3 and (alpha[2], sigma[2]) == (0, 1)


# --- Prediction types ------------------------------------------------------------------------


def pictures(seed):
    return jax.random.normal(jax.random.key(seed), (2, 3, 3, 1))


def test_x_and_eps_merge_to_one_picture():
    """2202.00512, section 4: x = sigma^2 x' + alpha (z - sigma eps')."""
    t = jnp.array([1000.0, 200.0])
    alpha, sigma = (a[:, None, None, None] for a in Schedule(beta_schedule="cosine").alpha_sigma(t))
    z, x, eps = pictures(0), pictures(1), pictures(2)
    found = x0_and_eps("both", jnp.concatenate([x, eps], -1), z, alpha, sigma)
    want = sigma**2 * x + alpha * (z - sigma * eps)
    np.testing.assert_allclose(found[0], want, atol=2e-6)
    np.testing.assert_allclose(alpha * found[0] + sigma * found[1], z, atol=2e-6)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("angle", [0.2, 0.8, 1.4])
def test_a_right_prediction_gives_back_picture_and_noise(kind, angle):
    x0, eps = pictures(0), pictures(1)
    alpha, sigma = jnp.cos(angle), jnp.sin(angle)
    said = prediction_target(kind, x0, eps, alpha, sigma)
    found = x0_and_eps(kind, said, alpha * x0 + sigma * eps, alpha, sigma)
    # Dividing by alpha or sigma magnifies rounding by at most 1 / cos(1.4) = 1 / sin(.17) = 6.
    np.testing.assert_allclose(found[0], x0, atol=1e-5)
    np.testing.assert_allclose(found[1], eps, atol=1e-5)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [0.0, 1000.0])
def test_both_ends_of_the_cosine_schedule_are_finite(kind, t):
    alpha, sigma = COSINE.alpha_sigma(jnp.float32(t))
    x0, eps = x0_and_eps(kind, pictures(0), pictures(1), alpha, sigma)
    assert bool(jnp.isfinite(x0).all() and jnp.isfinite(eps).all())


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_pure_noise_is_all_noise(kind):
    """At alpha = 0 the picture is what the network says, the noise is what it sees."""
    x0, eps = pictures(0), pictures(1)
    alpha, sigma = jnp.float32(0), jnp.float32(1)
    found = x0_and_eps(kind, prediction_target(kind, x0, eps, alpha, sigma), eps, alpha, sigma)
    np.testing.assert_array_equal(found[0], x0)
    np.testing.assert_array_equal(found[1], eps)


# --- Times -----------------------------------------------------------------------------------


def test_alpha_sigma_at_whole_times_is_the_table():
    t = np.array([0, 1, 500, 999])
    alpha, sigma = SD.alpha_sigma(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(alpha, np.sqrt(SD.alphas_cumprod[t]), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 - SD.alphas_cumprod[t].astype(float)), rtol=1e-5)


def test_alpha_sigma_between_whole_times_interpolates_their_ratio():
    alpha, sigma = SD.alpha_sigma(jnp.asarray([700.0, 700.25, 701.0]))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    low, between, high = sigma / alpha
    np.testing.assert_allclose(between, 0.75 * low + 0.25 * high, rtol=1e-6)


def test_alpha_sigma_of_the_cosine_schedule():
    alpha, sigma = COSINE.alpha_sigma(jnp.asarray([0.0, 500.0, 1000.0]))
    np.testing.assert_allclose(alpha, [1, 0.5**0.5, 0], atol=1e-6)
    np.testing.assert_allclose(sigma, [0, 0.5**0.5, 1], atol=1e-6)


@pytest.mark.parametrize("schedule, most", [(SD, 999), (COSINE, 1000)])
def test_random_times_fall_into_every_stratum(schedule, most):
    count = 64
    for seed in range(3):
        t = np.asarray(schedule.random_times(jax.random.key(seed), count, continuous=True))
        assert t.dtype == np.float32 and t.min() >= 0 and t.max() < most
        # Equally spaced on a circle: sorted, every gap is one stratum wide.
        np.testing.assert_allclose(np.diff(np.sort(t)), most / count, rtol=1e-3)


@pytest.mark.parametrize("schedule, first", [(SD, 0), (COSINE, 1)])
def test_random_whole_times(schedule, first):
    small = dataclasses.replace(schedule, num_train_timesteps=10)
    t = np.asarray(small.random_times(jax.random.key(0), 1000, continuous=False))
    assert t.dtype == np.float32 and sorted(set(t)) == list(range(first, first + 10))


@pytest.mark.parametrize(
    "spacing, expected",
    [
        ("leading", range(901, 0, -100)),
        ("trailing", range(999, 0, -100)),
        ("linspace", range(999, -1, -111)),
    ],
)
def test_ten_timesteps(spacing, expected):
    """2305.08891, table 2; Stable Diffusion adds 1 to the leading ones."""
    schedule = dataclasses.replace(SD, timestep_spacing=spacing)
    assert schedule.timesteps(10).tolist() == list(expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_number_of_timesteps_lies_in_the_table(spacing, offset):
    schedule = dataclasses.replace(SD, timestep_spacing=spacing, steps_offset=offset)
    for count in (*range(1, 60), 333, 499, 500, 501, 999, 1000):
        t = schedule.timesteps(count)
        assert t.shape == (count,) and np.all(np.diff(t) < 0)
        assert t[0] <= 999 and t[-1] >= 0 and np.all(t == np.round(t))


def test_linspace_keeps_its_fractions_if_asked():
    schedule = dataclasses.replace(SD, timestep_spacing="linspace")
    np.testing.assert_allclose(schedule.timesteps(70, rounded=False)[:3], [999, 984.5217, 970.0435])
    assert schedule.timesteps(70)[:3].tolist() == [999, 985, 970]


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_numbers_of_steps(count):
    with pytest.raises(JaxsdError, match=f"steps must be from 1 to 1000, not {count}"):
        SD.timesteps(count)


# --- Files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [SD, COSINE, Schedule(), FAMILIES["digits"].schedule, FAMILIES["digits-ddpm"].schedule]
    + [
        dataclasses.replace(SD, class_name=name, timestep_spacing="linspace", clip_sample_range=2.0)
        for name in ("DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    ],
)
def test_json_round_trip(schedule):
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_the_file_of_a_cosine_schedule_is_one_that_diffusers_reads():
    assert COSINE.to_json()["beta_schedule"] == "squaredcos_cap_v2"


def test_each_class_has_defaults_of_its_own():
    ddim, euler, pndm = (
        Schedule.from_json({"_class_name": f"{name}Scheduler", "_diffusers_version": "0.6.0"})
        for name in ("DDIM", "EulerDiscrete", "PNDM")
    )
    assert (ddim.timestep_spacing, ddim.clip_sample, ddim.set_alpha_to_one) == (
        "leading",
        True,
        True,
    )
    assert (euler.timestep_spacing, euler.clip_sample) == ("linspace", False)
    assert (pndm.timestep_spacing, pndm.clip_sample, pndm.set_alpha_to_one) == (
        "leading",
        False,
        False,
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"trained_betas": [0.1]}, "trained_betas has 1 values"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, "between 0 and 1"),
        ({"variance_type": "learned"}, "variance_type='learned'"),
        ({"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
        ({"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ({"solver_order": 4}, "solver_order=4"),
        ({"solver_type": "logrho"}, "solver_type='logrho'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"predict_x0": False}, "predict_x0=False"),
        ({"disable_corrector": [1]}, "disable_corrector"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta"),
        ({"_class_name": "EDMEulerScheduler"}, "class_name='EDMEulerScheduler'"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow=1"),
    ],
)
def test_unknown_values_are_refused(wrong, said):
    with pytest.raises(JaxsdError) as error:
        Schedule.from_json(wrong, "here.json")
    assert said in str(error.value) and "here.json" in str(error.value)
    assert "\n" not in str(error.value)
