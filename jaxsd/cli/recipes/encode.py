"""`train.py encode`."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxsd.cli.recipes.models import ModelOptions
from jaxsd.cli.recipes.pictures import PictureData
from jaxsd.data.latents import MANIFEST
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode(PictureData, ModelOptions):
    """Latents and text embeddings of a data set, once: `--data` of latent trainings thereafter."""

    workdir: str
    """Where the cache goes, here or in a bucket (gs://). Run the same command again to go on with
    one that was cut off."""
    count: int | None = None
    """Of digits, which have no end: how many pictures to draw."""
    repeats: int = 1
    """How often to take each picture: of use with a random crop."""
    flip: bool = False
    """Keep each picture in both orientations, of which training draws one each time."""
    seed: int = 0
    family: str | None = None
    """What a single file holds where it cannot be told: sd2 or sd2-v."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the numbers in the cache."""
    batch_size: int = 64
    """Pictures at a time, on all devices together."""
    shard_size: int = 2048
    """Pictures in a file."""

    def run(self) -> None:
        """Encodes what is missing, and says what is there."""
        from jaxsd import sharding
        from jaxsd.encoding import Storage, encode
        from jaxsd.towers import Towers

        with sharding.on_host():  # `encode` spreads them
            parts = self.load(self.family, ("vae", "text_encoder", "text_encoder_2"))
        towers = Towers(parts.components, parts.tokenizers)
        groups, made_of, left_out = self._groups()
        storage = Storage(self.dtype, self.flip, self.shard_size, self.batch_size)
        model = self.model or f"{self.vae}, {self.text_encoder}"
        manifest = encode(towers, groups, self.workdir, storage, made_of, model, left_out)
        told = [f"{manifest['pictures']} pictures", f"{sum(manifest['captions'])} captions"]
        if cut := manifest["truncated"]:
            told.append(f"{cut} of them cut to {towers.length} tokens")
        if skipped := len(manifest["skipped"]):
            told.append(f"{skipped} pictures left out (named in {MANIFEST})")
        print(f"{self.workdir}: {', '.join(told)}")

    def _groups(self) -> tuple[list[Any], dict[str, Any], list[str]]:
        """The pictures by their size, what decides which they are, and those that are left out."""
        from jaxsd import data
        from jaxsd.encoding import Group, groups_of

        if self.repeats < 1 or (self.count is not None and self.count < 1):
            raise JaxsdError("repeats and count must be at least 1")
        folder = None if "://" in self.workdir else Path(self.workdir)
        source = self.open_data(self.seed, self.batch_size, folder)
        made_of: dict[str, Any] = {"data": self.data, "seed": self.seed}
        if not isinstance(source, data.Pictures):
            if self.count is None:
                raise JaxsdError(f"{self.data} have no end: say with --count how many to draw")
            if "caption" not in source[0]:
                raise JaxsdError(f"{self.data} have no captions: choose digits, or your pictures")
            height, width, _ = source[0]["image"].shape
            return [Group((height, width), self.count, source.__getitem__)], made_of, []
        if self.count is not None:
            raise JaxsdError(f"count is for what has no end; {self.data} is taken whole")
        made_of |= {"stamp": source.source.stamp(), "crop": self.crop, "repeats": self.repeats}
        made_of |= {name: getattr(self, name) for name in ("resolution", "holdout")}
        # How captions were chosen: the stamp of tables and shards is of the files alone
        made_of["caption_column"] = self.caption_column
        left_out = [f"{name}: {reason}" for name, reason in source.skipped.reasons.items()]
        return groups_of(source, self.repeats), made_of, left_out
