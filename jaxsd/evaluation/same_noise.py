"""How far a model's pictures are from those that its teacher makes of the same noise.

The most sensitive measure of a distillation: a student that merely draws well has another picture
for each seed, one that was taught to jump along the teacher's trajectories has the teacher's.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxsd import pipeline
from jaxsd.diffusion.jumps import student_schedule
from jaxsd.errors import JaxsdError
from jaxsd.evaluation.drawing import Drawn, Sampling, costs, draw_batch, draw_batches
from jaxsd.pipeline import Pipeline
from jaxsd.weights.files import replacing


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that draws by DDIM, from the seeds and prompts of the one it is compared with.

    guidance_scale: None for that of the other. Every batch is drawn once and kept in `folder`: for
    one list of prompts for each sampling seed, and one batch size.
    """

    pipe: Pipeline
    folder: Path
    steps: int
    guidance_scale: float | None = None

    def batch(self, prompts: Sequence[str], how: Sampling, seed: int, start: int) -> Drawn:
        """What it draws in place of `draw_batch` with the same arguments."""
        scale = how.guidance_scale if self.guidance_scale is None else self.guidance_scale
        file = self.folder / f"{self.steps}-steps-guidance-{scale}-seed-{seed}-from-{start}.npz"
        if file.exists():
            with np.load(file) as kept:
                return Drawn(kept["latents"], kept["pixels"], float(kept["seconds"]))
        own = dataclasses.replace(how, steps=self.steps, sampler="ddim", guidance_scale=scale)
        drawn = draw_batch(self.pipe, prompts, own, seed, start)
        with replacing(file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **drawn._asdict())
        return drawn


def load_teacher(
    model: str,
    student: Pipeline,
    folder: Path,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> Teacher:
    """Opens the teacher of a student; JaxsdError if they do not draw of the same noise and prompts.

    Its steps lead from pure noise to the picture and are not clipped, as the students are taught
    (`student_schedule`): clipped at every step, DDIM goes elsewhere the more steps there are.
    steps: by default 256, or on a schedule of timesteps a quarter of them (250 of 1000), since
    DDIM's steps meet only where their number divides the timesteps.
    """
    pipe = pipeline.load(model)
    pipe.schedule = student_schedule(pipe.schedule)
    theirs, own = _kind(pipe), _kind(student)
    if theirs != own:
        raise JaxsdError(
            f"the teacher {model} draws {theirs}, the model {own}: give a teacher of the same kind"
        )
    usual = 256 if pipe.schedule.continuous else pipe.schedule.num_train_timesteps // 4
    teacher = Teacher(pipe, folder, usual if steps is None else steps, guidance_scale)
    pipe.plan_steps("ddim", teacher.steps)  # refused before any work
    return teacher


def _kind(pipe: Pipeline) -> str:
    channels = pipe.latent_channels
    height, width = pipe.default_size
    told = "prompts" if pipe.tokenizers else "class names" if pipe.takes_prompts else "nothing"
    if pipe.vae is None:
        return f"{height}x{width}x{channels} pixels from {told}"
    side = pipe.unet.config.sample_size
    return f"{height}x{width} pictures through {side}x{side}x{channels} latents from {told}"


class Observer:
    """Sees the pictures of one row of a report go by: what they cost, how far they are off.

    pictures(prompts, seed) yields uint8 [b, h, w, c], one picture for each prompt, in batches. When
    it has ended, rmse() is that of this sampling seed. costs() are those of all pictures so far.
    """

    def __init__(self, pipe: Pipeline, how: Sampling, teacher: Teacher | None = None):
        self._pipe, self._how, self._teacher = pipe, how, teacher
        self._seconds: list[float] = []
        self._squares: dict[str, list[float]] = {}  # the mean of each picture

    def pictures(self, prompts: Sequence[str], seed: int) -> Iterator[np.ndarray]:
        self._squares = {"rmse_to_teacher": [], "rmse_latents": []}
        for drawn in draw_batches(self._pipe, prompts, self._how, seed):
            self._seconds.append(drawn.seconds)
            if self._teacher is not None:
                start = len(self._squares["rmse_to_teacher"])
                theirs = self._teacher.batch(prompts, self._how, seed, start)
                self._squares["rmse_to_teacher"] += _squares(drawn.pixels, theirs.pixels)
                if self._pipe.vae is not None:
                    self._squares["rmse_latents"] += _squares(drawn.latents, theirs.latents)
            yield drawn.rounded

    def rmse(self) -> dict[str, float]:
        """Root mean square differences to the teacher, over all pictures of the last seed.

        rmse_to_teacher: of pixels in [-1, 1] (`Drawn.pixels`). rmse_latents: of latents as the UNet
        knows them, where there are such. Neither without a teacher.
        """
        return {name: float(np.sqrt(np.mean(s))) for name, s in self._squares.items() if s}

    def costs(self) -> dict[str, float]:
        """`drawing.costs`: passes and ms_per_image."""
        return costs(self._pipe, self._how, self._seconds)


def _squares(a: np.ndarray, b: np.ndarray) -> list[float]:
    """The mean square difference of each row, in float64."""
    return list(np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3)))
