"""The loss of every network that denoises (Ho et al. 2020): of eps, x or v, weighted by noise."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxsd.diffusion.denoise import Conditioning
from jaxsd.diffusion.schedule import Schedule, as_one, prediction_target
from jaxsd.diffusion.weighting import WEIGHTINGS, loss_weight
from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch
from jaxsd.pictures import tile
from jaxsd.pipeline import Pipeline

BUCKETS = 4  # of time, by which the loss is logged


@dataclasses.dataclass(frozen=True)
class Denoising:
    """How pictures or latents are made noisy, and what an error in telling them apart costs."""

    time: str = "discrete"  # or "continuous": whether times are whole, or spread over an interval
    weighting: str = "none"  # of `diffusion.weighting`
    snr_gamma: float = 5.0  # of "min-snr"
    offset_noise: float = 0.0  # its deviation; the usual is 0.1 (Guttenberg 2023)
    dtype: str = "float32"  # in which the network computes; the noise and the loss are float32

    def __post_init__(self):
        choices = {"time": ("discrete", "continuous"), "weighting": WEIGHTINGS}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise JaxsdError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
        if not self.snr_gamma > 0:
            raise JaxsdError(f"snr_gamma must be above 0, not {self.snr_gamma}")
        if not self.offset_noise >= 0:
            raise JaxsdError(f"offset_noise must be at least 0, not {self.offset_noise}")


class Example(NamedTuple):
    """What a batch says to a network that denoises, and what it is told where that is left out."""

    x0: jax.Array  # clean pictures or latents, [b, h, w, c]
    cond: Conditioning
    uncond: Conditioning  # of the same names and shapes


@runtime_checkable
class Denoiser(Protocol):
    """An objective of a network that denoises, as far as distillation builds upon it."""

    net: Net
    schedule: Schedule
    aux: Any

    def init(self, key: jax.Array) -> Params:
        """The parameters to start from."""
        ...

    def example(self, params: Params, aux: Any, batch: Batch, key: jax.Array) -> Example:
        """What is random about it, such as a latent's noise, is drawn from `key`."""
        ...

    def pipeline(self, params: Params) -> Pipeline:
        """The model with these parameters."""
        ...

    @property
    def preview_prompts(self) -> Sequence[str]:
        """What to ask for in previews."""
        ...


def with_dropout(example: Example, share: float, key: jax.Array) -> Conditioning:
    """What the network is told, left out of a random `share` of the examples (2207.12598)."""
    dropped = jax.random.bernoulli(key, share, (len(example.x0),))

    def mixed(cond: jax.Array, uncond: jax.Array) -> jax.Array:
        return jnp.where(dropped.reshape(-1, *[1] * (cond.ndim - 1)), uncond, cond)

    return jax.tree.map(mixed, example.cond, example.uncond)


