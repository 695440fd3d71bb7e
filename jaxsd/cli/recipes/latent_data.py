"""What a latent model is trained on: pictures, or latents that `train.py encode` made of some."""

import dataclasses
from typing import Any

from jaxsd.cli.recipes.common import Common, MakeBatches, remembering
from jaxsd.cli.recipes.pictures import PictureData
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentData(PictureData, Common):
    """Mixed into a recipe that trains the UNet of a latent model."""

    def text_to_image(
        self, parts: Any, unet: Any, schedule: Any, **options: Any
    ) -> tuple[Any, MakeBatches]:
        """The objective `TextToImage` of a model's other parts, and its batches.

        parts: `jaxsd.components.Parts`. unet: the config. options: of the objective.
        """
        from jaxsd.data import latents
        from jaxsd.objectives.text_to_image import TextToImage
        from jaxsd.towers import Towers

        towers = Towers(parts.components, parts.tokenizers)
        cached, own = latents.is_cache(self.data), self.sized(unet, towers)
        prompts, make_batches = (own._latents if cached else own._pictures)(towers)
        objective = TextToImage(
            unet,
            schedule,
            towers,
            zero_empty_prompt=bool(parts.index.get("force_zeros_for_empty_prompt", towers.xl)),
            cached=cached,
            preview_prompts=prompts,
            **options,
        )
        return objective, make_batches

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
