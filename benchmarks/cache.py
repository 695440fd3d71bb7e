"""How fast a cache of latents is read: batches of examples, on the host, as a training takes them.

python benchmarks/cache.py --data runs/latents --batch-size 64
"""

import dataclasses
import time

import tyro

from jaxsd import data
from jaxsd.data.latents import open_latents


@dataclasses.dataclass
class Options:
    data: str
    """A folder that `train.py encode` made."""
    batch_size: int = 64
    batches: int = 200
    num_workers: int = 0
    """Processes that read; 0 for two threads."""


def main(options: Options) -> None:
    latents = open_latents(options.data, 0, options.batch_size)
    made = data.batches(
        latents, options.batch_size, 0, options.batches + 1, num_workers=options.num_workers
    )
    first = next(made)  # until which threads or processes start
    size = sum(array.nbytes for array in first.values()) / options.batch_size
    start = time.perf_counter()
    count = sum(len(batch["mean"]) for batch in made)
    rate = count / (time.perf_counter() - start)
    print(f"{rate:,.0f} images/s, {rate * size / 1e6:,.0f} MB/s, {size / 1024:.1f} KiB an image")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
