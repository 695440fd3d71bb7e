"""A training that costs nothing: a noisy linear regression. Runs as `toy.py WORKDIR PAUSE_AT`."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import weights
from jaxsd.training import Options, train

SIZE = 32


class Regression:
    """y = W x + b, with noise on x that is drawn from the step's key."""

    def __init__(self, initial=None, aux=()):
        self.initial, self.aux = initial, aux

    def init(self, key):
        if self.initial is not None:
            return self.initial
        return {"weight": jax.random.normal(key, (SIZE, SIZE)), "bias": jnp.zeros(SIZE)}

    def loss(self, params, aux, batch, key):
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        y = x @ params["weight"].T + params["bias"][None]
        return jnp.square(y - batch["y"]).mean(), {"size": jnp.abs(params["weight"]).mean()}

    def preview(self, params):
        return np.full((4, 4, 3), 128, np.uint8)

    def export(self, params, folder):
        weights.save(params, Path(folder), weights.DIFFUSERS_FILE)


def batches(start, stop):
    for i in range(start, stop):
        x, y = np.random.default_rng(i).standard_normal((2, 8, SIZE), np.float32)
        yield {"x": x, "y": y}


OPTIONS = Options(120, batch_size=8, warmup_steps=5, save_every=4, log_every=2, sample_every=20)


if __name__ == "__main__":
    workdir, pause_at = sys.argv[1], int(sys.argv[2])

    def slow_batches(start, stop):
        for i, batch in enumerate(batches(start, stop), start):
            time.sleep(0.02)
            while i == pause_at:  # until killed
                time.sleep(1)
            yield batch

    train(Regression(), slow_batches, OPTIONS, workdir, {"recipe": "regression"})
