"""A model's programs made before they are needed: what `jaxsd compile` does."""

import dataclasses
from pathlib import PurePath

from PIL import Image

from jaxsd import programs
from jaxsd.errors import JaxsdError
from jaxsd.pipeline import Pipeline
from jaxsd.programs import Program
from jaxsd.shortcuts import Shortcuts


def compile_ahead(
    pipe: Pipeline,
    folder: str | PurePath,
    *,
    batch_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    sampler: str | None = None,
    guidance_scale: float | None = None,
    clip_skip: int = 0,
    chunks: int = 1,
    shortcuts: Shortcuts = Shortcuts(),  # noqa: B008
    image: bool = False,
    mask: bool = False,
) -> list[Program]:
    """Writes the programs of a request into a folder, for `jaxsd.load(..., compiled=folder)`.

    They are those that one step of such a request runs, with the empty prompt and, where it has
    them, white pictures; so XLA has compiled them for this machine, too, which JAX's compilation
    cache keeps. Prompts, seeds, steps, strength, eta and scales are values, and free, but whether
    there is guidance (a scale above 1) is not, nor which shortcuts are taken. LoRAs and ControlNets
    that the model has are part of it, their scales free. JaxsdError for a request that cannot be.
    """
    if batch_size is None:
        batch_size = pipe.default_batch_size(height, width)
    if batch_size < 1:
        raise JaxsdError(f"batch_size must be at least 1, not {batch_size}")
    height, width = height or pipe.default_size[0], width or pipe.default_size[1]
    sampler = sampler or pipe.default_sampler
    scale = pipe.default_guidance_scale if guidance_scale is None else guidance_scale
    white = Image.new("RGB", (width, height), "white")
    # Where there are LoRAs a callback has them added beforehand: other programs
    callbacks = (None, lambda i, t, latents: None) if pipe.loras else (None,)
    with pipe.programs.recording() as made:
        for callback in callbacks:
            pipe(
                "",
                range(batch_size),
                2 if image else 1,  # of which the default strength leaves one
                scale,
                height=height,
                width=width,
                sampler=sampler,
                clip_skip=clip_skip,
                chunks=chunks,
                shortcuts=shortcuts,
                image=white if image else None,
                mask=white if mask else None,
                control_images=[white] * len(pipe.controlnets),
                callback=callback,
            )
    settings = {"batch_size": batch_size, "height": height, "width": width, "sampler": sampler}
    settings["guidance"] = "yes" if scale > 1 and not pipe.guidance_embedded else "no"
    settings["quantize"] = "yes" if pipe.quantised else "no"
    usual = dataclasses.asdict(Shortcuts())
    taken = [name for name, value in dataclasses.asdict(shortcuts).items() if value != usual[name]]
    settings["shortcuts"] = " and ".join(taken) or "no"
    programs.save(made, folder, pipe.compiled_for, settings)
    return made
