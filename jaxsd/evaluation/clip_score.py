"""CLIP score: how well pictures show what their captions say, to a CLIP model (Hessel et al. 2021).

The score is 100 max(cos, 0), the mean over pairs, of the cosine between a picture's and its
caption's features (arXiv:2104.08718, eq. 1). The paper weighs by w = 2.5 in place of 100, so that
its CLIPScore is a fortieth of this one; tables of text-to-image models, and torchmetrics, have 100
(or leave it out, as .30 for 30). Only scores by the same CLIP can be compared.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxsd.components import Component, image_processor, load_clip
from jaxsd.errors import JaxsdError
from jaxsd.evaluation.features import Batched, coloured
from jaxsd.models.config import short
from jaxsd.nn import Params
from jaxsd.tokenizer import Tokenizer
from jaxsd.vocabulary import open_tokenizer
from jaxsd.weights.files import AnyPath, as_path

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture is made ready: as transformers' CLIPImageProcessor does with such a file."""

    size: int  # pixels of the shorter side
    crop: int  # a side of the square that is cut out of the middle
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """float32 [crop, crop, 3] of a uint8 picture [h, w, 1 or 3]."""
        image = Image.fromarray(np.ascontiguousarray(coloured(picture)))
        shorter = min(image.size)
        width, height = (self.size if side == shorter else int(self.size * side / shorter)
                         for side in image.size)  # fmt: skip
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        image = image.crop((left, top, left + self.crop, top + self.crop))
        x = np.asarray(image, np.float32) / np.float32(255)
        return (x - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def read_preprocessing(folder: AnyPath) -> Preprocessing:
    """What (pre)processor_config.json says; JaxsdError for what is not supported."""
    values, file = image_processor(folder)
    neutral = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
               "resample": 3, "rescale_factor": 1 / 255}  # fmt: skip
    for name, wanted in neutral.items():
        value = values.get(name, wanted)
        if type(value) not in (bool, int, float) or not math.isclose(value, wanted, rel_tol=1e-6):
            raise JaxsdError(f"{file}: unsupported {name}={short(value)} (supported: {wanted})")
    size: Any = values.get("size")
    crop: Any = values.get("crop_size")
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    if isinstance(crop, dict):
        crop = crop.get("height") if crop.get("height") == crop.get("width") else None
    if not all(type(side) is int and 1 <= side <= 4096 for side in (size, crop)) or crop > size:
        raise JaxsdError(
            f"{file}: size {short(values.get('size'))} and crop_size "
            f"{short(values.get('crop_size'))} are not a shortest edge and a square within it"
        )
    scales = []
    for name in ("image_mean", "image_std"):
        value = values.get(name)
        if not isinstance(value, list) or len(value) != 3 or not all(
            type(v) in (int, float) and math.isfinite(v) for v in value
        ):  # fmt: skip
            raise JaxsdError(f"{file}: {name} is {short(value)}, not three numbers")
        scales.append(tuple(map(float, value)))
    if not all(scales[1]):
        raise JaxsdError(f"{file}: image_std holds a zero")
    return Preprocessing(size, crop, *scales)


@dataclasses.dataclass(frozen=True)
class ClipJudge:
    """A CLIP model with its tokenizer and its way of looking at pictures."""

    clip: Component
    tokenizer: Tokenizer
    preprocessing: Preprocessing

    @functools.cached_property
    def _programs(self) -> dict[str, Batched]:
        def unit(method: str):
            def features(params: Params, x: jax.Array) -> jax.Array:
                y = self.clip.net(params, x, method=method)
                return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

            return Batched(features, BATCH)

        return {name: unit(name) for name in ("image_features", "text_features")}

    def image_features(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Unit features [n, p] of uint8 pictures [h, w, c] of any size."""
        prepared = np.stack([self.preprocessing(picture) for picture in pictures])
        return self._programs["image_features"](self.clip.params, prepared)

    def text_features(self, captions: Sequence[str]) -> np.ndarray:
        """Unit features [n, p] of captions, cut at the tower's length."""
        length = self.clip.net.shapes["text_model.embeddings.position_embedding.weight"][0]
        return self._programs["text_features"](self.clip.params, self.tokenizer(captions, length))

    def cosines(self, pictures: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str]) -> Any:
        """Of each picture and its caption, float [n]."""
        if len(pictures) != len(captions):
            raise JaxsdError(f"{len(pictures)} pictures, but {len(captions)} captions")
        return (self.image_features(pictures) * self.text_features(captions)).sum(axis=1)


def clip_score(cosines: np.ndarray) -> float:
    """100 max(cos, 0), the mean over pairs."""
    return float(100 * np.maximum(cosines, 0).mean())


def load_judge(folder: str | os.PathLike) -> ClipJudge:
    """Reads a CLIPModel's folder: weights, preprocessor_config.json, and the tokenizer's files.

    The tokenizer may also stand beside the folder, as `train.py clip` and pipelines have it.
    """
    path = as_path(folder)
    clip = load_clip(path)
    own = any((path / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    place = path if own else path.parent / "tokenizer"
    return ClipJudge(clip, open_tokenizer(place), read_preprocessing(path))
