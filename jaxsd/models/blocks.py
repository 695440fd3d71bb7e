"""Blocks that the UNet and the VAE share: ResNet block, attention block, resampling."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxsd.fused import fuses_convolution, normed_convolution
from jaxsd.nn import (
    Conv2d,
    Dropout,
    GroupNorm,
    Linear,
    attention,
    block,
    upsample_nearest,
)


class ResnetBlock(nnx.Module):
    """norm, SiLU, conv, (+ time embedding), norm, SiLU, dropout, conv, + shortcut.

    `time_channels` is None in the VAE, which knows no time.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: int,
        eps: float,
        time_channels: int | None = None,
        dropout: float = 0.0,
    ):
        self.norm1 = GroupNorm(groups, inputs, eps)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = None if time_channels is None else Linear(time_channels, outputs)
        self.norm2 = GroupNorm(groups, outputs, eps)
        self.dropout = Dropout(dropout)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = None if inputs == outputs else Conv2d(inputs, outputs, 1)

    @block
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w c2"]:
        known = None
        if self.time_emb_proj is not None and time is not None:
            known = self.time_emb_proj(jax.nn.silu(time))
        y = self._half(self.norm1, self.conv1, x, row=known)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self._half(self.norm2, self.conv2, y, self.dropout, residual=shortcut)

    def _half(
        self,
        norm: GroupNorm,
        conv: Conv2d,
        x: Float[Array, "b h w c"],
        dropout: Dropout | None = None,
        row: Float[Array, "b c2"] | None = None,
        residual: Float[Array, "b h w c2"] | None = None,
    ) -> Float[Array, "b h w c2"]:
        if not (dropout and dropout.active) and fuses_convolution(conv, x):
            return normed_convolution(norm, conv, x, row, residual)
        y = jax.nn.silu(norm(x))
        y = conv(y if dropout is None else dropout(y))
        y = y if row is None else y + row[:, None, None, :]
        return y if residual is None else y + residual


class AttentionBlock(nnx.Module):
    """Self-attention over the positions of a feature map, with biases and a residual."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float):
        self.heads = heads
        self.group_norm = GroupNorm(groups, channels, eps)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nnx.List([Linear(channels, channels)])

    @block
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        y = attention(self.to_q(y), self.to_k(y), self.to_v(y), self.heads)
        return x + self.to_out[0](y).reshape(x.shape)


class Downsample(nnx.Module):
    """Halves the size by a strided 3x3 convolution.

    The UNet pads both sides; the VAE encoder pads right and below only (`asymmetric`).
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        padding = ((0, 1), (0, 1)) if asymmetric else 1
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles the size (or reaches `size`) by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int):
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b h2 w2 c"]:
        return self.conv(upsample_nearest(x, size or (2 * x.shape[1], 2 * x.shape[2])))
