"""`sample.py PROMPT...`: pictures from prompts, as PNG files that say how they were made."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsd.cli.several import Several
from jaxsd.cli.shared import Shared, check_writable
from jaxsd.cli.together import Together
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Options(Together, Shared):
    """Make pictures from prompts, and from pictures; several processes share them out."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """What to draw, one or several; (word:1.3) weighs a word. A pixel model takes the names of its
    classes (7, seven), an edit its own prompt where none is given."""
    prompts_file: Path | None = None
    """Many prompts, a line each; a line that begins with { is JSON with prompt and, if wanted, seed
    and negative_prompt. What is in the folder already is not made again. Processes and devices
    share the pictures out; picture k has the seed SEED + k where its line names none."""
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
    control_image: Several[str] = ()
    """For each --controlnet what it looks at."""
    control_scale: Several[float] = ()
    """How much each ControlNet says: one for all, or one for each; by default 1."""
    refiner: str | None = None
    """A Stable Diffusion XL refiner that takes over for the last steps."""
    refiner_start: float = 0.8
    """At this share of the schedule."""

    compiled: str | None = None
    """What `jaxsd compile` made for these options: nothing is traced, and little compiled."""

    batch_size: int | None = None
    """Pictures at a time, with --prompts-file on each device; by default 4 of 512 px or more, up to
    32 of smaller ones."""
    preview_every: int = 0
    """Also write a strip with the picture after every so many steps, and an animated WebP."""
    preview_with: str = "vae"
    """What decodes the strip: vae, linear (at once, and small), or a TAESD folder."""
    show: Literal["auto", "kitty", "iterm2", "sixel", "off"] = "auto"
    """Pictures in the terminal, those on the way with --preview-every too: by the protocol that it
    speaks, by this one whatever it says, or none. Never where the output is no terminal."""
    out: Path = Path("outputs")
    """The folder to write into; nothing there is overwritten."""
    json: bool = False
    """Print a JSON object instead of lines."""


def run(options: Options) -> Any:
    """Makes the pictures: where they are, or of a file of prompts the `Drawn` report."""
    _check(options)
    options.meet()
    if options.prompts_file is not None:
        from jaxsd.cli.sampling.many import draw_file

        return draw_file(options)
    from jaxsd.cli.sampling.few import draw_prompts

    return draw_prompts(options)


def _check(options: Options) -> None:
    """What can be refused before a model is loaded."""
    for name in ("num_images", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise JaxsdError(f"{name} must be at least 1, not {value}")
    for name in ("preview_every", "vae_tile"):
        if getattr(options, name) < 0:
            raise JaxsdError(f"{name} must not be negative: {getattr(options, name)}")
    for name, needed in (("control_scale", "control_image"), ("mask_image", "init_image")):
        if getattr(options, name) and not getattr(options, needed):
            raise JaxsdError(f"{name} says something about {needed}: give that, too")
    if options.prompts_file is not None:
        if options.prompts:
            raise JaxsdError("prompts come from prompts_file or from the command line, not both")
        if options.preview_every:
            raise JaxsdError("preview_every is for prompts of the command line: leave it out")
        if options.show not in ("auto", "off"):
            raise JaxsdError(
                f"show {options.show} is for prompts of the command line: leave it out"
            )
    if options.compiled and options.refiner:
        raise JaxsdError("of a refiner no programs are made ahead: leave out refiner or compiled")
    check_writable(options.out)


def main(argv: list[str] | None = None) -> None:
    """Parses the options of `sample.py`, makes the pictures and prints where they are."""
    options = tyro.cli(Options, prog="sample.py", args=argv)
    made = run(options)
    if options.prompts_file is not None:
        print(json.dumps(made.to_json()) if options.json else made)
    elif options.json:
        print(json.dumps({"images": [str(path) for path in made]}))
    else:
        print("\n".join(str(path) for path in made))
