"""What may end a training early: signals, and losses that are no numbers.

Both are known for certain only later: whether a step's gradients were finite when the device has
done it, and whether any process was told to stop when all have said so. So the step is followed by
a few numbers on their way to the host, which are read when later steps are already under way: the
device never waits, and every process reads the same.
"""

import collections
import os
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsd.errors import JaxsdError

DELAY = 2  # steps that are under way while the numbers of an older one are read


class Signals:
    """Notes the first SIGTERM or SIGINT while it is entered; a second one ends the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # only there it is allowed
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
        line = f"\n{self.received.name}: saving after this step; once more stops at once\n"
        os.write(2, line.encode())  # print would fail where the signal has cut into another print


class Watch:
    """Whether to stop after the step just begun: `told`, the same in all processes.

    A state never counts as `max_skipped` bad steps in a row without JaxsdError, which names them;
    bad steps change no parameter, so every checkpoint is a good one.
    """

    def __init__(self, max_skipped: int, signals: Signals):
        self._max_skipped, self._signals = max_skipped, signals
        self._pending: collections.deque[tuple[int, Any, Any]] = collections.deque()
        self._vote = _vote_of_all() if jax.process_count() > 1 else None
        self.told = False

    def after(self, step: int, skipped_in_a_row: jax.Array) -> None:
        """Notes the step just begun, and reads of those before it."""
        told: Any = self._signals.received is not None
        if self._vote is None:
            self.told = told  # no need to hear of it from the device
        else:
            told = self._vote(told)
            told.copy_to_host_async()
        skipped_in_a_row.copy_to_host_async()
        self._pending.append((step, skipped_in_a_row, told))
        self._read(DELAY)

    def give_up(self) -> bool:
        """Whether to stop even between two steps: only where there is no one to agree with."""
        self.told |= self._vote is None and self._signals.received is not None
        return self.told and self._vote is None

    def settle(self) -> None:
        """Waits for all steps begun: JaxsdError if too many were bad."""
        self._read(0)

    def _read(self, left: int) -> None:
        while len(self._pending) > left:
            step, count, told = self._pending.popleft()
            self.told |= bool(told)
            if (bad := int(count)) >= self._max_skipped:
                raise JaxsdError(
                    f"loss or gradient was not finite {bad} times in a row: steps "
                    f"{step - bad + 1} to {step}, batches {step - bad} to {step - 1}. Nothing of "
                    "them was kept, and no checkpoint is lost; look at those batches, or lower the "
                    "learning rate"
                )


def _vote_of_all() -> Any:
    """A function: whether any process says True; the answer is on its way to all.

    A process may say one thing, or one for each of its devices.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    each = NamedSharding(mesh, PartitionSpec("all"))
    count = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def vote(flag: bool | np.ndarray) -> jax.Array:
        mine = np.full(jax.local_device_count(), flag, np.int32)
        return count(jax.make_array_from_process_local_data(each, mine))

    return vote
