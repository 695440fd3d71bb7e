"""Latent diffusion from text (Rombach et al. 2022): the UNet alone is trained."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.components import Component
from jaxsd.diffusion.schedule import Schedule
from jaxsd.models import UNet, UNetConfig
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch
from jaxsd.objectives.ddpm import denoising_loss
from jaxsd.pictures import tile
from jaxsd.pipeline import Pipeline
from jaxsd.tokenizer import Tokenizer


@dataclasses.dataclass
class TextToImage:
    """Batches hold "image" [b, h, w, 3] in [-1, 1] and "input_ids" [b, 77].

    The VAE and the text tower are frozen. A share `caption_dropout` of the captions is replaced by
    the empty one, which is what guidance contrasts.
    """

    unet: UNetConfig
    schedule: Schedule
    vae: Component
    text_encoder: Component
    tokenizer: Tokenizer
    continuous: bool = False
    caption_dropout: float = 0.1
    preview_prompts: Sequence[str] = ("",)
    initial: Params | None = None

    def __post_init__(self):
        self.net = Net(UNet(self.unet))
        length = self.text_encoder.net.config.max_position_embeddings
        self.aux: Any = {
            "vae": self.vae.params,
            "text_encoder": self.text_encoder.params,
            "empty": jnp.asarray(self.tokenizer([""], length)),
        }

    def init(self, key: jax.Array) -> Params:
        return self.net.init(key) if self.initial is None else self.initial

    def loss(self, params: Params, aux: Any, batch: Batch, key: jax.Array):
        key_latent, key_caption, key = jax.random.split(key, 3)
        mean, logvar = self.vae.net(aux["vae"], batch["image"], method="encode")
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key_latent, mean.shape)
        latents = latents * self.vae.net.config.scaling_factor

        ids = batch["input_ids"]
        dropped = jax.random.bernoulli(key_caption, self.caption_dropout, (len(ids), 1))
        ids = jnp.where(dropped, aux["empty"], ids)
        states = self.text_encoder.net(aux["text_encoder"], ids)
        conditioning = {"encoder_hidden_states": states}
        return denoising_loss(
            self.net, params, self.schedule, latents, conditioning, key, self.continuous
        )

    def pipeline(self, params: Params) -> Pipeline:
        unet = Component(self.net, params)
        return Pipeline(unet, self.schedule, self.vae, self.text_encoder, self.tokenizer)

    def preview(self, params: Params) -> np.ndarray:
        """Four seeds of each preview prompt, at guidance 3."""
        pipe = self.pipeline(params)
        prompts = [prompt for prompt in self.preview_prompts for _ in range(4)]
        seeds = [seed for _ in self.preview_prompts for seed in range(4)]
        latents = pipe.denoise(
            pipe.noise(seeds),
            pipe.encode(prompts),
            pipe.encode([""] * len(seeds)),
            steps=20,
            guidance_scale=3.0,
            sampler="ddim",
        )
        return tile(pipe.decode_array(latents), 4 * max(1, len(self.preview_prompts) // 4))

    def export(self, params: Params, folder: str | Path) -> None:
        self.pipeline(params).save(folder)
