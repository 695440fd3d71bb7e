"""What no update ever sees: the first examples of a held-out split, in the forms that are measured.

Always the same ones in the same order, whenever and on however many devices they are asked for.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsd import data
from jaxsd.pictures import to_uint8

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """`count` examples.

    batches() yields them as the objective takes them, all in arrays of one length but the last;
    pictures() as uint8 [n, h, w, c]; prompts() are what they were described by (a caption, the name
    of a class, or nothing).
    """

    count: int
    batches: Callable[[], Iterator[Batch]]
    prompts: Callable[[], list[str]]
    pictures: Callable[[], Iterator[np.ndarray]]


def of_elements(
    dataset: Any,
    count: int,
    batch_size: int,
    tokenize: Callable[[str], np.ndarray] | None = None,
) -> HeldOut:
    """The first `count` elements of a source of pictures, `data.elements(name, "test", seed)` say.

    Fewer where a folder has no more: none is taken twice, but for what stands in for a picture that
    cannot be decoded. With `tokenize`, batches have "input_ids"
    for captions, as in training.
    """
    if isinstance(dataset, data.Pictures):
        count = min(count, sum(map(len, dataset.members)))
    numbers = range(count)

    def batches() -> Iterator[Batch]:
        stop, left = math.ceil(count / batch_size), count
        for batch in data.batches(dataset, batch_size, 0, stop, tokenize):
            yield {name: value[:left] for name, value in batch.items()}
            left -= batch_size

    def pictures() -> Iterator[np.ndarray]:
        for start in numbers[::batch_size]:
            chosen = numbers[start : start + batch_size]
            yield np.stack([as_pixels(dataset[i]["image"]) for i in chosen])

    return HeldOut(count, batches, lambda: [prompt_of(dataset[i]) for i in numbers], pictures)


def as_pixels(image: np.ndarray) -> np.ndarray:
    """uint8 of an element's picture, which may be in [-1, 1]."""
    return image if image.dtype == np.uint8 else to_uint8(image)


def prompt_of(element: Mapping[str, Any]) -> str:
    """What would ask a model for such a picture."""
    return element.get("caption") or str(element.get("label", ""))


def cycled(prompts: Sequence[str], count: int) -> list[str]:
    """`count` prompts: the first ones, from the start again where there are fewer."""
    return list(itertools.islice(itertools.cycle(prompts), count))
