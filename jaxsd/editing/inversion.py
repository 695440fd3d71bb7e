"""From a picture back to the noise of which a model would draw it: DDIM the other way round.

noise = invert(pipe, "seven.png", "a red seven")       # which `pipe.denoise` turns into the picture
latents = pipe.denoise(noise, pipe.encode(["a blue seven"]), None, steps=50)  # or one like it

Song et al. 2020 (2010.02502), section 4.3. A student of `train.py progressive --encoder` does it in
few steps (Meng et al. 2023, 2210.03142, section 3.3: style transfer).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion import jumps
from jaxsd.pictures import Picture, Pictures, to_model
from jaxsd.pipeline import Pipeline


def invert(
    pipe: Pipeline,
    pictures: Pictures,
    prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 1.0,
) -> jax.Array:
    """Latents [n, h, w, c] near noise, one for each picture, which is brought to the model's size.

    prompt: what the pictures show. steps: of `jumps.ladder`, from the picture to the last time of
    the schedule; sampled with `ddim` from there, on `jumps.student_schedule(pipe.schedule)`, the
    picture comes back, the nearer the more steps. guidance_scale: 1 for none, of which the way
    back is straightest. JaxsdError for a picture that cannot be read.
    """
    several = [pictures] if isinstance(pictures, Picture) else list(pictures)
    channels = 3 if pipe.vae else pipe.latent_channels
    arrays = np.stack([to_model(one, *pipe.default_size, channels) for one in several])
    cond = pipe.encode([prompt] * len(several))
    uncond = None if pipe.guidance_embedded else pipe.encode([""] * len(several))
    z, kind = pipe.encode_pictures(arrays), pipe.schedule.prediction_type
    rungs = jumps.reverse(jumps.ladder(pipe.schedule, steps))
    for i in range(steps):
        here, there = (rungs.at(jnp.full(len(z), k)) for k in (i, i + 1))
        said = pipe.predict(z, float(rungs.t[i]), cond, uncond, guidance_scale)
        z = jumps.jump(kind, said, z, here, there)
    return z
