"""`jaxsd evaluate MODEL`: a model of digits against the 450 held-out scans, beside controls."""

import dataclasses
import json
import math
from typing import Any

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure a model of digits against the held-out scans."""

    model: tyro.conf.Positional[str] = "digits-ddpm"
    """A model that ships (digits, digits-ddpm), or a folder."""
    count: int | None = None
    """Pictures for each sampling seed; by default 2000 scans or 1000 coloured pictures."""
    sampling_seeds: int = 3
    """How many times to draw them: the spread is over these."""
    steps: int = 50
    sampler: str = "ddim"
    guidance_scale: tuple[float, ...] | None = None
    """One or several; by default 1 for scans and 3 for coloured pictures."""
    controls: bool = True
    """Also the real scans, per-class Gaussian, class means, ... measured by the same code."""
    negative_prompts: int = 0
    """With a text model: also draw this many of "a seven" for each colour as negative prompt."""
    json: bool = False
    """Print JSON instead of a table."""


def run(options: Options) -> dict[str, Any]:
    """Every row of the report: figures, or (mean, standard deviation over sampling seeds)."""
    from jaxsd import components, pipeline
    from jaxsd.evaluation import models, report

    pipe = pipeline.load(options.model)
    pixel = models.is_pixel_model(pipe)
    how = models.Sampling(
        count=options.count or (2000 if pixel else 1000),
        steps=options.steps,
        sampler=options.sampler,
        sampling_seeds=tuple(range(options.sampling_seeds)),
    )
    rows: dict[str, Any] = {}
    for scale in options.guidance_scale or ((1.0,) if pixel else (3.0,)):
        how = dataclasses.replace(how, guidance_scale=scale)
        rows[f"{options.model}, guidance {scale:g}"] = models.evaluate_model(pipe, how)
    if options.controls:
        rows |= (report.controls if pixel else report.picture_controls)(count=how.count)
    result: dict[str, Any] = {"sampling": dataclasses.asdict(how), "rows": rows}
    clip = components.find(options.model) / "clip"
    if clip.is_dir() and pipe.tokenizer is not None:
        result["zero_shot"] = models.zero_shot(components.load_clip(clip), pipe.tokenizer)
    if options.negative_prompts and not pixel:
        how = dataclasses.replace(how, count=options.negative_prompts)
        result["negative_prompts"] = models.negative_prompt_shares(pipe, how)
    return result


def main(argv: list[str] | None = None) -> None:
    """Parses the options of `jaxsd evaluate` and prints the report."""
    from jaxsd.evaluation import report

    options = tyro.cli(Options, prog="jaxsd evaluate", args=argv)
    result = run(options)
    if options.json:
        print(json.dumps(_no_nan(result), indent=2))
        return
    how = result["sampling"]
    print(
        f"{how['count']} samples for each of {len(how['sampling_seeds'])} sampling seeds, "
        f"{how['steps']} {how['sampler']} steps; ± is the spread over sampling seeds\n"
    )
    print(report.format_table(result["rows"]))
    if shot := result.get("zero_shot"):
        said = ", ".join(f"{name} {share:.1%}" for name, share in shot.items())
        print(f"\nCLIP, zero-shot on the held-out scans: {said}")
    if shares := result.get("negative_prompts"):
        print('\n"a seven" with a colour as negative prompt: the share of strokes in that colour\n')
        print("| negative prompt | without | with | still a seven |\n| --- | --- | --- | --- |")
        for colour, share in shares.items():
            before, after = (f"{share[k]:.1%}" for k in ("without", "with"))
            print(f"| {colour} | {before} | {after} | {share['digit']:.1%} |".replace("nan%", "–"))


def _no_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be measured becomes null."""
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
