"""What `make_steps` is asked for, and refuses."""

import dataclasses

import pytest
from test_samplers import LINEAR

from jaxsd.diffusion.samplers import default_sampler, make_steps
from jaxsd.errors import JaxsdError


@pytest.mark.parametrize(
    "options, name",
    [
        ({}, "ddim"),
        ({"class_name": "PNDMScheduler"}, "pndm"),
        ({"class_name": "KDPM2AncestralDiscreteScheduler"}, "dpm2_ancestral"),
        ({"class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "dpmpp_3m"),
        (
            {
                "class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "solver_order": 3,
            },
            "dpmpp_3m_sde",
        ),
    ],
)
def test_default_sampler(options, name):
    assert default_sampler(dataclasses.replace(LINEAR, **options)) == name


def test_no_default_sampler():
    first = dataclasses.replace(LINEAR, class_name="DPMSolverMultistepScheduler", solver_order=1)
    with pytest.raises(JaxsdError, match="solver_order=1"):
        default_sampler(first)


@pytest.mark.parametrize(
    "name, options, given, said",
    [
        ("ddim", {"use_karras_sigmas": True}, {}, "ddim cannot do use_karras_sigmas=True"),
        ("heun", {"final_sigmas_type": "sigma_min"}, {}, "heun cannot do final_sigmas_type"),
        ("euler_ancestral", {"use_beta_sigmas": True}, {}, "cannot do use_beta_sigmas"),
        ("unipc", {"use_lu_lambdas": True}, {}, "unipc cannot do use_lu_lambdas"),
        ("dpmpp_2m", {"sigma_min": 0.1}, {}, "cannot do sigma_min=0.1"),
        ("euler", {"beta_schedule": "cosine", "use_karras_sigmas": True}, {}, "continuous"),
        ("ddim", {}, {"timesteps": [900, 500]}, "ddim takes no timesteps of yours; ddpm, euler"),
        ("heun", {}, {"sigmas": [9.0, 0.0]}, "heun takes no sigmas of yours; euler do"),
        ("euler", {}, {"sigmas": [9.0, 0.0], "timesteps": [5.0]}, "not both"),
        ("euler", {"use_karras_sigmas": True}, {"timesteps": [900, 500]}, "use_karras_sigmas"),
        ("euler", {}, {"timesteps": [500, 900]}, "must fall from 999 on"),
        ("euler", {}, {"timesteps": [1000, 900]}, "must fall from 999 on"),
        ("euler", {}, {"timesteps": []}, "0 timesteps"),
        ("euler", {}, {"sigmas": [5.0, 7.0]}, "sigmas must fall"),
        ("euler", {"beta_schedule": "cosine"}, {"timesteps": [900, 500]}, "continuous"),
        ("euler", {}, {"strength": 0.0}, "strength must be"),
        ("euler", {}, {"strength": 0.05}, "less than one step"),
        ("lcm", {}, {"strength": 0.1}, "from 1 to 5, not 10.*original_inference_steps 50"),
        ("tcd", {"original_inference_steps": 8}, {}, "from 1 to 8, not 10"),
        ("tcd", {"original_inference_steps": 0}, {}, "original_inference_steps must be"),
    ],
)
def test_what_is_refused(name, options, given, said):
    with pytest.raises(JaxsdError, match=said) as error:
        make_steps(dataclasses.replace(LINEAR, **options), name, 10, **given)
    assert "\n" not in str(error.value)


def test_strength_says_where_to_begin():
    for strength, first in ((1.0, 0), (0.8, 2), (0.55, 5), (0.1, 9)):
        assert make_steps(LINEAR, "euler", 10, strength=strength).first == first
    assert make_steps(LINEAR, "lcm", 4, strength=0.5).first == 0


def test_switches_of_the_grid_compile_nothing():
    karras = dataclasses.replace(LINEAR, use_karras_sigmas=True, timestep_spacing="linspace")
    assert (
        karras.for_run()
        == LINEAR.for_run()
        != dataclasses.replace(LINEAR, prediction_type="sample").for_run()
    )
