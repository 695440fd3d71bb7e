"""Options that `sample.py` and `jaxsd compile` share, and what they do with them before the rest.

They say which model it is, how it is opened, and what is left out to be faster.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxsd.cli.several import Several, split
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """Mixed into a command's options."""

    guidance_interval: tuple[float, float] | None = None
    """Guide only where the noise level sigma / alpha is from the first to the second (inf for no
    limit): elsewhere one pass instead of two. Faster, another picture."""
    cache_every: int = 1
    """Compute the UNet's deep blocks in every so many steps alone. Faster, a little worse."""
    cache_branch: int = 0
    """Around how many skip connections, less one, the outer blocks are computed between them."""
    quantize: Literal["int8", "fp8"] | None = None
    """Keep the UNet's weights in eight bits: less memory, a little worse. LoRAs are merged."""
    controlnet: Several[str] = ()
    """A ControlNet's folder or Hub id; may be repeated, each with a --control-image."""
    lora: Several[str] = ()
    """A LoRA file, with its scale if it is not 1: style.safetensors:0.8; may be repeated."""
    textual_inversion: Several[str] = ()
    """A file of an embedding, with its token if it names none: cat.pt:<cat>; may be repeated."""
    variant: str | None = None
    """Which files of a folder that holds several, such as fp16."""
    family: str | None = None
    """What a single file holds where it cannot be told: sd2 or sd2-v."""
    config: str | None = None
    """For a single file: a diffusers folder with its configs."""
    tokenizer: str | None = None
    """For a single file: a folder with CLIP's vocabulary."""
    use_ema: bool = False
    """Take a single file's averaged weights, if it holds them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and computation."""
    vae_tile: int = 0
    """Decode in tiles with this side in latents (64, say): large pictures in little memory."""

    @property
    def shortcuts(self) -> Any:
        from jaxsd.shortcuts import Shortcuts

        return Shortcuts(self.guidance_interval, self.cache_every, self.cache_branch)

    def load(self, model: str) -> Any:
        """The pipeline, with all that is added to it; JaxsdError if they cannot go together."""
        from jaxsd import pipeline

        own = {"family": self.family, "config": self.config, "use_ema": self.use_ema}
        given = {name: value for name, value in own.items() if value}
        return self.complete(
            pipeline.load(model, **self.reading(), controlnets=self.controlnet, **given)
        )

    def reading(self) -> dict[str, Any]:
        """Of `jaxsd.load`'s arguments what holds of a refiner, too."""
        import jax.numpy as jnp

        dtype = getattr(jnp, self.dtype)
        return {"dtype": dtype, "variant": self.variant, "tokenizer": self.tokenizer}

    def complete(self, pipe: Any) -> Any:
        """A pipeline that was opened, with LoRAs and embeddings, quantised and told its tiles."""
        for text in self.lora:
            pipe.add_lora(*split(text, float, 1.0))
        for text in self.textual_inversion:
            pipe.add_embedding(*split(text, str, None))
        if self.quantize:
            if pipe.loras:
                pipe.merge_loras()
            pipe.quantize(self.quantize)
        pipe.vae_tile = self.vae_tile
        return pipe


SHORTCUTS = ("guidance_interval", "cache_every", "cache_branch")
# What says which model.
NAMES = tuple(f.name for f in dataclasses.fields(Shared) if f.name not in SHORTCUTS)


def check_writable(folder: Path) -> None:
    """Makes a folder for the results; JaxsdError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".jaxsd-writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process's, perhaps
    except OSError as error:
        raise JaxsdError(f"cannot write to {folder}: {error.strerror or error}") from None
