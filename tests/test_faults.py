"""Signals and losses that are no numbers end a training where it can go on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import OPTIONS, assert_same_state, logged, run

from jaxsd.checkpoints import Checkpoints
from jaxsd.errors import JaxsdError
from jaxsd.training import faults

LONG = dataclasses.replace(OPTIONS, steps=24)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir, options=LONG)


# --- Signals ---------------------------------------------------------------------------------


def signalling(number, at, then_wait=False):
    """Batches that send this process a signal when number `at` is asked for."""

    def batches(start, stop):
        for i, batch in enumerate(toy.batches(start, stop), start):
            if i == at:
                os.kill(os.getpid(), number)
                while then_wait:  # as on a bucket that does not answer
                    time.sleep(1)
            yield batch

    return batches


@pytest.mark.parametrize(
    "number, error, then_wait",
    [
        (signal.SIGTERM, SystemExit, False),
        (signal.SIGTERM, SystemExit, True),
        (signal.SIGINT, KeyboardInterrupt, False),
    ],
)
def test_a_signal_saves_and_ends(tmp_path, whole, capsys, number, error, then_wait):
    before = signal.getsignal(number)
    with pytest.raises(error) as caught:
        run(tmp_path, make_batches=signalling(number, 13, then_wait), options=LONG)
    assert error is not SystemExit or caught.value.code == 0
    assert signal.getsignal(number) is before
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.close()
    assert checkpoints.latest is not None and checkpoints.latest <= (13 if then_wait else 16)
    said = f"stopped by {number.name} after step {checkpoints.latest}, which {tmp_path} holds"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "model").exists()
    assert_same_state(run(tmp_path, options=LONG), whole[1])
    assert logged(tmp_path) == logged(whole[0])


def test_a_second_signal_stops_at_once():
    code = """
import os, signal, sys
from jaxsd.training.faults import Signals
with Signals() as signals:
    os.kill(os.getpid(), signal.SIGTERM)
    print(signals.received.name, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "SIGTERM\n" and done.returncode == -signal.SIGTERM


def test_in_a_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(faults.Signals().__enter__).result().received is None
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_that_is_told_to_stop_is_enough():
    """As with several processes, where each has its devices' part of the votes."""
    vote = faults._vote_of_all()
    assert [bool(vote(np.arange(8) == told)) for told in (8, 0, 5)] == [False, True, True]


def test_processes_stop_at_the_step_at_which_all_know(monkeypatch):
    """The answer to the vote of step n is read at step n + 2, wherever the signal arrived."""
    votes = iter([0, 0, 1, 1, 1, 1])
    monkeypatch.setattr(faults.jax, "process_count", lambda: 2)
    monkeypatch.setattr(faults, "_vote_of_all", lambda: lambda told: jnp.int32(next(votes)))
    watch, told = faults.Watch(10, faults.Signals()), []
    for step in range(1, 6):
        watch.after(step, jnp.int32(0))
        told.append(watch.told)
    assert told == [False, False, False, False, True]
    assert watch.give_up() is False  # alone it may not decide


# --- Not finite ------------------------------------------------------------------------------


def poisoned(*numbers):
    def batches(start, stop):
        for i, batch in enumerate(toy.batches(start, stop), start):
            yield {**batch, "y": batch["y"] * np.float32("nan")} if i in numbers else batch

    return batches


def options(max_skipped):
    return dataclasses.replace(LONG, max_skipped=max_skipped, log_every=1)


def column(workdir, name):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows]


def test_bad_steps_are_skipped_and_counted(tmp_path):
    run(tmp_path, make_batches=poisoned(3, 4, 9), options=options(3))
    assert column(tmp_path, "skipped") == [0] * 3 + [1] + [2] * 5 + [3] * 15
    assert column(tmp_path, "loss")[3:5] == [None, None]  # which every reader of JSON knows


@pytest.mark.parametrize("last", [14, 23])
def test_too_many_bad_steps_in_a_row_stop_and_are_named(tmp_path, last):
    bad = [2, 3, *range(last - 4, last + 1)]
    with pytest.raises(JaxsdError, match="not finite 5 times in a row") as caught:
        run(tmp_path, make_batches=poisoned(*bad), options=options(5))
    assert f"steps {last - 3} to {last + 1}, batches {last - 4} to {last}" in str(caught.value)
    assert "\n" not in str(caught.value)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.close()
    assert checkpoints.latest == (last // 4) * 4
    # Whoever mends the data goes on from there
    mended = run(tmp_path, make_batches=poisoned(2, 3), options=options(5))
    assert int(mended.skipped) == 2 + sum(i < checkpoints.latest for i in bad[2:])


def test_a_training_that_stopped_for_bad_steps_stops_again(tmp_path):
    for _ in range(2):
        with pytest.raises(JaxsdError, match="batches 14 to 18"):
            run(tmp_path, make_batches=poisoned(*range(14, 24)), options=options(5))
