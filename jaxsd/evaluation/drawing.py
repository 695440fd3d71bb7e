"""Draws pictures from a model, in batches of one shape, and says what they cost."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion import samplers
from jaxsd.errors import Diverged
from jaxsd.pictures import to_uint8
from jaxsd.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: all of it goes into the report."""

    count: int = 2000
    steps: int = 50
    sampler: str = "ddim"
    guidance_scale: float = 1.0
    sampling_seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 100


class Drawn(NamedTuple):
    """A batch of pictures, before they are rounded.

    latents: float32 [b, h, w, c] as the sampler leaves them (pixels, of a pixel model). pixels:
    float32 [b, H, W, c], what `Pipeline.decode_pixels` makes of them, clipped to [-1, 1]. seconds:
    how long each picture took, from its prompt on, with `batch_size` at a time.
    """

    latents: np.ndarray
    pixels: np.ndarray
    seconds: float

    @property
    def rounded(self) -> np.ndarray:
        """uint8, as files hold them."""
        return to_uint8(self.pixels)


def draw(
    pipe: Pipeline, prompts: Sequence[str], how: Sampling, seed: int, negative_prompt: str = ""
) -> np.ndarray:
    """uint8 pictures [n, h, w, c], one of each prompt: all batches of `draw_batches`."""
    batches = draw_batches(pipe, prompts, how, seed, negative_prompt)
    return np.concatenate([drawn.rounded for drawn in batches])


def draw_batches(
    pipe: Pipeline,
    prompts: Sequence[str],
    how: Sampling,
    seed: int,
    negative_prompt: str = "",
    place: Callable[[jax.Array], jax.Array] = lambda noise: noise,
) -> Iterator[Drawn]:
    """One picture of each prompt, in batches that begin at 0, batch_size, ...: `draw_batch`."""
    for start in range(0, len(prompts), how.batch_size):
        yield draw_batch(pipe, prompts, how, seed, start, negative_prompt, place)


def draw_batch(
    pipe: Pipeline,
    prompts: Sequence[str],
    how: Sampling,
    seed: int,
    start: int,
    negative_prompt: str = "",
    place: Callable[[jax.Array], jax.Array] = lambda noise: noise,
) -> Drawn:
    """The batch of pictures start ... start + batch_size - 1 of all that the prompts ask for.

    Picture i has the seed 1,000,000 * seed + i. Where there is no guidance the unconditional half
    is left out: it would be multiplied by zero. place: puts the noise where the pictures are to be
    drawn. Diverged if they are not finite.
    """
    began = time.perf_counter()
    chosen = list(prompts[start : start + how.batch_size])
    count = len(chosen)
    chosen += chosen[:1] * (how.batch_size - count)  # the last batch runs in the others' program
    seeds = [1_000_000 * seed + start + i for i in range(len(chosen))]
    latents = pipe.denoise(
        place(pipe.noise(seeds)),
        pipe.encode(chosen),
        pipe.encode([negative_prompt] * len(chosen)) if is_guided(pipe, how) else None,
        steps=how.steps,
        guidance_scale=how.guidance_scale,
        sampler=how.sampler,
        seeds=seeds,
    )
    if not jnp.isfinite(latents).all():
        raise Diverged("the model draws NaN or infinity: it has diverged")
    pixels = np.clip(pipe.decode_pixels(latents), -1, 1)
    seconds = (time.perf_counter() - began) / len(chosen)
    return Drawn(np.asarray(latents)[:count], pixels[:count], seconds)


def usual_sampler(pipe: Pipeline) -> str:
    """DDIM, but the own sampler of students that were taught to jump to the picture."""
    return pipe.default_sampler if pipe.default_sampler in ("lcm", "tcd") else "ddim"


def usual_steps(pipe: Pipeline) -> int:
    """What the model was distilled for, if its schedule says; else 4 to jump, 50 to walk."""
    told = pipe.schedule.default_steps
    return told or (50 if usual_sampler(pipe) == "ddim" else 4)


def usual_scale(pipe: Pipeline, otherwise: float) -> float:
    """The guidance scale that the model was distilled for, if its schedule says."""
    told = pipe.schedule.default_guidance_scale
    return otherwise if told is None else told


def is_guided(pipe: Pipeline, how: Sampling) -> bool:
    """Whether the network is asked with and without the prompt, and not told the scale instead."""
    return how.guidance_scale > 1 and pipe.takes_prompts and not pipe.guidance_embedded


def passes(pipe: Pipeline, how: Sampling) -> int:
    """How often a picture goes through the network: guidance, though one batch, is two passes."""
    grid, _ = pipe.plan_steps(how.sampler, how.steps)
    return samplers.evaluations(how.sampler, grid) * (2 if is_guided(pipe, how) else 1)


def costs(pipe: Pipeline, how: Sampling, seconds: Sequence[float]) -> dict[str, float]:
    """Network passes and median milliseconds of a picture; seconds: of each batch that was drawn.

    The first one may have been compiled for and is left out; NaN if there is no other.
    """
    median = statistics.median(seconds[1:]) if len(seconds) > 1 else math.nan
    return {"passes": float(passes(pipe, how)), "ms_per_image": 1000 * median}
