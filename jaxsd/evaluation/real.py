"""Real pictures with captions, from any source of data, for a model to be measured against."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxsd.data.images import make_image
from jaxsd.data.sources import Source, open_source
from jaxsd.errors import JaxsdError
from jaxsd.evaluation.clip_score import ClipJudge, clip_score
from jaxsd.evaluation.held_out import cycled


@dataclasses.dataclass(frozen=True)
class RealPictures:
    """All pictures of a source, scaled to just cover `size` (height, width) and cut to it."""

    source: Source
    size: tuple[int, int]
    skipped: list[str] = dataclasses.field(default_factory=list)  # what could not be decoded

    def __len__(self) -> int:
        return len(self.source)

    def examples(self, batch_size: int = 64) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Pictures, uint8 [n, h, w, 3], with their n captions.

        A picture that cannot be decoded is left out, and named in `skipped`; JaxsdError if none
        can be.
        """
        self.skipped.clear()
        unused = np.random.default_rng(0)  # cut from the middle, and not mirrored
        pictures: list[np.ndarray] = []
        captions: list[str] = []
        for i in range(len(self.source)):
            try:
                found = self.source[i]
                pictures.append(make_image(found["image"], self.size, unused)["image"])
                captions.append(found["caption"])
            except JaxsdError as error:
                self.skipped.append(f"{self.source.name(i)}: {error}")
            if len(pictures) == batch_size:
                yield np.stack(pictures), captions
                pictures, captions = [], []
        if pictures:
            yield np.stack(pictures), captions
        if len(self.skipped) == len(self.source):
            raise JaxsdError(f"no picture can be decoded: {self.skipped[0]}, and so on")

    def batches(self) -> Iterator[np.ndarray]:
        """The pictures alone."""
        for pictures, _ in self.examples():
            yield pictures

    def score(self, clip: ClipJudge) -> dict[str, float]:
        """The CLIP score of the pictures themselves and their captions: what to compare with."""
        cosines = [clip.cosines(*example) for example in self.examples()]
        return {"clip_score": clip_score(np.concatenate(cosines))}

    def captions(self, count: int) -> list[str]:
        """Captions of `count` pictures, in an order that is drawn but always the same.

        All of them come before any comes again. What cannot be read is left out.
        """
        found: list[str] = []
        for i in np.random.default_rng(0).permutation(len(self.source)):
            if len(found) == count:
                break
            try:
                found.append(self.source[int(i)]["caption"])
            except JaxsdError:  # one that is missing is named where pictures are read
                continue
        if not found:
            raise JaxsdError("no picture can be read, nor its caption")
        return cycled(found, count)


def open_real(
    data: str, size: tuple[int, int], caption_column: str | None = None, holdout: float = 0.0
) -> RealPictures:
    """The pictures at a path (`sources.open_source`).

    With a `holdout` above 0 those alone that a training with the same share would never see; else
    of several splits that for tests.
    """
    split = "test" if holdout else "given"
    return RealPictures(open_source(data, caption_column, split, holdout), size)
