"""The loop does what its options say, and a training that was killed ends with the same bits."""

import dataclasses
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy
from toy import OPTIONS, Regression

from jaxsd import data, training, weights
from jaxsd.checkpoints import Checkpoints
from jaxsd.errors import JaxsdError
from jaxsd.objectives.ddpm import DDPM
from jaxsd.training import Options

CONFIG = {"recipe": "regression", "seed": 0}
SHORT = dataclasses.replace(OPTIONS, steps=8)


def run(workdir, objective=None, make_batches=toy.batches, options=SHORT, config=CONFIG):
    return training.train(objective or Regression(), make_batches, options, workdir, config)


def stopping_after(stop, make_batches=toy.batches):
    """Batches that raise when asked for more than the first `stop`."""

    def broken(start, last):
        yield from make_batches(start, stop)
        raise InterruptedError

    return broken


def assert_same_state(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def logged(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}, [row["step"] for row in rows]


# --- Options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"save_every": 0},
        {"log_every": -1},
        {"sample_every": 0},
        {"decay": "exponential"},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": -1.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"seed": -1},
    ],
)
def test_options_that_cannot_be_are_refused_by_name(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(JaxsdError, match=f"^{name} .*{value}"):
        Options(**{"steps": 10} | wrong)


@pytest.mark.parametrize(
    "decay, middle, end", [("cosine", 0.25, 0), ("linear", 0.25, 0), ("constant", 0.5, 0.5)]
)
def test_the_learning_rate_warms_up_and_decays_to_the_last_step(decay, middle, end):
    options = Options(110, learning_rate=0.5, warmup_steps=10, decay=decay)
    rate = training.learning_rate_schedule(options)
    want = {0: 0, 5: 0.25, 10: 0.5, 60: middle, 110: end}
    np.testing.assert_allclose([rate(i) for i in want], list(want.values()), atol=1e-7)
    quarter = {"cosine": 0.5 * (1 + np.cos(np.pi / 4)) / 2, "linear": 0.375, "constant": 0.5}
    np.testing.assert_allclose(rate(35), quarter[decay], atol=1e-7)


def test_warm_up_may_be_absent_or_longer_than_the_training():
    none, long = (
        training.learning_rate_schedule(Options(10, learning_rate=1.0, warmup_steps=n))
        for n in (0, 40)
    )
    assert none(0) == 1 and none(10) == pytest.approx(0, abs=1e-7)
    np.testing.assert_allclose([long(i) for i in (0, 5, 10)], [0, 0.5, 1])


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(tmp_path):
    with pytest.raises(JaxsdError, match="batch_size 6 .*4 devices"):
        run(tmp_path, options=dataclasses.replace(SHORT, batch_size=6))


# --- A step ----------------------------------------------------------------------------------


def steps_of(objective, options, count):
    """The states before and after each of `count` updates, and the metrics of each."""
    optimizer = training.make_optimizer(options)
    states = [training.init_state(objective, optimizer, options.seed)]
    step, metrics = jax.jit(training.make_step(objective, optimizer, options)), []
    for batch in toy.batches(0, count):
        state, values = step(states[-1], objective.aux, batch)
        states.append(state)
        metrics.append(values)
    return states, metrics


def test_ema_is_a_running_mean_that_grows_to_its_decay():
    options = Options(12, learning_rate=0.1, decay="constant", warmup_steps=0, ema_decay=0.5)
    states, _ = steps_of(Regression(), options, 12)
    want = np.asarray(states[0].params["weight"], np.float64)
    for n, state in enumerate(states[1:]):
        decay = min(0.5, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * np.asarray(state.params["weight"], np.float64)
        np.testing.assert_allclose(state.ema["weight"], want, atol=1e-6)
    assert np.abs(want - states[-1].params["weight"]).max() > 1e-3


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_long_gradients_are_shortened_and_short_ones_left(limit):
    options = dataclasses.replace(SHORT, max_grad_norm=limit)
    states, metrics = steps_of(Regression(), options, 1)
    key = jax.random.fold_in(jax.random.key(options.seed), 0)
    [batch] = toy.batches(0, 1)
    grads = jax.grad(Regression().loss, has_aux=True)(states[0].params, (), batch, key)[0]
    norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in grads.values()))
    assert 1e-3 < norm < 1e3
    np.testing.assert_allclose(metrics[0]["grad_norm"], norm, rtol=1e-5)
    # Adam's first moment starts as a tenth of what it is given
    moment = optax.tree_utils.tree_get(states[1].opt_state, "mu")
    for name, gradient in grads.items():
        want = gradient * min(1, limit / norm)
        # Against the norm: an entry is a sum of many terms, which may cancel
        np.testing.assert_allclose(moment[name] * 10, want, atol=1e-6 * min(norm, limit))


