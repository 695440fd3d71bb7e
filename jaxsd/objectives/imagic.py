"""Imagic (Kawar et al. 2022, 2210.09276): a prompt's embedding, then the network, learn a picture.

Both stages minimise the loss that the model was trained with, of one picture, from the noise that
the step's key draws. A batch holds its latents, "latents" [b, h, w, c], as often as there are rows.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.components import Component, make_net
from jaxsd.diffusion.denoise import Conditioning
from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import Denoising, denoising_loss, loss_by_bucket
from jaxsd.objectives.text_to_image import check_trainable
from jaxsd.pictures import tile
from jaxsd.pipeline import Pipeline
from jaxsd.towers import Towers
from jaxsd.weights import edits
from jaxsd.weights.edits import Edit

PREVIEWS = 3  # seeds
DRAWS = 8  # of noise in each quarter of time, of which the reconstruction is measured


@dataclasses.dataclass
class Stage:
    """What both stages share.

    pipe: the model that is edited. edit: the embedding of the prompt, and what it has become.
    picture: uint8 [h, w, 3], to be shown beside what the model makes of it; None for no previews.
    dtype: in which the network computes. It runs without dropout, and is never told nothing.
    """

    pipe: Pipeline
    edit: Edit
    picture: np.ndarray | None = None
    dtype: str = "float32"

    def __post_init__(self):
        check(self.pipe)
        config: Any = dataclasses.replace(self.pipe.unet.config, dropout=0.0)
        self.net: Net = make_net(config)
        ids = self.pipe.size_ids(self.edit.size)
        self._sizes = {} if ids is None else {"time_ids": jnp.asarray([ids], jnp.float32)}
        self.aux: Any = self._aux()

    def _aux(self) -> Any:
        raise NotImplementedError

    def asked(self, params: Params, aux: Any) -> tuple[Params, Conditioning]:
        """The UNet's parameters, and what it is told, each [1, ...]."""
        raise NotImplementedError

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        """The model's own loss on the one picture's latents, told the embedding of this stage."""
        unet, told = self._told(params, aux, batch)
        x0, options = batch["latents"], Denoising(dtype=self.dtype)
        return denoising_loss(self.net, unet, self.pipe.schedule, x0, told, now.key, options)

    def loss_by_bucket(self, params: Params, aux: Any, batch: Batch, keys: jax.Array) -> jax.Array:
        """`denoising.loss_by_bucket`, [buckets, b]: each row with the noise of its own key."""
        unet, told = self._told(params, aux, batch)
        x0, options = batch["latents"], Denoising(dtype=self.dtype)
        return loss_by_bucket(self.net, unet, self.pipe.schedule, x0, told, keys, options)

    def _told(self, params: Params, aux: Any, batch: Batch) -> tuple[Params, Conditioning]:
        unet, told = self.asked(params, aux)
        rows = len(batch["latents"])
        return unet, {n: jnp.broadcast_to(v, (rows, *v.shape[1:])) for n, v in told.items()}

    def pipeline(self, unet: Params) -> Pipeline:
        """The model with this UNet."""
        return with_unet(self.pipe, unet)

    def preview(self, params: Params) -> np.ndarray | None:
        """The picture, and beside it what the network draws where it is told the embedding."""
        if self.picture is None:
            return None
        unet, told = self.asked(params, self.aux)
        pipe = self.pipeline(unet)
        noise = pipe.noise(range(PREVIEWS), *self.edit.size)
        cond = {n: jnp.repeat(jnp.asarray(v), PREVIEWS, 0) for n, v in told.items()}
        latents = pipe.denoise(noise, cond, None, steps=20, guidance_scale=1.0, sampler="ddim")
        drawn = pipe.decode_array(latents)
        return tile([self.picture, *drawn], 1 + PREVIEWS)


class Embedding(Stage):
    """First stage: the embedding is trained, from the prompt's own; the UNet is frozen.

    Parameters: encoder_hidden_states [1, t, d] and, for Stable Diffusion XL, text_embeds [1, p].
    """

    def _aux(self) -> Any:
        unet = self.pipe.params["unet"]
        # What the network computes in; vectors stay, as norms compute in float32
        kept = {n: p.astype(jnp.dtype(self.dtype)) if p.ndim > 1 else p for n, p in unet.items()}
        return {"unet": kept, "sizes": self._sizes}

    def init(self, key: jax.Array) -> Params:
        return {name: jnp.asarray(array) for name, array in self.edit.target.items()}

    def asked(self, params: Params, aux: Any) -> tuple[Params, Conditioning]:
        return aux["unet"], {**params, **aux["sizes"]}

    def export(self, params: Params, folder: str | Path) -> None:
        """An edit of the base model as it is."""
        edits.save(dataclasses.replace(self.edit, optimised=on_host(params)), folder)


class Tuning(Stage):
    """Second stage: the UNet is trained; what it is told, the embedding, is frozen."""

    def _aux(self) -> Any:
        told = {name: jnp.asarray(array) for name, array in self.edit.optimised.items()}
        return {"told": told, "sizes": self._sizes}

    def init(self, key: jax.Array) -> Params:
        return self.pipe.params["unet"]

    def asked(self, params: Params, aux: Any) -> tuple[Params, Conditioning]:
        return params, {**aux["told"], **aux["sizes"]}

    def export(self, params: Params, folder: str | Path) -> None:
        """An edit with the whole model, unless it has a base: then the factors are there already.

        `edit.json` comes last.
        """
        if self.edit.base is None:
            self.pipeline(params).save(folder)
        edits.save(self.edit, folder)


def check(pipe: Pipeline) -> None:
    """JaxsdError for a model that Imagic cannot edit, or would spoil."""
    if not pipe.tokenizers:
        raise JaxsdError("Imagic changes what a prompt says: this model reads no text")
    if pipe.guidance_embedded:
        raise JaxsdError(
            "this UNet was distilled with its guidance (LCM), which the denoising loss would undo: "
            "edit with the model it came from"
        )
    check_trainable(pipe.unet.config, Towers(pipe.components, pipe.tokenizers))


def with_unet(pipe: Pipeline, params: Params) -> Pipeline:
    """Another pipeline of the same model, but for the weights of its UNet."""
    parts = pipe.components | {"unet": Component(pipe.unet, params)}
    schedule, zero = pipe.schedule, pipe.zero_empty_prompt
    return Pipeline(schedule=schedule, zero_empty_prompt=zero, **parts, **pipe.tokenizers)


def new_edit(pipe: Pipeline, prompt: str, size: tuple[int, int], clip_skip: int = 0) -> Edit:
    """The edit before any training: the embedding is the prompt's. size: height, width."""
    told = pipe.encode([prompt], clip_skip)
    target = on_host({name: told[name] for name in edits.NAMES if name in told})
    return Edit(prompt, target, target, size, clip_skip)


def on_host(told: Any) -> edits.Told:
    """An embedding as float32 arrays of numpy, of which an edit is made."""
    return {name: np.array(value, np.float32) for name, value in told.items()}


def reconstruction_error(
    stage: Any, params: Params, aux: Any, latents: jax.Array
) -> dict[str, jax.Array]:
    """The loss of latents [1, h, w, c] at noise that is always the same: "loss", and by quarters.

    stage: a stage, or what trains factors for one. For `jit`.
    """
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rows = {"latents": jnp.broadcast_to(latents, (DRAWS, *latents.shape[1:]))}
    losses = stage.loss_by_bucket(params, aux, rows, keys).mean(1)
    return {"loss": losses.mean(), **{f"loss_t{i}": loss for i, loss in enumerate(losses)}}
