"""What is minimised: one file for each objective, all of them run by `jaxsd.training`."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxsd.nn import Params

Batch = dict[str, jax.Array]


@runtime_checkable
class Objective(Protocol):
    """What the training loop asks of an objective.

    `aux` is a pytree that the loss reads but does not train (frozen networks, for instance); it is
    an argument, not a constant, so that it is not compiled into the program.
    """

    aux: Any

    def init(self, key: jax.Array) -> Params:
        """The parameters that training starts from."""
        ...

    def loss(
        self, params: Params, aux: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """A scalar, the mean over the batch, and what else is worth logging."""
        ...

    def preview(self, params: Params) -> np.ndarray | None:
        """A uint8 picture [h, w, 3] of what the parameters can do so far; None if it has none."""
        ...

    def export(self, params: Params, folder: Any) -> None:
        """Writes a diffusers folder."""
        ...
