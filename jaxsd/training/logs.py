"""Where a training tells what it does: JSON lines, TensorBoard, pictures, a page, W&B.

A tracker continues after the step that training is resumed from: what follows is about to come
again.
"""

import contextlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd import processes, run_report
from jaxsd.errors import JaxsdError
from jaxsd.pictures import write_png
from jaxsd.training.workdir import writing
from jaxsd.weights import read_json, write_json
from jaxsd.weights.files import replacing


class Tracker:
    """Something that is told numbers and pictures; what it has no use for it leaves."""

    def scalars(self, step: int, row: dict[str, float]) -> None:
        pass

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """picture: uint8 [h, w, 3]."""

    def close(self) -> None:
        pass


class JSONLines(Tracker):
    """A row for each logged step: {"step": ..., "loss": ..., ...}; null is no finite number."""

    def __init__(self, file: Path, last: int):
        if file.exists():
            rows = file.read_text(encoding="utf-8").splitlines()
            kept = [row for row in rows if _step_of(row) <= last]
            with replacing(file) as temporary:
                temporary.write_text("".join(row + "\n" for row in kept), encoding="utf-8")
        self._file = open(file, "a", encoding="utf-8")

    def scalars(self, step: int, row: dict[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint may follow, after which it comes no more

    def close(self) -> None:
        self._file.close()


def _step_of(row: str) -> int | float:
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return float("inf")


class Pictures(Tracker):
    """A PNG file for each picture: NAME_0001000.png, where a name may have folders."""

    def __init__(self, folder: Path):
        self._folder = folder

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        write_png(picture, self._folder / f"{name}_{step:07}.png")


class TensorBoard(Tracker):
    """Each row is in the file at once. A SummaryWriter has a queue, which would be lost with the
    process, and a thread, for which all would wait after it met a full disk.
    """

    def __init__(self, folder: Path, last: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore

        folder.mkdir(parents=True, exist_ok=True)
        runs = sum(1 for _ in folder.iterdir())  # two that begin in one second would share a name
        self._file = EventsWriter(str(folder / "events"), f".{runs:04}")
        self._write(last + 1, session_log=SessionLog(status=SessionLog.START))  # hides older ones
        self._file.flush()

    def scalars(self, step: int, row: dict[str, float]) -> None:
        from tensorboardX import summary

        for name, value in row.items():
            self._write(step, summary=summary.scalar(name, value))
        self._file.flush()

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        from tensorboardX import summary

        self._write(step, summary=summary.image(name, picture, dataformats="HWC"))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

        self._file.write_event(Event(step=step, wall_time=time.time(), **content))

    def close(self) -> None:
        self._file.close()


class Report(Tracker):
    """`report.html`: at the start, after evaluations and pictures, and once in a while between.

    It takes a twentieth of the time at most. One that cannot be made is told once, and not tried
    again.
    """

    EVERY, SHARE = 60.0, 0.05  # seconds, and of all time

    def __init__(self, workdir: Path):
        self._workdir, self._due, self._failed = workdir, False, False
        self._write()

    def scalars(self, step: int, row: dict[str, float]) -> None:
        self._due |= any("/" in name for name in row)
        rest = max(self._took / self.SHARE, 0.0 if self._due else self.EVERY)
        if time.monotonic() - self._ended >= rest:
            self._write()

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._due = True

    def _write(self) -> None:
        began = time.monotonic()
        if not self._failed:
            self._failed = not write_report(self._workdir)
        self._ended, self._due = time.monotonic(), False
        self._took = self._ended - began


def write_report(workdir: Path) -> bool:
    """Makes `report.html` of what the folder holds; says why, and returns False, if it cannot."""
    try:
        run_report.write(workdir)
    except Exception as error:  # a page is not worth a training
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"warning: no {run_report.FILE}: {reason}", file=sys.stderr)
        return False
    return True


class WeightsAndBiases(Tracker):
    """One run for one workdir, however often it is resumed; its id is in wandb.json.

    WANDB_MODE=offline and its other variables count as ever. Rows that come again after a kill are
    the same as before, and carry their step as a value: W&B's own count only ever rises.
    """

    def __init__(self, project: str, workdir: Path, config: dict[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise JaxsdError(
                "wandb_project needs Weights & Biases: pip install 'jaxsd[wandb]'"
            ) from None
        file = workdir / "wandb.json"
        if not file.exists():
            write_json(file, {"id": uuid.uuid4().hex[:12]})
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            id=read_json(file)["id"],
            resume="allow",
            dir=str(workdir),
            name=workdir.name,
            config=config,
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, row: dict[str, float]) -> None:
        self._run.log({"step": step, **row})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self) -> None:
        self._run.finish()


class Log(Tracker):
    """All trackers as one; a disk that refuses is one line."""

    def __init__(self, workdir: Path, trackers: Sequence[Tracker]):
        self._workdir, self._trackers = workdir, trackers

    def scalars(self, step: int, row: dict[str, float]) -> None:
        with writing(self._workdir):
            for tracker in self._trackers:
                tracker.scalars(step, row)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        with writing(self._workdir):
            for tracker in self._trackers:
                tracker.image(step, name, picture)


@contextlib.contextmanager
def _closing(tracker: Tracker, workdir: Path) -> Iterator[None]:
    """Closes it at the end. After an error that is to be told, what the disk says is no news."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            tracker.close()
        raise
    with writing(workdir):
        tracker.close()


@contextlib.contextmanager
def open_log(
    workdir: Path,
    last: int,
    config: dict[str, Any],
    wandb_project: str | None = None,
    report: bool = False,
) -> Iterator[Log]:
    """The log of a training, to be continued after step `last`; the first process alone has one."""
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []

        def add(tracker: Tracker) -> None:
            stack.enter_context(_closing(tracker, workdir))
            trackers.append(tracker)

        def start() -> None:
            with writing(workdir):
                add(JSONLines(workdir / "metrics.jsonl", last))
                add(TensorBoard(workdir / "tensorboard", last))
                add(Pictures(workdir))
            if report:
                add(Report(workdir))
            if wandb_project is not None:
                add(WeightsAndBiases(wandb_project, workdir, config))

        processes.first(start)
        yield Log(workdir, trackers)
