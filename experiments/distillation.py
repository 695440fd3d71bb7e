"""Measures few-step students beside their teachers, prints the tables and draws the plot.

`python experiments/distillation.py` keeps each row in experiments/distillation.json as soon as it
is measured, so that it goes on where it was stopped; a row whose model has other weights now is
measured again. `--only pixel`, `--only text`, or names of models choose rows: the tables show all
there are. `--no-measure` prints and draws what is known; `--retime` takes all times anew, for a
machine that does nothing else. Needs matplotlib: `pip install -e ".[docs]"`.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distillation_plot
import numpy as np
import tyro
from kept import digest
from ship import SHIPPED

import jaxsd
from jaxsd.diffusion.jumps import student_schedule
from jaxsd.errors import JaxsdError
from jaxsd.evaluation import drawing, models, report
from jaxsd.evaluation.drawing import Sampling
from jaxsd.evaluation.same_noise import Teacher, load_teacher
from jaxsd.weights import read_json, write_json

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
# In the folder of the runs where training leaves it; by its name alone once it ships.
STUDENTS = {name: row.source for name, row in SHIPPED.items() if row.base}
FLOOR = "real train (floor)"
SHOWN_SCALE = 3.0  # of guidance: in the table with all columns, and in the plot
TEACHER_STEPS = 256  # of the pictures that pixel students are compared with
PANELS = {  # title, guidance scale
    "pixel": ("digits-ddpm, 8x8 pixels from a class", 1.0),
    "text": (f"digits, 32x32 pictures from text, guidance {SHOWN_SCALE:g}", SHOWN_SCALE),
}
REFERENCE = {"pixel": 64, "text": 50}  # DDIM steps of the teacher, whose FD the others' is over


@dataclasses.dataclass(frozen=True)
class Options:
    """Which rows to measure, how, and where they are kept."""

    only: tuple[str, ...] = ()
    """pixel, text, or names of models; by default everything."""
    runs: Path | None = None
    """The folder of the runs that left the students; by default those that ship."""
    results: Path = HERE / "distillation.json"
    image: Path = IMAGES / "distillation.png"
    cache: Path = Path(".cache/distillation")
    """Keeps what the teacher drew."""
    pixel_count: int = 2000
    """Pictures for each sampling seed."""
    text_count: int = 1000
    seeds: int = 3
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 8.0, 9.0)
    """Guidance scales of the models that read text."""
    batch_size: int = 100
    measure: bool = True
    """Also measure the rows that are not known yet."""
    retime: bool = False
    """Take the times of the plot's rows again, one after the other."""

    def count(self, panel: str) -> int:
        return self.pixel_count if panel == "pixel" else self.text_count


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, sampled in one way. curve: which line of the plot, and group of the tables."""

    panel: str
    curve: str
    model: str
    steps: int
    sampler: str = "ddim"
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.model}, {self.steps} {self.sampler} step{'s' * (self.steps > 1)}"


def all_rows(options: Options) -> list[Row]:
    """In the order of the tables."""
    pixel, text = "digits-ddpm", "digits"
    found = [Row("pixel", "DDIM", pixel, n) for n in (TEACHER_STEPS, 64, 8, 4, 2, 1)]
    found += [Row("pixel", "DPM++ 2M", pixel, n, "dpmpp_2m") for n in (8, 4, 2, 1)]
    found += [Row("pixel", "progressive", f"{pixel}-{n}step", n) for n in (8, 4, 2, 1)]
    for w in options.scales:
        found += [Row("text", "DDIM", text, n, "ddim", w) for n in (50, 4, 2, 1)]
        found += [Row("text", "DPM++ 2M", text, n, "dpmpp_2m", w) for n in (4, 2, 1)]
        found += [Row("text", "progressive", f"{text}-{n}step", n, "ddim", w) for n in (4, 2, 1)]
        found += [Row("text", "consistency", f"{text}-lcm", n, "lcm", w) for n in (4, 2, 1)]
    return found


# --- Measuring -------------------------------------------------------------------------------


class Results:
    """Figures by row, in a file that is written whole after each."""

    def __init__(self, options: Options):
        self._file, self._options = options.results, options
        self._known = read_json(options.results) if options.results.exists() else {}

    def _key(self, row: Row) -> str:
        drawn = f"{self._options.count(row.panel)} pictures x {self._options.seeds} seeds"
        return f"{row.panel}: {row.name}, guidance {row.scale:g}, {drawn}"

    def get(self, row: Row, weights: str | None = None) -> report.Summary | None:
        """The row's figures, if they are known (and of these weights)."""
        entry = self._known.get(self._key(row))
        if entry is None or weights not in (None, entry["weights"]):
            return None
        return {
            name: (*v, math.nan)[:2] if isinstance(v, list) else v
            for name, v in entry["figures"].items()
        }

    def put(self, row: Row, weights: str, figures: report.Summary) -> None:
        """What is not known, NaN, is left out: JSON has no such number."""
        known: dict[str, Any] = {}
        for name, value in figures.items():
            if isinstance(value, tuple):
                value = [v for v in value if not math.isnan(v)] or math.nan
            if isinstance(value, list) or not math.isnan(value):
                known[name] = value
        self._known[self._key(row)] = {"weights": weights, "figures": known}
        write_json(self._file, dict(sorted(self._known.items())))


