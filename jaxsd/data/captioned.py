"""Captioned pictures as examples of training: opened, planned, and decoded by their number."""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.data.buckets import Plan, Shape, bucket_shapes, nearest_shapes
from jaxsd.data.images import Crop, make_image
from jaxsd.data.sizes import read_sizes
from jaxsd.data.skipped import Skipped, one_line
from jaxsd.data.sources import Source, open_source
from jaxsd.errors import JaxsdError

MOST_REPLACED = 100  # in a row: where so many fail, it is not the pictures that are at fault


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Which pictures, and what is made of them.

    data, caption_column, split, holdout: as for `sources.open_source`. resolution: the side of the
    square, or of the square that no shape is larger than with `buckets`, whose sides are multiples
    of `multiple` and which are up to `max_ratio` times as long as wide. min_size: pixels that a
    picture's shorter side must have; half the resolution if it is None. crop, flip: as for
    `images.make_image`. workdir: where sizes are remembered and what is skipped is named. captions:
    one of these is drawn for each example in place of the picture's own.
    """

    data: str
    resolution: int = 512
    buckets: bool = False
    multiple: int = 64
    max_ratio: float = 2.0
    min_size: int | None = None
    crop: Crop = "center"
    flip: bool = False
    caption_column: str | None = None
    split: str = "train"
    holdout: float = 0.0
    workdir: Path | None = None
    captions: tuple[str, ...] = ()

    @property
    def shapes(self) -> list[Shape]:
        """Every (height, width) that a batch may have."""
        if self.buckets:
            return bucket_shapes(self.resolution, self.multiple, self.max_ratio)
        if self.resolution < 1:
            raise JaxsdError(f"resolution must be at least 1, not {self.resolution}")
        return [(self.resolution, self.resolution)]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Endless examples; those of one batch, `plan.batch_size` in a row, have one shape.

    Example i is a function of the seed and i: {"image": uint8 [h, w, 3], "caption": str,
    "original_size", "crop", "target_size": int32 [2] as of `images.make_image`, "replaced": str,
    a line "name, tab, reason" for each picture that could not be decoded in its place}.
    """

    source: Source
    options: PictureOptions
    shapes: tuple[Shape, ...]
    members: tuple[np.ndarray, ...]  # for each shape, the pictures of that bucket
    plan: Plan
    skipped: Skipped

    def __len__(self) -> int:
        return sys.maxsize

    @property
    def digest(self) -> str:
        """A short text that is another one as soon as a batch would hold other pictures."""
        parts = [self.source.stamp().encode(), *(m.tobytes() for m in self.members)]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = divmod(index, self.plan.batch_size)
        bucket, own = self.plan.batch(number)
        first, epoch = self.plan.picture(bucket, own * self.plan.batch_size + row)
        members, failed = self.members[bucket], []
        for turn in range(min(len(members), MOST_REPLACED)):
            picture = int(members[(first + turn) % len(members)])
            rng = np.random.default_rng((self.plan.seed, 0, epoch, picture))
            try:
                found = self.source[picture]
                made = make_image(
                    found["image"],
                    self.shapes[bucket],
                    rng,
                    self.options.crop,
                    self.options.flip,
                )
            except JaxsdError as error:
                failed.append(f"{one_line(self.source.name(picture))}\t{one_line(str(error))}")
                continue
            given = self.options.captions
            caption = given[rng.integers(len(given))] if given else found["caption"]
            return {**made, "caption": caption, "replaced": "\n".join(failed)}
        raise JaxsdError(
            f"none of the {len(failed)} pictures of shape {self.shapes[bucket]} that were tried "
            f"can be decoded: {one_line(failed[0])}"
        )


def open_pictures(options: PictureOptions, seed: int, batch_size: int) -> Pictures:
    """The examples of a training. Reads the header of every picture, unless the workdir knows them.

    What cannot be read or is smaller than `min_size` is left out of the plan, counted and named.
    JaxsdError if nothing is left.
    """
    if batch_size < 1:
        raise JaxsdError(f"batch_size must be at least 1, not {batch_size}")
    shapes = options.shapes
    source = open_source(options.data, options.caption_column, options.split, options.holdout)
    sizes, reasons = read_sizes(source, options.workdir)
    least = options.resolution // 2 if options.min_size is None else options.min_size
    shorter = sizes.min(1)
    reasons |= {
        i: f"{sizes[i, 1]}x{sizes[i, 0]} pixels, smaller than {least}"
        for i in np.flatnonzero((0 < shorter) & (shorter < least)).tolist()
    }
    skipped = Skipped(options.workdir)
    skipped.add(((source.name(i), reason) for i, reason in sorted(reasons.items())), "left out")
    usable = np.setdiff1d(np.arange(len(source)), np.array([*reasons], int))
    if not len(usable):
        i, reason = next(iter(sorted(reasons.items())))
        raise JaxsdError(
            f"no usable picture among the {len(source)} of {options.data}: {source.name(i)} "
            f"({reason}), and so on"
        )
    nearest = nearest_shapes(sizes[usable], shapes)
    members = tuple(usable[nearest == i].astype(np.int32) for i in range(len(shapes)))
    plan = Plan(tuple(len(m) for m in members), batch_size, seed)
    return Pictures(source, options, tuple(shapes), members, plan, skipped)
