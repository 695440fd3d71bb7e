"""Measures Imagic beside SDEdit and DDIM inversion on a scripted TEdBench, and draws the curves.

`python experiments/editing.py` keeps each row in experiments/editing.json as soon as it is
measured, and what was drawn of each Imagic edit in .cache/editing, so that it goes on where it was
stopped; `--minutes 5` stops it. `--only SDEdit Imagic` chooses methods; `--no-measure` prints and
draws what is known. Needs matplotlib: `pip install -e ".[docs]"`.

Held-out scans, three edits of each (`edits.py`), by the shipped `digits`, in each of the ways of
`edit_methods.py`. Imagic's settings in `Design` were chosen on training scans (`--split train`,
with its own --results) before any of its edits of a held-out scan was looked at; the baselines'
guidance is the usual 3, and was not tuned.
"""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import editing_plot
import numpy as np
import tyro
from edit_methods import BASELINES, IMAGIC, METHODS, Design, ImagicEdits, Method
from edits import KINDS, Edit, Scores, draw_edits, psnr, score
from kept import Kept, digest
from tradeoff import Curve, area, gaps, interval

import jaxsd
from jaxsd.diffusion import jumps
from jaxsd.evaluation.report import format_table
from jaxsd.pictures import tile

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"


@dataclasses.dataclass(frozen=True)
class Options:
    """Which rows to measure, and where they are kept."""

    design: Design = Design()
    only: tuple[str, ...] = ()
    """SDEdit, DDIM inversion, Imagic; by default all."""
    model: str = "digits"
    split: str = "test"
    count: int = 100
    """Pictures, each edited in three ways; fewer are the first of them."""
    results: Path = HERE / "editing.json"
    image: Path = IMAGES / "editing.png"
    examples: Path | None = IMAGES / "imagic.png"
    """Some Imagic edits over eta, if they were drawn here."""
    cache: Path = Path(".cache/editing")
    minutes: float | None = None
    """Stop after so long; what is done is kept."""
    measure: bool = True
    """Also measure the rows that are not known yet."""


Figures = dict[str, str]  # a word for each edit: the fields of `Scores`; Imagic's, and STAGES
STAGES = ("error_before", "error_embedding", "error_tuning")  # of reconstruction


# --- Measuring -------------------------------------------------------------------------------


class Measurement:
    """The edits, and the rows that are known of them: one for each method and value of its knob."""

    def __init__(self, options: Options):
        self.options, self.design = options, options.design
        self.edits = draw_edits(options.split, options.count)
        self.pipe = jaxsd.load(options.model)
        self.pipe.schedule = jumps.student_schedule(self.pipe.schedule)  # for all, as inversion's
        self.weights = digest(self.pipe.params["unet"])
        self._kept = Kept(options.results)
        self._stop = np.inf if options.minutes is None else 60 * options.minutes
        self._stop += time.monotonic()

    def of(self, method: Method) -> str:
        return f"weights {self.weights}, {method.settings(self.design)}"

    def _name(self, method: Method, knob: float) -> str:
        return f"{self.options.split} scans, {method.name}, {method.knob} {knob:g}"

    def get(self, method: Method, knob: float) -> Figures | None:
        """What is known of these edits, the first of those that were measured."""
        known, count = self._kept.get(self._name(method, knob), self.of(method)), len(self.edits)
        if known is None or len(known["rmse"].split()) < count:
            return None
        return {name: " ".join(words.split()[:count]) for name, words in known.items()}

    def _put(self, method: Method, knob: float, drawn: np.ndarray, **more: str) -> None:
        """drawn: uint8 [seeds, n, 32, 32, 3]."""
        figures = figures_of(self.edits, drawn) | more
        self._kept.put(self._name(method, knob), self.of(method), figures)
        print(self._name(method, knob), file=sys.stderr, flush=True)

    def run(self) -> None:
        """All rows that are chosen and not known yet."""
        names = [method.name for method in METHODS]
        if unknown := {*self.options.only} - {*names}:
            sys.exit(f"--only {unknown.pop()}: there are {', '.join(names)}")
        for method in METHODS:
            knobs = [k for k in getattr(self.design, method.knobs) if self.get(method, k) is None]
            if not knobs or (self.options.only and method.name not in self.options.only):
                continue
            if method is IMAGIC:
                self._imagic()
                continue
            for knob in knobs:
                self._check_time()
                drawn = BASELINES[method.name](self.pipe, self.edits, knob, self.design)
                self._put(method, knob, drawn)

    def folder(self) -> Path:
        """Of what was drawn of Imagic edits."""
        design = f"{self.of(IMAGIC)}, etas {self.design.etas}, {self.options.split}"
        return self.options.cache / hashlib.sha256(design.encode()).hexdigest()[:16]

    def _imagic(self) -> None:
        learn, made = ImagicEdits(self.pipe, self.design, self.folder()), []
        for i, edit in enumerate(self.edits):
            self._check_time()
            made.append(learn(edit))
            print(
                f"\rImagic edit {i + 1} of {len(self.edits)}", end="", file=sys.stderr, flush=True
            )
        print(file=sys.stderr)
        drawn = np.stack([one["pictures"] for one in made], 2)  # [etas, seeds, n, ...]
        errors = np.stack([one["errors"] for one in made], 1)
        told = {n: as_words(of_all) for n, of_all in zip(STAGES, errors, strict=True)}
        for eta, pictures in zip(self.design.etas, drawn, strict=True):
            self._put(IMAGIC, eta, pictures, **told)

    def _check_time(self) -> None:
        if time.monotonic() > self._stop:
            sys.exit("stopped: the same command goes on from here")


