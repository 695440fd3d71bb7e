"""Pictures of a class, drawn by the model that is about to learn one thing of that class.

DreamBooth (Ruiz et al. 2022, 2208.12242, section 3.2) holds the model to them, lest it forget.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxsd.data.folder import SUFFIXES
from jaxsd.errors import JaxsdError
from jaxsd.pictures import write_png
from jaxsd.pipeline import Pipeline
from jaxsd.seeds import SEEDS

NAME = re.compile(r"class-(\d{5,})\.png")  # of those that were drawn


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How to draw: picture number i has the i-th of the seeds that `seed` gives."""

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 4


def missing(folder: Path, count: int, prompt: str) -> list[int]:
    """The numbers of the pictures that are still to be drawn for `count` altogether.

    Others in the folder count as well. JaxsdError for pictures that were drawn for another prompt,
    and for an empty folder if none are to be drawn.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    drawn = {int(found[1]): path for path in files if (found := NAME.fullmatch(path.name))}
    for path in drawn.values():
        if (said := _prompt_of(path)) != prompt:
            raise JaxsdError(
                f"{path} was drawn for {said!r}, not {prompt!r}: take another folder, or remove it"
            )
    wanted = range(max(0, count - (len(files) - len(drawn))))
    if not files and not wanted:
        raise JaxsdError(
            f"{folder} holds no picture of the class, and none is to be drawn: put some there, or "
            "give num_class_images above 0"
        )
    return [number for number in wanted if number not in drawn]


def draw(
    pipe: Pipeline,
    folder: Path,
    numbers: Sequence[int],
    how: Drawing,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Draws the pictures of these numbers into class-00000.png and so on.

    Each is a function of the model, its number and `how`, and appears whole or not at all: whoever
    was interrupted draws what is `missing`. progress: told of how many each batch has made.
    """
    last = max(numbers, default=-1)
    seeds = np.random.default_rng((how.seed, 0xC1A55)).integers(SEEDS, size=last + 1)
    for start in range(0, len(numbers), how.batch_size):
        batch = numbers[start : start + how.batch_size]
        full = [*batch, *[batch[0]] * (how.batch_size - len(batch))]  # one program for all
        images = pipe(how.prompt, [int(seeds[i]) for i in full], how.steps, how.guidance_scale)
        for number, image in zip(batch, images, strict=False):
            notes = {"prompt": how.prompt, "seed": int(seeds[number])}
            write_png(image, folder / f"class-{number:05}.png", notes)
        progress(len(batch))


def _prompt_of(path: Path) -> str | None:
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            return opened.info.get("prompt")
    except Exception as error:  # a dozen kinds
        raise JaxsdError(
            f"cannot read {path}: {error}; remove it, to have it drawn again"
        ) from None
