"""Every tracker tells the same, and goes on where a resumed training does."""

import dataclasses
import json
import resource
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image
from toy import CONFIG, SHORT, run, stopping_after

from jaxsd.errors import JaxsdError
from jaxsd.training.logs import JSONLines, open_log

PICTURE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rows_after_the_resumed_step_and_torn_ones_are_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 2.0}\n{"step": 6}\n{"step": 4, "lo'
    )
    log = JSONLines(file, last=4)
    log.scalars(5, {"loss": 0.5, "grad_norm": float("inf"), "other": float("nan")})
    log.close()
    assert rows(tmp_path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 5, "loss": 0.5, "grad_norm": None, "other": None},
    ]


def test_pictures_are_files_by_name_and_step(tmp_path):
    with open_log(tmp_path, 0, {}) as log:
        log.image(30, "eval/grid", PICTURE)
    with Image.open(tmp_path / "eval" / "grid_0000030.png") as image:
        np.testing.assert_array_equal(np.asarray(image), PICTURE)
    assert len(list((tmp_path / "eval").iterdir())) == 1


def events(folder):
    """The events in TensorBoard's files: records of a length, its CRC, the bytes and their CRC."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            [size] = struct.unpack_from("<Q", content, place)
            yield Event.FromString(content[place + 12 : place + 12 + size])
            place += 12 + size + 4


def test_tensorboard_has_the_numbers_and_purges_what_comes_again(tmp_path):
    with pytest.raises(InterruptedError):
        run(tmp_path, make_batches=stopping_after(7))  # rows to step 6, a checkpoint at 4
    run(tmp_path)
    found, purged = {}, []
    for event in events(tmp_path / "tensorboard"):
        if event.session_log.status:
            purged.append(event.step)
            found = {key: value for key, value in found.items() if key[0] < event.step}
        for value in event.summary.value:
            found[event.step, value.tag] = value.simple_value
    assert purged == [1, 5]
    told = rows(tmp_path)
    assert [row["step"] for row in told] == [2, 4, 6, 8]
    for row in told:
        for name in ("loss", "grad_norm", "skipped", "memory_gib"):
            assert found[row["step"], name] == pytest.approx(row[name], rel=1e-6)
    assert (8, "samples/preview") in found


@pytest.mark.parametrize("other", [None, InterruptedError])
def test_a_disk_that_refuses_is_one_line_unless_there_is_more_to_tell(tmp_path, other):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(other or JaxsdError) as caught, open_log(tmp_path, 0, {}) as log:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
            with pytest.raises(JaxsdError, match="cannot write .*File too large") as first:
                log.scalars(1, {f"number {i}": float(i) for i in range(100)})
            raise first.value if other is None else other
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)


def test_what_tensorboard_was_told_is_there_before_it_is_closed(tmp_path):
    with open_log(tmp_path, 0, {}) as log:
        log.scalars(3, {"loss": 0.5, "eval/loss": 0.25})
        told = [each for event in events(tmp_path / "tensorboard") for each in event.summary.value]
        assert {each.tag: each.simple_value for each in told} == {"loss": 0.5, "eval/loss": 0.25}


# --- Weights & Biases ------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is told."""
    calls = types.SimpleNamespace(init=[], log=[], metric=[], finished=0)

    class Run:
        def log(self, values):
            calls.log.append(values)

        def define_metric(self, *names, **options):
            calls.metric.append((names, options))

        def finish(self):
            calls.finished += 1

    def init(**options):
        calls.init.append(options)
        return Run()

    module = types.ModuleType("wandb")
    module.__dict__.update(init=init, Image=lambda picture: ("image", picture.shape))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_one_run_for_a_workdir_however_often_it_is_resumed(tmp_path, wandb):
    options = dataclasses.replace(SHORT, wandb_project="digits")
    with pytest.raises(InterruptedError):
        run(tmp_path, make_batches=stopping_after(5), options=options)
    run(tmp_path, options=options)
    first, second = wandb.init
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "digits" and first["config"] == CONFIG
    assert wandb.finished == 2
    assert wandb.metric == [(("*",), {"step_metric": "step"})] * 2
    assert [values["step"] for values in wandb.log if "loss" in values] == [2, 4, 6, 8]
    assert {"step": 8, "samples/preview": ("image", (4, 4, 3))} in wandb.log


def test_without_wandb_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(JaxsdError, match=r"pip install 'jaxsd\[wandb\]'") as caught:
        run(tmp_path, options=dataclasses.replace(SHORT, wandb_project="digits"))
    assert "\n" not in str(caught.value)
