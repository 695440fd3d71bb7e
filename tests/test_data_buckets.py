"""A fixed table of shapes, and a plan of batches that needs no history."""

import collections

import numpy as np
import pytest

from jaxsd.data.buckets import Plan, bucket_shapes, nearest_shapes
from jaxsd.errors import JaxsdError


@pytest.mark.parametrize("resolution", [256, 512, 768, 1024])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_shapes_are_large_even_and_bounded(resolution, ratio):
    shapes = bucket_shapes(resolution, 64, ratio)
    assert (resolution, resolution) in shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % 64 == width % 64 == 0
        assert height * width <= resolution**2
        assert max(height, width) <= ratio * min(height, width)
        assert (width, height) in shapes
        assert height * width > resolution**2 - 64 * max(height, width)  # none larger would fit
    ratios = [width / height for height, width in shapes]
    assert ratios == sorted(ratios)


def test_the_shapes_of_stable_diffusion_xl_are_there():
    # of the table in appendix I of Podell et al. 2023, those that both sides' largest partner makes
    published = {(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216)}
    published |= {(896, 1152), (960, 1088), (1024, 1024), (1216, 832), (1344, 768), (2048, 512)}
    assert published <= set(bucket_shapes(1024, 64, 4.0))


def test_shapes_that_cannot_be():
    for arguments in (
        (500, 64, 2.0),
        (0, 64, 2.0),
        (512, 64, 0.5),
        (512, 64, float("nan")),
        (512, 64, 1e9),
    ):
        with pytest.raises(JaxsdError):
            bucket_shapes(*arguments)


def test_every_size_goes_to_the_nearest_ratio():
    shapes = bucket_shapes(512, 64, 2.0)
    sizes = np.array([(100, 100), (1000, 100), (100, 1000), *shapes, (480, 640)])
    nearest = [shapes[i] for i in nearest_shapes(sizes, shapes)]
    assert nearest[0] == (512, 512)
    assert nearest[1] == shapes[0] and nearest[2] == shapes[-1]
    assert nearest[3:-1] == shapes
    assert nearest[-1] == (448, 576)


COUNTS = ((7, 1, 0, 20), 4)


def pictures(plan, number):
    bucket, own = plan.batch(number)
    row = range(own * plan.batch_size, (own + 1) * plan.batch_size)
    return bucket, [plan.picture(bucket, place) for place in row]


def test_every_picture_comes_once_an_epoch():
    plan = Plan(*COUNTS, 0)
    seen = collections.Counter()
    total = plan.full_before(12).sum()
    assert total == 12 * 7 // 4 + 12 * 1 // 4 + 12 * 20 // 4
    for number in range(total):
        bucket, rows = pictures(plan, number)
        for picture, epoch in rows:
            seen[bucket, picture, epoch] += 1
    assert set(seen.values()) == {1}
    assert len(seen) == total * 4
    whole = {(b, p, e) for b, n in enumerate(COUNTS[0]) for p in range(n) for e in range(12)}
    assert len(whole - set(seen)) == 12 * 28 - total * 4 == 0


def test_a_batch_comes_in_the_epoch_in_which_it_is_full():
    plan = Plan(*COUNTS, 3)
    for number in range(60):
        bucket, rows = pictures(plan, number)
        assert max(epoch for _, epoch in rows) == plan.epoch_of(number)
        assert bucket != 2


def test_the_seed_and_the_epoch_shuffle_and_nothing_else_does():
    def orders(seed, first):
        return [pictures(Plan((16, 16), 4, seed), n) for n in range(first, first + 8)]

    assert orders(0, 0) == orders(0, 0) != orders(1, 0)
    buckets = [[bucket for bucket, _ in orders(0, first)] for first in (0, 8, 16)]
    assert len(set(map(tuple, buckets))) > 1
    rows = [[p for _, row in sorted(orders(0, first)) for p, _ in row] for first in (0, 8)]
    assert rows[0] != rows[1]


def test_fewer_pictures_than_a_batch():
    plan = Plan((3,), 8, 0)
    bucket, rows = pictures(plan, 0)
    assert [epoch for _, epoch in rows] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert plan.epoch_of(0) == 2 and plan.epoch_of(3 * 10**9) == 8 * 10**9 + 2
