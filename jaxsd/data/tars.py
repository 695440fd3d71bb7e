"""Tar shards in WebDataset's layout: the files of a picture have one name and stand in one tar.

`0001.jpg`, `0001.txt`, `0002.jpg`, ... A shard's headers are read once, to find where its files
lie; after that any picture is read by its place. Nothing is ever unpacked to the disk.
"""

import dataclasses
import json
import posixpath
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxsd.data.captions import as_caption, choose_column
from jaxsd.data.files import READERS, File, open_file, read_bytes, stamp
from jaxsd.data.folder import SUFFIXES
from jaxsd.errors import JaxsdError

PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)
TEXTS = ("txt", "caption", "json")
MAX_READ = 1 << 20  # bytes of one header; long names and attributes take a few hundred
MAX_MEMBER = 1 << 30  # bytes of one picture
CHECKED = 16  # captions of which one at least must be readable


class _Place(NamedTuple):
    """Where a member lies in its shard."""

    offset: int
    size: int
    suffix: str


@dataclasses.dataclass(frozen=True)
class Tars:
    """Pictures in tar shards. Places are int64 [n, 2], of pictures and of captions (size 0: none).

    shards: int32 [n], of which of `files` each is. suffixes: of the captions' members.
    """

    files: Sequence[File]
    names: Sequence[str]
    shards: np.ndarray
    pictures: np.ndarray
    captions: np.ndarray
    suffixes: Sequence[str]
    caption_column: str | None
    readers = READERS

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        offset, size = (int(n) for n in self.pictures[index])
        image = self._read(index, offset, size)
        return {"image": image, "caption": self._caption(index), "name": self.name(index)}

    def _read(self, index: int, offset: int, size: int) -> bytes:
        return read_bytes(self.files[self.shards[index]].path, offset, size)

    def _caption(self, index: int) -> str:
        offset, size = (int(n) for n in self.captions[index])
        text = self._read(index, offset, size).decode("utf-8-sig", "replace") if size else ""
        if self.suffixes[index] != "json":
            return as_caption(text)
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise JaxsdError(f"the caption of {self.name(index)} is not a JSON object")
        texts = [name for name, value in fields.items() if isinstance(value, (str, list))]
        if not texts and self.caption_column is None:
            return ""
        return as_caption(fields[choose_column(texts, self.caption_column, self.name(index)) or ""])

    def name(self, index: int) -> str:
        return f"{self.files[self.shards[index]].name}/{self.names[index]}"

    def head(self, index: int, size: int) -> bytes:
        offset, whole = (int(n) for n in self.pictures[index])
        return self._read(index, offset, min(size, whole))

    def stamp(self) -> str:
        return stamp(self.files)


def tar_shards(files: Sequence[File], caption_column: str | None = None) -> Tars:
    """The pictures of some tar files. A caption is a .txt, or else a field of a .json.

    With `caption_column` the .json is read first, and the caption is that field.
    """
    texts = ("json", *TEXTS) if caption_column is not None else TEXTS
    with ThreadPoolExecutor(16) as threads:
        samples = list(threads.map(_samples, files))
    names, shards, pictures, captions, suffixes = [], [], [], [], []
    for shard, members in enumerate(samples):
        for key, places in members:
            picture = next((places[s] for s in PICTURES if s in places), None)
            if picture is None:
                continue
            caption = next((places[s] for s in texts if s in places), _Place(0, 0, ""))
            names.append(f"{key}.{picture.suffix}")
            shards.append(shard)
            pictures.append(picture[:2])
            captions.append(caption[:2])
            suffixes.append(caption.suffix)
    if not names:
        raise JaxsdError(
            f"no pictures in {files[0].path}: WebDataset's layout is 0001.jpg, 0001.txt, ..."
        )
    source = Tars(
        files,
        names,
        np.array(shards, np.int32),
        np.array(pictures, np.int64),
        np.array(captions, np.int64),
        suffixes,
        caption_column,
    )
    _check_fields(source)
    return source


def _check_fields(source: Tars) -> None:
    """JaxsdError if no caption can be told from the first ones, of a mistyped column say."""
    first = [i for i, suffix in enumerate(source.suffixes) if suffix == "json"][:CHECKED]
    if source.caption_column is not None and not first:
        raise JaxsdError(
            f"no caption column {source.caption_column!r} in {source.files[0].path}: there is no "
            ".json beside the pictures, but texts"
        )
    failed: list[JaxsdError] = []
    for i in first:
        try:
            source._caption(i)
            return
        except JaxsdError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _samples(file: File) -> list[tuple[str, dict[str, _Place]]]:
    """The members of a tar by their common name, which ends at the first dot of the file's."""
    samples: list[tuple[str, dict[str, _Place]]] = []
    latest: dict[str, dict[str, _Place]] = {}
    with open_file(file.path) as stream:
        try:
            headers: Any = _Headers(stream, file.size)
            with tarfile.open(fileobj=headers, mode="r:") as tar:
                for member in tar:
                    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                        continue  # folders, links and devices hold no picture
                    folder, base = posixpath.split(member.name)
                    stem, _, suffix = base.partition(".")
                    suffix = suffix.lower()
                    if not stem or suffix not in PICTURES + TEXTS:
                        continue
                    start, size = member.offset_data, member.size
                    if not 0 <= size <= min(MAX_MEMBER, file.size - start):
                        raise ValueError(f"{member.name} claims {size} bytes from byte {start}")
                    key = posixpath.join(folder, stem)
                    if suffix in latest.setdefault(key, {}) or not latest[key]:
                        latest[key] = {}
                        samples.append((key, latest[key]))
                    latest[key][suffix] = _Place(start, size, suffix)
        except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
            reason = (str(error).splitlines() or ["damaged"])[0]
            raise JaxsdError(
                f"{file.path} is not a whole tar file ({reason}): fetch or make it again"
            ) from None
    return samples


class _Headers:
    """A file for the tar module, which would read a "header" of any size that a file claims."""

    def __init__(self, stream: Any, size: int):
        self.stream, self.size = stream, size

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise ValueError(f"a header of {size} bytes")
        return self.stream.read(size)

    def seek(self, place: int) -> int:
        if not 0 <= place <= self.size:
            raise ValueError(f"a member that ends at byte {place} of {self.size}")
        return self.stream.seek(place)

    def tell(self) -> int:
        return self.stream.tell()
