"""Twenty kills at random moments leave no trace in what a training leaves."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest
import toy
from drill import differences, drill

KILLS, REACH = 20, 6
STEPS = KILLS * REACH + 8


class Served:
    """A training in a child of `toy.serve`, as a process."""

    def __init__(self, server, workdir, until):
        self._server = server
        server.stdin.write(f"{workdir} {STEPS} {until}\n")
        server.stdin.flush()
        self._child, self._status = int(server.stdout.readline()), None

    def poll(self):
        try:
            os.kill(self._child, 0)
        except ProcessLookupError:
            return self.wait()
        return None

    def send_signal(self, number):
        os.kill(self._child, number)

    def wait(self):
        if self._status is None:
            self._status = int(self._server.stdout.readline())
        return self._status


@pytest.fixture
def server():
    """Devices and programs belong to the children: the server has only imported."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, toy.__file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path, server):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    kills = drill(lambda i: Served(server, cut, REACH * (i + 1)), cut, KILLS, pace=0.9)
    assert [Served(server, workdir, STEPS).wait() for workdir in (cut, whole)] == [0, 0]
    assert differences(cut, whole) == []
    # The moments were what they were meant to be
    assert sum(kill.saving for kill in kills) >= KILLS // 4
    assert {kill.signal for kill in kills} == {signal.SIGKILL.name, signal.SIGTERM.name}
    assert kills[-1].step > STEPS // 4
    # What a SIGTERM left is never lost: each left more
    kept = [kill.checkpoints[-1] for kill in kills if kill.signal == signal.SIGTERM.name]
    assert kept == sorted(set(kept)) and len(kept) == KILLS // 4, kept


def test_the_drill_notices_what_differs(tmp_path):
    """Else it would prove nothing."""
    one, other = tmp_path / "one", tmp_path / "other"
    toy.run(one), toy.run(other)
    assert differences(one, other) == []
    log = other / "metrics.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    picture = next((other / "samples").iterdir())
    picture.write_bytes(b"")
    for item, seed in (("params", 1), ("ema", 2)):
        toy.run(tmp_path / item, options=dataclasses.replace(toy.SHORT, seed=seed))
        shutil.rmtree(other / "checkpoints" / "8" / item)
        shutil.copytree(
            tmp_path / item / "checkpoints" / "8" / item, other / "checkpoints" / "8" / item
        )
    assert differences(one, other) == [
        f"samples/{picture.name}",
        "metrics.jsonl",
        "params of step 8",
        "ema of step 8",
    ]
