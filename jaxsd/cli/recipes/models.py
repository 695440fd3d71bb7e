"""Which model a recipe starts from: a checkpoint of any kind, or parts of several."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Where the networks come from that a latent training needs."""

    model: str | None = None
    """A model to start from: a folder, a single file, a Hub id or the name of one that ships."""
    vae: Path | None = None
    """A folder with vae/, such as the `model` of a VAE training; in place of the model's own."""
    text_encoder: Path | None = None
    """A folder with text_encoder/ and tokenizer/ (for XL also text_encoder_2/ and tokenizer_2/),
    such as the `model` of a CLIP training; in place of the model's own."""
    variant: str | None = None
    """Which files of a model's folder that holds several, such as fp16."""
    config: str | None = None
    """For a single file: a diffusers folder with its configs."""
    tokenizer: str | None = None
    """For a single file: a folder with CLIP's vocabulary."""
    use_ema: bool = False
    """Start from a single file's averaged weights, if it holds them."""

    def load(self, family: str | None, only: Collection[str], latent: bool = True) -> Any:
        """The model's parts, `jaxsd.components.Parts`, as far as they are in `only`, in float32.

        Without a model there are VAE and text encoders alone, and the schedule of the family.
        JaxsdError for a model without VAE, if it must be `latent`.
        """
        import jax.numpy as jnp

        from jaxsd import components
        from jaxsd.families import get_family
        from jaxsd.vocabulary import open_tokenizer

        if self.model is None:
            if self.vae is None or self.text_encoder is None:
                raise JaxsdError(
                    "give --model, or --vae and --text-encoder, each a trained model folder"
                )
            parts = components.Parts({}, get_family(family or "digits").schedule, {}, {})
        else:
            parts = components.load_parts(
                self.model,
                jnp.float32,
                self.variant,
                family=family,
                config=self.config,
                tokenizer=self.tokenizer,
                use_ema=self.use_ema,
                only=only,
            )
        found, words = dict(parts.components), dict(parts.tokenizers)
        if self.vae is not None:
            found["vae"] = components.load_component(self.vae / "vae", jnp.float32)
        if self.text_encoder is not None:
            for tower, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
                folder = self.text_encoder / tower
                if tower == "text_encoder" or folder.is_dir():
                    found[tower] = components.load_component(folder, jnp.float32)
                    words[name] = open_tokenizer(self.text_encoder / name)
        if latent and "vae" not in found:
            raise JaxsdError(f"{self.model} is no latent model: it has no VAE")
        return dataclasses.replace(parts, components=found, tokenizers=words)


def check_undistilled(unet: Any) -> None:
    """JaxsdError for the config of a UNet that is told the guidance scale."""
    if getattr(unet, "time_cond_proj_dim", None) is not None:
        raise JaxsdError(
            "this UNet was distilled with its guidance (LCM), which a plain denoising loss would "
            "undo: take the model that it came from"
        )