def test_weight_decay_spares_vectors_and_scalars():
    initial = {"weight": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(())}

    class Flat(Regression):
        def loss(self, params, aux, batch, key):
            return sum(0.0 * value.sum() for value in params.values()), {}

    options = Options(10, learning_rate=0.1, warmup_steps=0, decay="constant", weight_decay=0.5)
    states, _ = steps_of(Flat(initial), options, 1)
    after = states[1].params
    np.testing.assert_allclose(after["weight"], 1 - 0.1 * 0.5, rtol=1e-6)
    assert np.all(after["bias"] == 1) and np.all(after["scale"] == 1)


def test_metrics_say_what_the_step_did():
    states, metrics = steps_of(Regression(), SHORT, 3)
    rate = training.learning_rate_schedule(SHORT)
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    rates = [m["learning_rate"] for m in metrics]
    np.testing.assert_allclose(rates, [rate(i) for i in range(3)], rtol=1e-6)
    loss = jax.jit(Regression().loss)
    for i, batch in enumerate(toy.batches(0, 3)):
        key = jax.random.fold_in(jax.random.key(SHORT.seed), i)
        value, more = loss(states[i].params, (), batch, key)
        np.testing.assert_allclose(metrics[i]["loss"], value, rtol=1e-6)
        np.testing.assert_allclose(metrics[i]["size"], more["size"], rtol=1e-6)


def test_the_step_is_compiled_once(tmp_path, caplog):
    class Scaled(Regression):
        """With a parameter that starts weakly typed, as `jnp.full(shape, 2.0)` is."""

        def init(self, key):
            return super().init(key) | {"scale": jnp.full((), 2.0)}

        def loss(self, params, aux, batch, key):
            loss, metrics = super().loss(params, aux, batch, key)
            return loss * params["scale"], metrics

    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        run(tmp_path, Scaled())
        first = [r for r in caplog.records if "Compiling jit(step)" in r.getMessage()]
    assert len(first) == 1


def test_what_the_objective_was_given_outlives_the_training(tmp_path):
    initial = Regression().init(jax.random.key(1))
    before = {name: np.array(value) for name, value in initial.items()}
    state = run(tmp_path, Regression(initial, aux={"teacher": initial}))
    for name, value in initial.items():  # a donated array would be gone
        np.testing.assert_array_equal(np.asarray(value), before[name])
        assert not np.array_equal(state.params[name], before[name])


# --- The loop --------------------------------------------------------------------------------


def test_a_training_leaves_what_it_promises(tmp_path):
    state = run(tmp_path)
    assert int(state.step) == 8
    assert logged(tmp_path)[1] == [2, 4, 6, 8]
    assert weights.read_json(tmp_path / "config.json") == CONFIG
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step_0000008.png"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    model = weights.load(tmp_path / "model", like={"weight": (32, 32), "bias": (32,)})
    assert_same_state(model, {name: state.ema[name] for name in model})
    saved = Checkpoints(tmp_path / "checkpoints")
    assert_same_state(saved.restore(state), state)
    saved.close()


class Silent(DDPM):
    def preview(self, params):
        return None


