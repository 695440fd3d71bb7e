"""A folder of pictures: captions in metadata files, in a text beside each, or in folder names."""

import csv
import dataclasses
import hashlib
import io
import json
import posixpath
from collections.abc import Sequence
from typing import Any

from jaxsd.data.captions import as_caption, choose_column
from jaxsd.data.files import READERS, File, read_bytes, stamp
from jaxsd.data.splits import split_of, splits_of
from jaxsd.errors import JaxsdError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"


@dataclasses.dataclass(frozen=True)
class Folder:
    """Pictures, each a file of its own. `texts` are captions, or files that hold them."""

    files: Sequence[File]
    texts: Sequence[str | File]
    readers = READERS

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, file = self.texts[index], self.files[index]
        if isinstance(text, File):
            text = read_bytes(text.path).decode("utf-8-sig", "replace")
        return {"image": read_bytes(file.path), "caption": as_caption(text), "name": file.name}

    def name(self, index: int) -> str:
        return self.files[index].name

    def head(self, index: int, size: int) -> bytes:
        return read_bytes(self.files[index].path, 0, size)

    def stamp(self) -> str:
        """Of the captions, too: of those in files of their own by their size."""
        texts = json.dumps([t.size if isinstance(t, File) else t for t in self.texts]).encode()
        return hashlib.sha256(stamp(self.files).encode() + texts).hexdigest()[:16]


def image_folder(files: Sequence[File], caption_column: str | None = None) -> Folder:
    """The pictures among some files, with captions.

    Where there is a metadata.jsonl, .csv or .parquet, as Hugging Face's imagefolder reads it (a
    column `file_name`, relative to the metadata's folder, and one of captions), its pictures are
    those of that file. Without any, a caption is what the .txt of the same name says (or nothing,
    for a picture that has none); without any .txt, it is the name of the picture's folder, with
    blanks for underscores, or nothing for pictures that lie at the top.
    """
    described = [f for f in files if posixpath.basename(f.name) in METADATA]
    if described:
        rows = [row for file in described for row in _described(file, files, caption_column)]
        return Folder([file for file, _ in rows], [text for _, text in rows])
    pictures = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    texts = {posixpath.splitext(f.name)[0]: f for f in files if f.name.lower().endswith(".txt")}
    beside = [texts.get(posixpath.splitext(file.name)[0], "") for file in pictures]
    if any(beside):
        return Folder(pictures, beside)
    splits = splits_of([file.name for file in pictures])
    return Folder(pictures, [_class(f.name, s) for f, s in zip(pictures, splits, strict=True)])


def _class(name: str, split: str | None) -> str:
    folder = posixpath.basename(posixpath.dirname(name))
    return "" if split and split_of(folder) == split else folder.replace("_", " ")


def _described(
    metadata: File, files: Sequence[File], caption_column: str | None
) -> list[tuple[File, str]]:
    """The pictures that a metadata file names, and their captions."""
    there = {file.name: file for file in files}
    base, folder = posixpath.dirname(metadata.name), metadata.path.rpartition("/")[0]
    rows = _rows(metadata)
    columns = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if isinstance(name, str)  # what a row of CSV has beyond its columns is called None
        and name != FILE_NAME
        and all(isinstance(row.get(name), (str, list, type(None))) for row in rows)
    ]
    column = choose_column(columns, caption_column, metadata.path)
    found = []
    for number, row in enumerate(rows, 1):
        name = row.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            raise JaxsdError(
                f"{metadata.path}: row {number} has no {FILE_NAME!r}, which names a picture "
                "relative to this file"
            )
        inside = posixpath.normpath(posixpath.join(base, name))
        if inside.startswith(("/", "../")):
            raise JaxsdError(f"{metadata.path}: row {number}, {name}, lies outside the data")
        # One that is missing stays in, and is counted and named with all that cannot be read.
        missing = File(f"{folder}/{name}", inside, 0)
        found.append((there.get(inside, missing), as_caption(row.get(column) if column else "")))
    return found


def _rows(metadata: File) -> list[dict[str, Any]]:
    """The rows of a metadata file, each a dict by column name."""
    raw = read_bytes(metadata.path)
    if metadata.name.endswith(".parquet"):
        from jaxsd.data.tables import read_rows

        return read_rows(raw, metadata.path)
    text = raw.decode("utf-8-sig", "replace")
    if metadata.name.endswith(".csv"):
        try:
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise JaxsdError(f"{metadata.path} is not valid CSV: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise JaxsdError(f"{metadata.path}: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise JaxsdError(f"{metadata.path}: line {number} is not a JSON object {{...}}")
        rows.append(row)
    return rows
