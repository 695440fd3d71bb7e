"""Samplers against diffusers' schedulers: every step from the same latents, float32.

Each run is one program of ours: it takes all steps from their latents at once, and then the whole
way alone.
"""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from scheduler_reference import CLASSES, START, THEIRS, compare, reference, trajectory

from jaxsd.diffusion.samplers import SAMPLERS, make_steps
from jaxsd.diffusion.schedule import PREDICTION_TYPES, Schedule
from jaxsd.errors import JaxsdError
from jaxsd.families import FAMILIES

# Torch's tensors, as diffusers turns them into arrays and numbers, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TOLERANCE = 1e-5  # of one step, from the same latents
LOOP_TOLERANCE = 1e-4  # of a whole loop, in which rounding is carried on and magnified

SPACINGS = ("leading", "trailing", "linspace")
COUNTS = (1, 2, 4, 10, 30, 50)
SD = FAMILIES["sd1"].schedule
NO_SAMPLE = ("euler_ancestral", "dpm2", "dpm2_ancestral", "pndm")  # they raise for "sample"


@pytest.fixture(autouse=True, scope="module")
def quiet():
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()


def check(name, schedule, monkeypatch, counts=COUNTS, **options):
    errors = {n: compare(name, schedule, n, monkeypatch, **options) for n in counts}
    print(name, options, errors)
    assert np.max([step for step, _ in errors.values()]) <= TOLERANCE
    assert np.max([loop for _, loop in errors.values()]) <= LOOP_TOLERANCE


# --- Every sampler x spacing x prediction type x number of steps ------------------------------


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", THEIRS)
def test_every_step(name, kind, monkeypatch, record_property):
    for spacing in SPACINGS:
        schedule = dataclasses.replace(SD, prediction_type=kind, timestep_spacing=spacing)
        if name in NO_SAMPLE and kind == "sample":
            with pytest.raises((NotImplementedError, ValueError), match="sample"):
                trajectory(name, schedule, 4, monkeypatch, z=START)
            continue
        counts = COUNTS
        if name == "dpm2_ancestral" and spacing == "linspace":
            # From 14.6 to .03 at once: sqrt(r'^2 - up^2) in float32 is all rounding, theirs differs
            # between machines. test_the_midpoint_of_a_huge_step holds what can be held.
            counts = tuple(n for n in COUNTS if n != 2)
        check(name, schedule, monkeypatch, counts, eta=0.3 if name == "tcd" else 0.0)


def test_the_midpoint_of_a_huge_step():
    schedule = dataclasses.replace(SD, timestep_spacing="linspace")
    theirs = float(reference("dpm2_ancestral", schedule, 2).sigmas_interpol[0])
    steps = make_steps(schedule, "dpm2_ancestral", 2)
    np.testing.assert_allclose(steps.mid_sigma[0] / steps.mid_alpha[0], theirs, rtol=0.01)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name, eta", [("ddim", 0.5), ("ddim", 1.0), ("tcd", 0.0), ("tcd", 1.0)])
def test_renewed_noise(name, eta, kind, monkeypatch):
    for spacing in SPACINGS:
        schedule = dataclasses.replace(SD, prediction_type=kind, timestep_spacing=spacing)
        check(name, schedule, monkeypatch, eta=eta)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_pndm_with_its_runge_kutta_start(kind, monkeypatch):
    for spacing in SPACINGS:
        schedule = dataclasses.replace(
            SD, prediction_type=kind, timestep_spacing=spacing, skip_prk_steps=False
        )
        check("pndm", schedule, monkeypatch, (4, 5, 10, 30, 50))
        for count in (1, 2, 3):
            with pytest.raises(ValueError, match="broadcast"):
                reference("pndm", schedule, count)
            with pytest.raises(JaxsdError, match="at least 4 steps"):
                make_steps(schedule, "pndm", count)


# --- Other grids ------------------------------------------------------------------------------

SIGMA_SAMPLERS = ("euler", "heun", "dpm2", "dpm2_ancestral", "lms")
DPM_SAMPLERS = ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_singlestep")
SOLVERS = (*DPM_SAMPLERS, "unipc")


