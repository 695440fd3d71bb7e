"""`train.py lora`."""

import dataclasses
from typing import Annotated

from jaxsd.cli.recipes.common import MakeBatches
from jaxsd.cli.recipes.text_to_image import TextToImage
from jaxsd.errors import JaxsdError
from jaxsd.training.options import one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(TextToImage):
    """Factors for a latent model, trained on captioned pictures: a file of a few MB (LoRA).

    It is `text-to-image` with what suits a few pictures. workdir/model holds the factors in
    pytorch_lora_weights.safetensors, and the model to which they are added.
    """

    data: str = dataclasses.field()
    resolution: int = 0
    lora_rank: int = 8
    batch_size: int = 4
    learning_rate: float = 1e-4
    steps: int = 1000
    warmup_steps: int = 0
    decay: Annotated[str, one_of("cosine", "linear", "constant")] = "constant"
    ema_decay: float = 0.0
    """Of the averaged factors, which are what is exported; 0 for the last ones."""
    sample_every: int = 250
    caption_dropout: float = 0.0

    def build(self) -> tuple[object, MakeBatches]:
        if self.model is None:
            raise JaxsdError("give the model that the factors are for with --model")
        if self.lora_rank < 1:
            raise JaxsdError(
                f"lora_rank must be at least 1, not {self.lora_rank}: `text-to-image` trains the "
                "weights themselves"
            )
        return super().build()
