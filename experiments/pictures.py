"""Draws the pictures of README and docs: `python experiments/pictures.py`."""

from pathlib import Path

import numpy as np
from PIL import Image

import jaxsd
from jaxsd.data import digits
from jaxsd.editing import mixing
from jaxsd.editing.inversion import reconstruct
from jaxsd.editing.style import restyle
from jaxsd.pictures import tile, to_uint8

IMAGES = Path(__file__).parent.parent / "docs" / "images"
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


def scans_in(colours: tuple[str, str], count: int) -> tuple[list[np.ndarray], list[str]]:
    """Held-out scans as uint8 pictures, stroke on background, and the words for their digits."""
    rng, (scans, labels) = np.random.default_rng(0), digits.load_scans("test")
    drawn = [digits.colour_scan(scan, rng, colours)[0] for scan in scans[:count]]
    words = [digits.DIGIT_WORDS[label] for label in labels[:count]]
    return [to_uint8(2 * picture - 1) for picture in drawn], words


def editing() -> None:
    """docs/editing.md: the grid of prompts and noise; inversions; styles."""
    pipe = jaxsd.load("digits")
    stops = ["a red seven on a white background", "a blue three on a yellow background"]
    latents = mixing.grid(pipe, stops, [0, 1], columns=9, rows=5, steps=50, guidance_scale=3)
    mixed = np.concatenate([pipe.decode_array(row) for row in latents])
    enlarge(tile(mixed, 9), 2).save(IMAGES / "mixing.png")

    pictures, words = scans_in(("red", "white"), 10)
    source, keep = ([f"a {c}{word} on a white background" for word in words] for c in ("red ", ""))
    rows = [pictures]
    for steps in (10, 50, 200):
        rows.append([*pipe.decode_array(reconstruct(pipe, pictures, source, steps).back)])
    enlarge(tile([p for row in rows for p in row], 10), 2).save(IMAGES / "inversion.png")

    rows = [pictures]
    for style in ("something blue", "something green", "something purple"):
        rows.append([*pipe.decode_array(restyle(pipe, pictures, style, source, keep))])
    enlarge(tile([p for row in rows for p in row], 10), 2).save(IMAGES / "style.png")


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
    editing()


if __name__ == "__main__":
    main()
