"""Denoising in pixel space (Ho et al. 2020), class-conditional or not."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.components import Component
from jaxsd.diffusion.schedule import Schedule
from jaxsd.models import UNet, UNet2DConfig, UNetConfig, class_input
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import Denoising, denoising_loss, loss_by_bucket
from jaxsd.pictures import tile
from jaxsd.pipeline import Lending, Pipeline


@dataclasses.dataclass
class DDPM:
    """Batches hold "image" [b, h, w, c] in [-1, 1] and, for a conditional UNet, "label" [b].

    A share `class_dropout` of the labels is left out, which is what guidance contrasts.
    """

    unet: UNetConfig | UNet2DConfig
    schedule: Schedule
    denoising: Denoising = Denoising(time="continuous")
    class_dropout: float = 0.1
    initial: Params | None = None

    def __post_init__(self):
        self.net = Net(UNet(self.unet))
        self.aux: Any = ()
        self._lent = Lending(self.pipeline)

    def init(self, key: jax.Array) -> Params:
        return self.net.init(key) if self.initial is None else self.initial

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        key_class, key = jax.random.split(now.key)
        conditioning = {}
        if self.unet.num_classes:
            kept = jax.random.bernoulli(key_class, 1 - self.class_dropout, batch["label"].shape)
            labels = jnp.where(kept, batch["label"], -1)
            conditioning["class_labels"] = class_input(self.unet, labels)
        image = batch["image"]
        return denoising_loss(
            self.net, params, self.schedule, image, conditioning, key, self.denoising
        )

    def loss_by_bucket(self, params: Params, aux: Any, batch: Batch, keys: jax.Array) -> jax.Array:
        """For held-out pictures: `denoising.loss_by_bucket`, [buckets, b], with all labels."""
        conditioning = {}
        if self.unet.num_classes:
            conditioning["class_labels"] = class_input(self.unet, batch["label"])
        image, options = batch["image"], self.denoising
        return loss_by_bucket(self.net, params, self.schedule, image, conditioning, keys, options)

    def pipeline(self, params: Params) -> Pipeline:
        return Pipeline(Component(self.net, params), self.schedule)

    def preview(self, params: Params) -> np.ndarray:
        """Four pictures of each class, without guidance; sixteen where there are no classes."""
        classes = self.unet.num_classes or 4
        seeds = range(4 * classes)
        conditioned = self.unet.num_classes > 0
        with self._lent(params) as pipe:
            cond = pipe.encode([str(s % classes) for s in seeds]) if conditioned else {}
            latents = pipe.denoise(pipe.noise(seeds), cond, None, steps=25, sampler="ddim")
            return tile(pipe.decode_array(latents), classes)

    def export(self, params: Params, folder: str | Path) -> None:
        self.pipeline(params).save(folder)
