"""`train.py ddpm`."""

import dataclasses
from typing import Annotated, Any

from jaxsd.cli.recipes.common import Denoised, MakeBatches, share
from jaxsd.cli.recipes.evaluation import DenoisingEvaluation
from jaxsd.training.options import one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(Denoised, DenoisingEvaluation):
    """Diffusion in pixel space, class-conditional where the family is."""

    data: str = "digit-scans"
    family: str = "digits-ddpm"
    time: Annotated[str, one_of("continuous", "discrete")] = "continuous"
    class_dropout: float = 0.1
    """The share of examples whose class is left out, for guidance."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd import data, families
        from jaxsd.objectives.ddpm import DDPM as Objective

        family = families.get_family(self.family)
        dropout = share("class_dropout", self.class_dropout)
        objective = Objective(
            family.unet, self.scheduled(family.schedule), self.denoising(), dropout
        )
        dataset = data.elements(self.data, "train", self.seed)
        return objective, lambda start, stop: data.batches(
            dataset, self.batch_size, start, stop, shard=self.rows()
        )

    def evaluators(self, objective: Any) -> list[Any]:
        return self.denoising_evaluators(objective)
