"""`jaxsd compare MODEL`: a model here and in PyTorch, block by block and step by step."""

import dataclasses
import json
import sys
from typing import Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """Hold a model's numbers against PyTorch's (needs pip install "jaxsd[torch]").

    Exits with 1, and names the first block that departs, if an error is above its tolerance.
    """

    model: tyro.conf.Positional[str]
    """One that ships, a diffusers folder (or one of its components), a single file, a Hub id."""
    reference: str | None = None
    """What PyTorch reads instead: for a model that was converted, exported or changed."""
    variant: str | None = None
    """Which files of a folder that holds several, such as fp16."""
    family: str | None = None
    """Of a single file, if it cannot be told."""
    config: str | None = None
    """Of a single file: a diffusers folder with its configs."""
    tokenizer: str | None = None
    """Of a single file: a folder or a Hub id with its vocabulary."""
    components: tuple[str, ...] | None = None
    """Such as unet vae text_encoder; by default all."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    layers: bool = False
    """Compare every single layer, not only blocks: several times the memory."""
    trajectory: bool = True
    """Also sample with both, from the same noise, and compare every step."""
    steps: int = 4
    sampler: str = "ddim"
    """One that draws no noise on the way."""
    guidance_scale: float = 7.5
    height: int | None = None
    """In pixels; by default what the model was trained on."""
    width: int | None = None
    tolerance: float = 1e-4
    """Largest relative error in float32 while the model runs."""
    block_tolerance: float = 2e-5
    """Largest relative error in float32 of one block that is fed PyTorch's own values."""
    bfloat16_ratio: float = 2.0
    """Largest distance to float32 in bfloat16, over PyTorch's own (and 2^-8 more)."""
    torch_device: str = "cpu"
    """Where PyTorch computes: cpu or cuda."""
    json: bool = False
    """Print JSON instead of tables."""


def run(options: Options) -> Any:
    """The report of the comparison (`jaxsd.compare.Report`)."""
    from tqdm import tqdm

    from jaxsd import compare
    from jaxsd.compare.trajectory import Sampled

    single_file = {name: getattr(options, name) for name in ("family", "config", "tokenizer")}
    sampled = Sampled(options.steps, options.sampler, options.guidance_scale)
    with tqdm(desc="compare", unit=" stages", leave=False, disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_description(stage)
            bar.update()

        return compare.compare(
            options.model,
            reference_model=options.reference,
            variant=options.variant,
            components=options.components,
            dtypes=options.dtypes,
            height=options.height,
            width=options.width,
            layers=options.layers,
            sampled=sampled if options.trajectory else None,
            torch_device=options.torch_device,
            tolerance=compare.Tolerance(
                options.tolerance, options.block_tolerance, options.bfloat16_ratio
            ),
            progress=progress,
            **{name: value for name, value in single_file.items() if value is not None},
        )


def main(argv: list[str] | None = None) -> None:
    """Parses the options of `jaxsd compare`, prints the report, exits with 1 if numbers depart."""
    options = tyro.cli(Options, prog="jaxsd compare", args=argv)
    report = run(options)
    print(json.dumps(report.to_json(), indent=2) if options.json else report.to_text())
    if not report.agrees:
        sys.exit(1)
