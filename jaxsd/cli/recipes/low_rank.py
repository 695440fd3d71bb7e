"""Options of low-rank training (LoRA), and what they make of an objective."""

import dataclasses
from typing import Any

from jaxsd.cli.recipes.common import Common
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions(Common):
    """Mixed into a recipe that can start from a model (`--model`)."""

    lora_rank: int = 0
    """Train low-rank factors (LoRA) of this rank instead of the model's weights, which stay as they
    are: a file of a few MB, beside the model that it makes. 0 trains the weights."""
    lora_alpha: float | None = None
    """The change is alpha / rank times the product of the factors; by default alpha is the rank."""
    lora_targets: tuple[str, ...] = ("attention",)
    """What the factors change: attention, feed-forward, convs, projections, text-encoders, or
    patterns of parameters' names, such as "mid_block.*.to_q.weight"."""

    def maybe_low_rank(self, objective: Any) -> Any:
        """The objective, or what trains factors for it where a rank is given."""
        if not self.lora_rank:
            for field in dataclasses.fields(LoRAOptions):
                if field.name.startswith("lora_") and getattr(self, field.name) != field.default:
                    raise JaxsdError(f"{field.name} needs a --lora-rank, such as 8")
            return objective
        import jax

        from jaxsd.objectives.low_rank import LowRank

        if getattr(self, "model", None) is None:
            raise JaxsdError("lora_rank: factors change a model that is there: give --model")
        alpha = float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
        base = objective.init(jax.random.key(self.seed))
        targets = self.lora_targets
        return LowRank(objective, base, self.lora_rank, alpha, targets, dtype=self.dtype)

    def plain(self, objective: Any) -> Any:
        """The objective without what trains factors for it."""
        return objective.inner if self.lora_rank else objective