@functools.cache
def opened(model: str, runs: Path | None) -> tuple[Any, str]:
    """(the pipeline, a digest of its UNet's weights); JaxsdError if there is no such model."""
    pipe = jaxsd.load(runs / STUDENTS[model] if runs and model in STUDENTS else model)
    return pipe, digest(pipe.params["unet"])


@functools.cache
def pixel_teacher(options: Options) -> Teacher:
    """Draws what pixel students should, from the same noise; kept in a folder for its weights."""
    pipe, weights = opened("digits-ddpm", None)
    folder = options.cache / f"{weights}-{options.pixel_count}-by-{options.batch_size}"
    return load_teacher("digits-ddpm", pipe, folder, TEACHER_STEPS)


@contextlib.contextmanager
def sampling(row: Row, options: Options) -> Iterator[tuple[Any, Sampling]]:
    """The pipeline and how it is to draw.

    Models are as they ship, but those that read text step as their students do where steps are few:
    one or two of "leading" spacing would begin next to the picture.
    """
    pipe, _ = opened(row.model, options.runs)
    how = Sampling(
        count=options.count(row.panel),
        steps=row.steps,
        sampler=row.sampler,
        guidance_scale=row.scale,
        sampling_seeds=tuple(range(options.seeds)),
        batch_size=options.batch_size,
    )
    shipped = pipe.schedule
    if row.model == "digits" and row.steps != REFERENCE["text"]:
        pipe.schedule = student_schedule(shipped)
    try:
        yield pipe, how
    finally:
        pipe.schedule = shipped


def measure_all(rows: list[Row], options: Options, results: Results) -> None:
    """Those that are chosen and not known yet, a model after the other."""
    names = {row.panel for row in rows} | {row.model for row in rows}
    if unknown := {*options.only} - names:
        sys.exit(f"--only {unknown.pop()}: there are {', '.join(sorted(names))}")
    chosen = [r for r in rows if not options.only or {r.panel, r.model} & {*options.only}]
    for panel in sorted({row.panel for row in chosen}):
        measure_floor(panel, options, results)
    missing = set()
    for row in sorted(chosen, key=lambda row: (row.panel, row.model)):
        try:
            _, weights = opened(row.model, options.runs)
        except JaxsdError as error:
            if row.model not in STUDENTS:
                raise
            if row.model not in missing:
                print(f"{row.model} is left out: {error}", file=sys.stderr)
            missing.add(row.model)
            continue
        if results.get(row, weights) is None:
            teacher = pixel_teacher(options) if row.panel == "pixel" else None
            with sampling(row, options) as (pipe, how):
                results.put(row, weights, models.evaluate_model(pipe, how, teacher))
            print(f"{row.name}, guidance {row.scale:g}", file=sys.stderr, flush=True)


def retime(rows: list[Row], options: Options, results: Results, batches: int = 6) -> None:
    """The times of the rows that the plot shows, of a few batches each."""
    for row in [row for panel in PANELS for row in shown(known_rows(rows, results), panel)]:
        _, weights = opened(row.model, options.runs)
        figures = results.get(row, weights)
        if figures is not None:
            with sampling(row, options) as (pipe, how):
                prompts = [str(i % 10) for i in range(how.batch_size)]
                if row.panel == "text":
                    prompts, _ = models.full_prompts(how.batch_size, 0)
                drawn = [drawing.draw_batch(pipe, prompts, how, i, 0) for i in range(batches)]
                costs = drawing.costs(pipe, how, [batch.seconds for batch in drawn])
            results.put(row, weights, figures | costs)


def measure_floor(panel: str, options: Options, results: Results) -> None:
    """The training scans themselves: no model can be expected to do better."""
    if results.get(floor(panel)) is None:
        controls = report.controls if panel == "pixel" else report.picture_controls
        results.put(floor(panel), "", controls(count=options.count(panel))[FLOOR])


def floor(panel: str) -> Row:
    return Row(panel, FLOOR, FLOOR, 0)


# --- Tables ----------------------------------------------------------------------------------

