"""Options of the recipes that train on captioned pictures, and the examples that they stand for."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureData:
    """Mixed into a recipe: which pictures, and what is made of them."""

    data: str = "digits"
    """Digits made by code (digits, digits-in-groups), or captioned pictures: a folder, tar shards,
    Parquet, Arrow or ArrayRecord; here or gs://, with patterns such as {0000..0010}.tar."""
    caption_column: str | None = None
    """The column of captions; by default text, caption, prompt, or the only one there is."""
    resolution: int = 512
    """Side of the square that pictures are scaled and cropped to."""
    buckets: bool = False
    """Several shapes of about the square's area, each picture to the nearest."""
    bucket_multiple: int = 64
    """Pixels that the sides of all shapes are multiples of."""
    max_ratio: float = 2.0
    """How many times as long as the other a side of these shapes may be."""
    min_size: int | None = None
    """Pictures whose shorter side has fewer pixels are left out; by default half the resolution."""
    crop: Literal["center", "random"] = "center"
    """What is kept of a picture that has another shape."""
    flip: bool = False
    """Mirror half of the pictures."""
    holdout: float = 0.0
    """The share that is kept from training, if there is no folder test/ or validation/."""
    num_workers: int = 0
    """Processes that decode pictures; 0 for two threads of the training itself."""

    def open_data(
        self, seed: int, batch_size: int, workdir: Path | None = None, split: str = "train"
    ) -> Any:
        """Endless examples for `data.batches`, of the digits or of pictures.

        In the workdir, sizes are remembered and all that is skipped is named.
        """
        from jaxsd import data, processes

        if self.num_workers < 0:
            raise JaxsdError(f"num_workers must be at least 0, not {self.num_workers}")
        if self.data in data.SOURCES:
            return data.elements(self.data, split, seed)
        options = data.PictureOptions(
            data=self.data,
            resolution=self.resolution,
            buckets=self.buckets,
            multiple=self.bucket_multiple,
            max_ratio=self.max_ratio,
            min_size=self.min_size,
            crop=self.crop,
            flip=self.flip,
            caption_column=self.caption_column,
            split=split,
            holdout=self.holdout,
            workdir=workdir,
        )
        pictures = data.open_pictures(options, seed, batch_size)
        if processes.agree(pictures.digest) != pictures.digest:
            raise JaxsdError(
                f"this process finds other pictures in {self.data} than the first one does: all "
                "must see the same files"
            )
        return pictures
