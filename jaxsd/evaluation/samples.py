"""Pictures that a model draws against real ones: FID, KID and CLIP score, for any model."""

import dataclasses
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

import jax
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.evaluation import report, statistics
from jaxsd.evaluation.clip_score import ClipJudge, clip_score
from jaxsd.evaluation.drawing import Sampling, draw_batches
from jaxsd.evaluation.features import Features
from jaxsd.evaluation.same_noise import Observer, Teacher
from jaxsd.evaluation.statistics import Running, Statistics
from jaxsd.pipeline import Pipeline
from jaxsd.weights.files import as_path

SHOWN = 16  # pictures in a grid


@dataclasses.dataclass(frozen=True)
class Measures:
    """What pictures are measured by: features against those of real ones, and a CLIP model."""

    features: Features | None = None
    reference: Statistics | None = None  # of the real pictures' features
    clip: ClipJudge | None = None

    def of(self, pictures: Iterable[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
        """Distances (`statistics.distances`: fid, kid or fd, kd, and so on) and clip_score.

        pictures: batches, uint8 [n, h, w, c], one picture for each prompt. They are not kept, so
        that memory does not grow with their number.
        """
        running, cosines, start = Running(), [], 0
        for batch in pictures:
            if self.features is not None:
                running.add(self.features(batch))
            if self.clip is not None:
                cosines.append(self.clip.cosines(batch, prompts[start : start + len(batch)]))
            start += len(batch)
        found = {}
        if self.features is not None and self.reference is not None:
            names = self.features.frechet, self.features.kernel
            found |= statistics.distances(running.result(), self.reference, *names)
        if cosines:
            found["clip_score"] = clip_score(np.concatenate(cosines))
        return found

    def unknown(self) -> dict[str, float]:
        """What `of` gives, by the same names, where there is nothing to measure: NaN."""
        names = [] if self.clip is None else ["clip_score"]
        if self.features is not None and self.reference is not None:
            kernel = self.features.kernel
            several = [kernel, f"{kernel}_spread", f"{kernel}_all"]
            names += [self.features.frechet, *(several if len(self.reference.rows) else [])]
        return dict.fromkeys(names, math.nan)


def measure(
    pipe: Pipeline,
    prompts: Sequence[str],
    how: Sampling,
    measures: Measures,
    place: Callable[[jax.Array], jax.Array] = lambda noise: noise,
) -> tuple[dict[str, float], np.ndarray]:
    """What `measures` say of one picture of each prompt, and the first pictures themselves.

    Those of the first sampling seed: the same ones each time. place: as for `draw_batches`.
    """
    shown: list[np.ndarray] = []

    def passing_by() -> Iterator[np.ndarray]:
        for drawn in draw_batches(pipe, prompts, how, how.sampling_seeds[0], place=place):
            batch = drawn.rounded
            shown.extend(batch[: SHOWN - len(shown)])
            yield batch

    found = measures.of(passing_by(), prompts)
    return found, np.stack(shown)


def evaluate_model(
    pipe: Pipeline,
    prompts: Sequence[str],
    how: Sampling,
    measures: Measures,
    teacher: Teacher | None = None,
) -> report.Summary:
    """Mean and spread of what `measures` say over the sampling seeds, and what a picture costs.

    Each time of one picture of each prompt.
    """
    seen, rows = Observer(pipe, how, teacher), []
    for seed in how.sampling_seeds:
        row = measures.of(seen.pictures(prompts, seed), prompts)
        rows.append(row | seen.rmse())
    return report.summarise(rows) | seen.costs()


def reference(
    pictures: Callable[[], Iterable[np.ndarray]],
    features: Features,
    file: str | os.PathLike | None = None,
    counts: Container[int] | None = None,
) -> Statistics:
    """Statistics of the real pictures' features: those in `file` if it is there.

    Else of `pictures`, batches of uint8 [n, h, w, c]; they are kept in `file`, if one is named.
    counts: how many pictures there may be; JaxsdError if `file` tells that it is of another number.
    """
    if file is not None and as_path(file).exists():
        found = statistics.load(file)
        if found.count and counts is not None and found.count not in counts:
            raise JaxsdError(
                f"{file} is of {found.count} pictures, hence of others than these: remove it, or "
                "name another"
            )
        return found
    found = statistics.gather(features(batch) for batch in pictures())
    if file is not None:
        statistics.save(found, file)
    return found
