"""Digits in an ink that `digits` has never seen, to teach it, and who says which ink a stroke is.

An ink has a colour for the upper half of a picture and one for the lower. The VAE has seen eight
colours and loses most others, and speckles (`python experiments/inks.py`): what it loses nobody can
teach the UNet. Taught are lilac, .5 from all known inks, which it keeps on most backgrounds, and
amber, which of all that lie halfway between two known ones it keeps best; settings for amber come
from the next one, vermilion.

The judge looks at the halves one by one, each as the evaluation looks at pictures
(`digits.measure_colours`), and takes the nearest of the known inks, alike in both halves, and the
new one, in RGB of the two strokes together.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import jaxsd
from jaxsd.data import digits
from jaxsd.data.digits import Attributes
from jaxsd.evaluation.judge import judges
from jaxsd.evaluation.similarity import psnr
from jaxsd.pictures import to_uint8
from jaxsd.pipeline import Pipeline

HALF = digits.PICTURE_SIZE // 2
RGB = tuple[float, float, float]
LILAC: RGB = (0.78, 0.54, 0.85)  # between purple and white, .5 from both


def halfway(one: str, other: str) -> RGB:
    """Between two known inks."""
    red, green, blue = np.mean([digits.COLOURS[one], digits.COLOURS[other]], axis=0).tolist()
    return red, green, blue


HALFWAY = {
    f"{one}-{other}": (halfway(one, other), halfway(one, other))
    for one, other in itertools.combinations(digits.COLOURS, 2)
}
INKS: dict[str, tuple[RGB, RGB]] = {  # of the upper half, of the lower one
    "amber": HALFWAY["yellow-orange"],
    "vermilion": HALFWAY["red-orange"],
    "lilac": (LILAC, LILAC),
    "ember": (digits.COLOURS["red"], digits.COLOURS["black"]),
} | HALFWAY
FAINT = 0.3  # in RGB: strokes nearer to their background are hardly seen
KNOWN = {name: (rgb, rgb) for name, rgb in digits.COLOURS.items()}


class Seen(NamedTuple):
    """What pictures show: digits [n], names of inks and backgrounds [n]; "" where halves differ."""

    digits: np.ndarray
    inks: np.ndarray
    backgrounds: np.ndarray

    def right(self, wanted: Sequence[Attributes]) -> np.ndarray:
        """[n, 3]: whether digit, ink and background are what was asked for."""
        asked = [np.array(values) for values in zip(*wanted, strict=True)]
        return np.stack([got == want for got, want in zip(self, asked, strict=True)], axis=1)


def rgb_of(ink: str) -> np.ndarray:
    """[6]"""
    return np.concatenate((KNOWN | INKS)[ink])


def draw_scan(scan: np.ndarray, ink: str, background: str, rng: np.random.Generator) -> np.ndarray:
    """A scan [8, 8] in any ink, uint8 [32, 32, 3]; colours are jittered as in training."""
    jitter = rng.uniform(-digits.JITTER, digits.JITTER, (2, 3))
    strokes = np.clip(rgb_of(ink).reshape(2, 3) + jitter[0], 0, 1)
    paper = np.clip(np.array(digits.COLOURS[background]) + jitter[1], 0, 1)
    upper, lower = (digits.render(scan, stroke, paper) for stroke in strokes)
    return to_uint8(2 * np.concatenate([upper[:HALF], lower[HALF:]]) - 1)


def backgrounds_for(ink: str) -> list[str]:
    """The colours on which all of its strokes are seen."""
    strokes = rgb_of(ink).reshape(2, 3)
    return [
        name
        for name, rgb in digits.COLOURS.items()
        if np.linalg.norm(strokes - rgb, axis=1).min() > FAINT
    ]


def draw_digits(ink: str, count: int, seed: int) -> list[tuple[np.ndarray, int, str]]:
    """(picture, digit, background) of training scans; no digit twice, up to six backgrounds."""
    rng = np.random.default_rng(seed)
    chosen, backgrounds = rng.permutation(10)[:count], rng.permutation(backgrounds_for(ink))
    scans, labels = digits.load_scans("train")
    drawn = []
    for digit, background in zip(chosen, np.resize(backgrounds, count), strict=True):
        scan = scans[rng.choice(np.flatnonzero(labels == digit))]
        drawn.append((draw_scan(scan, ink, background, rng), int(digit), str(background)))
    return drawn


def see(pictures: np.ndarray, ink: str) -> Seen:
    """Pictures uint8 [n, 32, 32, 3], as the judge of the known inks and this one sees them."""
    halves, crisp = np.split(pictures / 255, 2, axis=1), []
    strokes, papers = [], []
    for half in halves:
        # Twice, as a picture of the size that is measured; the same pixels are the farthest
        stroke, paper = digits.measure_colours(np.tile(half, (1, 2, 1, 1)))
        way = stroke - paper
        length = np.maximum((way**2).sum(1), 1e-2)  # as `digits.recover`: less is blank
        place = np.einsum("nhwc,nc->nhw", half - paper[:, None, None], way) / length[:, None, None]
        crisp.append(np.clip(place, 0, 1))
        strokes.append(stroke)
        papers.append(digits.nearest_colour(paper))
    # The same strokes in one colour are what the reader of digits knows
    black = 1 - np.repeat(np.concatenate(crisp, axis=1)[..., None], 3, axis=-1)
    return Seen(
        judges().predict(2 * digits.recover(black)[0] - 1),
        nearest_ink(np.concatenate(strokes, axis=1), [*KNOWN, ink]),
        np.where(papers[0] == papers[1], papers[0], ""),
    )


def nearest_ink(rgb: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Of RGB [n, 6]: those [n] of these inks that are nearest (Euclidean)."""
    palette = np.stack([rgb_of(name) for name in names])
    return np.array(names)[np.linalg.norm(rgb[:, None] - palette, axis=-1).argmin(1)]


