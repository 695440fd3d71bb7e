"""`train.py guided`."""

import dataclasses

from jaxsd.cli.recipes.common import MakeBatches
from jaxsd.cli.recipes.distillation import Distillation
from jaxsd.errors import JaxsdError

PREVIEW_STEPS = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guided(Distillation):
    """A student told the guidance scale says in one pass what takes two (Meng et al. 2023).

    `progressive` makes of it one that samples in few steps.
    """

    guidance_range: tuple[float, float] | None = (1.0, 9.0)
    told: bool | None = True
    """Whether the student is told the scale; None: if its teacher is. One that is not learns one
    scale (give the same twice) or, with --guidance-range None, its teacher as it is, in another
    --prediction-type."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd.objectives.distillation import takes_scale
        from jaxsd.objectives.guided import Guided as Objective

        if self.told and self.lora_rank:
            raise JaxsdError(
                "a LoRA changes weights that its base has, and has none that hear the guidance "
                "scale: add --told False, and give one scale as the range"
            )
        teacher, base, make_batches = self.teacher_and_base(
            None, self.told, turned=True, taught=bool(self.told)
        )
        if self.told and not takes_scale(base.net):
            raise JaxsdError("told needs a --guidance-range, such as 1 9")
        objective = Objective(base, teacher, PREVIEW_STEPS, **self.shared(base))
        return self.maybe_low_rank(objective), make_batches
