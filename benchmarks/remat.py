"""What rematerialisation costs and saves: memory and time of a training step of Stable Diffusion.

`python benchmarks/remat.py` prints, for Stable Diffusion 1.5's UNet at a third of its width, the
memory that a step works with (as compiled, besides state and batch) and its time as a share of that
without rematerialisation, median over interleaved rounds in one run. `--full-size` compiles the
whole UNet and runs nothing. Latents are those of 256 px.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from latents import Latents

from jaxsd.families import Family, get_family
from jaxsd.training import Options, compiler_options, init_state, make_optimizer, make_step

ROUNDS = 5
SIDE = 256  # of the pictures, in pixels


def compiled(family: Family, dtype: str, remat: str, batch: Any) -> tuple[Any, Any]:
    """The step as a program, and how to make the state that it starts from."""
    options = Options(10, batch_size=len(batch["mean"]), dtype=dtype, remat=remat)
    objective, optimizer = Latents(family, dtype), make_optimizer(options)

    def start() -> Any:
        return init_state(objective, optimizer, options)

    state, aux = jax.eval_shape(start)
    step = jax.jit(make_step(objective, optimizer, options), donate_argnums=0)
    told = compiler_options(options, jax.default_backend())
    return step.lower(state, aux, batch).compile(told), start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--batch-size", type=int, default=2)
    arguments = parser.parse_args()
    family, b = get_family("sd1"), arguments.batch_size
    if not arguments.full_size:
        narrow: Any = dataclasses.replace(family.unet, block_out_channels=(96, 192, 384, 384))
        family = dataclasses.replace(family, unet=narrow)
    batch = jax.tree.map(jnp.asarray, Latents(family).batch(b, SIDE))
    print(f"| {jax.devices()[0].device_kind}, batch {b} | remat | MiB | step time | 10 – 90 % |")
    print("| --- | --- | --- | --- | --- |")
    for dtype in ("float32", "bfloat16"):
        programs = {
            remat: compiled(family, dtype, remat, batch) for remat in ("none", "selective", "full")
        }
        shares = {} if arguments.full_size else ratios(programs, batch)
        for remat, (program, _) in programs.items():
            mib = program.memory_analysis().temp_size_in_bytes / 2**20
            low, middle, high = np.quantile(shares[remat], (0.1, 0.5, 0.9)) if shares else [0] * 3
            times = f"{middle:.2f} | {low:.2f} – {high:.2f}" if shares else "– | –"
            print(f"| {dtype} | {remat} | {mib:,.0f} | {times} |", flush=True)


def ratios(programs: dict[str, tuple[Any, Any]], batch: Any) -> dict[str, list[float]]:
    """Times of a step as shares of that without rematerialisation, round by round."""
    state, aux = programs["none"][1]()
    shares: dict[str, list[float]] = {remat: [] for remat in programs}
    for i in range(ROUNDS + 1):
        seconds = {}
        for remat, (program, _) in programs.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(program(state, aux, batch))
            seconds[remat] = time.perf_counter() - start
        if i:  # the first warms up
            for remat in programs:
                shares[remat].append(seconds[remat] / seconds["none"])
    return shares


if __name__ == "__main__":
    main()
