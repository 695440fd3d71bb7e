"""A scripted TEdBench in small (Kawar et al. 2022): edits of single digits, and what each is worth.

Each scan, coloured, is to be edited in three ways: to another digit, in another stroke colour, on
another background. Source, target and colours are drawn by a seed, so what an edit should do is
known, and judges (`jaxsd.evaluation.judge`, `digits.recover`) say whether it did.

How much of a picture an edit kept is the RMSE to the input over all channels: it sees shape and
colours alike, as the methods do. It has two blind spots, which other figures light up. An edit has
to change something: `Edit.oracle` is one that changes as little as can be told (the same scan in
the other colour; of another digit, the real scan that is nearest). And a large plain area counts
more than the digit on it: `Scores.shape` is the distance of the two scans in the judge's features,
which know of no colours; an edit of a colour should leave it 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsd.data import digits
from jaxsd.data.digits import Attributes
from jaxsd.evaluation.judge import judges
from jaxsd.pictures import to_uint8

KINDS = ("digit", "stroke", "background")  # which of the attributes an edit changes


class Edit(NamedTuple):
    """picture, oracle: uint8 [32, 32, 3]. seed: of the samplers; no two edits share it."""

    kind: str
    picture: np.ndarray
    source: Attributes
    target: Attributes
    oracle: np.ndarray
    seed: int

    @property
    def source_prompt(self) -> str:
        return describe(self.source)

    @property
    def prompt(self) -> str:
        return describe(self.target)


class Scores(NamedTuple):
    """Of edited pictures, arrays [n].

    changed: whether the attribute that was to change is what was asked for. right: whether all
    three are. rmse: to the input, of pixels in [0, 1]. shape: distance of the scans in the judge's
    features. to_oracle: RMSE to the oracle's picture.
    """

    changed: np.ndarray
    right: np.ndarray
    rmse: np.ndarray
    shape: np.ndarray
    to_oracle: np.ndarray


def describe(attributes: Attributes) -> str:
    """The caption that names everything: "a red seven on a white background"."""
    digit, stroke, background = attributes
    assert digit is not None and stroke is not None and background is not None
    return f"{a(stroke)} {digits.DIGIT_WORDS[digit]} on {a(background)} background"


def a(word: str) -> str:
    """The word with its article."""
    return f"an {word}" if word == "orange" else f"a {word}"


def draw_edits(split: str, count: int, seed: int = 0) -> list[Edit]:
    """Three edits, in the order of KINDS, of each of `count` scans, as many of every digit.

    Everything about a picture is drawn with its own generator: fewer pictures are the first ones.
    Colours are jittered as in training; the one that an oracle changes is the palette's own.
    """
    scans, labels = digits.load_scans(split)
    order = np.random.default_rng(seed).permutation(len(scans))
    by_digit = [order[labels[order] == digit] for digit in range(10)]
    edits = []
    for i in range(count):
        digit = i % 10
        scan = scans[by_digit[digit][i // 10]]
        rng = np.random.default_rng([seed, i])
        stroke, background, *others = rng.permutation(digits.COLOUR_NAMES)
        rgb = np.array([digits.COLOURS[name] for name in (stroke, background)])
        rgb = np.clip(rgb + rng.uniform(-digits.JITTER, digits.JITTER, rgb.shape), 0, 1)
        other = int((digit + rng.integers(1, 10)) % 10)
        new = [np.array(digits.COLOURS[name]) for name in others[:2]]
        source = (digit, str(stroke), str(background))
        done = {
            "digit": ((other, *source[1:]), (nearest_scan(scan, other), *rgb)),
            "stroke": ((digit, str(others[0]), source[2]), (scan, new[0], rgb[1])),
            "background": ((*source[:2], str(others[1])), (scan, rgb[0], new[1])),
        }
        picture = _uint8(digits.render(scan, *rgb))
        for k, kind in enumerate(KINDS):
            target, drawn = done[kind]
            oracle = _uint8(digits.render(*drawn))
            edits.append(Edit(kind, picture, source, target, oracle, 3 * i + k))
    return edits


def nearest_scan(scan: np.ndarray, digit: int) -> np.ndarray:
    """The training scan [8, 8] of a digit that differs least from a scan."""
    scans, labels = digits.load_scans("train")
    of_digit = scans[labels == digit]
    return of_digit[((of_digit - scan) ** 2).sum((1, 2)).argmin()]


def _uint8(picture: np.ndarray) -> np.ndarray:
    return to_uint8(2 * picture - 1)


def score(edits: Sequence[Edit], edited: np.ndarray) -> Scores:
    """What pictures uint8 [n, 32, 32, 3], one of each edit, are worth."""
    given = np.stack([edit.picture for edit in edits])
    scans, strokes, backgrounds = digits.recover(edited / 255)
    seen = (judges().predict(2 * scans - 1), strokes, backgrounds)
    hits = np.array(
        [
            [want == found[i] for want, found in zip(edit.target, seen, strict=True)]
            for i, edit in enumerate(edits)
        ]
    )
    asked = [KINDS.index(edit.kind) for edit in edits]
    before, after = (judges().features(2 * s - 1) for s in (digits.recover(given / 255)[0], scans))
    return Scores(
        changed=hits[np.arange(len(edits)), asked],
        right=hits.all(1),
        rmse=rmse(edited, given),
        shape=np.linalg.norm(after - before, axis=1),
        to_oracle=rmse(edited, np.stack([edit.oracle for edit in edits])),
    )


def rmse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] of uint8 pictures [n, h, w, c], on the scale of [0, 1]."""
    return np.sqrt((((a.astype(float) - b.astype(float)) / 255) ** 2).mean((1, 2, 3)))


def psnr(error: np.ndarray) -> np.ndarray:
    """In dB, of what `rmse` gives; no more than 100, where pictures are the same."""
    return -20 * np.log10(np.maximum(error, 1e-5))
