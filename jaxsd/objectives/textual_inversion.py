"""Textual inversion (Gal et al. 2022, 2208.01618): a new word is learnt, and nothing else.

What is trained are the vectors that the word stands for, new rows behind each text encoder's table
of tokens. The model itself is an argument of the loss and stays as it is.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import preview
from jaxsd.objectives.text_to_image import TextToImage
from jaxsd.pipeline import Pipeline
from jaxsd.tokenizer import Tokenizer
from jaxsd.towers import TEXT, Towers
from jaxsd.weights import embeddings
from jaxsd.weights.embeddings import Embedding

ROWS = ".token_embedding.weight"  # behind a text encoder's name: its new rows


@dataclasses.dataclass
class TextualInversion:
    """Trains the vectors of a new word, and freezes the model.

    base: of that model, with its UNet as `initial`; it does not know the word. Batches are those of
    `base`, their captions read by `tokenize`, which does. initialize_from: a word of one token,
    whose vector all the new ones begin as. vectors: how many there are. dtype: in which networks
    compute. whole_model: whether the exported folder holds the model as well, with its new word.

    The parameters are the new rows alone: "text_encoder.token_embedding.weight" [vectors, d] and,
    for Stable Diffusion XL, those of "text_encoder_2".
    """

    base: TextToImage
    token: str
    initialize_from: str
    vectors: int = 1
    dtype: str = "float32"
    whole_model: bool = False

    def __post_init__(self):
        if self.vectors < 1:
            raise JaxsdError(f"vectors must be at least 1, not {self.vectors}")
        assert self.base.initial is not None
        towers, names = self.base.towers, embeddings.token_names(self.token, self.vectors)
        self._words = {tower: towers.tokenizers[TEXT[tower]] for tower in towers.text}
        for known in self._words.values():
            _check_token(self.token, known)
            _one_token(self.initialize_from, known)
        taught = {TEXT[tower]: known.with_tokens(names) for tower, known in self._words.items()}
        self.tokenize = Towers(towers.components, taught).tokenize
        kept = self.base.initial.items()
        unet = {n: v.astype(jnp.dtype(self.dtype)) if v.ndim > 1 else v for n, v in kept}
        self.aux: Any = {"base": self.base.aux, "unet": unet}

    @property
    def net(self) -> Net:
        return self.base.net

    def init(self, key: jax.Array) -> Params:
        rows = {}
        for tower, known in self._words.items():
            params = self.base.towers.params[tower]
            table = params[embeddings.table_name(params)]
            row = _one_token(self.initialize_from, known)
            rows[tower + ROWS] = jnp.tile(table[row : row + 1], (self.vectors, 1))
        return rows

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        """The base's own, with the new rows behind the table of each text encoder."""
        towers = {
            tower: embeddings.with_rows(aux["base"][tower], len(known), params[tower + ROWS])
            for tower, known in self._words.items()
        }
        return self.base.loss(aux["unet"], {**aux["base"], **towers}, batch, now)

    def embedding(self, params: Params) -> Embedding:
        """The word as `embeddings.save` and `Pipeline.add_embedding` take it."""
        return Embedding(self.token, {t: np.asarray(params[t + ROWS]) for t in self._words})

    def pipeline(self, params: Params) -> Pipeline:
        assert self.base.initial is not None
        pipe = self.base.pipeline(self.base.initial)
        pipe.add_embedding(self.embedding(params))
        return pipe

    def preview(self, params: Params) -> np.ndarray:
        """As of `base`."""
        pipe = self.pipeline(params)
        prompts = self.base.preview_prompts
        return preview(pipe, prompts, steps=20, guidance_scale=3.0, sampler="ddim")

    def export(self, params: Params, folder: str | Path) -> None:
        """The word in every form that there is for it: diffusers' and A1111's, or XL's."""
        word = self.embedding(params)
        for form in ("sdxl",) if self.base.towers.xl else ("diffusers", "a1111"):
            embeddings.save(word, folder, form)
        if self.whole_model:
            self.pipeline(params).save(folder)


def _check_token(token: str, words: Tokenizer) -> None:
    if not re.fullmatch(r"[^\s/()]+", token):
        raise JaxsdError(
            f"token: {token!r} cannot be one: it is a word without blanks, slashes and "
            "parentheses, such as <cat>"
        )
    if len(words.ids(token)) == 1:
        raise JaxsdError(f"token: {token!r} is a token already: choose another, such as <{token}>")


def _one_token(word: str, words: Tokenizer) -> int:
    """The id of a word; JaxsdError if it is not exactly one token."""
    ids = words.ids(word)
    if len(ids) != 1:
        pieces = ", ".join(words.tokens(word)[1:-1]) or "none"
        raise JaxsdError(
            f"initialize_from is a word that the tokenizer has as one token; {word!r} it has as "
            f"{len(ids)}: {pieces}"
        )
    return ids[0]
