"""Tables of a page: what was measured, how it was set up, where it ran."""

import json
import math
import re
import shlex
from collections.abc import Iterable
from html import escape
from typing import Any

from jaxsd.run_report.curves import number
from jaxsd.run_report.pictures import spread
from jaxsd.run_report.reading import Row, Run

SHOWN = 30  # rows of the table of evaluations, those with a best value besides
HIGHER = re.compile(r"psnr|ssim|clip_score|top1|acc|precision|recall")
LOWER = re.compile(r"(loss(_t\d)?|l1|l2|fid|kid|fd|kd|lpips)(_all)?")


def best_rows(run: Run, name: str) -> set[int]:
    """Steps at which a number was best; none where nothing says what is good."""
    last, kept = name.rpartition("/")[2], run.config.get("keep_best") == name
    if kept:
        pick = max if run.config.get("keep_highest") else min
    elif HIGHER.search(last):
        pick = max
    elif LOWER.fullmatch(last):
        pick = min
    else:
        return set()
    finite = [(step, value) for step, value in run.column(name) if math.isfinite(value)]
    best = pick((value for _, value in finite), default=None)
    return {step for step, value in finite if value == best}


def evaluations(run: Run, most: int = SHOWN) -> str:
    """What was measured on the way, a row for each time, the best of each column marked."""
    names = [name for name in run.columns if "/" in name]
    rows = [row for row in run.rows if any(name in row for name in names)]
    if not rows:
        return ""
    best = {name: best_rows(run, name) for name in names}
    marked = {step for steps in best.values() if len(steps) < 4 for step in steps}
    shown = {row["step"] for row in spread(rows, most)} | marked
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [
        f"<tr><th>{int(row['step']):,}</th>{''.join(_cell(row, n, best[n]) for n in names)}</tr>"
        for row in rows
        if row["step"] in shown
    ]
    note = f'<p class="note">{len(lines)} of {len(rows)} evaluations.</p>'
    return (
        f'<div class="wide"><table><tr><th>step</th>{head}</tr>{"".join(lines)}</table></div>'
        f'<p class="note">★ the best value of its column.</p>'
        f"{note if len(lines) < len(rows) else ''}"
    )


def _cell(row: Row, name: str, best: set[int]) -> str:
    if name not in row:
        return "<td></td>"
    if row["step"] in best:
        return f'<td class="best">{number(row[name])} ★</td>'
    return f"<td>{number(row[name])}</td>"


def pairs(values: Iterable[tuple[str, Any]]) -> str:
    """Names and values, as JSON where they are no text."""
    lines = []
    for name, value in values:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>")
    return f"<dl>{''.join(lines)}</dl>"


def environment(run: Run) -> str:
    """Where the last start ran, and what was different in those before."""
    if not run.starts:
        return '<p class="note">Not recorded.</p>'
    last = run.starts[-1]
    own = ("time", "step", "command", "directory")
    written = pairs((name, value) for name, value in last.items() if name not in own)
    if len(run.starts) == 1:
        return written
    lines = []
    for start in spread(run.starts, SHOWN):
        other = {n: v for n, v in start.items() if n not in own and v != last.get(n)}
        said = ", ".join(
            f"{n} {v if isinstance(v, str) else json.dumps(v)}" for n, v in other.items()
        )
        lines.append(
            f"<tr><th>{escape(str(start.get('time', '')))}</th>"
            f"<td>{escape(str(start.get('step', '')))}</td><td>{escape(said)}</td></tr>"
        )
    head = "<tr><th>started</th><th>after step</th><th>other than now</th></tr>"
    return f'{written}<div class="wide"><table>{head}{"".join(lines)}</table></div>'


def resuming(run: Run) -> str:
    """The command that goes on, and the checkpoints from which it may."""
    last = run.starts[-1] if run.starts else {}
    command = last.get("command")
    written = "<p>The command that began it goes on from the newest checkpoint.</p>"
    if isinstance(command, list) and command:
        text = f"cd {shlex.quote(str(last.get('directory', '.')))}\n{shlex.join(map(str, command))}"
        written = (
            "<p>The same command goes on from the newest checkpoint"
            f"{' (here nothing is left to do but to export again)' if run.ended else ''}:</p>"
            f"<pre>{escape(text)}</pre>"
        )
    steps = ", ".join(f"{step:,}" for step in run.checkpoints) or "none"
    return f"{written}<p>Checkpoints: {steps}.</p>"
