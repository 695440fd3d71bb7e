"""Curves as SVG: thinned, smoothed, linear or logarithmic; a picture that needs nothing else."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

LARGE, SMALL = (960, 300), (310, 140)  # width and height
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 10, 26
BINS = 300  # of steps, of which a curve keeps the lowest and the highest value
Points = list[tuple[int, float]]  # (step, value); NaN is a gap


@dataclasses.dataclass(frozen=True)
class Curve:
    """kind: a class in the page's style: c0 ... c5, and raw for what is only the background."""

    name: str
    points: Points
    kind: str


def smoothed(points: Points, span: float) -> Points:
    """The exponential moving average over about `span` points, without the pull towards 0.

    Gaps stay, and the average goes on behind them.
    """
    keep = 1 - 1 / max(1.0, span)
    total = weight = 0.0
    found = []
    for step, value in points:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append((step, total / weight if math.isfinite(value) else math.nan))
    return found


def thinned(points: Points, bins: int = BINS) -> Points:
    """At most twice as many points as bins of steps: of each the lowest and the highest value.

    So that no spike is lost. A bin of gaps alone is a gap.
    """
    if len(points) <= 2 * bins:
        return points
    first, last = points[0][0], points[-1][0]
    groups: dict[int, Points] = {}
    for point in points:
        groups.setdefault(min(bins - 1, bins * (point[0] - first) // (last - first)), []).append(
            point
        )
    found: Points = []
    for group in groups.values():
        finite = [point for point in group if math.isfinite(point[1])]
        if not finite:
            found.append(group[0])
            continue
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def chart(
    title: str,
    curves: Sequence[Curve],
    logarithmic: bool = False,
    marks: Sequence[int] = (),
    size: tuple[int, int] = LARGE,
) -> str:
    """An SVG element; empty if no value is finite. marks: steps at which something happened.

    logarithmic: of what is above 0 alone.
    """
    curves = [dataclasses.replace(c, points=_drawable(c.points, logarithmic)) for c in curves]
    values = [v for c in curves for _, v in c.points if math.isfinite(v)]
    steps = [float(s) for c in curves for s, v in c.points if math.isfinite(v)]
    if not values:
        return ""
    width, height = size
    x_axis = _Axis(min(steps), max(steps), LEFT, width - RIGHT)
    y_axis = _Axis(min(values), max(values), height - BOTTOM, TOP, logarithmic)
    drawn = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for value in y_axis.ticks():
        y = y_axis(value)
        drawn.append(f'<path class="line" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="y">{number(value)}</text>')
    for value in filter(float.is_integer, map(float, x_axis.ticks())):
        x, room = x_axis(value), 4 * len(number(value))
        kind = "y" if x + room > width else "x"  # ends, where it would not fit in the middle
        x = width - 2 if kind == "y" else x
        drawn.append(f'<text x="{x:.1f}" y="{height - 8}" class="{kind}">{number(value)}</text>')
    for step in marks:
        if x_axis.low <= step <= x_axis.high:
            line = f"M{x_axis(step):.1f} {TOP}V{height - BOTTOM}"
            drawn.append(f'<path class="mark" d="{line}"><title>step {step}</title></path>')
    for curve in curves:
        drawn.append(_path(curve, x_axis, y_axis))
    return "".join(drawn) + "</svg>"


def number(value: float) -> str:
    """Short, for people."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _drawable(points: Points, logarithmic: bool) -> Points:
    return [(s, v if not logarithmic or v > 0 else math.nan) for s, v in points]


def _path(curve: Curve, x_axis: "_Axis", y_axis: "_Axis") -> str:
    """Lines between neighbours that are numbers; a dot where one stands alone."""
    written, runs = [], [[]]
    for step, value in thinned(curve.points):
        if math.isfinite(value):
            runs[-1].append(f"{x_axis(step):.1f} {y_axis(value):.1f}")
        elif runs[-1]:
            runs.append([])
    for run in filter(None, runs):
        written.append("M" + "L".join(run) + ("h.1" if len(run) == 1 else ""))
    name = f"<title>{escape(curve.name)}</title>"
    return f'<path class="curve {curve.kind}" d="{"".join(written)}">{name}</path>'


class _Axis:
    """From values to places in the picture."""

    def __init__(self, low: float, high: float, begin: int, end: int, logarithmic: bool = False):
        self.low, self.high, self._logarithmic = low, high, logarithmic
        self._begin, self._end = begin, end
        self._from, self._to = self._scaled(low), self._scaled(high)
        if self._to <= self._from:  # a single value, in the middle
            room = 0.3 if logarithmic else abs(low) / 2 or 1.0
            self._from, self._to = self._from - room, self._to + room

    def _scaled(self, value: int | float) -> float:
        return math.log10(value) if self._logarithmic else float(value)

    def __call__(self, value: int | float) -> float:
        # Each divided first: a difference of the largest floats would be infinite
        span = self._to / 2 - self._from / 2
        share = (self._scaled(value) / 2 - self._from / 2) / span
        return self._begin + share * (self._end - self._begin)

    def ticks(self) -> list[float]:
        """Round values inside, about five."""
        if self._logarithmic:
            decades = range(math.floor(self._from), math.ceil(self._to) + 1)
            steps = (1,) if self._to - self._from > 1.5 else (1, 2, 5)
            every = max(1, len(decades) // 6)
            found = [float(f"{m}e{d}") for d in decades[::every] for m in steps]
            found = [v for v in found if v > 0 and self._from <= math.log10(v) <= self._to]
            if len(found) > 1:
                return found
        low, high = self.low, self.high
        if high <= low:
            return [low]
        rough = high / 5 - low / 5
        if rough < 1e-300:  # whose power of ten is no float any more
            return [low]
        unit = 10.0 ** math.floor(math.log10(rough))
        unit *= next(m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
        first, last = math.ceil(low / unit), math.floor(high / unit)
        slack = (high / 2 - low / 2) * 1e-9  # 3 * 0.1 is above 0.3
        found = [i * unit for i in range(first, last + 1)]
        return [v for v in found if low - slack <= v <= high + slack] or [low]
