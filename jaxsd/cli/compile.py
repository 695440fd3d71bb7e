"""`jaxsd compile MODEL`: the programs of sampling ahead of time, for `sample.py --compiled`."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import tyro

from jaxsd.cli.several import Several, split


@dataclasses.dataclass(frozen=True)
class Options:
    """Make the programs of sampling ahead of time: `sample.py --compiled FOLDER` traces nothing.

    Prompts, seeds, steps, scales and strength stay free. What is compiled for this machine goes
    into the cache of compiled programs; elsewhere the same FOLDER is compiled at its first use.
    """

    model: tyro.conf.Positional[str]
    """A model that ships, a diffusers folder, a single file or a Hub id."""
    out: Path = Path("compiled")
    """The folder to write into."""
    height: int | None = None
    """In pixels; by default what the model was trained on."""
    width: int | None = None
    batch_size: int | None = None
    """Pictures at a time, as sample.py's --batch-size; by default what that takes by default."""
    sampler: str | None = None
    """By default the model's own."""
    guidance_scale: float | None = None
    """At most 1: without guidance. Any other is as good as any other."""
    image: bool = False
    """Also for --init-image."""
    mask: bool = False
    """Also for --mask-image; needs --image."""
    clip_skip: int = 0
    chunks: int = 1
    """Of long prompts: how many times the text tower's length they take."""
    vae_tile: int = 0
    """The side of the tiles that pictures are decoded in."""
    lora: Several[str] = ()
    """A LoRA of the same shape as those to come; may be repeated."""
    controlnet: Several[str] = ()
    """A ControlNet's folder or Hub id; may be repeated."""
    variant: str | None = None
    """Which files of a folder that holds several, such as fp16."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and computation."""
    json: bool = False
    """Print a JSON object instead of lines."""


# What says which model, not which request.
MODEL = ("model", "out", "vae_tile", "lora", "controlnet", "variant", "dtype", "json")


def main(argv: list[str] | None = None) -> None:
    import jax.numpy as jnp

    from jaxsd import pipeline
    from jaxsd.ahead import compile_ahead

    options = tyro.cli(Options, args=argv, prog="jaxsd compile")
    pipe = pipeline.load(
        options.model, getattr(jnp, options.dtype), options.variant, controlnets=options.controlnet
    )
    for text in options.lora:
        pipe.add_lora(*split(text, float, 1.0))
    pipe.vae_tile = options.vae_tile
    request = {n: v for n, v in dataclasses.asdict(options).items() if n not in MODEL}
    made = {
        program.file: len(program.data) for program in compile_ahead(pipe, options.out, **request)
    }
    if options.json:
        print(json.dumps({"folder": str(options.out), "programs": made}))
        return
    for file, size in made.items():
        print(f"{options.out / file}: {size / 1e3:,.0f} kB")
