"""From a picture back to the noise of which a model would draw it: DDIM the other way round.

noise = invert(pipe, "seven.png", "a red seven")
latents = on_ladder(pipe).denoise(noise, pipe.encode(["a blue seven"]), None, steps=50)

Song et al. 2020 (2010.02502), section 4.3. A student of `train.py progressive --encoder` does it in
few steps (Meng et al. 2023, 2210.03142, section 3.3: style transfer).
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import tasks
from jaxsd.diffusion import jumps
from jaxsd.diffusion.denoise import Conditioning
from jaxsd.errors import JaxsdError
from jaxsd.families import latent_shape
from jaxsd.pictures import Picture, Pictures, to_model
from jaxsd.pipeline import Pipeline


class Reconstruction(NamedTuple):
    """Latents [n, h, w, c] (of a pixel model pixels): pictures, noise, and what came back."""

    latents: jax.Array
    noise: jax.Array
    back: jax.Array

    @property
    def rmse(self) -> np.ndarray:
        """The root mean square difference [n] between what went and what came back."""
        return np.asarray(jnp.sqrt(jnp.square(self.back - self.latents).mean((1, 2, 3))))


def invert(
    pipe: Pipeline,
    pictures: Pictures,
    prompts: str | Sequence[str] = "",
    steps: int = 50,
    guidance_scale: float = 1.0,
    *,
    height: int | None = None,
    width: int | None = None,
) -> jax.Array:
    """Latents [n, h, w, c] near noise, one for each picture.

    prompts: what the pictures show, one for all or one for each. steps: of `jumps.ladder`, from the
    picture to the last time of the schedule; sampled with `ddim` from there by `on_ladder(pipe)`,
    the picture comes back, the nearer the more steps. guidance_scale: 1 for none, of which the way
    back is straightest. height, width: in pixels, what pictures are brought to, by default what the
    model was trained on.

    JaxsdError for a picture that cannot be read, a size or a number of prompts that cannot be, or a
    model that predicts the picture, which at the picture itself says nothing of the noise.
    """
    z = picture_latents(pipe, pictures, height, width)
    return _climb(pipe, z, *conditions(pipe, prompts, z), steps, guidance_scale)


def reconstruct(
    pipe: Pipeline,
    pictures: Pictures,
    prompts: str | Sequence[str] = "",
    steps: int = 50,
    guidance_scale: float = 1.0,
    *,
    height: int | None = None,
    width: int | None = None,
) -> Reconstruction:
    """Inverts pictures and samples them back in as many steps: what a model can hold of them.

    Arguments and errors as of `invert`. What the VAE loses is no part of the difference.
    """
    z = picture_latents(pipe, pictures, height, width)
    told = conditions(pipe, prompts, z)
    noise = _climb(pipe, z, *told, steps, guidance_scale)
    how = {"steps": steps, "guidance_scale": guidance_scale, "sampler": "ddim"}
    return Reconstruction(z, noise, on_ladder(pipe).denoise(noise, *told, **how))


def on_ladder(pipe: Pipeline) -> Pipeline:
    """The same model, its programs shared, whose DDIM steps are those of `invert` turned round."""
    walker = copy.copy(pipe)
    walker.schedule = jumps.student_schedule(pipe.schedule)
    return walker


def picture_latents(
    pipe: Pipeline, pictures: Pictures, height: int | None = None, width: int | None = None
) -> jax.Array:
    """Latents [n, h, w, c] of one picture or several, brought to a size in pixels."""
    tasks.check(pipe, tasks.Given())  # a model that is also given a picture at each step
    default, downscale = pipe.default_size, pipe.vae.config.downscale if pipe.vae else 1
    size = default[0] if height is None else height, default[1] if width is None else width
    latent_shape(pipe.unet.config, downscale, *size)  # refused before any work
    several = [pictures] if isinstance(pictures, Picture) else list(pictures)
    if not several:
        raise JaxsdError("give at least one picture")
    channels = 3 if pipe.vae else pipe.latent_channels
    return pipe.encode_pictures(np.stack([to_model(one, *size, channels) for one in several]))


def conditions(
    pipe: Pipeline, prompts: str | Sequence[str], z: jax.Array
) -> tuple[Conditioning, Conditioning | None]:
    """What the UNet is told of latents of pictures, and the unconditional half, if it has one.

    prompts: one for all, or one for each; JaxsdError for another number.
    """
    texts = [prompts] * len(z) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(z):
        raise JaxsdError(f"{len(texts)} prompts for {len(z)} pictures: give one, or one for each")
    downscale = pipe.vae.config.downscale if pipe.vae else 1
    size = z.shape[1] * downscale, z.shape[2] * downscale
    cond = pipe.encode(texts, size_ids=pipe.size_ids(size))
    if pipe.guidance_embedded:
        return cond, None
    return cond, pipe.encode([None] * len(z), size_ids=pipe.size_ids(size, negative=True))


def _climb(
    pipe: Pipeline,
    z: jax.Array,
    cond: Conditioning,
    uncond: Conditioning | None,
    steps: int,
    guidance_scale: float,
) -> jax.Array:
    """DDIM's steps from the picture to noise."""
    kind = pipe.schedule.prediction_type
    if kind == "sample":
        raise JaxsdError("a model that predicts the picture says nothing of the noise in it")
    rungs = jumps.reverse(jumps.ladder(pipe.schedule, steps))
    for i in range(steps):
        here, there = (rungs.at(jnp.full(len(z), k)) for k in (i, i + 1))
        said = pipe.predict(z, float(rungs.t[i]), cond, uncond, guidance_scale)
        z = jumps.jump(kind, said, z, here, there)
    return z
