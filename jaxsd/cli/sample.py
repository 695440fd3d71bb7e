"""`sample.py PROMPT...`: pictures from prompts, as PNG files that say how they were made."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Options:
    """Make pictures from prompts."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """What to draw, one or several. A pixel model takes the names of its classes (7, seven)."""
    model: str = "digits"
    """A model that ships (digits, digits-ddpm), a diffusers folder, or a Hub id."""
    variant: str | None = None
    """Which files of a folder that holds several, such as fp16."""
    negative_prompt: str = ""
    """What to stay away from."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Pictures of each prompt, with the seeds SEED, SEED + 1, ..."""
    seed: int = 0
    steps: int = 30
    guidance_scale: float = 7.5
    """How hard to follow the prompt: 1 as trained, more is harder."""
    guidance_rescale: float = 0.0
    """From 0 to 1: tames the contrast of a high guidance scale."""
    sampler: str | None = None
    """ddim, ddpm, euler or dpmpp_2m; by default what the model's scheduler is nearest to."""
    eta: float = 0.0
    """With ddim: the share of noise renewed on the way, from 0 (none) to 1."""
    height: int | None = None
    """In pixels; by default what the model was trained on."""
    width: int | None = None
    clip_skip: int = 0
    """How many last layers of the text tower to leave out."""
    batch_size: int = 4
    """Pictures at a time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and computation."""
    preview_every: int = 0
    """Also write a strip with the picture after every so many steps."""
    out: Path = Path("outputs")
    """The folder to write into; nothing there is overwritten."""
    json: bool = False
    """Print a JSON object instead of lines."""


@dataclasses.dataclass(frozen=True)
class Job:
    prompt: str
    seed: int


def run(options: Options) -> list[Path]:
    """Makes the pictures and returns where they are: the grid, if there is one, last."""
    import jax.numpy as jnp
    import numpy as np

    from jaxsd import pipeline
    from jaxsd.pictures import tile

    _check(options)
    pipe = pipeline.load(options.model, getattr(jnp, options.dtype), options.variant)
    settings: dict[str, Any] = dict(
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
        sampler=options.sampler or pipe.default_sampler,
        eta=options.eta,
        clip_skip=options.clip_skip,
        height=pipe.default_size[0] if options.height is None else options.height,
        width=pipe.default_size[1] if options.width is None else options.width,
    )
    jobs = [Job(p, options.seed + i) for p in options.prompts for i in range(options.num_images)]
    number = _next_number(options.out)
    paths, arrays = [], []
    for batch in _batches(jobs, options.batch_size):
        frames: list[Any] = []

        def look(i: int, t: float, latents: Any, frames=frames) -> None:
            if (i + 1) % options.preview_every == 0 or i + 1 == options.steps:
                frames.append(pipe.decode_array(latents))

        # The last batch is filled up, so that it runs in the program of the others.
        full = (batch * options.batch_size)[: min(options.batch_size, len(jobs))]
        pictures = pipe(
            [job.prompt for job in full],
            [job.seed for job in full],
            negative_prompt=options.negative_prompt,
            callback=look if options.preview_every else None,
            **settings,
        )
        for i, job in enumerate(batch):
            stem = f"{number + len(paths):05}-{_slug(job.prompt)}-seed{job.seed}"
            notes = dataclasses.asdict(job) | {
                "negative_prompt": options.negative_prompt,
                **settings,
                "model": options.model,
                "dtype": options.dtype,
            }
            paths.append(write_png(pictures[i], options.out / f"{stem}.png", notes))
            arrays.append(np.asarray(pictures[i]).reshape(*pictures[i].size[::-1], -1))
            if frames:
                strip = tile([frame[i] for frame in frames], len(frames))
                write_png(strip, options.out / f"{stem}-preview.png", notes)
    if len(paths) > 1:
        columns = options.num_images if options.num_images > 1 else None
        grid = options.out / f"{number:05}-grid.png"
        notes = {"prompts": list(options.prompts), "seed": options.seed, **settings}
        paths.append(write_png(tile(arrays, columns), grid, notes))
    return paths


def write_png(picture: Any, path: Path, notes: dict[str, Any]) -> Path:
    """Writes a PIL image or uint8 array, whole or not at all, with `notes` as PNG text chunks."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from jaxsd import __version__
    from jaxsd.weights.files import replacing

    info = PngInfo()
    info.add_text("Software", f"jaxsd {__version__}")
    for name, value in notes.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        info.add_itxt(name, text)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def _check(options: Options) -> None:
    """What can be refused before a model is loaded."""
    if not options.prompts:
        raise JaxsdError('give at least one prompt, such as "a red seven on a white background"')
    for name in ("num_images", "batch_size"):
        if getattr(options, name) < 1:
            raise JaxsdError(f"{name} must be at least 1, not {getattr(options, name)}")
    if options.preview_every < 0:
        raise JaxsdError(f"preview_every must not be negative: {options.preview_every}")
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
