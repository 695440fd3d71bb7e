"""Denoising in pixel space (Ho et al. 2020), class-conditional or not."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.components import Component, make_net
from jaxsd.diffusion.schedule import Schedule
from jaxsd.models import UNet2DConfig, UNetConfig, class_input
from jaxsd.nn import Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import (
    Denoising,
    Example,
    denoising_loss,
    loss_by_bucket,
    preview,
    with_dropout,
)
from jaxsd.pipeline import Pipeline


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
        self.net = make_net(self.unet)
        self.aux: Any = ()

    def init(self, key: jax.Array) -> Params:
        return self.net.init(key) if self.initial is None else self.initial

    def example(self, params: Params, aux: Any, batch: Batch, key: jax.Array) -> Example:
        """What a batch holds: pictures, and classes told and untold."""
        image = batch["image"]
        if not self.unet.num_classes:
            return Example(image, {}, {})
        none = jnp.full_like(batch["label"], -1)
        told, nothing = ({"class_labels": class_input(self.unet, labels)}
                         for labels in (batch["label"], none))  # fmt: skip
        return Example(image, told, nothing)

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        """The error at random times (Ho et al. 2020, eq. 14, or as `denoising` says).

        batch: image [b, h, w, c] in [-1, 1] and, for models of classes, label [b].
        """
        key_class, key = jax.random.split(now.key)
        example = self.example(params, aux, batch, key)
        told = with_dropout(example, self.class_dropout, key_class)
        return denoising_loss(
            self.net, params, self.schedule, example.x0, told, key, self.denoising
        )

    def loss_by_bucket(self, params: Params, aux: Any, batch: Batch, keys: jax.Array) -> jax.Array:
        """For held-out pictures: `denoising.loss_by_bucket`, [buckets, b], with all labels."""
        example, options = self.example(params, aux, batch, keys[0]), self.denoising
        return loss_by_bucket(
            self.net, params, self.schedule, example.x0, example.cond, keys, options
        )

    def pipeline(self, params: Params) -> Pipeline:
        """What draws with these parameters."""
        return Pipeline(Component(self.net, params), self.schedule)

    @property
    def preview_prompts(self) -> list[str]:
        """The classes; a few times nothing where there are none."""
        return [str(label) for label in range(self.unet.num_classes)] or [""] * 4

    def preview(self, params: Params) -> np.ndarray:
        """Four pictures of each class, without guidance; sixteen where there are no classes."""
        pipe = self.pipeline(params)
        return preview(pipe, self.preview_prompts, steps=25, guidance_scale=1.0, sampler="ddim")

    def export(self, params: Params, folder: str | Path) -> None:
        self.pipeline(params).save(folder)
