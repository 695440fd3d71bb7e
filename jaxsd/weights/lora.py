"""LoRA (Hu et al. 2021): low-rank changes to weights, and their sum with the weights.

a = lora_files.read("style.safetensors", {"unet": unet_net, "text_encoder": text_net})
params = lora.merge(pipe.params, [(a, 0.8), (b, 0.5)])             # once, outside any program
params = lora.apply(params["unet"], lora.live([a, b], "unet"), scales)   # inside jit: scales traced

A changed weight is W + sum_i scale_i (alpha_i / r_i) up_i down_i, with the kernel of a convolution
seen as a matrix [out, in * kh * kw]. DoRA (Liu et al. 2024) also sets the length of each row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsd.nn import Params


@dataclasses.dataclass(frozen=True)
class Layer:
    """A change of one weight [out, in] or [out, in, kh, kw]."""

    down: np.ndarray  # [r, in] or [r, in, kh, kw]
    up: np.ndarray  # [out, r]
    alpha: float  # the change is alpha / r times up @ down
    magnitude: np.ndarray | None = None  # [out]: lengths of the weight's rows, in DoRA alone

    @property
    def rank(self) -> int:
        """Of the change that the factors make, at most."""
        return len(self.down)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Changes to a model: component -> parameter name -> layer."""

    layers: dict[str, dict[str, Layer]]


# --- Sums ------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """A layer as arrays that go through `jax.jit`."""

    down: jax.Array
    up: jax.Array
    gain: jax.Array  # alpha / r, a float32 scalar
    magnitude: jax.Array | None


# For each parameter that any LoRA changes: the factors, by the LoRA's place in the list.
Live = dict[str, dict[int, Factors]]


def live(loras: Sequence[LoRA], component: str) -> Live:
    """The layers of several LoRAs that change one component: what `apply` adds."""
    found: Live = {}
    for i, lora in enumerate(loras):
        for name, layer in lora.layers.get(component, {}).items():
            found.setdefault(name, {})[i] = Factors(
                jnp.asarray(layer.down),
                jnp.asarray(layer.up),
                jnp.float32(layer.alpha / layer.rank),
                None if layer.magnitude is None else jnp.asarray(layer.magnitude),
            )
    return found


def apply(params: Params, live: Live, scales: Float[Array, " n"]) -> Params:
    """The weights with every LoRA i added scales[i] times; a pure function, at home inside jit.

    Sums are in float32; each weight keeps its dtype. The scales are values: called with others, a
    compiled program stays as it is.
    """
    return params | {name: _sum(params[name], layers, scales) for name, layers in live.items()}


def merge(params: Mapping[str, Params], loras: Sequence[tuple[LoRA, float]]) -> dict[str, Params]:
    """The weights of each component with all (LoRA, scale) added, for good."""
    scales = jnp.asarray([scale for _, scale in loras], jnp.float32)
    return {
        name: _apply(weights, live([lora for lora, _ in loras], name), scales)
        for name, weights in params.items()
    }


_apply = jax.jit(apply)  # as one program: op by op, every shape compiles


def _sum(weight: jax.Array, layers: dict[int, Factors], scales: jax.Array) -> jax.Array:
    base = weight.astype(jnp.float32)
    total = base
    for i, layer in layers.items():
        down, up = (x.astype(jnp.float32) for x in (layer.down, layer.up))
        product = jnp.matmul(up, down.reshape(len(down), -1), precision="highest")
        change = scales[i] * layer.gain * product.reshape(base.shape)
        if layer.magnitude is not None:  # equation 5: the sum's rows take the lengths learnt
            axes = tuple(range(1, base.ndim))
            length = jnp.sqrt(jnp.sum((base + change) ** 2, axes, keepdims=True))
            wanted = layer.magnitude.astype(jnp.float32).reshape(length.shape)
            change = wanted / length * (base + change) - base
        total = total + change
    return total.astype(weight.dtype)
