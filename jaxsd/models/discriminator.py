"""Discriminators: what tells real from made, of pictures' patches or of a UNet's features.

The first is that of pix2pix (Isola et al. 2017) and of taming-transformers' autoencoders, named as
taming's `NLayerDiscriminator`. It judges overlapping patches, 70 pixels wide with three layers, and
so texture alone; what the picture shows is left to the reconstruction loss. The second sits on the
middle of a UNet that stays as it is (Lin et al. 2024, SDXL-Lightning, 2402.13929, section 3.3).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsd.nn import Conv2d, GroupNorm, Initializer, normal, parameter, zeros


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The shape of a discriminator.

    norm: "group" (up to 32 groups) judges each picture by itself, whatever the batch and however
    it is split; "batch" is what pix2pix and taming have, with the statistics of the whole batch,
    all devices' parts of it, and no running ones, which only a discriminator at rest would need.
    """

    channels: int = 64
    layers: int = 3
    norm: str = "group"

    def __post_init__(self):
        if not 1 <= self.layers <= 6:
            raise ValueError(f"a discriminator has 1 to 6 layers, not {self.layers}")
        if self.norm not in ("group", "batch"):
            raise ValueError(f"a discriminator's norm is group or batch, not {self.norm!r}")

    @property
    def smallest(self) -> int:
        """Pixels along a side of the smallest picture in which a patch fits."""
        size = 1
        for stride in (1, 1, *(2,) * self.layers):
            size = (size - 1) * stride + 4 - 2
        return size


def _around_one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 1 + 0.02 * jax.random.normal(key, shape, jnp.float32)


class BatchNorm(nnx.Module):
    """Normalises [b, h, w, c] over pictures and space; statistics in float32 and of this batch."""

    def __init__(self, channels: int):
        self.weight = parameter((channels,), _around_one)
        self.bias = parameter((channels,), zeros)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x.astype(jnp.float32)
        y = y - y.mean((0, 1, 2), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((0, 1, 2), keepdims=True) + 1e-5)
        weight, bias = (p[...].astype(y.dtype)[None, None, None] for p in (self.weight, self.bias))
        return (y * weight + bias).astype(x.dtype)


class PatchDiscriminator(nnx.Module):
    """[b, h, w, 3] in [-1, 1] -> [b, h', w', 1]: how real each patch looks, above 0 for real."""

    def __init__(self, config: DiscriminatorConfig, inputs: int = 3):
        init: Initializer = normal(0.02)
        bias = config.norm != "batch"  # which would take it away again
        layers: dict[str, nnx.Module] = {"0": Conv2d(inputs, config.channels, 4, 2, 1, init=init)}
        place, width = 2, config.channels  # the activations take a number as well
        for i in range(1, config.layers + 1):
            outputs = config.channels * min(2**i, 8)
            stride = 2 if i < config.layers else 1
            layers[str(place)] = Conv2d(width, outputs, 4, stride, 1, bias, init)
            layers[str(place + 1)] = (
                BatchNorm(outputs)
                if config.norm == "batch"
                else GroupNorm(math.gcd(32, outputs), outputs, 1e-5)
            )
            place, width = place + 3, outputs
        layers[str(place)] = Conv2d(width, 1, 4, 1, 1, init=init)
        self.main = nnx.Dict(layers)
        self.order = tuple(layers)

    def __call__(self, pictures: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 1"]:
        x = pictures
        for name in self.order:
            layer = self.main[name]
            if isinstance(layer, Conv2d) and name != "0":
                # An activation before each convolution but the first, of what its norm gave
                x = jax.nn.leaky_relu(x, 0.2)
            x = layer(x)
        return x


class FeatureDiscriminator(nnx.Module):
    """[b, h, w, c] features of two points of a path -> [b, h, w, 1]: above 0 for the real path."""

    def __init__(self, inputs: int, channels: int = 64):
        groups = math.gcd(32, channels)
        self.conv1 = Conv2d(2 * inputs, channels, 3, padding=1)
        self.norm1 = GroupNorm(groups, channels, 1e-5)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels, 1e-5)
        self.conv_out = Conv2d(channels, 1, 1)

    def __call__(
        self, start: Float[Array, "b h w c"], end: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w 1"]:
        x = self.conv1(jnp.concatenate([start, end], -1))
        x = self.conv2(jax.nn.silu(self.norm1(x)))
        return self.conv_out(jax.nn.silu(self.norm2(x)))


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """What the discriminator minimises (Lim & Ye 2017): real above 1, fake below -1."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
