"""Batches of one shape each: a table of shapes, and the plan of which pictures come when.

Aspect-ratio buckets as NovelAI introduced and Stable Diffusion XL (Podell et al. 2023, 2.2 and
appendix I) uses them: every picture goes to the shape of the nearest ratio, so that little of it is
cropped, and there is one compiled program for each shape of the table.
"""

import dataclasses
import functools

import numpy as np

from jaxsd.errors import JaxsdError

Shape = tuple[int, int]


def bucket_shapes(resolution: int, multiple: int = 64, max_ratio: float = 2.0) -> list[Shape]:
    """Shapes (height, width) of at most resolution² pixels, from tall to wide.

    Both sides are multiples of `multiple`; each short side comes with the longest side that fits,
    up to `max_ratio` times as long. JaxsdError if the square is not among them.
    """
    if resolution < 1 or multiple < 1 or resolution % multiple:
        raise JaxsdError(f"resolution must be a multiple of {multiple}, not {resolution}")
    if not 1 <= max_ratio <= 100:
        raise JaxsdError(f"max_ratio must be from 1 to 100, not {max_ratio}")
    shapes: set[Shape] = set()
    for side in range(multiple, int(resolution * max_ratio) + 1, multiple):
        other = resolution**2 // side // multiple * multiple
        if other and max(side, other) <= max_ratio * min(side, other):
            shapes |= {(side, other), (other, side)}
    return sorted(shapes, key=lambda shape: (shape[1] / shape[0], shape))


def nearest_shapes(sizes: np.ndarray, shapes: list[Shape]) -> np.ndarray:
    """The place in `shapes` whose ratio is nearest (in its logarithm); sizes int [n, 2] -> [n]."""
    ratios = np.array([np.log(width / height) for height, width in shapes])
    own = np.log(sizes[:, 1] / sizes[:, 0])
    return np.abs(own[:, None] - ratios).argmin(1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pictures make up batch i: a function of the seed and i, worked out without a history.

    The pictures of each bucket come in an endless row, one shuffled epoch after the other, which is
    cut into batches. A batch belongs to the epoch in which it is full: what is left of a bucket at
    the end of an epoch opens its first batch of the next one, so nothing is left out, however rare
    its shape. Within an epoch the buckets' batches are shuffled.

    counts: how many pictures each bucket has; together at least one.
    """

    counts: tuple[int, ...]
    batch_size: int
    seed: int

    def batch(self, number: int) -> tuple[int, int]:
        """(bucket, which of the bucket's own batches) of batch number `number`."""
        return _batch(self, number)

    def picture(self, bucket: int, place: int) -> tuple[int, int]:
        """(which of the bucket's pictures, epoch) stands at a place of the bucket's endless row."""
        from grain.experimental import index_shuffle

        epoch, row = divmod(place, self.counts[bucket])
        seed = _shuffle_seed(self.seed, epoch, bucket)
        return index_shuffle(row, self.counts[bucket] - 1, seed, 4), epoch

    def full_before(self, epoch: int) -> np.ndarray:
        """int64 [buckets]: how many batches of each are full before an epoch begins."""
        return epoch * np.array(self.counts, np.int64) // self.batch_size

    def epoch_of(self, number: int) -> int:
        """The epoch that a batch belongs to."""
        low, high = 0, 1
        while self.full_before(high).sum() <= number:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.full_before(middle).sum() <= number:
                low = middle
            else:
                high = middle
        return low


@functools.lru_cache(maxsize=256)  # asked for each row of a batch
def _batch(plan: Plan, number: int) -> tuple[int, int]:
    epoch = plan.epoch_of(number)
    before, order = plan.full_before(epoch), _order(plan, epoch)
    place = number - int(before.sum())
    bucket = int(order[place])
    return bucket, int(before[bucket] + np.count_nonzero(order[:place] == bucket))


@functools.lru_cache(maxsize=4)
def _order(plan: Plan, epoch: int) -> np.ndarray:
    """The bucket of each batch of an epoch, shuffled."""
    counts = plan.full_before(epoch + 1) - plan.full_before(epoch)
    order = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.random.default_rng((plan.seed, 1, epoch)).permutation(order)


@functools.lru_cache(maxsize=256)
def _shuffle_seed(seed: int, epoch: int, bucket: int) -> int:
    return int(np.random.SeedSequence((seed, 2, epoch, bucket)).generate_state(1)[0])
