"""The parts of a model that are programs: each is traced once for a shape, and then compiled code.

Others call them with values; what is settled when they are traced is named in `__init__`.
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
from jaxsd.nn import Params
from jaxsd.shortcuts import Way
from jaxsd.weights import lora


class Compiled(Model):
    """Noise, the loop of denoising, one prediction, encoding and decoding, on arrays."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        jit, options = self.programs.jit, kernels.compiler_options
        self._compiled_noise = jit("noise", samplers.initial_noise, ("shape",))
        self._compiled_denoise = jit(
            "denoise", self._loop, ("schedule", "sampler", "ways"), options
        )
        self._compiled_predict = jit("predict", self._predict, (), options)
        self._compiled_decode = jit("decode", self._decode, (), options)
        self._compiled_encode = jit("encode", self._encode, (), options)
        self._compiled_lora = jit("lora", lora.apply)

    def _spread(self, rows: int) -> contextlib.AbstractContextManager:
        """While a part is traced: how its batch lies on several devices, if it does."""
        if self.rows is None or rows % self.rows.mesh.size:
            return contextlib.nullcontext()
        split = NamedSharding(self.rows.mesh, sharding.HEADS)
        return kernels.compiling_for(kernels.platform(), split)

    def _loop(
        self,
        inputs: Inputs,
        x,
        history,
        begin,
        end,
        *,
        schedule: Schedule,
        sampler: str,
        ways: tuple[Way, ...],
    ):
        nets = [component.net for component in self.controlnets]
        with self._spread(len(x)):
            return denoising.loop(
                self.unet, nets, schedule, sampler, ways, inputs, x, history, begin, end
            )

    def _predict(self, params: Params, loras, lora_scales, conditions, scales, x, t) -> jax.Array:
        params = lora.apply(params, loras, lora_scales)
        network = denoising.make_network(self.unet, params)
        with self._spread(len(x)):
            return guided(network, conditions, scales, jnp.float32(0))(x, t)

    def _encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The mean of the latents, as the VAE gives them."""
        assert self.vae is not None
        params, x = _computable(params, x)
        with self._spread(len(x)):
            return self.vae(params, x, method="encode")[0].astype(jnp.float32)

    def _decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Pictures in [-1, 1], more or less."""
        if self.vae is None:
            return latents
        params, x = _computable(params, latents / self.vae.config.scaling_factor)
        with self._spread(len(x)):
            return self.vae(params, x, method="decode").astype(jnp.float32)


def _computable(params: Params, x: jax.Array) -> tuple[Params, jax.Array]:
    """A VAE's parameters and input in one dtype: never float16, in which XL's overflows."""
    dtype = next(iter(params.values())).dtype
    dtype = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
    return {name: p.astype(dtype) for name, p in params.items()}, x.astype(dtype)
