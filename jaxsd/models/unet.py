"""The denoising UNet of Stable Diffusion 1 and 2: diffusers' `UNet2DConditionModel`, name for name.

Ronneberger et al. 2015 (U-Net), Ho et al. 2020 (with time), Rombach et al. 2022 (cross-attention
to text). A picture goes down through blocks that halve it, through the middle, and up again; every
output on the way down returns as a skip connection on the way up. Time (and class) enter each
ResNet block as a vector, text enters by cross-attention.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxsd.models.blocks import AttentionBlock, Downsample, ResnetBlock, Upsample
from jaxsd.models.config import Config
from jaxsd.nn import Conv2d, Dropout, GroupNorm, LayerNorm, Linear, attention, gelu, zeros

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
SELF = ("AttnDownBlock2D", "AttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig(Config):
    """The fields of diffusers' `unet/config.json` that decide the architecture.

    `attention_head_dim`, one for all blocks or one for each on the way down, is the *number of
    heads* in cross-attention blocks (diffusers' legacy misnomer) and the size of a head in
    self-attention (`Attn*Block2D`) blocks. `upcast_attention` is for PyTorch in half precision:
    scores and softmax are in float32 here always. With
    `class_embed_type="simple_projection"` a class vector of `projection_class_embeddings_input_dim`
    numbers (a one-hot label) passes through a linear layer into the time embedding.
    """

    sample_size: int
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (CROSS[0],) * 3 + (PLAIN[0],)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (PLAIN[1],) + (CROSS[1],) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    class_embed_type: str | None = None
    projection_class_embeddings_input_dim: int | None = None

    NEUTRAL = {
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None,),
        "addition_time_embed_dim": (None,),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
        "transformer_layers_per_block": (1,),
    }
    IGNORED = ("addition_embed_type_num_heads",)  # read only when addition_embed_type is set

    def __post_init__(self):
        blocks = len(self.block_out_channels)
        if not (len(self.down_block_types) == len(self.up_block_types) == blocks):
            raise ValueError(
                "down_block_types, up_block_types and block_out_channels differ in length"
            )
        if isinstance(self.attention_head_dim, tuple) and len(self.attention_head_dim) != blocks:
            raise ValueError("attention_head_dim and block_out_channels differ in length")
        kinds = {*self.down_block_types, *self.up_block_types} - {*CROSS, *SELF, *PLAIN}
        if self.mid_block_type not in (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"):
            kinds.add(self.mid_block_type)
        if kinds:
            raise ValueError(f"unsupported blocks {', '.join(sorted(kinds))}")
        if self.class_embed_type not in (None, "simple_projection"):
            raise ValueError(f"unsupported class_embed_type={self.class_embed_type!r}")
        if self.class_embed_type and not self.projection_class_embeddings_input_dim:
            raise ValueError("class_embed_type needs projection_class_embeddings_input_dim")

    def head_dim(self, block: int) -> int:
        """`attention_head_dim` of a block, counted on the way down; the middle has the last."""
        both = self.attention_head_dim
        return both if isinstance(both, int) else both[block]

    @property
    def text_conditional(self) -> bool:
        """Whether the network reads `encoder_hidden_states`."""
        return any(
            "CrossAttn" in kind for kind in (*self.down_block_types, str(self.mid_block_type))
        )

    def to_json(self) -> dict[str, Any]:
        return {"_class_name": "UNet2DConditionModel", "act_fn": "silu", **super().to_json()}


def timestep_embedding(
    t: Float[Array, " b"], channels: int, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "b c"]:
    """Sinusoidal embedding of time (0 ... 1000), Vaswani et al. 2017; frequencies 1 ... 1e-4."""
    half = channels // 2
    frequencies = jnp.exp(
        -math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    )
    angles = t[:, None] * frequencies[None]
    pair = (
        (jnp.cos(angles), jnp.sin(angles))
        if flip_sin_to_cos
        else (jnp.sin(angles), jnp.cos(angles))
    )
    return jnp.concatenate(pair, -1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, linear."""

    def __init__(self, inputs: int, outputs: int):
        self.linear_1 = Linear(inputs, outputs)
        self.linear_2 = Linear(outputs, outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


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
        context = x if context is None else context
        x = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        for layer in self.to_out:
            x = layer(x)
        return x


class GEGLU(nnx.Module):
    """x * gelu(gate), both from one projection (Shazeer 2020)."""

    def __init__(self, inputs: int, outputs: int):
        self.proj = Linear(inputs, 2 * outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, gate = jnp.split(self.proj(x), 2, -1)
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


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm and with a residual."""

    def __init__(self, channels: int, context_channels: int, heads: int, dropout: float):
        self.norm1 = LayerNorm(channels)
        self.attn1 = CrossAttention(channels, channels, heads, dropout)
        self.norm2 = LayerNorm(channels)
        self.attn2 = CrossAttention(channels, context_channels, heads, dropout)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)

    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b t c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """A transformer over the positions of a feature map, between two projections of the channels.

    1x1 convolutions or, in Stable Diffusion 2, linear layers: the same but for the weight's shape.
    """

    def __init__(self, channels: int, heads: int, config: UNetConfig):
        # 1e-6 whatever norm_eps says: diffusers fixes it here
        self.norm = GroupNorm(config.norm_num_groups, channels, 1e-6)
        self.proj_in = self._projection(channels, config)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, config.cross_attention_dim, heads, config.dropout)]
        )
        self.proj_out = self._projection(channels, config)

    @staticmethod
    def _projection(channels: int, config: UNetConfig) -> Linear | Conv2d:
        if config.use_linear_projection:
            return Linear(channels, channels)
        return Conv2d(channels, channels, 1)

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + self.proj_out(y.reshape(b, h, w, c))


class Stage(nnx.Module):
    """What down, middle and up blocks have in common: ResNet blocks, each with its attention."""

    def __init__(
        self, resnets: list[tuple[int, int]], kind: str, head_dim: int, config: UNetConfig
    ):
        groups, eps, time_channels = (
            config.norm_num_groups,
            config.norm_eps,
            4 * config.block_out_channels[0],
        )
        self.resnets = nnx.List(
            [ResnetBlock(i, o, groups, eps, time_channels, config.dropout) for i, o in resnets]
        )
        channels = resnets[-1][1]
        self.cross = "CrossAttn" in kind
        attentions = len(resnets) - 1 if kind.startswith("UNetMid") else len(resnets)
        if self.cross:
            self.attentions = nnx.List(
                [Transformer2D(channels, head_dim, config) for _ in range(attentions)]
            )
        elif kind in SELF:
            heads = max(channels // head_dim, 1)
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
        self, inputs: int, outputs: int, last: bool, kind: str, head_dim: int, config: UNetConfig
    ):
        pairs = [(inputs if i == 0 else outputs, outputs) for i in range(config.layers_per_block)]
        super().__init__(pairs, kind, head_dim, config)
        self.downsamplers = None if last else nnx.List([Downsample(outputs)])

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
    """ResNet block, then (attention, ResNet block) if the kind has attention."""

    def __init__(self, channels: int, kind: str, head_dim: int, config: UNetConfig):
        count = 2 if "CrossAttn" in kind else 1
        super().__init__([(channels, channels)] * count, kind, head_dim, config)

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
        head_dim: int,
        config: UNetConfig,
    ):
        pairs = [((inputs if i == 0 else outputs) + skip, outputs) for i, skip in enumerate(skips)]
        super().__init__(pairs, kind, head_dim, config)
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


class UNet(nnx.Module):
    """Predicts noise, picture or velocity from a noisy picture, the time and a condition."""

    def __init__(self, config: UNetConfig):
        self.config = config
        channels = config.block_out_channels
        time_channels = 4 * channels[0]
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_channels)
        if config.class_embed_type:
            classes = config.projection_class_embeddings_input_dim or 0
            self.class_embedding = Linear(classes, time_channels)

        last = len(channels) - 1
        skips, inputs, down = [channels[0]], channels[0], []
        for i, (outputs, kind) in enumerate(zip(channels, config.down_block_types, strict=True)):
            down.append(DownBlock(inputs, outputs, i == last, kind, config.head_dim(i), config))
            skips += [outputs] * (config.layers_per_block + (i != last))
            inputs = outputs
        self.down_blocks = nnx.List(down)

        kind = config.mid_block_type
        head_dim = config.head_dim(last)
        self.mid_block = None if kind is None else MidBlock(inputs, kind, head_dim, config)

        up = []
        for i, (outputs, kind) in enumerate(
            zip(channels[::-1], config.up_block_types, strict=True)
        ):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            head_dim = config.head_dim(last - i)
            up.append(UpBlock(inputs, taken, outputs, i == last, kind, head_dim, config))
            inputs = outputs
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1, init=zeros)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Num[Array, " b"],
        encoder_hidden_states: Float[Array, "b s d"] | None = None,
        class_labels: Float[Array, "b k"] | None = None,
    ) -> Float[Array, "b h w c2"]:
        """The prediction for each picture.

        sample: noisy pictures or latents. timestep: 0 ... 1000, whole or fractional, one for each.
        encoder_hidden_states: text, [b, 77, cross_attention_dim]. class_labels: one-hot rows, all
        zeros for "no class".
        """
        config = self.config
        if config.text_conditional and encoder_hidden_states is None:
            raise ValueError("this UNet is text-conditional: pass encoder_hidden_states")
        embedding = timestep_embedding(
            timestep.astype(jnp.float32),
            config.block_out_channels[0],
            config.flip_sin_to_cos,
            config.freq_shift,
        )
        time = self.time_embedding(embedding.astype(sample.dtype))
        if config.class_embed_type:
            if class_labels is None:
                raise ValueError("this UNet is class-conditional: pass class_labels")
            time = time + self.class_embedding(class_labels.astype(sample.dtype))

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, encoder_hidden_states)
            skips += outputs
        if self.mid_block is not None:
            x = self.mid_block(x, time, encoder_hidden_states)
        for block in self.up_blocks:
            x = block(x, skips, time, encoder_hidden_states)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
