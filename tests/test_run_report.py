"""`report.html`: what it says is what the folder holds, in one file that needs nothing else."""

import base64
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from PIL import Image
from refusals import refused
from toy import CONFIG, OPTIONS, SHORT, run, stopping_after

from jaxsd import run_report, training
from jaxsd.cli import run_command
from jaxsd.cli.recipes.progressive import Progressive
from jaxsd.cli.train import run as run_recipe
from jaxsd.pictures import write_png
from jaxsd.run_report.curves import BINS
from jaxsd.training import Evaluator
from jaxsd.training.logs import Report, open_log
from jaxsd.weights import read_json, write_json

MORE = dataclasses.replace(OPTIONS, steps=12)
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Sections by title with their text; AssertionError unless tags are closed in order."""

    def __init__(self, workdir):
        super().__init__()
        self.source = (workdir / "report.html").read_text(encoding="utf-8")
        self.sections: dict[str, str] = {"": ""}
        self.tags: list[tuple[str, dict]] = []
        self.best: list[str] = []
        self._open: list[tuple[str, dict]] = []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(self.tags[-1])
        if tag == "h2":
            self.sections["h2"] = ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag
        if tag == "h2":
            self.sections[self.sections.pop("h2")] = ""

    def handle_data(self, data):
        name = [*self.sections][-1]
        self.sections[name] += data if name == "h2" else f"{data} "
        if self._open and self._open[-1] == ("td", {"class": "best"}):
            self.best.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def pictures(self):
        """(place, alternative text, kind, bytes) of each."""
        found = []
        for link, image in zip(self.of("a"), self.of("img"), strict=False):
            kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", image["src"]).groups()
            found.append((link["href"], image["alt"], kind, base64.b64decode(data)))
        return found


def measure(params, step):
    """Whose loss is lowest at step 6."""
    grid = np.full((6, 6, 3), step, np.uint8)
    return {"loss": 1.0 + abs(step - 6), "psnr": 10.0 - abs(step - 9), "grid": grid}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    options = dataclasses.replace(MORE, sample_every=6)
    run(workdir, options=options, evaluators=[Evaluator("eval", 3, measure)])
    return workdir


# --- What it says ----------------------------------------------------------------------------


def test_it_says_what_the_folder_holds(whole):
    page = Page(whole)
    assert {"Loss", "Evaluation", "On the way", "Going on", "Configuration", "Environment",
            "Pictures: eval/grid", "Pictures: samples/preview"} < page.sections.keys()  # fmt: skip
    assert "ended after step 12" in page.source
    for row in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()):
        if "eval/loss" in row:
            assert f"{row['step']} {row['eval/loss']:g} " in page.sections["Evaluation"].replace(
                " ★", ""
            )
    assert page.best == ["1 ★", "10 ★"]  # of the loss the lowest, of PSNR the highest
    assert "Checkpoints: 8, 12." in page.sections["Going on"]
    for name, value in CONFIG.items():
        assert f"{name} {value}" in page.sections["Configuration"]
    assert f"jax {jax.__version__} " in page.sections["Environment"]
    assert "8 x cpu (cpu)" in page.sections["Environment"]


def test_pictures_are_the_files(whole):
    found = Page(whole).pictures
    assert [place for place, *_ in found] == [
        *(f"eval/grid_{step:07}.png" for step in (12, 9, 6, 3)),
        *(f"samples/preview_{step:07}.png" for step in (12, 6)),
    ]
    for place, text, kind, data in found:
        assert kind == "png" and data == (whole / place).read_bytes()
        assert text == f"{place[:-12]} at step {int(place[-11:-4])}"


def test_it_needs_nothing_else(whole):
    page = Page(whole)
    assert not [t for t, _ in page.tags if t in ("script", "link", "iframe", "object", "base")]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert value.startswith("data:") or not re.match(r"[a-z]+:|/", value)
    assert "url(" not in page.source and "@import" not in page.source


def test_what_users_write_stays_text(tmp_path):
    nasty = '</td></table><script>alert("1")</script><img src=x onerror=alert(1)> & \' "'
    workdir = tmp_path / "<em>bold"
    write_json(workdir / "config.json", {"recipe": nasty, nasty: nasty, "prompts": [nasty]})
    row = {"step": 1, "loss": 1.0, nasty: 2.0, f"eval/{nasty}": 3.0}
    other = row | {"step": 2, nasty: 5.0}
    (workdir / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    start = {"time": nasty, "step": 0, "command": [nasty], "directory": nasty, "jax": nasty}
    write_json(workdir / "environment.json", {"starts": [start, start | {"jax": "other"}]})
    write_png(toy.PICTURE, workdir / "a' onload='b" / "<i>_0000001.png")
    write_json(workdir / "stages.json", {"stages": [".", "../elsewhere", "<u>", nasty, "/etc"]})
    run_report.write(workdir)
    page = Page(workdir)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "em", "i", "u"} and len(page.of("img")) == 1
    assert all(not name.startswith("on") for _, told in page.tags for name in told)
    assert f"{nasty} {nasty} " in page.sections["Configuration"] and "<em>bold" in page.sections[""]
    assert "elsewhere" not in page.source and "/etc" not in page.source


# --- When ------------------------------------------------------------------------------------


def test_it_is_there_while_training_goes_on(tmp_path, monkeypatch):
    """From the start, and after each evaluation: a kill takes nothing of it along."""
    monkeypatch.setattr(Report, "SHARE", math.inf)
    seen = []

    def look(params, step):
        page = Page(tmp_path)
        seen.append((step, page.sections.get("Evaluation", "")))
        assert f"seed {CONFIG['seed']}" in page.sections["Configuration"]
        return measure(params, step)

    run(tmp_path, options=MORE, evaluators=[Evaluator("eval", 3, look)])
    assert seen[0] == (3, "") and [step for step, _ in seen] == [3, 6, 9, 12]
    for step, told in seen[1:]:
        assert f" {step - 3} {measure({}, step - 3)['loss']:g} " in told.replace(" ★", "")


def test_one_that_was_interrupted_has_what_it_had(tmp_path, whole):
    with pytest.raises(InterruptedError):
        run(tmp_path, options=MORE, make_batches=stopping_after(7))
    page = Page(tmp_path)
    assert "step 6" in page.source and "Checkpoints: 4." in page.sections["Going on"]
    run(tmp_path, options=MORE)
    starts = read_json(tmp_path / "environment.json")["starts"]
    assert [start["step"] for start in starts] == [0, 4]
    page = Page(tmp_path)
    assert "ended after step 12" in page.source
    assert "step 4 " in page.sections["Loss"] and "resumed" in page.sections["Loss"]
    assert starts[1]["time"] in page.sections["Environment"]


def writing_takes(seconds, monkeypatch):
    """The time, which only moves with a page or when it is told to; and when pages were made."""
    now, made = [0.0], []

    def write(workdir):
        made.append(now[0])
        now[0] += seconds

    monkeypatch.setattr("jaxsd.training.logs.time.monotonic", lambda: now[0])
    monkeypatch.setattr(run_report, "write", write)
    return now, made


def test_it_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    """However often something is measured: made every second, it may take a twentieth of one."""
    now, made = writing_takes(2.0, monkeypatch)
    report = Report(tmp_path)
    for step in range(1, 101):
        report.scalars(step, {"eval/loss": 1.0})
        now[0] += 1.0
    assert made == [0.0, 42.0, 84.0]
    for step in range(101, 201):
        report.scalars(step, {"loss": 1.0})
        now[0] += 1.0
    assert [round(b - a) for a, b in zip(made[2:], made[3:], strict=False)] == [42, 62]


def test_a_page_that_takes_long_is_made_seldom(tmp_path, monkeypatch):
    now, made = writing_takes(10.0, monkeypatch)
    report = Report(tmp_path)
    for step in range(1, 1001):
        report.scalars(step, {"loss": 1.0})
        now[0] += 1.0
    assert 10.0 * len(made) <= 0.05 * now[0] + 10.0


def test_what_a_crash_left_of_its_starts_hinders_no_training(tmp_path):
    """A file that a machine had not yet written when its power failed."""
    with pytest.raises(InterruptedError):
        run(tmp_path, options=MORE, make_batches=stopping_after(7))
    for left in ("", '{"starts": 3}'):
        (tmp_path / "environment.json").write_text(left)
        with pytest.raises(InterruptedError):
            run(tmp_path, options=MORE, make_batches=stopping_after(9))
        (start,) = read_json(tmp_path / "environment.json")["starts"]
        assert start["step"] in (4, 8)


def test_pictures_in_pieces_are_left_out(tmp_path):
    """Of all kinds: cut off, or with another thing in the middle, as disks leave them."""
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "loss": 1.0}\n')
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    data = write_png(noise, tmp_path / "samples" / "preview_0000001.png").read_bytes()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    for step, broken in enumerate((data[:second] + b"\0" * 9999, data[:60], b""), 2):
        (tmp_path / "samples" / f"preview_{step:07}.png").write_bytes(broken)
    run_report.write(tmp_path)
    page = Page(tmp_path)
    assert "3 left out" in page.sections["Pictures: samples/preview"] and len(page.pictures) == 1


def test_one_that_cannot_be_made_stops_nothing(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    state = run(tmp_path, options=MORE, evaluators=[Evaluator("eval", 3, measure)])
    assert int(state.step) == 12 and (tmp_path / "model").is_dir()
    told = capsys.readouterr().err
    # At the start and no more on the way, at the end, and after the export
    assert told.count("warning: no report.html: cannot write") == 3


def test_it_can_be_left_out(tmp_path):
    run(tmp_path, options=dataclasses.replace(SHORT, report=False))
    assert not (tmp_path / "report.html").exists()
    run(tmp_path)  # which is no other training
    assert (tmp_path / "report.html").exists()


def test_the_first_process_alone_writes(tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", CONFIG)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_log(tmp_path, 0, {}, report=True) as log:
        log.scalars(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# --- Runs of all kinds -----------------------------------------------------------------------


def fake(workdir, rows, config=CONFIG):
    write_json(workdir / "config.json", config)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(lines + '{"step": 9999999, "lo')
    run_report.write(workdir)
    return Page(workdir)


def test_a_run_of_which_there_is_nothing_yet(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    run_report.write(tmp_path)
    page = Page(tmp_path)
    assert "not a step yet" in page.source and "No row of the log yet" in page.sections["Loss"]
    assert "Checkpoints: none." in page.sections["Going on"]
    assert "holds no training" in refused(run_report.write, tmp_path / "elsewhere")


def test_one_that_diverged(tmp_path):
    rows = [{"step": i, "loss": None if i > 5 else 1.0 / i, "skipped": max(0, i - 5)}
            for i in range(1, 11)]  # fmt: skip
    page = fake(tmp_path / "some", rows)
    assert "no finite number in 5 rows of the log, at step 6 first; 5 updates" in page.sections[""]
    page = fake(tmp_path / "all", [{"step": i, "loss": None} for i in range(1, 4)])
    assert "No finite number" in page.sections["Loss"] and not page.of("svg")
    page = fake(tmp_path / "wild", [{"step": i, "loss": (-1) ** i * 1e308} for i in range(1, 9)])
    assert len(page.of("svg")) == 1 and "nan" not in page.source and "inf" not in page.source


def test_what_cannot_be_read_is_passed_over(tmp_path):
    lines = ["[1]", "null", "{}", '{"step": null}', '{"step": 1e999}', '{"step": "two"}', "\0"]
    lines += [f'{{"step": 1, "loss": {"9" * 400}}}', '{"step": 3, "loss": 2.0, "odd": [1]}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "environment.json").write_text('{"starts": [3, {"step": true, "command": "x"}]}')
    (tmp_path / "stages.json").write_text('{"stages": {"a": 1}}')
    with open(tmp_path / "config.json", "w") as file:
        file.write('{"recipe": "\\ud800", "steps": 7}')
    run_report.write(tmp_path)
    page = Page(tmp_path)
    assert "? · step 3 of 7" in page.sections[""] and len(page.of("svg")) == 2


def test_a_long_run_is_a_small_page_without_a_spike_lost(tmp_path):
    rng = np.random.default_rng(0)
    losses = np.exp(-np.arange(1, 20_001) / 5000) + 0.01 * rng.random(20_000)
    losses[12_345] = 50.0
    names = [f"number_{i}" for i in range(10)]
    rows = [
        {"step": 50 * i, "loss": loss, **dict.fromkeys(names, loss)}
        | ({"eval/loss": loss} if i % 40 == 0 else {})
        for i, loss in enumerate(losses.tolist(), 1)
    ]
    page = fake(tmp_path, rows)
    assert len(page.source) < 500_000
    assert page.sections["Evaluation"].count(" ★") <= 2
    assert "31 of 500 evaluations" in page.sections["Evaluation"]
    path = next(a["d"] for a in page.of("path") if a.get("class") == "curve c0 raw")
    heights = [float(pair.split()[1]) for pair in re.split("[ML]", path)[1:]]
    assert min(heights) == 10.0 and sorted(heights)[1] > 200  # the top of the picture
    assert len(heights) <= 2 * BINS


def test_many_large_pictures_keep_the_page_small(tmp_path):
    rng = np.random.default_rng(0)
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "loss": 1.0}\n')
    for step in range(1, 41):
        small = rng.integers(0, 256, (200, 200, 3), np.uint8)
        write_png(small, tmp_path / "samples" / f"small_{step:07}.png")
        if step % 4 == 0:
            smooth = np.repeat(np.repeat(small, 6, axis=0), 6, axis=1)
            smooth[:, :, 0] += rng.integers(0, 2, smooth.shape[:2], np.uint8)
            write_png(smooth, tmp_path / "samples" / f"large_{step:07}.png")
    (tmp_path / "samples" / "small_0000040.png").write_bytes(b"cut off")
    write_png(small, tmp_path / "samples" / "small_0000041.png")  # of no step that counts
    run_report.write(tmp_path)
    page = Page(tmp_path)
    assert len(page.source) < 9_000_000
    told = page.sections["Pictures: samples/small"]
    assert "12 of 40 pictures; 1 left out" in told and "step 1 " in told
    for place, _, kind, data in page.pictures:
        assert kind == ("webp" if "large" in place else "png")
        if kind == "png":
            assert data == (tmp_path / place).read_bytes()
        else:
            with Image.open(io.BytesIO(data)) as inside, Image.open(tmp_path / place) as file:
                assert inside.size == (640, 640)
                want = np.asarray(file.resize((640, 640), Image.Resampling.LANCZOS)).astype(int)
                assert np.abs(np.asarray(inside) - want).mean() < 25  # of noise, at quality 80


# --- Chains ----------------------------------------------------------------------------------


def test_a_chain_has_a_page_with_its_stages(tmp_path):
    top = tmp_path / "chain"
    folders = [top / name for name in ("32-steps", "16-steps", "8-steps")]
    run_report.write_stages(top, folders)
    for folder in folders[:2]:
        run(folder, options=dataclasses.replace(SHORT, sample_every=4))
        page = Page(top)
    assert "32-steps ended after step 8" in page.sections["Stages"]
    assert "8-steps not begun" in page.sections["Stages"]
    links = [a["href"] for a in page.of("a")]
    assert links[:2] == ["32-steps/report.html", "16-steps/report.html"]
    assert all((top / link).is_file() for link in links)
    assert len(page.of("img")) == 4 and len(page.of("svg")) == 2
    assert "Stage 16-steps" in page.sections and "Stage 8-steps" not in page.sections
    moved = shutil.move(top, tmp_path / "elsewhere")
    run_command("report", [str(moved)])
    assert len(Page(moved).of("img")) == 4


def test_the_last_stage_may_be_the_folder_itself(tmp_path):
    run_report.write_stages(tmp_path, [tmp_path / "first", tmp_path])
    run(tmp_path / "first"), run(tmp_path)
    page = Page(tmp_path)
    assert "first ended after step 8" in page.sections["Stages"]
    assert "this folder ended after step 8" in page.sections["Stages"]
    assert {"Loss", "Configuration", "Stage first"} < page.sections.keys()


def test_recipes_say_what_their_stages_are(tmp_path, monkeypatch):
    def train(objective, batches, recipe, workdir, config, evaluators):
        write_json(workdir / "config.json", config)
        training.logs.write_report(workdir)

    monkeypatch.setattr(Progressive, "build", lambda self: (None, toy.batches))
    monkeypatch.setattr(Progressive, "evaluators", lambda self, objective: [])
    monkeypatch.setattr("jaxsd.training.train", train)
    how = {"model": "digits-ddpm", "start_steps": 8, "prediction_type": "sample"}
    run_recipe(Progressive(workdir=tmp_path / "a", **how))
    names = ["4-steps", "2-steps", "1-steps"]
    assert read_json(tmp_path / "a" / "stages.json") == {"stages": names}
    assert all(
        f"{name} not a step yet" in Page(tmp_path / "a").sections["Stages"] for name in names
    )
    run_recipe(Progressive(workdir=tmp_path / "b", report=False, **how))
    assert not (tmp_path / "b" / "stages.json").exists()


def test_the_command_needs_no_jax(whole):
    code = "import sys; from jaxsd.cli import main; main(); print('jax' in sys.modules)"
    command = [sys.executable, "-c", code, "report", str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(whole / "report.html"), "False"]
    assert Path(done.stdout.split()[0]).is_file()
