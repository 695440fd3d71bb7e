"""What a comparison found: errors by block and by step, tolerances, and the first departure.

float32: the greatest error, relative to the greatest value of PyTorch's. bfloat16: no two correct
programs agree to many digits, and the greatest of many rounding errors differs by more than a
factor of two between them wherever a LayerNorm magnifies one. So there the distances of both to
PyTorch in float32 are held against each other, as root mean squares.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("float32", "bfloat16")


class Error(NamedTuple):
    """How far two arrays are apart, or from zero how large one is."""

    most: float
    rms: float

    @classmethod
    def of(cls, difference: np.ndarray) -> "Error":
        return cls(
            float(np.abs(difference).max()), float(np.sqrt(np.square(difference, dtype="d").mean()))
        )


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a block may be from PyTorch's.

    float32: of the running model, in which every block is fed what ours gave before. alone: of one
    block that is fed PyTorch's own values, which leaves what its own arithmetic adds. bfloat16:
    our distance to PyTorch in float32 may be `bfloat16_ratio` times that of PyTorch in bfloat16,
    plus `bfloat16_floor`, half a unit in the eighth and last bit.
    """

    float32: float = 1e-4
    alone: float = 2e-5
    bfloat16_ratio: float = 2.0
    bfloat16_floor: float = 2.0**-8


@dataclasses.dataclass(frozen=True)
class Row:
    """The errors of one block (or sampling step) in one dtype.

    absolute, relative: the greatest, against PyTorch in the same dtype. alone: in float32, as
    `relative`, the block fed PyTorch's values. to_float32, torch_to_float32: in bfloat16, the root
    mean square distances of ours and PyTorch's to PyTorch in float32, over that of its values.
    """

    name: str
    absolute: float
    relative: float
    alone: float | None = None
    to_float32: float | None = None
    torch_to_float32: float | None = None

    def departs_alone(self, tolerance: Tolerance) -> bool:
        return self.alone is not None and not self.alone <= tolerance.alone  # NaN departs, too

    def departs(self, tolerance: Tolerance) -> bool:
        if self.to_float32 is None or self.torch_to_float32 is None:
            return not self.relative <= tolerance.float32
        most = tolerance.bfloat16_ratio * self.torch_to_float32 + tolerance.bfloat16_floor
        return not self.to_float32 <= most


