"""Training states and networks on disk, by Orbax: found whole or not at all."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.weights.entries import DTYPES
from jaxsd.weights.files import AnyPath, is_local, listing
from jaxsd.weights.matching import match
from jaxsd.weights.orbax import read_orbax_header
from jaxsd.weights.tensors import Placement, as_dtype


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


def save_arrays(params: Params, folder: AnyPath, dtype: Any = None) -> None:
    """Writes the weights of one network; by default each array keeps its dtype."""
    wanted = None if dtype is None else as_dtype(dtype)
    arrays = {name: jnp.asarray(value, wanted) for name, value in params.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() if is_local(folder) else folder, arrays)
    except OSError as error:
        raise JaxsdError(f"cannot write {folder}: {error.strerror or error}") from None


def load_arrays(
    folder: AnyPath, net: Net, dtype: Any = None, sharding: Placement | None = None
) -> Params:
    """The weights of one network, as `weights.load` gives them.

    JaxsdError if the checkpoint is damaged, or differs from `net`, with every difference listed.
    """
    header = read_orbax_header(folder)
    sources = match(header, net.shapes, folder)
    if renamed := [source for name, source in sources.items() if name != source]:
        raise JaxsdError(f"{folder} has other names than ours: {listing(renamed)}")
    wanted = None if dtype is None else as_dtype(dtype)

    def place(name: str) -> jax.ShapeDtypeStruct:
        where = sharding(name, net.shapes[name]) if callable(sharding) else sharding
        if where is None:
            where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        kept = DTYPES[header[name].dtype] if wanted is None else wanted
        return jax.ShapeDtypeStruct(net.shapes[name], kept, sharding=where)

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            where = folder.absolute() if is_local(folder) else folder
            return checkpointer.restore(where, {name: place(name) for name in sources})
    except Exception as error:  # orbax and tensorstore raise all kinds on damaged bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(f"{folder} is a damaged Orbax checkpoint: {reason}") from None
