"""The algebra of distillation: times of few steps, and what a student has to say of two of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd.diffusion import jumps, samplers
from jaxsd.diffusion.schedule import Schedule, prediction_target
from jaxsd.errors import JaxsdError
from jaxsd.families import SD_SCHEDULE

COSINE = Schedule(beta_schedule="cosine", prediction_type="v_prediction")
ZERO_SNR = dataclasses.replace(SD_SCHEDULE, rescale_betas_zero_snr=True)
SCHEDULES = {"cosine": COSINE, "stable diffusion": SD_SCHEDULE, "zero terminal SNR": ZERO_SNR}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_ladder_is_the_sampler_s_grid_and_half_of_the_next(schedule):
    student = jumps.student_schedule(schedule)
    for count in (1, 2, 4, 8):
        rungs, grid = jumps.ladder(student, count), samplers.make_steps(student, "ddim", count)
        for name, here in (("t", slice(0, -1)), ("alpha", slice(0, -1)), ("sigma", slice(0, -1))):
            np.testing.assert_allclose(
                getattr(rungs, name)[here], getattr(grid, name)[:count], atol=1e-7
            )
        np.testing.assert_allclose(rungs.alpha[1:], grid.next_alpha[:count], atol=1e-7)
        np.testing.assert_allclose(rungs.sigma[1:], grid.next_sigma[:count], atol=1e-7)
    for count in (1, 2, 4, 8, 16, 32):
        finer = jumps.ladder(student, 2 * count)
        for coarse, fine in zip(jumps.ladder(student, count), finer, strict=True):
            np.testing.assert_array_equal(coarse, fine[::2])
    assert rungs.t[0] == (1000 if schedule.continuous else 999)
    assert rungs.t[-1] == 0 and rungs.alpha[-1] == 1 and rungs.sigma[-1] == 0


def pairs(schedule: Schedule, count: int) -> tuple[jumps.Level, jumps.Level]:
    """Every step of `count`, and where it ends."""
    rungs = jumps.ladder(jumps.student_schedule(schedule), count)
    return cut(rungs, slice(0, -1)), cut(rungs, slice(1, None))


def cut(level: jumps.Level, part: slice) -> jumps.Level:
    return jumps.Level(*(jnp.asarray(values[part]) for values in level))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_stable_target_is_the_paper_s(schedule):
    here, there = pairs(schedule, 16)
    rng = np.random.default_rng(0)
    z, end = rng.standard_normal((2, 16, 2, 2, 1), np.float32)
    x0, eps = jumps.explains(jnp.asarray(z), jnp.asarray(end), here, there)
    alpha, sigma, alpha_end, sigma_end = (
        np.asarray(a, np.float64)[:, None, None, None]
        for a in (here.alpha, here.sigma, there.alpha, there.sigma)
    )
    ratio = sigma_end / sigma  # 2202.00512, algorithm 2
    want = (end - ratio * z) / (alpha_end - ratio * alpha)
    np.testing.assert_allclose(x0, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(eps, (z - alpha * want) / sigma, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("reverse", [False, True], ids=["sampler", "encoder"])
def test_who_says_the_target_lands_where_the_teacher_did(kind, reverse):
    rungs = jumps.ladder(jumps.student_schedule(COSINE), 8)
    rungs = jumps.reverse(rungs) if reverse else rungs
    here, there = cut(rungs, slice(0, -1)), cut(rungs, slice(1, None))
    if kind == "sample" and reverse:  # of a clean picture x says nothing about the noise
        here, there = (cut(level, slice(1, None)) for level in (here, there))
    rng = np.random.default_rng(0)
    z, end = jnp.asarray(rng.standard_normal((2, len(here.t), 2, 2, 1), np.float32))
    x0, eps = jumps.explains(z, end, here, there)
    said = prediction_target(kind, x0, eps, *here.each())
    np.testing.assert_allclose(jumps.jump(kind, said, z, here, there), end, atol=3e-6)


def test_unit_gaussian_data_in_closed_form():
    """v = 0 is best there, and N steps are cos(pi / 2N)^N (reference values to six digits)."""
    for count, want in ((1, 0.0), (2, 0.5), (4, 0.72855), (8, 0.85623), (64, 0.980906)):
        rungs, z = jumps.ladder(jumps.student_schedule(COSINE), count), jnp.ones((1, 1, 1, 1))
        for i in range(count):
            here, there = (rungs.at(jnp.array([j])) for j in (i, i + 1))
            z = jumps.jump("v_prediction", jnp.zeros_like(z), z, here, there)
        np.testing.assert_allclose(z.item(), want, atol=6e-6)


@pytest.mark.parametrize(("start", "end"), [(64, 3), (6, 2), (4, 4), (4, 8), (5, 1), (4, 0)])
def test_steps_that_no_halving_leads_to_are_refused(start, end):
    with pytest.raises(JaxsdError, match="no division by 2 leads"):
        jumps.stages(start, end)
    assert jumps.stages(64, 1) == [32, 16, 8, 4, 2, 1]
    assert jumps.stages(64, 1, factor=4) == [16, 4, 1] and jumps.stages(64, 1, 64) == [1]
    with pytest.raises(JaxsdError, match="factor must be at least 2, not 1"):
        jumps.stages(64, 1, 1)