def test_four_steps_equal_two_and_two_after_an_interruption(tmp_path, monkeypatch):
    """With the real thing: dropout, four devices, batches from grain."""
    ddpm = tiny.ddpm()
    objective = Silent(ddpm.unet, ddpm.schedule, initial=tiny.parameters(ddpm.net))
    dataset = data.elements("digit-scans", "train", 0)

    def digits(start, stop):
        return data.batches(dataset, 8, start, stop)

    options = Options(4, batch_size=8, warmup_steps=1, save_every=2, log_every=1)
    # One function for the three runs, so that it is compiled once
    step = training.make_step(objective, training.make_optimizer(options), options)
    monkeypatch.setattr(training, "make_step", lambda *_: step)
    whole = run(tmp_path / "whole", objective, digits, options)
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", objective, stopping_after(2, digits), options)
    cut = run(tmp_path / "cut", objective, digits, options)
    assert_same_state(cut, whole)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_an_interruption_anywhere_changes_nothing(tmp_path, stop):
    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", make_batches=stopping_after(stop))
    assert_same_state(run(tmp_path / "cut"), whole)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_an_ended_training_only_exports_again(tmp_path):
    def none_left(start, stop):
        assert start == stop
        return iter(())

    state = run(tmp_path)
    (tmp_path / "model" / weights.DIFFUSERS_FILE).unlink()
    log = (tmp_path / "metrics.jsonl").read_text()
    assert_same_state(run(tmp_path, make_batches=none_left), state)
    assert (tmp_path / "metrics.jsonl").read_text() == log
    assert (tmp_path / "model" / weights.DIFFUSERS_FILE).exists()


def test_a_half_written_checkpoint_and_a_torn_row_are_ignored(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", make_batches=stopping_after(6))
    [complete] = [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert complete == "4"
    torn = tmp_path / "cut" / "checkpoints" / "6.orbax-checkpoint-tmp"
    (torn / "default").mkdir(parents=True)
    (torn / "default" / "manifest.ocdbt").write_bytes(b"\0")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "lo')
    assert_same_state(run(tmp_path / "cut"), whole)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert not torn.exists()


def test_a_workdir_of_other_options_is_refused_with_both_values(tmp_path):
    run(tmp_path)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(JaxsdError, match="learning_rate None, now 0.5; seed 0, now 1") as caught:
        run(tmp_path, config=CONFIG | {"seed": 1, "learning_rate": 0.5})
    assert "\n" not in str(caught.value)
    assert weights.read_json(tmp_path / "config.json") == CONFIG
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == files


@pytest.mark.parametrize(
    "taken, kind",
    [
        ("", "file"),
        ("config.json", "folder"),
        ("checkpoints", "file"),
        ("metrics.jsonl", "folder"),
        ("tensorboard", "file"),
    ],
)
def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, taken, kind):
    workdir = tmp_path / "work"
    place = workdir / taken if taken else workdir
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if kind == "folder" else place.touch()
    with pytest.raises(JaxsdError, match="work") as caught:
        run(workdir)
    assert "\n" not in str(caught.value)


# --- Killed ----------------------------------------------------------------------------------


def start(workdir, pause_at):
    return subprocess.Popen(
        [sys.executable, toy.__file__, str(workdir), str(pause_at)],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "ended early"
        time.sleep(0.005)


def kill_midway(workdir, pause_at, while_saving, rng):
    """Runs a training that has no end, and kills it once it has made some progress."""
    log, saves = workdir / "metrics.jsonl", workdir / "checkpoints"

    def size():
        return log.stat().st_size if log.exists() else 0

    def paused():
        return f'{{"step": {pause_at},' in log.read_text()

    def saving():
        return saves.exists() and any("tmp" in path.name for path in saves.iterdir())

    before = size()
    process = start(workdir, pause_at)
    try:
        wait_for(lambda: size() > before, process)
        if while_saving:
            wait_for(lambda: saving() or paused(), process)
        else:
            time.sleep(rng.uniform(0, 0.3))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_training_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rng = random.Random(0)
    for i in range(4):
        kill_midway(cut, pause_at=24 * (i + 1), while_saving=i % 2 == 0, rng=rng)
    processes = [start(workdir, -1) for workdir in (cut, whole)]
    assert [process.wait() for process in processes] == [0, 0]

    for name in ("config.json", "model/" + weights.DIFFUSERS_FILE):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert logged(cut) == logged(whole)
    assert logged(cut)[1] == list(range(2, 121, 2))
    like = training.init_state(Regression(), training.make_optimizer(OPTIONS), 0)
    states = []
    for workdir in (whole, cut):
        saved = Checkpoints(workdir / "checkpoints")
        assert saved.latest == 120
        states.append(saved.restore(like))
        saved.close()
    assert_same_state(*states)
