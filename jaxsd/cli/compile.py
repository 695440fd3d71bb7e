"""`jaxsd compile MODEL`: the programs of sampling ahead of time, for `sample.py --compiled`."""

import dataclasses
import json
from pathlib import Path

import tyro

from jaxsd.cli.shared import NAMES, SHORTCUTS, Shared, check_writable


@dataclasses.dataclass(frozen=True)
class Options(Shared):
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
    json: bool = False
    """Print a JSON object instead of lines."""


# What says which model, not which request.
MODEL = ("model", "out", "json", *NAMES)


def main(argv: list[str] | None = None) -> None:
    from jaxsd.ahead import compile_ahead

    options = tyro.cli(Options, args=argv, prog="jaxsd compile")
    check_writable(options.out)
    pipe = options.load(options.model)
    told = dataclasses.asdict(options)
    request = {n: v for n, v in told.items() if n not in (*MODEL, *SHORTCUTS)}
    request["shortcuts"] = options.shortcuts
    made = {
        program.file: len(program.data) for program in compile_ahead(pipe, options.out, **request)
    }
    if options.json:
        print(json.dumps({"folder": str(options.out), "programs": made}))
        return
    for file, size in made.items():
        print(f"{options.out / file}: {size / 1e3:,.0f} kB")
