"""Options of low-rank training (LoRA), and what they make of an objective."""

import dataclasses
from typing import Annotated, Any

from jaxsd.cli.recipes.common import Common
from jaxsd.errors import JaxsdError
from jaxsd.training.options import one_of

TEXT = "text-encoders"  # the group of targets


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
    lora_format: Annotated[str, one_of("peft", "kohya")] = "peft"
    """How the file names the factors: as PEFT and diffusers do, or as most other programs read."""

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
        return LowRank(
            objective,
            base,
            self.lora_rank,
            alpha,
            self.targets,
            dtype=self.dtype,
            form=self.lora_format,
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """What the factors change."""
        return self.lora_targets

    def plain(self, objective: Any) -> Any:
        """The objective without what trains factors for it."""
        return objective.inner if self.lora_rank else objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(LoRAOptions):
    """Of a recipe that may train text encoders too: as they are, or by factors for them."""

    train_text_encoder: bool = False
    """Also train the text encoders, from pictures; their learning rate is a matter of
    --rate-factors 'text_encoder*=0.1', say. With a --lora-rank that is the target text-encoders."""

    @property
    def trains_text(self) -> bool:
        return self.train_text_encoder or bool(self.lora_rank and TEXT in self.lora_targets)

    @property
    def targets(self) -> tuple[str, ...]:
        named = any(t == TEXT or t.startswith("text_encoder") for t in self.lora_targets)
        return self.lora_targets if named or not self.trains_text else (*self.lora_targets, TEXT)
