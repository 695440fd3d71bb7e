"""A sampled trajectory, step by step: our pipeline against diffusers' own, from the same noise.

diffusers runs its pipeline with its scheduler, we the public `Pipeline`. Both encode the same
prompts and follow them with guidance. Latents are compared in our coordinates, alpha x + sigma eps.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsd import pipeline, weights
from jaxsd.compare import reference
from jaxsd.compare.inputs import normal
from jaxsd.compare.plan import Plan
from jaxsd.compare.report import Error, Row, Section, make_row
from jaxsd.denoising import within_range
from jaxsd.diffusion.samplers import SAMPLERS
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError

PROMPT, NEGATIVE = "a red seven on a white background", "blue"
# Samplers that ask the network once a step and draw no noise on the way, which two libraries draw
# differently; with what their schedulers are told besides a folder's options.
DPM = {"algorithm_type": "dpmsolver++"}
OPTIONS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "dpmpp_2m": DPM | {"solver_order": 2},
    "dpmpp_3m": DPM | {"solver_order": 3},
    "euler": {},
    "lms": {},
    "unipc": {},
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclasses.dataclass(frozen=True)
class Sampled:
    """How to sample; guidance_scale 1 is none."""

    steps: int = 4
    sampler: str = "ddim"
    guidance_scale: float = 7.5

    def __post_init__(self):
        if self.sampler not in OPTIONS:
            raise JaxsdError(
                f"no trajectory with sampler {self.sampler!r}: compare knows "
                f"{', '.join(OPTIONS)}, which draw no noise on the way"
            )
        if self.steps < 1:
            raise JaxsdError(f"steps must be at least 1, not {self.steps}")


def why_not(plan: Plan) -> str | None:
    """Why this model's trajectory has no counterpart in diffusers, if it has none."""
    indexes = [side.folder / "model_index.json" for side in (plan.model, plan.reference)]
    if not all(index.is_file() for index in indexes):
        return "as one component is no model"
    kind = weights.read_json(indexes[1]).get("_class_name")
    file = plan.model.folder / "scheduler" / "scheduler_config.json"
    if kind not in PIPELINES:
        return f"as {kind} is not one of {', '.join(PIPELINES)}"
    if Schedule.from_json(weights.read_json(file), str(file)).continuous:
        return "as diffusers has no schedule that is defined between its steps"
    return None


def compare(plan: Plan, sampled: Sampled) -> Section:
    """The latents after every step in each dtype, as rows of a report.

    At a scale that a student was taught: to diffusers, which knows of no range, it is told so, too.
    """
    scale = within_range(plan.config("unet"), np.asarray(sampled.guidance_scale))
    sampled = dataclasses.replace(sampled, guidance_scale=float(scale))
    start = normal(1, *plan.size.latents, plan.config("unet").in_channels)
    theirs = {}
    for dtype in dict.fromkeys(("float32", *plan.dtypes)):
        plan.progress(f"trajectory: PyTorch {dtype}")
        theirs[dtype] = _their_steps(plan, sampled, start, dtype)
        reference.free()
    rows: dict[str, list[Row]] = {}
    for dtype in plan.dtypes:
        plan.progress(f"trajectory: jaxsd {dtype}")
        ours = _our_steps(plan, sampled, start, dtype)
        reference.free()
        rows[dtype] = []
        for i, (t, z) in enumerate(ours):
            exact, same = theirs["float32"][i], theirs[dtype][i]
            errors = [Error.of(z - same), Error.of(z - exact)]
            rows[dtype].append(make_row(f"step {i + 1}, t = {t:g}", dtype, errors, same, exact))
    about = (
        f"{sampled.sampler}, {sampled.steps} steps, guidance {sampled.guidance_scale:g}; "
        f"latents {list(start.shape)}"
    )
    return Section("trajectory", about, rows)


def _their_steps(plan: Plan, sampled: Sampled, start: np.ndarray, dtype: str) -> list[np.ndarray]:
    torch = reference.require()
    pipe = reference.load_pipeline(plan.reference, dtype, plan.torch_device, plan.variant)
    pipe.scheduler = reference.scheduler(
        SAMPLERS[sampled.sampler].scheduler,
        _schedule_config(plan) | OPTIONS[sampled.sampler],
    )
    # Samplers in the coordinates z / alpha start from noise of another size.
    exploding = float(pipe.scheduler.init_noise_sigma) != 1
    steps = []

    def look(pipe, i, t, values):
        z = np.moveaxis(values["latents"].float().cpu().numpy(), 1, -1)
        if exploding:
            z = z / np.sqrt(1 + float(pipe.scheduler.sigmas[i + 1]) ** 2).astype(np.float32)
        steps.append(np.array(z))
        return values

    height, width = plan.size.pixels
    with torch.inference_mode():
        pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=height,
            width=width,
            num_inference_steps=sampled.steps,
            guidance_scale=sampled.guidance_scale,
            latents=reference.to_torch(start, getattr(torch, dtype), plan.torch_device),
            output_type="latent",
            callback_on_step_end=look,
        )
    return steps


def _schedule_config(plan: Plan) -> dict[str, Any]:
    """What the reference's file says; of what it leaves out, the defaults of the class it names.

    Another class has others: DDIM, say, clips x0 where PNDM, which has no such option, does not.
    """
    file = plan.reference.folder / "scheduler" / "scheduler_config.json"
    values = weights.read_json(file)
    return dataclasses.asdict(Schedule.from_json(values, str(file))) | values


def _our_steps(
    plan: Plan, sampled: Sampled, start: np.ndarray, dtype: str
) -> list[tuple[float, np.ndarray]]:
    pipe = pipeline.load(plan.model.folder, getattr(jnp, dtype), plan.variant)
    steps: list[tuple[float, np.ndarray]] = []
    # Stable Diffusion XL is told sizes, too; others have none.
    cond, uncond = (
        pipe.encode([text], size_ids=pipe.size_ids(plan.size.pixels, negative=negative))
        for text, negative in ((PROMPT, False), (NEGATIVE, True))
    )
    pipe.denoise(
        jnp.asarray(start),
        cond,
        None if pipe.guidance_embedded else uncond,
        steps=sampled.steps,
        guidance_scale=sampled.guidance_scale,
        sampler=sampled.sampler,
        callback=lambda i, t, latents: steps.append((t, np.asarray(latents))),
    )
    return steps