def figures_of(edits: list[Edit], drawn: np.ndarray) -> Figures:
    """What is kept of a row: means over the seeds of `Scores`.

    drawn: uint8 [seeds, n, 32, 32, 3].
    """
    scored = [score(edits, pictures) for pictures in drawn]
    return {n: as_words(np.mean([getattr(one, n) for one in scored], 0)) for n in Scores._fields}


def as_words(values: np.ndarray) -> str:
    """A word for each edit, so that a row of the file is a line."""
    return " ".join(f"{value:.4g}" for value in values)


def of_words(words: str) -> np.ndarray:
    """[pictures, edits of one]."""
    return np.array(words.split(), float).reshape(-1, len(KINDS))


def scores_of(figures: Figures) -> Scores:
    """Each [pictures, edits of one]."""
    return Scores(*(of_words(figures[name]) for name in Scores._fields))


# --- Tables ----------------------------------------------------------------------------------

Known = dict[Method, dict[float, Figures]]

DISTANCES = {"rmse": "RMSE to the input", "shape": "distance of the shape"}  # fields of `Scores`
PARTS = {"all": [0, 1, 2], **{kind: [i] for i, kind in enumerate(KINDS)}}

COLUMNS = {
    "right": ("all right", 3),
    **{f"right_{kind}": (f"{kind} edits", 3) for kind in KINDS},
    "changed": ("asked one right", 3),
    "rmse": ("RMSE to input", 3),
    "shape": ("shape, colour edits", 2),
    "to_oracle": ("RMSE to oracle", 3),
    "psnr": ("PSNR to input", 1),
}


def known_rows(measurement: Measurement) -> Known:
    found: Known = {}
    for method in METHODS:
        knobs = getattr(measurement.design, method.knobs)
        rows = {k: row for k in knobs if (row := measurement.get(method, k)) is not None}
        if rows:
            found[method] = rows
    return found


def curves_of(known: Known, distance: str = "rmse") -> dict[str, Curve]:
    """By the names of methods. distance: a field of `Scores`."""
    found = {}
    for method, rows in known.items():
        scored = [scores_of(row) for row in rows.values()]
        right, far = (np.stack([getattr(s, name) for s in scored]) for name in ("right", distance))
        found[method.name] = Curve(list(rows), right, far)
    return found


def summary(figures: Figures) -> dict[str, float]:
    """What a row of the table says."""
    scores = scores_of(figures)
    return {
        "right": float(scores.right.mean()),
        **{f"right_{k}": float(scores.right[:, i].mean()) for i, k in enumerate(KINDS)},
        "changed": float(scores.changed.mean()),
        "rmse": float(scores.rmse.mean()),
        "shape": float(scores.shape[:, 1:].mean()),
        "to_oracle": float(scores.to_oracle.mean()),
        "psnr": float(psnr(scores.rmse).mean()),
    }


