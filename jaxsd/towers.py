"""What a training asks of networks that it does not train: moments of pictures, states of captions.

`Towers` is code alone; the weights go in with each call, so that it may stand inside `jit`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsd.components import Component
from jaxsd.conditioning import encode_text
from jaxsd.errors import JaxsdError
from jaxsd.models import VAEConfig
from jaxsd.nn import Params
from jaxsd.tokenizer import Tokenizer

# The text encoders in the UNet's order, and the tokenizer of each.
TEXT = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# Not of the weights that make latents and embeddings, or not of what they are made of
UNREAD = ("scaling_factor", "sample_size")
PROBES = (
    "",
    "A photograph of an astronaut riding a horse",
    "0 1 2 3456789 (red:1.2), a blue three!",
)


class Towers:
    """The VAE and the text encoders of a model, and their tokenizers.

    components: "vae", "text_encoder", "text_encoder_2", as many as there are; others are left out.
    tokenizers: "tokenizer", "tokenizer_2". JaxsdError if the VAE gives no moments.
    """

    def __init__(self, components: Mapping[str, Component], tokenizers: Mapping[str, Tokenizer]):
        names = [name for name in ("vae", *TEXT) if name in components]
        self.components = {name: components[name] for name in names}
        self.nets = {name: part.net for name, part in self.components.items()}
        self.params = {name: part.params for name, part in self.components.items()}
        self.text = [name for name in names if name in TEXT]
        self.tokenizers = {TEXT[name]: tokenizers[TEXT[name]] for name in self.text}
        if not self.text or "vae" not in names:
            raise JaxsdError("latents and captions need a VAE and a text encoder")
        lengths = {self.nets[name].config.max_position_embeddings for name in self.text}
        if len(lengths) > 1:
            raise JaxsdError(
                f"text encoders of different lengths ({lengths}) cannot be read together"
            )
        self.length = lengths.pop()  # tokens
        if not isinstance(self.nets["vae"].config, VAEConfig):
            raise JaxsdError(
                "latents need an AutoencoderKL: this VAE gives no variance to draw from"
            )

    @property
    def xl(self) -> bool:
        """Whether text is read as Stable Diffusion XL does, with a pooled embedding."""
        return "text_encoder_2" in self.nets

    @property
    def scaling_factor(self) -> float:
        """What the UNet's latents are the VAE's times."""
        return self.nets["vae"].config.scaling_factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """[h, w, c] of the latents of a picture (height, width); JaxsdError if it has none."""
        config = self.nets["vae"].config
        if any(side % config.downscale for side in size):
            raise JaxsdError(
                f"pictures of {size[0]}x{size[1]} have no latents: sides must be multiples of "
                f"{config.downscale}, which --resolution decides"
            )
        return size[0] // config.downscale, size[1] // config.downscale, config.latent_channels

    def tokenize(self, captions: Sequence[str]) -> np.ndarray:
        """Ids, int32 [n, k, t], for k text encoders. What is longer is cut, with a warning."""
        return np.stack(
            [self.tokenizers[TEXT[name]](captions, self.length) for name in self.text], 1
        )

    def moments(self, params: Params, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance [b, h, w, c] of pictures [b, H, W, 3] in [-1, 1], unscaled."""
        return self.nets["vae"](params, pictures, method="encode")

    def states(
        self, params: Mapping[str, Params], ids: Int[Array, "b k t"]
    ) -> dict[str, jax.Array]:
        """What the UNet is told of captions: encoder_hidden_states [b, t, d], text_embeds [b, p].

        params: of every text encoder. The latter for Stable Diffusion XL alone.
        """
        nets, weights = [self.nets[n] for n in self.text], [params[n] for n in self.text]
        tokens = [(row, jnp.ones(row.shape, jnp.float32)) for row in jnp.split(ids, len(nets), 1)]
        states, pooled = encode_text(nets, weights, tokens, 0, self.xl)
        told = {"encoder_hidden_states": states}
        return told if pooled is None else told | {"text_embeds": pooled}

    def fingerprints(self) -> dict[str, str]:
        """Of what decides latents ("vae") and embeddings ("text"): equal for equal weights.

        Of the VAE the encoder alone counts, whose decoder may be another, finer one.
        """
        vae = {
            name: value
            for name, value in self.params["vae"].items()
            if name.startswith(("encoder.", "quant_conv."))
        }
        words = [[each.ids(text) for text in PROBES] for each in self.tokenizers.values()]
        ids = json.dumps([words, self.tokenize([""]).tolist()])  # which also tells the padding
        text = [hashlib.sha256(ids.encode()).hexdigest()]
        text += [_fingerprint(self.nets[name].config, self.params[name]) for name in self.text]
        return {
            "vae": _fingerprint(self.nets["vae"].config, vae)[:16],
            "text": hashlib.sha256(" ".join(text).encode()).hexdigest()[:16],
        }


def _fingerprint(config: Any, params: Params) -> str:
    values = {name: value for name, value in config.to_json().items() if name not in UNREAD}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(np.asarray(params[name], np.float32).tobytes())
    return digest.hexdigest()
