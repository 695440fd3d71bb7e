"""Teaches `digits` a letter from a few pictures, each way there is, and measures what it did.

`python docs/teaching.py` trains in runs/teaching and keeps each row in docs/teaching.json as soon
as it is measured, so that it goes on where it was stopped; `--minutes 5` stops between two rows.
`--only lora` chooses ways; `--no-measure` prints what is known. The letter and its pictures are
made by `letters.py`; who recognises it, `recognition.py`.

What is asked of each model, always by 10 steps of DDIM at guidance 3:

- the letter: its bare prompt, and the same with a stroke and a background colour of every kind;
- the ten digits, in all colours: what was forgotten is what is no longer right;
- the class, "a digit": how often it has become the letter.

Settings were chosen with another letter (X), before any picture of this one was drawn.
"""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from edits import a
from kept import Kept, digest
from letters import draw_letters
from PIL import Image
from recognition import (
    TAUGHT_SEED,
    digits_right,
    held_out_accuracies,
    share_in_colours,
    share_of_letter,
)

import jaxsd
from jaxsd.data import digits
from jaxsd.evaluation import drawing, models, report
from jaxsd.evaluation.drawing import Sampling
from jaxsd.pictures import tile, to_uint8
from jaxsd.pipeline import Pipeline

DOCS = Path(__file__).parent
ROOT = DOCS.parent
WORD, CLASS = "sks", "digit"  # the rare word of DreamBooth and LoRA, and what it is a kind of
TOKEN = "<letter>"  # of textual inversion
BEFORE = "before"


@dataclasses.dataclass(frozen=True)
class Design:
    """Everything that decides the results."""

    letter: str = "K"
    pictures: int = 6
    drawn: int = 100
    """Of the bare prompt, of the prompt with colours, and of the class: each."""
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

    design: Design = Design()
    only: tuple[str, ...] = ()
    """Names of ways, or how they begin; by default all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings and of the sampler; the taught pictures stay."""
    model: str = "digits"
    runs: Path = Path("runs/teaching")
    results: Path = DOCS / "teaching.json"
    image: Path = DOCS / "images" / "teaching.png"
    minutes: float | None = None
    """Stop between two rows after so long; what is done is kept."""
    measure: bool = True
    """Also train and measure what is not known yet."""


@dataclasses.dataclass(frozen=True)
class Way:
    """recipe: of `train.py`, with arguments of its own. word: what the letter is called."""

    name: str
    recipe: str = ""
    arguments: tuple[str, ...] = ()
    word: str = f"{WORD} {CLASS}"

    @property
    def inverted(self) -> bool:
        return self.recipe == "textual-inversion"


def all_ways(design: Design, data: Path) -> list[Way]:
    """In the order of the table."""
    inversion = (
        *("--data", str(data / "plain"), "--token", TOKEN, "--initialize-from", CLASS),
        *("--template", "{}", "a {}", "the digit {}", "the number {}"),
        *("--steps", str(design.inversion_steps), "--learning-rate", str(design.inversion_rate)),
    )
    booth = ("--instance-data", str(data / "plain"), "--instance-prompt", f"a {WORD} {CLASS}")
    prior = ("--class-prompt", f"a {CLASS}", "--num-class-images", str(design.class_pictures))
    prior += ("--class-steps", str(design.steps), "--class-batch-size", "25")
    prior += ("--class-guidance-scale", str(design.guidance_scale))
    full = ("--steps", str(design.full_steps), "--learning-rate", str(design.full_rate))
    factors = ("--steps", str(design.factors_steps), "--learning-rate", str(design.factors_rate))
    factors += ("--lora-rank", str(design.rank), "--lora-targets", *design.targets)
    ti, db = "textual-inversion", "dreambooth"
    return [
        Way(BEFORE),
        Way("textual inversion, 1 vector", ti, inversion, TOKEN),
        Way("textual inversion, 4 vectors", ti, (*inversion, "--vectors", "4"), TOKEN),
        Way("DreamBooth", db, (*booth, *full)),
        Way("DreamBooth, prior", db, (*booth, *prior, *full)),
        Way("DreamBooth LoRA", db, (*booth, *factors)),
        Way("DreamBooth LoRA, prior", db, (*booth, *prior, *factors)),
        Way("LoRA, captions", "lora", ("--data", str(data / "captioned"), *factors)),
    ]


# --- Teaching --------------------------------------------------------------------------------


def taught_pictures(design: Design) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """uint8 [n, 32, 32, 3] and their (stroke, background), no stroke twice."""
    scans = draw_letters(design.letter, design.pictures, TAUGHT_SEED)
    strokes = np.random.default_rng(TAUGHT_SEED).permutation(digits.COLOUR_NAMES)
    backgrounds = np.roll(strokes, 3)
    pictures, colours = [], []
    for i, scan in enumerate(scans):
        names = (str(strokes[i % len(strokes)]), str(backgrounds[i % len(strokes)]))
        picture, *_ = digits.colour_scan(scan, np.random.default_rng([TAUGHT_SEED, i]), names)
        pictures.append(to_uint8(2 * picture - 1))
        colours.append(names)
    return np.stack(pictures), colours


