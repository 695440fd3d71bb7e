"""`sample.py PROMPT...`: pictures from prompts, as PNG files that say how they were made."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsd import __version__
from jaxsd.cli.several import Several, split
from jaxsd.cli.together import NAMES, Together
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Options(Together):
    """Make pictures from prompts, and from pictures; several processes share them out."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """What to draw, one or several; (word:1.3) weighs a word. A pixel model takes the names of its
    classes (7, seven), an edit its own prompt where none is given."""
    model: str = "digits"
    """A model that ships (digits, digits-ddpm), a diffusers folder, a single file (.safetensors,
    .ckpt), a Hub id, or the edit that `train.py imagic` made."""
    imagic_eta: float | None = None
    """Of an edit: from the picture (0) to the prompt (1), or past it; by default .7."""
    negative_prompt: str | None = None
    """What to stay away from."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Pictures of each prompt, with the seeds SEED, SEED + 1, ..."""
    seed: int = 0
    steps: int | None = None
    """By default 30, or what a distilled model is made for."""
    guidance_scale: float | None = None
    """How hard to follow the prompt: 1 as trained, more is harder. By default 7.5, or what a
    distilled model is made for."""
    guidance_rescale: float = 0.0
    """From 0 to 1: tames the contrast of a high guidance scale."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where the noise level sigma / alpha is from the first to the second (inf for no
    limit): elsewhere one pass instead of two. Faster, another picture."""
    cache_every: int = 1
    """Compute the UNet's deep blocks in every so many steps alone. Faster, a little worse."""
    cache_branch: int = 0
    """Around how many skip connections, less one, the outer blocks are computed between them."""
    quantize: Literal["int8", "fp8"] | None = None
    """Keep the UNet's weights in eight bits: less memory, a little worse. LoRAs are merged."""
    sampler: str | None = None
    """ddim, euler, dpmpp_2m, ...: an unknown name lists all; by default the model's own."""
    eta: float = 0.0
    """With ddim: the share of noise renewed on the way, from 0 (none) to 1."""
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    """How the steps are spread over the schedule; by default as the model says."""
    sigmas: Literal["plain", "karras", "exponential", "beta"] | None = None
    """Another spread of the noise levels, where the sampler knows it; by default the model's."""
    height: int | None = None
    """In pixels; by default what the model was trained on, in the shape of --init-image."""
    width: int | None = None
    clip_skip: int = 0
    """How many last layers of the text tower to leave out."""
    long_prompts: bool = False
    """Read prompts longer than the text tower in chunks, instead of cutting them."""

    init_image: str | None = None
    """A picture to start from (or, for InstructPix2Pix, to edit)."""
    strength: float | None = None
    """How far to leave it, from 0 to 1; by default .8, with a mask 1."""
    mask_image: str | None = None
    """Light where the picture is to be painted anew."""
    image_guidance_scale: float = 1.5
    """How closely InstructPix2Pix keeps to the picture."""
    controlnet: Several[str] = ()
    """A ControlNet's folder or Hub id; may be repeated, each with a --control-image."""
    control_image: Several[str] = ()
    control_scale: Several[float] = ()
    """How much each ControlNet says: one for all, or one for each; by default 1."""
    refiner: str | None = None
    """A Stable Diffusion XL refiner that takes over for the last steps."""
    refiner_start: float = 0.8
    """At this share of the schedule."""

    lora: Several[str] = ()
    """A LoRA file, with its scale if it is not 1: style.safetensors:0.8; may be repeated."""
    textual_inversion: Several[str] = ()
    """A file of an embedding, with its token if it names none: cat.pt:<cat>; may be repeated."""
    variant: str | None = None
    """Which files of a folder that holds several, such as fp16."""
    family: str | None = None
    """What a single file holds where it cannot be told: sd2 or sd2-v."""
    config: str | None = None
    """For a single file: a diffusers folder with its configs."""
    tokenizer: str | None = None
    """For a single file: a folder with CLIP's vocabulary."""
    use_ema: bool = False
    """Take a single file's averaged weights, if it holds them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and computation."""

    batch_size: int = 4
    """Pictures at a time."""
    vae_tile: int = 0
    """Decode in tiles with this side in latents (64, say): large pictures in little memory."""
    preview_every: int = 0
    """Also write a strip with the picture after every so many steps."""
    preview_with: str = "vae"
    """What decodes the strip: vae, linear (at once, and small), or a TAESD folder."""
    out: Path = Path("outputs")
    """The folder to write into; nothing there is overwritten."""
    json: bool = False
    """Print a JSON object instead of lines."""


