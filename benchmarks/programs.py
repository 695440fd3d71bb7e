"""Programs at full size to be compiled for machines that are not at hand: shapes, no arrays."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from latents import TOKENS, Latents, Recipe, held, objective

from jaxsd import denoising, families, kernels, sharding, training
from jaxsd.diffusion import samplers
from jaxsd.diffusion.denoise import guided
from jaxsd.families import Family
from jaxsd.models import UNet
from jaxsd.nn import Net
from jaxsd.shortcuts import Way
from jaxsd.training.placement import compile_step, make_mesh, spread


@dataclasses.dataclass(frozen=True)
class Options:
    program: Literal["step", "sampling", "training"] = "training"
    recipe: Recipe = "text-to-image"
    model: str = "sd1"
    """A family, whose UNet is run or trained."""
    size: int = 512
    """Of the pictures, in pixels."""
    batch: int = 8
    """Pictures for each chip."""
    steps: int = 20
    """Of sampling."""
    accumulate: int = 1
    fsdp: int = 1
    """Chips over which a training's state is split."""
    tensor: int = 1
    remat: str = "selective"
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    json: bool = False
    """Print JSON alone."""
    hlo: Path | None = None
    """Where to write the compiled program, for a closer look."""


def make(options: Options, devices: Any) -> tuple[Any, tuple]:
    """The program, jitted, and the shapes of what it takes."""
    of = training_program if options.program == "training" else sampling_program
    return of(options, families.get_family(options.model), devices)


def training_program(options: Options, family: Family, devices: Any) -> tuple[Any, tuple]:
    """A training's step, and the shapes of what it takes."""
    names = ("accumulate", "fsdp", "tensor", "remat", "dtype", "optimizer")
    settings = training.Options(
        1000,
        batch_size=options.batch * len(devices),
        **{name: getattr(options, name) for name in names},
    )
    mesh = make_mesh(settings, devices)
    goal = objective(options.recipe, family, options.dtype)
    optimizer = training.make_optimizer(settings)
    state, aux = spread(held(goal, optimizer, settings), settings, mesh)
    rows = NamedSharding(mesh, sharding.ROWS)
    shapes = Latents(family).shapes(settings.batch_size, options.size)
    batch = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows) for n, s in shapes.items()}
    step = compile_step(training.make_step(goal, optimizer, settings), state, settings)
    return step, (state, aux, batch)


def loop_inputs(
    family: Family, params: Any, conditions: list, scales: Any, steps: int
) -> denoising.Inputs:
    """Of `denoising.loop` by DDIM, with guidance [1, b] and nothing besides."""
    return denoising.Inputs(
        params=(params, []),
        loras={},
        lora_scales=np.zeros(0, np.float32),
        conditions=conditions,
        scales=scales,
        guidance_rescale=np.float32(0),
        control_scales=np.zeros(0, np.float32),
        blend=None,
        keys=jax.vmap(jax.random.key)(jnp.arange(scales.shape[1], dtype=jnp.uint32)),
        grid=samplers.make_steps(family.schedule, "ddim", steps),
        eta=np.float32(0),
    )


def sampling_program(options: Options, family: Family, devices: Any) -> tuple[Any, tuple]:
    """The denoising of latents, once or in a loop, and the shapes of what it takes."""
    mesh = sharding.make_mesh(devices=devices)
    everywhere, rows = (NamedSharding(mesh, spec) for spec in (sharding.WHOLE, sharding.ROWS))
    net, unet, count = Net(UNet(family.unet)), family.unet, options.batch * len(devices)
    assert family.vae is not None

    def shape(*sizes: int, where: NamedSharding = rows, dtype: Any = options.dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=where)

    params = {name: shape(*sizes, where=everywhere) for name, sizes in net.shapes.items()}
    told = {"encoder_hidden_states": shape(count, TOKENS, unet.cross_attention_dim)}
    if unet.addition_embed_type == "text_time":
        told |= {"text_embeds": shape(count, 1280), "time_ids": shape(count, 6)}
    side = options.size // family.vae.downscale
    x = shape(count, side, side, unet.in_channels, dtype="float32")
    scales = shape(
        1, count, where=NamedSharding(mesh, jax.P(None, *sharding.ROWS)), dtype="float32"
    )

    def step(params: Any, x: Any, conditions: Any, scales: Any) -> Any:
        def network(x: Any, t: Any, **told: Any) -> Any:
            return net(params, x.astype(options.dtype), t, **told).astype(jnp.float32)

        return guided(network, conditions, scales, jnp.float32(0))(x, jnp.float32(500))

    def loop(params: Any, x: Any, conditions: Any, scales: Any) -> Any:
        inputs = loop_inputs(family, params, conditions, scales, options.steps)
        run = (net, [], family.schedule, "ddim", (Way(),), inputs, x, (), jnp.int32(0))
        return denoising.loop(*run, jnp.int32(options.steps))[0]

    def told_where(*arguments: Any) -> Any:
        platform = devices[0].platform
        with kernels.compiling_for(platform, NamedSharding(mesh, sharding.HEADS)):
            return (loop if options.program == "sampling" else step)(*arguments)

    return jax.jit(told_where), (params, x, [told, told], scales)
