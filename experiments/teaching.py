"""Teaches `digits` a letter or an ink from a few pictures, in each way there is, and measures it.

`python experiments/teaching.py letter` trains in runs/teaching and keeps each row in
experiments/teaching.json as soon as it is measured, so that it goes on where it was stopped;
`--minutes 5` stops between two rows. `--only lora` chooses ways; `--no-measure` prints what is
known. `amber` and `lilac` are the same for an ink, one near to those that the model knows and one
far from them. What each concept looks like, how it is asked for and who recognises it:
`concepts.py`.

What is asked of each model, always by 10 steps of DDIM at guidance 3:

- the concept: its bare prompt, and prompts that name all else too (of a letter, a stroke and a
  background colour; of an ink, a digit and a background);
- the ten digits, in all colours: what was forgotten is what is no longer right;
- the class, "a digit": how often it has become the concept.

Settings were chosen with another letter (X) and other inks (ember for lilac, vermilion for the
textual inversion of amber), before any picture of these was drawn.
"""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from concepts import CLASS, KINDS, Concept, Drawn
from kept import Kept, digest
from PIL import Image

import jaxsd
from jaxsd.evaluation import drawing, models, report
from jaxsd.evaluation.drawing import Sampling
from jaxsd.pictures import tile
from jaxsd.pipeline import Pipeline

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
ROOT = HERE.parent
BEFORE = "before"


