"""Training states and networks on disk, by Orbax: found whole or not at all."""

import contextlib
import dataclasses
import logging
import math
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxsd import processes
from jaxsd.checksums import find_damage, write_checksums
from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.weights.entries import DTYPES, Entry
from jaxsd.weights.files import AnyPath, as_path, is_local, listing
from jaxsd.weights.matching import match
from jaxsd.weights.orbax import read_orbax_header
from jaxsd.weights.tensors import Placement, as_dtype

DAMAGED = "damaged"  # the folder where such checkpoints are moved to
COUNTERS = "counters"  # the item of all single numbers of a state
# Bytes of the least piece that each of the devices holding the same array writes. To cut one takes
# a small program on each of them, which for the thousands of arrays of a state adds up.
LEAST_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest, the best by a metric, and those of every n-th step."""

    newest: int = 2
    best: str | None = None  # a metric's name
    highest: bool = False  # whether its highest value is the best one, not its lowest
    every: int | None = None

    def policy(self) -> Any:
        """The same for Orbax."""
        managers = ocp.checkpoint_managers
        policies: list[Any] = [managers.LatestN(self.newest)]
        if self.best is not None:
            policies.append(
                managers.BestN(
                    get_metric_fn=self.score, n=1, keep_checkpoints_without_metrics=False
                )
            )
        if self.every is not None:
            policies.append(managers.EveryNSteps(self.every))
        return managers.AnyPreservationPolicy(policies)

    def score(self, metrics: dict[str, float]) -> float:
        """The higher the better; minus infinity without the metric, or where it is no number."""
        value = metrics.get(self.best or "", math.nan)
        if not math.isfinite(value):
            return -math.inf
        return value if self.highest else -value


class Checkpoints:
    """The checkpoints of one training, one folder for each kept step, written in the background.

    Each field of a state is a folder of its own (params, ema, opt_state, ...), the single numbers
    are in `counters`, and `checksums.json` tells whether all is still as it was written. A step is
    there when it is complete: a save that was cut off leaves a temporary folder, which the next
    start removes, and older steps go only when a newer one is complete. If the newest is damaged,
    that is reported, it is moved to `damaged/`, and the one before it takes its place; JaxsdError
    if none is left. To be closed.
    """

    def __init__(self, folder: str | PurePath, keep: Keep = Keep()):
        folder = as_path(folder)
        self._folder = folder.absolute() if is_local(folder) else folder
        self._keep = keep
        self._writing: int | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # orbax would stumble in a thread
            if is_local(folder):  # nobody looks before that is done
                processes.first(lambda: _set_damaged_aside(self._folder))
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep.policy(),
                    best_fn=keep.score,
                    cleanup_tmp_directories=True,
                    async_options=ocp.options.AsyncOptions(
                        post_finalization_callback=self._before_commit
                    ),
                ),
                handler_registry=_handlers(),
            )
        except OSError as error:
            raise JaxsdError(f"cannot write {folder}: {error.strerror or error}") from None
        self._quiet = contextlib.ExitStack()
        self._quiet.callback(_hide_tracebacks())

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Copies the state to the host and writes it in the background; a kept step stays.

        JaxsdError if that, or the save before it, has failed.
        """
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.PyTreeSave(item) for name, item in _items(state).items()}  # pyright: ignore
        with self._reporting():
            self._manager.wait_until_finished()  # which may tell of the save before this one
            self._writing = step
            self._manager.save(
                step, args=ocp.args.Composite(**items), metrics=metrics or {}, force=True
            )

    def check(self) -> None:
        """JaxsdError if the save in the background has failed; does not wait for it."""
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk; JaxsdError if it is not."""
        with self._reporting():
            self._manager.wait_until_finished()
            self._writing = None

    def restore(self, like: Any) -> Any:
        """The newest state, with the structure, dtypes and placement of `like`; None without one.

        `like` is a state or its shapes; another placement than when it was saved is fine.
        """
        if self.latest is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {
            name: ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
            )  # pyright: ignore
            for name, item in _items(abstract).items()
        }
        try:
            found = self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        except Exception as error:  # of which orbax raises all kinds
            place = self._folder / str(self.latest)
            raise JaxsdError(
                f"{place} is no state of this training: {_first_line(error)}"
            ) from error
        fields = {name: found[name] for name in items if name != COUNTERS} | found[COUNTERS]
        return type(like)(**fields)

    def close(self) -> None:
        """Waits until everything is on disk; JaxsdError if it is not."""
        with self._quiet:
            try:
                self.wait()
            finally:
                with contextlib.suppress(Exception):  # the same one again
                    self._manager.close()

    def _before_commit(self) -> None:
        """In the first process: all is written, and not yet under the name that makes it count."""
        if is_local(self._folder):
            [partial] = self._folder.glob(f"{self._writing}.*-tmp*")
            # Orbax notes the time in _CHECKPOINT_METADATA as its last act.
            write_checksums(partial, ignored=("_CHECKPOINT_METADATA",))

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Makes one line of what a failed save raises, and removes what it has left."""
        try:
            yield
        except Exception as error:  # of the disk, of tensorstore, of a thread
            self._quiet.pop_all()  # to the process's end: what Orbax has begun outlives all of us
            self._remove_partial()
            kept = [step for step in _steps(self._folder) if step != self._writing]
            there = f"the checkpoint of step {max(kept)} is complete" if kept else "there is none"
            raise JaxsdError(
                f"cannot save step {self._writing} in {self._folder}: {_first_line(error)}; {there}"
            ) from error

    def _remove_partial(self) -> None:
        """Removes what a failed save has written, and what its other threads go on writing."""
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                with contextlib.suppress(Exception):  # Orbax raises here what has failed in it
                    thread.join(10)
        for _ in range(50):
            partial = list(self._folder.glob(f"{self._writing}.*-tmp*"))
            if not partial:
                return
            for folder in partial:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.02)


