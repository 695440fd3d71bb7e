"""One of the processes that train the digits together. Runs as `pair.py WORKDIR PAUSE_AT`."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tiny
from flax import nnx

from jaxsd import data, processes, sharding, weights
from jaxsd.nn import Linear, Net
from jaxsd.objectives.ddpm import DDPM
from jaxsd.training import Options, train
from jaxsd.training.placement import make_mesh

OPTIONS = Options(
    12,
    batch_size=8,
    warmup_steps=1,
    save_every=3,
    log_every=1,
    fsdp=2,
    shard=("fc1.weight=fsdp,-",),  # and fc2's by the rule that there is
)


class Perceptron(nnx.Module):
    """Two layers in the UNet's place, which take a second to compile."""

    config = None

    def __init__(self):
        self.fc1 = Linear(64 + 1 + tiny.CLASSES, 64)
        self.fc2 = Linear(64, 64)

    def __call__(self, sample, timestep, class_labels):
        known = [sample.reshape(-1, 64), timestep[:, None] / 1000, class_labels]
        return self.fc2(jax.nn.silu(self.fc1(jnp.concatenate(known, 1)))).reshape(sample.shape)


class Digits(DDPM):
    def __post_init__(self):
        super().__post_init__()
        self.net = Net(Perceptron())

    def preview(self, params):
        return None

    def export(self, params, folder):
        weights.save(params, Path(folder), weights.DIFFUSERS_FILE)


def objective() -> DDPM:
    ddpm = tiny.ddpm()
    return Digits(ddpm.unet, ddpm.schedule)


def batches(start: int, stop: int):
    scans = data.elements("digit-scans", "train", 0)
    share = sharding.share(make_mesh(OPTIONS))
    return data.batches(scans, OPTIONS.batch_size, start, stop, shard=share)


if __name__ == "__main__":
    workdir, pause_at = sys.argv[1], int(sys.argv[2])
    processes.initialize(timeout=200)

    def slow_batches(start, stop):
        for i, batch in enumerate(batches(start, stop), start):
            time.sleep(0.05)
            while i == pause_at:  # until killed
                time.sleep(1)
            yield batch

    train(objective(), slow_batches, OPTIONS, workdir, {"recipe": "digits"})
