"""Style by the gradient of a text: pictures are drawn of their prompt and pulled towards a style.

latents = restyle(pipe, "seven.png", "something blue", source="a red seven", keep="a seven")

What pulls is the gradient that the model itself has of how likely a text is, given noisy latents:
grad_z log p(text | z) = (eps(z) - eps(z, text)) / sigma, a classifier without one being trained (Ho
& Salimans 2022, 2207.12598, section 3.2). So it needs nothing beside the model. The prompt's own
prediction says what stays, and gradients of several texts add up (Liu et al. 2022, 2206.01714, eq.
11): eps(z, keep) - scale * sigma * grad_z log p(style | z).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxsd.diffusion import jumps
from jaxsd.editing.inversion import conditions, invert
from jaxsd.errors import JaxsdError
from jaxsd.pictures import Pictures
from jaxsd.pipeline import Pipeline


def restyle(
    pipe: Pipeline,
    pictures: Pictures,
    style: str | Sequence[str],
    source: str | Sequence[str] = "",
    keep: str | Sequence[str] = "",
    scale: float = 1.0,
    steps: int = 50,
    *,
    height: int | None = None,
    width: int | None = None,
) -> jax.Array:
    """Latents [n, h, w, c] of pictures in another style, one for each picture.

    source: what the pictures show, style and all: with it they go to noise (`invert`). keep: what
    of it stays; what it leaves unsaid is free for the style. Texts are one for all pictures or one
    for each. The other arguments are those of `styled`, sizes and errors those of `invert`.
    """
    noise = invert(pipe, pictures, source, steps, height=height, width=width)
    return styled(pipe, noise, keep, style, scale, steps)


def styled(
    pipe: Pipeline,
    noise: jax.Array,
    prompts: str | Sequence[str],
    style: str | Sequence[str],
    scale: float = 1.0,
    steps: int = 50,
) -> jax.Array:
    """Latents [n, h, w, c] of what the prompts say, pulled towards a style at every step.

    noise: [n, h, w, c], of `pipe.noise` or `invert`. scale: how many times the style's gradient is
    added: 0 is plain DDIM, 1 as hard as the prompt, and beyond 2 or so the style takes the place of
    the content. steps: of DDIM, on `jumps.ladder`. JaxsdError for a model that has no unconditional
    half to tell the style from.
    """
    content, nothing = conditions(pipe, prompts, noise)
    if nothing is None or not pipe.takes_prompts:
        raise JaxsdError("a style is told from no prompt: this model knows no such difference")
    kind, rungs = pipe.schedule.prediction_type, jumps.ladder(pipe.schedule, steps)
    wanted, _ = conditions(pipe, style, noise)
    z = noise
    for i in range(steps):
        here, there = (rungs.at(jnp.full(len(z), k)) for k in (i, i + 1))
        t = float(rungs.t[i])
        said = pipe.predict(z, t, content)
        if scale:
            # Of any type: x0, eps and v are linear in one another, so the difference is the same
            pull = pipe.predict(z, t, wanted) - pipe.predict(z, t, nothing)
            said = said + scale * pull
        z = jumps.jump(kind, said, z, here, there)
    return z
