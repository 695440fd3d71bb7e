"""Reproduces in small the order of what Salimans & Ho 2022 (2202.00512) found of distillation.

`python experiments/ablation.py` trains and measures, keeps what it has in runs/ablation and in
experiments/ablation.json, so that it goes on where it was stopped, and prints the tables.
`--design.beta-schedule linear --results experiments/ablation-linear.json` does it on the schedule
of Ho et al. 2020. All was fixed before any result was seen; no choice was made on the held-out
scans:

- Data: the 1347 real scans that are for training; judged against the 450 that are held out.
- Teachers, three seeds each: a class-conditional UNet of one resolution, 20 channels wide, trained
  on the plain square error of v, eps or x (1000 updates of 32 scans, Adam, learning rate 2e-3
  falling as a cosine, average of decay .99, no dropout). Cosine schedule: alpha ends at 0; linear
  in beta over 1000 whole timesteps: at .0064.
- Halving: 64 -> 32 -> ... -> 1 steps, 80 updates of 32 scans for each of the six students, fresh
  Adam, learning rate 1e-3 falling to 0, no average.
- One stage: the student of one step learns from 64 teacher steps at once. It gets as many network
  passes as halving takes from 64 to 1, a row forward counting one and a row forward and backward
  three: 480 updates of 2 + 3 passes a row become 36 of 64 + 3.
- Weighting: truncated SNR, or SNR + 1 beside it, but the plain error for eps (the weight SNR): all
  others are divided by alpha^2 and have no bound where alpha is 0.
- Measured at 8, 4, 2 and 1 steps: FD feat and judge accuracy of 2000 samples of one sampling seed,
  and the RMSE of the first 200 to what their own teacher makes of the same noise in 256 steps.
  Steps are not clipped, as students are taught; those of eps are drawn once more, reference and
  all, with x clipped to [-1, 1] at each step: at alpha = 0 eps says nothing of x.
- Diverged: samples that are not finite, or whose root mean square is over 2 before they are clipped
  to [-1, 1], where scans lie.
"""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from jaxsd import data, training, weights
from jaxsd.components import Component
from jaxsd.diffusion import jumps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import Diverged, JaxsdError
from jaxsd.evaluation import metrics
from jaxsd.evaluation.drawing import Drawn, Sampling, draw_batches
from jaxsd.evaluation.judge import judges, real_scans
from jaxsd.models import UNetConfig
from jaxsd.nn import Params
from jaxsd.objectives.ddpm import DDPM
from jaxsd.objectives.distillation import Teacher
from jaxsd.objectives.progressive import Progressive
from jaxsd.pipeline import Pipeline
from jaxsd.weights import read_json, write_json

NAMES = {"v_prediction": "v", "epsilon": "eps", "sample": "x"}
LIMIT = 2.0  # root mean square of samples, beyond which they have diverged


@dataclasses.dataclass(frozen=True)
class Design:
    """Everything that decides the results."""

    seeds: tuple[int, ...] = (0, 1, 2)
    beta_schedule: str = "cosine"
    width: int = 20
    batch_size: int = 32
    teacher_updates: int = 1000
    stage_updates: int = 80
    teacher_learning_rate: float = 2e-3
    learning_rate: float = 1e-3
    start_steps: int = 64
    drawn_steps: tuple[int, ...] = (8, 4, 2, 1)
    reference_steps: int = 256
    samples: int = 2000
    compared: int = 200
    """Samples whose distance to the teacher's is taken."""

    def schedule(self, kind: str) -> Schedule:
        return Schedule(beta_schedule=self.beta_schedule, prediction_type=kind)

    @property
    def unet(self) -> UNetConfig:
        return UNetConfig(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownBlock2D",),
            mid_block_type=None,
            up_block_types=("UpBlock2D",),
            block_out_channels=(self.width,),
            layers_per_block=1,
            norm_num_groups=4,
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=10,
        )


@dataclasses.dataclass(frozen=True)
class Options:
    design: Design = Design()
    kinds: tuple[str, ...] = ("v_prediction", "epsilon")
    """What teachers predict; there is "sample", too."""
    workdir: Path = Path("runs/ablation")
    results: Path = Path(__file__).parent / "ablation.json"
    measure: bool = True
    """Also train and measure what is not known yet."""


class Chain(NamedTuple):
    """Students, each the teacher of the next."""

    kind: str
    weighting: str
    halving: bool = True

    @property
    def name(self) -> str:
        what = {"truncated-snr": "truncated SNR", "snr+1": "SNR + 1", "none": "SNR"}
        return f"{'halving' if self.halving else 'one stage'}, {what[self.weighting]}"


CHAINS = (
    Chain("v_prediction", "truncated-snr"),
    Chain("v_prediction", "snr+1"),
    Chain("v_prediction", "truncated-snr", halving=False),
    Chain("epsilon", "none"),
    Chain("sample", "truncated-snr"),
)


# --- Training --------------------------------------------------------------------------------


