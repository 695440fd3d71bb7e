"""From examples to batches: a process's rows, made ahead of their use in threads or processes."""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxsd.errors import JaxsdError

Batch = dict[str, np.ndarray]
THREADS = 2  # in each process: while one reads, the other decodes
AHEAD = 2  # batches


def batches(
    dataset: Any,
    batch_size: int,
    start: int,
    stop: int,
    tokenize: Callable[[str], np.ndarray] | None = None,
    shard: tuple[int, int] = (0, 1),
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Batches number `start` ... `stop` - 1, made ahead of their use.

    Batch i is the same whatever the start and the number of workers, so a resumed training sees
    what an uninterrupted one would. dataset: examples by their number (dicts); if it has a `plan`,
    that is for batches of the same size. With `tokenize`, "caption" becomes "input_ids"; without,
    it is left out. Pictures become float32 in [-1, 1]. shard: (index, count) of this process; of
    each batch it gets the rows from index / count on, 1 / count of them. num_workers: processes
    that make batches; 0 for threads of this one. They end with the iterator, and with this process
    however it ends.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's own, which only absl's apps parse
        flags.FLAGS.mark_as_parsed()
    index, count = shard
    if not 0 <= index < count or batch_size % count:
        raise JaxsdError(
            f"batch_size {batch_size} must divide by {count} processes, of which this is {index}"
        )
    if (plan := getattr(dataset, "plan", None)) is not None and plan.batch_size != batch_size:
        raise JaxsdError(f"batches of {batch_size} from examples planned for {plan.batch_size}")
    rows = batch_size // count
    mine = _Batches(dataset, start * batch_size + index * rows, rows, batch_size, stop - start)
    made = (
        grain.MapDataset.source(mine)
        .to_iter_dataset(grain.ReadOptions(THREADS, AHEAD))
        .mp_prefetch(grain.MultiprocessingOptions(num_workers, AHEAD), _start_worker)
    )
    iterator = iter(made)
    try:
        for batch in iterator:
            yield _finish(batch, dataset, tokenize)
    except RuntimeError as error:
        if num_workers and "terminated unexpectedly" in str(error):
            raise JaxsdError(
                "a process that makes batches has died, for want of memory perhaps, or of room in "
                "/dev/shm: take fewer --num-workers or a smaller batch"
            ) from error
        raise
    finally:
        iterator.close()


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Batches by their number i: of `rows` examples each, from number `first + i * stride` on."""

    dataset: Any
    first: int
    rows: int
    stride: int
    count: int  # batches

    def __len__(self) -> int:
        return max(0, self.count)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = self.first + index * self.stride
        examples = [self.dataset[i] for i in range(first, first + self.rows)]
        return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def _finish(batch: dict[str, Any], dataset: Any, tokenize: Any) -> Batch:
    """What is left to do where the batch is used: words to ids, bytes to floats, names to the log.

    Here captions are remembered once for all workers, and pictures cost a quarter on the way.
    """
    captions, replaced = batch.pop("caption", None), batch.pop("replaced", None)
    finished = {name: _own(name, array) for name, array in batch.items()}
    if tokenize is not None and captions is not None:
        finished["input_ids"] = np.stack([tokenize(str(caption)) for caption in captions])
    if replaced is not None:
        told = [line for text in replaced for line in str(text).split("\n") if line]
        names = [line.partition("\t")[::2] for line in told]
        dataset.skipped.add(names, "replaced by the next of the same shape")
    return finished


def _own(name: str, array: np.ndarray) -> np.ndarray:
    """An array in memory of its own: what workers share is gone when the program ends."""
    array = np.asarray(array)
    if name == "image" and array.dtype == np.uint8:
        pixels = np.divide(array, np.float32(127.5), dtype=np.float32)
        return np.subtract(pixels, np.float32(1), out=pixels)
    return array if array.base is None else np.array(array)


def _start_worker(index: int, count: int) -> None:
    """In a worker process: signals are for the main process, with which the worker ends."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()  # also if it was killed, and could not say so
        os._exit(1)
