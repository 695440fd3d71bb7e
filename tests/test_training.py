"""The loop does what its options say, and a training that was killed ends with the same bits."""

import dataclasses
import json
import logging
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy
from toy import CONFIG, OPTIONS, SHORT, Regression, assert_same_state, logged, run, stopping_after

from jaxsd import data, training, weights
from jaxsd.checkpoints import Checkpoints
from jaxsd.errors import JaxsdError
from jaxsd.objectives.ddpm import DDPM
from jaxsd.training import Evaluator, Options

MORE = dataclasses.replace(OPTIONS, steps=12)


# --- The loop ---------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(tmp_path):
    with pytest.raises(JaxsdError, match="batch_size 6 .*8 devices"):
        run(tmp_path, options=dataclasses.replace(SHORT, batch_size=6))


def test_the_step_is_compiled_once(tmp_path, caplog):
    class Scaled(Regression):
        """With a parameter that starts weakly typed, as `jnp.full(shape, 2.0)` is."""

        def init(self, key):
            return super().init(key) | {"scale": jnp.full((), 2.0)}

        def loss(self, params, aux, batch, now):
            loss, metrics = super().loss(params, aux, batch, now)
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


def test_a_training_leaves_what_it_promises(tmp_path):
    state = run(tmp_path)
    assert int(state.step) == 8
    assert logged(tmp_path)[1] == [2, 4, 6, 8]
    assert weights.read_json(tmp_path / "config.json") == CONFIG
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["preview_0000008.png"]
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
    """With the real thing: dropout, eight devices, batches from grain."""
    ddpm = tiny.ddpm()
    objective = Silent(ddpm.unet, ddpm.schedule, initial=tiny.parameters(ddpm.net))
    dataset = data.elements("digit-scans", "train", 0)

    def digits(start, stop):
        return data.batches(dataset, 8, start, stop)

    options = Options(4, batch_size=8, warmup_steps=1, save_every=2, log_every=1)
    # One function for the three runs, so that it is compiled once
    step = training.make_step(objective, training.make_optimizer(options), options)
    monkeypatch.setattr(training.loop, "make_step", lambda *_: step)
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
    with pytest.raises(JaxsdError, match="learning_rate 0.001, now 0.5; seed 0, now 1") as caught:
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


def test_options_that_an_older_workdir_does_not_know_had_their_defaults(tmp_path):
    old = {"recipe": "regression", "seed": 0, "save_every": 3, "num_workers": 0, "fsdp": 2}
    weights.write_json(tmp_path / "config.json", old)
    now = old | {"save_every": 4, "num_workers": 8, "fsdp": 1}  # which changes no result
    now |= {"optimizer": "adamw", "accumulate": 1, "keep_best": None}
    run(tmp_path, config=now)
    assert weights.read_json(tmp_path / "config.json") == now
    weights.write_json(tmp_path / "config.json", old)
    with pytest.raises(JaxsdError, match="optimizer 'adamw', now 'lion'"):
        run(tmp_path, config=now | {"optimizer": "lion"})
    assert weights.read_json(tmp_path / "config.json") == old


def test_a_damaged_checkpoint_costs_the_steps_after_the_one_before(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", options=MORE, make_batches=stopping_after(10))
    newest = tmp_path / "cut" / "checkpoints" / "8"
    (newest / "opt_state" / "manifest.ocdbt").unlink()
    capsys.readouterr()
    assert_same_state(run(tmp_path / "cut"), whole)
    assert f"warning: checkpoint {newest} is damaged" in capsys.readouterr().err
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_a_full_disk_stops_with_one_line_and_the_checkpoint_before(tmp_path):
    big = {"weight": jnp.ones((32, 32)), "bias": jnp.zeros(32), "unused": jnp.ones((256, 256))}
    big["unused"] = jax.random.normal(jax.random.key(0), (256, 256))  # which no compression shrinks
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(start, stop):
        for i, batch in enumerate(toy.batches(start, stop), start):
            if i == 6:
                while not (tmp_path / "cut" / "checkpoints" / "4").exists():
                    time.sleep(0.01)  # batches are made ahead
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            yield batch

    try:
        with pytest.raises(JaxsdError, match="cannot save step .*step 4 is complete") as caught:
            run(tmp_path / "cut", Regression(big), filling, MORE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["4"]
    whole = run(tmp_path / "whole", Regression(big), options=MORE)
    assert_same_state(run(tmp_path / "cut", Regression(big), options=MORE), whole)


# --- Evaluation ------------------------------------------------------------------------------


def evaluator(every, seen):
    """Whose loss falls to step 6 and rises after; it looks at all parameters, with pictures too."""

    def measure(params, step):
        assert sorted(params) == ["bias", "weight"]
        seen.append(step)
        loss = 1.0 + abs(step - 6)
        return {"loss": loss, "size": np.abs(params["weight"]).mean(), "grid": toy.PICTURE}

    return Evaluator("eval", every, measure)


def columns(workdir, name):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def test_evaluators_are_asked_in_their_turn_and_once(tmp_path):
    whole, cut, seen = tmp_path / "whole", tmp_path / "cut", []
    options = dataclasses.replace(MORE, freeze=("bias",))
    state = run(whole, options=options, evaluators=[evaluator(3, seen)])
    assert seen == [3, 6, 9, 12]
    assert columns(whole, "eval/loss") == {3: 4, 6: 1, 9: 4, 12: 7}
    assert columns(whole, "eval/size")[12] == pytest.approx(np.abs(state.ema["weight"]).mean())
    assert sorted(columns(whole, "loss")) == [2, 4, 6, 8, 10, 12]
    pictures = [f"grid_{step:07}.png" for step in (3, 6, 9, 12)]
    assert sorted(path.name for path in (whole / "eval").iterdir()) == pictures

    del seen[:]
    with pytest.raises(InterruptedError):  # after the evaluation of step 9; there is a checkpoint 8
        run(cut, make_batches=stopping_after(9), options=options, evaluators=[evaluator(3, seen)])
    run(cut, options=options, evaluators=[evaluator(3, seen)])
    assert seen == [3, 6, 9, 9, 12]  # 9 lay after the checkpoint
    run(cut, options=options, evaluators=[evaluator(3, seen)])
    assert seen[5:] == []
    for name in ("loss", "eval/loss", "eval/size"):
        assert columns(cut, name) == columns(whole, name)


def test_the_best_checkpoint_is_kept(tmp_path):
    options = dataclasses.replace(MORE, steps=16, keep_best="eval/loss", keep=1)
    run(tmp_path, options=options, evaluators=[evaluator(3, [])])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["16", "6"]
    for best, said in (
        ("loss", "evaluations samples, eval"),
        ("eval/los", "eval/loss or eval/size"),
    ):
        with pytest.raises(JaxsdError, match=f"there is no '{best}'.*{said}"):
            run(
                tmp_path / best,
                options=dataclasses.replace(options, keep_best=best),
                evaluators=[evaluator(3, [])],
            )
