"""`experiments/distillation.py`: measures once, knows what is stale, and draws what it knows."""

import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError

SCRIPT = Path(__file__).parent.parent / "experiments" / "distillation.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script where models cost nothing: all that was measured is in `script.seen`."""
    spec = importlib.util.spec_from_file_location("distillation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "distillation", module)  # for its dataclasses
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec.loader.exec_module(module)
    module.seen, module.digests, module.absent = [], {}, set()

    def opened(model, runs):
        if model in module.absent:
            raise JaxsdError(f"no model {model}")
        schedule = Schedule(timestep_spacing="leading")
        return types.SimpleNamespace(name=model, schedule=schedule), module.digests.get(model, "")

    def evaluate_model(pipe, how, teacher):
        spacing = pipe.schedule.timestep_spacing
        steps, scale = how.steps, how.guidance_scale
        module.seen.append((pipe.name, steps, how.sampler, scale, spacing, teacher is not None))
        row = {"fd_features": (1 + 8 / steps, 0.1), "judge_accuracy": (0.9, 0.0)}
        row |= {"passes": float(steps), "ms_per_image": float("nan")}
        share = 1.0 if pipe.name == "digits-ddpm" else 0.25
        return row | ({"rmse_to_teacher": (share / steps, 0.01)} if teacher else {})

    monkeypatch.setattr(module, "opened", opened)
    monkeypatch.setattr(module, "pixel_teacher", lambda options: "teacher")
    monkeypatch.setattr(module.models, "evaluate_model", evaluate_model)
    floor = {module.FLOOR: {"fd_features": 0.8, "judge_accuracy": 1.0}}
    for name in ("controls", "picture_controls"):
        monkeypatch.setattr(module.report, name, lambda count: floor)
    files = {"results": tmp_path / "r.json", "image": tmp_path / "p.png", "cache": tmp_path / "c"}
    module.run = lambda **changes: module.main(
        module.Options(**files | {"scales": (1.0, 3.0)} | changes)
    )
    return module


@pytest.mark.slow
def test_rows_are_measured_once(script, capsys, tmp_path):
    script.absent = {"digits-lcm"}
    script.run(only=("pixel",))
    assert len(script.seen) == 6 + 4 + 4 and {row[0][:11] for row in script.seen} == {"digits-ddpm"}
    assert all(row[-1] for row in script.seen)  # compared with the teacher
    script.run()
    assert len(script.seen) == 14 + 2 * (4 + 3 + 3) and not any(row[-1] for row in script.seen[14:])
    assert capsys.readouterr().err.count("digits-lcm is left out: no model") == 1
    script.absent, script.digests = set(), {"digits-4step": "other"}
    script.run(only=("digits-lcm", "digits-4step"))
    assert [row[:3] for row in script.seen[34:]] == [
        *[("digits-4step", 4, "ddim")] * 2,
        *[("digits-lcm", n, "lcm") for n in (4, 2, 1)] * 2,
    ]
    script.run()
    script.run(measure=False, only=("pixel",))
    with pytest.raises(SystemExit, match="--only cats: there are digits, digits-1step"):
        script.run(only=("cats",))
    assert len(script.seen) == 42
    script.run(only=("digits-1step",), seeds=1)  # are other figures, and replace none
    assert len(script.seen) == 44 and len(json.loads((tmp_path / "r.json").read_text())) == 45


def test_undistilled_models_step_as_students_do(script):
    script.run(only=("text",))
    spacing = {row[:3]: row[4] for row in script.seen if row[0] == "digits"}
    assert spacing[("digits", 50, "ddim")] == "leading"  # as it ships
    assert {value for key, value in spacing.items() if key[1] < 50} == {"trailing"}
    assert len(spacing) == 7


def test_the_tables(script, capsys):
    script.run()
    capsys.readouterr()
    script.run(measure=False)
    pixel, text, digit, *others = capsys.readouterr().out.split("\n\n|")[1:]
    lines = [line.split("|") for line in pixel.splitlines()]
    row = {
        cells[1].strip() or "-": [c.strip() for c in cells[1:-1]] for cells in lines if cells[1:]
    }
    heads = [cell.strip() for cell in pixel.splitlines()[0].split("|")[1:-1]]
    assert heads == ["FD feat", "over 64 steps'", "RMSE to 256 steps", "over DDIM's", "passes"]
    name = "digits-ddpm-4step, 4 ddim steps"
    assert row[name] == [name, "3.00 ± 0.10", "2.67", "0.0625 ± 0.0100", "0.25", "4"]
    assert row["digits-ddpm, 64 ddim steps"][2] == "1.00"
    assert row["real train (floor)"][1:] == ["0.80", "–", "–", "–", "–"]
    assert "digits-lcm, 1 lcm step " in text and "| 9.00 ± 0.10 | 7.76 " in text
    assert "| guidance 1    | guidance 3    |" in digit and "| 0.900 ± 0.000 |" in digit
    assert len(others) == 1 and "| 7.759" in others[0]


def test_one_seed_has_no_spread_and_times_are_taken_again(script, capsys, monkeypatch):
    monkeypatch.setattr(
        script.models,
        "evaluate_model",
        lambda *_: {"fd_features": (2.0, math.nan), "cas": (math.nan, math.nan), "passes": 1.0},
    )
    batch = types.SimpleNamespace(seconds=0.007)
    monkeypatch.setattr(script.drawing, "draw_batch", lambda *_: batch)
    monkeypatch.setattr(script.drawing, "costs", lambda p, h, s: {"ms_per_image": sum(s)})
    script.run(seeds=1, only=("digits-lcm",), retime=True)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("| digits-lcm, 4 lcm steps"))
    assert line.endswith("| 2.00    | 1      | 0.04     |") and "CAS" not in out


def test_the_plot(script, tmp_path):
    script.run()
    with Image.open(tmp_path / "p.png") as image:
        width, height = image.size
        colours = image.convert("RGB").getcolors(width * height)
    drawn = {colour for count, colour in colours if count > 100}
    known = script.distillation_plot
    wanted = {tuple(bytes.fromhex(c[1:])) for c in (known.TEACHERS | known.STUDENTS).values()}
    assert wanted <= drawn and width > 2 * height
