"""From the options of `sample.py` to a model that is told all but prompts and seeds."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsd import __version__, pipeline
from jaxsd.cli.sample import Options
from jaxsd.cli.together import NAMES
from jaxsd.errors import JaxsdError
from jaxsd.weights import edits

# Of the options what does not make the picture.
NOT_NOTED = ("prompts", "prompts_file", "seed", "num_images", "batch_size", "out", "json", "height")
NOT_NOTED += ("width", "preview_every", "preview_with", "show", "compiled", *NAMES)


@dataclasses.dataclass(frozen=True)
class Job:
    """A picture to draw. index: of the line of the file that asks for it, if one does."""

    prompt: str
    seed: int
    negative_prompt: str | None = None
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Session:
    """A model, and the options with its own defaults in them."""

    options: Options
    pipe: Any
    edited: Any = None  # of Imagic, if the model is an edit
    refiner: Any = None

    @property
    def sampler(self) -> str:
        return self.options.sampler or self.pipe.default_sampler

    @property
    def last(self) -> int:
        """The number of steps that the sampler makes."""
        return int(self.pipe.plan_steps(self.sampler, self.options.steps)[0].count)

    @property
    def batch_size(self) -> int:
        """Of each device, as asked for or as suits the model."""
        o = self.options
        return o.batch_size or self.pipe.default_batch_size(o.height, o.width)

    def rows(self, count: int) -> int:
        """How many pictures of `count` are made at a time: no more, but what is compiled for."""
        return self.batch_size if self.options.compiled else min(self.batch_size, count)

    def start(
        self, jobs: Sequence[Job], size: int, chunks: int, callback: Callable | None = None
    ) -> Any:
        """`Pipeline.start` of these pictures, and of more up to `size`: in one program for all."""
        o, scales = self.options, self.options.control_scale or (1.0,)
        full = (list(jobs) * size)[:size]
        prompts = [job.prompt for job in full]
        return self.pipe.start(
            prompts,
            [job.seed for job in full],
            negative_prompt=[job.negative_prompt for job in full],
            cond=self.edited and self.edited.told(prompts, o.imagic_eta),
            callback=callback,
            refiner=self.refiner,
            refiner_start=o.refiner_start,
            steps=o.steps,
            guidance_scale=o.guidance_scale,
            guidance_rescale=o.guidance_rescale,
            shortcuts=o.shortcuts,
            sampler=o.sampler,
            eta=o.eta,
            clip_skip=o.clip_skip,
            chunks=chunks,
            height=o.height,
            width=o.width,
            image=o.init_image,
            mask=o.mask_image,
            strength=o.strength,
            image_guidance_scale=o.image_guidance_scale,
            control_images=o.control_image,
            control_scales=scales[0] if len(scales) == 1 else scales,
        )

    @functools.cached_property
    def notes(self) -> dict[str, Any]:
        """How the pictures are made: every option that says something."""
        values = dataclasses.asdict(self.options) | {"sampler": self.sampler}
        noted = {name: value for name, value in values.items() if name not in NOT_NOTED}
        # By identity: a guidance scale of 0 equals False, and says much.
        said = {n: value for n, value in noted.items() if value is not None and value is not False}
        told = {name: value for name, value in said.items() if value != ()}
        return {"Software": f"jaxsd {__version__}", **told}

    def notes_of(self, job: Job, picture: np.ndarray) -> dict[str, Any]:
        """What a picture [h, w, c] says of itself."""
        own = {name: value for name, value in vars(job).items() if value is not None}
        height, width, _ = picture.shape
        return self.notes | own | {"height": height, "width": width}


def load(options: Options) -> Session:
    """Opens what the options name; JaxsdError if they cannot go together."""
    edited = None
    if edits.find(options.model) is not None:
        from jaxsd.editing.imagic import load_edit

        set_there = ("variant", "family", "config", "tokenizer", "use_ema", "clip_skip", "compiled")
        if given := [n for n in (*set_there, "long_prompts") if getattr(options, n)]:
            raise JaxsdError(f"the edit says which model it is of, and how prompts are read: leave "
                             f"out {', '.join(given)}")  # fmt: skip
        edited = load_edit(
            options.model, options.reading()["dtype"], controlnets=options.controlnet
        )
    elif options.imagic_eta is not None:
        raise JaxsdError(
            f"imagic_eta is for what `train.py imagic` made: {options.model} is no edit"
        )
    pipe = options.load(options.model) if edited is None else options.complete(edited.pipe)
    if options.compiled is not None:
        pipe.programs.read(options.compiled, pipe.compiled_for)
    refiner = None
    if options.refiner is not None:
        refiner = pipeline.load(options.refiner, **options.reading(), quantize=options.quantize)
    changes: dict[str, Any] = {}
    if options.spacing:
        changes["timestep_spacing"] = options.spacing
    if options.sigmas:
        kinds = ("karras", "exponential", "beta")
        changes |= {f"use_{kind}_sigmas": kind == options.sigmas for kind in kinds}
    for each in filter(None, (pipe, refiner)):
        each.schedule = dataclasses.replace(each.schedule, **changes)
        each.vae_tile = options.vae_tile
    return Session(with_defaults(options, pipe, edited), pipe, edited, refiner)


def with_defaults(options: Options, pipe: Any, edited: Any) -> Options:
    """The options, with the model's own where they say nothing, and a scale that it was taught.

    Here, so that the pictures' notes name them, and a warning comes once and not once a batch.
    """
    if edited is not None:
        from jaxsd.editing.imagic import ETA

        height, width = edited.edit.size
        options = dataclasses.replace(
            options,
            prompts=options.prompts or (edited.edit.prompt,),
            imagic_eta=ETA if options.imagic_eta is None else options.imagic_eta,
            height=options.height or height,
            width=options.width or width,
        )
    steps, scale = options.steps, options.guidance_scale
    scale = np.asarray(pipe.default_guidance_scale if scale is None else scale)
    return dataclasses.replace(
        options,
        steps=pipe.default_steps if steps is None else steps,
        guidance_scale=float(pipe.taught_scales(scale)),
    )
