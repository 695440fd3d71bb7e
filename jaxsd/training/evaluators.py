"""What is measured of a training on its way, from the averaged parameters alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

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


def due(evaluators: Sequence[Evaluator], step: int, last: bool) -> list[Evaluator]:
    """Those whose turn it is after this step."""
    return [evaluator for evaluator in evaluators if last or step % evaluator.every == 0]


def measure(
    evaluators: Sequence[Evaluator], params: Params, step: int, wanted: str | None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The numbers and the pictures of all these; JaxsdError if `wanted`, of one of them, is not."""
    numbers, pictures = {}, {}
    for evaluator in evaluators:
        for name, value in evaluator.measure(params, step).items():
            if np.ndim(value) == 3:
                pictures[f"{evaluator.name}/{name}"] = np.asarray(value)
            else:
                numbers[f"{evaluator.name}/{name}"] = float(value)
    owners = [evaluator.name for evaluator in evaluators]
    if wanted is not None and _owner(wanted) in owners and wanted not in numbers:
        raise JaxsdError(
            f"there is no {wanted!r} to keep the best of: write {' or '.join(numbers)}"
        )
    return numbers, pictures


def check_metric(wanted: str | None, evaluators: Sequence[Evaluator]) -> None:
    """JaxsdError if no evaluator can report the metric that a checkpoint is kept by."""
    names = [evaluator.name for evaluator in evaluators]
    if wanted is not None and _owner(wanted) not in names:
        raise JaxsdError(
            f"there is no {wanted!r} to keep the best of: write the name of one of the evaluations "
            f"{', '.join(names)}, a slash and what it reports, such as eval/loss"
        )


def _owner(metric: str) -> str:
    return metric.partition("/")[0]