def tables(known: Known, edits: list[Edit]) -> Iterator[str]:
    """Markdown, one after the other, each under a line that says what it is."""
    given, oracle = (np.stack([getattr(e, n) for e in edits]) for n in ("picture", "oracle"))
    rows = {
        "the picture itself": summary(figures_of(edits, given[None])),
        "oracle": summary(figures_of(edits, oracle[None])),
    }
    rows |= {
        f"{method.name}, {method.knob} {knob:g}": summary(row)
        for method, found in known.items()
        for knob, row in found.items()
    }
    yield f"every row\n\n{format_table(rows, COLUMNS)}"
    curves = curves_of(known)
    areas = {}
    for name, curve in curves.items():
        areas[name] = {part: area(*curve.only(at).points()) for part, at in PARTS.items()}
    heads = {part: (f"{part} edits", 3) for part in PARTS}
    yield f"area under the curves, 0 to 1\n\n{format_table(areas, heads)}"
    if IMAGIC in known:
        yield f"reconstruction\n\n{stages(next(iter(known[IMAGIC].values())))}"
        for distance, heading in DISTANCES.items():
            curves = curves_of(known, distance)
            for other in [name for name in curves if name != IMAGIC.name]:
                title = f"how much more often Imagic is right than {other}, at the same {heading}"
                yield f"{title}\n\n{against(curves[IMAGIC.name], curves[other])}"


def stages(figures: Figures) -> str:
    """How the reconstruction error falls; figures: of any row of Imagic."""
    before, first, second = (of_words(figures[name]) for name in STAGES)
    return (
        f"error {before.mean():.4f} before, {first.mean():.4f} after the embedding, "
        f"{second.mean():.4f} after tuning; it fell in {(first < before).mean():.1%} and in "
        f"{(second < first).mean():.1%} of {before.size} edits"
    )


def against(curve: Curve, other: Curve) -> str:
    """A row for each kind of edits: the gap at each knob, with its 95 % interval over pictures."""
    rows = {}
    for name, at in PARTS.items():
        one, two = curve.only(at), other.only(at)
        low, high = interval(lambda of, a=one, b=two: gaps(a, b, of), one.right.shape[1])
        middle = gaps(one, two)
        rows[name] = [
            f"{m:+.2f} [{lo:+.2f}, {hi:+.2f}]" for m, lo, hi in zip(middle, low, high, strict=True)
        ]
    heads = ["", *(f"eta {knob:g}" for knob in curve.knobs)]
    lines = [heads, ["---"] * len(heads), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- Pictures --------------------------------------------------------------------------------


def panels(known: Known, edits: list[Edit]) -> list[list[editing_plot.Panel]]:
    """A row for each distance, in which every kind of edits has a panel."""
    oracle = scores_of(figures_of(edits, np.stack([edit.oracle for edit in edits])[None]))
    rows = []
    for name, heading in DISTANCES.items():
        curves, row = curves_of(known, name), []
        for title, at in PARTS.items():
            some = {method: curve.only(at) for method, curve in curves.items()}
            star = [float(getattr(oracle, which)[:, at].mean()) for which in (name, "right")]
            row.append(editing_plot.Panel(f"{title} edits", heading, some, (star[0], star[1])))
        rows.append(row)
    return rows


def draw_examples(measurement: Measurement, image: Path, pictures: int = 4) -> None:
    """A row for each of the first edits: the input, then Imagic over eta, if that is here."""
    from PIL import Image

    rows, folder = [], measurement.folder()
    for edit in measurement.edits[: len(KINDS) * pictures]:
        file = folder / f"{edit.seed:04}-{edit.kind}.npz"
        if not file.exists():
            return
        with np.load(file) as kept:
            rows += [edit.picture, *kept["pictures"][:, 0]]
    grid = Image.fromarray(tile(np.stack(rows), 1 + len(measurement.design.etas)))
    image.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(image)


def main(options: Options) -> None:
    measurement = Measurement(options)
    if options.measure:
        measurement.run()
    known = known_rows(measurement)
    print(f"{options.count} scans x {len(KINDS)} edits of {options.model}")
    for method in known:
        print(f"{method.name}: {measurement.of(method)}")
    for table in tables(known, measurement.edits):
        print(f"\n{table}")
    if known:
        editing_plot.draw(panels(known, measurement.edits), options.image)
    if options.examples is not None:
        draw_examples(measurement, options.examples)


if __name__ == "__main__":
    main(tyro.cli(Options))
