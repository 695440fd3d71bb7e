"""Means and covariances of features, gathered batch by batch and kept in files.

`Statistics` is all that the Fréchet and kernel distances need to know of a set of pictures, in
memory that does not grow with it. Files are .npz with pytorch-fid's names (`mu`, `sigma`).
"""

import dataclasses
import os
import zipfile
from collections.abc import Iterable

import numpy as np

from jaxsd.errors import Diverged, JaxsdError
from jaxsd.evaluation import metrics
from jaxsd.weights.files import as_path, reading, replacing

KEPT = 10_000  # features that are kept for kernel distances, at most: 80 MB of Inception's


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of `count` rows of features: mean [d], covariance [d, d], and KEPT rows [k, d] at most.

    A file of another program has no rows, and does not say how many there were (count 0).
    """

    count: int
    mean: np.ndarray
    covariance: np.ndarray
    rows: np.ndarray


class Running:
    """Statistics of features that come in batches, in float64.

    Each batch is centred before its squares are summed (Chan, Golub & LeVeque 1983, eq. 2.1), so
    nothing cancels. Of more than KEPT rows a fair draw is kept, always the same: row n takes place
    j, drawn from the first n, if there is such a place (Vitter 1985, algorithm R).
    """

    def __init__(self):
        self.count, self.mean, self.square = 0, np.zeros(0), np.zeros((0, 0))
        self.rows = np.zeros((0, 0), np.float32)
        self._rng = np.random.default_rng(0)

    def add(self, features: np.ndarray) -> None:
        """Takes in a batch [n, d]; Diverged if it is not finite."""
        x = np.asarray(features, np.float64)
        if not np.isfinite(x).all():
            raise Diverged("features are NaN or infinite: the model that drew them has diverged")
        if not self.count:
            self.mean, self.square = np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
            self.rows = np.zeros((KEPT, x.shape[1]), np.float32)
        total = self.count + len(x)
        own = x.mean(axis=0)
        gap, centred = own - self.mean, x - own
        self.square += centred.T @ centred + np.outer(gap, gap) * (self.count * len(x) / total)
        self.mean = self.mean + gap * (len(x) / total)
        places = np.arange(self.count, total)
        late = places >= KEPT
        places[late] = self._rng.integers(places[late] + 1)
        kept = places < KEPT
        self.rows[places[kept]] = x[kept]  # in order: of several at one place the last one stays
        self.count = total

    def result(self) -> Statistics:
        """JaxsdError if fewer than two rows came."""
        if self.count < 2:
            raise JaxsdError(f"distances between sets need two pictures, not {self.count}")
        covariance = self.square / (self.count - 1)
        return Statistics(self.count, self.mean, covariance, self.rows[: self.count])


def gather(batches: Iterable[np.ndarray]) -> Statistics:
    """The statistics of features that come in batches [n, d]; JaxsdError as of `Running`."""
    running = Running()
    for features in batches:
        running.add(features)
    return running.result()


def distances(
    a: Statistics, b: Statistics, frechet: str = "fd", kernel: str = "kd"
) -> dict[str, float]:
    """Every distance that can be told of two sets, under these names.

    fd: the Fréchet distance. Where both kept rows, kd and kd_spread: the kernel distance, mean and
    standard deviation over 100 subsets of (at most) 1000; kd_all: its unbiased estimate from all
    rows. JaxsdError for features of different networks.
    """
    if a.mean.shape != b.mean.shape:
        raise JaxsdError(
            f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared: these "
            "statistics are of different networks"
        )
    found = {frechet: metrics.gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)}
    if len(a.rows) and len(b.rows):
        found[kernel], found[f"{kernel}_spread"] = metrics.kernel_distance(a.rows, b.rows)
        found[f"{kernel}_all"] = metrics.squared_mmd(a.rows, b.rows)
    return found


def save(statistics: Statistics, file: str | os.PathLike) -> None:
    """Writes a .npz that pytorch-fid reads, too; whole or not at all."""
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        np.savez(
            stream,
            mu=statistics.mean,
            sigma=statistics.covariance,
            count=statistics.count,
            rows=statistics.rows,
        )


def load(file: str | os.PathLike) -> Statistics:
    """Reads a .npz of `save` or of pytorch-fid, executing nothing; JaxsdError if it is none."""
    path = as_path(file)
    try:
        with reading(path), path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
            mean, covariance = (np.asarray(found[name], np.float64) for name in ("mu", "sigma"))
            rows = found["rows"] if "rows" in found else np.zeros((0, len(mean)), np.float32)
            count = int(found["count"]) if "count" in found else 0
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(f"{file} holds no statistics of features (mu, sigma): {reason}") from None
    size = mean.shape
    if mean.ndim != 1 or covariance.shape != size * 2 or rows.shape[1:] != size:
        raise JaxsdError(
            f"{file}: mu {list(size)}, sigma {list(covariance.shape)} and rows {list(rows.shape)} "
            "do not belong together"
        )
    if not all(np.isfinite(values).all() for values in (mean, covariance, rows)):
        raise JaxsdError(f"{file} holds what is not finite")
    return Statistics(count, mean, covariance, rows)
