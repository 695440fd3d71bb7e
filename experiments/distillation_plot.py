"""The plot of `distillation.py`: quality against steps, a panel for each kind of model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

TEACHERS = {"DDIM": "#777777", "DPM++ 2M": "#c07a2c"}  # colours of the undistilled models' curves
STUDENTS = {"progressive": "#1f5fa8", "consistency": "#3a8f4d"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """curves: (steps, FD feat, its spread over sampling seeds) by a name in TEACHERS or STUDENTS.

    floor: FD feat of real scans.
    """

    title: str
    curves: dict[str, list[tuple[int, float, float]]]
    floor: float | None


def draw(panels: Sequence[Panel], image: Path) -> None:
    """Both axes are logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5.5 * len(panels), 4.4)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, points in panel.curves.items():
            student = name in STUDENTS
            axis.errorbar(
                *zip(*sorted(points), strict=True),
                label=f"{name} student" if student else f"teacher, {name}",
                color=(TEACHERS | STUDENTS)[name],
                linewidth=2 if student else 1.3,
                marker="o",
                markersize=5,
                capsize=3,
            )
        if panel.floor is not None:
            label = "real training scans"
            axis.axhline(panel.floor, color="black", linestyle=":", linewidth=1, label=label)
        axis.set(title=panel.title, xlabel="sampling steps", ylabel="FD feat (lower is better)")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({steps for points in panel.curves.values() for steps, *_ in points})
        axis.set_xticks(ticks, [str(steps) for steps in ticks])
        low, high = axis.get_ylim()
        levels = [y for y in (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200) if low <= y <= high]
        axis.set_yticks(levels, [f"{y:g}" for y in levels])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=130)
    pyplot.close(figure)