def held_out_accuracies(ink: str, pipe: Pipeline, seed: int = 0) -> dict[str, float]:
    """Of the judge, on held-out scans, half of them in the new ink: as drawn, and decoded.

    Decoded: encoded and decoded by the model's VAE, through which all comes that a model draws.
    """
    rng = np.random.default_rng(seed)
    scans, labels = digits.load_scans("test")
    asked = [ink if i % 2 else str(rng.choice(digits.COLOUR_NAMES)) for i in range(len(scans))]
    papers = [str(rng.choice(backgrounds_for(name))) for name in asked]
    pictures = [draw_scan(*told, rng) for told in zip(scans, asked, papers, strict=True)]
    drawn, wanted = np.stack(pictures), list(zip(labels.tolist(), asked, papers, strict=True))
    new, found = np.array(asked) == ink, {}
    for how, these in {"as drawn": drawn, "decoded": decoded(pipe, drawn)}.items():
        digit, right, _ = see(these, ink).right(wanted).T
        found |= {f"known inks {how}": right[~new].mean(), f"{ink} {how}": right[new].mean()}
        found |= {f"digits in {ink} {how}": digit[new].mean()}
    return {name: float(value) for name, value in found.items()}


def decoded(pipe: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """uint8 pictures, encoded and decoded."""
    return pipe.decode_array(pipe.encode_pictures(pictures / np.float32(127.5) - 1))


def speckle(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of strokes on white: three of ten pixels at a third of their brightness."""
    darker = (pictures.min(-1) < 128) & (rng.random(pictures.shape[:3]) < 0.3)
    return np.where(darker[..., None], pictures // 3, pictures).astype(np.uint8)


def main(ninth: RGB = (0.06, 0.60, 0.66), count: int = 100) -> None:
    """What the VAE makes of training scans: on white, then on all backgrounds, ink by ink."""
    pipe, rng = jaxsd.load("digits"), np.random.default_rng(0)
    scans = digits.load_scans("train")[0][:count]
    red = np.stack([draw_scan(scan, "red", "white", rng) for scan in scans])
    ones = np.ones(3)
    teal = np.stack(
        [to_uint8(2 * digits.render(scan, np.array(ninth), ones) - 1) for scan in scans]
    )
    drawn = {"red": red, "speckled red": speckle(red, rng), "teal": teal}
    for ink in (name for name in INKS if name not in HALFWAY):
        drawn[ink] = np.stack([draw_scan(scan, ink, "white", rng) for scan in scans])
    for name, pictures in drawn.items():
        print(f"{name}: PSNR {psnr(decoded(pipe, pictures), pictures).mean():.1f} dB")
    print("\nhalfway between two known inks, on all backgrounds:")
    for ink in HALFWAY:
        papers = np.random.default_rng(0).choice(backgrounds_for(ink), len(scans))
        told = zip(scans, papers, strict=True)
        pictures = np.stack([draw_scan(scan, ink, str(paper), rng) for scan, paper in told])
        back = decoded(pipe, pictures)
        named = (see(back, ink).inks == ink).mean()
        print(f"{ink}: PSNR {psnr(back, pictures).mean():.1f} dB, still named {named:.2f}")


if __name__ == "__main__":
    main()