class Seeded:
    """Draws from a seed that is an argument: all seeds and stages are one compiled program."""

    def loss(self, params, aux, batch, now):
        own, seed = aux
        now = now._replace(key=jax.random.fold_in(now.key, seed))
        return super().loss(params, own, batch, now)  # pyright: ignore


class SeededDDPM(Seeded, DDPM):
    pass


class SeededProgressive(Seeded, Progressive):
    pass


class Lab:
    """Trains the networks of a design, or reads those that it has trained before."""

    def __init__(self, design: Design, workdir: Path):
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(design)).encode()).hexdigest()[:12]
        self.design, self.folder = design, workdir / digest
        self._programs: dict[Any, Any] = {}  # by what they train

    def teacher(self, kind: str, seed: int) -> Teacher:
        design = self.design
        objective = SeededDDPM(design.unet, design.schedule(kind), class_dropout=0.0)
        options = training.Options(
            steps=design.teacher_updates,
            batch_size=design.batch_size,
            learning_rate=design.teacher_learning_rate,
            warmup_steps=design.teacher_updates // 15,
            ema_decay=0.99,
        )
        name = f"seed-{seed}/{NAMES[kind]}-teacher"
        params = self._trained(name, kind, objective, options, seed, 0)
        return Teacher(objective.net, params, objective.schedule)

    def students(self, chain: Chain, teacher: Teacher, seed: int) -> dict[int, Params]:
        """The parameters of each, by its steps."""
        design = self.design
        factor = 2 if chain.halving else design.start_steps
        stages, found = jumps.stages(design.start_steps, 1, factor), {}
        updates = design.stage_updates if chain.halving else one_stage_updates(design)
        options = training.Options(
            steps=updates,
            batch_size=design.batch_size,
            learning_rate=design.learning_rate,
            warmup_steps=0,
            decay="linear",
            ema_decay=0.0,
        )
        schedule = jumps.student_schedule(teacher.schedule)
        for stage, steps in enumerate(stages, 1):
            base = DDPM(design.unet, schedule, initial=teacher.params)
            weighting = chain.weighting
            objective = SeededProgressive(base, teacher, steps, weighting=weighting, factor=factor)
            name = f"seed-{seed}/{NAMES[chain.kind]}, {chain.name}, {steps}"
            found[steps] = self._trained(name, chain, objective, options, seed, stage)
            teacher = Teacher(objective.net, found[steps], schedule)
        return found

    def _trained(
        self, name: str, what: Any, objective: Any, options: training.Options, seed: int, stage: int
    ) -> Params:
        """seed, stage: all that is random comes from them."""
        file = self.folder / f"{name}.safetensors"
        if file.exists():
            return weights.load(file, objective.net)
        optimizer = training.make_optimizer(options)
        if what not in self._programs:
            step = training.make_step(objective, optimizer, options)
            self._programs[what] = jax.jit(step, donate_argnums=0)
        state = training.state_of(objective.init(jax.random.key(seed)), optimizer)
        aux = training.Aux((objective.aux, np.uint32(100 * seed + stage)), {})
        scans = data.elements("digit-scans", "train", 100 * seed + stage)
        for batch in data.batches(scans, options.batch_size, 0, options.steps):
            state, told = self._programs[what](state, aux, batch)
        skipped, loss = int(state.skipped), float(told["loss"])
        print(f"{name}: loss {loss:.4f}, {skipped} updates skipped", file=sys.stderr, flush=True)
        weights.save(state.ema, file)
        return state.ema


def one_stage_updates(design: Design) -> int:
    """Updates of one long stage that cost the network passes of all that halve."""
    halving = len(jumps.stages(design.start_steps, 1)) * design.stage_updates * (2 + 3)
    return max(1, round(halving / (design.start_steps + 3)))


# --- Measuring -------------------------------------------------------------------------------

Row = dict[str, Any]


class Curve(NamedTuple):
    """Rows of the tables: the students of a chain, or with none their teacher itself."""

    kind: str
    chain: Chain | None
    clipped: bool

    @property
    def name(self) -> str:
        what = "DDIM of the teacher" if self.chain is None else self.chain.name
        return f"{NAMES[self.kind]}, {what}{', x clipped' if self.clipped else ''}"

    def steps(self, design: Design) -> tuple[int, ...]:
        return (1,) if self.chain and not self.chain.halving else design.drawn_steps


def curves(kind: str) -> list[Curve]:
    chains = [None, *(chain for chain in CHAINS if chain.kind == kind)]
    clips = (False, True) if kind == "epsilon" else (False,)
    return [Curve(kind, chain, clipped) for clipped in clips for chain in chains]


def draw(
    teacher: Teacher, params: Params, clipped: bool, steps: int, count: int
) -> Iterator[Drawn]:
    """Sample i is of digit i % 10; Diverged if not finite."""
    schedule = jumps.student_schedule(teacher.schedule)
    schedule = dataclasses.replace(schedule, clip_sample=clipped)
    pipe = Pipeline(Component(teacher.net, params), schedule)
    prompts = [str(i % 10) for i in range(count)]
    return draw_batches(pipe, prompts, Sampling(steps=steps), seed=0)


