"""The tiny autoencoder for previews, TAESD (Bohan 2023): diffusers' `AutoencoderTiny`.

Convolutions alone, a thirtieth of the big VAE's parameters. It is trained on *scaled* latents, so
its `scaling_factor` is 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsd.models.config import NetworkConfig
from jaxsd.nn import Conv2d, upsample_nearest


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig(NetworkConfig):
    """The fields of an `AutoencoderTiny`'s config.json; a side is halved between blocks."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    scaling_factor: float = 1.0

    NEUTRAL = {
        "act_fn": ("relu",),
        "shift_factor": (0.0, None),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
    }
    # The first repeats the decoder's; force_upcast is about float16; the others are for storing
    # latents as bytes.
    IGNORED = ("block_out_channels", "force_upcast", "latent_magnitude", "latent_shift")

    def __post_init__(self):
        super().__post_init__()
        for part in ("encoder", "decoder"):
            channels = getattr(self, f"{part}_block_out_channels")
            if len(channels) != len(getattr(self, f"num_{part}_blocks")):
                raise ValueError(
                    f"{part}_block_out_channels and num_{part}_blocks differ in length"
                )
            if len(set(channels)) > 1:  # nothing between the blocks changes their number
                raise ValueError(f"{part}_block_out_channels differ from one another")
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise ValueError("num_encoder_blocks and num_decoder_blocks differ in length")

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent position: 8 for Stable Diffusion."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    def to_json(self) -> dict[str, Any]:
        return {"_class_name": "AutoencoderTiny", "act_fn": "relu", **super().to_json()}


class ReLU(nnx.Module):
    """max(x, 0), as a module: it counts in torch's Sequential."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)


class Double(nnx.Module):
    """Twice the size, by nearest neighbours."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return upsample_nearest(x, (2 * x.shape[1], 2 * x.shape[2]))


class Block(nnx.Module):
    """Three convolutions with a residual."""

    def __init__(self, channels: int):
        convs = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nnx.List([convs[0], ReLU(), convs[1], ReLU(), convs[2]])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jax.nn.relu(_apply(self.conv, x) + x)


class Encoder(nnx.Module):
    """[b, h, w, 3] in [-1, 1] -> [b, h/8, w/8, latent_channels]; its layers see [0, 1]."""

    def __init__(self, config: TinyVAEConfig):
        channels, layers = config.encoder_block_out_channels[0], []
        for i, blocks in enumerate(config.num_encoder_blocks):
            halve = Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
            layers.append(Conv2d(config.in_channels, channels, 3, padding=1) if i == 0 else halve)
            layers += [Block(channels) for _ in range(blocks)]
        layers.append(Conv2d(channels, config.latent_channels, 3, padding=1))
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _apply(self.layers, (x + 1) / 2)


class Decoder(nnx.Module):
    """[b, h/8, w/8, latent_channels] -> [b, h, w, 3] in [-1, 1]."""

    def __init__(self, config: TinyVAEConfig):
        channels, last = config.decoder_block_out_channels[0], len(config.num_decoder_blocks) - 1
        layers = [Conv2d(config.latent_channels, channels, 3, padding=1), ReLU()]
        for i, blocks in enumerate(config.num_decoder_blocks):
            layers += [Block(channels) for _ in range(blocks)]
            if i < last:
                layers += [Double(), Conv2d(channels, channels, 3, padding=1, bias=False)]
        layers.append(Conv2d(channels, config.out_channels, 3, padding=1))
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _apply(self.layers, jnp.tanh(x / 3) * 3) * 2 - 1


def _apply(layers: nnx.List, x: jax.Array) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x


class AutoencoderTiny(nnx.Module):
    """Used as `AutoencoderKL` is. Pictures are [b, h, w, 3] in [-1, 1]."""

    def __init__(self, config: TinyVAEConfig):
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(
        self, pictures: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
        """The latents and, as log variance, minus infinity: nothing is left to chance."""
        latents = self.encoder(pictures)
        return latents, jnp.full_like(latents, -jnp.inf)

    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Pictures (not clipped) from latents."""
        return self.decoder(latents)
