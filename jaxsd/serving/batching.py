"""One thread owns the device and draws what waits, several requests in one compiled program."""

import collections
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxsd.serving.limits import Busy

logger = logging.getLogger(__name__)
# (step, of how many, uint8 [h, w, c]): called in the worker's thread, and not to keep it
OnFrame = Callable[[int, int, np.ndarray], None]
Watch = Callable[[int, float, Any], None]  # Pipeline's callback
GRACE = 60  # the longest that a client is told to stay away, in seconds


@runtime_checkable
class Model(Protocol):
    """What the worker knows of a model."""

    batch_size: int

    def kind(self, request: Any) -> Hashable:
        """What requests must share to be drawn by one run of one program."""
        ...

    def frames_at(self, request: Any) -> Sequence[int]:
        """The steps after which a picture is shown on the way."""
        ...

    def preview(self, latents: Any, /) -> np.ndarray:
        """What they look like: uint8 [batch_size, h, w, c]."""
        ...

    def draw(self, requests: Sequence[Any], watch: Watch | None = None) -> np.ndarray:
        """At most batch_size pictures, uint8 [n, h, w, c]; watch is called after each step."""
        ...


class Job:
    """A picture that somebody waits for; who no longer does cancels `picture`, a future of it."""

    def __init__(self, model: Model, request: Any, on_frame: OnFrame | None):
        self.model, self.request, self.on_frame = model, request, on_frame
        self.kind = (id(model), model.kind(request))
        self.picture: Future[np.ndarray] = Future()

    @property
    def given_up(self) -> bool:
        return self.picture.cancelled()

    def show(self, step: int, count: int, picture: np.ndarray) -> None:
        if self.on_frame is None or self.given_up:
            return
        try:
            self.on_frame(step, count, picture)
        except Exception:  # whoever looks is not to stop the others' run
            logger.exception("a picture on the way could not be shown")
            self.on_frame = None

    def settle(self, outcome: np.ndarray | Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            if isinstance(outcome, Exception):
                self.picture.set_exception(outcome)
            else:
                self.picture.set_result(outcome)


class _NobodyWaits(Exception):
    """Ends a run whose pictures nobody waits for any more."""


class Worker:
    """A queue of at most `waiting` pictures and the thread that draws them.

    Who has waited longest is served next, together with others whose requests are of the same kind,
    as many as the model draws at a time. A batch always has the model's full size, so that whoever
    shares it changes no bit of a picture.
    """

    def __init__(self, waiting: int):
        self._most = waiting
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._drawing: list[Job] = []
        self._seconds = 1.0  # that the last batch took
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether new requests are taken."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """How many pictures have not begun."""
        with self._changed:
            return sum(not job.given_up for job in self._waiting)

    @property
    def drawing(self) -> int:
        """How many pictures have begun and are not done."""
        return sum(not job.picture.done() for job in self._drawing)

    def submit(
        self, model: Model, requests: Sequence[Any], on_frame: OnFrame | None = None
    ) -> list[Job]:
        """All of the requests get in line, or none; Busy if there is no room.

        on_frame: told of the pictures on the way.
        """
        jobs = [Job(model, request, on_frame) for request in requests]
        with self._changed:
            if not self.alive:
                raise Busy("the server is stopping: ask again when it is back", GRACE)
            self._forget()
            if len(self._waiting) + len(jobs) > self._most:
                batches = math.ceil(len(self._waiting) / model.batch_size)
                later = min(GRACE, max(1, math.ceil(batches * self._seconds)))
                raise Busy(
                    f"{len(self._waiting)} pictures wait already, and {self._most} are the most: "
                    f"ask again in {later} s",
                    later,
                )
            self._waiting.extend(jobs)
            self._changed.notify()
        return jobs

    def stop(self) -> None:
        """Refuses what waits and what comes; returns when what runs is answered."""
        with self._changed:
            self._stopping = True
            refused = [*self._waiting]
            self._waiting.clear()
            self._changed.notify()
        for job in refused:
            job.settle(Busy("the server is stopping: ask again when it is back", GRACE))
        self._thread.join()

    def _forget(self) -> None:
        """Drops those who no longer wait; the lock is held."""
        self._waiting = collections.deque(job for job in self._waiting if not job.given_up)

    def _work(self) -> None:
        while batch := self._take():
            began = time.monotonic()
            self._draw(batch)
            self._drawing = []
            self._seconds = time.monotonic() - began

    def _take(self) -> list[Job]:
        """The next batch, of one kind; empty when there is to be none."""
        with self._changed:
            self._forget()
            while not self._waiting and not self._stopping:
                self._changed.wait()
                self._forget()
            if not self._waiting:
                return []
            first = self._waiting[0]
            alike = [job for job in self._waiting if job.kind == first.kind]
            batch = alike[: first.model.batch_size]
            taken = set(map(id, batch))
            self._waiting = collections.deque(j for j in self._waiting if id(j) not in taken)
            self._drawing = batch
            return batch

    def _draw(self, batch: Sequence[Job]) -> None:
        model = batch[0].model
        shown: Sequence[int] = ()

        def watch(i: int, t: float, latents: Any) -> None:
            if all(job.given_up for job in batch):
                raise _NobodyWaits
            if i in shown:
                pictures = model.preview(latents)
                for job, picture in zip(batch, pictures, strict=False):  # the rest is padding
                    job.show(shown.index(i) + 1, len(shown), picture)

        try:  # all that a model does: what is raised outside ends the thread, and all who come wait
            if any(job.on_frame for job in batch):
                shown = model.frames_at(batch[0].request)
            pictures = model.draw([job.request for job in batch], watch)
            drawn = list(zip(batch, pictures, strict=True))
        except _NobodyWaits:
            return
        except Exception as error:
            if len(batch) > 1:  # one of them is at fault, and the others are not to pay for it
                for job in batch:
                    self._draw([job])
                return
            logger.exception("a picture failed: %s", error)
            batch[0].settle(error)
            return
        for job, picture in drawn:
            job.settle(picture)