def write_pictures(design: Design, folder: Path) -> None:
    """Twice: in plain/ alone, in captioned/ each with a .txt that names its colours."""
    for picture, (stroke, background) in zip(*taught_pictures(design), strict=True):
        for part in ("plain", "captioned"):
            file = folder / part / f"{stroke}-on-{background}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
            if part == "captioned":
                caption = in_colours(f"{WORD} {CLASS}", stroke, background)
                file.with_suffix(".txt").write_text(caption)


def in_colours(word: str, stroke: str, background: str) -> str:
    return f"{a(stroke)} {word} on {a(background)} background"


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
    pipe.add_embedding(workdir / "model", TOKEN)
    return pipe


# --- Measuring -------------------------------------------------------------------------------


def measure(pipe: Pipeline, way: Way, seed: int, design: Design) -> dict[str, float]:
    """What a taught model draws: see the head of this file."""
    letter, count = design.letter, design.drawn
    pairs = [pair for pair in _pairs(np.random.default_rng([seed, 7]), count)]
    prompts, wanted = models.full_prompts(design.digits, seed)
    bare = draw(pipe, [f"a {way.word}"] * count, seed, design)
    coloured = draw(pipe, [in_colours(way.word, *pair) for pair in pairs], seed + 100, design)
    kind = draw(pipe, [f"a {CLASS}"] * count, seed + 200, design)
    digit, right = digits_right(draw(pipe, prompts, seed + 300, design), wanted)
    return {
        "letter": share_of_letter(letter, bare),
        "letter_in_colours": share_of_letter(letter, coloured),
        "all_right": share_in_colours(letter, coloured, pairs),
        "digit": digit,
        "digit_all_right": right,
        "class_is_letter": share_of_letter(letter, kind),
    }


def draw(pipe: Pipeline, prompts: list[str], seed: int, design: Design) -> np.ndarray:
    how = Sampling(len(prompts), design.steps, "ddim", design.guidance_scale, (seed,), 50)
    return drawing.draw(pipe, prompts, how, seed)


def _pairs(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    return [digits.draw_colours(rng) for _ in range(count)]


class Rows:
    """What is known of each way and seed."""

    def __init__(self, options: Options, weights: str):
        self._kept, self._options = Kept(options.results), options
        self._design = ", ".join(
            f"{name} {value}" for name, value in dataclasses.asdict(options.design).items()
        )
        self._weights = weights

    def _key(self, way: Way, seed: int) -> tuple[str, str]:
        return f"{way.name}, seed {seed}", f"weights {self._weights}, {self._design}"

    def get(self, way: Way, seed: int) -> dict[str, Any] | None:
        return self._kept.get(*self._key(way, seed))

    def put(self, way: Way, seed: int, figures: dict[str, float]) -> None:
        self._kept.put(*self._key(way, seed), figures)


# --- Tables ----------------------------------------------------------------------------------

COLUMNS = {
    "letter": ("the letter, bare prompt", 2),
    "letter_in_colours": ("the letter, with colours", 2),
    "all_right": ("and both colours right", 2),
    "digit": ("ten digits right", 3),
    "digit_all_right": ("and both colours right ", 3),
    "class_is_letter": ("'a digit' is the letter", 2),
}


def table(ways: list[Way], rows: Rows, seeds: tuple[int, ...]) -> str:
    """Mean and standard deviation over the seeds that are known."""
    found = {}
    for way in ways:
        known = [row for seed in seeds if (row := rows.get(way, seed)) is not None]
        if known:
            name = f"{way.name} ({len(known)} seed{'s' * (len(known) > 1)})"
            found[name] = report.summarise(known)
    return report.format_table(found, COLUMNS)


def draw_image(ways: list[Way], options: Options, columns: int = 8) -> None:
    """The taught pictures and, of each way that was trained here, its bare and coloured prompts."""
    design, rows = options.design, []
    taught, _ = taught_pictures(design)
    rows.append(np.resize(taught, (2 * columns, *taught.shape[1:])))
    pairs = _pairs(np.random.default_rng(7), columns)
    for way in ways:
        pipe = teach(way, options.seeds[0], options)
        prompts = [f"a {way.word}"] * columns + [in_colours(way.word, *pair) for pair in pairs]
        rows.append(draw(pipe, prompts, 400, design))
    grid = Image.fromarray(tile(np.concatenate(rows), 2 * columns))
    options.image.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(options.image)


def main(options: Options) -> None:
    design = options.design
    data = options.runs / "pictures"
    ways = all_ways(design, data)
    chosen = [w for w in ways if not options.only or w.name.startswith(options.only)]
    if not chosen:
        sys.exit(f"--only: there are {'; '.join(way.name for way in ways)}")
    rows = Rows(options, digest(jaxsd.load(options.model).params["unet"]))
    if options.measure:
        write_pictures(design, data)
        stop = np.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
        for seed in options.seeds:
            for way in chosen:
                if rows.get(way, seed) is not None:
                    continue
                if time.monotonic() > stop:
                    sys.exit("stopped: the same command goes on from here")
                rows.put(way, seed, measure(teach(way, seed, options), way, seed, design))
                print(f"{way.name}, seed {seed}", file=sys.stderr, flush=True)
        draw_image([way for way in ways if rows.get(way, options.seeds[0])], options)
    accuracies = held_out_accuracies(design.letter)
    told = ", ".join(f"{value:.3f} of {name}" for name, value in accuracies.items())
    print(f"{design.letter}, from {design.pictures} pictures; the reader is right on {told}")
    print(f"\n{table(ways, rows, options.seeds)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
