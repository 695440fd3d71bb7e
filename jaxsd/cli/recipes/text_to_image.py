"""`train.py text-to-image`."""

import dataclasses
from typing import Any

from jaxsd.cli.recipes.common import Denoised, MakeBatches, remembering, share
from jaxsd.cli.recipes.evaluation import DenoisingEvaluation
from jaxsd.cli.recipes.latent_data import LatentData
from jaxsd.cli.recipes.models import ModelOptions
from jaxsd.diffusion.schedulers import SCHEDULER_CLASSES
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToImage(Denoised, LatentData, DenoisingEvaluation, ModelOptions):
    """The UNet of a latent model: from noise, or fine-tuned from a model of any kind."""

    data: str = "digits"
    """Digits made by code, captioned pictures (a folder, tar shards, Parquet, Arrow or ArrayRecord;
    here or gs://), or the folder of latents that `train.py encode` made of any of them."""
    family: str | None = None
    """Without --model: what to train, by default digits. With a single file that does not tell
    what it holds: sd2 or sd2-v."""
    caption_dropout: float = 0.1
    """The share of examples whose caption is left out, for guidance."""
    train_text_encoder: bool = False
    """Also train the text encoders, from pictures; their learning rate is a matter of
    --rate-factors 'text_encoder*=0.1', say."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd.families import get_family
        from jaxsd.hub import FOLDERS

        parts = self.load(self.family, FOLDERS)
        unet = parts.components.get("unet")
        config: Any = unet.net.config if unet else get_family(self.family or "digits").unet
        if getattr(config, "time_cond_proj_dim", None) is not None:
            raise JaxsdError(
                "this UNet was distilled with its guidance (LCM), which a plain denoising loss "
                "would undo: fine-tune the model it came from"
            )
        return self.text_to_image(
            parts,
            config,
            self.scheduled(parts.schedule),
            train_text=self.train_text_encoder,
            denoising=self.denoising(),
            caption_dropout=share("caption_dropout", self.caption_dropout),
            initial=unet.params if unet else None,
        )

    def evaluators(self, objective: Any) -> list[Any]:
        if not self.evaluates():
            return []
        # Held out are pictures, whatever is trained on
        of_pictures = dataclasses.replace(objective, cached=False)
        return self.denoising_evaluators(of_pictures, remembering(objective.towers.tokenize))

    def scheduled(self, schedule: Any) -> Any:
        """The schedule as the options change it, of a class that has a word for all of it."""
        changed = super().scheduled(schedule)
        known = SCHEDULER_CLASSES[changed.class_name].defaults
        if changed.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in known:
            return dataclasses.replace(changed, class_name="DDIMScheduler")
        return changed
