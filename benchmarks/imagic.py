"""The three stages of Imagic at full size, on this machine: time and memory of a step of each.

    for stage in embedding tuning sampling; do python benchmarks/imagic.py $stage --model sd1; done

Each in a process of its own, whose peak it prints, on random weights: the UNet's step with the
embedding trained, then with the UNet trained (state and gradients float32), then one step of the
sampler with guidance and the decoder.
"""

import dataclasses
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from latents import fresh

from jaxsd import families, sharding, training
from jaxsd.components import Component, make_net
from jaxsd.editing.imagic import Edited, sample
from jaxsd.objectives.imagic import Embedding, Tuning, new_edit
from jaxsd.objectives.low_rank import LowRank
from jaxsd.pipeline import Pipeline
from jaxsd.tokenizer import train_tokenizer
from jaxsd.training.placement import compile_step, make_mesh, place_state

GIB = 2**30
PROMPT = "a bird spreading its wings"


@dataclasses.dataclass(frozen=True)
class Options:
    stage: Annotated[Literal["embedding", "tuning", "sampling"], tyro.conf.Positional]
    model: str = "sd1"
    """A family."""
    size: int = 256
    """Of the picture, in pixels."""
    batch: int = 1
    steps: int = 2
    """Steps to run: the first, and some to time."""
    lora_rank: int = 0
    """Of factors to tune instead of the UNet."""
    optimizer: str = "adamw"
    remat: str = "full"
    dtype: str = "bfloat16"


def main(options: Options) -> None:
    pipe = random_pipeline(families.get_family(options.model))
    edit = new_edit(pipe, PROMPT, (options.size, options.size))
    print(f"{options.model}: {pipe.unet.size / 1e6:,.0f} M parameters of the UNet, {options}")
    if options.stage == "sampling":
        dtype = jnp.dtype(options.dtype)
        for name, part in pipe.components.items():
            kept = {n: p.astype(dtype) for n, p in part.params.items()}
            pipe.components[name] = Component(part.net, kept)
        for count in range(1, options.steps + 1):
            start = time.perf_counter()
            pipe.decode(sample(Edited(pipe, edit), 0.7, 0, steps=1))
            seconds = time.perf_counter() - start
            print(f"picture {count}, one step of the sampler: {seconds:.1f} s")
    else:
        train(options, pipe, edit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak resident memory {peak / GIB:.2f} GiB, compiling included")


def train(options: Options, pipe: Pipeline, edit: Any) -> None:
    """Some steps of a stage, on latents that are noise."""
    kind = Embedding if options.stage == "embedding" else Tuning
    goal: Any = kind(pipe, edit, dtype=options.dtype)
    if options.lora_rank and kind is Tuning:
        rank = options.lora_rank
        goal = LowRank(goal, pipe.params["unet"], rank, float(rank), dtype=options.dtype)
    settings = training.Options(
        options.steps,
        batch_size=options.batch,
        learning_rate=2e-3 if kind is Embedding else 5e-7,
        warmup_steps=0,
        decay="constant",
        ema_decay=0.0,
        optimizer=options.optimizer,
        remat=options.remat,
        dtype=options.dtype,
    )
    mesh, optimizer = make_mesh(settings, jax.devices()[:1]), training.make_optimizer(settings)
    state, aux = place_state(goal, optimizer, settings, mesh)
    side = options.size // pipe.vae.config.downscale if pipe.vae else options.size
    shape = (options.batch, side, side, pipe.latent_channels)
    drawn = np.random.default_rng(0).standard_normal(shape, np.float32)
    batch = sharding.split({"latents": drawn}, mesh)
    start = time.perf_counter()
    step = compile_step(training.make_step(goal, optimizer, settings), state, settings)
    compiled = step.lower(state, aux, batch).compile()
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    print(f"{arguments / GIB:.2f} GiB of arguments, {temporary / GIB:.2f} of temporaries")
    for _ in range(options.steps):
        start = time.perf_counter()
        state, metrics = compiled(state, aux, batch)
        loss = float(metrics["loss"])
        print(f"step {int(state.step)}: {time.perf_counter() - start:.1f} s, loss {loss:.4f}")


def random_pipeline(family: families.Family) -> Pipeline:
    """A family's networks with random weights, float32, and a small tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        words = train_tokenizer([PROMPT], Path(folder) / "tokenizer", 600)
    parts: dict[str, Any] = {"unet": Component(make_net(family.unet), fresh(make_net(family.unet)))}
    for name in ("vae", "text_encoder", "text_encoder_2"):
        config: Any = getattr(family, name)
        if config is None:
            continue
        if name != "vae":
            config = dataclasses.replace(config, eos_token_id=words.eos_token_id)
            parts[name.replace("text_encoder", "tokenizer")] = words
        net = make_net(config)
        parts[name] = Component(net, net.init(jax.random.key(1)))
    return Pipeline(schedule=family.schedule, **parts)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
