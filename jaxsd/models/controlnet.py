"""ControlNet (Zhang et al. 2023): diffusers' `ControlNetModel`, name for name.

A copy of the UNet's way down that also sees a picture (edges, depth, a pose ...); what it finds is
added to the UNet's skip connections and to the output of its middle.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxsd.models.unet import UNetEncoder
from jaxsd.models.unet_config import ControlNetConfig
from jaxsd.nn import Conv2d, zeros


class ConditioningEmbedding(nnx.Module):
    """A picture at the size of the latents: convolutions, of which every second one halves it."""

    def __init__(self, inputs: int, widths: tuple[int, ...], outputs: int):
        self.conv_in = Conv2d(inputs, widths[0], 3, padding=1)
        blocks = []
        for width, wider in zip(widths[:-1], widths[1:], strict=True):
            blocks += [
                Conv2d(width, width, 3, padding=1),
                Conv2d(width, wider, 3, stride=2, padding=1),
            ]
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv2d(widths[-1], outputs, 3, padding=1, init=zeros)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = jax.nn.silu(self.conv_in(x))
        for block in self.blocks:
            x = jax.nn.silu(block(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """What a picture adds to a UNet that is given the same latents, time and text."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        channels = config.block_out_channels
        self.controlnet_cond_embedding = ConditioningEmbedding(
            config.conditioning_channels, config.conditioning_embedding_out_channels, channels[0]
        )
        self.controlnet_down_blocks = nnx.List(
            [Conv2d(width, width, 1, init=zeros) for width in self.skip_channels]
        )
        self.controlnet_mid_block = Conv2d(channels[-1], channels[-1], 1, init=zeros)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Num[Array, " b"],
        controlnet_cond: Float[Array, "b h2 w2 c2"],
        conditioning_scale: Float[Array, ""] | float = 1.0,
        encoder_hidden_states: Float[Array, "b s d"] | None = None,
        class_labels: Num[Array, " b"] | Float[Array, "b k"] | None = None,
        *,
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Num[Array, "b n"] | None = None,
        timestep_cond: Float[Array, "b g"] | None = None,
        guess_mode: bool = False,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """`down_block_residuals` and `mid_block_residual` for the UNet.

        controlnet_cond: pictures in [0, 1], eight times the latents' size for Stable Diffusion.
        conditioning_scale: may be traced. guess_mode: the shallower, the weaker (0.1 to 1), as for
        use without prompts. timestep_cond: for the UNet alone, not read. See `UNet.__call__` for
        the rest.
        """
        dtype = sample.dtype
        time = self.embed(timestep, dtype, class_labels, text_embeds, time_ids)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond[..., ::-1]
        x = self.conv_in(sample) + self.controlnet_cond_embedding(controlnet_cond.astype(dtype))
        middle, skips = self.encode(x, time, encoder_hidden_states)
        found = [layer(x) for layer, x in zip(self.controlnet_down_blocks, skips, strict=True)]
        found.append(self.controlnet_mid_block(middle))

        scales = jnp.asarray(conditioning_scale, jnp.float32) * jnp.ones(len(found))
        if guess_mode and not self.config.global_pool_conditions:
            scales = scales * jnp.logspace(-1, 0, len(found))
        found = [x * scale for x, scale in zip(found, scales.astype(dtype), strict=True)]
        if self.config.global_pool_conditions:
            found = [x.mean((1, 2), keepdims=True) for x in found]
        return tuple(found[:-1]), found[-1]
