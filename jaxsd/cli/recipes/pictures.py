"""Options of the recipes that train on pictures, and the examples that they stand for."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureShapes:
    """Mixed into a recipe: what is made of pictures."""

    resolution: int = 512
    """Side of the square that pictures are scaled and cropped to; 0 for the model's own."""
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
    num_workers: int = 0
    """Processes that decode pictures; 0 for two threads of the training itself."""

    def sized(self, unet: Any, towers: Any) -> Any:
        """These options with a resolution; unet: a config of the model, towers: `jaxsd.towers`."""
        side = unet.sample_size * towers.nets["vae"].config.downscale
        return self if self.resolution else dataclasses.replace(self, resolution=side)

    def open_pictures(
        self, data: str, seed: int, batch_size: int, workdir: Path | None = None, **options: Any
    ) -> Any:
        """Endless examples for `data.batches`. options: further ones of `data.PictureOptions`.

        In the workdir, sizes are remembered and all that is skipped is named.
        """
        from jaxsd.data import PictureOptions, open_pictures
        from jaxsd.processes import agree

        if self.num_workers < 0:
            raise JaxsdError(f"num_workers must be at least 0, not {self.num_workers}")
        chosen = PictureOptions(
            data=data,
            resolution=self.resolution,
            buckets=self.buckets,
            multiple=self.bucket_multiple,
            max_ratio=self.max_ratio,
            min_size=self.min_size,
            crop=self.crop,
            flip=self.flip,
            workdir=workdir,
            **options,
        )
        pictures = open_pictures(chosen, seed, batch_size)
        if agree(pictures.digest) != pictures.digest:
            raise JaxsdError(
                f"this process finds other pictures in {data} than the first one does: all must "
                "see the same files"
            )
        return pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureData(PictureShapes):
    """Mixed into a recipe: which captioned pictures, too."""

    data: str = "digits"
    """Digits made by code (digits, digits-in-groups), or captioned pictures: a folder, tar shards,
    Parquet, Arrow or ArrayRecord; here or gs://, with patterns such as {0000..0010}.tar."""
    caption_column: str | None = None
    """The column of captions; by default text, caption, prompt, or the only one there is."""
    holdout: float = 0.0
    """The share that is kept from training, if there is no folder test/ or validation/."""

    def open_data(
        self, seed: int, batch_size: int, workdir: Path | None = None, split: str = "train"
    ) -> Any:
        """Endless examples of the digits, or as `open_pictures` gives them."""
        from jaxsd import data

        if self.data in data.SOURCES:
            return data.elements(self.data, split, seed)
        column, holdout = self.caption_column, self.holdout
        return self.open_pictures(
            self.data,
            seed,
            batch_size,
            workdir,
            caption_column=column,
            split=split,
            holdout=holdout,
        )
