"""Latent diffusion from text (Rombach et al. 2022; Podell et al. 2023 for Stable Diffusion XL)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsd.components import Component, make_net
from jaxsd.conditioning import Sizes
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.models import UNet2DConfig, UNetConfig
from jaxsd.nn import Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import (
    Denoising,
    Example,
    denoising_errors,
    loss_by_bucket,
    preview,
    with_dropout,
)
from jaxsd.pipeline import Pipeline
from jaxsd.towers import Towers

Told = dict[str, jax.Array]


@dataclasses.dataclass
class TextToImage:
    """The UNet of a latent model is trained and, with `train_text`, its text encoders; not its VAE.

    A batch holds pictures, "image" [b, h, w, 3] in [-1, 1], and "input_ids" [b, k, t] for each of
    k text encoders; or, with `cached`, what became of them: "mean" and "logvar" [b, h, w, c] of the
    unscaled latents, of which new ones are drawn at each step, and "encoder_hidden_states"
    [b, t, d] (for XL also "text_embeds" [b, p]). XL's batches hold "original_size", "crop" and
    "target_size" too, int32 [b, 2] each, which may be left out of whole pictures.

    A share `caption_dropout` of the captions is replaced by the empty one, which is what guidance
    contrasts, or by zeros where the model has these in its place (`zero_empty_prompt`).

    Parameters have the UNet's names; those of a text encoder stand behind "text_encoder." or
    "text_encoder_2.".
    """

    unet: UNetConfig
    schedule: Schedule
    towers: Towers
    zero_empty_prompt: bool = False
    cached: bool = False
    train_text: bool = False
    denoising: Denoising = Denoising()
    caption_dropout: float = 0.1
    preview_prompts: Sequence[str] = ("",)
    initial: Params | None = None

    def __post_init__(self):
        self.net = make_net(self.unet)
        check_trainable(self.unet, self.towers)
        if self.cached and self.train_text:
            raise JaxsdError("text encoders are trained from pictures: no gradient leads through a "
                             "cache of what they said")  # fmt: skip
        ids = self.towers.tokenize([""])
        if self.cached:
            self.aux: Any = {"empty": jax.jit(self._nothing)(self.towers.params, ids)}
        elif self.train_text:
            self.aux = {"empty_ids": jnp.asarray(ids), "vae": self.towers.params["vae"]}
        else:
            empty = jax.jit(self._nothing)(self.towers.params, ids)
            self.aux = {"empty": empty, **self.towers.params}

    def _nothing(self, params: Mapping[str, Params], ids: jax.Array) -> Told:
        """What the UNet is told, [1, ...], where a caption is left out; ids: of the empty one."""
        states = self.towers.states(params, ids)
        return jax.tree.map(jnp.zeros_like, states) if self.zero_empty_prompt else states

    def init(self, key: jax.Array) -> Params:
        params = self.net.init(key) if self.initial is None else self.initial
        if not self.train_text:
            return params
        towers = {name: self.towers.params[name] for name in self.towers.text}
        text = {f"{tower}.{name}": v for tower, own in towers.items() for name, v in own.items()}
        return {**text, **params}

    def _text_params(self, params: Params) -> dict[str, Params]:
        """The text encoders' share of the trained parameters, under their own names."""
        return {
            tower: {name: params[f"{tower}.{name}"] for name in self.towers.nets[tower].shapes}
            for tower in (self.towers.text if self.train_text else ())
        }

    def example(self, params: Params, aux: Any, batch: Batch, key: jax.Array) -> Example:
        """The latents are drawn of their moments, all with `key`, or each with its own [b]."""
        mean, logvar, cond = self._encoded(params, aux, batch)
        if key.ndim:
            noise = jax.vmap(lambda own: jax.random.normal(own, mean.shape[1:]))(key)
        else:
            noise = jax.random.normal(key, mean.shape)
        latents = (mean + jnp.exp(0.5 * logvar) * noise) * self.towers.scaling_factor
        text = self._text_params(params)
        empty = self._nothing(text, aux["empty_ids"]) if self.train_text else aux["empty"]
        uncond = {name: jnp.broadcast_to(empty[name], cond[name].shape) for name in cond}
        if self.towers.xl:
            cond["time_ids"] = uncond["time_ids"] = self._time_ids(batch, mean)
        return Example(latents, cond, uncond)

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        """The mean of `errors` over the batch."""
        errors, logged = self.errors(params, aux, batch, now)
        return errors.mean(), logged

    def errors(
        self, params: Params, aux: Any, batch: Batch, now: Now
    ) -> tuple[Float[Array, " b"], dict[str, jax.Array]]:
        """The loss of each example, and `denoising_errors`' share of the log."""
        key_latent, key_caption, key = jax.random.split(now.key, 3)
        example = self.example(params, aux, batch, key_latent)
        told = with_dropout(example, self.caption_dropout, key_caption)
        return denoising_errors(
            self.net, params, self.schedule, example.x0, told, key, self.denoising
        )

    def loss_by_bucket(self, params: Params, aux: Any, batch: Batch, keys: jax.Array) -> jax.Array:
        """For held-out pictures: `denoising.loss_by_bucket`, [buckets, b], with all captions.

        The latents are drawn with each picture's own key, too.
        """
        own = jax.vmap(lambda key: jax.random.fold_in(key, 1 << 16))(keys)
        example, options = self.example(params, aux, batch, own), self.denoising
        return loss_by_bucket(
            self.net, params, self.schedule, example.x0, example.cond, keys, options
        )

    def _encoded(self, params: Params, aux: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Told]:
        """Mean and log variance of the latents, and what the captions tell the UNet."""
        if self.cached:
            mean, logvar = (batch[name].astype(jnp.float32) for name in ("mean", "logvar"))
            return mean, logvar, {name: batch[name].astype(jnp.float32) for name in aux["empty"]}
        moments = self.towers.moments(aux["vae"], batch["image"])
        return *moments, self.towers.states(self._text_params(params) or aux, batch["input_ids"])

    def _time_ids(self, batch: Batch, latents: jax.Array) -> jax.Array:
        """[b, 6]: original size, crop and target size (2307.01952, section 2.2)."""
        if "crop" not in batch:
            sides = [side * self.towers.nets["vae"].config.downscale for side in latents.shape[1:3]]
            whole = jnp.array([*sides, 0, 0, *sides], jnp.float32)
            return jnp.broadcast_to(whole[None], (len(latents), 6))
        known = [batch[name] for name in ("original_size", "crop", "target_size")]
        return jnp.concatenate(known, 1).astype(jnp.float32)

    def pipeline(self, params: Params) -> Pipeline:
        """What draws with these parameters; the text encoders' are among them if trained."""
        components = dict(self.towers.components)
        for tower, own in self._text_params(params).items():
            components[tower] = Component(components[tower].net, own)
            params = {n: value for n, value in params.items() if not n.startswith(f"{tower}.")}
        return Pipeline(
            Component(self.net, params),
            self.schedule,
            zero_empty_prompt=self.zero_empty_prompt,
            **components,
            **self.towers.tokenizers,
        )

    def preview(self, params: Params) -> np.ndarray:
        """Four seeds of each preview prompt, at guidance 3."""
        pipe = self.pipeline(params)
        prompts = self.preview_prompts
        return preview(pipe, prompts, steps=20, guidance_scale=3.0, sampler="ddim")

    def export(self, params: Params, folder: str | Path) -> None:
        self.pipeline(params).save(folder)


