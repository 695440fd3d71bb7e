"""The transformer inside the UNet's blocks, by which text is read: diffusers' `Transformer2DModel`.

Vaswani et al. 2017, applied to the positions of a feature map (Rombach et al. 2022, 3.3).
"""

from typing import cast

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxsd.fused import fuses_feed_forward, normed_feed_forward
from jaxsd.nn import Conv2d, Dropout, GroupNorm, LayerNorm, Linear, attention, block, gelu


class CrossAttention(nnx.Module):
    """Attention from `x` to `context` (to itself without one); no biases but on the way out."""

    def __init__(self, channels: int, context_channels: int, heads: int, dropout: float):
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_channels, channels, bias=False)
        self.to_v = Linear(context_channels, channels, bias=False)
        self.to_out = nnx.List([Linear(channels, channels), Dropout(dropout)])

    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b s d"] | None = None
    ) -> Float[Array, "b t c"]:
        context = x if context is None else context.astype(x.dtype)
        x = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        for layer in self.to_out:
            x = layer(x)
        return x


class GEGLU(nnx.Module):
    """x * gelu(gate), both from one projection (Shazeer 2020)."""

    def __init__(self, inputs: int, outputs: int):
        self.proj = Linear(inputs, 2 * outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, gate = self.proj.parts(x, 2)
        return x * gelu(gate)


class FeedForward(nnx.Module):
    def __init__(self, channels: int, dropout: float):
        self.net = nnx.List(
            [GEGLU(channels, 4 * channels), Dropout(dropout), Linear(4 * channels, channels)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.net:
            x = layer(x)
        return x

    def after(self, norm: LayerNorm, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        """x + self(norm(x))"""
        geglu, dropout, outer = cast("tuple[GEGLU, Dropout, Linear]", tuple(self.net))
        if dropout.active or not fuses_feed_forward(x):
            return x + self(norm(x))
        return normed_feed_forward(norm, geglu.proj, outer, x)


class TransformerBlock(nnx.Module):
    """Two attentions and a feed-forward, each after a LayerNorm and with a residual.

    The first attention is to `x` itself or, with `only_cross`, to the context like the second.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        dropout: float,
        only_cross: bool = False,
    ):
        self.only_cross = only_cross
        self.norm1 = LayerNorm(channels)
        first = context_channels if only_cross else channels
        self.attn1 = CrossAttention(channels, first, heads, dropout)
        self.norm2 = LayerNorm(channels)
        self.attn2 = CrossAttention(channels, context_channels, heads, dropout)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)

    @block
    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b t c"]:
        x = x + self.attn1(self.norm1(x), context if self.only_cross else None)
        x = x + self.attn2(self.norm2(x), context)
        return self.ff.after(self.norm3, x)


class Transformer2D(nnx.Module):
    """Transformer blocks over the positions of a feature map, between two projections.

    The projections of the channels are 1x1 convolutions or, with `linear` (Stable Diffusion 2 and
    XL), linear layers: the same but for the weight's shape.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        layers: int,
        groups: int,
        dropout: float = 0.0,
        linear: bool = False,
        only_cross: bool = False,
    ):
        # 1e-6 whatever the config's norm_eps says: diffusers fixes it here
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nnx.List(
            [
                TransformerBlock(channels, context_channels, heads, dropout, only_cross)
                for _ in range(layers)
            ]
        )
        self.proj_out = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self._enter(x).reshape(b, h * w, c)
        for layer in self.transformer_blocks:
            y = layer(y, context)
        return x + self.proj_out(y.reshape(b, h, w, c))

    @block
    def _enter(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.proj_in(self.norm(x))