PIXEL_COLUMNS = {
    "fd_features": ("FD feat", 2),
    "fd_ratio": ("over 64 steps'", 2),
    "cas": ("CAS", 3),
    "one_nn": ("1-NN", 2),
    "nn_distance": ("NN to train", 2),
    "rmse_to_teacher": ("RMSE to 256 steps", 4),
    "rmse_ratio": ("over DDIM's", 2),
    "passes": ("passes", 0),
    "ms_per_image": ("ms/image", 2),
}
ACCURACIES = {
    "judge_accuracy": ("digit right", 3),
    "stroke_accuracy": ("stroke right", 3),
    "background_accuracy": ("background right", 3),
    "all_right": ("all right", 3),
}
TEXT_COLUMNS = ACCURACIES | {
    "fd_features": ("FD feat", 2),
    "fd_ratio": ("over 50 steps'", 2),
    "passes": ("passes", 0),
    "ms_per_image": ("ms/image", 2),
}
NOTES = {
    "pixel": "; as it ships the model clips x0 at each step, the pictures that RMSE is to do not",
    "text": "; the model itself steps as its students do, but as it ships at 50 steps",
}


def known_rows(rows: list[Row], results: Results) -> dict[Row, report.Summary]:
    """What has been measured, with ratios to the teacher's figures."""
    found = {row: figures for row in rows if (figures := results.get(row)) is not None}

    def of(row: Row, **like: Any) -> Any:
        return found.get(dataclasses.replace(row, **like))

    for row, figures in found.items():
        teacher = "digits-ddpm" if row.panel == "pixel" else "digits"
        ddim = {"curve": "DDIM", "model": teacher, "sampler": "ddim"}
        if base := of(row, **ddim, steps=REFERENCE[row.panel]):
            figures["fd_ratio"] = figures["fd_features"][0] / base["fd_features"][0]
        same = of(row, **ddim)
        if same and "rmse_to_teacher" in figures:
            figures["rmse_ratio"] = figures["rmse_to_teacher"][0] / same["rmse_to_teacher"][0]
    return found


def shown(known: dict[Row, report.Summary], panel: str) -> dict[Row, report.Summary]:
    """The rows of a panel of the plot, hence of one guidance scale."""
    of = panel, PANELS[panel][1]
    return {row: figures for row, figures in known.items() if (row.panel, row.scale) == of}


def tables(known: dict[Row, report.Summary], results: Results) -> Iterator[str]:
    """Markdown, one after the other, each under a line that says what it is."""
    for panel, columns in (("pixel", PIXEL_COLUMNS), ("text", TEXT_COLUMNS)):
        if rows := {row.name: figures for row, figures in shown(known, panel).items()}:
            if real := results.get(floor(panel)):
                rows[FLOOR] = real
            yield f"{PANELS[panel][0]}{NOTES[panel]}\n\n{report.format_table(rows, columns)}"
    text = {row: figures for row, figures in known.items() if row.panel == "text"}
    scales = {f"{row.scale:g}": (f"guidance {row.scale:g}", 3) for row in text}
    for key, (heading, _) in (ACCURACIES | {"fd_ratio": ("FD feat over 50 steps'", 3)}).items():
        by_name: dict[str, report.Summary] = {}
        for row, figures in text.items():
            if key in figures:
                by_name.setdefault(row.name, {})[f"{row.scale:g}"] = figures[key]
        if by_name:
            yield f"digits, {heading}\n\n{report.format_table(by_name, scales)}"


def panels(known: dict[Row, report.Summary], results: Results) -> list[distillation_plot.Panel]:
    """What the plot shows."""
    found = []
    for panel, (title, _) in PANELS.items():
        curves: dict[str, list[tuple[int, float, float]]] = {}
        for row, figures in shown(known, panel).items():
            curves.setdefault(row.curve, []).append((row.steps, *pair(figures["fd_features"])))
        real = results.get(floor(panel))
        if curves:
            level = pair(real["fd_features"])[0] if real else None
            found.append(distillation_plot.Panel(title, curves, level))
    return found


def pair(value: float | tuple[float, float]) -> tuple[float, float]:
    """(mean, spread), which is 0 where it is not known."""
    mean, spread = value if isinstance(value, tuple) else (value, 0.0)
    return mean, float(np.nan_to_num(spread))


def main(options: Options) -> None:
    rows, results = all_rows(options), Results(options)
    if options.measure:
        measure_all(rows, options, results)
    if options.retime:
        retime(rows, options, results)
    known = known_rows(rows, results)
    print(f"{options.pixel_count} scans or {options.text_count} pictures for each of "
          f"{options.seeds} sampling seeds; ± is the spread over these")  # fmt: skip
    for table in tables(known, results):
        print(f"\n{table}")
    if found := panels(known, results):
        distillation_plot.draw(found, options.image)


if __name__ == "__main__":
    main(tyro.cli(Options))
