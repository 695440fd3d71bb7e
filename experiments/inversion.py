"""Measures DDIM inversion on held-out digits: `python experiments/inversion.py` prints the table.

Pictures of scans that no model was trained on go to noise and come back in so many steps each way.
RMSE: between their latents and those that came back. PSNR: of the pictures decoded from these
against the originals, uint8; "VAE alone" is what is lost without going anywhere.
"""

import dataclasses

import numpy as np
import tyro

import jaxsd
from jaxsd.data import digits
from jaxsd.editing.inversion import reconstruct
from jaxsd.evaluation.similarity import psnr
from jaxsd.pictures import to_uint8


@dataclasses.dataclass(frozen=True)
class Options:
    """What to invert, and how."""

    model: str = "digits"
    count: int = 100
    """Pictures: the first of the held-out scans, in random colours."""
    steps: tuple[int, ...] = (10, 20, 50, 100, 200)


def pictures_of_scans(count: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """uint8 pictures [n, 32, 32, 3] of held-out scans, and captions that name all of each."""
    rng, (scans, labels) = np.random.default_rng(seed), digits.load_scans("test")
    drawn = [digits.colour_scan(scan, rng) for scan in scans[:count]]
    captions = [
        f"a {stroke} {digits.DIGIT_WORDS[label]} on a {background} background"
        for (_, stroke, background), label in zip(drawn, labels[:count], strict=True)
    ]
    return to_uint8(np.stack([2 * picture - 1 for picture, *_ in drawn])), captions


def main(options: Options) -> None:
    pipe = jaxsd.load(options.model)
    pictures, captions = pictures_of_scans(options.count)
    rows, kinds = [], {"its caption": captions, "no prompt": ""}
    for steps in options.steps:
        row = [str(steps)]
        for prompts in kinds.values():
            found = reconstruct(pipe, list(pictures), prompts, steps)
            quality = psnr(pipe.decode_array(found.back), pictures)
            row += [f"{np.sqrt(np.square(found.rmse).mean()):.4f}", f"{quality.mean():.2f}"]
        rows.append(row)
    alone = psnr(pipe.decode_array(found.latents), pictures).mean()
    rows.append(["VAE alone", *["0", f"{alone:.2f}"] * len(kinds)])
    heads = ["steps", *[f"{what}, {kind}" for kind in kinds for what in ("RMSE", "PSNR")]]
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