def check_trainable(unet: UNetConfig | UNet2DConfig, towers: Towers) -> None:
    """Refuses with a JaxsdError what would need other batches or another loss."""
    channels = towers.nets["vae"].config.latent_channels
    if isinstance(unet, UNet2DConfig) or not unet.text_conditional:
        raise JaxsdError("this UNet reads no text")
    if unet.in_channels != channels:
        kind = {9: "an inpainting", 8: "an InstructPix2Pix"}.get(unet.in_channels, "another")
        raise JaxsdError(
            f"this UNet takes {unet.in_channels} channels where the latents have {channels}: it is "
            f"of {kind} model, which text-to-image does not train"
        )
    if unet.class_conditional:
        raise JaxsdError("this UNet is told classes, which text-to-image does not give")
    xl = unet.addition_embed_type == "text_time"
    if xl != towers.xl:
        raise JaxsdError(
            "Stable Diffusion XL has two text encoders, and others one: this UNet takes "
            f"{'two' if xl else 'one'}, and there {'are two' if towers.xl else 'is one'}"
        )
    if xl:
        pooled = towers.nets["text_encoder_2"].config.projection_dim
        if len(Sizes().ids(unet, pooled, (8, 8), negative=False)) != 6:
            raise JaxsdError(
                "Stable Diffusion XL's refiner is told an aesthetic score, which pictures do not "
                "come with: train the base model"
            )
