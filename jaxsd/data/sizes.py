"""The sizes of all pictures, read from their headers once and remembered in the workdir."""

import logging
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.data.images import read_size
from jaxsd.data.sources import Source
from jaxsd.errors import JaxsdError, ReadFailed
from jaxsd.weights.files import replacing

_log = logging.getLogger("jaxsd.data")
FILE = "sizes.npz"
HEAD = 1 << 16  # bytes; a camera's preview and colour profile seldom take more before the size
BLOCK = 256  # pictures in a row for one thread, which share what a row group of a table costs


def read_sizes(source: Source, workdir: Path | None = None) -> tuple[np.ndarray, dict[int, str]]:
    """int32 [n, 2] (height, width), 0 where a header cannot be read, and why it cannot.

    ReadFailed where that may be otherwise another time: the plan is to be the same in every run.
    With a workdir they are kept in `workdir/sizes.npz`, and read from there as long as the data
    are the same.
    """
    file = None if workdir is None else workdir / FILE
    if file is not None and (known := _load(file, source.stamp())) is not None:
        return known
    from tqdm import tqdm

    blocks = [range(i, min(i + BLOCK, len(source))) for i in range(0, len(source), BLOCK)]
    with ThreadPoolExecutor(min(source.readers, 4 * (os.cpu_count() or 1))) as threads:
        read = threads.map(lambda block: [_size(source, i) for i in block], blocks)
        bar = tqdm(
            read, "sizes", len(blocks), unit=f" x {BLOCK} pictures", leave=False, disable=None
        )
        found = [size for block in bar for size in block]
    sizes = np.array([(0, 0) if isinstance(s, str) else s for s in found], np.int32)
    reasons = {i: size for i, size in enumerate(found) if isinstance(size, str)}
    if file is not None:
        with replacing(file) as temporary, open(temporary, "wb") as stream:
            bad, why = np.array([*reasons], np.int64), np.array([*reasons.values()], str)
            np.savez(stream, stamp=np.array(source.stamp()), sizes=sizes, bad=bad, why=why)
    return sizes, reasons


def _size(source: Source, index: int) -> tuple[int, int] | str:
    """The size, or why there is none."""
    try:
        try:
            return read_size(source.head(index, HEAD))
        except ReadFailed:
            raise
        except JaxsdError:  # perhaps there is much before it
            return read_size(source[index]["image"])
    except ReadFailed:  # of the disk or the bucket: not to be remembered of the picture
        raise
    except JaxsdError as error:
        return str(error)


def _load(file: Path, stamp: str) -> tuple[np.ndarray, dict[int, str]] | None:
    """What was remembered of the same data; None if there is nothing, or it cannot be read."""
    try:
        with open(file, "rb") as stream, np.load(stream) as kept:
            if str(kept["stamp"]) != stamp:
                _log.warning("the pictures have changed since %s: other batches are to come", file)
                return None
            reasons: Any = zip(kept["bad"].tolist(), kept["why"].tolist(), strict=True)
            return kept["sizes"], dict(reasons)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
