"""A training may end before its last step: where an evaluation comes to a given number."""

import dataclasses
import json

import numpy as np
import pytest
from refusals import refused
from toy import OPTIONS, Regression, assert_same_state, run, stopping_after

from jaxsd.training import Evaluator
from jaxsd.training.evaluators import parse_goal

MORE = dataclasses.replace(OPTIONS, steps=12)
END = 8


def size(params, step):
    """Rises from zero, with the bias."""
    return {"size": float(np.abs(np.asarray(params["bias"])).sum())}


TOLD = [Evaluator("eval", 4, size), Evaluator("late", 100, lambda params, step: {"seen": step})]


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Those of a training that reaches its goal after step 8 of 12."""
    workdir = tmp_path_factory.mktemp("long")
    run(workdir, options=MORE, evaluators=TOLD)
    sizes = [rows(workdir)[step]["eval/size"] for step in (4, END, 12)]
    assert sizes == sorted(sizes)
    return dataclasses.replace(MORE, stop_when=f"eval/size>{sizes[1]!r}")


@pytest.fixture(scope="module")
def ended(options, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ended")
    return workdir, run(workdir, options=options, evaluators=TOLD)


def test_it_ends_at_the_goal_as_at_the_last_step(ended):
    workdir, state = ended
    assert int(state.step) == END == max(rows(workdir))
    assert rows(workdir)[END]["late/seen"] == END and "loss" in rows(workdir)[END]
    assert (workdir / "samples" / f"preview_{END:07}.png").is_file()
    assert (workdir / "model").is_dir()


class Unlucky(Regression):
    def export(self, params, folder):
        raise InterruptedError


@pytest.mark.parametrize(
    ("objective", "read"), [(Regression(), 6), (Unlucky(), 12)], ids=["on the way", "at the end"]
)
def test_one_that_was_killed_ends_there_too(objective, read, ended, options, tmp_path):
    cut = stopping_after(read)
    with pytest.raises(InterruptedError):
        run(tmp_path, objective, cut, options=options, evaluators=TOLD)
    assert_same_state(run(tmp_path, options=options, evaluators=TOLD), ended[1])
    told = ("loss", "eval/size", "late/seen")
    got, want = (
        {s: [row.get(n) for n in told] for s, row in rows(w).items()} for w in (tmp_path, ended[0])
    )
    assert got == want and (tmp_path / "model").is_dir()


def test_one_that_never_comes_there_goes_to_its_last_step(options, tmp_path):
    never = dataclasses.replace(options, stop_when="eval/size < -1e9")
    assert int(run(tmp_path, options=never, evaluators=TOLD).step) == 12


def test_what_is_no_goal(options, tmp_path):
    for text in ("eval/size", "eval/size<", "<3", "eval/size<nan", "a<1<2", "eval/size=3"):
        assert "METRIC<VALUE or METRIC>VALUE" in refused(parse_goal, text)
    for text, said in (("evil/size<3", "eval, late"), ("eval/loss<3", "eval/size")):
        wrong = dataclasses.replace(options, stop_when=text)
        assert said in refused(run, tmp_path / "w", options=wrong, evaluators=TOLD)
    assert parse_goal(None) is None
