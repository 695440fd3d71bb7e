"""What the recipes share that teach a model one thing from a few pictures of it."""

import dataclasses
from typing import Annotated, Any

from jaxsd.cli.recipes.common import Weighted
from jaxsd.cli.recipes.models import ModelOptions, check_undistilled
from jaxsd.cli.recipes.pictures import PictureShapes
from jaxsd.errors import JaxsdError
from jaxsd.training.options import one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching(Weighted, PictureShapes, ModelOptions):
    """Options of the recipes that teach a latent model, `--model`, of any kind."""

    resolution: int = 0
    batch_size: int = 4
    steps: int = 1000
    warmup_steps: int = 0
    decay: Annotated[str, one_of("cosine", "linear", "constant")] = "constant"
    ema_decay: float = 0.0
    """Of the averaged parameters, which are what is exported; 0 for the last ones."""
    sample_every: int = 250
    preview_prompts: tuple[str, ...] = ()
    """What to draw for the sample grids; by default the thing by its name."""

    def parts(self) -> Any:
        """The model, `jaxsd.components.Parts`; JaxsdError if there is none."""
        from jaxsd.hub import FOLDERS

        if self.model is None:
            raise JaxsdError("give the model that is to be taught with --model")
        parts = self.load(None, FOLDERS)
        check_undistilled(parts.components["unet"].net.config)
        return parts

    def objective(self, kind: Any, parts: Any, prompts: tuple[str, ...], **options: Any) -> Any:
        """The objective `TextToImage`, or a kind of it. prompts: for the grids, if none are given.

        options: more of its fields.
        """
        from jaxsd.towers import Towers

        towers, unet = Towers(parts.components, parts.tokenizers), parts.components["unet"]
        return kind(
            unet.net.config,
            parts.schedule,
            towers,
            zero_empty_prompt=bool(parts.index.get("force_zeros_for_empty_prompt", towers.xl)),
            denoising=self.denoising(),
            caption_dropout=0.0,
            preview_prompts=self.preview_prompts or prompts,
            initial=unet.params,
            **options,
        )

    def examples(self, name: str, objective: Any, data: str, captions: tuple[str, ...]) -> Any:
        """The pictures of a folder or of another source, each with one of the captions.

        name: of the folder in the workdir where their sizes are remembered.
        """
        from jaxsd.data import SOURCES
        from jaxsd.data.latents import is_cache

        if data in SOURCES or is_cache(data):
            raise JaxsdError(f"{data} are no pictures of one thing: give a folder with some of it")
        own = self.sized(objective.unet, objective.towers)
        where = self.workdir / name
        found = own.open_pictures(data, self.seed, self.batch_size, where, captions=captions)
        for size in found.shapes:
            objective.towers.latent_shape(size)  # which refuses some
        return found
