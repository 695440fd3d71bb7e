"""The page: sections of what `read_run` finds, in one file that needs nothing else."""

import datetime
import math
import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from jaxsd.run_report import tables
from jaxsd.run_report.curves import SMALL, Curve, Points, chart, number, smoothed
from jaxsd.run_report.pictures import Album
from jaxsd.run_report.reading import Run, read_run, read_stages
from jaxsd.run_report.style import STYLE
from jaxsd.weights.files import replacing

FILE = "report.html"
SPANS = 50  # a smoothed curve averages over this part of all rows, and 5 at least
STAGE_PICTURES, STAGE_ROWS = 3, 5  # of each stage, in the page of a chain
FIRST = ("learning_rate", "images_per_second", "grad_norm")  # of the smaller curves


def write(workdir: Path) -> Path:
    """Makes `report.html` of a training's folder, and of a chain's that it is a stage of.

    Whole or not at all; JaxsdError if the folder holds no training or cannot be written.
    """
    workdir = Path(os.path.abspath(workdir))  # so that "." has a name
    run = read_run(workdir)
    with replacing(workdir / FILE) as temporary:
        temporary.write_bytes(page(run).encode("utf-8", "replace"))  # JSON may hold half characters
    if workdir.name in read_stages(workdir.parent):
        write(workdir.parent)
    return workdir / FILE


def page(run: Run) -> str:
    """HTML of a training or a chain; everything that a user wrote is escaped."""
    album, body = Album(run.workdir), []
    others = [name for name in run.stages if name != "."]
    if run.config:
        body += sections(run, album)
    if others:
        stages = {name: _stage(run.workdir / name) for name in run.stages}
        body.append(_section("Stages", _overview(stages)))
        body += [_of_stage(name, stages[name], album) for name in others if stages[name]]
    title = escape(run.workdir.name)
    recipe = run.config.get("recipe") or (f"{len(run.stages)} stages" if others else "")
    written = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{title}</h1><p>{escape(str(recipe))}"
        f"{' · ' + state(run) if run.config else ''}</p>"
        f'<p class="note">Written {written}.</p></header>'
        f"{''.join(body)}</main></body></html>\n"
    )


def state(run: Run) -> str:
    """Where a training is, in a few words."""
    steps = run.config.get("steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    if run.ended:
        return f"ended after step {run.step:,}{of if run.step != steps else ''}"
    return f"step {run.step:,}{of}" if run.step else "not a step yet"


def sections(run: Run, album: Album) -> list[str]:
    """All about one training."""
    found = [_warnings(run), _section("Loss", _losses(run))]
    for name, pictures in run.pictures.items():
        found.append(_section(f"Pictures: {name}", album.figures(name, pictures)))
    measured = [name for name in run.columns if "/" in name]
    if table := tables.evaluations(run):
        curves = "".join(_small(run, name) for name in measured)
        found.append(_section("Evaluation", f'{table}<div class="grid">{curves}</div>'))
    plain = [n for n in run.columns if "/" not in n and n != "loss" and not n.startswith("loss_t")]
    ordered = [n for n in FIRST if n in plain] + [n for n in plain if n not in FIRST]
    moving = [n for n in ordered if len({v for _, v in run.column(n) if math.isfinite(v)}) > 1]
    if curves := "".join(_small(run, name) for name in moving):
        still = [f"{n} {number(run.column(n)[-1][1])}" for n in ordered if n not in moving]
        note = f'<p class="note">Always the same: {escape(", ".join(still))}.</p>' if still else ""
        found.append(_section("On the way", f'<div class="grid">{curves}</div>{note}'))
    found.append(_section("Going on", tables.resuming(run)))
    found.append(_section("Configuration", tables.pairs(run.config.items())))
    found.append(_section("Environment", tables.environment(run)))
    return found


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _warnings(run: Run) -> str:
    """What a glance at a curve may miss."""
    told = []
    bad = [step for step, value in run.column("loss") if not math.isfinite(value)]
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad):,} rows"
        told.append(f"the loss was no finite number in {rows} of the log, at step {bad[0]:,} first")
    skipped = run.column("skipped")
    if skipped and skipped[-1][1] > 0:
        told.append(f"{number(skipped[-1][1])} updates were not made, as they were not finite")
    return f'<p class="warning">Mind: {"; ".join(told)}.</p>' if told else ""


