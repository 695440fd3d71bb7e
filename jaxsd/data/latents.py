"""Cached latents: what a VAE and text encoders made of a data set, written once and read at random.

A cache is a folder:

    cache.json                   what it was made of and how; `finished` once it is whole
    64x64-00003.array_record     pictures whose latents are 64 by 64: moments, and sizes in pixels
    64x64-00003.json             their captions, and what was left out; the last thing to be written
    captions-00000.array_record  embeddings of each distinct caption, which stands with them; the
                                 first caption of all is ""
    captions.npy                 int32 [pictures]: which caption each picture has

Pictures are numbered in the order of the buckets in cache.json, and in each by shard. One that is
kept in both orientations has two records in a row. What a record is, `jaxsd.data.records` says.
"""

import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.data.buckets import Plan
from jaxsd.data.files import File, find_files, is_remote, read_bytes
from jaxsd.data.records import SUFFIX, Records
from jaxsd.errors import JaxsdError
from jaxsd.weights.files import AnyPath, as_path, read_json, replacing

MANIFEST, CAPTION_INDEX = "cache.json", "captions.npy"
FORMAT = 1
DTYPES = ("float16", "float32")
SIZES = ("original_size", "crop", "target_size")  # two numbers each, as of `images.make_image`


def shard_name(shape: Sequence[int], number: int) -> str:
    """The file of a shard of pictures, without its ending; shape: [h, w, c] of the latents."""
    return f"{shape[0]}x{shape[1]}-{number:05}"


def caption_shard(number: int) -> str:
    """The file of a shard of captions, without its ending."""
    return f"captions-{number:05}"


def narrow(values: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """The values as they are stored; JaxsdError if they are no numbers, or too large for that."""
    if not np.isfinite(values).all():
        raise JaxsdError(f"{what} are not finite: the weights or the pictures are damaged")
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        most = np.abs(values).max()
        raise JaxsdError(f"{what} reach {most:.3g}, too large for {dtype}: choose float32")
    return stored


def write_index(folder: AnyPath, captions: np.ndarray) -> None:
    """Writes which caption each picture has, int32 [pictures]."""
    with replacing(folder / CAPTION_INDEX) as temporary, open(temporary, "wb") as stream:
        np.save(stream, captions)


def is_cache(folder: str | Path) -> bool:
    """Whether a folder holds cached latents, finished or not."""
    return (as_path(folder) / MANIFEST).is_file()


@dataclasses.dataclass(frozen=True)
class Latents:
    """Endless examples; those of one batch, `plan.batch_size` in a row, have one shape.

    Example i is a function of the seed and i: "mean" and "logvar" [h, w, c] of the unscaled
    latents; what the UNet is told of the caption, "encoder_hidden_states" [t, d] and for Stable
    Diffusion XL "text_embeds" [p], all in the dtype of the cache; for XL also `SIZES`, int32 [2].
    """

    manifest: Mapping[str, Any]
    pictures: tuple[Records, ...]  # of each bucket
    captions: Records
    caption_of: np.ndarray
    plan: Plan

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, row = divmod(index, self.plan.batch_size)
        bucket, own = self.plan.batch(number)
        picture, epoch = self.plan.picture(bucket, own * self.plan.batch_size + row)
        number = sum(self.plan.counts[:bucket]) + picture
        rng = np.random.default_rng((self.plan.seed, 0, epoch, number))
        turned = int(rng.integers(self.orientations))
        record = self.pictures[bucket][picture * self.orientations + turned]
        told = self.captions[int(self.caption_of[number])]
        found = {name: record[name] for name in ("mean", "logvar")}
        found |= {name: told[name] for name in self.manifest["text"]}
        if "text_embeds" in found:
            found |= dict(zip(SIZES, record["sizes"].reshape(3, 2), strict=True))
        return found

    @property
    def orientations(self) -> int:
        """How many records each picture has."""
        return 2 if self.manifest["made_of"]["flip"] else 1

    def caption(self, number: int) -> str:
        """The caption of a picture of the cache."""
        return self.captions[int(self.caption_of[number])]["caption"]


def open_latents(folder: str | Path, seed: int, batch_size: int) -> Latents:
    """The examples of a training from a cache; of one in a bucket, shards are copied here for it.

    JaxsdError if the cache is not finished, or is none that this version reads.
    """
    place = as_path(folder)
    manifest = read_json(place / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise JaxsdError(f"{place / MANIFEST} is not of latents that this version reads")
    if not manifest.get("finished"):
        raise JaxsdError(f"{folder} is not finished: run the same `train.py encode` again")
    # In bytes: of shards that were copied here before, what tells that they are whole
    remote = find_files(str(folder)) if is_remote(str(folder)) else []
    sizes = {file.name: file.size for file in remote}
    try:
        each = 2 if manifest["made_of"]["flip"] else 1
        pictures = []
        for bucket in manifest["buckets"]:
            names = [shard_name(bucket["latents"], i) for i in range(len(bucket["shards"]))]
            numbers = [each * count for count in bucket["shards"]]
            pictures.append(_records(place, names, numbers, sizes))
        counts = manifest["captions"]
        captions = _records(place, [caption_shard(i) for i in range(len(counts))], counts, sizes)
        totals = tuple(sum(bucket["shards"]) for bucket in manifest["buckets"])
    except (KeyError, TypeError) as error:
        raise JaxsdError(f"{place / MANIFEST} is damaged: {error!r}") from None
    try:
        caption_of = np.load(io.BytesIO(read_bytes(str(place / CAPTION_INDEX))))
    except ValueError as error:
        raise JaxsdError(f"{place / CAPTION_INDEX} is damaged: {error}") from None
    if caption_of.shape != (sum(totals),) or not np.all(caption_of < len(captions)):
        raise JaxsdError(f"{place / CAPTION_INDEX} is of other pictures than {MANIFEST}")
    plan = Plan(totals, batch_size, seed)
    return Latents(manifest, tuple(pictures), captions, caption_of, plan)


def _records(
    folder: AnyPath, names: Sequence[str], counts: Sequence[int], sizes: Mapping[str, int]
) -> Records:
    """Shards whose numbers of records are known: none is opened before it is read."""
    names = [f"{name}{SUFFIX}" for name in names]
    files = [File(str(folder / name), name, sizes.get(name, 0)) for name in names]
    return Records(files, np.cumsum([0, *counts], dtype=np.int64))
