"""`train.py text-to-image`."""

import dataclasses
from typing import Any

from jaxsd.cli.recipes.common import Denoised, MakeBatches, remembering, share
from jaxsd.cli.recipes.evaluation import DenoisingEvaluation
from jaxsd.cli.recipes.latent_data import LatentData
from jaxsd.cli.recipes.low_rank import TextOptions
from jaxsd.cli.recipes.models import ModelOptions, check_undistilled
from jaxsd.diffusion.schedulers import SCHEDULER_CLASSES


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToImage(Denoised, TextOptions, LatentData, DenoisingEvaluation, ModelOptions):
    """The UNet of a latent model: from noise, or fine-tuned from a model of any kind."""

    data: str = "digits"
    """Digits made by code, captioned pictures (a folder, tar shards, Parquet, Arrow or ArrayRecord;
    here or gs://), or the folder of latents that `train.py encode` made of any of them."""
    family: str | None = None
    """Without --model: what to train, by default digits. With a single file that does not tell
    what it holds: sd2 or sd2-v."""
    caption_dropout: float = 0.1
    """The share of examples whose caption is left out, for guidance."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd.families import get_family
        from jaxsd.hub import FOLDERS

        parts = self.load(self.family, FOLDERS)
        unet = parts.components.get("unet")
        config: Any = unet.net.config if unet else get_family(self.family or "digits").unet
        check_undistilled(config)
        objective, make_batches = self.text_to_image(
            parts,
            config,
            self.scheduled(parts.schedule),
            train_text=self.trains_text,
            denoising=self.denoising(),
            caption_dropout=share("caption_dropout", self.caption_dropout),
            initial=unet.params if unet else None,
        )
        return self.maybe_low_rank(objective), make_batches

    def evaluators(self, objective: Any) -> list[Any]:
        if not self.evaluates():
            return []
        # Held out are pictures, whatever is trained on
        plain = self.plain(objective)
        of_pictures = self.maybe_low_rank(dataclasses.replace(plain, cached=False))
        own = self.sized(plain.unet, plain.towers)
        return own.denoising_evaluators(of_pictures, remembering(plain.towers.tokenize))

    def scheduled(self, schedule: Any) -> Any:
        """The schedule as the options change it, of a class that has a word for all of it."""
        changed = super().scheduled(schedule)
        known = SCHEDULER_CLASSES[changed.class_name].defaults
        if changed.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in known:
            return dataclasses.replace(changed, class_name="DDIMScheduler")
        return changed
