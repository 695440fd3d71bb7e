"""`train.py consistency`."""

import dataclasses
from typing import Annotated

from jaxsd.cli.recipes.common import MakeBatches
from jaxsd.cli.recipes.distillation import Distillation
from jaxsd.errors import JaxsdError
from jaxsd.training.options import one_of

STEPS = 4  # in which such students are usually sampled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(Distillation):
    """A student that jumps to the picture from anywhere: latent consistency (Luo et al. 2023).

    It is sampled with lcm, in 1 to 8 steps, and is told the guidance scale, unless it is a LoRA.
    With --guidance-range None the teacher is followed without guidance.
    """

    guidance_range: tuple[float, float] | None = (1.0, 9.0)
    original_steps: int = 50
    """Times of the schedule between which the teacher jumps: 50 of 1000 skip 20 at a time."""
    loss_type: Annotated[str, one_of("huber", "l2")] = "huber"
    huber_c: float = 1e-3
    """Below which an error counts by its square."""
    ema_decay: float = 0.95
    """Of the parameters that say what is right at the next point, which are what is exported."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd.objectives.consistency import Consistency as Objective

        if self.original_steps < 1:
            raise JaxsdError(f"original_steps must be at least 1, not {self.original_steps}")
        teacher, base, make_batches = self.teacher_and_base(
            STEPS,
            self.guidance_range is not None and not self.lora_rank,
            "LCMScheduler",
            original_inference_steps=self.original_steps,
        )
        objective = Objective(
            base,
            teacher,
            STEPS,
            loss_type=self.loss_type,
            huber_c=self.huber_c,
            **self.shared(base),
        )
        return self.maybe_low_rank(objective), make_batches
