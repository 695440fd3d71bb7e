"""Pictures are written by threads, while the next ones are computed."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxsd.pictures import write_animation, write_png

T = TypeVar("T")


class Writer:
    """Writes PNGs, and animations, in threads, as a context: at its end all are written.

    No more than `waiting` are kept; then `write` waits for the first. What fails in a thread is
    raised by a later `write` or at the end. An error drops no other picture. After an interruption
    (whatever is no Exception) what has not been begun is dropped, and what has been is written to
    its end: no file is left in pieces.
    """

    def __init__(self, threads: int | None = None, waiting: int | None = None):
        threads = threads or min(4, os.cpu_count() or 1)
        self._waiting = waiting or 8 * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="png")
        self._futures: collections.deque[Future] = collections.deque()

    def write(self, picture: np.ndarray, path: Path, notes: Mapping[str, Any]) -> None:
        """As `pictures.write_png`, but later; the picture must not change meanwhile."""
        self._submit(write_png, picture, path, notes)

    def animate(self, frames: Sequence[np.ndarray], path: Path, notes: Mapping[str, Any]) -> None:
        """As `pictures.write_animation`, but later."""
        self._submit(write_animation, frames, path, notes)

    def _submit(self, call: Callable[..., Any], *arguments: Any) -> None:
        while len(self._futures) >= self._waiting:
            self._futures.popleft().result()
        self._futures.append(self._pool.submit(call, *arguments))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        drop = kind is not None and not issubclass(kind, Exception)
        try:
            while kind is None and self._futures:
                self._futures.popleft().result()
        except BaseException as error:
            drop = not isinstance(error, Exception)
            raise
        finally:
            self._pool.shutdown(cancel_futures=drop)


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each of them when the next one has been asked for.

    Where asking only starts a computation, the device has work while the caller looks at a result.
    An error in asking is raised after the item that is held.
    """
    held: list[T] = []
    try:
        for item in items:
            yield from held
            held = [item]
    except Exception:
        yield from held
        raise
    yield from held
