"""Pictures of the prompts of the command line, numbered, with a grid."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsd import processes
from jaxsd.cli.sample import Options
from jaxsd.cli.sampling import model
from jaxsd.cli.sampling.model import Job
from jaxsd.errors import JaxsdError
from jaxsd.pictures import tile, to_uint8, write_png
from jaxsd.terminal.screen import open_screen
from jaxsd.writing import Writer, one_ahead


def draw_prompts(options: Options) -> list[Path]:
    """Makes the pictures and returns where they are: the grid, if there is one, last.

    Of several processes each makes, and returns, its own batches, and there is no grid.
    """
    # A terminal that is asked what it can show answers before anything else is said
    screen = None if options.json else open_screen(options.show)
    session = model.load(options)
    options, pipe = session.options, session.pipe
    if not options.prompts and pipe.takes_prompts:
        raise JaxsdError('give at least one prompt, such as "a red seven on a white background"')
    prompts, negative = options.prompts or ("",), options.negative_prompt
    jobs = [
        Job(prompt, options.seed + i, negative)
        for prompt in prompts
        for i in range(options.num_images)
    ]
    chunks = pipe.chunks([*prompts, negative]) if options.long_prompts else 1
    size = session.batch_size
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    mine = [*enumerate(batches)][jax.process_index() :: jax.process_count()]
    preview = None
    if options.preview_every:
        from jaxsd.previews import previewer

        preview = previewer(pipe, options.preview_with)
    last = session.last if preview else 0

    def started() -> Iterator[tuple[int, list[Job], Any, list[np.ndarray]]]:
        for rank, batch in mine:
            frames: list[np.ndarray] = []

            def look(i: int, t: float, latents: Any, frames=frames, batch=batch) -> None:
                if (i + 1) % options.preview_every == 0 or i + 1 == last:
                    assert preview is not None
                    frames.append(preview(latents))
                    if screen:
                        screen.show(tile(frames[-1][: len(batch)]))

            watch = look if preview else None
            yield rank, batch, session.start(batch, session.rows(len(jobs)), chunks, watch), frames

    number = processes.agree(_next_number(options.out))
    paths, arrays = [], []
    # Whoever looks on sees one batch to its end before the next one begins
    batches_made = started() if screen and preview else one_ahead(started())
    with Writer() as writer:
        for rank, batch, pixels, frames in batches_made:
            pictures = to_uint8(np.asarray(pixels)[: len(batch)])
            if screen:
                screen.show(tile(pictures))
                screen.next()
            for i, (job, picture) in enumerate(zip(batch, pictures, strict=True)):
                stem = f"{number + rank * size + i:05}-{_slug(job.prompt)}-seed{job.seed}"
                notes = session.notes_of(job, picture)
                paths.append(options.out / f"{stem}.png")
                writer.write(picture, paths[-1], notes)
                arrays.append(picture)
                if frames:
                    seen = [frame[i] for frame in frames]
                    strip, file = tile(seen, len(seen)), options.out / f"{stem}-preview.png"
                    writer.write(strip, file, notes)
                    writer.animate(seen, file.with_suffix(".webp"), notes)
    if len(paths) > 1 and jax.process_count() == 1:
        columns = options.num_images if options.num_images > 1 else None
        grid = options.out / f"{number:05}-grid.png"
        notes = {"prompts": list(prompts), "seed": options.seed, **session.notes}
        paths.append(write_png(tile(arrays, columns), grid, notes))
    return paths


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-") or "empty"


def _next_number(folder: Path) -> int:
    numbers = [int(m[1]) for p in folder.glob("*.png") if (m := re.match(r"(\d{5,})-", p.name))]
    return max(numbers, default=-1) + 1
