"""The plot of `docs/editing.py`: how often edits are right, against how far pictures are left."""

from pathlib import Path

from edits import KINDS, Scores
from tradeoff import Curve

COLOURS = {"SDEdit": "#c07a2c", "DDIM inversion": "#777777", "Imagic": "#1f5fa8"}


def draw(curves: dict[str, Curve], oracle: Scores, image: Path) -> None:
    """A panel for all edits and one for each kind of them.

    curves: by the names in COLOURS. oracle: of edits that change no more than they must, which
    stand as a star.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4.2), layout="constrained", sharey=True)
    parts = {"all edits": range(len(KINDS))} | {f"{k} edits": [i] for i, k in enumerate(KINDS)}
    for axis, (title, at) in zip(axes, parts.items(), strict=True):
        for name, curve in curves.items():
            x, y = curve.only(at).points()
            axis.plot([*x], [*y], "o-", label=name, color=COLOURS[name], markersize=4)
            for i in (0, len(x) - 1):  # which end is which
                place = {"textcoords": "offset points", "xytext": (4, -10), "fontsize": 8}
                axis.annotate(f"{curve.knobs[i]:g}", (x[i], y[i]), color=COLOURS[name], **place)
        star = oracle.rmse[:, at].mean(), oracle.right[:, at].mean()
        axis.plot(*star, "*", label="oracle", color="black", markersize=11)
        axis.set(title=title, xlabel="RMSE to the input", ylim=(-0.03, 1.03))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("digit and both colours right")
    axes[0].legend(frameon=False)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110)
    pyplot.close(figure)
