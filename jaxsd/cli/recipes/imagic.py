"""`train.py imagic`: one picture, changed by words, in two trainings and a strip of pictures."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

from jaxsd.cli.recipes.common import Common, MakeBatches
from jaxsd.cli.recipes.low_rank import LoRAOptions
from jaxsd.cli.recipes.models import ModelOptions
from jaxsd.errors import JaxsdError
from jaxsd.training.options import one_of

# Learning rates of the second stage where none is given: of the whole UNet, and of factors
WHOLE, FACTORS = 5e-7, 1e-4
LOSS = "reconstruction/loss"
OF_UNET = ("train", "freeze", "rate_factors", "decayed")  # patterns of its parameters' names
FIRST, STRIP = "embedding", "strip.png"  # in the workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagicOptions(LoRAOptions, ModelOptions):
    """What both stages, and the strip, are told."""

    image: Path
    """The picture to change."""
    prompt: str
    """What it is to become, with all that is to stay: "a bird spreading its wings"."""
    family: str | None = None
    """What a single file holds where it cannot be told: sd2 or sd2-v."""
    height: int | None = None
    """In pixels; by default in the picture's own shape, with as many pixels as the model likes."""
    width: int | None = None
    clip_skip: int = 0
    """How many last layers of the text tower to leave out: what the layer before them says of the
    prompt is what the first stage changes."""
    batch_size: int = 1
    """How often the picture is in an update, each time with a noise level and noise of its own."""
    warmup_steps: int = 0
    decay: Annotated[str, one_of("cosine", "linear", "constant")] = "constant"
    ema_decay: float = 0.0
    """Of the averaged parameters, which are what is exported; 0 for the last ones."""
    measure_every: int = 100
    """Updates between measurements of reconstruction/loss: the loss at noise that stays."""

    made: ClassVar[str] = "edit.json"

    def pipeline(self) -> Any:
        """The model to edit, in float32."""
        from jaxsd import pipeline

        return pipeline.load(**self.base())

    def base(self) -> dict[str, Any]:
        """Which model that is, as options of `jaxsd.load`; local paths in full."""
        from jaxsd.weights.edits import BASE

        if self.model is None:
            raise JaxsdError("give the model to edit with --model")
        if self.vae is not None or self.text_encoder is not None:
            raise JaxsdError(
                "vae and text_encoder: an edit is of one model, with its own VAE and text encoders"
            )
        told = {n: getattr(self, n, None) for n in BASE}
        paths = ("model", "config", "tokenizer")
        return {n: _in_full(v) if n in paths else v for n, v in told.items() if v}

    def stage(self, kind: Any, pipe: Any, edit: Any) -> tuple[Any, MakeBatches]:
        """One of `objectives.imagic`, and its batches: the picture's latents."""
        import numpy as np

        from jaxsd.editing import imagic

        shown = self.shown(pipe)
        latents = np.asarray(imagic.latents_of(pipe, shown))
        first, count = self.rows()
        rows = {"latents": np.repeat(latents, self.batch_size // count, 0)}
        objective = kind(pipe, edit, shown, self.dtype)
        return objective, lambda start, stop: (rows for _ in range(start, stop))

    def shown(self, pipe: Any) -> Any:
        """The picture as the model is shown it."""
        from jaxsd.editing import imagic

        return imagic.prepare(pipe, self.image, self.height, self.width)

    def evaluators(self, objective: Any) -> list[Any]:
        """The loss of the picture at noise that is always the same."""
        import functools

        import jax

        from jaxsd.editing import imagic
        from jaxsd.objectives.imagic import reconstruction_error
        from jaxsd.training import Evaluator

        if self.measure_every < 1:
            raise JaxsdError(f"measure_every must be at least 1, not {self.measure_every}")
        stage = self.plain(objective)
        latents = imagic.latents_of(stage.pipe, stage.picture)
        measure = jax.jit(functools.partial(reconstruction_error, objective))

        def reconstruction(params: Any, step: int) -> dict[str, float]:
            found = measure(params, objective.aux, latents)
            return {name: float(value) for name, value in found.items()}

        return [Evaluator("reconstruction", self.measure_every, reconstruction)]


def _in_full(name: str) -> str:
    """A path of this machine in full, so that the edit finds it from anywhere; else the name."""
    from jaxsd.hub import shipped

    return name if name in shipped() or not Path(name).exists() else str(Path(name).resolve())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding(ImagicOptions):
    """The first stage: the prompt's embedding comes nearer to the picture."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd.objectives.imagic import Embedding as Objective
        from jaxsd.objectives.imagic import check, new_edit

        pipe = self.pipeline()
        check(pipe)
        shown = self.shown(pipe)
        edit = new_edit(pipe, self.prompt, shown.shape[:2], self.clip_skip)
        return self.stage(Objective, pipe, dataclasses.replace(edit, base=self.base()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning(ImagicOptions):
    """The second stage: the UNet comes nearer, told the embedding that the first one found."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd.objectives.imagic import Tuning as Objective
        from jaxsd.weights import edits

        edit = edits.read(self.workdir / FIRST / edits.MODEL)
        if not self.lora_rank:
            edit = dataclasses.replace(edit, base=None)
        objective, make_batches = self.stage(Objective, self.pipeline(), edit)
        return self.maybe_low_rank(objective), make_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imagic(ImagicOptions):
    """Change one picture by words (Kawar et al. 2022): its embedding, the network, then a strip.

    First the prompt's embedding learns the picture, in WORKDIR/embedding, then the UNet or, with
    --lora-rank, factors for it. WORKDIR/model is the edit, for `sample.py --model WORKDIR
    --imagic-eta 0.7`, and WORKDIR/strip.png shows it from eta 0, the picture, to 1, the prompt.
    """

    embedding_steps: int = 1000
    """Updates of the first stage."""
    embedding_learning_rate: float = 2e-3
    embedding_target: float | None = None
    """End the first stage where reconstruction/loss has come down to this."""
    steps: int = 1500
    """Updates of the second stage."""
    learning_rate: float = 0.0
    """Of the second stage; 0 for 5e-7 or, with a --lora-rank, 1e-4."""
    target: float | None = None
    """End the second stage where reconstruction/loss has come down to this."""
    etas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """The columns of the strip; past 1 goes past the prompt."""
    strip_seeds: int = 4
    """Its rows."""
    sampling_steps: int | None = None
    """Of the strip; by default 30."""
    guidance_scale: float | None = None
    """Of the strip; by default the model's."""
    negative_prompt: str | None = None
    """Of the strip."""

    def __post_init__(self):
        if self.learning_rate == 0:
            object.__setattr__(self, "learning_rate", FACTORS if self.lora_rank else WHOLE)
        super().__post_init__()
        # Now, not after the trainings
        if not self.etas or not all(map(math.isfinite, self.etas)):
            raise JaxsdError(f"etas are numbers, such as 0 0.5 1, not {list(self.etas)}")
        if min(self.strip_seeds, self.sampling_steps or 1) < 1:
            raise JaxsdError("strip_seeds and sampling_steps must be at least 1")

    def stages(self) -> list[Common]:
        fields = dataclasses.fields(ImagicOptions)
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields}
        plain = {f.name: f.default for f in fields if f.name in OF_UNET or "lora" in f.name}
        first: dict[str, Any] = {
            **plain,
            "workdir": self.workdir / FIRST,
            "steps": self.embedding_steps,
            "learning_rate": self.embedding_learning_rate,
            "stop_when": _goal(self.embedding_target) or self.stop_when,
        }
        second: dict[str, Any] = {"stop_when": _goal(self.target) or self.stop_when}
        return [Embedding(**shared | first), Tuning(**shared | second)]

    def finish(self) -> None:
        """Writes the strip."""
        from jaxsd import processes

        if file := processes.first(self._strip):
            print(file, flush=True)

    def _strip(self) -> str:
        from jaxsd.editing import imagic
        from jaxsd.pictures import write_png

        edited = imagic.load_edit(self.workdir)
        picture = imagic.strip(
            edited,
            self.etas,
            range(self.seed, self.seed + self.strip_seeds),
            imagic.prepare(edited.pipe, self.image, *edited.edit.size),
            steps=self.sampling_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
        )
        return str(write_png(picture, self.workdir / STRIP))


def _goal(target: float | None) -> str | None:
    return None if target is None else f"{LOSS}<{target!r}"