def finished(batches: Iterator[Drawn]) -> np.ndarray | None:
    """The pixels [n, 8, 8, 1], clipped to [-1, 1]; None if they have diverged."""
    try:
        drawn = list(batches)
    except Diverged:
        return None
    latents = np.concatenate([batch.latents for batch in drawn]).astype(np.float64)
    if not np.sqrt(np.square(latents).mean()) <= LIMIT:
        return None
    return np.concatenate([batch.pixels for batch in drawn])


def measured(pixels: np.ndarray | None, reference: np.ndarray | None) -> Row:
    """FD feat, judge accuracy and RMSE, those that there are."""
    if pixels is None:
        return {"diverged": True}
    scans, labels = pixels[..., 0], np.arange(len(pixels)) % 10
    held_out, _ = real_scans("test")
    features = judges().features
    row = {
        "fd_features": metrics.frechet_distance(features(scans), features(held_out)),
        "judge_accuracy": float((judges().predict(scans) == labels).mean()),
    }
    if reference is not None:
        error = pixels[: len(reference)].astype(np.float64) - reference
        row["rmse_to_teacher"] = float(np.sqrt(np.square(error).mean()))
    return row


class Results:
    """Rows by their key, in a file that is written whole after each."""

    def __init__(self, file: Path, design: Design):
        self._file, told = file, json.loads(json.dumps(dataclasses.asdict(design)))
        self._all = read_json(file) if file.exists() else {"design": told, "rows": {}}
        if self._all["design"] != told:
            raise JaxsdError(f"{file} is of another design: remove it, or name another --results")

    def get(self, curve: Curve, steps: int, seed: int) -> Row | None:
        return self._all["rows"].get(self._key(curve, steps, seed))

    def put(self, curve: Curve, steps: int, seed: int, row: Row) -> None:
        self._all["rows"][self._key(curve, steps, seed)] = row
        write_json(self._file, self._all)

    @staticmethod
    def _key(curve: Curve, steps: int, seed: int) -> str:
        return f"{curve.name}, {steps} step{'s' * (steps > 1)}, seed {seed}"


def measure_seed(kind: str, seed: int, lab: Lab, results: Results) -> None:
    """All curves of one teacher."""
    design = lab.design
    teacher = lab.teacher(kind, seed)

    @functools.cache
    def reference(clipped: bool) -> np.ndarray | None:
        how = clipped, design.reference_steps, design.compared
        return finished(draw(teacher, teacher.params, *how))

    for curve in curves(kind):
        networks = dict.fromkeys(design.drawn_steps, teacher.params)
        if curve.chain is not None:
            networks = lab.students(curve.chain, teacher, seed)
        for steps in curve.steps(design):
            if results.get(curve, steps, seed) is None:
                how = curve.clipped, steps, design.samples
                pixels = finished(draw(teacher, networks[steps], *how))
                row = measured(pixels, reference(curve.clipped))
                results.put(curve, steps, seed, row)
                print(f"{curve.name}, {steps}, seed {seed}: {row}", file=sys.stderr, flush=True)


# --- Tables ----------------------------------------------------------------------------------

TABLES = {
    "fd_features": ("FD feat", 2),
    "rmse_to_teacher": ("same-noise RMSE to the own teacher's 256 steps", 3),
    "judge_accuracy": ("judge accuracy", 3),
}


def tables(results: Results, options: Options) -> Iterator[str]:
    """Markdown, one after the other, each under a line that says what it is."""
    design = options.design
    for key, (heading, decimals) in TABLES.items():
        lines = [["", *(f"{n} step{'s' * (n > 1)}" for n in design.drawn_steps)]]
        for curve in (curve for kind in options.kinds for curve in curves(kind)):
            found = [[results.get(curve, n, seed) for seed in design.seeds]
                     for n in design.drawn_steps]  # fmt: skip
            if any(row for rows in found for row in rows):
                lines.append([curve.name, *(cell(rows, key, decimals) for rows in found)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * max(3, width) for width in widths])
        rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
        yield "\n".join([heading, "", *rows])


def cell(rows: list[Row | None], key: str, decimals: int) -> str:
    """Mean ± spread over the seeds; – where nothing was or could be measured."""
    known = [row for row in rows if row is not None]
    if bad := sum("diverged" in row for row in known):
        return "diverged" if bad == len(known) else f"diverged ({bad} of {len(known)})"
    values = [row[key] for row in known if key in row]
    if not values:
        return "–"
    text = f"{np.mean(values):.{decimals}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{decimals}f}"


def main(options: Options) -> None:
    design, results = options.design, Results(options.results, options.design)
    if options.measure:
        lab = Lab(design, options.workdir)
        for seed in design.seeds:
            for kind in options.kinds:
                measure_seed(kind, seed, lab, results)
    print(f"{design.samples} samples; ± is the spread over {len(design.seeds)} seeds")
    for table in tables(results, options):
        print(f"\n{table}")


if __name__ == "__main__":
    options = tyro.cli(Options)
    jax.config.update("jax_compilation_cache_dir", str(options.workdir / "programs"))
    main(options)
