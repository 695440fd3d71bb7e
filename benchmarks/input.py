"""Images per second of the input pipeline, beside torch's DataLoader in the same run.

python benchmarks/input.py                      # about six minutes; needs torch for the peer

JPEG pictures of about 512 x 512 pixels and of many ratios are cut from scikit-learn's two
photographs, and written as a folder with captions, as tar shards and as Parquet. Every
configuration decodes them to batches of float32 [16, 512, 512, 3] (or the shapes of buckets),
scaled with Lanczos' filter, in turns with all others. The Parquet file repeats them until it has
several times as many row groups as are kept in memory: as of a large data set, nearly every picture
of the shuffled order has its group read for it alone. What is timed is the steady state: neither
the start of processes, nor the batches that they have made by then. The peer reads the folder with
Pillow, scales and crops alike, in as many worker processes, and makes float32 tensors; each of its
workers has one thread, each of ours the two of `jaxsd.data.loading.THREADS`. Images per second of
one core's time stand beside those of the clock: other work moves them less.
"""

import argparse
import dataclasses
import io
import json
import math
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxsd.data.tables import GROUPS

RESOLUTION, BATCH = 512, 16
ROWS = 100  # in a row group of Parquet, as `datasets` writes them
LAYOUTS = ("folder", "tar", "parquet")
SPREAD = (statistics.median, min, max)


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration: who loads, from which layout, with buckets or not, in how many workers."""

    library: str
    layout: str
    buckets: bool
    workers: int


def make_pictures(count: int) -> list[tuple[str, bytes, str]]:
    """(name, JPEG, caption): windows of photographs, from 3:4 to 16:9, of 512² to 640² pixels."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        photograph = photographs[i % 2]
        ratio = rng.uniform(3 / 4, 16 / 9)
        height = rng.uniform(0.7, 1) * min(photograph.height, photograph.width / ratio)
        width = ratio * height
        left = rng.uniform(0, photograph.width - width)
        top = rng.uniform(0, photograph.height - height)
        side = rng.uniform(512, 640)
        size = round(side * ratio**0.5), round(side / ratio**0.5)
        window = photograph.resize(
            size, Image.Resampling.BICUBIC, (left, top, left + width, top + height)
        )
        stream = io.BytesIO()
        window.save(stream, "JPEG", quality=90)
        made.append((f"{i:05}.jpg", stream.getvalue(), f"picture {i}"))
    return made


def write(root: Path, pictures: list[tuple[str, bytes, str]]) -> None:
    """The same pictures in every layout."""
    import pyarrow as pa
    from pyarrow import parquet

    for layout in LAYOUTS:
        (root / layout).mkdir()
    rows = [json.dumps({"file_name": name, "text": text}) for name, _, text in pictures]
    (root / "folder" / "metadata.jsonl").write_text("\n".join(rows))
    with tarfile.open(root / "tar" / "0000.tar", "w") as tar:
        for name, image, text in pictures:
            (root / "folder" / name).write_bytes(image)
            for member, raw in ((name, image), (name.replace(".jpg", ".txt"), text.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    images = [{"bytes": image, "path": name} for name, image, _ in pictures]
    table = pa.table({"image": images, "text": [text for *_, text in pictures]})
    with parquet.ParquetWriter(root / "parquet" / "0.parquet", table.schema) as writer:
        for _ in range(math.ceil(4 * GROUPS * ROWS / len(pictures))):
            writer.write_table(table, row_group_size=ROWS)


def open_batches(run: Run, root: Path) -> Iterator[Any]:
    """Endless batches."""
    if run.library == "torch":
        return torch_batches(root / run.layout, run.workers)
    from jaxsd import data

    options = data.PictureOptions(
        data=str(root / run.layout), resolution=RESOLUTION, buckets=run.buckets
    )
    dataset = data.open_pictures(options, 0, BATCH)
    return data.batches(dataset, BATCH, 0, 10**6, num_workers=run.workers)


class TorchPictures:
    """The peer's data set: the same work with the same library."""

    def __init__(self, folder: Path):
        self.rows = [json.loads(row) for row in open(folder / "metadata.jsonl")]
        self.folder = folder

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Any:
        import torch

        row = self.rows[index % len(self.rows)]
        with Image.open(self.folder / row["file_name"]) as opened:
            image = opened.convert("RGB")
        scale = RESOLUTION / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
        )
        left, top = (image.width - RESOLUTION) // 2, (image.height - RESOLUTION) // 2
        image = image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
        return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1), row["text"]


def torch_batches(folder: Path, workers: int) -> Iterator[Any]:
    import torch

    torch.set_num_threads(1)
    loader: Any = torch.utils.data.DataLoader(
        TorchPictures(folder), BATCH, shuffle=False, num_workers=workers
    )
    yield from loader


def cpu_seconds() -> float:
    """Seconds of all cores that this process and its workers have used (Linux)."""
    ticks = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(run: Run, root: Path, batches: int) -> tuple[float, float]:
    """Images per second, once everything has started and what was made meanwhile is used up.

    And images per second of one core's time, which says the same on a machine with other work.
    """
    made = open_batches(run, root)
    try:
        for _ in range(4 + 4 * run.workers):  # what buffers hold
            next(made)
        start, used = time.perf_counter(), cpu_seconds()
        for _ in range(batches):
            next(made)
        seconds, used = time.perf_counter() - start, cpu_seconds() - used
        return batches * BATCH / seconds, batches * BATCH / used
    finally:
        made.close()  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of the input pipeline.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    options = parser.parse_args()
    runs = [
        Run("jaxsd", layout, buckets, workers)
        for layout in options.layouts
        for buckets in (False, True)
        for workers in options.workers
    ]
    runs += [Run("torch", "folder", False, workers) for workers in options.workers]
    rates: dict[Run, list[tuple[float, float]]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, make_pictures(options.pictures))
        for _ in range(options.repeats):
            for run in runs:
                rates[run].append(measure(run, root, options.batches))
    cores = len(os.sched_getaffinity(0))
    print(f"images per second, {cores} cores, {options.repeats} runs of each in turns")
    print(
        "| | layout | buckets | workers | median | least | most | per core second | least | most |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for run, pairs in rates.items():
        spread = (f(column) for column in zip(*pairs, strict=True) for f in SPREAD)
        numbers = " | ".join(f"{value:.0f}" for value in spread)
        buckets = "yes" if run.buckets else "no"
        print(f"| {run.library} | {run.layout} | {buckets} | {run.workers} | {numbers} |")


if __name__ == "__main__":
    main()
