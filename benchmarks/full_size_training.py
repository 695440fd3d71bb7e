"""A training step of Stable Diffusion at full size, on this machine: its memory, time and loss.

    python benchmarks/full_size_training.py --model sd1 --size 256 --optimizer adafactor

compiles the step of `train.py text-to-image`, or of another `--recipe`, on cached latents, prints
the bytes that it will take, and, if there are so many, runs it on random weights. State and
gradients are float32; the teacher of a distillation is as it computes.
"""

import dataclasses
import resource
import time

import jax
import tyro
from latents import Latents, Recipe, held, objective

from jaxsd import families, sharding, training
from jaxsd.training.placement import compile_step, make_mesh, place_state, spread

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Options:
    recipe: Recipe = "text-to-image"
    model: str = "sd1"
    """A family, whose UNet is trained."""
    size: int = 256
    """Of the pictures, in pixels."""
    batch: int = 1
    steps: int = 2
    """Steps to run: the first, and some to time."""
    optimizer: str = "adamw"
    train: tuple[str, ...] = ()
    """Patterns of the only parameters to train; by default all."""
    remat: str = "full"
    dtype: str = "bfloat16"
    run: bool = True
    """Run it too, not just compile it."""


def main(options: Options) -> None:
    names = ("optimizer", "train", "remat", "dtype")
    settings = training.Options(
        1000,
        batch_size=options.batch,
        learning_rate=1e-5,
        warmup_steps=0,
        **{name: getattr(options, name) for name in names},
    )
    mesh = make_mesh(settings, jax.devices()[:1])
    family = families.get_family(options.model)
    goal = objective(options.recipe, family, options.dtype)
    optimizer = training.make_optimizer(settings)
    state, aux = spread(held(goal, optimizer, settings), settings, mesh)
    latents = Latents(family).batch(options.batch, options.size)
    batch = sharding.split(latents, mesh)
    trained = sum(x.size for x in state.params.values())
    print(f"{options.model}: {trained / 1e6:,.0f} of {goal.net.size / 1e6:,.0f} M parameters")
    print(f"{options.batch} x {options.size} px, {options}")

    step = compile_step(training.make_step(goal, optimizer, settings), state, settings)
    start = time.perf_counter()
    compiled = step.lower(state, aux, batch).compile()
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    print(f"{arguments / GIB:.2f} GiB of arguments, {temporary / GIB:.2f} of temporaries")
    # Initial parameters are there beside the state that is made of them
    initial = 4 * trained
    needed, free = arguments + max(temporary, initial), _available()
    if not options.run or needed > free:
        print(f"not run: it takes {needed / GIB:.1f} GiB, and {free / GIB:.1f} are free")
        return

    goal = objective(options.recipe, family, options.dtype, real=True)
    state, aux = place_state(goal, optimizer, settings, mesh)
    for _ in range(options.steps):
        start = time.perf_counter()
        state, metrics = compiled(state, aux, batch)
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - start
        norm = float(metrics["grad_norm"])
        print(f"step {int(state.step)}: {seconds:.1f} s, loss {loss:.4f}, gradient norm {norm:.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak resident memory {peak / GIB:.2f} GiB, compiling included")


def _available() -> int:
    """Bytes of memory that this machine could give without swapping (Linux)."""
    with open("/proc/meminfo") as lines:
        known = dict(line.split(":") for line in lines)
    return int(known["MemAvailable"].split()[0]) * 1024


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
