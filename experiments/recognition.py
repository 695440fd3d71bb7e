"""Who says whether a picture shows the taught letter, and what an untaught judge makes of digits.

The reader knows three kinds of scans: the ten digits, the letter, and other letters, lest anything
that is no digit pass for it. It is fitted on real training scans and on drawings (`letters.py`) of
seeds that neither the taught pictures nor the held-out ones come from.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from letters import STROKES, draw_letters
from sklearn.svm import SVC

from jaxsd.data import digits
from jaxsd.data.digits import Attributes
from jaxsd.evaluation.judge import flatten_scans, judges, real_scans

LETTER, OTHER = 10, 11  # what the reader says beside the ten digits
TAUGHT_SEED, READER_SEED, HELD_OUT_SEED = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Reader:
    """letter: the one that counts as LETTER."""

    letter: str
    svc: SVC

    def read(self, scans: np.ndarray) -> np.ndarray:
        """What scans [n, 8, 8] of ink in [0, 1] show: a digit, LETTER or OTHER."""
        return self.svc.predict(flatten_scans(2 * scans - 1))


@functools.cache
def reader(letter: str) -> Reader:
    scans, labels = _scans(letter, "train", READER_SEED)
    return Reader(letter, SVC(C=10).fit(scans, labels))


def held_out_accuracies(letter: str) -> dict[str, float]:
    """Of the reader: on real digits, on the letter, and on other letters that it was not shown."""
    scans, labels = _scans(letter, "test", HELD_OUT_SEED)
    right = reader(letter).svc.predict(scans) == labels
    kinds = {"digits": labels < LETTER, "letter": labels == LETTER, "others": labels == OTHER}
    return {name: float(right[at].mean()) for name, at in kinds.items()}


def _scans(letter: str, split: str, seed: int, count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Real scans, `count` drawings of the letter, and as many of all others together."""
    others = sorted(STROKES.keys() - {letter})
    each = [draw_letters(other, -(-count // len(others)), seed) for other in others]
    drawn = [draw_letters(letter, count, seed), np.concatenate(each)[:count]]
    scans, labels = real_scans(split)
    flat = [flatten_scans(2 * one - 1) for one in drawn]
    names = [np.full(count, LETTER), np.full(count, OTHER)]
    return np.concatenate([scans, *flat]), np.concatenate([labels, *names])


def share_of_letter(letter: str, pictures: np.ndarray) -> float:
    """Of pictures uint8 [n, 32, 32, 3]: how many show it."""
    scans, _, _ = digits.recover(pictures / 255)
    return float((reader(letter).read(scans) == LETTER).mean())


def share_in_colours(
    letter: str, pictures: np.ndarray, colours: Sequence[tuple[str, str]]
) -> float:
    """How many show it in the stroke and on the background that were asked for."""
    scans, strokes, backgrounds = digits.recover(pictures / 255)
    seen = reader(letter).read(scans) == LETTER
    asked = np.array(colours)
    return float((seen & (strokes == asked[:, 0]) & (backgrounds == asked[:, 1])).mean())


def digits_right(pictures: np.ndarray, wanted: Sequence[Attributes]) -> tuple[float, float]:
    """(the digit is right, all is right), by the judge that has never heard of letters."""
    scans, strokes, backgrounds = digits.recover(pictures / 255)
    said = judges().predict(2 * scans - 1)
    digit = np.array([said[i] == want[0] for i, want in enumerate(wanted)])
    colours = [strokes[i] == w[1] and backgrounds[i] == w[2] for i, w in enumerate(wanted)]
    return float(digit.mean()), float((digit & np.array(colours)).mean())
