"""`train.py progressive`: a chain of trainings, each of which halves the steps."""

import dataclasses
import math

from jaxsd.cli.recipes.common import Common, MakeBatches
from jaxsd.cli.recipes.distillation import Distillation
from jaxsd.cli.recipes.guided import Guided
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive(Distillation):
    """Half as many sampling steps, again and again: 64 -> 32 -> ... -> 1 (Salimans & Ho 2022).

    Each stage is a training of its own in workdir/N-steps, with a new optimizer and a learning rate
    that falls to 0; it leaves a model that samples in N steps, the teacher of the next. A teacher
    that was distilled by `guided`, and is told the guidance scale, is followed at all its scales.
    """

    start_steps: int = 64
    """Sampling steps of the first teacher."""
    end_steps: int = 1
    """Sampling steps of the last student: start_steps halved once or more."""
    factor: int = 2
    """How many of a teacher's steps one of its student's is worth."""
    last_stages_steps: int | None = None
    """Updates of the stages that end at 2 steps and at 1; by default twice --steps."""
    convert_steps: int = 0
    """Updates of a stage that comes first, in workdir/converted, and turns a teacher that predicts
    eps into one that predicts v, or what --prediction-type says."""
    encoder: bool = False
    """Students of the reversed sampler: from pictures to noise."""

    adversarial_weight: float = 0.0
    """How much it counts in the last stages, beside the error, that a discriminator on the
    teacher's own features takes the student for its teacher (SDXL-Lightning): 0.05, say."""
    adversarial_steps: int = 2
    """The most steps of a student that is trained so."""

    def stages(self) -> list[Common]:
        from jaxsd.diffusion import jumps

        counts = jumps.stages(self.start_steps, self.end_steps, self.factor)
        if self.convert_steps < 0:
            raise JaxsdError(f"convert_steps must be at least 0, not {self.convert_steps}")
        last = 2 * self.steps if self.last_stages_steps is None else self.last_stages_steps
        updates = {count: last if count <= 2 else self.steps for count in counts}
        if len(counts) == 1 and not self.convert_steps:
            return [dataclasses.replace(self, steps=updates[counts[0]], last_stages_steps=None)]
        found: list[Common] = []
        teacher, initial, kind = self.model, self.initial, self.prediction_type
        if self.convert_steps:
            names = {field.name for field in dataclasses.fields(Guided)}
            own = {name: value for name, value in vars(self).items() if name in names}
            own |= {"steps": self.convert_steps, "workdir": self.workdir / "converted"}
            own["prediction_type"] = kind = kind or "v_prediction"
            found.append(Guided(**own, told=None))
            teacher, initial = str(found[-1].workdir / "model"), None
        for count in counts:
            found.append(
                dataclasses.replace(
                    self,
                    model=teacher,
                    initial=initial,
                    workdir=self.workdir / f"{count}-steps",
                    start_steps=self.factor * count,
                    end_steps=count,
                    steps=updates[count],
                    last_stages_steps=None,
                    convert_steps=0,
                    prediction_type=kind,
                )
            )
            teacher, initial = str(found[-1].workdir / "model"), None
        return found

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd.objectives.distillation import takes_scale
        from jaxsd.objectives.progressive import Progressive as Objective

        teacher, base, make_batches = self.teacher_and_base(self.end_steps)
        if base.schedule.prediction_type == "epsilon" and self.prediction_type is None:
            raise JaxsdError(
                "the teacher predicts eps, which says nothing of the picture where there is noise "
                "alone: turn it into one that predicts v with --convert-steps 2000, say (or insist "
                "with --prediction-type epsilon)"
            )
        if self.guidance_range and not takes_scale(base.net):
            raise JaxsdError(
                "guidance_range: a student that is not told the scale would be guided again in the "
                "next stage; start from one that `guided` made"
            )
        if not 0 <= self.adversarial_weight < math.inf:
            weight = self.adversarial_weight
            raise JaxsdError(f"adversarial_weight must be at least 0, not {weight}")
        if self.adversarial_weight and (self.lora_rank or self.encoder):
            what = "lora_rank: factors" if self.lora_rank else "encoder: students of noise"
            raise JaxsdError(f"{what} are not trained with --adversarial-weight")
        fooling = self.end_steps <= self.adversarial_steps
        objective = Objective(
            base,
            teacher,
            self.end_steps,
            factor=self.factor,
            encoder=self.encoder,
            adversarial_weight=self.adversarial_weight if fooling else 0.0,
            **self.shared(base),
        )
        return self.maybe_low_rank(objective), make_batches
