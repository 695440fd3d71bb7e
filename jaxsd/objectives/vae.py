"""A variational autoencoder: reconstruction + beta KL (Kingma & Welling 2014)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.components import save_component
from jaxsd.models import AutoencoderKL, VAEConfig
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch
from jaxsd.pictures import tile, to_uint8


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each number, in nats."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)


@dataclasses.dataclass
class VAE:
    """Batches hold "image" [b, h, w, 3] in [-1, 1].

    The loss is the mean over pixels of |x - x'| (or its square, "l2") plus `kl_weight` times the
    mean over latents of the KL divergence. `samples` [n, h, w, 3] are training pictures on which
    the scaling factor, 1 / (standard deviation of the latents), is measured at the end.
    """

    vae: VAEConfig
    samples: np.ndarray
    kl_weight: float = 1e-6
    reconstruction: str = "l1"
    initial: Params | None = None

    def __post_init__(self):
        self.net = Net(AutoencoderKL(self.vae))
        self.aux: Any = ()
        self._encode = jax.jit(lambda params, x: self.net(params, x, method="encode"))
        self._decode = jax.jit(lambda params, z: self.net(params, z, method="decode"))

    def init(self, key: jax.Array) -> Params:
        return self.net.init(key) if self.initial is None else self.initial

    def loss(self, params: Params, aux: Any, batch: Batch, key: jax.Array):
        image = batch["image"]
        mean, logvar = self.net(params, image, method="encode")
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)
        difference = self.net(params, latents, method="decode") - image
        l1, l2 = jnp.abs(difference).mean(), jnp.square(difference).mean()
        kl = kl_divergence(mean, logvar).mean()
        reconstruction = l1 if self.reconstruction == "l1" else l2
        metrics = {"l1": l1, "psnr": 10 * jnp.log10(4 / l2), "kl": kl}
        return reconstruction + self.kl_weight * kl, metrics

    def scaling_factor(self, params: Params) -> float:
        """1 / std of latents drawn for `samples`, so that the UNet sees unit variance."""
        total, square, count = 0.0, 0.0, 0
        for start in range(0, len(self.samples), 64):
            mean, logvar = self._encode(params, jnp.asarray(self.samples[start : start + 64]))
            # E[z] and E[z^2] of the posterior, without drawing from it
            total += float(mean.sum())
            square += float((jnp.square(mean) + jnp.exp(logvar)).sum())
            count += mean.size
        return float(1 / np.sqrt(square / count - (total / count) ** 2))

    def preview(self, params: Params) -> np.ndarray:
        """Eight pictures above their reconstructions."""
        pictures = jnp.asarray(self.samples[:8])
        rebuilt = self._decode(params, self._encode(params, pictures)[0])
        return tile(to_uint8(np.concatenate([pictures, rebuilt])), 8)

    def export(self, params: Params, folder: str | Path) -> None:
        factor = self.scaling_factor(params)
        net = Net(AutoencoderKL(dataclasses.replace(self.vae, scaling_factor=factor)))
        save_component(Path(folder) / "vae", net, params)
