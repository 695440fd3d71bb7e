"""What a training's folder holds, as far as it can be read."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from jaxsd.errors import JaxsdError
from jaxsd.weights.files import read_json, reading, write_json

STAGES, STARTS = "stages.json", "environment.json"
PICTURE = re.compile(r"(.+)_(\d{7,})\.png")
Row = dict[str, float]  # NaN where the log has null


@dataclasses.dataclass(frozen=True)
class Run:
    """A training, or a chain of them.

    rows: of the log, by step. starts: what environment.json says of each. pictures: by name, such
    as samples/preview, (step, file) in order. checkpoints: steps. stages: folders in `workdir`, in
    order; "." is the training in `workdir` itself.
    """

    workdir: Path
    config: dict[str, Any]
    rows: list[Row]
    starts: list[dict[str, Any]]
    pictures: dict[str, list[tuple[int, Path]]]
    checkpoints: list[int]
    ended: bool
    stages: list[str]

    @property
    def step(self) -> int:
        """The last one of which anything is known."""
        return max([int(row["step"]) for row in self.rows[-1:]] + self.checkpoints, default=0)

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a number in the log, where it is logged."""
        return [(int(row["step"]), row[name]) for row in self.rows if name in row]

    @property
    def columns(self) -> list[str]:
        """Names of all numbers, as they first come."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name != "step"]


def read_run(workdir: Path) -> Run:
    """What is there; JaxsdError if it is no training's folder."""
    config, stages = _object(workdir / "config.json"), read_stages(workdir)
    if not config and not stages:
        raise JaxsdError(f"{workdir} holds no training: there is neither config.json nor {STAGES}")
    rows = _rows(workdir / "metrics.jsonl")
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return Run(
        workdir,
        config,
        rows,
        read_starts(workdir),
        _pictures(workdir, int(rows[-1]["step"]) if rows else 0),
        sorted(int(name) for name in names if name.isdecimal()),
        (workdir / "model").is_dir(),
        stages,
    )


def write_stages(workdir: Path, stages: list[Path]) -> None:
    """Says which trainings a chain in `workdir` consists of: folders in it, or itself."""
    names = [str(stage.relative_to(workdir)) for stage in stages]
    if read_stages(workdir) != names:
        write_json(workdir / STAGES, {"stages": names})


def read_stages(workdir: Path) -> list[str]:
    """The names that `write_stages` wrote; none if it did not, and none of folders elsewhere."""
    names = map(str, _list(_object(workdir / STAGES), "stages"))
    return [name for name in names if name == "." or (name == Path(name).name and name != "..")]


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """What was written of each start of a training, as far as it can be read."""
    starts = _list(_object(workdir / STARTS), "starts")
    return [start for start in starts if isinstance(start, dict)]


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none, or none that can be read."""
    if not file.is_file():
        return {}
    try:
        return read_json(file)
    except JaxsdError:
        return {}


def _list(values: dict[str, Any], name: str) -> list[Any]:
    found = values.get(name)
    return found if isinstance(found, list) else []


def _rows(file: Path) -> list[Row]:
    if not file.is_file():
        return []
    with reading(file):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = {}
    for line in lines:
        try:
            values = json.loads(line)
            numbers = {n: v for n, v in values.items() if v is None or isinstance(v, int | float)}
            row = {n: math.nan if v is None else float(v) for n, v in numbers.items()}
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue  # cut off by a kill
    return [rows[step] for step in sorted(rows)]


def _pictures(workdir: Path, last: int) -> dict[str, list[tuple[int, Path]]]:
    """Those of steps that count: a training that was killed makes later ones again."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in workdir.glob("*/*.png"):
        named = PICTURE.fullmatch(file.name)
        if named and int(named[2]) <= last:
            name = f"{file.parent.name}/{named[1]}"
            found.setdefault(name, []).append((int(named[2]), file))
    return {name: sorted(found[name]) for name in sorted(found)}
