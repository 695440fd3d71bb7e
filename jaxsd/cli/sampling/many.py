"""Pictures of a file of prompts, as many as it has lines, in memory for a batch or two."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxsd import gallery, processes, sharding
from jaxsd.cli.sample import Options
from jaxsd.cli.sampling import model
from jaxsd.cli.sampling.model import Job, Session
from jaxsd.denoising import NO_UNCOND
from jaxsd.errors import JaxsdError
from jaxsd.pictures import to_uint8
from jaxsd.prompt_files import read_lines, scan
from jaxsd.seeds import SEEDS
from jaxsd.writing import Writer, one_ahead


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What this process has made of its share, and in how many seconds since the model is loaded.

    already: pictures that were in the folder before.
    """

    folder: Path
    images: int
    already: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.images else 0.0

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self) | {"folder": str(self.folder)}
        return values | {"images_per_second": self.images_per_second}

    def __str__(self) -> str:
        before = f"; {self.already} were there already" if self.already else ""
        rate = (
            f"{self.images} images in {self.seconds:.1f} s, {self.images_per_second:.1f} a second"
        )
        return f"{self.folder}: {rate}{before}"


def draw_file(options: Options) -> Drawn:
    """Makes what the folder lacks of the pictures of `options.prompts_file`.

    Of several processes each makes its share, and with several devices each of these its share of
    every batch. A picture depends on its line and seed alone: to the last bit, where as many are
    computed at a time on each device.
    """
    file = options.prompts_file
    assert file is not None
    if options.compiled and jax.local_device_count() > 1:
        raise JaxsdError(
            f"prompts_file shares each batch out to the {jax.local_device_count()} devices of this "
            "process, and programs are compiled for one: leave out compiled"
        )
    processes.first(lambda: [*scan(file)])  # refused before a model is loaded
    session = model.load(options)
    chunks = processes.first(lambda: _survey(session, file))
    said = session.notes | {
        name: getattr(session.options, name) for name in ("num_images", "seed", "height", "width")
    }
    del said["Software"]
    record = processes.first(lambda: gallery.check(options.out, said, file))

    devices = jax.local_devices()
    if len(devices) > 1:
        mesh = sharding.make_mesh(devices=devices)
        for pipe in filter(None, (session.pipe, session.refiner)):
            pipe.spread(mesh)
    total = record["lines"] * options.num_images
    rank, ranks = jax.process_index(), jax.process_count()
    size = session.rows(math.ceil(total / (ranks * len(devices)))) * len(devices)
    share = itertools.islice(_jobs(session, file), rank, None, ranks)
    with tqdm(total=len(range(rank, total, ranks)), unit=" images", disable=None) as bar:
        drawn = _draw(session, share, size, chunks, record, bar)
    if ranks > 1:  # where the first one leaves, the others are ended
        processes.wait_for_all("pictures drawn")
    return drawn


def _draw(
    session: Session,
    share: Iterator[Job],
    size: int,
    chunks: int,
    record: dict[str, Any],
    bar: tqdm,
) -> Drawn:
    folder, file = session.options.out, session.options.prompts_file
    assert file is not None
    began, images, already = time.perf_counter(), 0, 0
    claim = functools.cache(lambda: gallery.claim(folder, record, file))

    def missing() -> Iterator[Job]:
        nonlocal already
        for job in share:
            if _place(folder, job).exists():
                claim()  # it may be another command's, and have come just now
                already += 1
                bar.total -= 1  # which the bar's rate must not count
            else:
                yield job

    def started() -> Iterator[tuple[list[Job], Any]]:
        wanted = missing()
        while batch := list(itertools.islice(wanted, size)):
            yield batch, session.start(batch, size, chunks)

    with Writer() as writer:
        for batch, pixels in one_ahead(started()):
            pictures = to_uint8(np.asarray(pixels)[: len(batch)])
            claim()
            for job, picture in zip(batch, pictures, strict=True):
                writer.write(picture, _place(folder, job), session.notes_of(job, picture))
            images += len(batch)
            bar.update(len(batch))
    return Drawn(folder, images, already, time.perf_counter() - began)


def _place(folder: Path, job: Job) -> Path:
    assert job.index is not None
    return gallery.place(folder, job.index, job.seed)


def _jobs(session: Session, file: Path) -> Iterator[Job]:
    """The pictures that the lines ask for, one after another; JaxsdError for a seed too large."""
    options = session.options
    for line in read_lines(file):
        negative = line.negative_prompt
        negative = options.negative_prompt if negative is None else negative
        for i in range(options.num_images):
            first = options.seed + line.index * options.num_images
            seed = (first if line.seed is None else line.seed) + i
            if not 0 <= seed < SEEDS:
                raise JaxsdError(f"{file}, line {line.index + 1}: seeds must be from 0 to "
                                 f"{SEEDS - 1}, and this would be {seed}")  # fmt: skip
            yield Job(line.prompt, seed, negative, line.index)


def _survey(session: Session, file: Path) -> int:
    """Refuses lines that this model cannot draw; returns the chunks that the longest takes."""
    pipe, most = session.pipe, 1
    known = functools.lru_cache(10_000)(lambda name: pipe.encode([name]))
    for job in _jobs(session, file):
        where = f"{file}, line {(job.index or 0) + 1}"
        if job.negative_prompt and pipe.guidance_embedded:
            raise JaxsdError(f"{where}: {NO_UNCOND}")
        if not pipe.tokenizers:
            try:
                for name in (job.prompt, job.negative_prompt):
                    known(name)
            except JaxsdError as error:
                raise JaxsdError(f"{where}: {error}") from None
        elif session.options.long_prompts:
            most = max(most, pipe.chunks([job.prompt, job.negative_prompt]))
    return most
