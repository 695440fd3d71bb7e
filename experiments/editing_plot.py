"""The plot of `editing.py`: how often edits are right, against how far pictures are left."""

from pathlib import Path
from typing import NamedTuple

from tradeoff import Curve

COLOURS = {"SDEdit": "#c07a2c", "DDIM inversion": "#777777", "Imagic": "#1f5fa8"}


class Panel(NamedTuple):
    """curves: by the names in COLOURS. oracle: (distance, share) of edits that change the least."""

    title: str
    distance: str
    curves: dict[str, Curve]
    oracle: tuple[float, float]


def draw(rows: list[list[Panel]], image: Path) -> None:
    """A panel beside the other, row by row; the first and last of each knob's values are named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3.7 * len(rows[0]), 3.7 * len(rows))
    figure, axes = pyplot.subplots(
        len(rows), len(rows[0]), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axis, panel in zip(axes.flat, (panel for row in rows for panel in row), strict=True):
        for name, curve in panel.curves.items():
            x, y = curve.points()
            axis.plot([*x], [*y], "o-", label=name, color=COLOURS[name], markersize=4)
            for i in (0, len(x) - 1):  # which end is which
                place = {"textcoords": "offset points", "xytext": (4, -10), "fontsize": 8}
                axis.annotate(f"{curve.knobs[i]:g}", (x[i], y[i]), color=COLOURS[name], **place)
        axis.plot(*panel.oracle, "*", label="oracle", color="black", markersize=11)
        axis.set(title=panel.title, xlabel=panel.distance, ylim=(-0.03, 1.03))
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("digit and both colours right")
    axes[0, 0].legend(frameon=False)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90)
    pyplot.close(figure)