@pytest.mark.parametrize("switch", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", SIGMA_SAMPLERS + SOLVERS)
def test_noise_levels_of_another_spacing(name, switch, monkeypatch):
    for spacing in ("leading", "linspace"):
        schedule = dataclasses.replace(
            SD, timestep_spacing=spacing, **{f"use_{switch}_sigmas": True}
        )
        check(name, schedule, monkeypatch, (10, 30) if name == "dpm2_ancestral" else (2, 10, 30))
        plain = make_steps(dataclasses.replace(SD, timestep_spacing=spacing), name, 10)
        assert not np.allclose(make_steps(schedule, name, 10).sigma, plain.sigma, rtol=1e-3)


@pytest.mark.parametrize("name", DPM_SAMPLERS[:4])
def test_lu_lambdas(name, monkeypatch):
    check(name, dataclasses.replace(SD, use_lu_lambdas=True), monkeypatch, (2, 10, 30))


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_singlestep", "unipc"])
def test_karras_timesteps_of_the_cosine_betas(name, monkeypatch):
    schedule = Schedule(
        beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True, clip_sample=False
    )
    check(name, schedule, monkeypatch, (10,))


@pytest.mark.parametrize(
    "options",
    [
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 11.0},
        {"use_exponential_sigmas": True, "sigma_min": 0.05, "final_sigmas_type": "sigma_min"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"timestep_type": "continuous", "prediction_type": "epsilon"},
    ],
    ids=str,
)
def test_switches_of_euler(options, monkeypatch):
    check("euler", dataclasses.replace(SD, **options), monkeypatch, (2, 10, 30))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_karras_sigmas": True},
        {"lower_order_final": False},
        {"solver_type": "heun"},
        {"lambda_min_clipped": -2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SOLVERS)
def test_ends_at_the_least_noise(name, options, monkeypatch):
    schedule = dataclasses.replace(SD, final_sigmas_type="sigma_min", **options)
    if name == "unipc" and "lambda_min_clipped" in options:
        with pytest.raises(JaxsdError, match="unipc cannot do lambda_min_clipped"):
            make_steps(schedule, name, 10)
        return
    if "_3m" in name and "use_karras_sigmas" in options:
        # The last step has no length; with 15 steps and more it is of third order: 0 / 0.
        assert np.isnan(trajectory(name, schedule, 20, monkeypatch, z=START)[-1]).all()
        check(name, schedule, monkeypatch, (2, 10))
        return
    check(name, schedule, monkeypatch, (2, 10, 20))


def test_unipc_bh1_to_the_picture(monkeypatch):
    """Theirs multiplies infinity by zero; ours is the same step as with bh2, of first order."""
    schedule = dataclasses.replace(SD, solver_type="bh1")
    assert np.isnan(trajectory("unipc", schedule, 4, monkeypatch, z=START)[-1]).all()
    assert compare("unipc", schedule, 4, monkeypatch, stop=3)[1] <= LOOP_TOLERANCE