@dataclasses.dataclass(frozen=True)
class Section:
    """A component, or the trajectory: rows in the order of execution, for each dtype.

    unmatched: blocks of ours that did not run in PyTorch under the same name, and were not
    compared.
    """

    name: str
    about: str
    rows: dict[str, list[Row]]
    unmatched: list[str] = dataclasses.field(default_factory=list)

    def first_departing(self, dtype: str, tolerance: Tolerance) -> Row | None:
        """The first block whose own arithmetic departs; if none does, the first that drifts off."""
        rows = self.rows[dtype]
        alone = (row for row in rows if row.departs_alone(tolerance))
        running = (row for row in rows if row.departs(tolerance))
        return next(alone, None) or next(running, None)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that `jaxsd compare` prints. notes: what was left out, and why."""

    model: str
    reference: str
    tolerance: Tolerance
    sections: list[Section]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def departures(self) -> list[tuple[str, str, Row]]:
        """(component, dtype, first block that departs), where one does."""
        found = [
            (section.name, dtype, section.first_departing(dtype, self.tolerance))
            for section in self.sections
            for dtype in section.rows
        ]
        return [(name, dtype, row) for name, dtype, row in found if row is not None]

    @property
    def agrees(self) -> bool:
        """Whether nothing departs."""
        return not self.departures

    def to_json(self) -> dict[str, Any]:
        """Numbers and names; an error that is not finite is null."""
        sections = {}
        for section in self.sections:
            sections[section.name] = {"about": section.about, "unmatched": section.unmatched}
            for dtype, rows in section.rows.items():
                first = section.first_departing(dtype, self.tolerance)
                sections[section.name][dtype] = {
                    "blocks": [_row_json(row) for row in rows],
                    "worst_relative": _finite(worst(rows, "relative")),
                    "first_departing": first and first.name,
                }
        return {
            "model": self.model,
            "reference": self.reference,
            "tolerance": dataclasses.asdict(self.tolerance),
            "agrees": self.agrees,
            "sections": sections,
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """Tables, a summary, and the verdict."""
        parts = [_table(section, self.tolerance) for section in self.sections]
        return "\n\n".join([*parts, *self.notes, self._verdict()])

    def _verdict(self) -> str:
        lines = []
        for section in self.sections:
            for dtype, rows in section.rows.items():
                said = f"{section.name} {dtype}: worst relative error {worst(rows, 'relative'):.1e}"
                if rows[0].alone is not None:
                    said += f", of a block alone {worst(rows, 'alone'):.1e}"
                if rows[0].to_float32 is not None:
                    said += f"; rms distance to float32 {worst(rows, 'to_float32'):.1e}"
                    said += f", PyTorch's {worst(rows, 'torch_to_float32'):.1e}"
                first = section.first_departing(dtype, self.tolerance)
                lines.append(
                    f"{said}; " + (f"DEPARTS first at {first.name}" if first else "agrees")
                )
        return "\n".join(lines)


def make_row(
    name: str,
    dtype: str,
    errors: Sequence[Error],
    same: np.ndarray,
    exact: np.ndarray,
    alone: Error | None = None,
) -> Row:
    """A row from our errors against PyTorch in this dtype and, if that is another, in float32.

    same, exact: PyTorch's values in this dtype and in float32. alone: the error of the block fed
    PyTorch's values.
    """
    size, error = Error.of(exact), errors[0]
    row = Row(name, error.most, relative(error.most, Error.of(same).most))
    if dtype == "float32":
        return dataclasses.replace(row, alone=alone and relative(alone.most, size.most))
    theirs = relative(Error.of(same - exact).rms, size.rms)
    ours = relative(errors[1].rms, size.rms)
    return dataclasses.replace(row, to_float32=ours, torch_to_float32=theirs)


def relative(error: float, size: float) -> float:
    """error / size; what PyTorch says is zero everywhere is so here, or infinitely wrong."""
    return error / size if size else (0.0 if error == 0 else math.inf)


def worst(rows: list[Row], field: str) -> float:
    """The greatest value of a field; infinite if one is NaN."""
    values = [getattr(row, field) for row in rows]
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


COLUMNS = {
    "absolute": "max abs",
    "relative": "max rel",
    "alone": "alone",
    "to_float32": "rms",
    "torch_to_float32": "torch rms",
}


def _table(section: Section, tolerance: Tolerance) -> str:
    """One line for a block, the columns of each dtype side by side; `!` marks what departs."""
    names = [row.name for row in next(iter(section.rows.values()))]
    shown = {
        dtype: [field for field in COLUMNS if getattr(rows[0], field) is not None]
        for dtype, rows in section.rows.items()
    }
    width = max(map(len, [*names, "block"]))
    head = ["", "block"]
    for dtype, fields in shown.items():
        head[0] += f"  {dtype:<{10 * len(fields)}}"
        head[1] = head[1].ljust(width) if dtype == next(iter(shown)) else head[1]
        head[1] += "  " + "".join(f"{COLUMNS[field]:<10}" for field in fields)
    lines = [f"{section.name}: {section.about}", " " * width + head[0], head[1]]
    for i, name in enumerate(names):
        line = name.ljust(width)
        for dtype, fields in shown.items():
            row = section.rows[dtype][i]
            wrong = row.departs(tolerance) or row.departs_alone(tolerance)
            line += " !" if wrong else "  "
            line += "".join(f"{getattr(row, field):<10.1e}" for field in fields)
        lines.append(line)
    if section.unmatched:
        lines.append(f"not in PyTorch under this name: {', '.join(section.unmatched)}")
    return "\n".join(line.rstrip() for line in lines)


def _row_json(row: Row) -> dict[str, Any]:
    values = {k: v for k, v in dataclasses.asdict(row).items() if v is not None}
    return {k: v if isinstance(v, str) else _finite(v) for k, v in values.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
