"""The stages of the UNet: ResNet blocks with or without attention, and a change of size.

Named after diffusers' block types: plain (`DownBlock2D`), with self-attention (`AttnDownBlock2D`)
or with transformers that read a text (`CrossAttnDownBlock2D`).
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd.models.blocks import AttentionBlock, Downsample, ResnetBlock, Upsample
from jaxsd.models.transformer import Transformer2D
from jaxsd.models.unet_config import MID_PLAIN, SELF, BackboneConfig


class Stage(nnx.Module):
    """What down, middle and up blocks have in common: ResNet blocks, each with its attention.

    `block` counts the resolutions from the finest, 0, on: it chooses among a config's heads.
    """

    def __init__(
        self, resnets: list[tuple[int, int]], kind: str, block: int, config: BackboneConfig
    ):
        groups, eps = config.norm_num_groups, config.norm_eps
        time_channels = 4 * config.block_out_channels[0]
        self.resnets = nnx.List(
            [ResnetBlock(i, o, groups, eps, time_channels, config.dropout) for i, o in resnets]
        )
        channels = resnets[-1][1]
        middle = kind.startswith("UNetMid")
        attentions = len(resnets) - 1 if middle else len(resnets)
        self.cross = "CrossAttn" in kind
        if self.cross:
            self.attentions = nnx.List(
                [
                    Transformer2D(
                        channels,
                        config.cross_attention_dim,
                        heads=config.heads(block, kind),
                        layers=config.of("transformer_layers_per_block", block),
                        groups=groups,
                        dropout=config.dropout,
                        linear=config.use_linear_projection,
                        only_cross=config.of("only_cross_attention", block) and not middle,
                    )
                    for _ in range(attentions)
                ]
            )
        elif kind in SELF or (kind == MID_PLAIN and config.add_attention):
            if middle and config.attn_norm_num_groups:
                groups = config.attn_norm_num_groups
            heads = config.heads(block, kind)
            self.attentions = nnx.List(
                [AttentionBlock(channels, heads, groups, eps) for _ in range(attentions)]
            )

    def attend(self, i: int, x: jax.Array, context: jax.Array | None) -> jax.Array:
        if not hasattr(self, "attentions"):
            return x
        layer: Any = self.attentions[i]
        return layer(x, context) if self.cross else layer(x)


class DownBlock(Stage):
    """ResNet blocks (each with attention), then halving; returns every output as a skip."""

    def __init__(
        self, inputs: int, outputs: int, last: bool, kind: str, block: int, config: BackboneConfig
    ):
        pairs = [(inputs if i == 0 else outputs, outputs) for i in range(config.layers_per_block)]
        super().__init__(pairs, kind, block, config)
        asymmetric = config.downsample_padding == 0
        self.downsamplers = None if last else nnx.List([Downsample(outputs, asymmetric)])

    def __call__(
        self, x: jax.Array, time: jax.Array, context: jax.Array | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        skips = list(self.outputs(x, time, context))
        return skips[-1], skips

    def outputs(
        self, x: jax.Array, time: jax.Array, context: jax.Array | None
    ) -> Iterator[jax.Array]:
        """The skips one by one: what is not asked for is not computed."""
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, resnet(x, time), context)
            yield x
        if self.downsamplers is not None:
            yield self.downsamplers[0](x)


class MidBlock(Stage):
    """ResNet block, then (attention, ResNet block) if the kind has them."""

    def __init__(self, channels: int, kind: str, block: int, config: BackboneConfig):
        count = 1 + (1 if "CrossAttn" in kind else config.MID_LAYERS)
        super().__init__([(channels, channels)] * count, kind, block, config)

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array | None) -> jax.Array:
        x = self.resnets[0](x, time)
        for i, resnet in enumerate(list(self.resnets)[1:]):
            x = resnet(self.attend(i, x, context), time)
        return x


class UpBlock(Stage):
    """Takes one skip more than the down block has layers; then doubles to the next skip's size.

    layers: of its ResNet blocks those to go through; after the last the size doubles.
    """

    def __init__(
        self,
        inputs: int,
        skips: list[int],
        outputs: int,
        last: bool,
        kind: str,
        block: int,
        config: BackboneConfig,
    ):
        pairs = [((inputs if i == 0 else outputs) + skip, outputs) for i, skip in enumerate(skips)]
        super().__init__(pairs, kind, block, config)
        self.upsamplers = None if last else nnx.List([Upsample(outputs)])

    def __call__(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        time: jax.Array,
        context: jax.Array | None,
        layers: range | None = None,
    ) -> jax.Array:
        layers = range(len(self.resnets)) if layers is None else layers
        for i in layers:
            x = self.resnets[i](jnp.concatenate([x, skips.pop()], -1), time)
            x = self.attend(i, x, context)
        if self.upsamplers is not None and layers.stop == len(self.resnets):
            # The skip's size, not twice ours: they differ when a size was odd on the way down.
            _, h, w, _ = skips[-1].shape
            x = self.upsamplers[0](x, (h, w))
        return x
