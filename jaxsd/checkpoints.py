"""Training states on disk, by Orbax: saved in the background, found whole or not at all."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxsd.errors import JaxsdError


class Checkpoints:
    """The checkpoints of one training, in `folder`; the `keep` newest are kept.

    A save that was cut off leaves a temporary folder, which the next start removes: a step is
    listed only when it is complete.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        folder = Path(folder).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)  # orbax would stumble later, in a thread
            self._manager = ocp.CheckpointManager(
                folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, cleanup_tmp_directories=True
                ),
            )
        except OSError as error:
            raise JaxsdError(f"cannot write {folder}: {error.strerror or error}") from None

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Copies the state to the host and writes it in the background."""
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)  # pyright: ignore

    def restore(self, like: Any) -> Any:
        """The newest state, with the structure, dtypes and placement of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(
            self.latest,
            args=ocp.args.StandardRestore(abstract),  # pyright: ignore
        )

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