@dataclasses.dataclass(frozen=True)
class Job:
    prompt: str
    seed: int


def run(options: Options) -> list[Path]:
    """Makes the pictures and returns where they are: the grid, if there is one, last.

    Of several processes each makes, and returns, its own batches, and there is no grid.
    """
    import jax
    import numpy as np

    from jaxsd import processes
    from jaxsd.pictures import tile, write_png
    from jaxsd.previews import previewer

    _check(options)
    options.meet()
    pipe, edited, refiner = _load(options)
    options = _with_defaults(options, pipe, edited)
    if not options.prompts and pipe.takes_prompts:
        raise JaxsdError('give at least one prompt, such as "a red seven on a white background"')
    prompts = options.prompts or ("",)
    preview = previewer(pipe, options.preview_with) if options.preview_every else None
    settings = _settings(options, pipe, prompts)
    sampler = options.sampler or pipe.default_sampler
    last = int(pipe.plan_steps(sampler, settings["steps"])[0].count)
    jobs = [Job(p, options.seed + i) for p in prompts for i in range(options.num_images)]
    number = processes.agree(_next_number(options.out))
    paths, arrays = [], []
    batches = list(enumerate(_batches(jobs, options.batch_size)))
    for rank, batch in batches[jax.process_index() :: jax.process_count()]:
        frames: list[Any] = []

        def look(i: int, t: float, latents: Any, frames=frames) -> None:
            if (i + 1) % options.preview_every == 0 or i + 1 == last:
                assert preview is not None
                frames.append(preview(latents))

        # The last batch is filled up, so that it runs in the program of the others.
        full = (batch * options.batch_size)[: min(options.batch_size, len(jobs))]
        pictures = pipe(
            [job.prompt for job in full],
            [job.seed for job in full],
            cond=edited and edited.told([job.prompt for job in full], options.imagic_eta),
            callback=look if preview else None,
            refiner=refiner,
            refiner_start=options.refiner_start,
            **settings,
        )
        for i, job in enumerate(batch):
            stem = f"{number + rank * options.batch_size + i:05}-{_slug(job.prompt)}-seed{job.seed}"
            notes = dataclasses.asdict(job) | _notes(options, sampler)
            width, height = pictures[i].size
            notes |= {"height": height, "width": width}
            paths.append(write_png(pictures[i], options.out / f"{stem}.png", notes))
            arrays.append(np.asarray(pictures[i]).reshape(height, width, -1))
            if frames:
                strip = tile([frame[i] for frame in frames], len(frames))
                write_png(strip, options.out / f"{stem}-preview.png", notes)
    if len(paths) > 1 and jax.process_count() == 1:
        columns = options.num_images if options.num_images > 1 else None
        grid = options.out / f"{number:05}-grid.png"
        notes = {"prompts": list(prompts), "seed": options.seed}
        notes |= _notes(options, sampler)
        paths.append(write_png(tile(arrays, columns), grid, notes))
    return paths