def _resumed(run: Run) -> list[int]:
    return [step for start in run.starts if isinstance(step := start.get("step"), int) and step]


def _losses(run: Run) -> str:
    if not (points := run.column("loss")):
        return '<p class="note">No row of the log yet.</p>'
    curves = [Curve("loss", points, "c0 raw"), Curve("loss, smoothed", _smooth(points), "c0")]
    legend = [("c0 raw", "each row of the log"), ("c0", "smoothed")]
    marks = _resumed(run)
    if marks:
        legend.append(("mark", "resumed"))
    written = _scales("loss", curves, legend, marks)
    parts = [name for name in run.columns if name.startswith("loss_t")]
    if parts:
        parted = [Curve(n, _smooth(run.column(n)), f"c{i % 6}") for i, n in enumerate(parts)]
        told = [(curve.kind, curve.name) for curve in parted]
        written += "<h3>By noise, from the picture (t0) to noise alone, smoothed</h3>"
        written += _scales("loss_t", parted, told, marks)
    return written


def _scales(name: str, curves: list[Curve], legend: list[tuple[str, str]], marks: list[int]) -> str:
    """A chart with a linear and a logarithmic scale to choose from, without a script."""
    keys = "".join(f'<span class="key {kind}">{escape(text)}</span>' for kind, text in legend)
    keys = f'<p class="legend">{keys}</p>'
    linear, log = chart(name, curves, marks=marks), chart(name, curves, True, marks)
    values = [v for curve in curves for _, v in curve.points if math.isfinite(v)]
    if not values or min(values) <= 0:
        return linear + keys if linear else '<p class="note">No finite number.</p>'
    wide = max(values) > 20 * min(values)
    chosen = {"linear": not wide, "log": wide}
    buttons = "".join(
        f'<input type="radio" name="{name}" id="{name}-{kind}" class="to-{kind}"'
        f'{" checked" if checked else ""}><label for="{name}-{kind}">{kind}</label>'
        for kind, checked in chosen.items()
    )
    charts = f'<div class="linear">{linear}</div><div class="log">{log}</div>'
    return f'<div class="scales">{buttons}{charts}</div>{keys}'


def _small(run: Run, name: str) -> str:
    points = run.column(name)
    curves = [Curve(name, points, "c0 raw"), Curve(f"{name}, smoothed", _smooth(points), "c0")]
    if len(points) < 20 or name == "learning_rate":
        curves = [Curve(name, points, "c0")]
    drawn = chart(name, curves, marks=_resumed(run), size=SMALL)
    last = next((value for _, value in reversed(points) if math.isfinite(value)), math.nan)
    caption = f"<figcaption>{escape(name)} <b>{number(last)}</b></figcaption>"
    return f"<figure>{caption}{drawn}</figure>" if drawn else ""


def _smooth(points: Points) -> Points:
    return smoothed(points, max(5.0, len(points) / SPANS)) if len(points) > 2 else points


def _stage(workdir: Path) -> Run | None:
    """None as long as it has not begun."""
    return read_run(workdir) if (workdir / "config.json").is_file() else None


def _overview(stages: dict[str, Run | None]) -> str:
    lines = []
    for name, run in stages.items():
        loss = [v for _, v in run.column("loss") if math.isfinite(v)] if run else []
        told = [state(run) if run else "not begun", number(loss[-1]) if loss else "–"]
        link = f'<a href="{quote(name)}/{FILE}">{escape(name)}</a>' if run else escape(name)
        link = "this folder" if name == "." else link
        lines.append(f"<tr><th>{link}</th>{''.join(f'<td>{t}</td>' for t in told)}</tr>")
    head = "<tr><th>stage</th><th>state</th><th>last loss</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(lines)}</table></div>'


def _of_stage(name: str, run: Run | None, album: Album) -> str:
    """The least that tells how it went, for whom the stage's own page is not at hand."""
    assert run is not None
    points = run.column("loss")
    curves = [Curve("loss", points, "c0 raw"), Curve("loss, smoothed", _smooth(points), "c0")]
    written = _warnings(run) + chart(f"loss of {name}", curves)
    for title, pictures in run.pictures.items():
        written += f"<h3>{escape(title)}</h3>{album.figures(title, pictures, STAGE_PICTURES)}"
    return _section(f"Stage {name}", written + tables.evaluations(run, STAGE_ROWS))
