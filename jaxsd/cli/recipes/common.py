"""What the recipes share: the loop's options, where things go, and small conversions."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from jaxsd.cli.together import Together
from jaxsd.diffusion.weighting import WEIGHTINGS
from jaxsd.errors import JaxsdError
from jaxsd.training import Options
from jaxsd.training.options import one_of

MakeBatches = Callable[[int, int], Iterator[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common(Together, Options):
    """Options that every recipe has. A recipe is one subclass, with a `build` of its own."""

    workdir: Path
    """Where everything goes. Run the same command again to resume."""
    steps: int = 3000
    """Updates altogether."""
    dry_run: bool = False
    """Print the resolved options, what is where and a memory estimate, and stop."""

    made: ClassVar[str] = "model_index.json"  # in workdir/model: the last that a training writes

    def __post_init__(self):
        super().__post_init__()
        scheme, slash, rest = str(self.workdir).partition(":/")  # a Path makes one slash of two
        if slash and len(scheme) > 1 and scheme.isalnum():
            raise JaxsdError(
                f"workdir must be a folder of this machine, not {scheme}://{rest}: write to a "
                "disk, or mount the bucket"
            )

    def build(self) -> tuple[Any, MakeBatches]:
        """The objective, and its batches as a function (start, stop)."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Makes what is needed and not there yet, on the devices: `build` keeps to the host."""

    def stages(self) -> "list[Common]":
        """The trainings that this one stands for, one after the other; by default itself."""
        return [self]

    def finish(self) -> None:
        """What is left to do after the last of the stages."""

    def evaluators(self, objective: Any) -> list[Any]:
        """What is measured on the way (`recipes.evaluation`)."""
        return []

    def rows(self) -> tuple[int, int]:
        """Which rows of each batch this process reads: part i of n, as (i, n)."""
        from jaxsd import sharding
        from jaxsd.training.placement import make_mesh

        return sharding.share(make_mesh(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Common):
    """Options of the recipes whose loss is that of a network that denoises."""

    time: Annotated[str, one_of("continuous", "discrete")] = "discrete"
    """Whether training times are drawn from an interval or from whole steps."""
    weighting: Annotated[str, one_of(*WEIGHTINGS)] = "none"
    """What noise levels count in the loss: as the error of the prediction has it (none), or the
    error of the picture by min(SNR, gamma), SNR + 1 or max(SNR, 1)."""
    snr_gamma: float = 5.0
    """Of min-snr."""
    offset_noise: float = 0.0
    """Deviation of noise that shifts a whole channel, for very dark and bright pictures: 0.1."""

    def denoising(self) -> Any:
        from jaxsd.objectives.denoising import Denoising

        return Denoising(
            self.time, self.weighting, self.snr_gamma, self.offset_noise, dtype=self.dtype
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoised(Weighted):
    """Options of the recipes that train a network to denoise, by a schedule of their choice."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the network predicts; by default as the family says."""
    zero_terminal_snr: bool = False
    """Shift the schedule so that it ends in noise alone. Not for networks that predict noise."""

    def scheduled(self, schedule: Any) -> Any:
        """The family's noise schedule, as these options change it."""
        if self.prediction_type is not None:
            schedule = dataclasses.replace(schedule, prediction_type=self.prediction_type)
        if self.zero_terminal_snr and schedule.continuous:
            raise JaxsdError("zero_terminal_snr: this family's schedule ends in noise alone anyway")
        if self.zero_terminal_snr:
            if schedule.prediction_type == "epsilon":
                raise JaxsdError(
                    "zero_terminal_snr needs --prediction-type v_prediction or sample: noise alone "
                    "says nothing of the picture to a network that predicts noise"
                )
            schedule = dataclasses.replace(
                schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing"
            )
        return schedule


def share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise JaxsdError(f"{name} must be from 0 to 1, not {value}")
    return value


def remembering(tokenize: Callable[[list[str]], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Ids of one caption, remembered: captions repeat, and tokenizing costs more than drawing.

    Longer captions are cut without a word: in other people's data there are thousands of them.
    tokenize: ids of captions, [n, ...].
    """
    from jaxsd.tokenizer import PromptTruncated

    @functools.lru_cache(100_000)
    def ids(caption: str) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptTruncated)
            return tokenize([caption])[0]

    return ids
