"""The parts of a model that are programs: each is traced once for a shape, and then compiled code.

Others call them with values; what is settled when they are traced is named in `__init__`, the
model's own networks among it.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxsd import denoising, kernels, sharding
from jaxsd.denoising import Inputs
from jaxsd.diffusion import samplers
from jaxsd.diffusion.denoise import guided
from jaxsd.diffusion.schedule import Schedule
from jaxsd.model import Model
from jaxsd.nn import Net, Params
from jaxsd.shortcuts import Way
from jaxsd.weights import lora


class Compiled(Model):
    """Noise, the loop of denoising, one prediction, encoding and decoding, on arrays."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        jit, options = self.programs.jit, kernels.compiler_options
        self._compiled_noise = jit("noise", samplers.initial_noise, ("shape",))
        self._compiled_denoise = jit(
            "denoise", _loop, ("schedule", "sampler", "ways"), options, ("unet", "nets", "split")
        )
        self._compiled_predict = jit("predict", _predict, (), options, ("unet", "split"))
        self._compiled_decode = jit("decode", _decode, (), options, ("vae", "split"))
        self._compiled_encode = jit("encode", _encode, (), options, ("vae", "split"))
        self._compiled_lora = jit("lora", lora.apply)


# Functions of nothing but their arguments, so that models of the same networks share programs.
# split: how the rows of batches are split over devices, if they are.


def _loop(
    inputs: Inputs,
    x,
    history,
    begin,
    end,
    *,
    schedule: Schedule,
    sampler: str,
    ways: tuple[Way, ...],
    unet: Net,
    nets: tuple[Net, ...],
    split: NamedSharding | None,
):
    with _spread(len(x), split):
        return denoising.loop(unet, nets, schedule, sampler, ways, inputs, x, history, begin, end)


def _predict(
    params: Params,
    loras,
    lora_scales,
    conditions,
    scales,
    x,
    t,
    *,
    unet: Net,
    split: NamedSharding | None,
) -> jax.Array:
    params = lora.apply(params, loras, lora_scales)
    network = denoising.make_network(unet, params)
    with _spread(len(x), split):
        return guided(network, conditions, scales, jnp.float32(0))(x, t)


def _encode(params: Params, x: jax.Array, *, vae: Net, split: NamedSharding | None) -> jax.Array:
    """The mean of the latents, as the VAE gives them."""
    params, x = _computable(params, x)
    with _spread(len(x), split):
        return vae(params, x, method="encode")[0].astype(jnp.float32)


def _decode(
    params: Params, latents: jax.Array, *, vae: Net | None, split: NamedSharding | None
) -> jax.Array:
    """Pictures in [-1, 1], more or less."""
    if vae is None:
        return latents
    params, x = _computable(params, latents / vae.config.scaling_factor)
    with _spread(len(x), split):
        return vae(params, x, method="decode").astype(jnp.float32)


def _spread(rows: int, split: NamedSharding | None) -> contextlib.AbstractContextManager:
    """While a part is traced: how its batch lies on several devices, if it does."""
    if split is None or rows % split.mesh.size:
        return contextlib.nullcontext()
    return kernels.compiling_for(kernels.platform(), NamedSharding(split.mesh, sharding.HEADS))


def _computable(params: Params, x: jax.Array) -> tuple[Params, jax.Array]:
    """A VAE's parameters and input in one dtype: never float16, in which XL's overflows."""
    dtype = next(iter(params.values())).dtype
    dtype = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
    return {name: p.astype(dtype) for name, p in params.items()}, x.astype(dtype)
