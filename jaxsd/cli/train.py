"""`train.py RECIPE`: options as dataclasses, each of which builds its objective and its data."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsd.cli.recipes.clip import CLIP
from jaxsd.cli.recipes.common import Common, MakeBatches
from jaxsd.cli.recipes.consistency import Consistency
from jaxsd.cli.recipes.ddpm import DDPM
from jaxsd.cli.recipes.dreambooth import DreamBooth
from jaxsd.cli.recipes.encode import Encode
from jaxsd.cli.recipes.guided import Guided
from jaxsd.cli.recipes.imagic import Imagic
from jaxsd.cli.recipes.lora import LoRA
from jaxsd.cli.recipes.progressive import Progressive
from jaxsd.cli.recipes.text_to_image import TextToImage
from jaxsd.cli.recipes.textual_inversion import TextualInversion
from jaxsd.cli.recipes.vae import VAE
from jaxsd.cli.together import NAMES

Recipe = (
    Annotated[DDPM, tyro.conf.subcommand("ddpm", prefix_name=False)]
    | Annotated[VAE, tyro.conf.subcommand("vae", prefix_name=False)]
    | Annotated[CLIP, tyro.conf.subcommand("clip", prefix_name=False)]
    | Annotated[TextToImage, tyro.conf.subcommand("text-to-image", prefix_name=False)]
    | Annotated[Progressive, tyro.conf.subcommand("progressive", prefix_name=False)]
    | Annotated[Guided, tyro.conf.subcommand("guided", prefix_name=False)]
    | Annotated[Consistency, tyro.conf.subcommand("consistency", prefix_name=False)]
    | Annotated[LoRA, tyro.conf.subcommand("lora", prefix_name=False)]
    | Annotated[DreamBooth, tyro.conf.subcommand("dreambooth", prefix_name=False)]
    | Annotated[TextualInversion, tyro.conf.subcommand("textual-inversion", prefix_name=False)]
    | Annotated[Imagic, tyro.conf.subcommand("imagic", prefix_name=False)]
    | Annotated[Encode, tyro.conf.subcommand("encode", prefix_name=False)]
)


def run(recipe: Common) -> None:
    """Trains, or with `dry_run` says what would be trained; each stage of a recipe in its turn."""
    recipe.meet()
    stages = recipe.stages()
    if recipe.dry_run:
        if len(stages) > 1:
            print(f"{'stages':20} {', '.join(stage.workdir.name for stage in stages)}; the first:")
        with tempfile.TemporaryDirectory() as scratch:  # a CLIP recipe writes its tokenizer
            _describe(dataclasses.replace(stages[0], workdir=Path(scratch)), _config(stages[0]))
        return
    for stage in stages:
        _train(stage, recipe.workdir, stages)
    recipe.finish()


def _config(recipe: Common) -> dict[str, Any]:
    """What decides the result."""
    config = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(recipe).items()
        if name not in ("workdir", "dry_run", *NAMES)
    }
    return {"recipe": type(recipe).__name__, **config}


def _train(recipe: Common, top: Path, stages: list[Common]) -> None:
    """One of the stages of the recipe whose workdir is `top`."""
    from jaxsd import processes, run_report, training

    config, one_of_several = _config(recipe), len(stages) > 1
    training.check_workdir(recipe.workdir, config, recipe)  # building writes into it
    last = recipe.workdir / "model" / recipe.made
    if not (one_of_several and processes.first(last.is_file)):
        recipe.prepare()
        objective, make_batches = _build(recipe)
        told = recipe.evaluators(objective)
        if one_of_several and recipe.report:
            folders = [stage.workdir for stage in stages]
            processes.first(lambda: run_report.write_stages(top, folders))
        training.train(objective, make_batches, recipe, recipe.workdir, config, evaluators=told)
    if processes.is_first():
        print(f"{recipe.workdir / 'model'}", flush=True)


def _build(recipe: Common) -> tuple[Any, MakeBatches]:
    """What a training starts from would stay whole on the first device throughout: not there."""
    from jaxsd import sharding

    with sharding.on_host():
        return recipe.build()


def _describe(recipe: Common, config: dict[str, Any]) -> None:
    import jax

    from jaxsd import processes, training
    from jaxsd.training import placement
    from jaxsd.training.step import initial_params

    objective, mesh = _build(recipe)[0], placement.make_mesh(recipe)
    if not processes.is_first():
        return
    for name, value in config.items():
        print(f"{name:20} {value}")
    trained, _ = jax.eval_shape(lambda: initial_params(objective, recipe))
    print(f"{'parameters':20} {objective.net.size:,}")
    print(f"{'trained':20} {sum(array.size for array in trained.values()):,}")
    sizes = training.state_bytes(objective, recipe)
    for kind, size in [*sizes.items(), ("together", sum(sizes.values()))]:
        print(f"{'memory: ' + kind:20} {size / 2**20:,.1f} MiB")
    print(f"{'devices':20} {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"{'mesh':20} {' x '.join(f'{name} {size}' for name, size in mesh.shape.items())}")
    rows = placement.describe(objective, recipe, mesh)
    for row in rows:
        whole, piece = row.whole / 2**20, row.piece / 2**20
        print(
            f"{'split: ' + row.axes:20} {whole:,.1f} MiB, {piece:,.1f} on each device: "
            f"{row.arrays} arrays such as {row.example}"
        )
    held = sum(row.piece for row in rows) / 2**20
    print(f"{'state':20} {held:,.1f} MiB on each device")


def main(argv: list[str] | None = None) -> None:
    """Parses the options of `train.py` and runs the recipe."""
    recipe: Any = tyro.cli(Recipe, prog="train.py", description=__doc__, args=argv)  # pyright: ignore
    if isinstance(recipe, Encode):
        recipe.run()
    else:
        run(recipe)
