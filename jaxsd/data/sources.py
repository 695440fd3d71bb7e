"""Where pictures come from: a path, the format that is found there, and one of its splits."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxsd.data.files import File, find_files
from jaxsd.data.folder import METADATA, SUFFIXES, image_folder
from jaxsd.data.records import picture_records
from jaxsd.data.splits import Part, chosen_split, held_out, split_of, splits_of
from jaxsd.data.tables import arrow_files, parquet_files
from jaxsd.data.tars import tar_shards
from jaxsd.errors import JaxsdError


@runtime_checkable
class Source(Protocol):
    """Random access to pictures and captions; any number of threads and processes may read it."""

    @property
    def readers(self) -> int:
        """How many threads, each at pictures in a row, read it without getting in the way."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": bytes, still encoded, "caption": str, "name": str}; JaxsdError if it fails."""
        ...

    def name(self, index: int) -> str:
        """A name for the log, the same in every run, told without reading the picture."""
        ...

    def head(self, index: int, size: int) -> bytes:
        """The picture's first `size` bytes, or more where that costs nothing."""
        ...

    def stamp(self) -> str:
        """Another text as soon as the data have changed."""
        ...


@dataclasses.dataclass(frozen=True)
class Format:
    """A format: its name, the endings of its files, and what opens them."""

    name: str
    suffixes: tuple[str, ...]
    open: Callable[[Sequence[File], str | None], Source]


PICTURES = Format("pictures", SUFFIXES, image_folder)
FORMATS = (
    PICTURES,
    Format("tar shards", (".tar",), tar_shards),
    Format("Parquet", (".parquet",), parquet_files),
    Format("Arrow", (".arrow",), arrow_files),
    Format("ArrayRecord", (".array_record", ".arrayrecord"), picture_records),
)
EXPECTED = (
    "a folder of pictures, tar shards in WebDataset's layout (.tar), Parquet (.parquet), Arrow "
    "(.arrow) or ArrayRecord (.array_record)"
)
_log = logging.getLogger("jaxsd.data")
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def open_source(
    data: str, caption_column: str | None = None, split: str = "train", holdout: float = 0.0
) -> Source:
    """The pictures of one split at a path, in whichever format is found there.

    data: a folder, a file or a pattern, here or in a bucket (`files.find_files`).
    caption_column: where captions are; by default found by name (`captions.choose_column`).
    split: "train" or "test". If folders are named after splits, or shards themselves are, that
    decides (`splits.splits_of`, `chosen_split`); else a share `holdout` of the pictures is "test",
    chosen by their names: the same ones whatever the seed, and still the same when others are
    added. "given" is for a path that was named to be measured against: "test" where names say that
    there is one, else all of it.
    JaxsdError if there is nothing, or nothing of a known format.
    """
    if split not in ("train", "test", "given"):
        raise JaxsdError(f"no split {split!r} in pictures: choose one of train, test, given")
    if not 0 <= holdout < 1:
        raise JaxsdError(f"holdout must be at least 0 and below 1, not {holdout}")
    files = find_files(data)
    form, nothing = _format(data, files), f"{data} holds no pictures for the {split} split"
    if form is PICTURES:  # metadata may lie above the splits' folders: pictures decide
        source = form.open(files, caption_column)
        chosen = _chosen(data, [source.name(i) for i in range(len(source))], split, True)
        source = source if chosen is None else Part(source, np.array(chosen, int))
    else:
        files = [file for file in files if file.name.lower().endswith(form.suffixes)]
        chosen = _chosen(data, [file.name for file in files], split, False)
        files = files if chosen is None else [files[i] for i in chosen]
        if not files:
            raise JaxsdError(nothing)
        source = form.open(files, caption_column)
    if chosen is None:
        source = _by_share(source, data, split, holdout)
    if not len(source):
        raise JaxsdError(nothing)
    return source


def _chosen(data: str, names: Sequence[str], split: str, folders_only: bool) -> list[int] | None:
    """The places of names that are of a split, or None if names do not tell."""
    splits = splits_of(names, folders_only)
    if split == "given":
        return chosen_split(splits, "test") or None
    if not any(splits) and (named := next(filter(split_of, names), None)) is not None:
        _log.warning(
            "%s is not of a split, since folders beside it are not named after any: all are used",
            f"{data.rstrip('/')}/{named}",
        )
    return chosen_split(splits, split)


def _by_share(source: Source, data: str, split: str, holdout: float) -> Source:
    if split == "given" or (holdout == 0 and split == "train"):
        return source
    if holdout == 0:
        raise JaxsdError(
            f"no pictures of {data} are held out: put some into a folder test/ or validation/ "
            "beside train/, or give --holdout a share above 0"
        )
    held = np.array([held_out(source.name(i), holdout) for i in range(len(source))], bool)
    return Part(source, np.flatnonzero(held == (split == "test")))


def _format(data: str, files: Sequence[File]) -> Format:
    names = [f.name.lower() for f in files if f.name.rpartition("/")[2] not in METADATA]
    found = [form for form in FORMATS if any(name.endswith(form.suffixes) for name in names)]
    if len(found) > 1:
        what = " and ".join(form.name for form in found)
        pattern = f"{data.rstrip('/')}/*{found[-1].suffixes[0]}"
        raise JaxsdError(f"{data} holds {what}: name one kind by a pattern, such as {pattern}")
    if found:
        return found[0]
    if any(name.endswith(PACKED) for name in names):
        raise JaxsdError(f"the shards of {data} are compressed: unpack them to plain .tar files")
    raise JaxsdError(f"no pictures in {data}: expected {EXPECTED}")
