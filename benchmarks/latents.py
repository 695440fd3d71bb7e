"""Text-to-image training on cached latents at full size, without the files: what a step costs.

The loss is that of `train.py text-to-image` on cached latents, but for dropping captions; VAE and
text towers, which such a training does not run, are left out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import families
from jaxsd.models import UNet, UNetConfig
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import Denoising, denoising_loss

TOKENS = 77


@dataclasses.dataclass
class Latents:
    """Batches as of `shapes`: the moments of latents, and what the text towers would say."""

    family: families.Family
    dtype: str = "float32"
    initial: Params | None = None

    def __post_init__(self):
        assert isinstance(self.family.unet, UNetConfig)
        self.net = Net(UNet(self.family.unet))
        self.aux: Any = ()

    def shapes(self, rows: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a batch of pictures with `side` pixels: float16, as the files have them."""
        unet = self.family.unet
        assert isinstance(unet, UNetConfig)
        latents = (rows, side // 8, side // 8, unet.in_channels)
        told = {"encoder_hidden_states": (rows, TOKENS, unet.cross_attention_dim)}
        if unet.addition_embed_type == "text_time":
            told |= {"text_embeds": (rows, 1280), "time_ids": (rows, 6)}
        shapes = {"mean": latents, "logvar": latents, **told}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float16) for name, shape in shapes.items()}

    def batch(self, rows: int, side: int) -> dict[str, np.ndarray]:
        """Made up: as random as latents and text states are, of moments that are nearly sure."""
        rng = np.random.default_rng(0)
        shapes = self.shapes(rows, side)
        batch = {n: rng.standard_normal(s.shape).astype(s.dtype) for n, s in shapes.items()}
        return batch | {"logvar": np.full_like(batch["logvar"], -10)}

    def init(self, key: jax.Array) -> Params:
        return self.net.init(key) if self.initial is None else self.initial

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        told = {name: value.astype(jnp.float32) for name, value in batch.items()}
        mean, logvar = told.pop("mean"), told.pop("logvar")
        key_latent, key = jax.random.split(now.key)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key_latent, mean.shape)
        told["encoder_hidden_states"] = told["encoder_hidden_states"].astype(self.dtype)
        return denoising_loss(
            self.net,
            params,
            self.family.schedule,
            0.18215 * latents,
            told,
            key,
            Denoising(dtype=self.dtype),
        )
