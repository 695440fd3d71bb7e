"""A variational autoencoder: reconstruction + beta KL (Kingma & Welling 2014).

Optionally with what VQGAN and Stable Diffusion's autoencoder were trained with besides (Esser et
al. 2021, section 3.1; Rombach et al. 2022, appendix G): a perceptual distance, and a discriminator
that learns to tell pictures from reconstructions while the decoder learns to fool it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import kernels
from jaxsd.components import Component, make_net, save_component
from jaxsd.errors import JaxsdError
from jaxsd.models import VAEConfig
from jaxsd.models.discriminator import DiscriminatorConfig, PatchDiscriminator, hinge_loss
from jaxsd.models.perceptual import SMALLEST
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch, Now
from jaxsd.pictures import tile, to_uint8

LAST_LAYER = "decoder.conv_out.weight"
PREFIX = "discriminator."  # of its parameters' names, among those that are trained


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each number, in nats."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator, the update with which its part begins, and how much its opinion counts."""

    config: DiscriminatorConfig = DiscriminatorConfig()
    start: int = 0
    weight: float = 0.5


@dataclasses.dataclass
class VAE:
    """Batches hold "image" [b, h, w, 3] in [-1, 1].

    The loss is the mean over pixels of |x - x'| (or its square, "l2"), plus `perceptual_weight`
    times the mean LPIPS distance of x' from x where a network for it is given, plus `kl_weight`
    times the mean over latents of the KL divergence. For an adversary see `_adversarial`.
    `samples` [n, h, w, 3] are training pictures on which the scaling factor, 1 / (standard
    deviation of the latents), is measured at the end; with `keep_scaling_factor` it stays as it is.
    """

    vae: VAEConfig
    samples: np.ndarray
    kl_weight: float = 1e-6
    reconstruction: str = "l1"
    initial: Params | None = None
    perceptual: Component | None = None  # an LPIPS
    perceptual_weight: float = 1.0
    adversary: Adversary | None = None
    keep_scaling_factor: bool = False
    dtype: str = "float32"  # in which the networks compute, LPIPS apart; losses are float32

    def __post_init__(self):
        self.net = make_net(self.vae)
        self.aux: Any = () if self.perceptual is None else {"perceptual": self.perceptual.params}
        smallest = 1 if self.perceptual is None else SMALLEST
        if self.adversary is not None:
            self._discriminator = Net(PatchDiscriminator(self.adversary.config))
            smallest = max(smallest, self.adversary.config.smallest)
        if (side := min(self.samples.shape[1:3])) < smallest:
            raise JaxsdError(
                f"pictures {side} pixels wide or high are too small for the perceptual distance or "
                f"the discriminator, which need {smallest}: a discriminator with fewer layers "
                "needs less"
            )
        self._encode = kernels.jit(lambda params, x: self.net(params, x, method="encode"))
        self._decode = kernels.jit(lambda params, z: self.net(params, z, method="decode"))

    def init(self, key: jax.Array) -> Params:
        params = self.net.init(key) if self.initial is None else self.initial
        if self.adversary is None:
            return params
        drawn = self._discriminator.init(jax.random.fold_in(key, 1))
        return params | {PREFIX + name: value for name, value in drawn.items()}

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        """Reconstruction, KL and, if asked for, LPIPS and the discriminator's word, weighed.

        batch: image [b, h, w, c] in [-1, 1].
        """
        image = batch["image"]
        mean, logvar = (
            moment.astype(jnp.float32)
            for moment in self.net(params, image.astype(self.dtype), method="encode")
        )
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(now.key, mean.shape)
        features = self.net(params, latents.astype(self.dtype), method="decode_features")
        rebuilt = self._render(params, features)
        kl = kl_divergence(mean, logvar).mean()

        def error_of(rebuilt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self._error(rebuilt, image, aux)

        if self.adversary is None:
            error, metrics = error_of(rebuilt)
        else:
            error, metrics = self._adversarial(params, features, rebuilt, image, error_of, now)
        return error + self.kl_weight * kl, {**metrics, "kl": kl}

    def _render(self, params: Params, features: jax.Array) -> jax.Array:
        return self.net(params, features, method="render").astype(jnp.float32)

    def _judge(self, own: Params, pictures: jax.Array) -> jax.Array:
        assert self.adversary is not None
        return self._discriminator(own, pictures.astype(self.dtype)).astype(jnp.float32)

    def _error(self, rebuilt: jax.Array, image: jax.Array, aux: Any):
        """How far a reconstruction is from its picture, and what is logged of it."""
        difference = rebuilt - image
        l1, l2 = jnp.abs(difference).mean(), jnp.square(difference).mean()
        error = l1 if self.reconstruction == "l1" else l2
        metrics = {"l1": l1, "psnr": 10 * jnp.log10(4 / l2)}
        if self.perceptual is not None:
            distance = self.perceptual.net(aux["perceptual"], rebuilt, image).mean()
            error, metrics = (
                error + self.perceptual_weight * distance,
                {**metrics, "lpips": distance},
            )
        return error, metrics

    def _adversarial(
        self,
        params: Params,
        features: jax.Array,
        rebuilt: jax.Array,
        image: jax.Array,
        error_of: Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
        now: Now,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The error, plus what the generator and the discriminator D each want, as one scalar.

        The generator minimises error(x') - w r mean D(x'), where r = |error's gradient| / |that of
        mean D| by the weight of the decoder's last layer, at most 1e4 (Esser et al. 2021, eq. 7),
        the discriminator its hinge loss of x and x'. Each sees the other as a constant, so that the
        gradient of their sum is that of each loss by its own parameters. Both begin with update
        `start`; before, D costs time and changes nothing.
        """
        assert self.adversary is not None
        own = {name: params[PREFIX + name] for name in self._discriminator.shapes}
        params, own_now, features = jax.lax.stop_gradient((params, own, features))
        fixed = jax.lax.stop_gradient(rebuilt)

        def unlikeness(rebuilt: jax.Array) -> jax.Array:
            return -self._judge(own_now, rebuilt).mean()

        (error, metrics), pull = jax.value_and_grad(error_of, has_aux=True)(fixed)
        fake, push = jax.value_and_grad(unlikeness)(fixed)
        _, at_last_layer = jax.vjp(
            lambda w: self._render({**params, LAST_LAYER: w}, features),
            params[LAST_LAYER].astype(jnp.float32),
        )
        pulled, pushed = (jnp.linalg.norm(at_last_layer(g)[0].ravel()) for g in (pull, push))
        ratio = jnp.clip(pulled / (pushed + 1e-4), 0, 1e4)
        begun = jnp.where(now.step >= self.adversary.start, 1.0, 0.0)
        weight = begun * self.adversary.weight * ratio

        real, unreal = (self._judge(own, x) for x in (image, fixed))
        hinge = hinge_loss(real, unreal)
        generator = _with_gradient(error + weight * fake, rebuilt, pull + weight * push)
        metrics |= {
            "adversarial": fake,
            "adversarial_weight": weight,
            "discriminator": hinge,
            "logits_real": real.mean(),
            "logits_fake": unreal.mean(),
        }
        return generator + begun * hinge, metrics

    def scaling_factor(self, params: Params) -> float:
        """1 / std of latents drawn for `samples`, so that the UNet sees unit variance."""
        total, square, count = 0.0, 0.0, 0
        for pictures in self._chunks(self.samples):
            mean, logvar = self._encode(params, pictures)
            # E[z] and E[z^2] of the posterior, without drawing from it
            total += float(mean.sum())
            square += float((jnp.square(mean) + jnp.exp(logvar)).sum())
            count += mean.size
        return float(1 / np.sqrt(square / count - (total / count) ** 2))

    def preview(self, params: Params) -> np.ndarray:
        """Eight pictures above their reconstructions."""
        pictures = self.samples[:8]
        rebuilt = [
            self._decode(params, self._encode(params, chunk)[0]) for chunk in self._chunks(pictures)
        ]
        return tile(to_uint8(np.concatenate([pictures, *rebuilt])), 8)

    def _chunks(self, pictures: np.ndarray) -> Iterator[jax.Array]:
        """As many at once as do not take much more memory than a step: 64, or a few large ones."""
        size = max(1, min(64, (1 << 18) // math.prod(pictures.shape[1:3])))
        for start in range(0, len(pictures), size):
            yield jnp.asarray(pictures[start : start + size])

    def export(self, params: Params, folder: str | Path) -> None:
        """Writes `vae/`; the discriminator stays in the checkpoints, for resuming."""
        params = {name: params[name] for name in self.net.shapes}
        config = self.vae
        if not self.keep_scaling_factor:
            config = dataclasses.replace(config, scaling_factor=self.scaling_factor(params))
        save_component(Path(folder) / "vae", make_net(config), params)


def _with_gradient(value: jax.Array, at: jax.Array, gradient: jax.Array) -> jax.Array:
    """The value, as a function of `at` with this gradient there.

    What is behind a gradient that is known already is not run through again.
    """
    value, gradient = jax.lax.stop_gradient((value, gradient))
    return value + ((at - jax.lax.stop_gradient(at)) * gradient).sum()