def preview(pipe: Pipeline, prompts: Sequence[str], **how: Any) -> np.ndarray:
    """Four seeds of each prompt, side by side; how: options of `Pipeline.sample`."""
    asked = [prompt for prompt in prompts for _ in range(4)]
    latents = pipe.sample(asked, [0, 1, 2, 3] * len(prompts), **how)
    return tile(pipe.decode_array(latents), 4 * max(1, len(prompts) // 4))


def denoising_loss(
    net: Net,
    params: Params,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    conditioning: dict[str, Any],
    key: jax.Array,
    options: Denoising,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over a batch of `denoising_errors`, and what that has for the log."""
    errors, logged = denoising_errors(net, params, schedule, x0, conditioning, key, options)
    return errors.mean(), logged


def denoising_errors(
    net: Net,
    params: Params,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    conditioning: dict[str, Any],
    key: jax.Array,
    options: Denoising,
) -> tuple[Float[Array, " b"], dict[str, jax.Array]]:
    """The weighted error of the prediction of z_t = alpha x0 + sigma eps, for each of a batch.

    t, eps and dropout are drawn from `key`; `conditioning` is what else the network is told. The
    errors come with their mean in each quarter of time, "loss_t0" (clean) to "loss_t3" (noise).
    """
    key_t, key_eps, key_dropout = jax.random.split(key, 3)
    t = schedule.random_times(key_t, len(x0), options.time == "continuous")
    eps = _noise(key_eps, x0.shape, options)
    error = _error(net, params, schedule, x0, eps, t, conditioning, options, key_dropout)
    first, length = _times(schedule, options)
    return error, by_quarter(error, (t - first) / length)


def by_quarter(error: Float[Array, " b"], share: Float[Array, " b"]) -> dict[str, jax.Array]:
    """The mean error in each quarter of time: "loss_t0" (clean) to "loss_t3" (noise).

    share: of the time to pure noise. A quarter of the batch is expected in each. Counted on as if
    it were so, the mean over devices and parts of a batch is right, also where a quarter has no
    example.
    """
    bucket = jnp.minimum((BUCKETS * share).astype(jnp.int32), BUCKETS - 1)
    return {
        f"loss_t{i}": BUCKETS * jnp.where(bucket == i, error, 0.0).mean() for i in range(BUCKETS)
    }


def loss_by_bucket(
    net: Net,
    params: Params,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    conditioning: dict[str, Any],
    keys: Key[Array, " b"],
    options: Denoising,
    buckets: int = BUCKETS,
) -> Float[Array, "{buckets} b"]:
    """For held-out pictures: the loss of each, once in every bucket, without dropout.

    Bucket i is the i-th of equal parts of time, 0 the cleanest; times are uniform in it. A picture
    has its own key, so that its times and its noise are the same in whatever batch it comes.
    """
    first, length = _times(schedule, options)

    def one(bucket: jax.Array) -> jax.Array:
        key_t, key_eps = jax.vmap(
            lambda key: jax.random.split(jax.random.fold_in(key, bucket)), out_axes=1
        )(keys)
        share = (bucket + jax.vmap(jax.random.uniform)(key_t)) / buckets
        t = length * share
        if options.time == "discrete":
            t = jnp.minimum(jnp.floor(t), length - 1)
        eps = jax.vmap(lambda key: _noise(key, x0.shape[1:], options))(key_eps)
        return _error(net, params, schedule, x0, eps, first + t, conditioning, options)

    return jax.lax.map(one, jnp.arange(buckets, dtype=jnp.float32))


def _error(
    net: Net,
    params: Params,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    conditioning: dict[str, Any],
    options: Denoising,
    dropout_key: jax.Array | None = None,
) -> Float[Array, " b"]:
    """The weighted mean square error of the prediction for each picture."""
    kind = schedule.prediction_type
    if kind == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise JaxsdError(
            "zero terminal SNR needs prediction_type v_prediction or sample: noise alone says "
            "nothing of the picture to a network that predicts noise"
        )
    x0 = x0.astype(jnp.float32)
    alpha, sigma = schedule.alpha_sigma(t)
    weight = loss_weight(options.weighting, kind, alpha, sigma, options.snr_gamma)
    alpha, sigma = (a[:, None, None, None] for a in (alpha, sigma))
    z = (alpha * x0 + sigma * eps).astype(options.dtype)
    prediction = net(params, z, t, dropout_key=dropout_key, **conditioning).astype(jnp.float32)
    kind, prediction = as_one(kind, prediction, alpha, sigma)
    target = prediction_target(kind, x0, eps, alpha, sigma)
    return weight * jnp.square(prediction - target).mean((1, 2, 3))


def _noise(key: jax.Array, shape: tuple[int, ...], options: Denoising) -> jax.Array:
    """[..., h, w, c]"""
    eps = jax.random.normal(key, shape, jnp.float32)
    if not options.offset_noise:
        return eps
    shape = (*shape[:-3], 1, 1, shape[-1])
    offset = jax.random.normal(jax.random.fold_in(key, 1), shape, jnp.float32)
    return eps + options.offset_noise * offset


def _times(schedule: Schedule, options: Denoising) -> tuple[float, int]:
    """The first training time, and over how many the rest are spread: `Schedule.random_times`."""
    n = schedule.num_train_timesteps
    if options.time == "discrete":
        return float(schedule.continuous), n
    return 0.0, n if schedule.continuous else n - 1