@dataclasses.dataclass(frozen=True)
class Design:
    """Everything that decides the results."""

    pictures: int = 6
    drawn: int = 100
    """Of the bare prompt, of the full prompts, and of the class: each."""
    digits: int = 300
    steps: int = 10
    guidance_scale: float = 3.0
    class_pictures: int = 50
    """That DreamBooth draws to preserve."""
    batch_size: int = 4
    inversion_steps: int = 300
    inversion_rate: float = 1e-2
    full_steps: int = 300
    full_rate: float = 1e-4
    factors_steps: int = 200
    factors_rate: float = 1e-3
    rank: int = 8
    targets: tuple[str, ...] = ("attention", "feed-forward", "convs")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which rows to measure, and where they are kept."""

    kind: str = "letter"
    name: str = "K"
    """Which letter, or which ink."""
    design: Design = Design()
    only: tuple[str, ...] = ()
    """Names of ways, or how they begin; by default all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings and of the sampler; the taught pictures stay."""
    model: str = "digits"
    runs: Path = Path("runs/teaching")
    results: Path = HERE / "teaching.json"
    image: Path = IMAGES / "teaching.png"
    minutes: float | None = None
    """Stop between two rows after so long; what is done is kept."""
    measure: bool = True
    """Also train and measure what is not known yet."""

    @property
    def concept(self) -> Concept:
        return KINDS[self.kind](self.name)


AMBER, LILAC = (
    Options(
        kind="ink",
        name=name,
        design=design,
        runs=Path(f"runs/teaching-{name}"),
        results=HERE / f"teaching-{name}.json",
        image=IMAGES / f"teaching-{name}.png",
    )
    for name, design in (
        ("amber", Design(inversion_steps=1000)),
        ("lilac", Design(inversion_rate=5e-2)),
    )
)


@dataclasses.dataclass(frozen=True)
class Way:
    """recipe: of `train.py`, with arguments of its own. word: what the concept is called."""

    name: str
    word: str
    recipe: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def inverted(self) -> bool:
        return self.recipe == "textual-inversion"


def all_ways(concept: Concept, design: Design, data: Path) -> list[Way]:
    """In the order of the table."""
    inversion = (
        *("--data", str(data / "plain"), "--token", concept.token),
        *("--initialize-from", concept.begin, "--template", *concept.templates),
        *("--steps", str(design.inversion_steps), "--learning-rate", str(design.inversion_rate)),
    )
    rare, token = concept.rare, concept.token
    booth = ("--instance-data", str(data / "plain"), "--instance-prompt", concept.bare_prompt(rare))
    prior = ("--class-prompt", f"a {CLASS}", "--num-class-images", str(design.class_pictures))
    prior += ("--class-steps", str(design.steps), "--class-batch-size", "25")
    prior += ("--class-guidance-scale", str(design.guidance_scale))
    full = ("--steps", str(design.full_steps), "--learning-rate", str(design.full_rate))
    factors = ("--steps", str(design.factors_steps), "--learning-rate", str(design.factors_rate))
    factors += ("--lora-rank", str(design.rank), "--lora-targets", *design.targets)
    ti, db = "textual-inversion", "dreambooth"
    return [
        Way(BEFORE, rare),
        Way("textual inversion, 1 vector", token, ti, inversion),
        Way("textual inversion, 4 vectors", token, ti, (*inversion, "--vectors", "4")),
        Way("DreamBooth", rare, db, (*booth, *full)),
        Way("DreamBooth, prior", rare, db, (*booth, *prior, *full)),
        Way("DreamBooth LoRA", rare, db, (*booth, *factors)),
        Way("DreamBooth LoRA, prior", rare, db, (*booth, *prior, *factors)),
        Way("LoRA, captions", rare, "lora", ("--data", str(data / "captioned"), *factors)),
    ]


# --- Teaching --------------------------------------------------------------------------------


def write_pictures(concept: Concept, count: int, folder: Path) -> None:
    """Twice: in plain/ alone, in captioned/ each with a .txt that names all that it shows."""
    for name, picture, caption in concept.taught(count):
        for part in ("plain", "captioned"):
            file = folder / part / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
            if part == "captioned":
                file.with_suffix(".txt").write_text(caption.format(concept.rare))


def teach(way: Way, seed: int, options: Options) -> Pipeline:
    """The model, taught; trained if it is not there yet."""
    if way.name == BEFORE:
        return jaxsd.load(options.model)
    name = way.name.replace(", ", "-").replace(" ", "-").lower()
    workdir = options.runs / f"{name}-seed-{seed}"
    arguments = [way.recipe, "--model", options.model, "--workdir", str(workdir)]
    arguments += [*way.arguments, "--batch-size", str(options.design.batch_size)]
    arguments += ["--seed", str(seed)]
    subprocess.run([sys.executable, ROOT / "train.py", *arguments], check=True)
    if not way.inverted:
        return jaxsd.load(workdir / "model")
    pipe = jaxsd.load(options.model)
    pipe.add_embedding(workdir / "model", way.word)
    return pipe


# --- Measuring -------------------------------------------------------------------------------


def measure(
    pipe: Pipeline, concept: Concept, way: Way, seed: int, design: Design
) -> dict[str, float]:
    """What a taught model draws: see the head of this file."""
    count = design.drawn
    rng = np.random.default_rng([seed, 7])
    full, full_wanted = concept.full_prompts(way.word, count, rng)
    asked, wanted = models.full_prompts(design.digits, seed)
    return concept.figures(
        Drawn(
            draw(pipe, [concept.bare_prompt(way.word)] * count, seed, design),
            draw(pipe, full, seed + 100, design),
            full_wanted,
            draw(pipe, [f"a {CLASS}"] * count, seed + 200, design),
            draw(pipe, asked, seed + 300, design),
            wanted,
        )
    )


def draw(pipe: Pipeline, prompts: list[str], seed: int, design: Design) -> np.ndarray:
    how = Sampling(len(prompts), design.steps, "ddim", design.guidance_scale, (seed,), 50)
    return drawing.draw(pipe, prompts, how, seed)


class Rows:
    """What is known of each way and seed."""

    def __init__(self, options: Options, weights: str):
        self._kept, self._options = Kept(options.results), options
        settings = {options.kind: options.name} | dataclasses.asdict(options.design)
        self._design = ", ".join(f"{name} {value}" for name, value in settings.items())
        self._weights = weights

    def _key(self, way: Way, seed: int) -> tuple[str, str]:
        return f"{way.name}, seed {seed}", f"weights {self._weights}, {self._design}"

    def get(self, way: Way, seed: int) -> dict[str, Any] | None:
        return self._kept.get(*self._key(way, seed))

    def put(self, way: Way, seed: int, figures: dict[str, float]) -> None:
        self._kept.put(*self._key(way, seed), figures)


# --- Tables ----------------------------------------------------------------------------------


def table(concept: Concept, ways: list[Way], rows: Rows, seeds: tuple[int, ...]) -> str:
    """Mean and standard deviation over the seeds that are known."""
    found = {}
    for way in ways:
        known = [row for seed in seeds if (row := rows.get(way, seed)) is not None]
        if known:
            name = f"{way.name} ({len(known)} seed{'s' * (len(known) > 1)})"
            found[name] = report.summarise(known)
    return report.format_table(found, concept.columns)


def draw_image(ways: list[Way], options: Options, columns: int = 8) -> None:
    """The taught pictures and, of each way that was trained here, its bare and full prompts."""
    design, concept, rows = options.design, options.concept, []
    taught = np.stack([shown.picture for shown in concept.taught(design.pictures)])
    rows.append(np.resize(taught, (2 * columns, *taught.shape[1:])))
    for way in ways:
        pipe = teach(way, options.seeds[0], options)
        full, _ = concept.full_prompts(way.word, columns, np.random.default_rng(7))
        prompts = [concept.bare_prompt(way.word)] * columns + full
        rows.append(draw(pipe, prompts, 400, design))
    grid = Image.fromarray(tile(np.concatenate(rows), 2 * columns))
    options.image.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(options.image)


def main(options: Options) -> None:
    design, concept = options.design, options.concept
    data = options.runs / "pictures"
    ways = all_ways(concept, design, data)
    chosen = [w for w in ways if not options.only or w.name.startswith(options.only)]
    if not chosen:
        sys.exit(f"--only: there are {'; '.join(way.name for way in ways)}")
    untaught = jaxsd.load(options.model)
    rows = Rows(options, digest(untaught.params["unet"]))
    if options.measure:
        write_pictures(concept, design.pictures, data)
        stop = np.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
        for seed in options.seeds:
            for way in chosen:
                if rows.get(way, seed) is not None:
                    continue
                if time.monotonic() > stop:
                    sys.exit("stopped: the same command goes on from here")
                pipe = teach(way, seed, options)
                rows.put(way, seed, measure(pipe, concept, way, seed, design))
                print(f"{way.name}, seed {seed}", file=sys.stderr, flush=True)
        draw_image([way for way in ways if rows.get(way, options.seeds[0])], options)
    accuracies = concept.accuracies(untaught)
    told = ", ".join(f"{value:.3f} of {name}" for name, value in accuracies.items())
    print(f"{concept.name}, from {design.pictures} pictures; the reader is right on {told}")
    print(f"\n{table(concept, ways, rows, options.seeds)}")


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            {
                "letter": ("A letter: a new shape.", Options()),
                "amber": ("An ink near to two known ones.", AMBER),
                "lilac": ("An ink far from all known ones.", LILAC),
            }
        )
    )
