"""`jaxsd evaluate MODEL`: what a model draws against real pictures, in figures.

A model of digits is held to the 450 held-out scans, beside controls. With --data any model is held
to a folder of pictures: FID and KID on Inception's features, and CLIP score. With --teacher it is
also compared with what that draws from the same noise.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure a model against real pictures: digits against the held-out scans, others by --data.

    Of several --steps, --sampler and --guidance-scale every combination is a row. Distances need
    equal counts to be compared, and the same pictures and features.
    """

    model: tyro.conf.Positional[str] = "digits-ddpm"
    """A model that ships (digits, digits-ddpm), a folder, a single file or a Hub id."""
    count: int | None = None
    """Pictures for each sampling seed; by default 2000 scans, 1000 coloured pictures or, with
    --data, as many as there are real ones."""
    sampling_seeds: int | None = None
    """How many times to draw them: the spread is over these. By default 3, or 1 with --data."""
    steps: tuple[int, ...] | None = None
    """One or several; by default what the model was distilled for, else 50."""
    sampler: tuple[str, ...] | None = None
    """One or several; by default ddim, or a consistency model's own."""
    guidance_scale: tuple[float, ...] | None = None
    """One or several; by default what the model was distilled for, else 1 for scans, 3 for
    coloured pictures and 7.5 with --data."""
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    """How the steps are spread over the schedule; by default as the model says. A model that was
    not distilled is best at few steps with trailing."""
    teacher: str | None = None
    """A model of the same kind, to measure the distance to what it draws from the same noise; not
    clipped on the way, since that is what students are taught."""
    teacher_steps: int | None = None
    """Of DDIM; by default 256, or a quarter of the schedule's timesteps, which that divides."""
    teacher_guidance: float | None = None
    """By default each row's --guidance-scale."""
    controls: bool = True
    """Also the real scans, per-class Gaussian, class means, ... measured by the same code; with
    --data the CLIP score of the real pictures."""
    negative_prompts: int = 0
    """With a text model of digits: also draw this many of "a seven" for each colour as negative
    prompt."""
    data: str | None = None
    """Real pictures with captions, which are the prompts: a folder, tar shards, Parquet, ..."""
    caption_column: str | None = None
    """The column of captions; by default text, caption, prompt, or the only one there is."""
    holdout: float = 0.0
    """Of --data, only what a training with this --holdout never sees; 0 for all. Where folders or
    shards are named after splits, always validation or else test."""
    inception: Path | None = None
    """Weights for FID and KID: pytorch-fid's pt_inception-2015-12-05-6726825d.pth."""
    statistics: Path | None = None
    """A file (.npz) of the real pictures' features: read if it is there (pytorch-fid's will do),
    else written."""
    clip: Path | None = None
    """A CLIPModel's folder for the CLIP score, with its tokenizer and preprocessor_config.json."""
    batch_size: int | None = None
    """Pictures at a time; by default 100 digits, or 8 with --data."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self):
        for name in ("count", "sampling_seeds", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise JaxsdError(f"{name} must be at least 1, not {value}")


def run(options: Options) -> dict[str, Any]:
    """Every row of the report: figures, or (mean, standard deviation over sampling seeds)."""
    from jaxsd import pipeline

    for name in ("teacher_steps", "teacher_guidance"):
        if getattr(options, name) is not None and options.teacher is None:
            raise JaxsdError(f"--{name.replace('_', '-')} needs --teacher, a model to compare with")
    pipe = pipeline.load(options.model)
    if options.spacing:
        pipe.schedule = dataclasses.replace(pipe.schedule, timestep_spacing=options.spacing)
    if options.data is not None:
        return _against_pictures(pipe, options)
    pictures = ("inception", "statistics", "clip", "holdout", "caption_column")
    if needless := [name.replace("_", "-") for name in pictures if getattr(options, name)]:
        raise JaxsdError(f"--{needless[0]} needs --data, real pictures to measure against")
    return _digits(pipe, options)


def _against_pictures(pipe: Any, options: Options) -> dict[str, Any]:
    from jaxsd.evaluation import clip_score, features, real, samples

    if options.inception is None and options.clip is None:
        raise JaxsdError("--data needs --inception for FID and KID, or --clip for the CLIP score")
    if options.statistics is not None and options.inception is None:
        raise JaxsdError("--statistics are of Inception's features: give --inception, too")
    chosen = real.open_real(
        str(options.data), pipe.default_size, options.caption_column, options.holdout
    )
    clip = None if options.clip is None else clip_score.load_judge(options.clip)
    count = options.count or len(chosen)
    wanted = _rows(pipe, options, count, seeds=1, batch_size=8, scale=7.5)
    prompts = chosen.captions(count)
    with _teacher(pipe, options) as teacher:
        by = samples.Measures(clip=clip)
        if options.inception is not None:
            known = features.inception(options.inception)
            counts = range(len(chosen) + 1)  # some may be broken
            reference = samples.reference(chosen.batches, known, options.statistics, counts)
            by = dataclasses.replace(by, features=known, reference=reference)
        rows: dict[str, Any] = {
            name: samples.evaluate_model(pipe, prompts, how, by, teacher)
            for name, how in wanted.items()
        }
        result = _report(options, wanted, rows, teacher)
    if options.controls and clip is not None:
        rows["real pictures"] = chosen.score(clip)
    return result | {"real": len(chosen), "skipped": chosen.skipped}


def _digits(pipe: Any, options: Options) -> dict[str, Any]:
    from jaxsd import components
    from jaxsd.evaluation import models, report

    pixel = models.is_pixel_model(pipe)
    count, scale = (2000, 1.0) if pixel else (1000, 3.0)
    count = options.count or count
    wanted = _rows(pipe, options, count, seeds=3, batch_size=100, scale=scale)
    negative = None
    if options.negative_prompts and not pixel:  # first, for a student without them is refused
        how = dataclasses.replace([*wanted.values()][-1], count=options.negative_prompts)
        negative = models.negative_prompt_shares(pipe, how)
    with _teacher(pipe, options) as teacher:
        rows: dict[str, Any] = {
            name: models.evaluate_model(pipe, how, teacher) for name, how in wanted.items()
        }
        result = _report(options, wanted, rows, teacher)
    if options.controls:
        rows |= (report.controls if pixel else report.picture_controls)(count=count)
    clip = components.find(options.model) / "clip"
    if clip.is_dir() and pipe.tokenizer is not None:
        result["zero_shot"] = models.zero_shot(components.load_clip(clip), pipe.tokenizer)
    if negative is not None:
        result["negative_prompts"] = negative
    return result


def _rows(
    pipe: Any, options: Options, count: int, seeds: int, batch_size: int, scale: float
) -> dict[str, Any]:
    """How each row is drawn, by its name: what cannot be is refused before any work."""
    from jaxsd.evaluation.drawing import Sampling, usual_sampler, usual_scale, usual_steps

    steps = options.steps or (usual_steps(pipe),)
    names = options.sampler or (usual_sampler(pipe),)
    scales = options.guidance_scale or (usual_scale(pipe, scale),)
    several = len(steps) * len(names) > 1
    found = {}
    for name, number, guidance in itertools.product(names, steps, scales):
        pipe.plan_steps(name, number)
        suffix = f", {number} {name} step{'s' * (number > 1)}" if several else ""
        found[f"{options.model}, guidance {guidance:g}{suffix}"] = Sampling(
            count=count,
            steps=number,
            sampler=name,
            guidance_scale=guidance,
            sampling_seeds=tuple(range(options.sampling_seeds or seeds)),
            batch_size=options.batch_size or batch_size,
        )
    return found


@contextlib.contextmanager
def _teacher(pipe: Any, options: Options) -> Iterator[Any]:
    """The teacher, if there is one, whose pictures are kept while this lasts."""
    from jaxsd.evaluation.same_noise import load_teacher

    if options.teacher is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="jaxsd-teacher-") as folder:
        known = options.teacher_steps, options.teacher_guidance
        yield load_teacher(options.teacher, pipe, Path(folder), *known)


def _report(options: Options, wanted: dict[str, Any], rows: dict, teacher: Any) -> dict[str, Any]:
    """How it was measured, with lists where rows differ, and the rows."""
    hows = [dataclasses.asdict(how) for how in wanted.values()]
    sampling = hows[-1]
    for name in ("steps", "sampler", "guidance_scale"):
        values = [*dict.fromkeys(how[name] for how in hows)]
        sampling[name] = values if len(values) > 1 else values[0]
    result: dict[str, Any] = {"sampling": sampling, "rows": rows}
    if teacher is not None:
        told = {"model": options.teacher, "steps": teacher.steps}
        result["teacher"] = told | {"guidance_scale": teacher.guidance_scale}
    return result


def main(argv: list[str] | None = None) -> None:
    """Parses the options of `jaxsd evaluate` and prints the report."""
    from jaxsd.evaluation import report

    options = tyro.cli(Options, prog="jaxsd evaluate", args=argv)
    result = run(options)
    if options.json:
        print(json.dumps(_no_nan(result), indent=2))
        return
    how, real = result["sampling"], result.get("real")
    print(
        f"{how['count']} samples for each of {len(how['sampling_seeds'])} sampling seeds, "
        f"{_listed(how['steps'])} {_listed(how['sampler'])} steps; ± is the spread over sampling "
        f"seeds; {how['batch_size']} at a time"
    )
    if teacher := result.get("teacher"):
        print(
            f"RMSE to {teacher['model']}, {teacher['steps']} DDIM steps from the same noise: of "
            "what is drawn, in [-1, 1], before it is rounded"
        )
    if real is not None:
        # None may have been looked at: their features may come from a file
        broken = len(result["skipped"])
        told = f", {broken} of which cannot be read" if broken else ""
        print(f"against {real} real pictures{told}")
    print("\n" + report.format_table(result["rows"]))
    if shot := result.get("zero_shot"):
        said = ", ".join(f"{name} {share:.1%}" for name, share in shot.items())
        print(f"\nCLIP, zero-shot on the held-out scans: {said}")
    if shares := result.get("negative_prompts"):
        print('\n"a seven" with a colour as negative prompt: the share of strokes in that colour\n')
        print("| negative prompt | without | with | still a seven |\n| --- | --- | --- | --- |")
        for colour, share in shares.items():
            before, after = (f"{share[k]:.1%}" for k in ("without", "with"))
            print(f"| {colour} | {before} | {after} | {share['digit']:.1%} |".replace("nan%", "–"))


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _no_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be measured becomes null."""
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
