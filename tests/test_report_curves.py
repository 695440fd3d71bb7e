"""Curves of `report.html`: thinned without losing a spike, smoothed, drawn of any numbers."""

import math
import re

import numpy as np
import pytest

from jaxsd.run_report.curves import BINS, Curve, chart, smoothed, thinned


def test_thinned_curves_keep_ends_of_each_bin_and_gaps():
    rng = np.random.default_rng(0)
    points = [(i, float(v)) for i, v in enumerate(rng.standard_normal(7000))]
    points[3000:4000] = [(i, math.nan) for i in range(3000, 4000)]
    few = thinned(points)
    finite = [p for p in few if math.isfinite(p[1])]
    assert len(few) <= 2 * BINS and few == sorted(few, key=lambda p: p[0])
    assert set(finite) <= set(points) and len(few) > len(finite)
    every = [v for _, v in points if math.isfinite(v)]
    assert {min(every), max(every)} <= {v for _, v in finite}
    assert thinned(points[:100]) == points[:100]


def test_smoothing_is_an_average():
    flat = smoothed([(i, 3.0) for i in range(50)], 10.0)
    assert all(v == pytest.approx(3.0) for _, v in flat)
    points = [(0, 1.0), (1, math.nan), (2, 4.0)]
    (_, a), (_, b), (_, c) = smoothed(points, 2.0)
    assert a == 1 and math.isnan(b) and c == pytest.approx((0.5 * 0.5 * 1 + 0.5 * 4) / 0.75)


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [0.0],
        [5e-324, 1e-323],
        [1.0, 1.0 + 2**-52],
        [1e-300, 1e300],
        [-1e308, 1e308],
        [1e16, 1e16 + 2],
        [math.nan, 2.0, math.inf],
    ],
)
def test_any_numbers_can_be_drawn(values, logarithmic):
    drawn = chart("any", [Curve("any", list(enumerate(values)), "c0")], logarithmic)
    assert "nan" not in drawn and "inf" not in drawn
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", drawn):
        assert 0 <= float(x) <= 960 and 0 <= float(y) <= 300
    assert bool(drawn) == any(math.isfinite(v) and (v > 0 or not logarithmic) for v in values)
