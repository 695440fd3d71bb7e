"""Draws the README's pictures from the models that ship: `python docs/pictures.py`."""

from pathlib import Path

import numpy as np
from PIL import Image

import jaxsd
from jaxsd.pictures import tile

IMAGES = Path(__file__).parent / "images"
SCALES = (1.1, 3, 7, 14)
PROMPT = "a red seven on a white background"
# Rows of docs/distillation.md: the teacher, and students from the same noise
STEPS = (("digits", 50), ("digits-4step", 4), ("digits-2step", 2), ("digits-1step", 1))
STEPS += (("digits-lcm", 4), ("digits-lcm", 2), ("digits-lcm", 1))


def enlarge(picture: np.ndarray, times: int) -> Image.Image:
    """Whole pixels, so that what is seen is what the model drew."""
    image = Image.fromarray(picture)
    size = (image.width * times, image.height * times)
    return image.resize(size, Image.Resampling.NEAREST)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    pipe = jaxsd.load("digits")
    rows = [pipe(PROMPT, [0, 1, 2, 3], steps=50, guidance_scale=scale) for scale in SCALES]
    grid = tile([np.asarray(image) for row in rows for image in row], 4)
    enlarge(grid, 3).save(IMAGES / "guidance.png")

    colours = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
    words = "zero one two three four five six seven eight nine".split()
    prompts = [
        f"a {colours[i % 8]} {words[i % 10]} on a {colours[(i + 3 + i // 8) % 8]} background"
        for i in range(40)
    ]
    images = pipe(prompts, range(40), steps=50, guidance_scale=3)
    enlarge(tile([np.asarray(image) for image in images], 10), 2).save(IMAGES / "digits.png")

    rows = []
    for name, steps in STEPS:
        rows += jaxsd.load(name)(prompts[:10], range(10), steps=steps, guidance_scale=3)
    grid = tile([np.asarray(image) for image in rows], 10)
    enlarge(grid, 2).save(IMAGES / "students.png")

    pipe = jaxsd.load("digits-ddpm")
    names = [str(i % 10) for i in range(40)]
    images = pipe(names, range(40), steps=50, guidance_scale=1, sampler="ddim")
    scans = [np.asarray(image)[:, :, None] for image in images]
    enlarge(tile(scans, 10), 6).save(IMAGES / "digits-ddpm.png")


if __name__ == "__main__":
    main()
