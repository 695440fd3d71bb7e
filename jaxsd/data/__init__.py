"""Data sources and the batches made of them: a pure function of a seed and a step.

A source is a function `split -> grain.MapDataset` of elements (dicts of arrays, ints and strings)
given a seed; to add one, write it in a file of this folder and name it in SOURCES.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsd.data.captioned import PictureOptions, Pictures, open_pictures
from jaxsd.data.loading import Batch, batches
from jaxsd.data.sources import open_source
from jaxsd.errors import JaxsdError

__all__ = [
    "SOURCES",
    "Batch",
    "PictureOptions",
    "Pictures",
    "batches",
    "elements",
    "open_pictures",
    "open_source",
]


def digit_scans(split: str, seed: int) -> Any:
    """8x8 scans: {"image": float32 [8, 8, 1] in [-1, 1], "label": int}, shuffled, endless."""
    import grain

    from jaxsd.data.digits import ScanSource

    return grain.MapDataset.source(ScanSource(split)).seed(seed).shuffle().repeat()


def digit_pictures(split: str, seed: int) -> Any:
    """Coloured, captioned 32x32 pictures of the scans: {"image": [32, 32, 3], "caption": str}."""
    import grain

    from jaxsd.data.digits import PictureSource, make_picture

    source = grain.MapDataset.source(PictureSource(split)).seed(seed).shuffle().repeat()
    return source.random_map(make_picture)


def digit_pictures_in_groups(split: str, seed: int, group: int = 16) -> Any:
    """As `digit_pictures`, but `group` elements in a row have the same two colours.

    Hard negatives for contrastive training: with free colours, colours alone tell nearly all
    pictures of a batch apart, and the towers never learn to look at the digit.
    """
    import grain

    from jaxsd.data.digits import PictureSource, draw_colours, make_picture

    def paint(index: int, element: dict) -> dict:
        names = draw_colours(np.random.default_rng((seed, 1, index // group)))
        return make_picture(element, np.random.default_rng((seed, 0, index)), names)

    source = grain.MapDataset.source(PictureSource(split)).seed(seed).shuffle().repeat()
    return source.map_with_index(paint)


SOURCES: dict[str, Callable[[str, int], Any]] = {
    "digit-scans": digit_scans,
    "digits": digit_pictures,
    "digits-in-groups": digit_pictures_in_groups,
    "digits-same-colours": functools.partial(digit_pictures_in_groups, group=128),
}


def elements(name: str, split: str, seed: int) -> Any:
    """The endless, shuffled elements of a source; element i depends on the seed and i alone."""
    if name not in SOURCES:
        raise JaxsdError(f"unknown data {name!r}; there are {', '.join(SOURCES)}")
    return SOURCES[name](split, seed)
