"""`train.py dreambooth`."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsd.cli.recipes.common import MakeBatches, remembering
from jaxsd.cli.recipes.low_rank import TextOptions
from jaxsd.cli.recipes.teaching import Teaching
from jaxsd.errors import JaxsdError

OF_THE_PRIOR = ("class_data", "num_class_images", "prior_weight")
OF_THE_PRIOR += ("class_steps", "class_guidance_scale", "class_batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamBooth(Teaching, TextOptions):
    """One thing for a rare word: the model itself is fine-tuned on a few pictures of it.

    With --class-prompt it is held to pictures of the class, which it draws itself where there are
    not enough, so that not everything becomes that thing (Ruiz et al. 2022).
    """

    instance_data: str
    """Pictures of the thing: a folder with three to ten of them will do."""
    instance_prompt: str
    """The caption of all of them, with a rare word before the class: "a photo of sks dog"."""
    token: str | None = None
    """The rare word, to make sure that --instance-prompt has it and --class-prompt does not."""
    class_prompt: str | None = None
    """What the class's pictures show: "a photo of a dog". By default there are none."""
    class_data: Path | None = None
    """The folder of the class's pictures; by default workdir/class."""
    num_class_images: int = 100
    """How many pictures of the class there are to be: what is missing is drawn. 0 draws none."""
    prior_weight: float = 1.0
    """What the class's pictures count, beside those of the thing."""
    class_steps: int | None = None
    """Sampling steps of what is drawn; by default the model's own number."""
    class_guidance_scale: float | None = None
    """Guidance scale of what is drawn; by default the model's own."""
    class_batch_size: int = 4
    """Pictures that are drawn at a time."""
    batch_size: int = 4
    """Pictures of the thing in an update, and as many of the class, on all devices together."""
    learning_rate: float = 5e-6
    """This suits whole weights; factors (--lora-rank) want about 1e-4."""
    steps: int = 400

    def __post_init__(self):
        super().__post_init__()
        for name, text in (("instance_prompt", self.instance_prompt), ("token", self.token)):
            if text is not None and not text.strip():
                raise JaxsdError(f"{name} must not be empty")
        if self.token is not None and not _holds(self.instance_prompt, self.token):
            raise JaxsdError(
                f"instance_prompt {self.instance_prompt!r} does not hold the token {self.token!r}, "
                "which is to stand for what the pictures show"
            )
        if self.class_prompt is None:
            fields = {field.name: field.default for field in dataclasses.fields(self)}
            for name in OF_THE_PRIOR:
                if getattr(self, name) != fields[name]:
                    raise JaxsdError(f"{name} needs a --class-prompt, such as 'a photo of a dog'")
            return
        if self.token is not None and _holds(self.class_prompt, self.token):
            raise JaxsdError(
                f"class_prompt {self.class_prompt!r} holds the token {self.token!r}, which is to "
                "stand for one of the class alone"
            )
        if self.num_class_images < 0:
            raise JaxsdError(f"num_class_images must be at least 0, not {self.num_class_images}")
        if self.class_batch_size < 1:
            raise JaxsdError(f"class_batch_size must be at least 1, not {self.class_batch_size}")
        if not 0 <= self.prior_weight < math.inf:
            raise JaxsdError(f"prior_weight must be at least 0, not {self.prior_weight}")
        if self.buckets:
            raise JaxsdError("buckets: the thing's and the class's pictures share one shape")

    @property
    def _class_folder(self) -> Path:
        return self.class_data or self.workdir / "class"

    def prepare(self) -> None:
        """Draws the pictures of the class that are missing."""
        from jaxsd import processes

        if self.class_prompt is not None:
            processes.first(self._draw)

    def _draw(self) -> None:
        from tqdm import tqdm

        from jaxsd.editing import class_pictures
        from jaxsd.pipeline import of_parts

        assert self.class_prompt is not None
        folder = self._class_folder
        numbers = class_pictures.missing(folder, self.num_class_images, self.class_prompt)
        if not numbers:
            return
        parts = self.parts()
        components = {
            name: dataclasses.replace(
                part, params={n: value.astype(self.dtype) for n, value in part.params.items()}
            )
            for name, part in parts.components.items()
        }
        pipe = of_parts(dataclasses.replace(parts, components=components))
        how = class_pictures.Drawing(
            self.class_prompt,
            self.seed,
            self.class_steps,
            self.class_guidance_scale,
            self.class_batch_size,
        )
        with tqdm(total=len(numbers), desc="class pictures", unit="picture") as bar:
            class_pictures.draw(pipe, folder, numbers, how, bar.update)

    def build(self) -> tuple[Any, MakeBatches]:
        from jaxsd import data
        from jaxsd.objectives.dreambooth import PRIOR
        from jaxsd.objectives.dreambooth import DreamBooth as Objective

        prompts = tuple(filter(None, (self.instance_prompt, self.class_prompt)))
        options = {"train_text": self.trains_text, "prior_weight": self.prior_weight}
        objective = self.objective(Objective, self.parts(), prompts, **options)
        tokenize = remembering(objective.towers.tokenize)
        own = self.examples("instance", objective, self.instance_data, (self.instance_prompt,))

        def batches(examples: Any, start: int, stop: int) -> Iterator[Any]:
            return data.batches(
                examples, self.batch_size, start, stop, tokenize, self.rows(), self.num_workers
            )

        def make_batches(start: int, stop: int) -> Iterator[Any]:
            things = batches(own, start, stop)
            if self.class_prompt is None:
                return things
            folder = str(self._class_folder)  # which in a dry run may still be empty
            others = self.examples("prior", objective, folder, (self.class_prompt,))
            return (
                {**thing, **{PRIOR + name: value for name, value in kind.items()}}
                for thing, kind in zip(things, batches(others, start, stop), strict=True)
            )

        return self.maybe_low_rank(objective), make_batches


def _holds(prompt: str, word: str) -> bool:
    """Whether a prompt holds a word that stands alone."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt) is not None
