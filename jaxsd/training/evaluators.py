"""What is measured of a training on its way, from the averaged parameters alone."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Params

Results = Mapping[str, float | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Something to measure every so many steps, and after the last one.

    measure(params, step) -> numbers and uint8 pictures [h, w, 3] by name, where `params` are all
    averaged parameters, frozen ones included, on the host or on one device. It may depend on
    nothing else: whoever resumes must measure the same. Logged as "name/...".
    """

    name: str
    every: int
    measure: Callable[[Params, int], Results]


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number of an evaluation at which training may end before its last step."""

    metric: str
    value: float
    above: bool  # whether it is to rise to the value; else to fall

    def is_of(self, evaluator: Evaluator) -> bool:
        return _owner(self.metric) == evaluator.name

    def reached(self, measured: Mapping[str, float]) -> bool:
        """Whether this is among what was just measured, and has come so far."""
        if self.metric not in measured:
            return False
        number = measured[self.metric]
        return number >= self.value if self.above else number <= self.value


def parse_goal(text: str | None) -> Goal | None:
    """The goal in METRIC<VALUE or METRIC>VALUE; JaxsdError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"([^<>]+)([<>])([^<>]+)", text.replace(" ", ""))
    try:
        value = float(found[3]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise JaxsdError(
            f"stop_when is METRIC<VALUE or METRIC>VALUE, eval/loss<0.02 say, not {text!r}"
        )
    return Goal(found[1], value, found[2] == ">")


def due(evaluators: Sequence[Evaluator], step: int, last: bool) -> list[Evaluator]:
    """Those whose turn it is after this step."""
    return [evaluator for evaluator in evaluators if last or step % evaluator.every == 0]


def measure(
    evaluators: Sequence[Evaluator], params: Params, step: int, wanted: Collection[str]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The numbers and the pictures of all these; JaxsdError if one that is `wanted` is not there.

    wanted: of these or of other evaluators.
    """
    numbers, pictures = {}, {}
    for evaluator in evaluators:
        for name, value in evaluator.measure(params, step).items():
            if np.ndim(value) == 3:
                pictures[f"{evaluator.name}/{name}"] = np.asarray(value)
            else:
                numbers[f"{evaluator.name}/{name}"] = float(value)
    owners = [evaluator.name for evaluator in evaluators]
    for metric in wanted:
        if _owner(metric) in owners and metric not in numbers:
            raise JaxsdError(f"there is no {metric!r}: write {' or '.join(numbers)}")
    return numbers, pictures


def check_metrics(wanted: Collection[str], evaluators: Sequence[Evaluator]) -> None:
    """JaxsdError if no evaluator can report a metric that checkpoints or the end depend on."""
    names = [evaluator.name for evaluator in evaluators]
    for metric in wanted:
        if _owner(metric) not in names:
            raise JaxsdError(
                f"there is no {metric!r}: write the name of one of the evaluations "
                f"{', '.join(names)}, a slash and what it reports, such as eval/loss"
            )


def _owner(metric: str) -> str:
    return metric.partition("/")[0]
