"""`experiments/ablation.py`: trains and measures once, and says what has diverged."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from jaxsd.errors import Diverged, JaxsdError
from jaxsd.evaluation.drawing import Drawn

SCRIPT = Path(__file__).parent.parent / "experiments" / "ablation.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ablation"]


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(script, tmp_path, monkeypatch, capsys):
    unet = dataclasses.replace(tiny.PIXEL_UNET, dropout=0.0)
    monkeypatch.setattr(script.Design, "unet", unet)
    design = script.Design(
        seeds=(0,), batch_size=4, teacher_updates=2, stage_updates=2, start_steps=4,
        drawn_steps=(2, 1), reference_steps=4, samples=20, compared=10,
    )  # fmt: skip
    files = {"workdir": tmp_path / "runs", "results": tmp_path / "r.json"}
    options = script.Options(design=design, kinds=("epsilon",), **files)
    script.main(options)
    said = capsys.readouterr().out
    rows = json.loads(files["results"].read_text())["rows"]
    assert len(rows) == 2 * 2 * 2  # teacher and students, clipped or not, in two steps and in one
    for name, row in rows.items():
        if "clipped" in name:
            assert row["rmse_to_teacher"] < 2 and row["fd_features"] > 10, name
        else:
            assert row == {"diverged": True}, name
    assert "| eps, halving, SNR                   | diverged | diverged |" in said

    saved = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(saved) == 3
    before = dict(rows)
    del rows["eps, halving, SNR, x clipped, 1 step, seed 0"]
    whole = json.loads(files["results"].read_text())
    files["results"].write_text(json.dumps(whole | {"rows": rows}))
    script.main(options)
    assert json.loads(files["results"].read_text())["rows"] == before
    assert capsys.readouterr().out == said
    assert {file: file.stat().st_mtime_ns for file in saved} == saved
    other = dataclasses.replace(options, design=dataclasses.replace(design, samples=30))
    with pytest.raises(JaxsdError, match=r"r\.json is of another design"):
        script.main(other)


def test_one_stage_costs_what_halving_does(script):
    design = script.Design()
    updates, passes = script.one_stage_updates(design), 64 + 3
    assert updates == 36 and abs(updates * passes - 6 * design.stage_updates * 5) <= passes / 2


def test_what_counts_as_diverged(script):
    def drawn(value):
        latents = np.full((10, 8, 8, 1), value, np.float32)
        yield Drawn(latents, np.clip(latents, -1, 1), 0.0)

    def broken():
        yield from drawn(0.0)
        raise Diverged("NaN")

    assert script.finished(broken()) is None and script.finished(drawn(2.1)) is None
    assert script.finished(drawn(1e30)) is None
    pixels = script.finished(drawn(1.5))
    assert pixels.max() == 1.0
    row = script.measured(pixels, np.full((5, 8, 8, 1), 0.5))
    assert row["rmse_to_teacher"] == 0.5 and row["judge_accuracy"] == 0.1
    assert "rmse_to_teacher" not in script.measured(pixels, None)
    assert script.measured(None, None) == {"diverged": True}


def test_cells(script):
    def of(*values):
        return [{"diverged": True} if v is None else {"fd": v} for v in values]

    assert script.cell(of(1.0, 2.0, 3.0), "fd", 2) == "2.00 ± 1.00"
    assert script.cell(of(1.0), "fd", 1) == "1.0"
    assert script.cell(of(1.0, None, 3.0), "fd", 2) == "diverged (1 of 3)"
    assert script.cell(of(None, None), "fd", 2) == "diverged"
    assert script.cell([None, *of(1.0)], "rmse", 2) == "–"
