"""`jaxsd info MODEL`: what a model is, from headers alone."""

import dataclasses
import json

import tyro

from jaxsd.inspection import Report, inspect


@dataclasses.dataclass(frozen=True)
class Options:
    """Say what a model is: family, parameters, dtypes, sizes, and what is unusual."""

    model: tyro.conf.Positional[str]
    """A folder, a file (weights, LoRA, embedding), a Hub id, or the name of a model that ships."""
    variant: str | None = None
    """Which of several forms of the weights: fp16, non_ema."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, prog="jaxsd info")
    report = inspect(options.model, options.variant)
    print(json.dumps(dataclasses.asdict(report), indent=2) if options.json else _table(report))


def _table(report: Report) -> str:
    lines = [f"{report.path}: {report.kind}, family {report.family}"]
    lines += [f"{'':22}{'tensors':>9}{'parameters':>16}{'size':>14}  dtypes"]
    for name, held in report.components.items():
        size, dtypes = f"{held.bytes / 1e6:,.1f} MB", ", ".join(held.dtypes)
        lines.append(f"{name:22}{held.tensors:9,}{held.parameters:16,}{size:>14}  {dtypes}")
    return "\n".join(lines + [f"unusual: {line}" for line in report.unusual])
