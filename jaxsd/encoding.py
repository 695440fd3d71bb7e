"""A data set through VAE and text encoders, once: the cache that latent trainings read.

It can be cut off at any time: a shard stands in the folder whole or not at all, and the next call
goes on with the first one that is missing.
"""

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsd import kernels, sharding
from jaxsd.data import latents
from jaxsd.data.captioned import Pictures
from jaxsd.data.images import make_image
from jaxsd.data.records import SUFFIX, write_records
from jaxsd.errors import JaxsdError
from jaxsd.tokenizer import PromptTruncated
from jaxsd.towers import Towers
from jaxsd.weights import read_json, write_json
from jaxsd.weights.files import AnyPath, as_path, is_local

CAPTIONS_A_SHARD = 1024
Picture = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures of one size, (height, width), number 0 ... count - 1.

    load(i) is {"image": [height, width, 3], uint8 or float32 in [-1, 1], "caption": str} and
    perhaps int32 [2] each of `latents.SIZES`; JaxsdError where a picture must be left out.
    """

    size: tuple[int, int]
    count: int
    load: Callable[[int], Picture]


def groups_of(pictures: Pictures, repeats: int = 1) -> list[Group]:
    """Every picture of a source, `repeats` times (of use with random crops), by shape.

    None is mirrored: a cache may hold both orientations.
    """
    groups = []
    for shape, members in zip(pictures.shapes, pictures.members, strict=True):

        def load(i: int, shape=shape, members=members) -> Picture:
            turn, row = divmod(i, len(members))
            picture = int(members[row])
            rng = np.random.default_rng((pictures.plan.seed, 0, turn, picture))
            try:
                found = pictures.source[picture]
                made = make_image(found["image"], shape, rng, pictures.options.crop)
            except JaxsdError as error:
                raise JaxsdError(f"{pictures.source.name(picture)}: {error}") from None
            return {**made, "caption": found["caption"]}

        if len(members):
            groups.append(Group(shape, len(members) * repeats, load))
    return groups


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a cache is stored, and how many pictures are worked on at a time."""

    dtype: str = "float16"
    flip: bool = False  # whether each picture is kept in both orientations
    shard_size: int = 2048  # pictures in a shard
    batch_size: int = 64

    def __post_init__(self):
        if self.dtype not in latents.DTYPES:
            raise JaxsdError(f"dtype is {' or '.join(latents.DTYPES)}, not {self.dtype!r}")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise JaxsdError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """The pictures of one file."""

    name: str
    group: Group
    numbers: range