def _load(options: Options) -> tuple[Any, Any, Any]:
    """The pipeline, the edit if it is one's and, if one is asked for, the refiner."""
    import jax.numpy as jnp

    from jaxsd import pipeline
    from jaxsd.weights import edits

    shared = dict(
        dtype=getattr(jnp, options.dtype), variant=options.variant, tokenizer=options.tokenizer
    )
    names = ("family", "config", "use_ema")
    own = {name: getattr(options, name) for name in names if getattr(options, name)}
    edited = None
    if edits.find(options.model) is not None:
        from jaxsd.editing.imagic import load_edit

        set_there = ("variant", "family", "config", "tokenizer", "use_ema", "clip_skip")
        if given := [n for n in (*set_there, "long_prompts") if getattr(options, n)]:
            raise JaxsdError(f"the edit says which model it is of, and how prompts are read: leave "
                             f"out {', '.join(given)}")  # fmt: skip
        edited = load_edit(options.model, shared["dtype"], controlnets=options.controlnet)
    elif options.imagic_eta is not None:
        raise JaxsdError(
            f"imagic_eta is for what `train.py imagic` made: {options.model} is no edit"
        )
    if edited is not None:
        pipe = edited.pipe
    else:
        pipe = pipeline.load(options.model, controlnets=options.controlnet, **shared, **own)
    for text in options.lora:
        name, scale = split(text, float, 1.0)
        pipe.add_lora(name, scale)
    for text in options.textual_inversion:
        pipe.add_embedding(*split(text, str, None))
    if options.quantize:
        if pipe.loras:
            pipe.merge_loras()
        pipe.quantize(options.quantize)
    refiner = None if options.refiner is None else pipeline.load(options.refiner, **shared)
    changes: dict[str, Any] = {}
    if options.spacing:
        changes["timestep_spacing"] = options.spacing
    if options.sigmas:
        kinds = ("karras", "exponential", "beta")
        changes |= {f"use_{kind}_sigmas": kind == options.sigmas for kind in kinds}
    for each in filter(None, (pipe, refiner)):
        each.schedule = dataclasses.replace(each.schedule, **changes)
        each.vae_tile = options.vae_tile
    return pipe, edited, refiner


def _with_defaults(options: Options, pipe: Any, edited: Any) -> Options:
    """The options, with the model's own where they say nothing, and a scale that it was taught.

    Here, so that the pictures' notes name them, and a warning comes once and not once a batch.
    """
    import numpy as np

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


def _settings(options: Options, pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """What every call of the pipeline is told."""
    from jaxsd.shortcuts import Shortcuts

    texts = [*prompts, options.negative_prompt]
    scales = options.control_scale or (1.0,)
    return dict(
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
        shortcuts=Shortcuts(options.guidance_interval, options.cache_every, options.cache_branch),
        sampler=options.sampler,
        eta=options.eta,
        clip_skip=options.clip_skip,
        chunks=pipe.chunks(texts) if options.long_prompts else 1,
        height=options.height,
        width=options.width,
        image=options.init_image,
        mask=options.mask_image,
        strength=options.strength,
        image_guidance_scale=options.image_guidance_scale,
        control_images=options.control_image,
        control_scales=scales[0] if len(scales) == 1 else scales,
    )


# Of the options what does not make the picture.
NOT_NOTED = ("prompts", "seed", "num_images", "batch_size", "out", "json", "height", "width")
NOT_NOTED += ("preview_every", "preview_with", *NAMES)


def _notes(options: Options, sampler: str) -> dict[str, Any]:
    """How the pictures were made: every option that says something."""
    values = dataclasses.asdict(options) | {"sampler": sampler}
    noted = {name: value for name, value in values.items() if name not in NOT_NOTED}
    # By identity: a guidance scale of 0 equals False, and says much.
    said = {n: value for n, value in noted.items() if value is not None and value is not False}
    told = {name: value for name, value in said.items() if value != ()}
    return {"Software": f"jaxsd {__version__}", **told}


def _check(options: Options) -> None:
    """What can be refused before a model is loaded."""
    for name in ("num_images", "batch_size"):
        if getattr(options, name) < 1:
            raise JaxsdError(f"{name} must be at least 1, not {getattr(options, name)}")
    for name in ("preview_every", "vae_tile"):
        if getattr(options, name) < 0:
            raise JaxsdError(f"{name} must not be negative: {getattr(options, name)}")
    for name, needed in (("control_scale", "control_image"), ("mask_image", "init_image")):
        if getattr(options, name) and not getattr(options, needed):
            raise JaxsdError(f"{name} says something about {needed}: give that, too")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        probe = options.out / ".jaxsd-writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise JaxsdError(f"cannot write to {options.out}: {error.strerror or error}") from None


def _batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-") or "empty"


def _next_number(folder: Path) -> int:
    numbers = [int(m[1]) for p in folder.glob("*.png") if (m := re.match(r"(\d{5,})-", p.name))]
    return max(numbers, default=-1) + 1


def main(argv: list[str] | None = None) -> None:
    """Parses the options of `sample.py`, makes the pictures and prints where they are."""
    options = tyro.cli(Options, prog="sample.py", args=argv)
    paths = run(options)
    if options.json:
        print(json.dumps({"images": [str(path) for path in paths]}))
    else:
        print("\n".join(str(path) for path in paths))
