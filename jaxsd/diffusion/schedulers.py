"""The scheduler classes of diffusers: what each one's file may say, its defaults, our sampler.

A class has defaults of its own for what its file leaves out, and switches that others do not know.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class SchedulerClass:
    """One class of diffusers: its sampler, and the default of everything its file may say."""

    sampler: str
    defaults: dict[str, Any]


def _betas(start: float = 0.0001, end: float = 0.02, kind: str = "linear") -> dict[str, Any]:
    return {
        "num_train_timesteps": 1000,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": kind,
        "trained_betas": None,
        "prediction_type": "epsilon",
    }


def _spacing(kind: str) -> dict[str, Any]:
    return {"timestep_spacing": kind, "steps_offset": 0}


def _clipping(clip_sample: bool) -> dict[str, Any]:
    return {"clip_sample": clip_sample, "clip_sample_range": 1.0}


LATENT_BETAS = _betas(0.00085, 0.012)
THRESHOLDING = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
ZERO_SNR = {"rescale_betas_zero_snr": False}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
SIGMA_RANGE = {"sigma_min": None, "sigma_max": None}
SOLVER = {
    **THRESHOLDING,
    **SIGMAS,
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}
DPM_SOLVER = {
    **SOLVER,
    "algorithm_type": "dpmsolver++",
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
}
KARRAS_ODE = {**LATENT_BETAS, **SIGMAS, **_spacing("linspace")}
CONSISTENCY = {
    **_betas(0.00085, 0.012, "scaled_linear"),
    **_spacing("leading"),
    **_clipping(False),
    **THRESHOLDING,
    **ZERO_SNR,
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}

SCHEDULER_CLASSES = {
    "DDIMScheduler": SchedulerClass(
        "ddim",
        _betas()
        | _spacing("leading")
        | _clipping(True)
        | THRESHOLDING
        | ZERO_SNR
        | {"set_alpha_to_one": True},
    ),
    "DDPMScheduler": SchedulerClass(
        "ddpm",
        _betas()
        | _spacing("leading")
        | _clipping(True)
        | THRESHOLDING
        | ZERO_SNR
        | {"variance_type": "fixed_small"},
    ),
    "PNDMScheduler": SchedulerClass(
        "pndm",
        _betas() | _spacing("leading") | {"skip_prk_steps": False, "set_alpha_to_one": False},
    ),
    "LMSDiscreteScheduler": SchedulerClass("lms", _betas() | SIGMAS | _spacing("linspace")),
    "EulerDiscreteScheduler": SchedulerClass(
        "euler",
        _betas()
        | SIGMAS
        | SIGMA_RANGE
        | _spacing("linspace")
        | ZERO_SNR
        | {
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(
        "euler_ancestral", _betas() | _spacing("linspace") | ZERO_SNR
    ),
    "HeunDiscreteScheduler": SchedulerClass("heun", KARRAS_ODE | _clipping(False)),
    "KDPM2DiscreteScheduler": SchedulerClass("dpm2", KARRAS_ODE),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass("dpm2_ancestral", KARRAS_ODE),
    # default_sampler() looks further: at algorithm_type and solver_order
    "DPMSolverMultistepScheduler": SchedulerClass(
        "dpmpp_2m",
        _betas()
        | DPM_SOLVER
        | _spacing("linspace")
        | ZERO_SNR
        | {"euler_at_final": False, "use_lu_lambdas": False},
    ),
    # the class knows no other spacing than linspace
    "DPMSolverSinglestepScheduler": SchedulerClass(
        "dpmpp_singlestep", _betas() | DPM_SOLVER | {"lower_order_final": False}
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        "unipc",
        _betas() | SOLVER | SIGMA_RANGE | _spacing("linspace") | ZERO_SNR | {"solver_type": "bh2"},
    ),
    "LCMScheduler": SchedulerClass("lcm", CONSISTENCY),
    "TCDScheduler": SchedulerClass("tcd", CONSISTENCY),
}