def _hide_tracebacks() -> Callable[[], None]:
    """What fails is said in one line, by us, without the tracebacks of Orbax's threads and tasks.

    It logs them; asyncio logs those that nobody asked for; and where one write fails, the others
    come back to an event loop that is gone, which no `except` of ours sees. Returns what ends this.
    """
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    def keep(record: logging.LogRecord) -> bool:
        traceback = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        return "orbax" not in traceback

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    sys.unraisablehook = hook
    for logger in loggers:
        logger.addFilter(keep)

    def end() -> None:
        for logger in loggers:
            logger.removeFilter(keep)
        if sys.unraisablehook is hook:  # else another one stands on it by now
            sys.unraisablehook = others

    return end


def _handlers() -> Any:
    """Orbax's, for arrays on devices and on the host, that cut no small ones."""
    devices = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_PIECE)
    arrays = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, devices)
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=arrays)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for arguments in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add(None, arguments, handler)
    return registry


def _items(state: Any) -> dict[str, Any]:
    """The fields of a state (a NamedTuple), its single numbers together."""
    fields = state._asdict()
    single = {name for name, value in fields.items() if hasattr(value, "dtype")}
    items = {name: value for name, value in fields.items() if name not in single}
    return items | {COUNTERS: {name: fields[name] for name in single}}


def _steps(folder: AnyPath) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def _set_damaged_aside(folder: Path) -> None:
    """Moves away the checkpoints that are newer than the newest whole one, and says so.

    JaxsdError if there is no whole one; then all stay.
    """
    damage = {}
    for step in sorted(_steps(folder), reverse=True):
        if (reason := find_damage(folder / str(step))) is None:
            break
        damage[step] = reason
    else:
        if damage:
            said = "; ".join(f"step {step}: {reason}" for step, reason in damage.items())
            raise JaxsdError(
                f"all checkpoints in {folder} are damaged ({said}): restore one of them, or "
                "remove them to begin anew"
            )
    for later, reason in damage.items():
        place = folder / DAMAGED / str(later)
        while place.exists():
            place = place.with_name(f"{place.name}_")
        place.parent.mkdir(exist_ok=True)
        (folder / str(later)).rename(place)
        print(
            f"warning: checkpoint {folder / str(later)} is damaged ({reason}); it is now {place}, "
            f"and step {step} is used instead",
            file=sys.stderr,
        )


def restore_params(
    folder: str | PurePath,
    step: int | None = None,
    which: str = "ema",
    dtype: Any = None,
    sharding: Placement | None = None,
) -> Params:
    """The parameters alone of a training's checkpoint, whatever its objective and optimizer.

    folder: the workdir or its `checkpoints`. step: by default the newest. which: "ema" for the
    averaged parameters, which are what is exported, or "params". dtype and sharding: as for
    `weights.load`. JaxsdError if there is no such checkpoint or it is damaged.
    """
    folder = as_path(folder)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    steps = sorted(_steps(folder)) if folder.is_dir() else []
    if not steps or step not in (None, *steps):
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        named = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise JaxsdError(f"{folder} has no {named}; {there}")
    place = folder / str(steps[-1] if step is None else step)
    if is_local(place) and (reason := find_damage(place)) is not None:
        raise JaxsdError(f"{place} is damaged ({reason}); there are {', '.join(map(str, steps))}")
    if not (place / which).is_dir():
        raise JaxsdError(f"{place} has no {which!r}; write 'ema' or 'params'")
    header = read_orbax_header(place / which)
    return _restore(place / which, header, dtype, sharding)


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
    return _restore(folder, header, dtype, sharding)


def _restore(
    folder: AnyPath, header: dict[str, Entry], dtype: Any, sharding: Placement | None
) -> Params:
    wanted = None if dtype is None else as_dtype(dtype)
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    free = sharding is None and default is not None

    def place(name: str, entry: Entry) -> jax.ShapeDtypeStruct:
        where = sharding(name, entry.shape) if callable(sharding) else sharding
        if where is None:
            where = jax.sharding.SingleDeviceSharding(default or jax.local_devices()[0])
        kept = DTYPES[entry.dtype] if wanted is None else wanted
        return jax.ShapeDtypeStruct(entry.shape, kept, sharding=where)

    abstract = {name: place(name, entry) for name, entry in header.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            path = folder.absolute() if is_local(folder) else folder
            found = checkpointer.restore(path, abstract)
    except Exception as error:  # orbax and tensorstore raise all kinds on damaged bytes
        reason = _first_line(error)
        raise JaxsdError(f"{folder} is a damaged Orbax checkpoint: {reason}") from None
    # Orbax binds arrays to their device; as of other files, they are to follow where they are used
    return {n: jax.device_put(np.asarray(a)) for n, a in found.items()} if free else found


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = (str(error).splitlines() or [type(error).__name__])[0]
    system = re.search(r"([^:]+) \[os_error_code", line)  # what matters of tensorstore's long ones
    return system[1].strip() if system else line
