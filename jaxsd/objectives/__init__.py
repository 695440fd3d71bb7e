"""What is minimised: one file for each objective, all of them run by `jaxsd.training`."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxsd.nn import Params

Batch = dict[str, jax.Array]


class Now(NamedTuple):
    """What the loop tells a loss of the step that it is in."""

    key: jax.Array  # of this step alone: whatever is random comes from it
    step: jax.Array | int = 0  # updates made before this one
    ema: Params | None = None  # the averaged parameters, for losses that compare with them


@runtime_checkable
class Objective(Protocol):
    """What the training loop asks of an objective.

    `aux` is a pytree that the loss reads but does not train (frozen networks, for instance); it is
    an argument, not a constant, so that it is not compiled into the program.

    One whose parameters may not take every value also has `constrain(params) -> params`, through
    which each update of the trained parameters goes.
    """

    aux: Any

    def init(self, key: jax.Array) -> Params:
        """The parameters that training starts from."""
        ...

    def loss(
        self, params: Params, aux: Any, batch: Batch, now: Now
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """A scalar, the mean over the batch, and what else is worth logging."""
        ...

    def preview(self, params: Params) -> np.ndarray | None:
        """A uint8 picture [h, w, 3] of what the parameters can do so far; None if it has none."""
        ...

    def export(self, params: Params, folder: Any) -> None:
        """Writes a diffusers folder."""
        ...
