"""A training that costs nothing: a noisy linear regression. As a script it serves `drill.py`."""

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import weights
from jaxsd.training import Options, train

SIZE = 32
PICTURE = np.full((4, 4, 3), 128, np.uint8)


class Regression:
    """y = W x + b, with noise on x that is drawn from the step's key."""

    def __init__(self, initial=None, aux=()):
        self.initial, self.aux = initial, aux

    def init(self, key):
        if self.initial is not None:
            return self.initial
        return {"weight": jax.random.normal(key, (SIZE, SIZE)), "bias": jnp.zeros(SIZE)}

    def loss(self, params, aux, batch, now):
        x = batch["x"] + 0.1 * jax.random.normal(now.key, batch["x"].shape)
        y = x @ params["weight"].T + params["bias"][None]
        return jnp.square(y - batch["y"]).mean(), {"size": jnp.abs(params["weight"]).mean()}

    def preview(self, params):
        return PICTURE

    def export(self, params, folder):
        weights.save(params, Path(folder), weights.DIFFUSERS_FILE)


def batches(start, stop):
    for i in range(start, stop):
        x, y = np.random.default_rng(i).standard_normal((2, 8, SIZE), np.float32)
        yield {"x": x, "y": y}


OPTIONS = Options(120, batch_size=8, warmup_steps=5, save_every=4, log_every=2, sample_every=20)
SHORT = dataclasses.replace(OPTIONS, steps=8)
CONFIG = {"recipe": "regression", "seed": 0}


def run(workdir, objective=None, make_batches=batches, options=SHORT, config=CONFIG, evaluators=()):
    objective = objective or Regression()
    return train(objective, make_batches, options, workdir, config, evaluators=evaluators)


def stopping_after(stop, make_batches=batches):
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


def train_slowly(workdir, steps, until):
    """A training whose batches take a while, and of which there are only those before `until`."""

    def slow_batches(start, stop):
        for i, batch in enumerate(batches(start, stop), start):
            if until < steps:
                time.sleep(0.01)
            while i == until:  # until killed
                time.sleep(1)
            yield batch

    options = dataclasses.replace(OPTIONS, steps=steps)
    train(Regression(), slow_batches, options, workdir, CONFIG)


def serve():
    """Trains in a child for each line "WORKDIR STEPS UNTIL" of the input; all is imported once.

    Says the child's process id, and its exit status when it has ended.
    """
    for name in ("tensorboardX", "tqdm", "PIL.Image"):  # which training would load
        importlib.import_module(name)
    for line in sys.stdin:
        workdir, steps, until = line.split()
        if (child := os.fork()) == 0:
            sys.stdin.close()
            sys.stdout = sys.stderr
            train_slowly(workdir, int(steps), int(until))
            sys.exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
