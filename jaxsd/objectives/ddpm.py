"""Denoising in pixel space (Ho et al. 2020), class-conditional or not, for eps, x or v."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.components import Component
from jaxsd.diffusion.schedule import Schedule, prediction_target
from jaxsd.models import UNet, UNet2DConfig, UNetConfig, class_input
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch
from jaxsd.pictures import tile
from jaxsd.pipeline import Pipeline


def denoising_loss(
    net: Net,
    params: Params,
    schedule: Schedule,
    x0: jax.Array,
    conditioning: dict[str, Any],
    key: jax.Array,
    continuous: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean square error of the network's prediction of z_t = alpha x0 + sigma eps.

    x0: [b, h, w, c]. t and eps are drawn from `key`, and so is dropout. The error is that of the
    prediction itself, whatever its type, so its weight in x is 1 (x), SNR (eps) or SNR + 1 (v).
    """
    key_t, key_eps, key_dropout = jax.random.split(key, 3)
    t = schedule.random_times(key_t, len(x0), continuous)
    eps = jax.random.normal(key_eps, x0.shape, x0.dtype)
    alpha, sigma = (a[:, None, None, None] for a in schedule.alpha_sigma(t))
    z = alpha * x0 + sigma * eps
    prediction = net(params, z, t, dropout_key=key_dropout, **conditioning)
    target = prediction_target(schedule.prediction_type, x0, eps, alpha, sigma)
    error = jnp.square(prediction - target).mean((1, 2, 3))
    late = t > schedule.num_train_timesteps / 2
    halves = {  # where the loss sits: near the noise or near the picture
        "loss_noisy": _mean_where(error, late),
        "loss_clean": _mean_where(error, ~late),
    }
    return error.mean(), halves


def _mean_where(values: jax.Array, chosen: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(chosen, values, 0.0)) / jnp.maximum(
        chosen.astype(values.dtype).sum(), 1.0
    )


@dataclasses.dataclass
class DDPM:
    """Batches hold "image" [b, h, w, c] in [-1, 1] and, for a conditional UNet, "label" [b].

    A share `class_dropout` of the labels is left out, which is what guidance contrasts.
    """

    unet: UNetConfig | UNet2DConfig
    schedule: Schedule
    continuous: bool = True
    class_dropout: float = 0.1
    initial: Params | None = None

    def __post_init__(self):
        self.net = Net(UNet(self.unet))
        self.aux: Any = ()

    def init(self, key: jax.Array) -> Params:
        return self.net.init(key) if self.initial is None else self.initial

    def loss(self, params: Params, aux: Any, batch: Batch, key: jax.Array):
        key_class, key = jax.random.split(key)
        conditioning = {}
        if self.unet.num_classes:
            kept = jax.random.bernoulli(key_class, 1 - self.class_dropout, batch["label"].shape)
            labels = jnp.where(kept, batch["label"], -1)
            conditioning["class_labels"] = class_input(self.unet, labels)
        image = batch["image"]
        return denoising_loss(
            self.net, params, self.schedule, image, conditioning, key, self.continuous
        )

    def pipeline(self, params: Params) -> Pipeline:
        return Pipeline(Component(self.net, params), self.schedule)

    def preview(self, params: Params) -> np.ndarray:
        """Four pictures of each class, without guidance; sixteen where there are no classes."""
        pipe = self.pipeline(params)
        classes = self.unet.num_classes or 4
        seeds = range(4 * classes)
        conditioned = self.unet.num_classes > 0
        cond = pipe.encode([str(s % classes) for s in seeds]) if conditioned else {}
        latents = pipe.denoise(pipe.noise(seeds), cond, None, steps=25, sampler="ddim")
        return tile(pipe.decode_array(latents), classes)

    def export(self, params: Params, folder: str | Path) -> None:
        self.pipeline(params).save(folder)
