"""`jaxsd report WORKDIR`: what a training left, as one page."""

import dataclasses
from pathlib import Path

import tyro

from jaxsd import run_report


@dataclasses.dataclass(frozen=True)
class Options:
    """Make report.html of a training's folder anew, or of a chain of trainings."""

    workdir: tyro.conf.Positional[Path]
    """The folder, as it was given to `train.py --workdir`."""


def main(argv: list[str] | None = None) -> None:
    """Parses the options of `jaxsd report`, writes the page and prints where it is."""
    print(run_report.write(tyro.cli(Options, args=argv, prog="jaxsd report").workdir))
