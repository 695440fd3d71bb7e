"""Which pictures are for training and which are held out: by folders' names, or by a share."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# The words for a split in the names of folders and files that Hugging Face's loaders know.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: split for split, words in SPLITS.items() for word in words}


def split_of(folders: str) -> str | None:
    """The split that one of the folders of a path is named after, the topmost that is."""
    return next((_WORDS[word] for word in folders.lower().split("/") if word in _WORDS), None)


def splits_of(names: Sequence[str], folders_only: bool = True) -> list[str | None]:
    """The split that each file belongs to: by its folder, or else by a word of its own name.

    The topmost level of folders decides at which any is named after a split. If there is but one
    split beside folders of other names, they are classes, of which one happens to be called "dev".
    """
    paths = [name.lower().split("/") for name in names]
    for level in range(max(map(len, paths), default=1) - 1):
        folders = [path[level] if level < len(path) - 1 else "" for path in paths]
        splits = [_WORDS.get(folder) for folder in folders]
        if found := {*splits} - {None}:
            classes = len(found) == 1 and any(f and f not in _WORDS for f in folders)
            return [None] * len(names) if classes else splits
    if folders_only:
        return [None] * len(names)
    words = [re.split(r"[-._\d]+", path[-1]) for path in paths]
    return [next((_WORDS[w] for w in several if w in _WORDS), None) for several in words]


def chosen_split(splits: Sequence[str | None], split: str) -> list[int] | None:
    """The places in a list of splits that are for `split`, or None if no name says a split.

    "test" is validation where there is any, for a test set is best kept for the end. What belongs
    to no split is for training if nothing else is.
    """
    if not any(splits):
        return None
    if split == "test":
        wanted = "validation" if "validation" in splits else "test"
    else:
        wanted = "train" if "train" in splits else None
    return [i for i, s in enumerate(splits) if s == wanted]


def held_out(name: str, share: float) -> bool:
    """Whether a picture is among the share that is held out, decided by its name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the pictures of a source."""

    source: Any
    indices: np.ndarray  # int [n]

    @property
    def readers(self) -> int:
        return self.source.readers

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def head(self, index: int, size: int) -> bytes:
        return self.source.head(int(self.indices[index]), size)

    def stamp(self) -> str:
        digest = hashlib.sha256(self.source.stamp().encode() + self.indices.tobytes())
        return digest.hexdigest()[:16]
