"""Batches that are on the device before the step wants them."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_END = object()


class Prefetch:
    """Iterates over place(batch) of each batch, up to `size` of them made ahead in a thread.

    What the batches raise is raised here, in its turn. Ends early if there is none to be had, or
    they raise (a Ctrl-C reaches the processes that make them too), and give_up() says so. `waited`
    is the number of seconds that the reader has spent waiting. To be closed, which does not wait
    for a batch that never comes.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        place: Callable[[Any], Any],
        give_up: Callable[[], bool] = lambda: False,
        size: int = 2,
    ):
        self.waited = 0.0
        self._give_up = give_up
        self._closed = threading.Event()
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(size)
        self._thread = threading.Thread(
            target=self._run, args=(batches, place), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            batch, error = self._next()
            self.waited += time.perf_counter() - start
            if error is not None and not self._give_up():
                raise error
            if error is not None or batch is _END:
                return
            yield batch

    def _next(self) -> tuple[Any, BaseException | None]:
        while True:
            try:
                return self._ready.get(timeout=0.1)
            except queue.Empty:
                if self._give_up():
                    return _END, None

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=1.0)

    def _run(self, batches: Iterator[Any], place: Callable[[Any], Any]) -> None:
        try:
            for batch in batches:
                if not self._offer((place(batch), None)):
                    return
            self._offer((_END, None))
        except BaseException as error:  # raised where the batches are used
            self._offer((None, error))

    def _offer(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
