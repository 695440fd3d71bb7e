"""The denoising UNet: diffusers' `UNet2DConditionModel` and `UNet2DModel`, name for name.

Ronneberger et al. 2015 (U-Net), Ho et al. 2020 (with time), Rombach et al. 2022 (cross-attention
to text), Podell et al. 2023 (XL). A picture goes down through blocks that halve it, through the
middle, and up again; every output on the way down returns as a skip connection on the way up. Time
(and class, pooled text, sizes, guidance scale) enter each ResNet block as a vector, text enters by
cross-attention.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from jaxsd.models.embeddings import TimestepEmbedding, timestep_embedding
from jaxsd.models.unet_blocks import DownBlock, MidBlock, UpBlock
from jaxsd.models.unet_config import BackboneConfig, UNet2DConfig, UNetConfig
from jaxsd.nn import Conv2d, Embedding, GroupNorm, Linear, normal, zeros


class UNetEncoder(nnx.Module):
    """The half of a UNet that goes down, with the middle; ControlNets are made of it too."""

    def __init__(self, config: BackboneConfig):
        self.config = config
        channels = config.block_out_channels
        time_channels = 4 * channels[0]
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            channels[0], time_channels, config.time_cond_proj_dim
        )
        self.class_embedding = _class_embedding(config, time_channels)
        if config.addition_embed_type == "text_time":
            inputs = config.projection_class_embeddings_input_dim or 0
            self.add_embedding = TimestepEmbedding(inputs, time_channels)

        last = len(channels) - 1
        inputs, down = channels[0], []
        for i, (outputs, kind) in enumerate(zip(channels, config.down_block_types, strict=True)):
            down.append(DownBlock(inputs, outputs, i == last, kind, i, config))
            inputs = outputs
        self.down_blocks = nnx.List(down)
        kind = config.mid_block_type
        self.mid_block = None if kind is None else MidBlock(inputs, kind, last, config)

    @property
    def skip_channels(self) -> list[int]:
        """The channels of every output that `encode` hands to the way up."""
        channels, layers = self.config.block_out_channels, self.config.layers_per_block
        halvings = [1] * (len(channels) - 1) + [0]
        blocks = [[c] * (layers + h) for c, h in zip(channels, halvings, strict=True)]
        return [channels[0], *sum(blocks, [])]

    def embed(
        self,
        timestep: Num[Array, " b"],
        dtype: Any,
        class_labels: Num[Array, " b"] | Float[Array, "b k"] | None = None,
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Num[Array, "b n"] | None = None,
        timestep_cond: Float[Array, "b g"] | None = None,
    ) -> Float[Array, "b t"]:
        """The vector that every ResNet block is told: time, and what is added to it."""
        config = self.config
        time = self.time_embedding(
            self._sinusoid(timestep, config.block_out_channels[0], dtype),
            None if timestep_cond is None else timestep_cond.astype(dtype),
        )
        if config.class_conditional:
            time = time + self._embed_class(_given(class_labels, "class_labels"), dtype)
        if config.addition_embed_type == "text_time":
            text, ids = _given(text_embeds, "text_embeds"), _given(time_ids, "time_ids")
            numbers = self._sinusoid(ids.reshape(-1), config.addition_time_embed_dim or 0, dtype)
            both = [text.astype(dtype), numbers.reshape(len(text), -1)]
            time = time + self.add_embedding(jnp.concatenate(both, -1))
        return time

    def _sinusoid(self, numbers: Num[Array, " b"], channels: int, dtype: Any) -> jax.Array:
        flip, shift = self.config.flip_sin_to_cos, self.config.freq_shift
        return timestep_embedding(numbers.astype(jnp.float32), channels, flip, shift).astype(dtype)

    def _embed_class(self, labels: jax.Array, dtype: Any) -> jax.Array:
        kind = self.config.class_embed_type
        if kind == "identity":
            return labels.astype(dtype)
        layer: Any = self.class_embedding
        if kind == "timestep":
            return layer(self._sinusoid(labels, self.config.block_out_channels[0], dtype))
        if kind is not None:
            return layer(labels.astype(dtype))
        known = (labels >= 0).astype(dtype)[:, None]
        return layer(jnp.maximum(labels, 0)).astype(dtype) * known

    def encode(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, "b t"],
        context: Float[Array, "b s d"] | None,
    ) -> tuple[Float[Array, "b h2 w2 c2"], list[jax.Array]]:
        """From the output of `conv_in` to that of the middle, and all skips on the way."""
        if self.config.text_conditional:
            _given(context, "encoder_hidden_states")
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, context)
            skips += outputs
        return x if self.mid_block is None else self.mid_block(x, time, context), skips


def _class_embedding(config: BackboneConfig, channels: int) -> nnx.Module | None:
    kind, inputs = config.class_embed_type, config.projection_class_embeddings_input_dim or 0
    if kind == "timestep":
        return TimestepEmbedding(config.block_out_channels[0], channels)
    if kind == "projection":
        return TimestepEmbedding(inputs, channels)
    if kind == "simple_projection":
        return Linear(inputs, channels)
    if kind is None and config.num_class_embeds is not None:
        return Embedding(config.num_class_embeds, channels, normal(1.0))
    return None


def _given(value: jax.Array | None, name: str) -> jax.Array:
    if value is None:
        raise ValueError(f"this network is told more than the time: pass {name}")
    return value


def class_input(config: BackboneConfig, labels: Int[Array, " n"]) -> jax.Array:
    """Labels 0 ... `num_classes` - 1, or -1 for no class, as the `class_labels` of a network."""
    if config.class_embed_type is None:
        return labels
    return jax.nn.one_hot(labels, config.num_classes, dtype=jnp.float32)


class UNet(UNetEncoder):
    """Predicts noise, picture or velocity from a noisy picture, the time and a condition."""

    def __init__(self, config: UNetConfig | UNet2DConfig):
        super().__init__(config)
        channels, skips = config.block_out_channels, self.skip_channels
        last = len(channels) - 1
        inputs, up = channels[-1], []
        for i, (outputs, kind) in enumerate(
            zip(channels[::-1], config.up_block_types, strict=True)
        ):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            up.append(UpBlock(inputs, taken, outputs, i == last, kind, last - i, config))
            inputs = outputs
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1, init=zeros)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Num[Array, " b"],
        encoder_hidden_states: Float[Array, "b s d"] | None = None,
        class_labels: Num[Array, " b"] | Float[Array, "b k"] | None = None,
        *,
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Num[Array, "b n"] | None = None,
        timestep_cond: Float[Array, "b g"] | None = None,
        down_block_residuals: tuple[jax.Array, ...] | None = None,
        mid_block_residual: jax.Array | None = None,
    ) -> Float[Array, "b h w c2"]:
        """The prediction for each picture; ValueError if a condition is missing.

        sample: noisy pictures or latents. timestep: 0 ... 1000, whole or fractional, one for each.
        encoder_hidden_states: text, [b, 77, cross_attention_dim]. class_labels: integers (-1 for
        no class), or vectors such as one-hot rows (all zeros for none), as `class_embed_type` says.
        text_embeds: the pooled, projected text. time_ids: sizes and crops in pixels.
        timestep_cond: the embedded guidance scale (`guidance_scale_embedding`).
        down_block_residuals, mid_block_residual: what ControlNets add to the skips, and to the
        middle's output.
        """
        time = self.embed(
            timestep, sample.dtype, class_labels, text_embeds, time_ids, timestep_cond
        )
        x, skips = self.encode(self._enter(sample), time, encoder_hidden_states)
        if down_block_residuals is not None:
            if len(down_block_residuals) != len(skips):
                raise ValueError(f"{len(down_block_residuals)} residuals for {len(skips)} skips")
            skips = [s + r for s, r in zip(skips, down_block_residuals, strict=True)]
        if mid_block_residual is not None:
            x = x + mid_block_residual
        return self._leave(self._up(x, skips, time, encoder_hidden_states))

    def and_deep(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Num[Array, " b"],
        encoder_hidden_states: Float[Array, "b s d"] | None = None,
        class_labels: Num[Array, " b"] | Float[Array, "b k"] | None = None,
        *,
        branch: int,
        **added: Any,
    ) -> tuple[Float[Array, "b h w c2"], Float[Array, "b h2 w2 c3"]]:
        """The prediction, and the features that enter the way up where skip `branch` does.

        branch: 0 (the output of `conv_in`) ... `branches(config)` - 1. Otherwise told as `__call__`
        is. The shape of the features is `deep_shape`.
        """
        time = self.embed(timestep, sample.dtype, class_labels, **added)
        x, skips = self.encode(self._enter(sample), time, encoder_hidden_states)
        deep = self._up(x, skips, time, encoder_hidden_states, branch + 1)
        return self._leave(self._up(deep, skips, time, encoder_hidden_states)), deep

    def around_deep(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Num[Array, " b"],
        encoder_hidden_states: Float[Array, "b s d"] | None = None,
        class_labels: Num[Array, " b"] | Float[Array, "b k"] | None = None,
        *,
        branch: int,
        deep: Float[Array, "b h2 w2 c3"],
        **added: Any,
    ) -> Float[Array, "b h w c2"]:
        """The prediction from such features, of another time: what lies deeper is not computed.

        DeepCache (2312.00858, section 3.2).
        """
        time = self.embed(timestep, sample.dtype, class_labels, **added)
        outputs = self._outputs(self._enter(sample), time, encoder_hidden_states)
        skips = list(itertools.islice(outputs, branch + 1))
        return self._leave(self._up(deep, skips, time, encoder_hidden_states))

    def _outputs(
        self, x: jax.Array, time: jax.Array, context: jax.Array | None
    ) -> Iterator[jax.Array]:
        """The skips one by one, from the finest on."""
        yield x
        for block in self.down_blocks:
            for x in block.outputs(x, time, context):  # noqa: B020
                yield x

    def _up(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        time: jax.Array,
        context: jax.Array | None,
        left: int = 0,
    ) -> jax.Array:
        """Up from where the last of the skips enters, until `left` of them have not."""
        layers = self.config.layers_per_block + 1
        while len(skips) > left:
            block, layer = divmod(len(self.skip_channels) - len(skips), layers)
            stop = min(layers, layer + len(skips) - left)
            x = self.up_blocks[block](x, skips, time, context, range(layer, stop))
        return x

    def _leave(self, x: jax.Array) -> jax.Array:
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def features(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Num[Array, " b"],
        encoder_hidden_states: Float[Array, "b s d"] | None = None,
        class_labels: Num[Array, " b"] | Float[Array, "b k"] | None = None,
        **added: Any,
    ) -> Float[Array, "b h2 w2 c2"]:
        """What leaves the middle, with `block_out_channels[-1]` channels; told as `__call__` is."""
        time = self.embed(timestep, sample.dtype, class_labels, **added)
        return self.encode(self._enter(sample), time, encoder_hidden_states)[0]

    def _enter(self, sample: jax.Array) -> jax.Array:
        return self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)


def branches(config: BackboneConfig) -> int:
    """How many skip connections there are: where `UNet.and_deep` can take features."""
    return len(config.block_out_channels) * (config.layers_per_block + 1)


def deep_shape(config: BackboneConfig, branch: int, height: int, width: int) -> tuple[int, ...]:
    """[h, w, c] of the features that `UNet.and_deep` takes at `branch` from pictures of a size."""
    channels = config.block_out_channels
    level, layer = divmod(branch, config.layers_per_block + 1)
    # The first ResNet block of a level's way up sees what comes from the level below
    below = layer == config.layers_per_block and level + 1 < len(channels)
    for _ in range(level):
        height, width = ((side + config.downsample_padding) // 2 for side in (height, width))
    return height, width, channels[level + below]
