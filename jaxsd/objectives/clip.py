"""Contrastive training of a text and a picture tower (Radford et al. 2021, figure 3)."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import weights
from jaxsd.components import make_net, save_component
from jaxsd.errors import JaxsdError
from jaxsd.models import CLIPModel, CLIPTextConfig, CLIPVisionConfig
from jaxsd.models.config import short
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch, Now
from jaxsd.tokenizer import Tokenizer

SCALE = "logit_scale"
MAX_SCALE = np.float32(math.log(100))  # the temperature's least is 1/100 (section 2.5)
BICUBIC = 3  # as PIL counts


def contrastive_loss(
    text: jax.Array, image: jax.Array, scale: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric cross-entropy of the cosine similarities of unit features [b, p] each.

    Row i of one belongs to row i of the other; all other pairs count as wrong, wherever they are:
    with a batch that is split over n devices, each gathers the other tower's features and holds
    b/n rows of the [b, b] similarities, for which XLA needs no telling.
    """
    logits = scale * jnp.einsum("ip,jp->ij", text, image)
    pair = jnp.arange(len(text))
    # Not jnp.diagonal, whose indices would be gathered by every device
    own = jnp.where(pair[:, None] == pair[None], logits, 0.0).sum(1)
    loss_text = (jax.nn.logsumexp(logits, axis=1) - own).mean()
    loss_image = (jax.nn.logsumexp(logits, axis=0) - own).mean()
    top1 = (logits.argmax(1) == pair).astype(logits.dtype).mean()
    return (loss_text + loss_image) / 2, {"top1": top1, "temperature": 1 / scale}


@dataclasses.dataclass(frozen=True)
class PixelStatistics:
    """What a picture tower's pixels are, of those in [0, 1]: (pixel - mean) / std, by channel.

    The default is [-1, 1], as everywhere else here; OpenAI's towers have others.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Of pictures [b, h, w, 3] in [-1, 1]."""
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        scale, shift = (jnp.asarray(v)[None, None, None] for v in (0.5 / std, (0.5 - mean) / std))
        return pictures * scale + shift

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "PixelStatistics":
        """Of a preprocessor_config.json; JaxsdError for what no such statistics can say."""
        if not values.get("do_normalize", True):
            return cls((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        found = []
        for name in ("image_mean", "image_std"):
            value = values.get(name)
            if (
                not isinstance(value, list)
                or len(value) != 3
                or not all(type(v) in (int, float) and abs(v) <= 100 for v in value)
                or (name == "image_std" and min(value) <= 0)
            ):
                raise JaxsdError(f"{where}: {name} is {short(value)}, not three such numbers")
            found.append(tuple(map(float, value)))
        if not math.isclose(values.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise JaxsdError(f"{where}: unsupported rescale_factor, which is not 1/255")
        return cls(*found)

    def to_json(self, size: int) -> dict[str, Any]:
        """preprocessor_config.json, by which transformers prepares pictures for such a tower."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


@dataclasses.dataclass
class CLIP:
    """Batches hold "input_ids" [b, 77] and "image" [b, h, w, 3] in [-1, 1].

    Exports the text tower and the tokenizer as a pipeline has them, and in `clip/` what
    transformers' CLIPModel and CLIPProcessor open: both towers, tokenizer and pixel statistics.
    """

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    tokenizer: Tokenizer
    initial: Params | None = None
    statistics: PixelStatistics = PixelStatistics()
    dtype: str = "float32"  # in which the towers compute; similarities and the loss are float32

    def __post_init__(self):
        size, end = len(self.tokenizer), self.tokenizer.eos_token_id
        self.text = dataclasses.replace(self.text, vocab_size=size, eos_token_id=end)
        self.net = Net(CLIPModel(self.text, self.vision))
        self.aux: Any = ()

    def init(self, key: jax.Array) -> Params:
        return self.constrain(self.net.init(key) if self.initial is None else self.initial)

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        """`contrastive_loss` of a batch: image [b, h, w, 3] in [-1, 1], input_ids [b, t]."""
        # At the limit the slope is whole, so that the scale can come down again
        beyond = params[SCALE] - jax.lax.stop_gradient(params[SCALE])
        limited = jnp.where(params[SCALE] > MAX_SCALE, MAX_SCALE + beyond, params[SCALE])
        pictures = self.statistics(batch["image"]).astype(self.dtype)
        text = self.net(params, batch["input_ids"], method="text_features")
        image = self.net(params, pictures, method="image_features")
        return contrastive_loss(_unit(text), _unit(image), jnp.exp(limited))

    def constrain(self, params: Params) -> Params:
        """What the step does after each update: the temperature may not fall below 1/100."""
        if SCALE not in params:  # frozen
            return params
        return params | {SCALE: jnp.minimum(params[SCALE], MAX_SCALE)}

    def preview(self, params: Params) -> np.ndarray | None:
        return None

    def export(self, params: Params, folder: str | Path) -> None:
        folder, params = Path(folder), self.constrain(params)
        net = make_net(self.text)
        tower = {name: params[name] for name in net.shapes}
        save_component(folder / "text_encoder", net, tower)
        config = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.text.projection_dim,
            "text_config": self.text.to_json(),
            "vision_config": self.vision.to_json(),
        }
        clip = folder / "clip"
        weights.write_json(clip / "config.json", config)
        pixels = self.statistics.to_json(self.vision.image_size)
        weights.write_json(clip / "preprocessor_config.json", pixels)
        for place in (folder / "tokenizer", clip):
            self.tokenizer.save(place)
        weights.save(params, clip, weights.TRANSFORMERS_FILE)


def _unit(features: jax.Array) -> jax.Array:
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