@pytest.mark.parametrize(
    "name, options",
    [
        ("dpmpp_2m", {"solver_type": "heun"}),
        ("dpmpp_3m", {"solver_type": "heun"}),
        ("dpmpp_2m_sde", {"solver_type": "heun"}),
        ("dpmpp_2m", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"lower_order_final": False}),
        ("dpmpp_3m", {"lower_order_final": False}),
        ("dpmpp_singlestep", {"solver_order": 1}),
        ("dpmpp_singlestep", {"solver_order": 3}),
        ("dpmpp_singlestep", {"solver_order": 3, "solver_type": "heun"}),
        ("dpmpp_singlestep", {"solver_order": 2, "solver_type": "heun"}),
        ("dpmpp_singlestep", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
        (
            "dpmpp_singlestep",
            {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        ),
        ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("unipc", {"solver_order": 1}),
        ("unipc", {"solver_order": 3}),
        ("unipc", {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("ddpm", {"variance_type": "fixed_small_log"}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"variance_type": "fixed_large", "steps_offset": 0}),
        ("ddim", {"set_alpha_to_one": True}),
        ("pndm", {"set_alpha_to_one": True}),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
        ("tcd", {"original_inference_steps": 100}),
    ],
    ids=str,
)
def test_other_solvers(name, options, monkeypatch):
    schedule = dataclasses.replace(SD, **options)
    check(name, schedule, monkeypatch, (2, 4, 10, 20, 21), eta=0.3 if name == "tcd" else 0.0)


@pytest.mark.parametrize(
    "name", ["ddim", "ddpm", "euler", "euler_ancestral", "unipc", "lcm", "tcd", *DPM_SAMPLERS[:4]]
)
def test_zero_terminal_snr(name, monkeypatch):
    for kind in ("v_prediction", "sample"):
        if kind == "sample" and name in NO_SAMPLE:
            continue
        for spacing in ("trailing", "linspace"):
            schedule = dataclasses.replace(
                SD, rescale_betas_zero_snr=True, prediction_type=kind, timestep_spacing=spacing
            )
            # Their latents y = z / alpha are in the thousands: in float32 rounded to 2e-4.
            double = name in ("euler", "euler_ancestral")
            check(name, schedule, monkeypatch, (2, 10, 30), double=double)


# --- Clipping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_with_clipping(name, eta, monkeypatch):
    check(name, Schedule(clip_sample=True, clip_sample_range=0.8), monkeypatch, eta=eta)


def test_heun_with_clipping(monkeypatch):
    """In few steps, rounding of the second slope is magnified by all of the noise: not in 10."""
    schedule = dataclasses.replace(SD, clip_sample=True, clip_sample_range=0.8)
    check("heun", schedule, monkeypatch, (1, 10, 30, 50))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", *SOLVERS])
def test_with_dynamic_thresholding(name, monkeypatch):
    for options in ({"sample_max_value": 1.5}, {"dynamic_thresholding_ratio": 0.7}):
        schedule = dataclasses.replace(SD, thresholding=True, clip_sample=True, **options)
        check(name, schedule, monkeypatch, (4, 10))


# --- Timesteps and sigmas of the caller -------------------------------------------------------

TIMESTEPS = [999, 870, 700, 515, 400, 259, 133, 40, 19]


@pytest.mark.parametrize("name", [n for n, row in SAMPLERS.items() if "timesteps" in row.custom])
def test_timesteps_of_the_caller(name, monkeypatch):
    step, loop = compare(name, SD, None, monkeypatch, timesteps=TIMESTEPS)
    assert step <= TOLERANCE and loop <= LOOP_TOLERANCE


def test_sigmas_of_the_caller(monkeypatch):
    for sigmas in ([14.6, 7.3, 3.0, 1.1, 0.3, 0.0], [9.0, 2.0, 0.1]):
        step, loop = compare("euler", SD, None, monkeypatch, sigmas=sigmas)
        assert step <= TOLERANCE and loop <= LOOP_TOLERANCE


def test_who_takes_what():
    """As the signatures say; UniPC's sigmas are for flow matching."""
    import inspect

    for name in THEIRS:
        known = inspect.signature(CLASSES[name].set_timesteps).parameters
        expected = [kind for kind in ("timesteps", "sigmas") if kind in known and name != "unipc"]
        assert list(SAMPLERS[name].custom) == expected, name


# --- Image-to-image, base and refiner ---------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", [name for name in THEIRS if name != "lms"])
def test_beginning_on_the_way(name, spacing, monkeypatch):
    """From a picture with their noise on it; `first` is what diffusers calls the begin index."""
    schedule = dataclasses.replace(SD, timestep_spacing=spacing)
    for count, begin in ((10, 1), (10, 4), (10, 9), (30, 6)):
        step, loop = compare(name, schedule, count, monkeypatch, begin=begin, z=None, eta=0.0)
        print(name, spacing, count, begin, step, loop)
        assert step <= TOLERANCE and loop <= LOOP_TOLERANCE


@pytest.mark.parametrize("name", THEIRS)
def test_stopping_on_the_way(name, monkeypatch):
    """As the base model does that leaves the rest to a refiner."""
    step, loop = compare(name, SD, 10, monkeypatch, stop=7)
    assert step <= TOLERANCE and loop <= LOOP_TOLERANCE


@pytest.mark.parametrize("name", ["lcm", "tcd"])
@pytest.mark.parametrize("count, strength", [(4, 0.5), (7, 0.83), (1, 0.1)])
def test_strength_makes_the_timesteps(name, count, strength, monkeypatch):
    step, loop = compare(name, SD, count, monkeypatch, eta=0.3, strength=strength)
    assert step <= TOLERANCE and loop <= LOOP_TOLERANCE
