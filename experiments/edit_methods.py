"""The ways to edit that `editing.py` compares, each over what leads away from a picture.

- SDEdit (2108.01073): image-to-image with the target prompt, over the strength.
- DDIM inversion (2010.02502): a share of the way to noise, without guidance, where it is
  straightest, and with the empty prompt, as of a picture of which nothing is known; back with the
  target prompt. Over that share.
- Imagic (2210.09276): first an embedding, then the network learns the picture. Over eta.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from edits import Edit

from jaxsd import training
from jaxsd.diffusion import jumps
from jaxsd.editing import imagic
from jaxsd.editing.editor import Editor
from jaxsd.pictures import to_model
from jaxsd.pipeline import Pipeline
from jaxsd.weights.files import replacing


@dataclasses.dataclass(frozen=True)
class Design:
    """Everything that decides the results."""

    strengths: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    etas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    seeds: int = 1
    """Of the sampler, for each edit; inversion has no noise to draw."""
    steps: int = 10
    """Of SDEdit and Imagic, by DDIM."""
    sdedit_scale: float = 3.0
    inversion_steps: int = 20
    inversion_scale: float = 3.0
    source_known: bool = False
    """Invert with the caption of the picture instead of the empty prompt."""
    imagic_scale: float = 3.0
    batch_size: int = 4
    embedding_steps: int = 60
    embedding_rate: float = 3e-2
    tuning_steps: int = 30
    tuning_rate: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Method:
    """knobs: field of `Design` with its values; knob: what one is called.

    made_with: fields that decide what is drawn, beside the knob.
    """

    name: str
    knob: str
    knobs: str
    made_with: tuple[str, ...]

    def settings(self, design: Design) -> str:
        return ", ".join(f"{name} {getattr(design, name)}" for name in self.made_with)


SDEDIT = Method("SDEdit", "strength", "strengths", ("seeds", "steps", "sdedit_scale"))
INVERSION = Method(
    "DDIM inversion", "share", "shares", ("inversion_steps", "inversion_scale", "source_known")
)
IMAGIC = Method(
    "Imagic",
    "eta",
    "etas",
    ("seeds", "steps", "imagic_scale", "batch_size", "embedding_steps", "embedding_rate")
    + ("tuning_steps", "tuning_rate"),
)
METHODS = (SDEDIT, INVERSION, IMAGIC)


def sdedit(pipe: Pipeline, edits: Sequence[Edit], strength: float, design: Design) -> np.ndarray:
    """uint8 [seeds, n, 32, 32, 3]."""
    drawn = [
        pipe.sample(
            [edit.prompt for edit in edits],
            seeds,
            image=[edit.picture for edit in edits],
            strength=strength,
            steps=design.steps,
            guidance_scale=design.sdedit_scale,
            sampler="ddim",
        )
        for seeds in _seeds(edits, design)
    ]
    return np.stack([pipe.decode_array(latents) for latents in drawn])


def inversion(pipe: Pipeline, edits: Sequence[Edit], share: float, design: Design) -> np.ndarray:
    """uint8 [1, n, 32, 32, 3]. pipe: on `jumps.student_schedule`, whose steps turn round."""
    count, steps = len(edits), design.inversion_steps
    nothing = pipe.encode([""] * count)
    source = pipe.encode([edit.source_prompt for edit in edits])
    z = latents_of(pipe, edits)
    rungs = jumps.reverse(jumps.ladder(pipe.schedule, steps))
    for i in range(round(share * steps)):
        here, there = (rungs.at(jnp.full(count, k)) for k in (i, i + 1))
        told = source if design.source_known else nothing
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
    return pipe.decode_array(back)[None]


def latents_of(pipe: Pipeline, edits: Sequence[Edit]) -> jax.Array:
    arrays = [to_model(edit.picture, *pipe.default_size) for edit in edits]
    return pipe.encode_pictures(np.stack(arrays))


def _seeds(edits: Sequence[Edit], design: Design) -> list[list[int]]:
    """A list for each seed of the design."""
    return [[edit.seed + 1_000_000 * i for edit in edits] for i in range(design.seeds)]


class ImagicEdits:
    """Learns one edit after another; what was drawn of each is kept in a folder.

    There it is an .npz of "pictures" uint8 [etas, seeds, 32, 32, 3] and "errors" [3]: of
    reconstruction, before any training and after each of both.
    """

    def __init__(self, pipe: Pipeline, design: Design, folder: Path):
        self._design, self._folder = design, folder
        embedding, tuning = (
            training.Options(
                steps=steps,
                batch_size=design.batch_size,
                learning_rate=rate,
                warmup_steps=0,
                decay="constant",
                ema_decay=0.0,
            )
            for steps, rate in (
                (design.embedding_steps, design.embedding_rate),
                (design.tuning_steps, design.tuning_rate),
            )
        )
        self._editor = Editor(pipe, embedding, tuning)

    def __call__(self, edit: Edit) -> dict[str, np.ndarray]:
        file = self._folder / f"{edit.seed:04}-{edit.kind}.npz"
        if not file.exists():
            made = self._learn(edit)
            with replacing(file) as temporary, open(temporary, "wb") as stream:
                np.savez(stream, **made)
        with np.load(file) as kept:
            return dict(kept)

    def _learn(self, edit: Edit) -> dict[str, np.ndarray]:
        design = self._design
        edited, errors = self._editor(edit.picture, edit.prompt)
        (etas, seeds), count = (design.etas, _seeds([edit], design)), design.seeds
        drawn = imagic.sample(
            edited,
            eta=[eta for eta in etas for _ in seeds],
            seeds=[seed for _ in etas for (seed,) in seeds],
            steps=design.steps,
            guidance_scale=design.imagic_scale,
            sampler="ddim",
        )
        pictures = edited.pipe.decode_array(drawn)
        pictures = pictures.reshape(len(etas), count, *pictures.shape[1:])
        return {"pictures": pictures, "errors": np.array(errors)}


BASELINES: dict[str, Callable[..., np.ndarray]] = {
    SDEDIT.name: sdedit,
    INVERSION.name: inversion,
}