def encode(
    towers: Towers,
    groups: Sequence[Group],
    folder: str | Path,
    storage: Storage = Storage(),
    made_of: Mapping[str, Any] | None = None,
    model: str = "",
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the cache of some pictures, or what is missing of it, and returns its manifest.

    made_of: what decides the numbers besides networks and storage: the data and how it was cut. A
    folder that holds a cache made of anything else is refused with a JaxsdError. For the record
    alone: model, where the networks came from; left_out, pictures that are in none of the groups.
    """
    if jax.process_count() > 1:
        raise JaxsdError("encode works in one process: start it alone, on all devices of a machine")
    target, groups = as_path(folder), sorted(groups, key=lambda group: group.size)
    shards = [
        Shard(latents.shard_name(towers.latent_shape(group.size), number), group, numbers)
        for group in groups
        for number, numbers in enumerate(_pieces(range(group.count), storage.shard_size))
    ]
    decides = {
        **towers.fingerprints(),
        "dtype": storage.dtype,
        "flip": storage.flip,
        "shard_size": storage.shard_size,
        "pictures": {f"{g.size[0]}x{g.size[1]}": g.count for g in groups},
        **(made_of or {}),
    }
    manifest = _claim(target, decides)
    if manifest["finished"]:
        return manifest
    run = _Run(towers, storage, target)
    with _progress(sum(group.count for group in groups), "image") as bar:
        for shard in shards:
            if _done(target, shard.name):
                bar.update(len(shard.numbers))
            else:
                run.write_pictures(shard, bar.update)
    notes = [read_json(target / f"{shard.name}.json") for shard in shards]
    if not any(note["captions"] for note in notes):
        raise JaxsdError("none of the pictures could be used: there is nothing to train on")
    captions = list(dict.fromkeys(itertools.chain([""], *(note["captions"] for note in notes))))
    pieces = _pieces(captions, CAPTIONS_A_SHARD)
    with _progress(len(captions), "caption") as bar:
        for number, piece in enumerate(pieces):
            if not _done(target, latents.caption_shard(number)):
                run.write_captions(latents.caption_shard(number), piece)
            bar.update(len(piece))
    number_of = {caption: number for number, caption in enumerate(captions)}
    order = [number_of[caption] for note in notes for caption in note["captions"]]
    latents.write_index(target, np.asarray(order, np.int32))
    cut = [read_json(target / f"{latents.caption_shard(i)}.json") for i in range(len(pieces))]
    manifest |= {
        "finished": True,
        "model": model,
        "scaling_factor": towers.scaling_factor,
        "text_encoders": towers.text,
        "text": {name: shape[1:] for name, shape in run.text_shapes().items()},
        "pictures": len(order),
        "buckets": _buckets(towers, shards, notes),
        "captions": [len(piece) for piece in pieces],
        "truncated": sum(note["truncated"] for note in cut),  # captions that were too long
        "skipped": [*left_out, *(skipped for note in notes for skipped in note["skipped"])],
    }
    write_json(target / latents.MANIFEST, manifest)
    return manifest


def _buckets(towers: Towers, shards: Sequence[Shard], notes: Sequence[Any]) -> list[dict]:
    """What the manifest says of pictures of each size: how many each shard holds."""
    counts: dict[tuple[int, int], list[int]] = {}
    for shard, note in zip(shards, notes, strict=True):
        counts.setdefault(shard.group.size, []).append(len(note["captions"]))
    return [
        {"latents": towers.latent_shape(size), "pictures": size, "shards": several}
        for size, several in counts.items()
    ]


def _progress(total: int, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, mininterval=1.0)


def _pieces(values: Any, size: int) -> list[Any]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _claim(folder: AnyPath, decides: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest so far; JaxsdError if it is of a cache that is made of other things."""
    new = {"format": latents.FORMAT, "finished": False, "made_of": dict(decides)}
    new = json.loads(json.dumps(new))
    if not latents.is_cache(folder):
        write_json(folder / latents.MANIFEST, new)
        return new
    manifest = read_json(folder / latents.MANIFEST)
    old = manifest.get("made_of", {})
    names = sorted({*old, *new["made_of"]})
    differ = [name for name in names if old.get(name) != new["made_of"].get(name)]
    if differ:
        said = "; ".join(f"{n} {old.get(n)!r}, now {new['made_of'].get(n)!r}" for n in differ)
        raise JaxsdError(
            f"{folder} holds latents made of something else ({said}): go on with the same, or take "
            "another --workdir"
        )
    if is_local(folder):  # what a killed process left
        for file in folder.glob(f".*{SUFFIX}.*.tmp"):
            file.unlink(missing_ok=True)
    return manifest


def _done(folder: AnyPath, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


class _Run:
    """The networks on all devices, at work on one folder."""

    def __init__(self, towers: Towers, storage: Storage, folder: AnyPath):
        self.towers, self.storage, self.folder = towers, storage, folder
        self.mesh = sharding.make_mesh()
        placement = sharding.shardings(towers.params, self.mesh)
        self.params = sharding.place(towers.params, placement)
        self._moments = kernels.jit(towers.moments)
        self._states = kernels.jit(towers.states)
        self.orientations = 2 if storage.flip else 1
        unit = self.mesh.size * self.orientations  # a batch is split over the devices
        self.batch_size = -(-storage.batch_size // unit) * unit

    def text_shapes(self) -> dict[str, list[int]]:
        """Of the states of a caption, each with the axis of captions in front."""
        ids = self.towers.tokenize([""])
        told = jax.eval_shape(self.towers.states, self.params, ids)
        return {name: list(value.shape) for name, value in told.items()}

    def write_pictures(self, shard: Shard, progress: Callable[[int], Any]) -> None:
        """One shard, then its captions, without which it does not count."""
        note: dict[str, list] = {"captions": [], "skipped": []}
        pictures = self._usable(shard, note, progress)
        records = self._moments_of(pictures, shard.group.size)
        write_records(f"{self.folder / shard.name}{SUFFIX}", records)
        write_json(self.folder / f"{shard.name}.json", note)

    def _usable(
        self, shard: Shard, note: dict[str, list], progress: Callable[[int], Any]
    ) -> Iterator[Picture]:
        """The pictures that can be used, made ahead in threads; `note` is kept of all of them."""
        import grain

        def load(number: int) -> Picture:
            try:
                return shard.group.load(number)
            except JaxsdError as error:
                return {"error": str(error)}

        chosen = grain.MapDataset.source(shard.numbers).map(load)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * self.batch_size)
        for picture in chosen.to_iter_dataset(options):
            if "error" in picture:
                note["skipped"].append(picture["error"])
            else:
                note["captions"].append(picture["caption"])
                yield picture
            progress(1)

    def _moments_of(self, pictures: Iterable[Picture], size: tuple[int, int]) -> Iterator[Any]:
        """The record of each picture. Devices work on a batch while the one before is written."""
        waiting: Any = None
        for several in _batched(pictures, self.batch_size // self.orientations):
            ahead = self._start(several, size)
            if waiting is not None:
                yield from self._records(*waiting)
            waiting = ahead
        if waiting is not None:
            yield from self._records(*waiting)

    def _start(self, pictures: Sequence[Picture], size: tuple[int, int]) -> tuple[Any, np.ndarray]:
        """Sets the devices to work: moments to come, and the sizes of what they are of."""
        images = np.stack([picture["image"] for picture in pictures])
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / np.float32(127.5) - 1
        whole = dict(zip(latents.SIZES, (size, (0, 0), size), strict=True))
        sizes = np.array([[p.get(n, whole[n]) for n in latents.SIZES] for p in pictures], np.int32)
        if self.orientations == 2:
            images = np.stack([images, images[:, :, ::-1]], 1).reshape(-1, *images.shape[1:])
            sizes = np.stack([sizes, [_mirrored(row) for row in sizes]], 1).reshape(-1, 3, 2)
        batch = sharding.split(sharding.filled(images, self.batch_size), self.mesh)
        return self._moments(self.params["vae"], batch), sizes.reshape(-1, 6)

    def _records(self, moments: Any, sizes: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        mean, logvar = (
            latents.narrow(np.asarray(values)[: len(sizes)], self.storage.dtype, "latents")
            for values in moments
        )
        for i, row in enumerate(sizes):
            yield {"mean": mean[i], "logvar": logvar[i], "sizes": row}

    def write_captions(self, name: str, captions: Sequence[str]) -> None:
        """One shard of text embeddings, each with its caption."""
        note = {"captions": len(captions), "truncated": 0}

        def records() -> Iterator[dict[str, Any]]:
            for several in _batched(captions, self.batch_size):
                with warnings.catch_warnings(record=True) as cut:
                    warnings.simplefilter("always", PromptTruncated)
                    ids = self.towers.tokenize(several)
                note["truncated"] += len(cut)
                batch = sharding.split(sharding.filled(ids, self.batch_size), self.mesh)
                told = {
                    field: latents.narrow(np.asarray(values), self.storage.dtype, "embeddings")
                    for field, values in self._states(self.params, batch).items()
                }
                for i, caption in enumerate(several):
                    yield {"caption": caption} | {field: v[i] for field, v in told.items()}

        write_records(f"{self.folder / name}{SUFFIX}", records())
        write_json(self.folder / f"{name}.json", note)


def _batched(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size`, and one of what is left: itertools.batched, which Python 3.11 lacks."""
    source = iter(values)
    while several := list(itertools.islice(source, size)):
        yield several


def _mirrored(sizes: np.ndarray) -> np.ndarray:
    """The sizes [3, 2] of a mirrored picture: what was cut off on the right is so on the left."""
    original, (top, left), target = sizes
    scale = max(target / original)
    width = max(int(target[1]), round(scale * original[1]))  # as `images.make_image` scales it
    return np.array([original, (top, width - target[1] - left), target], np.int32)
