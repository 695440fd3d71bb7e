"""The variational autoencoder between pictures and latents: diffusers' `AutoencoderKL`.

Kingma & Welling 2014; Rombach et al. 2022. A 512x512x3 picture becomes 64x64x4 latents, 48 times
fewer numbers, and back.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsd.models.blocks import AttentionBlock, Downsample, ResnetBlock, Upsample
from jaxsd.models.config import NetworkConfig
from jaxsd.nn import Conv2d, GroupNorm

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class VAEConfig(NetworkConfig):
    """The fields of `vae/config.json`; the UNet sees latents times `scaling_factor`."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    NEUTRAL = {
        "act_fn": ("silu", "swish"),
        "latents_mean": (None,),
        "latents_std": (None,),
        "mid_block_add_attention": (True,),
        "shift_factor": (None,),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    }
    IGNORED = ("force_upcast",)  # about float16, which we never run the VAE in unasked

    def __post_init__(self):
        super().__post_init__()
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError("norm_num_groups does not divide block_out_channels")
        blocks = len(self.block_out_channels)
        if self.down_block_types != ("DownEncoderBlock2D",) * blocks:
            raise ValueError(f"unsupported down_block_types {self.down_block_types}")
        if self.up_block_types != ("UpDecoderBlock2D",) * blocks:
            raise ValueError(f"unsupported up_block_types {self.up_block_types}")

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent position: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_json(self) -> dict[str, Any]:
        return {"_class_name": "AutoencoderKL", "act_fn": "silu", **super().to_json()}


class MidBlock(nnx.Module):
    """ResNet block, single-head attention, ResNet block."""

    def __init__(self, channels: int, groups: int):
        self.attentions = nnx.List([AttentionBlock(channels, 1, groups, EPS)])
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, EPS) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Stage(nnx.Module):
    """ResNet blocks, then a change of size (`resample`) unless it is the last stage."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, resample: str | None):
        self.resnets = nnx.List(
            [
                ResnetBlock(inputs if i == 0 else outputs, outputs, groups, EPS)
                for i in range(layers)
            ]
        )
        if resample == "down":
            self.downsamplers = nnx.List([Downsample(outputs, asymmetric=True)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample(outputs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for name in ("resnets", "downsamplers", "upsamplers"):
            for layer in getattr(self, name, ()):
                x = layer(x)
        return x


def _stages(config: VAEConfig, channels: tuple[int, ...], layers: int, resample: str) -> nnx.List:
    inputs = (channels[0], *channels[:-1])
    return nnx.List(
        [
            Stage(
                i, o, layers, config.norm_num_groups, None if n == len(channels) - 1 else resample
            )
            for n, (i, o) in enumerate(zip(inputs, channels, strict=True))
        ]
    )


class Encoder(nnx.Module):
    """[b, h, w, 3] -> [b, h/8, w/8, 2 * latent_channels]: mean and log variance."""

    def __init__(self, config: VAEConfig):
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = _stages(config, channels, config.layers_per_block, "down")
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """[b, h/8, w/8, latent_channels] -> [b, h, w, 3]."""

    def __init__(self, config: VAEConfig):
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = _stages(config, channels, config.layers_per_block + 1, "up")
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def features(self, x: jax.Array) -> jax.Array:
        """What the last layer, `conv_out`, reads."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return jax.nn.silu(self.conv_norm_out(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv_out(self.features(x))


class AutoencoderKL(nnx.Module):
    """Encoder to a Gaussian over latents, decoder back. Pictures are [b, h, w, 3] in [-1, 1]."""

    def __init__(self, config: VAEConfig):
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = Conv2d(latent, latent, 1)

    def encode(
        self, pictures: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
        """Mean and log variance (clipped to [-30, 20]) of the unscaled latents."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(pictures)), 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Pictures (not clipped) from unscaled latents."""
        return self.render(self.decode_features(latents))

    def decode_features(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 d"]:
        """`decode` up to its last layer, for losses that ask for the slope there."""
        return self.decoder.features(self.post_quant_conv(latents))

    def render(self, features: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
        """The last layer of `decode`."""
        return self.decoder.conv_out(features)
