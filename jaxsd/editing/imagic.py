"""Imagic (Kawar et al. 2022, 2210.09276): one real picture, changed by words.

edited = load_edit("W")                                # what `train.py imagic --workdir W` made
images = edited.pipe.decode(sample(edited, eta=0.7, seeds=[0, 1, 2, 3]))

The network was tuned to draw the picture where it is told an embedding near the prompt's. Between
the two, from eta 0 to 1, the picture turns into what the prompt says.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import pictures
from jaxsd.diffusion.denoise import Conditioning
from jaxsd.editing.mixing import lerp
from jaxsd.errors import JaxsdError
from jaxsd.families import size_unit
from jaxsd.objectives.imagic import new_edit
from jaxsd.pictures import Picture
from jaxsd.pipeline import Pipeline, load
from jaxsd.weights import edits, lora_files
from jaxsd.weights.edits import Edit

ETA = 0.7  # where none is named: the paper's are from .6 to .8
ETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of a strip


@dataclasses.dataclass(frozen=True)
class Edited:
    """A picture's edit, and the model that draws it."""

    pipe: Pipeline
    edit: Edit

    def told(self, prompts: Sequence[str], eta: float | Sequence[float] = ETA) -> Conditioning:
        """What the UNet is told, a row for each prompt; eta: one for all, or one for each.

        A prompt may be another than the edit's own: then its embedding takes the target's place.
        """
        etas = np.broadcast_to(np.asarray(eta, np.float32), len(prompts))
        rows = [mix(self.towards(p), float(e)) for p, e in zip(prompts, etas, strict=True)]
        return {name: jnp.concatenate([row[name] for row in rows]) for name in rows[0]}

    def towards(self, prompt: str) -> Edit:
        """The edit with this prompt at its end; what the picture became stays."""
        if prompt == self.edit.prompt:
            return self.edit
        target = new_edit(self.pipe, prompt, self.edit.size, self.edit.clip_skip).target
        return dataclasses.replace(self.edit, prompt=prompt, target=target)


def load_edit(path: str | PurePath, dtype: Any = jnp.float32, **options: Any) -> Edited:
    """The edit in a folder, or in the workdir of the training that made it, with its model.

    dtype, options: of `jaxsd.load`. JaxsdError if there is none, if it is damaged, or if its base
    model is not to be found or is another than it was made with.
    """
    folder = edits.find(path)
    if folder is None:
        raise JaxsdError(f"{path} holds no edit: no {edits.FILE}, there or in {edits.MODEL}/")
    edit = edits.read(folder)
    if edit.base is None:
        pipe = load(folder, dtype, **options)
    else:
        try:
            pipe = load(dtype=dtype, **options, **edit.base)
        except JaxsdError as error:
            raise JaxsdError(f"the base model that {folder / edits.FILE} names: {error}") from None
        if (folder / lora_files.DIFFUSERS_FILE).is_file():
            pipe.add_lora(folder / lora_files.DIFFUSERS_FILE)
    if not pipe.tokenizers:
        raise JaxsdError(f"{folder / edits.FILE} names a model that reads no text")
    own = new_edit(pipe, "", edit.size, edit.clip_skip)
    if (has := _shapes(edit)) != (wants := _shapes(own)):
        raise JaxsdError(f"{folder} is an edit of another model: it has {has}, this takes {wants}")
    return Edited(pipe, edit)


def _shapes(edit: Edit) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in edit.target.items()}


def mix(edit: Edit, eta: float | Sequence[float]) -> Conditioning:
    """What lies between the picture (eta 0) and the prompt (1), and past them: [n, ...].

    eta: one for a row, or several for as many.
    """
    etas = np.atleast_1d(np.asarray(eta, np.float32))
    if etas.ndim != 1 or not np.isfinite(etas).all():
        raise JaxsdError(f"eta is a number, or several, not {eta}")

    picture, prompt = (
        {name: jnp.repeat(jnp.asarray(array), len(etas), 0) for name, array in told.items()}
        for told in (edit.optimised, edit.target)
    )
    return lerp(picture, prompt, etas.tolist())


def sample(
    edited: Edited,
    eta: float | Sequence[float] = ETA,
    seeds: int | Sequence[int] = 0,
    prompt: str | None = None,
    **options: Any,
) -> jax.Array:
    """Clean latents [n, h, w, c], one for each seed, from noise as in the paper.

    eta: one for all, or one for each. prompt: another than the edit's own. options: of
    `Pipeline.sample`, such as steps, guidance_scale, negative_prompt; the size is the picture's.
    """
    edit = edited.edit if prompt is None else edited.towards(prompt)
    height, width = edit.size
    how: dict[str, Any] = {"height": height, "width": width, **options}
    return edited.pipe.sample(edit.prompt, seeds, cond=mix(edit, eta), **how)


def strip(
    edited: Edited,
    etas: Sequence[float] = ETAS,
    seeds: Sequence[int] = (0, 1, 2, 3),
    picture: np.ndarray | None = None,
    **options: Any,
) -> np.ndarray:
    """A grid [H, W, 3]: a row for each seed, a column for each eta, before them the picture."""
    rows = []
    for seed in seeds:
        drawn = sample(edited, etas, [seed] * len(etas), **options)
        rows += [] if picture is None else [picture]
        rows += list(edited.pipe.decode_array(drawn))
    return pictures.tile(rows, len(rows) // len(seeds))


def prepare(
    pipe: Pipeline, picture: Picture, height: int | None = None, width: int | None = None
) -> np.ndarray:
    """The picture as the model is shown it: uint8 [h, w, 3], in its own shape and of the model's
    area, or of a given height and width."""
    downscale = pipe.vae.config.downscale if pipe.vae else 1
    unit, area = size_unit(pipe.unet.config, downscale), int(np.prod(pipe.default_size))
    if height is None or width is None:
        height, width = pictures.fitting_size(picture, area, unit, height, width)
    pipe.noise([0], height, width)  # which refuses a size that cannot be
    return pictures.to_uint8(pictures.to_model(picture, height, width))


def latents_of(pipe: Pipeline, picture: np.ndarray) -> jax.Array:
    """Latents [1, h, w, c] of what `prepare` gives: the VAE's mean.

    Not a draw: the embedding is to say this picture, and what would be drawn around it is far less
    than the noise that the loss adds.
    """
    return pipe.encode_pictures(pictures.to_model(picture, *picture.shape[:2])[None])
