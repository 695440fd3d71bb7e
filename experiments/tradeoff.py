"""Curves of editing: how often an edit is right, against how far the picture was left for it."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

REACH = 0.4  # of distance, over which the area under a curve is taken
DRAWS = 1000  # of pictures, with replacement, of which an interval is taken


@dataclasses.dataclass(frozen=True)
class Curve:
    """One method, of knobs k, on edits [p, e]: p pictures, e edits of each.

    right: [k, p, e] in [0, 1], the share of seeds whose edit is right. distance: [k, p, e], the
    mean over seeds. The picture itself, distance 0 and never right, is a point of every curve.
    """

    knobs: Sequence[float]
    right: np.ndarray
    distance: np.ndarray

    def points(self, of: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(distance [k], share that is right [k]) of all pictures, or of those named in `of`."""
        of = np.arange(self.right.shape[1]) if of is None else of
        return self.distance[:, of].mean((1, 2)), self.right[:, of].mean((1, 2))

    def only(self, edits: Sequence[int]) -> "Curve":
        """Of some of the edits of each picture."""
        at = list(edits)
        return Curve(self.knobs, self.right[:, :, at], self.distance[:, :, at])


def envelope(distance: np.ndarray, right: np.ndarray, at: float | np.ndarray) -> np.ndarray:
    """The best that points reach without going further than `at`.

    Between two neighbours a method can be mixed, edit by edit, hence the line between them; beyond
    the last point it stays.
    """
    order = np.argsort(distance, kind="stable")
    x = np.concatenate([[0.0], distance[order]])
    y = np.maximum.accumulate(np.concatenate([[0.0], right[order]]))
    return np.interp(at, x, y)


def area(distance: np.ndarray, right: np.ndarray, reach: float = REACH) -> float:
    """The mean of `envelope` over distances from 0 to `reach`: one number for a curve."""
    grid = np.linspace(0, reach, 401)
    return float(envelope(distance, right, grid).mean())


def gaps(curve: Curve, other: Curve, of: np.ndarray | None = None) -> np.ndarray:
    """[k] how much more often a curve's points are right than another is at the same distance."""
    distance, right = curve.points(of)
    return right - envelope(*other.points(of), distance)


def interval(figure: Callable[[np.ndarray], np.ndarray], pictures: int, seed: int = 0):
    """(low, high): 95 % of what a figure is of pictures drawn with replacement, all of their edits.

    figure: of the numbers of pictures [p], which may come more than once.
    """
    rng = np.random.default_rng(seed)
    drawn = np.stack([figure(rng.integers(pictures, size=pictures)) for _ in range(DRAWS)])
    return np.percentile(drawn, 2.5, axis=0), np.percentile(drawn, 97.5, axis=0)
