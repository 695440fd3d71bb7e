"""`train.py textual-inversion`."""

import dataclasses
from typing import Annotated, Any

from jaxsd.cli.recipes.common import MakeBatches, remembering
from jaxsd.cli.recipes.teaching import Teaching
from jaxsd.training.options import one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextualInversion(Teaching):
    """A new word for what a few pictures show: only its vectors are trained (Gal et al. 2022).

    Leaves them in workdir/model as files of a few KB, for `sample.py --textual-inversion`,
    diffusers and the web UIs.
    """

    data: str
    """Pictures of the thing, or in the style: a folder with three to ten of them will do."""
    token: str
    """The new word, such as <cat>: one that prompts do not hold by chance."""
    initialize_from: str
    """A word that is near in meaning, where the vectors begin. The tokenizer must have it as one
    token."""
    vectors: int = 1
    """How many vectors the word has. More say more, and leave less room in a prompt."""
    learn: Annotated[str, one_of("object", "style")] = "object"
    """Whether the word is for what pictures show or for how they show it: decides the captions."""
    template: tuple[str, ...] = ()
    """Captions of your own instead, one or several, with {} for the word: "a photo of {}"."""
    learning_rate: float = 5e-4
    steps: int = 3000
    whole_model: bool = False
    """Also leave the model with its new word there, as a folder that diffusers opens."""

    def build(self) -> tuple[Any, MakeBatches]:
        from jaxsd import data
        from jaxsd.data.templates import TEMPLATES, captions
        from jaxsd.objectives.text_to_image import TextToImage
        from jaxsd.objectives.textual_inversion import TextualInversion as Objective

        told = captions(self.token, self.template or TEMPLATES[self.learn])
        base = self.objective(TextToImage, self.parts(), told[:2])
        objective = Objective(
            base,
            self.token,
            self.initialize_from,
            self.vectors,
            dtype=self.dtype,
            whole_model=self.whole_model,
        )
        examples = self.examples("pictures", base, self.data, told)
        tokenize = remembering(objective.tokenize)
        return objective, lambda start, stop: data.batches(
            examples, self.batch_size, start, stop, tokenize, self.rows(), self.num_workers
        )
