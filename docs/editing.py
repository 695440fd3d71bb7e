"""Measures Imagic beside SDEdit and DDIM inversion on a scripted TEdBench, and draws the curves.

`python docs/editing.py` keeps each row in docs/editing.json as soon as it is measured, and what was
drawn of each Imagic edit in .cache/editing, so that it goes on where it was stopped; `--minutes 5`
stops it. `--only SDEdit Imagic` chooses methods; `--no-measure` prints and draws what is known.
Needs matplotlib: `pip install -e ".[docs]"`.

100 held-out scans, three edits of each (`edits.py`), all by the shipped `digits`. Everything in
`Design` was chosen on the first 20 pictures of training scans (`--split train --count 20`), by the
area under the curve that is printed, before any edit of a held-out scan was looked at.

- SDEdit (2108.01073): image-to-image with the target prompt, over the strength.
- DDIM inversion (2010.02502): a share of the way to noise with the empty prompt, as of a picture of
  which nothing is known, and back with the target prompt, over that share.
- Imagic (2210.09276): an embedding and then the network learn the picture; sampled over eta.
"""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import editing_plot
import jax.numpy as jnp
import numpy as np
import tyro
from edits import KINDS, Edit, Scores, draw_edits, psnr, score
from kept import Kept, digest
from tradeoff import Curve, area, gaps, interval

import jaxsd
from jaxsd import training
from jaxsd.diffusion import jumps
from jaxsd.editing import imagic
from jaxsd.editing.editor import Editor
from jaxsd.evaluation.report import format_table
from jaxsd.pictures import to_model
from jaxsd.pipeline import Pipeline

DOCS = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Design:
    """Everything that decides the results."""

    strengths: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    etas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    seeds: int = 2
    """Of the sampler, for each edit; inversion has no noise to draw."""
    steps: int = 20
    inversion_steps: int = 50
    sdedit_scale: float = 3.0
    inversion_scale: float = 3.0
    source_known: bool = False
    """Invert with the caption of the picture instead of the empty prompt."""
    imagic_scale: float = 3.0
    batch_size: int = 4
    embedding_steps: int = 60
    embedding_rate: float = 1e-2
    tuning_steps: int = 60
    tuning_rate: float = 3e-4


@dataclasses.dataclass(frozen=True)
class Options:
    """Which rows to measure, and where they are kept."""

    design: Design = Design()
    only: tuple[str, ...] = ()
    """SDEdit, DDIM inversion, Imagic; by default all."""
    split: str = "test"
    count: int = 100
    """Pictures, each edited in three ways."""
    results: Path = DOCS / "editing.json"
    image: Path = DOCS / "images" / "editing.png"
    cache: Path = Path(".cache/editing")
    minutes: float | None = None
    """Stop after so long; what is done is kept."""
    measure: bool = True
    """Also measure the rows that are not known yet."""


# --- The methods -----------------------------------------------------------------------------


def sdedit(pipe: Pipeline, edits: Sequence[Edit], strength: float, seed: int, design: Design):
    """uint8 [n, 32, 32, 3], as all methods."""
    return pipe.decode_array(
        pipe.sample(
            [edit.prompt for edit in edits],
            [edit.seed + 1_000_000 * seed for edit in edits],
            image=[edit.picture for edit in edits],
            strength=strength,
            steps=design.steps,
            guidance_scale=design.sdedit_scale,
            sampler="ddim",
        )
    )


def inversion(pipe: Pipeline, edits: Sequence[Edit], share: float, seed: int, design: Design):
    """The way to noise is without guidance, where it is straightest."""
    count, steps = len(edits), design.inversion_steps
    z = latents_of(pipe, edits)
    nothing = pipe.encode([""] * count)
    source = [edit.source_prompt for edit in edits]
    told = pipe.encode(source) if design.source_known else nothing
    rungs, climbed = jumps.reverse(jumps.ladder(pipe.schedule, steps)), round(share * steps)
    for i in range(climbed):
        here, there = (rungs.at(jnp.full(count, k)) for k in (i, i + 1))
        said = pipe.predict(z, float(rungs.t[i]), told, None, 1.0)
        z = jumps.jump(pipe.schedule.prediction_type, said, z, here, there)
    back = pipe.denoise(
        z,
        pipe.encode([edit.prompt for edit in edits]),
        nothing,
        steps=steps,
        guidance_scale=design.inversion_scale,
        sampler="ddim",
        denoising_start=1 - share,
    )
    return pipe.decode_array(back)


def latents_of(pipe: Pipeline, edits: Sequence[Edit]):
    return pipe.encode_pictures(np.stack([to_model(edit.picture, 32, 32) for edit in edits]))


@dataclasses.dataclass(frozen=True)
class Method:
    """knobs, settings: names of fields of `Design`. draw: None for Imagic, which learns first."""

    name: str
    knob: str
    knobs: str
    settings: tuple[str, ...]
    draw: Any = None
    seeded: bool = True

    def seeds(self, design: Design) -> range:
        return range(design.seeds if self.seeded else 1)

    def made_with(self, design: Design, weights: str) -> str:
        told = {name: getattr(design, name) for name in self.settings}
        told |= {"seeds": len(self.seeds(design))}
        return ", ".join([f"weights {weights}", *(f"{k} {v}" for k, v in told.items())])


METHODS = (
    Method("SDEdit", "strength", "strengths", ("steps", "sdedit_scale"), sdedit),
    Method(
        "DDIM inversion",
        "share",
        "shares",
        ("inversion_steps", "inversion_scale", "source_known"),
        inversion,
        seeded=False,
    ),
)
