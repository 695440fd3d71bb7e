"""Contrastive training of a text and a picture tower (Radford et al. 2021, figure 3)."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import weights
from jaxsd.components import save_component
from jaxsd.models import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch
from jaxsd.tokenizer import Tokenizer


def contrastive_loss(
    text: jax.Array, image: jax.Array, scale: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric cross-entropy of the cosine similarities of unit features [b, p] each.

    Row i of one belongs to row i of the other; all other pairs count as wrong.
    """
    logits = scale * jnp.einsum("ip,jp->ij", text, image)
    own = jnp.diagonal(logits)
    loss_text = (jax.nn.logsumexp(logits, axis=1) - own).mean()
    loss_image = (jax.nn.logsumexp(logits, axis=0) - own).mean()
    top1 = (logits.argmax(1) == jnp.arange(len(text))).astype(logits.dtype).mean()
    return (loss_text + loss_image) / 2, {"top1": top1, "temperature": 1 / scale}


@dataclasses.dataclass
class CLIP:
    """Batches hold "input_ids" [b, 77] and "image" [b, h, w, 3] in [-1, 1].

    Exports the text tower and the tokenizer as a pipeline has them, and both towers in `clip/`.
    """

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    tokenizer: Tokenizer
    initial: Params | None = None

    def __post_init__(self):
        size, end = len(self.tokenizer), self.tokenizer.eos_token_id
        self.text = dataclasses.replace(self.text, vocab_size=size, eos_token_id=end)
        self.net = Net(CLIPModel(self.text, self.vision))
        self.aux: Any = ()

    def init(self, key: jax.Array) -> Params:
        return self.net.init(key) if self.initial is None else self.initial

    def loss(self, params: Params, aux: Any, batch: Batch, key: jax.Array):
        params = _limit_scale(params)
        return contrastive_loss(*self.net(params, batch["input_ids"], batch["image"]))

    def preview(self, params: Params) -> np.ndarray | None:
        return None

    def export(self, params: Params, folder: str | Path) -> None:
        folder, params = Path(folder), _limit_scale(params)
        net = Net(CLIPTextModel(self.text))
        tower = {name: params[name] for name in net.shapes}
        save_component(folder / "text_encoder", net, tower)
        self.tokenizer.save(folder / "tokenizer")
        config = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.text.projection_dim,
            "text_config": self.text.to_json(),
            "vision_config": self.vision.to_json(),
        }
        weights.write_json(folder / "clip" / "config.json", config)
        weights.save(params, folder / "clip", weights.TRANSFORMERS_FILE)


def _limit_scale(params: Params) -> Params:
    """The temperature may not fall below 1/100 (the paper, section 2.5)."""
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], math.log(100))}
