"""How long saving stops a training, all devices with all of the state.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/saving.py

Of a UNet with as many arrays as Stable Diffusion 1.5's, and a tenth of the channels. In turns, for
each least size of the pieces that devices write of one array: until the training goes on, until all
is written, and reading it again, seconds.
"""

import dataclasses
import tempfile
import time

import jax
import numpy as np
import tyro
from beside import narrowed
from latents import Latents

from jaxsd import checkpoints, training
from jaxsd.families import get_family
from jaxsd.training.placement import make_mesh, place_state


@dataclasses.dataclass(frozen=True)
class Options:
    pieces: tuple[int, ...] = (0, checkpoints.LEAST_PIECE)
    """Least sizes in bytes, jaxsd's own last."""
    rounds: int = 5


def times(state: training.TrainState) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        kept = checkpoints.Checkpoints(folder)
        try:
            moments = [time.perf_counter()]
            for does in (lambda: kept.save(1, state), kept.wait, lambda: kept.restore(state)):
                does()
                moments.append(time.perf_counter())
        finally:
            kept.close()
    begin, going_on, written, read = moments
    return going_on - begin, written - begin, read - written


def main(options: Options) -> None:
    family = narrowed(get_family("sd1"), 10)
    settings = training.Options(10, batch_size=jax.device_count())
    optimizer, mesh = training.make_optimizer(settings), make_mesh(settings)
    state, _ = place_state(Latents(family), optimizer, settings, mesh)
    arrays = jax.tree.leaves(state)
    size = sum(array.nbytes for array in arrays) / 1e6
    print(f"{len(arrays)} arrays, {size:.0f} MB on each of {jax.device_count()} devices\n")
    taken = {piece: [] for piece in options.pieces}
    for number in range(options.rounds + 1):
        for piece in options.pieces:
            checkpoints.LEAST_PIECE = piece
            seconds = times(state)
            if number:  # the first compiles
                taken[piece].append(seconds)
    print("| pieces from | stopped | written | read |\n| --- | --- | --- | --- |")
    for piece, seconds in taken.items():
        columns = zip(*seconds, strict=True)
        told = [f"{np.median(c):.2f} [{min(c):.2f}, {max(c):.2f}]" for c in columns]
        print(f"| {piece / 2**20:g} MiB | {' | '.join(told)} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
