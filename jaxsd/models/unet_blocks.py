"""The stages of the UNet: ResNet blocks with or without attention, and a change of size.

Named after diffusers' block types: plain (`DownBlock2D`), with self-attention (`AttnDownBlock2D`)
or with transformers that read a text (`CrossAttnDownBlock2D`).
"""

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
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, resnet(x, time), context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


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
    """Takes one skip more than the down block has layers; then doubles to the next skip's size."""

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
        self, x: jax.Array, skips: list[jax.Array], time: jax.Array, context: jax.Array | None
    ) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], -1), time)
            x = self.attend(i, x, context)
        if self.upsamplers is not None:
            # The skip's size, not twice ours: they differ when a size was odd on the way down.
            _, h, w, _ = skips[-1].shape
            x = self.upsamplers[0](x, (h, w))
        return x
