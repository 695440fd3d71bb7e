"""`train.py text-to-image`."""

import dataclasses
from typing import Any

from jaxsd.cli.recipes.common import Denoised, MakeBatches, remembering, share
from jaxsd.cli.recipes.evaluation import DenoisingEvaluation
from jaxsd.cli.recipes.low_rank import LoRAOptions
from jaxsd.cli.recipes.models import ModelOptions
from jaxsd.cli.recipes.pictures import PictureData
from jaxsd.diffusion.schedulers import SCHEDULER_CLASSES
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToImage(Denoised, LoRAOptions, PictureData, DenoisingEvaluation, ModelOptions):
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
        from jaxsd.data import latents
        from jaxsd.families import get_family
        from jaxsd.hub import FOLDERS
        from jaxsd.objectives.text_to_image import TextToImage as Objective
        from jaxsd.towers import Towers

        parts = self.load(self.family, FOLDERS)
        unet = parts.components.get("unet")
        config: Any = unet.net.config if unet else get_family(self.family or "digits").unet
        towers = Towers(parts.components, parts.tokenizers)
        cached = latents.is_cache(self.data)
        prompts, make_batches = (self._latents if cached else self._pictures)(towers)
        objective = Objective(
            config,
            self.scheduled(parts.schedule),
            towers,
            zero_empty_prompt=bool(parts.index.get("force_zeros_for_empty_prompt", towers.xl)),
            cached=cached,
            train_text=self.train_text_encoder,
            denoising=self.denoising(),
            caption_dropout=share("caption_dropout", self.caption_dropout),
            preview_prompts=prompts,
            initial=unet.params if unet else None,
        )
        return self.maybe_low_rank(objective), make_batches

    def evaluators(self, objective: Any) -> list[Any]:
        if not self.evaluates():
            return []
        # Held out are pictures, whatever is trained on
        plain = getattr(objective, "inner", objective)
        of_pictures = self.maybe_low_rank(dataclasses.replace(plain, cached=False))
        return self.denoising_evaluators(of_pictures, remembering(plain.towers.tokenize))

    def scheduled(self, schedule: Any) -> Any:
        """The schedule as the options change it, of a class that has a word for all of it."""
        changed = super().scheduled(schedule)
        known = SCHEDULER_CLASSES[changed.class_name].defaults
        if changed.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in known:
            return dataclasses.replace(changed, class_name="DDIMScheduler")
        return changed

    def _latents(self, towers: Any) -> tuple[list[str], MakeBatches]:
        """Prompts for the preview, and batches of a cache, which must be of the same networks."""
        from jaxsd import data
        from jaxsd.data.latents import open_latents

        cache = open_latents(self.data, self.seed, self.batch_size)
        made_of, own = cache.manifest["made_of"], towers.fingerprints()
        if other := [name for name in own if made_of.get(name) != own[name]]:
            said = "; ".join(f"{n} {made_of.get(n)}, the model's is {own[n]}" for n in other)
            raise JaxsdError(
                f"the latents in {self.data} were made by other networks than this model's "
                f"({said}): encode the data again with these"
            )
        prompts = [cache.caption(i) for i in range(min(8, sum(cache.plan.counts)))]
        return prompts, lambda start, stop: data.batches(
            cache, self.batch_size, start, stop, None, self.rows(), self.num_workers
        )

    def _pictures(self, towers: Any) -> tuple[list[str], MakeBatches]:
        """Prompts for the preview, and batches of pictures."""
        from jaxsd import data

        dataset = self.open_data(self.seed, self.batch_size, self.workdir)
        if "caption" not in dataset[0]:
            raise JaxsdError(f"{self.data} have no captions: choose digits, or your pictures")
        for size in getattr(dataset, "shapes", ()):
            towers.latent_shape(size)  # which refuses some
        prompts, tokenize = [dataset[i]["caption"] for i in range(8)], remembering(towers.tokenize)
        return prompts, lambda start, stop: data.batches(
            dataset, self.batch_size, start, stop, tokenize, self.rows(), self.num_workers
        )
